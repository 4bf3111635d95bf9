"""The adaptive optimizers at the centre of Reddi et al. 2021: they differ in how the second moment moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.updates._server import How, Memory, taken
from fanbu.merging.task_vector import LABEL
from fanbu.model import Model, Provenance
from fanbu.types import Context

Second = Callable[[Tensor, Tensor], Tensor]  # of v as it was and delta^2: v as it is


def adaptive(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, made: Provenance, second: Second,
) -> Model:  # fmt: skip
    """theta = theta_base + rate m / (sqrt v + tau), m = beta1 m_before + (1 - beta1) delta, from zero moments."""
    rate, head_rate, beta1, tau = (float(made.parameters[name]) for name in ("rate", "head_rate", "beta1", "tau"))

    def rule(name: str, kept: dict[str, Tensor], change: Tensor) -> Tensor:
        m = kept["m"].mul_(beta1).add_(change, alpha=1 - beta1)
        v = kept["v"].copy_(second(kept["v"], change.square()))
        return m / v.sqrt().add_(tau) * (head_rate if name.startswith(LABEL) else rate)

    how = How(by_rows=bool(made.parameters["by_rows"]))
    return taken(base, contributions, out, context, how, made, Memory(["m", "v"], rule))
