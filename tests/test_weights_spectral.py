"""Spectral methods against plain float64 references, their own properties, and what the engine makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.errors import UsageError
from fanbu.merging.factors import FORM
from fanbu.merging.spectral import (
    calibrated,
    factored_svd,
    iso_c,
    iso_cts,
    opcm,
    polar,
    sum_of,
    svd,
    tsv_m,
    wudi,
    wudi_adam,
)  # fmt: skip
from fanbu.model import Model, open_model
from fanbu.tensors import Tensors
from fanbu.types import Context

SHAPES = [(24, 24), (20, 44), (44, 20), (12, 60)]
SPECTRAL = ["tsv_m", "iso_c", "iso_cts", "svc", "wudi", "opcm"]
shapes = pytest.mark.parametrize(("m", "n"), SHAPES)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def random(m: int, n: int, seed: int = 0, rank: int | None = None) -> Tensor:
    """A float32 matrix with a falling spectrum."""
    rng = torch.Generator().manual_seed(seed)
    k = rank or min(m, n)
    left, right = torch.randn(m, k, generator=rng), torch.randn(k, n, generator=rng)
    return (left * torch.logspace(0, -1.5, k)) @ right * 0.01


def several(m: int, n: int, tasks: int = 3) -> list[Tensor]:
    return [random(m, n, seed) for seed in range(tasks)]


def exact(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The textbook SVD: u, s, v^T in float64."""
    u, s, vt = torch.linalg.svd(a.double(), full_matrices=False)
    return u, s, vt


def ortho(a: Tensor) -> Tensor:
    u, _, vt = exact(a)
    return u @ vt


def assert_near(got: Tensor, want: Tensor, share: float = 1e-5) -> None:
    """Equal to a share of the largest number."""
    torch.testing.assert_close(got.double(), want.double(), rtol=0, atol=share * float(want.abs().max()))


def parts(deltas: list[Tensor]) -> list[Any]:
    return [svd(d, min(d.shape) // len(deltas)) for d in deltas]


@shapes
def test_the_svd_is_the_textbook_one(m: int, n: int) -> None:
    a = random(m, n)
    u, s, v = svd(a)
    assert_near(s, exact(a)[1], 1e-9)
    assert_near((u * s) @ v.T, a, 1e-9)
    for side in (u, v):
        assert_near(side.T @ side, torch.eye(len(s)), 1e-9)
    top = svd(a, 5)
    assert_near((top.u * top.s) @ top.v.T, (u[:, :5] * s[:5]) @ v[:, :5].T, 1e-9)


def test_directions_that_are_rounding_noise_are_left_out() -> None:
    low = random(40, 30, rank=4)
    assert len(torch.linalg.svdvals(low)) == 30
    assert len(svd(low).s) == 4
    assert len(svd(low.T).s) == 4
    assert len(svd(torch.zeros(4, 6)).s) == 0


@pytest.mark.parametrize("rank", [1, 6, 30])
def test_the_svd_of_factors_is_that_of_their_product(rank: int) -> None:
    b, a = random(24, rank, 1), random(rank, 40, 2)
    found, want = factored_svd(b, a), svd(b.double() @ a.double())
    assert_near(found.s, want.s, 1e-8)
    assert_near((found.u * found.s) @ found.v.T, b.double() @ a.double(), 1e-9)
    assert_near(found.u.T @ found.u, torch.eye(len(found.s)), 1e-6)
    zero = factored_svd(torch.zeros(24, 1), torch.zeros(1, 40))
    assert len(zero.s) == 0


@shapes
def test_the_polar_factor_is_u_v(m: int, n: int) -> None:
    a = random(m, n)
    assert_near(polar(a), ortho(a), 1e-8)


@shapes
def test_tsv_m_is_its_formula(m: int, n: int) -> None:
    deltas = several(m, n)
    k = min(m, n) // 3
    cut = [(u[:, :k], s[:k], vt[:k]) for u, s, vt in map(exact, deltas)]
    u, s, vt = torch.cat([c[0] for c in cut], 1), torch.cat([c[1] for c in cut]), torch.cat([c[2] for c in cut])
    assert_near(tsv_m(parts(deltas)), ortho(u) @ torch.diag(s) @ ortho(vt), 1e-8)


def test_tsv_m_of_orthogonal_tasks_is_their_sum() -> None:
    u, v = torch.linalg.qr(torch.randn(24, 24))[0], torch.linalg.qr(torch.randn(36, 24))[0]
    tasks = [(u[:, i : i + 8] * torch.linspace(1, 0.2, 8)) @ v[:, i : i + 8].T for i in (0, 8, 16)]
    assert_near(tsv_m(parts(tasks)), sum_of(tasks))
    assert not torch.allclose(tsv_m(parts(several(24, 36))).float(), sum_of(several(24, 36)), atol=1e-3)


def test_tsv_m_of_the_same_task_twice_is_the_task_cut() -> None:
    one = random(24, 36)
    u, s, vt = exact(one)
    assert_near(tsv_m(parts([one, one])), (u[:, :12] * s[:12]) @ vt[:12], 1e-6)


@shapes
def test_iso_c_is_flat_and_keeps_the_sum_of_singular_values(m: int, n: int) -> None:
    total = sum_of(several(m, n))
    u, s, vt = exact(total)
    assert_near(iso_c(total), s.mean() * u @ vt, 1e-7)
    assert torch.allclose(torch.linalg.svdvals(iso_c(total)), s.mean(), rtol=1e-7)
    assert_near(iso_c(total, 0.25), (u * (0.75 * s + 0.25 * s.mean())) @ vt, 1e-7)
    assert torch.equal(iso_c(total, 0.0), total)


def test_iso_c_of_low_rank_stays_of_low_rank() -> None:
    low = random(40, 30, rank=4)
    found = torch.linalg.svdvals(iso_c(low))
    assert torch.allclose(found[:4], exact(low)[1].sum() / 4, rtol=1e-6)
    assert float(found[4]) < 1e-9
    assert not iso_c(torch.zeros(4, 6)).any()


@shapes
@pytest.mark.parametrize("flatten", [1.0, 0.4])
def test_iso_cts_is_its_formula(m: int, n: int, flatten: float) -> None:
    deltas, r = several(m, n), min(m, n)
    each = round((r - int(0.8 * r)) / 3)
    k = r - 3 * each
    u, s, vt = exact(sum_of(deltas))
    common = u[:, :k]
    own = [exact(d.double() - common @ common.T @ d.double()) for d in deltas]
    left = torch.cat([*(o[0][:, :each] for o in own), common], 1)
    right = torch.cat([*(o[2][:each] for o in own), vt[:k]])
    values = torch.cat([*(o[1][:each] for o in own), s[:k]])
    values = (1 - flatten) * values + flatten * values.mean()
    found = iso_cts(list(deltas), flatten=flatten)
    # the sum is rounded to float32 before it is taken apart, and its weakest directions feel that
    assert_near(found, ortho(left) @ torch.diag(values) @ ortho(right), 2e-5)
    assert (flatten == 1) == torch.allclose(torch.linalg.svdvals(found), values.mean(), rtol=1e-6)


def test_iso_cts_with_more_specialists_than_directions_is_the_common_part() -> None:
    deltas = [random(4, 6, seed) for seed in range(9)]
    assert torch.allclose(torch.linalg.svdvals(iso_cts(list(deltas), common=0.0)), exact(sum_of(deltas))[1].mean())


@shapes
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_svc_is_its_formula(m: int, n: int, alpha: float) -> None:
    deltas = several(m, n)
    merged = sum_of(deltas)
    u, s, vt = exact(merged)
    factors = []
    for k in range(len(s)):
        response = u[:, k] @ merged.double()
        own = [u[:, k] @ d.double() for d in deltas]
        factors.append(3 / sum(max(alpha, float(response @ a / (a @ a))) for a in own))
    assert_near(calibrated(merged, deltas, alpha), (u * s * torch.tensor(factors)) @ vt, 1e-7)
    assert alpha < 1 or max(factors) <= 1 + 1e-9


def test_svc_counts_what_all_did_once() -> None:
    one = random(20, 30)
    assert_near(calibrated(one * 3, [one, one, one]), one)
    assert_near(calibrated(one, [one]), one)
    assert torch.isfinite(calibrated(one, [one, torch.zeros_like(one)])).all()


def reference_opcm(deltas: list[Tensor], alpha: float) -> Tensor:
    """With square U and V, as the paper writes it."""
    merged = deltas[0].double()
    for delta in deltas[1:]:
        u, s, vt = torch.linalg.svd(merged, full_matrices=True)
        z = u.T @ delta.double() @ vt.T
        k = int((s.cumsum(0) / s.sum() > alpha).int().argmax())
        z.diagonal().fill_(0)
        z[:k, :k] = 0
        merged = merged + u @ z @ vt
    return merged


@shapes
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_opcm_is_its_formula(m: int, n: int, alpha: float) -> None:
    deltas = several(m, n)
    assert_near(opcm(list(deltas), alpha), reference_opcm(deltas, alpha), 1e-6)


def test_opcm_adds_only_what_is_new() -> None:
    one = random(20, 30)
    assert_near(opcm([one]), one, 1e-12)
    assert_near(opcm([one, one, one]), one, 1e-6)
    u, v = torch.linalg.qr(torch.randn(20, 20))[0], torch.linalg.qr(torch.randn(30, 20))[0]
    strangers = [(u[:, :9] * 2) @ v[:, :9].T, (u[:, 9:] * 3) @ v[:, 9:].T]
    assert_near(opcm(list(strangers)), sum_of(strangers), 1e-5)
    mixed = opcm([one, random(20, 30, 5)])
    assert not torch.allclose(mixed, opcm([random(20, 30, 5), one]))


def grams(deltas: list[Tensor]) -> list[Tensor]:
    return [d.double().T @ d.double() / d.double().square().sum() for d in deltas]


def loss(tau: Tensor, deltas: list[Tensor]) -> Tensor:
    return sum(
        (((tau - d) @ d.T).square().sum() / d.square().sum() for d in (x.to(tau) for x in deltas)), torch.zeros(())
    )


@shapes
def test_wudi_has_no_slope_left_and_is_the_smallest(m: int, n: int) -> None:
    deltas = several(m, n)
    tau = wudi(list(deltas))
    slope = sum((tau - d.double()) @ g for d, g in zip(deltas, grams(deltas), strict=True))
    start = sum((sum_of(deltas).double() - d.double()) @ g for d, g in zip(deltas, grams(deltas), strict=True))
    assert float(torch.as_tensor(slope).abs().max()) < 1e-8 * float(torch.as_tensor(start).abs().max())
    assert float(loss(tau, deltas)) < 0.9 * float(loss(sum_of(deltas).double(), deltas))
    right = sum(d.double() @ g for d, g in zip(deltas, grams(deltas), strict=True))
    assert_near(tau, right @ torch.linalg.pinv(torch.as_tensor(sum(grams(deltas))), hermitian=True, rtol=1e-12), 1e-5)


def test_wudi_of_low_rank_and_of_nothing() -> None:
    low = [random(16, 40, seed, rank=3) for seed in range(3)]
    assert_near(
        torch.cat([wudi(list(low)) @ d.double().T - d.double() @ d.double().T for d in low]) + 1, torch.ones(48, 16)
    )
    assert_near(wudi([low[0]]), low[0])
    assert_near(wudi([low[0].T.contiguous()]), low[0].T)
    assert_near(wudi([low[0], torch.zeros(16, 40)]), low[0])
    assert not wudi([torch.zeros(4, 6), torch.zeros(4, 6)]).any()


@shapes
def test_wudi_by_adam_is_torch_s_adam(m: int, n: int) -> None:
    deltas = several(m, n)
    tau = torch.nn.Parameter(sum_of(deltas).double())
    adam = torch.optim.Adam([tau], lr=1e-4)
    for _ in range(40):
        adam.zero_grad()
        tau.grad = torch.autograd.grad(loss(tau, deltas), tau)[0]
        adam.step()
    moved = wudi_adam(list(deltas), 40, 1e-4)
    assert float(loss(tau.detach(), deltas)) < 0.95 * float(loss(sum_of(deltas).double(), deltas))
    assert_near(moved, tau.detach(), 1e-3)
    assert torch.equal(wudi_adam([deltas[0]], 40, 1e-4), deltas[0])


# What the engine makes of them


@pytest.fixture
def base(llama: Path) -> Model:
    return open_model(llama)


def sent(base: Model, domain: str, seed: int, rank: int | None = None) -> Contribution:
    """A change of every tensor, of low rank where it is asked for."""
    specs = Tensors(base.path).specs
    values = {
        name: random(*spec.shape, seed + i, rank)
        if len(spec.shape) == 2
        else 0.01 * torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed + i))
        for i, (name, spec) in enumerate(sorted(specs.items()))
    }
    return Contribution("weights", domain, "tsv_m", values, meta={"labels": []})


def factored(base: Model, domain: str, seed: int, rank: int = 3) -> tuple[Contribution, Contribution]:
    """The same change of the attention's matrices as factors and as plain tensors."""
    rng = torch.Generator().manual_seed(seed)
    low: dict[str, Tensor] = {}
    plain = {n: torch.zeros(spec.shape) for n, spec in Tensors(base.path).specs.items()}
    for name, spec in sorted(Tensors(base.path).specs.items()):
        if "self_attn" in name:
            b, a = (torch.randn(s, generator=rng) * 0.1 for s in ((spec.shape[0], rank), (rank, spec.shape[1])))
            low |= {f"b:{name}": b, f"a:{name}": a, f"scale:{name}": torch.tensor(2.0)}
            plain[name] = (b.double() @ (2 * a.double())).float()
    meta: dict[str, Any] = {"labels": []}
    return (
        Contribution("weights", domain, "tsv_m", low, meta={**meta, "form": FORM}),
        Contribution("weights", domain, "tsv_m", plain, meta=meta),
    )


def merged(way: str, base: Model, given: list[Contribution], out: Path, context: Context, **arguments: Any) -> Tensors:
    return Tensors(method(way).absorb(base, given, out, context, **arguments).path)


@pytest.mark.parametrize("way", [w for w in SPECTRAL if w != "opcm"])
def test_tensors_that_are_no_matrices_are_averaged_and_weights_leave_out(
    way: str, base: Model, context: Context, tmp_path: Path
) -> None:
    a, b = sent(base, "a", 10), sent(base, "b", 50)
    old, new = Tensors(base.path), merged(way, base, [a, b], tmp_path / "both", context, scale=0.5)
    for name in ("model.norm.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(new[name], old[name] + 0.25 * (a.tensors[name] + b.tensors[name]))
    name = "model.layers.0.mlp.down_proj.weight"
    assert not torch.allclose(new[name], old[name] + 0.25 * (a.tensors[name] + b.tensors[name]), atol=1e-5)
    alone = merged(way, base, [a], tmp_path / "alone", context)
    muted = merged(way, base, [a, b], tmp_path / "muted", context, weights={"b": 0.0})
    assert all(torch.equal(alone[n], muted[n]) for n in alone)
    with pytest.raises(UsageError, match="sum to 0"):
        merged(way, base, [a, b], tmp_path / "none", context, weights={"a": -1.0, "b": 1.0})


@pytest.mark.parametrize("way", ["tsv_m", "iso_c"])
def test_factors_give_what_whole_matrices_give(
    way: str, base: Model, context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [factored(base, "a", 100), factored(base, "b", 200)]
    weights = {"b": 0.5}
    whole = merged(way, base, [p[1] for p in pairs], tmp_path / "whole", context, weights=weights)
    monkeypatch.setattr("fanbu.merging.engine.Stack.whole", None)
    low = merged(way, base, [p[0] for p in pairs], tmp_path / "low", context, weights=weights)
    old = Tensors(base.path)
    for name in old:
        torch.testing.assert_close(low[name], whole[name], rtol=1e-5, atol=1e-6)
        assert ("self_attn" in name) != torch.equal(low[name], old[name])


def test_opcm_has_the_mean_norm_of_its_specialists(base: Model, context: Context, tmp_path: Path) -> None:
    given = [sent(base, "a", 10), sent(base, "b", 50), sent(base, "c", 90)]
    old, new = Tensors(base.path), merged("opcm", base, given, tmp_path / "new", context)
    size = sum(float((new[n].double() - old[n]).square().sum()) for n in old) ** 0.5
    own = [sum(float(t.double().square().sum()) for t in c.tensors.values()) ** 0.5 for c in given]
    assert size == pytest.approx(sum(own) / 3, rel=1e-5)
    name = "model.layers.1.self_attn.q_proj.weight"
    found, want = new[name].double() - old[name], reference_opcm([c.tensors[name] for c in given], 0.5)
    ratio = float((new["model.norm.weight"] - old["model.norm.weight"]).norm()) / float(
        sum_of([c.tensors["model.norm.weight"] for c in given]).norm()
    )
    assert_near(found, want * ratio, 1e-4)
    assert [p.name for p in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize("way", SPECTRAL)
def test_threads_and_memory_change_no_bit(way: str, base: Model, context: Context, tmp_path: Path) -> None:
    from dataclasses import replace

    given = [sent(base, "a", 10), sent(base, "b", 50)]
    one = method(way).absorb(base, given, tmp_path / "one", context)
    four = replace(context, threads=4, memory=1)
    assert method(way).absorb(base, given, tmp_path / "four", four).digest == one.digest


@pytest.mark.parametrize(
    ("way", "wrong"),
    [
        ("iso_c", {"flatten": 1.5}), ("iso_cts", {"common": -0.1}), ("iso_cts", {"flatten": 2.0}),
        ("svc", {"alpha": 0.0}), ("wudi", {"steps": 0}), ("wudi", {"lr": -1.0}), ("opcm", {"alpha": 1.1}),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_named(
    way: str, wrong: dict[str, Any], base: Model, context: Context, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"{way}: {next(iter(wrong))}.*allowed.*got.*remedy"):
        merged(way, base, [sent(base, "a", 1)], tmp_path / "new", context, **wrong)
    assert not (tmp_path / "new").exists()
