"""Quantized checkpoints: on the grid, loaded by plain transformers, smaller on disk, and measured."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from conftest import make_llama
from fanbu.catalogue import method
from fanbu.domain import Domain, load_domain
from fanbu.errors import FanbuError, IntegrityError
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import class_logits
from fanbu.shrink._rounding import Rounding, on_grid, rounded, scales
from fanbu.shrink._units import inner_layers
from fanbu.types import Context, Train

QUANTIZE = method("quantize")
WAYS: list[Rounding] = ["nearest", "activation", "gptq"]


def inputs(width: int) -> torch.Tensor:
    """[400, width], correlated, a few of them much larger than the rest."""
    g = torch.Generator().manual_seed(3)
    size = torch.ones(width)
    size[::9] = 12
    return torch.randn(400, width, generator=g) @ torch.randn(width, width, generator=g) * size


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize(("bits", "group"), [(8, 0), (4, 0), (4, 16)])
def test_weights_are_whole_numbers_of_steps(how: Rounding, bits: int, group: int) -> None:
    torch.manual_seed(0)
    x, weight = inputs(48), torch.randn(20, 48)
    made, step = on_grid(weight, x.T @ x / len(x), bits, group, how)
    assert step.shape == (20, 48 // (group or 48))
    whole = made.reshape(*step.shape, -1) / step[..., None]
    torch.testing.assert_close(whole, whole.round(), rtol=0, atol=1e-4)
    assert whole.round().min() >= -(2 ** (bits - 1))
    assert whole.round().max() <= 2 ** (bits - 1) - 1
    if how == "nearest":
        assert ((made - weight).abs().reshape(*step.shape, -1) <= step[..., None] / 2 + 1e-6).all()


def test_who_looks_at_inputs_loses_less() -> None:
    torch.manual_seed(0)
    x, weight = inputs(64), torch.randn(30, 64)
    lost = {
        how: float(((on_grid(weight, x.T @ x / len(x), 4, 0, how)[0] - weight) @ x.T).square().sum()) for how in WAYS
    }
    assert lost["gptq"] < lost["activation"] < lost["nearest"]


def test_the_clip_is_the_best_of_all_that_are_tried() -> None:
    torch.manual_seed(1)
    weight, squares = torch.randn(6, 32), torch.rand(32) * 5

    def lost(step: torch.Tensor) -> torch.Tensor:
        return ((rounded(weight, step, 4) - weight).square() * squares).sum(1)

    widest, chosen = scales(weight, 4, 0), scales(weight, 4, 0, squares)
    tried = torch.stack([lost(widest * (1 - 0.05 * i)) for i in range(11)])
    torch.testing.assert_close(lost(chosen), tried.min(0).values)
    assert (chosen < widest).any()


@pytest.mark.parametrize(("bits", "group", "how"), [(8, 0, "nearest"), (4, 16, "gptq")])
def test_plain_transformers_loads_what_we_load(
    bits: int, group: int, how: str, specialists: dict[str, Any], domains: dict[str, Domain], context: Context,
    tmp_path: Path,
) -> None:  # fmt: skip
    model, texts = specialists["food"].model, domains["food"].test.texts
    small = QUANTIZE.shrink(model, domains["food"], tmp_path / "q", context, bits=bits, group=group, rounding=how)
    assert small.bytes < model.bytes / 2
    assert small.parameters == model.parameters
    tokenizer = load_tokenizer(small)
    ours = class_logits(load_network(small), tokenizer, texts, context)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(small.path)
    with torch.no_grad():
        theirs = torch.cat([plain(**tokenizer(t, return_tensors="pt")).logits for t in texts])
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    before = class_logits(load_network(model), tokenizer, texts, context)
    assert not torch.equal(ours, before)
    old, new, inner = load_network(model).state_dict(), load_network(small).state_dict(), set(inner_layers(plain))
    for name, weight in old.items():
        off = (new[name] - weight).abs()
        if name not in inner and "word_embeddings" not in name:
            assert not off.any()
        elif how == "nearest":
            assert (off.amax(1) <= 0.501 * weight.abs().amax(1) / 127).all()  # half a step of its row
    metrics = small.manifest["metrics"]
    assert abs(metrics["valid"] - metrics["valid_before"]) < 0.2
    network = load_network(small)
    assert not hasattr(network.config, "quantization_config")
    assert {t.dtype for t in network.state_dict().values() if t.is_floating_point()} == {torch.float32}
    again = method("finetune").shrink(small, domains["food"], tmp_path / "f", context, train=Train(epochs=1))
    assert again.bytes == model.bytes  # trained on as floats, and saved as such


def test_a_tied_embedding_stays_in_floats(context: Context, tmp_path: Path) -> None:
    model = open_model(make_llama(tmp_path / "llama"))
    domain = load_domain("numbers", python="numbers", test=0.2, task="causal-lm", limit={"train": 24, "valid": 8})
    small = QUANTIZE.shrink(model, domain, tmp_path / "q", context, bits=4, group=16, rounding="activation")
    names = set(small.tensors)
    assert {n for n in names if "embed" in n} == {"model.embed_tokens.weight"}
    assert any(n.endswith("q_proj.weight_packed") for n in names)
    ids = torch.tensor([[1, 2, 3]])
    off = load_network(small)(input_ids=ids).logits - load_network(model)(input_ids=ids).logits
    assert 0 < off.norm() < load_network(model)(input_ids=ids).logits.norm()


def test_training_with_rounded_weights_helps(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model, domain = specialists["food"].model, domains["food"]
    form = {"bits": 4, "group": 0, "embeddings": False}
    losses = {}
    for name, train in {"rounded": None, "trained": Train(epochs=6, lr=1e-3, patience=0)}.items():
        made = QUANTIZE.shrink(model, domain, tmp_path / name, context, train=train, **form)
        z = class_logits(load_network(made), load_tokenizer(made), domain.train.texts, context)
        losses[name] = float(torch.nn.functional.cross_entropy(z, torch.tensor(domain.train.labels)))
    assert losses["trained"] < losses["rounded"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [({"group": 7}, "not-in-groups"), ({"bits": 3}, "bad-parameter"), ({"group": -1}, "bad-parameter")],
)
def test_what_cannot_be_meant(
    arguments: dict[str, Any], code: str, specialists: dict[str, Any], domains: dict[str, Domain], context: Context,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(FanbuError) as caught:
        QUANTIZE.shrink(specialists["food"].model, domains["food"], tmp_path / "q", context, **arguments)
    assert caught.value.code == code
    assert not (tmp_path / "q").exists()


def test_another_format_is_refused(specialists: dict[str, Any], tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(specialists["food"].model.path, tmp_path / "m"))
    (folder / "fanbu.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(IntegrityError):
        load_network(open_model(folder))


def test_parameters_are_counted_as_weights() -> None:
    from fanbu.tensors import TensorSpec

    for bits, group in itertools.product((4, 8), (0, 32)):
        config = {
            "quantization_config": {"config_groups": {"group_0": {"weights": {"num_bits": bits, "group": group}}}}
        }
        model = Model(Path("m"), config)
        shapes = {"a.weight_packed": (6, 64 * bits // 32), "a.weight_scale": (6, 1), "a.weight_shape": (2,), "b": (5,)}
        model.__dict__["tensors"] = {n: TensorSpec(Path("m"), s, "I32") for n, s in shapes.items()}
        assert model.parameters == 6 * 64 + 5
