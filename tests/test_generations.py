"""Round after round: the champion is the parent of the next; rows arrive; domains join, leave and are forgotten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import TOPICS, Done, finished_round, open_gate, rows, tiny_recipe, write_rows
from fanbu import generations
from fanbu.data.load import RawRow
from fanbu.data.split import carve, portion
from fanbu.domain import Arrived, load_domain
from fanbu.errors import FanbuError, IntegrityError, RetryError, UsageError
from fanbu.generations import leave, run
from fanbu.ledger import Workspace
from fanbu.model import open_model
from fanbu.recipe import load_domains, load_recipe
from fanbu.recipe_parts import DomainSpec
from fanbu.record import read_records
from fanbu.tensors import Tensors
from fanbu.turn import open_turn

# A candidate with the incumbent's weights: its change is zero, so the gate refuses it
IDLE = {"method": "distill", "train": {"epochs": 1, "lr": 0.0, "head_lr": 0.0}}


@pytest.fixture(scope="module")
def spiral(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """(recipe, workspace) of three rounds: food's rows arrive in three portions, rail joins in round two."""
    folder = tmp_path_factory.mktemp("spiral")
    value = tiny_recipe(folder)
    value["rounds"] = 3
    value["domains"]["food"]["arrivals"] = 3
    value["domains"]["rail"]["joins"] = 2
    with open_gate():
        run(load_recipe(value))
    return value, folder / "ws"


@pytest.fixture
def copy(spiral: tuple[dict[str, Any], Path], tmp_path: Path) -> tuple[dict[str, Any], Path]:
    """The three rounds, to go on from."""
    value, workspace = spiral
    shutil.copytree(workspace, tmp_path / "ws")
    return {**value, "workspace": str(tmp_path / "ws")}, tmp_path / "ws"


def test_the_champion_is_the_parent_of_the_next_round(spiral: tuple[dict[str, Any], Path]) -> None:
    _, workspace = spiral
    records = read_records(workspace)
    assert [r["round"] for r in records] == [1, 2, 3]
    assert records[0]["parent"] is None
    champion = records[0]["incumbent"]["digest"]
    for now, after in zip(records, [*records[1:], None], strict=True):
        if now["verdict"]["accepted"]:
            champion = now["candidate"]["digest"]
        if after:
            assert after["parent"] == champion
            known = set(open_model(after["incumbent"]["path"]).labels)
            assert {label.partition("/")[0] for label in known} == set(after["domains"])
    assert Workspace(workspace).champion()["model"] == champion  # type: ignore[index]


def test_rows_arrive_and_domains_join(spiral: tuple[dict[str, Any], Path]) -> None:
    first, second, third = read_records(spiral[1])
    assert list(first["domains"]) == ["food"]
    assert [r["domains"]["food"]["rows"]["train"] for r in (first, second, third)] == [48, 96, 144]
    assert [r["domains"]["food"]["new_rows"]["train"] for r in (first, second, third)] == [48, 48, 48]
    assert second["domains"]["rail"]["joined"]
    assert not second["domains"]["food"]["joined"]
    assert third["domains"]["rail"]["new_rows"] == {"train": 0, "unlabelled": 0}
    assert len({r["domains"]["food"]["digest"] for r in (first, second, third)}) == 3


def test_a_joining_domain_leaves_the_rows_of_the_others(spiral: tuple[dict[str, Any], Path]) -> None:
    second = read_records(spiral[1])[1]
    workspace = Workspace(spiral[1])
    before = open_model(
        workspace.root / next(e["path"] for e in workspace.champions() if e["model"] == second["parent"])
    )
    after = open_model(second["incumbent"]["path"])
    one, two = Tensors(before.path), Tensors(after.path)
    for name in one:
        if name.startswith("classifier."):
            numbers = [after.labels.index(label) for label in before.labels]
            assert torch.equal(two[name][numbers], one[name]), name
        else:
            assert torch.equal(one[name], two[name]), name


def test_specialists_have_forerunners(spiral: tuple[dict[str, Any], Path]) -> None:
    first, second, third = (r["domains"] for r in read_records(spiral[1]))
    assert first["food"]["specialist"]["born"] == "born"
    assert first["food"]["specialist"]["forerunner"] is None
    assert second["rail"]["specialist"]["born"] == "born"
    for before, now in ((first, second), (second, third)):
        own = now["food"]["specialist"]
        assert own["forerunner"]["digest"] == before["food"]["specialist"]["digest"]
        if own["born"] == "carried on":
            assert own["digest"] == own["forerunner"]["digest"]
            assert own["reborn_valid"] <= own["valid"] == own["forerunner"]["valid"]
        else:
            assert own["born"] == "reborn"
            assert own["valid"] == own["reborn_valid"] > own["forerunner"]["valid"]


@pytest.mark.parametrize("better", [True, False])
def test_a_specialist_is_carried_on_where_the_new_one_is_no_better(
    copy: tuple[dict[str, Any], Path], better: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation values decide, and a tie is no improvement."""
    value, workspace = copy
    before = {d: read_records(workspace)[-1]["domains"][d]["specialist"]["digest"] for d in TOPICS}

    def validated(turn: Any, model: Any, domain: Any) -> float:
        return 0.7 if model.digest in before.values() or not better else 0.8

    monkeypatch.setattr("fanbu.round.validated", validated)
    record = run(load_recipe({**value, "rounds": 4, "seed": 5}))
    for d, own in ((d, record["domains"][d]["specialist"]) for d in TOPICS):
        assert own["born"] == ("reborn" if better else "carried on")
        assert (own["digest"] == before[d]) is not better
        assert own["forerunner"]["digest"] == before[d]


def test_a_refused_round_keeps_the_champion_and_says_why(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    champion = Workspace(workspace).champion()
    record = run(load_recipe({**value, "rounds": 4, "feedback": IDLE}))
    assert record["decision"] == "refused"
    assert record["champion"] == champion
    event = Workspace(workspace).history()[-1]
    assert (event["event"], event["number"]) == ("refused", 4)
    assert event["reason"] == record["verdict"]["reason"] != ""


def test_nothing_new_is_only_read_and_something_new_is_one_more_round(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    history = (workspace / "history.jsonl").read_text()
    for changed in ({}, {"rounds": 1}, {"checkpoint_seconds": 5.0}):
        assert run(load_recipe({**value, **changed}))["round"] == 3
    assert (workspace / "history.jsonl").read_text() == history
    extra = Path(value["domains"]["food"]["train"]).with_name("later.jsonl")
    write_rows(extra, rows("food", 30, 9))
    grown = {**value["domains"]["food"], "train": [value["domains"]["food"]["train"], str(extra)]}
    record = run(load_recipe({**value, "domains": {**value["domains"], "food": grown}}))
    assert record["round"] == 4
    assert record["domains"]["food"]["rows"]["train"] > 144
    assert (
        record["parent"] == read_records(workspace)[2]["candidate"]["digest"]
        or not read_records(workspace)[2]["verdict"]["accepted"]
    )


def test_rollback_makes_the_earlier_champion_the_parent(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    done = finished_round(tmp_path_factory)
    workspace = Path(shutil.copytree(done.workspace, tmp_path / "ws"))
    back = Workspace(workspace).rollback()
    recipe = load_recipe(done.recipe, [f"workspace={workspace}"])
    assert run(recipe)["round"] == 1  # nothing new: a rollback is a person's decision
    record = run(recipe.model_copy(update={"rounds": 2}))
    assert record["parent"] == back["model"] == done.record["incumbent"]["digest"]
    assert record["candidate"]["digest"] == done.champion  # same parent, same rows: the same child


# Leaving


def test_leaving_drops_the_label_rows_and_nothing_else(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    before = open_model(workspace / Workspace(workspace).champion()["path"])  # type: ignore[index]
    leave(workspace, "food")
    pointer = Workspace(workspace).champion()
    assert pointer is not None
    after = open_model(workspace / pointer["path"])
    assert after.labels == tuple(label for label in before.labels if label.startswith("rail/"))
    one, two = Tensors(before.path), Tensors(after.path)
    kept = [before.labels.index(label) for label in after.labels]
    for name in one:
        assert torch.equal(one[name][kept] if name.startswith("classifier.") else one[name], two[name]), name
    record = run(load_recipe({**value, "rounds": 4}))
    assert list(record["domains"]) == ["rail"]
    assert record["left"] == ["food"]
    with pytest.raises(UsageError, match="learned nothing"):
        leave(workspace, "food")
    with pytest.raises(UsageError, match="only domain"):
        leave(workspace, "rail")
    while Workspace(workspace).left():
        Workspace(workspace).rollback()
    assert Workspace(workspace).champion()["model"] == before.digest  # type: ignore[index]


def test_a_domain_that_is_forgotten_is_as_if_it_had_never_joined(
    copy: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    value, workspace = copy
    leave(workspace, "food", forget=True)
    assert Workspace(workspace).champion() is None
    rail = {**value["domains"]["rail"], "joins": 1}
    again = run(load_recipe({**value, "rounds": 4, "domains": {"food": value["domains"]["food"], "rail": rail}}))
    never = run(load_recipe({**value, "rounds": 1, "domains": {"rail": rail}, "workspace": str(tmp_path / "fresh")}))
    assert again["round"] == 4
    for what in ("incumbent", "candidate"):
        assert again[what]["digest"] == never[what]["digest"]


def test_the_recipe_lets_a_domain_leave(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    domains = {**value["domains"], "rail": {**value["domains"]["rail"], "leaves": 4}}
    record = run(load_recipe({**value, "rounds": 4, "domains": domains}))
    assert list(record["domains"]) == ["food"]
    assert [e["event"] for e in Workspace(workspace).history()][-2] == "left"
    assert not any(label.startswith("rail/") for label in open_model(record["candidate"]["path"]).labels)


def test_a_domain_that_the_recipe_does_not_name_keeps_its_rows(copy: tuple[dict[str, Any], Path]) -> None:
    value, _ = copy
    record = run(load_recipe({**value, "rounds": 4, "domains": {"food": value["domains"]["food"]}}))
    assert any("rail" in w and "not judged" in w for w in record["warnings"])
    assert any(label.startswith("rail/") for label in open_model(record["candidate"]["path"]).labels)


# Guards of the ledger


def test_a_round_that_was_overtaken_is_made_anew(
    copy: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its candidate was never compared with the champion of now."""
    value, workspace = copy
    whole = generations.turn_once

    def slow(turn: Any) -> Any:
        result = whole(turn)
        Workspace(workspace).promote(read_records(workspace)[0]["candidate"]["digest"][:12])
        return result

    monkeypatch.setattr(generations, "turn_once", slow)
    with pytest.raises(RetryError, match="the champion changed"):
        run(load_recipe({**value, "rounds": 4, "seed": 3}))
    monkeypatch.undo()
    assert run(load_recipe({**value, "rounds": 4, "seed": 3}))["round"] == 4


def test_another_base_needs_another_workspace(copy: tuple[dict[str, Any], Path], bert: Path) -> None:
    with pytest.raises(UsageError, match="another model") as caught:
        run(load_recipe({**copy[0], "model": str(bert), "rounds": 4}))
    assert caught.value.code == "other-workspace"


def test_a_lost_record_is_an_error(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    (workspace / "rounds" / read_records(workspace)[1]["key"][:20] / "record.json").unlink()
    with pytest.raises(IntegrityError, match="round 2"):
        run(load_recipe({**value, "rounds": 4}))


def test_a_run_that_fails_says_so_in_the_live_file(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    assert json.loads((workspace / "live.json").read_text())["state"] == "finished"
    gone = {**value["domains"]["food"], "train": "gone.jsonl"}
    with pytest.raises(FanbuError):
        run(load_recipe({**value, "rounds": 4, "domains": {**value["domains"], "food": gone}}))
    live = json.loads((workspace / "live.json").read_text())
    assert live["state"] == "failed"
    assert "gone.jsonl" in live["error"]


def test_what_happens_while_a_round_is_at_work_is_not_undone(
    copy: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A domain is forgotten, or another round ends, meanwhile."""
    value, workspace = copy
    whole = generations.turn_once

    def forgetting(turn: Any) -> Any:
        result = whole(turn)
        leave(workspace, "rail", forget=True)
        return result

    monkeypatch.setattr(generations, "turn_once", forgetting)
    with pytest.raises(RetryError):
        run(load_recipe({**value, "rounds": 4, "seed": 3}))
    assert Workspace(workspace).left() == ["rail"]
    Workspace(workspace).rollback()

    def overtaken(turn: Any) -> Any:
        result = whole(turn)
        monkeypatch.setattr(generations, "turn_once", whole)
        refused = {**value, "rounds": 4, "feedback": IDLE}
        assert run(load_recipe(refused))["decision"] == "refused"
        return result

    monkeypatch.setattr(generations, "turn_once", overtaken)
    with pytest.raises(RetryError):
        run(load_recipe({**value, "rounds": 4, "seed": 3}))
    assert [e["number"] for e in Workspace(workspace).rounds()] == [1, 2, 3, 4]


def test_a_leave_that_was_overtaken_is_not_written(
    copy: tuple[dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, workspace = copy
    whole = generations.without_domain

    def slow(*arguments: Any) -> Any:
        Workspace(workspace).promote(read_records(workspace)[0]["candidate"]["digest"][:12])
        return whole(*arguments)

    monkeypatch.setattr(generations, "without_domain", slow)
    with pytest.raises(RetryError, match="while rail was leaving"):
        leave(workspace, "rail")
    assert Workspace(workspace).left() == []


def test_forgetting_one_does_not_bring_another_back(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    leave(workspace, "food")
    leave(workspace, "rail", forget=True)  # the first champion, which knows food and not rail
    assert Workspace(workspace).left() == ["food", "rail"]
    Workspace(workspace).rollback()
    Workspace(workspace).promote(read_records(workspace)[2]["incumbent"]["digest"][:12])
    assert Workspace(workspace).left() == ["food"]  # by hand or not: who left stays away
    record = run(load_recipe({**value, "rounds": 4}))
    assert all(label.startswith("rail/") for label in open_model(record["incumbent"]["path"]).labels)


def test_one_domain_takes_the_place_of_another(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path)
    value["domains"]["food"]["leaves"] = 2
    value["domains"]["rail"]["joins"] = 2
    value |= {"rounds": 2, "gate": {"margin": 0.5, "margins": {"rail": 0.4}}, "references": []}
    record = run(load_recipe(value))
    assert list(record["domains"]) == ["rail"]
    assert all(label.startswith("rail/") for label in open_model(record["candidate"]["path"]).labels)


def test_the_order_of_domains_in_the_recipe_changes_no_bit(spiral: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    value, workspace = spiral
    turned = {**value, "workspace": str(tmp_path / "ws"), "rounds": 2, "references": []}
    with open_gate():
        record = run(load_recipe({**turned, "domains": dict(reversed(value["domains"].items()))}))
    assert record["candidate"]["digest"] == read_records(workspace)[1]["candidate"]["digest"]


def test_another_base_is_found_out_before_the_first_decision(tmp_path: Path, bert: Path) -> None:
    value = tiny_recipe(tmp_path)
    run(load_recipe(value))
    history = tmp_path / "ws" / "history.jsonl"
    history.write_text(history.read_text().split("\n")[0] + "\n")  # killed after the first champion was named
    with pytest.raises(UsageError, match="another model"):
        run(load_recipe({**value, "model": str(bert)}))


def test_a_pointer_that_a_kill_left_behind_is_mended(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    told = (workspace / "champion.json").read_text()
    (workspace / "champion.json").write_text(json.dumps({"model": "0" * 64}))
    run(load_recipe(value))
    assert (workspace / "champion.json").read_text() == told


def test_a_history_without_numbers_is_refused(copy: tuple[dict[str, Any], Path]) -> None:
    value, workspace = copy
    path = workspace / "history.jsonl"
    old = [{k: v for k, v in e.items() if k != "number"} for e in Workspace(workspace).history()]
    path.write_text("".join(json.dumps(e) + "\n" for e in old))
    with pytest.raises(UsageError, match="did not number") as caught:
        run(load_recipe(value))
    assert caught.value.code == "old-workspace"


# Examples and calibration


def test_examples_are_real_rows_with_both_answers(tmp_path_factory: pytest.TempPathFactory) -> None:
    record = finished_round(tmp_path_factory).record
    seen = 0
    for name, domain in record["domains"].items():
        texts = {r["text"]: r["label"] for r in rows(name, 36, 2)}
        verdict = record["verdict"]["domains"][name]
        for kind, right in (("wins", "new"), ("losses", "old")):
            assert len(domain["examples"][kind]) == min(6, verdict[kind])
            for example in domain["examples"][kind]:
                assert texts[example["text"]] == example["label"] == example[right]
                assert example["old"] != example["new"]
                seen += 1
        for who in ("incumbent", "candidate"):
            bins = domain["calibration"][who]
            assert sum(n for n, _, _ in bins) == 36
            accuracy = sum(n * a for n, _, a in bins) / 36
            assert accuracy == pytest.approx(verdict[who])
    assert seen


def test_examples_are_withheld_where_texts_or_labels_stay(copy: tuple[dict[str, Any], Path]) -> None:
    value, _ = copy
    closed = {**value["domains"]["rail"], "share": {"preset": "open", "labels": False}}
    record = run(load_recipe({**value, "rounds": 4, "domains": {**value["domains"], "rail": closed}, "references": []}))
    assert "does not share" in record["domains"]["rail"]["examples"]["withheld"]
    assert "wins" in record["domains"]["food"]["examples"]
    assert "examples" not in {c["what"] for c in record["domains"]["rail"]["crossed"]}


# Rows that arrive

NAMED: dict[str, Any] = {"fanbu": 1, "name": "x", "model": "m", "feedback": {"method": "distill"}}


def test_portions_share_out_each_label_and_grow() -> None:
    raw = [RawRow(str(i), f"text {i}", "abc"[i % 3] if i < 60 else "rare") for i in range(62)]
    parts = [{r.id for r in portion(raw, k, 3, "salt")} for k in (1, 2, 3)]
    assert parts[0] < parts[1] < parts[2] == {r.id for r in raw}
    assert len(parts[0]) == pytest.approx(62 / 3, abs=2)
    for part in parts:
        assert {r.label for r in raw if r.id in part} == {"a", "b", "c", "rare"}


def test_rows_that_are_added_never_move_what_was_trained_on_into_a_test() -> None:
    raw = [RawRow(str(i), f"text {i}", "ab"[i % 2]) for i in range(400)]
    kept: set[str] = set()
    for count in (20, 60, 200, 400):
        train, test = carve(raw[:count], 0.2, "salt")
        assert not kept & {r.id for r in test}
        kept = {r.id for r in train}
        assert len(test) == pytest.approx(0.2 * count, abs=0.2 * count)


def test_labels_whose_rows_are_yet_to_come_wait(tmp_path: Path) -> None:
    train = write_rows(tmp_path / "a.jsonl", [r for r in rows("food", 30, 0) if r["label"] != "soup"])
    test = write_rows(tmp_path / "t.jsonl", rows("food", 12, 1))
    domain = load_domain("food", train=train, test=test, valid=0.2, arrived=Arrived(more=True))
    assert domain.labels == ("bread", "fruit")
    assert len(domain.test) == 8
    assert "wait for training rows" in domain.warnings[-1]
    with pytest.raises(FanbuError, match="no training row"):
        load_domain("food", train=train, test=test, valid=0.2)


def test_files_arrive_by_round_and_by_day(tmp_path: Path) -> None:
    first, second, third = (write_rows(tmp_path / f"{n}.jsonl", rows("food", 30, n)) for n in range(3))
    arrivals = [
        {"round": 2, "train": second},
        {"date": "2001-01-01", "unlabelled": third},
        {"date": "2999-01-01", "train": "later"},
    ]
    value = {
        **NAMED,
        "domains": {"food": {"train": first, "test": 0.2, "arrivals": arrivals}},
    }
    recipe = load_recipe(value)
    one, two = (load_domains(recipe, n)["food"] for n in (1, 2))
    assert len(one.train) + len(one.valid) + len(one.test) == 30
    assert len(two.train) + len(two.valid) + len(two.test) == 60
    assert len(one.unlabelled) > 0
    assert set(one.train.texts) <= set(two.train.texts) | set(two.valid.texts)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"arrivals": [{"train": "a"}]}, "either round or date"),
        ({"arrivals": [{"round": 1, "date": "2001-01-01", "train": "a"}]}, "either round or date"),
        ({"arrivals": [{"round": 1}]}, "name a file"),
        ({"test": 0.2, "arrivals": [{"round": 1, "test": "a"}]}, "share of train"),
        ({"joins": 3, "leaves": 3}, "after joins"),
        ({"arrivals": 0}, "greater than 0"),
    ],
)
def test_arrivals_that_cannot_be_meant(spec: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        DomainSpec.model_validate(spec)


def test_a_path_with_a_variable_that_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_PLACE", raising=False)
    value = {
        **NAMED,
        "domains": {"food": {"train": "${NO_SUCH_PLACE}/a.csv", "test": 0.2}},
    }
    with pytest.raises(UsageError, match="export NO_SUCH_PLACE=") as caught:
        load_recipe(value)
    assert caught.value.code == "variable-unset"


def test_a_round_in_which_nobody_takes_part() -> None:
    value = {
        **NAMED,
        "domains": {"food": {"train": "a.csv", "test": 0.2, "joins": 2}},
    }
    with pytest.raises(UsageError, match="no domain takes part in round 1"):
        load_domains(load_recipe(value))


def test_the_finished_round_is_round_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    done: Done = finished_round(tmp_path_factory)
    assert (done.record["round"], done.record["parent"], done.record["decision"]) == (1, None, "promoted")


def test_no_test_text_is_asked_about_before_its_time(tmp_path: Path) -> None:
    """Texts of domains that join later, of labels that wait, and of rows that may be tested once they have a label."""
    value = tiny_recipe(tmp_path)
    food, rail = value["domains"]["food"], value["domains"]["rail"]
    later = rows("rail", 36, 2)  # rail's test rows
    soup = [{"id": f"s{i}", "text": f"soup of the day {i}", "label": "soup"} for i in range(8)]
    unlabelled = [*later, *soup, {"id": "u", "text": "a text of nobody's", "label": ""}]
    food["unlabelled"] = write_rows(tmp_path / "unlabelled.jsonl", unlabelled)
    food["train"] = write_rows(tmp_path / "train.jsonl", [r for r in rows("food", 90, 0) if r["label"] != "soup"])
    food["test"] = write_rows(tmp_path / "test.jsonl", [*rows("food", 30, 2), *soup])
    food["arrivals"] = [{"round": 2, "train": write_rows(tmp_path / "more.jsonl", rows("food", 60, 5))}]
    rail["joins"] = 2
    recipe = load_recipe(value)
    texts = set(open_turn(recipe, open_model(recipe.model), None, []).context.probe.texts)
    assert "a text of nobody's" in texts
    assert not texts & {r["text"] for r in [*later, *soup]}
    shared = load_domain("food", train=food["train"], test=0.4, unlabelled=food["unlabelled"])
    assert 0 < len(shared.unlabelled) < len(unlabelled)
    labelled = [RawRow(t, t, "x") for t in shared.unlabelled.texts]
    assert len(carve(labelled, 0.4, "food/test")[1]) == 1  # the one that every label must give


def test_a_guard_whose_rows_arrive(tmp_path: Path) -> None:
    test = write_rows(tmp_path / "t.jsonl", rows("food", 12, 1))
    guard = load_domain("food", test=test, role="guard", arrived=Arrived(more=True))
    assert len(guard.test) == 12
