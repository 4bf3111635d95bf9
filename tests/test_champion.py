"""A workspace's champion is what the next candidate must beat, whoever made it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import finished_round
from fanbu.errors import RetryError, UsageError
from fanbu.generations import run
from fanbu.ledger import Workspace
from fanbu.recipe import load_recipe


def test_a_candidate_that_is_no_better_does_not_replace_the_champion(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    done = finished_round(tmp_path_factory)
    shutil.copytree(done.workspace, tmp_path / "ws")
    same = [f"workspace={tmp_path / 'ws'}", "feedback.train.lr=0.0", "feedback.train.head_lr=0.0"]
    record = run(load_recipe(done.recipe, same))
    assert not record["verdict"]["accepted"]
    assert record["incumbent"]["digest"] == record["champion"]["model"] == done.champion


def test_rollback_and_promote_move_one_pointer(tmp_path: Path) -> None:
    ledger = Workspace(tmp_path)
    base = {"model": "a" * 64, "path": "stages/a"}

    def decide(letter: str, number: int, accepted: bool, before: str | None) -> bool:
        entry = {"model": letter * 64, "path": f"stages/{letter}", "round": f"r{number}", "number": number}
        return ledger.decide(entry, base, accepted, before=before, reason="said", what="rows")

    assert decide("b", 1, True, None)
    assert not decide("b", 1, True, None)
    assert decide("c", 2, False, "b" * 64)
    with pytest.raises(RetryError, match="the champion changed"):
        decide("d", 3, True, "c" * 64)
    assert [e["number"] for e in ledger.rounds()] == [1, 2]
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
