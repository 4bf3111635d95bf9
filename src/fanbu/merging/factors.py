"""Changes that cross as low-rank factors: rows are computed when asked for, and no difference is ever held whole."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import lru_cache

import torch
from torch import Tensor

from fanbu.errors import FitError
from fanbu.merging.task_vector import HEAD
from fanbu.tensors import layout, read_rows

FORM = "factors"  # meta["form"] of a contribution whose tensors have the names below
A, B, SCALE, MAGNITUDE, NEW = "a:", "b:", "scale:", "m:", "new:"
Shapes = Mapping[str, tuple[int, ...]]


class Factored:
    """A Source over ``b:NAME`` [out, r], ``a:NAME`` [r, in] and ``scale:NAME`` [], for each tensor that changed.

    delta = scale b a; with ``m:NAME`` [out] it is m_i (w_i + scale b_i a) / |w_i + scale b_i a| - w_i for each row i
    of the base's w (DoRA). ``new:NAME`` is a tensor that was replaced; all others are unchanged. ``body`` has the
    shapes of the base's tensors.

    Raises FitError, with names, where factors are incomplete, or do not fit the base.

    Reference: Hu et al. 2022, "LoRA"; Liu et al. 2024, "DoRA".
    """

    def __init__(self, tensors: Mapping[str, Tensor], body: Shapes, domain: str) -> None:
        self.tensors, self.body = tensors, body
        found: dict[str, set[str]] = {kind: set() for kind in (A, B, SCALE, MAGNITUDE, NEW)}
        for name in tensors:
            if not name.startswith(HEAD):
                kind = name.partition(":")[0] + ":"
                found.setdefault(kind, set()).add(name.removeprefix(kind))
        self.low, self.new, self.dora = found[A], found[NEW], found[MAGNITUDE]
        wrong = [f"{kind}{n}" for kind, names in found.items() for n in names if kind not in _KINDS or n not in body]
        wrong += list(self.low ^ found[B] | self.low ^ found[SCALE] | self.dora - self.low | self.low & self.new)
        wrong = wrong or [f"{n} {body[n]}" for n in self.low | self.new if not self._fits(n)]
        if wrong:
            raise FitError(
                "other-architecture", f"{domain} sent factors that do not fit the base's tensors",
                allowed="b [out, r], a [r, in] and scale [] for tensors [out, in] of the base", got=sorted(wrong)[:6],
                remedy="make the adapter from this base, or use distill",
            )  # fmt: skip
        # what every part of a tensor needs again
        self._small = lru_cache(16)(self._read_small)

    def _fits(self, name: str) -> bool:
        shape = self.body[name]
        if name in self.new:
            return layout(self.tensors, NEW + name)[0] == shape
        a, b, scale = (layout(self.tensors, kind + name)[0] for kind in (A, B, SCALE))
        fits = len(a) == 2 and len(b) == 2 and shape == (b[0], a[1]) and a[0] == b[1] > 0 and scale == ()
        return fits and (name not in self.dora or layout(self.tensors, MAGNITUDE + name)[0] == shape[:1])

    @property
    def names(self) -> Collection[str]:
        """All tensors of the base's body: what has no factors did not change."""
        return self.body.keys()

    def touches(self, name: str) -> bool:
        """Whether the tensor changed."""
        return name in self.low or name in self.new

    def rows(self, name: str, start: int, stop: int, base: Tensor, into: Tensor) -> None:
        """Rows of the change, from the factors and the base's rows."""
        if name in self.new:
            into.copy_(read_rows(self.tensors, NEW + name, start, stop)).sub_(base)
        elif name not in self.low:
            into.zero_()
        else:
            a, magnitude = self._small(name, into.device)
            torch.mm(read_rows(self.tensors, B + name, start, stop).to(into.device, torch.float32), a, out=into)
            if magnitude is not None:
                length = into.add_(base).norm(dim=1, keepdim=True)
                into.mul_(magnitude[start:stop, None].div(length.masked_fill_(length == 0, 1.0))).sub_(base)

    def factors(self, name: str, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """(b [out, r], a [r, in]) in float32 with delta = b a (zeros where nothing changed); None where it is no such
        product (a matrix that was replaced, or DoRA)."""
        if name in self.new or name in self.dora:
            return None
        if name not in self.low:
            rows, columns = self.body[name]
            return torch.zeros(rows, 1, device=device), torch.zeros(1, columns, device=device)
        a, _ = self._small(name, device)
        return read_rows(self.tensors, B + name, 0, self.body[name][0]).to(device, torch.float32), a

    def _read_small(self, name: str, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """scale a, and the magnitudes where there are some."""
        rank = layout(self.tensors, A + name)[0][0]
        a = read_rows(self.tensors, A + name, 0, rank).to(device, torch.float32) * float(self.tensors[SCALE + name])
        if name not in self.dora:
            return a, None
        return a, read_rows(self.tensors, MAGNITUDE + name, 0, self.body[name][0]).to(device, torch.float32)


_KINDS = (A, B, SCALE, MAGNITUDE, NEW)
