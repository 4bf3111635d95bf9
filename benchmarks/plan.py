"""What `fanbu plan` says a way back takes, beside what it takes: seconds and peak memory, way by way, in one run.

Domains of real texts, specialists grown from the probed MiniLM encoder as a round grows them; for ways that teach an
owner who has texts and no labels, another owner of the first domain's industry has its validation texts. Each way is
first tried by `fanbu plan` on a few rows, and then taken with all rows, in a process of its own, as a round would.
Federated ways are taken twice over (inner rounds). Of a way that takes less than a minute, loading libraries, which a
round has done by then, and what a disk does meanwhile are much: it is taken three times more, and their median says.

Run: python benchmarks/plan.py [--quick] [--data DIR] [--work DIR] [--ways NAME ...]. Six domains, at most 600 training
rows each; --quick: three domains and 300 rows.
"""

from __future__ import annotations

import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _outcomes import BASE, usable
from fanbu.catalogue import method
from fanbu.doctor.ways import ways
from fanbu.domain import Specialist
from fanbu.feeding import feed
from fanbu.files import write_text
from fanbu.ledger import Workspace
from fanbu.model import open_model
from fanbu.progress import log
from fanbu.recipe import Recipe, load_domains, load_recipe
from fanbu.recipe_parts import Step
from fanbu.round import grow, raise_incumbent
from fanbu.search.costs import Cost, expected
from fanbu.turn import start

SECONDS, MEMORY = 1.5, 1.3  # factors within which a prediction holds
SOON, AGAIN = 60.0, 3  # a way that took fewer seconds is taken so many times more


def recipe_of(data: Path, work: Path, count: int, rows: int, target: bool = False) -> Recipe:
    """All domains in one place, with one thread. ``target``: in the industry of the first one another owner has texts
    and no labels (the validation texts)."""
    domains = {
        name: {
            **{s: str(folder / f"{s}.jsonl") for s in ("train", "valid", "test")},
            "limit": {"train": rows, "valid": 200, "test": 50},
        }
        for name, folder in list(usable(text_domains(data)).items())[:count]
    }
    guards = {}
    if target:
        name, first = next(iter(domains.items()))
        domains = {f"{name}@one" if n == name else n: spec for n, spec in domains.items()}
        guards[f"{name}@other"] = {
            "test": first["test"], "unlabelled": first["valid"], "limit": {"unlabelled": rows, "test": 50}
        }  # fmt: skip
    return load_recipe({
        "fanbu": 1, "name": "plan", "model": BASE, "workspace": str(work), "threads": 1, "device": "cpu",
        "precision": "fp32", "max_length": 64, "domains": domains, "guards": guards, "feedback": {"method": "distill"},
        "shrink": [{"method": "finetune", "train": {"epochs": 1, "lr": 2e-4}}],
    })  # fmt: skip


def taken(recipe: Recipe, step: Step) -> dict[str, float]:
    """Seconds, peak of memory and bytes of one way with all rows; in a process of its own."""
    import torch

    torch.set_num_threads(1)
    turn = start(recipe)
    incumbent = raise_incumbent(turn)
    specialists = [Specialist(grow(turn, incumbent, d), d, incumbent) for d in turn.feeding]

    def once() -> Cost:
        with TemporaryDirectory(dir=turn.workspace.root) as folder:  # nothing of another way is used again
            watched = replace(turn, workspace=Workspace(Path(folder)), costs=[], crossed={})
            feed(watched, step, specialists, incumbent)
        crossed = sum(c["bytes"] for sent in watched.crossed.values() for c in sent.values())
        costs = watched.costs
        return Cost(sum(c["seconds"] for c in costs), max(c["peak_bytes"] for c in costs), crossed)

    first = once()
    again = [once() for _ in range(AGAIN)] if first.seconds < SOON else [first]
    return asdict(sorted(again, key=lambda cost: cost.seconds)[len(again) // 2])


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--ways", nargs="+", default=None, help="these alone")
    args = flags.parse_args()
    count, rows = (3, 300) if args.quick else (6, 600)
    name = "plan-quick" if args.quick else "plan"
    found: dict[str, Any] = {}
    failed: list[str] = []
    for target in (False, True):
        recipe = recipe_of(args.data, args.work / (f"{name}-target" if target else name), count, rows, target)
        domains = load_domains(recipe)
        fitting = [w["name"] for w in ways(recipe, domains) if w["fits"] and w["name"] in (args.ways or [w["name"]])]
        steps = [
            Step(method=w, times=2 if method(w, "feedback").needs.kind == "updates" else 1)
            for w in fitting if method(w, "feedback").needs.target == target
        ]  # fmt: skip
        for step, cost in expected(recipe, domains, open_model(recipe.model), steps, log=log):
            if isinstance(cost, Cost):
                found[step.method] = {"told": asdict(cost), "took": took(recipe, step)}
            else:
                log(f"{step.method}: {cost}")
                failed.append(step.method)
    return report(name, found, failed, f"{count} domains, at most {rows} training rows each; one thread")


def took(recipe: Recipe, step: Step) -> dict[str, float]:
    """What a way takes, measured once, right after it was told: machines are shared."""
    kept = Path(recipe.workspace) / "measured" / f"{step.method}.json"
    if not kept.exists():
        log(f"== {step.method}")
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps(pool.submit(taken, recipe, step).result()))
    found: dict[str, float] = json.loads(kept.read_text())
    return found


def report(name: str, found: dict[str, Any], failed: list[str], what: str) -> int:
    """The table, and how many predictions hold."""

    def ratio(way: str, key: str) -> float:
        return float(found[way]["told"][key]) / max(float(found[way]["took"][key]), 1e-9)

    heading = ["way back", "seconds told", "took", "ratio", "GB told", "took", "ratio", "MB told", "took"]
    lines = [heading]
    for way, one in sorted(found.items(), key=lambda item: item[1]["took"]["seconds"]):
        told, took = one["told"], one["took"]
        lines.append([
            way, f"{told['seconds']:.1f}", f"{took['seconds']:.1f}", f"{ratio(way, 'seconds'):.2f}",
            f"{told['peak_bytes'] / 1e9:.2f}", f"{took['peak_bytes'] / 1e9:.2f}", f"{ratio(way, 'peak_bytes'):.2f}",
            f"{told['crossed_bytes'] / 1e6:.2f}", f"{took['crossed_bytes'] / 1e6:.2f}",
        ])  # fmt: skip
    text = f"{table(lines)}\n\n{what}"
    print(text, flush=True)
    bars = []
    for key, factor in (("seconds", SECONDS), ("peak_bytes", MEMORY)):
        off = [*(way for way in found if not 1 / factor <= ratio(way, key) <= factor), *failed]
        count = len(found) + len(failed)
        got = f"{count - len(off)} of {count}" + (f"; not {', '.join(off)}" if off else "")
        bars.append(bar(f"{key} within a factor of {factor}", got, "every way", bool(count) and not off))
    return finish(name, text, found, bars)


if __name__ == "__main__":
    sys.exit(main())
