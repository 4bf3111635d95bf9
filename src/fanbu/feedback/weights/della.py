"""DELLA: drops task vectors at random like DARE, small changes of a row more often than large ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import UsageError
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.elementwise import by_rank, drop, joined, share_of
from fanbu.merging.engine import Combine, Part, Stack, merge
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"density": 1.0, "epsilon": 0.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    density: Dial = 0.5, epsilon: Dial = 0.1, weights: Mapping[str, Dial] = {},
    elect: bool = True, normalise: bool = True,
) -> Model:  # fmt: skip
    """theta = theta_base + scale * sum of w_i m_i delta_i / p_i / sum of w_i, with m_i ~ Bernoulli(p_i).

    p rises with the rank r of |delta| in its row of n numbers: p = density - epsilon + 2 epsilon r / (n - 1). Vectors
    are one row (of at most 2^18 numbers at a time).

    Args:
        scale: of what is added.
        density: the mean share of numbers kept.
        epsilon: half the difference between the largest and the smallest p.
        weights: w_i by domain, 1 where it is not named.
        elect: only those that agree with the elected sign of a number count, as in ``ties``.
        normalise: divide by the weights (with ``elect`` by those that agree); else the sum is taken.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: a density outside 0..1, or an epsilon that makes p leave 0..1.

    Reference: Deep et al. 2024, "DELLA-Merging".
    """

    def rule(stack: Stack) -> Combine:
        keep, spread = share_of(stack.level(density)), stack.level(epsilon)
        if not 0 <= spread <= min(keep, 1 - keep):
            raise UsageError(
                "bad-parameter", "della: epsilon", allowed=f"0 to {min(keep, 1 - keep):.4g} at density {keep}",
                got=spread, remedy="give a smaller one",
            )  # fmt: skip
        w, factor = stack.levels(1.0, weights), stack.level(scale)

        def combine(part: Part) -> Tensor:
            dropped = [
                drop(delta, by_rank(delta, keep, spread), stack.generator(domain, part.start))
                for domain, delta in zip(stack.domains, part.deltas, strict=True)
            ]
            return joined(dropped, w, elected=elect, normalise=normalise).mul_(factor)

        return combine

    made = provenance(
        "della", [base], context, scale=scale, density=density, epsilon=epsilon, weights=weights, elect=elect,
        normalise=normalise, domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule, made)
