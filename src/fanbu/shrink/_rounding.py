"""Weights on a grid of whole numbers: scales, rounding to the nearest, and rounding that looks at what inputs are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Rounding = Literal["nearest", "activation", "gptq"]
_CLIPS = [1 - 0.05 * i for i in range(11)]
_BLOCK, _DAMP = 128, 0.01


def scales(weight: Tensor, bits: int, group: int, squares: Tensor | None = None) -> Tensor:
    """[out, groups]: step sizes of the symmetric grid -2^(bits-1) .. 2^(bits-1) - 1 of each row's groups of columns.

    s = max |w| / (2^(bits-1) - 1). With ``squares`` [in] = E x_j^2 the largest value may lie off the grid: of s and
    95, 90 .. 50% of it the one that loses least, sum_j E x_j^2 (w_j - round(w_j))^2 (the search of clips in Lin et
    al. 2024, AWQ).
    """
    grouped = weight.reshape(len(weight), -1, group or weight.shape[1])
    most = 2 ** (bits - 1) - 1
    widest = (grouped.abs().amax(-1) / most).clamp_min(torch.finfo(torch.float32).tiny * most)
    if squares is None:
        return widest
    matter = squares.reshape(1, -1, group or weight.shape[1])
    best, least = widest.clone(), torch.full_like(widest, float("inf"))
    for clip in _CLIPS:
        off = (grouped - _rounded(grouped, (widest * clip)[..., None], bits)).square()
        lost = (off * matter).sum(-1)
        better = lost < least
        best, least = torch.where(better, widest * clip, best), torch.where(better, lost, least)
    return best


def _rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return (weight / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * scale


def rounded(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """weight [out, in] on the grid of ``scale`` [out, groups]."""
    grouped = weight.reshape(*scale.shape, -1)
    return _rounded(grouped, scale[..., None], bits).reshape(weight.shape)


def on_grid(weight: Tensor, gram: Tensor | None, bits: int, group: int, how: Rounding) -> tuple[Tensor, Tensor]:
    """(weight [out, in] on the grid, scales); gram [in, in] is E x x^T.

    gptq rounds column by column and makes good for each rounding in the columns to its right, by the inverse of the
    Gram matrix (Frantar et al. 2023).
    """
    weight = weight.float()
    if how == "nearest":
        step = scales(weight, bits, group)
        return rounded(weight, step, bits), step
    assert gram is not None
    step = scales(weight, bits, group, gram.diagonal())
    return (_solved(weight, gram, step, bits) if how == "gptq" else rounded(weight, step, bits)), step


def _solved(weight: Tensor, gram: Tensor, step: Tensor, bits: int) -> Tensor:
    weight, gram, size = weight.double().clone(), gram.double().clone(), gram.shape[0]
    idle = gram.diagonal() == 0
    gram[idle, idle] = 1
    gram += _DAMP * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    wide = step.double().repeat_interleave(size // step.shape[1], 1)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        inner, part = upper[start:stop, start:stop], weight[:, start:stop]
        errors = torch.zeros_like(part)
        for i in range(stop - start):
            stays = _rounded(part[:, i], wide[:, start + i], bits)
            errors[:, i] = (part[:, i] - stays) / inner[i, i]
            part[:, i:] -= errors[:, i, None] * inner[i, i:]
            part[:, i] = stays
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight.float()
