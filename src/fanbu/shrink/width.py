"""Width pruning: neurons, attention heads and hidden channels are dropped by importance; the rest is a plain model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fanbu.deploy.latency import Clock, fitted, usual_milliseconds
from fanbu.domain import Domain
from fanbu.errors import FitError, UsageError
from fanbu.files import noted
from fanbu.merging.gram import columns, linear_layers, own_texts
from fanbu.model import Model, provenance, save_network
from fanbu.shrink._tune import open_for, tune
from fanbu.shrink._units import (
    Importance,
    Keep,
    Units,
    counted,
    counts_of,
    first_units,
    importances,
    kept_of,
    narrowed,
    own_grams,
    size_of,
    units,
)
from fanbu.train import set_up
from fanbu.types import Context, Train

CHANGES: frozenset[str] = frozenset({"architecture"})
_RIDGE = 1e-3
# so often sizes are chosen for a time, until they take it, give or take a twentieth; above the last it is refused
_AGAIN, _OVER, _MOST = 5, 1.05, 1.1
_Value = Callable[[float], float]
_Limit = tuple[Callable[[dict[str, int]], float], float, str]  # what is measured, its limit, its name
Share = Annotated[float, Gt(0), Le(1)]


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    neurons: Share = 0.5, heads: Share = 1.0, channels: Share = 1.0,
    parameters: Annotated[float, Ge(0)] = 0.0, milliseconds: Annotated[float, Ge(0)] = 0.0,
    importance: Importance = "activation", compensate: bool = True, train: Train | None = Train(epochs=4, lr=2e-4),
) -> Model:  # fmt: skip
    """Keeps the most important units, the same number in every layer, and fine-tunes what is left on the domain.

    The result is a smaller config of the same class, which plain transformers loads. What dropped neurons and heads
    wrote is taken over by the kept ones as well as least squares can: with X the reader's inputs on 256 texts and
    G = X^T X, its weight W becomes (W G[:, K] + r W[:, K]) (G[K, K] + r I)^-1 on the kept inputs K, r = 1e-3 mean
    diag G.

    ``parameters`` or ``milliseconds`` ask for a size instead of shares: with f in [0, 1] the share of each kind is
    1 - f (1 - its share), and the smallest f that fits is taken; heads and channels go in large steps, and the
    room that they leave is filled up with neurons.

    Args:
        neurons: share of the feed-forward neurons that stay.
        heads: share of the attention heads that stay; with grouped queries, of whole groups. Most encoders (BERT,
            ViT and others) make heads as wide as hidden size / heads: there heads go with the channels.
        channels: share of the hidden channels that stay.
        parameters: at most so many; up to 1 as a share of the parent's. 0: take the shares as they are.
        milliseconds: at most so long for one of the domain's texts at batch 1, on this machine. 0: no limit.
        importance: ``activation``, ``taylor`` (needs labels) or ``magnitude``; see ``_units.importances``.
        compensate: whether kept units take over for dropped ones.
        train: how training continues; None leaves that to a later step.

    ``metrics`` of the result hold, for a target of time, the ``milliseconds`` that the smaller network took, and those
    that the whole one took beside it.

    Raises:
        UsageError: nothing would be dropped, or the target cannot be met with these shares.
        FitError: the architecture is not known, or a kind cannot be cut in it.

    References: Muralidharan et al. 2024 (Minitron; importance by activations); Michel et al. 2019 (taylor);
        He et al. 2017, "Channel pruning for accelerating very deep neural networks" (least squares).
    """
    network, tokenizer = open_for(parent, domain, context)
    set_up(context, "width", domain.industry)
    found = units(network, parent, channels=channels < 1)
    shares = {"neurons": neurons, "heads": heads, "channels": channels}
    targets = {"parameters": parameters, "milliseconds": milliseconds}
    if not found.free_heads and heads < 1:
        raise FitError(
            "heads-not-free", f"heads of {type(network).__name__} are as wide as hidden size / heads",
            allowed="heads: 1 (they go with the channels)", got=heads, remedy="give channels instead",
        )  # fmt: skip
    counts, times = noted(
        None if context.scratch is None else context.scratch / "width.json",
        lambda: _sizes(network, tokenizer, domain, found, parent, shares, targets, context),
    )
    if all(counts[s.name] == s.units for s in found.sets if s.name in counts):
        raise UsageError(
            "bad-parameter", "width: nothing would be dropped", allowed="shares or a target that make it smaller",
            got={**shares, **targets}, remedy="say what may be dropped, and how small it is to be",
        )  # fmt: skip
    keep = kept_of(found, counts, importances(network, tokenizer, domain, found.chosen(counts), importance, context))
    if compensate:
        _compensate(network, tokenizer, domain, found, keep, context)
    smaller = narrowed(network, found, keep, parent)
    metrics = {} if train is None else tune(smaller, tokenizer, domain, train, context, f"width {domain.industry}")
    metrics |= times
    made = provenance(
        "width", [parent], context, domain=domain.name, kept=_by_kind(found, counts), importance=importance,
        compensate=compensate, parameters=size_of(smaller), train=train and vars(train),
    )  # fmt: skip
    return save_network(smaller, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))


def _sizes(
    network: Any, tokenizer: Any, domain: Domain, found: Units, parent: Model, shares: dict[str, float],
    targets: dict[str, float], context: Context,
) -> tuple[dict[str, int], dict[str, float]]:  # fmt: skip
    """How many units of each set stay, by the shares or by the targets; and the times that a target of time saw."""
    parameters, milliseconds = targets.values()

    def sizes(depth: float) -> dict[str, int]:
        return counts_of(found, {kind: 1 - depth * (1 - share) for kind, share in shares.items()})

    limits: list[_Limit] = []
    if parameters:
        most = parameters * size_of(network) if parameters <= 1 else parameters
        limits.append((lambda counts: size_of(network, found, counts), most, "parameters"))
    choose = partial(_chosen, found, sizes, shares["neurons"] < 1)
    if milliseconds:
        known = network, tokenizer, own_texts(domain, 32), context
        clock = Clock(*known, usual_milliseconds(*known))

        def measured(counts: dict[str, int]) -> float:
            return clock.milliseconds(narrowed(network, found, first_units(counts), parent), tokenizer)

        size = partial(size_of, network, found)
        counts, took = _in_time(lambda limit: choose([*limits, limit]), sizes, size, measured, milliseconds)
        return counts, {"milliseconds": took, "whole_milliseconds": clock.unit}
    return choose(limits) if limits else sizes(1.0), {}


def _chosen(
    found: Units, sizes: Callable[[float], dict[str, int]], fill: bool, limits: Sequence[_Limit]
) -> dict[str, int]:
    """The largest sizes within all limits."""
    counts = sizes(max(_least(_after(sizes, value), most, what) for value, most, what in limits))
    return _filled(found, counts, limits) if fill else counts


def _in_time(
    choose: Callable[[_Limit], dict[str, int]], sizes: Callable[[float], dict[str, int]],
    size: Callable[[dict[str, int]], int], measured: Callable[[dict[str, int]], float], most: float,
) -> tuple[dict[str, int], float]:  # fmt: skip
    """Sizes that take as long as is asked for, and how long they took.

    Some are measured, a + b x parameters is fitted to them, and what it says of the chosen ones is put right by their
    own time, until that is the one asked for.
    """
    some = [sizes(f) for f in (0.0, 0.25, 0.5, 0.75, 1.0)]
    times = [measured(counts) for counts in some]
    if times[-1] > _OVER * most:
        raise _not_reached("milliseconds", times[-1], most)
    a, b = fitted([(1.0, size(counts) / 1e6) for counts in some], times)
    aim, tries = most, list[tuple[dict[str, int], float]]()
    for _ in range(_AGAIN):
        least = a + b * size(some[-1]) / 1e6  # the smallest there are, if the fit says more of them than was measured
        counts = choose((lambda c: a + b * size(c) / 1e6, max(aim, least), "milliseconds"))
        if any(counts == c for c, _ in tries):
            break
        tries.append((counts, took := measured(counts)))
        if abs(took / most - 1) <= _OVER - 1:
            break
        aim *= most / took
    counts, took = min(tries, key=lambda t: (t[1] > _OVER * most, abs(t[1] - most)))
    if took > _MOST * most:
        raise _not_reached("milliseconds", took, most)
    return counts, took


def _filled(found: Units, counts: dict[str, int], limits: Sequence[_Limit]) -> dict[str, int]:
    """Heads and channels go in large steps: the room that they leave below the limits is filled up with neurons."""
    neurons = found.of("neurons")

    def filled(f: float) -> dict[str, int]:
        share = f * counts[neurons[0].name] / neurons[0].units + 1 - f
        return {**counts, **{s.name: counted(s.units, share) for s in neurons}}

    return filled(max(_bisected(_after(filled, value), most) for value, most, _ in limits))


def _after(counts: Callable[[float], dict[str, int]], value: Callable[[dict[str, int]], float]) -> _Value:
    return lambda f: value(counts(f))


def _least(value: _Value, most: float, what: str) -> float:
    """The smallest f in [0, 1] whose value is at most ``most``, by bisection."""
    if (least := value(1.0)) > most:
        raise _not_reached(what, least, most)
    return _bisected(value, most)


def _not_reached(what: str, least: float, most: float) -> UsageError:
    return UsageError(
        "target-not-met", f"width: {what} of {most:g} are not reached with these shares",
        allowed=f"at least {least:g} {what}", got=most, remedy="give lower shares, or cut depth and vocabulary first",
    )  # fmt: skip


def _bisected(value: _Value, most: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(8):
        middle = (low + high) / 2
        low, high = (low, middle) if value(middle) <= most else (middle, high)
    return high


def _by_kind(found: Units, counts: dict[str, int]) -> dict[str, int]:
    kinds = {
        kind: [counts[s.name] for s in found.of(kind) if s.name in counts] for kind in ("neurons", "heads", "channels")
    }
    return {kind: numbers[0] for kind, numbers in kinds.items() if numbers}


def _compensate(network: Any, tokenizer: Any, domain: Domain, found: Units, keep: Keep, context: Context) -> None:
    """Changes the readers of neurons and heads in place; columns of dropped units become zero."""
    layers = linear_layers(network)
    readers = {s.reader: s for s in found.layers if s.name in keep}
    solved: dict[str, Tensor] = {}
    for name, gram in own_grams(network, tokenizer, domain, list(readers), context):
        s, weight = readers[name], columns(layers[name])
        block = weight.shape[1] // s.units
        kept = (keep[s.name][:, None] * block + torch.arange(block)).flatten()
        solved[name] = _solved(weight.cpu(), gram, kept)
    for name, weight in solved.items():
        columns(layers[name]).copy_(weight)


def _solved(weight: Tensor, gram: Tensor, kept: Tensor) -> Tensor:
    """(W G[:, K] + r W[:, K]) (G[K, K] + r I)^-1 in the kept columns, zero in the others."""
    gram = gram.double()
    ridge = _RIDGE * gram.diagonal().mean().clamp_min(1e-12)
    inner = gram[kept][:, kept] + ridge * torch.eye(len(kept), dtype=torch.double)
    # the ridge is towards the weights as they are, so that columns which nothing correlates with stay
    target = weight.double() @ gram[:, kept] + ridge * weight[:, kept].double()
    result = torch.zeros_like(weight)
    result[:, kept] = torch.linalg.solve(inner, target.T).T.to(weight.dtype)
    return result
