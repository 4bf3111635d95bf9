"""What each of several players adds to a value of sets of them: leave-one-out, and Shapley values by orders.

phi_i = mean over orders of v(those before i, and i) - v(those before i) (Shapley 1953), over all orders where there are
few players, else over drawn ones, each with its reverse (antithetic; Mitchell et al. 2022). A value is a table of rows,
and a player's part is a sum over sets of values, so that it is a table of rows, too: its mean is the estimate, and its
spread over rows, with the spread over pairs of orders, gives the interval.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from fanbu.errors import UsageError

Floats = NDArray[np.float64]
Value = Callable[[frozenset[str]], Mapping[str, Floats]]  # by domain, a number a row: what a set of players adds
EXACT = 5  # players at most for which all orders are taken
LEVEL = 0.05  # at which intervals are told, and harm is found over all players together


@dataclass(frozen=True)
class Part:
    """A player's part in the value, with its 95% interval; whether it is ``harmful``: below 0, as one of so many
    (Bonferroni)."""

    value: float
    low: float
    high: float
    harmful: bool


def leave_one_out(players: Sequence[str], value: Value) -> dict[str, Part]:
    """v(all) - v(all but i) for each player."""
    everybody = frozenset(players)
    return {p: _part(_sum(value, {everybody: 1.0, everybody - {p}: -1.0}), [], len(players)) for p in players}


def shapley(players: Sequence[str], value: Value, count: int, seed: int) -> dict[str, Part]:
    """Each player's Shapley value, from ``count`` pairs of an order and its reverse; from all orders where there are no
    more than ``EXACT`` players and ``count`` is 0 or asks for as many. UsageError where all orders are too many, and
    where one pair is to tell how much pairs differ."""
    ordered = sorted(players)
    if count == 0 and len(ordered) > EXACT:
        raise UsageError(
            "too-many-orders", f"all orders are taken of {EXACT} specialists at most",
            allowed="pairs of orders, from 1", got=len(ordered),
            remedy="say how many pairs of orders are drawn, such as 8",
        )  # fmt: skip
    if len(ordered) <= EXACT and (count == 0 or 2 * count >= math.factorial(len(ordered))):
        pairs = [[order] for order in permutations(ordered)]
        drawn = False
    elif count == 1:
        raise UsageError(
            "too-many-orders", "one pair of orders does not tell how much pairs differ", allowed="pairs, from 2",
            got=count, remedy="draw more, such as 8",
        )  # fmt: skip
    else:
        rng, drawn = random.Random(seed), True
        pairs = [
            [tuple(order), tuple(reversed(order))]
            for order in (rng.sample(ordered, len(ordered)) for _ in range(count))
        ]
    orders = [order for pair in pairs for order in pair]
    found = {}
    for player in ordered:
        sets: dict[frozenset[str], float] = {}
        for order in orders:
            before = frozenset(order[: order.index(player)])
            sets[before | {player}] = sets.get(before | {player}, 0.0) + 1 / len(orders)
            sets[before] = sets.get(before, 0.0) - 1 / len(orders)
        spread = pairs if drawn else []
        means = [float(np.mean([_marginal(value, order, player) for order in pair])) for pair in spread]
        found[player] = _part(_sum(value, sets), means, len(ordered))
    return found


def _marginal(value: Value, order: Sequence[str], player: str) -> float:
    before = frozenset(order[: order.index(player)])
    return _mean(_sum(value, {before | {player}: 1.0, before: -1.0}))


def _sum(value: Value, sets: Mapping[frozenset[str], float]) -> dict[str, Floats]:
    total: dict[str, Floats] = {}
    for chosen, weight in sets.items():
        for domain, rows in value(chosen).items():
            total[domain] = total.get(domain, np.zeros(len(rows))) + weight * rows
    return total


def _mean(table: Mapping[str, Floats]) -> float:
    return float(np.mean([rows.mean() for rows in table.values()]))


def _part(table: Mapping[str, Floats], means: Sequence[float], among: int) -> Part:
    """The mean over domains, each counting once; its variance is that of rows, and that of pairs of orders, which are
    few: their part of the interval is Student's."""
    rows = float(sum(r.var(ddof=1) / len(r) for r in table.values())) / len(table) ** 2
    pairs = float(np.var(means, ddof=1)) / len(means) if means else 0.0
    value = _mean(table)

    def half(level: float) -> float:
        z, student = -ndtri(level / 2), -stdtrit(max(len(means) - 1, 1), level / 2)
        return math.sqrt(z**2 * rows + student**2 * pairs)

    return Part(value, value - half(LEVEL), value + half(LEVEL), value + half(LEVEL / among) < 0)
