"""Error feedback: what packing an update left out is added to the owner's next one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.merging.sources import source_of
from fanbu.merging.store import Store, stored
from fanbu.merging.task_vector import TaskVector, body_shapes, packs
from fanbu.model import Model
from fanbu.tensors import ByRows, Tensors, layout, read_rows, save_tensors
from fanbu.types import Inner

_FILE = "left.safetensors"


def with_feedback(
    vector: TaskVector, base: Model, domain: str, labels: Sequence[str], store: Store, inner: Inner
) -> Contribution:
    """Sends pack(delta + e) and keeps e = delta + e - pack(delta + e) of each matrix, at the owner; e is 0 at first.

    Reference: Karimireddy et al. 2019, "Error feedback fixes SignSGD and other gradient compression schemes".
    """
    whole = _Sum(vector, Tensors(inner.before / _FILE) if inner.before and (inner.before / _FILE).exists() else None)
    sent = stored(whole, domain, labels, store)
    if inner.after:
        inner.after.mkdir(parents=True, exist_ok=True)
        save_tensors(inner.after / _FILE, _Left(whole, sent, body_shapes(base)))
    return sent


class _Sum(ByRows):
    """delta + e, row by row."""

    def __init__(self, vector: TaskVector, left: Tensors | None) -> None:
        self.vector, self.left, self.names = vector, left, vector.names

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.vector.layout(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        rows = self.vector.rows(name, start, stop)
        known = self.left is not None and name in self.left
        return rows + self.left.rows(name, start, stop) if self.left and known else rows


class _Left(ByRows):
    """e of each matrix, row by row."""

    def __init__(self, whole: _Sum, sent: Contribution, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.whole, self.source = whole, source_of(sent, shapes)
        self.names = [n for n in shapes if packs(whole, n)]

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return layout(self.whole, name)[0], torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        exact = read_rows(self.whole, name, start, stop).float()
        sent = torch.empty_like(exact)
        self.source.rows(name, start, stop, exact, sent)
        return exact - sent
