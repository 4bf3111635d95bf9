"""Merging at the speed of the disk: seconds, CPU seconds and memory beside its peers, and the floor of plain copying.

Random Llama-shaped checkpoints in bf16 are made in the work folder: 1.2B parameters for elementwise methods, 150M for
spectral and least-squares ones. Every merge, and the floor, runs in a process of its own after the same imports, whose
time (start-up) is shown apart; so is the hash of a base that has no manifest yet, which names it in the lineage. All
inputs are read once before, so the page cache is warm for everybody. Peers get virtual environments of their own (or
$FANBU_PEERS). Then: ten specialists; parity with the peers on small tensors; adapters; with --capped, models of 7 GB
under a limit of 2 GB of own memory.

Run: python benchmarks/merge.py [--quick] [--work DIR] [--times N] [--capped] [--only PART ...]. --quick: 150M
parameters instead of 1.2B, once each. A part that was measured before stays in the table when others are run.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _checkpoints import family
from _common import HERE, bar, finish, parser, table
from _merge_adapters import adapters
from _merge_parity import parity
from _merge_spectral import spectral
from _merge_watch import median, repeated, watched
from _peers import peer_python
from fanbu.files import write_text
from fanbu.tensors import Tensors

# our method and settings; mergekit's method and its parameters, by model where that is how it wants them
ELEMENTWISE: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "linear": ("average", {}, "linear", {"weight": 1.0}),
    "slerp": ("slerp", {"t": 0.4}, "slerp", {"t": 0.4}),
    "task_arithmetic": ("task_arithmetic", {"scale": 0.4}, "task_arithmetic", {"weight": 0.4}),
    "ties": ("ties", {"density": 0.5}, "ties", {"weight": 1.0, "density": 0.5}),
    "dare_ties": ("dare", {"density": 0.5, "elect": True}, "dare_ties", {"weight": 1.0, "density": 0.5}),
}
CAP = 2 * 2**30


def floor(inputs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Plainly reading all inputs with two threads, then writing one output's bytes and making them durable."""
    files = [str(f / "model.safetensors") for f in inputs]
    return watched([sys.executable, str(HERE / "_merge_floor.py"), str(out), *files])


def ours(name: str, models: Sequence[Path], out: Path, limit: int | None = None) -> dict[str, Any]:
    """One merge by fanbu."""
    method, settings, _, _ = ELEMENTWISE[name]
    chosen = models[:2] if method == "slerp" else models
    script = str(HERE / "_merge_ours.py")
    command = [sys.executable, script, method, str(out), json.dumps(settings), *map(str, chosen)]
    return watched(command, limit)


def mergekit_config(name: str, models: Sequence[Path]) -> dict[str, Any]:
    """The same merge in mergekit's words."""
    _, _, method, parameters = ELEMENTWISE[name]
    base, *others = map(str, models)
    config: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "slerp":
        return {
            **config,
            "base_model": base,
            "models": [{"model": base}, {"model": others[0]}],
            "parameters": parameters,
        }
    listed = [{"model": m, "parameters": parameters} for m in others]
    return {**config, "models": listed} | ({} if method == "linear" else {"base_model": base})


def theirs(name: str, models: Sequence[Path], out: Path, python: Path) -> dict[str, Any]:
    """One merge by mergekit."""
    config = out.with_suffix(".yml")
    config.write_text(json.dumps(mergekit_config(name, models)))  # JSON is YAML
    return watched([str(python), str(HERE / "_merge_mergekit.py"), str(out), str(config)])


def largest_difference(one: Path, other: Path) -> float:
    """The largest difference between two checkpoints."""
    a, b = Tensors(one), Tensors(other)
    return max(float((a[n].float() - b[n].float()).abs().max()) for n in a)


def capped(work: Path) -> list[dict[str, Any]]:
    """7 GB models under a limit of 2 GB on a process's own memory (RLIMIT_DATA)."""
    models, out, bars = family(work, "3.5B", 2), work / "out", []
    for name in ("linear", "ties"):
        got = ours(name, models, out, CAP)
        shutil.rmtree(out, ignore_errors=True)
        what = f"{name}: 7 GB models with at most 2 GB of own memory"
        said = got.get("failed") or f"{got['merge']:.0f} s, {got['peak_gb']:.2f} GB"
        bars.append(bar(what, str(said), "finishes", "failed" not in got))
    shutil.rmtree(work / "3.5B")
    return bars


def elementwise(work: Path, size: str, times: int, python: Path) -> tuple[list[list[str]], list[Any], dict[str, Any]]:
    """The table of the elementwise methods beside mergekit and the floor."""
    models, out = family(work, size, 3), work / "out"
    floor(models, work / "floor.bin")
    runs: dict[str, Callable[[], dict[str, Any]]] = {"floor": lambda: floor(models, work / "floor.bin")}
    for name in ELEMENTWISE:
        runs[f"fanbu {name}"] = lambda name=name: ours(name, models, out)
        runs[f"mergekit {name}"] = lambda name=name: theirs(name, models, out, python)
    found = repeated(times, out, runs)
    ground = median(found["floor"], "merge")
    rows = [COLUMNS, *(row_of(name, found[name], ground) for name in runs)]
    bars = []
    for name in ELEMENTWISE:
        mine, peer = median(found[f"fanbu {name}"], "merge"), median(found[f"mergekit {name}"], "merge")
        if name in ("linear", "task_arithmetic"):
            bars.append(bar(f"{name} beside the floor", f"{mine / ground:.2f}", "<= 1.5", mine <= 1.5 * ground))
        want = 5 if name == "ties" else 3
        if name in ("linear", "task_arithmetic", "ties"):
            bars.append(bar(f"{name} beside mergekit", f"{peer / mine:.1f} x", f">= {want} x", peer >= want * mine))
    peak = max(median(found[f"fanbu {name}"], "peak_gb") for name in ELEMENTWISE)
    bars.append(bar("peak own memory, elementwise", f"{peak:.2f} GB", "< 1 GB", peak < 1))
    return rows, bars, found


COLUMNS = ["merge", "seconds", "of the floor", "CPU seconds", "peak own memory, GB", "start-up", "hash of the base"]


def row_of(name: str, runs: Sequence[dict[str, Any]], ground: float) -> list[str]:
    """A line of the table: medians over runs."""
    values = {k: median(runs, k) for k in ("merge", "cpu", "peak_gb", "start-up", "hash of the base")}
    hashed = "-" if values["hash of the base"] != values["hash of the base"] else f"{values['hash of the base']:.1f}"
    return [
        name, f"{values['merge']:.1f}", f"{values['merge'] / ground:.1f}", f"{values['cpu']:.1f}",
        f"{values['peak_gb']:.2f}", f"{values['start-up']:.1f}", hashed,
    ]  # fmt: skip


def ten(work: Path, size: str) -> tuple[list[list[str]], list[Any], dict[str, Any]]:
    """Ten specialists: the same methods once each, beside the floor of eleven inputs."""
    models, out = family(work, size, 10), work / "out"
    floor(models, work / "floor.bin")
    found: dict[str, Any] = {"floor": [floor(models, work / "floor.bin")]}
    for name in ("linear", "task_arithmetic", "ties", "dare_ties"):
        found[f"fanbu {name}"] = [ours(name, models, out)]
        shutil.rmtree(out, ignore_errors=True)
        print(name, json.dumps(found[f"fanbu {name}"][0]), flush=True)
    rows = [COLUMNS, *(row_of(name, runs, median(found["floor"], "merge")) for name, runs in found.items())]
    peak = max(median(runs, "peak_gb") for name, runs in found.items() if name != "floor")
    done = all("merge" in run for runs in found.values() for run in runs)
    bars = [bar("ten specialists: peak own memory", f"{peak:.2f} GB", "finishes, < 1 GB", done and peak < 1)]
    for number in range(3, 10):
        shutil.rmtree(work / size / f"s{number}")
    return rows, bars, found


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--times", type=int, default=None, help="how often; default: 3, with --quick 1")
    flags.add_argument("--capped", action="store_true", help="also 7 GB models under a limit of 2 GB (30 GB of disk)")
    flags.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS, help="parts; default: all of them")
    args = flags.parse_args()
    work, size, times = args.work / "merge", "150M" if args.quick else "1.2B", args.times or (1 if args.quick else 3)
    work.mkdir(parents=True, exist_ok=True)
    mk, fb = (peer_python(name, args.work) for name in ("mk", "fb"))
    parts: dict[str, Callable[[], tuple[list[list[str]], list[Any], dict[str, Any]]]] = {
        "elementwise": lambda: elementwise(work, size, times, mk),
        "ten": lambda: ten(work, size),
        "spectral": lambda: spectral(work, 1, fb),
        "parity": lambda: parity(work, mk, fb),
        "adapters": lambda: adapters(work, mk),
    }
    kept = work / f"parts-{size}"
    kept.mkdir(exist_ok=True)
    for name in args.only:
        rows, held, values = parts[name]()
        print(f"## {PARTS[name]}\n\n{table(rows)}", flush=True)
        write_text(kept / f"{name}.json", json.dumps([rows, held, values], default=str))
    known = {n: json.loads(file.read_text()) for n in PARTS if (file := kept / f"{n}.json").exists()}
    texts = [f"## {PARTS[n]}\n\n{table(rows)}" for n, (rows, _, _) in known.items()]
    bars = [b for _, held, _ in known.values() for b in held]
    found = {n: values for n, (_, _, values) in known.items()}
    if args.capped:
        bars += capped(work)
    text = (
        "\n\n".join(texts) + f"\n\nElementwise: base + three specialists of {size} parameters, median of {times} run(s)"
    )
    text += f"; load at the end {os.getloadavg()[0]:.1f}; warm page cache"
    return finish("merge-quick" if args.quick else "merge", text, {"runs": found, "size": size}, bars)


PARTS = {
    "elementwise": "Elementwise methods, three specialists",
    "ten": "Ten specialists",
    "spectral": "Spectral methods and least squares, three specialists of 150M parameters",
    "parity": "Parity on small tensors",
    "adapters": "Eight LoRA adapters on 150M parameters",
}


if __name__ == "__main__":
    sys.exit(main())
