"""Memory and time of one distillation step over a large vocabulary: ours, TRL's, and all logits at once.

Student and teacher give hidden states (512 and 768 wide); the step is the loss KL(T || S) at temperature 2, mean over
tokens, and its gradients in the student's hidden states and head, float32. Each runs in a process of its own, after
a first small step. Peak memory is by how much a process's own memory rises from then on; the gradient of the head,
which all must return, is part of it. TRL gets a virtual environment of its own (or $FANBU_PEERS).

Run: python benchmarks/kd_memory.py [--quick] [--work DIR] [--times N]. --quick: the smallest vocabulary, once.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from _common import HERE, bar, finish, parser, table
from _merge_watch import watched
from _peers import peer_python

VOCABULARIES = (32_000, 128_000, 152_000)
TOKENS = 1024
STEPS = 3  # in a process


def step(who: str, vocabulary: int, python: Path, out: Path) -> dict[str, Any]:
    """One process; its gradients lie in ``out``."""
    return watched([str(python), str(HERE / "_kd_step.py"), who, str(vocabulary), str(TOKENS), str(STEPS), str(out)])


def apart(one: Path, other: Path) -> float:
    """The largest difference of loss and gradients, by each one's size."""
    a, b = load_file(one), load_file(other)
    return max(float((a[n] - b[n]).abs().max() / b[n].abs().max()) for n in b)


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--times", type=int, default=None, help="how many processes each; default: 3, with --quick 1")
    args = flags.parse_args()
    times = args.times or (1 if args.quick else 3)
    work = args.work / "kd"
    work.mkdir(parents=True, exist_ok=True)
    pythons = {"naive": Path(sys.executable), "fanbu": Path(sys.executable), "trl": peer_python("trl", args.work)}
    rows = [["vocabulary", "step", "seconds", "beside naive", "peak own memory, GB", "largest difference to naive"]]
    bars, values = [], {}
    for vocabulary in VOCABULARIES[: 1 if args.quick else None]:
        runs: dict[str, list[dict[str, Any]]] = {who: [] for who in pythons}
        for _ in range(times):
            for who, python in pythons.items():
                runs[who].append(step(who, vocabulary, python, work / f"{who}.safetensors"))
                print(vocabulary, who, runs[who][-1], flush=True)
        failed = {who: r["failed"] for who, found in runs.items() for r in found if "failed" in r}
        if failed:
            raise subprocess.SubprocessError(f"a step failed: {failed}")
        seconds = {who: statistics.median(r["seconds"] for r in found) for who, found in runs.items()}
        peak = {who: statistics.median(r["peak_own_gb"] for r in found) for who, found in runs.items()}
        off = {who: apart(work / f"{who}.safetensors", work / "naive.safetensors") for who in pythons}
        for who in pythons:
            rows.append([
                f"{vocabulary:,}", who, f"{seconds[who]:.1f}", f"{seconds[who] / seconds['naive']:.2f}",
                f"{peak[who]:.2f}", "-" if who == "naive" else f"{off[who]:.1e}",
            ])  # fmt: skip
        less, slower = peak["naive"] / peak["fanbu"], seconds["fanbu"] / min(seconds.values())
        bars += [
            bar(f"{vocabulary:,}: memory beside naive", f"{less:.1f} x less", ">= 3 x", less >= 3),
            bar(f"{vocabulary:,}: time beside the fastest", f"{slower:.2f}", "<= 1.15", slower <= 1.15),
            bar(f"{vocabulary:,}: gradients", f"{off['fanbu']:.1e}", "equal to rounding", off["fanbu"] < 1e-4),
        ]
        values[str(vocabulary)] = {"runs": runs, "seconds": seconds, "peak_gb": peak, "difference": off}
    text = table(rows) + f"\n\n{TOKENS:,} tokens, float32, two threads; medians of {times} process(es) of {STEPS} steps"
    return finish("kd_memory-quick" if args.quick else "kd_memory", text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
