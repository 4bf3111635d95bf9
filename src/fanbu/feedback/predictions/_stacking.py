"""Stacking: how much each specialist counts, learned from labels of texts that it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_RIDGE = 1.0
_STEPS = 100
_LEAST = 1e-6


def stacked(beyond: Sequence[Tensor], own: Sequence[Tensor], mean_nl: Tensor, truth_n: Tensor | None) -> Tensor:
    """q(l) prop. to mean(l)^c exp(sum_t a_t beyond_t(l)): logistic regression over what the specialists say.

    c and a_t minimise the mean of -log q(truth) over the labelled texts, plus ((c - 1)^2 + |a|^2) / texts, so that few
    labels leave the mean as it is. A specialist does not count on its own owner's texts while a is learned: it was
    trained on them, so what it says of them is no better than a memory. ``beyond`` [texts, labels] is log p_t - log
    mean, ``own`` [texts] marks those texts, ``truth_n`` is -1 where a label is not known. Reference: Wolpert 1992,
    "Stacked generalization".
    """
    known = torch.zeros(len(mean_nl)).bool() if truth_n is None else truth_n >= 0
    if truth_n is None or not bool(known.any()):
        return mean_nl
    logs = mean_nl.clamp_min(_LEAST).log().double()
    x = torch.stack([b.double() * ~o[:, None] for b, o in zip(beyond, own, strict=True)])
    weights = torch.zeros(1 + len(x), dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        z = (1 + weights[0]) * logs[known] + torch.einsum("t,tnl->nl", weights[1:], x[:, known])
        ridge = _RIDGE * weights.square().sum() / int(known.sum())
        value = functional.cross_entropy(z, truth_n[known]) + ridge
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    a = weights.detach()
    z = (1 + a[0]) * logs + torch.einsum("t,tnl->nl", a[1:], torch.stack([b.double() for b in beyond]))
    return (z.softmax(1) * (mean_nl > 0)).float()
