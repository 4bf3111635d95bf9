"""Aggregating changes of which some may be false: by coordinates, or by weights from their inner products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Aggregate = Literal["mean", "median", "trimmed", "krum", "multi_krum", "geometric"]
_STEPS, _NEAR, _FAR = 200, 1e-10, 10.0
_FEW = 32


def false_ones(count: int, share: float) -> int:
    """How many of ``count`` may be false: as many as a share says, and fewer than half of them."""
    return min(int(share * count + 1e-9), max(0, (count - 1) // 2))


def middle(values_n: Sequence[Tensor], aggregate: Aggregate, share: float) -> Tensor:
    """``median``: of each number by itself, the mean of the middle two where they are even in number. ``trimmed``:
    the mean of each number without its ``false_ones`` largest and as many smallest.

    Reference: Yin et al. 2018, "Byzantine-robust distributed learning: towards optimal statistical rates".
    """
    count = len(values_n)
    cut = (count - 1) // 2 if aggregate == "median" else false_ones(count, share)
    kept = _ordered(values_n)[cut : count - cut]
    return torch.stack(kept).mean(0) if len(kept) > 1 else kept[0]


def _ordered(values_n: Sequence[Tensor]) -> list[Tensor]:
    """Each number sorted by itself; over few owners by odd-even transposition: to compare whole tensors is faster than
    to sort many short rows."""
    if len(values_n) > _FEW:
        return list(torch.stack(list(values_n)).sort(0).values)
    x, spare = [v.clone() for v in values_n], torch.empty_like(values_n[0])
    for turn in range(len(x)):
        for i in range(turn % 2, len(x) - 1, 2):
            torch.minimum(x[i], x[i + 1], out=spare)
            torch.maximum(x[i], x[i + 1], out=x[i + 1])
            x[i], spare = spare, x[i]
    return x


def chosen(products_nn: Tensor, aggregate: Aggregate, share: float) -> Tensor:
    """Weights [owners], summing to 1 (``geometric``: at most), from the inner products of their changes, for what is no
    matter of coordinates.

    With f = ``false_ones`` of n owners. ``krum``: 1 for the owner whose n - f - 2 nearest others are nearest in sum of
    squares; ``multi_krum``: even ones for the n - f such owners. ``geometric``: of the point with the least sum of
    distances to all (Weiszfeld's iteration), once changes of more than ten times the median length are brought down to
    that. ``mean``: even.

    References: Blanchard et al. 2017 (Krum); Pillutla et al. 2022, "Robust aggregation for federated learning".
    """
    count = len(products_nn)
    weights = torch.full((count,), 1 / count, dtype=torch.float64)
    if aggregate == "geometric":
        factors = bounded(products_nn, _FAR)
        return factors * _weiszfeld(products_nn * factors[:, None] * factors, weights)
    if aggregate not in {"krum", "multi_krum"} or count < 3:
        return weights
    false = false_ones(count, share)
    squares = _squares(products_nn).fill_diagonal_(float("inf"))
    near = max(1, count - false - 2)
    best = squares.sort(1).values[:, :near].sum(1).argsort(stable=True)[: 1 if aggregate == "krum" else count - false]
    weights = torch.zeros(count, dtype=torch.float64)
    weights[best] = 1 / len(best)
    return weights


def _squares(products_nn: Tensor) -> Tensor:
    lengths = products_nn.diagonal()
    return (lengths[:, None] + lengths[None] - 2 * products_nn).clamp_min(0)


def _weiszfeld(products_nn: Tensor, weights: Tensor) -> Tensor:
    least = _NEAR * float(products_nn.diagonal().quantile(0.5).clamp_min(1e-30))
    for _ in range(_STEPS):
        away = products_nn.diagonal() - 2 * products_nn @ weights + weights @ products_nn @ weights
        pull = 1 / away.clamp_min(least).sqrt()
        moved = pull / pull.sum()
        if float((moved - weights).abs().amax()) < 1e-9:
            break
        weights = moved
    return weights


def bounded(products_nn: Tensor, clip: float) -> Tensor:
    """Factors [owners] that bring changes longer than ``clip`` times the median length down to that; 0: none.

    Reference: Sun et al. 2019, "Can you really backdoor federated learning?" (norm bounding, here by the median).
    """
    if not clip:
        return torch.ones(len(products_nn), dtype=torch.float64)
    lengths = products_nn.diagonal().clamp_min(0).sqrt()
    return (clip * lengths.quantile(0.5) / lengths.clamp_min(1e-30)).clamp_max(1.0)
