"""A task vector: what a specialist's weights are beyond the base's, row by row, with its label rows as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from fanbu.errors import FitError
from fanbu.heads import Head
from fanbu.model import Model
from fanbu.tensors import Tensors, borrow_rows, layout, read_rows
from fanbu.types import CLASSIFYING

HEADS = ("classifier.out_proj.", "classifier.", "score.")
HEAD = "head:"
LABEL = "label:"  # before a label: the name of its row with its bias
FORM = "weights"  # meta["form"] of a contribution that holds a specialist's own weights, as they are stored


class TaskVector(Mapping[str, Tensor]):
    """delta = theta_specialist - theta_base in float32, each row computed when asked for.

    Head tensors have the prefix ``head:`` and are the specialist's own. Tensors of whole numbers (positions) must be
    the base's own and are left out. Raises FitError, with names, where tensors are missing, extra or of other shapes.

    Reference: Ilharco et al. 2023, "Editing models with task arithmetic".
    """

    def __init__(self, model: Model, base: Model) -> None:
        self.model, self.base = Tensors(model.path), Tensors(base.path)
        head, old = head_tensors(model), set(head_tensors(base))
        body, expected = set(self.model) - set(head), set(self.base) - old
        self._check(model, body, expected)
        numbers = {n for n in expected if not self.base.specs[n].torch_dtype.is_floating_point}
        changed = [n for n in numbers if not torch.equal(self.model[n], self.base[n])]
        if changed:
            raise _other(model, "its tensors of whole numbers are not the base's", changed)
        self.body = body - numbers
        self.names = sorted(self.body | {HEAD + n for n in head})

    def _check(self, model: Model, body: set[str], expected: set[str]) -> None:
        missing, extra = sorted(expected - body), sorted(body - expected)
        if missing or extra:
            why = f"it lacks {_some(missing)} and has {_some(extra)} that the base has not"
            raise _other(model, why, [*missing, *extra])
        specs, old = self.model.specs, self.base.specs
        shapes = [f"{n} {specs[n].shape} for {old[n].shape}" for n in sorted(body) if specs[n].shape != old[n].shape]
        if shapes:
            raise _other(model, "tensors have other shapes", shapes)
        kinds = [
            n for n in body if specs[n].torch_dtype.is_floating_point != old[n].torch_dtype.is_floating_point
        ]  # fmt: skip
        if kinds:
            raise _other(model, "tensors are whole numbers (quantised?) where the base has real ones", kinds)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one difference."""
        if name.startswith(HEAD):
            return self.model.rows(name.removeprefix(HEAD), start, stop)
        return self.model.rows(name, start, stop).float() - self.base.rows(name, start, stop).float()

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        spec = self.model.specs[name.removeprefix(HEAD)]
        return spec.shape, spec.torch_dtype if name.startswith(HEAD) else torch.float32

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        shape, _ = self.layout(name)
        return self.rows(name, 0, shape[0] if shape else 1).reshape(shape).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Weights(Mapping[str, Tensor]):
    """What a task vector is made of: the specialist's own tensors, under the same names.

    This is what crosses: it says the same as the differences, exactly, and has half their size where weights are
    stored in sixteen bits.
    """

    def __init__(self, vector: TaskVector) -> None:
        self.vector, self.tensors = vector, vector.model

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor."""
        return self.tensors.rows(name.removeprefix(HEAD), start, stop)

    def borrowed(self, name: str, start: int, stop: int) -> Tensor:
        """As ``Tensors.borrowed``."""
        return self.tensors.borrowed(name.removeprefix(HEAD), start, stop)

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        spec = self.tensors.specs[name.removeprefix(HEAD)]
        return spec.shape, spec.torch_dtype

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.vector.names:
            raise KeyError(name)
        return self.tensors[name.removeprefix(HEAD)]

    def __iter__(self) -> Iterator[str]:
        return iter(self.vector.names)

    def __len__(self) -> int:
        return len(self.vector.names)


class Overlaid(Mapping[str, Tensor]):
    """Tensors, without those whose names begin so, and with ``more``."""

    def __init__(self, tensors: Mapping[str, Tensor], without: str, more: Mapping[str, Tensor]) -> None:
        self.body, self.more = tensors, more
        self.names = [*(n for n in tensors if not n.startswith(without)), *more]

    def _of(self, name: str) -> Mapping[str, Tensor]:
        return self.more if name in self.more else self.body

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        return read_rows(self._of(name), name, start, stop)

    def borrowed(self, name: str, start: int, stop: int) -> Tensor:
        """As ``Tensors.borrowed``."""
        return borrow_rows(self._of(name), name, start, stop)

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return layout(self._of(name), name)

    def __getitem__(self, name: str) -> Tensor:
        return self._of(name)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def head_tensors(model: Model) -> list[str]:
    """Names of the tensors of the final layer of a classifier; none for a causal model."""
    if model.task not in CLASSIFYING:
        return []
    for prefix in HEADS:
        found = [n for n in (prefix + "weight", prefix + "bias") if n in model.tensors]
        if found:
            return found
    return []


def rows_of(base: Model) -> Head:
    """The base's label rows in float32; a head without bias has zeros."""
    names, tensors = head_tensors(base), Tensors(base.path)
    bias = tensors[names[1]] if len(names) > 1 else torch.zeros(len(base.labels))
    return Head(tuple(base.labels), tensors[names[0]].float(), bias.float())


def packs(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a tensor is one that is packed where a task vector is: a matrix, no vector and no label rows."""
    return not name.startswith(HEAD) and len(layout(tensors, name)[0]) > 1


def body_shapes(base: Model) -> dict[str, tuple[int, ...]]:
    """Shapes by name of all tensors of real numbers beside the label head."""
    heads = set(head_tensors(base))
    specs = Tensors(base.path).specs.items()
    return {n: s.shape for n, s in specs if n not in heads and s.torch_dtype.is_floating_point}


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else "nothing"


def _other(model: Model, why: str, names: list[str]) -> FitError:
    return FitError(
        "other-architecture", f"{model.path} is not of the base's architecture: {why}",
        allowed="the same tensors with the same shapes", got=sorted(names)[:6],
        remedy="feed this specialist back by predictions (distill), which needs nothing in common",
    )  # fmt: skip
