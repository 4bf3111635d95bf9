"""A look at one domain's rows: how many, which labels, what is wrong with them, and what a repair would keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fanbu.data.check import normalised
from fanbu.data.load import raw_records
from fanbu.errors import DataError
from fanbu.init.columns import Ask, Columns, Record, guess, missing
from fanbu.init.files import Files

Splits = dict[str, list[Record]]


@dataclass(frozen=True)
class Look:
    """What a domain holds. ``repaired`` has the rows of splits that cannot be used as they are, cleaned."""

    name: str
    files: Mapping[str, Path]
    columns: Columns
    rows: Mapping[str, int]
    labels: Mapping[str, int]
    texts: Sequence[str]
    warnings: Sequence[str]
    repaired: Mapping[str, Sequence[Record]] = field(default_factory=dict)


def look(
    files: Files, said: Mapping[str, str | None], ask: Ask | None = None, *, labelled: bool | None = None
) -> Look:  # fmt: skip
    """Reads a domain's files and says what is in them. ``labelled`` False takes the texts alone.

    ``said`` holds the columns that the user named (``text``, ``label``, ``name`` for the id).
    """
    raw: Splits = {split: list(raw_records(str(path))) for split, path in files.splits.items()}
    if not raw["train"]:
        path = files.splits["train"]
        raise DataError("empty-split", f"{path} has no rows", got=0, remedy="give a file with rows")
    columns = guess(raw["train"], str(files.splits["train"].name), **said, ask=ask)
    if labelled is False:
        columns = Columns(columns.text, None, columns.id)
    columns = Columns(columns.text, columns.label, _usable_id(raw, columns))
    clean, lost = _clean(raw, columns)
    label = columns.label
    labels = Counter(str(r[label]) for r in clean["train"]) if label else Counter()
    return Look(
        files.name, files.splits, columns, {split: len(rows) for split, rows in clean.items()}, labels,
        [r[columns.text] for r in clean["train"]], [*lost, *_trouble(clean["train"], columns, labels)],
        {split: rows for split, rows in clean.items() if rows != raw.get(split, [])},
    )  # fmt: skip


def _usable_id(raw: Splits, columns: Columns) -> str | None:
    """The id's column. Where ``id`` has values twice or none, a name that no column has: rows are then numbered."""
    known = {k for rows in raw.values() for row in rows[:100] for k in row}
    for name in (columns.id, *(["id"] if "id" in known else [])):
        split_values = [[row.get(name) for row in rows] for rows in raw.values()] if name else []
        if name and all(len(set(map(str, v))) == len(v) and not any(map(missing, v)) for v in split_values):
            return name
    return "row number" if "id" in known else None


def _clean(raw: Splits, columns: Columns) -> tuple[Splits, list[str]]:
    """(usable rows by split, what was taken out): rows need a text, labelled rows a label that training knows."""
    text, label = columns.text, columns.label
    lost: list[str] = []
    splits: Splits = {}
    for split, rows in raw.items():
        splits[split] = [r for r in rows if isinstance(r.get(text), str) and not missing(r[text])]
        if count := len(rows) - len(splits[split]):
            lost.append(f"{count} rows of {split} have no text: left out")
    if label is None:
        return splits, lost
    unnamed = [r for r in splits["train"] if missing(r.get(label))]
    if unnamed:
        lost.append(f"{len(unnamed)} rows of train have no label: used as unlabelled texts")
        splits["unlabelled"] = [*splits.get("unlabelled", []), *unnamed]
        splits["train"] = [r for r in splits["train"] if not missing(r.get(label))]
    known = {str(r[label]) for r in splits["train"]}
    for split in {"valid", "test"} & set(splits):
        kept = [r for r in splits[split] if not missing(r.get(label)) and str(r[label]) in known]
        if count := len(splits[split]) - len(kept):
            lost.append(f"{count} rows of {split} have no label, or one that no training row has: left out")
        splits[split] = kept
    for split, rows in splits.items():
        if not rows:
            raise DataError("empty-split", f"no row of {split} can be used", got=lost, remedy="check text and label")
    return splits, lost


def _trouble(train: Sequence[Record], columns: Columns, labels: Mapping[str, int]) -> list[str]:
    """What a person should know; none of it stops a run."""
    told = []
    by_text: dict[str, Counter[Any]] = {}
    for row in train:
        label = None if columns.label is None else str(row[columns.label])
        by_text.setdefault(normalised(row[columns.text]), Counter())[label] += 1
    if twice := sum(sum(found.values()) - 1 for found in by_text.values()):
        told.append(f"{twice} rows of train repeat the text of another")
    if torn := sum(len(found) > 1 for found in by_text.values()):
        told.append(f"{torn} texts of train have more than one label")
    if single := [name for name, count in labels.items() if count == 1]:
        shown = ", ".join(single[:5]) + (", ..." if len(single) > 5 else "")
        told.append(f"{len(single)} labels have one row only, so they cannot be tested: {shown}")
    if len(train) < 50:
        told.append(f"{len(train)} training rows are very few")
    return told
