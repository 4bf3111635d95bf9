"""Full fine-tuning: the parent's size is kept, its label head is the domain's alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from fanbu.domain import Domain
from fanbu.model import Model, provenance, save_network
from fanbu.shrink._tune import open_for, tune
from fanbu.types import Context, Train

CHANGES: frozenset[str] = frozenset()


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *, train: Train = Train(epochs=3, lr=1.5e-4)
) -> Model:
    """Trains all parameters of the parent on the domain's labelled rows, starting from its linear probe.

    theta* = argmin_theta mean over training rows of -log p_theta(y | x), y among the domain's labels (for causal
    models: of -log p(next token)); the epoch that is best on validation rows is kept.

    Args:
        parent: a classifier (with or without the domain's rows) or a causal model.
        domain: its train and valid splits are read.
        train: how to train.

    Raises:
        DataError: the parent is of another task.

    Reference: Kumar et al. 2022, "Fine-tuning can distort pretrained features" (start from the probe).
    """
    network, tokenizer = open_for(parent, domain, context)
    metrics = tune(network, tokenizer, domain, train, context, f"finetune {domain.industry}")
    made = provenance("finetune", [parent], context, domain=domain.name, train=vars(train))
    made = replace(made, metrics=metrics, data={domain.name: domain.digest})
    return save_network(network, tokenizer, out, made)
