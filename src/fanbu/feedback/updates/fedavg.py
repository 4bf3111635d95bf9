"""Federated averaging: owners train the large model on their own rows, the centre averages what that changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Gt, Lt

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.updates._local import LOCAL, Learns, update
from fanbu.feedback.updates._server import How, taken
from fanbu.merging.robust import Aggregate
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs, Train

NEEDS = Needs(kind="updates", specialist=False)
LINEAR = True  # with ``aggregate: mean`` and nothing clipped
SENSITIVITY = 1.0


def contribute(
    specialist: Specialist, base: Model, context: Context, *, train: Train = LOCAL, learns: Learns = Learns()
) -> Contribution:
    """delta = theta - theta_base after training the large model on the domain's training rows; its own label rows.

    The specialist itself is not asked: what crosses is what its owner's rows make of the large model. Take it many
    ``times``, with little training each. A base that is stored in sixteen bits rounds away small changes each time:
    store it in float32 first.

    Args:
        train: how an owner trains in one inner round.
        learns: what of the model, and what of that crosses (``Learns``): ``layers``, ``rank``, ``store``, ``rivals``,
            ``privacy``.

    Raises:
        UsageError: ``layers: head`` of a causal model; packed factors; privacy where all layers learn.
    """
    return update("fedavg", specialist, base, context, train, learns)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    scale: Annotated[float, Gt(0)] = 1.0, by_rows: bool = True, aggregate: Aggregate = "mean",
    liars: Annotated[float, Ge(0), Lt(0.5)] = 0.3, clip: Annotated[float, Ge(0)] = 0.0,
) -> Model:  # fmt: skip
    """theta = theta_base + scale sum_i n_i delta_i / sum_i n_i, n_i the rows of owner i; label rows from their owners.

    A label's row is the mean over those who know the label, so owners with labels of their own get their own rows.

    Args:
        scale: the learning rate of the centre.
        by_rows: whether an owner counts by its rows, which it says itself; else all count alike.
        aggregate: ``mean``; or one that some false updates do not carry away, whose owners all count alike: ``median``
            and ``trimmed`` mean of each number, ``krum``, ``multi_krum``, ``geometric`` median (``merging.robust``).
        liars: the share of owners that may be false (``trimmed``, ``krum``, ``multi_krum``).
        clip: updates longer than so many times the median length are brought down to that; 0: none is.

    Raises:
        FitError: an update's tensors are not the base's.
        IntegrityError: an update does not say of how many rows it is.

    Reference: McMahan et al. 2017, "Communication-efficient learning of deep networks from decentralized data".
    """
    made = provenance(
        "fedavg", [base], context, scale=scale, by_rows=by_rows, aggregate=aggregate, liars=liars, clip=clip,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return taken(base, contributions, out, context, How(scale, by_rows, aggregate, liars, clip), made)
