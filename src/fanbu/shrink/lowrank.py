"""Low rank: each matrix of the layers becomes the product of two thin ones, closest on what the domain's texts give."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt, Lt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fanbu.domain import Domain
from fanbu.errors import FitError
from fanbu.merging.gram import columns, linear_layers, stores_input_first
from fanbu.model import Model, provenance, save_network
from fanbu.shrink._tune import open_for, tune
from fanbu.shrink._units import follows, inner_layers, own_grams
from fanbu.train import set_up
from fanbu.types import Context, Train

CHANGES: frozenset[str] = frozenset()
_DAMP = 1e-3


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    share: Annotated[float, Gt(0), Lt(1)] = 0.5, train: Train | None = Train(epochs=4, lr=2e-4),
) -> Model:  # fmt: skip
    """Brings each matrix in the blocks to the rank at which two factors hold ``share`` of its numbers.

    r = share x in x out / (in + out), rounded down. With the Gram matrix G = E x x^T of the layer's inputs and
    S S^T = G: W -> U_r Sigma_r V_r^T S^-1 of the decomposition U Sigma V^T = W S, which loses least of W x on the
    domain's texts.

    The checkpoint keeps plain matrices, now of low rank, because no plain config has room for factors: it is loaded
    as ever and is neither smaller nor faster. ``fanbu export --to onnx`` writes the two factors instead: there it is.

    Args:
        share: of the numbers of each matrix.
        train: how the factors are trained on; None leaves that out.

    Raises:
        FitError: no matrix is large enough, or there are no blocks.

    Reference: Wang et al. 2024, "SVD-LLM" (truncation that looks at activations).
    """
    network, tokenizer = open_for(parent, domain, context)
    set_up(context, "lowrank", domain.industry)
    layers = linear_layers(network)
    matrices = {n: columns(layers[n]) for n in inner_layers(network)}
    # what hands channels through needs its full rank
    ranks = {n: r for n, m in matrices.items() if not follows(m) and (r := rank_of(m.shape, share))}
    if not ranks:
        raise FitError(
            "no-layers", f"{type(network).__name__} has no matrix in its blocks of which {share} makes a rank of 1",
            remedy="take a larger share, or another way down",
        )  # fmt: skip
    factors = {
        n: factored(matrices[n].float().cpu(), gram, ranks[n])
        for n, gram in own_grams(network, tokenizer, domain, list(ranks), context)
    }
    for n, (a, b) in factors.items():
        columns(layers[n]).copy_(a @ b)  # not ``matrices``: the network may have moved since
    metrics: dict[str, float] = {}
    if train is not None:
        with _factors_trained({layers[n]: pair for n, pair in factors.items()}):
            metrics = tune(network, tokenizer, domain, train, context, f"lowrank {domain.industry}")
    made = provenance(
        "lowrank", [parent], context, domain=domain.name, share=share, ranks=ranks, train=train and vars(train)
    )
    return save_network(network, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))


def rank_of(shape: Any, share: float) -> int:
    """The rank at which two factors of a matrix hold ``share`` of its numbers."""
    rows, width = shape
    return int(share * rows * width / (rows + width))


def factored(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [out, rank], B [rank, in]) with the least E |W x - A B x|^2; gram [in, in] is E x x^T."""
    gram = gram.double()
    gram = gram + _DAMP * gram.diagonal().mean().clamp_min(1e-12) * torch.eye(len(gram), dtype=gram.dtype)
    root = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(weight.double() @ root, full_matrices=False)
    half = s[:rank].sqrt()
    b = torch.linalg.solve_triangular(root, half[:, None] * vh[:rank], upper=False, left=False)
    return (u[:, :rank] * half).float(), b.float()


class _Product(nn.Module):
    """W is A B, from the given A and B on, and training moves them."""

    def __init__(self, start: tuple[Tensor, Tensor], transposed: bool) -> None:
        super().__init__()
        self.start, self.transposed = start, transposed

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a @ b).T if self.transposed else a @ b

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.start[0].to(weight.device), self.start[1].to(weight.device)


@contextmanager
def _factors_trained(factors: Mapping[nn.Module, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within it the layers' weights are products of factors; afterwards plain matrices again."""
    for layer, pair in factors.items():
        parametrize.register_parametrization(layer, "weight", _Product(pair, stores_input_first(layer)))
    yield
    for layer in factors:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)
