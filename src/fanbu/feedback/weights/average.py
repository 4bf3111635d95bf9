"""The average of the specialists' weights (linear merging, model soup): the plainest way to feed weights back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fanbu.contribution import Contribution
from fanbu.errors import UsageError
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Combine, Linear, Stack, merge
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = True
SENSITIVITY = 1.0
NEUTRAL = {"scale": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    weights: Mapping[str, Dial] = {},
) -> Model:  # fmt: skip
    """theta = theta_base + scale * sum of w_i delta_i / sum of w_i over the specialists; label rows as they came.

    Computed row by row in float32 and stored in the base's dtype. No data is needed.

    Args:
        scale: 1 is the average of the weights.
        weights: w_i by domain, 1 where it is not named.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: the weights of a tensor sum to 0.

    Reference: Wortsman et al. 2022, "Model soups"; Ilharco et al. 2023 (scale).
    """

    def rule(stack: Stack) -> Combine:
        w = stack.levels(1.0, weights)
        if not sum(w):
            raise UsageError(
                "bad-parameter", f"average: the weights of {stack.name} sum to 0", got=w, remedy="change one"
            )
        return Linear([stack.level(scale) * each / sum(w) for each in w])

    made = provenance(
        "average", [base], context, scale=scale, weights=weights, domains=[c.domain for c in contributions]
    )
    return merge(base, contributions, out, context, rule, made)
