"""What ``train`` minimises: each function returns a loss over row numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fanbu.batches import Sequences, collate
from fanbu.heads import final_layer
from fanbu.losses import (
    Divergence,
    chunked_divergence,
    divergence,
    next_token_loss,
    soft_cross_entropy,
    top_k_divergence,
)
from fanbu.train import BatchLoss


def labelled(sequences: Sequences, labels: Sequence[int], pad: int, device: str) -> BatchLoss:
    """Cross-entropy of a label head."""
    target = torch.tensor(labels, device=device)

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        logits = network(**collate([sequences[i] for i in rows], pad, device)).logits
        return functional.cross_entropy(logits.float(), target[list(rows)])

    return loss


def soft_labelled(sequences: Sequences, targets_nl: Tensor, pad: int, device: str) -> BatchLoss:
    """KL to soft labels over the whole union head (``losses.soft_cross_entropy``)."""

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        logits = network(**collate([sequences[i] for i in rows], pad, device)).logits
        return soft_cross_entropy(logits.float(), targets_nl[list(rows)].float().to(device))

    return loss


def language(sequences: Sequences, pad: int, device: str) -> BatchLoss:
    """Next-token cross-entropy."""

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        batch = collate([sequences[i] for i in rows], pad, device)
        return next_token_loss(network(**batch).logits, batch["input_ids"], batch["attention_mask"])

    return loss


def soft_language(sequences: Sequences, targets: Sequence[tuple[Tensor, Tensor]], pad: int, device: str) -> BatchLoss:
    """KL to the teacher's top-k next tokens (``losses.top_k_divergence``)."""

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        batch = collate([sequences[i] for i in rows], pad, device)
        keep = batch["attention_mask"][:, 1:].bool()
        indices = torch.cat([targets[i][0] for i in rows]).long().to(device)
        probs = torch.cat([targets[i][1].float() for i in rows]).to(device)  # autocast does not join float16
        return top_k_divergence(network(**batch).logits[:, :-1][keep], indices, probs)

    return loss


Weigh = tuple[Divergence, float, float]  # which divergence, at what temperature, and how much true labels count


def taught_labels(
    sequences: Sequences, h_nt: Tensor, z_nl: Tensor, labels: Sequence[int], pad: int, weigh: Weigh, hidden: float
) -> BatchLoss:
    """A teacher's logits and pooled features, and true labels of the first rows (``shrink.distill``)."""
    kind, temperature, share = weigh
    scale = h_nt.square().sum(1).mean().clamp_min(1e-12)
    seen: dict[str, Tensor] = {}

    def loss(student: Any, rows: Sequence[int]) -> Tensor:
        network = student["network"]
        device = next(network.parameters()).device
        batch = collate([sequences[i] for i in rows], pad, device)
        with given_to(final_layer(network), seen):
            z = network(**batch).logits.float()
        total = (1 - share) * divergence(z_nl[list(rows)].to(device), z, kind, temperature)
        known = [i for i, row in enumerate(rows) if row < len(labels)]
        if share and known:
            total = total + share * functional.cross_entropy(
                z[known], torch.tensor([labels[rows[i]] for i in known], device=device)
            )
        if hidden:
            x = seen["x"]
            pooled = x if x.ndim == 2 else x[torch.arange(len(rows)), batch["attention_mask"].sum(1) - 1]
            off = student["map"](pooled.float()) - h_nt[list(rows)].to(device)
            total = total + hidden * off.square().sum(1).mean() / scale
        return total

    return loss


@contextmanager
def given_to(layer: Any, seen: dict[str, Tensor]) -> Iterator[None]:
    """What a layer is given, under ``x``."""
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    try:
        yield
    finally:
        handle.remove()


def taught_tokens(sequences: Sequences, teacher: Any, pad: int, weigh: Weigh) -> BatchLoss:
    """A teacher's next tokens, and the true ones, from hidden states (``losses.chunked_divergence``).

    Where a network changes what its head gives (soft-capping, scaling), all logits are made at once instead.
    """
    kind, temperature, share = weigh
    plain: list[bool] = []

    def loss(student: Any, rows: Sequence[int]) -> Tensor:
        network = student["network"]
        batch = collate([sequences[i] for i in rows], pad, next(network.parameters()).device)
        keep, truth = batch["attention_mask"][:, 1:].bool(), batch["input_ids"][:, 1:]
        if not plain:
            plain.append(all(_head_is_all(n, sequences[rows[0]]) for n in (network, teacher)))
        if not plain[0]:
            with torch.no_grad():
                known = teacher(**batch).logits[:, :-1][keep].float()
            own = network(**batch).logits[:, :-1][keep].float()
            soft = divergence(known, own, kind, temperature) if share < 1 else own.new_zeros(())
            return (1 - share) * soft + share * functional.cross_entropy(own, truth[keep])
        with torch.no_grad():
            known = teacher.base_model(**batch).last_hidden_state[:, :-1][keep]
        own = network.base_model(**batch).last_hidden_state[:, :-1][keep]
        heads = teacher.get_output_embeddings(), network.get_output_embeddings()
        return chunked_divergence(known, heads[0], own, heads[1], kind, temperature, truth[keep], share)

    return loss


def _head_is_all(network: Any, ids: Sequence[int]) -> bool:
    """Whether a network's logits are what its head makes of its last hidden states."""
    given, training = torch.tensor([list(ids[:8])], device=next(network.parameters()).device), network.training
    network.eval()
    with torch.no_grad():
        logits = network(input_ids=given).logits.float()
        made = network.get_output_embeddings()(network.base_model(input_ids=given).last_hidden_state).float()
    network.train(training)
    return bool(torch.allclose(logits, made, rtol=1e-2, atol=1e-3 * float(made.abs().max())))
