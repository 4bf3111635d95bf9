"""Losses, for shrinking and for feeding back alike.

The label head of many domains needs no loss of its own: over the union of rows, with labels ``domain/label``,
log softmax(z)[d/l] = log p(d) + log p(l | d), where p(d) is the share of logsumexp over the rows of d. So plain
cross-entropy over the union is cross-entropy over domains plus cross-entropy within the domain.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 1024


def soft_cross_entropy(logits_bl: Tensor, targets_bl: Tensor) -> Tensor:
    """Mean over rows of KL(t || softmax(z)) = sum_l t_l (log t_l - log softmax(z)_l).

    logits_bl: [batch, labels]; targets_bl: the same shape, rows that sum to 1 (Hinton et al. 2015, temperature
    applied by the teacher).
    """
    return functional.kl_div(logits_bl.log_softmax(-1), targets_bl, reduction="batchmean")


def next_token_loss(logits_btv: Tensor, ids_bt: Tensor, mask_bt: Tensor) -> Tensor:
    """Mean over predicted tokens of -log p(token t+1 | tokens up to t), padding left out."""
    keep = mask_bt[:, 1:].bool()
    return functional.cross_entropy(logits_btv[:, :-1][keep].float(), ids_bt[:, 1:][keep])


def top_k_divergence(logits_nv: Tensor, indices_nk: Tensor, probs_nk: Tensor) -> Tensor:
    """Mean over tokens of KL between teacher and student over k named tokens and "all others" as one outcome.

    logits_nv: [tokens, vocabulary]; indices_nk, probs_nk: the teacher's k likeliest tokens and their
    probabilities, the rest's mass being 1 - sum. Computed in chunks of tokens: log p_k is the gathered logit minus
    the logsumexp, so no second tensor of the vocabulary's size is made.
    """
    total = logits_nv.new_zeros((), dtype=torch.float32)
    for start in range(0, len(logits_nv), _CHUNK):
        z = logits_nv[start : start + _CHUNK].float()
        p = probs_nk[start : start + _CHUNK].float()
        log_q = z.gather(1, indices_nk[start : start + _CHUNK]) - z.logsumexp(-1, keepdim=True)
        rest_p = (1 - p.sum(-1)).clamp_min(1e-6)
        rest_q = (1 - log_q.exp().sum(-1)).clamp_min(1e-6)
        p = p.clamp_min(1e-9)
        total = total + (p * (p.log() - log_q)).sum() + (rest_p * (rest_p.log() - rest_q.log())).sum()
    return total / max(len(logits_nv), 1)
