"""What benchmarks/shrink.py holds our cuts against: Torch-Pruning, a random cut, the same sizes from scratch.

Each gives a checkpoint of at most so many parameters, not yet distilled, of the same fine-tuned parent as ours.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fanbu.batches import encode, pad_id
from fanbu.domain import Domain
from fanbu.heads import final_layer
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.objectives import labelled
from fanbu.predict import limit
from fanbu.shrink._units import best, narrowed, size_of, units
from fanbu.shrink.depth import keep_layers, layers_of
from fanbu.types import Context

TORCH_PRUNING = "torch-pruning==1.6.1"
_SAMPLE = 256


def torch_pruning(work: Path) -> Any:
    """The package, installed once into the work folder (pure Python; it needs nothing but torch)."""
    folder = work / "peers" / "torch-pruning"
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
        subprocess.run([*command, TORCH_PRUNING], check=True)
    sys.path.insert(0, str(folder))
    import torch_pruning as package

    return package


def by_torch_pruning(parent: Model, domain: Domain, out: Path, context: Context, most: int, work: Path) -> Model:
    """Its Taylor importance with its grouping, one ratio for channels, heads and neurons, neurons filled up to size.

    Its result is a module without a config that fits; as one ratio holds everywhere, a plain BERT takes its tensors.
    """
    tp = torch_pruning(work)
    network, tokenizer = load_network(parent), load_tokenizer(parent)
    heads, neurons = _sizes(network, parent, most)
    _accumulate_gradients(network, tokenizer, domain, context)
    attention = [layer.attention.self for layer in network.bert.encoder.layer]
    share = heads / network.config.num_attention_heads + 1e-6  # it takes the whole part of heads x share
    ratios = {
        layer.intermediate.dense: 1 - neurons / network.config.intermediate_size - 1e-6
        for layer in network.bert.encoder.layer
    }
    ids = torch.tensor([tokenizer("a text of a few words")["input_ids"]])
    pruner = tp.pruner.MetaPruner(
        network, {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        importance=tp.importance.GroupTaylorImportance(), pruning_ratio=1 - share, pruning_ratio_dict=ratios,
        ignored_layers=[final_layer(network)], prune_num_heads=True, prune_head_dims=False,
        head_pruning_ratio=1 - share,
        num_heads={m: network.config.num_attention_heads for a in attention for m in (a.query, a.key, a.value)},
    )  # fmt: skip
    pruner.step()
    config = type(network.config)(**network.config.to_dict())
    config.num_attention_heads, config.hidden_size = heads, network.bert.embeddings.word_embeddings.embedding_dim
    config.intermediate_size = neurons
    plain = type(network)(config)
    plain.load_state_dict(network.state_dict(), strict=True)
    return save_network(plain, tokenizer, out, provenance("torch-pruning", [parent], context))


def _sizes(network: Any, parent: Model, most: int) -> tuple[int, int]:
    """(heads, neurons): the largest uniform share that fits, in whole heads; the rest goes to neurons."""
    config, found = network.config, units(network, parent, channels=True)
    width = config.hidden_size // config.num_attention_heads
    per_head = config.intermediate_size // config.num_attention_heads

    def parameters(heads: int, neurons: int) -> int:
        numbers = {"neurons": neurons, "heads": heads, "channels": heads * width}
        return size_of(network, found, {s.name: numbers[s.kind] for s in found.sets})

    heads = max(n for n in range(1, config.num_attention_heads + 1) if parameters(n, n * per_head) <= most)
    neurons = range(heads * per_head, config.intermediate_size + 1, 8)
    return heads, max(n for n in neurons if parameters(heads, n) <= most)


def _accumulate_gradients(network: Any, tokenizer: Any, domain: Domain, context: Context) -> None:
    sequences = encode(tokenizer, domain.train.texts[:_SAMPLE], limit(network, context))
    loss = labelled(sequences, (domain.train.labels or ())[:_SAMPLE], pad_id(tokenizer), context.device)
    for start in range(0, len(sequences), 32):
        loss(network, range(start, min(start + 32, len(sequences)))).backward()


def at_random(parent: Model, like: Model, domain: Domain, out: Path, context: Context) -> Model:
    """Layers and units drawn at random, to the sizes of ``like``; whole rows, as ours, but nobody takes over."""
    network, tokenizer = load_network(parent), load_tokenizer(parent)
    generator = torch.Generator().manual_seed(context.seeded("random", domain.name))
    stack, count = layers_of(network), int(like.config["num_hidden_layers"])
    keep_layers(network, stack, sorted(torch.randperm(len(stack), generator=generator)[:count].tolist()))
    found = units(network, parent, channels=True)
    hidden, neurons = int(like.config["hidden_size"]), int(like.config["intermediate_size"])
    heads = int(like.config["num_attention_heads"])
    assert found.channels is not None
    channels = torch.randperm(found.channels.units, generator=generator)[:hidden].sort().values
    keep = {found.channels.name: channels, **{s.name: channels for s in found.followers}}
    if found.pooled:
        keep[found.pooled.name] = best(torch.rand(found.pooled.units, generator=generator), hidden)
    for s in found.layers:
        keep[s.name] = best(torch.rand(s.units, generator=generator), neurons if s.kind == "neurons" else heads)
    smaller = narrowed(network, found, keep, parent)
    return save_network(smaller, tokenizer, out, provenance("random cut", [parent], context))


def from_scratch(like: Model, out: Path, context: Context) -> Model:
    """Fresh weights in the sizes, tokens and labels of ``like``."""
    network, tokenizer = load_network(like), load_tokenizer(like)
    torch.manual_seed(context.seeded("scratch"))
    fresh = type(network)(network.config)
    return save_network(fresh, tokenizer, out, provenance("scratch", [like], context))
