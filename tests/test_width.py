"""Width pruning: plain smaller checkpoints of every family, units that do nothing go first, targets are met."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fanbu.catalogue import method
from fanbu.deploy import latency
from fanbu.domain import Domain
from fanbu.errors import FitError, UsageError
from fanbu.merging.gram import columns, grams, linear_layers
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.predict import class_logits
from fanbu.shrink import width
from fanbu.shrink._units import Keep, best, counted, follows, importances, narrowed, size_of, units
from fanbu.types import Context
from test_rebasin import CONTEXT, FAMILIES, GROUPED, answers, make

WIDTH = method("width")
BARE: dict[str, Any] = {"train": None}


def network_of(model: Model) -> Any:
    return getattr(transformers, model.config["architectures"][0]).from_pretrained(model.path).eval()


def some_units(found: Any, *, channels: bool, seed: int = 3) -> Keep:
    """Half of everything that can go, at random."""
    generator, keep = torch.Generator().manual_seed(seed), {}
    half = torch.randperm(found.channels.units, generator=generator)[: found.channels.units // 2] if channels else None
    for s in found.sets:
        if s.kind == "heads" and not (found.free_heads or channels):
            continue
        if s.kind == "channels":
            keep[s.name] = half.sort().values
        else:
            keep[s.name] = best(
                torch.rand(s.units, generator=generator), max(1, s.units // s.group // 2) * s.group, s.group
            )
    return keep


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_is_a_plain_checkpoint(family: str, channels: bool, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family)
    network = network_of(model)
    if channels and family == "Wav2Vec2":
        with pytest.raises(FitError, match="pos_conv_embed"):
            units(network, model, channels=True)
        return
    found = units(network, model, channels=channels)
    keep = some_units(found, channels=channels)
    smaller = narrowed(network, found, keep, model)
    assert size_of(smaller) == size_of(network, found, {k: len(v) for k, v in keep.items()}) < size_of(network)
    made = save_network(smaller, model.path, tmp_path / "small", provenance("width", [model], CONTEXT))
    given = answers(made)
    assert given.isfinite().all()
    assert given.shape[:-1] == answers(model).shape[:-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_units_that_nobody_reads_go_without_a_trace(family: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family)
    network = network_of(model)
    found = units(network, model, channels=False)
    keep, layers = some_units(found, channels=False), linear_layers(network)
    with torch.no_grad():
        for s in found.layers:
            if s.name in keep:
                block = columns(layers[s.reader]).shape[1] // s.units
                idle = torch.ones(s.units, dtype=torch.bool)
                idle[keep[s.name]] = False
                columns(layers[s.reader])[:, idle.repeat_interleave(block)] = 0
    before = save_network(network, model.path, tmp_path / "before", provenance("x", [model], CONTEXT))
    smaller = narrowed(network, found, keep, model)
    after = save_network(smaller, model.path, tmp_path / "after", provenance("x", [model], CONTEXT))
    torch.testing.assert_close(answers(after), answers(before), rtol=1e-4, atol=1e-5)
    assert after.parameters < before.parameters


@pytest.mark.parametrize("family", ["Qwen2", "Llama"])
def test_channels_may_go_without_heads_where_heads_say_their_width(family: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family, head_dim=None) if family == "Llama" else make(tmp_path / "model", family)
    network = network_of(model)
    if family == "Qwen2":  # its config has no width of its own
        config = transformers.Qwen2Config(**{k: v for k, v in GROUPED.items() if k != "head_dim"})
        network = transformers.Qwen2ForCausalLM(config)
    found = units(network, model, channels=True)
    smaller = narrowed(network, found, {"channels": torch.arange(12)}, model)
    assert smaller.config.hidden_size == 12
    assert smaller(torch.tensor([[3, 4]])).logits.isfinite().all()


@pytest.mark.parametrize("family", ["Gemma", "Gemma2"])
def test_gemmas_embeddings_keep_their_size(family: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family)
    network = network_of(model)
    found, keep = units(network, model, channels=True), {"channels": torch.arange(6)}
    smaller, ids = narrowed(network, found, keep, model).eval(), torch.tensor([[3, 9, 12]])
    first = [n.model(ids, output_hidden_states=True).hidden_states[0] for n in (network, smaller)]
    torch.testing.assert_close(first[1], first[0][..., :6], rtol=1e-5, atol=1e-6)
    heads = [n.lm_head.weight * (1 + n.model.norm.weight) for n in (network, smaller)]
    torch.testing.assert_close(heads[1], heads[0][:, :6], rtol=1e-5, atol=1e-6)


def edited(model: Model, out: Path, change: Callable[[Any], None]) -> Model:
    network = load_network(model)
    with torch.no_grad():
        change(network)
    return save_network(network, load_tokenizer(model), out, provenance("edited", [model], CONTEXT))


@pytest.mark.parametrize("how", ["activation", "taylor", "magnitude"])
def test_what_does_nothing_matters_least(
    how: Any, specialists: dict[str, Any], domains: dict[str, Domain], context: Context
) -> None:
    model = specialists["food"].model
    network, tokenizer = load_network(model), load_tokenizer(model)
    found = units(network, model, channels=True)
    s = found.of("neurons")[0]
    reader, writer = linear_layers(network)[s.reader], linear_layers(network)[s.axes[0].tensor]
    with torch.no_grad():
        columns(reader)[:, :5] = 0
        if how == "magnitude":
            writer.weight[:5] = 0
            writer.bias[:5] = 0
    scores = importances(network, tokenizer, domains["food"], found.sets, how, context)
    assert scores[s.name].argsort()[:5].sort().values.tolist() == [0, 1, 2, 3, 4]
    assert {name: len(v) for name, v in scores.items()} == {t.name: t.units for t in found.sets}
    assert all(v.isfinite().all() and v.max() > 0 for v in scores.values())


def test_kept_neurons_take_over_what_dropped_twins_wrote(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    def twins(network: Any) -> None:
        found = units(network, specialists["food"].model, channels=False)
        layers = linear_layers(network)
        for s in found.of("neurons"):
            writer, half = layers[s.axes[0].tensor], s.units // 2
            writer.weight[half:] = writer.weight[:half]
            writer.bias[half:] = writer.bias[:half]

    model, domain = edited(specialists["food"].model, tmp_path / "twins", twins), domains["food"]
    texts = domain.test.texts
    want = class_logits(load_network(model), load_tokenizer(model), texts, context)
    off = {}
    for compensate in (True, False):
        network, tokenizer = load_network(model), load_tokenizer(model)
        found = units(network, model, channels=False)
        keep = {s.name: torch.arange(s.units // 2) for s in found.of("neurons")}
        with torch.inference_mode():
            if compensate:
                width._compensate(network, tokenizer, domain, found, keep, context)
            got = class_logits(narrowed(network, found, keep, model), tokenizer, texts, context)
        off[compensate] = float((got - want).abs().max())
    assert off[True] < 1e-3 * float(want.abs().max())
    assert off[True] < 0.05 * off[False]


def test_values_close_to_the_identity_go_with_their_channels(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model = specialists["food"].model
    network = load_network(model)
    found = units(network, model, channels=True)
    last = max(s.layer for s in found.layers)
    assert [s.name for s in found.followers] == [f"bert.encoder.layer.{last}.heads", "pooled"]
    assert last not in {s.layer for s in found.of("heads")}
    made = WIDTH.shrink(model, domains["food"], tmp_path / "small", context, neurons=1.0, channels=0.5, **BARE)
    smaller = load_network(made)
    assert smaller.config.hidden_size == network.config.hidden_size // 2
    assert follows(smaller.bert.encoder.layer[-1].attention.self.value.weight)
    assert follows(smaller.bert.pooler.dense.weight)


@pytest.mark.parametrize("target", [0.9, 1500.0])
def test_a_number_of_parameters_is_met(
    target: float, specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model = specialists["food"].model
    most = target * model.parameters if target <= 1 else model.parameters - target
    shares = {"neurons": 0.1}
    made = WIDTH.shrink(
        model, domains["food"], tmp_path / "m", context, **shares, parameters=target if target <= 1 else most, **BARE
    )
    assert 0.8 * most <= made.parameters <= most
    assert made.manifest["parameters"]["parameters"] == made.parameters


def test_a_time_is_met(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = specialists["food"].model
    monkeypatch.setattr(latency, "network_milliseconds", lambda network, *_: size_of(network) / 1000)
    most = 0.85 * model.parameters / 1000
    made = WIDTH.shrink(model, domains["food"], tmp_path / "m", context, neurons=0.1, milliseconds=most, **BARE)
    assert 0.9 * most <= size_of(load_network(made)) / 1000 <= most
    slow = replace(context, scratch=tmp_path / "scratch")
    slow.scratch.mkdir()
    first = WIDTH.shrink(model, domains["food"], tmp_path / "k", slow, neurons=0.1, milliseconds=most, **BARE)
    monkeypatch.setattr(latency, "network_milliseconds", lambda network, *_: size_of(network) ** 0.9)
    again = WIDTH.shrink(model, domains["food"], tmp_path / "l", slow, neurons=0.1, milliseconds=most, **BARE)
    assert again.digest == first.digest == made.digest  # what was chosen before a kill stays
    with pytest.raises(UsageError, match=r"milliseconds of 0\.001.*remedy") as caught:
        WIDTH.shrink(model, domains["food"], tmp_path / "n", context, milliseconds=1e-3, **BARE)
    assert caught.value.code == "target-not-met"


def test_a_machine_that_changes_its_speed_does_not_decide(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model = specialists["food"].model
    calls = itertools.count()
    speeds = [1.0, 0.6, 1.0, 1.0, 1.5]  # of some moments; the clock takes the middle one, then one after the other

    def pretended(network: Any, *_: Any) -> float:
        return speeds[(next(calls) + 1) // 2 % 5] * size_of(network) / 1000

    monkeypatch.setattr(latency, "network_milliseconds", pretended)
    most = 0.85 * model.parameters / 1000
    made = WIDTH.shrink(model, domains["food"], tmp_path / "m", context, neurons=0.1, milliseconds=most, **BARE)
    assert 0.9 * most <= size_of(load_network(made)) / 1000 <= most


def test_time_is_measured(specialists: dict[str, Any], domains: dict[str, Domain], context: Context) -> None:
    model = specialists["food"].model
    known = load_network(model), load_tokenizer(model), domains["food"].test.texts[:4], context
    unit = latency.usual_milliseconds(*known)
    assert 0 < unit < 10_000
    again = latency.Clock(*known, unit).milliseconds(load_network(model), known[1])
    assert again == pytest.approx(unit, rel=0.9)  # the same network


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"neurons": 1.0}, "bad-parameter"), ({"neurons": 0.0}, "bad-parameter"),
        ({"parameters": 1.0}, "bad-parameter"), ({"neurons": 0.995}, "bad-parameter"),
        ({"heads": 0.5}, "heads-not-free"),
        ({"neurons": 0.9, "parameters": 10.0}, "target-not-met"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(
    arguments: dict[str, float], code: str, specialists: dict[str, Any], domains: dict[str, Domain], context: Context,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises((UsageError, FitError)) as caught:
        WIDTH.shrink(specialists["food"].model, domains["food"], tmp_path / "m", context, **arguments, **BARE)
    assert caught.value.code == code
    assert not (tmp_path / "m").exists()


def test_other_architectures_are_refused_by_name(domains: dict[str, Domain], tmp_path: Path) -> None:
    config = transformers.FunnelConfig(vocab_size=60, block_sizes=[1, 1], d_model=16, n_head=2, d_head=8, d_inner=16)
    network = transformers.FunnelForSequenceClassification(config)
    with pytest.raises(FitError, match="funnel"):
        units(network, Model(tmp_path, {}), channels=False)


def test_layers_of_different_sizes_are_refused(specialists: dict[str, Any]) -> None:
    model = specialists["food"].model
    network = load_network(model)
    found = units(network, model, channels=False)
    keep = {s.name: torch.arange(4 + i) for i, s in enumerate(found.of("neurons"))}
    with pytest.raises(FitError, match="different numbers of neurons"):
        narrowed(network, found, keep, model)


def test_training_after_the_cut_keeps_the_best_epoch(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    train = {"epochs": 2, "lr": 1e-3, "batch_size": 8}
    made = WIDTH.shrink(specialists["food"].model, domains["food"], tmp_path / "m", context, train=train)
    assert made.manifest["metrics"]["steps"] > 0
    assert made.manifest["parameters"]["kept"]["neurons"] == load_network(made).config.intermediate_size
    again = WIDTH.shrink(
        specialists["food"].model, domains["food"], tmp_path / "n", replace(context, threads=1), train=train
    )
    assert again.digest == made.digest


def test_counts_are_round_where_there_are_many() -> None:
    assert counted(1536, 0.3) == 464
    assert counted(12, 0.5) == 6
    assert counted(12, 0.01) == 1
    assert counted(4096, 0.0001) == 8


def test_pooled_rows_are_no_tokens_where_a_text_has_as_many_as_the_hidden_size(
    specialists: dict[str, Any], domains: dict[str, Domain]
) -> None:
    model = specialists["food"].model
    network, tokenizer = load_network(model), load_tokenizer(model)
    hidden = network.config.hidden_size
    text = " ".join(domains["food"].train.texts)
    found, _ = grams(network, tokenizer, [text], ["classifier.weight"], Context(max_length=hidden, threads=1))
    assert len(tokenizer(text)["input_ids"]) >= hidden
    assert int(torch.linalg.matrix_rank(found["classifier.weight"])) == 1  # one text, one pooled row


def test_channels_stay_a_multiple_of_heads_as_configs_insist(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model = open_model(llama)
    for share, hidden in ((0.7, 24), (0.55, 16), (0.05, 4)):
        made = WIDTH.shrink(model, texts["food"], tmp_path / str(share), context, channels=share, **BARE)
        plain = transformers.AutoModelForCausalLM.from_pretrained(made.path)
        assert plain.config.hidden_size == hidden
        assert plain(torch.tensor([[3, 4, 5]])).logits.isfinite().all()
