"""Slerp: the way between two models on the sphere instead of through it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fanbu.contribution import Contribution
from fanbu.errors import FitError
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Combine, Stack, merge
from fanbu.merging.geometry import arc, gram, spanned
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True, most=2)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"t": 1.0}


def absorb(base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, t: Dial = 0.5) -> Model:
    """theta = sin((1 - t) phi) / sin(phi) theta_a + sin(t phi) / sin(phi) theta_b, phi the angle between the two.

    For each tensor by itself, flattened. With two specialists they are a and b, in the order of their names; with one,
    a is the base. Tensors that are nearly parallel (cosine above 0.9995), or zero, are interpolated linearly.

    Args:
        t: where between a (0) and b (1).

    Raises:
        FitError: more than two contributions (take ``karcher``), or tensors that are not the base's.

    Reference: Shoemake 1985, "Animating rotation with quaternion curves".
    """
    if len(contributions) > 2:
        raise FitError(
            "too-many", "slerp goes between two models", allowed="one or two specialists", got=len(contributions),
            remedy="take karcher, the mean of many on the sphere",
        )  # fmt: skip

    def rule(stack: Stack) -> Combine:
        products = gram(stack)
        first = len(products) - 2  # the base, or the first of two specialists
        weights = [0.0] * len(products)
        weights[first], weights[first + 1] = arc(products[first:, first:], stack.level(t))
        return spanned(weights)

    made = provenance("slerp", [base], context, t=t, domains=[c.domain for c in contributions])
    return merge(base, contributions, out, context, rule, made)
