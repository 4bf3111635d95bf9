"""Random Llama-shaped checkpoints of any size, written as they are made."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from fanbu.tensors import Shards, Tensors, chunks

SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "vocab_size": 1000, "heads": (4, 2)},
    "150M": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "vocab_size": 50304, "heads": (12, 4)},
    "1.2B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "vocab_size": 128256, "heads": (32, 8)},
    "3.5B": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 30, "vocab_size": 128256, "heads": (24, 8)},
}  # fmt: skip


def config_of(size: str) -> dict[str, object]:
    """config.json of a size."""
    shape = dict(SHAPES[size])
    heads, groups = shape.pop("heads")  # type: ignore[misc]
    return {
        **shape, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": heads,
        "num_key_value_heads": groups, "tie_word_embeddings": True, "dtype": "bfloat16", "hidden_act": "silu",
        "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "bos_token_id": 0,
        "eos_token_id": 1,
    }  # fmt: skip


def shapes_of(size: str) -> dict[str, tuple[int, ...]]:
    """Tensor shapes by name."""
    c = SHAPES[size]
    h, i, v = int(c["hidden_size"]), int(c["intermediate_size"]), int(c["vocab_size"])  # type: ignore[call-overload]
    heads, groups = c["heads"]  # type: ignore[misc]
    kv = h // heads * groups
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    for layer in range(int(c["num_hidden_layers"])):  # type: ignore[call-overload]
        name = f"model.layers.{layer}."
        found |= {f"{name}self_attn.{p}_proj.weight": (h if p in "qo" else kv, h) for p in "qkvo"}
        found |= {f"{name}mlp.{p}_proj.weight": (i, h) for p in ("gate", "up")}
        found |= {f"{name}mlp.down_proj.weight": (h, i)}
        found |= {f"{name}{n}layernorm.weight": (h,) for n in ("input_", "post_attention_")}
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
            if old:
                rows = old.rows(name, start, stop).float() + rows * noise
            else:
                rows = rows * 0.02
            shards.put(name, start, rows)
    shards.close()
    (folder / "done").touch()
    return folder


def family(work: Path, size: str, specialists: int) -> list[Path]:
    """A base and its specialists."""
    base = make(work / size / "base", size, 0)
    return [base, *(make(work / size / f"s{i}", size, i + 1, base) for i in range(specialists))]
