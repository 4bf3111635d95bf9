"""FedAvgM: federated averaging with momentum at the centre."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.updates._server import How, Moments, taken
from fanbu.feedback.updates.fedavg import contribute
from fanbu.merging.engine import Part
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="updates")
LINEAR = True
SENSITIVITY = None


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    rate: Annotated[float, Gt(0)] = 1.0, momentum: Annotated[float, Ge(0), Lt(1)] = 0.9, by_rows: bool = True,
) -> Model:  # fmt: skip
    """theta = theta_base + rate m, m = momentum m_before + delta, delta the owners' mean change; label rows as in
    ``fedavg``.

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
    kept = Moments(base, ["momentum"], context)

    def step(name: str, part: Part, change: Tensor) -> Tensor:
        m = kept.get("momentum", name, part).mul_(momentum).add_(change)
        kept.put("momentum", name, part, m)
        return m.mul_(rate)

    made = provenance(
        "fedavgm", [base], context, rate=rate, momentum=momentum, by_rows=by_rows,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    new = taken(base, contributions, out, context, How(by_rows=by_rows), made, step)
    kept.close()
    return new
