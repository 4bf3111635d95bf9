"""An owner's process that stays: it has loaded what answering takes, so that a question costs the work alone.

Flower starts a program for each message. That program hands the message on, through a socket that only this user may
open, and so needs neither torch nor models itself.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NoReturn

from fanbu.errors import UsageError
from fanbu.transport.centre import Message
from fanbu.transport.parcel import broken
from fanbu.types import digest

_AGAIN = 5.0
Answers = dict[str, Message]


def asked(request: Message, root: Path) -> Answers | None:
    """What the owner's process of the workspace ``root`` answers; None where there is none, or it ended meanwhile."""
    try:
        with Client(str(_address(root)), "AF_UNIX") as line:
            _send(line, *request)
            names = json.loads(line.recv_bytes())
            return {str(name): _received(line) for name in names}
    except (OSError, EOFError):
        return None


def stay(root: Path, answer: Callable[[Message], Answers]) -> NoReturn:
    """Answers for ever."""
    address = _address(root)
    address.parent.mkdir(mode=0o700, exist_ok=True)
    place = address.parent.lstat()
    if place.st_uid != os.getuid() or place.st_mode & 0o077 or not stat.S_ISDIR(place.st_mode):
        raise UsageError(
            "worker-place", f"{address.parent} is not this user's own folder", allowed="a folder that only it may open",
            got=oct(place.st_mode), remedy="remove it",
        )  # fmt: skip
    address.unlink(missing_ok=True)  # of one that was killed
    with Listener(str(address), "AF_UNIX") as listener:
        while True:
            with listener.accept() as line:
                _serve(line, answer)


def _address(root: Path) -> Path:
    """The socket of a workspace: a workspace's own path may be too long for one."""
    return Path(gettempdir()) / f"fanbu-{os.getuid()}-{digest(str(root.resolve()))[:16]}" / "owner"


def _serve(line: Connection[Any, Any], answer: Callable[[Message], Answers]) -> None:
    try:
        answers = answer(_received(line))
        line.send_bytes(json.dumps(list(answers)).encode())
        for said, files in answers.values():
            _send(line, said, files)
    except (OSError, EOFError) as error:  # who asked is gone
        print(f"an answer was not taken: {error}", file=sys.stderr, flush=True)


@contextmanager
def kept(part: Path, root: Path) -> Iterator[None]:
    """Keeps such a process running; where it ends, it is started again."""
    ended = threading.Event()
    running: list[subprocess.Popen[bytes]] = []

    def keep() -> None:
        while not ended.is_set():
            command = [sys.executable, "-m", "fanbu.serve.worker", str(part), str(root)]
            running[:] = [subprocess.Popen(command, stdin=subprocess.PIPE)]
            running[0].wait()
            ended.wait(_AGAIN)

    threading.Thread(target=keep, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        for process in running:
            process.terminate()


def _end_with_parent() -> None:
    """The pipe from who started this process ends with it, however that ends."""
    sys.stdin.buffer.read()
    os._exit(1)


def _send(line: Connection[Any, Any], said: Mapping[str, Any], files: Mapping[str, bytes]) -> None:
    line.send_bytes(json.dumps({"said": dict(said), "files": list(files)}).encode())
    for content in files.values():
        line.send_bytes(content)


def _received(line: Connection[Any, Any]) -> Message:
    head = json.loads(line.recv_bytes())
    if not isinstance(head, dict) or not isinstance(head.get("said"), dict) or not isinstance(head.get("files"), list):
        raise broken("a message cannot be read", type(head).__name__)
    return head["said"], {str(name): line.recv_bytes() for name in head["files"]}


def main() -> None:
    """``python -m fanbu.serve.worker PART WORKSPACE``, until its standard input ends."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a centre names no model that an owner would fetch
    from fanbu.owner import answer
    from fanbu.progress import log

    part, root = Path(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stay(root, lambda request: answer(request, part, root, log=log))


if __name__ == "__main__":
    main()
