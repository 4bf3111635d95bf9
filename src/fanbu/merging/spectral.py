"""Pieces of spectral methods: singular vectors of task vectors, polar factors, and what is built of them.

All mathematics is in float64 through the smaller Gram matrix: for 768x3072 this takes a quarter of the time of a
float32 SVD and is a thousand times closer to the exact result. Directions whose singular value is below RANK times the
largest are rounding noise of float32 and are left out, so matrices of low rank keep their rank.

Shapes: a matrix is m x n (out x in), r = min(m, n), T specialists. Lists named ``deltas`` are consumed: each tensor is
freed as soon as it has been used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fanbu.errors import UsageError
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Combine, Linear, Rule, Stack

RANK = 1e-6


class Svd(NamedTuple):
    """u_mk diag(s_k) v_nk^T in float64, singular values falling, none of them noise."""

    u: Tensor
    s: Tensor
    v: Tensor

    def top(self, k: int) -> Svd:
        """The k largest."""
        return Svd(self.u[:, :k], self.s[:k], self.v[:, :k])


def wide(a: Tensor) -> Tensor:
    """In float64; on the CPU where the accelerator knows no float64."""
    return a.to("cpu" if a.device.type == "mps" else a.device, torch.float64)


def svd(a_mn: Tensor, top: int | None = None, least: float = 0.0) -> Svd:
    """The SVD over the numerical rank, from eigh of the smaller Gram matrix.

    Args:
        top: only so many of the largest.
        least: singular values up to this are noise too.
    """
    a = wide(a_mn)
    if a.shape[0] > a.shape[1]:
        v, s, u = svd(a.T, top, least)
        return Svd(u, s, v)
    first = 0 if top is None else max(0, len(a) - top)
    u = torch.linalg.eigh(a @ a.T).eigenvectors[:, first:]  # eigenvalues rise
    rows = u.T @ a
    s = torch.linalg.vector_norm(rows, dim=1)  # closer than the root of the eigenvalue
    order = s.argsort(descending=True, stable=True)
    order = order[s[order] > max(least, RANK * float(s.max() if len(s) else 0))]
    s = s[order]
    return Svd(u[:, order], s, rows[order].div_(s[:, None]).T)


def factored_svd(b_mr: Tensor, a_rn: Tensor) -> Svd:
    """The SVD of b a over its numerical rank without making it: QR of both factors, then the SVD of r x r."""
    q_b, r_b = torch.linalg.qr(wide(b_mr))
    q_a, r_a = torch.linalg.qr(wide(a_rn).T)
    u, s, v = svd(r_b @ r_a.T)
    return Svd(q_b @ u, s, q_a @ v)


def inverse_root(gram: Tensor) -> Tensor:
    """gram^(-1/2), in the directions that it has."""
    values, q = torch.linalg.eigh(gram)
    real = values > RANK**2 * float(values.max())
    q = q[:, real]
    return (q * values[real].rsqrt()) @ q.T


def polar(a: Tensor) -> Tensor:
    """The polar factor a (a^T a)^(-1/2) = U V^T for a = U S V^T, over the numerical rank."""
    a = wide(a)
    return a @ inverse_root(a.T @ a) if a.shape[0] >= a.shape[1] else inverse_root(a @ a.T) @ a


def joined(parts: Sequence[Svd], flatten: float = 0.0) -> Tensor:
    """U' diag(s) V'^T, where U' and V' are the polar factors of all u and all v side by side.

    Args:
        flatten: how far each s goes to their mean, 0 to 1.
    """
    u, s, v = (torch.cat(each, dim=-1) for each in zip(*parts, strict=True))
    del parts
    if not len(s):
        return u.new_zeros(len(u), len(v))
    s = torch.lerp(s, s.mean(), flatten)
    return (u @ (inverse_root(u.T @ u) * s @ inverse_root(v.T @ v))) @ v.T


def tsv_m(parts: Iterable[Svd]) -> Tensor:
    """U' diag(s) V'^T of the strongest singular vectors of each task, all made orthogonal.

    Two equal specialists give one of them, cut to r / T.

    Reference: Gargiulo et al. 2025, "Task singular vectors: reducing task interference in model merging".
    """
    return joined(list(parts))


def iso_c(total: Tensor, flatten: float = 1.0) -> Tensor:
    """(1 - f) D + f mean(s) U V^T for D = U S V^T: its spectrum, made flat. The mean is over the numerical rank.

    Reference: Marczak et al. 2025, "No task left behind: isotropic model merging with common and task-specific
    subspaces".
    """
    if not flatten:
        return total
    whole = wide(total)
    factor = polar(whole)
    # the sum of the singular values is <D, U V^T>, their number |U V^T|^2
    mean = torch.sum(factor * whole) / torch.sum(factor * factor).clamp_min(1.0)
    return factor.mul_(mean * flatten).add_(whole, alpha=1 - flatten)


def iso_cts(deltas: list[Tensor], common: float = 0.8, flatten: float = 1.0) -> Tensor:
    """The top of the sum's singular vectors, and the top of what each task has beside them, orthogonal, made flat.

    k = about ``common`` of r, so that T divides r - k; of each task (r - k) / T of D_t - U_k U_k^T D_t.

    Reference: Marczak et al. 2025, "No task left behind: isotropic model merging with common and task-specific
    subspaces".
    """
    rows, tasks, r = len(deltas[0]), len(deltas), min(deltas[0].shape)
    each = min(round((r - int(r * common)) / tasks), r // tasks)
    whole = svd(sum_of(deltas))
    least = RANK * float(whole.s[0]) if len(whole.s) else 0.0
    shared = Svd(*(part.clone() for part in whole.top(r - each * tasks)))
    del whole
    # with fewer rows than columns, what is beside U_k is few rows: the SVD becomes a small one
    flat = rows <= deltas[0].shape[1]
    beside = torch.linalg.qr(shared.u, mode="complete").Q[:, shared.u.shape[1] :] if flat else None
    parts = []
    for delta in consumed(deltas):
        if beside is None:
            parts.append(svd(delta - shared.u @ (shared.u.T @ delta), each, least))
        else:
            own = svd(beside.T @ delta, each, least)
            parts.append(own._replace(u=beside @ own.u))
    parts.append(shared)
    del shared, beside
    return joined(parts, flatten)


def calibrated(merged: Tensor, deltas: Sequence[Tensor], alpha: float = 1.0) -> Tensor:
    """Singular values of a merged delta, each divided by how much too often the tasks' changes were counted in it.

    merged = U S V^T; a_k = u_k^T merged, a_k^i = u_k^T delta_i; c_k^i = <a_k, a_k^i> / |a_k^i|^2 is how many times task
    i's change is in the merged one; s_k is multiplied by T / sum over i of max(alpha, c_k^i). A task without anything
    in direction k counts as alpha. Any method's delta may be merged.

    Reference: "When shared knowledge hurts: spectral over-accumulation in model merging", 2026, arXiv 2602.05536.
    """
    whole = wide(merged)
    u, s, v = svd(whole)
    rows = v.mul_(s).T
    counted = torch.zeros_like(rows[:, 0])
    for delta in deltas:
        own = u.T @ wide(delta)
        size = own.square().sum(1)
        times = torch.where(size > 0, (own * rows).sum(1) / size, alpha)
        counted += times.clamp_min(alpha)
    factor = len(deltas) / counted
    return whole.addmm(u, rows.mul_((factor - 1)[:, None]))


def opcm(deltas: list[Tensor], alpha: float = 0.5) -> Tensor:
    """One task after the other: X_1 = D_1, X_t = X_(t-1) + what D_t has beside X_(t-1).

    With X_(t-1) = U S V^T and Z = U^T D_t V, what is taken away is Z's diagonal and its first k rows and columns; k is
    how many singular values make up ``alpha`` of their sum.

    Reference: Tang et al. 2025, "Merging models on the fly without retraining: a sequential approach to scalable
    continual model merging".
    """
    left = consumed(deltas)
    merged = next(left)
    for delta in left:
        u, s, v = svd(merged)
        k = int((s.cumsum(0) <= alpha * s.sum()).sum())
        z = u.T @ delta @ v
        taken = torch.diag(z.diagonal())
        taken[:k, :k] = z[:k, :k]
        merged += delta.addmm_(u @ taken, v.T, alpha=-1)
    return merged


def wudi(deltas: list[Tensor]) -> Tensor:
    """argmin over tau of sum |(tau - D_i) D_i^T|^2 / |D_i|^2 = (sum D_i G_i) (sum G_i)^+, the smallest there is.

    G_i = D_i^T D_i / |D_i|^2. Where T m < n, the same through the T m x T m Gram matrix of all rows, with 1e-12 T added
    to its diagonal: rows of different tasks that nearly agree would else decide the result by their rounding.

    Reference: Cheng et al. 2025, "Whoever started the interference should end it: guiding data-free model merging via
    task vectors".
    """
    (m, n), tasks = deltas[0].shape, len(deltas)
    sizes = [_size(delta) for delta in deltas]
    if tasks * m >= n:
        gram, right = wide(deltas[0]).new_zeros(n, n), wide(deltas[0]).new_zeros(m, n)
        for delta, size in zip(consumed(deltas), sizes, strict=True):
            own = (delta.T @ delta).div_(size**2)
            gram += own
            right.addmm_(delta, own)
        return over(right, gram)
    rows = torch.cat([delta.div_(size) for delta, size in zip(consumed(deltas), sizes, strict=True)])
    gram = rows @ rows.T
    # D_i D_i^T / |D_i| are the blocks on the diagonal of the Gram matrix, times |D_i|
    blocks = [gram[i * m : (i + 1) * m, i * m : (i + 1) * m] * size for i, size in enumerate(sizes)]
    # its trace is T; where it has nothing, ``rows`` has nothing
    return over(torch.cat(blocks, dim=1), gram, ridge=1e-12 * tasks) @ rows


def wudi_adam(deltas: list[Tensor], steps: int = 300, lr: float = 1e-5) -> Tensor:
    """The loss of ``wudi``, lowered as its paper does: Adam from the sum of all D_i, stopped early.

    In float32. What is moved is x = tau - sum D_i, so that one specialist alone stays where it is.
    """
    total = sum_of(deltas)
    gram, right = total.new_zeros(total.shape[1], total.shape[1]), torch.zeros_like(total)
    while deltas:
        delta = deltas.pop(0)
        share = 2 / _size(delta) ** 2
        gram.addmm_(delta.T, delta, alpha=share)
        right.add_(torch.linalg.multi_dot([delta - total, delta.T, delta]), alpha=share)
    x, mean, square = (torch.zeros_like(total) for _ in range(3))
    for step in range(1, steps + 1):
        slope = torch.addmm(right, x, gram, beta=-1)
        mean.lerp_(slope, 0.1)
        square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        length = square.sqrt().div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
        x.addcdiv_(mean, length, value=-lr / (1 - 0.9**step))
    return total.add_(x)


def over(right: Tensor, gram: Tensor, ridge: float = 0.0) -> Tensor:
    """right gram^+ for a symmetric gram without negative eigenvalues, over its numerical rank; the gram is changed.

    A Cholesky factor takes a thirtieth of eigh's time, but needs a gram that has an inverse.

    Args:
        ridge: what is added to the diagonal for that. Only for a result whose parts in the directions that the gram
            has not are of no consequence: they are noise.
    """
    gram.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = factor.diagonal()
    if not failed and (ridge or float(diagonal.min()) > 1e-4 * float(diagonal.max())):
        return torch.cholesky_solve(right.T, factor).T
    values, q = torch.linalg.eigh(gram)
    real = values > RANK**2 * float(values.max())
    q = q[:, real]
    return (right @ q).div_(values[real]) @ q.T


def _size(delta: Tensor) -> float:
    """|delta|; 1 where nothing changed."""
    return float(torch.linalg.vector_norm(wide(delta))) or 1.0


def consumed(deltas: list[Tensor]) -> Iterator[Tensor]:
    """Each in float64, one at a time; the list is empty afterwards."""
    while deltas:
        yield wide(deltas.pop(0))


def sum_of(deltas: Sequence[Tensor]) -> Tensor:
    """Their sum, in memory of its own."""
    total = deltas[0].clone()
    for delta in deltas[1:]:
        total.add_(delta)
    return total


# What the methods share: weights, and tensors that are no matrices


Solve = Callable[[Stack, list[float]], Tensor]  # a stack of matrices and the weight of each specialist


def rule_of(solve: Solve, scale: Dial, weights: Mapping[str, Dial]) -> Rule:
    """scale * solve for each matrix; scale * sum of w_i delta_i / sum of w_i for other tensors.

    Raises UsageError where the weights of a tensor sum to 0.
    """

    def rule(stack: Stack) -> Combine:
        w, factor = levels(stack, weights), stack.level(scale)
        if stack.matrix:
            return rows_of(solve(stack, w), factor, stack.device)
        return Linear([factor * each / sum(w) for each in w])

    return rule


def deltas_of(stack: Stack, w: Sequence[float]) -> list[Tensor]:
    """w_i delta_i of each specialist whose weight is not 0, whole."""
    return [d if each == 1 else d.mul_(each) for d, each in zip(stack.whole().deltas, w, strict=True) if each]


def strongest(stack: Stack, w: Sequence[float]) -> Iterator[Svd]:
    """The top r / T singular vectors (at least one) of each w_i delta_i whose weight is not 0, one after the other."""
    top = max(1, min(stack.shape) // sum(each != 0 for each in w))
    factors = stack.factors()
    if factors is None:
        yield from (svd(delta, top) for delta in consumed(deltas_of(stack, w)))
    else:
        yield from (factored_svd(b * each, a).top(top) for (b, a), each in zip(factors, w, strict=True) if each)


def sum_of_factors(stack: Stack, w: Sequence[float]) -> Svd | None:
    """The SVD of sum of w_i delta_i where all are low-rank; else None."""
    factors = stack.factors()
    if factors is None:
        return None
    b = torch.cat([b * each for (b, _), each in zip(factors, w, strict=True)], dim=1)
    return factored_svd(b, torch.cat([a for _, a in factors]))


def levels(stack: Stack, weights: Mapping[str, Dial]) -> list[float]:
    """The weight of each specialist. Raises UsageError where they sum to 0."""
    w = stack.levels(1.0, weights)
    if not sum(w):
        raise UsageError("bad-parameter", f"the weights of {stack.name} sum to 0", got=w, remedy="change one")
    return w


def rows_of(delta: Tensor, factor: float, device: torch.device) -> Combine:
    """A whole delta times a factor, handed out by rows in float32."""
    ready = delta.to(device, torch.float32).mul_(factor)
    return lambda part: ready[part.start : part.stop]


def within(name: str, value: float, low: float, high: float = math.inf) -> float:
    """The value. Raises UsageError where it is not in low..high."""
    if not low <= value <= high:
        raise UsageError("bad-parameter", name, allowed=f"{low} to {high}", got=value, remedy="change it")
    return value
