"""Task arithmetic: the scaled sum of the specialists' task vectors is added to the large model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Linear, merge
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = True
SENSITIVITY = 1.0
NEUTRAL = {"scale": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 0.3,
    weights: Mapping[str, Dial] = {},
) -> Model:  # fmt: skip
    """theta = theta_base + scale * sum over the specialists of w_i delta_i; each domain's label rows as they came.

    Args:
        scale: lambda of the paper, which tunes it on validation rows (0.3 was good for eight tasks).
        weights: w_i by domain, 1 where it is not named.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Ilharco et al. 2023, "Editing models with task arithmetic".
    """
    made = provenance(
        "task_arithmetic", [base], context, scale=scale, weights=weights, domains=[c.domain for c in contributions]
    )
    return merge(
        base, contributions, out, context,
        lambda stack: Linear([stack.level(scale) * w for w in stack.levels(1.0, weights)]), made,
    )  # fmt: skip
