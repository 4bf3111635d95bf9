"""Merging at the speed of the disk: seconds, CPU seconds and memory beside mergekit, and the floor of plain copying.

Random Llama-shaped checkpoints in bf16 are made in the work folder. Every merge runs in a process of its own; all
inputs are read once before, so the page cache is warm for everybody. Start-up (imports) is shown apart. Peers get
virtual environments of their own (or $FANBU_PEERS).

Run: python benchmarks/merge.py [--quick] [--work DIR] [--capped]. --quick: 150M parameters instead of 1.2B, once each.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _checkpoints import family
from _common import HERE, bar, finish, parser, table
from _peers import peer_python
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


def watched(command: Sequence[str], limit: int | None = None) -> dict[str, Any]:
    """Runs one process; its own JSON with wall seconds and its peak anonymous memory (polled every 10 ms)."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "MALLOC_ARENA_MAX": "2"}
    started = time.perf_counter()

    def cap() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=cap,
    )  # fmt: skip
    peak, over = [0], threading.Event()

    def poll() -> None:
        while not over.wait(0.01):
            try:
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak[0] = max([peak[0], *(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))])
            except (OSError, IndexError):
                return

    watcher = threading.Thread(target=poll)
    watcher.start()
    out, error = process.communicate()
    over.set()
    watcher.join()
    if process.returncode:
        return {"failed": error.strip().splitlines()[-1:] or process.returncode}
    told = json.loads(out.strip().splitlines()[-1])
    return {**told, "wall": time.perf_counter() - started, "peak_gb": peak[0] / 1e9}


def floor(inputs: Sequence[Path], out: Path) -> dict[str, float]:
    """Plainly reading all inputs with two threads, then writing one output's bytes; fsync apart."""
    files = [f / "model.safetensors" for f in inputs]

    def read(mine: Sequence[Path]) -> None:
        room = bytearray(2**22)
        for file in mine:
            handle = os.open(file, os.O_RDONLY)
            while os.readv(handle, [room]):
                pass
            os.close(handle)

    started = time.perf_counter()
    threads = [threading.Thread(target=read, args=(files[k::2],)) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    was_read = time.perf_counter()
    size, block = files[0].stat().st_size, os.urandom(2**22)
    with out.open("wb") as stream:
        for start in range(0, size, len(block)):
            stream.write(block[: size - start])
        stream.flush()
        written = time.perf_counter()
        os.fsync(stream.fileno())
    ended = time.perf_counter()
    out.unlink()
    return {"read": was_read - started, "write": written - was_read, "fsync": ended - written, "all": ended - started}


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


def repeated(times: int, out: Path, runs: dict[str, Callable[[], dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """All runs, one after the other, several times over; outputs are removed between them."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            shutil.rmtree(out, ignore_errors=True)
            found[name].append(run())
            print(name, json.dumps(found[name][-1], default=str), flush=True)
    shutil.rmtree(out, ignore_errors=True)
    return found


def median(values: Sequence[dict[str, Any]], key: str) -> float:
    """Of the runs that finished; not a number where none did."""
    known = [v[key] for v in values if key in v]
    return statistics.median(known) if known else float("nan")


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


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--times", type=int, default=None, help="how often; default: 3, with --quick 1")
    flags.add_argument("--capped", action="store_true", help="also 7 GB models under a limit of 2 GB (30 GB of disk)")
    args = flags.parse_args()
    work, size, times = args.work / "merge", "150M" if args.quick else "1.2B", args.times or (1 if args.quick else 3)
    work.mkdir(parents=True, exist_ok=True)
    models, out, python = family(work, size, 3), work / "out", peer_python("mk", args.work)
    floor(models, work / "floor.bin")
    runs: dict[str, Callable[[], dict[str, Any]]] = {"floor": lambda: floor(models, work / "floor.bin")}
    for name in ELEMENTWISE:
        runs[f"fanbu {name}"] = lambda name=name: ours(name, models, out)
        runs[f"mergekit {name}"] = lambda name=name: theirs(name, models, out, python)
    found = repeated(times, out, runs)
    ground = median(found["floor"], "all")
    rows = [["merge", "seconds", "of the floor", "CPU seconds", "peak own memory, GB", "start-up"]]
    rows.append(["floor: read all, write one, fsync", f"{ground:.1f}", "1.0", "-", "-", "-"])
    for name in list(runs)[1:]:
        values = {k: median(found[name], k) for k in ("merge", "cpu", "peak_gb", "start-up")}
        rows.append([
            name, f"{values['merge']:.1f}", f"{values['merge'] / ground:.1f}", f"{values['cpu']:.1f}",
            f"{values['peak_gb']:.2f}", f"{values['start-up']:.1f}",
        ])  # fmt: skip
    print(table(rows), flush=True)
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
    if args.capped:
        bars += capped(work)
    text = table(rows) + f"\n\nbase + three specialists of {size} parameters; median of {times} run(s)"
    text += f"; load {os.getloadavg()[0]:.1f}; warm page cache"
    return finish("merge-quick" if args.quick else "merge", text, {"runs": found, "size": size}, bars)


if __name__ == "__main__":
    sys.exit(main())
