"""What shared merging methods are, written plainly in float64: one tensor at a time, no thought of speed or memory.

Each gives the merged tensor, and a mask of numbers that its definition leaves open: those whose magnitude equals a
threshold exactly, of which a sort keeps whichever comes first, and those whose changes cancel exactly, so that no sign
is elected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Answer = tuple[Tensor, Tensor]
SETTINGS = {"t": 0.4, "limit": 0.001, "weight": 0.4, "density": 0.5, "gamma": 0.01}


def closed(value: Tensor) -> Answer:
    """Nothing is left open."""
    return value, torch.zeros_like(value, dtype=torch.bool)


def linear(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """The mean."""
    return closed(torch.stack(list(thetas)).mean(0))


def slerp(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """The way on the sphere from the base to the one other model."""
    a, b, t = base, thetas[0], SETTINGS["t"]
    cosine = (a * b).sum() / a.norm() / b.norm()
    if float(cosine.abs()) > 0.9995:
        return closed((1 - t) * a + t * b)
    angle = cosine.acos()
    return closed((((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin())


def karcher(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """Mean length times the mean direction, iterated until nothing moves."""
    lengths = [t.norm() for t in thetas]
    units = [t / n for t, n in zip(thetas, lengths, strict=True)]
    u = sum(units, torch.zeros_like(base))
    u = u / u.norm()
    for _ in range(200):
        angles = [(u * x).sum().clamp(-1, 1).acos() for x in units]
        logs = [(x - a.cos() * u) * (a / a.sin()) for x, a in zip(units, angles, strict=True) if a > 0]
        tangent = sum(logs, torch.zeros_like(base)) / len(units)
        step = tangent.norm()
        if step < 1e-15:
            break
        u = step.cos() * u + step.sin() * tangent / step
        u = u / u.norm()
    return closed(u * (sum(lengths) / len(lengths)))


def model_stock(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """Between the base and the mean, t = N cos / (1 + (N - 1) cos)."""
    deltas = [(t - base).flatten() for t in thetas]
    count = len(deltas)
    pairs = [(a @ b) / a.norm() / b.norm() for i, a in enumerate(deltas) for b in deltas[i + 1 :]]
    cosine = sum(pairs) / len(pairs)
    t = count * cosine / (1 + (count - 1) * cosine)
    return closed(base + t * (torch.stack(list(thetas)).mean(0) - base))


def nearswap(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """Interpolation with the weight min(1, t / |difference|)."""
    delta = thetas[0] - base
    weight = (SETTINGS["limit"] / delta.abs().clamp(min=1e-300)).clamp(max=1)
    return closed(weight * thetas[0] + (1 - weight) * base)


def task_arithmetic(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """The base and the weighted sum of the differences."""
    return closed(base + SETTINGS["weight"] * sum(t - base for t in thetas))


def ranked(delta: Tensor, first: int, last: int) -> Answer:
    """delta where the rank of its magnitude (0: the largest) is in first..last, else 0; equal numbers at the ends."""
    sizes = delta.abs().flatten()
    falling = sizes.sort(descending=True).values
    keep, open_ = torch.zeros_like(sizes, dtype=torch.bool), torch.zeros_like(sizes, dtype=torch.bool)
    if last > first:
        low = falling[last - 1]
        keep = sizes >= low
        if last < len(falling):
            open_ |= sizes == low if falling[last] == low else open_
        if first:
            high = falling[first - 1]
            keep &= sizes < high
            open_ |= sizes == high if falling[first] == high else open_
    return delta * keep.view_as(delta), open_.view_as(delta)


def elect(deltas: Sequence[Tensor], weight: float, normalise: bool) -> Tensor:
    """Sum, or mean, of those that agree with the sign of the sum."""
    stacked = torch.stack(list(deltas)) * weight
    # one positive weight for all does not count for the sign; with it, sums that cancel exactly would round
    sign = torch.where(torch.stack(list(deltas)).sum(0) >= 0, 1.0, -1.0)
    agree = stacked.sign() == sign
    share = (agree * weight).sum(0)
    return (stacked * agree).sum(0) / (share.where(share != 0, 1.0) if normalise else 1.0)


def ties(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """Trim, elect, mean of those that agree."""
    keep = max(1, int(SETTINGS["density"] * base.numel()))
    trimmed = [ranked(t - base, 0, keep) for t in thetas]
    value = base + elect([d for d, _ in trimmed], 1.0, True)
    return value, torch.stack([o for _, o in trimmed]).any(0)


def _crumbs(base: Tensor, thetas: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    count = base.numel()
    keep = int(SETTINGS["density"] * count)
    top = min(int(SETTINGS["gamma"] * count), count - keep)
    found = [ranked(t - base, top, top + keep) for t in thetas]
    return [d for d, _ in found], torch.stack([o for _, o in found]).any(0)


def breadcrumbs(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """floor(gamma n) largest dropped, the next floor(density n) kept, then the weighted sum."""
    deltas, open_ = _crumbs(base, thetas)
    return base + SETTINGS["weight"] * sum(deltas), open_


def breadcrumbs_ties(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """The same with elected signs."""
    deltas, open_ = _crumbs(base, thetas)
    return base + elect(deltas, SETTINGS["weight"], False), open_


def tsv(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """Top r / T singular vectors of each, made orthogonal by the polar factor, with their singular values."""
    parts = []
    for theta in thetas:
        u, s, v = torch.linalg.svd(theta - base, full_matrices=False)
        top = len(s) // len(thetas)
        parts.append((u[:, :top], s[:top], v[:top]))
    sides = []
    for side in (torch.cat([p[0] for p in parts], 1), torch.cat([p[2] for p in parts])):
        u, _, v = torch.linalg.svd(side, full_matrices=False)
        sides.append(u @ v)
    return closed(base + sides[0] * torch.cat([p[1] for p in parts]) @ sides[1])


def iso(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """The sum's singular values, all made their mean."""
    u, s, v = torch.linalg.svd(sum(t - base for t in thetas), full_matrices=False)
    return closed(base + s.mean() * (u @ v))


def wudi_loss(tau: Tensor, deltas: Sequence[Tensor]) -> Tensor:
    """What WUDI minimises."""
    return torch.stack([((tau - d) @ d.T).square().sum() / d.square().sum() for d in deltas]).sum()


def wudi(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """Its loss lowered by 300 steps of Adam (1e-5) from the sum."""
    deltas = [t - base for t in thetas]
    tau = torch.nn.Parameter(sum(deltas, torch.zeros_like(base)))
    adam = torch.optim.Adam([tau], lr=1e-5)
    for _ in range(300):
        adam.zero_grad()
        wudi_loss(tau, deltas).backward()
        adam.step()
    return closed(base + tau.detach())


def wudi_closed(base: Tensor, thetas: Sequence[Tensor]) -> Answer:
    """The minimum itself, by the pseudo-inverse."""
    deltas = [t - base for t in thetas]
    grams = [d.T @ d / d.square().sum() for d in deltas]
    right = sum(d @ g for d, g in zip(deltas, grams, strict=True))
    return closed(base + right @ torch.linalg.pinv(sum(grams), hermitian=True, rtol=1e-12))


def regmean(thetas: Sequence[Tensor], grams: Sequence[Tensor]) -> Tensor:
    """(sum W_i G_i) (sum G_i)^-1."""
    return torch.linalg.solve(sum(grams), sum(w @ g for w, g in zip(thetas, grams, strict=True)), left=False)


Reference = Callable[[Tensor, Sequence[Tensor]], Answer]
ELEMENTWISE: dict[str, Reference] = {
    f.__name__: f
    for f in (
        linear, slerp, karcher, model_stock, nearswap, task_arithmetic, ties, breadcrumbs, breadcrumbs_ties,
    )
}  # fmt: skip
SPECTRAL: dict[str, Reference] = {f.__name__: f for f in (tsv, iso, wudi, wudi_closed)}
