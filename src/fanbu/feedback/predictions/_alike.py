"""Labels of different owners that mean the same, by what specialists say of the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.predictions._panel import Answers, answered
from fanbu.model import Model
from fanbu.types import CLASSIFYING, Context

_OVERLAP = 0.6
_TEXTS = 15  # that both say it of, at least
_ERRORS = 3.0
_SURE = 0.5  # who gives a label more says it


def alike(base: Model, panels: Sequence[Contribution], context: Context, augment: int = 0) -> dict[str, float]:
    """By ``LABEL = LABEL``: how far two specialists say them of the same texts, where they seem to mean the same.

    A specialist says a label that it gives more than 0.5. The overlap of two is n_ab / (n_a + n_b - n_ab), counted over
    the N probe rows that both were asked about: those of their industry, and those of nobody's. Named are labels that
    not both know, each the other's best, with an overlap of 0.6 or more, said together of 15 texts at least, and by
    three standard errors more often than independent answers would be, of which e = n_a n_b / N with a variance of
    e (1 - n_a / N) (1 - n_b / N). Nothing is joined: a person decides.
    """
    if base.task not in CLASSIFYING:
        return {}
    found: dict[str, float] = {}
    for one, other in combinations([answered(c, base, context, augment) for c in panels], 2):
        rows = sorted(set(one.rows) & set(other.rows))
        a, b = _said(one, rows, other.columns), _said(other, rows, one.columns)
        if not (rows and a and b):
            continue
        overlap = _overlap(torch.stack(list(a.values()), 1), torch.stack(list(b.values()), 1))
        for i, j in (overlap >= _OVERLAP).nonzero().tolist():
            if overlap[i].argmax() == j and overlap[:, j].argmax() == i:
                pair = " = ".join(sorted(base.labels[k] for k in (list(a)[i], list(b)[j])))
                found[pair] = max(found.get(pair, 0.0), round(float(overlap[i, j]), 2))
    return dict(sorted(found.items()))


def _said(one: Answers, rows: Sequence[int], known: Sequence[int]) -> dict[int, Tensor]:
    """By number of a label row that is not ``known`` to the other: 1 for each of the rows that are said to have it."""
    place = {row: k for k, row in enumerate(one.rows)}
    said_nk = (one.probs_nk[[place[row] for row in rows]] > _SURE).float()
    return {i: said_nk[:, k] for k, i in enumerate(one.columns) if i not in known}


def _overlap(a_nk: Tensor, b_nl: Tensor) -> Tensor:
    """[k, l]: overlaps; 0 of what is said together of few texts, or no oftener than by chance."""
    both, a, b, n = a_nk.T @ b_nl, a_nk.sum(0)[:, None], b_nl.sum(0)[None], len(a_nk)
    expected = a * b / n
    chance = expected + _ERRORS * (expected * (1 - a / n) * (1 - b / n)).sqrt()
    overlap = both / (a + b - both).clamp_min(1)
    overlap[(both < _TEXTS) | (both <= chance)] = 0
    return overlap
