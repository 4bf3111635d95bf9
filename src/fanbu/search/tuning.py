"""Other arguments for the best candidate: drawn by Optuna from ranges of its signature, while the budget lasts."""

from __future__ import annotations

import importlib
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from fanbu.errors import needs_extra
from fanbu.search.halving import History, Run, attempt, seconds
from fanbu.search.spaces import Range, Space

Sampler = Literal["tpe", "cmaes", "random", "grid"]
_POINTS = 3  # of a range, in a grid
_MOST = 1000  # points of a grid
FIRST = 1 / 3  # of the rows, with which new arguments are tried first, where more rows make a difference


class Draws:
    """Arguments, one after the other; each is told what the one before came to. The same seed and answers, the same
    arguments."""

    def __init__(self, space: Space, sampler: Sampler, seed: int) -> None:
        """Raises UsageError where Optuna is not installed (extra ``search``)."""
        self.space, self.seed = space, seed
        self._study: Any = None
        self._trial: Any = None
        if sampler == "grid":
            return
        with needs_extra("search"):
            import optuna
            from optuna.samplers import CmaEsSampler, RandomSampler, TPESampler

            if sampler == "cmaes":
                importlib.import_module("cmaes")  # which Optuna imports late
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        made: dict[Sampler, Callable[[], Any]] = {
            "tpe": lambda: TPESampler(seed=seed, n_startup_trials=4),
            "cmaes": lambda: CmaEsSampler(seed=seed, n_startup_trials=2, warn_independent_sampling=False),
            "random": lambda: RandomSampler(seed=seed),
        }
        self._study = optuna.create_study(direction="maximize", sampler=made[sampler]())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Draws for ever, but from a grid each point once; each is answered by ``tell`` before the next."""
        if self._study is None:
            yield from _points(self.space, self.seed)
            return
        while True:
            self._trial = trial = self._study.ask()
            yield {key: _drawn(trial, key, one) for key, one in self.space.items()}

    def tell(self, score: float | None) -> None:
        """What the last arguments came to; None where they failed."""
        if self._study is not None:
            self._study.tell(self._trial, score, state=None if score is not None else _failed())


def _failed() -> Any:
    from optuna.trial import TrialState

    return TrialState.FAIL


def _drawn(trial: Any, key: str, one: Range | tuple[Any, ...]) -> Any:
    if not isinstance(one, Range):
        return one[trial.suggest_categorical(key, list(range(len(one))))]
    if one.whole:
        return trial.suggest_int(key, int(one.low), int(one.high), log=one.log)
    return trial.suggest_float(key, one.low, one.high, log=one.log)


def _points(space: Space, seed: int) -> Iterator[dict[str, Any]]:
    """Points of a grid, each once, in an order that the seed draws: all of them, or so many as are ever tried."""
    axes = {key: _axis(one) for key, one in space.items()}
    rng, seen, total = random.Random(seed), set[tuple[int, ...]](), math.prod(len(axis) for axis in axes.values())
    while len(seen) < min(total, _MOST):  # drawn, not listed: points may be more than memory holds
        if (point := tuple(rng.randrange(len(axis)) for axis in axes.values())) not in seen:
            seen.add(point)
            yield {key: axis[i] for (key, axis), i in zip(axes.items(), point, strict=True)}


def _axis(one: Range | tuple[Any, ...]) -> list[Any]:
    if not isinstance(one, Range):
        return list(one)
    steps = [i / (_POINTS - 1) for i in range(_POINTS)]
    values = [one.low * (one.high / one.low) ** s if one.log else one.low + s * (one.high - one.low) for s in steps]
    return sorted({round(v) for v in values}) if one.whole else [min(v, one.high) for v in values]


def tuned(
    history: History, winner: str, new: Callable[[Mapping[str, Any]], str], run: Run, draws: Draws, budget: float,
    count: int,
) -> None:  # fmt: skip
    """Tries ``count`` other arguments of the winner at most, as long as another trial fits the budget; ``new`` makes a
    candidate of drawn arguments and returns its name.

    Where rows make a difference, arguments are tried with a third of them first, and with all of them where they are
    then no worse than the winner was with as many. What is told of those that are worse is what they came to with a
    third.
    """
    known = {t.share: t.score for t in history.of(winner)}
    shares = sorted({min(known, key=lambda share: abs(share - FIRST)), 1.0})
    costs, names = {share: seconds(history, winner, share) for share in shares}, {winner}
    for values, _ in zip(draws, range(count), strict=False):
        if history.seconds + sum(costs.values()) > budget:
            break
        names.add(name := new(values))
        draws.tell(_scored(history, run, name, costs, known))
    history.chosen = max((t for t in history.trials if t.share == 1 and t.arm in names), key=lambda t: t.score).arm


def _scored(
    history: History, run: Run, name: str, costs: Mapping[float, float], known: Mapping[float, float]
) -> float | None:  # fmt: skip
    """The score with the largest share that was worth trying; None where a trial failed, which costs what the winner's
    cost."""
    score = None
    for share, cost in costs.items():
        if not attempt(history, run, name, share, cost):
            return None
        score = history.of(name)[-1].score
        if score < known[share]:
            break
    return score
