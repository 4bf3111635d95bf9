"""Contributions with differential privacy of a whole owner: brought down to a length, with noise on every number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fanbu.chance import Chance
from fanbu.contribution import Contribution
from fanbu.heads import Head
from fanbu.merging.sources import SUM
from fanbu.merging.summing import KNOWN, WEIGHT, Summands
from fanbu.merging.task_vector import HEAD, head_tensors, rows_of
from fanbu.model import Model
from fanbu.tensors import ByRows, Tensors, chunks, layout, read_rows, save_tensors


def noised(c: Contribution, base: Model, norm: float, deviation: float, out: Path) -> Contribution:
    """What an owner changed, ``shortened``, with N(0, deviation^2) on every number; written to the file ``out``.

    Noise is drawn from the system's entropy, not from the run's seed: who knows the seed could take it away again
    (``chance``).
    """
    sent = shortened(c, base, norm)
    save_tensors(out, Shaken(sent.tensors, deviation))
    return replace(sent, tensors=Tensors(out))


def shortened(c: Contribution, base: Model, norm: float) -> Contribution:
    """delta min(1, norm / |delta|), delta all that the owner changed as one vector, its label rows too: so what it adds
    is ``norm`` long at most, whatever its rows are.

    Reference: McMahan et al. 2018, "Learning differentially private recurrent language models" (differential privacy
    of a user).
    """
    changes = _Changes(c, base)
    squares = (
        float(changes.change(name, start, stop).square().sum())
        for name in changes.names
        for start, stop in chunks(changes.layout(name)[0])
    )
    length = math.sqrt(math.fsum(squares))
    changes.factor = min(1.0, norm / length) if length else 1.0
    kept = {name: c.meta[name] for name in ("labels", "rows", "steps") if name in c.meta}
    return Contribution(c.kind, c.domain, c.method, changes, meta={**kept, "form": SUM}, epsilon=c.epsilon)


class _Changes(ByRows):
    """What an owner changed, times ``factor``, in float32; label rows on top of the base's, or of zeros."""

    def __init__(self, c: Contribution, base: Model) -> None:
        labels = list(c.meta.get("labels") or ())
        self.numbers, self.factor = Summands(c, base, labels, 1.0), 1.0
        self.names = [n for n in self.numbers.names if n not in {WEIGHT, KNOWN}]
        self.start = _start(base, labels) if labels else {}

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.numbers.layout(name)[0], torch.float32

    def change(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one difference, in float64."""
        rows = self.numbers.rows(name, start, stop)
        return rows - self.start[name][start:stop] if name in self.start else rows

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        rows = self.change(name, start, stop) * self.factor
        return (rows + self.start[name][start:stop] if name in self.start else rows).float()


class Shaken(ByRows):
    """Numbers with noise on every one of them but weights: in a sum also where this owner has nothing to say, so that
    the noise of all owners together is as large there as elsewhere."""

    def __init__(self, numbers: Mapping[str, Tensor], deviation: float) -> None:
        self.numbers, self.deviation, self.names = numbers, deviation, list(numbers)
        self.chance = Chance()

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return layout(self.numbers, name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor, with other noise each time: they are asked for once."""
        rows = read_rows(self.numbers, name, start, stop)
        return rows if name in {WEIGHT, KNOWN} else rows + self.chance.normal(rows, self.deviation)


def _start(base: Model, labels: list[str]) -> dict[str, Tensor]:
    """The base's rows of these labels, by the names of what is sent."""
    names, known = head_tensors(base), rows_of(base)
    found = Head(tuple(labels), torch.zeros(len(labels), known.weight_lh.shape[1]), torch.zeros(len(labels)))
    for place, label in enumerate(labels):
        if label in known.labels:
            number = known.labels.index(label)
            found.weight_lh[place], found.bias_l[place] = known.weight_lh[number], known.bias_l[number]
    return dict(zip([HEAD + n for n in names], (found.weight_lh, found.bias_l), strict=False))
