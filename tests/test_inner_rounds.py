"""A way back that is taken many times over: one stage, which goes on where it was killed and leaves no more behind."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

import fanbu.feeding
from conftest import open_gate, tiny_recipe
from fanbu.catalogue import Method
from fanbu.doctor import plan
from fanbu.errors import UsageError
from fanbu.generations import run
from fanbu.model import open_model
from fanbu.recipe import load_recipe
from fanbu.recipe_parts import Step

SHORT = {"epochs": 1, "lr": 5e-3, "head_lr": 1e-2, "batch_size": 8}
SGD = {**SHORT, "optimizer": "SGD"}


def recipe_in(folder: Path, feedback: Any, workspace: str = "ws") -> Path:
    value = tiny_recipe(folder)
    value |= {"feedback": feedback, "references": [], "workspace": str(folder / workspace)}
    path = folder / f"{workspace}.yaml"
    path.write_text(yaml.safe_dump(value))
    return path


def ended(path: Path) -> dict[str, Any]:
    with open_gate():
        return run(load_recipe(path))


class Killed(BaseException):
    """As kill -9: nothing is tidied up."""


@pytest.mark.parametrize(
    ("method", "train"),
    [
        pytest.param("fedavg", SHORT, marks=pytest.mark.slow),
        pytest.param("fedadam", SHORT, marks=pytest.mark.slow),
        ("scaffold", SGD),  # keeps most: at owners, at the centre, and what is told
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_killed_in_an_inner_round_it_ends_with_the_same_model(
    method: str, train: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = {"method": method, "times": 3, "train": train}
    whole = ended(recipe_in(tmp_path, step))
    killed = recipe_in(tmp_path, step, "killed")
    count, absorb = [0], Method.absorb

    def dying(self: Method, *args: Any, **kwargs: Any) -> Any:
        if self.name == method:
            count[0] += 1
            if count[0] in {2, 4}:
                raise Killed
        return absorb(self, *args, **kwargs)

    monkeypatch.setattr(Method, "absorb", dying)
    for _ in range(2):
        with pytest.raises(Killed):
            ended(killed)
    again = ended(killed)
    assert count[0] == 5  # three that count, and two that came to nothing: what was done is not done again
    assert again["candidate"]["digest"] == whole["candidate"]["digest"]
    for d, told in whole["domains"].items():
        assert again["domains"][d]["crossed"] == told["crossed"]
    assert not list((tmp_path / "killed" / "partial").iterdir())
    [stage] = (tmp_path / "killed" / "stages").glob(f"{method}-x3-*")
    assert sorted(p.name for p in stage.iterdir()) == ["cost.json", "crossed.json", "model", "stage.json"]
    made = open_model(stage / "model")
    assert made.manifest["parameters"]["times"] == 3
    assert made.manifest["parents"] == [whole["incumbent"]["digest"]]


@pytest.mark.slow
def test_the_record_tells_of_all_inner_rounds(tmp_path: Path) -> None:
    once, thrice = (
        ended(recipe_in(tmp_path, {"method": "fedavg", "times": n, "train": SHORT}, f"ws{n}")) for n in (1, 3)
    )
    assert once["candidate"]["method"] == "fedavg"
    assert thrice["candidate"]["method"] == "fedavg x3"
    assert once["candidate"]["digest"] != thrice["candidate"]["digest"]
    assert "times" not in once["recipe"]["feedback"]
    assert thrice["recipe"]["feedback"]["times"] == 3
    for d in once["domains"]:
        sent = [[c for c in r["domains"][d]["crossed"] if c["kind"] == "updates"] for r in (once, thrice)]
        assert (len(sent[0]), len(sent[1])) == (1, 3)
        assert sum(c["bytes"] for c in sent[1]) > 2.5 * sum(c["bytes"] for c in sent[0])
    seconds = next(row["seconds"] for row in thrice["table"] if row["role"] == "candidate")
    assert seconds > 0
    assert ended(tmp_path / "ws3.yaml")["candidate"]["digest"] == thrice["candidate"]["digest"]


@pytest.mark.slow
def test_others_repeat_too_and_the_plan_counts_it(tmp_path: Path) -> None:
    steps = [{"method": "distill", "times": 2, "train": SHORT}, {"method": "probe"}]
    path = recipe_in(tmp_path, steps)
    once = recipe_in(tmp_path, {"method": "distill", "train": SHORT}, "once")
    record = ended(path)
    assert record["candidate"]["method"] == "distill x2 > probe"
    assert set(record["candidate"]["made"]) == {"1.distill", "2.probe"}
    found = {p: plan(load_recipe(p)) for p in (path, once)}
    assert [s["method"] for s in found[path]["feedback"]] == ["distill", "probe"]
    assert found[path]["feedback"][0]["times"] == 2
    batches = [
        next(s["batches"] for s in found[p]["estimate"]["stages"] if s["stage"].startswith("distill"))
        for p in (path, once)
    ]
    assert batches[0] == 2 * batches[1] > 0


def test_where_nobody_teaches_nothing_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fanbu.feedback.predictions.distill.believed", lambda *_: ([], {}))
    record = ended(recipe_in(tmp_path, {"method": "distill", "times": 2, "train": SHORT}))
    assert record["candidate"]["digest"] == record["incumbent"]["digest"]
    assert any("changed nothing" in warning for warning in record["warnings"])


def test_ways_down_are_taken_once(tmp_path: Path) -> None:
    for idle in ({"times": 2}, {"noise": {"epsilon": 4.0}}, {"secure": True}, {"tree": {"by": "texts"}}):
        value = tiny_recipe(tmp_path) | {"shrink": [{"method": "finetune", **idle}]}
        with pytest.raises(UsageError, match="feedback-only"):
            load_recipe(value)
    value = tiny_recipe(tmp_path)
    for idle in ({"mix": "layer"}, {"settings": 3}, {"tune": 0.5, "mix": "domain", "space": {"scale": [1, 2]}}):
        with pytest.raises(UsageError, match="compare"):
            load_recipe({**value, "compare": idle})
    for wrong in (0, -1, 1.5, "many", 10**6):
        with pytest.raises(UsageError, match="times"):
            load_recipe(tiny_recipe(tmp_path) | {"feedback": {"method": "fedavg", "times": wrong}})
    assert json.loads(Step(method="probe").model_dump_json()) == {"method": "probe"}
    assert fanbu.feeding.STATE != fanbu.feeding.SAID


@pytest.mark.slow
def test_a_share_of_the_owners_takes_part_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[list[str]] = []
    absorb = Method.absorb

    def listening(self: Method, base: Any, contributions: Any, *args: Any, **kwargs: Any) -> Any:
        if self.name == "scaffold":
            heard.append([c.domain for c in contributions])
        return absorb(self, base, contributions, *args, **kwargs)

    monkeypatch.setattr(Method, "absorb", listening)
    step = {"method": "scaffold", "times": 6, "participation": 0.5, "train": SGD}
    record = ended(recipe_in(tmp_path, step))
    everyone = {d for part in heard for d in part}
    assert len(heard) == 6
    assert all(len(part) == math.ceil(len(record["domains"]) / 2) for part in heard)
    assert len({tuple(part) for part in heard}) > 1
    assert len(everyone) > len(heard[0])
    again = ended(recipe_in(tmp_path, step, "again"))
    assert again["candidate"]["digest"] == record["candidate"]["digest"]
    with pytest.raises(UsageError, match="inner rounds"):
        load_recipe(recipe_in(tmp_path, {"method": "fedavg", "participation": 0.5}, "once"))
