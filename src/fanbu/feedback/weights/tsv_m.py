"""TSV-M: the strongest singular vectors of every task vector, made orthogonal to one another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Stack, merge
from fanbu.merging.spectral import rule_of, strongest, tsv_m
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    weights: Mapping[str, Dial] = {},
) -> Model:  # fmt: skip
    """theta = theta_base + scale * U' diag(s) V'^T, over the top r / T singular vectors of each of T specialists.

    U' and V' are the polar factors of all left and all right singular vectors of the w_i delta_i, side by side; r is
    the smaller side of the matrix. Low-rank specialists (LoRA) are never made whole.

    Tensors that are no matrices, and tables of embeddings, take scale * sum of w_i delta_i / sum of w_i.

    Args:
        scale: alpha of the paper, which takes 1.
        weights: w_i by domain, by which its delta is multiplied; 1 where it is not named, 0 leaves it out.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: the weights of a tensor sum to 0.

    Reference: Gargiulo et al. 2025, "Task singular vectors: reducing task interference in model merging".
    """

    def solve(stack: Stack, w: list[float]) -> Tensor:
        return tsv_m(strongest(stack, w))

    made = provenance(
        "tsv_m", [base], context, scale=scale, weights=weights,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule_of(solve, scale, weights), made, whole=8)
