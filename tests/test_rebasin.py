"""Other initialisations and widths: orders are undone exactly, functions stay, and what is hopeless is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import TOPICS, all_texts, rows
from fanbu.errors import FitError, UsageError
from fanbu.merging.matching import TwoNetworks, above_chance, match
from fanbu.merging.permute import Order, Symmetry, moves, symmetries
from fanbu.merging.rebasin import _write, rebasin
from fanbu.merging.zip import group_units, zip_models
from fanbu.model import Model, load_tokenizer, open_model, provenance
from fanbu.tensors import Tensors
from fanbu.types import Context
from test_cli import Command, error_of
from test_cli import fanbu as fanbu

CONTEXT = Context(threads=1, max_length=16)
SIZES = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 40, "vocab_size": 60,
    "max_position_embeddings": 32,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 3, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
RELATIVE = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "num_attention_heads": 4}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
IMAGES = {**{k: v for k, v in SIZES.items() if k[0] in "hni"}, "image_size": 16, "patch_size": 8}
SEEN = {"vit": (3, 3, 16, 16), "deit": (3, 3, 16, 16), "wav2vec2": (3, 800), "whisper": (3, 8, 40)}  # no tokens
LLAMAS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2"]
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    **{n: (f"{n}Config", f"{n}ForCausalLM", GROUPED) for n in LLAMAS},
    "LlamaBiased": ("LlamaConfig", "LlamaForCausalLM", {**GROUPED, "attention_bias": True, "mlp_bias": True}),
    "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", GROUPED),
    "GPT2": (
        "GPT2Config", "GPT2LMHeadModel",
        {"n_embd": 24, "n_layer": 2, "n_head": 6, "vocab_size": 60, "n_positions": 32, "bos_token_id": 0,
         "eos_token_id": 0},
    ),
    "Bert": ("BertConfig", "BertForSequenceClassification", SIZES),
    "BertBody": ("BertConfig", "BertModel", SIZES),
    "BertTokens": ("BertConfig", "BertForTokenClassification", SIZES),
    "BertMasked": ("BertConfig", "BertForMaskedLM", SIZES),
    "Roberta": ("RobertaConfig", "RobertaForSequenceClassification", SIZES),
    "RobertaMasked": ("RobertaConfig", "RobertaForMaskedLM", SIZES),
    "Electra": ("ElectraConfig", "ElectraForSequenceClassification", {**SIZES, "embedding_size": 24}),
    "DistilBert": (
        "DistilBertConfig", "DistilBertForSequenceClassification",
        {"dim": 24, "n_layers": 2, "n_heads": 6, "hidden_dim": 40, "vocab_size": 60},
    ),
    "DebertaV2": (
        "DebertaV2Config", "DebertaV2ForSequenceClassification",
        {**RELATIVE, "share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
    ),
    "DebertaV2Conv": ("DebertaV2Config", "DebertaV2ForSequenceClassification", {**RELATIVE, "conv_kernel_size": 3}),
    "Deberta": ("DebertaConfig", "DebertaForSequenceClassification", RELATIVE),
    "ModernBert": ("ModernBertConfig", "ModernBertForSequenceClassification", {**SIZES, **SPECIAL}),
    "ModernBertMasked": ("ModernBertConfig", "ModernBertForMaskedLM", {**SIZES, **SPECIAL, "mlp_bias": True}),
    "GPTNeoX": ("GPTNeoXConfig", "GPTNeoXForCausalLM", SIZES),
    "DeiT": ("DeiTConfig", "DeiTForImageClassification", IMAGES),
    "Wav2Vec2": (
        "Wav2Vec2Config", "Wav2Vec2ForSequenceClassification",
        {**{k: v for k, v in SIZES.items() if k[0] in "hni"}, "conv_dim": (8, 8), "conv_stride": (5, 2),
         "conv_kernel": (10, 3), "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
         "num_feat_extract_layers": 2},
    ),
    "Whisper": (
        "WhisperConfig", "WhisperForAudioClassification",
        {"d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 6, "encoder_ffn_dim": 40, "num_mel_bins": 8,
         "max_source_positions": 20},
    ),
    # as the library stores it, and by its modules' own names
    **dict.fromkeys(["ViT", "ViTRaw"], ("ViTConfig", "ViTForImageClassification", IMAGES)),
}  # fmt: skip


def make(folder: Path, family: str, seed: int = 0, tokenizer: Path | None = None, **changes: Any) -> Model:
    """A network all of whose numbers are random: fresh biases are zero and fresh norms one, which would hide much."""
    config, kind, sizes = FAMILIES[family]
    torch.manual_seed(seed)
    network = getattr(transformers, kind)(getattr(transformers, config)(**{**sizes, **changes}))
    with torch.no_grad():
        for name, value in network.named_parameters():
            value.normal_(1.0 if value.ndim == 1 and "weight" in name else 0.0, 0.3)
    network.save_pretrained(folder)
    if family.endswith("Raw"):
        save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    if tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(tokenizer / name, folder / name)
    return open_model(folder)


def random_order(found: tuple[Symmetry, ...], seed: int) -> dict[str, Tensor]:
    """Any order that is allowed; of grouped heads, blocks and what is in them."""
    g = torch.Generator().manual_seed(seed)
    order = {}
    for s in found:
        blocks = torch.randperm(s.units // s.group, generator=g).tolist()
        order[s.name] = torch.cat([b * s.group + torch.randperm(s.group, generator=g) for b in blocks])
    return order


def reordered(model: Model, out: Path, seed: int = 1, *, residual: bool = False, order: Order | None = None) -> Model:
    """The same function in another order of units."""
    found = symmetries(model, residual=residual)
    moved = moves(model.tensors, found, order or random_order(found, seed))
    return _write(model, out, moved, provenance("reordered", [model], CONTEXT), CONTEXT)


def answers(model: Model) -> Tensor:
    """What plain transformers computes with a checkpoint."""
    network = getattr(transformers, model.config["architectures"][0]).from_pretrained(model.path).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.inference_mode():
        if model.config["model_type"] in SEEN:
            result = network(torch.randn(*SEEN[model.config["model_type"]], generator=generator))
        else:
            result = network(torch.randint(3, 60, (3, 12), generator=generator))
    value: Tensor = result[0]
    return value


def edited(model: Model, out: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Model:
    """A copy with other tensors or settings."""
    shutil.copytree(model.path, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "config.json").write_text(json.dumps({**model.config, **config}))
    (out / "fanbu.json").unlink(missing_ok=True)
    return open_model(out)


def weights(model: Model) -> dict[str, str]:
    return {n: h for n, h in model.files.items() if n.endswith(".safetensors")}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_random_order_is_undone_exactly(family: str, residual: bool, tmp_path: Path) -> None:
    base = make(tmp_path / "base", family)
    if residual and family == "Wav2Vec2":
        with pytest.raises(FitError, match="pos_conv_embed"):
            symmetries(base, residual=True)
        return
    mixed = reordered(base, tmp_path / "mixed", residual=residual)
    assert weights(mixed) != weights(base)
    bare = residual and family == "BertBody"  # its outputs are its hidden channels, and come in their order
    old_answers, new_answers = (answers(m).sort(-1).values if bare else answers(m) for m in (base, mixed))
    torch.testing.assert_close(new_answers, old_answers, rtol=1e-4, atol=1e-4)
    made = rebasin(mixed, base, tmp_path / "out", CONTEXT, residual=residual, strict=True)
    told = made.manifest["metrics"]
    assert told["distance_before"] > 0.1
    assert told["distance_after"] == 0.0
    assert told["correlation"] == pytest.approx(1.0)
    assert len(told["warnings"]) == bare
    old, new = Tensors(base.path), Tensors(made.path)
    assert all(torch.equal(old[n], new[n]) for n in old)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Qwen3", "GPT2", "Bert", "ViT", "DebertaV2", "DistilBert"])
def test_every_symmetry_matters(family: str, tmp_path: Path) -> None:
    """Moving all but one of a symmetry's tensors changes the function: none is listed for nothing, none is missing."""
    base = make(tmp_path / "base", family)
    for s in symmetries(base):
        if s.layer != 0:
            continue
        for axis in s.axes:
            short = replace(s, axes=tuple(a for a in s.axes if a != axis))
            moved = moves(base.tensors, [short], random_order((s,), 3))
            wrong = _write(base, tmp_path / "wrong", moved, provenance("x", [base], CONTEXT), CONTEXT)
            # softmax takes no notice of what is added to all keys alike
            if axis.tensor.endswith(("key.bias", "key_proj.bias", "k_proj.bias", "k_lin.bias")):
                continue
            if axis.tensor.endswith("c_attn.bias") and axis.first == 24:
                continue
            assert (answers(wrong) - answers(base)).abs().max() > 1e-3, axis


@pytest.fixture(scope="module")
def bert_base(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    size = json.loads((bert / "config.json").read_text())["vocab_size"]
    return make(tmp_path_factory.mktemp("b") / "base", "Bert", tokenizer=bert, vocab_size=size, pad_token_id=0)


@pytest.fixture(scope="module")
def llama_base(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    size = json.loads((llama / "config.json").read_text())["vocab_size"]
    return make(tmp_path_factory.mktemp("l") / "base", "Llama", tokenizer=llama, vocab_size=size)


@pytest.fixture(params=["bert_base", "llama_base"])
def base(request: pytest.FixtureRequest) -> Model:
    model: Model = request.getfixturevalue(request.param)
    return model


def tuned(model: Model, out: Path, seed: int = 7, size: float = 0.03) -> Model:
    """What fine-tuning leaves: every number a little different."""
    g = torch.Generator().manual_seed(seed)
    return edited(model, out, lambda t: [v.add_(size * torch.randn(v.shape, generator=g)) for v in t.values()])


@pytest.mark.parametrize("by", ["weights", "activations"])
def test_a_fine_tuned_copy_comes_back_as_it_was(by: Any, base: Model, tmp_path: Path) -> None:
    fine = tuned(base, tmp_path / "fine")
    mixed = reordered(fine, tmp_path / "mixed")
    made = rebasin(mixed, base, tmp_path / "out", CONTEXT, by=by, texts=all_texts())
    old, new = Tensors(fine.path), Tensors(made.path)
    assert all(torch.equal(old[n], new[n]) for n in old)
    told = made.manifest["metrics"]
    assert 0 < told["distance_after"] < 0.3 * told["distance_before"]
    assert 0.8 < told["correlation"] < 1
    assert told["chance"] < 0.6
    assert made.manifest["method"] == "rebasin"
    assert made.manifest["parents"] == [mixed.digest, base.digest]
    assert bool(made.manifest["data"]) == (by == "activations")


def test_hidden_channels_of_a_fine_tuned_copy(base: Model, tmp_path: Path) -> None:
    fine = tuned(base, tmp_path / "fine")
    made = rebasin(
        reordered(fine, tmp_path / "mixed", residual=True), base, tmp_path / "out", CONTEXT, residual=True
    )  # fmt: skip
    assert weights(made) == weights(rebasin(fine, base, tmp_path / "same", CONTEXT, residual=True))
    without = rebasin(reordered(fine, tmp_path / "m2", residual=True), base, tmp_path / "o2", CONTEXT)
    assert without.manifest["metrics"]["distance_after"] > 3 * made.manifest["metrics"]["distance_after"]


def averaged(a: Model, b: Model, out: Path) -> Model:
    other = Tensors(b.path)
    return edited(a, out, lambda t: [v.copy_((v + other[n]) / 2) for n, v in t.items()])


def test_averages_work_after_alignment_and_not_before(base: Model, tmp_path: Path) -> None:
    one = reordered(tuned(base, tmp_path / "t1", 1, 0.01), tmp_path / "one", 1)
    two = reordered(tuned(base, tmp_path / "t2", 2, 0.01), tmp_path / "two", 2)
    straight = averaged(one, two, tmp_path / "straight")
    aligned = averaged(one, rebasin(two, one, tmp_path / "two2", CONTEXT), tmp_path / "aligned")
    true = answers(base)
    spread = true.std()
    good, bad = ((answers(m) - true).abs().mean() / spread for m in (aligned, straight))
    assert good < 0.15
    assert bad > 4 * good


def trained(folder: Path, tokenizer: Path, seed: int) -> tuple[Model, Callable[[Model], float]]:
    """A classifier trained from an initialisation of its own, and the loss on other rows of the same task."""
    reader = transformers.AutoTokenizer.from_pretrained(tokenizer)
    labels = sorted({f"{n}/{label}" for n in TOPICS for label in TOPICS[n]})

    def data(part: int, count: int) -> tuple[Any, Tensor]:
        found = [(r["text"], labels.index(f"{n}/{r['label']}")) for n in TOPICS for r in rows(n, count, part)]
        inputs = reader([t for t, _ in found], padding=True, truncation=True, max_length=16, return_tensors="pt")
        return inputs, torch.tensor([y for _, y in found])

    torch.manual_seed(seed)
    config = {**SIZES, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": len(reader), "pad_token_id": 0}
    network = transformers.BertForSequenceClassification(transformers.BertConfig(**config, num_labels=len(labels)))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    inputs, target = data(0, 200)
    for _ in range(6):
        for i in torch.randperm(len(target)).split(32):
            network(**{k: v[i] for k, v in inputs.items()}, labels=target[i]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    network.save_pretrained(folder)
    inputs, target = data(3, 60)

    def loss(model: Model) -> float:
        loaded = transformers.BertForSequenceClassification.from_pretrained(model.path).eval()
        with torch.inference_mode():
            return float(loaded(**inputs, labels=target).loss)

    return open_model(folder), loss


def test_two_that_were_trained_apart(bert: Path, tmp_path: Path) -> None:
    """Nearer and above chance with the channels reordered; without, the manifest says that it did not help.

    That a merge of such small ones then works is not promised: sometimes it does.
    """
    (one, loss), (two, _) = (trained(tmp_path / f"t{seed}", bert, seed) for seed in (1, 2))
    near = rebasin(two, one, tmp_path / "near", CONTEXT, residual=True, strict=True).manifest["metrics"]
    assert loss(open_model(tmp_path / "near")) == pytest.approx(loss(two), abs=1e-4)
    assert near["warnings"] == []
    far = rebasin(two, one, tmp_path / "far", CONTEXT).manifest["metrics"]
    assert "residual" in far["warnings"][-1]
    assert near["distance_after"] < 0.95 * near["distance_before"]
    assert near["correlation"] > far["correlation"]


def test_the_same_seed_gives_the_same_bytes(base: Model, tmp_path: Path) -> None:
    other = edited(base, tmp_path / "o", lambda t: [v.copy_(v.flip(0)) for v in t.values()])
    found = [rebasin(other, base, tmp_path / f"r{i}", CONTEXT, residual=True) for i in range(2)]
    assert weights(found[0]) == weights(found[1])
    assert found[0].manifest["metrics"] == found[1].manifest["metrics"]


def test_each_pass_comes_nearer(base: Model, tmp_path: Path) -> None:
    """A model of another initialisation: nearer than it was, and said to be no better than chance."""
    family = "Bert" if base.config["model_type"] == "bert" else "Llama"
    other = make(tmp_path / "other", family, 9, tokenizer=base.path, vocab_size=base.config["vocab_size"])
    for residual in (False, True):
        made = rebasin(other, base, tmp_path / f"out{residual}", CONTEXT, residual=residual)
        told = made.manifest["metrics"]
        assert told["distance_after"] < told["distance_before"]
        torch.testing.assert_close(answers(made), answers(other), rtol=1e-4, atol=1e-4)
    made = rebasin(other, base, tmp_path / "w", CONTEXT)
    assert "chance" in made.manifest["metrics"]["warnings"][0]
    with pytest.raises(FitError, match=r"no units in common.*distill.*\[no-common-units\]"):
        rebasin(other, base, tmp_path / "strict", CONTEXT, strict=True)
    assert not (tmp_path / "strict").exists()


def test_a_body_and_a_classifier_on_it(bert_base: Model, tmp_path: Path) -> None:
    body = edited(
        bert_base, tmp_path / "body",
        lambda t: [t.__setitem__(n.removeprefix("bert."), t.pop(n)) for n in list(t)] and [
            t.pop(n) for n in list(t) if n.startswith("classifier")
        ],
        architectures=["BertModel"],
    )  # fmt: skip
    for by in ("weights", "activations"):
        mixed = reordered(body, tmp_path / f"mixed-{by}")
        made = rebasin(mixed, bert_base, tmp_path / f"out-{by}", CONTEXT, by=by, texts=all_texts())  # type: ignore[arg-type]
        assert made.manifest["metrics"]["distance_after"] == 0
        assert weights(made) == weights(body)


def test_little_memory_changes_nothing(llama_base: Model, tmp_path: Path) -> None:
    mixed = reordered(llama_base, tmp_path / "mixed")
    small = rebasin(
        mixed, llama_base, tmp_path / "small", replace(CONTEXT, memory=1), by="activations", texts=all_texts()
    )
    assert small.manifest["metrics"]["distance_after"] == 0


# Refusals


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (lambda t: t.update({"model.layers.1.mlp.gate.weight": torch.ones(2, 24)}), {}, r"layers\.1\.mlp\.gate"),
        (lambda t: t.pop("model.layers.0.mlp.up_proj.weight"), {}, r"layers\.0\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(20, 24)}), {}, r"self_attn\.q_proj"),
        (lambda t: None, {"num_attention_heads": 5}, r"5 and 3"),
        (lambda t: None, {"model_type": "mixtral"}, r"mixtral"),
        (lambda t: t.update({"model.adapter.weight": torch.ones(2, 24)}), {}, r"model\.adapter\.weight"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_refused_by_name(
    change: Callable[[dict[str, Tensor]], object],
    config: dict[str, Any],
    message: str,
    llama_base: Model,
    tmp_path: Path,
) -> None:  # fmt: skip
    odd = edited(llama_base, tmp_path / "odd", change, **config)
    with pytest.raises(FitError, match=rf"{message}.*remedy.*\[not-permutable\]"):
        rebasin(odd, llama_base, tmp_path / "out", CONTEXT, residual=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "depth.*other-architecture"),
        ({"hidden_size": 30}, "hidden size.*other-architecture"),
        ({"head_dim": 8}, "rotary.*other-architecture"),
        ({"hidden_act": "gelu"}, "activation function.*other-architecture"),
        ({"mlp_bias": True}, r"other tensors in.*layers\.0\.neurons.*other-architecture"),
        ({"intermediate_size": 48}, r"number of neurons.*layers\.0\.neurons.*--zip.*other-width"),
        ({"num_attention_heads": 12}, r"number of heads.*--zip.*other-width"),
    ],
)
def test_hopeless_pairs_are_refused_with_the_reason(
    changes: dict[str, Any], message: str, llama_base: Model, tmp_path: Path
) -> None:
    other = make(tmp_path / "other", "Llama", **changes)
    with pytest.raises(FitError, match=message) as caught:
        rebasin(other, llama_base, tmp_path / "out", CONTEXT)
    assert "distill" in str(caught.value)


def test_another_model_type(llama_base: Model, bert_base: Model, tmp_path: Path) -> None:
    for act in (rebasin, lambda a, b, o, c: zip_models(b, a, o, c, texts=["x"])):
        with pytest.raises(FitError, match=r"another model type; allowed: llama; got: bert.*distill"):
            act(bert_base, llama_base, tmp_path / "out", CONTEXT)


def test_parameters_are_checked(llama_base: Model, tmp_path: Path) -> None:
    wrong: list[dict[str, Any]] = [
        {"by": "feeling"}, {"by": "activations"}, {"by": "activations", "texts": ["a"], "residual": True},
    ]  # fmt: skip
    for parameters in wrong:
        with pytest.raises(UsageError, match=r"remedy.*\[bad-parameter\]"):
            rebasin(llama_base, llama_base, tmp_path / "out", CONTEXT, **parameters)
    for parameters in ({"share": 1.5}, {"until": -0.1}):
        with pytest.raises(UsageError, match=r"0 to 1.*\[bad-parameter\]"):
            zip_models(llama_base, llama_base, tmp_path / "out", CONTEXT, texts=["a"], **parameters)
    with pytest.raises(UsageError, match=r"texts.*\[bad-parameter\]"):
        zip_models(llama_base, llama_base, tmp_path / "out", CONTEXT, texts=[])


def test_another_tokenizer(llama_base: Model, tmp_path: Path) -> None:
    other = edited(llama_base, tmp_path / "other", lambda t: None)
    value = json.loads((other.path / "tokenizer.json").read_text())
    words = value["model"]["vocab"]
    words["a"], words["e"] = words["e"], words["a"]
    (other.path / "tokenizer.json").write_text(json.dumps(value))
    with pytest.raises(FitError, match=r"other tokens.*\[other-tokenizer\]"):
        rebasin(other, llama_base, tmp_path / "out", CONTEXT, by="activations", texts=all_texts())


# Assignments


def test_grouped_matching_is_the_best_of_all() -> None:
    from itertools import permutations

    torch.manual_seed(0)
    pairs = torch.randn(6, 6)
    orders = [
        [b * 2 + i for b, flip in zip(blocks, flips, strict=True) for i in ((1, 0) if flip else (0, 1))]
        for blocks in permutations(range(3))
        for flips in ((x, y, z) for x in (0, 1) for y in (0, 1) for z in (0, 1))
    ]
    best = max(orders, key=lambda o: float(sum(pairs[i, j] for i, j in enumerate(o))))
    assert match(pairs, 2).tolist() == best


def test_chance_is_chance() -> None:
    torch.manual_seed(0)
    wins = sum(above_chance(0.3 + 0.1 * torch.randn(50), 0.3 + 0.1 * torch.randn(50)) for _ in range(200))
    assert wins <= 3
    assert above_chance(0.4 + 0.1 * torch.randn(50), 0.3 + 0.1 * torch.randn(50))


def test_padding_is_not_looked_at(llama_base: Model) -> None:
    both = TwoNetworks(llama_base, llama_base, ["a", "please some more bread with fruit today", "my"], CONTEXT)
    reader = "model.layers.0.mlp.down_proj.weight"
    seen: list[tuple[int, ...]] = []
    both.run([(reader, reader)], lambda i, x, y: seen.append((len(x), len(y), x.shape[1])))
    tokens = len(load_tokenizer(llama_base)("please some more bread with fruit today")["input_ids"][:16])
    lengths = [len(load_tokenizer(llama_base)(t)["input_ids"]) for t in ("a", "my")]
    assert seen == [(tokens + sum(lengths), tokens + sum(lengths), 40)]


def test_what_all_units_share_is_no_correlation(llama_base: Model, tmp_path: Path) -> None:
    """Numbers that are far from zero in all units make unrelated ones no more alike."""
    g = torch.Generator().manual_seed(4)
    one, two = (
        edited(llama_base, tmp_path / n, lambda t: [v.normal_(2.0, 0.3, generator=g) for v in t.values()])
        for n in ("one", "two")
    )  # fmt: skip
    told = rebasin(two, one, tmp_path / "out", CONTEXT).manifest["metrics"]
    assert told["correlation"] < 0.5
    assert not told["above_chance"]


# Zip


def widened(model: Model, out: Path, copies: int = 2) -> Model:
    """The same function with each neuron ``copies`` times, each with its part of the outgoing weights, mixed."""

    def change(t: dict[str, Tensor]) -> None:
        for s in symmetries(model):
            if s.kind != "neurons":
                continue
            order = torch.randperm(copies * s.units, generator=torch.Generator().manual_seed(s.layer))
            for a in s.axes:
                part = torch.cat([t[a.tensor]] * copies, a.dim).index_select(a.dim, order)
                t[a.tensor] = part / copies if a.tensor == s.reader else part

    return edited(model, out, change, intermediate_size=copies * SIZES["intermediate_size"])


def test_a_wider_net_of_duplicates_zips_to_the_same_function(base: Model, tmp_path: Path) -> None:
    wide = widened(base, tmp_path / "wide", 3)
    torch.testing.assert_close(answers(wide), answers(base), rtol=1e-4, atol=1e-4)
    made = zip_models(base, wide, tmp_path / "out", CONTEXT, texts=all_texts(), share=0.4)
    torch.testing.assert_close(answers(made), answers(base), rtol=1e-3, atol=1e-3)
    assert {n: s.shape for n, s in made.tensors.items()} == {n: s.shape for n, s in base.tensors.items()}
    told = made.manifest["metrics"]
    assert all(layer["both"] == 40 and layer["lowest"] > 0.999 for layer in told["layers"].values())
    assert told["channels"] == pytest.approx(1.0)
    assert told["attention"] == "averaged"


def test_a_narrower_and_reordered_net(base: Model, tmp_path: Path) -> None:
    """The base is the wide one; the other's heads are in another order too."""
    wide = widened(base, tmp_path / "wide")
    mixed = reordered(base, tmp_path / "mixed")
    made = zip_models(wide, mixed, tmp_path / "out", CONTEXT, texts=all_texts())
    torch.testing.assert_close(answers(made), answers(base), rtol=1e-3, atol=1e-3)
    assert made.tensors.keys() == wide.tensors.keys()


def test_zip_of_tuned_copies_beats_a_zip_that_ignores_order(base: Model, tmp_path: Path) -> None:
    fine = reordered(tuned(base, tmp_path / "fine", size=0.02), tmp_path / "mixed")
    made = zip_models(base, fine, tmp_path / "out", CONTEXT, texts=all_texts())
    straight = averaged(base, fine, tmp_path / "straight")
    true = answers(base)
    assert (answers(made) - true).abs().mean() < 0.4 * (answers(straight) - true).abs().mean()


def test_other_heads_leave_attention_the_bases(llama_base: Model, llama: Path, tmp_path: Path) -> None:
    other = make(
        tmp_path / "other", "Llama", tokenizer=llama, vocab_size=llama_base.config["vocab_size"], num_attention_heads=12
    )  # fmt: skip
    made = zip_models(llama_base, other, tmp_path / "out", CONTEXT, texts=all_texts())
    assert "base's" in made.manifest["metrics"]["attention"]
    old, new = Tensors(llama_base.path), Tensors(made.path)
    assert all(torch.equal(old[n], new[n]) for n in old if "_proj" in n and "self_attn" in n)
    assert not torch.equal(old["model.layers.0.mlp.up_proj.weight"], new["model.layers.0.mlp.up_proj.weight"])


def test_later_layers_and_label_rows_stay_the_bases(bert_base: Model, tmp_path: Path) -> None:
    fine = tuned(bert_base, tmp_path / "fine")
    made = zip_models(bert_base, fine, tmp_path / "out", CONTEXT, texts=all_texts(), until=0.5)
    old, new = Tensors(bert_base.path), Tensors(made.path)
    same = {n for n in old if torch.equal(old[n], new[n])}
    assert {n for n in old if "layer.1." in n or "pooler" in n or "classifier" in n} == same
    none = zip_models(bert_base, fine, tmp_path / "none", CONTEXT, texts=all_texts(), until=0)
    assert all(torch.equal(old[n], v) for n, v in Tensors(none.path).items())
    whole = zip_models(bert_base, fine, tmp_path / "all", CONTEXT, texts=all_texts())
    assert not torch.equal(Tensors(whole.path)["bert.pooler.dense.bias"], old["bert.pooler.dense.bias"])


def test_channels_that_do_not_correspond(bert_base: Model, tmp_path: Path) -> None:
    mixed = reordered(bert_base, tmp_path / "mixed", residual=True)
    made = zip_models(bert_base, mixed, tmp_path / "out", CONTEXT, texts=all_texts())
    assert "residual" in made.manifest["metrics"]["warnings"][0]
    with pytest.raises(FitError, match=r"channels.*rebasin with residual.*\[no-common-units\]"):
        zip_models(bert_base, mixed, tmp_path / "strict", CONTEXT, texts=all_texts(), strict=True)
    back = rebasin(mixed, bert_base, tmp_path / "back", CONTEXT, residual=True)
    good = zip_models(bert_base, back, tmp_path / "good", CONTEXT, texts=all_texts(), strict=True)
    torch.testing.assert_close(answers(good), answers(bert_base), rtol=1e-3, atol=1e-3)


def test_groups_of_neurons() -> None:
    """Two of the base alike, one of the other alone; merged activations are means of their units'."""
    torch.manual_seed(0)
    x = torch.randn(5000, 3)
    units = torch.stack([x[:, 0], x[:, 0] + 0.01 * x[:, 1], x[:, 1], x[:, 2], -x[:, 1]], 1)
    found = group_units(torch.cov(units.T), torch.full((5,), 0.5), 3)
    # five to three: 0 and 1 are one; then the two that are least unlike, never 2 and 4, which are opposites
    assert found.group[0] == found.group[1] == 0
    assert found.group[2] != found.group[4]
    assert float(found.correlations[0]) > 0.99
    assert sorted(set(found.group.tolist())) == [0, 1, 2]
    still = group_units(torch.zeros(4, 4), torch.ones(4), 2)
    assert sorted(set(still.group.tolist())) == [0, 1]


# Command


def test_the_command(fanbu: Command, llama_base: Model, tmp_path: Path) -> None:
    mixed = reordered(llama_base, tmp_path / "mixed")
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": t}) + "\n" for t in all_texts()))
    for more in ([], ["--by", "activations", "--texts", texts]):
        code, told = fanbu("align", mixed.path, llama_base.path, tmp_path / "out", "--device", "cpu", *more, "--json")
        assert code == 0
        assert told["distance_after"] == 0
        assert "correlations" not in told
        open_model(tmp_path / "out")
    wide = widened(llama_base, tmp_path / "wide")
    line = ("align", wide.path, llama_base.path, tmp_path / "zip", "--device", "cpu")
    error_of(fanbu(*line, "--json"), 1, "other-width")
    error_of(fanbu(*line, "--zip", "--json"), 2, "flag")
    error_of(fanbu(*line, "--share", "0.2", "--json"), 2, "flag")
    error_of(fanbu(*line, "--zip", "--by", "weights", "--texts", texts, "--json"), 2, "flag")
    error_of(fanbu(*line, "--zip", "--share", "2", "--texts", texts, "--json"), 2, "bad-parameter")
    code, told = fanbu(*line, "--zip", "--texts", texts, "--share", "0.5", "--json")
    assert code == 0
    torch.testing.assert_close(answers(open_model(told["model"])), answers(llama_base), rtol=1e-3, atol=1e-3)
