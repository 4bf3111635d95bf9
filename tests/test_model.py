"""Opening and saving: lazily, sharded, tied, verified, the same bytes for the same model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fanbu.errors import IntegrityError
from fanbu.model import copy_model, load_network, load_tokenizer, open_model, provenance, save_model, save_network
from fanbu.tensors import INDEX, Tensors, write_tensors
from fanbu.types import Context


def test_saving_twice_gives_the_same_digest_and_a_card(llama: Path, context: Context, tmp_path: Path) -> None:
    base = open_model(llama)
    network, tokenizer = load_network(base), load_tokenizer(base)
    one = save_network(network, tokenizer, tmp_path / "one", provenance("test", [base], context, rate=0.1))
    two = save_network(
        network, tokenizer, tmp_path / "elsewhere" / "two", provenance("test", [base], context, rate=0.1)
    )
    assert one.digest == two.digest
    assert one.manifest["parents"] == [base.digest]
    card = (one.path / "README.md").read_text()
    assert card.startswith("---\n")
    assert "base_model_relation: finetune" in card
    assert str(tmp_path) not in card + json.dumps(dict(one.config)) + (one.path / "tokenizer_config.json").read_text()


def test_tied_weights_are_stored_once_and_stay_tied(llama: Path, context: Context, tmp_path: Path) -> None:
    base = open_model(llama)
    saved = save_network(load_network(base), load_tokenizer(base), tmp_path / "m", provenance("test", [base], context))
    assert "lm_head.weight" not in saved.tensors
    network = load_network(saved)
    assert network.get_output_embeddings().weight is network.get_input_embeddings().weight


def test_shards_are_read_lazily_and_give_the_same_network(llama: Path, context: Context, tmp_path: Path) -> None:
    base = open_model(llama)
    (tmp_path / "s").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "s" / name).write_bytes((llama / name).read_bytes())
    tensors = dict(Tensors(llama))
    write_tensors(tmp_path / "s", tensors, shard_bytes=40_000)
    assert (tmp_path / "s" / INDEX).exists()
    sharded = open_model(tmp_path / "s")
    assert len({spec.file for spec in sharded.tensors.values()}) > 1
    assert sharded.parameters == base.parameters
    for name, tensor in load_network(sharded).state_dict().items():
        assert torch.equal(tensor, load_network(base).state_dict()[name])


def test_a_copy_is_the_same_model(llama: Path, tmp_path: Path) -> None:
    base = open_model(llama)
    assert copy_model(base, tmp_path / "copy").digest == base.digest


def test_a_changed_byte_is_noticed(llama: Path, context: Context, tmp_path: Path) -> None:
    base = open_model(llama)
    save_network(load_network(base), load_tokenizer(base), tmp_path / "m", provenance("test", [base], context))
    path = tmp_path / "m" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(IntegrityError, match="not what its manifest says"):
        open_model(tmp_path / "m")


def test_nothing_is_left_of_a_failed_save(llama: Path, context: Context, tmp_path: Path) -> None:
    base = open_model(llama)
    bad = {**dict(Tensors(llama)), "extra": torch.tensor([float("nan")])}
    with pytest.raises(IntegrityError, match="NaN"):
        save_model(tmp_path / "m", base.config, bad, llama, provenance("test", [base], context))
    assert list(tmp_path.iterdir()) == []


def test_the_base_prefix_of_a_body_does_not_matter(bert: Path, context: Context) -> None:
    from fanbu.heads import open_classifier

    body, classifier = open_model(bert), open_classifier(open_model(bert), context)
    ours = classifier.bert.embeddings.word_embeddings.weight
    assert torch.equal(ours, Tensors(body.path)["embeddings.word_embeddings.weight"])
