"""The error tree. Every error says what is wrong, what is allowed, what was got, and what to do.

Exit codes of the command line: 0 done, 1 error, 2 usage, 3 the gate refused, 4 bad data, 5 integrity, 75 try again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FanbuError(Exception):
    """Base of all errors that fanbu raises on purpose.

    ``code`` is stable and names the kind of mistake; ``exit_code`` is what the command line returns.
    """

    exit_code = 1

    def __init__(self, code: str, what: str, *, allowed: object = None, got: object = None, remedy: str) -> None:
        self.code, self.what, self.allowed, self.got, self.remedy = code, what, allowed, got, remedy
        parts = [what]
        if allowed is not None:
            parts.append(f"allowed: {_short(allowed)}")
        if got is not None:
            parts.append(f"got: {_short(got)}")
        parts.append(f"remedy: {remedy}")
        super().__init__("; ".join(parts) + f" [{code}]")

    def __reduce__(self) -> tuple[object, ...]:
        """An error of a process is raised again in the one that started it."""
        said = {"allowed": self.allowed, "got": self.got, "remedy": self.remedy}
        said = {key: None if value is None else _short(value) for key, value in said.items()}
        return _again, (type(self), self.code, self.what, said)

    def as_dict(self) -> dict[str, str | None]:
        """The error for machines (``--json``)."""
        allowed = None if self.allowed is None else _short(self.allowed)
        got = None if self.got is None else _short(self.got)
        return {"code": self.code, "what": self.what, "allowed": allowed, "got": got, "remedy": self.remedy}


def _again(kind: type[FanbuError], code: str, what: str, said: dict[str, str]) -> FanbuError:
    return kind(code, what, allowed=said["allowed"], got=said["got"], remedy=said["remedy"])


class UsageError(FanbuError):
    """A recipe, flag or parameter that cannot be meant."""

    exit_code = 2


class DataError(FanbuError):
    """Rows, labels or splits that cannot be used."""

    exit_code = 4


class IntegrityError(FanbuError):
    """A file that is not what its manifest says, or a checkpoint that is broken or hostile."""

    exit_code = 5


class BoundaryError(FanbuError):
    """Something would leave its owner that the owner does not share."""


class FitError(FanbuError):
    """A method does not fit what the specialists offer."""


class RetryError(FanbuError):
    """The machine, not the input: disk full, a lock that did not come free. Finished work is kept."""

    exit_code = 75


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Within it a library that is missing is an error that names the extra to install."""
    try:
        yield
    except ImportError as error:
        raise UsageError(
            "extra-missing", f"the library {error.name} is not installed", remedy=f"pip install 'fanbu[{name}]'"
        ) from None


def _short(value: object, limit: int = 300) -> str:
    if isinstance(value, (list, tuple, set, frozenset)):
        text = ", ".join(str(v) for v in (sorted(value, key=str) if isinstance(value, (set, frozenset)) else value))
    else:
        text = str(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
