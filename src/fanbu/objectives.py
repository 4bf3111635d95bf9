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

_APART = 2.0  # at most so far a label's log-odds are moved


def labelled(sequences: Sequences, labels: Sequence[int], pad: int, device: str) -> BatchLoss:
    """Cross-entropy of a label head."""
    target = torch.tensor(labels, device=device)

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        logits = network(**collate([sequences[i] for i in rows], pad, device)).logits
        return functional.cross_entropy(logits.float(), target[list(rows)])

    return loss


def soft_labelled(
    sequences: Sequences, targets_nl: Tensor, pad: int, device: str, weights_n: Tensor | None = None
) -> BatchLoss:
    """KL to soft labels over the whole union head (``losses.soft_cross_entropy``)."""

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        logits = network(**collate([sequences[i] for i in rows], pad, device)).logits
        few = list(rows)
        weights = None if weights_n is None else weights_n[few].to(device)
        return soft_cross_entropy(logits.float(), targets_nl[few].float().to(device), weights)

    return loss


def informed(
    sequences: Sequences, targets_nl: Tensor, pad: int, device: str, groups: Sequence[Sequence[int]],
    group: Sequence[int], weight: float,
) -> BatchLoss:  # fmt: skip
    """``soft_labelled``, and information maximisation on rows of a target: + weight (mean H(q(x)) - H(mean q(x))).

    ``group`` [texts] says of each row which of ``groups``, the labels of a target's industry, q is restricted to, -1:
    of none. Each answer is to be certain and all of them together even. Reference: Liang et al. 2020 (SHOT).
    """
    numbers = torch.tensor(group)

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        logits = network(**collate([sequences[i] for i in rows], pad, device)).logits.float()
        few = list(rows)
        total = soft_cross_entropy(logits, targets_nl[few].float().to(device))
        for number in sorted(set(numbers[few].tolist()) - {-1}):
            own = (numbers[few] == number).to(device)
            log_q = logits[own][:, torch.tensor(groups[number], device=device)].log_softmax(1)
            mean = log_q.exp().mean(0)
            unsure = -(log_q.exp() * log_q).sum(1).mean() + (mean * mean.clamp_min(1e-6).log()).sum()
            total = total + weight * float(own.float().mean()) * unsure
        return total

    return loss


def related(
    sequences: Sequences, targets_nl: Tensor, pad: int, device: str, features: Sequence[Tensor], place_nt: Tensor,
    weight: float, weights_n: Tensor | None = None,
) -> BatchLoss:  # fmt: skip
    """``soft_labelled`` + weight mean over pairs of a batch that a teacher saw of (cos teacher - cos student)^2.

    ``features`` are each teacher's unit vectors, ``place_nt`` [texts, teachers] the row's place in them or -1; rows
    beyond its length have none. Only angles between pooled features count, so widths may differ. Reference: Tung and
    Mori 2019, "Similarity-preserving knowledge distillation".
    """

    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        with without_head(network):
            pooled = network(**collate([sequences[i] for i in rows], pad, device)).logits
        logits = final_layer(network)(pooled).float()
        few = list(rows)
        weights = None if weights_n is None else weights_n[few].to(device)
        total = soft_cross_entropy(logits, targets_nl[few].float().to(device), weights)
        x, apart = functional.normalize(pooled.float(), dim=1), []
        for teacher, known in enumerate(features):
            places = [int(place_nt[i, teacher]) if i < len(place_nt) else -1 for i in rows]
            own = [k for k, at in enumerate(places) if at >= 0]
            if len(own) > 1:
                seen = known[[places[k] for k in own]].to(device)
                off = (seen @ seen.T - x[own] @ x[own].T).square()
                apart.append(off[~torch.eye(len(own), dtype=torch.bool, device=device)])
        return total + weight * torch.cat(apart).mean() if apart else total

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


class Confidence(nn.Module):
    """The state of the auxiliary confidence loss (Burns et al. 2023), kept in checkpoints beside the network's.

    ``seen`` counts batches; ``mean_l`` is the running mean of the student's answers within each domain, over about as
    many as the domain has texts, which starts at the teachers', ``log_prior_l``. Both are missing for causal models.
    """

    def __init__(
        self, most: float, ramp: float, targets_nl: Tensor | None = None, groups: Sequence[Sequence[int]] = (),
        own: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        self.most, self.ramp, self.groups = most, ramp, [list(g) for g in groups]
        self.seen: Tensor
        self.mean_l: Tensor
        self.log_prior_l: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.texts = [list(own).count(number) for number in range(len(self.groups))]
        if targets_nl is not None:
            numbers, prior = torch.tensor(own), torch.ones(targets_nl.shape[1])
            for number, labels in enumerate(self.groups):
                if bool((numbers == number).any()):
                    prior[labels] = targets_nl[numbers == number][:, labels].float().mean(0).clamp_min(1e-4)
            self.register_buffer("mean_l", prior.clone())
            self.register_buffer("log_prior_l", prior.log())

    def share(self) -> float:
        """How much the student's own answers count in this batch; counts it."""
        self.seen += 1
        return self.most * min(1.0, int(self.seen) / max(self.ramp, 1.0))

    @torch.no_grad()
    def own_labels(self, logits_bl: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """What the student finds likeliest among the labels of each row's domain, and how sure it is of that. Rows of
        no domain: among all."""
        found, sure = logits_bl.argmax(1), logits_bl.softmax(1).amax(1)
        for number in sorted(set(numbers.tolist()) - {-1}):
            rows, labels = numbers == number, torch.tensor(self.groups[number], device=logits_bl.device)
            log_q = logits_bl[rows][:, labels].float().log_softmax(1)
            mean = self.mean_l[labels]
            mean += min(1.0, len(log_q) / self.texts[number]) * (log_q.exp().mean(0) - mean)
            self.mean_l[labels] = mean
            apart = (self.log_prior_l[labels] - mean.clamp_min(1e-4).log()).clamp(-_APART, _APART)
            best = (log_q + apart).argmax(1)
            found[rows], sure[rows] = labels[best], log_q.exp().gather(1, best[:, None])[:, 0]
        return found, sure


def confident(
    sequences: Sequences, targets_nl: Tensor, weights_n: Tensor, own: Sequence[int], pad: int, device: str
) -> BatchLoss:
    """(1 - a) w KL to soft labels + a CE to the student's own (``Confidence``); a is 0 where the teacher is surer, and
    on rows without one."""
    numbers = torch.tensor(own)

    def loss(student: Any, rows: Sequence[int]) -> Tensor:
        logits = student["network"](**collate([sequences[i] for i in rows], pad, device)).logits.float()
        state, few = student["confidence"], list(rows)
        share = state.share()
        weights, taught = weights_n[few].to(device), (numbers[few] >= 0).to(device)
        target = targets_nl[few].float().to(device)
        soft = functional.kl_div(logits.log_softmax(1), target, reduction="none").sum(1)
        own_labels, sure = state.own_labels(logits.detach(), numbers[few].to(device))
        hard = functional.cross_entropy(logits, own_labels, reduction="none")
        a = share * (taught & (sure >= weights * target.amax(1)))
        return ((1 - a) * weights * soft + a * hard).mean()

    return loss


def confident_language(
    sequences: Sequences, targets: Sequence[tuple[Tensor, Tensor]], taught: Sequence[bool], pad: int, device: str
) -> BatchLoss:
    """(1 - a) KL to the teacher's top-k next tokens + a CE to the student's likeliest, where it is surer of that than
    the teacher of its own, on rows with one."""

    def loss(student: Any, rows: Sequence[int]) -> Tensor:
        batch = collate([sequences[i] for i in rows], pad, device)
        keep = batch["attention_mask"][:, 1:].bool()
        indices = torch.cat([targets[i][0] for i in rows]).long().to(device)
        probs = torch.cat([targets[i][1].float() for i in rows]).to(device)
        z = student["network"](**batch).logits[:, :-1][keep].float()
        share = student["confidence"].share()
        soft = top_k_divergence(z, indices, probs)
        spoken = torch.tensor([taught[i] for i in rows], device=device)[:, None].expand_as(keep)[keep]
        own = spoken & (z.detach().softmax(1).amax(1) >= probs.amax(1))
        if not (share and own.any()):
            return soft
        part = share * float(own.double().mean())
        return (1 - part) * soft + part * functional.cross_entropy(z[own], z[own].detach().argmax(1))

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
