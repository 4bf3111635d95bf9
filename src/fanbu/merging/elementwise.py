"""Pieces of elementwise methods: trimming by magnitude and electing signs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fanbu.errors import UsageError
from fanbu.merging.engine import Stack
from fanbu.merging.select import kth_largest


def kept(density: float, numbers: int) -> int:
    """How many of ``numbers`` a density keeps: floor(density * numbers), and one at least where it is not 0.

    Raises UsageError outside 0..1.
    """
    if not 0 <= density <= 1:
        raise UsageError("bad-parameter", "density", allowed="0 to 1", got=density, remedy="change it")
    return max(1, int(density * numbers + 1e-9)) if density else 0


def thresholds(work: Sequence[Stack], densities: Sequence[float]) -> list[float]:
    """For each specialist, the magnitude that its largest ``density`` of numbers reach, over all tensors of ``work``.

    Numbers equal to the threshold are kept, so the answer hangs on no order. A second density for each specialist may
    follow the first ones.
    """
    total = sum(math.prod(s.shape) for s in work)
    return reached(work, [kept(d, total) for d in densities])


def reached(work: Sequence[Stack], counts: Sequence[int]) -> list[float]:
    """For each specialist the magnitude that so many of its numbers reach: infinity for 0, 0 for all of them."""
    total, domains = sum(math.prod(s.shape) for s in work), len(work[0].domains)
    wanted = [(i % domains, k) for i, k in enumerate(counts)]
    found = kth_largest(lambda share: magnitudes(work, share), [(i, k) for i, k in wanted if k < total], total)
    values = iter(found)
    return [next(values) if k < total else 0.0 for k in counts]


def magnitudes(work: Sequence[Stack], share: int = 1) -> Iterator[Sequence[Tensor]]:
    """|delta| of each specialist, part by part (see ``Stack.parts``)."""
    for stack in work:
        for part in stack.parts(share):
            yield [delta.abs_() for delta in part.deltas]


def trim(delta: Tensor, threshold: float) -> Tensor:
    """delta where |delta| >= threshold, else 0."""
    if threshold <= 0:
        return delta
    if threshold == math.inf:
        return delta.zero_()
    below = torch.nextafter(torch.tensor(threshold, dtype=torch.float32), torch.tensor(0.0))
    return torch.nn.functional.hardshrink(delta, float(below))  # one pass; it drops what is equal to its bound


def share_of(density: float) -> float:
    """A density, checked. UsageError outside 0..1."""
    kept(density, 1)
    return density


def summed(deltas: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum of w_i delta_i, as a new tensor."""
    total = deltas[0] * weights[0]
    for delta, weight in zip(deltas[1:], weights[1:], strict=True):
        total.add_(delta, alpha=weight)
    return total


def drop(delta: Tensor, keep: float | Tensor, generator: torch.Generator) -> Tensor:
    """delta / keep with probability ``keep``, else 0, for each number; in place."""
    if isinstance(keep, float):
        if keep >= 1:
            return delta
        if keep <= 0:
            return delta.zero_()
        return delta.mul_(torch.empty_like(delta).bernoulli_(keep, generator=generator)).div_(keep)
    mask = torch.rand(delta.shape, generator=generator, device=delta.device) < keep
    return delta.mul_(mask).div_(keep.clamp_(min=1e-12))


def by_rank(delta: Tensor, keep: float, spread: float) -> float | Tensor:
    """keep - spread + 2 spread r / (n - 1), with r the rank of |delta| in its row of n numbers (DELLA)."""
    if spread == 0:
        return keep
    rows = delta.reshape(delta.shape[0], -1) if delta.ndim > 1 else delta.reshape(1, -1)
    ranks = rows.abs().argsort(1).argsort(1).to(torch.float32)
    return ranks.mul_(2 * spread / max(1, rows.shape[1] - 1)).add_(keep - spread).reshape(delta.shape)


def joined(deltas: Sequence[Tensor], weights: Sequence[float], *, elected: bool, normalise: bool) -> Tensor:
    """sum of w_i delta_i, divided by sum of w_i where asked; or the elected merge of TIES."""
    if elected:
        return elect(deltas, weights, normalise=normalise)
    total = summed(deltas, weights)
    if not normalise:
        return total
    if not sum(weights):
        raise UsageError("bad-parameter", "weights sum to 0", got=list(weights), remedy="change one")
    return total.div_(sum(weights))


def elect(deltas: Sequence[Tensor], weights: Sequence[float], *, normalise: bool = True) -> Tensor:
    """The elected merge of TIES: sum over agreeing i of w_i delta_i, divided by the sum of their w_i.

    The sign of a number is that of sum w_i delta_i (0 counts as positive); a specialist agrees where its w_i delta_i is
    not 0 and has this sign. Without ``normalise`` the sum is not divided.

    Reference: Yadav et al. 2023, "TIES-Merging".
    """
    # equal weights do not count for a sign, and without them changes that cancel exactly sum to 0
    even = weights[0] > 0 and all(w == weights[0] for w in weights)
    sign = summed(deltas, [1.0] * len(deltas) if even else weights).sign_().add_(0.5).sign_()  # 0 becomes 1
    merged, share = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, weight in zip(deltas, weights, strict=True):
        agreeing = torch.mul(delta, sign if weight >= 0 else -sign).relu_()
        merged.add_(agreeing, alpha=abs(weight))
        if normalise:
            share.add_(agreeing.sign_(), alpha=weight)
    if normalise:
        merged.div_(share.masked_fill_(share.abs() < 1e-8, 1.0))
    return merged.mul_(sign)
