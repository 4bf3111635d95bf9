"""What earlier comparisons left in ledgers, as a bandit learns from it, and the state of one that begins."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.errors import UsageError
from fanbu.model import Model
from fanbu.recipe_parts import Step
from fanbu.round import evaluated
from fanbu.search.bandit import Action, Seen, reward
from fanbu.turn import Turn
from fanbu.types import digest

_LEAST_GAIN = 0.05  # of specialists beside the large model, in terms of which rewards are told


def action_of(step: Step) -> Action:
    """A candidate as a bandit knows it."""
    way = method(step.method, "feedback")
    return Action(way.family, way.name, digest(step.model_dump(mode="json")))


def state_of(turn: Turn, incumbent: Model, specialists: Sequence[Specialist]) -> tuple[tuple[float, ...], float]:
    """Numbers that describe a round before its way back, and the mean gain of its specialists on validation rows, in
    which rewards are told: log2 of the number of domains, log10 of their training rows and labels, the value of the
    large model, the mean and least gain of its specialists, and log2 of the round's number."""
    before, gains = [], []
    for s in specialists:
        old, new = (_value(turn, who, m, s.domain) for who, m in (("incumbent", incumbent), ("specialist", s.model)))
        before.append(old)
        gains.append((new - old) / (abs(old) if s.domain.metric == "loss" else 1.0))
    feeding = [s.domain for s in specialists]
    state = (
        math.log2(len(feeding)), _log10([len(d.train) for d in feeding]), _log10([len(d.labels) for d in feeding]),
        float(np.mean(before)), float(np.mean(gains)), min(gains), math.log2(turn.number),
    )  # fmt: skip
    return state, max(float(np.mean(gains)), _LEAST_GAIN)


def _log10(counts: Sequence[int]) -> float:
    return math.log10(max(float(np.mean(counts)), 1.0))


def _value(turn: Turn, who: str, model: Model, d: Domain) -> float:
    outcomes, _ = evaluated(turn, who, model, replace(d, test=d.valid))
    column = outcomes.tensors.get(turn.recipe.gate.mode, outcomes.tensors["told"])
    return float(column.sum() / outcomes.tensors["weight"].sum())


def seen_in(found: Mapping[str, Any], name: str) -> Iterator[Seen]:
    """The trials of a finished comparison."""
    for row in found["trials"]:
        yield Seen(name, tuple(found["state"]), action_of(Step(**row["step"])), float(row["share"]),
                   reward(row["score"], found["scale"]), row["seconds"])  # fmt: skip


def experience(workspaces: Sequence[Path], own: Path, folder: str) -> list[Seen]:
    """All trials of the comparisons in workspaces. UsageError where one has none, but for a recipe's own."""
    seen: list[Seen] = []
    for workspace in workspaces:
        files = sorted((workspace / folder).glob("*.json"), key=lambda f: int(f.stem))
        if not files and workspace.resolve() != own.resolve():
            raise UsageError(
                "no-comparison", f"no finished comparison in {workspace}", allowed="workspaces of `fanbu compare`",
                got=workspace, remedy="leave it out of compare.learn, or compare there first",
            )  # fmt: skip
        for file in files:
            seen += seen_in(json.loads(file.read_text()), f"{workspace}#{file.stem}")
    return seen
