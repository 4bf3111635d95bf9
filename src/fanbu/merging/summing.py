"""What adds up: a contribution as numbers that need only be summed over owners, and their sum as one contribution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.merging.factors import Factored
from fanbu.merging.sources import SUM, Mean, source_of
from fanbu.merging.task_vector import HEAD, LABEL, Overlaid, body_shapes
from fanbu.model import Model
from fanbu.tensors import ByRows, Tensors, layout, read_rows

CONTROL = "control:"  # before a tensor, or a label's row: an owner's control variate of it
WEIGHT, KNOWN = "weight", "known"  # an owner's weight [1]; and of each label, where the owner knows it [labels]
TOGETHER = "together"  # the domain that the sum of several owners stands for
_BY_LABEL = ("sum", "count")  # statistics with a row for each label
_KEPT = ("form", "leaders", "turned")  # what absorb reads of meta, the same of all owners


class Summands(ByRows):
    """w x, for each tensor x of a contribution, in float64, and w: what all owners send has the same names and shapes.

    Changes of weights are differences to the base, whatever they crossed as; label rows have a place for each of
    ``labels``, those of all owners, with zeros where the owner knows it not.
    """

    def __init__(self, c: Contribution, base: Model, labels: Sequence[str], weight: float) -> None:
        self.c, self.weight, self.labels = c, weight, tuple(labels)
        self.base = Tensors(base.path)
        self.own = [self.labels.index(label) for label in c.meta.get("labels") or ()]
        body = body_shapes(base)
        self.source = None
        if c.kind in {"weights", "updates"}:
            self.source = source_of(replace(c, tensors=Overlaid(c.tensors, CONTROL, {})), body)
        changed = [n for n in body if self.source and n in self.source.names and self._changes(n)]
        rows = [n for n in c.tensors if n.startswith(HEAD) or (self.source is None and n in _BY_LABEL)]
        controls = [n for n in c.tensors if n.startswith(CONTROL) or (self.source is None and n not in rows)]
        by_label = sorted(n for n in controls if n.startswith(CONTROL + LABEL))
        self.label_shape = layout(c.tensors, by_label[0])[0] if by_label else ()
        self.shapes = {n: body[n] for n in changed}
        self.shapes |= {n: layout(c.tensors, n)[0] for n in controls if n not in by_label}
        self.shapes |= {n: (len(labels), *layout(c.tensors, n)[0][1:]) for n in rows}
        if by_label:
            self.shapes |= {CONTROL + LABEL + label: self.label_shape for label in labels}
        self.shapes |= {WEIGHT: (1,), **({KNOWN: (len(labels),)} if labels else {})}
        self.names = sorted(self.shapes)

    def _changes(self, name: str) -> bool:
        return not isinstance(self.source, (Factored, Mean)) or self.source.touches(name)

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.shapes[name], torch.float64

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        found = self._rows(name, start, stop).double()
        return found if name in {WEIGHT, KNOWN} else found * self.weight

    def _rows(self, name: str, start: int, stop: int) -> Tensor:
        if name in {WEIGHT, KNOWN}:
            known = torch.zeros(self.shapes[name], dtype=torch.float64)
            known[self.own if name == KNOWN else [0]] = self.weight
            return known[start:stop]
        if name.startswith(HEAD) or (self.source is None and name in _BY_LABEL):
            spread = torch.zeros(self.shapes[name])
            spread[self.own] = self.c.tensors[name].float()
            return spread[start:stop]
        if self.source and not name.startswith(CONTROL):
            base = self.base.rows(name, start, stop).float()
            into = torch.empty_like(base)
            self.source.rows(name, start, stop, base, into)
            return into
        if name not in self.c.tensors:  # the control variate of a label that the owner does not know
            return torch.zeros(self.shapes[name])[start:stop]
        return read_rows(self.c.tensors, name, start, stop)


def meta_of(c: Contribution) -> dict[str, Any]:
    """What of meta crosses with masked numbers: the same of all owners."""
    return {name: c.meta[name] for name in _KEPT if name in c.meta}


def as_one(
    sums: Mapping[str, Tensor], labels: Sequence[str], meta: Mapping[str, Any], sent: Contribution,
    owners: Sequence[str], scale: float,
) -> Contribution:  # fmt: skip
    """The weighted mean over owners as one contribution, which a linear method takes in their place.

    ``sums`` are those of ``Summands``; of ``labels`` some may be of nobody who was heard. A label's row, and its
    control variate, is the mean over those who know it. ``sent`` says kind and method, ``scale`` what weights were
    divided by.
    """
    weight = float(sums[WEIGHT][0])
    known = sums[KNOWN].double() if labels else torch.zeros(0)
    heard = [i for i, w in enumerate(known.tolist()) if w > 0]
    told = {**meta, "rows": min(10**7, max(1, round(weight * scale))), "owners": len(owners), "of": sorted(owners)}
    if labels:
        told["labels"] = [labels[i] for i in heard]
    if sent.kind in {"weights", "updates"}:
        told["form"] = SUM
    tensors = _Mean(sums, labels, heard, known, weight)
    return Contribution(sent.kind, TOGETHER, sent.method, tensors, meta=told, owners=len(owners))


class _Mean(ByRows):
    """Sums over weights, in float32."""

    def __init__(
        self, sums: Mapping[str, Tensor], labels: Sequence[str], heard: Sequence[int], known: Tensor, weight: float
    ) -> None:
        self.sums, self.heard, self.known, self.weight = sums, list(heard), known, weight
        self.place = {CONTROL + LABEL + label: i for i, label in enumerate(labels)}
        gone = {n for n, i in self.place.items() if i not in self.heard}
        self.names = sorted(set(sums) - gone - {WEIGHT, KNOWN})

    def _by_label(self, name: str) -> bool:
        return name.startswith(HEAD) or name in _BY_LABEL

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        shape, _ = layout(self.sums, name)
        return (len(self.heard), *shape[1:]) if self._by_label(name) else shape, torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        if not self._by_label(name):
            weight = float(self.known[self.place[name]]) if name in self.place else self.weight
            return (read_rows(self.sums, name, start, stop).double() / weight).float()
        rows = self.sums[name].double()[self.heard]
        weights = self.known[self.heard] if name.startswith(HEAD) else torch.full((len(rows),), self.weight).double()
        return (rows / weights.view(-1, *[1] * (rows.ndim - 1))).float()[start:stop]
