"""Zeros: as many as asked for, where they should be, kept through training; SparseGPT loses least."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fanbu.catalogue import method
from fanbu.domain import Specialist
from fanbu.errors import FitError
from fanbu.merging.gram import columns, linear_layers
from fanbu.model import load_network
from fanbu.shrink._sparse import Way, _check, kept, pruned
from fanbu.shrink._units import inner_layers
from fanbu.types import Context

WAYS: list[Way] = ["magnitude", "wanda", "sparsegpt"]


def inputs(width: int, seed: int = 0) -> torch.Tensor:
    """[500, width], correlated, of different sizes."""
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(500, width, generator=g) @ torch.randn(width, width, generator=g) * torch.rand(width, generator=g)
    )


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.5])
def test_as_many_zeros_as_asked_for(how: Way, share: float) -> None:
    torch.manual_seed(0)
    x, weight = inputs(200), torch.randn(40, 200)
    new = pruned(weight, x.T @ x / len(x), how, share, None)
    assert float((new == 0).float().mean()) == pytest.approx(share, abs=0.005)
    if share == 0:
        torch.testing.assert_close(new, weight, rtol=1e-6, atol=1e-6)
    if how != "sparsegpt":
        assert set(new.flatten().tolist()) <= {0.0, *weight.flatten().tolist()}


@pytest.mark.parametrize("how", WAYS)
def test_two_of_every_four_stay(how: Way) -> None:
    torch.manual_seed(0)
    x, weight = inputs(140), torch.randn(24, 140)
    new = pruned(weight, x.T @ x / len(x), how, 0.5, (2, 4))
    assert ((new.reshape(24, 35, 4) != 0).sum(2) == 2).all()


@pytest.mark.parametrize("pattern", [None, (2, 4)])
def test_each_way_loses_less_than_the_plainer_one(pattern: Any) -> None:
    torch.manual_seed(0)
    x, weight = inputs(160), torch.randn(64, 160)
    lost = [
        float((x @ (pruned(weight, x.T @ x / len(x), how, 0.5, pattern) - weight).T).square().mean()) for how in WAYS
    ]
    assert lost[2] < lost[1] < lost[0]


def test_sparsegpt_with_one_column_to_drop_is_the_least_squares_answer() -> None:
    """Dropping the last column cannot be repaired; dropping the first is, by all others (OBS, Hassibi and Stork)."""
    torch.manual_seed(0)
    x, weight = inputs(12).double(), torch.randn(1, 12).double()
    weight[0, 0] = 1e-3  # the one that goes
    gram = x.T @ x / len(x)
    new = pruned(weight, gram, "sparsegpt", 1 / 12, None).double()
    assert new[0].nonzero().flatten().tolist() == list(range(1, 12))
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(12).double()
    inverse = torch.linalg.inv(damped)
    want = weight[0] - weight[0, 0] / inverse[0, 0] * inverse[0]
    torch.testing.assert_close(new[0, 1:], want[1:], rtol=1e-6, atol=1e-9)


def test_inputs_that_never_were_anything_do_no_harm() -> None:
    x, weight = inputs(16), torch.randn(4, 16)
    x[:, 3] = 0
    new = pruned(weight, x.T @ x / len(x), "sparsegpt", 0.5, None)
    assert new.isfinite().all()
    assert (new[:, 3] == 0).all()


def test_the_highest_scores_stay() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 2.0], [9.0, 8.0, 7.0, 6.0]])
    assert kept(scores, 0.5, None, whole=True).tolist() == [[False] * 4, [True] * 4]
    assert kept(scores, 0.5, None, whole=False).tolist() == [[False, True, True, False], [True, True, False, False]]


@pytest.mark.parametrize("way", ["unstructured", "semi_structured"])
def test_training_leaves_zeros_where_they_are(
    way: str, specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    s = specialists["food"]
    shrink = method(way, "shrink").shrink
    bare = shrink(s.model, s.domain, tmp_path / "bare", context)
    train = {"epochs": 2, "lr": 3e-3, "batch_size": 8}
    made = shrink(s.model, s.domain, tmp_path / "tuned", context, train=train)
    before, after = (load_network(m) for m in (bare, made))
    names, moved = inner_layers(before), 0.0
    assert names
    assert not [n for n in names if "embed" in n or "classifier" in n or "pooler" in n]
    for name in names:
        a, b = (columns(linear_layers(n)[name]) for n in (before, after))
        assert torch.equal(a == 0, b == 0)
        moved += float((a - b).abs().sum())
    assert moved > 0
    assert made.manifest["metrics"]["zeros"] == pytest.approx(0.5, abs=0.03)
    assert made.parameters == s.model.parameters


def test_inputs_that_do_not_come_in_fours_are_refused() -> None:
    network = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(6, 4)])})
    with pytest.raises(FitError, match=r"layers\.0\.weight do not come in groups of 4.*remedy") as caught:
        _check(network, 4)
    assert caught.value.code == "not-in-groups"
