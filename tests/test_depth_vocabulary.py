"""Which layers and tokens go: those that do nothing, runs, tokens that no text needs; the rest reads as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from conftest import make_bert
from fanbu.catalogue import method
from fanbu.data.augment import augmented
from fanbu.domain import Domain, load_domain
from fanbu.errors import FanbuError
from fanbu.heads import open_classifier
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.predict import class_logits
from fanbu.shrink.depth import influence, layers_of
from fanbu.types import Context, Train

DEPTH, VOCABULARY, DISTILL = method("depth"), method("vocabulary"), method("distill", "shrink")


@pytest.fixture(scope="module")
def deep(domains: dict[str, Domain], context: Context, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Six layers and the one that takes the mean, fine-tuned; layers 2 and 3 do next to nothing."""
    folder = tmp_path_factory.mktemp("deep")
    base = open_model(make_bert(folder / "bert", layers=6))
    network = open_classifier(base, context)
    with torch.no_grad():
        for number in (2, 3):
            layer = network.bert.encoder.layer[number]
            layer.attention.output.dense.weight.mul_(1e-4)
            layer.output.dense.weight.mul_(1e-4)
    opened = save_network(network, load_tokenizer(base), folder / "opened", provenance("open", [base], context))
    train = Train(epochs=2, lr=1e-4, head_lr=1e-2, batch_size=8)
    return method("finetune").shrink(opened, domains["food"], folder / "tuned", context, train=train)


@pytest.mark.parametrize("importance", ["influence", "contiguous", "loss"])
def test_layers_that_do_nothing_go_first(
    importance: str, deep: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    made = DEPTH.shrink(deep, domains["food"], tmp_path / "m", context, layers=5, importance=importance, train=None)
    kept = made.manifest["parameters"]["kept"]
    assert len(kept) == 5
    assert kept[-1] == 6
    if importance != "loss":  # the loss of so small a model may rather lose another
        assert kept == [0, 1, 4, 5, 6]
    texts = domains["food"].test.texts
    before, after = (class_logits(load_network(m), load_tokenizer(m), texts, context) for m in (deep, made))
    assert (after - before).norm() < 0.5 * before.norm()


def test_without_loss_means_the_least_loss_of_all_single_drops(
    deep: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    domain = domains["food"]
    target = torch.tensor(domain.train.labels)

    def loss(kept: list[int]) -> float:
        network = load_network(deep)
        from fanbu.shrink.depth import keep_layers

        keep_layers(network, layers_of(network), kept)
        z = class_logits(network, load_tokenizer(deep), domain.train.texts, context)
        return float(torch.nn.functional.cross_entropy(z, target))

    losses = {i: loss([j for j in range(7) if j != i]) for i in range(6)}
    made = DEPTH.shrink(deep, domain, tmp_path / "m", context, layers=6, importance="loss", train=None)
    (gone,) = set(range(7)) - set(made.manifest["parameters"]["kept"])
    assert losses[gone] == pytest.approx(min(losses.values()), abs=1e-5)


def test_the_influence_of_a_run_is_that_of_its_ends(deep: Model, domains: dict[str, Domain], context: Context) -> None:
    network, tokenizer = load_network(deep), load_tokenizer(deep)
    texts = domains["food"].train.texts[:8]
    runs = influence(network, tokenizer, texts, layers_of(network), context, 2)
    assert len(runs) == 6
    hidden = []
    for text in texts:
        with torch.no_grad():
            hidden.append(network(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states)
    for start in (0, 2, 5):
        pairs = [torch.cosine_similarity(h[start], h[start + 2], dim=-1)[0] for h in hidden]
        assert runs[start] == pytest.approx(float(1 - torch.cat(pairs).mean()), abs=2e-3)


def byte_level(texts: list[str]) -> Any:
    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokens.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>")


def unigram(texts: list[str]) -> Any:
    tokens = Tokenizer(models.Unigram())
    tokens.normalizer, tokens.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
    tokens.decoder = decoders.Metaspace()
    special = ["<pad>", "<eos>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=special, unk_token="<unk>", show_progress=False)
    tokens.train_from_iterator(texts, trainer)
    tokens.post_processor = processors.TemplateProcessing(single="$A <eos>", special_tokens=[("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")


@pytest.mark.parametrize("kind", [byte_level, unigram])
@pytest.mark.parametrize("tied", [False, True])
def test_texts_read_as_before_and_others_lose_nothing(kind: Any, tied: bool, context: Context, tmp_path: Path) -> None:
    limits = {"train": 60, "valid": 12, "test": 12}
    domain = load_domain("system", python="system", test=0.2, task="causal-lm", limit=limits)
    other = load_domain("numbers", python="numbers", test=0.2, task="causal-lm", limit=limits)
    torch.manual_seed(0)
    tokenizer = kind([*domain.train.texts[:20], *other.train.texts])
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 6, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=1, bos_token_id=None, pad_token_id=0, tie_word_embeddings=tied,
    )  # fmt: skip
    model = save_network(LlamaForCausalLM(config), tokenizer, tmp_path / "m", provenance("new", [], context))
    small = VOCABULARY.shrink(model, domain, tmp_path / "s", context, max_tokens=len(tokenizer))
    old, new, whole, cut = load_tokenizer(model), load_tokenizer(small), load_network(model), load_network(small)
    assert small.config["vocab_size"] == len(new) < len(old)
    assert new.convert_ids_to_tokens([small.config["eos_token_id"]]) == ["<eos>"]
    rows = old.convert_tokens_to_ids(new.convert_ids_to_tokens(range(len(new))))
    for text in [*domain.train.texts, *domain.valid.texts]:
        a, b = (t(text)["input_ids"] for t in (old, new))
        assert old.convert_ids_to_tokens(a) == new.convert_ids_to_tokens(b)
    with torch.no_grad():
        logits = [n(input_ids=torch.tensor([ids[:64]])).logits[0] for n, ids in ((whole, a), (cut, b))]
    torch.testing.assert_close(logits[1], logits[0][:, rows])
    strange = "naïve 汉字 🙂 \t" + other.test.texts[0]
    assert new.decode(new(strange)["input_ids"]) == old.decode(old(strange)["input_ids"])
    fewer = VOCABULARY.shrink(model, domain, tmp_path / "f", context, max_tokens=len(new) - 40)
    assert fewer.config["vocab_size"] <= len(new) - 40
    text = domain.train.texts[0]
    again = load_tokenizer(fewer)
    assert again.decode(again(text)["input_ids"]) == old.decode(old(text)["input_ids"])
    with pytest.raises(FanbuError, match="max-tokens"):
        VOCABULARY.shrink(model, domain, tmp_path / "n", context, max_tokens=20)


def test_variants_are_made_of_the_domains_words() -> None:
    texts = [f"w{i} w{i + 1} w{i + 2} w{i + 3} w{i + 4} w{i + 5}" for i in range(30)]
    made = augmented(texts, 3, 7)
    assert made == augmented(texts, 3, 7) != augmented(texts, 3, 8)
    assert len(made) == 90
    words = set(" ".join(texts).split())
    assert all(set(t.split()) <= words for t in made)
    dropped, exchanged, joined = made[:30], made[30:60], made[60:]
    assert all(set(d.split()) <= set(t.split()) for d, t in zip(dropped, texts, strict=True))
    assert sum(len(d.split()) for d in dropped) < 0.95 * 180
    assert all(len(e.split()) == 6 for e in exchanged)
    assert exchanged != texts
    assert all(j.split()[:3] == t.split()[:3] for j, t in zip(joined, texts, strict=True))
    assert [t for t in augmented(["汉字没有空格"], 1, 0) if " " in t] == []
    assert all(t and set(t) <= set("one") for t in augmented(["one"], 4, 0))
    assert augmented([], 3, 0) == []


def test_answers_are_kept_and_told_apart(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from fanbu.shrink import distill

    model, asked = specialists["food"].model, []
    real = distill._answers
    monkeypatch.setattr(distill, "_answers", lambda *a: (asked.append(1), real(*a))[1])
    known: dict[str, Any] = {"teacher": str(model.path), "train": Train(epochs=1)}
    made = [
        DISTILL.shrink(
            model,
            domains["food"],
            tmp_path / str(n),
            context,
            extra={"augment": augment, "cache": str(tmp_path / "answers")},
            **known,
        )
        for n, augment in enumerate((0, 0, 1))
    ]
    assert len(asked) == 2
    assert made[0].digest == made[1].digest != made[2].digest
    assert len(list((tmp_path / "answers").glob("*.safetensors"))) == 2
