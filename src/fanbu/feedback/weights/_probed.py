"""The contribution of methods that merge weights with the help of a probe set: a task vector that names the set."""

from __future__ import annotations

from dataclasses import replace

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.weights._task_vector import contribute as task_vector
from fanbu.model import Model
from fanbu.types import Context


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """The specialist's weights (see ``_task_vector``), and which probe set the centre will look at them with.

    Raises FitError where the two architectures differ.
    """
    sent = task_vector(specialist, base, context)
    return replace(sent, meta={**sent.meta, "probe": context.probe.digest})
