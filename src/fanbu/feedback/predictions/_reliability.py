"""How right each specialist is on each owner's texts, found from their answers alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_OWN, _OTHER = 0.95, 0.4  # how right a specialist is on its owner's texts, and on others', until answers tell
_PRIOR = 10.0  # texts that the latter counts as; the former counts as half of all
_FEW = 30  # of fewer texts answers tell nothing
_STEPS = 30


def accuracies(
    said: Sequence[Tensor], columns: Sequence[Sequence[int]], own: Sequence[Tensor], labels: int
) -> list[Tensor]:
    """For each specialist [texts]: the share of right answers among texts of the same owner, by what all say.

    The one-coin model of Dawid and Skene, fitted by EM: t names the true label with probability a_t, else any other
    that it knows; about labels that it does not know it says nothing. A share starts at 0.95 on a specialist's own
    owner's texts, which counts as half as many texts as there are: it was trained on them, and others may err together.
    It starts at 0.4 on others', which counts as ten; where an owner has fewer than thirty texts that stays. So whoever
    answers at random, always the same or with exchanged labels comes out low, as long as enough others are right.
    ``said`` [texts] are numbers of labels, ``own`` [texts] marks a specialist's own texts.
    Reference: Dawid and Skene 1979, "Maximum likelihood estimation of observer error-rates".
    """
    owner = torch.full_like(said[0], -1)
    for number, mine in enumerate(own):
        owner[mine] = number
    found = [torch.zeros(len(owner)) for _ in said]
    for number in sorted(set(owner.tolist())):
        rows = owner == number
        shares = _fitted([s[rows] for s in said], columns, number, labels)
        for t, share in enumerate(shares):
            found[t][rows] = share
    return found


def _fitted(said: Sequence[Tensor], columns: Sequence[Sequence[int]], owner: int, labels: int) -> list[float]:
    prior = [_OWN if t == owner else _OTHER for t in range(len(said))]
    shares = list(prior)
    if len(said[0]) < _FEW or len(said) < 3:
        return shares
    strength = [len(said[0]) / 2 if t == owner else _PRIOR for t in range(len(said))]
    knows = torch.zeros(len(said), labels, dtype=torch.bool)
    for t, known in enumerate(columns):
        knows[t, list(known)] = True
    named = torch.stack([torch.nn.functional.one_hot(s, labels).bool() for s in said])
    for _ in range(_STEPS):
        log_q = torch.zeros(len(said[0]), labels)
        for t, a in enumerate(shares):
            others = max(int(knows[t].sum()) - 1, 1)
            right, wrong, silent = math.log(a), math.log((1 - a) / others), -math.log(others + 1)
            log_q += torch.where(knows[t], torch.where(named[t], right, wrong), torch.tensor(silent))
        q = log_q.softmax(1)
        for t, first in enumerate(prior):
            asked, right = float((q * knows[t]).sum()), float((q * named[t]).sum())
            shares[t] = min(max((right + strength[t] * first) / (asked + strength[t]), 0.001), 0.999)
    return shares


def weight_of(accuracy_n: Tensor, labels: int) -> Tensor:
    """log(a (k - 1) / (1 - a)), what an answer is worth as evidence among k labels; at least 0."""
    a = accuracy_n.clamp(0.001, 0.999)
    return (a * max(labels - 1, 1) / (1 - a)).log().clamp_min(0)
