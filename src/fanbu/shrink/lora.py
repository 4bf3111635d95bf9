"""Fine-tuning by low-rank adapters (LoRA, DoRA, rsLoRA): merged into a plain checkpoint, and kept beside it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Lt
from torch import nn

from fanbu.domain import Domain
from fanbu.errors import FitError, needs_extra
from fanbu.heads import final_layer
from fanbu.merging.gram import linear_layers, stores_input_first
from fanbu.model import Model, provenance, save_network
from fanbu.shrink._tune import open_for, tune
from fanbu.shrink._units import columns
from fanbu.tensors import save_tensors
from fanbu.train import set_up
from fanbu.types import CLASSIFYING, Context, Train

CHANGES: frozenset[str] = frozenset()


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    kind: Literal["lora", "dora", "rslora"] = "lora", rank: Annotated[int, Ge(1)] = 8,
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
    with needs_extra("adapters"):
        from peft import LoraConfig, get_peft_model

    network, tokenizer = open_for(parent, domain, context)
    names = _targets(network, domain, targets, directed=kind == "dora")
    classifies = domain.task in CLASSIFYING
    head = _name_of(network, final_layer(network)) if classifies else None
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, use_dora=kind == "dora",
        use_rslora=kind == "rslora", fan_in_fan_out=any(map(stores_input_first, linear_layers(network).values())),
    )  # fmt: skip
    set_up(context, "lora", domain.name)
    wrapped = get_peft_model(network, config)
    if head:
        final_layer(network).requires_grad_(True)
    metrics = tune(network, tokenizer, domain, train, context, f"lora {domain.name}")
    beside = out.with_name(f"{out.name}.adapter")
    if adapter:
        _save_adapter(wrapped, head, parent, beside)
    merged: Any = wrapped.merge_and_unload(safe_merge=True)
    made = provenance(
        "lora", [parent], context, domain=domain.name, kind=kind, rank=rank, alpha=alpha, dropout=dropout,
        targets=sorted(targets), train=vars(train),
    )  # fmt: skip
    return save_network(merged, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))


def _save_adapter(wrapped: Any, head: str | None, parent: Model, out: Path) -> None:
    """In PEFT's format, with the label head as a module that was trained whole."""
    from peft import get_peft_model_state_dict

    state, config = get_peft_model_state_dict(wrapped), wrapped.peft_config["default"]
    if head:
        layer = wrapped.base_model.model.get_submodule(head)
        state |= {f"base_model.model.{head}.{name}": value for name, value in layer.state_dict().items()}
        config.modules_to_save = [head]
    config.base_model_name_or_path, config.inference_mode = parent.digest, True  # not a path of this machine
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_tensors(out / "adapter_model.safetensors", {name: value.contiguous() for name, value in state.items()})
    config.save_pretrained(str(out))


def _targets(network: Any, domain: Domain, endings: Sequence[str], *, directed: bool) -> list[str]:
    output = network.get_output_embeddings()
    last = final_layer(network) if domain.task in CLASSIFYING else None
    known = [
        name.removesuffix(".weight")
        for name, m in linear_layers(network).items()
        if m is not output and m is not last and not (directed and bool((columns(m) == 0).all(1).any()))
    ]
    found = [n for n in known if not endings or n.endswith(tuple(endings))]
    if not found:
        raise FitError(
            "no-layers", f"{type(network).__name__} has no linear layers that end so",
            allowed=sorted({n.rpartition(".")[2] for n in known}), got=list(endings), remedy="name some of these",
        )  # fmt: skip
    return found


def _name_of(network: nn.Module, layer: nn.Module) -> str:
    return next(name for name, m in network.named_modules() if m is layer)
