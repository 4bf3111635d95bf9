"""Task vectors kept sparse: of each matrix the largest hundredth of its numbers, with their places."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import FitError
from fanbu.merging.task_vector import packs
from fanbu.tensors import ByRows, layout, read_rows

SPARSE = "sparse"  # meta["form"] of a contribution whose tensors have the names below
PLACES, VALUES = "places:", "values:"
_SHARE = 100


class Sparse(ByRows):
    """``places:NAME`` [k] (in the matrix as one row, ascending) and ``values:NAME`` float32 [k]; else as it is."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors
        self.names = sorted(
            part + n if part else n for n in tensors for part in ((PLACES, VALUES) if packs(tensors, n) else ("",))
        )
        self._largest = lru_cache(1)(self._find)

    def _find(self, name: str) -> tuple[Tensor, Tensor]:
        flat = self.tensors[name].float().reshape(-1)
        places = flat.abs().topk(_count(len(flat)), sorted=False).indices.sort().values
        return places.to(_kind(len(flat))), flat[places]

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        own = name.removeprefix(PLACES).removeprefix(VALUES)
        shape, dtype = layout(self.tensors, own)
        if own == name:
            return shape, dtype
        size = math.prod(shape)
        return (_count(size),), _kind(size) if name.startswith(PLACES) else torch.float32

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        own = name.removeprefix(PLACES).removeprefix(VALUES)
        if own == name:
            return read_rows(self.tensors, own, start, stop)
        return self._largest(own)[not name.startswith(PLACES)][start:stop]


class Scattered:
    """A Source over a sparse contribution. Raises FitError where places and values do not fit the base's tensors."""

    def __init__(self, contribution: Contribution, body: Mapping[str, tuple[int, ...]]) -> None:
        self.tensors, self.body = contribution.tensors, body
        self.sparse = {n.removeprefix(PLACES) for n in self.tensors if n.startswith(PLACES)}
        self.names = self.sparse | {n for n in self.tensors if ":" not in n}
        self._read = lru_cache(16)(self._both)
        wrong = sorted(n for n in self.sparse & body.keys() if not self._fits(n))
        if wrong:
            raise FitError(
                "other-architecture", f"{contribution.domain} sent sparse tensors that do not fit the base's",
                allowed="ascending places within the base's matrix, and a value for each", got=wrong[:6],
                remedy="leave this specialist out, or use distill",
            )  # fmt: skip

    def _fits(self, name: str) -> bool:
        size = math.prod(self.body[name])
        if VALUES + name not in self.tensors or layout(self.tensors, PLACES + name)[1] != _kind(size):
            return False
        (places,), (values,) = (layout(self.tensors, p + name)[:1] for p in (PLACES, VALUES))
        if len(places) != 1 or places != values or places[0] > size:
            return False
        found, _ = self._read(name)
        inside = not len(found) or (int(found[0]) >= 0 and int(found[-1]) < size)
        return inside and bool((found[1:] > found[:-1]).all())

    def _both(self, name: str) -> tuple[Tensor, Tensor]:
        count = layout(self.tensors, PLACES + name)[0][0]
        places, values = (read_rows(self.tensors, p + name, 0, count) for p in (PLACES, VALUES))
        return places.long(), values.float()

    def rows(self, name: str, start: int, stop: int, base: Tensor, into: Tensor) -> None:
        """Rows of the change."""
        if name not in self.sparse:
            into.copy_(read_rows(self.tensors, name, start, stop))
            return
        places, values = self._read(name)
        width = math.prod(self.body[name][1:])
        first, last = torch.searchsorted(places, torch.tensor([start * width, stop * width])).tolist()
        flat = torch.zeros((stop - start) * width)
        flat[places[first:last] - start * width] = values[first:last]
        into.copy_(flat.reshape(into.shape))


def _count(size: int) -> int:
    return -(-size // _SHARE)


def _kind(size: int) -> torch.dtype:
    return torch.int32 if size < 2**31 else torch.int64
