"""Random Llama-shaped checkpoints of any size, written as they are made."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from fanbu.tensors import Shards, Tensors, chunks

# hidden, intermediate, layers, vocabulary, heads, key and value heads
SHAPES = {
    "tiny": (64, 176, 4, 1000, 4, 2),
    "20M": (384, 1024, 6, 24000, 6, 2),
    "100M": (768, 2048, 12, 32000, 12, 4),
    "150M": (768, 3072, 12, 50304, 12, 4),
    "1.2B": (2048, 8192, 16, 128256, 32, 8),
    "3.5B": (3072, 8192, 30, 128256, 24, 8),
}


def config_of(size: str) -> dict[str, object]:
    """config.json of a size."""
    hidden, inner, layers, vocabulary, heads, groups = SHAPES[size]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocabulary,
        "num_attention_heads": heads, "num_key_value_heads": groups, "tie_word_embeddings": True, "dtype": "bfloat16",
        "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Tensor shapes by name."""
    hidden, inner, layers, vocabulary, heads, groups = SHAPES[size]
    kv = hidden // heads * groups
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
    }
    for layer in range(layers):
        name = f"model.layers.{layer}."
        found |= {f"{name}self_attn.{p}_proj.weight": (hidden if p in "qo" else kv, hidden) for p in "qkvo"}
        found |= {f"{name}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        found |= {f"{name}mlp.down_proj.weight": (hidden, inner)}
        found |= {f"{name}{n}layernorm.weight": (hidden,) for n in ("input_", "post_attention_")}
    return found


def make(folder: Path, size: str, seed: int, base: Path | None = None, noise: float = 0.002) -> Path:
    """A checkpoint in bf16: normal numbers (0.02), or a base with ``noise`` added; nothing if it is there."""
    if (folder / "done").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_of(size)))
    generator = torch.Generator().manual_seed(seed)
    old = Tensors(base) if base else None
    shapes = shapes_of(size)
    shards = Shards(folder, {n: (s, torch.bfloat16) for n, s in shapes.items()})
    block = torch.randn(2**20, generator=generator)
    for name, shape in shapes.items():
        for start, stop in chunks(shape):
            count = (stop - start) * (shape[1] if len(shape) > 1 else 1)
            first = int(torch.randint(0, 2**20, (1,), generator=generator))
            rows = block.roll(first).repeat(-(-count // 2**20))[:count].reshape(stop - start, *shape[1:])
            rows = old.rows(name, start, stop).float() + rows * noise if old else rows * 0.02
            shards.put(name, start, rows)
    shards.close()
    (folder / "done").touch()
    return folder


def family(work: Path, size: str, specialists: int) -> list[Path]:
    """A base and its specialists."""
    base = make(work / size / "base", size, 0)
    return [base, *(make(work / size / f"s{i}", size, i + 1, base) for i in range(specialists))]
