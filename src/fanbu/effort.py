"""How much a step of a recipe has to do: the rows that it reads, and the rows and batches that it trains on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from fanbu.catalogue import method
from fanbu.domain import Domain
from fanbu.recipe import Recipe, public_texts
from fanbu.recipe_parts import PublicTexts, Step
from fanbu.tree import given
from fanbu.types import Task, Train


def training(step: Step, way: str = "feedback") -> Train | None:
    """How a step trains; None where it does not. ``way`` is ``shrink`` or ``feedback``."""
    found = method(step.method, way).check(step.arguments).get("train")
    return found if isinstance(found, Train) else None


def taken(step: Step, feeding: Sequence[Domain]) -> int:
    """How often a step takes its way: in each inner round once for each group of its tree, twice with shrinkage. Of a
    tree that is yet to be found, as often as that may be."""
    if not step.tree:
        return step.times
    names = [d.name for d in feeding]
    found = len(given(step.tree.groups, names).groups) if step.tree.groups else 1 + (len(names) >= 4) * len(names) // 2
    return step.times * found * (2 if step.tree.shrinkage else 1)


def trained(plan: Train, rows: int) -> tuple[int, int]:
    """(batches, rows) over all epochs; stopping early may save some."""
    batches = plan.epochs * math.ceil(rows / plan.batch_size)
    most = plan.max_steps or batches
    return min(batches, most), min(plan.epochs * rows, most * plan.batch_size)


def asked(recipe: Recipe, d: Domain) -> int:
    """Probe rows that come from a domain."""
    given = recipe.probe.from_domain(d.share)
    if given == "own":
        texts = min(len(d.texts), recipe.probe.limit or len(d.texts))
    else:
        texts = recipe.probe.synthetic if given else 0
    return texts + min(texts, recipe.probe.written)


def public(recipe: Recipe, task: Task) -> list[int]:
    """Probe rows that belong to nobody, by their source."""
    return [_counted(p.model_dump_json(), task, _changed(p.path)) for p in recipe.probe.public]


def fewer_public(recipe: Recipe, task: Task, rows: Callable[[int], int]) -> Recipe:
    """The recipe with fewer probe rows that belong to nobody: ``rows(n)`` of a source's n."""
    counted = zip(recipe.probe.public, public(recipe, task), strict=True)
    less = [p.model_copy(update={"limit": rows(n)}) for p, n in counted]
    return recipe.model_copy(update={"probe": recipe.probe.model_copy(update={"public": less})})


@cache
def _counted(public: str, task: Task, changed: float) -> int:
    return len(public_texts(PublicTexts.model_validate_json(public), task))


def _changed(path: str | None) -> float:
    return Path(path).stat().st_mtime if path and Path(path).exists() else 0.0


def read_by(recipe: Recipe, step: Step, feeding: Sequence[Domain]) -> list[int]:
    """How many rows a way back reads together: the probe set or all owners' training rows; each owner's by itself where
    owners train."""
    needs = method(step.method, "feedback").needs_with(step.arguments)
    if needs.probe:
        return [sum(asked(recipe, d) for d in feeding) + sum(public(recipe, feeding[0].task))]
    rows = [len(d.train) for d in feeding]
    return rows if needs.kind == "updates" else [sum(rows)]
