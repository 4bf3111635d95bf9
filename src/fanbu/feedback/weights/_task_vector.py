"""The contribution of the weights family: a specialist's task vector, and its label rows as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.errors import FitError
from fanbu.model import Model
from fanbu.tensors import Tensors
from fanbu.types import Context

HEADS = ("classifier.out_proj.", "classifier.", "score.")


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """delta = theta_specialist - theta_base for each tensor of the body; the domain's label rows as they are.

    Raises FitError where the two architectures differ (Ilharco et al. 2023, "Editing models with task arithmetic").
    """
    return Contribution(
        "weights", specialist.domain.name, "task_vector", TaskVector(specialist.model, base),
        meta={"labels": list(specialist.model.labels)},
    )  # fmt: skip


class TaskVector(Mapping[str, Tensor]):
    """Lazy: each difference is computed when asked for. Head tensors have the prefix ``head:``."""

    def __init__(self, model: Model, base: Model) -> None:
        self.model, self.base = Tensors(model.path), Tensors(base.path)
        self.head = head_tensors(model)
        body, expected = set(self.model) - set(self.head), set(self.base) - set(head_tensors(base))
        different = [n for n in body & expected if self.model.specs[n].shape != self.base.specs[n].shape]
        if body != expected or different:
            raise FitError(
                "other-architecture", f"{model.path} is not of the base's architecture",
                allowed="the same tensors with the same shapes", got=sorted((body ^ expected) | set(different))[:6],
                remedy="feed this specialist back by predictions (distill), which needs nothing in common",
            )  # fmt: skip
        self.names = sorted(body | {f"head:{n}" for n in self.head})

    def __getitem__(self, name: str) -> Tensor:
        if name.startswith("head:"):
            return self.model[name.removeprefix("head:")]
        return self.model[name] - self.base[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def head_tensors(model: Model) -> list[str]:
    """Names of the tensors of the final layer of a classifier; none for a causal model."""
    if model.task != "text-classification":
        return []
    for prefix in HEADS:
        found = [n for n in (prefix + "weight", prefix + "bias") if n in model.tensors]
        if found:
            return found
    return []
