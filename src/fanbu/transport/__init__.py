"""Where owners work: one after the other here, side by side in processes, or on a Ray cluster."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

from fanbu.types import Transport


class Workers(Protocol):
    """A module of this folder."""

    def results(
        self, transport: Transport, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], threads: int
    ) -> Iterator[Any]:
        """What the calls return, in the order in which they end; ``threads`` is how many each of them computes with."""


def side_by_side(
    transport: Transport, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], threads: int
) -> Iterator[Any]:
    """``function(*call)`` for all calls, each in a process of its own; results come as they end.

    The function is one of a module, and all that it is given and returns can be pickled. What it raises is raised
    here, once the others that have begun are done (on Ray these are cut off).
    """
    workers = cast(Workers, importlib.import_module(f"fanbu.transport.{transport.kind}"))
    yield from workers.results(transport, function, calls, threads)
