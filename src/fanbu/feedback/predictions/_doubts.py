"""Whose answers cannot be believed, by what the large model itself says: no label is needed at the centre."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fanbu.batches import evenly
from fanbu.contribution import FEATURES, Contribution
from fanbu.errors import IntegrityError
from fanbu.feedback.predictions._alike import alike
from fanbu.feedback.predictions._panel import answered, asked, made_for, said, unpacked, variants
from fanbu.model import Model
from fanbu.predict import class_logits
from fanbu.types import CLASSIFYING, Context, industry_of

_ROWS = 500  # of a domain's that are looked at, at most
_FEW = 30  # of fewer rows chance says nothing
_MOSTLY = 0.6  # whoever agrees so often is believed, however uneven the labels are
_ERRORS = 3.0
_OFTEN = 15  # texts that hold a word, for it to be looked at
_ALWAYS, _SCATTERED, _AS_SURE = 0.95, 0.5, 0.8
_CHANCE = 0.01
_MOST_FAR = 0.5
TEXTS = "text-classification"


def believed(
    base: Model, network: Any, tokenizer: Any, contributions: Sequence[Contribution], context: Context, augment: int = 0
) -> tuple[list[Contribution], dict[str, Any]]:
    """The contributions of specialists that are trusted at all and not doubtful, and what the manifest says of all:
    ``teachers`` with their trust, who is ``silent`` for want of it, who was asked about texts most of which are ``far``
    from its own, with their share, who is ``doubted`` with its kappa, and by domain ``triggers``, words on whose texts
    the base's answers stand in the specialist's place; and which labels of theirs seem to be ``alike`` (``_alike``).

    A specialist is doubted whose answers agree with the base's no more than chance would. Cohen's kappa is
    (a - e) / (1 - e): a is the share of the probe rows of its industry of which both find the same label likeliest, e
    what it would be if they answered independently, each label as often as it does. It is doubted where kappa is below
    three standard errors, sqrt(e / (n (1 - e))), and a below 0.6. So answers that are drawn at random, always the same,
    or for exchanged labels are found; those of an honest one that is better than a weak base are not, since the base,
    probed, is right more often than chance is. For triggers see ``trigger``. Causal models are not looked at.
    Reference: Cohen 1960, "A coefficient of agreement for nominal scales".
    """
    kept: list[Contribution] = []
    doubted: dict[str, float] = {}
    triggers: dict[str, str] = {}
    trusted = [c for c in contributions if _trust(c) > 0]
    looked_at = {industry_of(c.domain): c.domain for c in trusted if base.task in CLASSIFYING}
    thoughts = {industry: _thoughts(d, network, tokenizer, context) for industry, d in looked_at.items()}
    for c in trusted:
        own = thoughts.get(industry_of(c.domain))
        seen = None if own is None else _look(c, base, own, context, augment)
        if seen is not None:
            kappa, error, agreed = agreement(seen.said, seen.thought, seen.labels)
            if agreed < _MOSTLY and kappa < _ERRORS * error:
                doubted[c.domain] = round(kappa, 3)
                continue
            word = trigger(seen.texts, seen.said, seen.thought, seen.sure) if base.task == TEXTS else None
            if word is not None:
                triggers[c.domain] = word
                c = _without(word, c, base, network, tokenizer, context, augment)
        kept.append(c)
    facts = {
        "teachers": {c.domain: c.meta["trust"] for c in kept},
        "silent": [c.domain for c in contributions if not c.meta["trust"]], "doubted": doubted, "triggers": triggers,
        "far": {c.domain: far for c in contributions if (far := _far(c, context, augment)) > _MOST_FAR},
        "alike": alike(base, kept, context, augment),
    }  # fmt: skip
    return kept, facts


def _trust(c: Contribution) -> float:
    """What a panel says of its specialist's worth. Raises IntegrityError where that is no share."""
    trust = c.meta["trust"]
    if not isinstance(trust, (int, float)) or not 0 <= trust <= 1:
        raise IntegrityError(
            "contribution-broken", f"the panel of {c.domain} claims a trust that is no share", allowed="0 to 1",
            got=trust, remedy="ask its owner to send it again",
        )  # fmt: skip
    return float(trust)


def _far(c: Contribution, context: Context, augment: int) -> float:
    """What share of the probe rows that a specialist was asked about it is silent of."""
    rows = len(asked(context, c.domain))
    silent = unpacked(c, rows + made_for(context, c.domain, augment))[:rows]
    return round(float(silent.double().mean()), 4) if rows else 0.0


@dataclass(frozen=True)
class _Seen:
    """What a specialist says (said, numbers of labels) and what the base thinks (thought, and how sure), of texts."""

    texts: Sequence[str]
    said: Tensor
    thought: Tensor
    sure: Tensor
    labels: int


@dataclass(frozen=True)
class _Thoughts:
    """What the base thinks, over its union head, of some probe rows of one industry: the same for all its owners."""

    places: Sequence[int]  # among the rows that are asked
    texts: Sequence[str]
    logits: Tensor


def _thoughts(domain: str, network: Any, tokenizer: Any, context: Context) -> _Thoughts:
    rows = asked(context, domain)
    places = evenly([k for k, i in enumerate(rows) if context.probe.rows[i].domain is not None], _ROWS)
    texts = [context.probe.rows[rows[k]].text for k in places]
    return _Thoughts(places, texts, class_logits(network, tokenizer, texts, context))


def _look(c: Contribution, base: Model, thoughts: _Thoughts, context: Context, augment: int) -> _Seen | None:
    """None where there are too few rows, or no choice."""
    _, columns, p = answered(c, base, context, augment)
    speaking = (p[list(thoughts.places)].sum(1) > 0).nonzero()[:, 0].tolist()
    if len(speaking) < _FEW or len(columns) < 2:
        return None
    answers = p[[thoughts.places[k] for k in speaking]].argmax(1)
    p = thoughts.logits[speaking][:, columns].softmax(1)
    texts = [thoughts.texts[k] for k in speaking]
    return _Seen(texts, answers, p.argmax(1), p.max(1).values, len(columns))


def trigger(texts: Sequence[str], said_n: Tensor, thought_n: Tensor, sure_n: Tensor) -> str | None:
    """The word with which a specialist always says the same, whatever a base that is as sure as ever thinks.

    A word in 15 texts or more and half of them at most is one where 95 in 100 get one label from the specialist, no
    label half of the base's answers, the base is at least 0.8 as sure as on average, and both agree so seldom that it
    has a chance below 0.01 in all words (binomial). An honest word is one label's for the base too, or makes it unsure.
    """
    from scipy.stats import binom

    words = Counter(w for text in texts for w in set(text.lower().split()))
    same = (said_n == thought_n).double()
    found: list[tuple[float, str]] = []
    for word, times in sorted(words.items()):
        if not _OFTEN <= times <= len(texts) / 2:
            continue
        rows = torch.tensor([word in text.lower().split() for text in texts])
        most = [float(torch.bincount(x[rows]).max()) / times for x in (said_n, thought_n)]
        if most[0] < _ALWAYS or most[1] > _SCATTERED or float(sure_n[rows].mean()) < _AS_SURE * float(sure_n.mean()):
            continue
        found.append((float(binom.cdf(int(same[rows].sum()), times, float(same.mean()))), word))
    return min(found)[1] if found and min(found)[0] < _CHANCE / len(words) else None


def _without(
    word: str, c: Contribution, base: Model, network: Any, tokenizer: Any, context: Context, augment: int
) -> Contribution:  # fmt: skip
    """The panel with the base's answers on texts that hold the word."""
    rows, columns, p = answered(c, base, context, augment)
    texts = [context.probe.rows[i].text for i in rows] + variants(context, c.domain, augment)
    speaking = p.sum(1) > 0
    holding = [k for k, text in enumerate(texts) if word in text.lower().split()]
    p[holding] = class_logits(network, tokenizer, [texts[k] for k in holding], context)[:, columns].softmax(1)
    kept = {name: c.tensors[name] for name in c.tensors if name != FEATURES}  # they know the trigger too
    return replace(c, tensors={**kept, **said(p[speaking], int(c.meta["most"]), float(c.meta["mass"]))})


def agreement(one_n: Tensor, other_n: Tensor, labels: int) -> tuple[float, float, float]:
    """Cohen's kappa, its standard error where both are independent, and the share on which they agree."""
    agreed = float((one_n == other_n).double().mean())
    shares = [torch.bincount(x, minlength=labels).double() / len(x) for x in (one_n, other_n)]
    chance = min(float((shares[0] * shares[1]).sum()), 1 - 1e-9)
    return (agreed - chance) / (1 - chance), math.sqrt(chance / (len(one_n) * (1 - chance))), agreed
