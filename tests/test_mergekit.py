"""mergekit's recipes: read strictly, and merged as the formulas say."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from fanbu.errors import FitError, UsageError
from fanbu.from_mergekit import METHODS, run_mergekit
from fanbu.merging.mergekit import names_of, read_mergekit
from fanbu.model import load_network, open_model
from fanbu.tensors import Tensors
from fanbu.types import Context
from test_engine import variant


@pytest.fixture
def models(llama: Path, tmp_path: Path) -> list[Path]:
    return [llama, *(variant(llama, tmp_path / f"s{i}", i) for i in range(2))]


def run(value: dict[str, Any], folder: Path) -> dict[str, Tensor]:
    (folder / "merge.yml").write_text(yaml.safe_dump(value))
    made = run_mergekit(folder / "merge.yml", folder / "out", Context())
    load_network(made)
    return dict(Tensors(made.path))


def by_hand(models: list[Path], formula: Callable[[str, Tensor, list[Tensor]], Tensor]) -> dict[str, Tensor]:
    base, *others = (Tensors(m) for m in models)
    return {n: formula(n, base[n].double(), [o[n].double() for o in others]) for n in base}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=1e-4, atol=2e-6)


def listed(models: list[Path], **parameters: Any) -> list[dict[str, Any]]:
    return [{"model": str(m), "parameters": parameters} for m in models]


def test_linear_counts_every_model(models: list[Path], tmp_path: Path) -> None:
    weights = [1.0, 2.0, 0.5]
    value = {"merge_method": "linear", "models": [
        {"model": str(m), "parameters": {"weight": w}} for m, w in zip(models, weights, strict=True)
    ]}  # fmt: skip
    total = by_hand(models, lambda _, b, o: (b * 1.0 + o[0] * 2.0 + o[1] * 0.5) / 3.5)
    assert_same(run(value, tmp_path), total)


def test_gradients_filters_and_lambda(models: list[Path], tmp_path: Path) -> None:
    weight = [{"filter": "mlp", "value": [0.0, 1.0]}, {"value": 0.5}]
    value = {
        "merge_method": "task_arithmetic", "base_model": str(models[0]), "models": listed(models[1:], weight=weight),
        "parameters": {"lambda": 0.5, "int8_mask": True},
    }  # fmt: skip

    def formula(name: str, b: Tensor, o: list[Tensor]) -> Tensor:
        w = (0.0 if "layers.0." in name else 1.0) if "mlp" in name else 0.5
        return b + 0.5 * w * (o[0] - b + o[1] - b)

    assert_same(run(value, tmp_path), by_hand(models, formula))


def test_slerp_goes_from_the_base(models: list[Path], tmp_path: Path) -> None:
    value = {
        "merge_method": "slerp", "base_model": str(models[0]), "models": [{"model": str(m)} for m in models[:2]],
        "parameters": {"t": 0.3},
    }  # fmt: skip

    def formula(_: str, b: Tensor, o: list[Tensor]) -> Tensor:
        cosine = (b.flatten() @ o[0].flatten()) / b.norm() / o[0].norm()
        if cosine > 0.9995:
            return 0.7 * b + 0.3 * o[0]
        angle = cosine.acos()
        return ((0.7 * angle).sin() * b + (0.3 * angle).sin() * o[0]) / angle.sin()

    assert_same(run(value, tmp_path), by_hand(models, formula))


def test_nearswap_clips(models: list[Path], tmp_path: Path) -> None:
    value = {
        "merge_method": "nearswap", "base_model": str(models[0]), "models": [{"model": str(models[1])}],
        "parameters": {"t": 0.004},
    }  # fmt: skip
    assert_same(run(value, tmp_path), by_hand(models, lambda _, b, o: b + (o[0] - b).clamp(-0.004, 0.004)))


@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_runs(method: str, models: list[Path], tmp_path: Path) -> None:
    several = method not in {"slerp", "nearswap"}
    density = {"density": 0.5} if method.startswith("della") else {}
    value = {
        "merge_method": method, "base_model": str(models[0]), "dtype": "bfloat16",
        "models": listed(models[1 : 3 if several else 2], weight=0.4, **density),
    }  # fmt: skip
    got = run(value, tmp_path)
    assert {t.dtype for t in got.values()} == {torch.bfloat16}
    assert any(not torch.equal(got[n], t.bfloat16()) for n, t in Tensors(models[0]).items())


def test_layers_are_stacked(models: list[Path], tmp_path: Path) -> None:
    spans = [(models[0], 0, 2), (models[1], 1, 2), (models[0], 0, 1)]
    value = {"merge_method": "passthrough", "slices": [
        {"sources": [{"model": str(m), "layer_range": [a, b]}]} for m, a, b in spans
    ]}  # fmt: skip
    got = run(value, tmp_path)
    assert open_model(tmp_path / "out").config["num_hidden_layers"] == 4
    places = [(m, layer) for m, a, b in spans for layer in range(a, b)]
    for number, (model, layer) in enumerate(places):
        own = Tensors(model)
        for name in (n for n in own if f"layers.{layer}." in n):
            assert torch.equal(got[name.replace(f"layers.{layer}.", f"layers.{number}.")], own[name])
    assert torch.equal(got["model.embed_tokens.weight"], Tensors(models[0])["model.embed_tokens.weight"])


def test_layers_that_do_not_fit(models: list[Path], bert: Path, tmp_path: Path) -> None:
    def stack(model: Path, span: list[int]) -> dict[str, Any]:
        sources = [{"sources": [{"model": str(m), "layer_range": s}]} for m, s in ((models[0], [0, 1]), (model, span))]
        return {"merge_method": "passthrough", "slices": sources}

    with pytest.raises(UsageError, match=r"layers 0 to 2.*got: 0, 3"):
        run(stack(models[1], [0, 3]), tmp_path)
    with pytest.raises(FitError, match=r"no model\.layers\.0"):
        run(stack(bert, [0, 1]), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"merge_method": "sce"}, "merge_method.*allowed.*ties.*got: sce"),
        ({"merge_metod": "ties"}, "key.*got: merge_metod"),
        ({"tokenizer_source": 3}, "a directory or hub id"),
        ({"dtype": "int8"}, "dtype"),
        ({"models": []}, "models"),
        ({"models": [{"model": "a+b"}]}, "adapter"),
        ({"parameters": {"lambda": "much"}}, "lambda.*a number"),
        ({"parameters": {"lambda": [{"filtre": "x", "value": 1}]}}, "lambda.*filter"),
        ({"parameters": {"rescale": True}}, "rescale.*allowed: False with ties"),
        ({"models": [{"model": "s0"}]}, "model at|a weight for each"),
    ],
)
def test_what_we_cannot_do_is_said(change: dict[str, Any], told: str, models: list[Path], tmp_path: Path) -> None:
    value = {"merge_method": "ties", "base_model": str(models[0]), "models": listed(models[1:], weight=1.0)}
    with pytest.raises(UsageError, match=told):
        run({**value, **change}, tmp_path)
    assert not (tmp_path / "out").exists()


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    for text in ("[1, 2]", "a: [", "!!python/object:os.system {}"):
        path.write_text(text)
        with pytest.raises(UsageError, match="mergekit recipe: file"):
            read_mergekit(path)
    with pytest.raises(UsageError, match="at most"):
        read_mergekit(tmp_path / "gone.yml")


def test_names() -> None:
    assert names_of(["a/x", "b/x/", "owner/y"]) == ["x", "x-1", "y"]
