"""The report's words: every label is looked up here, in English or another language; data never is."""

from __future__ import annotations

from typing import Protocol

from fanbu.lang import translator

AREA = "report"


class Say(Protocol):
    """A label in the page's language, with ``values`` filled into its ``{names}``."""

    def __call__(self, text: str, /, **values: object) -> str:
        """The label."""
        ...


def words(lang: str) -> Say:
    """The labels in ``lang``. Raises UsageError where the language is not known."""
    look = translator(AREA, lang)

    def say(text: str, /, **values: object) -> str:
        found = look(text) if text else ""
        return found.format(**values) if values else found

    return say


def counted(t: Say, n: int, one: str, many: str) -> str:
    """``one`` or ``many`` with ``{n}`` filled in."""
    return t(one if n == 1 else many, n=n)
