"""What the page of a running round reads: the workspace's files and nothing else. It writes nothing.

The files are other programs' output, so any part of them may be missing, cut off or hostile.
"""

from __future__ import annotations

import contextlib
import json
import platform
import re
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from fanbu.live import FILE
from fanbu.report import format as f

KEY = re.compile(r"[0-9a-f]{20}")
SILENT = 60.0  # seconds without a sign of life after which a run counts as stopped (it gives one every five)
_MOST = 64 * 2**20


def signature(root: Path) -> tuple[Any, ...]:
    """Changes whenever a file that the page shows changes."""
    paths = [root / name for name in (FILE, "history.jsonl", "champion.json", "report.html")]
    paths += [folder / name for folder in (root / "rounds").glob("*") for name in ("record.json", "report.html")]
    found = []
    for path in paths:
        try:
            stat = path.stat()
        except OSError:
            continue
        found.append((path.name, path.parent.name, stat.st_mtime_ns, stat.st_size, stat.st_ino))
    return tuple(sorted(found))


def liveness(live: Mapping[str, Any], now: float) -> tuple[str, str]:
    """(running, finished, failed, stalled or idle; why)."""
    state = live.get("state")
    if state in ("finished", "failed"):
        return str(state), ""
    if state != "running":
        return "idle", ""
    updated = moment(live.get("updated"))
    if updated is None or now - updated > SILENT:
        return "stalled", "It gave no sign of life for a minute."
    if live.get("host") in (None, platform.node()) and not _alive(live.get("pid"), updated):
        return "stalled", "Its process is gone. Run the same command again to go on."
    return "running", ""


def _alive(pid: object, updated: float) -> bool:
    """Whether the process is there, and is the one that wrote: not a later one with the same number."""
    import psutil

    if not isinstance(pid, int) or isinstance(pid, bool) or not 0 < pid < 2**31:
        return False
    try:
        process = psutil.Process(pid)
        return bool(process.status() != psutil.STATUS_ZOMBIE and process.create_time() <= updated + 2)
    except psutil.AccessDenied:
        return True
    except psutil.Error:
        return False


def read_object(path: Path) -> Mapping[str, Any]:
    """A JSON object, or an empty one."""
    try:
        if path.stat().st_size > _MOST:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


@lru_cache(maxsize=256)
def _parsed(path: Path, modified: int, size: int) -> Mapping[str, Any]:
    return read_object(path)


def read_records(root: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """(number of the round, its record), oldest first, of the rounds that history calls finished."""
    ends = [e for e in read_lines(root / "history.jsonl") if e.get("event") in ("promoted", "refused")]
    numbers = {str(e.get("round"))[:20]: whole(e.get("number")) for e in ends if whole(e.get("number")) > 0}
    if numbers:
        found = [(number, _record(root / "rounds" / key)) for key, number in numbers.items()]
        return sorted(((n, record) for n, record in found if record), key=lambda row: row[0])
    # A history from before rounds were counted: what lies there, by its age.
    old = [record for folder in (root / "rounds").glob("*") if (record := _record(folder))]
    return list(enumerate(sorted(old, key=lambda record: str(record.get("created"))), start=1))


def _record(folder: Path) -> dict[str, Any]:
    """A round's record and the name of its folder; a file that did not change is not read again."""
    path = folder / "record.json"
    try:
        stat = path.stat()
    except (OSError, ValueError):
        return {}
    found = _parsed(path, stat.st_mtime_ns, stat.st_size) if KEY.fullmatch(folder.name) else {}
    return {**found, "folder": folder.name} if found else {}


def read_lines(path: Path) -> list[Mapping[str, Any]]:
    """The objects of a JSONL file; lines that are none are left out."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n") if path.stat().st_size <= _MOST else []
    except (OSError, ValueError):
        return []
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line) if line else None
            found += [row] if isinstance(row, Mapping) else []
    return found


def moment(value: object) -> float | None:
    """An ISO time as seconds since the epoch."""
    try:
        return datetime.fromisoformat(str(value)).timestamp()
    except (ValueError, OverflowError):
        return None


def whole(value: object) -> int:
    """A finite number without its fraction; zero for anything else."""
    return int(f.number(value) or 0)
