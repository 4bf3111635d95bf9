"""Bodies for images and recordings that know something general: taught to tell made-up glyphs, or words, apart.

Nothing can be downloaded here, and a network with random weights learns little from a few hundred rows. So glyphs are
drawn (a class is a few random strokes; a sample is bent, turned and moved) and words are synthesised (a class is a few
pairs of formants; a sample has a pitch, a throat and a tempo of its own), as many as are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fanbu.model import Model, provenance, save_network
from fanbu.types import Context

RATE = 8000
CLASSES = 100
STEPS = {"image": 1000, "audio": 600}
BATCH = {"image": 64, "audio": 32}
Floats = np.ndarray[Any, np.dtype[np.float64]]


def body(kind: str, size: int, out: Path, context: Context) -> Model:
    """``size`` layers, 32 ``size`` wide: a ViT, or the convolutions and transformer of wav2vec 2.0."""
    torch.manual_seed(context.seeded("body", kind, size))
    network, reader = (_seeing if kind == "image" else _hearing)(size)
    _teach(network, reader, kind, context)
    return save_network(network.base_model, reader, out, provenance("made-up classes", [], context))


def _shape(size: int) -> dict[str, int]:
    width = {"hidden_size": 32 * size, "intermediate_size": 64 * size}
    return {"num_hidden_layers": size, "num_attention_heads": size, "num_labels": CLASSES, **width}


def _seeing(size: int) -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    config = ViTConfig(image_size=28, patch_size=7, **_shape(size))
    return ViTForImageClassification(config), ViTImageProcessorPil(size={"height": 28, "width": 28})


def _hearing(size: int) -> tuple[Any, Any]:
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        conv_dim=(16 * size,) * 3, conv_kernel=(20, 8, 4), conv_stride=(10, 4, 2), num_feat_extract_layers=3,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, feat_extract_norm="layer", layerdrop=0.0,
        do_stable_layer_norm=True, vocab_size=8, classifier_proj_size=32 * size, apply_spec_augment=False,
        **_shape(size),
    )  # fmt: skip
    reader = Wav2Vec2FeatureExtractor(sampling_rate=RATE, return_attention_mask=True)
    return Wav2Vec2ForSequenceClassification(config), reader


def _teach(network: Any, reader: Any, kind: str, context: Context) -> None:
    """Fresh samples in every batch."""
    numbers = np.random.default_rng(context.seeded("made-up", kind))
    sample: Callable[[int, np.random.Generator], Any] = (glyphs if kind == "image" else words)(numbers)
    steps = STEPS[kind]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    network.train()
    for step in range(steps):
        y = numbers.integers(CLASSES, size=BATCH[kind])
        made = [sample(int(label), numbers) for label in y]
        more = {} if kind == "image" else {"sampling_rate": RATE, "padding": True}
        loss = network(**reader(made, return_tensors="pt", **more), labels=torch.tensor(y)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        rates.step()
        context.progress(f"body, loss {loss:.2f}", step + 1, steps)


def glyphs(numbers: np.random.Generator) -> Callable[[int, np.random.Generator], Any]:
    """Classes of one to four curved strokes."""
    known = [numbers.uniform(0.1, 0.9, (numbers.integers(1, 5), 3, 2)) for _ in range(CLASSES)]
    t = np.linspace(0, 1, 12)[:, None]

    def sample(label: int, numbers: np.random.Generator) -> Any:
        from PIL import Image, ImageDraw

        turn = np.eye(2) + numbers.normal(0, 0.12, (2, 2))
        image = Image.new("L", (56, 56))
        draw, width = ImageDraw.Draw(image), int(numbers.integers(2, 5))
        shift = 0.5 + numbers.normal(0, 0.06, 2)
        for stroke in known[label]:
            a, b, c = (stroke + numbers.normal(0, 0.03, (3, 2)) - 0.5) @ turn + shift
            curve = (1 - t) ** 2 * a + 2 * t * (1 - t) * b + t**2 * c
            draw.line([tuple(p) for p in 56 * curve], fill=255, width=width, joint="curve")
        return np.asarray(image.resize((28, 28), Image.Resampling.BOX).convert("RGB"))

    return sample


def words(numbers: np.random.Generator) -> Callable[[int, np.random.Generator], Any]:
    """Classes of two or three sounds: two formants, how much noise, how long."""
    known = []
    for _ in range(CLASSES):
        n = numbers.integers(2, 4)
        low, high = numbers.uniform(250, 900, n), numbers.uniform(900, 3000, n)
        known.append((low, high, numbers.uniform(0, 1, n) ** 3, numbers.uniform(0.05, 0.15, n)))

    def sample(label: int, numbers: np.random.Generator) -> Floats:
        low, high, rough, long = known[label]
        throat, tempo, pitch = numbers.uniform(0.85, 1.18), numbers.uniform(0.7, 1.4), numbers.uniform(80, 250)
        lengths = np.maximum((RATE * long * tempo * numbers.uniform(0.8, 1.25, len(long))).astype(int), 200)
        at = np.cumsum(lengths) - lengths / 2
        n = np.arange(lengths.sum())
        f1, f2, r = (np.interp(n, at, v) for v in (throat * low, throat * high, rough))
        f0 = pitch * (1 + 0.1 * np.sin(2 * np.pi * n / len(n) + numbers.uniform(0, 6)))
        phase, x = 2 * np.pi * np.cumsum(f0) / RATE, np.zeros(len(n))
        for k in range(1, min(int(3600 / pitch), 24)):
            f = k * f0
            loud = np.exp(-(((f - f1) / 150) ** 2)) + 0.6 * np.exp(-(((f - f2) / 250) ** 2)) + 0.02
            x += loud * np.sin(k * phase)
        x = (1 - r) * x + r * numbers.normal(0, 0.7, len(n))
        x *= np.minimum(1, np.minimum(n, n[::-1]) / 200)
        return (x + numbers.normal(0, 0.02, len(n))).astype(np.float32)

    return sample
