"""Losses, for shrinking and for feeding back alike.

The label head of many domains needs no loss of its own: over the union of rows, with labels ``domain/label``,
log softmax(z)[d/l] = log p(d) + log p(l | d), where p(d) is the share of logsumexp over the rows of d. So plain
cross-entropy over the union is cross-entropy over domains plus cross-entropy within the domain.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

_CHUNK = 1024
_LOG_2 = math.log(2)
_TOKENS = 96  # at least so many at a time, or an eighth of the hidden size: then logits stay smaller than the head


def soft_cross_entropy(logits_bl: Tensor, targets_bl: Tensor, weights_b: Tensor | None = None) -> Tensor:
    """Mean over rows of w KL(t || softmax(z)) = w sum_l t_l (log t_l - log softmax(z)_l); w is 1 where none is given.

    logits_bl: [batch, labels]; targets_bl: the same shape, rows that sum to 1 (Hinton et al. 2015, temperature
    applied by the teacher).
    """
    if weights_b is None:
        return functional.kl_div(logits_bl.log_softmax(-1), targets_bl, reduction="batchmean")
    apart = functional.kl_div(logits_bl.log_softmax(-1), targets_bl, reduction="none").sum(-1)
    return (weights_b * apart).mean()


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


Divergence = Literal["forward", "reverse", "js"]
Matrix = tuple[Tensor, Tensor | None]


def divergence(
    teacher_bl: Tensor, student_bl: Tensor, kind: Divergence = "forward", temperature: float = 1.0
) -> Tensor:
    """Mean over rows of t^2 D(softmax(z_T / t), softmax(z_S / t)); logits [batch, labels].

    ``forward`` is KL(T || S), ``reverse`` KL(S || T), ``js`` (KL(T || M) + KL(S || M)) / 2 with M their mean. The
    factor keeps gradients of one size whatever the temperature (Hinton et al. 2015).
    """
    log_p, log_q = (teacher_bl / temperature).log_softmax(-1), (student_bl / temperature).log_softmax(-1)
    return temperature**2 * _divergence(log_p, log_q, kind).sum() / max(len(log_p), 1)


def _divergence(log_p: Tensor, log_q: Tensor, kind: Divergence) -> Tensor:
    """By row; of two log-distributions."""
    if kind == "forward":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if kind == "reverse":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = torch.logaddexp(log_p, log_q) - _LOG_2
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def chunked_divergence(
    teacher_nk: Tensor, teacher_head: Matrix, student_nh: Tensor, student_head: Matrix, kind: Divergence = "forward",
    temperature: float = 1.0, targets_n: Tensor | None = None, labels: float = 0.0,
) -> Tensor:  # fmt: skip
    """(1 - labels) ``divergence`` + labels cross-entropy, over a vocabulary of any size, from hidden states.

    teacher_nk, student_nh: [tokens, hidden] before the heads; a head is a weight [vocabulary, hidden] and a bias, or
    None. Logits are made for some tokens at a time, their gradients at once, by hand, so memory does not grow with
    tokens x vocabulary: with q = softmax(z_S / t) and g = dD/dq, dD/dz = q (g - <q, g>) / t. ``targets_n`` are the
    true next tokens. No gradient goes to the teacher. Raises ValueError where the vocabularies differ, and where
    ``labels`` count and there are no targets.
    """
    weight, bias = student_head
    if teacher_head[0].shape[0] != weight.shape[0]:
        raise ValueError(f"vocabularies of {teacher_head[0].shape[0]} and {weight.shape[0]} tokens")
    if labels and targets_n is None:
        raise ValueError(f"labels count {labels} and there are no targets")
    loss: Tensor = _Chunked.apply(
        student_nh, weight, bias, teacher_nk.detach(), teacher_head, targets_n, kind, temperature, labels
    )
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, head: Matrix, targets: Tensor | None,
        kind: Divergence, t: float, labels: float,
    ) -> Tensor:  # fmt: skip
        count, total = max(len(h), 1), h.new_zeros((), dtype=torch.float32)
        dh, dw = torch.empty_like(h), torch.zeros_like(weight)
        db = None if bias is None else torch.zeros_like(bias)
        size = max(_TOKENS, weight.shape[1] // 8)
        for start in range(0, len(h), size):
            part = slice(start, start + size)
            truth = None if targets is None else targets[part]
            z, soft = functional.linear(h[part], weight, bias), teacher[part]
            value, dz = _chunk(z, soft, head, truth, kind, t, labels)
            del z
            total += value / count
            dz = dz.mul_(1 / count).to(weight.dtype)
            dh[part] = dz @ weight
            dw.addmm_(dz.T, h[part].to(weight.dtype))
            if db is not None:
                db += dz.sum(0)
        ctx.save_for_backward(dh, dw, *([] if db is None else [db]))
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found, scale = ctx.saved_tensors, grads[0]
        if scale != 1:  # a copy as large as the head
            found = [d * scale for d in found]
        return (*found, *[None] * (9 - len(found)))


def _chunk(
    z: Tensor, teacher: Tensor, head: Matrix, targets: Tensor | None, kind: Divergence, t: float, labels: float
) -> tuple[Tensor, Tensor]:
    """The loss summed over some tokens, and its gradient in their logits, which are overwritten."""
    z = z.float()
    total, hard = z.new_zeros(()), None
    if targets is not None and labels:
        hard = z.log_softmax(-1)
        total -= labels * hard.gather(1, targets[:, None]).sum()
        hard.exp_()
        hard[torch.arange(len(hard), device=z.device), targets] -= 1
    if hard is not None and labels == 1:
        return total, hard
    log_q = z.div_(t).log_softmax(-1)
    del z
    log_p = functional.linear(teacher, *head).float().div_(t).log_softmax(-1)
    with torch.autocast(log_q.device.type, enabled=False):  # products below would be rounded to bf16
        value, dz = _with_gradient(log_p, log_q, kind)
    dz.mul_((1 - labels) * t)
    return total + (1 - labels) * t**2 * value, dz if hard is None else dz.add_(hard, alpha=labels)


def _with_gradient(log_p: Tensor, log_q: Tensor, kind: Divergence) -> tuple[Tensor, Tensor]:
    """The sum over rows of D, and its gradient in the student's logits; both arguments are overwritten."""

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return torch.bmm(a[:, None], b[:, :, None]).flatten()  # no product of their size is held

    if kind == "forward":
        p = log_p.exp()
        value = dot(p, log_p.sub_(log_q)).sum()
        return value, log_q.exp_().sub_(p)
    if kind == "reverse":
        g, q = log_p.neg_().add_(log_q), log_q.exp_()
        row = dot(q, g)
        return row.sum(), g.sub_(row[:, None]).mul_(q)
    log_m = torch.logaddexp(log_p, log_q).sub_(_LOG_2)
    p = log_p.exp()
    left = dot(p, log_p.sub_(log_m))
    g, q = log_m.neg_().add_(log_q), log_q.exp_()
    row = dot(q, g)
    return 0.5 * (left + row).sum(), g.sub_(row[:, None]).mul_(q).mul_(0.5)
