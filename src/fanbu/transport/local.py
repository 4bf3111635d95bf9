"""Owners side by side in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from typing import Any

from fanbu.errors import RetryError
from fanbu.types import Transport


def results(
    transport: Transport, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], threads: int
) -> Iterator[Any]:
    """See ``transport.side_by_side``. Raises RetryError where a process was killed."""
    pool = _pool(transport.processes)
    futures: list[Future[Any]] = [pool.submit(function, *call) for call in calls]
    try:
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        _pool.cache_clear()
        raise RetryError(
            "worker-killed", "a process in which an owner worked was killed (out of memory?)",
            got=f"{transport.processes} processes", remedy="run again: finished work is kept; or with fewer processes",
        ) from None  # fmt: skip
    finally:  # those that have begun come to their end: their work is kept
        for future in futures:
            future.cancel()


@lru_cache(1)
def _pool(processes: int) -> ProcessPoolExecutor:
    """Processes that stay until this one ends; they begin anew (a fork would share the state of torch's threads)."""
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_quiet)


def _quiet() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
