"""Texts to padded batches: tokenized once, ordered by length, the same order for the same seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Sequences = list[list[int]]


T = TypeVar("T")


def evenly(values: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of them, evenly spaced."""
    return list(values[:: max(1, -(-len(values) // max(1, count)))])


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> Sequences:
    """Token ids of each text, cut to ``max_length``; no padding yet."""
    if not texts:
        return []
    return [list(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]


def pad_id(tokenizer: Any) -> int:
    """The id that batches are padded with (masked, so any id does where a tokenizer has none)."""
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0)


def collate(sequences: Sequence[list[int]], pad: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """input_ids and attention_mask, [batch, longest], padded on the right."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def shuffled_batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of one epoch: rows shuffled, sorted by length within pools of 50 batches, batches shuffled again."""
    generator = torch.Generator().manual_seed(seed * 1000 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    pool = size * 50
    batches = []
    for start in range(0, len(order), pool):
        part = sorted(order[start : start + pool], key=lambda i: lengths[i])
        batches += [part[i : i + size] for i in range(0, len(part), size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def sorted_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Batches for prediction: longest first, so that too little memory shows at once."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    return [order[i : i + size] for i in range(0, len(order), size)]
