"""Elementwise ways of merging against plain formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.errors import FitError, UsageError
from fanbu.merging.elementwise import by_rank, drop, elect
from fanbu.merging.store import loss, pack, row_scales, unpack
from fanbu.model import Model, open_model
from fanbu.tensors import Tensors
from fanbu.types import Context
from test_engine import sent, variant

Formula = Callable[[Tensor, Tensor], Tensor]  # of the base [n] and the deltas [N, n]: the change


@pytest.fixture(scope="module")
def family(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, list[Contribution]]:
    folder = tmp_path_factory.mktemp("family")
    base = open_model(llama)
    return base, sent(base, *(variant(llama, folder / f"s{i}", i) for i in range(3)))


def check(name: str, family: tuple[Model, list[Contribution]], out: Path, formula: Formula, **settings: Any) -> None:
    base, contributions = family
    made = method(name).absorb(base, contributions, out, Context(threads=1), **settings)
    new, old = Tensors(made.path), Tensors(base.path)
    for tensor in old:
        deltas = torch.stack([c.tensors[tensor].double().flatten() for c in contributions])
        expected = formula(old[tensor].double().flatten(), deltas)
        got = new[tensor].double().flatten() - old[tensor].double().flatten()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-6, msg=lambda m, t=tensor: f"{t}: {m}")
    assert len(new) == len(old)


def ranks(values: Tensor) -> Tensor:
    """0 for the largest."""
    return values.argsort(dim=1, descending=True).argsort(dim=1)


def test_karcher(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    def formula(base: Tensor, deltas: Tensor) -> Tensor:
        full = base + deltas
        lengths = full.norm(dim=1)
        units = full / lengths[:, None]
        u = units.mean(0) / units.mean(0).norm()
        for _ in range(60):
            angles = (units @ u).clamp(-1, 1).acos()
            tangent = ((angles / angles.sin())[:, None] * (units - (units @ u)[:, None] * u)).mean(0)
            step = tangent.norm()
            u = step.cos() * u + step.sin() * tangent / step if step > 1e-12 else u
        return u * lengths.mean() - base

    check("karcher", family, tmp_path / "out", formula, steps=50, tolerance=1e-12)


def test_slerp_of_two_and_of_one(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    def between(a: Tensor, b: Tensor, t: float) -> Tensor:
        cosine = float(a @ b / a.norm() / b.norm())
        if cosine > 0.9995:
            return (1 - t) * a + t * b
        angle = math.acos(cosine)
        return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)

    base, all_three = family
    check("slerp", (base, all_three[:2]), tmp_path / "2", lambda b, d: between(b + d[0], b + d[1], 0.3) - b, t=0.3)
    check("slerp", (base, all_three[:1]), tmp_path / "1", lambda b, d: between(b, b + d[0], 0.3) - b, t=0.3)
    with pytest.raises(FitError, match=r"between two.*got: 3.*karcher"):
        method("slerp").absorb(base, all_three, tmp_path / "3", Context())


def test_model_stock(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    def formula(base: Tensor, deltas: Tensor) -> Tensor:
        units = deltas / deltas.norm(dim=1, keepdim=True)
        cosine = float(((units @ units.T).sum() - 3) / 6)
        return max(0.0, 3 * cosine / (1 + 2 * cosine)) * deltas.mean(0)

    check("model_stock", family, tmp_path / "out", formula)


def test_nearswap(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    def formula(base: Tensor, deltas: Tensor) -> Tensor:
        return (deltas * (0.005 / deltas.abs().clamp(min=1e-30)).clamp(max=1)).mean(0)

    check("nearswap", family, tmp_path / "out", formula, t=0.005)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.6])
def test_breadcrumbs(gamma: float, family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    def formula(base: Tensor, deltas: Tensor) -> Tensor:
        count = deltas.shape[1]
        share = min(gamma, 1 - 0.5)
        top = max(1, int(share * count + 1e-9)) if share else 0
        kept = (ranks(deltas.abs()) >= top) & (ranks(deltas.abs()) < max(1, int((share + 0.5) * count + 1e-9)))
        return 0.7 * (deltas * kept).sum(0)

    check("breadcrumbs", family, tmp_path / "out", formula, density=0.5, gamma=gamma, scale=0.7)


def test_consensus(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    def formula(base: Tensor, deltas: Tensor) -> Tensor:
        total = deltas.sum(0)
        wanted = (deltas.abs() >= 0.6 * (total - deltas).abs()).sum(0) >= 2
        return 0.5 * total * wanted

    check("consensus", family, tmp_path / "out", formula, threshold=0.6, scale=0.5)


def test_magmax(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    check(
        "magmax", family, tmp_path / "out",
        lambda b, d: 0.5 * d.gather(0, d.abs().argmax(0, keepdim=True))[0], scale=0.5,
    )  # fmt: skip


@pytest.mark.parametrize("density", [0.3, 1.0])
def test_pcb(density: float, family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    def formula(base: Tensor, deltas: Tensor) -> Tensor:
        within = (3 * (deltas.abs() / deltas.abs().amax(1, keepdim=True)).square()).exp()
        score = within * (deltas * deltas.sum(0)).tanh()
        limit = torch.zeros(3, 1).double()
        if density < 1:
            keep = max(1, int(density * deltas.shape[1]))
            limit = score.sort(dim=1, descending=True).values[:, keep - 1 : keep].clamp(min=0)
        won = (score - limit).clamp(min=0)
        weight = won.sum(0)
        return (won * deltas).sum(0) / torch.where(weight == 0, 1.0, weight)

    base, contributions = family
    made = method("pcb").absorb(base, contributions, tmp_path / "out", Context(threads=1), density=density)
    new, old = Tensors(made.path), Tensors(base.path)
    for name in old:
        deltas = torch.stack([c.tensors[name].double().flatten() for c in contributions])
        got = new[name].double().flatten() - old[name].double().flatten()
        # a number at the edge of winning may fall on either side in float32
        apart = (got - formula(old[name].double().flatten(), deltas)).abs() > 1e-4 * deltas.abs().max()
        assert apart.double().mean() < 0.01


def test_what_dare_keeps_is_what_it_was_in_the_mean(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    base, contributions = family
    made = method("dare").absorb(base, contributions[:1], tmp_path / "out", Context(), density=0.25)
    for name, new in Tensors(made.path).items():
        delta, got = contributions[0].tensors[name], new - Tensors(base.path)[name]
        kept = got.abs() > 1e-7
        if delta.numel() > 1000:
            assert 0.2 < kept.float().mean() < 0.3
        torch.testing.assert_close(got[kept], 4 * delta[kept], rtol=1e-3, atol=1e-5)
    other = method("dare").absorb(base, contributions[:1], tmp_path / "other", Context(seed=1), density=0.25)
    assert other.files != made.files


def test_della_drops_small_changes_more_often() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(200, 100, generator=generator)
    keep = by_rank(delta, 0.5, 0.3)
    assert isinstance(keep, Tensor)
    assert float(keep.min()) == pytest.approx(0.2)
    assert float(keep.max()) == pytest.approx(0.8)
    assert torch.equal(keep.argsort(1), delta.abs().argsort(1))
    before = delta.clone()
    after = drop(delta, keep.clone(), generator)
    small, large = (before.abs() < 0.3), (before.abs() > 1.5)
    assert (after[small] != 0).float().mean() < 0.35 < 0.65 < (after[large] != 0).float().mean()
    kept = after != 0
    torch.testing.assert_close(after[kept], (before / keep)[kept])


def test_della_with_an_epsilon_that_leaves_no_chance(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"epsilon.*0 to 0.2 at density 0.8.*got: 0.3"):
        method("della").absorb(*family, tmp_path / "out", Context(), density=0.8, epsilon=0.3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["ties", "dare", "della", "breadcrumbs", "pcb"])
def test_a_density_that_is_none(name: str, family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"density; allowed: 0 to 1; got: 1.5"):
        method(name).absorb(*family, tmp_path / "out", Context(), density=1.5)
    assert not (tmp_path / "out").exists()


def test_signs_are_elected_by_weight() -> None:
    deltas = [torch.tensor([1.0, 1.0, 0.0, -2.0]), torch.tensor([-2.0, 3.0, 0.0, -4.0])]
    assert elect([d.clone() for d in deltas], [1.0, 1.0]).tolist() == [-2.0, 2.0, 0.0, -3.0]
    assert elect([d.clone() for d in deltas], [3.0, 1.0]).tolist() == [1.0, 1.5, 0.0, -2.5]
    assert elect([d.clone() for d in deltas], [1.0, 1.0], normalise=False).tolist() == [-2.0, 4.0, 0.0, -6.0]
    # a weight below 0 turns the sign that counts
    assert elect([d.clone() for d in deltas], [1.0, -1.0], normalise=False).tolist() == [3.0, -3.0, 0.0, 4.0]


def test_eight_bits_and_one_bit() -> None:
    torch.manual_seed(0)
    delta = torch.randn(64, 77) * torch.rand(64, 1)
    for store, most in (("int8", 0.01), ("1bit", 0.7)):
        scales = row_scales(delta, store)
        codes = pack(delta, scales, store)
        back = unpack(codes, scales, (77,), store)
        assert codes.numel() == (64 * 77 if store == "int8" else 64 * 10)
        assert torch.equal(back.sign()[back != 0], torch.where(delta >= 0, 1.0, -1.0)[back != 0])
        assert loss(delta, store) == pytest.approx(float((back - delta).norm() / delta.norm()))  # type: ignore[arg-type]
        assert 0 < loss(delta, store) < most  # type: ignore[arg-type]
    # the mean of magnitudes is the best scale of signs
    scales = row_scales(delta, "1bit")
    worse = [unpack(pack(delta, scales, "1bit"), scales * f, (77,), "1bit") for f in (0.9, 1.1)]
    best = unpack(pack(delta, scales, "1bit"), scales, (77,), "1bit")
    assert all((best - delta).norm() < (w - delta).norm() for w in worse)
