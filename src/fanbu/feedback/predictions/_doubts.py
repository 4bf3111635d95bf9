"""Whose answers cannot be believed, by what the large model itself says: no label is needed at the centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fanbu.batches import evenly
from fanbu.contribution import Contribution
from fanbu.feedback.predictions._panel import asked, columns_of, heard, made_for
from fanbu.feedback.predictions._pool import agreement
from fanbu.model import Model
from fanbu.predict import class_logits
from fanbu.types import CLASSIFYING, Context

_ROWS = 500  # of a domain's that are looked at, at most
_FEW = 30  # of fewer rows chance says nothing
_MOSTLY = 0.6  # whoever agrees so often is believed, however uneven the labels are
_ERRORS = 3.0


def believed(
    base: Model, network: Any, tokenizer: Any, contributions: Sequence[Contribution], context: Context, augment: int = 0
) -> tuple[list[Contribution], dict[str, float]]:
    """The contributions of specialists that are trusted at all and not ``doubtful``; and whom to doubt."""
    trusted = [c for c in contributions if c.meta["trust"] > 0]
    doubted = doubtful(base, network, tokenizer, trusted, context, augment)
    return [c for c in trusted if c.domain not in doubted], doubted


def doubtful(
    base: Model, network: Any, tokenizer: Any, teachers: Sequence[Contribution], context: Context, augment: int = 0
) -> dict[str, float]:
    """Cohen's kappa of teacher and base, by domain, for teachers that agree with it no more than chance would.

    kappa = (a - e) / (1 - e): a is the share of the probe rows of its industry of which both find the same label
    likeliest, e what it would be if they answered independently, each label as often as it does. A teacher is doubted
    where kappa is below three standard errors, sqrt(e / (n (1 - e))), and a below 0.6. So answers that are drawn at
    random, always the same, or for exchanged labels are found; those of an honest one that is better than a weak base
    are not, since the base, probed, is right more often than chance is. What agrees in the main and errs on purpose in
    few places is not found this way; causal models are not looked at. Reference: Cohen 1960, "A coefficient of
    agreement for nominal scales".
    """
    found: dict[str, float] = {}
    for c in teachers if base.task in CLASSIFYING else ():
        rows = asked(context, c.domain)
        own = [k for k, i in enumerate(rows) if context.probe.rows[i].domain is not None]
        chosen, columns = evenly(own, _ROWS), columns_of(c, base)
        if len(chosen) < _FEW or len(columns) < 2:
            continue
        said = heard(c, len(rows) + made_for(context, c.domain, augment), len(columns))[chosen].argmax(1)
        texts = [context.probe.rows[rows[k]].text for k in chosen]
        thought = class_logits(network, tokenizer, texts, context)[:, columns].argmax(1)
        kappa, error, agreed = agreement(said, thought, len(columns))
        if agreed < _MOSTLY and kappa < _ERRORS * error:
            found[c.domain] = round(kappa, 3)
    return found
