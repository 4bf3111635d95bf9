"""Differential privacy at the owner: what it costs, what one row can do, and where it is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn

from conftest import tiny_recipe
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import BoundaryError, UsageError
from fanbu.generations import run
from fanbu.heads import domains_of
from fanbu.merging.task_vector import HEAD, head_tensors, rows_of
from fanbu.model import Model
from fanbu.private import Mechanism, cost, noise_for, spend, train_privately
from fanbu.recipe import load_recipe
from fanbu.types import Context, Inner, Privacy, Train

PLAN = Train(
    epochs=1, batch_size=8, lr=1.0, head_lr=1.0, optimizer="SGD", weight_decay=0.0, warmup=0.0, schedule="constant"
)


def epsilon_by_hand(noise: float, rate: float, steps: int, delta: float) -> float:
    """A second implementation: whole orders alone, by the binomial sum of Mironov et al. 2019, in logarithms."""
    best = math.inf
    for order in range(2, 256):
        terms = [
            math.lgamma(order + 1) - math.lgamma(k + 1) - math.lgamma(order - k + 1)
            + (order - k) * math.log1p(-rate) + k * math.log(rate) + (k * k - k) / (2 * noise**2)
            for k in range(order + 1)
        ]  # fmt: skip
        top = max(terms)
        rdp = steps * (top + math.log(sum(math.exp(term - top) for term in terms))) / (order - 1)
        found = rdp + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)
        best = min(best, found)
    return best


@pytest.mark.parametrize(
    ("noise", "rate", "steps"), [(1.1, 0.01, 10_000), (4.0, 0.1, 500), (2.0, 0.05, 300), (8.0, 0.5, 100)]
)
def test_two_accountants_agree(noise: float, rate: float, steps: int) -> None:
    by_hand = epsilon_by_hand(noise, rate, steps, 1e-5)
    assert cost([Mechanism(noise, rate, steps)], 1e-5) == pytest.approx(by_hand, rel=0.01)
    half = Mechanism(noise, rate, steps // 2)
    assert cost([half, half], 1e-5) == pytest.approx(by_hand, rel=0.01)


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 8.0])
def test_noise_costs_what_was_asked_for(epsilon: float) -> None:
    noise = noise_for(Privacy(epsilon), 0.1, 200)
    assert 0.98 * epsilon < cost([Mechanism(noise, 0.1, 200)], 1e-5) <= epsilon
    assert cost([], 1e-5) == 0


def summed(rows: Tensor, privacy: Privacy) -> Tensor:
    """Where one step on all rows moves one weight vector by the loss <w, x>."""
    layer = nn.Linear(rows.shape[1], 1, bias=False)
    nn.init.zeros_(layer.weight)
    plan = replace(PLAN, batch_size=len(rows))

    def loss(network: Any, chosen: Any) -> Tensor:
        return network(rows[list(chosen)]).mean()

    made = train_privately(layer, len(rows), loss, plan, Context(), "test", privacy)
    assert (made.rate, made.steps) == (1.0, 1)
    return layer.weight.detach()[0]


def test_one_row_moves_no_more_than_the_norm_allows() -> None:
    rows = torch.randn(10, 4)
    far = rows.clone()
    far[3] = 1e6
    one, other = (summed(r, Privacy(epsilon=1e6, norm=0.5)) for r in (rows, far))
    assert float((one - other).norm()) <= 2 * 0.5 / 10 + 0.05
    expected = -(rows * (0.5 / rows.norm(dim=1, keepdim=True)).clamp_max(1)).sum(0) / 10
    torch.testing.assert_close(one, expected, atol=0.05, rtol=0)


def test_noise_is_as_large_as_promised_and_not_the_seed_s() -> None:
    rows, privacy = torch.zeros(10, 4000), Privacy(epsilon=2.0)
    one, other = summed(rows, privacy), summed(rows, privacy)
    assert not torch.equal(one, other)
    wanted = noise_for(privacy, 1.0, 1) / 10
    assert float(one.std()) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("layers", ["head", pytest.param("lora", marks=pytest.mark.slow)])
def test_an_update_says_what_it_cost_so_far(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, layers: str
) -> None:
    food, way, said = Specialist(incumbent, domains["food"], incumbent), method("fedavg"), []
    train, privacy = {"epochs": 1, "batch_size": 16, "lr": 1e-3, "head_lr": 1e-2}, {"epsilon": 4.0}
    for number in range(3):
        inner = replace(context, inner=Inner(number, of=3))
        sent = way.contribute(
            food, incumbent, inner, train=train, learns={"layers": layers, "privacy": privacy, "rank": 2}
        )
        said.append(sent.epsilon)
    assert said == sorted(said)
    assert said[0] < said[2] <= 4.0
    assert said[2] > 3.9
    assert sent.meta["privacy"]["delta"] == 1e-5
    new = way.absorb(incumbent, [sent], tmp_path / "new", context)
    assert set(new.labels) == set(incumbent.labels)
    assert moved(sent, incumbent) > 0
    plain = way.contribute(food, incumbent, context, train=train, learns={"layers": layers, "rank": 2})
    assert plain.epsilon is None
    assert "privacy" not in plain.meta


def moved(sent: Contribution, base: Model) -> float:
    rows = rows_of(base).take(sent.meta["labels"])
    return float((sent.tensors[HEAD + head_tensors(base)[0]] - rows.weight_lh).norm())


def test_privacy_is_refused_where_it_cannot_be_kept(
    incumbent: Model, domains: dict[str, Domain], context: Context
) -> None:
    food = Specialist(incumbent, domains["food"], incumbent)
    assert domains_of(incumbent.labels)["food"]
    with pytest.raises(UsageError, match="lora or head"):
        method("fedavg").contribute(food, incumbent, context, learns={"privacy": {"epsilon": 1.0}})
    for wrong in (
        {"epsilon": -1.0},
        {"epsilon": math.inf},
        {"epsilon": 1.0, "delta": 0.0},
        {"epsilon": 1.0, "norm": 0.0},
    ):
        with pytest.raises(UsageError, match="privacy"):
            method("fedavg").contribute(food, incumbent, context, learns={"layers": "head", "privacy": wrong})
    one = replace(domains["food"].train, ids=("1",), texts=("soup",), labels=(0,))
    with pytest.raises(UsageError, match="hidden among others"):
        method("fedavg").contribute(
            replace(food, domain=replace(domains["food"], train=one)), incumbent, context,
            learns={"layers": "head", "privacy": {"epsilon": 1.0}},
        )  # fmt: skip


def test_a_budget_is_kept_over_all_that_was_spent(tmp_path: Path) -> None:
    ledger, each = tmp_path / "privacy" / "food.json", Mechanism(4.0, 0.1, 100)
    sent = Contribution("updates", "food", "fedavg", meta={"privacy": {**each.as_dict(), "delta": 1e-5, "norm": 1.0}})
    one, two = cost([each], 1e-5), cost([each, each], 1e-5)
    budget = (two + 1e-3, 1e-5)
    spend(ledger, "first", sent, budget)
    spend(ledger, "first", sent, budget)  # cut off before it crossed, and made again
    spend(ledger, "second", sent, budget)
    before = ledger.read_text()
    assert one < two
    with pytest.raises(BoundaryError, match="spent"):
        spend(ledger, "third", sent, budget)
    assert ledger.read_text() == before
    spend(ledger, "third", sent, None)
    spend(ledger, "plain", Contribution("updates", "food", "fedavg"), budget)
    assert len(json.loads(ledger.read_text())) == 3


@pytest.mark.slow
def test_a_round_beyond_the_budget_ends_before_anything_crosses(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path)
    name = next(iter(value["domains"]))
    value["domains"][name]["share"] = {"budget": {"epsilon": 3.0}}
    value["feedback"] = {
        "method": "fedavg", "times": 2, "learns": {"layers": "head", "privacy": {"epsilon": 2.0}},
        "train": {"epochs": 1, "batch_size": 32, "head_lr": 1e-2},
    }  # fmt: skip
    value["references"] = []
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(value))
    record = run(load_recipe(tmp_path / "recipe.yaml"))
    costs = [c["epsilon"] for c in record["domains"][name]["crossed"] if "epsilon" in c]
    assert len(costs) == 2
    assert costs[0] < costs[1] <= 2.0
    with pytest.raises(BoundaryError, match="over all rounds"):
        run(load_recipe(tmp_path / "recipe.yaml", ["rounds=2", "seed=1", "feedback.learns.privacy.epsilon=2.5"]))
    ledger = json.loads((tmp_path / "ws" / "privacy" / f"{name}.json").read_text())
    assert cost([Mechanism(**m) for m in ledger.values()], 1e-5) <= 3.0
