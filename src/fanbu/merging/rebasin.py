"""Re-basin: a model whose neurons and heads are put into the base's order, so that the two can be merged.

    minimise over permutations P:  || theta_base - P(theta_model) ||^2

which for each set of units is a linear assignment with scores <unit of base, unit of model>. What the model computes
does not change. References: Ainsworth et al. 2023, "Git Re-Basin"; Li et al. 2015, "Convergent learning".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fanbu.errors import FitError, UsageError
from fanbu.merging.engine import shard_bytes
from fanbu.merging.matching import Scores, above_chance, activation_scores, match
from fanbu.merging.permute import (
    Axis,
    Moves,
    Order,
    Symmetry,
    heads_of,
    hidden_of,
    is_body,
    is_rotary,
    moved_rows,
    moves,
    plain,
    setting,
    symmetries,
    units_of,
)  # fmt: skip
from fanbu.merging.task_vector import head_tensors
from fanbu.model import Model, Provenance, provenance, save_model
from fanbu.tensors import Shards, Tensors, check_finite, chunks
from fanbu.types import Context, digest

By = Literal["weights", "activations"]
_PASSES = 50  # each pass of coordinate descent comes nearer; this is only a bound
_BETTER = 1e-6  # what counts as nearer, relative: rounding must not make it go round in circles


def rebasin(
    model: Model, base: Model, out: Path, context: Context, *, by: By = "weights", texts: Sequence[str] = (),
    residual: bool = False, strict: bool = False,
) -> Model:  # fmt: skip
    """Writes ``model`` with its neurons and heads (with ``residual`` its hidden channels too) in the base's order.

    Without ``residual`` no two sets of units touch, so that one assignment each is the optimum. With it, orders
    depend on each other: coordinate descent, which begins at the channels (embeddings tie them to the vocabulary),
    takes the others in a seeded order and ends when none changes. ``activations`` compares what units say on
    ``texts`` instead: both networks are in memory, and as many layers' statistics as ``context.memory`` holds.

    The manifest tells the relative distance || model - base || / || base || before and after, the mean correlation
    of matched units, and the same by chance; where it is no better than chance, a warning, or with ``strict`` a
    FitError ``no-common-units``.

    Raises:
        FitError: ``other-architecture`` or ``not-permutable``; ``other-tokenizer`` for activations.
        UsageError: ``bad-parameter`` for activations without texts or with ``residual``, or an unknown ``by``.
    """
    _check_parameters(by, texts, residual)
    ours, theirs = symmetries(base, residual=residual), symmetries(model, residual=residual)
    check_alike(base, model, ours, theirs)
    pairs = list(zip(ours, theirs, strict=True))
    if by == "weights":
        order, scores = _by_weights(base, model, pairs, context)
    else:
        scores = activation_scores(base, model, pairs, texts, context)
        order = {name: match(s.pairs, s.group) for name, s in scores.items()}
    told = _told(scores, order)
    if strict and not told["above_chance"]:
        raise FitError(
            "no-common-units", f"{model.path} has no units in common with {base.path}",
            allowed=f"a mean correlation above {told['chance']:.4f}, which is chance", got=f"{told['correlation']:.4f}",
            remedy="use distill, which needs nothing in common, or leave strict out to have it aligned all the same",
        )  # fmt: skip
    moved = moves(model.tensors, theirs, order)
    if residual and is_body(model):
        told["warnings"].append("what this bare body returns are its hidden channels: they are in the base's order now")
    told["distance_before"], told["distance_after"] = distance(base, model, {}), distance(base, model, moved)
    if told["distance_after"] > 0.95 * told["distance_before"] > 0 and told["moved"]:
        told["warnings"].append("it came hardly nearer: hidden channels may differ, and residual reorders these")
    made = provenance("rebasin", [model, base], context, by=by, residual=residual, strict=strict)
    data = {"texts": digest(list(texts))} if by == "activations" else {}
    return _write(model, out, moved, replace(made, metrics=told, data=data), context)


def _check_parameters(by: str, texts: Sequence[str], residual: bool) -> None:
    if by not in ("weights", "activations"):
        raise UsageError(
            "bad-parameter", "by", allowed="weights, activations", got=by, remedy="take one of these"
        )  # fmt: skip
    if by == "activations" and not texts:
        raise UsageError(
            "bad-parameter", "texts: activations are compared on texts", allowed="at least one text", got=0,
            remedy="give some hundred texts such as both models know, or match by weights",
        )  # fmt: skip
    if by == "activations" and residual:
        raise UsageError(
            "bad-parameter", "residual: hidden channels are matched by weights only", allowed="by weights", got=by,
            remedy="match by weights first with residual, then its result by activations",
        )  # fmt: skip


# What must be alike


def check_alike(
    base: Model, model: Model, ours: Sequence[Symmetry], theirs: Sequence[Symmetry], *, width: bool = True
) -> None:
    """Raises FitError ``other-architecture`` where no order can make two models alike, and says why.

    With ``width`` False the number of neurons and heads may differ.
    """
    checks: list[tuple[str, object, object]] = [
        (what, setting(base, *names), setting(model, *names))
        for what, *names in (
            ("another model type", "model_type"), ("another activation function", "hidden_act", "activation_function"),
        )
    ]  # fmt: skip
    checks.append(("another hidden size", hidden_of(base), hidden_of(model)))
    checks.append(("another depth", _depth(ours), _depth(theirs)))
    if is_rotary(base):
        checks.append(("heads of another size, whose rotary positions differ", heads_of(base)[2], heads_of(model)[2]))
    for why, allowed, got in checks:
        if allowed != got:
            raise _unlike(model, why, allowed, got)
    for one, other in zip(ours, theirs, strict=True):
        if width:
            _check_units(model, one, other)
        names = [[plain(m, a.tensor) for a in s.axes] for m, s in ((base, one), (model, other))]
        if one.kind != "channels" and names[0] != names[1]:
            raise _unlike(model, f"other tensors in {other.name!r}", names[0], names[1])


def _check_units(model: Model, one: Symmetry, other: Symmetry) -> None:
    allowed, got = (f"{s.units} in {s.units // s.group} groups" for s in (one, other))
    if allowed != got:
        raise FitError(
            "other-width", f"{model.path} has another number of {one.kind} in {other.name!r}", allowed=allowed,
            got=got, remedy="zip the two (fanbu align --zip), or use distill, which needs nothing in common",
        )  # fmt: skip


def _depth(found: Sequence[Symmetry]) -> int:
    return 1 + max(s.layer for s in found)


def _unlike(model: Model, why: str, allowed: object, got: object) -> FitError:
    return FitError(
        "other-architecture", f"{model.path} cannot be put into the base's order: it has {why}", allowed=allowed,
        got=got, remedy="feed it back by predictions (distill), which needs nothing in common",
    )  # fmt: skip


# What was found


def _told(scores: dict[str, Scores], order: Order) -> dict[str, Any]:
    """What the manifest says of a match: mean correlations over all units, by set of units, and how many moved."""
    real = {name: s.correlations(order[name]) for name, s in scores.items()}
    null = {name: s.correlations(match(s.chance, s.group), chance=True) for name, s in scores.items()}
    every, chance = torch.cat(list(real.values())), torch.cat(list(null.values()))
    better = above_chance(every, chance)
    warnings = [] if better else ["matched units are no more alike than chance: do not expect a merge to work"]
    return {
        "correlation": _mean(every), "chance": _mean(chance), "above_chance": better, "warnings": warnings,
        "correlations": {name: _mean(values) for name, values in real.items()},
        "units": sum(map(len, order.values())),
        "moved": sum(int((o != torch.arange(len(o))).sum()) for o in order.values()),
    }  # fmt: skip


def _mean(values: Tensor) -> float:
    return round(float(values.mean()), 6) if len(values) else 0.0


# By weights


def _by_weights(
    base: Model, model: Model, pairs: Sequence[tuple[Symmetry, Symmetry]], context: Context
) -> tuple[dict[str, Tensor], dict[str, Scores]]:
    """Coordinate descent over all sets of units; returns their orders, and their scores under the orders of the rest.

    Each pass holds the tensors of one set of units at a time, and of the channels one tensor.
    """
    mine, his, theirs = Tensors(base.path), Tensors(model.path), [t for _, t in pairs]
    coupled = any(t.kind == "channels" for t in theirs)
    generator = torch.Generator().manual_seed(context.seeded("rebasin"))
    order: dict[str, Tensor] = {}
    scores: dict[str, Scores] = {}
    for number in range(_PASSES):
        changed = False
        shuffled = [pairs[i] for i in torch.randperm(len(pairs), generator=generator).tolist()]
        # the first pass begins with the channels: only they have something (the vocabulary) that stands still
        shuffled.sort(key=lambda pair: number == 0 and pair[1].kind != "channels")
        for done, (one, other) in enumerate(shuffled, 1):
            others = [t for t in theirs if t is not other]
            still = _still(other, others, order) if other.kind == "channels" else None
            found = _weight_scores(mine, his, one, other, moves(model.tensors, others, order), still, context)
            best, before = match(found.pairs, found.group), order.get(other.name)
            if before is None or found.worth(best) > found.worth(before) * (1 + _BETTER):
                changed |= before is None or not torch.equal(best, before)
                order[other.name] = best
            scores[other.name] = found
            context.progress("align", done, len(shuffled))
        if not (coupled and changed):
            break
    return order, scores


def _still(channels: Symmetry, others: Sequence[Symmetry], order: Order) -> set[str]:
    """Tensors whose other dimensions are in the base's order already: the channels are compared on these."""
    waiting = {a.tensor for s in others if s.name not in order for a in s.axes}
    return {a.tensor for a in channels.axes if a.tensor not in waiting}


def _weight_scores(
    mine: Tensors, his: Tensors, one: Symmetry, other: Symmetry, moved: Moves, only: set[str] | None, context: Context
) -> Scores:
    """Inner products of units, summed over tensors, each feature centred over the units.

    Centring adds the same number to every order's sum, so it changes no best order; it makes the correlations mean
    something, as biases and norms that all units share would count otherwise.
    """
    sums = [torch.zeros(one.units, one.units, device=context.device) for _ in range(2)]
    sizes = [torch.zeros(one.units, device=context.device) for _ in range(2)]
    for a, b in _axes(one, other, mine, his):
        if b.fixed or (only is not None and b.tensor not in only):
            continue
        group = one.group if a.grouped else 1
        count = one.units // group
        tensors = (mine[a.tensor], moved_rows(his, b.tensor, 0, his.specs[b.tensor].rows, moved))
        check_finite(b.tensor, tensors[1], his.specs[b.tensor].file)
        x, y = (units_of(t.to(context.device), axis, count) for t, axis in zip(tensors, (a, b), strict=True))
        x, y = x - x.mean(0), y - y.mean(0)
        generator = torch.Generator().manual_seed(context.seeded("chance", one.name, a.tensor, a.first))
        mixed = y[:, torch.randperm(y.shape[1], generator=generator).to(y.device)]
        # a block's score is shared by its query heads, so that every sum over heads counts it once
        for total, z in zip(sums, (y, mixed), strict=True):
            part = x @ z.T / group
            total += part.repeat_interleave(group, 0).repeat_interleave(group, 1) if group > 1 else part
        for total, z in zip(sizes, (x, y), strict=True):
            total += z.square().sum(1).repeat_interleave(group) / group
    return Scores(sums[0].cpu(), sums[1].cpu(), sizes[0].cpu(), sizes[1].cpu(), one.group)


def _axes(one: Symmetry, other: Symmetry, mine: Tensors, his: Tensors) -> Iterator[tuple[Axis, Axis]]:
    """Axes of the same tensors. Those of channels that only one model has, or has in another shape (label rows,
    added tokens), are moved all the same and cannot be compared."""
    if one.kind != "channels":
        yield from zip(one.axes, other.axes, strict=True)
        return
    known = {(a.tensor, a.dim): a for a in one.axes}
    for b in other.axes:
        a = known.get((b.tensor, b.dim))
        if a and mine.specs[a.tensor].shape == his.specs[b.tensor].shape:
            yield a, b


# Distance, and writing


def distance(base: Model, model: Model, moved: Moves) -> float:
    """|| P(theta_model) - theta_base || / || theta_base || over all numbers of the bodies that have the same shapes."""
    mine, his = Tensors(base.path), Tensors(model.path)
    skipped = set(head_tensors(model))
    names = {plain(base, n): n for n in mine if mine.specs[n].torch_dtype.is_floating_point}
    apart = size = 0.0
    for name in his:
        own = names.get(plain(model, name))
        if own is None or name in skipped or mine.specs[own].shape != his.specs[name].shape:
            continue
        for start, stop in chunks(mine.specs[own].shape):
            reference = mine.rows(own, start, stop).double()
            apart += float((moved_rows(his, name, start, stop, moved).double() - reference).square().sum())
            size += float(reference.square().sum())
    return math.sqrt(apart / size) if size else 0.0


def _write(model: Model, out: Path, moved: Moves, made: Provenance, context: Context) -> Model:
    """The model's own bytes in another order, some rows at a time."""
    tensors = Tensors(model.path)
    layouts = {n: (s.shape, s.torch_dtype) for n, s in tensors.specs.items()}

    def fill(folder: Path) -> dict[str, str]:
        shards = Shards(folder, layouts, shard_bytes(sum(s.bytes for s in tensors.specs.values())))
        for done, name in enumerate(tensors, 1):
            for start, stop in chunks(layouts[name][0]):
                shards.put(name, start, moved_rows(tensors, name, start, stop, moved))
            context.progress("write", done, len(layouts))
        return shards.close()

    return save_model(out, model.config, fill, model.path, made)
