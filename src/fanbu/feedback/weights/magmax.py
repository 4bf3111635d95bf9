"""MagMax: takes, of each number, the largest change that any specialist made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Combine, Part, Stack, merge
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 0.5
) -> Model:
    """theta = theta_base + scale * delta_j, j the specialist with the largest |delta| at each number.

    Where two are equally large, the first by name counts.

    Args:
        scale: of what is added.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Marczak et al. 2024, "MagMax: leveraging model merging for seamless continual learning".
    """

    def rule(stack: Stack) -> Combine:
        factor = stack.level(scale)

        def combine(part: Part) -> Tensor:
            best, size = part.deltas[0], part.deltas[0].abs()
            for delta in part.deltas[1:]:
                other = delta.abs()
                best = torch.where(other > size, delta, best)
                size = torch.maximum(size, other)
            return best.mul_(factor)

        return combine

    made = provenance("magmax", [base], context, scale=scale, domains=[c.domain for c in contributions])
    return merge(base, contributions, out, context, rule, made)
