"""What must hold of rows before anything is trained on them; each failure says what to do."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

from fanbu.data.load import RawRow
from fanbu.errors import DataError


def normalised(text: str) -> str:
    """What two texts are compared by: NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def check_split(domain: str, split: str, rows: Sequence[RawRow]) -> None:
    """Raises DataError for an empty split, duplicate ids, and empty texts."""
    if not rows:
        raise DataError(
            "empty-split", f"{domain}: {split} is empty", allowed="at least one row", got=0, remedy="give it rows"
        )
    twice = [name for name, count in Counter(row.id for row in rows).items() if count > 1]
    if twice:
        raise DataError(
            "duplicate-ids",
            f"{domain}: {split} has {len(twice)} ids more than once",
            allowed="each id once",
            got=twice[:5],
            remedy="remove the duplicates, or map `id` to a column that is unique",
        )
    empty = [row.id for row in rows if not row.text.strip()]
    if empty:
        raise DataError(
            "empty-text", f"{domain}: {split} has {len(empty)} rows without text", got=empty[:5], remedy="remove them"
        )


def check_labels(domain: str, train: Sequence[RawRow], others: dict[str, Sequence[RawRow]]) -> None:
    """Raises DataError where training knows one class only, or another split has labels that training lacks."""
    known = {row.label for row in train}
    if len(known) < 2:
        raise DataError(
            "one-class",
            f"{domain}: all training rows have one label",
            allowed="at least two labels",
            got=known,
            remedy="add rows of another label, or check that `label` names the right column",
        )
    for split, rows in others.items():
        unseen = {str(row.label) for row in rows} - {str(label) for label in known}
        if unseen:
            raise DataError(
                "unseen-labels",
                f"{domain}: {split} has labels that no training row has",
                allowed=sorted(map(str, known)),
                got=unseen,
                remedy="add training rows of these labels, or remove them from the split",
            )


def without_overlap(rows: Sequence[RawRow], held_out: Sequence[RawRow]) -> list[RawRow]:
    """The rows whose text is not among the held-out ones (compared as ``normalised``)."""
    taken = {normalised(row.text) for row in held_out}
    return [row for row in rows if normalised(row.text) not in taken]
