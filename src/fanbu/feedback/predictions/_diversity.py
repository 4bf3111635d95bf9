"""How much the specialists of one industry agree, and whether they err in the same places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from fanbu.feedback.predictions._pool import Voice

_MOST = 20  # voices whose pairs are told one by one


def diversity(voices: Sequence[Voice], reference_n: Tensor) -> list[Mapping[str, object]]:
    """For each pair: the share of texts on which they disagree, and Yule's Q of their being right.

    Q = (n11 n00 - n01 n10) / (n11 n00 + n01 n10) over texts, n11: both right, n01: the second alone, and so on; 1: they
    err together, 0: independently, below 0: where one errs the other tends to be right. Right is what agrees with
    ``reference_n``: the true label where it is known, else what they all say together. Texts whose reference is none
    of a voice's labels are left out. Of more than 20 voices the first 20 are told.
    Reference: Kuncheva and Whitaker 2003, "Measures of diversity in classifier ensembles".
    """
    found: list[Mapping[str, object]] = []
    for one, other in combinations(voices[:_MOST], 2):
        both = [torch.tensor(list(v.columns)) for v in (one, other)]
        known = torch.isin(reference_n, both[0]) & torch.isin(reference_n, both[1])
        said = [c[v.probs_nk.argmax(1)][known] for c, v in zip(both, (one, other), strict=True)]
        right = [s == reference_n[known] for s in said]
        n11, n00 = (int((right[0] & right[1]).sum()), int((~right[0] & ~right[1]).sum()))
        n10, n01 = (int((right[0] & ~right[1]).sum()), int((~right[0] & right[1]).sum()))
        same, apart = n11 * n00, n01 * n10
        found.append({
            "pair": [one.domain, other.domain], "texts": int(known.sum()),
            "disagreement": round(float((said[0] != said[1]).float().mean()), 4) if int(known.sum()) else None,
            "q": round((same - apart) / (same + apart), 4) if same + apart else None,
        })  # fmt: skip
    return found
