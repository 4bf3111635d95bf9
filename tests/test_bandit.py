"""A bandit that learns from earlier comparisons: its mathematics, and that what it learns helps."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from fanbu.errors import UsageError
from fanbu.search.bandit import Action, Belief, Prior, Seen, explore
from fanbu.search.halving import Arm, Trial, halving

WAYS = [f"way{i}" for i in range(8)]
ACTIONS = {w: Action("weights" if i < 4 else "predictions", w, w) for i, w in enumerate(WAYS)}
SHARES = (1 / 27, 1 / 9, 1 / 3, 1.0)
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
    return Prior(past), Prior(past, "seconds")


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


def test_a_gradient_is_what_a_trial_adds(priors: tuple[Prior, Prior]) -> None:
    belief = beliefs(priors, World(70))[0]
    point = ("way6", 1.0)
    i = belief.points.index(point)
    drawn = np.random.default_rng(0).normal(belief.mean[i], math.sqrt(belief.covariance[i, i] + belief.noise[i]), 4000)
    after = [belief.after(point, float(value)) for value in drawn]
    added = np.mean([a.mean[a.whole].max() for a in after]) - belief.mean[belief.whole].max()
    assert belief.gradients()[point] == pytest.approx(added, abs=0.004)
    assert min(belief.gradients().values()) > -1e-9


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
