"""Fine-tuning by low-rank adapters (LoRA, DoRA, rsLoRA): merged into a plain checkpoint, and kept beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt

from fanbu.domain import Domain
from fanbu.merging.low_rank import Low, save_adapter, with_adapters
from fanbu.model import Model, provenance, save_network
from fanbu.shrink._tune import open_for, tune
from fanbu.train import set_up
from fanbu.types import Context, Train

CHANGES: frozenset[str] = frozenset()


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    kind: Low = "lora", rank: Annotated[int, Ge(1)] = 8,
    alpha: Annotated[int, Ge(1)] = 16, dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    targets: Sequence[str] = (), adapter: bool = False, train: Train = Train(epochs=5, lr=1e-3),
) -> Model:  # fmt: skip
    """Trains W + s B A on the domain, B [out, rank] from zeros, and the label head whole; W itself does not move.

    s = alpha / rank for ``lora`` and ``dora``, alpha / sqrt(rank) for ``rslora``; ``dora`` learns the length of each
    row of W + s B A by itself (layers with rows of zeros, which have no direction, are left out). The result has the
    product added in: a plain checkpoint of the parent's size.

    Args:
        kind: which of the three.
        rank: of A and B.
        alpha: see s.
        dropout: of what the adapter is given.
        targets: endings of module names; none: all linear layers but the label head.
        adapter: whether the adapter itself is kept too, in PEFT's format, in a folder ``OUT.adapter`` beside the
            result; ``fanbu feed`` takes it for a specialist of the opened parent.
        train: how to train.

    Raises:
        FitError: no linear layer has such a name.

    References: Hu et al. 2022 (LoRA); Liu et al. 2024 (DoRA); Kalajdzievski 2023 (rsLoRA).
    """
    network, tokenizer = open_for(parent, domain, context)
    set_up(context, "lora", domain.industry)
    wrapped = with_adapters(network, domain.task, targets, kind=kind, rank=rank, alpha=alpha, dropout=dropout)
    metrics = tune(network, tokenizer, domain, train, context, f"lora {domain.industry}")
    beside = out.with_name(f"{out.name}.adapter")
    if adapter:
        save_adapter(wrapped, parent, beside)
    merged: Any = wrapped.merge_and_unload(safe_merge=True)
    made = provenance(
        "lora", [parent], context, domain=domain.name, kind=kind, rank=rank, alpha=alpha, dropout=dropout,
        targets=sorted(targets), train=vars(train),
    )  # fmt: skip
    return save_network(merged, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))
