"""Model Breadcrumbs: drops the smallest changes of each task vector, and the largest outliers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.elementwise import joined, reached, share_of, trim
from fanbu.merging.engine import Combine, Part, Stack, merge
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0, "density": 1.0, "gamma": 0.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 0.3,
    density: Dial = 0.9, gamma: Dial = 0.01, weights: Mapping[str, Dial] = {},
    elect: bool = False, normalise: bool = False,
) -> Model:  # fmt: skip
    """theta = theta_base + scale * sum of w_i b_i, b_i = delta_i where its magnitude is neither small nor an outlier.

    Of the n numbers of a tensor the floor(gamma n) largest magnitudes are dropped (fewer where not enough would be
    left), and the next floor(density n) are kept. Thresholds are exact; numbers equal to one lie above it.

    Args:
        scale: of what is added.
        density: the share of numbers kept.
        gamma: the share of largest numbers dropped.
        weights: w_i by domain, 1 where it is not named.
        elect: only those that agree with the elected sign of a number count, as in ``ties``.
        normalise: divide by the weights (with ``elect`` by those that agree).

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: density or gamma outside 0..1.

    Reference: Davari & Belilovsky 2024, "Model Breadcrumbs".
    """

    def rule(stack: Stack) -> Combine:
        count, numbers = len(stack.domains), math.prod(stack.shape)
        wanted = int(share_of(stack.level(density)) * numbers + 1e-9)
        top = min(int(share_of(stack.level(gamma)) * numbers + 1e-9), numbers - wanted)
        limits = reached([stack], [top + wanted] * count + [top] * count)
        w, factor = stack.levels(1.0, weights), stack.level(scale)

        def combine(part: Part) -> Tensor:
            kept = [
                trim(delta.masked_fill_(delta.abs() >= upper, 0.0), lower)
                for delta, lower, upper in zip(part.deltas, limits[:count], limits[count:], strict=True)
            ]
            return joined(kept, w, elected=elect, normalise=normalise).mul_(factor)

        return combine

    made = provenance(
        "breadcrumbs", [base], context, scale=scale, density=density, gamma=gamma, weights=weights, elect=elect,
        normalise=normalise, domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule, made)
