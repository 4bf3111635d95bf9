"""DARE: drops most of each task vector at random and scales up the rest, before they are added."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.elementwise import drop, joined, share_of
from fanbu.merging.engine import Combine, Part, Stack, merge
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"density": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    density: Dial = 0.5, weights: Mapping[str, Dial] = {},
    elect: bool = False, normalise: bool = True,
) -> Model:  # fmt: skip
    """theta = theta_base + scale * sum of w_i m_i delta_i / density / sum of w_i, with m_i ~ Bernoulli(density).

    Args:
        scale: of what is added.
        density: the share of numbers kept.
        weights: w_i by domain, 1 where it is not named.
        elect: only those that agree with the elected sign of a number count, as in ``ties``.
        normalise: divide by the weights (with ``elect`` by those that agree); else the sum is taken.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: a density outside 0..1.

    Reference: Yu et al. 2024, "Language models are Super Mario".
    """

    def rule(stack: Stack) -> Combine:
        keep, w, factor = share_of(stack.level(density)), stack.levels(1.0, weights), stack.level(scale)

        def combine(part: Part) -> Tensor:
            dropped = [
                drop(delta, keep, stack.generator(domain, part.start))
                for domain, delta in zip(stack.domains, part.deltas, strict=True)
            ]
            return joined(dropped, w, elected=elect, normalise=normalise).mul_(factor)

        return combine

    made = provenance(
        "dare", [base], context, scale=scale, density=density, weights=weights, elect=elect, normalise=normalise,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule, made)
