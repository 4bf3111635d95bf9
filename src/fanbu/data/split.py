"""Carving splits and capping rows: by hash, so that the same row always falls on the same side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from fanbu.data.check import normalised
from fanbu.data.load import RawRow
from fanbu.types import digest


def carve(rows: Sequence[RawRow], share: float, salt: str) -> tuple[list[RawRow], list[RawRow]]:
    """(kept, carved): ``share`` of each label's rows is carved out, at least one where a label has two or more.

    Rows are ordered by the hash of their text, so the split depends neither on their order nor on a random state,
    and equal texts stay on one side.
    """
    groups: dict[str | None, dict[str, list[RawRow]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        groups[row.label][digest([salt, normalised(row.text)])].append(row)
    carved = set()
    for texts in groups.values():
        keys = sorted(texts)
        count = max(round(share * len(keys)), 1) if len(keys) > 1 else 0
        carved |= {row.id for key in keys[:count] for row in texts[key]}
    return [r for r in rows if r.id not in carved], [r for r in rows if r.id in carved]


def cap(rows: Sequence[RawRow], limit: int | None, salt: str) -> list[RawRow]:
    """At most ``limit`` rows, chosen by hash, every label kept as far as there is room; order is kept."""
    if limit is None or len(rows) <= limit:
        return list(rows)
    ranked = sorted(rows, key=lambda row: digest([salt, row.id, row.text]))
    seen: set[str | None] = set()
    firsts: list[str] = []
    rest: list[str] = []
    for row in ranked:
        (rest if row.label in seen else firsts).append(row.id)
        seen.add(row.label)
    chosen = set([*firsts, *rest][:limit])
    return [row for row in rows if row.id in chosen]
