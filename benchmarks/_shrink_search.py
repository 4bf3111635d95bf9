"""The searching part of benchmarks/shrink.py: times that are met, and what earlier searches are worth."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from _common import bar, table
from fanbu.catalogue import method
from fanbu.deploy.runner import milliseconds_of, open_runner
from fanbu.domain import Domain
from fanbu.merging.gram import own_texts
from fanbu.model import Model, open_model
from fanbu.types import Context

TRIALS = 24
SHORT = {"finalists": 1, "augment": 0, "train": {"epochs": 1, "max_steps": 1}}  # trials are what is looked at


def _made(name: str, out: Path, teacher: Model, domain: Domain, context: Context, **arguments: Any) -> Model:
    if not (out / "fanbu.json").exists():
        scratch = out.with_name(f"{out.name}.scratch")
        scratch.mkdir(parents=True, exist_ok=True)
        method(name, "shrink").shrink(teacher, domain, out, replace(context, scratch=scratch), **arguments)
        shutil.rmtree(scratch)
    return open_model(out)


def _took(model: Model, domain: Domain, context: Context) -> float:
    return milliseconds_of(open_runner(model.path, context), own_texts(domain, 32), 1)


def _beside(made: Model, large: Model, domain: Domain, context: Context) -> float:
    """Share of the large one's time: the machine changes its speed, so both are measured in turns, five times."""
    return median(_took(made, domain, context) / _took(large, domain, context) for _ in range(5))


def searching(
    large: Mapping[str, tuple[Model, Domain]], most: int, work: Path, context: Context
) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Table, values and bars. Budgets of time are measured again afterwards, in runners of their own."""
    context = replace(context, threads=1)
    rows = [["milliseconds, batch 1", "large", "asked for", "by", "large, as it found", "afterwards", "of the budget"]]
    off = []
    for share, (name, (teacher, domain)) in zip((0.6, 0.35), large.items(), strict=False):
        whole = median(_took(teacher, domain, context) for _ in range(9))
        for way in ("width", "search"):
            out = work / "timed" / f"{name}-{way}-{share}"
            shutil.rmtree(out, ignore_errors=True)  # a time of another day is no measure
            asked = {"milliseconds": share * whole}
            more = {**asked, "neurons": 0.02, "channels": 0.15, "train": None}
            if way == "search":
                more = {"budget": asked, **SHORT, "trials": 10}
            made = _made(way, out, teacher, domain, context, **more)
            known = made.manifest["metrics"]["whole_milliseconds"]  # at the speed that the machine had then
            took = known * _beside(made, teacher, domain, context)
            off.append(took / (share * whole))
            cells = [f"{v:.2f}" for v in (whole, share * whole, known, took, off[-1])]
            rows.append([name, *cells[:2], way, *cells[2:]])
            print(rows[-1], flush=True)
    gains, text = _warm(large, most, work, context)
    widest = max(off)
    bars = [
        bar("longest time beside the budget", f"{widest:.2f}", "<= 1.10", widest <= 1.10),
        bar("nearest to the budget, at least", f"{min(off):.2f}", ">= 0.90", min(off) >= 0.90),
    ]
    return f"{table(rows)}\n\n{text}", {"beside_budget": off, "warm": gains}, bars


def _warm(
    large: Mapping[str, tuple[Model, Domain]], most: int, work: Path, context: Context
) -> tuple[dict[str, Any], str]:
    """The best score after so many trials, cold and with the history of the other domains."""
    found: dict[str, dict[str, list[float]]] = {}
    folder = work / "searched"
    for kind in ("cold", "warm"):
        for name, (teacher, domain) in large.items():
            history = folder / f"history-{kind}-{name}"
            if kind == "warm":
                history.mkdir(parents=True, exist_ok=True)
                for other in set(large) - {name}:
                    for file in (folder / f"history-cold-{other}").glob("*.json"):
                        shutil.copyfile(file, history / file.name)
            made = _made(
                "search", folder / f"{kind}-{name}", teacher, domain, context,
                budget={"parameters": float(most)}, tokens=[4000],
                trials=TRIALS, history=str(history), **SHORT,
            )  # fmt: skip
            scores = [t["score"] for t in made.manifest["metrics"]["trials"]]
            found.setdefault(name, {})[kind] = [max(scores[:k]) for k in range(1, len(scores) + 1)]
            print(name, kind, [round(s, 3) for s in found[name][kind]], flush=True)
    rows = [["best score after", *(f"{k} trials" for k in (1, 3, 6, 12)), "all", "trials until cold's best"]]
    for name, both in found.items():
        for kind, best in both.items():
            until = next((k for k, s in enumerate(best, 1) if s >= both["cold"][-1]), None)
            cells = [f"{best[min(k, len(best)) - 1]:.3f}" for k in (1, 3, 6, 12)]
            rows.append([f"{name}, {kind}", *cells, f"{best[-1]:.3f}", str(until or f"over {len(best)}")])
    return found, table(rows)
