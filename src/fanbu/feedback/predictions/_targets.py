"""What a large model is to say on each text: its specialist's answer, else its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fanbu.batches import Sequences
from fanbu.contribution import Contribution
from fanbu.feedback.predictions._panel import answered, asked, heard_tokens
from fanbu.feedback.predictions._pool import Voice, pool
from fanbu.heads import domains_of
from fanbu.model import Model
from fanbu.predict import class_logits, top_tokens
from fanbu.types import Context, industry_of

Together = Callable[[Sequence[int], Sequence[Voice], Tensor], Tensor]


def union_targets(
    base: Model, network: Any, tokenizer: Any, teachers: Sequence[Contribution], context: Context, augment: int = 0,
    together: Together | None = None,
) -> Tensor:  # fmt: skip
    """T [probe rows and each teacher's variants, union labels] in float16, rows summing to 1.

    Of several teachers of one industry, each answers for all its texts; ``together`` (the numbers of these rows, what
    each says, what the base says) makes one answer of them. Without it that is ``_pool.pool``, and the base is not
    asked about rows that are their teachers' alone. Whoever is silent about a text says there what the base says.
    """
    probe, groups = context.probe.rows, domains_of(base.labels)
    panels = [_Panel.of(c, base, context, augment) for c in teachers]
    industries = {p.industry: [q.voice for q in panels if q.industry == p.industry] for p in panels}
    whole = {i for i, voices in industries.items() if all(len(v.columns) == len(groups[i]) for v in voices)}
    alone = set() if together else whole
    targets = torch.zeros(len(probe), len(base.labels))
    quiet = {i for p in panels for i in p.quiet}
    rest = [i for i, r in enumerate(probe) if r.domain is None or industry_of(r.domain) not in alone or i in quiet]
    z = class_logits(network, tokenizer, [probe[i].text for i in rest], context)
    for i, logits in zip(rest, z, strict=True):
        known = groups.get(industry_of(probe[i].domain or ""))
        if known:  # the industry is known: all mass to its labels
            targets[i, known] = logits[known].softmax(0)
        else:
            targets[i] = logits.softmax(0)
    for industry, voices in industries.items():
        rows, labels = torch.tensor(asked(context, voices[0].domain), dtype=torch.long), groups[industry]
        if not len(rows):
            continue
        named = torch.tensor([probe[i].domain is not None for i in rows.tolist()], dtype=torch.bool)
        start = targets[rows][:, labels]
        voices = [_filled_in(voice, start) for voice in voices]
        mass = torch.where(named, 1.0, start.sum(1))
        q = together(rows.tolist(), voices, start) if together else pool(voices, start)
        q = _with_unknown(q, voices, start)
        targets[rows[:, None], torch.tensor(labels)[None]] = mass[:, None] * q
    targets = torch.cat([targets, *(p.variants(len(base.labels)) for p in panels)])
    return (targets / targets.sum(1, keepdim=True)).half()


def _with_unknown(q_nl: Tensor, voices: Sequence[Voice], start_nl: Tensor) -> Tensor:
    """On texts of nobody who is heard, the base says how likely the labels are that no specialist knows."""
    known = torch.zeros(q_nl.shape[1], dtype=torch.bool)
    for v in voices:
        known[list(v.columns)] = True
    if bool(known.all()):
        return q_nl
    foreign = ~torch.stack([v.own_n for v in voices]).any(0)
    own = start_nl[foreign] / start_nl[foreign].sum(1, keepdim=True).clamp_min(1e-9)
    q = q_nl.clone()
    q[foreign] = torch.where(known, q_nl[foreign] * own[:, known].sum(1, keepdim=True), own)
    return q


def _filled_in(voice: Voice, start_nl: Tensor) -> Voice:
    own = start_nl[:, list(voice.columns)]
    own = own / own.sum(1, keepdim=True).clamp_min(1e-9)
    silent = voice.probs_nk.sum(1, keepdim=True) == 0
    return replace(voice, probs_nk=torch.where(silent, own, voice.probs_nk))


@dataclass(frozen=True)
class _Panel:
    """One teacher's answers: on the probe rows that it was asked about, and on its variants."""

    industry: str
    voice: Voice
    quiet: Sequence[int]  # numbers of probe rows that it says nothing of
    rows: Sequence[int]  # of the union head
    made_nk: Tensor

    @classmethod
    def of(cls, c: Contribution, base: Model, context: Context, augment: int) -> _Panel:
        (rows, columns, p), industry = answered(c, base, context, augment), industry_of(c.domain)
        labels = domains_of(base.labels)[industry]
        own = torch.tensor([context.probe.rows[i].domain == c.domain for i in rows], dtype=torch.bool)
        voice = Voice(c.domain, [labels.index(i) for i in columns], p[: len(rows)], own)
        quiet = [i for i, said in zip(rows, p[: len(rows)].sum(1).tolist(), strict=True) if not said]
        return cls(industry, voice, quiet, columns, p[len(rows) :])

    def variants(self, labels: int) -> Tensor:
        """[variants, union labels]."""
        targets = torch.zeros(len(self.made_nk), labels)
        targets[:, list(self.rows)] = self.made_nk
        return targets


def token_targets(
    network: Any, tokenizer: Any, sequences: Sequences, teachers: Sequence[Contribution], context: Context, top_k: int
) -> list[tuple[Tensor, Tensor]]:
    """For each probe row the likeliest next tokens and their probabilities: of its specialist, else of the base, which
    also answers where a specialist of another vocabulary says nothing."""
    said: dict[int, list[tuple[Tensor, Tensor]]] = {}
    probe = context.probe.rows
    for c in teachers:
        rows = asked(context, c.domain)
        for i, part in zip(rows, heard_tokens(c, [len(sequences[i]) - 1 for i in rows]), strict=True):
            if probe[i].domain is not None:
                said.setdefault(i, []).append(part)
    taught = {i: _mean(parts, top_k) for i, parts in said.items()}
    rest = [i for i in range(len(probe)) if i not in taught or bool((taught[i][1].sum(1) == 0).any())]
    own = top_tokens(network, tokenizer, [probe[i].text for i in rest], context, top_k)
    for i, answer in zip(rest, own, strict=True):
        taught[i] = answer if i not in taught else _filled(taught[i], answer)
    return [taught[i] for i in range(len(probe))]


def _filled(said: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The own answer at the places where nothing is said."""
    silent = said[1].sum(1, keepdim=True) == 0
    return torch.where(silent, own[0], said[0]), torch.where(silent, own[1], said[1])


def _mean(parts: Sequence[tuple[Tensor, Tensor]], top_k: int) -> tuple[Tensor, Tensor]:
    """The mean of several owners' next tokens, over those that say something at a place; the likeliest ``top_k``."""
    if len(parts) == 1:
        return parts[0]
    indices = torch.cat([i for i, _ in parts], 1).long()
    probs = torch.cat([p.float() for _, p in parts], 1)
    speaking = torch.stack([p.float().sum(1) > 0 for _, p in parts]).sum(0).clamp_min(1)
    same = indices[:, :, None] == indices[:, None, :]
    first = same.long().argmax(2) == torch.arange(indices.shape[1])  # what is said twice counts where it stands first
    total = (same * probs[:, None, :]).sum(2) * first / speaking[:, None]
    p, place = total.topk(min(top_k, total.shape[1]), 1)
    return indices.gather(1, place).int(), p.half()
