"""Parties of joint modelling elsewhere, who are asked many times over: in processes of this machine, or over TLS."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import ssl
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Protocol, Self

import numpy as np

from fanbu.errors import DataError, FanbuError, RetryError

Array = np.ndarray[Any, np.dtype[Any]]
_MOST = 2**31  # bytes of one message
_PATIENCE, _SHAKE = 3600.0, 10.0  # seconds for an answer, and for a stranger to show who it is
_ERROR = "error"


class End(Protocol):
    """One end of a line."""

    def send_bytes(self, message: bytes, /) -> None:
        """Sends a message."""

    def recv_bytes(self, most: int, /) -> bytes:
        """The next message. EOFError or OSError where there is none any more, or it is longer than ``most``."""

    def close(self) -> None:
        """Hangs up."""


class Apart:
    """A ``Session`` with parties at the other ends of lines; what is said travels as safetensors."""

    def __init__(self, ends: Mapping[str, End], running: Sequence[Any] = ()) -> None:
        self._ends, self._running = dict(ends), list(running)

    @property
    def names(self) -> Sequence[str]:
        """The parties."""
        return list(self._ends)

    def ask(self, name: str, what: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The party's answer. Raises DataError with its words where it refuses, RetryError where it is gone."""
        try:
            self._ends[name].send_bytes(_packed(what, arrays))
            said, found = _unpacked(self._ends[name].recv_bytes(_MOST))
        except (OSError, EOFError) as error:
            raise RetryError(
                "party-gone", f"{name} does not answer any more: {error}", remedy="look at what it said, and run again"
            ) from None
        if said != what:
            raise DataError("session-broken", f"{name}: {said[:500]}", got=what, remedy="see what the party refuses")
        return found

    def close(self) -> None:
        """Hangs up, and ends processes."""
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


def processes(makers: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]]) -> Apart:
    """Parties that are made, and stay, in processes of their own.

    ``makers`` are functions of modules, by the party's name, each with the arguments that it is called with in its
    process: there it reads its table, which comes here in no form.
    """
    context = multiprocessing.get_context("spawn")
    ends, running = {}, []
    for name, (make, given) in makers.items():
        here, there = context.Pipe()
        process = context.Process(target=_made, args=(there, make, given), daemon=True)
        process.start()
        there.close()
        ends[name] = here
        running.append(process)
    return Apart(ends, running)


@dataclass(frozen=True)
class Identity:
    """Who one is on the network, as PEM files: ``certificate`` and its ``key``, and the ``ca`` that the others' are
    checked by. Both sides show theirs."""

    certificate: str | Path
    key: str | Path
    ca: str | Path

    def context(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """TLS 1.2 at least, and no line to who shows no certificate of the CA."""
        made = ssl.create_default_context(purpose, cafile=str(self.ca))
        made.load_cert_chain(self.certificate, self.key)
        made.verify_mode = ssl.CERT_REQUIRED
        return made


def connected(addresses: Mapping[str, tuple[str, int]], identity: Identity) -> Apart:
    """Parties on other machines, by (host, port), where ``serve`` answers. RetryError where one is not there."""
    context, ends = identity.context(ssl.Purpose.SERVER_AUTH), {}
    for name, (host, port) in addresses.items():
        try:
            plain = socket.create_connection((host, port), _SHAKE)
            ends[name] = _Wire(context.wrap_socket(plain, server_hostname=host))
        except OSError as error:
            for end in ends.values():
                end.close()
            raise RetryError(
                "party-gone", f"{name} cannot be reached at {host}:{port}: {error}",
                remedy="start it there (`fanbu.transport.session.serve`), and look at the certificates",
            ) from None  # fmt: skip
    return Apart(ends)


def serve(party: Any, host: str, port: int, identity: Identity) -> NoReturn:
    """A party on this machine: it answers one caller after the other, each with a certificate of the CA, for ever."""
    context = identity.context(ssl.Purpose.CLIENT_AUTH)
    with socket.create_server((host, port)) as listener:
        while True:
            plain, _ = listener.accept()
            plain.settimeout(_SHAKE)
            with suppress(OSError):  # a stranger, or one who is silent
                end = _Wire(context.wrap_socket(plain, server_side=True))
                with suppress(EOFError):
                    _answering(end, party)
            plain.close()


class _Wire:
    """Messages on a socket: eight bytes that say how long one is, then the message."""

    def __init__(self, line: ssl.SSLSocket) -> None:
        line.settimeout(_PATIENCE)
        self.line = line

    def send_bytes(self, message: bytes, /) -> None:
        self.line.sendall(len(message).to_bytes(8, "little") + message)

    def recv_bytes(self, most: int, /) -> bytes:
        size = int.from_bytes(self._read(8), "little")
        if size > most:
            raise OSError(f"a message of {size} bytes is longer than {most}")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            part = self.line.recv(min(size - len(found), 2**20))
            if not part:
                raise EOFError("the line ended")
            found += part
        return bytes(found)

    def close(self) -> None:
        self.line.close()


def _made(end: End, make: Callable[..., Any], given: tuple[Any, ...]) -> None:
    """A party's process."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import torch

    torch.set_num_threads(1)
    with suppress(EOFError, OSError):
        _answering(end, make(*given))


def _answering(end: End, party: Any) -> NoReturn:
    """Answers until the line ends."""
    while True:
        message = end.recv_bytes(_MOST)
        try:
            what, arrays = _unpacked(message)
            said = _packed(what, party.answer(what, arrays))
        except FanbuError as error:
            said = _packed(f"{_ERROR}: {error}", {})
        end.send_bytes(said)


def _packed(what: str, arrays: Mapping[str, Array]) -> bytes:
    from safetensors.numpy import save

    return save({n: np.ascontiguousarray(a) for n, a in arrays.items()}, {"what": what})


def _unpacked(message: bytes) -> tuple[str, dict[str, Array]]:
    """The word and the arrays. DataError for what is none."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        size = int.from_bytes(message[:8], "little")
        head = json.loads(message[8 : 8 + size])
        return str(head["__metadata__"]["what"]), load(message)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise DataError(
            "session-broken", f"a message cannot be read: {error}", remedy="let all run the same version of fanbu"
        ) from None
