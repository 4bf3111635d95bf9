"""Depth pruning: layers are dropped by a stated importance, then training continues."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import nn

from fanbu.batches import collate, encode, pad_id
from fanbu.domain import Domain
from fanbu.errors import FitError, UsageError
from fanbu.model import Model, provenance, save_network
from fanbu.predict import limit
from fanbu.shrink._tune import open_for, tune
from fanbu.train import set_up
from fanbu.types import Context, Train

_SAMPLE = 256

CHANGES: frozenset[str] = frozenset({"architecture"})


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    layers: Annotated[int, Ge(1)] = 4, importance: Literal["influence", "even"] = "influence",
    train: Train = Train(epochs=4, lr=2e-4),
) -> Model:  # fmt: skip
    """Keeps ``layers`` of the parent's layers and fine-tunes what is left on the domain.

    Importance ``influence`` of layer l is 1 - E cos(x_l, x_{l+1}) over the tokens of 256 training texts; ``even``
    keeps evenly spaced layers. The last layer, which feeds the head, always stays.

    Args:
        layers: how many layers stay, at least 1.
        importance: which layers those are.
        train: how training continues.

    Raises:
        UsageError: more layers are asked for than there are.
        FitError: the network has no plain list of layers.

    Reference: Men et al. 2024, "ShortGPT" (block influence).
    """
    network, tokenizer = open_for(parent, domain, context)
    stack, count = layers_of(network), network.config.num_hidden_layers
    if not 1 <= layers <= count:
        raise UsageError("layers", "depth: layers", allowed=f"1 to {count}", got=layers, remedy="take fewer")
    if importance == "even":
        kept = sorted({round((i + 1) * count / layers) - 1 for i in range(layers)})
    else:
        texts = domain.train.texts[:_SAMPLE]
        scores = influence(network, tokenizer, texts, stack, context)
        ranked = sorted(range(count - 1), key=lambda i: -scores[i])
        kept = sorted([*ranked[: layers - 1], count - 1])
    keep_layers(network, stack, kept)
    metrics = tune(network, tokenizer, domain, train, context, f"depth {domain.name}")
    made = provenance(
        "depth", [parent], context, domain=domain.name, kept=kept, importance=importance, train=vars(train)
    )
    return save_network(network, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))


def layers_of(network: nn.Module) -> nn.ModuleList:
    """The list of the network's layers."""
    count = getattr(network.config, "num_hidden_layers", None)
    found = [m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(found) != 1:
        raise FitError(
            "no-layers", f"{type(network).__name__} has no single list of {count} layers",
            remedy="use another way down for this architecture",
        )  # fmt: skip
    return found[0]


def influence(
    network: Any, tokenizer: Any, texts: Sequence[str], stack: nn.ModuleList, context: Context
) -> list[float]:
    """1 - mean cosine between what each layer is given and what it returns, over unpadded tokens."""
    set_up(context, "influence")
    seen: list[torch.Tensor] = []
    mask = torch.zeros(0)

    def hook(_: nn.Module, given: Any, kwargs: Any, returned: Any) -> None:
        before = given[0] if given else kwargs["hidden_states"]
        after = returned[0] if isinstance(returned, tuple) else returned
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        seen.append((1 - cosine)[mask.bool()].mean())

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in stack]
    sequences = encode(tokenizer, texts, limit(network, context))
    totals = torch.zeros(len(stack))
    network.eval()
    with torch.inference_mode():
        for start in range(0, len(sequences), 32):
            batch = collate(sequences[start : start + 32], pad_id(tokenizer), next(network.parameters()).device)
            mask = batch["attention_mask"]
            seen.clear()
            network(**batch)
            totals += torch.stack(seen).cpu()
    for handle in handles:
        handle.remove()
    return [float(t) for t in totals]


def keep_layers(network: Any, stack: nn.ModuleList, kept: Sequence[int]) -> None:
    """Drops all other layers in place; configuration, per-layer lists and layer numbers follow."""
    chosen, count = [stack[i] for i in kept], len(stack)
    del stack[:]
    stack.extend(chosen)
    config = network.config
    for name, setting in list(vars(config).items()):
        if isinstance(setting, list) and len(setting) == count and name in {"layer_types", "mlp_layer_types"}:
            setattr(config, name, [setting[i] for i in kept])
    config.num_hidden_layers = len(kept)
    for number, layer in enumerate(stack):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                setattr(module, "layer_idx", number)  # noqa: B010 - a plain attribute, not a parameter
