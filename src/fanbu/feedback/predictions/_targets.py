"""What a large model is to say on each text: its specialist's answer, else its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fanbu.batches import Sequences
from fanbu.contribution import Contribution
from fanbu.feedback.predictions._panel import asked, columns_of, heard, heard_tokens
from fanbu.heads import domains_of
from fanbu.model import Model
from fanbu.predict import class_logits, top_tokens
from fanbu.types import Context


def union_targets(
    base: Model, network: Any, tokenizer: Any, teachers: Sequence[Contribution], context: Context, augment: int = 0
) -> Tensor:
    """T [probe rows and each teacher's variants, union labels] in float16, rows summing to 1."""
    probe, groups = context.probe.rows, domains_of(base.labels)
    answers = {c.domain: asked(context, c.domain) for c in teachers}
    taught = {i for d, rows in answers.items() for i in rows if probe[i].domain == d}
    targets = torch.zeros(len(probe), len(base.labels))
    # the base is asked only where a row's own specialist does not answer for it
    rest = [i for i in range(len(probe)) if i not in taught]
    z = class_logits(network, tokenizer, [probe[i].text for i in rest], context)
    for i, logits in zip(rest, z, strict=True):
        known = groups.get(probe[i].domain or "")
        if known:  # the domain is known: all mass to its labels
            targets[i, known] = logits[known].softmax(0)
        else:
            targets[i] = logits.softmax(0)
    more = []
    for c in teachers:
        columns = columns_of(c, base)
        rows = torch.tensor(answers[c.domain], dtype=torch.long)
        own = torch.tensor([probe[i].domain == c.domain for i in answers[c.domain]], dtype=torch.bool)
        made = augment * int(own.sum())
        p = heard(c, len(rows) + made, len(columns))
        mass = torch.where(own, 1.0, targets[rows][:, groups[c.domain]].sum(1))
        targets[rows[:, None], torch.tensor(columns)[None]] = mass[:, None] * p[: len(rows)]
        more.append(torch.zeros(made, len(base.labels)))
        more[-1][:, columns] = p[len(rows) :]
    targets = torch.cat([targets, *more])
    return (targets / targets.sum(1, keepdim=True)).half()


def token_targets(
    network: Any, tokenizer: Any, sequences: Sequences, teachers: Sequence[Contribution], context: Context, top_k: int
) -> list[tuple[Tensor, Tensor]]:
    """For each probe row the likeliest next tokens and their probabilities: of its specialist, else of the base, which
    also answers where a specialist of another vocabulary says nothing."""
    taught: dict[int, tuple[Tensor, Tensor]] = {}
    probe = context.probe.rows
    for c in teachers:
        rows = asked(context, c.domain)
        for i, part in zip(rows, heard_tokens(c, [len(sequences[i]) - 1 for i in rows]), strict=True):
            if probe[i].domain == c.domain:
                taught[i] = part
    rest = [i for i in range(len(probe)) if i not in taught or bool((taught[i][1].sum(1) == 0).any())]
    own = top_tokens(network, tokenizer, [probe[i].text for i in rest], context, top_k)
    for i, answer in zip(rest, own, strict=True):
        taught[i] = answer if i not in taught else _filled(taught[i], answer)
    return [taught[i] for i in range(len(probe))]


def _filled(said: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The own answer at the places where nothing is said."""
    silent = said[1].sum(1, keepdim=True) == 0
    return torch.where(silent, own[0], said[0]), torch.where(silent, own[1], said[1])
