"""SVC: the sum of the task vectors, its singular values divided by how often what they hold was counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Stack, merge
from fanbu.merging.spectral import calibrated, deltas_of, rule_of, sum_of, within
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0, "alpha": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    alpha: Dial = 1.0, weights: Mapping[str, Dial] = {},
) -> Model:  # fmt: skip
    """theta = theta_base + scale * U diag(c) U^T D, where D = U diag(s) V^T = sum of w_i delta_i.

    c_k = T / sum over i of max(alpha, <a_k, a_ki> / |a_ki|^2), a_k = u_k^T D, a_ki = u_k^T w_i delta_i: where all T
    specialists changed the same, it is counted once.

    Tensors that are no matrices, and tables of embeddings, take scale * sum of w_i delta_i / sum of w_i.

    Args:
        scale: applied after the calibration; to calibrate lambda * D as the paper does, give alpha / lambda and 1.
        alpha: the least that a specialist counts in a direction, above 0; 1 never makes a singular value larger.
        weights: w_i by domain, by which its delta is multiplied; 1 where it is not named, 0 leaves it out.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: alpha is not above 0, or the weights of a tensor sum to 0.

    Reference: "When shared knowledge hurts: spectral over-accumulation in model merging", 2026, arXiv 2602.05536.
    """

    def solve(stack: Stack, w: list[float]) -> Tensor:
        deltas = deltas_of(stack, w)
        return calibrated(sum_of(deltas), deltas, within("svc: alpha", stack.level(alpha), 1e-6))

    made = provenance(
        "svc", [base], context, scale=scale, alpha=alpha, weights=weights,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule_of(solve, scale, weights), made, whole=6)
