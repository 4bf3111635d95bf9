"""Labels in other languages: flat tables of English texts and their translations, one file an area."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

from fanbu.errors import UsageError

LANGUAGES = ("en", "zh")


@cache
def table(area: str, lang: str) -> dict[str, str]:
    """All translations of one area (a file ``LANG/AREA.json`` beside this module); empty for English."""
    if lang not in LANGUAGES:
        raise UsageError("unknown-language", "--lang", allowed=LANGUAGES, got=lang, remedy="take one of these")
    if lang == "en":
        return {}
    found: dict[str, str] = json.loads((Path(__file__).parent / lang / f"{area}.json").read_text(encoding="utf-8"))
    return found


def translator(area: str, lang: str) -> Callable[[str], str]:
    """A function that gives an English text in ``lang``; what has no translation stays English."""
    known = table(area, lang)
    return lambda text: known.get(text, text)
