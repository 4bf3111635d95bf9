"""``fanbu plan``: which ways back fit a recipe's specialists, which would, and what each will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fanbu.catalogue import method
from fanbu.doctor.overlap import overlaps, unhelpful
from fanbu.doctor.warn import warnings_of
from fanbu.doctor.ways import ways
from fanbu.domain import Domain
from fanbu.errors import FanbuError
from fanbu.model import open_model
from fanbu.plan import need_rows_here, usual
from fanbu.recipe import Recipe, load_domains
from fanbu.record import finished
from fanbu.search.costs import Cost, expected
from fanbu.search.halving import said
from fanbu.turn import Log
from fanbu.types import Progress, silent


def choices(recipe: Recipe, names: Sequence[str] = ()) -> tuple[dict[str, Any], dict[str, Domain]]:
    """Every way back (or those of these names) with its reasons, and warnings; and the domains of the next round.

    UsageError where rows are with owners elsewhere, or a name is unknown.
    """
    need_rows_here(recipe, "which ways fit")
    for name in names:
        method(name, "feedback")
    records, left = finished(Path(recipe.workspace))
    domains = load_domains(recipe, len(records) + 1, left)
    gate = recipe.gate
    warnings = [
        w if w.startswith(d.name) else f"{d.name}: {w}"
        for d in domains.values()
        for w in warnings_of(d, gate.margins.get(d.name, gate.margin), gate.confidence)
    ]
    warnings += [*overlaps(list(domains.values())), *unhelpful(records[-1] if records else None)]
    known = [way for way in ways(recipe, domains) if not names or way["name"] in names]
    return {"name": recipe.name, "model": recipe.model, "ways": known, "warnings": warnings}, domains


def _error(error: Exception) -> str:
    return str(error) if isinstance(error, FanbuError) else said(error)


def costs(
    recipe: Recipe, domains: Mapping[str, Domain], found: Mapping[str, Any], progress: Progress = silent,
    log: Log = lambda text: None,
) -> Iterator[tuple[str, dict[str, Any]]]:  # fmt: skip
    """What each way that fits will take: ``seconds``, ``peak_bytes`` and ``crossed_bytes``; or the ``error`` with which
    its trial ended."""
    steps = [usual(w["name"], recipe) for w in found["ways"] if w["fits"]]
    base = open_model(recipe.model)
    for step, cost in expected(recipe, domains, base, steps, progress, log):
        yield step.method, asdict(cost) if isinstance(cost, Cost) else {"error": _error(cost)}
