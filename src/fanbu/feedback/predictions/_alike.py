"""Labels of different owners that mean the same, by what specialists say of the same texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.predictions._panel import asked, columns_of, heard, made_for
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
    said = [_Said.of(c, base, context, augment) for c in panels] if base.task in CLASSIFYING else []
    found: dict[str, float] = {}
    for one, other in combinations(sorted(said, key=lambda s: s.domain), 2):
        rows = sorted(set(one.rows) & set(other.rows))
        a, b = ((s.of_some(rows, t) > _SURE).float() for s, t in ((one, other), (other, one)))
        if not (len(rows) and a.shape[1] and b.shape[1]):
            continue
        overlap = _overlap(a, b)
        for i, j in (overlap >= _OVERLAP).nonzero().tolist():
            if overlap[i].argmax() == j and overlap[:, j].argmax() == i:
                pair = sorted([base.labels[one.own(other)[i]], base.labels[other.own(one)[j]]])
                key = " = ".join(pair)
                found[key] = max(found.get(key, 0.0), round(float(overlap[i, j]), 2))
    return found


def _overlap(a_nk: Tensor, b_nl: Tensor) -> Tensor:
    """[k, l]: overlaps; 0 of what is said together of few texts, or no oftener than by chance."""
    both, a, b, n = a_nk.T @ b_nl, a_nk.sum(0)[:, None], b_nl.sum(0)[None], len(a_nk)
    expected = a * b / n
    chance = expected + _ERRORS * (expected * (1 - a / n) * (1 - b / n)).sqrt()
    overlap = both / (a + b - both).clamp_min(1)
    overlap[(both < _TEXTS) | (both <= chance)] = 0
    return overlap


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
