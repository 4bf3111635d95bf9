"""What ``train`` minimises: each function returns a loss over row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
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
from fanbu.predict import without_head
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


def soft_language(
    sequences: Sequences, targets: Sequence[tuple[Tensor, Tensor]], pad: int, device: str, share: float = 0.0
) -> BatchLoss:
    """(1 - share) KL to the teacher's top-k next tokens (``losses.top_k_divergence``) + share x that to true ones."""

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        batch = collate([sequences[i] for i in rows], pad, device)
        keep = batch["attention_mask"][:, 1:].bool()
        indices = torch.cat([targets[i][0] for i in rows]).long().to(device)
        probs = torch.cat([targets[i][1].float() for i in rows]).to(device)  # autocast does not join float16
        logits = _of(network)(**batch).logits[:, :-1][keep]
        soft = top_k_divergence(logits, indices, probs)
        if not share:
            return soft
        return (1 - share) * soft + share * functional.cross_entropy(logits.float(), batch["input_ids"][:, 1:][keep])

    return loss


def _of(network: Any) -> Any:
    """The network itself, where it is trained together with other modules."""
    return network["network"] if isinstance(network, nn.ModuleDict) else network


Weigh = tuple[Divergence, float, float]  # which divergence, at what temperature, and how much true labels count


def taught_labels(
    sequences: Sequences, h_nt: Tensor, z_nl: Tensor, labels: Sequence[int], pad: int, weigh: Weigh, hidden: float
) -> BatchLoss:
    """A teacher's logits and pooled features, and true labels of the first rows (``shrink.distill``)."""
    kind, temperature, share = weigh
    scale = h_nt.square().sum(1).mean().clamp_min(1e-12)

    def loss(student: Any, rows: Sequence[int]) -> Tensor:
        network = student["network"]
        device = next(network.parameters()).device
        batch = collate([sequences[i] for i in rows], pad, device)
        with without_head(network):
            pooled = network(**batch).logits
        z = final_layer(network)(pooled).float()
        total = (1 - share) * divergence(z_nl[list(rows)].to(device), z, kind, temperature)
        known = [i for i, row in enumerate(rows) if row < len(labels)]
        if share and known:
            total = total + share * functional.cross_entropy(
                z[known], torch.tensor([labels[rows[i]] for i in known], device=device)
            )
        if hidden:
            off = student["map"](pooled.float()) - h_nt[list(rows)].to(device)
            total = total + hidden * off.square().sum(1).mean() / scale
        return total

    return loss


def taught_tokens(sequences: Sequences, teacher: Any, student: Any, pad: int, weigh: Weigh) -> BatchLoss:
    """A teacher's next tokens, and the true ones, from hidden states (``losses.chunked_divergence``).

    Where a network changes what its head gives (soft-capping, scaling), all logits are made at once instead. Rows
    that only one of the two vocabularies has are padding, and left out.
    """
    kind, temperature, share = weigh
    plain = all(_head_is_all(n, sequences[:4]) for n in (student, teacher))
    rows = min(n.get_output_embeddings().weight.shape[0] for n in (student, teacher))

    def loss(wrapped: Any, numbers: Sequence[int]) -> Tensor:
        network = wrapped["network"]
        batch = collate([sequences[i] for i in numbers], pad, next(network.parameters()).device)
        keep, truth = batch["attention_mask"][:, 1:].bool(), batch["input_ids"][:, 1:]
        if plain:
            with torch.no_grad():
                known = teacher.base_model(**batch).last_hidden_state[:, :-1][keep]
            own = network.base_model(**batch).last_hidden_state[:, :-1][keep]
            heads = [_rows_of(n.get_output_embeddings(), rows) for n in (teacher, network)]
            return chunked_divergence(known, heads[0], own, heads[1], kind, temperature, truth[keep], share)
        with torch.no_grad():
            known = teacher(**batch).logits[:, :-1][keep][:, :rows].float()
        own = network(**batch).logits[:, :-1][keep][:, :rows].float()
        soft = divergence(known, own, kind, temperature) if share < 1 else own.new_zeros(())
        return (1 - share) * soft + share * functional.cross_entropy(own, truth[keep])

    return loss


def _rows_of(head: Any, count: int) -> tuple[Tensor, Tensor | None]:
    bias = getattr(head, "bias", None)
    if head.weight.shape[0] == count:
        return head.weight, bias
    return head.weight[:count], None if bias is None else bias[:count]


def _head_is_all(network: Any, sequences: Sequences) -> bool:
    """Whether a network's logits are what its head makes of its last hidden states."""
    training, device = network.training, next(network.parameters()).device
    network.eval()
    same = True
    with torch.no_grad():
        for ids in sequences:
            given = torch.tensor([ids[:64]], device=device)
            logits = network(input_ids=given).logits.float()
            made = network.get_output_embeddings()(network.base_model(input_ids=given).last_hidden_state).float()
            same &= torch.allclose(logits, made, rtol=1e-5, atol=1e-6 * float(made.abs().max()))
    network.train(training)
    return same
