"""Tables of what every candidate does with every share of the rows, and trials that read them instead of training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fanbu.files import write_text
from fanbu.model import Model
from fanbu.progress import log
from fanbu.recipe import Recipe
from fanbu.recipe_parts import GateSpec
from fanbu.record import COMPARED
from fanbu.round import evaluated
from fanbu.search.compare import BEFORE, Bench, judged, opened
from fanbu.search.costs import reads_rows
from fanbu.search.experience import scored
from fanbu.search.halving import Trial, rungs_of
from fanbu.types import derived_seed, digest, silent

SHARES = (1 / 27, 1 / 9, 1 / 3, 1.0)
WHOLE = "1.000"
FEWEST = 24  # rows of a domain


def measured(recipe: Recipe, work: Path, whole: bool = False) -> dict[str, Any]:
    """The table: by candidate and share its seconds and outcomes, as bits by domain (``numbers``). Each trial is kept
    under ``work``, so that a run that was stopped goes on. ``whole``: of every trial the outcomes on all test rows, so
    that validation rows may be drawn from those; and no shares of fewer than 24 rows a domain, on average."""
    bench = opened(recipe, silent, log)
    bench.by_steps = False
    rows = float(np.mean([len(d.train) for d in bench.turn.feeding]))
    found: dict[str, Any] = {
        "candidates": {}, "grows": {n: reads_rows(s) for n, s in bench.steps.items()}, "least": rungs_of(rows),
        "state": bench.state, "scale": bench.scale,
        "steps": {n: s.model_dump(mode="json") for n, s in bench.steps.items()},
    }  # fmt: skip
    if whole:
        found["before"] = _tested(bench, BEFORE, bench.incumbent)
    shares = [s for s in SHARES if s * rows >= FEWEST] if whole else SHARES
    made_of = digest([bench.incumbent.digest, *(d.digest for d in bench.turn.feeding)])[:12]
    for name, step in bench.steps.items():
        for share in shares if reads_rows(step) else shares[-1:]:
            kept = work / "outcomes" / made_of / digest(found["steps"][name])[:12] / f"{share:.3f}.json"
            if not kept.exists():
                log(f"== {name}, {share:.0%}")
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_text(kept, json.dumps(_one(bench, name, share, whole)))
            found["candidates"].setdefault(name, {})[f"{share:.3f}"] = json.loads(kept.read_text())
    return found


def _one(bench: Bench, name: str, share: float, whole: bool) -> dict[str, Any]:
    """One trial."""
    bench(name, share)
    row = bench.rows[-1]
    told: dict[str, Any] = {k: row[k] for k in ("seconds", "score", "changes", "steps")}
    if not whole:
        for who, key in ((name, "valid"), (BEFORE, "before")):
            told[key] = {d: _bits(c.tensors["told"]) for d, c in bench.outcomes[who, share].items()}
    if whole or share == 1:
        told["test"] = _tested(bench, name, bench.models[name, share])
    return told


def _tested(bench: Bench, name: str, model: Model) -> dict[str, str]:
    return {
        d.name: _bits(evaluated(bench.turn, name, model, d)[0].tensors["told"]) for d in bench.turn.feeding
    }  # fmt: skip


def told_as_comparison(told: Mapping[str, Any], workspace: Path) -> str:
    """Makes a workspace whose finished comparison this is, as `fanbu compare` leaves it; its name for `learn`."""
    (workspace / COMPARED).mkdir(parents=True, exist_ok=True)
    write_text(workspace / COMPARED / "1.json", json.dumps(told))
    return str(workspace)


def _bits(column: Any) -> str:
    """In hexadecimal, behind a one that keeps leading zeros."""
    return f"{int('1' + ''.join(str(int(v)) for v in column.tolist()), 2):x}"


def numbers(text: str) -> np.ndarray[Any, Any]:
    """Right or wrong, row by row."""
    return np.frombuffer(f"{int(text, 16):b}"[1:].encode(), np.uint8).astype(np.float64) - 48


@dataclass
class Replay:
    """The table with validation rows drawn anew: of a ``whole`` one from test rows and, with a share of the rows, as
    many of them as `fanbu compare` looks at; else from the validation rows."""

    table: Mapping[str, Any]
    seed: int
    costs: Callable[[str, float], float] | None = None  # seconds, where none are given

    def __call__(self, name: str, share: float) -> Trial:
        """A trial on rows that are drawn alike for all candidates."""
        told, whole = self.table["candidates"][name][f"{share:.3f}"], "before" in self.table
        changes = {}
        for domain, text in sorted(told["test" if whole else "valid"].items()):
            change = numbers(text) - numbers((self.table if whole else told)["before"][domain])
            rng = np.random.default_rng(derived_seed(self.seed, domain, len(change)))
            drawn = rng.integers(0, len(change), len(change))
            changes[domain] = float(change[drawn[: judged(share, len(drawn))] if whole else drawn].mean())
        spent = self.costs(name, share) if self.costs else told["seconds"]
        return Trial(name, share, scored(changes, GateSpec()), spent)


def whole_seconds(table: Mapping[str, Any]) -> dict[str, float]:
    """What each candidate takes with all rows."""
    return {name: by[WHOLE]["seconds"] for name, by in table["candidates"].items()}


def truths(table: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy of each candidate with all rows on test rows, in percent, the mean over domains."""
    return {
        name: 100 * float(np.mean([numbers(text).mean() for text in by[WHOLE]["test"].values()]))
        for name, by in table["candidates"].items()
    }
