"""FedYogi: federated averaging with Yogi at the centre."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.updates._adaptive import adaptive
from fanbu.feedback.updates.fedavg import contribute
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="updates", specialist=False)
LINEAR = True
SENSITIVITY = 1.0


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    rate: Annotated[float, Gt(0)] = 1e-3, head_rate: Annotated[float, Gt(0)] = 1e-2,
    beta1: Annotated[float, Ge(0), Lt(1)] = 0.9,
    beta2: Annotated[float, Ge(0), Lt(1)] = 0.99, tau: Annotated[float, Gt(0)] = 1e-3, by_rows: bool = True,
) -> Model:  # fmt: skip
    """theta = theta_base + rate m / (sqrt v + tau), with delta the owners' mean change, m = beta1 m_before +
    (1 - beta1) delta and v = v_before - (1 - beta2) delta^2 sign(v_before - delta^2); so for label rows, of
    those who know the label.

    m and v start at 0 and are kept from one inner round to the next, so take it many ``times``.

    Args:
        rate: the learning rate of the centre.
        head_rate: the same, for label rows.
        beta1: how much of m stays.
        beta2: how much of v stays.
        tau: how little the changes may be and still be brought to one size.
        by_rows: whether an owner counts by its rows, which it says itself; else all count alike.

    Raises:
        FitError: an update's tensors are not the base's.
        IntegrityError: an update does not say of how many rows it is.

    Reference: Reddi et al. 2021, "Adaptive federated optimization".
    """

    def second(v: Tensor, square: Tensor) -> Tensor:
        return v.sub_((v - square).sign_().mul_(square), alpha=1 - beta2)

    made = provenance(
        "fedyogi", [base], context, rate=rate, head_rate=head_rate, beta1=beta1, beta2=beta2, tau=tau, by_rows=by_rows,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return adaptive(base, contributions, out, context, made, second)
