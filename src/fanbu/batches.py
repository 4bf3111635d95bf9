"""Texts (images, recordings) to padded batches: tokenized once, ordered by length, the same order for the same seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fanbu.data.media import is_media, pixels, samples
from fanbu.errors import DataError

T = TypeVar("T")


@dataclass(frozen=True)
class Media:
    """An image or a recording, as a data URL, with what reads it; decoded when a batch is made of it."""

    url: str
    processor: Any

    def __len__(self) -> int:
        """How much there is to read: images are all of one size; recordings are as long as their bytes."""
        return len(self.url) if self.url.startswith("data:audio/") else 1


Sequences = list[Any]  # lists of token ids; or Media


def evenly(values: Sequence[T], count: int) -> list[T]:
    """At most ``count`` of them, evenly spaced."""
    return list(values[:: max(1, -(-len(values) // max(1, count)))])


def encode(tokenizer: Any, texts: Sequence[str], max_length: int) -> Sequences:
    """Token ids of each text, cut to ``max_length``; no padding yet. Images and recordings are not read yet."""
    if not texts:
        return []
    if not callable(getattr(tokenizer, "get_vocab", None)):
        if strange := [text for text in texts if not is_media(text)]:
            raise DataError(
                "media-broken", f"{len(strange)} rows are texts, and the model reads none", got=strange[0][:40],
                remedy="give images or recordings",
            )  # fmt: skip
        return [Media(text, tokenizer) for text in texts]
    return [list(ids) for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]]


def pad_id(tokenizer: Any) -> int:
    """The id that batches are padded with (masked, so any id does where a tokenizer has none)."""
    known = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    return int(next((i for i in known if i is not None), 0))


def collate(sequences: Sequence[Any], pad: int, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """input_ids and attention_mask, [batch, longest], padded on the right; of media what their processor makes."""
    if isinstance(sequences[0], Media):
        return {k: v.to(device) for k, v in _read(sequences).items()}
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
        mask[row, : len(sequence)] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _read(media: Sequence[Media]) -> dict[str, Tensor]:
    """Images as ``pixel_values`` [batch, channels, height, width]; recordings, brought to the rate that the model
    knows, as ``input_values`` [batch, longest] with ``attention_mask``, or as the features that it takes."""
    processor = media[0].processor
    if media[0].url.startswith("data:image/"):
        return dict(processor([pixels(m.url) for m in media], return_tensors="pt"))
    rate = int(processor.sampling_rate)
    heard = [_at_rate(*samples(m.url), rate) for m in media]
    if "attention_mask" in processor.model_input_names or processor.model_input_names == ["input_values"]:
        more = {"padding": True, "return_attention_mask": True}
    else:  # what makes features pads to its own length
        more = {}
    return dict(processor(heard, sampling_rate=rate, return_tensors="pt", **more))


def _at_rate(x: np.ndarray[Any, Any], rate: int, wanted: int) -> np.ndarray[Any, Any]:
    """Resampled by a polyphase filter."""
    if rate == wanted:
        return x
    from scipy.signal import resample_poly

    common = math.gcd(rate, wanted)
    return np.asarray(resample_poly(x, wanted // common, rate // common), dtype=np.float32)


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
