"""Second moments that cross instead of weights: sums, from which the centre solves for the merged matrices."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

import torch
from torch import Tensor

from fanbu.merging.task_vector import TaskVector
from fanbu.tensors import read_rows

FORM = "moments"  # meta["form"] of a contribution whose tensors have the names below
GRAM, MOMENT, FISHER = "gram:", "moment:", "fisher:"


class Moments(Mapping[str, Tensor]):
    """``gram:NAME`` G and ``moment:NAME`` delta G for matrices, delta as it is for all else; each made when asked for.

    ``leaders`` names the Gram matrix of each matrix: those that are given the same inputs share one.
    ``turned`` names matrices that are stored input first: their moment is delta^T G.
    """

    def __init__(
        self, vector: TaskVector, grams: Mapping[str, Tensor], leaders: Mapping[str, str], turned: Collection[str]
    ) -> None:
        self.vector, self.grams, self.leaders, self.turned = vector, grams, leaders, turned
        plain = [n for n in vector.names if n not in leaders]
        self.names = sorted([*plain, *(GRAM + n for n in grams), *(MOMENT + n for n in leaders)])

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        if name.startswith(GRAM):
            return tuple(self.grams[name.removeprefix(GRAM)].shape), torch.float32
        shape, dtype = self.vector.layout(name.removeprefix(MOMENT))
        return shape[::-1] if name.removeprefix(MOMENT) in self.turned and name.startswith(MOMENT) else shape, dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        if name.startswith(GRAM):
            return self.grams[name.removeprefix(GRAM)][start:stop]
        if not name.startswith(MOMENT):
            return self.vector.rows(name, start, stop)
        own = name.removeprefix(MOMENT)
        delta = self.vector[own].T[start:stop] if own in self.turned else self.vector.rows(own, start, stop)
        return delta @ self.grams[self.leaders[own]].to(delta.device)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        shape, _ = self.layout(name)
        return self.rows(name, 0, shape[0] if shape else 1).reshape(shape).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Beside:
    """A Source over such a contribution: its plain differences; nothing where moments speak instead."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        moved = {n.removeprefix(MOMENT) for n in tensors if n.startswith(MOMENT)}
        self.names = moved | {n for n in tensors if ":" not in n}

    def rows(self, name: str, start: int, stop: int, base: Tensor, into: Tensor) -> None:
        """The rows as they are, or zeros."""
        if name in self.tensors:
            into.copy_(read_rows(self.tensors, name, start, stop))
        else:
            into.zero_()


def solve(gram: Tensor, moment: Tensor, ridge: float) -> Tensor:
    """delta = M (G + ridge * mean(diag G) I)^-1 by Cholesky in float64; M [out, in], G [in, in]; float32."""
    g = gram.double()
    g.diagonal().add_(ridge * float(g.diagonal().mean()) + 1e-30)
    return torch.cholesky_solve(moment.double().T, torch.linalg.cholesky(g)).T.float().contiguous()
