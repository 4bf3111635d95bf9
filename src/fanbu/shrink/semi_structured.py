"""Semi-structured pruning (2:4): two of every four weights in a row become zero, the pattern that GPUs can use."""

from __future__ import annotations

from pathlib import Path

from fanbu.domain import Domain
from fanbu.model import Model
from fanbu.shrink._sparse import Way, shrink_sparsely
from fanbu.types import Context, Train

CHANGES: frozenset[str] = frozenset()


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    importance: Way = "sparsegpt", train: Train | None = None,
) -> Model:  # fmt: skip
    """Keeps the two most important of every four consecutive inputs of each output, in the body's linear layers.

    The checkpoint has the parent's shapes and size. Tensor cores multiply such matrices up to twice as fast once they
    are stored in their sparse form (``torch.sparse.to_sparse_semi_structured``); a CPU gains nothing.

    Args:
        importance: ``magnitude``, ``wanda`` or ``sparsegpt``, as in ``unstructured``.
        train: how training continues, zeros staying zero; None leaves that to a later step.

    Raises:
        FitError: a layer's inputs do not come in fours.

    References: Mishra et al. 2021, "Accelerating sparse deep neural networks"; Sun et al. 2024; Frantar and Alistarh
        2023.
    """
    return shrink_sparsely("semi_structured", parent, domain, out, context, importance, 0.5, (2, 4), train)
