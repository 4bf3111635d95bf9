"""What ``train`` minimises: each function returns a loss over row numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fanbu.batches import Sequences, collate
from fanbu.losses import next_token_loss, soft_cross_entropy, top_k_divergence
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
