"""Exact order statistics of tensors that are never held whole."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

_SHARE, _STRIDE = 16, 7  # of the rows, and of their numbers, that a sample takes
_SMALL = 2**18
_FEW = 2**20

# the same rows of several tensors, one after the other; with a share, only one row in so many
Pieces = Callable[[int], Iterable[Sequence[Tensor]]]


def kth_largest(pieces: Pieces, counts: Sequence[tuple[int, int]], total: int) -> list[float]:
    """For each (which, k) of ``counts``, the k-th largest number of the tensors ``which`` of all pieces; exact.

    ``pieces(share)`` gives, each time it is called, the same rows of several tensors of ``total`` numbers in all.
    k = 0 gives infinity. A sample gives a bracket that holds the answer with near certainty; one pass counts what
    lies above it and keeps what lies within (equal numbers together), which is searched exactly. Where the bracket
    misses, it is widened and the pass repeated (after Floyd and Rivest 1975, "Expected time bounds for selection").
    """
    searches = [_Search(which, k) for which, k in counts]
    width = 4.0
    while open_ := [s for s in searches if s.found is None]:
        _bracket(pieces, open_, total, width)
        for piece in pieces(1):
            for search in open_:
                search.take(piece[search.which])
        for search in open_:
            search.settle()
        width *= 8
    return [s.found for s in searches if s.found is not None]


class _Search:
    """One number that is looked for; ``found`` once it is known."""

    def __init__(self, which: int, k: int) -> None:
        self.which, self.k = which, k
        self.found = float("inf") if k <= 0 else None
        self.look(0.0, 0.0)

    def look(self, low: float, high: float) -> None:
        """The next pass looks between these."""
        self.low, self.high, self.above, self.many = low, high, 0, 0
        self.within: list[Tensor] = []
        self.packed = (torch.empty(0), torch.empty(0, dtype=torch.long))

    def take(self, values: Tensor) -> None:
        flat = values.reshape(-1)
        self.above += int(torch.count_nonzero(flat > self.high))
        inner = flat[(flat >= self.low) & (flat <= self.high)].cpu()
        self.within.append(inner)
        self.many += inner.numel()
        if self.many > _FEW:
            self.pack()

    def pack(self) -> None:
        """Equal numbers together, with how often they occur: stored weights have few distinct values."""
        values = torch.cat([self.packed[0], *self.within])
        counts = torch.cat([self.packed[1], *(torch.ones(w.numel(), dtype=torch.long) for w in self.within)])
        distinct, place = values.unique(return_inverse=True)
        self.packed = distinct, torch.zeros(distinct.numel(), dtype=torch.long).index_add_(0, place, counts)
        self.within, self.many = [], 0

    def settle(self) -> None:
        self.pack()
        values, counts = (t.flip(0) for t in self.packed)
        rest, reached = self.k - self.above, counts.cumsum(0)
        if 0 < rest <= int(counts.sum()):
            self.found = float(values[int(torch.searchsorted(reached, rest))])


def _bracket(pieces: Pieces, searches: Sequence[_Search], total: int, width: float) -> None:
    """Sets the bracket of each search from a sample (from everything where that is little)."""
    share, stride = (_SHARE, _STRIDE) if total > _SMALL else (1, 1)
    samples: dict[int, list[Tensor]] = {s.which: [] for s in searches}
    for piece in pieces(share):
        for which, sample in samples.items():
            sample.append(piece[which].reshape(-1)[::stride].clone())
    ordered = {which: torch.cat(sample).sort(descending=True).values for which, sample in samples.items()}
    for search in searches:
        values = ordered[search.which]
        part = search.k / total
        slack = width * (1 + (part * (1 - part) * values.numel()) ** 0.5)
        first, last = int(part * values.numel() - slack), int(part * values.numel() + slack)
        high = float(values[first]) if first >= 0 else float("inf")
        low = float(values[last]) if last < values.numel() else float("-inf")
        search.look(low, high)
