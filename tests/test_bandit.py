"""A bandit that learns from earlier comparisons: its mathematics, and that what it learns helps."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fanbu.errors import UsageError
from fanbu.search.bandit import Action, Belief, Prior, Seen, _fitted, certain, explore, rows_err
from fanbu.search.halving import Arm, Trial, halving

WAYS = [f"way{i}" for i in range(8)]
ACTIONS = {w: Action("weights" if i < 4 else "predictions", w, w) for i, w in enumerate(WAYS)}
SHARES = (1 / 27, 1 / 9, 1 / 3, 1.0)
NEAR = (0.1,)
EVERY = dict.fromkeys(WAYS, SHARES)
COSTS = {w: 1.0 if i < 4 else 20.0 for i, w in enumerate(WAYS)}


class World:
    """Comparisons in which ways are about as good as they were in others; few rows tell less."""

    def __init__(self, number: int) -> None:
        rng = random.Random(number)
        self.number, self.noise = number, random.Random(1000 + number)
        self.level, self.state = rng.gauss(0, 0.1), (rng.gauss(0, 1),)
        self.true = {
            w: self.level + 0.08 * i + (0.3 * self.state[0] if i == 7 else 0.0) + rng.gauss(0, 0.03)
            for i, w in enumerate(WAYS)
        }

    def __call__(self, name: str, share: float) -> Trial:
        few = -math.log(share) / math.log(27)
        score = self.true[name] - few * 0.2 + self.noise.gauss(0, 0.02 + 0.1 * few)
        return Trial(name, share, score, 0.5 + COSTS[name] * share)

    def seen(self) -> list[Seen]:
        trials = [self(w, s) for w in WAYS for s in (SHARES if COSTS[w] > 1 else SHARES[-1:])]
        return [Seen(str(self.number), self.state, ACTIONS[t.arm], t.share, t.score, t.seconds) for t in trials]


@pytest.fixture(scope="module")
def past() -> list[Seen]:
    return [seen for number in range(10) for seen in World(number).seen()]


@pytest.fixture(scope="module")
def priors(past: list[Seen]) -> tuple[Prior, Prior]:
    return Prior(past, NEAR), Prior(past, NEAR, "seconds")


def beliefs(priors: tuple[Prior, Prior], world: World) -> list[Belief]:
    return [p.belief(str(world.number), world.state, ACTIONS, EVERY) for p in priors]


def test_one_trial_at_a_time_is_all_at_once(past: list[Seen], priors: tuple[Prior, Prior]) -> None:
    world = World(50)
    belief, points, values = beliefs(priors, world)[0], [("way7", 1 / 9), ("way1", 1.0), ("way7", 1.0)], [0.4, 0.1, 0.9]
    stepwise = belief
    for point, value in zip(points, values, strict=True):
        stepwise = stepwise.after(point, value)
    at = [belief.points.index(p) for p in points]
    gain = belief.covariance[:, at] @ np.linalg.inv(belief.covariance[np.ix_(at, at)] + np.diag(belief.noise[at]))
    np.testing.assert_allclose(stepwise.mean, belief.mean + gain @ (np.array(values) - belief.mean[at]), atol=1e-9)
    np.testing.assert_allclose(stepwise.covariance, belief.covariance - gain @ belief.covariance[at], atol=1e-9)


def test_knows_what_was_good_and_what_it_took(priors: tuple[Prior, Prior]) -> None:
    world = World(60)
    rewards, costs = beliefs(priors, world)
    expected = [rewards.of((w, 1.0)) for w in WAYS[:7]]
    assert np.corrcoef(expected, [world.true[w] for w in WAYS[:7]])[0, 1] > 0.9
    assert math.exp(costs.of(("way5", 1.0))) == pytest.approx(20.5, rel=0.2)
    assert math.exp(costs.of(("way1", 1.0))) == pytest.approx(1.5, rel=0.2)


def test_the_state_tells_where_a_way_is_good(priors: tuple[Prior, Prior]) -> None:
    low, high = (priors[0].belief("new", (x,), ACTIONS, EVERY).of(("way7", 1.0)) for x in (-1.5, 1.5))
    assert high > low + 0.3


def test_a_gradient_is_what_a_trial_adds(past: list[Seen]) -> None:
    belief = Prior(past[:40], NEAR).belief("new", (0.0,), ACTIONS, EVERY)  # of two comparisons, which says little
    gains = belief.gradients()
    point = max((p for p in gains if p[1] == 1), key=lambda p: gains[p])
    assert gains[point] > 0.01
    i, wider = belief.points.index(point), belief._wider()
    spread = wider * math.sqrt(belief.covariance[i, i] + belief.noise[i])
    drawn = np.random.default_rng(0).normal(belief.mean[i], spread, 6000)
    after = [belief.after(point, float(value)) for value in drawn]
    added = np.mean([a.mean[a.whole].max() for a in after]) - belief.mean[belief.whole].max()
    assert gains[point] == pytest.approx(added, rel=0.1)
    assert min(gains.values()) > -1e-9


def test_surprises_widen_what_is_believed(priors: tuple[Prior, Prior]) -> None:
    belief = beliefs(priors, World(80))[0]
    i = belief.points.index(("way5", 1.0))
    z = 4.0
    odd = belief.after(("way5", 1.0), belief.mean[i] + z * math.sqrt(belief.covariance[i, i] + belief.noise[i]))
    as_expected = belief.after(("way5", 1.0), belief.mean[i])
    assert odd._wider() == pytest.approx(math.sqrt((3 + z**2) / 4))
    assert as_expected._wider() == pytest.approx(math.sqrt(3 / 4))
    np.testing.assert_allclose(odd.covariance, as_expected.covariance)


def test_the_variances_are_the_likeliest() -> None:
    """The slope that the search for them follows is that of the likelihood."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(30, 2))
    parts = [np.outer(x[:, i], x[:, i]) for i in range(2)] + [np.eye(30)]
    values = 3 * x[:, 0] + 0.1 * rng.normal(size=30)
    found = _fitted(parts, values, float(values.var()))
    assert found[0] > 20 * found[1]
    assert found[2] < 0.1
    assert _minus_log_likelihood(parts, values, found) < min(
        _minus_log_likelihood(parts, values, found * factor) for factor in ([3, 1, 1], [1, 1, 3], [1, 1, 1 / 3])
    )


def _minus_log_likelihood(parts: list[Any], values: Any, variances: Any) -> float:
    whole = sum(v * p for v, p in zip(variances, parts, strict=True)) + 1e-9 * np.eye(len(values))
    return float(0.5 * values @ np.linalg.solve(whole, values) + 0.5 * np.linalg.slogdet(whole)[1])


def test_states_that_never_varied_stay_close(past: list[Seen]) -> None:
    still = [replace(s, state=(s.state[0], 1.0)) for s in past]
    prior = Prior(still, (0.1, 0.5))
    low, high = (prior.belief("new", (x, 1.2), ACTIONS, EVERY).of(("way7", 1.0)) for x in (-1.5, 1.5))
    assert high > low + 0.2


def test_one_trial_makes_nothing_certain() -> None:
    seen = [Seen("one", (0.0,), ACTIONS["way0"], 1.0, 0.2, 2.0)] * 3
    history = explore(
        Prior(seen, NEAR).belief("new", (0.0,), ACTIONS, EVERY),
        Prior(seen, NEAR, "seconds").belief("new", (0.0,), ACTIONS, EVERY),
        World(500), 200.0, 1.0, Prior(seen, NEAR).unknown(ACTIONS),
    )  # fmt: skip
    assert len({t.arm for t in history.trials}) > 4
    first = {w: next(t.share for t in history.trials if t.arm == w) for w in {t.arm for t in history.trials}}
    assert all(share == min(SHARES) for way, share in first.items() if way != "way0")


@pytest.mark.parametrize("budget", [30.0, 120.0])
def test_an_unknown_way_does_not_break_the_budget(budget: float) -> None:
    """What no comparison knew may take far more than all that they knew."""
    seen = [s for number in range(6) for s in World(number).seen() if COSTS[s.action.way] == 1.0]
    priors = Prior(seen, NEAR), Prior(seen, NEAR, "seconds")
    for number in range(300, 310):
        world = World(number)

        def run(name: str, share: float, world: World = world) -> Trial:
            return replace(world(name, share), seconds=0.5 + (1.0 if COSTS[name] == 1 else 300.0 * share))

        history = explore(*beliefs(priors, world), run, budget, 1.0, priors[0].unknown(ACTIONS))
        assert history.best
        assert history.seconds <= budget + 12  # one trial of the fewest rows was dearer than all before


@pytest.mark.parametrize("slower", [0.01, 0.1, 10.0, 100.0])
def test_what_another_machine_took_misleads_for_one_trial(past: list[Seen], slower: float) -> None:
    """Known seconds are of a machine that is faster or slower; the budget is two runs of the costliest on this one."""
    priors = Prior(past, NEAR), Prior([replace(s, machine="elsewhere") for s in past], NEAR, "seconds")
    lost = []
    for number in range(400, 415):
        world = World(number)

        def run(name: str, share: float, world: World = world) -> Trial:
            trial = world(name, share)
            return replace(trial, seconds=slower * trial.seconds)

        budget = slower * 2 * (0.5 + max(COSTS.values()))
        history = explore(*beliefs(priors, world), run, budget, 1.0)
        assert history.seconds <= 1.2 * budget
        lost.append(regret(history, world))
    assert np.mean(lost) < 0.1


def test_it_begins_where_nothing_is_expected_to_fit_only_if_it_may(past: list[Seen]) -> None:
    world = World(500)

    def tried(machine: str, budget: float) -> int:
        priors = Prior(past, NEAR), Prior([replace(s, machine=machine) for s in past], NEAR, "seconds")
        return len(explore(*beliefs(priors, world), world, budget, 1.0).trials)

    assert tried("elsewhere", 0.3) == 1  # the cheapest takes 1.5: now it is known that the budget does for nothing
    assert tried("", 0.3) == tried("elsewhere", 0.001) == 0


def test_any_beliefs_and_costs_come_to_an_end() -> None:
    """Ways that nobody knew, that take far more or less than was thought, or that fail."""
    ended = 0
    for seed in range(300):
        rng = random.Random(seed)
        seen = [s for n in range(2) for s in World(n).seen() if rng.random() < 0.5] or World(0).seen()
        priors = Prior(seen, NEAR), Prior(seen, NEAR, "seconds")
        world, factor = World(1000 + seed), {w: math.exp(rng.gauss(0, 2)) for w in WAYS}

        def run(name: str, share: float, world: World = world, factor: Any = factor, rng: Any = rng) -> Trial:
            if rng.random() < 0.1:
                raise UsageError("bad", "cannot", remedy="none")
            trial = world(name, share)
            return replace(trial, seconds=factor[name] * trial.seconds)

        history = explore(*beliefs(priors, world), run, rng.uniform(1, 100), 1.0, priors[0].unknown(ACTIONS))
        tried = {t.arm for t in history.trials if t.share == 1}
        assert tried.isdisjoint(history.left_out)
        assert tried | {t.arm for t in history.trials} | history.left_out.keys() == set(WAYS)
        ended += history.best is not None
    assert ended > 200


@pytest.mark.parametrize("steps", [3.0, 9.0, 10.0, 11.0, 1000.0, 123457.0])
def test_a_budget_of_whole_runs_does_for_as_many(steps: float) -> None:
    count = len(WAYS)
    belief = Belief([(w, 1.0) for w in WAYS], np.zeros(count), np.eye(count), np.full(count, 0.01))
    known = certain({(w, 1.0): 0.0 if w == "way0" else steps for w in WAYS})
    rng = random.Random(0)
    for runs in (1, 2):
        history = explore(
            belief, known, lambda n, s: Trial(n, s, rng.random(), 0.0 if n == "way0" else steps), runs * steps, 1.0
        )
        assert sum(t.seconds > 0 for t in history.trials) == runs


def regret(history: object, world: World) -> float:
    best = history.best  # type: ignore[attr-defined]
    return max(world.true.values()) - (world.true[best.arm] if best else min(world.true.values()))


@pytest.mark.parametrize("budget", [25.0, 60.0])
def test_beats_halving_that_knows_nothing(priors: tuple[Prior, Prior], budget: float) -> None:
    warm, cold = [], []
    for number in range(100, 130):
        world = World(number)
        history = explore(*beliefs(priors, world), world, budget, 1.0)
        assert history.seconds <= 1.2 * budget
        warm.append(regret(history, world))
        arms = [Arm(w, COSTS[w] > 1) for w in random.Random(number).sample(WAYS, len(WAYS))]
        cold.append(regret(halving(arms, World(number), budget), world))
    assert np.mean(warm) < 0.7 * np.mean(cold)


def test_what_misleads_it_is_overruled_by_what_it_sees(priors: tuple[Prior, Prior]) -> None:
    world = World(200)
    world.true = {w: -world.true[w] for w in WAYS}
    history = explore(*beliefs(priors, world), world, 200.0, 1.0)
    assert regret(history, world) < 0.1


def test_the_same_answers_the_same_trials(priors: tuple[Prior, Prior]) -> None:
    first, second = (explore(*beliefs(priors, w), w, 60.0, 1.0).trials for w in (World(300), World(300)))
    assert first == second


def test_what_fails_or_costs_too_much_is_left_out(priors: tuple[Prior, Prior]) -> None:
    world = World(400)

    def run(name: str, share: float) -> Trial:
        if name == "way7":
            raise UsageError("bad", "cannot", remedy="none")
        return world(name, share)

    history = explore(*beliefs(priors, world), run, 8.0, 1.0)
    assert history.best
    assert history.best.arm in WAYS[:4]
    assert "more than the budget" in history.left_out["way7"]
    history = explore(*beliefs(priors, world), run, 200.0, 1.0)
    assert "cannot" in history.left_out["way7"]


def test_a_new_trial_errs_by_its_rows_alone(past: list[Seen]) -> None:
    prior = Prior(past, NEAR)
    learned, bounded = (prior.belief("new", (0.3, 1.2), ACTIONS, EVERY, errs) for errs in (math.inf, 1e-3))
    assert bounded.noise.max() <= 1e-6 / min(share for _, share in bounded.points) * (1 + 1e-9)
    whole = [(b.covariance + np.diag(b.noise)) for b in (learned, bounded)]
    np.testing.assert_allclose(*whole)  # what is not the rows' is the trial's own
    point = ("way0", 1.0)
    told = learned.of(point) + 1.0
    assert abs(bounded.after(point, told).of(point) - told) < abs(learned.after(point, told).of(point) - told)
    assert rows_err([1000, 1000], 0.05) == pytest.approx(0.1)
