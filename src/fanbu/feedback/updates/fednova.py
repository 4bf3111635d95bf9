"""FedNova: federated averaging of changes per step, so that who makes more steps does not pull further."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Annotated

from annotated_types import Gt

from fanbu.contribution import Contribution
from fanbu.feedback.updates._server import How, said_number, taken
from fanbu.feedback.updates.fedavg import contribute
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="updates", specialist=False)
LINEAR = False  # steps are held to their median before anything is summed
SENSITIVITY = None


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    scale: Annotated[float, Gt(0)] = 1.0, by_rows: bool = True,
) -> Model:  # fmt: skip
    """theta = theta_base + scale s sum_i p_i delta_i / s_i, s_i the steps that owner i made, s = sum_i p_i s_i.

    p_i is its share of all rows. Where all make the same number of steps this is ``fedavg``. Owners say s_i themselves:
    it is held between a tenth and ten times the median. A label's row is the mean over those who know the label.

    Args:
        scale: the learning rate of the centre.
        by_rows: whether an owner counts by its rows, which it says itself; else all count alike.

    Raises:
        FitError: an update's tensors are not the base's.
        IntegrityError: an update does not say of how many rows or steps it is.

    Reference: Wang et al. 2020, "Tackling the objective inconsistency problem in heterogeneous federated optimization"
    (for plain SGD: a_i is s_i ones).
    """
    rows = [said_number(c, "rows") if by_rows else 1 for c in contributions]
    steps = {c.domain: float(said_number(c, "steps")) for c in contributions}
    middle = median(steps.values())
    steps = {d: min(max(s, middle / 10), 10 * middle) for d, s in steps.items()}
    mean = sum(n * s for n, s in zip(rows, steps.values(), strict=True)) / sum(rows)
    domains = [c.domain for c in contributions]
    made = provenance("fednova", [base], context, scale=scale, by_rows=by_rows, domains=domains)
    how = How(scale, by_rows)
    return taken(base, contributions, out, context, how, made, each=lambda c: mean / steps[c.domain])
