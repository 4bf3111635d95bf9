"""What specialists say together becomes what the large model learns: shared by the ways that form committees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanbu.batches import Sequences, encode, pad_id
from fanbu.contribution import Contribution
from fanbu.feedback.predictions._doubts import believed
from fanbu.feedback.predictions._panel import check_probe
from fanbu.feedback.predictions._pool import Voice
from fanbu.feedback.predictions._targets import union_targets
from fanbu.heads import domains_of, final_layer
from fanbu.model import Model, copy_model, load_network, load_tokenizer, provenance, save_network
from fanbu.predict import limit
from fanbu.train import BatchLoss
from fanbu.train import train as train_network
from fanbu.types import Context, Train, industry_of

# of numbers of rows, what all say of them, what the base says alone, and labels (-1: not known)
Combining = Callable[[Sequence[int], Sequence[Voice], Tensor, Tensor], Tensor]
Loss = Callable[[Sequences, Tensor, int, str], BatchLoss]  # of token ids, targets [texts, labels], padding and device
BASE = "base"  # the name of the base's own voice


def teach(
    name: str, base: Model, contributions: Sequence[Contribution], out: Path, context: Context, train: Train,
    committee: tuple[Combining, Loss], facts: Mapping[str, Any],
) -> Model:  # fmt: skip
    """Trains the base on T(l | x) = q(industry | x) p(l | x), with the p that a committee makes of all voices.

    Voices are the specialists of an industry that are trusted and not doubted, each with its trust as weight, and the
    base with what they leave. ``facts`` go into the manifest; the committee may add to them while it sits.
    """
    check_probe(name, contributions, context)
    network, tokenizer = load_network(base), load_tokenizer(base)
    network.to(context.device)
    teachers, told = believed(base, network, tokenizer, contributions, context)
    if not teachers:  # training on its own answers could only drift
        return copy_model(base, out)
    (combine, loss), trust = committee, told["teachers"]
    truth = numbers_of(base, [c for c in contributions if c.domain not in told["doubted"]], context)

    def together(rows: Sequence[int], voices: Sequence[Voice], start_nl: Tensor) -> Tensor:
        known = truth.get(industry_of(voices[0].domain), {})
        truth_n = torch.tensor([known.get(context.probe.rows[i].id, -1) for i in rows])
        voices = with_base([replace(v, weight=trust[v.domain]) for v in voices], start_nl)
        return combine(rows, voices, start_nl, truth_n)

    sequences = encode(tokenizer, context.probe.texts, limit(network, context))
    targets = union_targets(base, network, tokenizer, teachers, context, together=together)
    minimised = loss(sequences, targets, pad_id(tokenizer), context.device)
    lengths, head = [len(s) for s in sequences], final_layer(network)
    history = train_network(network, lengths, minimised, train, context, name, head=head)
    made = provenance(name, [base], context, train=vars(train), steps=history.steps, **told, **facts)
    return save_network(network, tokenizer, out, made)


def with_base(voices: Sequence[Voice], start_nl: Tensor) -> list[Voice]:
    """And the base, with the weight that trust leaves it; no text is its own."""
    left = 1 - sum(v.weight for v in voices) / len(voices)
    p = start_nl / start_nl.sum(1, keepdim=True).clamp_min(1e-6)
    nobody = torch.zeros(len(p), dtype=torch.bool)
    return [*voices, Voice(BASE, list(range(p.shape[1])), p, nobody, left)] if left > 0 else list(voices)


def numbers_of(base: Model, contributions: Sequence[Contribution], context: Context) -> dict[str, dict[str, int]]:
    """By industry, then by id of a probe row: the number of its label among the industry's, where it was sent."""
    found: dict[str, dict[str, int]] = {}
    for c in contributions:
        industry = industry_of(c.domain)
        numbers = {base.labels[i]: k for k, i in enumerate(domains_of(base.labels)[industry])}
        sent = {str(row.get("id")): numbers.get(str(row.get("label")), -1) for row in c.rows}
        own = {row.id for row in context.probe.rows if row.domain == c.domain}  # it has no say on others' texts
        found.setdefault(industry, {}).update({i: label for i, label in sent.items() if i in own})
    return found
