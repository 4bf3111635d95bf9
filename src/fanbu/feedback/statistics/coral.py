"""Correlation alignment: label rows of an industry's owners, bent to where a target without labels lies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.domain import Specialist, target_rows
from fanbu.errors import FitError, IntegrityError
from fanbu.feedback.statistics._label_rows import counts, join_rows
from fanbu.heads import Head, sent_head
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import features
from fanbu.probing import fit_probe
from fanbu.types import CLASSIFYING, Context, Needs, industry_of

NEEDS = Needs(kind="statistics", specialist=False, probe=True, target=True, tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """Mean and covariance of the frozen base's features of the owner's training texts, and label rows fitted on them.

    The specialist's own weights are not used. What crosses grows with the square of the base's width.
    """
    domain, network, tokenizer = specialist.domain, load_network(base), load_tokenizer(base)
    head, _ = fit_probe(network, tokenizer, domain, context)
    x = features(network, tokenizer, domain.train.texts, context)
    tensors = {
        "weight": head.weight_lh, "bias": head.bias_l, "mean": x.mean(0),
        "covariance": torch.cov(x.T, correction=0), **counts(domain),
    }  # fmt: skip
    return Contribution("statistics", domain.name, "coral", tensors, meta={"labels": list(head.labels)})


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    ridge: Annotated[float, Gt(0)] = 0.1,
) -> Model:  # fmt: skip
    """Puts label rows into the base that see a target's features as if they were each source's.

    A target's features x become (x - m_t) C_t^-1/2 C_s^1/2 + m_s, whose mean and covariance are the source's; since
    that is linear it is folded into the source's label rows, and rows of several sources are averaged by training
    rows. The industry's label rows then fit its targets, not its sources: this is the baseline that `adapt` is to beat.

    Args:
        ridge: added to both covariances, in shares of their mean variance.

    Raises:
        FitError: no probe row belongs to a target.
        IntegrityError: statistics of another width than the base's features.

    Reference: Sun et al. 2016, "Return of frustratingly easy domain adaptation" (which moves sources to the target).
    """
    rows = target_rows("coral", context, [c.domain for c in contributions])
    network, tokenizer = load_network(base), load_tokenizer(base)
    new = []
    for industry, numbers in rows.items():
        texts = [context.probe.rows[i].text for i in numbers]
        if len(set(texts)) < 2:
            raise FitError(
                "no-target", f"coral needs two different texts of a target, to see how they are spread: {industry}",
                allowed="2 or more", got=len(set(texts)), remedy="give it more texts, or take `adapt`",
            )  # fmt: skip
        x = features(network, tokenizer, texts, context).double()
        inverse, middle = _power(torch.cov(x.T, correction=0), ridge, -0.5), x.mean(0)
        for c in (c for c in contributions if industry_of(c.domain) == industry):
            new.append(_bent(c, inverse, middle, ridge))
    return join_rows(base, new, out, context, "coral", [c.domain for c in contributions])


def _bent(c: Contribution, inverse_hh: Tensor, middle_h: Tensor, ridge: float) -> Head:
    sent, mean_h, width = sent_head(c), c.tensors["mean"].double(), len(middle_h)
    weight_lh = sent.weight_lh.double()
    if weight_lh.shape[1:] != (width,) or c.tensors["covariance"].shape != (width, width) or len(mean_h) != width:
        raise IntegrityError(
            "contribution-broken", f"the statistics of {c.domain} are not of the base's features", allowed=width,
            got=tuple(c.tensors["covariance"].shape), remedy="ask its owner again, with this base",
        )  # fmt: skip
    turned_lh = weight_lh @ (inverse_hh @ _power(c.tensors["covariance"].double(), ridge, 0.5)).T
    bias_l = sent.bias_l.double() + weight_lh @ mean_h - turned_lh @ middle_h
    return Head(sent.labels, turned_lh.float(), bias_l.float(), sent.count_l)


def _power(c_hh: Tensor, ridge: float, power: float) -> Tensor:
    """(C + ridge mean variance I)^power, by eigenvalues."""
    level = float(c_hh.diagonal().mean().clamp_min(1e-12))
    values, vectors = torch.linalg.eigh((c_hh + c_hh.T) / 2 + ridge * level * torch.eye(len(c_hh), dtype=c_hh.dtype))
    return (vectors * values.clamp_min(1e-12).pow(power)) @ vectors.T
