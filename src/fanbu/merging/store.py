"""Task vectors kept small: eight bits or one bit a number, with a scale for each row, or sparse; vectors stay exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import FitError
from fanbu.merging.sparse import SPARSE, Sparse
from fanbu.merging.task_vector import FORM, TaskVector, Weights, packs
from fanbu.tensors import ByRows, layout, read_rows

PACKED = "packed"  # meta["form"] of a contribution whose tensors have the names below
CODES, SCALES = "codes:", "scales:"
Store = Literal["exact", "int8", "1bit", "topk"]


def task_vector(vector: TaskVector, domain: str, labels: Sequence[str], store: Store = "exact") -> Contribution:
    """What a specialist sends of its weights: as they are, or its differences to the base with packed matrices.

    int8: round(delta / s), s = max |delta| / 127 of the row. 1bit: the sign, s = mean |delta| of the row (which is the
    best scale for signs, in squares). topk: the largest hundredth of a matrix, exactly, and nothing of the rest
    (``merging.sparse``).

    Reference: Liu et al. 2024, "BitDelta: your fine-tune may only be worth one bit".
    """
    if store == "exact":
        return Contribution(
            "weights", domain, "task_vector", Weights(vector), meta={"labels": list(labels), "form": FORM}
        )
    return stored(vector, domain, labels, store)


def stored(delta: Mapping[str, Tensor], domain: str, labels: Sequence[str], store: Store) -> Contribution:
    """Differences that are packed, or kept sparse; vectors and label rows are exact."""
    if store == "topk":
        meta: dict[str, object] = {"labels": list(labels), "form": SPARSE}
        return Contribution("weights", domain, "task_vector", Sparse(delta), meta=meta)
    meta = {"labels": list(labels), "form": PACKED, "store": store}
    return Contribution("weights", domain, "task_vector", Packed(delta, store), meta=meta)


class Packed(ByRows):
    """``codes:NAME`` (int8, or uint8 with eight signs each) and ``scales:NAME`` float32 [rows]; else as it is."""

    def __init__(self, tensors: Mapping[str, Tensor], store: Store) -> None:
        self.tensors, self.store = tensors, store
        self.names = sorted(
            part + n if part else n for n in tensors for part in ((CODES, SCALES) if packs(tensors, n) else ("",))
        )

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        shape, dtype = layout(self.tensors, name.removeprefix(CODES).removeprefix(SCALES))
        if name.startswith(SCALES):
            return (shape[0],), torch.float32
        if not name.startswith(CODES):
            return shape, dtype
        return (shape, torch.int8) if self.store == "int8" else ((shape[0], -(-_width(shape) // 8)), torch.uint8)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        own = name.removeprefix(CODES).removeprefix(SCALES)
        rows = read_rows(self.tensors, own, start, stop)
        if own == name:
            return rows
        scales = row_scales(rows, self.store)
        return scales if name.startswith(SCALES) else pack(rows, scales, self.store)


class Unpacked:
    """A Source over a packed contribution. Raises FitError where codes and scales do not fit the base's tensors."""

    def __init__(self, contribution: Contribution, body: Mapping[str, tuple[int, ...]]) -> None:
        self.tensors, self.store = contribution.tensors, contribution.meta.get("store")
        self.packed = {n.removeprefix(CODES) for n in self.tensors if n.startswith(CODES)}
        self.names = self.packed | {n for n in self.tensors if ":" not in n}
        self.body = body
        wrong = sorted(n for n in self.packed & body.keys() if not self._fits(n))
        if wrong or self.store not in {"int8", "1bit"}:
            raise FitError(
                "other-architecture", f"{contribution.domain} sent packed tensors that do not fit the base's",
                allowed="codes and scales of the base's shapes, int8 or 1bit", got=wrong[:6] or self.store,
                remedy="leave this specialist out, or use distill",
            )  # fmt: skip

    def _fits(self, name: str) -> bool:
        shape = self.body[name]
        codes, dtype = layout(self.tensors, CODES + name)
        expected = (shape, torch.int8) if self.store == "int8" else ((shape[0], -(-_width(shape) // 8)), torch.uint8)
        return (codes, dtype) == expected and layout(self.tensors, SCALES + name) == ((shape[0],), torch.float32)

    def rows(self, name: str, start: int, stop: int, base: Tensor, into: Tensor) -> None:
        """Rows of the change, unpacked."""
        if name not in self.packed:
            into.copy_(read_rows(self.tensors, name, start, stop))
            return
        codes = read_rows(self.tensors, CODES + name, start, stop)
        scales = read_rows(self.tensors, SCALES + name, start, stop)
        into.copy_(unpack(codes, scales, self.body[name][1:], str(self.store)))


def row_scales(rows: Tensor, store: str) -> Tensor:
    """[rows], float32."""
    sizes = rows.float().abs().reshape(rows.shape[0], -1)
    return sizes.amax(1) / 127 if store == "int8" else sizes.mean(1)


def pack(rows: Tensor, scales: Tensor, store: str) -> Tensor:
    """Codes of some rows."""
    if store == "int8":
        shape = (-1, *[1] * (rows.ndim - 1))
        return (rows.float() / scales.clamp(min=1e-38).reshape(shape)).round().clamp(-127, 127).to(torch.int8)
    positive = (rows.reshape(rows.shape[0], -1) >= 0).to(torch.uint8)
    padded = torch.nn.functional.pad(positive, (0, -positive.shape[1] % 8)).reshape(rows.shape[0], -1, 8)
    return (padded << torch.arange(8, dtype=torch.uint8, device=rows.device)).sum(2, dtype=torch.uint8)


def unpack(codes: Tensor, scales: Tensor, inner: tuple[int, ...], store: str) -> Tensor:
    """What codes stand for, float32; ``inner`` is the shape of one row."""
    if store == "int8":
        return codes.float() * scales.reshape(-1, *[1] * len(inner))
    bits = (codes[:, :, None] >> torch.arange(8, dtype=torch.uint8, device=codes.device)) & 1
    signs = bits.reshape(codes.shape[0], -1)[:, : _width((0, *inner))].float().mul_(2).sub_(1)
    return (signs * scales[:, None]).reshape(-1, *inner)


def loss(exact: Tensor, store: Store) -> float:
    """|delta' - delta| / |delta|, Frobenius, of one matrix."""
    scales = row_scales(exact, store)
    back = unpack(pack(exact, scales, store), scales, tuple(exact.shape[1:]), store)
    return float((back - exact).norm() / exact.norm().clamp(min=1e-30))


def _width(shape: tuple[int, ...]) -> int:
    width = 1
    for size in shape[1:]:
        width *= size
    return width
