"""What earlier comparisons left in ledgers, as a bandit learns from it, and the state of one that begins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from fanbu.catalogue import method, methods
from fanbu.domain import Specialist
from fanbu.errors import IntegrityError, UsageError
from fanbu.model import Model, read_json
from fanbu.recipe_parts import Step
from fanbu.record import COMPARED
from fanbu.round import evaluated
from fanbu.search.bandit import Action, Seen, reward
from fanbu.turn import Turn
from fanbu.types import digest

NEAR = (0.5, 0.25, 0.25, 0.05, 0.05, 0.05, 0.5)  # differences of states that are small, by number
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
        old, new = _values(turn, incumbent, s)
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


def _values(turn: Turn, incumbent: Model, s: Specialist) -> tuple[float, float]:
    """Of the large model and of a specialist on validation rows; told, where one of them does not find the domain."""
    calls = [("incumbent", incumbent), ("specialist", s.model)]
    both = [evaluated(turn, who, m, replace(s.domain, test=s.domain.valid))[0].tensors for who, m in calls]
    mode = turn.recipe.gate.mode if all(turn.recipe.gate.mode in outcomes for outcomes in both) else "told"
    old, new = (float(outcomes[mode].sum() / outcomes["weight"].sum()) for outcomes in both)
    return old, new


def experience(workspaces: Sequence[Path], own: Path, number: int) -> list[Seen]:
    """All trials of the comparisons in workspaces; of a recipe's own, of rounds before ``number``. UsageError where one
    has none, but for the own, and IntegrityError where one cannot be read."""
    seen: list[Seen] = []
    for workspace in workspaces:
        files = {int(f.stem): f for f in (workspace / COMPARED).glob("*.json") if f.stem.isdigit()}
        mine = workspace.resolve() == own.resolve()
        if not files and not mine:
            raise UsageError(
                "no-comparison", f"no finished comparison in {workspace}", allowed="workspaces of `fanbu compare`",
                got=workspace, remedy="leave it out of compare.learn, or compare there first",
            )  # fmt: skip
        for made in sorted(n for n in files if not mine or n < number):
            seen += _read(files[made], f"{workspace}#{made}")
    return seen


def _read(file: Path, name: str) -> list[Seen]:
    """The trials of a finished comparison, but those of ways that are not installed here."""
    known = {m.name for m in methods() if m.family != "shrink"}
    found = read_json(file, "comparison-broken")
    try:
        state, scale = tuple(float(v) for v in found["state"]), float(found["scale"])
        seen = [
            Seen(name, state, action_of(Step(**row["step"])), float(row["share"]),
                 reward(float(row["score"]), scale), float(row["seconds"]))
            for row in found["trials"] if row["step"]["method"] in known
        ]  # fmt: skip
        if len(state) != len(NEAR) or not all(map(math.isfinite, (*state, *(s.reward for s in seen)))):
            raise ValueError(f"{len(state)} numbers in its state, or one that is not finite")
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise IntegrityError(
            "comparison-broken", f"{file} is no comparison that can be learned from", allowed="state, scale and trials",
            got=repr(error)[:100], remedy="leave its workspace out of compare.learn, or compare there again",
        ) from None  # fmt: skip
    return seen
