"""Geometry of whole tensors from their inner products: one pass over the weights, and nothing is held."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fanbu.errors import UsageError
from fanbu.merging.engine import Combine, Part, Stack

_PARALLEL = 0.9995


def gram(stack: Stack, *, deltas: bool = False) -> Tensor:
    """Inner products, in float64, of [theta_base, theta_1 .. theta_N], or of the N deltas; summed over all parts."""
    total: Tensor | None = None
    for part in stack.parts():
        if not deltas:
            for delta in part.deltas:
                delta.add_(part.base)
        rows = [part.base, *part.deltas][deltas:]
        flat = torch.stack([row.reshape(-1) for row in rows]).double()
        product = flat @ flat.T
        total = product if total is None else total.add_(product)
    assert total is not None
    return total.cpu()


def spanned(coefficients: Sequence[float]) -> Combine:
    """The change from the base to sum over k of c_k theta_k, with theta_0 the base."""

    def combine(part: Part) -> Tensor:
        total = part.base * (sum(coefficients) - 1.0)
        for delta, c in zip(part.deltas, coefficients[1:], strict=True):
            total.add_(delta, alpha=c)
        return total

    return combine


def arc(products: Tensor, t: float) -> tuple[float, float]:
    """Coefficients of two vectors at t of the way between them on the sphere, from their 2 x 2 inner products."""
    lengths = products.diagonal().sqrt()
    if float(lengths.min()) == 0:
        return 1 - t, t
    cosine = float(products[0, 1] / lengths.prod())
    if abs(cosine) > _PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def mean_cosine(products: Tensor) -> float:
    """The mean cosine between two different vectors; 0 where one has no length."""
    lengths = products.diagonal().clamp(min=1e-300).sqrt()
    cosines = products / lengths[:, None] / lengths[None, :]
    count = len(products)
    return float((cosines.sum() - cosines.diagonal().sum()) / max(1, count * (count - 1)))


def karcher(products: Tensor, weights: Sequence[float], steps: int, tolerance: float) -> list[float]:
    """Coefficients of the Karcher mean of vectors with these inner products (see feedback/weights/karcher.py)."""
    total = sum(weights)
    if not total:
        raise UsageError("bad-parameter", "karcher: weights sum to 0", got=list(weights), remedy="change one")
    a = torch.tensor(weights, dtype=torch.float64) / total
    lengths = products.diagonal().sqrt()
    if float(lengths.min()) == 0:  # a direction is missing: the straight mean
        return [float(x) for x in a]
    unit = products / lengths[:, None] / lengths[None, :]
    c = a.clone()  # of the unit vectors
    for _ in range(steps + 1):
        c = c / (c @ unit @ c).clamp(min=1e-300).sqrt()
        cosines = (unit @ c).clamp(-1.0, 1.0)
        angles = cosines.acos()
        ratio = torch.where(angles > 1e-9, angles / angles.sin().clamp(min=1e-300), torch.ones_like(angles))
        # log_u(x_i) = ratio_i (x_i - cos_i u)
        tangent = a * ratio - (a * ratio * cosines).sum() * c
        step = float((tangent @ unit @ tangent).clamp(min=0).sqrt())
        if step < tolerance or _ == steps:
            break
        c = math.cos(step) * c + math.sin(step) / step * tangent
    return [float(x) for x in c * (a * lengths).sum() / lengths]
