"""NearSwap: takes what lies near the base whole, and only a fixed step of what lies far."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Combine, Part, Stack, merge
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"t": 1e30}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, t: Dial = 0.001
) -> Model:
    """theta = theta_base + mean over the specialists of clip(delta_i, -t, t).

    Interpolating with the weight min(1, t / |delta|) is the same as clipping.

    Args:
        t: how far a number may move.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: alchemonaut 2024, "NearSwap" (QuartetAnemoi-70B).
    """

    def rule(stack: Stack) -> Combine:
        limit = abs(stack.level(t))

        def combine(part: Part) -> Tensor:
            clipped = [delta.clamp_(-limit, limit) for delta in part.deltas]
            for delta in clipped[1:]:
                clipped[0].add_(delta)
            return clipped[0].div_(len(clipped))

        return combine

    made = provenance("nearswap", [base], context, t=t, domains=[c.domain for c in contributions])
    return merge(base, contributions, out, context, rule, made)
