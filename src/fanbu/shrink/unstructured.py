"""Unstructured pruning: single weights become zero. Smaller when compressed; no faster on a CPU by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from annotated_types import Ge, Lt

from fanbu.domain import Domain
from fanbu.model import Model
from fanbu.shrink._sparse import Way, shrink_sparsely
from fanbu.types import Context, Train

CHANGES: frozenset[str] = frozenset()


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5, importance: Way = "sparsegpt", train: Train | None = None,
) -> Model:  # fmt: skip
    """Sets a share of the weights of each linear layer in the body to zero; embeddings and heads stay.

    The checkpoint has the parent's shapes and, stored plainly, its size: zeros alone save nothing and speed up
    nothing on a CPU. They compress well (zip, zstd), and some runtimes use them.

    Args:
        sparsity: the share of zeros in each layer.
        importance: ``magnitude`` (no texts), ``wanda`` or ``sparsegpt`` (256 of the domain's texts, no labels); see
            ``_sparse.pruned``.
        train: how training continues, zeros staying zero; None leaves that to a later step.

    References: Han et al. 2015; Sun et al. 2024 (Wanda); Frantar and Alistarh 2023 (SparseGPT).
    """
    return shrink_sparsely("unstructured", parent, domain, out, context, importance, sparsity, None, train)
