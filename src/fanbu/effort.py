"""How much a step of a recipe has to do: the rows that it reads, and the rows and batches that it trains on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fanbu.catalogue import method
from fanbu.domain import Domain
from fanbu.recipe import Recipe
from fanbu.recipe_parts import Step
from fanbu.tree import given
from fanbu.types import Train


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


def public(recipe: Recipe) -> int:
    """Probe rows that belong to nobody, about."""
    return sum(p.limit or 1000 for p in recipe.probe.public)


def read_by(recipe: Recipe, step: Step, feeding: Sequence[Domain]) -> list[int]:
    """How many rows a way back reads together: the probe set or all owners' training rows; each owner's by itself where
    owners train."""
    needs = method(step.method, "feedback").needs_with(step.arguments)
    if needs.probe:
        return [sum(asked(recipe, d) for d in feeding) + public(recipe)]
    rows = [len(d.train) for d in feeding]
    return rows if needs.kind == "updates" else [sum(rows)]
