"""Images and recordings: rows from files, hostile ones refused, and a round of each from a bare body."""

from __future__ import annotations

import io
import json
import random
import wave
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    AutoModelForImageClassification,
    ViTConfig,
    ViTImageProcessorPil,
    ViTModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
)

from fanbu.batches import collate, encode
from fanbu.data.load import load_rows
from fanbu.data.media import data_url, described, pixels, samples
from fanbu.data.synthetic import Corpus, synthetic
from fanbu.domain import load_domain
from fanbu.errors import DataError, UsageError
from fanbu.feedback.predictions._panel import variants
from fanbu.generations import run
from fanbu.model import load_network, load_tokenizer, open_model
from fanbu.predict import class_logits
from fanbu.recipe import load_recipe
from fanbu.types import Context, ProbeRow, ProbeSet

SPLITS = {"train": 36, "valid": 12, "test": 24}


def png(label: int, numbers: random.Random) -> bytes:
    """12 x 12: one row of the picture is lit, which one is the label; all else is noise."""
    x = np.array([[numbers.randrange(90) for _ in range(12)] for _ in range(12)], np.uint8)
    x[3 * label + 1] = 255
    stream = io.BytesIO()
    Image.fromarray(x).save(stream, "PNG")
    return stream.getvalue()


def wav(label: int, numbers: random.Random, rate: int = 2000, width: int = 2) -> bytes:
    """A tone with noise; how high it is is the label."""
    n = numbers.randrange(500, 700)
    x = np.sin(2 * np.pi * (120, 300, 700)[label] * np.arange(n) / rate) + np.random.default_rng(n).normal(0, 0.1, n)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(width)
        sound.setframerate(rate)
        top = 2 ** (8 * width - 1) - 1
        whole = (x / 2 * top).astype(f"<i{width}") if width > 1 else (x / 2 * top + 128).astype(np.uint8)
        sound.writeframes(whole.tobytes())
    return stream.getvalue()


MAKE = {"image": (png, "png"), "audio": (wav, "wav")}


def write_media(folder: Path, name: str, kind: str) -> dict[str, str]:
    """One domain: a JSONL a split that names files beside it."""
    made, numbers, suffix = {}, random.Random(name), MAKE[kind][1]
    (folder / name).mkdir(parents=True)
    for split, count in SPLITS.items():
        rows = []
        for i in range(count):
            label = i % 3
            (folder / name / f"{split}{i}.{suffix}").write_bytes(MAKE[kind][0](label, numbers))
            rows.append({kind: f"{name}/{split}{i}.{suffix}", "label": f"kind {label}"})
        path = folder / f"{name}.{split}.jsonl"
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        made[split] = str(path)
    return made


def body(folder: Path, kind: str) -> Path:
    torch.manual_seed(0)
    if kind == "image":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        ViTModel(ViTConfig(image_size=12, patch_size=4, **sizes)).save_pretrained(folder)
        ViTImageProcessorPil(size={"height": 12, "width": 12}).save_pretrained(folder)
    else:
        config = Wav2Vec2Config(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, conv_dim=(32, 32),
            conv_kernel=(16, 8), conv_stride=(8, 4), num_feat_extract_layers=2, num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2, feat_extract_norm="layer", do_stable_layer_norm=True, vocab_size=8,
            classifier_proj_size=32,
        )  # fmt: skip
        Wav2Vec2Model(config).save_pretrained(folder)
        Wav2Vec2FeatureExtractor(sampling_rate=2000, return_attention_mask=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_round_from_a_bare_body(kind: str, tmp_path: Path) -> None:
    auto = AutoModelForImageClassification if kind == "image" else AutoModelForAudioClassification
    train = {"epochs": 8, "lr": 1e-3, "batch_size": 12}
    record = run(load_recipe({
        "fanbu": 1, "name": "media", "model": str(body(tmp_path / "body", kind)), "workspace": str(tmp_path / "ws"),
        "device": "cpu", "precision": "fp32", "threads": 1,
        "domains": {
            name: {"task": f"{kind}-classification", **write_media(tmp_path / "data", name, kind)}
            for name in ("old", "new")
        },
        "shrink": [{"method": "finetune", "train": train}], "feedback": {"method": "distill", "train": train},
        "references": [{"method": "average"}], "gate": {"margin": 0.5},
    }))  # fmt: skip
    candidate = Path(record["candidate"]["path"])
    network = auto.from_pretrained(candidate)
    assert sorted(network.config.label2id)[0] == "new/kind 0"
    for verdict in record["verdict"]["domains"].values():
        assert verdict["candidate"] > 0.6  # of three kinds


def test_rows_come_from_files_bytes_and_parquet(tmp_path: Path) -> None:
    made = png(1, random.Random(0))
    (tmp_path / "a.png").write_bytes(made)
    (tmp_path / "a.csv").write_text("id,picture,label\nx,a.png,one\n")
    table = pa.Table.from_pylist([{"id": "x", "picture": {"bytes": made, "path": None}, "label": "one"}])
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        (row,) = load_rows(str(tmp_path / name), {"image": "picture"}, kind="image")
        assert (row.id, row.label, row.text) == ("x", "one", data_url(made, "image/png")), name
    assert pixels(row.text).shape == (12, 12, 3)
    assert described(row.text, 5) == f"(image/png, {len(made)} bytes)"


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_every_width_are_the_same_sound(width: int) -> None:
    wide = np.frombuffer(wav(1, random.Random(0), width=4)[44:], "<i4").astype(np.float64) / 2**31
    stream = io.BytesIO()
    with wave.open(stream, "wb") as sound:
        sound.setnchannels(2)
        sound.setsampwidth(width)
        sound.setframerate(2000)
        whole = np.stack([wide, wide], 1) * 2 ** (8 * width - 1)
        raw = (whole + 128).astype(np.uint8).tobytes() if width == 1 else _little(whole.astype(np.int64), width)
        sound.writeframes(raw)
    heard, rate = samples(data_url(stream.getvalue(), "audio/wav"))
    assert rate == 2000
    assert np.abs(heard - wide).max() < 2.0 ** -min(8 * width - 2, 23)


def _little(x: np.ndarray[Any, Any], width: int) -> bytes:
    return x.astype("<i8").view(np.uint8).reshape(*x.shape, 8)[..., :width].tobytes()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"no picture", "image"), (b"\x89PNG\r\n\x1a\n and no more", "image"), (b"RIFF....WAVE", "audio"),
        (png(0, random.Random(0)), "audio"), (png(0, random.Random(0))[:60], "image"), ("../secret.png", "image"),
        ("/etc/hostname", "image"), ("data:image/png;base64,!!!", "image"), ("data:text/html;base64,AAAA", "image"),
        (None, "image"), (7, "audio"),
    ],
)  # fmt: skip
def test_broken_and_hostile_media_are_refused_with_their_row(content: Any, kind: str, tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png(0, random.Random(0)))
    (tmp_path / "data").mkdir()
    value = {"bytes": content} if isinstance(content, bytes) else content
    pa.parquet.write_table(pa.Table.from_pylist([{kind: value, "label": "a"}]), tmp_path / "data" / "a.parquet")
    with pytest.raises(DataError, match="row 1 of") as caught:
        load_rows(str(tmp_path / "data" / "a.parquet"), kind=kind)
    assert caught.value.code == "media-broken"


def test_an_image_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fanbu.data.media.MAX_PIXELS", 100)
    with pytest.raises(DataError, match="12 x 12"):
        pixels(data_url(png(0, random.Random(0)), "image/png"))


def test_media_are_never_taken_for_synthetic_texts_and_have_no_variants() -> None:
    urls = [data_url(png(i % 3, random.Random(i)), "image/png") for i in range(8)]
    assert not Corpus(urls).hides(urls[0] + "A")
    with pytest.raises(DataError, match="no synthetic text"):
        synthetic(urls, 5, 0)
    context = Context(probe=ProbeSet(tuple(ProbeRow(str(i), url, "d") for i, url in enumerate(urls))))
    with pytest.raises(UsageError, match="variants"):
        variants(context, "d", 1)


def test_recordings_are_brought_to_the_models_rate_and_do_not_depend_on_their_batch(tmp_path: Path) -> None:
    folder = write_media(tmp_path / "data", "old", "audio")
    domain = load_domain("old", task="audio-classification", **folder)
    auto = AutoModelForAudioClassification.from_pretrained(body(tmp_path / "body", "audio"), num_labels=3)
    auto.save_pretrained(tmp_path / "whole")
    AutoFeatureExtractor.from_pretrained(tmp_path / "body").save_pretrained(tmp_path / "whole")
    model = open_model(tmp_path / "whole")
    assert model.task == "audio-classification"
    network, reader, context = load_network(model), load_tokenizer(model), Context(threads=1)
    together = class_logits(network, reader, domain.test.texts, context)
    alone = torch.cat([class_logits(network, reader, [t], context) for t in domain.test.texts])
    assert torch.allclose(together, alone, atol=1e-4)
    twice = data_url(wav(1, random.Random(0), rate=4000), "audio/wav")
    half = collate(encode(reader, [twice], 16), 0)["input_values"]
    assert half.shape[1] == -(-len(samples(twice)[0]) // 2)


def test_a_model_of_images_refuses_texts(tmp_path: Path) -> None:
    reader = load_tokenizer(open_model(body(tmp_path / "body", "image")))
    with pytest.raises(DataError, match="reads none"):
        encode(reader, ["a text"], 16)
