"""Labels of different owners that mean the same, by what specialists say of the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.predictions._panel import asked, columns_of, heard, made_for
from fanbu.model import Model
from fanbu.types import CLASSIFYING, Context

_OVERLAP = 0.6  # more than who knows two labels, and says both alike, has with anyone
_TEXTS = 15.0  # that both must say it of, in sum of probabilities


def alike(base: Model, panels: Sequence[Contribution], context: Context, augment: int = 0) -> dict[str, float]:
    """By ``LABEL = LABEL``: how far two specialists say them of the same texts, where they seem to mean the same.

    The overlap is sum_x min(p(a | x), p(b | x)) / sum_x max(p(a | x), p(b | x)) over the probe rows that both were
    asked about: those of their industry, and those of nobody's. Named are labels that not both know, each the other's
    best, with an overlap of 0.6 or more and 15 texts in the numerator. Nothing is joined: a person decides.
    """
    said = [_Said.of(c, base, context, augment) for c in panels] if base.task in CLASSIFYING else []
    found: dict[str, float] = {}
    for one, other in combinations(sorted(said, key=lambda s: s.domain), 2):
        rows = sorted(set(one.rows) & set(other.rows))
        p, q = one.of_some(rows, other), other.of_some(rows, one)
        if not (len(rows) and p.shape[1] and q.shape[1]):
            continue
        both = torch.stack([torch.minimum(p, column[:, None]).sum(0) for column in q.T], dim=1)
        overlap = both / (p.sum(0)[:, None] + q.sum(0)[None] - both).clamp_min(1e-9)
        overlap[both < _TEXTS] = 0
        for i, j in (overlap >= _OVERLAP).nonzero().tolist():
            if overlap[i].argmax() == j and overlap[:, j].argmax() == i:
                pair = sorted([base.labels[one.own(other)[i]], base.labels[other.own(one)[j]]])
                key = " = ".join(pair)
                found[key] = max(found.get(key, 0.0), round(float(overlap[i, j]), 2))
    return found


@dataclass(frozen=True)
class _Said:
    """One specialist's answers [rows, columns], of label rows ``columns`` in the base."""

    domain: str
    rows: Sequence[int]
    columns: Sequence[int]
    probs_nk: Tensor

    @classmethod
    def of(cls, c: Contribution, base: Model, context: Context, augment: int) -> _Said:
        rows, columns = asked(context, c.domain), columns_of(c, base)
        p = heard(c, len(rows) + made_for(context, c.domain, augment), len(columns))
        return cls(c.domain, rows, columns, p[: len(rows)])

    def own(self, other: _Said) -> list[int]:
        """Label rows that the other does not know."""
        return [i for i in self.columns if i not in other.columns]

    def of_some(self, rows: Sequence[int], other: _Said) -> Tensor:
        """[rows, ``own``]."""
        place = {row: k for k, row in enumerate(self.rows)}
        columns = [self.columns.index(i) for i in self.own(other)]
        return self.probs_nk[[place[row] for row in rows]][:, columns]
