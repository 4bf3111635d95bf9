"""Rows from files and from `datasets`, splits by hash, and the standard library as data."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from fanbu.data.load import RawRow, load_rows
from fanbu.data.split import cap, carve
from fanbu.data.standard_library import AREAS, function_bodies
from fanbu.domain import load_domain

ROWS = [{"id": f"r{i}", "text": f'row {i}, "quoted"\nsecond line', "label": "ab"[i % 2]} for i in range(6)]
EXPECTED = [RawRow(r["id"], r["text"], r["label"]) for r in ROWS]


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    import csv

    lines = "".join(json.dumps(r) + "\n" for r in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as stream:
        stream.write(lines)
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["id", "text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)
    pa.parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet"):
        assert load_rows(str(tmp_path / name)) == EXPECTED, name


def test_columns_are_mapped(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("question,intent\nwhere is my card,card\n")
    assert load_rows(str(tmp_path / "a.csv"), {"text": "question", "label": "intent"}) == [
        RawRow("0", "where is my card", "card")
    ]


def test_datasets_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in ROWS))
    assert load_rows(f"datasets:{tmp_path / 'set'}:train") == EXPECTED


def test_a_row_stays_on_its_side_whatever_the_order() -> None:
    rows = [RawRow(str(i), f"text {i}", "abc"[i % 3]) for i in range(90)]
    kept, carved = carve(rows, 0.2, "salt")
    assert len(kept) + len(carved) == 90
    assert 6 <= len(carved) <= 30
    again = carve(rows[::-1], 0.2, "salt")[1]
    assert {r.id for r in carved} == {r.id for r in again}
    assert {r.label for r in carved} == {"a", "b", "c"}
    assert {r.id for r in carve(rows, 0.2, "other")[1]} != {r.id for r in carved}


def test_a_cap_keeps_every_label() -> None:
    rows = [RawRow(str(i), f"text {i}", "rare" if i == 57 else "common") for i in range(100)]
    capped = cap(rows, 10, "salt")
    assert len(capped) == 10
    assert {r.label for r in capped} == {"rare", "common"}
    assert cap(rows, None, "salt") == rows


def test_label_names_may_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text number {i},{i % 2}\n" for i in range(40)))
    for names in (["no", "yes"], {0: "no", 1: "yes"}):
        domain = load_domain("d", train=str(tmp_path / "a.csv"), test=0.25, labels=names)  # type: ignore[arg-type]
        assert domain.labels == ("no", "yes")
        assert set(domain.test.labels or ()) == {0, 1}


@pytest.mark.parametrize("area", sorted(AREAS))
def test_function_bodies_hide_their_module(area: str) -> None:
    rows = function_bodies(area)
    assert len(rows) > 500
    for row in rows[:200]:
        assert row.label in AREAS[area]
        assert not row.text.startswith('"""')
        assert not re.search(rf"\b{row.label}\b", row.text)
    assert len({row.text for row in rows}) == len(rows) == len({row.id for row in rows})
