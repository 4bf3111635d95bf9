"""Owners side by side in processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from multiprocessing import connection
from typing import Any

from fanbu.errors import RetryError
from fanbu.types import Transport


def results(
    transport: Transport, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], threads: int
) -> Iterator[Any]:
    """See ``transport.side_by_side``. Raises RetryError where a process was killed."""
    futures: list[Future[Any]] = []
    try:
        futures += _submitted(transport.processes, function, calls)
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool:
        _pool.cache_clear()
        raise RetryError(
            "worker-killed", "a process in which an owner worked was killed, or could not begin",
            got=f"{transport.processes} processes",
            remedy="run again: finished work is kept; with fewer processes where memory ran out; a script that calls "
            "this needs `if __name__ == '__main__':`, since every process imports it again",
        ) from None  # fmt: skip
    finally:  # those that have begun come to their end: their work is kept
        wait([future for future in futures if not future.cancel()])


def _submitted(processes: int, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> list[Future[Any]]:
    try:
        return [_pool(processes).submit(function, *call) for call in calls]
    except BrokenProcessPool:  # one was killed while it had nothing to do
        _pool.cache_clear()
        return [_pool(processes).submit(function, *call) for call in calls]


@lru_cache(1)
def _pool(processes: int) -> ProcessPoolExecutor:
    """Processes that stay until this one ends; they begin anew (a fork would share the state of torch's threads)."""
    return ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"), initializer=_begin)


def _begin() -> None:
    """In a process of an owner's: it ends with the one that started it, however that ends."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        connection.wait([parent.sentinel])
        os._exit(1)
