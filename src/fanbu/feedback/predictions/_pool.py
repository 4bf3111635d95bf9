"""Several owners of one industry, asked about the same texts: their answers as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from fanbu.feedback.predictions._reliability import accuracies, weight_of
from fanbu.feedback.predictions._stacking import stacked

Combine = Literal["weighted", "mean", "log_mean", "gate", "stacked"]
_STEPS = 300
_LEAST = 1e-6
_LEAST_HEARD = 0.02
_AS_RIGHT = 0.5
_TEMPERATURES = torch.logspace(0, 1.5, 31)


@dataclass(frozen=True)
class Voice:
    """What one specialist says: ``probs_nk`` [texts, the labels it knows], of the rows ``columns`` of its industry.

    ``own_n`` marks the texts of its own owner, and ``weight`` is how much it counts beside the others from the start.
    """

    domain: str
    columns: Sequence[int]
    probs_nk: Tensor
    own_n: Tensor
    weight: float = 1.0


def pool(
    voices: Sequence[Voice], start_nl: Tensor, combine: Combine = "weighted", truth_n: Tensor | None = None
) -> Tensor:
    """q [texts, labels of the industry], rows summing to 1; nothing for labels that nobody knows.

    ``weighted`` and ``mean``: q minimises sum_t w_t KL(p_t || q restricted to the labels that t knows), so a
    specialist says nothing of labels that it does not know; where all know the same it is the mean sum_t w_t p_t.
    ``mean`` gives each the same weight; ``weighted`` each its reliability (``reliable``) times how sure it is of the
    text, max_l p_t(l). ``log_mean``: the geometric mean, of each p_t scaled to what the mean gives to the labels that
    t knows. ``gate``: a text's own owner decides; on texts of nobody, the surest. ``stacked``: ``_stacking.stacked`` by
    the labels ``truth_n``, -1 where they are not known.
    ``start_nl`` [texts, labels] decides between labels that no specialist knows both of.
    References: Vongkulbhisal et al. 2019 (unifying heterogeneous classifiers); Hunter 2004 for the iteration.
    """
    if len(voices) == 1:
        return _spread(voices[0], start_nl)
    if combine == "gate":
        return _gated(voices, start_nl)
    weights = [torch.full((len(start_nl),), v.weight) for v in voices]
    if combine == "weighted":
        judged = reliable(voices)
        voices = [v for v, _ in judged]
        weights = [v.weight * reliability * v.probs_nk.max(1).values for v, reliability in judged]
    q = _unified(voices, weights, start_nl)
    if combine == "stacked":
        unseen = blind(voices, start_nl)
        at_hand = [[_beside(v, mean) for v in voices] for mean in (unseen, q)]
        return stacked(at_hand[0], [v.own_n for v in voices], unseen, truth_n, at_hand[1], q)
    return _geometric(voices, q) if combine == "log_mean" else q


def blind(voices: Sequence[Voice], start_nl: Tensor) -> Tensor:
    """The mean of those who were not trained on a text; where everybody was, ``start_nl``."""
    weights = [v.weight * (~v.own_n).float() for v in voices]
    heard = torch.stack(weights).sum(0) > 0
    q = start_nl / start_nl.sum(1, keepdim=True).clamp_min(_LEAST)
    q[heard] = _unified(voices, weights, start_nl)[heard]
    return q


def _spread(voice: Voice, start_nl: Tensor) -> Tensor:
    q = torch.zeros_like(start_nl)
    q[:, list(voice.columns)] = voice.probs_nk
    return q


def _unified(voices: Sequence[Voice], weights: Sequence[Tensor], start_nl: Tensor) -> Tensor:
    """The fixed point of q(l) = sum_t w_t p_t(l) / sum over t that know l of w_t / q(labels of t)."""
    shares = [w / torch.stack(list(weights)).sum(0).clamp_min(_LEAST) for w in weights]
    said_nl = sum(w[:, None] * _spread(v, start_nl) for v, w in zip(voices, shares, strict=True))
    known = torch.zeros(start_nl.shape[1], dtype=torch.bool)
    for v in voices:
        known[list(v.columns)] = True
    q = (start_nl.clamp_min(_LEAST)) * known
    q = q / q.sum(1, keepdim=True)
    for _ in range(1 if all(len(v.columns) == int(known.sum()) for v in voices) else _STEPS):
        asked_nl = torch.zeros_like(q)
        for v, w in zip(voices, shares, strict=True):
            columns = list(v.columns)
            asked_nl[:, columns] += (w / q[:, columns].sum(1).clamp_min(_LEAST))[:, None]
        q = said_nl / asked_nl.clamp_min(_LEAST)
        q = q / q.sum(1, keepdim=True).clamp_min(_LEAST)
    return q


def _beside(voice: Voice, mean_nl: Tensor) -> Tensor:
    """log p - log mean [texts, labels]: what one says beyond the mean, 0 of labels that it does not know."""
    return among_all(voice, mean_nl).clamp_min(_LEAST).log() - mean_nl.clamp_min(_LEAST).log()


def among_all(voice: Voice, mean_nl: Tensor) -> Tensor:
    """p [texts, labels]: what one says of the labels it knows, scaled to what the mean gives them; else the mean."""
    columns, p = list(voice.columns), mean_nl.clone()
    p[:, columns] = voice.probs_nk * mean_nl[:, columns].sum(1, keepdim=True)
    return p


def _geometric(voices: Sequence[Voice], mean_nl: Tensor) -> Tensor:
    total, knowing = torch.zeros_like(mean_nl), torch.zeros(mean_nl.shape[1])
    for v in voices:
        total += v.weight * _beside(v, mean_nl)
        knowing[list(v.columns)] += v.weight
    q = mean_nl * (total / knowing.clamp_min(_LEAST)).exp()
    return q / q.sum(1, keepdim=True)


def _gated(voices: Sequence[Voice], start_nl: Tensor) -> Tensor:
    sure = torch.stack([v.probs_nk.max(1).values + 2 * v.own_n.float() for v in voices])
    chosen = sure.argmax(0)
    said = torch.stack([_spread(v, start_nl) for v in voices])
    return said[chosen, torch.arange(len(start_nl))]


def reliable(voices: Sequence[Voice]) -> list[tuple[Voice, Tensor]]:
    """Each voice with its weight [texts]: what its answers are worth by how right it is among this owner's texts.

    The weight is log(a (k - 1) / (1 - a)) for k labels, with a as ``_reliability.accuracies`` finds it; at least 0.02,
    so that labels which one alone knows are not lost. Where all know the same labels, who is surer than it is right is
    brought down to that by a temperature: the smallest of 1 to 32 for which its mean max_l p(l) is no more than a. On
    its own owner's texts a specialist weighs as much as all others together, as sure as it is, unless it is found less
    than half as right as the best of them: it knows these texts, and the others may err together. Two voices cannot
    judge each other: both count in full, but a specialist half on another owner's texts.
    """
    if len(voices) < 3:
        return [(v, torch.where(v.own_n | ~v.own_n.any(), 1.0, 0.5)) for v in voices]
    labels = 1 + max(max(v.columns) for v in voices)
    said = [torch.tensor(list(v.columns))[v.probs_nk.argmax(1)] for v in voices]
    alike = all(set(v.columns) == set(voices[0].columns) for v in voices)
    right = accuracies(said, [v.columns for v in voices], [v.own_n for v in voices], labels)
    weight = [weight_of(a, len(v.columns)).clamp_min(_LEAST_HEARD) for v, a in zip(voices, right, strict=True)]
    total, best = torch.stack(weight).sum(0), torch.stack(right).amax(0)
    found = []
    for v, a, w in zip(voices, right, weight, strict=True):
        knowing = v.own_n & (a >= _AS_RIGHT * best)
        p = v.probs_nk.clone()
        for share in a[~knowing].unique().tolist() if alike else ():
            rows = (a == share) & ~knowing
            p[rows] = _no_surer(p[rows], share)
        found.append((replace(v, probs_nk=p), torch.where(knowing, torch.maximum(w, total - w), w)))
    return found


def _no_surer(probs_nk: Tensor, right: float) -> Tensor:
    for temperature in _TEMPERATURES.tolist():
        calmer = probs_nk.clamp_min(_LEAST).log().div(temperature).softmax(1)
        if float(calmer.max(1).values.mean()) <= right:
            break
    return calmer
