"""Merging across tokenizers: models brought onto one vocabulary, exactly where that is possible, sensibly elsewhere."""

from __future__ import annotations

import json
import os
import random
import shutil
import string
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sklearn.linear_model import orthogonal_mp
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import fanbu as public
from conftest import wordpiece
from fanbu.catalogue import method
from fanbu.domain import Domain
from fanbu.errors import FitError, IntegrityError, UsageError
from fanbu.from_mergekit import run_mergekit
from fanbu.merging import omp
from fanbu.merging.omp import Table, sparse_codes
from fanbu.merging.token_rows import token_tensors
from fanbu.merging.tokens import Row, pieces_of, spelled, vocabulary_of, written
from fanbu.merging.vocabulary import retokenize, union
from fanbu.model import Model, open_model
from fanbu.tensors import Tensors
from fanbu.types import Context
from test_cli import Command, error_of, fanbu  # noqa: F401 - fixtures

SIZE = 32
CONTEXT = Context(threads=1)
SYLLABLES = ["ba", "co", "di", "fu", "gal", "hem", "ik", "jo", "ku", "lar", "mi", "no", "pre", "qua", "ri", "sto"]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def corpus(seed: int, words: int = 150) -> list[str]:
    rng = random.Random(seed)
    known = ["".join(rng.choices(SYLLABLES, k=rng.randint(1, 3))) for _ in range(words)]
    return [" ".join(rng.choices(known, k=8)) for _ in range(200)] + [" ".join(string.ascii_letters)]


def bpe(texts: Sequence[str], size: int = 400, metaspace: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace() if metaspace else pre_tokenizers.ByteLevel(False)
    tokenizer.decoder = decoders.Metaspace() if metaspace else decoders.ByteLevel()
    alphabet = [] if metaspace else sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<eos>", "<pad>"], show_progress=False, initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")


def unigram(texts: Sequence[str], size: int = 300) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size, special_tokens=["<unk>", "<eos>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


def llama_of(
    folder: Path, tokenizer: Any, *, rows: int | None = None, tied: bool = False, seed: int = 0, width: int = SIZE
) -> Model:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=width, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_model(folder)


def bert_of(folder: Path, tokenizer: Any, *, rows: int | None = None, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=rows or len(tokenizer), hidden_size=SIZE, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )  # fmt: skip
    network = BertForMaskedLM(config)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return open_model(folder)


def with_tokens(model: Model, folder: Path, keep: Sequence[str], change: Any = None) -> Model:
    """The same model for the tokens ``keep``, in this order: other ids, other tokenizer, rows that go along."""
    shutil.copytree(model.path, folder)
    vocabulary = vocabulary_of(model)
    spec = json.loads(json.dumps(vocabulary.spec))
    new = {t: i for i, t in enumerate(keep)}
    spec["model"]["vocab"] = new
    spec["added_tokens"] = [{**t, "id": new[t["content"]]} for t in spec["added_tokens"] if t["content"] in new]
    if "merges" in spec["model"]:
        spec["model"]["merges"] = [m for m in spec["model"]["merges"] if {*m, "".join(m)} <= set(keep)]
    for token in ((spec.get("post_processor") or {}).get("special_tokens") or {}).values():
        token["ids"] = [new[t] for t in token["tokens"]]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    order = torch.tensor([vocabulary.ids[t] for t in keep])
    tensors = {
        n: t[order] if n in token_tensors(model) else t for n, t in load_file(folder / "model.safetensors").items()
    }
    tensors = change(tensors) if change else tensors
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config, "vocab_size": len(keep)}
    config |= {
        k: new.get(vocabulary.tokens.get(v, "")) for k, v in config.items() if k.endswith("_token_id") and v is not None
    }
    (folder / "config.json").write_text(json.dumps(config))
    return open_model(folder)


def shuffled(model: Model, seed: int = 1) -> list[str]:
    tokens = sorted(vocabulary_of(model).ids)
    random.Random(seed).shuffle(tokens)
    return tokens


def hidden_ones(model: Model, share: float = 0.2) -> set[str]:
    """The tokens that BPE learned last: no other token is built on them, so a tokenizer can do without."""
    ids = vocabulary_of(model).ids
    return set(sorted(ids, key=ids.__getitem__)[-int(share * len(ids)) :])


def logits(model: Model, texts: Sequence[str]) -> tuple[list[list[str]], list[Tensor]]:
    """Tokens of each text, and the logits of each by name of token, in plain transformers."""
    auto = AutoModelForMaskedLM if "Masked" in model.config["architectures"][0] else AutoModelForCausalLM
    network, info = auto.from_pretrained(model.path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    vocabulary = tokenizer.get_vocab()
    order = torch.tensor([vocabulary[t] for t in sorted(vocabulary)])
    found, values = [], []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        found.append(tokenizer.convert_ids_to_tokens(ids[0]))
        with torch.no_grad():
            values.append(network(ids).logits[0][:, order])
    return found, values


TEXTS = ["bacodi fugal hemik", "lar mino prequa", "Zx stoRi jojoku"]


@pytest.fixture(scope="module", params=["llama", "tied", "bert"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("vocabulary") / request.param
    if request.param == "bert":
        return bert_of(folder, wordpiece(corpus(0)))
    return llama_of(folder, bpe(corpus(0)), tied=request.param == "tied")


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return llama_of(tmp_path_factory.mktemp("vocabulary") / "base", bpe(corpus(0)))


def test_one_vocabulary_changes_nothing(base: Model, tmp_path: Path) -> None:
    target = with_tokens(base, tmp_path / "t", in_order(base))
    made = retokenize(base, target, tmp_path / "out", CONTEXT)
    old, new = Tensors(base.path), Tensors(made.path)
    assert set(old) == set(new)
    assert all(torch.equal(old[n], new[n]) and old[n].dtype == new[n].dtype for n in old)
    assert made.manifest["parameters"]["rows"] == {"own": vocabulary_of(base).rows}


def test_permuted_ids_give_the_same_logits(base: Model, tmp_path: Path) -> None:
    target = with_tokens(
        base, tmp_path / "t", shuffled(base), lambda ts: {n: torch.zeros_like(t) for n, t in ts.items()}
    )
    made = retokenize(base, target, tmp_path / "out", CONTEXT)
    (tokens, expected), (again, got) = logits(base, TEXTS), logits(made, TEXTS)
    assert tokens == again
    for a, b in zip(expected, got, strict=True):
        torch.testing.assert_close(a, b)
    assert made.config["pad_token_id"] == target.config["pad_token_id"] != base.config["pad_token_id"]
    back = retokenize(made, base, tmp_path / "back", CONTEXT)
    assert all(torch.equal(Tensors(back.path)[n], t) for n, t in Tensors(base.path).items())


def test_rows_without_tokens(tmp_path: Path) -> None:
    tokenizer = bpe(corpus(0))
    n = len(tokenizer)
    wide = llama_of(tmp_path / "wide", tokenizer, rows=n + 56)
    less = llama_of(tmp_path / "less", tokenizer, rows=n + 8, seed=1)
    down = retokenize(wide, less, tmp_path / "down", CONTEXT)
    assert torch.equal(Tensors(down.path)[EMBED], Tensors(wide.path)[EMBED][: n + 8])
    assert down.config["vocab_size"] == n + 8
    own = Tensors(less.path)[HEAD]
    theirs = Tensors(wide.path)[HEAD]
    for missing, rest in (("omp", own[:n].mean(0).expand(48, -1).contiguous()), ("base", theirs[n + 8 :])):
        up = retokenize(less, wide, tmp_path / missing, CONTEXT, missing=missing)
        assert torch.equal(Tensors(up.path)[HEAD][: n + 8], own)
        torch.testing.assert_close(Tensors(up.path)[HEAD][n + 8 :], rest)
        logits(up, TEXTS)


def by_brute_force(x: np.ndarray, atoms: np.ndarray, k: int) -> np.ndarray:
    """Textbook OMP of one vector in float64: [a] coefficients."""
    unit, left, chosen = atoms / np.linalg.norm(atoms, axis=1, keepdims=True), x, []
    for _ in range(k):
        chosen.append(int(np.argmax(np.abs(unit @ left))))
        c, *_ = np.linalg.lstsq(atoms[chosen].T, x, rcond=None)
        left = x - atoms[chosen].T @ c
    full = np.zeros(len(atoms))
    full[chosen] = c
    return full


@pytest.mark.parametrize("blocks", [2**23, 2**11])
def test_omp_is_the_textbooks(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(omp, "BLOCK", blocks)
    monkeypatch.setattr(omp, "MOST", 7)
    rng = np.random.default_rng(0)
    atoms, x = rng.normal(size=(200, 24)) * rng.uniform(0.2, 3, size=(200, 1)), rng.normal(size=(30, 24))
    ids, c = sparse_codes(Table.of(torch.tensor(x)), Table.of(torch.tensor(atoms)), 5, CONTEXT)
    got = torch.zeros(30, 200).scatter_add_(1, ids, c).numpy()
    np.testing.assert_allclose(got, np.stack([by_brute_force(v, atoms, 5) for v in x]), rtol=2e-3, atol=2e-5)
    length = np.linalg.norm(atoms, axis=1)
    theirs = orthogonal_mp((atoms / length[:, None]).T, x.T, n_nonzero_coefs=5).T / length
    np.testing.assert_allclose(got, theirs, rtol=2e-3, atol=2e-5)


def test_omp_threads_change_no_bit_and_empty_atoms_no_result() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms, x = torch.randn(300, 16, generator=generator), torch.randn(2500, 16, generator=generator)
    atoms[::7] = 0.0
    x[0] = 0.0
    one = sparse_codes(Table.of(x), Table.of(atoms), 4, Context(threads=1))
    two = sparse_codes(Table.of(x), Table.of(atoms), 4, Context(threads=2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not bool((one[0][one[1] != 0] % 7 == 0).any())
    assert not bool(one[1][0].any())
    few = sparse_codes(Table.of(x[:3]), Table.of(atoms[1:3]), 4, CONTEXT)
    assert few[1].isfinite().all()
    assert few[1][1, :2].ne(0).all()
    assert not bool(few[1][:, 2:].any())


def turned(model: Model, folder: Path, keep: Sequence[str], seed: int) -> tuple[Model, Tensor]:
    """The same model for some of its tokens, its embeddings turned in space."""
    width = Tensors(model.path)[EMBED].shape[1]
    turn, _ = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(seed)))
    return with_tokens(
        model, folder, keep, lambda ts: {n: t @ turn if n in (EMBED, HEAD) else t for n, t in ts.items()}
    ), turn


def in_order(model: Model) -> list[str]:
    ids = vocabulary_of(model).ids
    return sorted(ids, key=ids.__getitem__)


def test_omp_finds_a_sparse_sum_exactly(tmp_path: Path) -> None:
    """The donor's hidden rows are sums of three known rows; so are then the model's own, in another space."""
    full = llama_of(tmp_path / "full", bpe(corpus(0)), width=128)
    hidden = hidden_ones(full)
    keep = [t for t in shuffled(full) if t not in hidden]
    order, rng = shuffled(full, 9), random.Random(0)
    ids = {t: i for i, t in enumerate(order)}
    sums = {ids[t]: [(ids[rng.choice(keep)], 0.5 + rng.random()) for _ in range(3)] for t in sorted(hidden)}

    def summed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in (EMBED, HEAD):
            for number, parts in sums.items():
                tensors[name][number] = sum(w * tensors[name][i] for i, w in parts)
        return tensors

    donor = with_tokens(full, tmp_path / "donor", order, summed)
    poor, turn = turned(donor, tmp_path / "poor", keep, 5)
    made = retokenize(poor, donor, tmp_path / "out", CONTEXT)
    assert made.manifest["parameters"]["rows"] == {"omp": len(hidden), "own": len(keep)}
    for name in (EMBED, HEAD):
        torch.testing.assert_close(Tensors(made.path)[name], Tensors(donor.path)[name] @ turn, rtol=1e-4, atol=1e-4)


def test_omp_beats_the_mean(tmp_path: Path) -> None:
    """Rows near a few directions, as trained ones are; the model is a turned copy that lacks every fifth token."""
    full = llama_of(tmp_path / "full", bpe(corpus(0)))
    generator = torch.Generator().manual_seed(2)
    n = vocabulary_of(full).rows

    def low(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        for name in (EMBED, HEAD):
            directions, noise = torch.randn(8, SIZE, generator=generator), torch.randn(n, SIZE, generator=generator)
            tensors[name] = torch.randn(n, 8, generator=generator) @ directions + 0.2 * noise
        return tensors

    donor = with_tokens(full, tmp_path / "donor", shuffled(full, 9), low)
    hidden = hidden_ones(full)
    poor, turn = turned(donor, tmp_path / "poor", [t for t in shuffled(donor) if t not in hidden], 3)
    at = torch.tensor([vocabulary_of(donor).ids[t] for t in sorted(hidden)])
    errors: dict[str, float] = {}
    for missing in ("omp", "mean", "zero", "pieces"):
        made = Tensors(retokenize(poor, donor, tmp_path / missing, CONTEXT, missing=missing).path)
        truth = {name: (Tensors(donor.path)[name] @ turn)[at] for name in (EMBED, HEAD)}
        errors[missing] = sum(float((made[n][at] - t).norm() / t.norm()) / 2 for n, t in truth.items())
    assert errors["omp"] < 0.3 < 0.9 < min(errors["mean"], errors["pieces"]), errors


def test_ways_for_tokens_that_are_missing(llama_base: Model, tmp_path: Path) -> None:
    hidden = hidden_ones(llama_base, 0.05)
    poor = with_tokens(llama_base, tmp_path / "poor", [t for t in shuffled(llama_base) if t not in hidden])
    own, new = vocabulary_of(poor), vocabulary_of(llama_base)
    at = torch.tensor([new.ids[t] for t in sorted(hidden)])
    old = Tensors(poor.path)
    tokenizer = AutoTokenizer.from_pretrained(poor.path)
    for name in (EMBED, HEAD):
        expected = {"zero": torch.zeros(len(at), SIZE), "mean": old[name].mean(0).expand(len(at), -1)}
        expected["base"] = Tensors(llama_base.path)[name][at]
        split = [tokenizer.encode(spelled(t, "bytes").decode(), add_special_tokens=False) for t in sorted(hidden)]
        assert all(len(ids) > 1 for ids in split)
        expected["pieces"] = torch.stack([old[name][torch.tensor(ids)].mean(0) for ids in split])
        for missing, rows in expected.items():
            made = retokenize(poor, llama_base, tmp_path / missing, CONTEXT, missing=missing)
            torch.testing.assert_close(Tensors(made.path)[name][at], rows.contiguous(), rtol=1e-5, atol=1e-6)
            for token, i in own.ids.items():
                assert torch.equal(
                    Tensors(made.path).rows(name, new.ids[token], new.ids[token] + 1)[0], old.rows(name, i, i + 1)[0]
                )


def test_small_pieces_of_work_change_nothing(
    llama_base: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poor = with_tokens(
        llama_base, tmp_path / "poor", [t for t in shuffled(llama_base) if t not in hidden_ones(llama_base)]
    )
    one = retokenize(poor, llama_base, tmp_path / "one", CONTEXT)
    assert retokenize(poor, llama_base, tmp_path / "again", Context(threads=2)).digest == one.digest
    monkeypatch.setattr("fanbu.tensors.CHUNK", 5 * SIZE)
    two = retokenize(poor, llama_base, tmp_path / "two", CONTEXT)
    for name, tensor in Tensors(one.path).items():
        torch.testing.assert_close(Tensors(two.path)[name], tensor, rtol=1e-5, atol=1e-6)


def test_surface_forms() -> None:
    assert [spelled(*x) for x in [("Ġbank", "bytes"), ("▁bank", "metaspace"), ("bank", "wordpiece")]] == [b" bank"] * 3
    assert [spelled(*x) for x in [("ing", "bytes"), ("ing", "metaspace"), ("##ing", "wordpiece")]] == [b"ing"] * 3
    assert spelled("<0x0A>", "metaspace") == spelled("Ċ", "bytes") == b"\n"
    for text in [" héllo".encode(), b"ing", " 反哺".encode()]:
        for family in ("bytes", "metaspace", "wordpiece"):
            assert spelled(written(text, family), family) == text
    for byte in range(256):
        assert spelled(written(bytes([byte]), "bytes"), "bytes") == bytes([byte])
    table = {c for b in range(256) for c in [written(bytes([b]), "bytes")]}
    assert table == set(pre_tokenizers.ByteLevel.alphabet())


def test_tokenizers_of_other_families(tmp_path: Path) -> None:
    bytewise = llama_of(tmp_path / "b", bpe(corpus(0)))
    spaced = llama_of(tmp_path / "m", bpe(corpus(0), metaspace=True), seed=1)
    made = retokenize(spaced, bytewise, tmp_path / "out", CONTEXT)
    own, new = vocabulary_of(spaced), vocabulary_of(bytewise)
    assert (own.family, new.family) == ("metaspace", "bytes")
    pairs = [(t, "Ġ" + t[1:] if t[0] == "▁" else t) for t in own.ids if t not in own.added and t != "▁"]
    pairs = [(a, b) for a, b in pairs if b in new.ids]
    assert len(pairs) > 150
    for a, b in [*pairs, ("<eos>", "<eos>")]:
        assert torch.equal(Tensors(made.path)[EMBED][new.ids[b]], Tensors(spaced.path)[EMBED][own.ids[a]])
    word = vocabulary_of(bert_of(tmp_path / "w", wordpiece(corpus(0))))
    split = pieces_of(word, new, ["Ġbacodi", "dikuba", "Ġ反", "<eos>"])
    assert [[word.tokens[i] for i in ids] for ids in split][:2] == [["ba", "##codi"], ["##diku", "##ba"]]
    assert split[2:] == [[], []]
    back = retokenize(bytewise, open_model(tmp_path / "w"), tmp_path / "bert", CONTEXT, missing="pieces")
    for token, text in (("ba", "Ġba"), ("##codi", "codi")):
        assert torch.equal(row(back, token), row(bytewise, text))


def noisy(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda ts: {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in ts.items()}


@dataclass
class Family:
    """A base that lacks tokens which its specialists have: each some of their own and some in common."""

    base: Model
    folders: dict[str, Path]
    own: dict[str, set[str]]
    common: set[str]

    def models(self) -> dict[str, Model]:
        return {n: open_model(f) for n, f in self.folders.items()}


@pytest.fixture(scope="module")
def family(llama_base: Model, tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("family")
    hidden = in_order(llama_base)[-60:]
    parts = {"a": set(hidden[0::3]), "b": set(hidden[1::3])}
    common = set(hidden[2::3])
    merges = vocabulary_of(llama_base).spec["model"]["merges"]
    for name in parts:  # a token needs those that it is made of
        for left, right in reversed(merges):
            if left + right in parts[name] | common:
                parts[name] |= {left, right} & set(hidden) - common
    both = parts["a"] & parts["b"]
    common |= both
    parts = {n: p - both for n, p in parts.items()}
    base = with_tokens(llama_base, folder / "base", [t for t in shuffled(llama_base) if t not in hidden])
    for name in parts:
        keep = [t for t in shuffled(llama_base, ord(name)) if t not in hidden or t in parts[name] | common]
        with_tokens(llama_base, folder / name, keep, noisy(ord(name)))
    return Family(base, {n: folder / n for n in parts}, parts, common)


def row(model: Model | Path, token: str, name: str = EMBED) -> Tensor:
    place = vocabulary_of(open_model(model) if isinstance(model, Path) else model).ids[token]
    return Tensors(model if isinstance(model, Path) else model.path).rows(name, place, place + 1)[0]


def test_a_union_has_every_token(family: Family, tmp_path: Path) -> None:
    made = union(family.base, family.models(), tmp_path / "u", CONTEXT)
    other = union(family.base, dict(reversed(family.models().items())), tmp_path / "v", CONTEXT)
    assert made.digest == other.digest
    own, new = vocabulary_of(family.base), vocabulary_of(made)
    assert all(new.ids[t] == i for t, i in own.ids.items())
    theirs = {n: vocabulary_of(m) for n, m in family.models().items()}
    assert set(new.ids) == set(own.ids).union(*(v.ids for v in theirs.values()))
    order = [t for n in "ab" for t in sorted(theirs[n].ids, key=theirs[n].ids.__getitem__) if t not in own.ids]
    assert [new.tokens[i] for i in range(len(own.ids), new.rows)] == list(dict.fromkeys(order))
    for name in (EMBED, HEAD):
        for owner, tokens in family.own.items():
            assert all(torch.equal(row(made, t, name), row(family.folders[owner], t, name)) for t in sorted(tokens)[:5])
        for token in sorted(family.common)[:5]:
            mean = (row(family.folders["a"], token, name) + row(family.folders["b"], token, name)) / 2
            torch.testing.assert_close(row(made, token, name), mean)
    assert all(torch.equal(row(made, t), row(family.base, t)) for t in sorted(own.ids)[:5])
    padded = union(family.base, family.models(), tmp_path / "w", CONTEXT, pad_to_multiple_of=64)
    assert padded.config["vocab_size"] == -(-new.rows // 64) * 64 > new.rows
    logits(padded, TEXTS)


def test_one_specialist_and_its_tokens_come_back_whole(llama_base: Model, family: Family, tmp_path: Path) -> None:
    """The full model merged into one with fewer tokens: it splits and answers as it did."""
    full = {"full": llama_base.path}
    for name in ("average", "task_arithmetic"):
        more = {"scale": 1.0} if name == "task_arithmetic" else {}
        made = public.merge(
            family.base, full, tmp_path / name, CONTEXT, method_name=name, vocabulary="union", **more
        )  # fmt: skip
        (tokens, expected), (again, got) = (
            logits(llama_base, [*TEXTS, *corpus(0)[:20]]),
            logits(made, [*TEXTS, *corpus(0)[:20]]),
        )
        assert tokens == again
        assert {t for ts in tokens for t in ts} & (
            set(vocabulary_of(llama_base).ids) - set(vocabulary_of(family.base).ids)
        )
        for a, b in zip(expected, got, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "average", "tsv_m"])
def test_who_does_not_know_a_token_does_not_move_it(name: str, family: Family, tmp_path: Path) -> None:
    (tmp_path / ".u.vocabulary.999999999.partial").mkdir()  # what a killed process left
    made = public.merge(family.base, family.folders, tmp_path / "u", CONTEXT, method_name=name, vocabulary="union")
    for owner, tokens in family.own.items():
        for token in sorted(tokens):
            torch.testing.assert_close(row(made, token), row(family.folders[owner], token), rtol=1e-5, atol=1e-6)
    assert not torch.equal(row(made, "ba"), row(family.base, "ba"))
    assert made.manifest["parents"][0] == family.base.digest
    assert made.manifest["parameters"]["vocabulary"] == "union"
    assert [p.name for p in tmp_path.iterdir()] == ["u"]
    with pytest.raises(UsageError, match="other tokens"):
        public.unmerge(family.base, made, ["a"], tmp_path / "less")


def test_onto_the_vocabulary_of_the_base(llama_base: Model, family: Family, tmp_path: Path) -> None:
    """The base knows more than the specialist, in another order: known tokens are the specialist's, others stay."""
    specialist = family.folders["a"]
    made = public.merge(
        llama_base, {"a": specialist}, tmp_path / "out", CONTEXT, method_name="task_arithmetic", vocabulary="base",
        scale=1.0, keep=True,
    )  # fmt: skip
    assert vocabulary_of(made).same(vocabulary_of(llama_base))
    known = vocabulary_of(open_model(specialist)).ids
    for token in vocabulary_of(llama_base).ids:
        expected = row(specialist, token) if token in known else row(llama_base, token)
        torch.testing.assert_close(row(made, token), expected, rtol=1e-5, atol=1e-6)
    less = public.unmerge(llama_base, made, ["a"], tmp_path / "less")
    assert all(torch.equal(t, Tensors(less.path)[n]) for n, t in Tensors(llama_base.path).items())


def test_rows_that_are_padding_elsewhere(tmp_path: Path) -> None:
    """Same tokens, other number of rows (as 151,936 and 152,064): the base's number counts."""
    tokenizer = bpe(corpus(0))
    large = llama_of(tmp_path / "large", tokenizer, rows=len(tokenizer) + 16)
    small = llama_of(tmp_path / "small", tokenizer, rows=len(tokenizer), seed=1)
    with pytest.raises(FitError, match=r"other-vocabulary") as told:
        public.merge(large, {"s": small.path}, tmp_path / "out", CONTEXT)
    assert "--vocabulary base" in told.value.remedy
    for base, other in ((large, small), (small, large)):
        made = public.merge(
            base, {"s": other.path}, tmp_path / base.path.name / "out", CONTEXT, vocabulary="base", scale=1.0
        )
        n = len(tokenizer)
        assert Tensors(made.path)[HEAD].shape == Tensors(base.path)[HEAD].shape
        torch.testing.assert_close(Tensors(made.path)[HEAD][:n], Tensors(other.path)[HEAD][:n], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(Tensors(made.path)[HEAD][n:], Tensors(base.path)[HEAD][n:], rtol=1e-5, atol=1e-6)


def test_a_specialist_that_fills_padding_needs_no_flag(tmp_path: Path) -> None:
    tokenizer = bpe(corpus(0))
    base = llama_of(tmp_path / "base", tokenizer, rows=len(tokenizer) + 8)
    tokenizer.add_tokens(["<tool>"])
    special = llama_of(tmp_path / "s", tokenizer, rows=len(tokenizer) + 7, seed=1)
    made = public.merge(base, {"s": special.path}, tmp_path / "out", CONTEXT, scale=1.0)
    assert "<tool>" not in vocabulary_of(made).ids
    made = public.merge(base, {"s": special.path}, tmp_path / "u", CONTEXT, scale=0.5, vocabulary="union")
    assert vocabulary_of(made).ids["<tool>"] == len(tokenizer) - 1
    assert torch.equal(row(made, "<tool>"), row(special, "<tool>"))
    assert "<tool>" in AutoTokenizer.from_pretrained(made.path).tokenize("baco<tool>di")


def test_unions_of_wordpiece_and_unigram(tmp_path: Path) -> None:
    first, second = wordpiece(corpus(0)), wordpiece(corpus(1))
    made = union(bert_of(tmp_path / "b", first), {"s": bert_of(tmp_path / "s", second)}, tmp_path / "bu", CONTEXT)
    assert set(vocabulary_of(made).ids) == set(first.get_vocab()) | set(second.get_vocab())
    word = next(w for w in corpus(1)[0].split() if w in second.get_vocab() and w not in first.get_vocab())
    assert AutoTokenizer.from_pretrained(made.path).tokenize(word) == [word] != first.tokenize(word)
    logits(made, TEXTS)
    tokenizer = unigram(corpus(0))
    tokenizer.add_tokens(["<x>"])
    other = unigram(corpus(1))
    base, more = llama_of(tmp_path / "u", tokenizer), llama_of(tmp_path / "v", other)
    made = union(base, {"s": more}, tmp_path / "uu", CONTEXT)
    assert set(vocabulary_of(made).ids) == set(tokenizer.get_vocab()) | set(other.get_vocab())
    assert all(vocabulary_of(made).ids[t] == i for t, i in tokenizer.get_vocab().items())
    new = [t for t in other.get_vocab() if t not in tokenizer.get_vocab() and len(t) > 4]
    assert any(AutoTokenizer.from_pretrained(made.path).tokenize(t.removeprefix("\u2581")) == [t] for t in new)


def recipe(folder: Path, base: Model, others: Sequence[Path], **more: Any) -> Model:
    listed = [{"model": str(f), "parameters": {"weight": 1.0}} for f in others]
    value = {"merge_method": "task_arithmetic", "base_model": str(base.path), "models": listed, **more}
    (folder / "merge.yml").write_text(yaml.safe_dump(value))
    return run_mergekit(folder / "merge.yml", folder / "out", CONTEXT)


def test_recipes_of_mergekit(family: Family, tmp_path: Path) -> None:
    a, b = family.folders["a"], family.folders["b"]
    of_a, of_b, shared = sorted(family.own["a"]), sorted(family.own["b"]), sorted(family.common)
    with pytest.raises(FitError, match="other-vocabulary"):
        recipe(tmp_path, family.base, [a, b])
    tokens = {
        of_a[0]: {"source": "zero"},  # a knows it: only the others' rows are zero
        of_a[1]: {"source": {"kind": "zero"}, "force": True},
        of_b[0]: {"source": {"kind": "model_token", "model": str(a), "token": of_a[2]}, "force": True},
        of_b[1]: {
            "source": {"kind": "model_token", "model": {"model": {"path": str(b)}}["model"], "token_id": 7},
            "force": True,
        },
        shared[0]: {"source": str(b)},
    }
    tokenizer = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 32}
    made = recipe(tmp_path, family.base, [a, b], tokenizer=tokenizer)
    assert set(vocabulary_of(made).ids) >= family.own["a"] | family.own["b"] | family.common
    assert made.config["vocab_size"] % 32 == 0
    expected = {
        of_a[0]: row(a, of_a[0]), of_a[1]: torch.zeros(SIZE), of_b[0]: row(a, of_a[2]),
        of_b[1]: Tensors(b).rows(EMBED, 7, 8)[0], shared[0]: row(a, shared[0]), of_a[3]: row(a, of_a[3]),
        "ba": row(a, "ba") + row(b, "ba") - row(family.base, "ba"),
    }  # fmt: skip
    for token, value in expected.items():
        torch.testing.assert_close(row(made, token), value, rtol=1e-5, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merge.yml", "out"]


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_the_vocabulary_of_a_path(method: str, family: Family, tmp_path: Path) -> None:
    a = family.folders["a"]
    for source in ("model:" + str(a), str(a)):
        folder = tmp_path / str(len(source))
        folder.mkdir()
        made = recipe(folder, family.base, [a], tokenizer_source=source, merge_method=method)
        assert vocabulary_of(made).same(vocabulary_of(open_model(a)))
        for name in (EMBED, HEAD):
            torch.testing.assert_close(Tensors(made.path)[name], Tensors(a)[name], rtol=1e-5, atol=1e-6)
    kept = recipe(tmp_path, family.base, [family.base.path, a], tokenizer_source="base", merge_method="linear")
    assert vocabulary_of(kept).same(vocabulary_of(family.base))
    torch.testing.assert_close(row(kept, "ba"), (row(a, "ba") + row(family.base, "ba")) / 2, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("tokenizer", "told"),
    [
        ({"tokenizer": {"sauce": "base"}}, "tokenizer.*got: sauce"),
        ({"tokenizer": {}, "tokenizer_source": "base"}, "one of"),
        ({"tokenizer": {"tokens": {"x": {"source": "zero", "force": "yes"}}}}, "tokens: x.*true or false"),
        ({"tokenizer": {"tokens": {"x": {"source": {"kind": "model_token", "model": "m"}}}}}, "token and token_id"),
        ({"tokenizer": {"pad_to_multiple_of": 0}}, "pad_to_multiple_of"),
        ({"tokenizer": {"tokens": {"nowhere": {"source": "zero"}}}}, "nowhere.*vocabulary-source"),
        ({"tokenizer": {"source": "base", "tokens": {"nowhere": {"source": "zero"}}}}, "nowhere.*vocabulary-source"),
        ({"tokenizer": {"source": "base", "tokens": {"ba": {"source": "BASE", "force": True}}}}, "model-not-found"),
    ],
)
def test_recipes_that_cannot_be_meant(tokenizer: dict[str, Any], told: str, family: Family, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=told):
        recipe(tmp_path, family.base, [family.folders["a"]], **tokenizer)
    assert [p.name for p in tmp_path.iterdir()] == ["merge.yml"]
    with pytest.raises(UsageError, match="vocabulary-source"):
        retokenize(
            open_model(family.folders["a"]), family.base, tmp_path / "out", CONTEXT,
            sources={"ba": Row(str(family.base.path), token="nowhere", force=True)},
        )  # fmt: skip


def test_rules_for_single_tokens(llama_base: Model, family: Family, tmp_path: Path) -> None:
    new = sorted(set(vocabulary_of(llama_base).ids) - set(vocabulary_of(family.base).ids))
    sources: dict[str, str | Row] = {
        new[0]: "zero", new[1]: "mean", new[2]: str(llama_base.path), "ba": "zero", "co": Row("zero", force=True),
        "fu": Row("omp", force=True),
    }  # fmt: skip
    made = retokenize(family.base, llama_base, tmp_path / "out", CONTEXT, sources=sources, missing="base")
    old = Tensors(family.base.path)[EMBED]
    expected = {
        new[0]: torch.zeros(SIZE), new[1]: old.mean(0), new[2]: row(llama_base, new[2]),
        new[3]: row(llama_base, new[3]), "ba": row(family.base, "ba"), "co": torch.zeros(SIZE),
    }  # fmt: skip
    for token, value in expected.items():
        torch.testing.assert_close(row(made, token), value)
    assert not torch.equal(row(made, "fu"), row(family.base, "fu"))
    assert made.manifest["parameters"]["rows"]["omp"] == 1


def test_from_the_command_line(family: Family, tmp_path: Path, fanbu: Command) -> None:  # noqa: F811
    given = [f"--specialist={n}={f}" for n, f in family.folders.items()]
    feed = ("feed", family.base.path, tmp_path / "out", *given, "--json")
    error = error_of(fanbu(*feed), 1, "other-vocabulary")
    assert "--vocabulary base" in str(error["remedy"])
    for vocabulary in ("base", "union"):
        code, told = fanbu(*feed, "--vocabulary", vocabulary, "--set", "scale=0.5")
        made = open_model(tmp_path / "out")
        assert (code, told["digest"]) == (0, made.digest)
        assert set(vocabulary_of(made).ids) >= (family.common if vocabulary == "union" else set())
        logits(made, TEXTS)
        shutil.rmtree(tmp_path / "out")
    error_of(fanbu(*feed, "--vocabulary", "all"), 2, "flag")
    error_of(fanbu(*feed, "--vocabulary", "union", "--dtype", "int8"), 2, "dtype")  # found while all lies beside it
    error_of(fanbu(*feed, "--vocabulary", "union", "--keep"), 2, "vocabulary-keep")
    assert list(tmp_path.iterdir()) == []


def test_hopeless_ones_are_refused(llama_base: Model, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def refused(code: str, *names: str, model: Model, target: Model = llama_base, **more: Any) -> None:
        with pytest.raises((FitError, IntegrityError)) as told:
            retokenize(model, target, out, CONTEXT, **more)
        assert told.value.code == code
        assert all(n in str(told.value) for n in names), told.value
        assert not out.exists()

    strange = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(["<eos>", "<pad>", *"反哺大小模型"])}, merges=[]))
    strange.pre_tokenizer = pre_tokenizers.ByteLevel(False)
    few = PreTrainedTokenizerFast(tokenizer_object=strange, eos_token="<eos>", pad_token="<pad>")
    refused("vocabulary-common", "at least 64", "got: 2", model=llama_of(tmp_path / "few", few))
    swapped = bpe(corpus(0))
    swapped.eos_token, swapped.pad_token = "<pad>", "<eos>"
    refused("vocabulary-roles", "<eos>", "pad_token", model=llama_of(tmp_path / "swapped", swapped))
    narrow = with_tokens(
        llama_of(tmp_path / "n", bpe(corpus(0)), width=16), tmp_path / "narrow", in_order(llama_base)[:380]
    )
    refused("vocabulary-width", "16", "32", model=narrow, missing="base")
    assert retokenize(narrow, llama_base, tmp_path / "fine", CONTEXT).config["hidden_size"] == 16

    def odd(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "odd.table": tensors[EMBED].clone()}

    refused(
        "vocabulary-tensors", "odd.table", model=with_tokens(llama_base, tmp_path / "odd", in_order(llama_base), odd)
    )
    slow = llama_of(tmp_path / "slow", bpe(corpus(0)))
    (slow.path / "tokenizer.json").rename(slow.path / "vocab.txt")
    (slow.path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ByT5Tokenizer"}))
    refused("vocabulary-unknown", "tokenizer.json", "ByT5", model=slow)
    many = bpe(corpus(0))
    many.add_tokens(["<more>"])
    model = llama_of(tmp_path / "many", many, rows=len(many) - 1)
    refused("tokenizer-mismatch", model=model)
    with pytest.raises(FitError, match=r"vocabulary-family") as told:
        union(llama_base, {"m": llama_of(tmp_path / "m", unigram(corpus(0)))}, out, CONTEXT)
    assert "Unigram" in str(told.value)
    for wrong in ({"missing": "guess"}, {"k": 0}):
        with pytest.raises(UsageError, match="bad-parameter"):
            retokenize(narrow, llama_base, out, CONTEXT, **wrong)
    with pytest.raises(UsageError, match=r"vocabulary-source"):
        union(narrow, {"b": llama_of(tmp_path / "b16", bpe(corpus(0)), width=16)}, out, CONTEXT, tokens={
            in_order(llama_base)[-1]: Row("omp")
        })  # fmt: skip
    assert not out.exists()


def test_half_precision_stays_bit_for_bit(llama_base: Model, tmp_path: Path) -> None:
    half = with_tokens(
        llama_base, tmp_path / "h", in_order(llama_base)[:350], lambda ts: {n: t.bfloat16() for n, t in ts.items()}
    )
    made = retokenize(half, llama_base, tmp_path / "out", CONTEXT)
    assert {s.torch_dtype for s in made.tensors.values()} == {torch.bfloat16}
    back = retokenize(made, half, tmp_path / "back", CONTEXT)
    assert all(torch.equal(t, Tensors(half.path)[n]) for n, t in Tensors(back.path).items())


def test_tensors_of_tokens_are_known_by_name(base: Model) -> None:
    known = token_tensors(base)
    assert set(known) == {n for n, s in base.tensors.items() if s.shape[0] == vocabulary_of(base).rows}


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer", "LlamaTokenizer"])
def test_unions_load_with_the_tokenizer_classes_of_real_models(kind: str, tmp_path: Path) -> None:
    """Their special tokens stand behind the vocabulary, and new tokens then behind these."""
    found = []
    for number in range(2):
        tokenizer = bpe(corpus(number), metaspace=kind == "LlamaTokenizer")
        tokenizer.add_tokens([f"<added {number}>", "<both>"], special_tokens=True)
        made = llama_of(tmp_path / str(number), tokenizer, rows=len(tokenizer) + 9, seed=number)
        settings = json.loads((made.path / "tokenizer_config.json").read_text())
        (made.path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": kind}))
        found.append(made)
    made = union(found[0], {"s": found[1]}, tmp_path / "u", CONTEXT)
    own, other, new = (vocabulary_of(m) for m in (*found, made))
    assert set(new.ids) == set(own.ids) | set(other.ids)
    assert all(new.ids[t] == i for t, i in own.ids.items())
    loaded = AutoTokenizer.from_pretrained(made.path)
    assert type(loaded).__name__ == kind
    assert loaded.tokenize("ba<added 1>co<both>")[1::2][:1] == ["<added 1>"]
    texts = corpus(0)[:20]
    split = [AutoTokenizer.from_pretrained(m.path).tokenize(t) for m in (found[0], made) for t in texts]
    assert sum(map(len, split[20:])) <= sum(map(len, split[:20]))
    theirs = [AutoTokenizer.from_pretrained(m.path).tokenize(t) for m in (found[1], made) for t in corpus(1)[:20]]
    assert any(t not in own.ids for ts in theirs[20:] for t in ts)
    logits(made, TEXTS)


def test_pieces_of_a_tokenizer_that_pads(tmp_path: Path, llama_base: Model) -> None:
    """Tokenizers of sentence encoders fill up to 128 tokens and cut there: the padding is no piece."""
    word = bert_of(tmp_path / "w", wordpiece(corpus(0)))
    expected = pieces_of(vocabulary_of(word), vocabulary_of(llama_base), ["dikuba"])
    tokenizer = Tokenizer.from_file(str(word.path / "tokenizer.json"))
    tokenizer.enable_padding(length=16, pad_token="[PAD]")
    tokenizer.enable_truncation(1)
    tokenizer.save(str(word.path / "tokenizer.json"))
    assert vocabulary_of(word).spec["padding"]
    assert pieces_of(vocabulary_of(word), vocabulary_of(llama_base), ["dikuba"]) == expected != []


def test_a_specialist_with_a_pruned_vocabulary(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    """What `shrink: vocabulary` made, merged again: nothing was trained, so the body comes back as it was."""
    small = method("vocabulary").shrink(incumbent, domains["food"], tmp_path / "small", context, max_tokens=120)
    assert vocabulary_of(small).rows < vocabulary_of(incumbent).rows
    with pytest.raises(FitError, match="other-vocabulary"):
        public.merge(incumbent, {"food": small.path}, tmp_path / "out")
    made = public.merge(incumbent, {"food": small.path}, tmp_path / "out", vocabulary="base", scale=1.0)
    for name, tensor in Tensors(incumbent.path).items():
        torch.testing.assert_close(Tensors(made.path)[name], tensor, rtol=1e-6, atol=1e-6)
    assert made.labels == incumbent.labels
    assert vocabulary_of(made).same(vocabulary_of(incumbent))


BOUNDED = """
import resource, sys
from pathlib import Path
import torch
from fanbu.merging.vocabulary import retokenize, vocabulary_of
from fanbu.model import open_model
from fanbu.types import Context
model, target, out = map(Path, sys.argv[1:])
kept = [vocabulary_of(open_model(f)) for f in (model, target)]
used = int([l for l in open('/proc/self/status') if l.startswith('VmData')][0].split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 110 * 2**20,) * 2)
retokenize(open_model(model), open_model(target), out, Context(threads=1), k=2)
"""


@pytest.mark.slow
def test_embeddings_are_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    """A model of 164 MB gets 100 new tokens by OMP, in a process that may have 110 MB more than it had before."""
    for name, first in (("model", 0), ("target", 100)):
        tokenizer = Tokenizer(models.WordLevel({f"w{i + first}": i for i in range(8_000)}, unk_token="w500"))
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w500")
        fast.save_pretrained(tmp_path / name)
        LlamaConfig(
            vocab_size=8_000, hidden_size=5120, num_hidden_layers=1, architectures=["LlamaForCausalLM"],
            tie_word_embeddings=True,
        ).save_pretrained(tmp_path / name)  # fmt: skip
        rows = torch.randn(8_000, 5120, generator=torch.Generator().manual_seed(first))
        save_file({EMBED: rows}, tmp_path / name / "model.safetensors")
    command = [sys.executable, "-c", BOUNDED, *(str(tmp_path / n) for n in ("model", "target", "out"))]
    # large blocks go back at once: what is measured is what is held, not what malloc keeps for later
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert open_model(tmp_path / "out").manifest["parameters"]["rows"] == {"omp": 100, "own": 7_900}
    assert torch.equal(row(tmp_path / "out", "w300"), row(tmp_path / "model", "w300"))
