"""``fanbu compare``: candidates for the way back side by side, with growing shares of the rows, on validation rows.

The specialists are grown once. Each trial is a way back as in a round, by the same stages, with a share of each owner's
rows; the best one with all rows is what a round would make. Test rows play no part: the winner is judged on them once,
in a round of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fanbu.catalogue import method, methods
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.effort import fewer_public
from fanbu.errors import UsageError
from fanbu.feeding import feed
from fanbu.files import write_text
from fanbu.generations import leave_by_recipe, run
from fanbu.judge.compare import compare as paired
from fanbu.ledger import COST, Workspace
from fanbu.model import Model, open_model
from fanbu.plan import need_rows_here, refusal, usual
from fanbu.probe_set import probe_of
from fanbu.recipe import Recipe
from fanbu.recipe_parts import CompareSpec, Step
from fanbu.record import COMPARED, chose, read_records
from fanbu.round import bear, evaluated, forerunner, raise_incumbent
from fanbu.search.bandit import Prior, certain, explore, rows_err
from fanbu.search.costs import reads_rows, steps_of
from fanbu.search.experience import NEAR, action_of, experience, known, scored, state_of
from fanbu.search.halving import Arm, History, Trial, halving, rungs_of, shares_of
from fanbu.search.mixing import coefficients, mixing_space
from fanbu.search.spaces import Range, Space, check_space, space_of, with_values
from fanbu.search.tuning import Draws, tuned
from fanbu.turn import Log, Turn, domains_now, made_of, start
from fanbu.types import CLASSIFYING, Progress, digest, silent

_LEAST_ROWS = 12  # of a domain that a trial works with
_JUDGED = 100  # validation rows of a domain by which a trial with a share of the rows is judged, at least
BEFORE = "incumbent"


def candidates(recipe: Recipe, domains: Mapping[str, Domain]) -> dict[str, Step]:
    """What is compared, by name: the steps that the recipe lists, or every way that fits and is not experimental. One
    that is only named is taken as it usually is (``plan.usual``)."""
    steps = [usual(s.method, recipe) if s.model_fields_set == {"method"} else s for s in recipe.compare.ways]
    if not steps:
        every = [usual(m.name, recipe) for m in methods() if m.family != "shrink" and not m.experimental]
        steps = [s for s in every if refusal(s, recipe, list(domains.values())) is None]
    found: dict[str, Step] = {}
    for step in steps:
        same = sum(name.partition(" #")[0] == step.called for name in found)
        found[f"{step.called} #{same + 1}" if same else step.called] = step
    if len(found) < 2:
        raise UsageError(
            "nothing-to-compare", "a comparison needs two candidates at least", allowed="two ways that fit",
            got=list(found), remedy="see which ways fit with `fanbu plan`, and name them under compare.ways",
        )  # fmt: skip
    return found


@dataclass
class Bench:
    """Where trials are made: what stands before them, and what they left."""

    turn: Turn
    incumbent: Model
    specialists: Sequence[Specialist]
    steps: dict[str, Step]
    by_steps: bool
    state: tuple[float, ...]  # what a bandit knows of the round
    scale: float  # the mean gain of specialists, in which it tells rewards
    shares: dict[float, Turn] = field(default_factory=dict)
    seen: set[Path] = field(default_factory=set)  # stages that were paid for
    common: set[Path] = field(default_factory=set)  # those of the incumbent's outcomes, which are no candidate's own
    rows: list[dict[str, Any]] = field(default_factory=list)
    outcomes: dict[tuple[str, float], dict[str, Contribution]] = field(default_factory=dict)  # on validation rows
    models: dict[tuple[str, float], Model] = field(default_factory=dict)

    def __call__(self, name: str, share: float) -> Trial:
        """One candidate with a share of the rows."""
        turn, step = self._at(share), self.steps[name]
        fresh = replace(turn, costs=[], crossed={}, used=[])
        specialists = [Specialist(s.model, turn.domains[s.domain.name], s.origin) for s in self.specialists]
        model = self.models[name, share] = feed(fresh, step, specialists, self.incumbent)
        told = {d.name: self._valued(fresh, name, model, d, share) for d in self.turn.feeding}
        changes = {d: new - old for d, (new, old) in told.items()}
        relative = self._relative(changes, {d: old for d, (_, old) in told.items()})
        score, own = scored(relative, turn.recipe.gate), {*fresh.used} - self.common
        (seconds, joules), steps = self._cost(own), steps_of(turn.recipe, step, turn.feeding)
        paid, _ = self._cost({*fresh.used} - self.seen)
        self.seen |= {*fresh.used}
        self.rows.append({
            "candidate": name, "step": step.model_dump(mode="json"), "share": share, "score": score,
            "changes": changes, "worst": min(relative.values()), "seconds": seconds, "steps": steps, "joules": joules,
            "crossed_bytes": sum(c["bytes"] for by in fresh.crossed.values() for c in by.values()
                                 if c["what"].startswith((step.method, "tree contribution"))),
            "peak_bytes": max((c.get("peak_bytes", 0) for c in fresh.costs), default=0), "model": model.digest,
        })  # fmt: skip
        self.turn.log(f"{name}, {share:.0%} of the rows: {100 * score:+.2f}")
        return Trial(name, share, score, float(steps) if self.by_steps else paid)

    def _at(self, share: float) -> Turn:
        """The round with a share of each owner's rows, and the probe set that these make."""
        if share == 1:
            return self.turn
        if share not in self.shares:
            cut = {n: _portion(d, share) if d.role == "feeds" else d for n, d in self.turn.domains.items()}
            sub = replace(self.turn, domains=cut, recipe=_asking(self.turn, share))
            sub.context = replace(sub.context, probe=probe_of(sub, self.steps.values()))
            self.shares[share] = sub
        return self.shares[share]

    def _valued(self, turn: Turn, name: str, model: Model, d: Domain, share: float) -> tuple[float, float]:
        """The values of a candidate and of the incumbent on a domain's validation rows."""
        rows = d.valid.first(judged(share, len(d.valid)))
        found = []
        for who, tried in ((name, model), (BEFORE, self.incumbent)):
            before = len(turn.used)
            outcomes, _ = evaluated(turn, who, tried, replace(d, test=rows))
            self.common |= {*turn.used[before:]} if who == BEFORE else set()
            self.outcomes.setdefault((who, share), {})[d.name] = outcomes
            column = outcomes.tensors.get(self.turn.recipe.gate.mode, outcomes.tensors["told"])
            found.append(float(column.sum() / outcomes.tensors["weight"].sum()))
        return found[0], found[1]

    def _relative(self, changes: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
        losses = {d.name for d in self.turn.feeding if d.metric == "loss"}
        return {d: change / abs(before[d]) if d in losses else change for d, change in changes.items()}

    def _cost(self, stages: Collection[Path]) -> tuple[float, float]:
        """Seconds and joules that stages took, those of inner rounds within theirs."""
        costs = [path / COST for path in sorted(stages) if path.parent == self.turn.workspace.root / "stages"]
        told = [json.loads(cost.read_text()) for cost in costs if cost.exists()]
        seconds, joules = (sum(float(cost.get(what, 0.0)) for cost in told) for what in ("seconds", "joules"))
        return seconds, joules


def judged(share: float, rows: int) -> int:
    """How many of a domain's validation rows a trial with a share of the rows is judged by."""
    return min(rows, max(_JUDGED, math.ceil(share * rows)))


def _portion(d: Domain, share: float) -> Domain:
    """A share of a domain's rows, with all its labels."""
    least = max(_LEAST_ROWS, len(d.labels))
    train, valid, unlabelled = (
        rows.first(max(least, math.ceil(share * len(rows)))) for rows in (d.train, d.valid, d.unlabelled)
    )
    return replace(d, train=train, valid=valid, unlabelled=unlabelled)


def _asking(turn: Turn, share: float) -> Recipe:
    """The recipe with a share of the probe rows that belong to nobody."""
    task = turn.feeding[0].task
    return fewer_public(turn.recipe, task, lambda rows: min(rows, max(_LEAST_ROWS, math.ceil(share * rows))))


def compare(recipe: Recipe, progress: Progress = silent, log: Log = lambda text: None) -> dict[str, Any]:
    """Tries the candidates within the budget, and judges the winner on test rows, in a round of its own.

    All that is made is a stage of the workspace, so a comparison that was stopped goes on where it was; one that is
    finished is only read, until another round is made or recipe or rows change. Returns what ``compare/NUMBER.json`` of
    the workspace holds (of the round's number), and the ``record`` of the round.
    """
    need_rows_here(recipe, "a comparison")
    if found := _finished(recipe):
        return found
    spec, ledger = recipe.compare, Workspace(Path(recipe.workspace))
    if spec.tune:
        Draws({}, spec.sampler, 0)  # what it needs is there, before anything is trained
    leave_by_recipe(recipe, ledger, len(ledger.rounds()) + 1)
    bench = opened(recipe, progress, log)
    costliest = max(steps_of(recipe, step, bench.turn.feeding) for step in bench.steps.values())
    budget = spec.runs * max(costliest, 1) if spec.seconds is None else spec.seconds
    history = _searched(bench, spec, (1 - spec.tune) * budget)
    if spec.tune and history.best:
        _tuned(bench, history, spec, budget)
    if history.best is None:
        raise UsageError(
            "no-candidate-tried", "no candidate could be tried with all rows", allowed="one that comes to an end",
            got=history.left_out, remedy="raise compare.seconds or compare.runs where the budget did not do; where "
            "candidates failed, mend what they say, or name others under compare.ways",
        )  # fmt: skip
    found = _summary(bench, history, budget)
    found["asked"] = _asked(recipe, bench.turn.domains, bench.turn.base)
    (ledger.root / COMPARED).mkdir(exist_ok=True)
    write_text(_file(ledger, bench.turn.number), json.dumps(found, indent=1, sort_keys=True))
    chosen = {"feedback": [bench.steps[history.best.arm]], "rounds": bench.turn.number}
    return {**found, "record": run(recipe.model_copy(update=chosen), progress, log)}


def _searched(bench: Bench, spec: CompareSpec, budget: float) -> History:
    """The candidates, as earlier comparisons say, or by successive halving."""
    turn, steps = bench.turn, _steps(bench, spec.eta)
    learned = experience([Path(w) for w in spec.learn], turn.workspace.root, turn.number, turn.domains)
    shipped = known(turn.feeding[0].task) if spec.known else []
    past = [*shipped, *learned]
    if len(past) == len({s.comparison for s in past}):  # nothing was compared
        arms = [Arm(name, grows=reads_rows(step)) for name, step in bench.steps.items()]
        rungs = len({share for _, share in steps}) - 1
        return halving(arms, bench, budget, spec.eta, rungs, (lambda *p: steps[p]) if bench.by_steps else None)
    turn.log(f"learns from {len(past)} trials of {len({s.comparison for s in past})} earlier comparisons")
    actions = {name: action_of(step) for name, step in bench.steps.items()}
    shares = {name: tuple(share for other, share in steps if other == name) for name in actions}
    here, unknown = (str(turn.workspace.root), bench.state, actions, shares), set[str]()
    if bench.by_steps:
        costs = certain(steps)
    else:
        took = Prior(past, NEAR, "seconds")
        costs, unknown = took.belief(*here), took.unknown(actions)
    told = [len(d.valid) for d in turn.feeding if d.metric != "loss"]
    errs = rows_err(told, bench.scale) if told else math.inf
    return explore(Prior(past, NEAR).belief(*here, errs), costs, bench, budget, bench.scale, unknown)


def _steps(bench: Bench, eta: int) -> dict[tuple[str, float], float]:
    """The training steps of each candidate with each share of the rows that it is tried with."""
    turn = bench.turn
    rungs = rungs_of(float(np.mean([len(d.train) for d in turn.feeding])), eta)
    cut = {share: (_asking(turn, share), [_portion(d, share) for d in turn.feeding]) for share in shares_of(eta, rungs)}
    return {
        (name, share): float(steps_of(cut[share][0], step, cut[share][1]))
        for name, step in bench.steps.items() for share in (cut if reads_rows(step) else [1.0])
    }  # fmt: skip


def _tuned(bench: Bench, history: History, spec: CompareSpec, budget: float) -> None:
    """Other arguments of the best candidate, with the rest of the budget."""
    assert history.best
    winner = history.best.arm
    step = bench.steps[winner]
    way = method(step.method, "feedback")
    if spec.mix:
        feeding = bench.turn.feeding
        names, classifies = [d.name for d in feeding], feeding[0].task in CLASSIFYING
        space = mixing_space(way, names, spec.mix == "layer", classifies, step.arguments)
    else:
        space = _fitting(bench.turn, step, space_of(way, step.arguments, spec.space))
    if not space:
        bench.turn.log(f"{winner} has nothing to {'mix' if spec.mix else 'tune'}")
        return
    draws = Draws(space, spec.sampler, bench.turn.context.seeded("tune", winner))

    def new(values: Mapping[str, Any]) -> str:
        name = f"{winner} ~{len(bench.steps)}"
        bench.steps[name] = _with(step, coefficients(values))
        return name

    tuned(history, winner, new, bench, draws, budget, spec.settings)


def _fitting(turn: Turn, step: Step, space: Space) -> Space:
    """A space without the choices that these domains refuse, which are named."""

    def fits(key: str, value: Any) -> bool:
        reason = refusal(_with(step, {key: value}), turn.recipe, list(turn.domains.values()))
        if reason:
            turn.log(f"{step.called}: {key} {value} is not tried: {reason.what}")
        return reason is None

    found = {k: one if isinstance(one, Range) else tuple(v for v in one if fits(k, v)) for k, one in space.items()}
    return {key: one for key, one in found.items() if one}


def _with(step: Step, values: Mapping[str, Any]) -> Step:
    """A step with other values of some arguments."""
    return Step(**{**step.model_dump(), **with_values(step.arguments, values)})


def _finished(recipe: Recipe) -> dict[str, Any] | None:
    """The comparison that made the last round, where nothing has changed since."""
    ledger = Workspace(Path(recipe.workspace))
    done = ledger.rounds()
    if not done or not (file := _file(ledger, len(done))).exists():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    domains, _ = domains_now(recipe, len(done), ledger.left(), None)
    record = read_records(ledger.root, done)[-1]
    if found["asked"] != _asked(recipe, domains, open_model(recipe.model)) or not chose(found, record):
        return None
    return {**found, "record": {**record, "workspace": str(ledger.root)}}


def _asked(recipe: Recipe, domains: Mapping[str, Domain], base: Model) -> str:
    return digest([made_of(recipe, domains, base), recipe.compare.model_dump(mode="json")])


def _file(ledger: Workspace, number: int) -> Path:
    return ledger.root / COMPARED / f"{number}.json"


def opened(recipe: Recipe, progress: Progress, log: Log) -> Bench:
    """The incumbent and the specialists of the next round, and the candidates."""
    turn = start(recipe, progress, log)
    steps = candidates(recipe, turn.domains)
    for step in steps.values():
        if reason := refusal(step, recipe, list(turn.domains.values())):
            raise reason
    check_space(recipe.compare.space, [method(step.method, "feedback") for step in steps.values()])
    turn.context = replace(turn.context, probe=probe_of(turn, steps.values()))
    incumbent = raise_incumbent(turn)
    births = turn.at_owners(bear, [(incumbent, d, forerunner(turn, d)) for d in turn.feeding])
    specialists = [b.specialist for _, b in births]
    state, scale = state_of(turn, incumbent, specialists)
    return Bench(turn, incumbent, specialists, steps, recipe.compare.seconds is None, state, scale)


def _summary(bench: Bench, history: History, budget: float) -> dict[str, Any]:
    """The table, its Pareto front, and how sure the winner is."""
    assert history.best
    whole = [row for row in bench.rows if row["share"] == 1]
    told = sureness(bench, [row["candidate"] for row in whole], history.best.arm)
    for row in whole:
        row |= told[row["candidate"]]
    return {
        "name": bench.turn.recipe.name, "metric": bench.turn.feeding[0].metric, "budget": budget,
        "in": "steps" if bench.by_steps else "seconds", "spent": history.seconds, "winner": history.best.arm,
        "state": bench.state, "scale": bench.scale, "trials": bench.rows,
        "left_out": history.left_out, "front": [row["candidate"] for row in front(whole)],
    }  # fmt: skip


def sureness(bench: Bench, names: Sequence[str], winner: str) -> dict[str, dict[str, float]]:
    """By candidate: the interval of its mean change, ``wins`` (the share of bootstrap draws over validation rows in
    which it is the best), and ``corrected``: the mean change less what choosing the best of so many adds by chance, the
    mean over draws of (the draw's best in the draw - the same one on all rows) (Tibshirani and Tibshirani 2009)."""
    mode, seed = bench.turn.recipe.gate.mode, bench.turn.recipe.seed
    draws, means = [], []
    for name in names:
        pairs = [
            (
                paired(bench.outcomes[name, 1.0][d.name], bench.outcomes[BEFORE, 1.0][d.name], mode, seed),
                d.metric == "loss",
            )
            for d in bench.turn.feeding
        ]
        scales = [1 / abs(p.incumbent) if of_loss else 1.0 for p, of_loss in pairs]
        draws.append(np.mean([scale * p.draws for (p, _), scale in zip(pairs, scales, strict=True)], 0))
        means.append(float(np.mean([scale * p.delta for (p, _), scale in zip(pairs, scales, strict=True)])))
    drawn, mean = np.stack(draws), np.array(means)
    best, first = drawn.argmax(0), drawn == drawn.max(0)
    wins = (first / first.sum(0)).mean(1)  # equals share a draw
    optimism = float(np.mean(drawn[best, np.arange(drawn.shape[1])] - mean[best]))
    found = {}
    for i, name in enumerate(names):
        low, high = np.quantile(drawn[i], [0.025, 0.975])
        found[name] = {"mean": means[i], "low": float(low), "high": float(high), "wins": float(wins[i]),
                       "corrected": means[i] - (optimism if name == winner else 0.0)}  # fmt: skip
    return found


def front(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Those that no other beats in one of mean change, worst domain, bytes crossed and seconds without losing in
    another, the best first."""

    def values(row: Mapping[str, Any]) -> tuple[float, ...]:
        return (row["score"], row["worst"], -row["crossed_bytes"], -row["seconds"])

    def beaten(row: Mapping[str, Any]) -> bool:
        own = values(row)
        return any(
            all(a >= b for a, b in zip(values(other), own, strict=True)) and values(other) != own for other in rows
        )

    return sorted((row for row in rows if not beaten(row)), key=lambda row: -row["score"])
