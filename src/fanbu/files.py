"""Files that are there whole or not at all, also after a power cut."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fanbu.errors import RetryError


def write_text(path: Path, text: str) -> None:
    """A text file that is there whole or not at all, also after a power cut."""
    with durable(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def durable(path: Path) -> Iterator[Path]:
    """temp, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_error(error: OSError, path: Path) -> Exception:
    """A full disk, or a place that cannot be written, as a RetryError; any other OSError as it is."""
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return RetryError(
            "not-writable",
            f"no permission for {error.filename or path}",
            allowed="a folder that can be written",
            got=os.strerror(error.errno),
            remedy="check owner and mount, or name another workspace, then run again: what was finished is kept",
        )
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return RetryError(
            "disk-full",
            f"no room left to write {path}",
            allowed="free space",
            got=os.strerror(error.errno),
            remedy="free some space and run the same command again: what was finished is kept",
        )
    return error


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def noted(note: Path | None, make: Callable[[], Any]) -> Any:
    """What ``make`` gives, as JSON; with a note it is made once, for work that goes on after a kill: a time that is
    measured again may be another."""
    if note is None:
        return make()
    if not note.exists():
        write_text(note, json.dumps(make()))
    return json.loads(note.read_text(encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
