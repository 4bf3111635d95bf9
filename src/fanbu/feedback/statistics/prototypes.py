"""Prototypes: a label's row is the mean of its texts' features, summed over all owners who have such texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.errors import IntegrityError
from fanbu.feedback.statistics._label_rows import join_rows
from fanbu.heads import Head, sent_head
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import features
from fanbu.probing import prototype_rows
from fanbu.types import CLASSIFYING, Context, Needs

NEEDS = Needs(kind="statistics", specialist=False, tasks=CLASSIFYING)
LINEAR = True
SENSITIVITY = None
_SHARPNESS = [2.0**k for k in range(1, 14)]  # times the mean square of features


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """Of each label the sum of its training texts' features x on the base, and how many these are; all rows times s,
    the sharpness that suits them.

    s is the one of a grid that makes the labels of the training rows likeliest where each is left out of its own mean.
    Needs no training, and one row a label: what suits few rows. The specialist's own weights are not used.
    """
    domain = specialist.domain
    network, tokenizer = load_network(base), load_tokenizer(base)
    x = features(network, tokenizer, domain.train.texts, context)
    labels = torch.tensor(domain.train.labels)
    count = torch.bincount(labels, minlength=len(domain.labels)).float()
    total = torch.zeros(len(domain.labels), x.shape[1]).index_add_(0, labels, x)
    sharpness = len(x) * best_sharpness(x, labels, total, count)
    tensors = {"sum": total, "count": count, "sharpness": torch.tensor([sharpness])}
    return Contribution(
        "statistics", domain.name, "prototypes", tensors, meta={"labels": list(domain.full_labels)}
    )  # fmt: skip


def best_sharpness(x_nh: Tensor, labels_n: Tensor, total_lh: Tensor, count_l: Tensor) -> float:
    """The s of softmax(-s/2 |x - mean|^2) under which the rows' labels are likeliest, each row left out of the mean of
    its label; rows that are alone in theirs do not count."""
    scale, alone = float(x_nh.square().sum(1).mean().clamp_min(1e-12)), count_l[labels_n] < 2
    means = total_lh / count_l.clamp(min=1)[:, None]
    apart = torch.cdist(x_nh, means).square()
    n = count_l[labels_n]
    own = apart.gather(1, labels_n[:, None])[:, 0] * (n / (n - 1).clamp(min=1)).square()  # |x - (n mean - x)/(n - 1)|^2
    apart = apart.scatter(1, labels_n[:, None], own[:, None])[~alone]
    if not len(apart):
        return _SHARPNESS[3] / scale
    losses = [
        float(torch.nn.functional.cross_entropy(-s / scale / 2 * apart, labels_n[~alone])) for s in _SHARPNESS
    ]  # fmt: skip
    return _SHARPNESS[losses.index(min(losses))] / scale


def absorb(base: Model, contributions: Sequence[Contribution], out: Path, context: Context) -> Model:
    """Label rows w = s mean, b = -s/2 |mean|^2: logits are -s/2 |x - mean|^2 up to what all labels share, and answers
    the nearest mean.

    All is made of sums over owners, so several owners of an industry give the rows that they would have in one place,
    and the texts of one cannot be told from what the centre needs to know. s is the mean over all rows. The mean of s/2
    |mean|^2 is taken from each bias, which brings domains to about the level of ``probe``; where the probe set has
    texts of known domains, they are aligned on these. Rows of other domains stay bit for bit.

    Raises:
        IntegrityError: sums that are not of the sender's labels, or no sharpness.

    Reference: Snell, Swersky and Zemel 2017, "Prototypical networks for few-shot learning".
    """
    sums: dict[str, list[Tensor]] = {}
    for c in contributions:
        spread = c.tensors["sharpness"]
        if spread.shape != (1,) or not spread > 0:
            raise IntegrityError(
                "contribution-broken", f"the prototypes of {c.domain} have no sharpness", allowed="one number above 0",
                got=spread.flatten()[:3].tolist(), remedy="ask its owner to send them again",
            )  # fmt: skip
        head = sent_head(replace(c, tensors={"weight": c.tensors["sum"], "count": c.tensors["count"]}), _zeros(c))
        assert head.count_l is not None
        for label, total, count in zip(head.labels, head.weight_lh, head.count_l, strict=True):
            known = sums.setdefault(label, [torch.zeros_like(total), torch.zeros(())])
            sums[label] = [known[0] + total, known[1] + count]
    total_lh, count_l = (torch.stack([pair[i] for pair in sums.values()]) for i in (0, 1))
    means = total_lh / count_l[:, None]
    sharpness = float(sum(c.tensors["sharpness"] for c in contributions) / count_l.sum())
    rows = prototype_rows(list(sums), means, sharpness)
    level = sharpness / 2 * float((count_l * means.square().sum(1)).sum() / count_l.sum())
    rows = Head(rows.labels, rows.weight_lh, rows.bias_l - level)
    return join_rows(base, [rows], out, context, "prototypes", [c.domain for c in contributions])


def _zeros(c: Contribution) -> Tensor:
    """A bias that was not sent."""
    return torch.zeros(len(c.meta["labels"]))
