"""Specialists that have little in common with the large model: cut to 1/2, 1/4, 1/8, or grown from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from _specialists import Bench, made
from fanbu.catalogue import method
from fanbu.domain import Specialist
from fanbu.model import Model, provenance, save_network

SHIPPED = 22_713_216  # parameters of the encoder as it ships
SHARES: Mapping[int, dict[str, float]] = {
    2: {"neurons": 0.3, "channels": 1.0}, 4: {"neurons": 0.2, "channels": 0.6}, 8: {"neurons": 0.1, "channels": 0.3},
}  # fmt: skip
KINDS = ("1/2", "1/4", "1/8", "from nothing")
DISTIL = {"epochs": 3, "lr": 5e-4, "patience": 0, "dropout": 0.0}
TUNE = {"epochs": 8, "lr": 5e-4}
_TOKENS, _HIDDEN, _LAYERS = 2000, 128, 2


def mixed(bench: Bench) -> list[Specialist]:
    """The kinds by turns."""
    return [of_kind(bench, s, KINDS[i % len(KINDS)]) for i, s in enumerate(bench.specialists)]


def of_kind(bench: Bench, full: Specialist, kind: str) -> Specialist:
    """One specialist of a kind; cut ones are distilled from the full-size one."""
    if kind == "from nothing":
        return replace(full, model=_from_nothing(bench, full))
    ratio = int(kind.partition("/")[2])
    cut, folder = _cut(bench, full, ratio), bench.folder / f"small-{ratio}"
    way = method("distill", "shrink")
    given: dict[str, Any] = {"teacher": str(full.model.path), "extra": {"augment": 3}, "train": DISTIL}
    small = made(folder / full.domain.name, lambda out: way.shrink(cut, full.domain, out, bench.context, **given))
    return replace(full, model=small)


def weak(bench: Bench) -> list[Specialist]:
    """At an eighth of the size, taught by labels alone."""

    def one(full: Specialist) -> Specialist:
        cut, way = _cut(bench, full, 8), method("finetune")
        place = bench.folder / "weak" / full.domain.name
        return replace(
            full, model=made(place, lambda out: way.shrink(cut, full.domain, out, bench.context, train=TUNE))
        )

    return [one(s) for s in bench.specialists]


def _cut(bench: Bench, full: Specialist, ratio: int) -> Model:
    """Of the probed base, not of the specialist: what it knows comes afterwards."""
    name, context = full.domain.name, bench.context
    fewer = made(
        bench.folder / "fewer-tokens" / name,
        lambda out: method("vocabulary").shrink(bench.incumbent, full.domain, out, context, max_tokens=4000),
    )
    shares = {**SHARES[ratio], "parameters": float(SHIPPED // ratio)}
    return made(
        bench.folder / f"cut-{ratio}" / name,
        lambda out: method("width").shrink(fewer, full.domain, out, context, train=None, **shares),
    )


def _from_nothing(bench: Bench, full: Specialist) -> Model:
    """A small encoder with random weights and a tokenizer of its own, fine-tuned on the domain."""
    name = full.domain.name
    body = made(bench.folder / "nothing" / name, lambda out: _body(full.domain.train.texts, out, bench))
    tune = {"epochs": 15, "lr": 1e-3}
    return made(
        bench.folder / "from-nothing" / name,
        lambda out: method("finetune").shrink(body, full.domain, out, bench.context, train=tune),
    )


def _body(texts: Sequence[str], out: Path, bench: Bench) -> Model:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    core.train_from_iterator(texts, trainers.WordPieceTrainer(vocab_size=_TOKENS, special_tokens=special))
    core.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=512,
    )  # fmt: skip
    torch.manual_seed(bench.context.seeded("nothing"))
    config = BertConfig(
        vocab_size=core.get_vocab_size(), hidden_size=_HIDDEN, num_hidden_layers=_LAYERS, num_attention_heads=4,
        intermediate_size=4 * _HIDDEN, max_position_embeddings=512,
    )  # fmt: skip
    network = BertForSequenceClassification(config)
    return save_network(network, tokenizer, out, provenance("nothing", [bench.incumbent], bench.context))
