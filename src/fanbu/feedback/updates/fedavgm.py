"""FedAvgM: federated averaging with momentum at the centre."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.updates._server import How, Memory, taken
from fanbu.feedback.updates.fedavg import contribute
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="updates", specialist=False)
LINEAR = True
SENSITIVITY = 1.0


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    rate: Annotated[float, Gt(0)] = 1.0, momentum: Annotated[float, Ge(0), Lt(1)] = 0.9, by_rows: bool = True,
) -> Model:  # fmt: skip
    """theta = theta_base + rate m, m = momentum m_before + delta, delta the owners' mean change; so for label rows,
    of those who know the label.

    m is kept from one inner round to the next, so take it many ``times``; alone, once, it is ``fedavg``.

    Args:
        rate: the learning rate of the centre.
        momentum: how much of the former changes goes on.
        by_rows: whether an owner counts by its rows, which it says itself; else all count alike.

    Raises:
        FitError: an update's tensors are not the base's.
        IntegrityError: an update does not say of how many rows it is.

    Reference: Hsu et al. 2019, "Measuring the effects of non-identical data distribution for federated visual
    classification".
    """

    def rule(_: str, kept: dict[str, Tensor], change: Tensor) -> Tensor:
        return kept["momentum"].mul_(momentum).add_(change) * rate

    made = provenance(
        "fedavgm", [base], context, rate=rate, momentum=momentum, by_rows=by_rows,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return taken(base, contributions, out, context, How(by_rows=by_rows), made, Memory(["momentum"], rule))
