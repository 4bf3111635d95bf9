"""Zip: two models of one family, whose layers may differ in width, made into one of the base's architecture.

Feed-forward neurons of both that do the same are merged, within a model and across, until as many are left as the
base has; the block's output is the weighted mean of the two outputs,

    y = (1 - share) sum over a of d_a h_a + share sum over b of d_b h_b
      ~ sum over groups G of (sum of w_u d_u over u in G) h_G,    h_G from the mean of G's incoming weights.

A neuron that resembles none stays as it is. Layers from ``until`` on stay the base's.
Reference: Stoica et al. 2024, "ZipIt! Merging models from different tasks without training".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fanbu.errors import FitError, UsageError
from fanbu.merging.dials import layer_of
from fanbu.merging.engine import shard_bytes, stored_dtype
from fanbu.merging.matching import TwoNetworks, above_chance, match
from fanbu.merging.permute import (
    Axis,
    Moves,
    Symmetry,
    heads_of,
    hidden_of,
    moved_rows,
    moves,
    plain,
    symmetries,
    units_of,
)
from fanbu.merging.rebasin import check_alike
from fanbu.merging.task_vector import head_tensors
from fanbu.model import Model, provenance, save_model
from fanbu.tensors import Shards, Tensors, chunks
from fanbu.types import Context, digest


@dataclass(frozen=True)
class Groups:
    """Which neurons of [base, other] become one: ``group`` [units of both] is each one's new place.

    ``correlations`` are those of the merged, in the order of merging.
    """

    group: Tensor
    correlations: Tensor

    def told(self, own: int) -> dict[str, Any]:
        """For the manifest: how many places hold neurons of both models, of one only, and just one neuron."""
        ours, theirs = (torch.bincount(g, minlength=own) for g in (self.group[:own], self.group[own:]))
        return {
            "both": int(((ours > 0) & (theirs > 0)).sum()), "base_only": int((theirs == 0).sum()),
            "other_only": int((ours == 0).sum()), "alone": int((ours + theirs == 1).sum()),
            "correlation": round(float(self.correlations.mean()), 6) if len(self.correlations) else 1.0,
            "lowest": round(float(self.correlations.min()), 6) if len(self.correlations) else 1.0,
        }  # fmt: skip


@dataclass(frozen=True)
class _Plan:
    """What becomes of the layers: groups of neurons by layer, where the other's heads go, and which layers."""

    groups: Mapping[int, Groups]
    moved: Moves
    told: dict[str, Any]
    heads: bool


def zip_models(
    base: Model, other: Model, out: Path, context: Context, *, texts: Sequence[str], share: float = 0.5,
    until: float = 1.0, strict: bool = False,
) -> Model:  # fmt: skip
    """Writes a model of the base's architecture that holds what both compute, as far as it can be merged.

    Neurons are grouped by the correlation of what they say on ``texts``. Attention is averaged, the other's heads in
    the base's order, where both have the same heads; else it stays the base's. Hidden channels are taken to be the
    same ones in both (specialists of one parent; others after ``rebasin`` with ``residual``): the manifest tells how
    well they correlate, and warns where that is no better than chance. Label rows stay the base's.

    Args:
        share: what the other counts, 0 to 1; the base counts 1 - share.
        until: the share of the depth that is zipped; later layers, and what follows them, stay the base's.
        strict: a FitError ``no-common-units`` instead of the warning.

    Raises:
        FitError: ``other-architecture``, ``not-permutable``, ``other-tokenizer``; their remedy is distill.
        UsageError: ``bad-parameter`` for a share or depth that is none, or no texts.
    """
    for name, value in (("share", share), ("until", until)):
        if not 0 <= value <= 1:
            raise UsageError("bad-parameter", name, allowed="0 to 1", got=value, remedy="take a number between")
    ours, theirs = symmetries(base), symmetries(other)
    check_alike(base, other, ours, theirs, width=False)
    depth = 1 + max(s.layer for s in ours)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a.layer < round(until * depth)]
    plan = _plan(base, other, pairs, texts, share, context)
    if strict and plan.told["warnings"]:
        raise FitError(
            "no-common-units", f"{other.path}: hidden channels do not correspond to those of {base.path}",
            allowed="correlations above chance", got=plan.told["channels"],
            remedy="rebasin with residual first, or use distill, which needs nothing in common",
        )  # fmt: skip
    made = provenance("zip", [base, other], context, share=share, until=until, strict=strict)
    made = replace(made, metrics=plan.told, data={"texts": digest(list(texts))})
    return save_model(
        out, _config(base, context), _Filler(base, other, pairs, plan, share, until, context), base.path, made
    )


def _config(base: Model, context: Context) -> dict[str, Any]:
    dtype = stored_dtype(context)
    kept = {k: v for k, v in base.config.items() if not (dtype and k == "torch_dtype")}
    return {**kept, "dtype": str(dtype).removeprefix("torch.")} if dtype else kept


# Planning


def _plan(
    base: Model, other: Model, pairs: Sequence[tuple[Symmetry, Symmetry]], texts: Sequence[str], share: float,
    context: Context,
) -> _Plan:  # fmt: skip
    """One pass over the texts for groups of neurons, orders of heads and correlations of channels."""
    same = heads_of(base) == heads_of(other)
    looked = [p for p in pairs if p[0].kind == "neurons" or same]
    channels = [(_channels(a, hidden_of(base)), _channels(b, hidden_of(base))) for a, b in pairs if a.kind == "neurons"]
    both = TwoNetworks(base, other, texts, context)
    work, order, groups, real, null = [*looked, *channels], {}, {}, [], []
    for i, sums in both.sums(work, [one.kind == "neurons" for one, _ in work]):
        one, two = work[i]
        if one.kind == "neurons":
            weights = torch.cat([torch.full((one.units,), 1 - share), torch.full((two.units,), share)])
            groups[one.layer] = group_units(sums.covariance()[0], weights, one.units)
            continue
        scores = sums.scores(one.group)
        if one.kind == "heads":
            order[two.name] = match(scores.pairs, scores.group)
        else:
            still = torch.arange(one.units)
            real.append(scores.correlations(still))
            null.append(scores.correlations(still.roll(1)))
    told: dict[str, Any] = {
        "layers": {str(n): g.told(_units(pairs, n)) for n, g in sorted(groups.items())},
        "attention": "averaged" if same else "the base's: the other has other heads",
        "channels": round(float(torch.cat(real).mean()), 6) if real else None, "warnings": [],
    }  # fmt: skip
    if real and not above_chance(torch.cat(real), torch.cat(null)):
        told["warnings"] = ["hidden channels of the two do not correspond: align them first (rebasin with residual)"]
    return _Plan(groups, moves(other.tensors, [b for _, b in looked], order), told, same)


def _units(pairs: Sequence[tuple[Symmetry, Symmetry]], layer: int) -> int:
    return next(a.units for a, _ in pairs if a.kind == "neurons" and a.layer == layer)


def _channels(neurons: Symmetry, hidden: int) -> Symmetry:
    """The hidden channels as the feed-forward block is given them."""
    first = neurons.axes[0].tensor
    return Symmetry(f"{first}:in", "channels", neurons.layer, hidden, (Axis(first, 1),), 1, first)


def group_units(covariance: Tensor, weights: Tensor, keep: int) -> Groups:
    """Merges the two most correlated groups until ``keep`` are left.

    ``covariance`` [units, units] of all neurons, the first ``keep`` being the base's; a group's activation is the
    mean of its units' with these ``weights``, and its covariances follow from the units'. Units that never change
    correlate with none. A group with units of the base takes the place of its first one.
    """
    c = covariance.double().cpu().numpy().copy()
    w = weights.double().numpy().clip(1e-9).copy()
    count = len(c)
    group, alive = np.arange(count), np.ones(count, dtype=bool)
    r = np.full((count, count), -np.inf)
    for i in range(count):
        r[i] = _row(c, i, alive)
    best = r.argmax(1)
    found: list[float] = []
    for _ in range(count - keep):
        top = r[np.arange(count), best]
        i = int(np.where(alive, top, -np.inf).argmax())
        i, j = sorted((i, int(best[i])))
        found.append(float(r[i, j]))
        share = w[i] / (w[i] + w[j])
        row = share * c[i] + (1 - share) * c[j]
        row[i] = share * row[i] + (1 - share) * row[j]
        c[i], c[:, i] = row, row
        w[i] += w[j]
        group[group == j], alive[j] = i, False
        r[j], r[:, j] = -np.inf, -np.inf
        r[i] = _row(c, i, alive)
        r[:, i] = np.where(alive, r[i], -np.inf)
        stale = np.flatnonzero(alive & ((best == i) | (best == j)))
        better = alive & (r[:, i] > r[np.arange(count), best])
        best[better] = i
        best[stale] = r[stale].argmax(1)
        best[i] = r[i].argmax()
    return Groups(_places(group, keep), torch.tensor(found))


def _row(c: np.ndarray, i: int, alive: np.ndarray) -> np.ndarray:
    """Correlations of group i with all others; -inf with itself and with what is gone."""
    scale = np.sqrt((c[i, i] * c.diagonal()).clip(0))
    row = np.divide(c[i], scale, out=np.zeros(len(c)), where=scale > 1e-12)
    row[~alive] = -np.inf
    row[i] = -np.inf
    return row


def _places(group: np.ndarray, keep: int) -> Tensor:
    """New places of groups: that of their first unit of the base; those without one take what is free, in order."""
    leaders = np.unique(group)
    own = {int(g): int(g) for g in leaders if g < keep}  # a group is called by its first unit
    free = iter(sorted(set(range(keep)) - set(own.values())))
    place = {**own, **{int(g): next(free) for g in leaders if g >= keep}}
    return torch.tensor([place[int(g)] for g in group])


# Writing


class _Filler:
    """Writes the zipped model, some rows at a time; feed-forward matrices one layer's tensor at a time."""

    def __init__(
        self, base: Model, other: Model, pairs: Sequence[tuple[Symmetry, Symmetry]], plan: _Plan, share: float,
        until: float, context: Context,
    ) -> None:  # fmt: skip
        self.mine, self.his = Tensors(base.path), Tensors(other.path)
        self.share, self.plan, self.context = share, plan, context
        self.names = {plain(other, n): n for n in self.his}
        self.plain = {n: plain(base, n) for n in self.mine}
        self.axes = {
            a.tensor: (one.layer, one, two, a, b)
            for one, two in pairs if one.kind == "neurons" for a, b in zip(one.axes, two.axes, strict=True)
        }  # fmt: skip
        self.heads = {a.tensor for one, _ in pairs if one.kind == "heads" for a in one.axes}
        self.layers = {one.layer for one, _ in pairs}
        self.skipped, self.whole = set(head_tensors(base)), until >= 1

    def __call__(self, folder: Path) -> dict[str, str]:
        """Writes all tensors; returns the sha256 of each file."""
        dtype = stored_dtype(self.context)
        layouts = {
            n: (s.shape, dtype if dtype and s.torch_dtype.is_floating_point else s.torch_dtype)
            for n, s in self.mine.specs.items()
        }
        shards = Shards(folder, layouts, shard_bytes(sum(s.bytes for s in self.mine.specs.values())))
        for done, name in enumerate(self.mine, 1):
            if name in self.axes:
                shards.put(name, 0, self._zipped(name))
            else:
                self._rows(shards, name)
            self.context.progress("zip", done, len(layouts))
        return shards.close()

    def _zipped(self, name: str) -> Tensor:
        """A tensor that writes neurons (means over each group) or reads them (weighted sums over each group)."""
        layer, one, two, a, b = self.axes[name]
        x, y = units_of(self.mine[name], a, one.units), units_of(self.his[b.tensor], b, two.units)
        group = self.plan.groups[layer].group
        weights = torch.cat([torch.full((len(x),), 1 - self.share), torch.full((len(y),), self.share)])
        both = torch.cat([x, y]) * weights[:, None]
        total = torch.zeros_like(x).index_add_(0, group, both)
        if name != one.reader:
            total /= torch.zeros(len(x)).index_add_(0, group, weights).clamp(min=1e-9)[:, None]
        shape = list(self.mine.specs[name].shape)
        return total.reshape(shape[a.dim], *shape[: a.dim], *shape[a.dim + 1 :]).movedim(0, a.dim)

    def _rows(self, shards: Shards, name: str) -> None:
        """A tensor that no neuron of a zipped layer touches: the mean of both models', or the base's."""
        theirs = self.names.get(self.plain[name])
        alike = theirs is not None and self.his.specs[theirs].shape == self.mine.specs[name].shape
        mean = alike and self._averaged(name) and self.mine.specs[name].torch_dtype.is_floating_point
        for start, stop in chunks(self.mine.specs[name].shape):
            rows = self.mine.rows(name, start, stop)
            if mean and theirs:
                other = moved_rows(self.his, theirs, start, stop, self.plan.moved).float()
                rows = rows.float() * (1 - self.share) + other * self.share
            shards.put(name, start, rows)

    def _averaged(self, name: str) -> bool:
        layer = layer_of(name)
        if name in self.skipped or (name in self.heads and not self.plan.heads):
            return False
        if layer is not None:
            return layer in self.layers
        # what stands before the layers is read by zipped ones; what follows them belongs to the last
        first = any(word in name for word in ("embed", "wte", "wpe"))
        return self.whole or (first and bool(self.layers))
