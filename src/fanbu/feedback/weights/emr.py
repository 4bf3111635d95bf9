"""EMR-Merging: one elected change for all, and for each domain a mask and a scale that make it the domain's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.elementwise import summed
from fanbu.merging.engine import Combine, Part, Stack, merge, stacks
from fanbu.merging.masks import Masks
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL: dict[str, object] = {}


def absorb(base: Model, contributions: Sequence[Contribution], out: Path, context: Context) -> Model:
    """theta = theta_base + tau, tau = sign(sum of delta_i) * max |delta_i| over those that agree with this sign.

    Beside the weights, ``masks.safetensors`` holds for each domain a bit for each number (m_i = delta_i tau > 0) and
    the scale s_i = sum |delta_i| / sum |m_i tau|, from which ``fanbu feed --only DOMAIN`` (``fanbu.only``) makes the
    domain's own model theta_base + s_i m_i tau. A plain loader reads the one for all.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Huang et al. 2024, "EMR-Merging: tuning-free high-performance model merging".
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=context.scratch or out.parent, prefix=".emr-") as folder:
        masks = Masks(Path(folder), stacks(base, contributions, context))

        def rule(stack: Stack) -> Combine:
            def combine(part: Part) -> Tensor:
                tau = elected(part.deltas)
                masks.put(stack, part, tau)
                return tau

            return combine

        made = provenance("emr", [base], context, domains=[c.domain for c in contributions])
        return merge(base, contributions, out, context, rule, made, more=masks.close)


def elected(deltas: Sequence[Tensor]) -> Tensor:
    """sign(sum of delta_i) * max |delta_i| over those with this sign; 0 where the sum is 0."""
    sign = summed(deltas, [1.0] * len(deltas)).sign_()
    largest = torch.zeros_like(sign)
    for delta in deltas:
        torch.maximum(largest, delta * sign, out=largest)
    return largest.mul_(sign)
