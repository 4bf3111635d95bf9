"""Rounds in MLflow: what is written, that nothing is written twice, and where the alias points."""

from __future__ import annotations

import builtins
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fanbu.errors import RetryError, UsageError
from fanbu.ledger import Workspace
from fanbu.track import _QUIET, metrics_of, parameters_of, track

CHANGED = (*_QUIET, "MLFLOW_TRACKING_URI")


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    before = {name: os.environ.pop(name, None) for name in CHANGED}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        os.environ.update({} if value is None else {name: value})


def record(number: int, accepted: bool, name: str = "demo") -> dict[str, Any]:
    def row(role: str, told: float, untold: float | None) -> dict[str, Any]:
        return {"role": role, "name": role, "domains": {"food/raw": {"told": told, "untold": untold}}}

    return {
        "name": name, "round": number, "key": f"{number}" * 64, "seed": 7, "task": "text-classification",
        "created": f"2026-01-0{number}T00:00:00Z", "decision": "promoted" if accepted else "refused",
        "parent": "a" * 64,
        "recipe": {"model": "m" * 900, "domains": [{"name": "food", "share": "open"}], "gate": {"margin": 0.05}},
        "candidate": {"digest": f"{number}" * 64, "method": "distill"}, "versions": {"torch": "2.8"},
        "table": [row("incumbent", 0.7, 0.6), row("candidate", 0.75, None), row("reference", 0.1, 0.1)],
        "verdict": {
            "accepted": accepted, "reason": "because", "average": {"delta": 0.05, "low": 0.01, "high": float("nan")},
            "gain_kept": {"value": 0.9, "low": 0.5, "high": 1.2},
            "domains": {"food/raw": {"delta": 0.05, "low": 0.02, "high": 0.08}},
        },
        "domains": {"food/raw": {"crossed": [{"bytes": 100}, {"bytes": 23}]}},
        "costs": [{"seconds": 4.5, "cpu_seconds": 6}, {"seconds": 99, "reused": True}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of MLflow: making its tables takes seconds, so it is made once and copied."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def workspace(tmp_path: Path, migrated: Path) -> Workspace:
    """One promoted round."""
    found = Workspace(tmp_path / "demo")
    (found.root / "mlflow.db").write_bytes(migrated.read_bytes())
    first = found.root / "stages" / "incumbent" / "model"
    first.mkdir(parents=True)
    event(found, "started", "a" * 64, "stages/incumbent/model", None)
    finish(found, 1, True)
    return found


def finish(workspace: Workspace, number: int, accepted: bool) -> None:
    value = record(number, accepted)
    folder = workspace.root / "rounds" / value["key"][:20]
    folder.mkdir()
    (folder / "record.json").write_text(json.dumps(value))
    (folder / "recipe.yaml").write_text("name: demo\n")
    model = workspace.root / "stages" / f"distill-{number}" / "model"
    model.mkdir(parents=True)
    path, sha = f"stages/distill-{number}/model", value["candidate"]["digest"]
    event(workspace, value["decision"], sha, path, value["key"], number=number, reason="because")


def event(workspace: Workspace, what: str, model: str | None, path: str | None, key: str | None, **more: Any) -> None:
    """One line of history, as the ledger writes it."""
    told = {
        "event": what,
        "model": model,
        "path": path,
        "round": key,
        "number": None,
        "domains": [],
        "left": [],
        **more,
    }
    with (workspace.root / "history.jsonl").open("a") as file:
        file.write(json.dumps({**told, "time": "2026-01-01T00:00:00Z"}) + "\n")


def client_of(workspace: Workspace) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{workspace.root / 'mlflow.db'}")


def runs_of(client: Any, name: str = "demo") -> dict[str, Any]:
    experiment = client.get_experiment_by_name(name)
    return {run.data.tags["fanbu.round"]: run for run in client.search_runs([experiment.experiment_id])}


def test_a_round_is_a_run(workspace: Workspace) -> None:
    said = track(workspace.root)
    assert (said["runs"], said["written"], said["experiment"]) == (1, ["1" * 64], "demo")
    client = client_of(workspace)
    (run,) = runs_of(client).values()
    assert run.info.status == "FINISHED"
    assert run.info.end_time - run.info.start_time == 4500
    domain = next(name.split("/")[1] for name in run.data.metrics if name.startswith("told/"))
    assert domain.startswith("food_raw-")
    assert run.data.metrics[f"told/{domain}/incumbent"] == 0.7
    assert run.data.metrics[f"told/{domain}/candidate"] == 0.75
    assert run.data.metrics[f"untold/{domain}/incumbent"] == 0.6
    assert f"untold/{domain}/candidate" not in run.data.metrics
    assert run.data.metrics[f"change/{domain}/high"] == 0.08
    assert run.data.metrics["change_mean/delta"] == 0.05
    assert "change_mean/high" not in run.data.metrics
    assert run.data.metrics["gain_kept/value"] == 0.9
    assert run.data.metrics["bytes_crossed_all"] == 123
    assert run.data.metrics["seconds"] == 4.5
    assert {m.step for m in client.get_metric_history(run.info.run_id, "seconds")} == {1}
    assert run.data.params["domains.food.share"] == "open"
    assert run.data.params["gate.margin"] == "0.05"
    assert len(run.data.params["model"]) == 500
    tags = run.data.tags
    assert (tags["fanbu.decision"], tags["fanbu.champion"], tags["fanbu.seed"]) == ("promoted", "yes", "7")
    assert (tags["fanbu.parent"], tags["fanbu.version.torch"], tags["fanbu.reason"]) == ("a" * 64, "2.8", "because")
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"record.json", "recipe.yaml"}
    assert not (Path.cwd() / "mlruns").exists(), "artifacts belong into the workspace"


def test_twice_writes_nothing_twice(workspace: Workspace) -> None:
    first = track(workspace.root)
    again = track(workspace.root)
    assert (again["written"], again["runs"], again["versions"]) == ([], 1, first["versions"])
    finish(workspace, 2, False)
    assert track(workspace.root)["written"] == ["2" * 64]
    client = client_of(workspace)
    assert sorted(runs_of(client)) == ["1", "2"]
    assert len(client.search_model_versions("name = 'demo'")) == 2


def test_a_run_that_was_cut_off_is_written_to_its_end(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    def broken(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(MlflowClient, "set_terminated", broken)
    with pytest.raises(KeyboardInterrupt):
        track(workspace.root)
    monkeypatch.undo()
    assert track(workspace.root)["written"] == ["1" * 64]
    client = client_of(workspace)
    (run,) = runs_of(client).values()
    assert run.info.status == "FINISHED"
    assert len(client.get_metric_history(run.info.run_id, "seconds")) == 1


def champion(workspace: Workspace) -> tuple[str, str]:
    found = client_of(workspace).get_model_version_by_alias("demo", "champion")
    return found.tags["fanbu.digest"], found.source


def test_the_alias_follows_the_champion(workspace: Workspace) -> None:
    track(workspace.root)
    models = {n: (workspace.root / "stages" / f"distill-{n}" / "model").as_uri() for n in (1, 2, 3)}
    assert champion(workspace) == ("1" * 64, models[1])
    finish(workspace, 2, False)
    track(workspace.root)
    assert champion(workspace) == ("1" * 64, models[1])
    finish(workspace, 3, True)
    said = track(workspace.root)
    assert champion(workspace) == ("3" * 64, models[3])
    assert said["versions"] == {"a" * 64: "1", "1" * 64: "2", "3" * 64: "3"}
    runs = runs_of(client_of(workspace))
    assert [runs[n].data.tags["fanbu.champion"] for n in "123"] == ["no", "no", "yes"]
    version = client_of(workspace).get_model_version("demo", "3")
    assert version.run_id == runs["3"].info.run_id

    workspace.rollback()
    said = track(workspace.root)
    assert champion(workspace) == ("1" * 64, models[1])
    assert (said["champion"], said["versions"], said["written"]) == (
        "2",
        {"a" * 64: "1", "1" * 64: "2", "3" * 64: "3"},
        [],
    )
    runs = runs_of(client_of(workspace))
    assert [runs[n].data.tags["fanbu.champion"] for n in "123"] == ["yes", "no", "no"]

    workspace.promote("2" * 12)  # by hand, over the gate
    track(workspace.root)
    assert champion(workspace) == ("2" * 64, models[2])
    tags = runs_of(client_of(workspace))["2"].data.tags
    assert (tags["fanbu.decision"], tags["fanbu.reason"]) == ("promoted", "by hand")


def test_leaving_moves_the_alias_or_takes_it_away(workspace: Workspace) -> None:
    from mlflow.exceptions import MlflowException

    event(workspace, "left", "b" * 64, "stages/without/model", None, domain="food", forget=False, rounds=1)
    track(workspace.root)
    assert champion(workspace) == ("b" * 64, (workspace.root / "stages" / "without" / "model").as_uri())
    event(workspace, "left", None, None, None, domain="rail", forget=True, rounds=1)
    said = track(workspace.root)
    assert (said["champion"], len(said["versions"])) == (None, 3)
    with pytest.raises(MlflowException, match="alias champion not found"):
        champion(workspace)


def test_uri_and_experiment_of_ones_own(
    workspace: Workspace, migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    for name in ("given.db", "environment.db"):
        (tmp_path / name).write_bytes(migrated.read_bytes())
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'environment.db'}")
    assert track(workspace.root)["uri"].endswith("environment.db")
    given = f"sqlite:///{tmp_path / 'given.db'}"
    assert track(workspace.root, given, "other")["uri"] == given
    assert len(runs_of(MlflowClient(given), "other")) == 1
    assert client_of(workspace).get_experiment_by_name("demo") is None


def test_no_telemetry_and_no_change_to_the_callers_mlflow(workspace: Workspace) -> None:
    import mlflow

    before = mlflow.get_tracking_uri()
    track(workspace.root)
    assert (os.environ["MLFLOW_DISABLE_TELEMETRY"], os.environ["DO_NOT_TRACK"]) == ("true", "true")
    assert mlflow.get_tracking_uri() == before
    assert mlflow.active_run() is None


def test_names_that_mlflow_does_not_take() -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    value = record(1, True)
    hostile = ["../x", "a'b\"", "ünï 中", "x" * 500, "", "a/b", "a_b", "."]
    row = value["verdict"]["domains"]["food/raw"]
    value["verdict"]["domains"] = dict.fromkeys(hostile, row)
    value["recipe"] = {"domains": [{"name": name, "share": "open"} for name in hostile], "x'/": {"..": None, "y": 1}}
    metrics, parameters = metrics_of(value), parameters_of(value)
    for name in metrics:
        _validate_metric_name(name)
    for name in parameters:
        _validate_param_name(name)
    assert sum(name.startswith("change/") for name in metrics) == 3 * len(hostile)
    assert sum(name.endswith(".share") for name in parameters) == len(hostile)


def test_a_recipe_of_any_length_is_bounded() -> None:
    value = record(1, True)
    value["recipe"]["domains"] = [{"name": f"d{n}", "train": "t" * 9000, "share": "open"} for n in range(2000)]
    found = parameters_of(value)
    assert len(found) == 1000
    assert max(map(len, found.values())) == 500


def test_without_the_extra(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == "mlflow":
            raise ImportError(f"No module named {name!r}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UsageError, match=r"pip install 'fanbu\[track\]' \[extra-missing\]"):
        track(workspace.root)


def test_what_cannot_be_tracked_is_said(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="no-rounds"):
        track(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with pytest.raises(RetryError, match="tracking"):
        track(workspace.root, "nonsense://somewhere")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    with pytest.raises(RetryError) as caught:
        track(workspace.root, "http://user:secret@127.0.0.1:9/")
    assert time.monotonic() - began < 20
    assert "secret" not in str(caught.value)
