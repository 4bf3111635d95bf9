"""Weights on a grid of whole numbers: scales, rounding to the nearest, and rounding that looks at what inputs are."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fanbu.shrink._columnwise import Column, columnwise

Rounding = Literal["nearest", "activation", "gptq"]
_CLIPS = [1 - 0.05 * i for i in range(11)]


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

    gptq rounds column by column and makes good for each rounding (``columnwise``; Frantar et al. 2023).
    """
    weight = weight.float()
    if how == "nearest":
        step = scales(weight, bits, group)
        return rounded(weight, step, bits), step
    assert gram is not None
    step = scales(weight, bits, group, gram.diagonal())
    if how == "activation":
        return rounded(weight, step, bits), step
    wide = step.double().repeat_interleave(weight.shape[1] // step.shape[1], 1)

    def choose(part: Tensor, _: Tensor, start: int) -> Column:
        return lambda i: _rounded(part[:, i], wide[:, start + i], bits)

    return columnwise(weight, gram, choose).float(), step
