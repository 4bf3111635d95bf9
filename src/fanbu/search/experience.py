"""What earlier comparisons and rounds left in ledgers, as a bandit learns from it, and the state of one that begins."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from fanbu.catalogue import method, methods
from fanbu.domain import Specialist
from fanbu.errors import IntegrityError, UsageError
from fanbu.model import Model, read_json
from fanbu.recipe_parts import GateSpec, Step
from fanbu.record import COMPARED, finished
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


def scored(changes: Mapping[str, float], gate: GateSpec) -> float:
    """The mean change over domains (of a loss, as a share of the incumbent's), less what any lost beyond its margin."""
    lost = [max(0.0, -change - gate.margins.get(name, gate.margin)) for name, change in changes.items()]
    return float(np.mean(list(changes.values()))) - sum(lost)


State = tuple[tuple[float, ...], float]


def state_of(turn: Turn, incumbent: Model, specialists: Sequence[Specialist]) -> State:
    """Numbers that describe a round before its way back, and the mean gain of its specialists on validation rows, in
    which rewards are told: log2 of the number of domains, log10 of their training rows and labels, the value of the
    large model, the mean and least gain of its specialists, and log2 of the round's number."""
    pairs = [(*_values(turn, incumbent, s), s.domain.metric == "loss") for s in specialists]
    feeding = [s.domain for s in specialists]
    return _state(pairs, [len(d.train) for d in feeding], [len(d.labels) for d in feeding], turn.number)


def _state(
    pairs: Sequence[tuple[float, float, bool]], rows: Sequence[int], labels: Sequence[int], number: int
) -> State:
    """Of the values of the large model and of the specialist of each domain, and whether these are losses."""
    gains = [(new - old) / (abs(old) if of_loss else 1.0) for old, new, of_loss in pairs]
    before, mean = float(np.mean([old for old, _, _ in pairs])), float(np.mean(gains))
    state = (
        math.log2(len(pairs)), _log10(rows), _log10(labels), before, mean, min(gains), math.log2(number),
    )  # fmt: skip
    return state, max(mean, _LEAST_GAIN)


def _log10(counts: Sequence[int]) -> float:
    return math.log10(max(float(np.mean(counts)), 1.0))


def _values(turn: Turn, incumbent: Model, s: Specialist) -> tuple[float, float]:
    """Of the large model and of a specialist on validation rows; told, where one of them does not find the domain."""
    calls = [("incumbent", incumbent), ("specialist", s.model)]
    both = [evaluated(turn, who, m, replace(s.domain, test=s.domain.valid))[0].tensors for who, m in calls]
    mode = turn.recipe.gate.mode if all(turn.recipe.gate.mode in outcomes for outcomes in both) else "told"
    old, new = (float(outcomes[mode].sum() / outcomes["weight"].sum()) for outcomes in both)
    return old, new


def experience(workspaces: Sequence[Path], own: Path, number: int, domains: Collection[str]) -> list[Seen]:
    """All trials of the comparisons in workspaces (of a recipe's own, those of rounds before ``number``), and what
    rounds over none of some ``domains`` came to: verdicts are of test rows, and a round's own may not choose its way.
    UsageError where a workspace has neither, but for the own, and IntegrityError where one cannot be read."""
    seen: list[Seen] = []
    for workspace in workspaces:
        compared = {int(f.stem): f for f in (workspace / COMPARED).glob("*.json") if f.stem.isdigit()}
        mine = workspace.resolve() == own.resolve()
        for made in sorted(n for n in compared if not mine or n < number):
            seen += _checked(compared[made], partial(_compared, compared[made], f"{workspace}#{made}"))
        rounds = _checked(workspace, partial(_rounds, workspace, {*compared}, {*domains}))
        seen += rounds
        if not compared and not rounds and not mine:
            raise UsageError(
                "no-comparison", f"no finished comparison, and no round over other domains, in {workspace}",
                allowed="workspaces of `fanbu compare`, or of `fanbu run` over other domains", got=workspace,
                remedy="leave it out of compare.learn, or compare there first",
            )  # fmt: skip
    return seen


def known(task: str, apart_from: Collection[str] = ()) -> list[Seen]:
    """The trials that fanbu comes with: those of comparisons of a task over none of some domains, as
    `benchmarks/compare.py` measured them; none for a task that was not measured."""
    shipped = json.loads(files("fanbu.search").joinpath("known.json").read_text(encoding="utf-8"))
    return [
        replace(seen, machine="elsewhere")
        for told in shipped if told["task"] == task and not {*told["domains"]} & {*apart_from}
        for seen in _trials(told, told["name"])
    ]  # fmt: skip


Told = Mapping[str, Any]


def _checked(source: Path, read: Callable[[], list[Seen]]) -> list[Seen]:
    """What a comparison or rounds have to tell."""
    try:
        seen = read()
        if not all(
            len(s.state) == len(NEAR) and all(map(math.isfinite, (*s.state, s.reward, s.seconds))) for s in seen
        ):
            raise ValueError(f"not {len(NEAR)} numbers in its state, or one that is not finite")
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise IntegrityError(
            "comparison-broken", f"{source} holds nothing that can be learned from", allowed="state, scale and trials",
            got=repr(error)[:100], remedy="leave its workspace out of compare.learn, or compare there again",
        ) from None  # fmt: skip
    return seen


def _compared(file: Path, name: str) -> list[Seen]:
    return _trials(read_json(file, "comparison-broken"), name)


def _rounds(workspace: Path, compared: Collection[int], domains: Collection[str]) -> list[Seen]:
    """What rounds that no comparison made came to, over none of some domains."""
    records = [r for r in finished(workspace)[0] if r["round"] not in compared and not {*r["domains"]} & {*domains}]
    return [seen for r in records for seen in _verdict(r, f"{workspace}#{r['round']}")]


def _trials(found: Told, name: str) -> list[Seen]:
    """The trials of a finished comparison, but those of ways that are not installed here."""
    state, scale = tuple(float(v) for v in found["state"]), float(found["scale"])
    return [
        Seen(name, state, action_of(Step(**row["step"])), float(row["share"]), reward(float(row["score"]), scale),
             float(row["seconds"]))
        for row in found["trials"] if _installed(row["step"])
    ]  # fmt: skip


def _verdict(record: Told, name: str) -> list[Seen]:
    """What a round's verdict says of its way back; nothing where it took several, or one that is not installed here."""
    steps, verdict = record["recipe"]["feedback"], record["verdict"]
    [step] = steps if isinstance(steps, list) and len(steps) == 1 else [steps]
    fed = {n: d for n, d in record["domains"].items() if d["specialist"] and n in verdict["domains"]}
    if isinstance(step, list) or not _installed(step) or not fed:
        return []
    way, rows = Step(**step), {n: verdict["domains"][n] for n in fed}
    signs = {n: 1.0 if row["higher_is_better"] else -1.0 for n, row in rows.items()}
    before = {n: signs[n] * d["parent"]["score"] for n, d in fed.items()}
    pairs = [(before[n], signs[n] * d["specialist"]["score"], signs[n] < 0) for n, d in fed.items()]
    rows_of, labels = [d["rows"]["train"] for d in fed.values()], [d["labels"] for d in fed.values()]
    state, scale = _state(pairs, rows_of, labels, record["round"])
    changes = {n: row["delta"] / (abs(before[n]) if signs[n] < 0 else 1.0) for n, row in rows.items()}
    score = scored(changes, GateSpec(**record["recipe"]["gate"]))
    own = (f"{way.method} contribution ", "evaluate candidate ")
    took = {c["stage"]: float(c["seconds"]) for c in record["costs"]}  # each stage once
    spent = [s for stage, s in took.items() if stage == way.called or stage.startswith(own)]
    return [Seen(name, state, action_of(way), 1.0, reward(score, scale), sum(spent))]


def _installed(step: Told) -> bool:
    return step["method"] in {m.name for m in methods() if m.family != "shrink"}
