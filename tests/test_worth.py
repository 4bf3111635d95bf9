"""What each specialist was worth: parts of games that are known, and of a round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import open_gate, tiny_recipe
from fanbu.errors import UsageError
from fanbu.generations import run
from fanbu.recipe import load_recipe
from fanbu.search.compare import compare
from fanbu.search.shares import Floats, Value, leave_one_out, shapley
from fanbu.search.worth import worth
from test_cli import Command
from test_cli import fanbu as fanbu

FIVE = tuple("abcde")


def game(rows: int = 400, noise: float = 0.3) -> Value:
    """Five players over two domains: a and its copy b bring 0.2 together or alone, c 0.1, d brings 0.1 where c is, e
    loses 0.15."""
    rng = np.random.default_rng(0)
    spread = {d: rng.normal(0, noise, (5, rows)) for d in ("x", "y")}

    def value(chosen: frozenset[str]) -> Mapping[str, Floats]:
        mean = 0.2 * bool(chosen & set("ab")) + 0.1 * ("c" in chosen) + 0.1 * ({"c", "d"} <= chosen)
        mean -= 0.15 * ("e" in chosen)
        here = [i for i, player in enumerate(FIVE) if player in chosen]
        return {d: mean + s[here].sum(0) - s[here].mean(1).sum() if here else np.zeros(rows) for d, s in spread.items()}

    return value


def test_shares_of_a_known_game() -> None:
    parts = shapley(FIVE, game(), 0, seed=0)
    wanted = {"a": 0.1, "b": 0.1, "c": 0.15, "d": 0.05, "e": -0.15}
    for player, value in wanted.items():
        assert parts[player].value == pytest.approx(value)
        assert parts[player].low < value < parts[player].high
    assert sum(p.value for p in parts.values()) == pytest.approx(0.2 + 0.1 + 0.1 - 0.15)
    assert parts["e"].high < 0
    alone = leave_one_out(FIVE, game())
    assert alone["a"].value == pytest.approx(0)  # its copy does for it
    assert alone["c"].value == pytest.approx(0.2)


def test_drawn_orders_agree_with_all_of_them() -> None:
    exact = shapley(FIVE, game(), 0, seed=0)
    near = 0
    for seed in range(20):
        drawn = shapley(FIVE, game(), 6, seed=seed)
        assert sum(p.value for p in drawn.values()) == pytest.approx(sum(p.value for p in exact.values()))
        near += sum(drawn[p].low <= exact[p].value <= drawn[p].high for p in FIVE)
    assert near >= 0.9 * 100
    assert shapley(FIVE, game(), 6, seed=3) == shapley(tuple(reversed(FIVE)), game(), 6, seed=3)
    assert shapley(FIVE, game(), 60, seed=0) == exact  # as many as there are
    with pytest.raises(UsageError, match="too-many-orders"):
        shapley(tuple("abcdef"), game(), 0, seed=0)


@pytest.mark.parametrize("pairs", [2, 3, 8])
def test_intervals_of_few_orders_are_as_wide_as_orders_differ(pairs: int) -> None:
    """Eight players who add more together, and no noise of rows."""
    players = tuple("abcdefgh")
    rng = np.random.default_rng(1)
    pull = np.triu(rng.normal(0, 1, (8, 8)))

    def value(chosen: frozenset[str]) -> Mapping[str, Floats]:
        here = [players.index(p) for p in chosen]
        return {"x": np.full(2, pull[np.ix_(here, here)].sum() ** 3 / 100)}

    exact = shapley(players, value, 4000, seed=0)
    inside = []
    for seed in range(1, 16):
        parts = shapley(players, value, pairs, seed=seed)
        inside += [parts[p].low <= exact[p].value <= parts[p].high for p in players]
    assert np.mean(inside) > 0.85
    with pytest.raises(UsageError, match="one pair"):
        shapley(players, value, 1, seed=0)


def test_harm_is_found_as_one_of_many() -> None:
    rng = np.random.default_rng(2)
    rows = rng.normal(-0.025, 0.25, 400)
    rows += -0.025 - rows.mean()  # two standard errors below 0

    def value(chosen: frozenset[str]) -> Mapping[str, Floats]:
        return {"x": rows * ("a" in chosen)}

    few, many = leave_one_out(("a",), value)["a"], leave_one_out(tuple("abcdefghij"), value)["a"]
    assert few.harmful
    assert many.high == few.high < 0
    assert not many.harmful


def test_sums_and_noise_are_not_asked_for_again(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path) | {"references": []}
    for step in (
        {"method": "fedavg", "secure": True},
        {"method": "fedavg", "learns": {"privacy": {"epsilon": 8.0}}},
        {"method": "average", "noise": {"epsilon": 4.0}},
    ):
        with pytest.raises(UsageError, match="no-worth"):
            worth(load_recipe({**value, "feedback": step}))


def test_each_set_is_asked_for_once_where_it_is_kept() -> None:
    asked: list[frozenset[str]] = []
    known: dict[frozenset[str], Mapping[str, Floats]] = {}
    whole = game()

    def value(chosen: frozenset[str]) -> Mapping[str, Floats]:
        if chosen not in known:
            asked.append(chosen)
            known[chosen] = whole(chosen)
        return known[chosen]

    shapley(FIVE, value, 0, seed=0)
    assert len(asked) == 2**5


def test_a_round(fanbu: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = tiny_recipe(tmp_path) | {"references": [], "feedback": {"method": "average"}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match="no-rounds"):
        worth(load_recipe(path))
    with open_gate():
        record = run(load_recipe(path))
    found = worth(load_recipe(path), 0)
    assert found["sets"] == 4  # nobody, each, both
    assert found["whole"] == pytest.approx(record["verdict"]["average"]["delta"])
    assert sum(p["value"] for p in found["shapley"].values()) == pytest.approx(found["whole"])
    kept = json.loads((tmp_path / "ws" / "worth" / "1.json").read_text())
    assert kept["left_out"] == found["left_out"]

    def again(*_: Any, **__: Any) -> None:
        pytest.fail("made again")

    monkeypatch.setattr("fanbu.catalogue.Method.absorb", again)
    code, text = fanbu("worth", str(path), "--shapley", "0")
    assert code == 0
    assert "Shapley value" in text
    with pytest.raises(UsageError, match="other-recipe"):
        worth(load_recipe(path, ["feedback={method: ties}"]))


def test_a_round_whose_way_a_comparison_chose(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path) | {"references": []}  # which distils
    value["compare"] = {"ways": ["average", {"method": "task_arithmetic", "scale": 0.7}], "runs": 1, "known": False}
    with open_gate():
        winner = compare(load_recipe(value))["winner"]
    assert worth(load_recipe(value))["way"] == winner


def test_a_set_without_a_source_of_the_targets_industry_teaches_nothing(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path) | {"references": []}
    rail = value["domains"].pop("rail")
    value["domains"]["rail@east"] = rail
    texts = tmp_path / "west.jsonl"
    texts.write_text("".join(json.dumps({"text": f"the late train number {i}"}) + "\n" for i in range(30)))
    value["guards"] = {"rail@west": {"test": rail["test"], "unlabelled": str(texts)}}
    value["feedback"] = {"method": "adapt", "train": {"epochs": 1, "batch_size": 8}}
    with open_gate():
        run(load_recipe(value))
    found = worth(load_recipe(value), 0)
    alone = found["shapley"]["food"]["value"] + found["shapley"]["rail@east"]["value"]
    assert alone == pytest.approx(found["whole"])
