"""The adaptive optimizers at the centre of Reddi et al. 2021: they differ in how the second moment moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.updates._server import How, Moments, taken
from fanbu.merging.engine import Part
from fanbu.model import Model, Provenance
from fanbu.types import Context

Second = Callable[[Tensor, Tensor], Tensor]  # of v as it was and delta^2: v as it is


def adaptive(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, made: Provenance, second: Second,
) -> Model:  # fmt: skip
    """theta = theta_base + rate m / (sqrt v + tau), m = beta1 m_before + (1 - beta1) delta, from zero moments."""
    rate, beta1, tau = (float(made.parameters[name]) for name in ("rate", "beta1", "tau"))
    kept = Moments(base, ["m", "v"], context)

    def step(name: str, part: Part, change: Tensor) -> Tensor:
        m = kept.get("m", name, part).mul_(beta1).add_(change, alpha=1 - beta1)
        v = second(kept.get("v", name, part), change.square())
        kept.put("m", name, part, m)
        kept.put("v", name, part, v)
        return m.div_(v.sqrt().add_(tau)).mul_(rate)

    new = taken(base, contributions, out, context, How(by_rows=bool(made.parameters["by_rows"])), made, step)
    kept.close()
    return new
