"""WUDI: the delta that disturbs each specialist's own directions least, in closed form or by Adam."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Stack, merge
from fanbu.merging.spectral import deltas_of, rule_of, within, wudi, wudi_adam
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0, "solver": "closed"}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    solver: Literal["closed", "adam"] = "closed", steps: int = 300, lr: float = 1e-5,
    weights: Mapping[str, Dial] = {},
) -> Model:  # fmt: skip
    """theta = theta_base + scale * tau, tau = argmin of sum over i of |(tau - D_i) D_i^T|^2 / |D_i|^2.

    D_i = w_i delta_i. In closed form tau = (sum D_i G_i) (sum G_i)^+ with G_i = D_i^T D_i / |D_i|^2, the smallest of
    all solutions.

    Tensors that are no matrices, and tables of embeddings, take scale * sum of w_i delta_i / sum of w_i.

    Args:
        scale: 1 as in the paper.
        solver: ``closed`` is exact and needs no steps; ``adam`` is what the paper does, which starts at the sum of the
            D_i and stops early, so it stays near the sum (float32; as slow as ``steps`` products of matrices).
        steps: of Adam.
        lr: Adam's learning rate, in units of the weights.
        weights: w_i by domain, by which its delta is multiplied; 1 where it is not named, 0 leaves it out.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: steps below 1, lr below 0, or the weights of a tensor sum to 0.

    Reference: Cheng et al. 2025, "Whoever started the interference should end it: guiding data-free model merging via
    task vectors".
    """
    within("wudi: steps", steps, 1)
    within("wudi: lr", lr, 0)

    def solve(stack: Stack, w: list[float]) -> Tensor:
        deltas = deltas_of(stack, w)
        return wudi_adam(deltas, steps, lr) if solver == "adam" else wudi(deltas)

    made = provenance(
        "wudi", [base], context, scale=scale, solver=solver, steps=steps, lr=lr, weights=weights,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule_of(solve, scale, weights), made, whole=8)
