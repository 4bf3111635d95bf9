"""Search: budgets are met, a stopped search goes on as if nothing had happened, earlier searches are tried first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fanbu.catalogue import method
from fanbu.deploy import latency
from fanbu.deploy.latency import fitted
from fanbu.domain import Domain
from fanbu.errors import DataError, FanbuError, UsageError
from fanbu.model import Model, load_network, open_model
from fanbu.shrink import _space, search
from fanbu.shrink._space import Choice, Space, shape_row
from fanbu.shrink._units import size_of
from fanbu.types import Context

SEARCH = method("search")
SHORT: dict[str, Any] = {"trials": 6, "finalists": 1, "augment": 1, "train": {"epochs": 1, "lr": 1e-3}}


@pytest.fixture(scope="module")
def model(specialists: dict[str, Any]) -> Model:
    found: Model = specialists["food"].model
    return found


@pytest.fixture
def space(model: Model, domains: dict[str, Domain], context: Context) -> Space:
    return Space(model, domains["food"], context)


def test_a_sketch_says_what_the_network_will_be(space: Space) -> None:
    for choice in (Choice(1, 0.5, 0.25), Choice(2, 0.75, 1.0), Choice(2, 1.0, 0.1)):
        sketch, network = space.sketch(choice), space.cut(choice)
        assert sketch.parameters == size_of(network)
        assert (sketch.hidden, sketch.neurons) == (network.config.hidden_size, network.config.intermediate_size)
        assert network.config.num_hidden_layers == choice.layers


def test_the_whole_network_scores_best(space: Space) -> None:
    whole, some, few = (space.score(c) for c in (Choice(space.count, 1, 1), Choice(2, 0.75, 0.5), Choice(1, 0.25, 0.1)))
    assert whole > max(some, few)


def test_bytes_are_those_of_the_file(
    model: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, space: Space
) -> None:
    sketch = space.sketch(Choice(space.count, 1, 1))
    assert sketch.bytes(32) == model.bytes
    for bits in (8, 4):
        small = method("quantize").shrink(model, domains["food"], tmp_path / str(bits), context, bits=bits)
        assert sketch.bytes(bits) == small.bytes


@pytest.mark.parametrize("kind", ["parameters", "bytes", "four bits"])
def test_a_budget_is_met(kind: str, model: Model, domains: dict[str, Domain], context: Context, tmp_path: Path) -> None:
    most: dict[str, Any] = {
        "parameters": {"budget": {"parameters": 0.5}},
        "bytes": {"budget": {"bytes": model.bytes // 4}, "bits": [32, 8]},
        "four bits": {"budget": {"bytes": model.bytes // 6}, "bits": [4]},
    }[kind]
    made = SEARCH.shrink(model, domains["food"], tmp_path / "m", context, **SHORT, **most)
    trials = made.manifest["metrics"]["trials"]
    assert 1 <= len(trials) <= 6
    if kind == "parameters":
        assert made.parameters <= 0.5 * model.parameters
        assert all(t["parameters"] <= 0.5 * model.parameters for t in trials)
    else:
        assert made.bytes <= most["budget"]["bytes"]
        assert made.manifest["metrics"]["choice"]["bits"] in most["bits"]
    assert load_network(made).config.num_labels == len(domains["food"].labels)


def test_a_stopped_search_goes_on_with_the_same_result(
    model: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(name: str) -> Model:
        here = tmp_path / name
        here.mkdir(exist_ok=True)
        known: dict[str, Any] = {**SHORT, "budget": {"parameters": 0.5}}
        out, scratch = tmp_path / f"{name}-out", replace(context, scratch=here)
        return SEARCH.shrink(model, domains["food"], out, scratch, **known)

    warm = [{"layers": 3, "channels": share} for share in (0.65, 0.7, 0.8)]
    monkeypatch.setattr(search, "_earlier", lambda *_: warm)
    made, left, real = {"whole": run("whole")}, iter(range(2)), Space.score
    with monkeypatch.context() as patched:
        patched.setattr(Space, "score", lambda self, c: (next(left), real(self, c))[1])
        with pytest.raises(StopIteration):
            run("stopped")
    warm.insert(0, {"layers": 2, "channels": 0.9})  # another search ended meanwhile
    made["stopped"] = run("stopped")
    assert made["stopped"].digest == made["whole"].digest
    assert made["stopped"].manifest["metrics"] == made["whole"].manifest["metrics"]
    tried = [t["choice"] for t in made["whole"].manifest["metrics"]["trials"]]
    assert [t["channels"] for t in tried[:3]] == [0.65, 0.7, 0.8]


def test_tokens_are_not_searched_for_causal_models(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    given = {**SHORT, "budget": {"parameters": 0.6}, "tokens": [300]}
    with pytest.raises(UsageError, match="for classifiers only"):
        SEARCH.shrink(open_model(llama), texts["food"], tmp_path / "m", context, **given)


def test_what_earlier_searches_found_is_tried_first(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    history = str(tmp_path / "history")
    known: dict[str, Any] = {**SHORT, "budget": {"parameters": 0.5}, "history": history}
    first = SEARCH.shrink(specialists["food"].model, domains["food"], tmp_path / "a", context, **known)
    best = max(first.manifest["metrics"]["trials"], key=lambda t: t["score"])["choice"]
    second = SEARCH.shrink(specialists["rail"].model, domains["rail"], tmp_path / "b", context, **known)
    tried = [t["choice"] for t in second.manifest["metrics"]["trials"]]
    assert {k: tried[0][k] for k in ("layers", "channels")} == {k: best[k] for k in ("layers", "channels")}
    assert len(list(Path(history).glob("search-*.json"))) == 2
    (tmp_path / "history" / "search-x.json").write_text(json.dumps({"asked": {"task": "text-classification"}}))
    with pytest.raises(DataError) as caught:
        SEARCH.shrink(specialists["rail"].model, domains["rail"], tmp_path / "c", context, **known)
    assert caught.value.code == "history-broken"


_COST = (0.2, 0.5, 40.0, 60.0)


@pytest.mark.parametrize("off", [1.0, 1.3, 0.75])
def test_a_time_is_met_when_it_is_measured(
    off: float, model: Model, domains: dict[str, Domain], context: Context, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def pretended(network: Any) -> float:
        config = network.config
        row = shape_row(config.num_hidden_layers, config.hidden_size, config.intermediate_size)
        return sum(f * v for f, v in zip(_COST, row, strict=True))

    monkeypatch.setattr(latency, "network_milliseconds", lambda network, *_: pretended(network))
    monkeypatch.setattr(search, "_factors", lambda *_: tuple(off * f for f in _COST))  # what is predicted
    space = Space(model, domains["food"], context)
    asked = 0.6 * pretended(space.network)
    made = SEARCH.shrink(model, domains["food"], tmp_path / "m", context, budget={"milliseconds": asked}, **SHORT)
    metrics = made.manifest["metrics"]
    assert metrics["milliseconds"] == pytest.approx(pretended(load_network(made)))
    assert 0.9 <= metrics["milliseconds"] / asked <= 1.1
    assert space.sketch(Choice(**metrics["choice"])).parameters == made.parameters
    assert max(t["milliseconds"] for t in metrics["trials"]) <= asked


def test_what_times_are_predicted_from_is_measured_in_turns(
    space: Space, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latency, "_TURNS", 1)
    clock = search._clock(space, tmp_path)
    factors = search._factors(space, clock, tmp_path)
    whole = search._Bounds(0.0, 0, 1.0, factors).predicted(space.sketch(Choice(2, 1, 1)), Choice(2, 1, 1))
    assert whole == pytest.approx(clock.unit, rel=0.9)
    assert search._clock(space, tmp_path) == clock  # a search that was stopped goes on with the same


def test_a_budget_is_spent(space: Space, model: Model) -> None:
    bounds = search._Bounds(0.9 * model.parameters, 0, 0.0)
    filled = search._filled(space, Choice(space.count, 0.5, 1.0), bounds)
    assert filled is not None
    assert filled.channels > 0.5
    assert 0.9 <= bounds.spent(space.sketch(filled), filled) <= 1
    roomy = search._Bounds(2.0 * model.parameters, 0, 0.0)
    most = search._filled(space, Choice(space.count, 0.5, 1.0), roomy)
    assert most is not None
    assert space.whole(most)
    assert search._filled(space, Choice(2, 1.0, 1.0), search._Bounds(10.0, 0, 0.0)) is None


def test_a_time_that_is_not_met_is_no_result(
    model: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_factors", lambda *_: (0.0, 1.0, 0.0, 0.0))  # a layer, a millisecond
    given = {**SHORT, "budget": {"milliseconds": 2.5}}
    monkeypatch.setattr(search, "usual_milliseconds", lambda *_: 1.0)
    monkeypatch.setattr(search, "_took", lambda *_: 50.0)
    with pytest.raises(UsageError) as caught:
        SEARCH.shrink(model, domains["food"], tmp_path / "slow", context, **given)
    assert caught.value.code == "target-not-met"
    assert not (tmp_path / "slow").exists()
    monkeypatch.setattr(search, "_took", lambda *_: 2.6)
    made = SEARCH.shrink(model, domains["food"], tmp_path / "m", context, **given)
    assert made.manifest["metrics"]["milliseconds"] == 2.6


def test_shares_that_round_to_all_leave_the_network_whole(
    model: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, space: Space
) -> None:
    near = Choice(1, 0.99, 1.0)
    assert not space.drops(near)
    assert space.drops(Choice(1, 0.5, 1.0))
    bounds = search._Bounds(0.0, 0, 0.0)
    cut = search._cut(0, near, space, domains["food"], bounds, tmp_path, context)
    assert (load_network(cut.model).config.hidden_size, cut.took) == (load_network(model).config.hidden_size, 0.0)


def test_a_table_of_another_machine(model: Model, domains: dict[str, Domain], context: Context, tmp_path: Path) -> None:
    rows = [
        {"layers": n, "hidden": h, "neurons": f, "milliseconds": 1 + 2 * n + n * h * h / 1e5 + 3 * n * h * f / 1e5}
        for n in (1, 3) for h in (16, 32) for f in (8, 64)
    ]  # fmt: skip
    table = tmp_path / "table.json"
    table.write_text(json.dumps(rows))
    budget = search.Budget(milliseconds=3.2, table=str(table))
    bounds = search._bounds(budget, model, Space(model, domains["food"], context), tmp_path)
    assert (bounds.factors, bounds.clock) == (pytest.approx((1, 2, 1, 3)), None)
    made = SEARCH.shrink(
        model, domains["food"], tmp_path / "m", context, budget={"milliseconds": 3.2, "table": str(table)}, **SHORT
    )
    assert made.config["num_hidden_layers"] == 1  # two take at least five milliseconds there
    for text in ("[]", "{", '[{"layers": 1}]', json.dumps([{**r, "milliseconds": 0} for r in rows])):
        table.write_text(text)
        with pytest.raises(DataError) as caught:
            SEARCH.shrink(
                model, domains["food"], tmp_path / "n", context, budget={"milliseconds": 3.0, "table": str(table)}
            )
        assert caught.value.code == "latency-table"


def test_times_are_fitted_by_relative_error() -> None:
    rows = [shape_row(n, h, f) for n in (1, 2, 6) for h in (64, 384) for f in (128, 1536)]
    true = (0.5, 0.1, 2.0, 1.5)
    times = [sum(a * b for a, b in zip(true, r, strict=True)) for r in rows]
    assert fitted(rows, times) == pytest.approx(true, rel=1e-6)
    assert min(fitted(rows, [t * (1.2 if i % 2 else 0.8) for i, t in enumerate(times)])) >= 0


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({}, "bad-parameter"),
        ({"budget": {"parameters": 10.0}}, "target-not-met"),
        ({"budget": {"weight": 1}}, "bad-parameter"),
        ({"bits": [5]}, "bad-parameter"),
    ],
)
def test_what_cannot_be_meant(
    arguments: dict[str, Any], code: str, model: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    with pytest.raises(FanbuError) as caught:
        SEARCH.shrink(model, domains["food"], tmp_path / "m", context, **{**SHORT, **arguments})
    assert isinstance(caught.value, UsageError)
    assert caught.value.code == code
    assert not (tmp_path / "m").exists()


def test_sub_networks_that_come_to_the_same_are_scored_once(space: Space, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = []
    real = _space.Space._scored
    monkeypatch.setattr(Space, "_scored", lambda self, n: (scored.append(n), real(self, n))[1])
    assert space.score(Choice(1, 0.5, 0.25)) == space.score(Choice(1, 0.51, 0.25))
    assert len(scored) == 1
