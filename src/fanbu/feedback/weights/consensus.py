"""Consensus merging: keeps the numbers that several specialists need (TALL masks), drops what one alone wants."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.elementwise import summed
from fanbu.merging.engine import Combine, Part, Stack, merge
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0, "agree": 1}


def absorb(
    base: Model,
    contributions: Sequence[Contribution],
    out: Path,
    context: Context,
    *,
    scale: Dial = 0.3,
    threshold: Dial = 0.4,
    agree: int = 2,
) -> Model:
    """theta = theta_base + scale * m * sum of delta_i, m = 1 where at least ``agree`` specialists need a number.

    Specialist i needs a number where |delta_i| >= threshold * |sum of all delta_j - delta_i|.

    Args:
        scale: of what is added.
        threshold: lambda of the paper, which tunes it between 0.2 and 0.6.
        agree: k of the paper; where fewer specialists take part, all of them.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Wang et al. 2024, "Localizing task information for improved model merging and compression".
    """

    def rule(stack: Stack) -> Combine:
        limit, factor, needed = stack.level(threshold), stack.level(scale), min(agree, len(stack.domains))

        def combine(part: Part) -> Tensor:
            total = summed(part.deltas, [1.0] * len(part.deltas))
            wanted = torch.zeros_like(total)
            for delta in part.deltas:
                wanted.add_((total - delta).abs_().mul_(limit) <= delta.abs())
            return total.mul_(wanted >= needed).mul_(factor)

        return combine

    made = provenance(
        "consensus",
        [base],
        context,
        scale=scale,
        threshold=threshold,
        agree=agree,
        domains=[c.domain for c in contributions],
    )
    return merge(base, contributions, out, context, rule, made)
