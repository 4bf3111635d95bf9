"""Depth pruning: layers are dropped by a stated importance, then training continues."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import nn

from fanbu.batches import collate, encode, evenly, pad_id, sorted_batches
from fanbu.domain import Domain
from fanbu.errors import FitError, UsageError
from fanbu.model import Model, provenance, save_network
from fanbu.predict import limit
from fanbu.shrink._tune import of_rows, open_for, tune
from fanbu.train import set_up
from fanbu.types import Context, Train

Importance = Literal["influence", "contiguous", "loss", "even"]
SAMPLE = 256
_LISTS = {"layer_types", "mlp_layer_types", "attention_layers", "no_rope_layers"}  # in configurations: a value a layer
_NUMBERS = {"mlp_only_layers"}  # numbers of layers

CHANGES: frozenset[str] = frozenset({"architecture"})


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    layers: Annotated[int, Ge(1)] = 4, importance: Importance = "influence",
    train: Train | None = Train(epochs=4, lr=2e-4),
) -> Model:  # fmt: skip
    """Keeps ``layers`` of the parent's layers and fine-tunes what is left on the domain.

    With x_l what layer l is given, over the tokens of 256 training texts: ``influence`` drops the layers with the least
    1 - E cos(x_l, x_{l+1}); ``contiguous`` the run of n layers with the least 1 - E cos(x_l, x_{l+n}); ``loss`` one
    layer after the other, each time the one without which the loss on the training rows rises least; ``even`` keeps
    evenly spaced layers. The last layer, which feeds the head, always stays, and so does a first one that is built
    otherwise than the others.

    Args:
        layers: how many layers stay, at least 1.
        importance: which layers those are.
        train: how training continues; None leaves that to a later step.

    Raises:
        UsageError: more layers are asked for than there are.
        FitError: the network has no plain list of layers, or its configuration cannot say which ones are left.

    References: Men et al. 2024, "ShortGPT" (block influence); Gromov et al. 2024, "The unreasonable ineffectiveness of
        the deeper layers" (contiguous).
    """
    network, tokenizer = open_for(parent, domain, context)
    stack, count = layers_of(network), network.config.num_hidden_layers
    if not 1 <= layers <= count:
        raise UsageError("layers", "depth: layers", allowed=f"1 to {count}", got=layers, remedy="take fewer")
    kept = _kept(network, tokenizer, domain, stack, layers, importance, context)
    keep_layers(network, stack, kept)
    _check_reloads(network, kept)
    metrics = {} if train is None else tune(network, tokenizer, domain, train, context, f"depth {domain.industry}")
    made = provenance(
        "depth", [parent], context, domain=domain.name, kept=kept, importance=importance, train=train and vars(train)
    )
    return save_network(network, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))


def _kept(
    network: Any, tokenizer: Any, domain: Domain, stack: nn.ModuleList, layers: int, importance: Importance,
    context: Context,
) -> list[int]:  # fmt: skip
    """Which layers stay, ascending."""
    count = len(stack)
    drop = count - layers
    first = int(0 in pinned(stack) and layers > 1)  # from which layer on there is a choice
    if importance == "even" or not drop:
        spaced = [round((i + 1) * count / layers) - 1 for i in range(layers)]
        return sorted({0, *spaced[1:]} if first else set(spaced))
    set_up(context, "depth", domain.industry)
    if importance == "loss":
        return _by_loss(network, tokenizer, domain, stack, layers, context)
    texts = domain.train.texts[:SAMPLE]
    if importance == "contiguous":
        scores = influence(network, tokenizer, texts, stack, context, drop)
        start = min(range(first, count - drop), key=lambda i: scores[i])
        return [i for i in range(count) if not start <= i < start + drop]
    return sorted(by_influence(network, tokenizer, texts, stack, context)[:layers])


def by_influence(
    network: Any, tokenizer: Any, texts: Sequence[str], stack: nn.ModuleList, context: Context
) -> list[int]:
    """Layers by what they change, most first; before all others those that always stay."""
    scores, stay = influence(network, tokenizer, texts, stack, context), pinned(stack)
    return [*stay, *sorted(set(range(len(stack))) - set(stay), key=lambda i: -scores[i])]


def pinned(stack: nn.ModuleList) -> list[int]:
    """Layers that always stay: the last, and the first where it lacks parameters of the second (ModernBERT's norm)."""
    first, second = (set(dict(layer.named_parameters())) for layer in (stack[0], stack[min(1, len(stack) - 1)]))
    return [len(stack) - 1, *([0] if first < second else [])]


def _by_loss(
    network: Any, tokenizer: Any, domain: Domain, stack: nn.ModuleList, layers: int, context: Context
) -> list[int]:
    """Greedily: the layer goes without which the loss is least, until so many are left."""
    network.to(context.device).eval()
    numbers = evenly(range(len(domain.train)), SAMPLE // 2)
    sequences = encode(tokenizer, [domain.train.texts[i] for i in numbers], limit(network, context))
    loss = of_rows(domain, sequences, numbers, pad_id(tokenizer), context.device)
    gone: set[int] = set()

    def without(layer: int) -> float:
        with _skipped(stack, {*gone, layer}), torch.inference_mode():
            parts = sorted_batches([len(s) for s in sequences], 32)
            return sum(float(loss(network, rows)) * len(rows) for rows in parts)

    stay = pinned(stack)[:layers]
    while len(stack) - len(gone) > layers:
        losses = {i: without(i) for i in range(len(stack)) if i not in gone and i not in stay}
        gone.add(min(losses, key=lambda i: losses[i]))
        context.progress("depth", len(gone), len(stack) - layers)
    return [i for i in range(len(stack)) if i not in gone]


@contextmanager
def _skipped(stack: nn.ModuleList, gone: set[int]) -> Iterator[None]:
    """These layers give what they are given."""

    def hook(_: nn.Module, given: Any, kwargs: Any, returned: Any) -> Any:
        before = given[0] if given else kwargs["hidden_states"]
        return (before, *returned[1:]) if isinstance(returned, tuple) else before

    handles = [stack[i].register_forward_hook(hook, with_kwargs=True) for i in gone]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
    network: Any, tokenizer: Any, texts: Sequence[str], stack: nn.ModuleList, context: Context, run: int = 1
) -> list[float]:
    """1 - mean cosine between what each layer is given and what the ``run`` layers from it on return, over unpadded
    tokens; as many values as there are such runs."""
    set_up(context, "influence")
    seen: list[torch.Tensor] = []

    def hook(_: nn.Module, given: Any, kwargs: Any, returned: Any) -> None:
        if not seen:
            seen.append((given[0] if given else kwargs["hidden_states"]).float())
        seen.append((returned[0] if isinstance(returned, tuple) else returned).float())

    handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in stack]
    sequences = encode(tokenizer, texts, limit(network, context))
    totals = torch.zeros(len(stack) - run + 1)
    network.eval()
    with torch.inference_mode():
        for start in range(0, len(sequences), 32):
            batch = collate(sequences[start : start + 32], pad_id(tokenizer), next(network.parameters()).device)
            mask = batch["attention_mask"].bool()
            seen.clear()
            network(**batch)
            pairs = zip(seen, seen[run:], strict=False)
            totals += torch.stack([(1 - torch.cosine_similarity(a, b, dim=-1))[mask].mean() for a, b in pairs]).cpu()
    for handle in handles:
        handle.remove()
    return [float(t) for t in totals]


def keep_layers(network: Any, stack: nn.ModuleList, kept: Sequence[int]) -> None:
    """Drops all other layers in place; configuration, per-layer lists and layer numbers follow."""
    chosen, count = [stack[i] for i in kept], len(stack)
    del stack[:]
    stack.extend(chosen)
    config, places = network.config, {old: new for new, old in enumerate(kept)}
    for name, setting in list(vars(config).items()):
        if name in _NUMBERS and setting:
            setattr(config, name, [places[i] for i in setting if i in places])
        elif name in _LISTS and isinstance(setting, list) and len(setting) == count:
            setattr(config, name, [setting[i] for i in kept])
    if getattr(config, "attention_types", None):  # GPT-Neo: the list of kinds in short
        config.attention_types = [[[kind], 1] for kind in config.attention_layers]
    config.num_hidden_layers = len(kept)
    for number, layer in enumerate(stack):
        for module in layer.modules():
            for name in ("layer_idx", "layer_id"):
                if isinstance(getattr(module, name, None), int):
                    setattr(module, name, number)  # a plain attribute, not a parameter


def _check_reloads(network: Any, kept: Sequence[int]) -> None:
    """Layers may differ by their place in ways that this file does not know: raises FitError where a network made from
    the configuration, with the same tensors, lacks some or answers otherwise."""
    try:
        fresh = type(network)(type(network.config).from_dict(network.config.to_dict())).to(network.device).eval()
        fresh.load_state_dict(network.state_dict())
        ids = torch.arange(16, device=network.device).reshape(2, 8) % network.config.vocab_size
        network.eval()
        with torch.inference_mode():
            known, got = (n(input_ids=ids, attention_mask=torch.ones_like(ids))[0].float() for n in (network, fresh))
        why = f"answers differ by {float((known - got).abs().max()):.2g}"
        if torch.allclose(known, got, rtol=1e-3, atol=1e-3 * float(known.abs().max())):
            return
    except Exception as error:  # whatever a foreign configuration or network says
        why = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    raise FitError(
        "no-layers", f"{type(network).__name__} with the layers {list(kept)} alone is not what its configuration says",
        got=why, remedy="keep other layers, or use another way down for this architecture",
    ) from None  # fmt: skip
