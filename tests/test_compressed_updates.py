"""Updates made smaller: what is left out comes later, and what does not fit is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution, write_contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import FitError
from fanbu.merging.sources import source_of
from fanbu.merging.sparse import PLACES, SPARSE, VALUES, Scattered, Sparse
from fanbu.merging.task_vector import body_shapes
from fanbu.model import Model
from fanbu.tensors import Tensors
from fanbu.types import Context, Inner

FAST = {"epochs": 1, "lr": 3e-3, "head_lr": 1e-2, "batch_size": 8}


def changes(sent: Contribution, base: Model) -> dict[str, Tensor]:
    """What a contribution says of each matrix of the body."""
    shapes, found = body_shapes(base), {}
    source, start = source_of(sent, shapes), Tensors(base.path)
    for name, shape in shapes.items():
        if len(shape) > 1:
            found[name] = torch.empty(shape)
            source.rows(name, 0, shape[0], start[name].float(), found[name])
    return found


def test_the_largest_hundredth_and_nothing_else(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exact = {"a": torch.randn(30, 50), "b": torch.randn(7), "head:w": torch.randn(2, 3)}
    sent = Contribution("updates", "food", "fedavg", Sparse(exact), meta={"form": SPARSE})
    write_contribution(sent, tmp_path / "sent")
    arrived = open_contribution(tmp_path / "sent")
    assert arrived.digest == sent.digest
    source = Scattered(arrived, {"a": (30, 50), "b": (7,)})
    assert source.names == {"a", "b"}
    whole, half, vector = torch.empty(30, 50), torch.empty(10, 50), torch.empty(7)
    source.rows("a", 0, 30, whole, whole)
    source.rows("a", 10, 20, half, half)
    source.rows("b", 0, 7, vector, vector)
    kept = exact["a"].abs() >= exact["a"].abs().flatten().sort().values[-15]
    assert torch.equal(whole, exact["a"] * kept)
    assert torch.equal(half, whole[10:20])
    assert torch.equal(vector, exact["b"])
    assert torch.equal(arrived.tensors["head:w"], exact["head:w"])


@pytest.mark.parametrize(
    "change",
    [
        {PLACES + "a": torch.tensor([0, 100], dtype=torch.int32)},
        {PLACES + "a": torch.tensor([5, 5], dtype=torch.int32)},
        {PLACES + "a": torch.tensor([-1, 5], dtype=torch.int32)},
        {PLACES + "a": torch.tensor([3.0, 9.0])}, {VALUES + "a": torch.zeros(3)}, {VALUES + "a": None},
        {VALUES + "a": torch.zeros(2, 1)},
    ],
    ids=str,
)  # fmt: skip
def test_places_that_are_none_are_refused(change: dict[str, Any]) -> None:
    good = {PLACES + "a": torch.tensor([3, 9], dtype=torch.int32), VALUES + "a": torch.ones(2)}
    sent = {n: t for n, t in {**good, **change}.items() if t is not None}
    c = Contribution("updates", "food", "fedavg", sent, meta={"form": SPARSE})
    with pytest.raises(FitError, match="do not fit"):
        Scattered(c, {"a": (10, 10)})
    assert Scattered(replace(c, tensors=good), {"a": (10, 10)}).names == {"a"}


@pytest.mark.parametrize("store", ["int8", "1bit", "topk"])
def test_what_is_left_out_is_sent_later(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, store: str
) -> None:
    food, way, train = Specialist(incumbent, domains["food"], incumbent), method("fedavg"), FAST
    total, exact, before = {}, {}, None
    for number in range(3):
        inner = Inner(0, before, tmp_path / str(number))  # the same inner round again: the same training
        sent = way.contribute(food, incumbent, replace(context, inner=inner), train=train, learns={"store": store})
        plain = way.contribute(food, incumbent, context, train=train)
        for name, change in changes(sent, incumbent).items():
            total[name] = total.get(name, 0) + change
        for name, change in changes(plain, incumbent).items():
            exact[name] = exact.get(name, 0) + change
        before = tmp_path / str(number)
    left = Tensors(before / "left.safetensors") if before else {}
    assert set(left) == set(total)
    for name, change in total.items():
        torch.testing.assert_close(change + left[name], exact[name], rtol=1e-4, atol=1e-6)
    assert any(float(left[name].norm()) > 0 for name in left)
    once = changes(way.contribute(food, incumbent, context, train=train, learns={"store": store}), incumbent)

    def off(found: dict[str, Tensor], count: int) -> float:
        return sum(float((exact[n] / 3 * count - found[n]).norm()) ** 2 for n in found) ** 0.5 / count

    if store != "1bit":  # signs leave more behind in three rounds than they make up for
        assert off(total, 3) < off(once, 1)
    new = way.absorb(incumbent, [sent], tmp_path / "new", context)
    assert new.digest != incumbent.digest
