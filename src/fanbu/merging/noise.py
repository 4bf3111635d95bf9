"""Contributions with differential privacy of a whole owner: brought down to a length, with noise on every number."""

from __future__ import annotations

import math
from collections.abc import Iterator
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
from fanbu.tensors import ByRows, Tensors, chunks, save_tensors


def noised(c: Contribution, base: Model, norm: float, deviation: float, out: Path) -> Contribution:
    """delta min(1, norm / |delta|) + N(0, deviation^2), delta all that the owner changed as one vector, its label rows
    too; written to the file ``out``.

    So what an owner adds is ``norm`` long at most, whatever its rows are. Noise is drawn from the system's entropy, not
    from the run's seed: who knows the seed could take it away again (``chance``).

    Reference: McMahan et al. 2018, "Learning differentially private recurrent language models" (differential privacy
    of a user).
    """
    changes = _Changes(c, base)
    squares = (float(part.square().sum()) for name in changes.names for part in changes.parts(name))
    length = math.sqrt(math.fsum(squares))
    factor = min(1.0, norm / length) if length else 1.0
    save_tensors(out, _Noised(changes, factor, deviation))
    kept = {name: c.meta[name] for name in ("labels", "rows", "steps") if name in c.meta}
    return Contribution(c.kind, c.domain, c.method, Tensors(out), meta={**kept, "form": SUM}, epsilon=c.epsilon)


class _Changes(ByRows):
    """What an owner changed, in float64; of label rows the difference to the base's, zeros where it knows none."""

    def __init__(self, c: Contribution, base: Model) -> None:
        labels = list(c.meta.get("labels") or ())
        self.numbers = Summands(c, base, labels, 1.0)
        self.names = [n for n in self.numbers.names if n not in {WEIGHT, KNOWN}]
        self.start = _start(base, labels) if labels else {}

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.numbers.layout(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        rows = self.numbers.rows(name, start, stop)
        return rows - self.start[name][start:stop] if name in self.start else rows

    def parts(self, name: str) -> Iterator[Tensor]:
        """All rows of one tensor, some at a time."""
        return (self.rows(name, start, stop) for start, stop in chunks(self.layout(name)[0]))


class _Noised(ByRows):
    """The same, shortened, with noise, in float32; label rows on top of the base's."""

    def __init__(self, changes: _Changes, factor: float, deviation: float) -> None:
        self.changes, self.factor, self.deviation = changes, factor, deviation
        self.names = changes.names
        self.chance = Chance()

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.changes.layout(name)[0], torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor, with other noise each time: they are asked for once."""
        rows = self.changes.rows(name, start, stop) * self.factor
        rows += self.chance.normal(rows, self.deviation)
        return (rows + self.changes.start[name][start:stop] if name in self.changes.start else rows).float()


class Shaken(ByRows):
    """Numbers that are to be summed, with noise on every one of them but the weights: also where this owner has nothing
    to say, so that the sum of all owners' noise is as large there as elsewhere."""

    def __init__(self, numbers: ByRows, deviation: float) -> None:
        self.numbers, self.deviation, self.names = numbers, deviation, numbers.names
        self.chance = Chance()

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.numbers.layout(name)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor, with other noise each time: they are asked for once."""
        rows = self.numbers.rows(name, start, stop)
        if name in {WEIGHT, KNOWN}:
            return rows
        return rows + self.chance.normal(rows, self.deviation)


def _start(base: Model, labels: list[str]) -> dict[str, Tensor]:
    """The base's rows of these labels, by the names of what is sent."""
    names, known = head_tensors(base), rows_of(base)
    found = Head(tuple(labels), torch.zeros(len(labels), known.weight_lh.shape[1]), torch.zeros(len(labels)))
    for place, label in enumerate(labels):
        if label in known.labels:
            number = known.labels.index(label)
            found.weight_lh[place], found.bias_l[place] = known.weight_lh[number], known.bias_l[number]
    return dict(zip([HEAD + n for n in names], (found.weight_lh, found.bias_l), strict=False))
