"""Where the rows of a specialist's change come from: a task vector here, or a contribution that arrived."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import FitError
from fanbu.merging.factors import FORM, Factored, Shapes
from fanbu.merging.least_squares import FORM as MOMENTS
from fanbu.merging.least_squares import Beside
from fanbu.merging.sparse import SPARSE, Scattered
from fanbu.merging.store import PACKED, Unpacked
from fanbu.merging.task_vector import FORM as WEIGHTS
from fanbu.merging.task_vector import HEAD
from fanbu.tensors import borrow_rows, layout

SUM = "sum"  # meta["form"] of what stands for several owners: the mean of their changes, where any changed something


class Source(Protocol):
    """What one specialist changed."""

    @property
    def names(self) -> Collection[str]:
        """The tensors of the body that it speaks of."""

    def rows(self, name: str, start: int, stop: int, base: Tensor, into: Tensor) -> None:
        """Puts rows of its change into a float32 tensor on the device of the base's rows."""


def source_of(contribution: Contribution, body: Shapes) -> Source:
    """The rows of a contribution, in whichever form it is; ``body`` has the shapes of the base's tensors.

    Raises FitError where its tensors have other shapes.
    """
    if contribution.meta.get("form") == FORM:
        return Factored(contribution.tensors, body, contribution.domain)
    if contribution.meta.get("form") == MOMENTS:
        return Beside(contribution.tensors)
    if contribution.meta.get("form") == PACKED:
        return Unpacked(contribution, body)
    if contribution.meta.get("form") == SPARSE:
        return Scattered(contribution, body)
    own = Own if contribution.meta.get("form") == WEIGHTS else Plain
    plain = Mean(contribution.tensors, body) if contribution.meta.get("form") == SUM else own(contribution.tensors)
    wrong = [n for n in plain.tensors if n in body and layout(plain.tensors, n)[0] != body[n]]
    if wrong:
        raise FitError(
            "other-architecture", f"{contribution.domain} sent tensors of other shapes than the base has",
            allowed=[f"{n} {body[n]}" for n in wrong[:4]],
            got=[f"{n} {layout(plain.tensors, n)[0]}" for n in wrong[:4]],
            remedy="leave this specialist out, or use distill",
        )  # fmt: skip
    return plain


@dataclass(frozen=True)
class Plain:
    """Differences as they were sent."""

    tensors: Mapping[str, Tensor]

    @cached_property
    def names(self) -> Collection[str]:
        """The tensors of the body."""
        return [n for n in self.tensors if not n.startswith(HEAD)]

    def rows(self, name: str, start: int, stop: int, base: Tensor, into: Tensor) -> None:
        """The rows as they are."""
        into.copy_(borrow_rows(self.tensors, name, start, stop))


@dataclass(frozen=True)
class Mean(Plain):
    """The mean of several owners' differences; tensors that are not there did not change."""

    body: Shapes

    @cached_property
    def names(self) -> Collection[str]:
        """All tensors of the base's body."""
        return self.body.keys()

    def touches(self, name: str) -> bool:
        """Whether the tensor changed."""
        return name in self.tensors

    def rows(self, name: str, start: int, stop: int, base: Tensor, into: Tensor) -> None:
        """The rows as they are, or zeros."""
        if name in self.tensors:
            super().rows(name, start, stop, base, into)
        else:
            into.zero_()


@dataclass(frozen=True)
class Own(Plain):
    """A specialist's own weights, here or as they arrived."""

    def rows(self, name: str, start: int, stop: int, base: Tensor, into: Tensor) -> None:
        """Specialist minus base."""
        into.copy_(borrow_rows(self.tensors, name, start, stop)).sub_(base)

    def whole(self, name: str, start: int, stop: int, into: Tensor) -> Tensor:
        """The rows themselves, put into a float32 tensor."""
        return into.copy_(borrow_rows(self.tensors, name, start, stop))

    def bits(self, name: str) -> int:
        """Of a number, as it is stored."""
        return 8 * layout(self.tensors, name)[1].itemsize
