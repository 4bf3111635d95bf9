"""Which texts are a specialist's to answer: those that lie as near to its training texts as its domain's own do."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_NEAR = 0.95  # of the domain's own validation texts are near
_BLOCK = 4096


def near(train_nh: Tensor, valid_nh: Tensor, x_nh: Tensor) -> Tensor:
    """[texts], true where max_i cos(x, train_i) in pooled features is no smaller than the least of the nearest 95 in
    100 validation texts; all, where there is nothing to hold them against.

    Reference: Sun et al. 2022, "Out-of-distribution detection with deep nearest neighbors", with one neighbour.
    """
    if not (len(train_nh) and len(valid_nh) and len(x_nh)):
        return torch.ones(len(x_nh), dtype=torch.bool)
    known = functional.normalize(train_nh, dim=1)
    valid_n, x_n = (_nearest(x, known) for x in (valid_nh, x_nh))
    return x_n >= valid_n.quantile(1 - _NEAR)


def _nearest(x_nh: Tensor, known_nh: Tensor) -> Tensor:
    return torch.cat([(functional.normalize(part, dim=1) @ known_nh.T).amax(1) for part in x_nh.split(_BLOCK)])
