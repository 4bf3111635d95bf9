"""RegMean: each layer of the merged model comes nearest to what the specialists' layers do on what they see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.merging.engine import Combine, Linear, Stack, merge
from fanbu.merging.gram import damped, grams, linear_layers, own_texts, stores_input_first
from fanbu.merging.least_squares import FORM, GRAM, MOMENT, Moments, solve
from fanbu.merging.task_vector import TaskVector
from fanbu.model import Model, load_network, load_tokenizer, provenance
from fanbu.types import Context, Needs

NEEDS = Needs(kind="statistics", same_architecture=True)
LINEAR = True
SENSITIVITY = None


def contribute(
    specialist: Specialist, base: Model, context: Context, *, rows: int = 256, shrink: float = 0.9
) -> Contribution:
    """For each linear layer G_i (Gram matrix of its inputs) and delta_i G_i; for all else delta_i; the label rows.

    G_i = X^T X / n over the tokens of at most ``rows`` of the owner's own texts, which stay where they are. All of it
    only needs to be summed.

    Args:
        rows: how many texts are looked at.
        shrink: what the off-diagonal of G_i is multiplied by (0.9 in the paper; 1 leaves it).

    Raises:
        FitError: the specialist's architecture is not the base's.
    """
    vector = TaskVector(specialist.model, base)
    network, tokenizer = load_network(specialist.model), load_tokenizer(specialist.model)
    layers = linear_layers(network)
    names = [n for n in vector.names if n in layers]
    found, leaders = grams(network, tokenizer, own_texts(specialist.domain, rows), names, context)
    matrices = {n: damped(g, shrink) for n, g in found.items()}
    turned = sorted(n for n in leaders if stores_input_first(layers[n]))
    meta = {"labels": list(specialist.model.labels), "form": FORM, "leaders": leaders, "turned": turned}
    tensors = Moments(vector, matrices, leaders, turned)
    return Contribution("statistics", specialist.domain.name, "regmean", tensors, meta=meta)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, ridge: float = 1e-6
) -> Model:
    """W = W_base + (sum of delta_i G_i) (sum of G_i)^-1 for each linear layer; the mean of delta_i for all else.

    It minimises the sum over specialists of |X_i W^T - X_i W_i^T|^2 (with damped off-diagonals). Solved in float64.

    Args:
        ridge: added to the diagonal of the sum, times its mean; it draws towards the base.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Jin et al. 2023, "Dataless knowledge fusion by merging weights of language models".
    """
    turned, leaders = (contributions[0].meta[key] for key in ("turned", "leaders"))

    def rule(stack: Stack) -> Combine:
        if stack.name not in leaders:
            return Linear([1.0 / len(stack.domains)] * len(stack.domains))
        gram, moment = (_sum(contributions, n) for n in (GRAM + leaders[stack.name], MOMENT + stack.name))
        delta = solve(gram, moment, ridge)
        delta = delta.T if stack.name in turned else delta
        return lambda part: delta[part.start : part.stop].to(part.base.device)

    made = provenance("regmean", [base], context, ridge=ridge, domains=[c.domain for c in contributions])
    return merge(base, contributions, out, context, rule, made, whole=lambda stack: held(stack.shape))


def held(shape: Sequence[int]) -> int:
    """Bytes that solving for a matrix takes: G, its factor and one arriving; the moment, one arriving, the solution."""
    return 4 * (5 * max(shape) ** 2 + 6 * math.prod(shape))


def _sum(contributions: Sequence[Contribution], name: str) -> Tensor:
    """In float64; one of them is in memory at a time."""
    total = contributions[0].tensors[name].double()
    for c in contributions[1:]:
        total.add_(c.tensors[name])
    return total
