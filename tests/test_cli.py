"""The command line: quick to start, errors with their exit codes, and a round's whole life by commands."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import Done, finished_round, short, stages, write_domain, write_rows
from fanbu.catalogue import methods
from fanbu.cli import main
from fanbu.contribution import open_contribution
from fanbu.model import Model, open_model

Command = Callable[..., tuple[int, Any]]


@pytest.fixture
def fanbu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """``fanbu ...`` in this process: (exit code, stdout; read as JSON with ``--json``)."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("fanbu.recipe.os.sched_getaffinity", lambda _: {0}, raising=False)  # one thread

    def call(*arguments: object) -> tuple[int, Any]:
        monkeypatch.setattr(sys, "argv", ["fanbu", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out = capsys.readouterr().out
        code = end.value.code or 0
        assert isinstance(code, int)
        return code, json.loads(out) if "--json" in sys.argv else out

    return call


def error_of(result: tuple[int, Any], exit_code: int, code: str) -> dict[str, str]:
    """The one JSON object that an error gives on stdout."""
    assert result[0] == exit_code
    assert set(result[1]) == {"error"}
    error: dict[str, str] = result[1]["error"]
    assert set(error) == {"code", "what", "allowed", "got", "remedy", "see"}
    assert error["see"] == f"docs/errors.md#{code}"
    assert error["code"] == code
    assert error["remedy"]
    return error


@pytest.fixture
def copied(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> tuple[Done, Path]:
    done = finished_round(tmp_path_factory)
    return done, Path(shutil.copytree(done.workspace, tmp_path / "ws"))


# Start


def quickest(command: list[str]) -> float:
    """The best of three, in seconds: the machine may be busy."""
    times = []
    for _ in range(3):
        started = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.monotonic() - started)
    return min(times)


def test_help_is_quick_and_imports_no_torch() -> None:
    for arguments in (["--help"], ["run", "--help"], ["methods", "list"]):
        code = (
            "import sys\n"
            f"sys.argv = ['fanbu', *{arguments}]\n"
            "from fanbu.cli import main\n"
            "try:\n    main()\n"
            "except SystemExit as end:\n    assert not end.code\n"
            "heavy = {'torch', 'transformers', 'numpy', 'sklearn', 'accelerate'} & set(sys.modules)\n"
            "assert not heavy, heavy\n"
        )
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert quickest([sys.executable, "-m", "fanbu", "--help"]) < 1.5


def test_import_is_quick_and_imports_no_torch() -> None:
    code = "import sys, fanbu; assert 'torch' not in sys.modules; assert fanbu.__version__"
    assert quickest([sys.executable, "-c", code]) < 1.5


def test_version_and_help(fanbu: Command) -> None:
    import fanbu as package

    assert fanbu("--version") == (0, package.__version__ + "\n")
    code, text = fanbu("--help")
    assert code == 0
    for command in (
        "init", "doctor", "run", "report", "watch", "track", "shrink", "feed", "judge", "history", "promote",
        "rollback", "leave", "export", "methods",
    ):  # fmt: skip
        assert f" {command} " in text


# Methods


def test_methods(fanbu: Command) -> None:
    code, listed = fanbu("methods", "list", "--json")
    assert code == 0
    assert {row["name"] for row in listed} == {m.name for m in methods()}
    assert all(row["summary"] and row["family"] for row in listed)
    for arguments in (["methods"], ["methods", "list"]):
        code, text = fanbu(*arguments)
        assert code == 0
        assert all(m.name in text for m in methods())


def test_what_is_not_proven_says_so(fanbu: Command) -> None:
    _, listed = fanbu("methods", "list", "--json")
    unproven = {row["name"]: row["experimental"] for row in listed if row["experimental"]}
    assert set(unproven) == {"maml", "reptile"}
    _, text = fanbu("methods", "list")
    assert all(("(experimental)" in line) == (line.split()[1] in unproven) for line in text.splitlines())
    for name, why in unproven.items():
        assert why in fanbu("methods", "show", name)[1]
        _, shown = fanbu("methods", "show", name, "--json")
        assert shown[0]["experimental"] == why


def test_show_one_method(fanbu: Command) -> None:
    code, shown = fanbu("methods", "show", "distill", "--json")
    assert code == 0
    back, down = sorted(shown, key=lambda m: m["family"])  # a way down and a way back of one name
    assert (back["family"], down["family"]) == ("predictions", "shrink")
    assert down["parameters"]["temperature"]["default"] == 2.0
    assert back["parameters"]["top_k"]["default"] == 64
    assert "int" in back["parameters"]["top_k"]["type"]
    assert back["parameters"]["train"]["default"]["epochs"] == 6
    code, one = fanbu("methods", "show", "ties", "--json")
    assert code == 0
    assert [m["family"] for m in one] == ["weights"]
    code, text = fanbu("methods", "show", "distill")
    assert code == 0
    assert "top_k" in text
    error = error_of(fanbu("methods", "show", "distil", "--json"), 2, "unknown-method")
    assert "did you mean 'distill'" in error["remedy"]


# Errors


def test_unknown_key_is_usage(copied: tuple[Done, Path], fanbu: Command, capsys: pytest.CaptureFixture[str]) -> None:
    done, workspace = copied
    error = error_of(fanbu("run", done.recipe, "--set", "gate.margn=1", "--json"), 2, "unknown-key")
    assert "did you mean 'margin'" in error["remedy"]
    assert fanbu("run", done.recipe, "--set", "gate.margn=1")[0] == 2
    assert fanbu("run", done.recipe, "--nonsense")[0] == 2
    assert fanbu("run")[0] == 2
    assert "--nonsense" in error_of(fanbu("run", done.recipe, "--nonsense", "--json"), 2, "flag")["what"]
    error_of(fanbu("history", "--json"), 2, "flag")
    capsys.readouterr()
    assert fanbu("nonsense")[0] == 2
    error_of(fanbu("run", workspace / "none.yaml", "--json"), 2, "recipe-not-found")


def test_an_error_goes_to_stderr_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["fanbu", "run", str(tmp_path / "none.yaml")])
    with pytest.raises(SystemExit, match="2"):
        main()
    told = capsys.readouterr()
    assert not told.out
    assert told.err.startswith("error: no recipe at")
    assert "remedy" in told.err
    assert told.err.endswith("\nsee docs/errors.md#recipe-not-found\n")
    assert "Traceback" not in told.err


def test_bad_data(copied: tuple[Done, Path], fanbu: Command, tmp_path: Path) -> None:
    done, workspace = copied
    before = stages(workspace)
    bad = write_rows(tmp_path / "bad.jsonl", [{"id": "1", "text": "", "label": "soup"}])
    change = ("--workspace", workspace, "--set", f"domains.food.test={bad}")
    error_of(fanbu("run", done.recipe, *change, "--json"), 4, "empty-text")
    assert stages(workspace) == before


def test_broken_checkpoint(copied: tuple[Done, Path], fanbu: Command, tmp_path: Path) -> None:
    done, workspace = copied
    before = stages(workspace)
    model = Path(shutil.copytree(done.recipe.parent / "bert", tmp_path / "model"))
    (model / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-8])
    change = ("--workspace", workspace, "--set", f"model={model}")
    error_of(fanbu("run", done.recipe, *change, "--json"), 5, "checkpoint-broken")
    assert stages(workspace) == before


def undecided(workspace: Path) -> None:
    """As if the run had been killed before its round was decided: only the stages are there."""
    shutil.rmtree(workspace / "rounds")
    for name in ("history.jsonl", "champion.json"):
        (workspace / name).unlink()


def test_changed_stage(copied: tuple[Done, Path], fanbu: Command) -> None:
    done, workspace = copied
    undecided(workspace)
    everything = stages(workspace)
    for wanted in ("shrink-finetune-food", "distill"):
        (stage,) = (workspace / "stages" / name for name in everything if short({name}) == {wanted})
        with (stage / "model" / "config.json").open("a") as stream:
            stream.write("\n")
        error = error_of(fanbu("run", done.recipe, "--workspace", workspace, "--json"), 5, "stage-changed")
        assert stage.name in error["what"]
        shutil.rmtree(stage)
    code, record = fanbu("run", done.recipe, "--workspace", workspace, "--json")
    assert code == 0
    assert record["champion"]["model"] == done.champion
    assert stages(workspace) == everything
    with (workspace / record["champion"]["path"] / "config.json").open("a") as stream:
        stream.write("\n")
    error_of(fanbu("run", done.recipe, "--workspace", workspace, "--rounds", 2, "--json"), 5, "file-changed")


def test_full_disk_and_closed_folder(
    copied: tuple[Done, Path], fanbu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    done, workspace = copied
    for number, code in ((errno.ENOSPC, "disk-full"), (errno.EROFS, "not-writable")):

        def fail(*_: Any, number: int = number) -> None:
            raise OSError(number, "no")

        for place in ("fanbu.files.sync", "fanbu.generations.write_record", "fanbu.turn.Workspace"):
            with monkeypatch.context() as patch:
                patch.setattr(place, fail)
                result = fanbu("run", done.recipe, "--workspace", workspace, "--set", "gate.margin=0.3", "--json")
                error_of(result, 75, code)
    assert fanbu("run", done.recipe, "--workspace", workspace)[0] == 0


# A round


def test_a_round_and_its_life(copied: tuple[Done, Path], fanbu: Command) -> None:
    done, workspace = copied
    code, record = fanbu("run", done.recipe, "--workspace", workspace, "--json")
    assert code == 0
    assert record["verdict"]["accepted"]
    assert Path(record["report"]).is_file()
    assert record["champion"]["model"] == done.champion
    code, text = fanbu("run", done.recipe, "--workspace", workspace)
    assert code == 0
    assert "food" in text
    assert "report: " in text
    Path(record["report"]).unlink()
    code, text = fanbu("report", workspace)
    assert code == 0
    assert Path(text.strip().removeprefix("report: ")).is_file()
    assert fanbu("report", workspace, "--json")[1]["key"] == record["key"]
    code, told = fanbu("history", workspace, "--json")
    assert code == 0
    assert [e["event"] for e in told["events"]] == ["started", "promoted"]
    assert told["champion"]["model"] == done.champion
    assert done.champion[:8] in fanbu("history", workspace)[1]

    first = told["events"][0]["model"]
    code, champion = fanbu("rollback", workspace, "--json")
    assert (code, champion["model"]) == (0, first)
    assert json.loads((workspace / "champion.json").read_text())["model"] == first
    error_of(fanbu("rollback", workspace, "--json"), 2, "nothing-before")
    code, champion = fanbu("promote", workspace, done.champion[:12], "--json")
    assert (code, champion["model"]) == (0, done.champion)
    model = open_model(workspace / champion["path"])
    assert model.digest == done.champion
    error_of(fanbu("promote", workspace, "ffffffffffff", "--json"), 2, "unknown-model")
    error_of(fanbu("promote", workspace, done.champion[:3], "--json"), 2, "unknown-model")
    events = [e["event"] for e in fanbu("history", workspace, "--json")[1]["events"]]
    assert events == ["started", "promoted", "rolled back", "promoted"]


def test_a_recipe_names_its_workspace(tmp_path_factory: pytest.TempPathFactory, fanbu: Command) -> None:
    done = finished_round(tmp_path_factory)
    assert fanbu("history", done.recipe, "--json") == fanbu("history", done.workspace, "--json")


def test_no_round_yet(tmp_path: Path, fanbu: Command) -> None:
    for command in ("report", "history", "rollback"):
        error_of(fanbu(command, tmp_path, "--json"), 2, "no-rounds")
    error_of(fanbu("promote", tmp_path, "abcdef", "--json"), 2, "no-rounds")
    assert not list(tmp_path.iterdir())


def test_set_changes_the_recipe_and_the_gate_refuses(copied: tuple[Done, Path], fanbu: Command) -> None:
    """A candidate that learned nothing is not better with confidence: exit code 3, and the champion stays."""
    done, workspace = copied
    before = stages(workspace)
    change = ("--set", "feedback.train.lr=0.0", "--set", "feedback.train.head_lr=0.0", "--set", "references=[]")
    code, record = fanbu("run", done.recipe, "--workspace", workspace, *change, "--json")
    assert code == 3
    assert not record["verdict"]["accepted"]
    assert record["recipe"]["feedback"]["train"]["lr"] == 0
    assert record["champion"]["model"] == done.champion
    assert short(stages(workspace) - before) >= {"distill"}
    events = fanbu("history", workspace, "--json")[1]["events"]
    assert events[-1]["event"] == "refused"
    assert events[-1]["reason"]
    assert fanbu("run", done.recipe, "--workspace", workspace, *change)[0] == 3
    assert fanbu("history", workspace, "--json")[1]["events"] == events
    error_of(fanbu("run", done.recipe, "--set", "nonsense", "--json"), 2, "set-form")


# The steps alone


@pytest.fixture(scope="module")
def yaml_of_domains(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps")
    names = {name: write_domain(folder, name) for name in ("food", "rail")}
    (folder / "domains.yaml").write_text(yaml.safe_dump({"domains": names}))
    return folder / "domains.yaml"


def test_the_steps_alone(incumbent: Model, yaml_of_domains: Path, tmp_path: Path, fanbu: Command) -> None:
    domains = ("--domains", yaml_of_domains)
    quick = ("--set", "train={epochs: 1, batch_size: 8, lr: 0.003}", "--json")
    made = {}
    for name in ("food", "rail"):
        code, told = fanbu("shrink", incumbent.path, tmp_path / name, *domains, "--domain", name, *quick)
        assert code == 0
        made[name] = open_model(tmp_path / name)
        assert told["digest"] == made[name].digest
        assert made[name].manifest["parents"] == [incumbent.digest]
    sent = [f"--specialist={name}={tmp_path / name}" for name in made]
    code, told = fanbu("feed", incumbent.path, tmp_path / "new", *domains, *sent, "--method", "average", "--json")
    assert code == 0
    assert told["digest"] == open_model(tmp_path / "new").digest
    assert set(told["crossed"]) == {"food", "rail"}
    assert all((tmp_path / f"new.{name}.contribution" / "contribution.json").is_file() for name in made)
    code, verdict = fanbu("judge", incumbent.path, tmp_path / "new", *domains, "--json")
    assert code == (0 if verdict["accepted"] else 3)
    assert set(verdict["domains"]) == {"food", "rail"}
    code, text = fanbu("judge", incumbent.path, incumbent.path, *domains)
    assert code == 3  # no better than itself
    assert "food" in text
    # and by distillation, with its probe set from the domains
    code, told = fanbu("feed", incumbent.path, tmp_path / "distilled", *domains, *sent, *quick)
    assert code == 0
    assert open_model(tmp_path / "distilled").labels == incumbent.labels
    # the texts cross too: through the boundary, and counted
    texts = tmp_path / "distilled.food.texts"
    assert open_contribution(texts).rows[0]["text"]
    assert not any("label" in row for row in open_contribution(texts).rows)
    assert told["crossed"]["food"] > open_contribution(texts).bytes > 0
    assert not (tmp_path / "new.food.texts").exists()  # average asks nobody


def test_a_bare_body_is_opened_first(bert: Path, yaml_of_domains: Path, tmp_path: Path, fanbu: Command) -> None:
    step = ("--domains", yaml_of_domains, "--domain", "food", "--set", "train.epochs=1", "--seed", 4, "--json")
    assert fanbu("shrink", bert, tmp_path / "small", *step)[0] == 0
    assert open_model(tmp_path / "small").manifest["seed"] == 4
    assert open_model(tmp_path / "small.opened").task == "text-classification"


def test_steps_with_wrong_arguments(incumbent: Model, yaml_of_domains: Path, tmp_path: Path, fanbu: Command) -> None:
    out, domains = tmp_path / "out", ("--domains", yaml_of_domains)

    def step(*arguments: object) -> tuple[int, Any]:
        return fanbu("shrink", incumbent.path, out, *domains, *arguments, "--json")

    error_of(step("--domain", "foood"), 2, "unknown-domain")
    error_of(step("--domain", "food", "--method", "finetun"), 2, "unknown-method")
    error_of(step("--domain", "food", "--set", "trian.epochs=1"), 2, "unknown-parameter")
    error_of(step("--domain", "food", "--set", "train.epochs=x"), 2, "bad-parameter")
    error_of(step("--domain", "food", "--device", "abacus"), 2, "device")
    feed = ("feed", incumbent.path, out, *domains, "--json", "--specialist")
    error_of(fanbu(*feed, "food"), 2, "flag")
    error_of(fanbu(*feed, f"food={tmp_path / 'gone'}"), 2, "model-not-found")
    judge = ("judge", incumbent.path, incumbent.path, *domains, "--json", "--set")
    error_of(fanbu(*judge, "margn=0.1"), 2, "unknown-key")
    error_of(fanbu(*judge, "margin=much"), 2, "bad-recipe")
    error_of(fanbu(*judge, "margins.foood=0.1"), 2, "unknown-domain")
    assert not out.exists()


def test_domains_of_a_private_owner_are_not_fed_back(
    incumbent: Model, yaml_of_domains: Path, tmp_path: Path, fanbu: Command
) -> None:
    value = yaml.safe_load(yaml_of_domains.read_text())
    value["domains"]["food"]["share"] = "private"
    (tmp_path / "domains.yaml").write_text(yaml.safe_dump(value))
    result = fanbu(
        "feed", incumbent.path, tmp_path / "new", "--domains", tmp_path / "domains.yaml", "--method", "average",
        "--specialist", f"food={incumbent.path}", "--json",
    )  # fmt: skip
    error_of(result, 1, "not-shared")
    assert {p.name for p in tmp_path.iterdir()} == {"domains.yaml"}


def test_set_keeps_values_of_yaml(copied: tuple[Done, Path], fanbu: Command) -> None:
    done, workspace = copied
    code, record = fanbu(
        "run", done.recipe, "--workspace", workspace, "--set", "gate={margin: 0.25, margins: {rail: 0.3}}",
        "--set", "references=[]", "--json",
    )  # fmt: skip
    assert code in {0, 3}
    rows = record["verdict"]["domains"]
    assert (rows["food"]["margin"], rows["rail"]["margin"]) == (0.25, 0.3)
    assert record["recipe"]["references"] == []
