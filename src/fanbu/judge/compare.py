"""Paired comparison on the same examples: bootstrap intervals, McNemar's test, Holm's correction, power."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fanbu.contribution import Contribution
from fanbu.errors import DataError
from fanbu.types import derived_seed

Floats = NDArray[np.float64]
RESAMPLES = 10_000


@dataclass(frozen=True)
class Paired:
    """Candidate against incumbent on one domain. ``delta`` is positive where the candidate is better.

    ``low`` and ``high`` bound delta at the confidence asked for (two-sided); ``floor`` is the one-sided lower bound
    that non-inferiority is judged by; ``draws`` are the bootstrap's deltas; ``smallest_detectable`` is the change
    that a two-sided test at 5% sees with 80% power.
    """

    domain: str
    candidate: float
    incumbent: float
    delta: float
    low: float
    high: float
    floor: float
    p: float
    n: int
    wins: int
    losses: int
    smallest_detectable: float
    draws: Floats


def compare(candidate: Contribution, incumbent: Contribution, mode: str, seed: int, confidence: float = 0.95) -> Paired:
    """Paired percentile bootstrap over examples (Efron and Tibshirani 1993); exact McNemar where values are 0 or 1.

    delta = sum(v_candidate) / sum(w) - sum(v_incumbent) / sum(w). Raises DataError where the two are not of the
    same examples.
    """
    a, b, w = _column(candidate, mode), _column(incumbent, mode), candidate.tensors["weight"].double().numpy()
    if (
        candidate.domain != incumbent.domain
        or candidate.meta.get("test") != incumbent.meta.get("test")
        or len(a) != len(b)
        or not np.array_equal(w, incumbent.tensors["weight"].numpy())
    ):
        raise DataError(
            "not-paired", f"outcomes of {candidate.domain} and {incumbent.domain} are not of the same examples",
            allowed=len(b), got=len(a), remedy="evaluate both models on the same test rows (with the same tokenizer)",
        )  # fmt: skip
    difference = a - b
    draws = bootstrap([difference, w], derived_seed(seed, "bootstrap", candidate.domain))
    draws = draws[0] / draws[1]
    tail = (1 - confidence) / 2
    low, high, floor = np.quantile(draws, [tail, 1 - tail, 1 - confidence])
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    spread = max(float(draws.std()), 1.0 / len(a) if set(np.unique(a)) <= {0.0, 1.0} else 0.0)
    return Paired(
        candidate.domain, float(a.sum() / w.sum()), float(b.sum() / w.sum()), float(difference.sum() / w.sum()),
        float(low), float(high), float(floor), _p(a, b, wins, losses, draws), len(a), wins, losses,
        (1.96 + 0.8416) * spread, draws,
    )  # fmt: skip


def _column(outcomes: Contribution, mode: str) -> Floats:
    # a model that knows one domain only has no untold answers of its own: there is nothing else to choose
    name = mode if mode in outcomes.tensors else "told"
    column: Floats = outcomes.tensors[name].double().numpy()
    return column


def bootstrap(columns: Sequence[Floats], seed: int, resamples: int = RESAMPLES) -> Floats:
    """[columns, resamples]: sums of each column over rows drawn with replacement, the same rows for all columns."""
    rng = np.random.default_rng(seed)
    stacked = np.stack(columns, 1)
    n, step = len(stacked), max(1, 2_000_000 // max(len(stacked), 1))
    sums = [
        stacked[rng.integers(0, n, (min(step, resamples - start), n))].sum(1) for start in range(0, resamples, step)
    ]
    return np.concatenate(sums).T


def _p(a: Floats, b: Floats, wins: int, losses: int, draws: Floats) -> float:
    from scipy.stats import binomtest

    if set(np.unique(np.concatenate([a, b]))) <= {0.0, 1.0}:
        return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
    below = (np.sum(draws <= 0) + 1) / (len(draws) + 1)
    return float(min(1.0, 2 * min(below, 1 - below + 1 / (len(draws) + 1))))


def holm(values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values, step-down: p_(i) -> max over j <= i of min(1, (m - j + 1) p_(j)) (Holm 1979)."""
    adjusted, running = {}, 0.0
    for rank, (name, p) in enumerate(sorted(values.items(), key=lambda item: item[1])):
        running = max(running, min(1.0, (len(values) - rank) * p))
        adjusted[name] = running
    return adjusted


def average(pairs: Sequence[Paired], confidence: float = 0.95) -> dict[str, float]:
    """The mean of the domains' deltas, each domain counting once, with its bootstrap interval."""
    draws = np.mean([p.draws for p in pairs], 0)
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return {"delta": float(np.mean([p.delta for p in pairs])), "low": float(low), "high": float(high)}


def gain_kept(
    new: Mapping[str, Contribution], base: Mapping[str, Contribution], specialists: Mapping[str, Contribution],
    mode: str, seed: int,
) -> dict[str, float] | None:  # fmt: skip
    """sum_d (new - base) / sum_d (specialist - base), with a 95% bootstrap interval over examples.

    None where the specialists gained nothing over the base: there is nothing to keep.
    """
    tops, bottoms, top, bottom = 0.0, 0.0, 0.0, 0.0
    for domain in sorted(specialists):
        w = base[domain].tensors["weight"].double().numpy()
        b = _column(base[domain], mode)
        gained, possible = _column(new[domain], mode) - b, _column(specialists[domain], mode) - b
        g, s, total = bootstrap([gained, possible, w], derived_seed(seed, "gain", domain))
        tops, bottoms = tops + g / total, bottoms + s / total
        top, bottom = top + gained.sum() / w.sum(), bottom + possible.sum() / w.sum()
    if bottom <= 0:
        return None
    ratios = np.where(np.asarray(bottoms) > 0, np.asarray(tops) / np.maximum(bottoms, 1e-9), np.nan)
    low, high = np.nanquantile(ratios, [0.025, 0.975])
    return {"value": float(top / bottom), "low": float(low), "high": float(high)}
