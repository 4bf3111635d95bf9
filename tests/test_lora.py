"""Low-rank ways down: adapters are what PEFT and ``feed`` take them for; factors lose least and stay of their rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_llama
from fanbu import api
from fanbu.catalogue import method
from fanbu.domain import Domain, load_domain
from fanbu.errors import FanbuError
from fanbu.heads import final_layer
from fanbu.merging.gram import linear_layers
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import class_logits, validation_value
from fanbu.shrink.lowrank import factored, rank_of
from fanbu.types import Context, Train

LORA, LOWRANK = method("lora"), method("lowrank")
TRAIN = Train(epochs=2, lr=5e-3, head_lr=1e-2, batch_size=8, patience=0)


@pytest.mark.parametrize("kind", ["lora", "dora", "rslora"])
def test_the_merged_model_and_the_adapter_say_the_same(
    kind: str, opened: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    from peft import PeftModel

    domain, texts = domains["food"], domains["food"].test.texts
    made = LORA.shrink(opened, domain, tmp_path / "m", context, kind=kind, rank=4, adapter=True, train=TRAIN)
    merged = class_logits(load_network(made), load_tokenizer(made), texts, context)
    settings = json.loads((tmp_path / "m.adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == opened.digest
    assert (settings["r"], settings["use_dora"], settings["use_rslora"]) == (4, kind == "dora", kind == "rslora")
    # on the parent with label rows of the right number, PEFT gives what the merged model gives
    base = load_network(made)
    base.load_state_dict({n: t for n, t in load_network(opened).state_dict().items() if "classifier" not in n},
                         strict=False)  # fmt: skip
    theirs = class_logits(
        PeftModel.from_pretrained(base, tmp_path / "m.adapter").base_model.model, load_tokenizer(made), texts, context
    )
    torch.testing.assert_close(theirs, merged, rtol=1e-3, atol=1e-4)


def test_only_the_named_layers_move(
    opened: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    made = LORA.shrink(opened, domains["food"], tmp_path / "m", context, targets=["query", "value"], train=TRAIN)
    before, after = load_network(opened).state_dict(), load_network(made).state_dict()
    moved = {n for n, t in after.items() if not torch.equal(t, before[n])} if before.keys() == after.keys() else set()
    assert moved
    assert all("query.weight" in n or "value.weight" in n or n.startswith("classifier.") for n in moved)
    for name in moved - {"classifier.weight", "classifier.bias"}:
        assert int(torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-4)) <= 8
    assert not (tmp_path / "m.adapter").exists()
    with pytest.raises(FanbuError, match="no-layers"):
        LORA.shrink(opened, domains["food"], tmp_path / "n", context, targets=["qkv"], train=TRAIN)


def test_feed_takes_the_adapter_for_a_specialist(context: Context, tmp_path: Path) -> None:
    base = open_model(make_llama(tmp_path / "llama"))
    domain = load_domain("numbers", python="numbers", test=0.2, task="causal-lm", limit={"train": 24, "valid": 8})
    made = LORA.shrink(base, domain, tmp_path / "m", context, adapter=True, train=TRAIN)
    values = [validation_value(load_network(m), load_tokenizer(m), domain, context) for m in (base, made)]
    assert values[1] > values[0]
    folders = {"a": made.path, "b": tmp_path / "m.adapter"}
    merged = [
        api.merge(base, {"numbers": folder}, tmp_path / name, context, method_name="average")
        for name, folder in folders.items()
    ]
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        logits = [load_network(m)(input_ids=ids).logits for m in merged]
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-4)


def test_factors_lose_least_on_what_the_inputs_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 24) @ torch.randn(24, 24) * torch.rand(24) * 3
    weight, gram = torch.randn(16, 24), x.T @ x / 300

    def lost(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((x @ (weight - a @ b).T).square().sum())

    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    plain = lost(u[:, :6] * s[:6], vh[:6])
    best = lost(*factored(weight, gram, 6))
    # no matrix of this rank loses less than what the singular values of W S say
    root = torch.linalg.cholesky(gram.double())
    floor = 300 * float(torch.linalg.svdvals(weight.double() @ root)[6:].square().sum())
    assert floor <= best <= 1.02 * floor < plain


@pytest.mark.parametrize("train", [None, TRAIN])
def test_matrices_get_the_rank_and_keep_it(
    train: Train | None, specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model = specialists["food"].model
    made = LOWRANK.shrink(model, domains["food"], tmp_path / "m", context, share=0.5, train=train)
    ranks = made.manifest["parameters"]["ranks"]
    network = load_network(made)
    layers = linear_layers(network)
    handed = {"bert.encoder.layer.2.attention.self.value.weight"}  # the layer that takes the mean
    assert {n for n in layers if ".layer." in n} - set(ranks) >= handed
    assert {n for n in layers if ".layer.0." in n or ".layer.1." in n} < set(ranks)
    assert all(layers[name] is not final_layer(network) for name in ranks)
    for name, rank in ranks.items():
        weight: Any = layers[name].weight
        assert rank == rank_of(weight.shape, 0.5)
        got = int(torch.linalg.matrix_rank(weight.detach().double(), rtol=1e-5))
        assert got == rank if bool(weight.any()) else got == 0
    assert made.parameters == model.parameters
    with pytest.raises(FanbuError, match="no-layers"):
        LOWRANK.shrink(model, domains["food"], tmp_path / "n", context, share=0.01, train=None)
