"""Which column is the text, which the label, which the id: by name and by content, and never a silent guess."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fanbu.errors import DataError, UsageError

Record = Mapping[str, Any]
Ask = Callable[[str, Sequence[str], str], str]

_TEXT = {
    "text", "texts", "sentence", "question", "query", "message", "utterance", "content", "body", "review", "comment",
    "document", "paragraph", "description", "prompt", "input", "abstract", "title", "headline", "tweet", "request",
    "ticket", "passage", "article", "note", "文本", "内容", "评论", "问题", "句子", "正文",
}  # fmt: skip
_LABEL = {
    "label", "labels", "intent", "category", "class", "target", "topic", "sentiment", "tag", "y", "type", "label_name",
    "label_text", "class_name", "intent_name", "category_name", "标签", "类别", "分类", "意图", "情感",
}  # fmt: skip
_ID = {"id", "uid", "uuid", "guid", "row_id", "index", "idx", "number", "no", "编号", "序号"}
_LOOKED_AT = 5000  # rows that content is judged by


@dataclass(frozen=True)
class Columns:
    """The names of a domain's columns; None where there is none."""

    text: str
    label: str | None
    id: str | None


@dataclass(frozen=True)
class Column:
    """What one column holds: rows that are filled, different values, mean length, and of what kind they are."""

    name: str
    rows: int
    filled: int
    distinct: int
    length: float
    strings: bool
    whole: bool
    numbers: bool
    spaced: float

    @property
    def like_text(self) -> bool:
        """Strings that differ, with words in them (or letters of a script without spaces)."""
        return self.strings and not self.numbers and self.spaced > 0.5 and self.distinct > 0.2 * self.filled

    @property
    def like_label(self) -> bool:
        """Few different values that come again and again: short strings, or small whole numbers."""
        few = 2 <= self.distinct <= min(1000, self.filled / 2)
        return few and self.length <= 80 and (self.whole or not self.numbers)


def guess(
    records: Sequence[Record], where: str, *, text: str | None = None, label: str | None = None,
    name: str | None = None, ask: Ask | None = None,
) -> Columns:  # fmt: skip
    """The columns of rows; ``text``, ``label`` and ``name`` (the id's) are what the user said.

    Where it is not clear, ``ask`` is asked; without it, raises UsageError that names the columns and the flag to
    give. DataError where no column can be the text. A label of None means that no column can be one.
    """
    found = describe(records)
    if len(found) == 1 and (other := next((c for c in ";\t|," if c in found[0].name), None)):
        raise DataError(
            "data-format", f"{where} is one column wide", allowed="commas between columns (.csv), or tabs (.tsv)",
            got=f"{other!r} in the first line", remedy="save it with commas, or rename it to .tsv where it has tabs",
        )  # fmt: skip
    for flag, said in (("--text", text), ("--label", label), ("--id", name)):
        if said is not None and said not in {c.name for c in found}:
            raise UsageError(
                "no-column", f"{where} has no column {said!r}", allowed=[c.name for c in found], got=f"{flag} {said}",
                remedy="take one of these",
            )  # fmt: skip
    chosen = text or _text(found, where, ask)
    own = label or _label([c for c in found if c.name != chosen], records, where, ask)
    return Columns(chosen, own, name or _id([c for c in found if c.name not in {chosen, own}]))


def describe(records: Sequence[Record]) -> list[Column]:
    """What the columns hold, in the order of the file."""
    some = records[:: max(1, len(records) // _LOOKED_AT)]
    names = dict.fromkeys(str(k) for record in some for k in record if k is not None)
    return [_describe(name, [record.get(name) for record in some]) for name in names]


def missing(value: Any) -> bool:
    """No value: nothing, an empty text, or not a number."""
    return value is None or value != value or (isinstance(value, str) and not value.strip())


def _describe(name: str, values: Sequence[Any]) -> Column:
    filled = [v for v in values if not missing(v)]
    plain = [str(v) for v in filled]
    scalar = all(isinstance(v, (str, int, float)) for v in filled)
    return Column(
        name, len(values), len(filled), len(set(plain)), sum(map(len, plain)) / max(len(plain), 1),
        all(isinstance(v, str) for v in filled) and bool(filled),
        scalar and all(_number(v) is not None and _number(v) == int(_number(v) or 0) for v in plain),
        not scalar or all(_number(v) is not None for v in plain),
        sum(" " in v.strip() or any(c > "\u2e80" for c in v) for v in plain) / max(len(plain), 1),
    )  # fmt: skip


def _number(value: str) -> float | None:
    try:
        got = float(value)
    except ValueError:
        return None
    return got if abs(got) < 1e15 else None


def _text(columns: Sequence[Column], where: str, ask: Ask | None) -> str:
    strings = [c for c in columns if c.strings and not c.numbers]
    for column in strings:
        if column.name.lower() == "text":
            return column.name
    called = [c for c in strings if c.name.lower() in _TEXT]
    fitting = called or [c for c in strings if c.like_text]
    fitting = sorted(fitting, key=lambda c: -c.length)
    if not fitting and not strings:
        raise DataError(
            "no-text", f"{where} has no column with texts", got=[c.name for c in columns],
            remedy="a text is a string; the first line of a CSV file names the columns",
        )  # fmt: skip
    longest_by_far = len(fitting) > 1 and fitting[0].length >= 2 * fitting[1].length and not called
    if len(fitting) == 1 or longest_by_far:
        return fitting[0].name
    return _unclear("text", [c.name for c in fitting or strings], columns, where, ask)


def _label(columns: Sequence[Column], records: Sequence[Record], where: str, ask: Ask | None) -> str | None:
    for column in columns:
        if column.name.lower() == "label" and (column.like_label or column.distinct == 1):
            twin = next((c for c in columns if c.name.lower() in {"label_name", "label_text"} and c.like_label), None)
            return twin.name if twin and _same(column, twin, records) else column.name
    called = [c for c in columns if c.name.lower() in _LABEL and c.like_label]
    fitting = called or [c for c in columns if c.like_label and not _named_id(c)]
    others = [c for c in columns if c not in fitting and not _named_id(c)]
    if len(called) == 1 or (len(fitting) == 1 and not others):
        return fitting[0].name
    if not fitting:
        return None
    return _unclear("label", [c.name for c in fitting], columns, where, ask)


def _same(one: Column, two: Column, records: Sequence[Record]) -> bool:
    """Whether two columns say the same in other words."""
    pairs = {(str(r.get(one.name)), str(r.get(two.name))) for r in records}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def _named_id(column: Column) -> bool:
    return column.name.lower() in _ID or column.name.lower().endswith(("_id", "-id"))


def _id(columns: Sequence[Column]) -> str | None:
    """A column that is named like an id and never says the same twice."""
    fitting = [c for c in columns if _named_id(c) and c.filled == c.distinct == c.rows]
    return min(fitting, key=lambda c: c.name.lower() != "id").name if fitting else None


def _unclear(what: str, candidates: Sequence[str], columns: Sequence[Column], where: str, ask: Ask | None) -> str:
    known = [c.name for c in columns]
    if ask is not None:
        return ask(f"{where}: which column is the {what}?", known, candidates[0])
    raise UsageError(
        "column-unclear", f"{where}: it is not clear which column is the {what}", allowed=known, got=candidates,
        remedy=f"say it: --{what} {candidates[0]} (or --{what} DOMAIN=COLUMN for one domain)",
    )  # fmt: skip
