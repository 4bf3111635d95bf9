"""Iso-CTS: directions common to all task vectors and directions of each, with equal singular values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Stack, merge
from fanbu.merging.spectral import deltas_of, iso_cts, rule_of, within
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0, "flatten": 0.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    common: Dial = 0.8,
    flatten: Dial = 1.0, weights: Mapping[str, Dial] = {},
) -> Model:  # fmt: skip
    """theta = theta_base + scale * U' diag((1 - f) s + f mean(s)) V'^T, over common directions and those of each task.

    Common are the top k singular vectors of sum of w_i delta_i, U_k among them; of each task, the top (r - k) / T of
    delta_i - U_k U_k^T delta_i. U' and V' are the polar factors of all of them, side by side.

    Tensors that are no matrices, and tables of embeddings, take scale * sum of w_i delta_i / sum of w_i.

    Args:
        scale: alpha of the paper, which tunes it on validation rows.
        common: k / r, moved so that the rest is shared out evenly.
        flatten: how far each singular value goes to their mean; 1 as in the paper, 0 leaves them.
        weights: w_i by domain, by which its delta is multiplied; 1 where it is not named, 0 leaves it out.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: common or flatten outside 0..1, or the weights of a tensor sum to 0.

    Reference: Marczak et al. 2025, "No task left behind: isotropic model merging with common and task-specific
    subspaces".
    """

    def solve(stack: Stack, w: list[float]) -> Tensor:
        share = within("iso_cts: common", stack.level(common), 0, 1)
        return iso_cts(deltas_of(stack, w), share, within("iso_cts: flatten", stack.level(flatten), 0, 1))

    made = provenance(
        "iso_cts", [base], context, scale=scale, common=common, flatten=flatten, weights=weights,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule_of(solve, scale, weights), made, whole=9)
