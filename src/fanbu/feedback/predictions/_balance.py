"""How much each text counts, so that no domain drowns in another's rows or is done before it is learned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fanbu.predict import class_logits
from fanbu.types import Context

_LEAST = 1e-3


def row_weights(
    domains: Sequence[str | None], by_size: float, by_difficulty: float, targets_nl: Tensor, logits_nl: Tensor | None,
    given: Mapping[str, float] = {},
) -> Tensor:  # fmt: skip
    """w [texts], mean 1: g_d n_d^-by_size KL_d^by_difficulty for a text of domain d, which has n_d of the texts and is
    given g_d, 1 where it is not named.

    KL_d is the mean of KL(target || base) over the domain's texts: how far the base is from what it is to say.
    Texts of nobody are a group of their own.
    """
    counts = Counter(domains)
    weight = {d: given.get(d or "", 1.0) * float(n) ** -by_size for d, n in counts.items()}
    if by_difficulty and logits_nl is not None:
        apart = torch.nn.functional.kl_div(logits_nl.log_softmax(1), targets_nl.float(), reduction="none").sum(1)
        for d in counts:
            rows = torch.tensor([other == d for other in domains])
            weight[d] *= max(float(apart[rows].mean()), _LEAST) ** by_difficulty
    w = torch.tensor([weight[d] for d in domains])
    return w / w.mean()


def balanced(
    network: Any, tokenizer: Any, texts: Sequence[str], domains: Sequence[str | None], targets_nl: Tensor,
    context: Context, by_size: float, by_difficulty: float, given: Mapping[str, float] = {},
) -> Tensor | None:  # fmt: skip
    """``row_weights``, the base asked where it must be; None where all count alike."""
    if not (by_size or by_difficulty or given):
        return None
    logits = class_logits(network, tokenizer, texts, context) if by_difficulty else None
    return row_weights(domains, by_size, by_difficulty, targets_nl, logits, given)
