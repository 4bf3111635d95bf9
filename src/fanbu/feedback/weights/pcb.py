"""PCB: numbers compete within a task vector and between them; those that win are averaged by how clearly they won."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.elementwise import kept, share_of
from fanbu.merging.engine import Combine, Part, Stack, merge
from fanbu.merging.select import kth_largest
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0, "density": 1.0}


def absorb(
    base: Model,
    contributions: Sequence[Contribution],
    out: Path,
    context: Context,
    *,
    scale: Dial = 1.0,
    density: Dial = 0.2,
) -> Model:
    """theta = theta_base + scale * sum of b_i delta_i / sum of b_i, b_i how clearly a number won.

    c_i = exp(N (|delta_i| / max |delta_i|)^2) * tanh(delta_i * sum over j of delta_j): how large it is within its own
    task vector, and how far the others agree. b_i = c_i - c', clipped at 0, with c' the value that the largest
    ``density`` of a tensor's c_i reach. With density 1 nothing is clipped but disagreement.

    Args:
        scale: of what is added.
        density: the share of numbers that may win.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: a density outside 0..1.

    Reference: Du et al. 2024, "Parameter competition balancing for model merging".
    """

    def rule(stack: Stack) -> Combine:
        share, factor, count = share_of(stack.level(density)), stack.level(scale), len(stack.domains)
        largest = [1e-30] * count
        for part in stack.parts():
            largest = [max(m, float(d.abs().max())) for m, d in zip(largest, part.deltas, strict=True)]
        numbers = math.prod(stack.shape)
        limits = [0.0] * count
        if share < 1:
            wanted = [(i, kept(share, numbers)) for i in range(count)]
            limits = kth_largest(lambda rows: (scores(p, largest) for p in stack.parts(rows)), wanted, numbers)

        def combine(part: Part) -> Tensor:
            total, weight = torch.zeros_like(part.base), torch.zeros_like(part.base)
            for delta, score, limit in zip(part.deltas, scores(part, largest), limits, strict=True):
                won = score.sub_(max(limit, 0.0)).clamp_(min=0.0)
                total.add_(delta.mul_(won))
                weight.add_(won)
            return total.div_(weight.masked_fill_(weight == 0, 1.0)).mul_(factor)

        return combine

    made = provenance("pcb", [base], context, scale=scale, density=density, domains=[c.domain for c in contributions])
    return merge(base, contributions, out, context, rule, made)


def scores(part: Part, largest: Sequence[float]) -> list[Tensor]:
    """c_i of each specialist; the deltas stay as they are."""
    total = part.deltas[0].clone()
    for delta in part.deltas[1:]:
        total.add_(delta)
    count = len(part.deltas)
    return [
        (delta / m).square_().mul_(count).exp_().mul_((delta * total).tanh_())
        for delta, m in zip(part.deltas, largest, strict=True)
    ]
