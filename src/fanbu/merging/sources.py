"""Where the rows of a specialist's change come from: a task vector here, or a contribution that arrived."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.merging.task_vector import HEAD, TaskVector
from fanbu.tensors import read_rows


class Source(Protocol):
    """What one specialist changed."""

    @property
    def names(self) -> Collection[str]:
        """The tensors of the body that it speaks of."""

    def rows(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """Rows of its change in float32, on the device of the base's rows."""


def source_of(contribution: Contribution) -> Source:
    """The rows of a contribution, in whichever form it is."""
    if isinstance(contribution.tensors, TaskVector):
        return Local(contribution.tensors)
    return Plain(contribution.tensors)


@dataclass(frozen=True)
class Local:
    """A specialist's checkpoint beside the base: one difference for each row that is asked for."""

    vector: TaskVector

    @property
    def names(self) -> Collection[str]:
        """The tensors of the body."""
        return self.vector.body

    def rows(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """Specialist minus base."""
        return self.vector.rows(name, start, stop, base)


@dataclass(frozen=True)
class Plain:
    """Differences as they were sent."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def names(self) -> Collection[str]:
        """The tensors of the body."""
        return [n for n in self.tensors if not n.startswith(HEAD)]

    def rows(self, name: str, start: int, stop: int, base: Tensor) -> Tensor:
        """The rows as they are, copied: a rule may change them in place, and a mapped file would crash."""
        return read_rows(self.tensors, name, start, stop).to(base.device, torch.float32, copy=True)
