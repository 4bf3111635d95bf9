"""Domain adaptation without the sources' data: specialists teach an industry's owner who has texts and no labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.domain import Specialist, target_rows
from fanbu.feedback.predictions._panel import check_probe, class_panel
from fanbu.feedback.predictions._pool import Voice, pool, reliable
from fanbu.feedback.predictions._teach import teach
from fanbu.heads import domains_of
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.objectives import informed
from fanbu.predict import features
from fanbu.types import CLASSIFYING, Context, Needs, Train, industry_of

NEEDS = Needs(kind="predictions", probe=True, target=True, tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None
_STEPS = 200
_HOLD = 1.0  # how much it costs to leave the weights that agreement gives


def contribute(
    specialist: Specialist, base: Model, context: Context, *, top_k: Annotated[int, Ge(1)] = 64,
    mass: Annotated[float, Gt(0), Le(1)] = 0.98,
) -> Contribution:  # fmt: skip
    """What the specialist says by itself, calibrated, on its industry's probe rows: the target's among them.

    Args:
        top_k: how many labels are said at most.
        mass: labels are said, likeliest first, until their probabilities come to this.
    """
    tensors, meta = class_panel(specialist, base, context, top_k, mass, alone=True)
    return Contribution("predictions", specialist.domain.name, "adapt", tensors, meta=meta)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    pseudo: Annotated[float, Ge(0), Le(1)] = 0.3, information: Annotated[float, Ge(0)] = 0.1,
    train: Train = Train(epochs=6, lr=2e-4),
) -> Model:  # fmt: skip
    """Trains the base on the probe rows of all owners of an industry, and those of targets, who send no contribution.

    On a target's texts: L = KL(T || q) + ``information`` (mean H(q) - H(mean q)), where
    T = (1 - ``pseudo``) sum_k a_k p_k + ``pseudo`` y. The weights a of the sources minimise the same information
    loss of their mixture, held near what their agreement with each other gives (``_pool.reliable``); y is the label
    whose centroid, in the base's features weighted by the mixture, is nearest by cosine. On the owners' own texts T is
    what they say together. A target is named by the probe set: rows of ``industry@owner`` where that owner has no
    specialist.

    Args:
        pseudo: how much the nearest centroid's label counts.
        information: how much certain, even answers count.
        train: how to train; there is no early stopping, since the centre has no labelled rows.

    Raises:
        FitError: no probe row belongs to a target, or a panel was made on another probe set.

    References: Liang et al. 2020 (SHOT: information maximisation, centroids); Ahmed et al. 2021 (DECISION: weights).
    """
    check_probe("adapt", contributions, context)
    targets, known = target_rows("adapt", context, [c.domain for c in contributions]), domains_of(base.labels)
    group = [-1] * len(context.probe.rows)
    for number, rows in enumerate(targets.values()):
        for i in rows:
            group[i] = number
    network, tokenizer = load_network(base), load_tokenizer(base)
    weights: dict[str, dict[str, float]] = {}

    def together(rows: Sequence[int], voices: Sequence[Voice], start_nl: Tensor, truth_n: Tensor) -> Tensor:
        q = pool(voices, start_nl)
        here = [k for k, i in enumerate(rows) if group[i] >= 0]
        if not here:
            return q
        asked = [replace(v, probs_nk=v.probs_nk[here], own_n=v.own_n[here]) for v in voices]
        a = source_weights(asked, start_nl[here])
        weights[industry_of(voices[0].domain)] = {v.domain: round(float(w), 4) for v, w in zip(voices, a, strict=True)}
        mixed = pool([replace(v, weight=float(w)) for v, w in zip(asked, a, strict=True)], start_nl[here], "mean")
        x = features(network, tokenizer, [context.probe.rows[rows[k]].text for k in here], context)
        q[here] = (1 - pseudo) * mixed + pseudo * nearest(x, mixed)
        return q

    loss = partial(informed, groups=[known[industry] for industry in targets], group=group, weight=information)
    facts = {"pseudo": pseudo, "information": information, "sources": weights}
    return teach("adapt", base, contributions, out, context, train, (together, loss), facts)


def source_weights(voices: Sequence[Voice], start_nl: Tensor) -> Tensor:
    """a [voices], summing to 1, that minimise mean_x H(m(x)) - H(mean_x m(x)) + KL(a || a_0) of m = sum_k a_k p_k.

    a_0 is weight times reliability. Where sources know different labels, a_0 is taken as it is.
    """
    first = torch.tensor([v.weight * float(w.mean()) for v, w in reliable(voices)]).clamp_min(1e-3)
    first = first / first.sum()
    if any(list(v.columns) != list(voices[0].columns) for v in voices):
        return first
    p = torch.stack([v.probs_nk for v in voices])
    z = first.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.05)
    with torch.enable_grad():
        for _ in range(_STEPS):
            a = z.softmax(0)
            m = torch.einsum("k,knl->nl", a, p).clamp_min(1e-8)
            mean = m.mean(0)
            loss = -(m * m.log()).sum(1).mean() + (mean * mean.log()).sum()
            loss = loss + _HOLD * (a * (a.log() - first.log())).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return z.detach().softmax(0)


def nearest(x_nh: Tensor, p_nl: Tensor, rounds: int = 2) -> Tensor:
    """One-hot [texts, labels]: centroids are means of unit features, first weighted by p, then by the labels found."""
    x = torch.nn.functional.normalize(x_nh.float(), dim=1)
    weight = p_nl
    for _ in range(rounds):
        known = weight.sum(0) > 0
        centroids = torch.nn.functional.normalize(weight.T @ x, dim=1)
        near = (x @ centroids.T).masked_fill(~known, -2.0)
        weight = torch.nn.functional.one_hot(near.argmax(1), p_nl.shape[1]).float()
    return weight
