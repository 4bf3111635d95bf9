"""OPCM: one task vector after the other; of each only what is orthogonal to what was merged before."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.feedback.weights._task_vector import contribute
from fanbu.merging.dials import Dial
from fanbu.merging.engine import Combine, Linear, Part, Stack, merge, run, stacks
from fanbu.merging.spectral import deltas_of, opcm, rows_of, within
from fanbu.model import Model, provenance
from fanbu.tensors import Shards, Tensors
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"scale": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: Dial = 1.0,
    alpha: Dial = 0.5,
) -> Model:  # fmt: skip
    """theta = theta_base + scale * X_T * (mean of |delta_i|) / |X_T|, X_t = X_(t-1) + P(delta_t), X_1 = delta_1.

    P takes from delta_t what it has in the strongest singular directions of X_(t-1). Norms are over the whole model;
    tensors that are no matrices, and tables of embeddings, are summed. Specialists are taken in the order of their
    domains' names, and this order matters: the first is kept as it is. The X_T of all tensors wait beside ``out`` on
    the disk (float32) until their norm is known.

    Args:
        scale: 1 as in the paper.
        alpha: the share of the sum of singular values whose directions are protected, 0 to 1.

    Raises:
        FitError: a contribution's tensors are not the base's.
        UsageError: alpha outside 0..1.

    Reference: Tang et al. 2025, "Merging models on the fly without retraining: a sequential approach to scalable
    continual model merging".
    """

    squares: dict[tuple[str, int], list[float]] = {}

    def sequence(stack: Stack) -> Combine:
        ones = [1.0] * len(stack.sources)
        merge_rows: Combine = Linear(ones)
        if stack.matrix:
            share = within("opcm: alpha", stack.level(alpha), 0, 1)
            merge_rows = rows_of(opcm(deltas_of(stack, ones), share), 1.0, stack.device)

        def combine(part: Part) -> Tensor:
            sizes = [_square(delta) for delta in part.deltas]
            merged = merge_rows(part)
            squares[stack.name, part.start] = [_square(merged), *sizes]
            return merged

        return combine

    made = provenance(
        "opcm", [base], context, scale=scale, alpha=alpha, domains=[c.domain for c in contributions]
    )  # fmt: skip
    work = stacks(base, contributions, context)
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=context.scratch or out.parent, prefix=".opcm-") as folder:
        sums = Shards(Path(folder), {s.name: (s.shape, torch.float32) for s in work})

        def put(stack: Stack, part: Part, delta: Tensor | None) -> None:
            sums.put(stack.name, part.start, torch.zeros_like(part.base) if delta is None else delta)

        run(work, sequence, put, context, made, 7)
        sums.close()
        kept, rescale = Tensors(Path(folder)), _to_mean_norm(list(squares.values()))

        def rule(stack: Stack) -> Combine:
            factor = stack.level(scale) * rescale
            return lambda part: kept.rows(stack.name, part.start, part.stop).to(part.base.device) * factor

        return merge(base, contributions, out, context, rule, made)


def _to_mean_norm(squares: Sequence[Sequence[float]]) -> float:
    """(mean of |delta_i|) / |X| from the squares of each part, X first; 1 where nothing was merged."""
    merged, *own = [math.sqrt(math.fsum(column)) for column in zip(*squares, strict=True)] or [0.0]
    return math.fsum(own) / len(own) / merged if merged else 1.0


def _square(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values, dtype=torch.float64)) ** 2
