"""Tables of what every candidate does with every share of the rows, and trials that read them instead of training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fanbu.files import write_text
from fanbu.progress import log
from fanbu.recipe import Recipe
from fanbu.recipe_parts import GateSpec
from fanbu.round import evaluated
from fanbu.search.compare import BEFORE, Bench, opened, scored
from fanbu.search.costs import reads_rows
from fanbu.search.halving import Trial, rungs_of
from fanbu.types import derived_seed, silent

SHARES = (1 / 27, 1 / 9, 1 / 3, 1.0)
WHOLE = "1.000"


def measured(recipe: Recipe, work: Path, shares: Sequence[float] = SHARES) -> dict[str, Any]:
    """The table: by candidate and share its seconds and outcomes, as strings of 0 and 1 by domain. Each trial is kept
    under ``work``, so that a run that was stopped goes on."""
    bench = opened(recipe, silent, log)
    bench.by_steps = False
    rows = float(np.mean([len(d.train) for d in bench.turn.feeding]))
    found: dict[str, Any] = {
        "candidates": {}, "grows": {n: reads_rows(s) for n, s in bench.steps.items()}, "least": rungs_of(rows),
        "state": bench.state, "scale": bench.scale,
        "steps": {n: s.model_dump(mode="json") for n, s in bench.steps.items()},
    }  # fmt: skip
    for name, step in bench.steps.items():
        for share in shares if reads_rows(step) else shares[-1:]:
            kept = work / "trials" / f"{name.replace(' ', '_')}-{share:.3f}.json"
            if not kept.exists():
                log(f"== {name}, {share:.0%}")
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_text(kept, json.dumps(_one(bench, name, share)))
            found["candidates"].setdefault(name, {})[f"{share:.3f}"] = json.loads(kept.read_text())
    return found


def _one(bench: Bench, name: str, share: float) -> dict[str, Any]:
    """One trial."""
    trial = bench(name, share)
    row = bench.rows[-1]
    told: dict[str, Any] = {"seconds": trial.seconds, "score": trial.score, "changes": row["changes"]}
    for who, key in ((name, "valid"), (BEFORE, "before")):
        told[key] = {d: _bits(c.tensors["told"]) for d, c in bench.outcomes[who, share].items()}
    if share == 1:
        tested = {d.name: evaluated(bench.turn, name, bench.models[name, share], d)[0] for d in bench.turn.feeding}
        told["test"] = {d: _bits(outcomes.tensors["told"]) for d, outcomes in tested.items()}
    return told


def _bits(column: Any) -> str:
    return "".join(str(int(v)) for v in column.tolist())


def numbers(text: str) -> np.ndarray[Any, Any]:
    """Right or wrong, row by row."""
    return np.frombuffer(text.encode(), np.uint8).astype(np.float64) - 48


@dataclass
class Replay:
    """The table with its validation rows drawn anew."""

    table: Mapping[str, Any]
    seed: int

    def __call__(self, name: str, share: float) -> Trial:
        """A trial on rows that are drawn alike for all candidates."""
        told = self.table["candidates"][name][f"{share:.3f}"]
        changes = {}
        for domain, text in sorted(told["valid"].items()):
            change = numbers(text) - numbers(told["before"][domain])
            rng = np.random.default_rng(derived_seed(self.seed, domain, len(change)))
            changes[domain] = float(change[rng.integers(0, len(change), len(change))].mean())
        return Trial(name, share, scored(changes, GateSpec()), told["seconds"])


def whole_seconds(table: Mapping[str, Any]) -> dict[str, float]:
    """What each candidate takes with all rows."""
    return {name: by[WHOLE]["seconds"] for name, by in table["candidates"].items()}


def truths(table: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy of each candidate with all rows on test rows, in percent, the mean over domains."""
    return {
        name: 100 * float(np.mean([numbers(text).mean() for text in by[WHOLE]["test"].values()]))
        for name, by in table["candidates"].items()
    }
