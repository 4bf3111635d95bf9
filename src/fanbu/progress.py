"""Progress on stderr: Rich bars for the run and for the step at work, plain lines where stderr is no terminal."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanbu.live import FILE

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

_EVERY = 15.0  # seconds between lines where there is no terminal


def log(text: str) -> None:
    """One line on stderr."""
    sys.stderr.write(f"[{time.strftime('%H:%M:%S')}] {text}\n")
    sys.stderr.flush()


class Lines:
    """Progress as lines. Call it with ``(what, done, total)``; ``log`` prints a line at once."""

    def __init__(self, workspace: Path | None = None) -> None:
        self.workspace = workspace
        self._last = self._began = time.monotonic()
        self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """A line now and then, with the time that is left at this rate."""
        now = time.monotonic()
        if what != self._what or done <= 1:
            self._what, self._began = what, now
        if now - self._last > _EVERY:
            self._last = now
            left = (now - self._began) / done * (total - done) if done else 0.0
            log(f"  {what} {done}/{total}" + (f", {left:.0f} s left" if left else ""))

    def log(self, text: str) -> None:
        """A step begins, or there is something to say."""
        where = "" if text.startswith("round ") else place(self.workspace)
        log(f"{where}: {text}" if where else text)


class Bar:
    """Progress as two bars: the run (round and stage, time since its start), and the step at work (time left)."""

    def __init__(self, bars: Bars, workspace: Path | None = None) -> None:
        self.bars, self.workspace = bars, workspace
        self.run = bars.add_task("", total=None, visible=False)
        self.step = bars.add_task("", total=None)
        self._stage = self._what = ""

    def __call__(self, what: str, done: int, total: int) -> None:
        """How far the step is."""
        shown = what if not self._stage or what in self._stage else f"{self._stage}: {what}"
        if what != self._what:  # its own clock, or the time left would be that of another step
            self._what = what
            self.bars.reset(self.step, total=total, description=shown)
        self.bars.update(self.step, description=shown, completed=done, total=total)

    def log(self, text: str) -> None:
        """A stage begins; its name goes before the bar."""
        self._stage, self._what = text, ""
        self.bars.reset(self.step, total=None, description=text)
        if where := place(self.workspace):
            self.bars.update(self.run, description=where, visible=True)
        log(text)


@contextmanager
def bar(workspace: Path | None = None) -> Iterator[Lines | Bar]:
    """A progress callback ``(what, done, total)`` with a ``log``; with a workspace, it also says which round it is."""
    if not sys.stderr.isatty():
        yield Lines(workspace)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<40}"), BarColumn(bar_width=24), MofNCompleteColumn(),
        TimeElapsedColumn(), TimeRemainingColumn(compact=True),
    )  # fmt: skip
    with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
        yield Bar(bars, workspace)


def place(workspace: Path | None) -> str:
    """``round 2/3, stage 14``, as the run itself has just written it; empty where there is no run of this process."""
    live = _live(workspace)
    if not live.get("round"):
        return ""
    return f"round {live['round']}/{max(live['rounds'], live['round'])}, stage {len(live.get('stages', [])) + 1}"


def _live(workspace: Path | None) -> Mapping[str, Any]:
    try:
        found = json.loads((workspace / FILE).read_text(encoding="utf-8")) if workspace else {}
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("pid") == os.getpid() else {}
