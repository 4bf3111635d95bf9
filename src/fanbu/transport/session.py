"""Parties of joint modelling in processes of their own, who are asked many times over: one exchange a batch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Self

import numpy as np

from fanbu.errors import DataError, FanbuError, RetryError

Array = np.ndarray[Any, np.dtype[Any]]
_MOST = 2**31  # bytes of one message
_ERROR = "error"


class Processes:
    """A ``Session`` with parties that are made, and stay, in processes of their own.

    ``makers`` are functions of modules, by the party's name, each with the arguments that it is called with in its
    process: there it reads its table, which comes here in no form. What is said travels as safetensors through pipes.
    """

    def __init__(self, makers: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> None:
        context = multiprocessing.get_context("spawn")
        self._ends: dict[str, Connection[Any, Any]] = {}
        self._running = []
        for name, (make, given) in makers.items():
            here, there = context.Pipe()
            process = context.Process(target=_party, args=(there, make, given), daemon=True)
            process.start()
            there.close()
            self._ends[name] = here
            self._running.append(process)

    @property
    def names(self) -> Sequence[str]:
        """The parties."""
        return list(self._ends)

    def ask(self, name: str, what: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The party's answer. Raises DataError with its words where it refuses, RetryError where it is gone."""
        try:
            self._ends[name].send_bytes(_packed(what, arrays))
            said, found = _unpacked(self._ends[name].recv_bytes(_MOST))
        except (OSError, EOFError):
            raise RetryError(
                "party-gone", f"the process of {name} has ended", remedy="look at what it said, and run again"
            ) from None
        if said != what:
            raise DataError("session-broken", f"{name}: {said[:500]}", got=what, remedy="see what the party refuses")
        return found

    def close(self) -> None:
        """Ends all processes."""
        for end in self._ends.values():
            end.close()
        for process in self._running:
            process.join(5)
            process.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _party(end: Connection[Any, Any], make: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """A party's process: it answers until nobody asks any more."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    party = make(*given)
    with suppress(EOFError, OSError):
        while True:
            what, arrays = _unpacked(end.recv_bytes(_MOST))
            try:
                end.send_bytes(_packed(what, party.answer(what, arrays)))
            except FanbuError as error:
                end.send_bytes(_packed(f"{_ERROR}: {error}", {}))


def _packed(what: str, arrays: Mapping[str, Array]) -> bytes:
    from safetensors.numpy import save

    return save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, {"what": what})


def _unpacked(message: bytes) -> tuple[str, dict[str, Array]]:
    """The word and the arrays. DataError for what is none."""
    import json

    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        size = int.from_bytes(message[:8], "little")
        head = json.loads(message[8 : 8 + size])
        return str(head["__metadata__"]["what"]), load(message)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise DataError(
            "session-broken", f"a message cannot be read: {error}", remedy="let all run the same version of fanbu"
        ) from None
