"""What a running round is doing now: ``live.json`` in the workspace, for ``fanbu watch`` and other programs.

It is only a view. Nothing reads it to decide anything, and a write that fails never stops a run.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from pathlib import Path
from typing import Any

FILE = "live.json"
_EVERY = 0.25  # seconds between writes for progress; a change of stage is written at once
_BEAT = 5.0  # seconds between signs of life where nothing changes
_KEPT = 500  # finished stages that are listed


class Live:
    """Writes ``live.json``: the round, the stage that runs, its progress, the stages that are done.

    A thread writes progress and signs of life until ``end``, so call that in a ``finally``.
    """

    def __init__(self, root: Path, name: str, rounds: int) -> None:
        self.path = Path(root) / FILE
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._changed, self._wrote = False, 0.0
        self._first: tuple[str, float, int] = ("", 0.0, 0)
        self.state: dict[str, Any] = {
            "name": name, "pid": os.getpid(), "host": platform.node(), "state": "running", "round": 1,
            "rounds": rounds, **_IDLE, "stages": [], "started": _now(), "updated": _now(), "error": None,
        }  # fmt: skip
        self._set()
        threading.Thread(target=self._follow, name="fanbu-live", daemon=True).start()

    def round(self, number: int) -> None:
        """A round begins."""
        self._set(round=number, **_IDLE)

    def stage(self, name: str) -> None:
        """A stage begins."""
        self._first = ("", 0.0, 0)
        self._set(**{**_IDLE, "stage": name})

    def stage_done(self, name: str, seconds: float, reused: bool) -> None:
        """A stage is finished, or was finished by an earlier run."""
        done = {"stage": name, "seconds": round(float(seconds), 3), "reused": bool(reused)}
        self._set(stages=[*self.state["stages"], done][-_KEPT:], **_IDLE)

    def progress(self, what: str, done: int, total: int) -> None:
        """How far the running stage is. Cheap: the thread writes it, at most four times a second."""
        name, began, before = self._first
        if name != what or done < before:
            self._first = (what, time.monotonic(), done)
        rate = (time.monotonic() - began) / (done - before) if name == what and done > before else None
        left = None if rate is None else round(rate * max(total - done, 0), 1)
        with self._lock:
            self.state.update(what=what, done=int(done), total=int(total), left=left)
            self._changed = True

    def end(self, error: str | None = None) -> None:
        """The run is over; ``error`` says what stopped it. A second call changes nothing."""
        if not self._ended.is_set():
            self._ended.set()
            self._set(state="failed" if error else "finished", error=error and error[:2000], **_IDLE)

    def _set(self, **values: Any) -> None:
        with self._lock:
            self.state.update(values)
            self._write()

    def _follow(self) -> None:
        while not self._ended.wait(_EVERY):
            with self._lock:
                due = self._changed or time.monotonic() - self._wrote >= _BEAT
                if due and not self._ended.is_set():
                    self._write()

    def _write(self) -> None:
        """Whole or not at all, and without fsync: after a crash of the machine nobody misses it."""
        self._changed, self._wrote = False, time.monotonic()
        self.state["updated"] = _now()
        temporary = self.path.with_name(f".{FILE}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.state, default=str), encoding="utf-8")
            temporary.replace(self.path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()


_IDLE: dict[str, Any] = {"stage": "", "what": "", "done": 0, "total": 0, "left": None}


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
