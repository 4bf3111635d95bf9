"""Exact order statistics of tensors that are never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_STRIDE = 61  # prime, so that it is in step with no layout
_SMALL = 2**16

Pieces = Callable[[], Iterable[Sequence[Tensor]]]


def kth_largest(pieces: Pieces, counts: Sequence[tuple[int, int]], total: int) -> list[float]:
    """For each (which, k) of ``counts``, the k-th largest number of the tensors ``which`` of all pieces; exact.

    ``pieces()`` gives, each time it is called, the same rows of several tensors of ``total`` numbers in all, one after
    the other. k = 0 gives infinity. A sample gives a bracket that holds the answer with near certainty; one pass
    counts what lies above it and keeps what lies within, which is searched exactly. Where the bracket misses, it is
    widened and the pass repeated (after Floyd and Rivest 1975, "Expected time bounds for selection").
    """
    wanted = [_Search(which, k) for which, k in counts]
    open_ = [s for s in wanted if s.k > 0]
    for s in wanted:
        s.found = float("inf") if s.k <= 0 else None
    width = 4.0
    while open_:
        _bracket(pieces, open_, total, width)
        for piece in pieces():
            for search in open_:
                search.take(piece[search.which])
        for search in open_:
            search.settle()
        open_ = [s for s in open_ if s.found is None]
        width *= 4
    return [float(s.found) for s in wanted if s.found is not None]


@dataclass
class _Search:
    which: int
    k: int
    low: float = 0.0
    high: float = 0.0
    above: int = 0
    at_high: int = 0
    at_low: int = 0
    within: list[Tensor] = field(default_factory=list)
    found: float | None = None

    def take(self, values: Tensor) -> None:
        flat = values.reshape(-1)
        near = flat[flat >= self.low]
        self.above += int((near > self.high).sum())
        self.at_high += int((near == self.high).sum())
        if self.low < self.high:
            self.at_low += int((near == self.low).sum())
            self.within.append(near[(near > self.low) & (near < self.high)])

    def settle(self) -> None:
        rest = self.k - self.above
        inner = torch.cat(self.within) if self.within else torch.empty(0)
        if rest <= 0:
            pass
        elif rest <= self.at_high:
            self.found = self.high
        elif rest <= self.at_high + inner.numel():
            place = inner.numel() - (rest - self.at_high) + 1
            self.found = float(inner.kthvalue(place).values)
        elif rest <= self.at_high + inner.numel() + self.at_low:
            self.found = self.low
        self.above, self.at_high, self.at_low, self.within = 0, 0, 0, []


def _bracket(pieces: Pieces, searches: Sequence[_Search], total: int, width: float) -> None:
    """Sets low and high of each search from every 61st number (from all of them where there are few)."""
    stride = _STRIDE if total > _SMALL else 1
    needed = {s.which for s in searches}
    samples: dict[int, list[Tensor]] = {which: [] for which in needed}
    for piece in pieces():
        for which in needed:
            samples[which].append(piece[which].reshape(-1)[::stride].clone())
    ordered = {which: torch.cat(sample).sort(descending=True).values for which, sample in samples.items()}
    for search in searches:
        values = ordered[search.which]
        share = search.k / max(total, 1)
        middle = share * values.numel()
        slack = width * (max(share * (1 - share), 0) * values.numel()) ** 0.5 + (width if stride > 1 else 1)
        first, last = int(middle - slack), int(middle + slack)
        search.high = float("inf") if first < 0 and stride > 1 else float(values[max(first, 0)])
        search.low = float(values[last]) if last < values.numel() else float("-inf")
