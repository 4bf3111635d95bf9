"""The contribution of the weights family: a specialist's task vector, and its label rows as they are."""

from __future__ import annotations

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.merging.store import Store, task_vector
from fanbu.merging.task_vector import TaskVector
from fanbu.model import Model
from fanbu.types import Context


def contribute(specialist: Specialist, base: Model, context: Context, *, store: Store = "exact") -> Contribution:
    """delta = theta_specialist - theta_base for each tensor of the body; the domain's label rows as they are.

    Args:
        store: ``exact`` (the specialist's weights as they are stored, which say the same), or delta's matrices in eight
            bits or one bit a number with a scale for each row (``int8``, ``1bit``), or the largest hundredth of them
            (``topk``).

    Raises:
        FitError: the two architectures differ.

    Reference: Ilharco et al. 2023, "Editing models with task arithmetic"; Liu et al. 2024, "BitDelta".
    """
    vector = TaskVector(specialist.model, base)
    return task_vector(vector, specialist.domain.name, specialist.model.labels, store)
