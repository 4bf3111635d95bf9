"""Weak-to-strong: a large model learns from smaller ones, and holds to its own answer where it is surer than they."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fanbu.batches import encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.predictions._doubts import believed
from fanbu.feedback.predictions._panel import check_probe, class_panel, token_panel
from fanbu.feedback.predictions._targets import token_targets, union_targets
from fanbu.heads import domains_of, final_layer
from fanbu.model import Model, copy_model, load_network, load_tokenizer, provenance, save_network
from fanbu.objectives import Confidence, confident, confident_language
from fanbu.predict import limit
from fanbu.train import train as train_network
from fanbu.types import CLASSIFYING, Context, Needs, Train, industry_of

NEEDS = Needs(kind="predictions", probe=True)
LINEAR = False
SENSITIVITY = None
_RAMP = 0.2  # of all steps, until the student's own answers count in full


def contribute(
    specialist: Specialist, base: Model, context: Context, *, top_k: Annotated[int, Ge(1)] = 64,
    mass: Annotated[float, Gt(0), Le(1)] = 0.98,
) -> Contribution:  # fmt: skip
    """As ``distill``, but a classifier's answers are its own, calibrated, and not mixed with the base's: the base has
    its say while it learns.

    Args:
        top_k: how many labels, or next tokens, are said at most.
        mass: labels are said, likeliest first, until their probabilities come to this.
    """
    if specialist.domain.task in CLASSIFYING:
        tensors, meta = class_panel(specialist, base, context, top_k, mass, alone=True)
    else:
        tensors, meta = token_panel(specialist, base, context, top_k)
    return Contribution("predictions", specialist.domain.name, "weak_to_strong", tensors, meta=meta)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    confidence: Annotated[float, Ge(0), Le(1)] = 0.5, keep: Annotated[float, Gt(0), Le(1)] = 1.0,
    train: Train = Train(epochs=3, lr=2e-4), top_k: Annotated[int, Ge(1)] = 64,
) -> Model:  # fmt: skip
    """Trains the base by (1 - a) KL(T || q) + a CE(q, y), with T the weak teachers' soft labels, q the student's and y
    what the student itself finds likeliest (the auxiliary confidence loss, for any number of classes).

    y = argmax over the labels of the row's domain of log q(l) - log m(l) + log pi(l): m is a running mean of the
    student's answers, pi the mean of the teachers', so that no label swallows the others; with two classes this is the
    threshold that makes each as frequent as the teachers say. a grows from 0 to ``confidence`` over the first fifth of
    the steps, and is 0 on texts where the teacher is surer of its answer than the student of y: a specialist knows its
    training texts by heart. Causal models: y is the likeliest next token, at each place where a specialist teaches.

    Args:
        confidence: a, how much the student's own answer counts in the end. 0: plain distilling from weak teachers.
        keep: share of each teacher's texts whose answers are believed, the surest first; of the others only the
            student's own answer counts. Classifiers only.
        train: how to train; there is no early stopping, since the centre has no labelled rows.
        top_k: how many next tokens of teacher zero are kept (causal models).

    Raises:
        FitError: the probe set is empty, or a panel does not belong to it.

    Reference: Burns et al. 2023, "Weak-to-strong generalization".
    """
    check_probe("weak_to_strong", contributions, context)
    network, tokenizer = load_network(base), load_tokenizer(base)
    network.to(context.device)
    teachers, told = believed(base, network, tokenizer, contributions, context)
    if not teachers:  # training on its own answers could only drift
        return copy_model(base, out)
    sequences = encode(tokenizer, context.probe.texts, limit(network, context))
    pad, head = pad_id(tokenizer), None
    ramp = _RAMP * train.epochs * math.ceil(len(sequences) / train.batch_size)
    if base.task in CLASSIFYING:
        targets = union_targets(base, network, tokenizer, teachers, context)
        groups, own = _groups(base, teachers, context)
        state = Confidence(confidence, ramp, targets, groups, own)
        loss = confident(sequences, targets, _believed(targets, groups, own, keep), own, pad, context.device)
        head = final_layer(network)
    else:
        answers = token_targets(network, tokenizer, sequences, teachers, context, top_k)
        _, own = _groups(base, teachers, context)
        state = Confidence(confidence, ramp)
        loss = confident_language(sequences, answers, [number >= 0 for number in own], pad, context.device)
    student = nn.ModuleDict({"network": network, "confidence": state})
    history = train_network(student, [len(s) for s in sequences], loss, train, context, "weak_to_strong", head=head)
    made = provenance(
        "weak_to_strong", [base], context, train=vars(train), confidence=confidence, keep=keep,
        steps=history.steps, **told,
    )  # fmt: skip
    return save_network(network, tokenizer, out, made)


def _groups(base: Model, teachers: Sequence[Contribution], context: Context) -> tuple[list[list[int]], list[int]]:
    """The label rows of each industry that is taught, and for each probe row the number of its industry, else -1."""
    known, taught = domains_of(base.labels), sorted({industry_of(c.domain) for c in teachers})
    number = {industry: k for k, industry in enumerate(taught)}
    own = [-1 if row.domain is None else number.get(industry_of(row.domain), -1) for row in context.probe.rows]
    return [known.get(industry, []) for industry in taught], own


def _believed(targets_nl: Tensor, groups: Sequence[Sequence[int]], own: Sequence[int], keep: float) -> Tensor:
    """1 for rows whose teacher is among its ``keep`` surest answers, and for rows that have no teacher; else 0."""
    weights = torch.ones(len(targets_nl))
    numbers = torch.tensor(own)
    for number in range(len(groups)):
        rows = (numbers == number).nonzero()[:, 0]
        sure = targets_nl[rows].float().max(1).values
        weights[rows[sure.argsort(stable=True)[: int((1 - keep) * len(rows))]]] = 0.0
    return weights
