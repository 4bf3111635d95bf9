"""Noise of a whole owner: what crosses is so long at most, noised as asked, and written down as spent."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_recipe
from fanbu.catalogue import Method, method, methods
from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.errors import BoundaryError, FitError
from fanbu.generations import run
from fanbu.merging.noise import Shaken, noised
from fanbu.merging.summing import KNOWN, WEIGHT, Summands
from fanbu.merging.task_vector import HEAD, rows_of
from fanbu.model import Model
from fanbu.private import OwnerNoise, cost
from fanbu.recipe import load_recipe
from fanbu.tensors import Tensors
from fanbu.types import Context, Privacy

NOISED = [m for m in methods() if m.family != "shrink" and m.code.SENSITIVITY is not None]
HEADS = {"method": "fedavg", "times": 2, "learns": {"layers": "head"}, "train": {"epochs": 1}, "by_rows": False}


def vector(c: Contribution, base: Model) -> torch.Tensor:
    """All that an owner changed, as one vector."""
    labels = list(c.meta["labels"])
    numbers, start = Summands(c, base, labels, 1.0), rows_of(base).take(labels)
    parts = []
    for name in numbers.names:
        if name not in {WEIGHT, KNOWN}:
            rows = numbers[name]
            if name.startswith(HEAD):
                rows = rows - (start.weight_lh if name.endswith("weight") else start.bias_l)
            parts.append(rows.flatten())
    return torch.cat(parts)


FEW = {"fedavg", "average", "maml"}  # the others send what these do


@pytest.mark.parametrize(
    "way", [m if m.name in FEW else pytest.param(m, marks=pytest.mark.slow) for m in NOISED], ids=lambda m: m.name
)
def test_what_crosses_is_no_longer_than_its_norm(
    way: Method, specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"train": {"epochs": 1, "batch_size": 8}} if "train" in way.parameters() else {}
    sent = [way.contribute(s, incumbent, context, **arguments) for s in specialists.values()]
    length = float(vector(sent[0], incumbent).norm())
    half = [noised(c, incumbent, length / 2, 0.0, tmp_path / f"half-{c.domain}") for c in sent]
    whole = noised(sent[0], incumbent, length * 2, 0.0, tmp_path / "whole")
    torch.testing.assert_close(vector(whole, incumbent), vector(sent[0], incumbent), rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(vector(half[0], incumbent), vector(sent[0], incumbent) / 2, rtol=1e-4, atol=2e-6)
    loud = noised(sent[0], incumbent, length, 3.0, tmp_path / "loud")
    noise = vector(loud, incumbent) - vector(sent[0], incumbent)
    assert float(noise.std()) == pytest.approx(3.0, rel=0.05)
    assert abs(float(noise.mean())) < 5 * 3.0 / math.sqrt(len(noise))
    again = noised(sent[0], incumbent, length, 3.0, tmp_path / "again")
    assert not torch.equal(vector(again, incumbent), vector(loud, incumbent))
    way.absorb(incumbent, half, tmp_path / "new", context, **arguments)
    assert any(not torch.equal(Tensors(tmp_path / "new")[n], t) for n, t in Tensors(incumbent.path).items())


def test_the_noise_of_a_sum_is_that_of_its_parts() -> None:
    privacy = Privacy(epsilon=4.0, delta=1e-5, norm=0.5)
    alone, once, shared = OwnerNoise(privacy, 3, 0), OwnerNoise(privacy, 1, 0), OwnerNoise(privacy, 3, 2, 16)
    assert alone.each == shared.each
    assert cost([alone.each] * 3, 1e-5) == pytest.approx(4.0, rel=0.01)
    assert once.deviation < alone.deviation == pytest.approx(2 * 0.5 * alone.each.noise)
    assert shared.deviation * math.sqrt(15) == pytest.approx(2 * 0.5 * shared.each.noise)  # all but one are enough
    assert OwnerNoise.of(json.loads(json.dumps(shared.as_dict()))) == shared
    # classic bound of the Gaussian mechanism, which is looser: sigma = sqrt(2 log(1.25/delta)) / epsilon at epsilon < 1
    tight = OwnerNoise(Privacy(epsilon=0.9, delta=1e-5), 1, 0)
    assert 0.7 < tight.each.noise / (math.sqrt(2 * math.log(1.25e5)) / 0.9) < 1.0


def test_every_number_of_a_sum_has_the_noise_of_all(
    specialists: dict[str, Specialist], incumbent: Model, context: Context
) -> None:
    """Also the label rows that one owner alone knows: its own share would not hide it there."""
    way = method("fedavg")
    labels = sorted(incumbent.labels)
    sums: dict[str, torch.Tensor] = {}
    for s in specialists.values():
        sent = way.contribute(s, incumbent, context, train={"epochs": 1, "batch_size": 8})
        numbers = Summands(sent, incumbent, labels, 1.0)
        shaken = Shaken(numbers, 3.0)
        for name in shaken.names:
            noise = shaken[name] - numbers[name]
            sums[name] = sums.get(name, torch.zeros_like(noise)) + noise
    for name, noise in sums.items():
        if name in {WEIGHT, KNOWN}:
            assert not noise.any()
        elif noise.numel() > 50:
            assert float(noise.std()) == pytest.approx(3.0 * math.sqrt(len(specialists)), rel=0.35), name
        if name.startswith(HEAD):
            assert (noise.reshape(len(labels), -1) != 0).all()


@pytest.mark.parametrize("secure", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_round_with_noise_says_what_was_spent(secure: bool, tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path)
    noise = {"epsilon": 4.0, "norm": 0.1}
    value |= {"references": [], "feedback": {**HEADS, "noise": noise, **({"secure": True} if secure else {})}}
    record = run(load_recipe(value))
    sent = [c for c in record["domains"]["food"]["crossed"] if c["what"].endswith("contribution") and "epsilon" in c]
    assert len(sent) == 2
    assert sent[1]["epsilon"] == pytest.approx(4.0, rel=0.02)
    assert sent[0]["epsilon"] < sent[1]["epsilon"]
    spent = json.loads((Path(record["workspace"]) / "privacy" / "food.json").read_text())
    assert len(spent) == 2
    assert record["recipe"]["feedback"]["noise"]["epsilon"] == 4.0
    value["domains"]["food"]["share"] = {"budget": {"epsilon": 2.0}}
    value["workspace"] = str(tmp_path / "poor")
    with pytest.raises(BoundaryError, match="would have spent"):
        run(load_recipe(value))


@pytest.mark.parametrize(
    ("step", "why"),
    [
        ({"method": "ties"}, "no form with noise"),
        ({"method": "scaffold", "times": 2}, "no form with noise"),
        ({**HEADS, "noise": {"epsilon": 0.0}}, "no form with noise"),
        ({**HEADS, "learns": {"layers": "head", "privacy": {"epsilon": 1.0}}}, "without other noise"),
        ({**HEADS, "by_rows": True, "secure": True}, "count alike"),
    ],
)
def test_where_noise_hides_nobody_it_is_refused(step: dict[str, Any], why: str, tmp_path: Path) -> None:
    value = {**tiny_recipe(tmp_path), "references": [], "feedback": {"noise": {"epsilon": 4.0}, **step}}
    with pytest.raises(FitError, match=why):
        run(load_recipe(value))
