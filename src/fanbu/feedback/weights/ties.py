"""TIES: trim each task vector to its largest changes, elect a sign for each number, average those that agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import UsageError
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.elementwise import elect, thresholds, trim
from fanbu.merging.engine import Combine, Part, Stack, merge, stacks
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0, "density": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    density: Dial = 0.2, weights: Mapping[str, Dial] = {},
    scope: Literal["tensor", "model"] = "tensor", normalise: bool = True,
) -> Model:  # fmt: skip
    """theta = theta_base + scale * sum of w_i t_i / sum of w_i, over the specialists i that agree in sign.

    t_i is delta_i with all but its largest ``density`` of numbers (by magnitude) set to 0. The sign of a number is that
    of the sum of all w_i t_i; a specialist agrees where its t_i is not 0 and has this sign. Thresholds are exact, and
    numbers equal to one are kept.

    Args:
        scale: lambda of the paper, which tunes it on validation rows (1 without any).
        density: the share of numbers kept.
        weights: w_i by domain, 1 where it is not named.
        scope: ``tensor`` trims each tensor by itself, ``model`` (as in the paper; ``density`` is one number then) over
            all of them.
        normalise: divide by the weights of those that agree, as in the paper; else their sum is taken.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: a density outside 0..1.

    Reference: Yadav et al. 2023, "TIES-Merging: resolving interference when merging models".
    """
    over_all = (
        thresholds(stacks(base, contributions, context), _one(density, contributions)) if scope == "model" else []
    )

    def rule(stack: Stack) -> Combine:
        limits = over_all or thresholds([stack], [stack.level(density)] * len(stack.domains))
        w, factor = stack.levels(1.0, weights), stack.level(scale)

        def combine(part: Part) -> Tensor:
            return elect([trim(d, t) for d, t in zip(part.deltas, limits, strict=True)], w, normalise=normalise).mul_(
                factor
            )

        return combine

    made = provenance(
        "ties", [base], context, scale=scale, density=density, weights=weights, scope=scope, normalise=normalise,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule, made)


def _one(density: Dial, contributions: Sequence[Contribution]) -> list[float]:
    if not isinstance(density, float):
        raise UsageError(
            "bad-parameter", "ties: density", allowed="one number with scope: model", got=density,
            remedy="give one number, or take scope: tensor",
        )  # fmt: skip
    return [density] * len(contributions)
