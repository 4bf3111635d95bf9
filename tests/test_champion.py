"""A workspace's champion is what the next candidate must beat, whoever made it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fanbu.errors import UsageError
from fanbu.ledger import Workspace
from fanbu.recipe import load_recipe
from fanbu.round import run
from test_resume import finished_round


def test_another_candidate_is_judged_against_the_champion(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    done = finished_round(tmp_path_factory)
    shutil.copytree(done.workspace, tmp_path / "ws")
    weaker = [f"workspace={tmp_path / 'ws'}", "feedback.train.epochs=1", "feedback.train.lr=0.00001"]
    record = run(load_recipe(done.recipe, weaker))
    assert not record["verdict"]["accepted"]
    assert record["champion"]["model"] == done.champion
    assert "champion of this workspace" in [row["name"] for row in record["table"]]


def test_a_champion_of_other_domains_is_not_replaced(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    import yaml

    done = finished_round(tmp_path_factory)
    shutil.copytree(done.workspace, tmp_path / "ws")
    value = yaml.safe_load(done.recipe.read_text())
    value["workspace"] = str(tmp_path / "ws")
    value["domains"] = {"sea": value["domains"]["rail"]}
    with pytest.raises(UsageError, match="does not know these domains"):
        run(load_recipe(value))


def test_rollback_and_promote_move_one_pointer(tmp_path: Path) -> None:
    ledger = Workspace(tmp_path)
    ledger.start(tmp_path / "stages" / "a", "a" * 64)
    assert ledger.decide("r1", True, tmp_path / "stages" / "b", "b" * 64, "better")
    assert not ledger.decide("r1", True, tmp_path / "stages" / "b", "b" * 64, "better")
    assert ledger.decide("r2", False, tmp_path / "stages" / "c", "c" * 64, "not better")
    champion = ledger.champion()
    assert champion is not None
    assert (champion["model"], champion["previous"]) == ("b" * 64, "a" * 64)
    assert ledger.rollback()["model"] == "a" * 64
    with pytest.raises(UsageError, match="no champion before"):
        ledger.rollback()
    assert ledger.promote("cccccc")["model"] == "c" * 64
    assert ledger.rollback()["model"] == "a" * 64
    with pytest.raises(UsageError, match="no single model"):
        ledger.promote("dddddd")
    events = [e["event"] for e in ledger.history()]
    assert events == ["started", "promoted", "refused", "rolled back", "promoted", "rolled back"]
