"""``fanbu export``: a plain checkpoint that opens without fanbu, and nothing of the user's is overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import Done, finished_round
from fanbu.errors import FanbuError, IntegrityError
from fanbu.export import export
from fanbu.model import open_model
from test_cli import Command, error_of
from test_cli import copied as copied
from test_cli import fanbu as fanbu


@pytest.fixture
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return finished_round(tmp_path_factory)


def test_the_champion_opens_with_plain_transformers(done: Done, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    made = export(done.workspace, tmp_path / "out")
    assert made.digest == done.champion
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    logits = network(**tokenizer("soup please", return_tensors="pt")).logits
    assert logits.shape == (1, 6)
    assert (tmp_path / "out" / "README.md").read_text().startswith("---")


def test_a_specialist_and_a_model_of_the_history(done: Done, tmp_path: Path, fanbu: Command) -> None:
    code, told = fanbu("export", done.recipe, tmp_path / "food", "--domain", "food", "--json")
    assert code == 0
    assert told["digest"] == done.record["domains"]["food"]["specialist"]["digest"]
    assert open_model(tmp_path / "food").labels == ("food/bread", "food/fruit", "food/soup")
    first = json.loads((done.workspace / "history.jsonl").read_text().split("\n")[0])["model"]
    code, told = fanbu("export", done.workspace, tmp_path / "first", "--model", first[:10], "--json")
    assert (code, told["digest"]) == (0, first)
    for flags, wrong in (
        (("--domain", "fod"), "unknown-domain"),
        (("--model", first[:3]), "unknown-model"),
        (("--model", "ffffffffff"), "unknown-model"),
        (("--model", first, "--domain", "food"), "flag"),
    ):
        error_of(fanbu("export", done.workspace, tmp_path / "no", *flags, "--json"), 2, wrong)
    error_of(fanbu("export", tmp_path, tmp_path / "no", "--json"), 2, "no-rounds")
    assert not (tmp_path / "no").exists()


def test_what_is_there_stays_unless_it_is_a_checkpoint_and_forced(done: Done, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    export(done.workspace, mine)  # an empty folder will do
    (mine / "notes.md").write_text("old")
    with pytest.raises(FanbuError, match="--force"):
        export(done.workspace, mine)
    export(done.workspace, mine, force=True)
    assert not (mine / "notes.md").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("years")
    with pytest.raises(FanbuError, match="no checkpoint"):
        export(done.workspace, other, force=True)
    assert (other / "thesis.txt").read_text() == "years"


def test_a_workspace_that_was_moved_or_changed(copied: tuple[Done, Path], tmp_path: Path) -> None:
    done, workspace = copied
    moved = Path(shutil.move(workspace, tmp_path / "moved"))
    record = next(moved.glob("rounds/*/record.json"))
    text = record.read_text().replace(str(done.workspace), str(workspace))  # as if it had been made there
    record.write_text(text)
    assert export(moved, tmp_path / "food", domain="food").digest
    weights = moved / json.loads((moved / "champion.json").read_text())["path"] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(IntegrityError):
        export(moved, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_card_gets_one(
    bert: Path, done: Done, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fanbu.export._champion", lambda _: bert)
    made = export(done.workspace, tmp_path / "out")
    assert "BertModel" in (made.path / "README.md").read_text()
    assert made.digest == open_model(bert).digest
