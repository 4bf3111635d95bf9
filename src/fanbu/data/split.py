"""Carving splits and capping rows: by hash, so that the same row always falls on the same side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from typing import Any

from fanbu.data.check import normalised
from fanbu.data.load import RawRow
from fanbu.types import digest


def carve(rows: Sequence[RawRow], share: float, salt: str) -> tuple[list[RawRow], list[RawRow]]:
    """(kept, carved): about ``share`` of each label's rows is carved out, at least one where a label has two or more.

    A row is carved where the hash of its text, as a number in [0, 1), is below ``share``. So the split depends neither
    on the order of rows nor on a random state, equal texts stay on one side, and when rows are added later, a row
    that was kept is not carved: what was trained on in one round is not tested in the next. One row of each label is
    kept whatever its hash, and one of two or more carved; in labels of a few rows that one may change sides.
    """
    carved = set()
    for texts in _by_label(rows, salt).values():
        keys = sorted(texts)
        below = [key for key in keys if _below(key, share)]
        chosen = (below or keys[:1])[: len(keys) - 1]
        carved |= {row.id for key in chosen for row in texts[key]}
    return [r for r in rows if r.id not in carved], [r for r in rows if r.id in carved]


def not_carved(rows: Sequence[RawRow], share: float, salt: str) -> list[RawRow]:
    """The rows that ``carve`` would not carve, if they had a label: for rows that may get one later."""
    return [row for row in rows if not _below(_hash(row, salt), share)]


def _below(key: str, share: float) -> bool:
    return int(key[:13], 16) < share * 16**13


def _hash(row: RawRow, salt: str) -> str:
    return digest([salt, normalised(row.text)])


def portion(rows: Sequence[RawRow], arrived: int, of: int, salt: str) -> list[RawRow]:
    """The rows of the first ``arrived`` of ``of`` equal portions; each label's rows are spread over all portions.

    By the hash of the text, so that equal texts arrive together; order is kept.
    """
    chosen = set()
    for texts in _by_label(rows, salt).values():
        keys = sorted(texts)
        here = [key for number, key in enumerate(keys) if number * of // len(keys) < arrived]
        chosen |= {row.id for key in here for row in texts[key]}
    return [row for row in rows if row.id in chosen]


def _by_label(rows: Sequence[RawRow], salt: str) -> dict[str | None, dict[str, list[RawRow]]]:
    """Rows by label and by the hash of their text."""
    groups: dict[str | None, dict[str, list[RawRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.label][_hash(row, salt)].append(row)
    return groups


def by_hash(keys: Sequence[Any], labels: Sequence[Hashable]) -> list[int]:
    """Numbers of rows in the order of their keys' hashes, the first of each label before all others."""
    seen: set[Hashable] = set()
    firsts: list[int] = []
    rest: list[int] = []
    hashes = [digest(key) for key in keys]
    for number in sorted(range(len(keys)), key=hashes.__getitem__):
        (rest if labels[number] in seen else firsts).append(number)
        seen.add(labels[number])
    return [*firsts, *rest]


def cap(rows: Sequence[RawRow], limit: int | None, salt: str) -> list[RawRow]:
    """At most ``limit`` rows, chosen by hash, every label kept as far as there is room; order is kept."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    order = by_hash([[salt, row.id, row.text] for row in rows], [row.label for row in rows])
    return [rows[number] for number in sorted(order[:limit])]
