"""Ways down on networks with peculiarities: layers that differ by place, tied heads, Conv1D, tokens in capitals."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from conftest import all_texts, wordpiece, write_domain
from fanbu.catalogue import method
from fanbu.deploy.runner import answers_of, open_runner
from fanbu.deploy.to_onnx import in_factors, in_linear
from fanbu.domain import Domain, load_domain
from fanbu.errors import FitError, UsageError
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.predict import limit
from fanbu.shrink._space import Space
from fanbu.shrink.depth import keep_layers, layers_of
from fanbu.types import Context

TINY: dict[str, Any] = {"max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
USUAL: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
GROUPED = {"num_key_value_heads": 2}
BY_PLACE: dict[str, tuple[str, dict[str, Any]]] = {
    "ModernBert": ("ForMaskedLM", {**USUAL, "cls_token_id": 0, "sep_token_id": 0}),
    "SmolLM3": ("ForCausalLM", {**USUAL, **GROUPED}),
    "GPTNeo": ("ForCausalLM", {
        "hidden_size": 32, "num_layers": 6, "num_heads": 4, "attention_types": [[["global", "local"], 3]],
        "window_size": 4,
    }),
    "Qwen3Moe": ("ForCausalLM", {
        **USUAL, **GROUPED, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
        "mlp_only_layers": [0, 1, 4],
    }),
    "Gemma2": ("ForCausalLM", {**USUAL, **GROUPED, "head_dim": 8, "sliding_window": 4}),
}  # fmt: skip


def saved(network: Any, tokenizer: Any, out: Path, context: Context) -> Model:
    return save_network(network, tokenizer, out, provenance("made", [], context))


def network_of(kind: str, tokens: int, **settings: Any) -> Any:
    torch.manual_seed(0)
    head, sizes = BY_PLACE[kind]
    network = getattr(transformers, kind + head)(
        getattr(transformers, kind + "Config")(vocab_size=tokens, **TINY, **sizes, **settings)
    )
    with torch.no_grad():  # so large that a layer of another kind shows
        for parameter in network.parameters():
            parameter.uniform_(0.2, 2) if parameter.ndim == 1 else parameter.mul_(8)
    return network.eval()


@pytest.mark.parametrize("importance", ["influence", "contiguous", "even"])
@pytest.mark.parametrize("kind", sorted(set(BY_PLACE) - {"ModernBert"}))
def test_layers_that_differ_by_place(
    kind: str, importance: str, llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(open_model(llama))
    model = saved(network_of(kind, len(tokenizer)), tokenizer, tmp_path / "m", context)
    made = method("depth").shrink(
        model, texts["food"], tmp_path / "small", context, layers=3, importance=importance, train=None
    )
    network = load_network(model)
    keep_layers(network, layers_of(network), made.manifest["parameters"]["kept"])
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        known, got = network(input_ids=ids)[0], load_network(made)(input_ids=ids)[0]
    torch.testing.assert_close(got, known, rtol=1e-4, atol=1e-4 * float(known.abs().max()))


@pytest.mark.parametrize("importance", ["influence", "contiguous", "even", "loss"])
def test_a_first_layer_without_a_norm_stays(
    importance: str, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    tokenizer, domain = wordpiece(all_texts()), domains["food"]
    torch.manual_seed(0)
    labels = dict(enumerate(domain.full_labels))
    sizes = {**USUAL, "cls_token_id": 2, "sep_token_id": 3, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    config = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), id2label=labels, label2id={v: k for k, v in labels.items()}, **sizes
    )
    network = transformers.ModernBertForSequenceClassification(config)
    model = saved(network, tokenizer, tmp_path / "m", context)
    made = method("depth").shrink(model, domain, tmp_path / "s", context, layers=3, importance=importance, train=None)
    kept = made.manifest["parameters"]["kept"]
    assert (kept[0], kept[-1], len(kept)) == (0, 5, 3)
    assert Space(model, domain, context).least == 2  # so that no search takes fewer
    with pytest.raises(FitError) as caught:
        method("depth").shrink(model, domain, tmp_path / "one", context, layers=1, train=None)
    assert caught.value.code == "no-layers"
    assert not (tmp_path / "one").exists()


def gpt2(tokens: int, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=tokens, pad_token_id=0, **sizes, **settings))


def test_what_a_config_cannot_say_is_refused(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(open_model(llama))
    network = gpt2(len(tokenizer), scale_attn_by_inverse_layer_idx=True)
    with torch.no_grad():
        for layer in network.transformer.h:
            layer.attn.c_attn.weight.mul_(40)
    model = saved(network, tokenizer, tmp_path / "m", context)
    with pytest.raises(FitError) as caught:
        method("depth").shrink(model, texts["food"], tmp_path / "s", context, layers=2, importance="even", train=None)
    assert caught.value.code == "no-layers"


def test_conv1d_is_factored_and_quantized_too(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(open_model(llama))
    model = saved(gpt2(len(tokenizer)), tokenizer, tmp_path / "m", context)
    low = method("lowrank").shrink(model, texts["food"], tmp_path / "low", context, train=None)
    ids = torch.arange(5, 25)[None]
    whole, factored = load_network(low), in_factors(load_network(low), low)
    with torch.no_grad():
        torch.testing.assert_close(factored(ids).logits, whole(ids).logits, rtol=1e-3, atol=1e-4)
    numbers = [sum(p.numel() for p in n.parameters()) for n in (factored, whole)]
    assert numbers[0] < numbers[1]
    plain = in_linear(load_network(model))
    assert sum(isinstance(m, torch.nn.Linear) for m in plain.modules()) == 4 * 4 + 1
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, load_network(model)(ids).logits)
    runner = open_runner(model.path, context, "int8")
    assert answers_of(runner, [texts["food"].test.texts[0]], tokens=3)[0]["continuation"]
    with pytest.raises(UsageError) as caught:
        answers_of(runner, [" ".join(texts["food"].test.texts)], tokens=3)
    assert caught.value.code == "prompt-too-long"


def test_a_tied_head_is_stored_once_in_whole_numbers(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model = open_model(llama)
    small = method("quantize").shrink(model, texts["food"], tmp_path / "q", context, bits=8)
    assert "lm_head.weight" not in small.tensors
    assert small.bytes < 0.6 * model.bytes
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        far = load_network(small)(ids).logits - load_network(model)(ids).logits
    assert float(far.abs().max()) < 0.05


def test_heads_alone_divide_the_hidden_size_of_llama(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    tokenizer, kept = load_tokenizer(open_model(llama)), []
    sizes = {**USUAL, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
    for kind in ("Llama", "Mistral"):
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **{**TINY, **sizes})
        model = saved(
            getattr(transformers, f"{kind}ForCausalLM")(config), tokenizer, tmp_path / kind, context
        )  # fmt: skip
        for share in (0.3, 0.4, 0.9):
            out = tmp_path / f"{kind}-{share}"
            method("width").shrink(model, texts["food"], out, context, heads=share, neurons=0.5, train=None)
            kept.append(load_network(open_model(out)).config.num_attention_heads)
    assert kept == [2, 4, 8, 2, 3, 7]


@pytest.mark.parametrize("rows", [45, 48])
def test_taylor_of_embeddings_of_distances(rows: int, context: Context, tmp_path: Path) -> None:
    """45 rows leave a batch of another size; the embeddings of distances are no texts."""
    domain = load_domain("food", **write_domain(tmp_path, "food", train=rows))
    tokenizer = wordpiece(all_texts())
    torch.manual_seed(0)
    network = transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, relative_attention=True, position_buckets=16, pos_att_type=["p2c", "c2p"],
            share_att_key=True, pooler_hidden_size=32, id2label=dict(enumerate(domain.full_labels)),
            label2id={label: i for i, label in enumerate(domain.full_labels)},
        )
    )  # fmt: skip
    model = saved(network, tokenizer, tmp_path / "m", context)
    made = method("width").shrink(
        model, domain, tmp_path / "w", context, channels=0.5, importance="taylor", train=None
    )  # fmt: skip
    assert load_network(made).config.hidden_size == 16


def cased(lowercase: bool) -> PreTrainedTokenizerFast:
    letters = [*string.ascii_letters, *"лёкае"]
    words = sorted({w for t in all_texts() for w in t.split()})
    pieces = ["[PAD]", "[UNK]", *letters, *("##" + c for c in letters), "Visa", "Zurich", *words]
    tokenizer = Tokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")


def test_capitals_and_what_the_normaliser_writes_stay(context: Context, tmp_path: Path) -> None:
    rows = write_domain(tmp_path, "food")
    Path(rows["train"]).write_text(Path(rows["train"]).read_text().replace("please", "\u0401\u041b\u041a\u0410"))
    domain = load_domain("food", **rows)
    for lowercase, unseen in ((False, ["Visa", "Zurich", "Zq"]), (True, ["\u041b\u0401\u041a\u0410"])):
        tokenizer, labels = cased(lowercase), dict(enumerate(domain.full_labels))
        config = transformers.BertConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
            max_position_embeddings=64, id2label=labels, label2id={v: k for k, v in labels.items()},
        )  # fmt: skip
        folder = tmp_path / str(lowercase)
        model = saved(transformers.BertForSequenceClassification(config), tokenizer, folder / "m", context)
        small = load_tokenizer(method("vocabulary").shrink(model, domain, folder / "v", context))
        for word in unseen:
            assert "[UNK]" not in small.tokenize(word)


def test_settings_outside_the_tokenizer_stay(
    llama: Path, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    """A padding id that only the config has, and a template of chats."""
    tokenizer, domain = load_tokenizer(open_model(llama)), domains["food"]
    tokenizer.pad_token, tokenizer.chat_template = None, "{% for m in messages %}{{ m.content }}{% endfor %}"
    torch.manual_seed(0)
    labels = dict(enumerate(domain.full_labels))
    sizes = {**TINY, **USUAL, **GROUPED, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), id2label=labels, label2id={v: k for k, v in labels.items()}, **sizes
    )
    model = saved(transformers.LlamaForSequenceClassification(config), tokenizer, tmp_path / "m", context)
    small = method("vocabulary").shrink(model, domain, tmp_path / "v", context)
    assert load_tokenizer(small).chat_template == tokenizer.chat_template
    assert small.config["pad_token_id"] is not None


def test_students_that_write_have_no_true_labels(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model = open_model(llama)
    with pytest.raises(UsageError, match="what the student writes"):
        method("distill", "shrink").shrink(
            model, texts["food"], tmp_path / "m", context, teacher=str(llama), labels=0.5, extra={"on_policy": 0.5}
        )


def test_positions_that_are_never_used_are_not_counted() -> None:
    sizes = {"vocab_size": 50, **USUAL, "num_hidden_layers": 1, "max_position_embeddings": 20, "pad_token_id": 1}
    for kind, most in (("Camembert", 18), ("Roberta", 18), ("Bert", 20)):
        network = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes))
        assert limit(network, Context(max_length=64)) == most
        network(torch.full((1, most), 5))
