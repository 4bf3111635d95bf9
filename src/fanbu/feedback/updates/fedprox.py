"""FedProx: federated averaging whose owners are held near the large model that they set out from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.updates._local import LOCAL, Learns, Pull, update
from fanbu.feedback.updates._server import How, taken
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs, Train

NEEDS = Needs(kind="updates", specialist=False)
LINEAR = True
SENSITIVITY = 1.0


def contribute(
    specialist: Specialist, base: Model, context: Context, *, mu: Annotated[float, Ge(0)] = 0.01, train: Train = LOCAL,
    learns: Learns = Learns(),
) -> Contribution:  # fmt: skip
    """As ``fedavg``, trained by the task's loss + mu / 2 |theta - theta_base|^2, theta what learns.

    Args:
        mu: how strongly owners are held. 0: ``fedavg``.
        train: how an owner trains in one inner round.
        learns: as in ``fedavg``; without privacy.

    Raises:
        UsageError: as ``fedavg``, and for privacy, unless mu is 0.

    Reference: Li et al. 2020, "Federated optimization in heterogeneous networks".
    """
    return update("fedprox", specialist, base, context, train, learns, _held(mu) if mu else None)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    scale: Annotated[float, Gt(0)] = 1.0, by_rows: bool = True,
) -> Model:  # fmt: skip
    """As ``fedavg``: theta = theta_base + scale sum_i n_i delta_i / sum_i n_i.

    Args:
        scale: the learning rate of the centre.
        by_rows: whether an owner counts by its rows, which it says itself; else all count alike.

    Raises:
        FitError: an update's tensors are not the base's.
        IntegrityError: an update does not say of how many rows it is.
    """
    domains = [c.domain for c in contributions]
    made = provenance("fedprox", [base], context, scale=scale, by_rows=by_rows, domains=domains)
    return taken(base, contributions, out, context, How(scale, by_rows), made)


def _held(mu: float) -> Callable[[nn.Module], Pull]:
    def pull(network: nn.Module) -> Pull:
        start = [p.detach().clone() for p in _learning(network)]

        def away(moved: nn.Module) -> Tensor:
            pairs = zip(_learning(moved), start, strict=True)
            return mu / 2 * torch.stack([(p - s).square().sum() for p, s in pairs]).sum()

        return away

    return pull


def _learning(network: nn.Module) -> list[nn.Parameter]:
    return [p for p in network.parameters() if p.requires_grad]
