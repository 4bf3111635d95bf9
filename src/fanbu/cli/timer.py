"""Rounds on a schedule: ``--every`` looks again and again for what is new."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Annotated, NoReturn

import typer

from fanbu.errors import DataError, RetryError, UsageError

Every = Annotated[
    str | None,
    typer.Option(metavar="SPAN", help="Go on for ever, and look so often for what is new: 30m, 6h, 1d."),
]
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def span(text: str) -> float:
    """Seconds of ``90s``, ``30m``, ``6h`` or ``1d``. UsageError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found or not float(found[1]):
        raise UsageError(
            "bad-span", "--every", allowed="a number above 0 with s, m, h or d: 30m, 6h", got=text, remedy="change it"
        )
    return float(found[1]) * _UNITS[found[2]]


def again_and_again(every: str, once: Callable[[], object], log: Callable[[str], None]) -> NoReturn:
    """Does it now, and again whenever so much time has gone by since it last began; what may be better next time (too
    few owners, a full disk, a file that is just being written) is told, and everything else ends it."""
    seconds = span(every)
    while True:
        began = datetime.now()
        try:
            once()
        except (DataError, RetryError) as error:
            log(str(error))
        following = max(began + timedelta(seconds=seconds), datetime.now())
        log(f"next look at {following:%Y-%m-%d %H:%M:%S}")
        while (left := (following - datetime.now()).total_seconds()) > 0:
            time.sleep(min(left, 60.0))  # a machine that slept notices
