"""Matrices changed one column after the other, each change made good by the columns to its right."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 128
_DAMP = 0.01
Column = Callable[[int], Tensor]
# (a block of columns, the factor's diagonal there, the number of its first column) -> what its column i becomes
Choose = Callable[[Tensor, Tensor, int], Column]


def columnwise(weight: Tensor, gram: Tensor, choose: Choose) -> Tensor:
    """weight [out, in] with every column replaced by what ``choose`` says, in float64; gram [in, in] is E x x^T.

    With U the upper Cholesky factor of the damped Gram matrix's inverse, a change e = (w_i - new w_i) / U_ii of column
    i is taken from the columns j > i as e U_ij, which keeps E |W x|^2 nearest (Frantar and Alistarh 2023; Frantar et
    al. 2023). A block is handed over as it is then, and changes in place while its columns are asked for.
    """
    weight, gram, size = weight.double().clone(), gram.double().clone(), gram.shape[0]
    idle = gram.diagonal() == 0
    gram[idle, idle] = 1
    gram += _DAMP * gram.diagonal().mean() * torch.eye(size, dtype=gram.dtype)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        inner, part = upper[start:stop, start:stop], weight[:, start:stop]
        errors, column = torch.zeros_like(part), choose(part, inner.diagonal(), start)
        for i in range(stop - start):
            stays = column(i)
            errors[:, i] = (part[:, i] - stays) / inner[i, i]
            part[:, i:] -= errors[:, i, None] * inner[i, i:]
            part[:, i] = stays
        weight[:, stop:] -= errors @ upper[start:stop, stop:]
    return weight
