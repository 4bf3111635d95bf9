"""Adapters as specialists: their changes are PEFT's, they stay factored, what is hostile or unknown is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution
from fanbu.errors import FitError, IntegrityError, UsageError
from fanbu.merging.adapter import CONFIG, WEIGHTS, adapter_contribution, weights_contribution
from fanbu.merging.engine import stacks
from fanbu.merging.extract import extract, join_adapters
from fanbu.merging.task_vector import TaskVector
from fanbu.model import Model, load_tokenizer, open_model, provenance, save_model
from fanbu.tensors import Tensors
from fanbu.types import PRESETS, Context

LINEAR = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"^model.layers.1.self_attn.v_proj": 3}},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "biases": {"modules_to_save": ["norm"]},
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def train(network: Any, seed: int, **settings: Any) -> Any:
    """A PEFT network whose factors are random instead of trained."""
    torch.manual_seed(seed)
    plain = {"r": 3, "lora_alpha": 5, "target_modules": LINEAR, "init_lora_weights": False}
    made = get_peft_model(network, LoraConfig(**{**plain, **settings}))
    with torch.no_grad():
        for name, value in made.named_parameters():
            if "magnitude" in name or "modules_to_save" in name or (settings.get("bias") == "all" and "bias" in name):
                value.mul_(1 + 0.2 * torch.rand_like(value)).add_(0.01)
    return made


def causal(base: Path, out: Path, seed: int = 1, **settings: Any) -> tuple[Path, dict[str, Tensor]]:
    """An adapter in ``out``, and the weights that PEFT merges it to."""
    made = train(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), seed, task_type="CAUSAL_LM", **settings
    )
    made.save_pretrained(out)
    return out, dict(made.merge_and_unload().state_dict())


def deltas(base: Model, sent: Contribution, context: Context) -> dict[str, Tensor]:
    """The change that the engine sees."""
    return {s.name: s.whole().deltas[0] for s in stacks(base, [sent], context)}


def same_as_peft(base: Model, sent: Contribution, merged: dict[str, Tensor], context: Context) -> bool:
    old, found = Tensors(base.path), deltas(base, sent, context)
    for name, delta in found.items():
        torch.testing.assert_close(old[name] + delta, merged[name].float(), rtol=1e-5, atol=1e-6)
    return any(bool(d.abs().max() > 0.01) for d in found.values())


@pytest.fixture(scope="session")
def two(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        causal(llama, folder / f"{i}", i, use_rslora=bool(i), r=2 + i, target_modules=LINEAR[i:])[0] for i in range(2)
    ]


@pytest.mark.parametrize("kind", list(KINDS))
def test_rows_are_what_peft_merges(kind: str, llama: Path, context: Context, tmp_path: Path) -> None:
    folder, merged = causal(llama, tmp_path / "adapter", **KINDS[kind])
    base = open_model(llama)
    sent = weights_contribution(folder, base, "food")
    assert (sent.method, sent.kind) == ("adapter", "weights")
    assert same_as_peft(base, sent, merged, context)
    written = cross(sent, PRESETS["internal"], tmp_path / "sent")
    read = open_contribution(tmp_path / "sent")
    assert read.digest == sent.digest
    assert written.bytes < base.bytes / 2 or kind == "embeddings"
    assert same_as_peft(base, read, merged, context)


def test_weights_stored_transposed(context: Context, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=24, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    target = ["c_attn", "c_proj"]
    folder, merged = causal(tmp_path / "gpt2", tmp_path / "adapter", target_modules=target, fan_in_fan_out=True)
    base = open_model(tmp_path / "gpt2")
    assert same_as_peft(base, adapter_contribution(folder, base, "food"), merged, context)
    dora, _ = causal(tmp_path / "gpt2", tmp_path / "dora", target_modules=target, fan_in_fan_out=True, use_dora=True)
    with pytest.raises(FitError, match=r"DoRA.*\[in, out\]"):
        adapter_contribution(dora, base, "food")


def test_a_classifier_brings_its_label_rows_and_biases(incumbent: Model, context: Context, tmp_path: Path) -> None:
    network = AutoModelForSequenceClassification.from_pretrained(
        incumbent.path, num_labels=2, ignore_mismatched_sizes=True
    )
    made = train(network, 3, task_type="SEQ_CLS", target_modules=["query", "dense"], bias="all")
    made.save_pretrained(tmp_path / "adapter")
    merged = {n: v.clone() for n, v in made.merge_and_unload().state_dict().items()}
    sent = weights_contribution(tmp_path / "adapter", incumbent, "toys", ["doll", "kite"])
    assert same_as_peft(incumbent, sent, merged, context)
    result = method("task_arithmetic").absorb(incumbent, [sent], tmp_path / "new", context, scale=1.0)
    assert set(result.labels) == {*incumbent.labels, "toys/doll", "toys/kite"}
    row = result.labels.index("toys/kite")
    torch.testing.assert_close(Tensors(result.path)["classifier.weight"][row], merged["classifier.weight"][1])
    with pytest.raises(UsageError, match="a head of 2 labels"):
        weights_contribution(tmp_path / "adapter", incumbent, "toys")


def dense(base: Model, sent: Contribution, context: Context) -> Contribution:
    """The same change, materialised."""
    return Contribution("weights", sent.domain, "task_vector", deltas(base, sent, context), meta={"labels": []})


@pytest.mark.parametrize("name", ["average", "task_arithmetic", "ties", "tsv_m", "iso_c"])
def test_factored_and_materialised_merge_to_the_same(
    name: str, two: list[Path], llama: Path, context: Context, tmp_path: Path
) -> None:
    base, way = open_model(llama), method(name)
    sent = [weights_contribution(path, base, f"d{i}") for i, path in enumerate(two)]
    one = way.absorb(base, sent, tmp_path / "one", context)
    other = way.absorb(base, [dense(base, c, context) for c in sent], tmp_path / "other", context)
    ours, theirs, old = Tensors(one.path), Tensors(other.path), Tensors(base.path)
    for tensor in ours:
        torch.testing.assert_close(ours[tensor], theirs[tensor], rtol=1e-5, atol=1e-6)
    changed = {n for n in ours if not torch.equal(ours[n], old[n])}
    assert changed == {n for n in ours if n.removesuffix(".weight").endswith(tuple(LINEAR))}


def test_factors_are_offered_only_where_all_are_products(
    two: list[Path], llama: Path, context: Context, tmp_path: Path
) -> None:
    base = open_model(llama)
    sent = [weights_contribution(path, base, f"d{i}") for i, path in enumerate(two)]
    name = "model.layers.0.self_attn.v_proj.weight"
    stack = next(s for s in stacks(base, sent, context) if s.name == name)
    pairs = stack.factors()
    assert pairs is not None
    assert [b.shape[1] for b, _ in pairs] == [2, 3]
    for (b, a), delta in zip(pairs, stack.whole().deltas, strict=True):
        torch.testing.assert_close(b @ a, delta)
    full = [sent[0], dense(base, sent[1], context)]
    assert all(s.factors() is None for s in stacks(base, full, context))
    dora = weights_contribution(causal(llama, tmp_path / "dora", use_dora=True)[0], base, "dora")
    assert next(s for s in stacks(base, [dora, *sent], context) if s.name == name).factors() is None


def changed_model(base: Model, out: Path, context: Context, also: str = "model.norm.weight") -> Model:
    """A model whose linear layers and one vector differ from the base's, with falling singular values."""
    torch.manual_seed(5)
    tensors = dict(Tensors(base.path))
    for name, value in tensors.items():
        if value.ndim == 2 and "embed" not in name:
            u, s, vh = torch.linalg.svd(torch.randn_like(value), full_matrices=False)
            tensors[name] = value + 0.1 * (u * s * 0.6 ** torch.arange(len(s))) @ vh
    tensors[also] = tensors[also] * 1.01
    return save_model(out, base.config, tensors, load_tokenizer(base), provenance("test", [base], context))


@pytest.mark.parametrize(("rank", "error"), [(4, None), (None, 0.05), (1000, None)])
def test_extracted_adapters_hold_their_bound_and_load_in_peft(
    rank: int | None, error: float | None, llama: Path, context: Context, tmp_path: Path
) -> None:
    base = open_model(llama)
    model = changed_model(base, tmp_path / "model", context)
    report = extract(model, base, tmp_path / "adapter", context, rank=rank, error=error)
    assert set(report.left_out) == {"model.norm.weight"}
    network = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "adapter")
    merged, vector = network.merge_and_unload().state_dict(), TaskVector(model, base)
    old = Tensors(base.path)
    for name, value in report.errors.items():
        delta = vector[name]
        rest = torch.linalg.matrix_norm(merged[name] - old[name] - delta) / torch.linalg.matrix_norm(delta)
        assert float(rest) == pytest.approx(value, rel=0.02, abs=1e-5)
        assert error is None or float(rest) <= error
        s = torch.linalg.svdvals(delta.double())
        k = report.ranks[name]
        assert value == pytest.approx(float((s[k:].square().sum() / s.square().sum()).sqrt()), rel=1e-3, abs=1e-5)
        assert error is None or float((s[k - 1 :].square().sum() / s.square().sum()).sqrt()) > error * 0.999
    assert rank != 4 or set(report.ranks.values()) == {4}
    again = weights_contribution(tmp_path / "adapter", base, "food")
    found = deltas(base, again, context)
    for name in report.ranks:
        torch.testing.assert_close(found[name], merged[name] - old[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(FitError, match="made for another base"):
        weights_contribution(tmp_path / "adapter", model, "food")


def test_a_classifier_is_extracted_with_its_labels(
    specialists: Any, incumbent: Model, context: Context, tmp_path: Path
) -> None:
    model = specialists["food"].model
    extract(model, incumbent, tmp_path / "adapter", context, rank=64)
    fresh = AutoModelForSequenceClassification.from_pretrained(
        incumbent.path, num_labels=len(model.labels), ignore_mismatched_sizes=True
    )
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload().state_dict()
    own = Tensors(model.path)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    torch.testing.assert_close(merged["classifier.weight"], own["classifier.weight"])
    torch.testing.assert_close(merged[name], own[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("rank", "error"), [(None, None), (2, None), (None, 0.3)])
def test_several_adapters_become_one(
    rank: int | None, error: float | None, two: list[Path], llama: Path, context: Context, tmp_path: Path
) -> None:
    base = open_model(llama)
    sent = [weights_contribution(path, base, f"d{i}") for i, path in enumerate(two)]
    report = join_adapters(
        sent, base, tmp_path / "one", context, scale=0.5, weights={"d1": 2.0}, rank=rank, error=error
    )
    parts = [deltas(base, c, context) for c in sent]
    joined = deltas(base, weights_contribution(tmp_path / "one", base, "all"), context)
    for name, got in joined.items():
        want = 0.5 * parts[0][name] + 1.0 * parts[1][name]
        rest = float((got - want).norm() / want.norm().clamp_min(1e-12))
        assert rest == pytest.approx(report.errors.get(name, 0.0), abs=1e-5)
        assert rank is not None or rest <= (error or 1e-5)
    assert max(report.ranks.values()) == (rank or (5 if error is None else max(report.ranks.values())))
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), tmp_path / "one")
    with pytest.raises(FitError, match="no adapter"):
        join_adapters([dense(base, sent[0], context)], base, tmp_path / "no", context)
    with pytest.raises(UsageError, match="rank 0"):
        join_adapters(sent, base, tmp_path / "no", context, rank=0)


CONFIGS = {
    "another kind": ({"peft_type": "IA3"}, FitError, "IA3"),
    "an unknown option": ({"layer_replication": [[0, 2]]}, FitError, "layer_replication"),
    "target_parameters": ({"target_parameters": ["x"]}, FitError, "target_parameters"),
    "a start that changes the base": ({"init_lora_weights": "pissa_niter_4"}, FitError, "pissa"),
    "a rank of text": ({"r": "3"}, IntegrityError, "r is no sound number"),
    "rank 0": ({"r": 0}, IntegrityError, "r is no sound number"),
    "another rank than the tensors": ({"r": 7}, IntegrityError, "rank 7"),
    "an infinite alpha": ({"lora_alpha": float("inf")}, IntegrityError, "lora_alpha is no sound number"),
    "a slow pattern": ({"rank_pattern": {"(a*)*b": 3}}, FitError, "at most one"),
    "a pattern that is none": ({"alpha_pattern": ["x"]}, IntegrityError, "must be mappings"),
    "DoRA without magnitudes": ({"use_dora": True}, IntegrityError, "lacks a factor"),
    "a transposed square": ({"fan_in_fan_out": True}, FitError, "fan_in_fan_out"),
    "another bias": ({"bias": "some"}, FitError, "bias"),
}


@pytest.mark.parametrize("what", list(CONFIGS))
def test_configs_that_cannot_be_meant_are_refused(what: str, two: list[Path], llama: Path, tmp_path: Path) -> None:
    change, error, words = CONFIGS[what]
    shutil.copytree(two[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / CONFIG
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(error, match=words):
        weights_contribution(tmp_path / "adapter", open_model(llama), "food")


def hostile_weights(what: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    first = sorted(n for n in tensors if "lora_A" in n)[0]
    a = tensors.pop(first)
    prefix = first.removesuffix(".lora_A.weight")
    return {
        "NaN": {**tensors, first: a * float("nan")},
        "a missing factor": tensors,
        "another width": {**tensors, first: torch.zeros(len(a), a.shape[1] + 1)},
        "a module that is not there": {**tensors, first: a, "base_model.model.model.no.lora_A.weight": a.clone()},
        "an unknown tensor": {**tensors, first: a, f"{prefix}.lora_diag": a.clone()},
        "whole numbers": {**tensors, first: a.to(torch.int8)},
        "a replaced tensor that the base lacks": {**tensors, first: a, "base_model.model.other.bias": a[0].clone()},
    }[what]


WEIGHT_ERRORS = {
    "NaN": (IntegrityError, "NaN"), "a missing factor": (IntegrityError, "lacks a factor"),
    "another width": (FitError, "do not fit"), "a module that is not there": (FitError, "the base lacks"),
    "an unknown tensor": (FitError, "lora_diag"), "whole numbers": (FitError, "whole numbers"),
    "a replaced tensor that the base lacks": (FitError, r"other\.bias"),
}  # fmt: skip


@pytest.mark.parametrize("what", list(WEIGHT_ERRORS))
def test_weights_that_do_not_fit_are_refused(what: str, two: list[Path], llama: Path, tmp_path: Path) -> None:
    error, words = WEIGHT_ERRORS[what]
    shutil.copytree(two[1], tmp_path / "adapter")
    file = tmp_path / "adapter" / WEIGHTS
    save_file(hostile_weights(what, load_file(file)), file)
    with pytest.raises(error, match=words):
        weights_contribution(tmp_path / "adapter", open_model(llama), "food")


def test_broken_folders_are_refused(two: list[Path], llama: Path, tmp_path: Path) -> None:
    base = open_model(llama)
    shutil.copytree(two[0], tmp_path / "pickled")
    (tmp_path / "pickled" / WEIGHTS).rename(tmp_path / "pickled" / "adapter_model.bin")
    with pytest.raises(IntegrityError, match=r"adapter_model\.bin.*never opened"):
        weights_contribution(tmp_path / "pickled", base, "food")
    shutil.copytree(two[0], tmp_path / "short")
    file = tmp_path / "short" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(IntegrityError, match="do not fill"):
        weights_contribution(tmp_path / "short", base, "food")
    shutil.copytree(two[0], tmp_path / "long")
    (tmp_path / "long" / CONFIG).write_text('{"peft_type": "LORA", "r": ' + "1" * 2**23 + "}")
    with pytest.raises(IntegrityError, match="larger than"):
        weights_contribution(tmp_path / "long", base, "food")


def test_factors_that_arrive_wrong_are_refused(two: list[Path], llama: Path, context: Context, tmp_path: Path) -> None:
    base = open_model(llama)
    sent = weights_contribution(two[0], base, "food")
    name = next(n for n in sent.tensors if n.startswith("a:"))
    wrong = [
        {n: v for n, v in sent.tensors.items() if n != name},
        {**sent.tensors, name: sent.tensors[name][:, :-1]},
        {**sent.tensors, "a:other": sent.tensors[name]},
        {**sent.tensors, "x:" + name[2:]: sent.tensors[name]},
    ]
    for tensors in wrong:
        bad = Contribution("weights", "food", "adapter", tensors, meta=sent.meta)
        with pytest.raises(FitError, match="food sent factors that do not fit"):
            method("task_arithmetic").absorb(base, [bad], tmp_path / "new", context)
    flat = dense(base, sent, context)
    short = Contribution("weights", "food", "task_vector", {n: v[:1] for n, v in flat.tensors.items()})
    with pytest.raises(FitError, match="other shapes"):
        method("task_arithmetic").absorb(base, [short], tmp_path / "new", context)
