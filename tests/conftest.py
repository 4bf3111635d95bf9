"""Tiny models and domains, made on the spot; nothing is downloaded."""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import yaml
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import fanbu.round
from fanbu.domain import Domain, Specialist, load_domain
from fanbu.generations import run
from fanbu.heads import open_classifier
from fanbu.model import Model, load_tokenizer, open_model, provenance, save_network
from fanbu.recipe import load_recipe
from fanbu.types import Context, ProbeRow, ProbeSet

TOPICS = {
    "food": {"soup": "broth ladle simmer leek", "bread": "flour yeast crust oven", "fruit": "apple pear plum peel"},
    "rail": {
        "delay": "late platform wait signal",
        "ticket": "fare refund price zone",
        "seat": "window aisle carriage row",
    },
}
DEVICE = os.environ.get("FANBU_TEST_DEVICE", "cpu")  # cuda: the same tests on a GPU
FILLER = ["the", "a", "my", "this", "please", "about", "with", "for", "and", "some", "more", "today"]


def rows(name: str, count: int, seed: int) -> list[dict[str, str]]:
    """Rows whose label shows in their words."""
    rng = random.Random(f"{name}{seed}")
    found = []
    for number in range(count):
        label = sorted(TOPICS[name])[number % len(TOPICS[name])]
        words = rng.choices(TOPICS[name][label].split(), k=2) + rng.choices(FILLER, k=4)
        rng.shuffle(words)
        found.append({"id": f"{seed}-{number}", "text": " ".join(words) + f" {seed}{number}", "label": label})
    return found


def write_rows(path: Path, values: list[dict[str, str]]) -> str:
    path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return str(path)


def write_domain(folder: Path, name: str, train: int = 48) -> dict[str, str]:
    """Files of one domain, as keyword arguments of load_domain."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": train, "valid": 18, "test": 36}
    return {
        split: write_rows(folder / f"{name}.{split}.jsonl", rows(name, count, seed))
        for seed, (split, count) in enumerate(sizes.items())
    }


def wordpiece(texts: list[str]) -> PreTrainedTokenizerFast:
    """Letters, words and their halves, 400 at most; training would break its ties anew in each process."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    normalizer, cut = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    words = Counter(word for t in texts for word, _ in cut.pre_tokenize_str(normalizer.normalize_str(t)))
    letters, common = sorted({letter for word in words for letter in word}), sorted(words, key=lambda w: (-words[w], w))
    parts = [part for word in common for part in (word[:2], "##" + word[2:]) if len(word) > 2]
    pieces = [*special, *letters, *("##" + letter for letter in letters), *common, *parts]
    ids = {piece: i for i, piece in enumerate(list(dict.fromkeys(pieces))[:400])}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, cut
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def all_texts() -> list[str]:
    return [r["text"] for name in TOPICS for r in rows(name, 60, 0)]


def make_bert(folder: Path, layers: int = 2, hidden: int = 32) -> Path:
    """A bare BERT body with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = wordpiece(all_texts())
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_llama(folder: Path, layers: int = 2) -> Path:
    """A tiny causal model with tied embeddings and a byte-level BPE tokenizer."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=350, special_tokens=["<eos>"], show_progress=False)
    tokenizer.train_from_iterator(all_texts(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")
    config = LlamaConfig(
        vocab_size=len(fast), hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=0,
        bos_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bert(tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def domains(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Domain]:
    folder = tmp_path_factory.mktemp("data")
    return {name: load_domain(name, **write_domain(folder, name)) for name in TOPICS}


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Domain]:
    """The same rows as text for causal models."""
    folder = tmp_path_factory.mktemp("text-data")
    return {name: load_domain(name, **write_domain(folder, name), task="causal-lm") for name in TOPICS}


def probe_of(domains: dict[str, Domain]) -> ProbeSet:
    return ProbeSet(
        tuple(ProbeRow(f"{d.name}/{i}", t, d.name) for d in domains.values() for i, t in enumerate(d.train.texts))
    )


@pytest.fixture(scope="session")
def context(domains: dict[str, Domain]) -> Context:
    return Context(device=DEVICE, max_length=16, threads=1, probe=probe_of(domains))


@pytest.fixture(scope="session")
def opened(bert: Path, context: Context, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """The bare body opened as a classifier."""
    base = open_model(bert)
    out = tmp_path_factory.mktemp("opened") / "model"
    return save_network(open_classifier(base, context), load_tokenizer(base), out, provenance("open", [base], context))


@pytest.fixture(scope="session")
def incumbent(
    opened: Model, domains: dict[str, Domain], context: Context, tmp_path_factory: pytest.TempPathFactory
) -> Model:
    """The large model that knows both domains by linear probes."""
    from fanbu.catalogue import method

    way = method("probe")
    sent = [way.contribute(Specialist(opened, d), opened, context) for d in domains.values()]
    return way.absorb(opened, sent, tmp_path_factory.mktemp("incumbent") / "model", context)


@pytest.fixture(scope="session")
def specialists(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Specialist]:
    from fanbu.catalogue import method

    folder, way = tmp_path_factory.mktemp("specialists"), method("finetune")
    train = {"epochs": 3, "lr": 3e-3, "head_lr": 1e-2, "batch_size": 8}
    return {
        name: Specialist(way.shrink(incumbent, d, folder / name, context, train=train), d, incumbent)
        for name, d in domains.items()
    }


def tiny_recipe(folder: Path) -> dict[str, Any]:
    """A recipe whose gate opens, in ``folder/recipe.yaml`` with its model and data; a round takes seconds."""
    make_bert(folder / "bert", hidden=16)
    short = {"epochs": 2, "lr": 5e-3, "head_lr": 1e-2, "batch_size": 8}
    value = {
        "fanbu": 1, "name": "tiny", "model": str(folder / "bert"), "workspace": str(folder / "ws"),
        "device": DEVICE, "precision": "fp32", "threads": 1, "max_length": 16,
        "domains": {name: write_domain(folder / "data", name, train=144) for name in TOPICS},
        "shrink": [{"method": "finetune", "train": short}],
        "feedback": {"method": "distill", "train": {**short, "epochs": 3}},
        "references": [{"method": "average"}], "gate": {"margin": 0.5},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(value))
    return value


@dataclass(frozen=True)
class Done:
    """A round that nothing disturbed. Its workspace is only read: copy it to go on from it."""

    recipe: Path
    workspace: Path
    record: dict[str, Any]

    @property
    def champion(self) -> str:
        return str(self.record["champion"]["model"])


def finished_round(factory: pytest.TempPathFactory) -> Done:
    """One undisturbed round, run once in a test session."""
    return _finished_round(factory.getbasetemp() / "round")


@cache
def _finished_round(folder: Path) -> Done:
    folder.mkdir()
    tiny_recipe(folder)
    done = Done(folder / "recipe.yaml", folder / "ws", run(load_recipe(folder / "recipe.yaml")))
    assert done.record["verdict"]["accepted"], done.record["verdict"]["reason"]
    assert done.champion == done.record["candidate"]["digest"]
    return done


def stages(workspace: Path) -> set[str]:
    """The folders of all finished stages."""
    return {p.name for p in (workspace / "stages").iterdir()}


def short(names: set[str]) -> set[str]:
    """Names of stages without their keys."""
    return {name.rpartition("-")[0] for name in names}


@contextmanager
def open_gate() -> Iterator[None]:
    """Every candidate is accepted: what is tested then does not hang on what tiny models happen to learn."""
    whole = fanbu.round.judge
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fanbu.round.judge", lambda *a: {**whole(*a), "accepted": True, "reason": "the gate is open"})
        yield


def rail_owners(folder: Path) -> list[Domain]:
    """Three owners of rail, with rows of their own."""
    found = []
    for number, owner in enumerate(("east", "north", "west")):
        files = {
            split: write_rows(folder / f"{owner}.{split}.jsonl", rows("rail", count, 10 * number + k))
            for k, (split, count) in enumerate({"train": 48, "valid": 18, "test": 60}.items())
        }
        found.append(load_domain(f"rail@{owner}", **files))
    return found


def probed_for(domains: list[Domain], body: Path, context: Context, folder: Path) -> Model:
    """A bare body opened as a classifier, with label rows that these owners fitted."""
    from fanbu.catalogue import method

    base, probe = open_model(body), method("probe")
    made = provenance("open", [base], context)
    opened = save_network(open_classifier(base, context), load_tokenizer(base), folder / "opened", made)
    sent = [probe.contribute(Specialist(opened, d), opened, context) for d in domains]
    return probe.absorb(opened, sent, folder / "probed", context)
