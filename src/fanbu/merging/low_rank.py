"""Low-rank adapters that are trained: put around a network by PEFT, and saved in its format."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fanbu.errors import FitError, needs_extra
from fanbu.heads import final_layer
from fanbu.merging.gram import columns, linear_layers, stores_input_first
from fanbu.model import Model
from fanbu.tensors import save_tensors
from fanbu.types import CLASSIFYING, Task

Low = Literal["lora", "dora", "rslora"]


def with_adapters(
    network: Any, task: Task | None, endings: Sequence[str] = (), *, kind: Low = "lora", rank: int = 8, alpha: int = 16,
    dropout: float = 0.0,
) -> Any:  # fmt: skip
    """The network within PEFT: A and B of its linear layers learn, a label head learns whole, all else stands still.

    ``endings`` are of module names; none: all linear layers but the label head. Layers with rows of zeros, which have
    no direction, are left out for DoRA. Raises FitError where no linear layer has such a name.
    """
    with needs_extra("adapters"):
        from peft import LoraConfig, get_peft_model

    names = _targets(network, task, endings, directed=kind == "dora")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=names, use_dora=kind == "dora",
        use_rslora=kind == "rslora", fan_in_fan_out=any(map(stores_input_first, linear_layers(network).values())),
    )  # fmt: skip
    head = final_layer(network) if task in CLASSIFYING else None
    wrapped = get_peft_model(network, config)
    if head is not None:
        head.requires_grad_(True)
    return wrapped


def save_adapter(wrapped: Any, parent: Model, out: Path) -> None:
    """In PEFT's format, with the label head as a module that was trained whole."""
    from peft import get_peft_model_state_dict

    network = wrapped.base_model.model
    state, config = get_peft_model_state_dict(wrapped), wrapped.peft_config["default"]
    if parent.task in CLASSIFYING:
        layer = final_layer(network)
        head = next(name for name, m in network.named_modules() if m is layer)
        state |= {f"base_model.model.{head}.{name}": value for name, value in layer.state_dict().items()}
        config.modules_to_save = [head]
    config.base_model_name_or_path, config.inference_mode = parent.digest, True  # not a path of this machine
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    save_tensors(out / "adapter_model.safetensors", {name: value.contiguous() for name, value in state.items()})
    config.save_pretrained(str(out))


def _targets(network: Any, task: Task | None, endings: Sequence[str], *, directed: bool) -> list[str]:
    output = network.get_output_embeddings()
    last = final_layer(network) if task in CLASSIFYING else None
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
