"""Multi-task learning: owners send labelled rows, the centre trains on all of them jointly."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le

from fanbu.batches import encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.heads import check_labels_known, final_layer
from fanbu.merging.low_rank import with_adapters
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.objectives import labelled, language
from fanbu.predict import limit
from fanbu.train import set_up
from fanbu.train import train as train_network
from fanbu.types import CLASSIFYING, Context, Needs, Train

NEEDS = Needs(kind="samples", specialist=False, texts=True, labels=True)
LINEAR = False
SENSITIVITY = None


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """The domain's training rows: texts with their labels (texts alone for a causal model)."""
    domain = specialist.domain
    labels = domain.train.labels
    rows = [
        {"text": text} if labels is None else {"text": text, "label": domain.full_labels[labels[i]]}
        for i, text in enumerate(domain.train.texts)
    ]
    return Contribution("samples", domain.name, "multitask", rows=rows)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    train: Train = Train(epochs=3, lr=1.5e-4), layers: Literal["all", "lora"] = "all", rank: Annotated[int, Ge(1)] = 8,
    shares: Mapping[str, Annotated[float, Gt(0), Le(100)]] = {},
) -> Model:  # fmt: skip
    """Trains the base on the rows of all domains: cross-entropy over the union head, which is cross-entropy over
    domains plus cross-entropy within the domain (``fanbu.losses``); next-token loss for a causal model.

    It sees everything, so it is the reference that other ways are measured by, where all share their rows.

    Args:
        train: how to train; there is no early stopping, since the centre has no validation rows.
        layers: ``all``; ``lora``: low-rank factors of the linear layers (s = 2), which are added in, and label rows.
        rank: of the factors.
        shares: how often a domain's rows come in an epoch, 1 where it is not named: with 2.5 each comes twice, and a
            drawn half of them once more.

    Raises:
        IntegrityError: a row's label is not in the base's head.

    Reference: Caruana 1997, "Multitask learning".
    """
    rows = [row for c in contributions for row in _coming(c, shares.get(c.domain, 1.0), context)]
    network, tokenizer = load_network(base), load_tokenizer(base)
    network.to(context.device)
    sequences = encode(tokenizer, [row["text"] for row in rows], limit(network, context))
    pad, head = pad_id(tokenizer), None
    if base.task in CLASSIFYING:
        check_labels_known(base, sorted({row["label"] for row in rows}))
        numbers = {label: i for i, label in enumerate(base.labels)}
        loss = labelled(sequences, [numbers[row["label"]] for row in rows], pad, context.device)
        head = final_layer(network)
    else:
        loss = language(sequences, pad, context.device)
    if layers == "lora":
        set_up(context, "adapter", "multitask")
        wrapped = with_adapters(network, base.task, rank=rank, alpha=2 * rank)
    history = train_network(network, [len(s) for s in sequences], loss, train, context, "multitask", head=head)
    if layers == "lora":
        network = wrapped.merge_and_unload(safe_merge=True)
    made = provenance(
        "multitask", [base], context, train=vars(train), layers=layers, rank=rank, steps=history.steps,
        domains=[c.domain for c in contributions], shares=dict(shares),
    )  # fmt: skip
    return save_network(network, tokenizer, out, made)


def _coming(c: Contribution, share: float, context: Context) -> list[Mapping[str, Any]]:
    """A domain's rows as often as they come in an epoch, at least one."""
    count = max(1, round(share * len(c.rows)))
    times, more = divmod(count, len(c.rows))
    drawn = random.Random(context.seeded("multitask", c.domain)).sample(range(len(c.rows)), more)
    return [*c.rows] * times + [c.rows[i] for i in sorted(drawn)]
