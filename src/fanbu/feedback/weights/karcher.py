"""Karcher mean: the mean of the specialists on the sphere, where none is nearer than the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Combine, Stack, merge
from fanbu.merging.geometry import gram, karcher, spanned
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL: dict[str, float] = {}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    weights: Mapping[str, Dial] = {},
    steps: int = 10, tolerance: float = 1e-5,
) -> Model:  # fmt: skip
    """theta = (sum of a_i |theta_i|) u, u the unit vector with sum of a_i log_u(theta_i / |theta_i|) = 0.

    For each tensor by itself, flattened; a_i are the weights divided by their sum. u is found by steps along the mean
    of the logarithms. All of them lie in the span of the specialists, so one pass over the weights, for their inner
    products, is enough.

    Args:
        weights: by domain, 1 where it is not named.
        steps: at most so many. One step from the straight mean is the multi-slerp of tangents.
        tolerance: the step's length at which it ends.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: the weights of a tensor sum to 0.

    Reference: Karcher 1977, "Riemannian center of mass and mollifier smoothing".
    """

    def rule(stack: Stack) -> Combine:
        found = karcher(gram(stack)[1:, 1:], stack.levels(1.0, weights), steps, tolerance)
        return spanned([0.0, *found])

    made = provenance(
        "karcher",
        [base],
        context,
        weights=weights,
        steps=steps,
        tolerance=tolerance,
        domains=[c.domain for c in contributions],
    )
    return merge(base, contributions, out, context, rule, made)
