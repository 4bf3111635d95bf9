"""Runs one merge in a process of its own, and watches its seconds and its memory."""

from __future__ import annotations

import json
import os
import resource
import shutil
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


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
