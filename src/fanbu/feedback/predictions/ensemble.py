"""Ensembles: what the specialists of an industry say together teaches the large model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.predictions._diversity import diversity
from fanbu.feedback.predictions._panel import class_panel
from fanbu.feedback.predictions._pool import Combine, Voice, pool
from fanbu.feedback.predictions._teach import teach
from fanbu.model import Model
from fanbu.objectives import soft_labelled
from fanbu.types import CLASSIFYING, Context, Needs, Train, industry_of

NEEDS = Needs(kind="predictions", probe=True, tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None


def needs_with(arguments: Mapping[str, Any]) -> Needs:
    """Stacking needs labels."""
    return replace(NEEDS, labels=arguments.get("combine") == "stacked")


def contribute(
    specialist: Specialist, base: Model, context: Context, *, combine: Combine = "weighted",
    top_k: Annotated[int, Ge(1)] = 64, mass: Annotated[float, Gt(0), Le(1)] = 0.98,
) -> Contribution:  # fmt: skip
    """What the specialist says by itself, calibrated, on its industry's probe rows and on those of nobody's.

    Args:
        combine: with ``stacked`` the labels of the owner's own training texts among the probe rows cross too.
        top_k: how many labels are said at most.
        mass: labels are said, likeliest first, until their probabilities come to this.
    """
    domain = specialist.domain
    tensors, meta = class_panel(specialist, base, context, top_k, mass, alone=True)
    rows: list[Mapping[str, Any]] = []
    if combine == "stacked":
        known = dict(zip(domain.train.texts, domain.train.labels or (), strict=True))
        own = [r for r in context.probe.rows if r.domain == domain.name and r.text in known]
        rows = [{"id": r.id, "label": domain.full_labels[known[r.text]]} for r in own]
    return Contribution("predictions", domain.name, "ensemble", tensors, rows=rows, meta=meta)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, combine: Combine = "weighted",
    train: Train = Train(epochs=6, lr=2e-4),
) -> Model:  # fmt: skip
    """Trains the base on what its specialists say together: T(l | x) = q(industry | x) p(l | x), by KL as ``distill``.

    The voices are all specialists of an industry, each with its trust (how much validation rows give it in a mixture
    with the base), and the base itself with what trust leaves (one minus the mean). ``combine`` makes p of them:
    ``weighted`` (linear, by how far each agrees with the others and how sure it is), ``mean``, ``log_mean``
    (geometric), ``gate`` (a text's own owner decides) or ``stacked`` (logistic regression over their answers, fitted
    on labels that owners share; nobody counts on texts that it was trained on). Specialists need not know the same
    labels. Who agrees with the base no more than chance would is not heard (``_doubts.believed``).

    The manifest says for each pair of voices how often they disagree and Yule's Q (``_diversity.diversity``).

    Args:
        combine: one of the above; the owners must have been asked with the same.
        train: how to train; there is no early stopping, since the centre has no labelled rows of its own.

    Raises:
        FitError: the probe set is empty, or a panel does not belong to it.

    References: Vongkulbhisal et al. 2019 for differing labels; Wolpert 1992 for stacking.
    """
    told: dict[str, list[Mapping[str, object]]] = {}

    def together(rows: Sequence[int], voices: Sequence[Voice], start_nl: Tensor, truth_n: Tensor) -> Tensor:
        q = pool(voices, start_nl, combine, truth_n)
        told[industry_of(voices[0].domain)] = diversity(voices, torch.where(truth_n < 0, q.argmax(1), truth_n))
        return q

    facts = {"combine": combine, "diversity": told}
    return teach("ensemble", base, contributions, out, context, train, (together, soft_labelled), facts)
