"""What every way down shares: opening the parent for one domain, and training it there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fanbu.batches import Sequences, encode, pad_id
from fanbu.domain import Domain
from fanbu.errors import DataError
from fanbu.heads import final_layer, get_head, set_head
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.objectives import labelled, language
from fanbu.predict import limit, validation_value
from fanbu.probing import fit_probe
from fanbu.train import BatchLoss, train
from fanbu.types import CLASSIFYING, Context, Train


def open_for(parent: Model, domain: Domain, context: Context) -> tuple[Any, Any]:
    """(network, tokenizer): the parent with the domain's label rows alone.

    A parent that does not know the domain yet gets the rows of a linear probe, so that fine-tuning starts where
    probing ends (LP-FT, Kumar et al. 2022). Raises DataError where the parent's task is another.
    """
    if parent.task != domain.task:
        raise DataError(
            "task-mismatch", f"{parent.path} cannot serve {domain.name}", allowed=domain.task, got=parent.task,
            remedy="give a parent of the domain's task (`fanbu run` opens a bare body by itself)",
        )  # fmt: skip
    network, tokenizer = load_network(parent), load_tokenizer(parent)
    if domain.task in CLASSIFYING:
        if set(domain.full_labels) <= set(parent.labels):
            set_head(network, get_head(network).take(domain.full_labels))
        else:
            set_head(network, fit_probe(network, tokenizer, domain, context)[0])
    return network, tokenizer


def tune(network: Any, tokenizer: Any, domain: Domain, plan: Train, context: Context, name: str) -> dict[str, float]:
    """Trains on the domain's training rows and keeps the epoch that is best on its validation rows."""
    network.to(context.device)
    sequences = encode(tokenizer, domain.train.texts, limit(network, context))
    loss = of_rows(domain, sequences, range(len(sequences)), pad_id(tokenizer), context.device)
    head = final_layer(network) if domain.task in CLASSIFYING else None
    history = train(
        network, [len(s) for s in sequences], loss, plan, context, name, head=head,
        validate=(lambda n: validation_value(n, tokenizer, domain, context)) if len(domain.valid) else None,
    )  # fmt: skip
    return {"steps": history.steps, "valid": max(history.values)} if history.values else {"steps": history.steps}


def of_rows(domain: Domain, sequences: Sequences, numbers: Sequence[int], pad: int, device: str) -> BatchLoss:
    """The task's loss over some training rows, whose tokens are given."""
    if domain.task in CLASSIFYING:
        labels = domain.train.labels or ()
        return labelled(sequences, [labels[i] for i in numbers], pad, device)
    return language(sequences, pad, device)
