"""Whatever is interrupted goes on to the same bits, and nothing is done twice."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from conftest import TOPICS, Done, finished_round, short, stages
from fanbu.catalogue import method
from fanbu.domain import Domain
from fanbu.generations import run
from fanbu.model import Model, open_model
from fanbu.recipe import load_recipe
from fanbu.round import turn_once
from fanbu.tensors import Tensors
from fanbu.train import train
from fanbu.turn import open_turn
from fanbu.types import Context, Train

# Training


class Stopped(Exception):
    """Stands for the end of the process."""


def stop_at(number: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if done == number and what != "predict":
            raise Stopped

    return progress


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 3))


def learn(context: Context, **changes: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """The weights and history of a small training: 20 rows in batches of 4, so 5 steps an epoch."""
    generator = torch.Generator().manual_seed(5)
    x, v, truth = (torch.randn(n, 6, generator=generator) for n in (20, 12, 3))
    y, w = (x @ truth.T).argmax(1), (v @ truth.T).argmax(1)
    plan = Train(**{"epochs": 4, "batch_size": 4, "lr": 3e-2, "head_lr": 5e-2, "patience": 0, **changes})
    net = network()

    def loss(n: nn.Module, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(n(x[list(batch)]), y[list(batch)])

    def validate(n: nn.Module) -> float:
        with torch.inference_mode():
            return -float(nn.functional.cross_entropy(n(v), w))

    history = train(net, [1] * 20, loss, plan, context, "small", head=net[3], validate=validate)
    return {k: t.clone() for k, t in net.state_dict().items()}, history


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


PLANS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.5},
    "early stopping": {"epochs": 20, "patience": 1, "lr": 0.3},
    "capped": {"max_steps": 13},
    "accumulated": {"accumulate": 2},
    "accumulated over epochs": {"accumulate": 3, "schedule": "cyclic"},
    "sgd": {"optimizer": "SGD", "schedule": "linear"},
    "lion-like": {"optimizer": "RMSprop", "clip": 0.0},
}


@pytest.mark.parametrize("changes", PLANS.values(), ids=list(PLANS))
def test_interrupted_training_goes_on_to_the_same_bits(changes: dict[str, Any], tmp_path: Path) -> None:
    context = Context(threads=1, checkpoint_seconds=0)
    whole, history = learn(context, **changes)
    assert history.steps > 5
    chosen = random.Random(0).sample(range(1, history.steps + 1), 2)
    for number in {*chosen, 5} if changes else (1, 4, 5, 6, 10, 13, 20):  # 5, 10, ... end an epoch
        scratch = tmp_path / str(number)
        scratch.mkdir()
        with pytest.raises(Stopped):
            learn(replace(context, scratch=scratch, progress=stop_at(number)), **changes)
        torch.manual_seed(99)
        torch.randn(7)
        resumed, after = learn(replace(context, scratch=scratch), **changes)
        assert same(whole, resumed), number
        assert after == history


def test_interrupted_again_and_again(tmp_path: Path) -> None:
    context = Context(threads=1, checkpoint_seconds=0, scratch=tmp_path)
    whole, history = learn(replace(context, scratch=None))
    for number in (2, 3, 3, 6, 11, 15, 20):
        with pytest.raises(Stopped):
            learn(replace(context, progress=stop_at(number)))
    resumed, after = learn(context)
    assert same(whole, resumed)
    assert after == history


def test_it_does_go_on_and_not_start_anew(tmp_path: Path) -> None:
    seen: list[int] = []
    context = Context(threads=1, checkpoint_seconds=0, scratch=tmp_path)
    with pytest.raises(Stopped):
        learn(replace(context, progress=stop_at(12)))
    learn(replace(context, progress=lambda what, done, total: seen.append(done)))
    assert seen[0] == 12  # the step that was not saved


def test_a_kill_while_a_checkpoint_is_written(tmp_path: Path) -> None:
    """The older generation counts: the tensors of the newest may be half there, its JSON is not."""
    context = Context(threads=1, checkpoint_seconds=0, scratch=tmp_path)
    whole, _ = learn(replace(context, scratch=None))
    with pytest.raises(Stopped):
        learn(replace(context, progress=stop_at(9)))
    folder = tmp_path / "small.checkpoint"
    newest = max(folder.glob("?.json"), key=lambda p: json.loads(p.read_text())["history"]["steps"])
    newest.unlink()
    newest.with_suffix(".safetensors").write_bytes(b"half")
    (folder / f".{newest.name}.1.tmp").write_text("{")
    resumed, _ = learn(context)
    assert same(whole, resumed)


@pytest.mark.parametrize("task", ["text-classification", "causal-lm"])
def test_an_interrupted_way_down_goes_on_to_the_same_bits(
    task: str, incumbent: Model, llama: Path, domains: dict[str, Domain], texts: dict[str, Domain], context: Context,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Dropout, early stopping and tied weights of real networks."""
    parent = incumbent if task == "text-classification" else open_model(llama)
    domain = (domains if task == "text-classification" else texts)["food"]
    plan = {"train": {"epochs": 2, "lr": 5e-3, "batch_size": 8, "dropout": 0.2}}
    way, context = method("finetune"), replace(context, checkpoint_seconds=0)
    whole = way.shrink(parent, domain, tmp_path / "whole", context, **plan)
    (tmp_path / "scratch").mkdir()
    for number in (4, 6, 9):
        broken = replace(context, scratch=tmp_path / "scratch", progress=stop_on(f"finetune {domain.name}", number))
        with pytest.raises(Stopped):
            way.shrink(parent, domain, tmp_path / "resumed", broken, **plan)
        assert not (tmp_path / "resumed").exists()
    resumed = way.shrink(parent, domain, tmp_path / "resumed", replace(context, scratch=tmp_path / "scratch"), **plan)
    one, two = Tensors(whole.path), Tensors(resumed.path)
    assert same({k: one[k] for k in one}, {k: two[k] for k in two})
    assert resumed.digest == whole.digest


def stop_on(name: str, number: int) -> Callable[[str, int, int], None]:
    def progress(what: str, done: int, total: int) -> None:
        if what == name and done == number:
            raise Stopped

    return progress


# Rounds


def launch(recipe: Path, workspace: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fanbu", "run", str(recipe), "--workspace", str(workspace), "--json", *more]
    quiet = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=quiet)


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, out
    record: dict[str, Any] = json.loads(out)
    return record


def wait_until(process: subprocess.Popen[str], reached: Callable[[], bool]) -> bool:
    """False where the process ended before."""
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if reached():
            return True
        time.sleep(0.002)
    return False


def champion(workspace: Path) -> str:
    return str(json.loads((workspace / "champion.json").read_text())["model"])


def in_training(workspace: Path, stage: str, steps: int) -> Callable[[], bool]:
    """Whether a stage has saved a checkpoint after so many steps."""

    def reached() -> bool:
        for path in workspace.glob(f"partial/{stage}-*/scratch/*.checkpoint/?.json"):
            try:
                if json.loads(path.read_text())["history"]["steps"] >= steps:
                    return True
            except (OSError, ValueError):
                pass
        return False

    return reached


def check_whole(done: Done, workspace: Path) -> None:
    """As if nothing had happened."""
    assert champion(workspace) == done.champion
    events = [json.loads(line) for line in (workspace / "history.jsonl").read_text().splitlines()]
    assert [e["event"] for e in events] == ["started", "promoted"]
    assert short(stages(workspace)) == short(stages(done.workspace))
    assert not list((workspace / "partial").iterdir())
    again = load_recipe(done.recipe, [f"workspace={workspace}"])
    assert all(cost["reused"] for cost in reuse(again)[0])


def test_killed_and_stopped_a_round_ends_with_the_same_champion(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    done, workspace = finished_round(tmp_path_factory), tmp_path / "ws"
    for stage, steps, number in (
        ("shrink-finetune-food", 7, signal.SIGKILL),
        ("shrink-finetune-rail", 20, signal.SIGTERM),
        ("distill", 30, signal.SIGKILL),
    ):
        process = launch(done.recipe, workspace, "--set", "checkpoint_seconds=0")
        assert wait_until(process, in_training(workspace, stage, steps))
        process.send_signal(number)
        process.communicate()
        assert process.returncode == (143 if number == signal.SIGTERM else -9)
        assert not (workspace / "champion.json").exists()
    record = finish(launch(done.recipe, workspace))
    assert record["verdict"] == done.record["verdict"]
    check_whole(done, workspace)


@pytest.mark.slow
def test_twenty_kills(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """At random moments all over the round: start, training, writing, judging, promoting."""
    done, workspace = finished_round(tmp_path_factory), tmp_path / "ws"
    total, kills, delays = len(stages(done.workspace)), 0, random.Random(20)
    for number in range(20):
        process = launch(done.recipe, workspace, "--set", "checkpoint_seconds=0")
        place = number * total // 20

        def reached(place: int = place) -> bool:
            return (workspace / "stages").exists() and len(stages(workspace)) >= place

        if wait_until(process, reached):
            # at an even number soon after the place is reached, at an odd one anywhere from the interpreter's start on
            time.sleep(delays.uniform(0, 0.4 if number % 2 == 0 else 6.0))
            if process.poll() is None:
                process.kill()
                kills += 1
        process.communicate()
        assert process.returncode in {0, -9}
    assert kills >= 15
    finish(launch(done.recipe, workspace))
    check_whole(done, workspace)


@pytest.mark.slow
def test_two_runs_at_once_on_one_workspace(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    done, workspace = finished_round(tmp_path_factory), tmp_path / "ws"
    both = [launch(done.recipe, workspace) for _ in range(2)]
    records = [finish(process) for process in both]
    assert {r["champion"]["model"] for r in records} == {done.champion}
    check_whole(done, workspace)


@pytest.fixture
def copied(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> tuple[Done, Path]:
    """The finished round, and a copy of its workspace to go on in."""
    done = finished_round(tmp_path_factory)
    return done, Path(shutil.copytree(done.workspace, tmp_path / "ws"))


def reuse(recipe: Any) -> tuple[list[dict[str, Any]], Any]:
    """What each stage cost and whether it was there, of a turn that promotes nothing."""
    turn = open_turn(recipe, open_model(recipe.model), None, [])
    return turn.costs, turn_once(turn)


def test_a_finished_round_is_only_read(copied: tuple[Done, Path]) -> None:
    done, workspace = copied
    before = {p: p.stat().st_mtime_ns for p in (workspace / "stages").rglob("*") if p.is_file()}
    history = (workspace / "history.jsonl").read_text()
    record = run(load_recipe(done.recipe, [f"workspace={workspace}"]))
    assert {p: p.stat().st_mtime_ns for p in (workspace / "stages").rglob("*") if p.is_file()} == before
    assert (workspace / "history.jsonl").read_text() == history
    for key in ("key", "created", "costs", "verdict", "table", "champion"):
        assert record[key] == done.record[key]
    costs, _ = reuse(load_recipe(done.recipe, [f"workspace={workspace}"]))
    assert all(cost["reused"] for cost in costs)


def test_another_margin_judges_again_and_trains_nothing(copied: tuple[Done, Path]) -> None:
    done, workspace = copied
    before = stages(workspace)
    costs, result = reuse(load_recipe(done.recipe, [f"workspace={workspace}", "gate.margin=0.0"]))
    assert stages(workspace) == before
    assert all(cost["reused"] for cost in costs)
    assert {row["margin"] for row in result.verdict["domains"].values()} == {0.0}


@pytest.mark.parametrize(
    ("change", "anew"),
    [
        ("feedback.train.epochs=1", {"distill", *(f"{what}-{d}" for what in ("evaluate", "examples") for d in TOPICS)}),
        ("checkpoint_seconds=0", set()),
        ("references=[]", set()),
        ("references=[tfidf]", {"evaluate-tfidf-food", "evaluate-tfidf-rail"}),
        ("domains.rail.limit.train=100", None),
    ],
)
def test_a_change_reruns_only_what_depends_on_it(copied: tuple[Done, Path], change: str, anew: Any) -> None:
    done, workspace = copied
    before = stages(workspace)
    reuse(load_recipe(done.recipe, [f"workspace={workspace}", change]))
    new = short(stages(workspace) - before)
    if anew is not None:
        assert new == anew
    else:
        untouched = {"open", "probe-texts-food", "probe-contribution-food"}
        assert "shrink-finetune-rail" in new
        assert not new & untouched
