"""Other arguments for the best candidate: ranges from signatures, draws that repeat, and a budget that is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest

from fanbu.catalogue import method, methods
from fanbu.errors import UsageError
from fanbu.search.halving import History, Trial
from fanbu.search.mixing import coefficients, mixing_space
from fanbu.search.spaces import Range, Space, check_space, space_of, with_values
from fanbu.search.tuning import Draws, Sampler, tuned

BACK = [m.name for m in methods() if m.family != "shrink"]


def test_ranges_are_around_what_is_given() -> None:
    way = method("ties", "feedback")
    assert space_of(way, {"density": 0.4})["density"] == Range(0.1, 1.0, log=True)
    assert space_of(way, {})["density"] == Range(0.05, 0.8, log=True)
    assert space_of(way, {})["scope"] == ("tensor", "model")
    assert "store" not in space_of(way, {})
    rates = space_of(method("multitask", "feedback"), {"train": {"lr": 1e-3}})
    assert rates["train.lr"] == Range(2.5e-4, 4e-3, log=True)
    momentum = space_of(method("fedavgm", "feedback"), {})["momentum"]
    assert isinstance(momentum, Range)
    assert momentum.high < 1
    over = space_of(way, {}, {"density": [0.1, 0.3], "scope": ["model"]})
    assert over == {"density": Range(0.1, 0.3, log=True), "scope": ("model",)}
    assert space_of(way, {}, {"density": ["1e-1", "3e-1"]}) == {"density": Range(0.1, 0.3, log=True)}  # YAML's 1e-1
    other = method("distill", "feedback")
    assert space_of(other, {}, {"density": [0.1, 0.3]}) == {}  # no parameter of its own
    check_space({"density": [0.1, 0.3], "train.lr": [1e-4, 1e-3]}, [way, other])
    with pytest.raises(UsageError, match="has a parameter 'densty'"):
        check_space({"densty": [0.1, 0.3]}, [way, other])
    with pytest.raises(UsageError, match="'density'"):
        check_space({"density": []}, [way])


def test_numbers_are_whole_where_the_parameter_is() -> None:
    ties, ensemble = method("ties", "feedback"), method("ensemble", "feedback")
    assert space_of(ties, {}, {"density": [0, 1]})["density"] == Range(0, 1)
    assert space_of(ties, {}, {"scale": [1, 2]})["scale"] == Range(1, 2, log=True)
    assert space_of(ensemble, {}, {"train.epochs": [1, 4]})["train.epochs"] == Range(1, 4, log=True, whole=True)
    for key, values in (("train.learning_rate", [1e-4, 1e-3]), ("combine", ["mean", "median-ish"])):
        with pytest.raises(UsageError, match="bad-parameter"):
            check_space({key: values}, [ensemble])


@pytest.mark.parametrize("name", BACK)
def test_whatever_is_drawn_is_allowed(name: str) -> None:
    way = method(name, "feedback")
    space = space_of(way, {})
    for sampler in ("random", "grid") if space else ():
        draws = Draws(space, sampler, 1)
        for values, _ in zip(draws, range(6), strict=False):
            way.check(with_values({}, values))
            draws.tell(0.0)


def test_values_take_the_place_of_arguments() -> None:
    given = {"scale": 0.3, "train": {"lr": 1e-4, "epochs": 2}}
    found = with_values(given, {"train.lr": 1e-3, "density": 0.5})
    assert found == {"scale": 0.3, "density": 0.5, "train": {"lr": 1e-3, "epochs": 2}}
    assert given["train"] == {"lr": 1e-4, "epochs": 2}


def test_coefficients_by_domain_and_depth() -> None:
    every = Range(0.25, 4.0, log=True)
    assert mixing_space(method("distill", "feedback"), ["a", "b"], by_layer=True) == {
        "weights.a": every,
        "weights.b": every,
    }
    assert mixing_space(method("multitask", "feedback"), ["a"]) == {"shares.a": every}
    around = mixing_space(method("multitask", "feedback"), ["a", "b"], given={"shares": {"b": 10.0}})
    assert around == {"shares.a": every, "shares.b": Range(2.5, 40.0, log=True)}
    assert mixing_space(method("probe", "feedback"), ["a"]) == {}
    assert mixing_space(method("distill", "feedback"), ["a"], classifies=False) == {}
    deep = mixing_space(method("average", "feedback"), ["a", "b"], by_layer=True)
    assert [*deep] == [f"weights.{d}/{i}" for d in "ab" for i in range(3)]
    drawn = coefficients({key: float(i) for i, key in enumerate(deep)})
    assert drawn == {"weights.a": [0.0, 1.0, 2.0], "weights.b": [3.0, 4.0, 5.0]}
    found = with_values({"scale": 0.5, "weights": {"b": 3.0, "c": 2.0}}, drawn)
    assert found == {"scale": 0.5, "weights": {"a": [0.0, 1.0, 2.0], "b": [3.0, 4.0, 5.0], "c": 2.0}}
    method("average", "feedback").check(found)


SPACE: Space = {"x": Range(0.01, 1.0, log=True), "n": Range(1, 8, log=True, whole=True), "word": ("a", "b")}


def tune(sampler: Sampler, budget: float = 1e9, count: int = 30, grows: bool = True) -> tuple[History, dict[str, Any]]:
    """The best is x = 0.1, n = 4, word b; a whole trial takes ten seconds."""
    asked: dict[str, Any] = {"w": {"x": 0.4, "n": 2, "word": "a"}}

    def run(name: str, share: float) -> Trial:
        v = asked[name]
        score = -abs(math.log10(v["x"]) + 1) - abs(math.log2(v["n"]) - 2) / 4 - 0.2 * (v["word"] == "a") - (1 - share)
        return Trial(name, share, score, 10 * share)

    def new(values: Mapping[str, Any]) -> str:
        asked[f"w ~{len(asked)}"] = dict(values)
        return f"w ~{len(asked) - 1}"

    history = History([run("w", 1 / 3), run("w", 1.0)] if grows else [run("w", 1.0)])
    tuned(history, "w", new, run, Draws(SPACE, sampler, 3), budget, count)
    return history, asked


@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "random", "grid"])
def test_it_finds_better_arguments_and_the_same_ones_again(sampler: Sampler) -> None:
    history, asked = tune(sampler)
    again, _ = tune(sampler)
    assert [(t.arm, t.share, t.score) for t in history.trials] == [(t.arm, t.share, t.score) for t in again.trials]
    assert history.best
    assert history.best.score > history.of("w")[-1].score + 0.4
    assert len(asked) == (19 if sampler == "grid" else 31)  # 3 * 3 * 2 points
    shares = {name: [t.share for t in history.of(name)] for name in asked}
    assert all(s in ([1 / 3], [1 / 3, 1.0]) for s in shares.values())
    assert [1 / 3] in shares.values()  # what is worse with a third is not tried with all


def test_a_grid_of_more_points_than_memory_holds() -> None:
    space: Space = {f"x{i}": Range(0.25, 4.0, log=True) for i in range(90)}
    points = [str(values) for values, _ in zip(Draws(space, "grid", 1), range(50), strict=False)]
    assert len({*points}) == 50


def test_one_that_fails_is_paid_for_as_the_winner() -> None:
    asked = ["w"]

    def run(name: str, share: float) -> Trial:
        if name == "w ~1":
            raise RuntimeError("diverged")
        return Trial(name, share, 0.1, 10 * share)

    def new(values: Mapping[str, Any]) -> str:
        asked.append(f"w ~{len(asked)}")
        return asked[-1]

    history = History([run("w", 1.0)], costs=lambda *point: {("w", 1.0): 10.0}[point])
    tuned(history, "w", new, run, Draws(SPACE, "random", 3), 100.0, 3)
    assert history.lost == 10
    assert asked == ["w", "w ~1", "w ~2", "w ~3"]
    assert "diverged" in history.left_out["w ~1"]


def test_the_budget_is_kept() -> None:
    history, _ = tune("random", budget=60.0)
    assert 40 < history.seconds <= 60
    whole, asked = tune("random", grows=False, count=5)
    assert len(asked) == 6
    assert {t.share for t in whole.trials} == {1.0}
