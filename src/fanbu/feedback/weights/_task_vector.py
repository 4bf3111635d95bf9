"""The contribution of the weights family: a specialist's task vector, and its label rows as they are."""

from __future__ import annotations

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.merging.task_vector import TaskVector
from fanbu.model import Model
from fanbu.types import Context


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """delta = theta_specialist - theta_base for each tensor of the body; the domain's label rows as they are.

    Raises FitError where the two architectures differ (Ilharco et al. 2023, "Editing models with task arithmetic").
    """
    return Contribution(
        "weights", specialist.domain.name, "task_vector", TaskVector(specialist.model, base),
        meta={"labels": list(specialist.model.labels)},
    )  # fmt: skip
