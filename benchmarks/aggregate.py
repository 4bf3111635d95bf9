"""Seconds and memory to make one model of many owners' updates, beside Flower on the same arrays.

A Llama-shaped model of 100M parameters in bf16 and updates of its size, made of random numbers, on disk. Ours reads
them there and writes the new model; Flower's FedAvg has all arrays in memory (as float32, loading is not timed), as
many owners as fit. Own memory is what a process holds beside the files' pages.

Run: python benchmarks/aggregate.py [--quick] [--work DIR]. 10, 30 and 100 owners (20 GB on disk); --quick: 3, 10, 30.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import psutil

from _checkpoints import make
from _common import HERE, bar, finish, parser, table
from _merge_watch import watched
from _peers import peer_python
from fanbu.contribution import Contribution, write_contribution
from fanbu.merging.task_vector import FORM, TaskVector, Weights
from fanbu.model import open_model

SIZE, BYTES = "100M", 4 * 100e6
SPARE = 1.2  # beside the arrays themselves


def update(base: Path, work: Path, number: int, size: str = SIZE) -> Path:
    """One owner's update on disk; nothing if it is there."""
    folder = work / f"update-{number}"
    if not (folder / "contribution.json").exists():
        model = make(work / "passing", size, number + 1, base)
        vector = TaskVector(open_model(model, verify=False), open_model(base, verify=False))
        meta = {"labels": [], "form": FORM, "rows": 100, "steps": 10}
        write_contribution(Contribution("updates", f"owner{number}", "fedavg", Weights(vector), meta=meta), folder)
        shutil.rmtree(model)
    return folder


def ours(base: Path, updates: list[Path], out: Path, settings: str = "{}") -> dict[str, Any]:
    """The new model, in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        str(HERE / "_merge_absorb.py"),
        "fedavg",
        str(out),
        settings,
        str(base),
        *map(str, updates),
    ]
    found = watched(command)
    shutil.rmtree(out, ignore_errors=True)
    return found


def main() -> int:
    args = parser(__doc__ or "").parse_args()
    work, counts = args.work / "aggregate", (3, 10, 30) if args.quick else (10, 30, 100)
    base = make(work / "base", SIZE, 0)
    updates = [update(base, work, number) for number in range(max(counts))]
    python = peer_python("flower", args.work)
    rows, found = [["updates", "seconds", "own memory, GB"]], {}
    for count in counts:
        found[f"fanbu {count}"] = ours(base, updates[:count], work / "out")
    found["fanbu 10, median"] = ours(base, updates[:10], work / "out", '{"aggregate": "median"}')
    found["fanbu 10, krum"] = ours(base, updates[:10], work / "out", '{"aggregate": "multi_krum"}')
    fits = int(psutil.virtual_memory().available / (SPARE * BYTES))
    for count in sorted({c for c in counts if c <= fits} | {min(fits, max(counts))}):
        command = [str(python), str(HERE / "_aggregate_flower.py"), *map(str, updates[:count])]
        found[f"flower {count}"] = watched(command)
    for name, run in found.items():
        print(name, run, flush=True)
        rows.append([name, *(f"{run[k]:.2f}" if k in run else "failed" for k in ("merge", "peak_gb"))])
    text, bars = table(rows), []
    print(text, flush=True)
    both = max(c for c in counts if "merge" in found.get(f"flower {c}", {}))
    mine, theirs = found[f"fanbu {both}"], found[f"flower {both}"]
    faster, less = theirs["merge"] / mine["merge"], theirs["peak_gb"] / mine["peak_gb"]
    got = f"{faster:.1f} x faster, {less:.1f} x less memory"
    bars.append(bar(f"{both} updates beside Flower", got, ">= 3 x or >= 5 x", faster >= 3 or less >= 5))
    peaks = [found[f"fanbu {c}"]["peak_gb"] for c in counts]
    got = ", ".join(f"{p:.2f}" for p in peaks) + " GB"
    bars.append(
        bar(
            f"own memory with {', '.join(map(str, counts))} owners",
            got,
            "constant (within 20%)",
            max(peaks) <= 1.2 * min(peaks),
        )
    )
    return finish("aggregate-quick" if args.quick else "aggregate", text, found, bars)


if __name__ == "__main__":
    sys.exit(main())
