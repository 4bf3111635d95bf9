"""RegMean++: RegMean layer by layer, with what each layer is given by the layers that are merged already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from fanbu.batches import evenly
from fanbu.contribution import Contribution
from fanbu.feedback.weights._probed import contribute
from fanbu.merging.dials import layer_of
from fanbu.merging.engine import Combine, Linear, Stack, merge
from fanbu.merging.gram import damped, grams, linear_layers, stores_input_first
from fanbu.merging.least_squares import solve
from fanbu.merging.live import Live, asked_texts
from fanbu.merging.spectral import within
from fanbu.model import Model, provenance
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True, same_tokenizer=True, probe=True)
LINEAR = False
SENSITIVITY = None
NEUTRAL = {"ridge": 0.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, rows: int = 128,
    shrink: float = 0.9, ridge: float = 1e-6,
) -> Model:  # fmt: skip
    """W = W_base + (sum of delta_i G_i) (sum of G_i)^-1 for each linear layer, the mean of delta_i for all else.

    G_i = X_i^T X_i / n, X_i the inputs of the layer on domain i's texts of the probe set, where all layers before are
    merged already and the layers of the same block are specialist i's. In ``regmean`` all layers before are
    specialist i's, and no text leaves its owner.

    Args:
        rows: how many texts of each domain are looked at.
        shrink: what the off-diagonal of G_i is multiplied by.
        ridge: added to the diagonal of the sum, times its mean; it draws towards the base.

    Raises:
        FitError: a contribution's tensors are not the base's, or a domain has no texts in the probe set.

    Reference: Nguyen et al. 2025, "RegMean++: enhancing effectiveness and generalization of regression mean for model
    merging".
    """
    within("regmean_plus: shrink", shrink, 0, 1)
    texts = {d: evenly(t, rows) for d, t in asked_texts(context, contributions, "regmean_plus").items()}
    live = Live(base, contributions, context)
    layers = linear_layers(live.network)
    equal = [1.0 / len(contributions)] * len(contributions)
    live.blend(lambda stack: equal)
    solved: dict[str, Tensor] = {}
    blocks = [list(names) for _, names in groupby(live.parameters, key=layer_of)]
    for done, block in enumerate(blocks, 1):
        names = [n for n in block if n in layers and live.stacks[n].matrix]
        if names:
            solved |= _block(live, block, names, texts, shrink, ridge)
        context.progress("regmean_plus", done, len(blocks))

    def rule(stack: Stack) -> Combine:
        if stack.name not in solved:
            return Linear(equal)
        delta = solved[stack.name]
        return lambda part: delta[part.start : part.stop].to(part.base.device)

    made = provenance(
        "regmean_plus", [base], context, rows=rows, shrink=shrink, ridge=ridge, probe=context.probe.digest,
        domains=[c.domain for c in contributions],
    )  # fmt: skip
    return merge(base, contributions, out, context, rule, made)


def _block(
    live: Live, block: Sequence[str], names: Sequence[str], texts: dict[str, list[str]], shrink: float, ridge: float
) -> dict[str, Tensor]:
    """The merged changes of a block's matrices; the network's block is the merged one afterwards."""
    layers = linear_layers(live.network)
    before = {n: live.parameters[n].detach().clone() for n in block}
    totals: dict[str, Tensor] = {}
    moments: dict[str, Tensor] = {}
    for domain, own in texts.items():
        live.become(block, domain)
        found, leaders = grams(live.network, live.tokenizer, own, names, live.context)
        for name in names:
            gram = damped(found[leaders[name]], shrink).double()
            delta = live.alone(name, domain).whole().deltas[0].cpu().double()
            delta = delta.T if stores_input_first(layers[name]) else delta
            totals[name] = totals[name] + gram if name in totals else gram
            moments[name] = moments[name] + delta @ gram if name in moments else delta @ gram
    solved = {}
    with torch.no_grad():
        for name in block:
            live.parameters[name].copy_(before[name])
        for name in names:
            delta = solve(totals[name], moments[name], ridge)
            solved[name] = delta.T.contiguous() if stores_input_first(layers[name]) else delta
            start = live.stacks[name].whole().base
            live.parameters[name].copy_(start.add_(solved[name].to(start.device)).view_as(live.parameters[name]))
    return solved
