"""Rows from JSONL, CSV, TSV, Parquet (each also gzipped where that is text) or a ``datasets`` name."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanbu.data.media import media_row
from fanbu.errors import DataError, UsageError, needs_extra

MAX_TEXT = 1_000_000
MAX_FILE = 4 * 2**30
FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", "and .jsonl.gz, .csv.gz, .tsv.gz")


@dataclass(frozen=True)
class RawRow:
    """One row as it was read: ``label`` is None where there is none."""

    id: str
    text: str
    label: str | None


def load_rows(
    source: str | Sequence[str], columns: Mapping[str, str] | None = None, *, labelled: bool = True, kind: str = "text"
) -> list[RawRow]:
    """Reads all rows of a file, of ``datasets:NAME[/CONFIG]:SPLIT``, or of several of these.

    ``columns`` maps ``text``, ``label`` and ``id`` to the names that the file uses; without an id column, the
    row's number is its id (after the file's number, from the second file on). ``kind`` is ``image`` or ``audio``
    where rows hold these in a column of that name (``data.media``). Raises DataError that names the file and the row.
    """
    if not isinstance(source, str):
        parts = enumerate(source)
        return [row for n, one in parts for row in _load_file(one, columns, labelled, kind, f"{n}/" if n else "")]
    return _load_file(source, columns, labelled, kind, "")


def load_texts(source: str) -> list[str]:
    """The texts alone; of a .txt file the lines that are not blank. Raises DataError as ``load_rows`` does."""
    path = Path(source).expanduser()
    if path.suffix != ".txt" or not path.is_file():
        return [row.text for row in load_rows(source, labelled=False)]
    return [line for line in _text(path).splitlines() if line.strip()]


def _load_file(source: str, columns: Mapping[str, str] | None, labelled: bool, kind: str, before: str) -> list[RawRow]:
    known = {kind: kind, "label": "label", "id": "id"}
    names = {**known, **(columns or {})}
    unknown = set(names) - set(known)
    if unknown:
        raise UsageError("column-map", "unknown key in columns", allowed=known, got=unknown, remedy="remove it")
    rows, folder = [], Path(source).expanduser().parent
    for number, record in enumerate(raw_records(source)):
        text, label = record.get(names[kind]), record.get(names["label"])
        where = f"row {number + 1} of {source}"
        if kind != "text":
            text = media_row(text, kind, folder, where)
        elif not isinstance(text, str):
            raise _column(where, names["text"], record)
        elif len(text) > MAX_TEXT:
            raise DataError(
                "text-too-long",
                f"{where} is too long",
                allowed=f"{MAX_TEXT} characters",
                got=len(text),
                remedy="cut it",
            )
        if labelled and (label is None or label == "" or label != label):
            raise _column(where, names["label"], record)
        rows.append(
            RawRow(str(record.get(names["id"], f"{before}{number}")), text, None if label is None else str(label))
        )
    return rows


def _column(where: str, column: str, record: Mapping[str, Any]) -> DataError:
    return DataError(
        "column-missing",
        f"{where} has no usable {column!r}",
        allowed="a text, and a label where labels are needed",
        got=f"columns {sorted(map(str, record))}",
        remedy="name the right columns under `columns: {text: ..., label: ...}`, or remove the row",
    )


def raw_records(source: str) -> Iterator[Mapping[str, Any]]:
    """The rows of a file or ``datasets`` name as they are, column by column."""
    if source.startswith("datasets:"):
        yield from _hub(source)
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise DataError("data-not-found", f"no file {path}", allowed=FORMATS, got=source, remedy="check the path")
    suffix = Path(path.name.removesuffix(".gz")).suffix
    try:
        if suffix == ".parquet":
            import pyarrow.parquet

            yield from pyarrow.parquet.read_table(path).to_pylist()
        elif suffix == ".jsonl":
            yield from _jsonl(path)
        elif suffix == ".json":
            records = json.loads(_text(path))
            if not isinstance(records, list) or not all(isinstance(r, dict) for r in records):
                raise ValueError("not a list of objects")
            yield from records
        elif suffix in {".csv", ".tsv"}:
            csv.field_size_limit(4 * MAX_TEXT)
            lines = io.StringIO(_text(path), newline="")
            yield from csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
        else:
            raise DataError("data-format", f"{path} is in no known format", allowed=FORMATS, remedy="convert it")
    except (ValueError, csv.Error, OSError, EOFError, RecursionError) as error:
        raise DataError("data-broken", f"{path} cannot be read: {error}", remedy="repair the file") from None


def _text(path: Path) -> str:
    if path.suffix == ".gz":
        with gzip.open(path) as stream:
            raw = stream.read(MAX_FILE + 1)
    else:
        raw = path.read_bytes()
    if len(raw) > MAX_FILE:
        raise DataError(
            "file-too-large", f"{path}", allowed=f"{MAX_FILE} bytes of text", remedy="use Parquet, or split it"
        )
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            "not-utf8",
            f"{path} is not UTF-8 at line {line}",
            allowed="UTF-8",
            got=f"byte {raw[error.start]:#x}",
            remedy="convert it, for example with: iconv -f latin1 -t utf-8",
        ) from None


def _jsonl(path: Path) -> Iterator[Mapping[str, Any]]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
            if not isinstance(record, dict):
                raise ValueError(f"line {number} is not an object")
            yield record


def _hub(source: str) -> Iterator[Mapping[str, Any]]:
    with needs_extra("datasets"):
        import datasets
    name, _, split = source.removeprefix("datasets:").rpartition(":")
    if not name:
        raise UsageError("data-name", f"{source} names no split", allowed="datasets:NAME:SPLIT", remedy="add :train")
    config = None
    if name.count("/") == 2 and not Path(name).exists():
        name, _, config = name.rpartition("/")
    try:
        found = datasets.load_dataset(name, config, split=split)
        for column, kind in found.features.items():
            if isinstance(kind, (datasets.Image, datasets.Audio)):  # as bytes: they are decoded here
                found = found.cast_column(column, type(kind)(decode=False))
        yield from found
    except Exception as error:  # the library raises many kinds
        raise DataError("data-not-found", f"{source}: {error}", remedy="check name, split and connection") from None
