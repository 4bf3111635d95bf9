"""A contextual bandit over ways back that knows earlier comparisons: what it expects of a candidate, and tries next.

Rewards of trials, of all comparisons together, are one Gaussian process. Its covariance is a sum of parts, each of
which says that two trials resemble each other for a reason: they belong to one comparison, family, way, or step; to one
way in comparisons whose states are close; to one step in one comparison; and, the fewer rows they have, to one
comparison or way with few rows. How much each part counts is learned from the earlier comparisons by the marginal
likelihood (type II maximum likelihood; Rasmussen and Williams 2006, chapter 5): that is what is learned about learning.
How much ways differ in close states is learned for each family by itself: merges are more alike than what trains.

The next trial is, of those that fit the budget, the one whose knowledge gradient is largest: by how much it can be
expected to raise the mean of the candidate that will be chosen, E[max_a mean_a(with the trial)] - max_a mean_a
(Frazier, Powell and Dayanik 2009). It is not divided by what it takes: where the budget does for a few full runs, that
spends it on what is cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.optimize import minimize
from scipy.special import ndtri

from fanbu.search.halving import BEYOND, SPENT, History, Run, attempt, seconds

Floats = NDArray[np.float64]
Point = tuple[str, float]  # a candidate and a share of the rows
# What the fewest rows change, the least deviation, and the variances between machines: of all, and of each family.
_QUANTITIES = {"reward": (0.0, 0.1, (0.0, 0.0)), "seconds": (-1.5, 0.5, (9.0, 1.0))}
_LEAST_SHARE = 27.0  # of which the logarithm is one unit of "few rows"
_Z = ndtri((np.arange(64) + 0.5) / 64)  # standard normal numbers, evenly likely
_NU = 3.0  # degrees of freedom: how soon surprises count
_APART = 0.05  # of the rows, which one candidate knows and another does not
_LEAST = 1e-3  # seconds or steps of which a logarithm is taken
_SLACK = 2e-3  # of a budget, for what logarithms round
_SAFE = 0.5  # standard deviations more than expected that a trial must fit the budget with
_IDLE = 2e-3  # of the reward: no trial that can be expected to add less is begun


def reward(score: float, scale: float) -> float:
    """A score in terms of the mean gain of specialists (``scale``), bent so that what went wrong altogether counts as
    two gains lost: 2 tanh(score / 2 scale)."""
    return 2 * math.tanh(score / (2 * scale))


def rows_err(rows: Sequence[int], scale: float) -> float:
    """The standard deviation of a reward by so many validation rows of each domain, where one in twenty rows sets
    candidates apart."""
    return math.sqrt(_APART * sum(1 / n for n in rows)) / len(rows) / scale


@dataclass(frozen=True)
class Action:
    """A candidate: its family (the kind that crosses), its way, and its step, arguments and all."""

    family: str
    way: str
    step: str


@dataclass(frozen=True)
class Seen:
    """One trial of a comparison: the comparison's name and state (numbers that describe it), what was tried with which
    share of the rows, the reward, and its seconds, on a ``machine`` (this one, where it has no name)."""

    comparison: str
    state: tuple[float, ...]
    action: Action
    share: float
    reward: float
    seconds: float
    machine: str = ""


class Prior:
    """What earlier comparisons say of a quantity (``of``: ``reward``, or the logarithm of ``seconds``).

    ``near`` are differences of each number of a state that are small: states that did not vary more so far are as
    close to each other as if they had. How fast another machine is, and how much faster for one family than for
    another, is not learned: standard deviations of factors of e^3 and e, until trials tell.
    """

    def __init__(self, past: Sequence[Seen], near: Sequence[float], of: str = "reward") -> None:
        self.past, self.ways = list(past), {s.action.way for s in past}
        self.families = sorted({s.action.family for s in past})
        values = np.array([s.reward if of == "reward" else math.log(max(s.seconds, _LEAST)) for s in past])
        self.slope, least, self.machines = _QUANTITIES[of]
        values = values - self.slope * np.array([_few(s.share) for s in past])
        self.mean = float(values.mean())
        self.values = values - self.mean
        states = np.array([s.state for s in past], dtype=np.float64)
        self.centre, self.spread = states.mean(0), np.maximum(states.std(0), near)
        parts, noise = self._parts(self.past, self.past), _noises(self.past)
        size = max(float(self.values.var()), least**2)
        self.variances = _fitted([*parts, *noise], self.values, size)
        whole = self._covariance(self.past, self.past) + _weighted(noise, self.variances[-2:])
        self._factor = cho_factor(whole + 1e-9 * size * np.eye(len(past)), lower=True)
        self._solved = cho_solve(self._factor, self.values)

    def belief(
        self, comparison: str, state: Sequence[float], actions: Mapping[str, Action],
        shares: Mapping[str, Sequence[float]], errs: float = math.inf,
    ) -> Belief:  # fmt: skip
        """What is expected of each candidate of a new comparison with each of its shares of the rows. A trial ``errs``
        by no more than its rows do (``rows_err``): what else sets past trials apart that are alike is real, since the
        very model that was tried is the one that may be chosen."""
        points = [(name, share) for name in actions for share in shares[name]]
        new = [Seen(comparison, tuple(state), actions[name], share, 0.0, 1.0) for name, share in points]
        across, own = self._covariance(new, self.past), self._covariance(new, new)
        mean = self.mean + across @ self._solved + self.slope * np.array([_few(share) for _, share in points])
        covariance = own - across @ cho_solve(self._factor, across.T)
        learned = _weighted(_noises(new), self.variances[-2:]).diagonal()
        noise = np.minimum(learned, [errs**2 / share for _, share in points])
        return Belief(points, mean, covariance + np.diag(learned - noise), noise)

    def unknown(self, actions: Mapping[str, Action]) -> set[str]:
        """Candidates by a way that no earlier comparison tried."""
        return {name for name, action in actions.items() if action.way not in self.ways}

    def _covariance(self, a: Sequence[Seen], b: Sequence[Seen]) -> Floats:
        machine, family = _same(a, b, lambda s: s.machine), _same(a, b, lambda s: s.action.family)
        return _weighted([machine, machine * family, *self._parts(a, b)], [*self.machines, *self.variances])

    def _parts(self, a: Sequence[Seen], b: Sequence[Seen]) -> list[Floats]:
        """The covariance's parts between two lists of trials, each with variance 1."""
        one, family = _same(a, b, lambda s: s.comparison), _same(a, b, lambda s: s.action.family)
        way, step = _same(a, b, lambda s: s.action.way), _same(a, b, lambda s: s.action.step)
        x, y = ((np.array([s.state for s in some]) - self.centre) / self.spread for some in (a, b))
        near = np.exp(-((x[:, None] - y[None]) ** 2).sum(-1) / (2 * x.shape[1]))
        few = np.outer([_few(s.share) for s in a], [_few(s.share) for s in b])
        close = [way * near * part for part in self._of_families(a)]
        return [one, family, way, step, one * step, few, few * way, few * one, few * near * way, *close]

    def _of_families(self, seen: Sequence[Seen]) -> list[Floats]:
        """For each known family, and for all others together, a column: which trials are of it."""
        families = [s.action.family for s in seen]
        columns = [[f == known for f in families] for known in self.families]
        columns.append([f not in self.families for f in families])
        return [np.array(column, dtype=np.float64)[:, None] for column in columns]


def _same(a: Sequence[Seen], b: Sequence[Seen], of: Callable[[Seen], str]) -> Floats:
    """1 where two trials have the same, 0 elsewhere."""
    return np.array([[of(x) == of(y) for y in b] for x in a], dtype=np.float64)


def _few(share: float) -> float:
    return -math.log(share) / math.log(_LEAST_SHARE)


def _noises(seen: Sequence[Seen]) -> list[Floats]:
    return [np.eye(len(seen)), np.diag([_few(s.share) for s in seen])]


def _weighted(parts: Sequence[Floats], variances: Sequence[float] | Floats) -> Floats:
    return np.asarray(sum(v * p for v, p in zip(variances, parts, strict=False)))


def _fitted(parts: Sequence[Floats], values: Floats, size: float) -> Floats:
    """The variances under which the values are likeliest, drawn a little towards a tenth of theirs."""
    start = math.log(0.1 * size)

    def cost(logs: Floats) -> tuple[float, Floats]:
        variances = np.exp(logs)
        factor = cho_factor(_weighted(parts, variances) + 1e-6 * size * np.eye(len(values)), lower=True)
        inverse = cho_solve(factor, np.eye(len(values)))
        solved = inverse @ values
        off = (logs - start) / 4.0
        value = 0.5 * float(values @ solved) + float(np.log(np.diag(factor[0])).sum()) + float(off @ off)
        slope = [0.5 * v * (float((inverse * p).sum()) - float(solved @ p @ solved)) for v, p in
                 zip(variances, parts, strict=True)]  # fmt: skip
        return value, np.array(slope) + off / 2.0

    bounds = [(start - 12, start + 6)] * len(parts)
    return np.exp(minimize(cost, np.full(len(parts), start), jac=True, method="L-BFGS-B", bounds=bounds).x)


class Belief:
    """A normal distribution over (candidate, share), and what trials of this comparison make of it.

    Its covariance is as wide as trials are surprising: times (nu + sum of z^2) / (nu + n) after n of them, whose
    distances from what was expected are z standard deviations, as that of a Student-t process (Shah et al. 2014).
    """

    def __init__(
        self, points: Sequence[Point], mean: Floats, covariance: Floats, noise: Floats,
        surprise: tuple[int, float] = (0, 0.0),
    ) -> None:  # fmt: skip
        self.points = list(points)
        self.mean, self.covariance, self.noise, self.surprise = mean, covariance, noise, surprise
        self.whole = [i for i, (_, share) in enumerate(self.points) if share == 1]

    def after(self, point: Point, value: float) -> Belief:
        """With one trial more."""
        i = self.points.index(point)
        column = self.covariance[:, i]
        scale = column[i] + self.noise[i]
        mean = self.mean + column * (value - self.mean[i]) / scale
        count, squares = self.surprise
        surprise = count + 1, squares + float((value - self.mean[i]) ** 2 / scale)
        return Belief(self.points, mean, self.covariance - np.outer(column, column) / scale, self.noise, surprise)

    def only(self, names: Collection[str]) -> Belief:
        """That of some candidates."""
        kept = [i for i, (name, _) in enumerate(self.points) if name in names]
        points, covariance = [self.points[i] for i in kept], self.covariance[np.ix_(kept, kept)]
        return Belief(points, self.mean[kept], covariance, self.noise[kept], self.surprise)

    def of(self, point: Point, deviations: float = 0.0) -> float:
        """The mean at a point, and so many standard deviations."""
        i = self.points.index(point)
        return float(self.mean[i] + deviations * self._wider() * math.sqrt(max(self.covariance[i, i], 0.0)))

    def _wider(self) -> float:
        count, squares = self.surprise
        return math.sqrt((_NU + squares) / (_NU + count))

    def best(self, among: Collection[str]) -> str:
        """Of some candidates the one of which the most is expected with all rows."""
        those = [i for i in self.whole if self.points[i][0] in among]
        return self.points[max(those, key=lambda i: (self.mean[i], self.points[i][0]))][0]

    def gradients(self) -> dict[Point, float]:
        """The knowledge gradient of a trial at each point."""
        means, found, wider = self.mean[self.whole], {}, self._wider()
        for i, point in enumerate(self.points):
            moves = (
                wider * self.covariance[self.whole, i] / math.sqrt(max(self.covariance[i, i] + self.noise[i], 1e-12))
            )
            found[point] = float((means[:, None] + moves[:, None] * _Z).max(0).mean() - means.max())
        return found


def certain(values: Mapping[Point, float]) -> Belief:
    """What needs no learning: the logarithm of a value at each point."""
    mean = np.log([max(value, _LEAST) for value in values.values()])
    return Belief([*values], mean, np.zeros((len(values), len(values))), np.ones(len(values)))


def explore(
    belief: Belief, costs: Belief, run: Run, budget: float, scale: float, unknown: Collection[str] = ()
) -> History:  # fmt: skip
    """Tries candidates until the budget is spent, or no trial can be expected to add anything; then the one
    of which most is expected, with all rows, for which so much of the budget is kept. ``costs`` is a belief in the
    logarithms of seconds, ``scale`` is what a reward of 1 is in the score that trials have.

    Chosen is the one of those tried with all rows of which most is expected in the end: what is known of the ways
    steadies scores of few validation rows. A candidate that would not fit the budget with all rows is not tried, and a
    trial that may well not fit (half a standard deviation more than is expected) is not begun. Where none is expected
    to fit and the first may (a standard deviation less), the cheapest is begun, and tells how fast the machine is; the
    most promising one is begun with the fewest rows where it may fit or not. Those that are ``unknown`` are tried with
    the fewest rows, then with the next more, for which they may take as many times as long; then it is read off the
    line through these.
    """
    history, known = History(), set[str]()
    ladder = {name: sorted(s for other, s in belief.points if other == name) for name, _ in belief.points}

    def price(point: Point, deviations: float = 0.0) -> float:
        tried = history.of(point[0]) if point[0] in unknown else []
        if len(tried) > 1:
            return seconds(history, *point)
        likely = math.exp(costs.of(point, deviations))
        return max([likely, *(t.seconds * point[1] / t.share for t in tried if deviations > 0)])

    def fitting(left: float, deviations: float = 0.0) -> set[str]:
        return {name for name in ladder if name in known or price((name, 1.0), deviations) <= left}

    def following(left: float) -> Point | None:
        fits, may, safe = fitting(left), fitting(left, -1.0), fitting(left, _SAFE)
        if not fits:
            cheap = min(may, key=lambda name: (price((name, 1.0)), name)) if may and not history.trials else None
            return (cheap, ladder[cheap][0]) if cheap else None
        best, hoped = belief.best(safe or fits), belief.best(may)
        spare = left - (0.0 if best in known else price((best, 1.0)))
        first = hoped, ladder[hoped][0]
        if hoped not in safe and first[1] < 1 and not history.of(hoped) and price(first, _SAFE) <= spare:
            return first
        turns = {name: len(history.of(name)) if name in unknown else len(ladder[name]) for name in may}
        gains = {
            p: gain for p, gain in belief.only(may).gradients().items()
            if gain > _IDLE and p[0] not in known and all(p != (t.arm, t.share) for t in history.trials)
            and (turns[p[0]] > 1 or p[1] == ladder[p[0]][min(turns[p[0]], len(ladder[p[0]]) - 1)])
            and price(p, _SAFE) <= (left if p == (best, 1.0) else spare)
        }  # fmt: skip
        if gains:
            return max(gains, key=lambda p: (gains[p], p))
        if best in known:
            return None
        return best, ladder[best][min(turns[best], len(ladder[best]) - 1)] if turns[best] < 2 else 1.0

    while point := following(budget + _SLACK - history.seconds):
        if not attempt(history, run, *point, price(point)):
            del ladder[point[0]]
            belief, costs = belief.only(ladder), costs.only(ladder)
            continue
        trial = history.trials[-1]
        belief = belief.after(point, reward(trial.score, scale))
        costs = costs.after(point, math.log(max(trial.seconds, _LEAST)))
        if point[1] == 1:
            known.add(point[0])
        history.chosen = belief.best(known) if known else None
    fits = fitting(budget + _SLACK - history.seconds)
    for name in sorted({*ladder} - known):
        if name not in fits:
            more = price((name, 1.0)) > budget + _SLACK
            history.left_out[name] = BEYOND if more else SPENT
        elif not history.of(name):
            history.left_out[name] = "earlier comparisons promise too little of it"
    return history
