"""Stacking: how much each specialist counts, learned from labels of texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_RIDGE = 1.0
_STEPS = 100
_LEAST = 1e-6


def stacked(
    unseen: Sequence[Tensor], own: Sequence[Tensor], blind_nl: Tensor, truth_n: Tensor | None,
    beyond: Sequence[Tensor], mean_nl: Tensor,
) -> Tensor:  # fmt: skip
    """q(l) prop. to mean(l)^c exp(sum_t a_t beyond_t(l)): logistic regression over what the specialists say.

    a_t = b + d_t. c, b and d minimise the mean of -log q(truth) over the labelled texts, plus
    ((c - 1)^2 + b^2 + |d|^2) / texts, so that few labels leave the mean as it is, and a specialist of which they say
    little counts as the others do. Meanwhile nobody counts on its own owner's texts, which ``own`` [texts] marks: it
    was trained on them, so what it says of them is no better than a memory. So ``blind_nl`` [texts, labels] is the mean
    of the others there, and ``unseen`` log p_t - log blind; ``beyond`` and ``mean_nl`` are the same of all. ``truth_n``
    is -1 where a label is not known. Reference: Wolpert 1992, "Stacked generalization".
    """
    known = torch.zeros(len(mean_nl)).bool() if truth_n is None else truth_n >= 0
    if truth_n is None or not bool(known.any()):
        return mean_nl
    logs = blind_nl[known].clamp_min(_LEAST).log().double()
    x = torch.stack([b[known].double() * ~o[known, None] for b, o in zip(unseen, own, strict=True)])
    weights = torch.zeros(2 + len(x), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        z = (1 + weights[0]) * logs + torch.einsum("t,tnl->nl", weights[1] + weights[2:], x)
        value = functional.cross_entropy(z, truth_n[known]) + _RIDGE * weights.square().sum() / int(known.sum())
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    a = weights.detach()
    z = (1 + a[0]) * mean_nl.clamp_min(_LEAST).log().double()
    z = z + torch.einsum("t,tnl->nl", a[1] + a[2:], torch.stack([b.double() for b in beyond]))
    return (z.softmax(1) * (mean_nl > 0)).float()
