"""Which single weights become zero: by size, by what they carry (Wanda), or solved one column after the other."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fanbu.domain import Domain
from fanbu.errors import FitError
from fanbu.merging.gram import columns, linear_layers
from fanbu.model import Model, provenance, save_network
from fanbu.shrink._columnwise import Column, columnwise
from fanbu.shrink._tune import open_for, tune
from fanbu.shrink._units import inner_layers, own_grams
from fanbu.train import set_up
from fanbu.types import Context, Train

Way = Literal["magnitude", "wanda", "sparsegpt"]
Pattern = tuple[int, int]  # n of every m in a row stay


def shrink_sparsely(
    name: str, parent: Model, domain: Domain, out: Path, context: Context, how: Way, share: float,
    pattern: Pattern | None, train: Train | None,
) -> Model:  # fmt: skip
    """The whole way down: zeros, then training that leaves them zero."""
    network, tokenizer = open_for(parent, domain, context)
    if pattern:
        _check(network, pattern[1])
    set_up(context, name, domain.industry)
    masks = make_sparse(network, tokenizer, domain, how, share, pattern, context)
    metrics: dict[str, float] = {}
    if train is not None:
        hold_zeros(network, masks)
        metrics = tune(network, tokenizer, domain, train, context, f"{name} {domain.industry}")
    metrics |= {"zeros": share_of_zeros(network, list(masks))}
    made = provenance(
        name, [parent], context, domain=domain.name, importance=how, sparsity=share,
        pattern=pattern and "{}:{}".format(*pattern), train=train and vars(train),
    )  # fmt: skip
    return save_network(network, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))


def _check(network: Any, m: int) -> None:
    layers = linear_layers(network)
    for name in inner_layers(network):
        if width := columns(layers[name]).shape[1] % m:
            raise FitError(
                "not-in-groups", f"inputs of {name} do not come in groups of {m}", allowed=f"a multiple of {m}",
                got=f"{width} more", remedy="use unstructured, or cut width to such a multiple first",
            )  # fmt: skip


def make_sparse(
    network: Any, tokenizer: Any, domain: Domain, how: Way, share: float, pattern: Pattern | None, context: Context
) -> dict[str, Tensor]:
    """Sets weights to zero in place; returns what stays, by the weights' names, as masks in their stored shape."""
    layers, names, masks = linear_layers(network), inner_layers(network), dict[str, Tensor]()
    found: Iterable[tuple[str, Tensor | None]] = ((n, None) for n in names)
    if how != "magnitude":
        found = own_grams(network, tokenizer, domain, names, context)
    for name, gram in found:
        weight = columns(layers[name])
        weight.copy_(pruned(weight.float().cpu(), gram, how, share, pattern))
        stored: Any = layers[name].weight
        masks[name] = stored.detach() != 0
    return masks


def pruned(weight: Tensor, gram: Tensor | None, how: Way, share: float, pattern: Pattern | None) -> Tensor:
    """weight [out, in] with a ``share`` of zeros, or with n of every m kept; gram [in, in] is E x x^T.

    magnitude compares |W_ij| over the matrix, wanda |W_ij| sqrt(G_jj) within each row (Sun et al. 2024). sparsegpt
    goes column by column (``columnwise``), and W_ij^2 / U_jj^2 says what matters (Frantar and Alistarh 2023).
    A pattern is always compared within its m.
    """
    if how == "sparsegpt":
        assert gram is not None
        return _solved(weight, gram, share, pattern).to(weight.dtype)
    scores = weight.abs()
    if how == "wanda":
        assert gram is not None
        scores = scores * gram.diagonal().sqrt()
    return weight * kept(scores, share, pattern, whole=how == "magnitude")


def kept(scores: Tensor, share: float, pattern: Pattern | None, *, whole: bool) -> Tensor:
    """Which scores [rows, columns] are high enough: of every m n, else all but a share, by row or of the ``whole``."""
    rows, width = scores.shape
    if pattern:
        n, m = pattern
        groups = scores.reshape(rows, width // m, m)
        return torch.zeros_like(groups, dtype=torch.bool).scatter_(2, groups.topk(n).indices, True).reshape(rows, width)
    flat = scores.reshape(1, -1) if whole else scores
    count = round(flat.shape[1] * (1 - share))
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, flat.topk(count).indices, True).reshape(rows, width)


def _solved(weight: Tensor, gram: Tensor, share: float, pattern: Pattern | None) -> Tensor:
    def choose(part: Tensor, diagonal: Tensor, _: int) -> Column:
        mask = torch.ones_like(part, dtype=torch.bool)
        if pattern is None:
            mask = kept((part / diagonal).square(), share, None, whole=True)

        def column(i: int) -> Tensor:
            if pattern and i % pattern[1] == 0:
                group = slice(i, i + pattern[1])
                mask[:, group] = kept((part[:, group] / diagonal[group]).square(), 0, pattern, whole=False)
            return part[:, i] * mask[:, i]

        return column

    return columnwise(weight * (gram.diagonal() != 0), gram, choose)  # of inputs that never were anything: zero


def hold_zeros(network: Any, masks: dict[str, Tensor]) -> None:
    """Gradients of what is zero are zero from now on, so that training leaves it there."""
    parameters = dict(network.named_parameters())
    for name, mask in masks.items():
        parameters[name].register_hook(lambda g, m=mask: g * m.to(g.device))


def share_of_zeros(network: Any, names: Sequence[str]) -> float:
    """Over the weights named."""
    weights = dict(network.named_parameters())
    zeros = sum(int((weights[n] == 0).sum()) for n in names)
    return zeros / max(1, sum(weights[n].numel() for n in names))
