"""Greedy soup: takes specialists into an average one after the other, and keeps those that validation rows approve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fanbu.batches import evenly
from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.weights._task_vector import contribute as task_vector
from fanbu.merging.engine import Linear, merge
from fanbu.merging.live import Live
from fanbu.model import Model, provenance
from fanbu.types import CLASSIFYING, Context, Needs

NEEDS = Needs(kind="weights", same_architecture=True, same_tokenizer=True, texts=True, labels=True, tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None
NEUTRAL: dict[str, object] = {}


def contribute(specialist: Specialist, base: Model, context: Context, *, rows: int = 100) -> Contribution:
    """The specialist's weights, and some of its domain's validation rows with their labels.

    Args:
        rows: at most so many, evenly spaced.

    Raises:
        FitError: the two architectures differ.
    """
    domain = specialist.domain
    labels = domain.valid.labels or ()
    chosen = evenly(range(len(domain.valid)), rows)
    sent = [{"text": domain.valid.texts[i], "label": domain.full_labels[labels[i]]} for i in chosen]
    return replace(task_vector(specialist, base, context), rows=sent)


def absorb(base: Model, contributions: Sequence[Contribution], out: Path, context: Context) -> Model:
    """theta = theta_base + mean of delta_i over the chosen specialists.

    Specialists come in the order of how good each of them is by itself: the mean over domains of the told accuracy on
    the rows that were sent. The first is taken, each further one where the average with it is at least as good.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Wortsman et al. 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy
    without increasing inference time".
    """
    live = Live(base, contributions, context)
    names = [c.domain for c in contributions]
    rows = {c.domain: c.rows for c in contributions if c.rows}
    tried = {name: _score(live, rows, [name]) for name in names}
    chosen: list[str] = []
    best = -1.0
    for done, name in enumerate(sorted(names, key=lambda n: (-tried[n], n)), 1):
        score = _score(live, rows, [*chosen, name]) if chosen else tried[name]
        if score >= best:
            chosen, best = [*chosen, name], score
        context.progress("soup", done, len(names))
    made = provenance("soup", [base], context, domains=names, chosen=chosen, valid=best)
    return merge(base, contributions, out, context, lambda stack: Linear(_shares(stack.domains, chosen)), made)


def _shares(domains: Sequence[str], chosen: Sequence[str]) -> list[float]:
    return [1 / len(chosen) if d in chosen else 0.0 for d in domains]


def _score(live: Live, rows: Mapping[str, Sequence[Mapping[str, str]]], chosen: Sequence[str]) -> float:
    """The mean over domains of the told accuracy; 0 where nobody sent rows."""
    live.blend(lambda stack: _shares(stack.domains, chosen))
    found = []
    for domain, own in rows.items():
        answers = live.logits([row["text"] for row in own], domain).argmax(1).tolist()
        names = [live.labels[i] for i in live.columns(domain)]
        found.append(sum(names[a] == row["label"] for a, row in zip(answers, own, strict=True)) / len(own))
    return sum(found) / len(found) if found else 0.0
