"""Owners side by side: eight text domains shrink and contribute, one after the other, in two processes, and on Ray.

Each owner fine-tunes the probed base and answers the probe set (`finetune`, `distill`), with one thread. Workers are
started before the clock is; what starting them took is printed beside. Processes and Ray take turns, twice; the faster
run of each counts.

Run: python benchmarks/transport.py [--quick] [--data DIR] [--work DIR]. At most 600 rows a domain; --quick: 150.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _outcomes import usable
from _specialists import limited, made, probed
from fanbu.catalogue import method
from fanbu.domain import Specialist
from fanbu.feeding import contribute
from fanbu.model import Model, open_model
from fanbu.progress import log
from fanbu.recipe import load_recipe
from fanbu.round import bear
from fanbu.transport import side_by_side
from fanbu.turn import open_turn
from fanbu.types import Context

KINDS: dict[str, dict[str, Any]] = {
    "one after the other": {},
    "two processes": {"processes": 2},
    "ray, two processors": {"kind": "ray", "processes": 2},
}


def ready(number: int) -> int:
    """A worker that has loaded what owners need."""
    import torch
    import transformers

    assert torch
    assert transformers
    time.sleep(2)  # so that the other one is asked as well
    return number


def timed(base: Model, folders: dict[str, Path], rows: int, workspace: Path, transport: dict[str, Any]) -> Any:
    """Seconds to start, seconds to shrink and contribute, and the digests of all that was made."""
    shutil.rmtree(workspace, ignore_errors=True)
    domains = {
        name: {
            **{s: str(folder / f"{s}.jsonl") for s in ("train", "valid", "test")},
            "limit": dict.fromkeys(("train", "valid", "test"), rows),
        }
        for name, folder in folders.items()
    }
    train = {"epochs": 1, "lr": 2e-4}
    recipe = load_recipe(
        {
            "fanbu": 1, "name": "transport", "model": str(base.path), "workspace": str(workspace), "threads": 1,
            "device": "cpu", "precision": "fp32", "max_length": 64, "domains": domains, "transport": transport,
            "shrink": [{"method": "finetune", "train": train}], "feedback": {"method": "distill"},
        }
    )  # fmt: skip
    turn = open_turn(recipe, base, None, [])
    started = time.monotonic()
    if recipe.transport.transport().apart:
        list(side_by_side(recipe.transport.transport(), ready, [(1,), (2,)], 1))
    begun = time.monotonic()
    turn.at_owners(bear, [(base, d, None) for d in turn.feeding])
    births = {d.name: bear(turn, base, d, None) for d in turn.feeding}
    calls = [(method("distill", "feedback"), {}, Specialist(b.specialist.model, b.specialist.domain, base), base)
             for b in births.values()]  # fmt: skip
    turn.at_owners(contribute, calls)
    sent = [contribute(turn, *call)[0] for call in calls]
    ended = time.monotonic()
    digests = {c.domain: (births[c.domain].specialist.model.digest, c.digest) for c in sent}
    return begun - started, ended - begun, digests


def main() -> int:
    args = parser(__doc__ or "").parse_args()
    rows = 150 if args.quick else 600
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    folders = dict(list(usable(text_domains(args.data)).items())[:8])
    domains = {n: limited(n, path, {"train": rows, "valid": rows, "test": rows}) for n, path in folders.items()}
    work, context = args.work / ("transport-quick" if args.quick else "transport"), Context(threads=1, max_length=64)
    base = made(work / "incumbent", lambda out: probed(domains, out, context))
    found = {}
    for name in [*KINDS, *list(KINDS)[1:]]:
        log(f"== {name}")
        run = timed(open_model(base.path), folders, rows, work / name.replace(" ", "-"), KINDS[name])
        assert name not in found or found[name][2] == run[2]
        found[name] = min(run, found.get(name, run), key=lambda made: made[1])
    text = table([["owners", "start, s", "shrink and contribute, s"], *(
        [name, f"{start:.1f}", f"{seconds:.1f}"] for name, (start, seconds, _) in found.items()
    )])  # fmt: skip
    print(text, flush=True)
    (_, alone, first), (_, pool, second), (_, ray, third) = found.values()
    bars = [
        bar("the same bytes, whoever works where", "yes" if first == second == third else "no", "yes",
            first == second == third),
        bar("ray beside two processes", f"{ray / pool:.2f} x the seconds", "<= 1.1", ray <= 1.1 * pool),
        bar("two processes beside one after the other", f"{alone / pool:.2f} x faster", "> 1", alone > pool),
    ]  # fmt: skip
    values = {name: {"start": start, "seconds": seconds} for name, (start, seconds, _) in found.items()}
    return finish("transport-quick" if args.quick else "transport", text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
