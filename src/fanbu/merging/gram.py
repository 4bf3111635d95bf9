"""Gram matrices of what linear layers see, computed at the owner: sums over tokens, and nothing that they came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fanbu.batches import collate, encode, evenly, pad_id, sorted_batches
from fanbu.domain import Domain
from fanbu.predict import limit
from fanbu.types import Context


def own_texts(domain: Domain, count: int) -> list[str]:
    """At most ``count`` of the owner's texts, evenly spaced: unlabelled ones, else training ones; no label is used."""
    texts = domain.unlabelled.texts or domain.train.texts
    return evenly(texts, count)


def linear_layers(network: Any) -> dict[str, nn.Module]:
    """The layers that multiply by a matrix, by the name of their weight: Linear, and GPT-2's Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return {f"{name}.weight": m for name, m in network.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def stores_input_first(layer: nn.Module) -> bool:
    """Whether the weight is [in, out] (Conv1D) and not [out, in] (Linear)."""
    return not isinstance(layer, nn.Linear)


def columns(layer: Any) -> Tensor:
    """[out, in] of a linear layer, however it stores it."""
    weight: Tensor = layer.weight.detach()
    return weight.T if stores_input_first(layer) else weight


def grams(
    network: Any, tokenizer: Any, texts: Sequence[str], names: Sequence[str], context: Context
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """G = X^T X / n for each layer of ``names``, X [n, in] its inputs at all n tokens that are not padding; float32.

    Layers that are given the same tensor (query, key and value) share one matrix. Returns the matrices by the first
    layer that they belong to, and for each layer the name of its matrix.
    """
    network.to(context.device).eval()
    sequences = encode(tokenizer, texts, limit(network, context))
    batches = sorted_batches([len(s) for s in sequences], 32)
    with _watched(network, names) as seen, torch.inference_mode():
        for number, rows in enumerate(batches, 1):
            batch = collate([sequences[i] for i in rows], pad_id(tokenizer), context.device)
            seen.mask = batch["attention_mask"].bool()
            seen.given.clear()
            network(**batch)
            context.progress("gram", number, len(batches))
    return {name: total.cpu() / max(1, seen.counts[name]) for name, total in seen.sums.items()}, seen.leader


class _Seen:
    """What layers were given so far; ``leader`` names, for each layer, the first one with the same inputs."""

    def __init__(self) -> None:
        self.mask = torch.empty(0)
        self.given: dict[int, str] = {}
        self.leader: dict[str, str] = {}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def look(self, name: str, x: Tensor) -> None:
        leader = self.given.setdefault(id(x), name)
        if self.leader.setdefault(name, leader) != name:
            return
        # pooled rows (one a text) have no padding
        rows = x[self.mask] if x.ndim == 3 and x.shape[:2] == self.mask.shape else x.reshape(-1, x.shape[-1])
        rows = rows.float()
        product = rows.T @ rows
        self.sums[name] = self.sums[name].add_(product) if name in self.sums else product
        self.counts[name] = self.counts.get(name, 0) + len(rows)


@contextmanager
def _watched(network: Any, names: Sequence[str]) -> Iterator[_Seen]:
    seen, layers = _Seen(), linear_layers(network)
    keep: list[Tensor] = []  # inputs stay alive through a batch, so that an id stands for one tensor

    def hook(name: str) -> Any:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if not seen.given:
                keep.clear()
            keep.append(inputs[0])
            seen.look(name, inputs[0])

        return look

    handles = [layers[name].register_forward_pre_hook(hook(name)) for name in names if name in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def damped(gram: Tensor, shrink: float) -> Tensor:
    """The off-diagonal times ``shrink``: a x G + (1 - a) x diag(G). Linear in G."""
    return gram * shrink + torch.diag(gram.diagonal() * (1 - shrink))
