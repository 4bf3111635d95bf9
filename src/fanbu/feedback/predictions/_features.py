"""What a specialist's pooled features say of the probe rows, in one byte a number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fanbu.contribution import FEATURES, Contribution
from fanbu.domain import Specialist
from fanbu.errors import FitError, IntegrityError
from fanbu.feedback.predictions._panel import asked
from fanbu.model import load_network, load_tokenizer
from fanbu.predict import features
from fanbu.types import Context

_MOST = 127


def shown(specialist: Specialist, context: Context) -> dict[str, Tensor]:
    """``features`` [rows that are asked, hidden] in int8: unit vectors times 127 over their largest number."""
    network, tokenizer = load_network(specialist.model), load_tokenizer(specialist.model)
    texts = [context.probe.rows[i].text for i in asked(context, specialist.domain.name)]
    x = features(network, tokenizer, texts, context)
    return {FEATURES: (_MOST * x / x.abs().amax(1, keepdim=True).clamp_min(1e-12)).round().to(torch.int8)}


def seen(contributions: Sequence[Contribution], context: Context) -> tuple[list[Tensor], Tensor]:
    """Unit features by teacher, and for each probe row [probe rows, teachers] its place among a teacher's, or -1.

    Raises FitError where nobody shows any, and IntegrityError where they are not of the rows that were asked.
    """
    showing = [c for c in contributions if FEATURES in c.tensors]
    if not showing:
        raise FitError(
            "no-features", "distill is to learn from features, and no panel holds any", allowed="features: 0",
            remedy="let owners contribute with the same `features`, or leave it out",
        )  # fmt: skip
    found, place = [], torch.full((len(context.probe.rows), len(showing)), -1)
    for number, c in enumerate(showing):
        rows, x = asked(context, c.domain), c.tensors[FEATURES]
        if x.ndim != 2 or len(x) != len(rows) or x.dtype != torch.int8:
            raise IntegrityError(
                "contribution-broken", f"the features of {c.domain} are not those of the rows that it was asked about",
                allowed=f"{len(rows)} rows of int8", got=f"{tuple(x.shape)} of {x.dtype}",
                remedy="ask its owner to send it again",
            )  # fmt: skip
        found.append(torch.nn.functional.normalize(x.float(), dim=1))
        place[rows, number] = torch.arange(len(rows))
    return found, place
