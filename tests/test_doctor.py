"""``fanbu doctor`` and ``--dry-run``: every problem at once, and an estimate that follows the work."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TOPICS, Done, finished_round, make_bert, stages, write_domain, write_rows
from fanbu.catalogue import methods
from fanbu.doctor import examine
from fanbu.doctor.estimate import Speed, Work, measure, work
from fanbu.doctor.machine import EXTRAS, extras, installed
from fanbu.doctor.text import doctor_page
from fanbu.domain import Domain
from fanbu.model import open_model
from fanbu.recipe import load_domains, load_recipe
from test_cli import Command
from test_cli import fanbu as fanbu

SHORT = {"epochs": 2, "batch_size": 8}


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    make_bert(tmp_path / "bert", hidden=16)
    return {
        "fanbu": 1, "name": "well", "model": "bert", "device": "cpu", "threads": 1, "max_length": 16,
        "workspace": str(tmp_path / "ws"),
        "domains": {name: write_domain(tmp_path, name) for name in TOPICS},
        "shrink": [{"method": "finetune", "train": dict(SHORT)}],
        "feedback": {"method": "distill", "train": dict(SHORT)},
        "gate": {"margin": 0.2},
    }  # fmt: skip


def written(tmp_path: Path, recipe: dict[str, Any]) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_what_is_installed() -> None:
    found = installed()
    names = {p["name"] for p in found}
    assert {"python", "fanbu", "torch", "transformers"} <= names
    assert all(p["fits"] for p in found if not p["extra"])
    assert {e["name"] for e in extras(found)} <= set(EXTRAS)
    assert all(e["for"] for e in extras(found))
    missing = [{"name": "nowhere", "extra": "track", "fits": False, "version": None}]
    assert extras(missing) == [{"name": "track", "for": EXTRAS["track"], "installed": False, "missing": ["nowhere"]}]


def test_every_extra_is_known() -> None:
    declared = set(metadata.metadata("fanbu").get_all("Provides-Extra") or [])
    assert set(EXTRAS) == declared  # a library of an unknown one would count as needed by all


def test_a_centre_without_rows(tmp_path: Path, recipe: dict[str, Any], fanbu: Command) -> None:
    recipe.update(domains={name: {} for name in TOPICS}, transport={"kind": "flower"})
    code, found = fanbu("doctor", written(tmp_path, recipe), "--json")
    assert (code, found["problems"]) == (0, [])
    assert found["warnings"] == ["rows are at their owners: what depends on them is not looked at here"]
    code, error = fanbu("run", tmp_path / "recipe.yaml", "--dry-run", "--json")
    assert (code, error["error"]["code"]) == (2, "owners-elsewhere")
    recipe["model"] = "nowhere/at-all"
    code, found = fanbu("doctor", written(tmp_path, recipe), "--json")
    assert (code, found["problems"][0]["where"]) == (1, "model")


def test_a_recipe_that_works(tmp_path: Path, recipe: dict[str, Any], fanbu: Command) -> None:
    path = written(tmp_path, recipe)
    code, found = fanbu("doctor", path, "--json")
    assert (code, found["problems"]) == (0, [])
    assert found["ok"]
    assert found["domains"]["food"]["rows"] == {"train": 48, "valid": 18, "test": 36, "unlabelled": 0}
    assert {m["name"] for m in found["methods"]} == {m.name for m in methods() if m.family != "shrink"}
    assert {m["name"] for m in found["methods"] if not m["fits"]} == {
        m.name
        for m in methods()
        if m.family != "shrink" and m.needs.target  # nobody has texts and no labels here
    }
    stages_of = {s["stage"]: s for s in found["estimate"]["stages"]}
    assert stages_of["shrink finetune food"]["batches"] == 12
    assert stages_of["distill"]["batches"] == 24
    assert found["estimate"]["round_seconds"] > 0
    assert found["machine"]["memory_bytes"] > 1e8
    assert not (tmp_path / "ws").exists()
    code, text = fanbu("doctor", path)
    assert code == 0
    assert "It will work." in text
    assert "distill" in text


def test_every_problem_is_told_at_once(tmp_path: Path, recipe: dict[str, Any], fanbu: Command) -> None:
    recipe["domains"]["food"]["test"] = write_rows(tmp_path / "e.jsonl", [{"id": "1", "text": "", "label": "soup"}])
    recipe["domains"]["rail"]["train"] = str(tmp_path / "gone.jsonl")
    recipe["model"] = "nowhere"
    code, found = fanbu("doctor", written(tmp_path, recipe), "--json")
    assert code == 1
    assert {(p["where"], p["code"]) for p in found["problems"]} == {
        ("model", "model-not-found"), ("food", "empty-text"), ("rail", "data-not-found"),
    }  # fmt: skip
    assert all(p["see"] == f"docs/errors.md#{p['code']}" for p in found["problems"])
    recipe["gate"]["margn"] = 1
    recipe["feedback"]["train"] = {"epoks": 2}
    recipe["shrink"] = [{"method": "finetun"}]
    code, found = fanbu("doctor", written(tmp_path, recipe), "--json")
    assert code == 1
    told = {(p["where"], p["code"]) for p in found["problems"]}
    assert {("recipe", "unknown-key"), ("model", "model-not-found"), ("food", "empty-text")} <= told
    assert {("shrink", "unknown-method"), ("feedback", "bad-parameter")} <= told
    code, text = fanbu("doctor", written(tmp_path, recipe))
    assert code == 1
    assert "docs/errors.md#empty-text" in text


def test_what_does_not_fit_and_why(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["domains"]["food"]["share"] = "internal"
    recipe["domains"]["rail"]["share"] = {"preset": "open", "labels": False}
    found = {m["name"]: m for m in examine(written(tmp_path, recipe))["methods"]}
    assert found["distill"]["fits"]
    assert found["distill"]["chosen"]
    assert not found["multitask"]["fits"]
    assert "labels" in found["multitask"]["why"]
    recipe["feedback"] = {"method": "multitask"}
    found_again = examine(written(tmp_path, recipe))
    assert [p["code"] for p in found_again["problems"]] == ["not-shared"]
    assert found_again["estimate"] is None


def test_arguments_that_let_more_cross_are_looked_at_before(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["domains"]["food"]["share"] = {"preset": "open", "labels": False}
    recipe["feedback"] = {"method": "ensemble"}
    assert examine(written(tmp_path, recipe))["problems"] == []
    recipe["feedback"] = {"method": "ensemble", "combine": "stacked"}
    assert [p["code"] for p in examine(written(tmp_path, recipe))["problems"]] == ["not-shared"]
    recipe["domains"]["food"]["share"] = "internal"
    recipe["feedback"] = {"method": "distill", "features": 1.0}
    assert [p["code"] for p in examine(written(tmp_path, recipe))["problems"]] == ["not-shared"]


def test_warnings(tmp_path: Path, recipe: dict[str, Any]) -> None:
    recipe["gate"]["margin"] = 0.02
    recipe["max_length"] = 4
    found = examine(written(tmp_path, recipe))
    assert found["ok"]
    assert "36 test rows resolve" in " ".join(found["domains"]["food"]["warnings"])
    assert "longer than max_length" in found["warnings"][0]
    recipe["model"] = "bert"
    for spec in recipe["domains"].values():
        spec["task"] = "causal-lm"
    found = examine(written(tmp_path, recipe))
    assert "model-task" in {p["code"] for p in found["problems"]}


def test_too_little_room(tmp_path: Path, recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    found = examine(written(tmp_path, recipe))
    assert [(p["where"], p["code"]) for p in found["problems"]] == [("disk", "too-little-room")]
    assert "too-little-room" in doctor_page(found)


def test_the_estimate_follows_the_work(tmp_path: Path, recipe: dict[str, Any]) -> None:
    path = written(tmp_path, recipe)

    def batches(*changes: str) -> dict[str, int]:
        loaded = load_recipe(path, changes)
        return {w.stage: w.batches for w in work(loaded, load_domains(loaded), open_model(loaded.model))}

    assert batches()["distill"] == 24
    assert batches("feedback.train.epochs=4")["distill"] == 48
    assert batches("feedback.train.max_steps=5")["distill"] == 5
    assert batches("probe.limit=10")["distill"] == 6
    assert batches("references=[{method: multitask, train: {epochs: 1, batch_size: 8}}]")["reference multitask"] == 12
    assert batches("feedback={method: average}")["average"] == 0
    speed = Speed(train=2.0, predict=0.5, open=1.0, peak_bytes=0)
    assert Work("x", 3, trained=10, predicted=4, opened=2, other=5.0).seconds(speed) == pytest.approx(29.0)


def test_the_estimate_counts_variants_and_trials(tmp_path: Path, recipe: dict[str, Any]) -> None:
    def of(step: dict[str, Any]) -> Work:
        loaded = load_recipe(written(tmp_path, recipe | {"shrink": [*recipe["shrink"], step | {"train": SHORT}]}))
        found = work(loaded, load_domains(loaded), open_model(loaded.model))
        return next(w for w in found if w.stage == f"shrink {step['method']} food")

    plain, more = of({"method": "distill"}), of({"method": "distill", "extra": {"augment": 3}})
    assert more.trained == 4 * plain.trained > 0
    assert more.predicted == plain.predicted + 3 * 48  # by the teacher
    found = of({"method": "search", "budget": {"parameters": 9000}, "augment": 3, "finalists": 2, "trials": 5})
    assert found.trained == 2 * more.trained
    assert found.predicted == 2 * more.predicted + 5 * 48


def test_speeds_are_measured_for_both_tasks(
    tmp_path: Path, recipe: dict[str, Any], llama: Path, texts: dict[str, Domain]
) -> None:
    loaded = load_recipe(written(tmp_path, recipe), [f"model={llama}"])
    speed = measure(loaded, texts, open_model(llama))
    assert 0 < speed.predict < 5
    assert 0 < speed.train < 5
    assert speed.peak_bytes > 1e7


def test_a_dry_run_trains_nothing(tmp_path: Path, recipe: dict[str, Any], fanbu: Command) -> None:
    path = written(tmp_path, {**recipe, "references": ["tfidf", {"method": "multitask"}]})
    code, plan = fanbu("run", path, "--dry-run", "--rounds", 3, "--json")
    assert code == 0
    assert (plan["rounds"], plan["finished"], plan["estimate"]["rounds"]) == (3, 0, 3)
    crosses = plan["domains"]["food"]["crosses"]
    assert crosses[-1] == "scores"
    assert "predictions (distill)" in crosses
    assert "samples (multitask, texts, labels)" in crosses
    assert not (tmp_path / "ws").exists()
    code, text = fanbu("run", path, "--dry-run")
    assert code == 0
    assert "Nothing was trained." in text


def test_a_dry_run_goes_on_from_what_is_finished(tmp_path_factory: pytest.TempPathFactory, fanbu: Command) -> None:
    done: Done = finished_round(tmp_path_factory)
    before = stages(done.workspace)
    code, plan = fanbu("run", done.recipe, "--dry-run", "--rounds", 2, "--json")
    assert (code, plan["finished"], plan["estimate"]["round"]) == (0, 1, 2)
    assert stages(done.workspace) == before
