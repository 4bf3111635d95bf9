"""A workspace's champion is what the next candidate must beat, whoever made it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from conftest import finished_round, open_gate, tiny_recipe
from fanbu.errors import RetryError, UsageError
from fanbu.generations import run
from fanbu.heads import get_head
from fanbu.ledger import Workspace
from fanbu.model import load_network, open_model
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


def test_ways_back_follow_each_other(tmp_path: Path) -> None:
    value = {**tiny_recipe(tmp_path), "references": []}
    value["feedback"] = [value["feedback"], {"method": "probe"}]
    recipe = load_recipe(value)
    with open_gate():
        record = run(recipe)
    assert record["recipe"]["feedback"] == value["feedback"]
    assert record["candidate"]["method"] == "distill > probe"
    assert record["candidate"]["arguments"] == {"1.distill": {"train": value["feedback"][0]["train"]}, "2.probe": {}}
    assert record["candidate"]["made"]["1.distill"]["teachers"].keys() == value["domains"].keys()
    candidate = open_model(record["candidate"]["path"])
    assert candidate.manifest["method"] == "probe"
    made = Path(value["workspace"]).glob("stages/*/model")
    distilled = next(m for m in map(open_model, made) if [m.digest] == candidate.manifest["parents"])
    assert distilled.manifest["method"] == "distill"
    new, old = load_network(candidate), load_network(distilled)
    body = {k: v for k, v in old.state_dict().items() if not k.startswith("classifier")}
    assert all(torch.equal(new.state_dict()[k], v) for k, v in body.items())
    assert not torch.equal(get_head(new).weight_lh, get_head(old).weight_lh)
    sent = [c["what"] for c in record["domains"]["food"]["crossed"]]
    assert {"distill contribution", "probe contribution"} <= set(sent)
    row = next(row for row in record["table"] if row["role"] == "candidate")
    assert row["name"] == "new: distill > probe"
    assert row["seconds"] >= next(c["seconds"] for c in record["costs"] if c["stage"] == "distill")


def test_one_way_back_may_stand_alone_or_in_a_list(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path)
    alone, listed = load_recipe(value), load_recipe({**value, "feedback": [value["feedback"]]})
    assert alone == listed
    assert listed.model_dump(mode="json")["feedback"] == value["feedback"]
    with pytest.raises(UsageError, match="feedback"):
        load_recipe({**value, "feedback": []})
    with pytest.raises(UsageError, match="epoks"):
        load_recipe({**value, "feedback": [value["feedback"], {"method": "distill", "train": {"epoks": 1}}]})
