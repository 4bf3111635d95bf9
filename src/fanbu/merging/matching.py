"""Which unit of one network is which of another: scores, assignments, and activations on the same texts.

References: Li et al. 2015, "Convergent learning: do different neural networks learn the same representations?";
Ainsworth et al. 2023, "Git Re-Basin: merging models modulo permutation symmetries".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from fanbu.batches import collate, encode, pad_id, sorted_batches
from fanbu.errors import FitError, UsageError
from fanbu.merging.permute import Symmetry, plain
from fanbu.model import Model, load_network, load_strictly, load_tokenizer
from fanbu.predict import limit
from fanbu.train import set_up
from fanbu.types import Context

_BATCH = 32


@dataclass(frozen=True)
class Scores:
    """How alike the units of base and model are: ``pairs`` [units, units] is what an order maximises the sum of.

    ``base`` and ``model`` [units] are the units' squared lengths, so that pairs / sqrt(base model) are correlations.
    ``chance`` is ``pairs`` after the model's features (or tokens) were shuffled, the same way for all its units: what
    a best order is worth where units have nothing to do with each other.
    """

    pairs: Tensor
    chance: Tensor
    base: Tensor
    model: Tensor
    group: int = 1

    def correlations(self, order: Tensor, *, chance: bool = False) -> Tensor:
        """The correlation of each two units that an order brings together; units that do nothing are left out."""
        size = (self.base * self.model[order]).double().sqrt()
        found = (self.chance if chance else self.pairs).double()[torch.arange(len(order)), order]
        return (found / size)[size > 0]

    def worth(self, order: Tensor) -> float:
        """What an order maximises."""
        return float(self.pairs.double()[torch.arange(len(order)), order].sum())


def match(pairs: Tensor, group: int = 1) -> Tensor:
    """The order that maximises sum over i of pairs[i, order[i]], exactly (linear assignment).

    With ``group`` > 1 blocks of so many units move as wholes, and units within them: the best order within each
    pair of blocks gives that pair's score, and the blocks are then assigned by these.
    """
    scores = pairs.double().cpu().numpy()
    if group == 1:
        return torch.as_tensor(linear_sum_assignment(scores, maximize=True)[1])
    blocks = len(scores) // group
    within = np.zeros((blocks, blocks, group), dtype=np.int64)
    values = np.zeros((blocks, blocks))
    for i in range(blocks):
        for j in range(blocks):
            part = scores[i * group : (i + 1) * group, j * group : (j + 1) * group]
            rows, within[i, j] = linear_sum_assignment(part, maximize=True)
            values[i, j] = part[rows, within[i, j]].sum()
    chosen = linear_sum_assignment(values, maximize=True)[1]
    return torch.as_tensor(np.concatenate([j * group + within[i, j] for i, j in enumerate(chosen)]))


def above_chance(real: Tensor, null: Tensor) -> bool:
    """Whether a mean of correlations is above what chance gives, by three standard errors of the difference."""
    if len(real) < 2 or len(null) < 2:
        return len(real) > 0 and float(real.mean()) > 0.5
    error = (real.var() / len(real) + null.var() / len(null)).sqrt()
    return float(real.mean() - null.mean()) > 3 * float(error)


# Activations


class Sums:
    """What correlations need of activations x [tokens, units, block] and y: sums, squares and products, in float64.

    Products are of the same place in the block only: a head's numbers are not reordered.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: dict[str, Any] = {}

    def add(self, x: Tensor, y: Tensor, mixed: Tensor | None = None) -> None:
        """Some tokens more; ``mixed`` is y with its tokens in another order."""
        self.count += len(x)
        new = {"x": x.sum(0), "y": y.sum(0), "xx": x.square().sum(0), "yy": y.square().sum(0)}
        new["xy"] = torch.einsum("tub,tvb->buv", x, y)
        if mixed is not None:
            new["mixed"] = torch.einsum("tub,tvb->buv", x, mixed)
        for name, value in new.items():
            if name in self.total:
                self.total[name] += value
            else:
                self.total[name] = value.double()

    def covariance(self, which: str = "xy") -> Tensor:
        """[block, units of x, units of y]."""
        x, y = self.total["x"].T / self.count, self.total["y"].T / self.count
        return self.total[which] / self.count - x[:, :, None] * y[:, None, :]

    def scores(self, group: int = 1) -> Scores:
        """Correlations, averaged over a unit's block; units that never change have length 0."""
        spread = []
        for name in ("x", "y"):
            mean = self.total[name] / self.count
            square = self.total[name * 2] / self.count
            variance = square - mean.square()
            spread.append(torch.where(variance > 1e-10 * square, variance, 0).sqrt().T)
        scale = spread[0][:, :, None] * spread[1][:, None, :]
        pairs, chance = (
            torch.where(scale > 0, self.covariance(w) / scale, 0).mean(0).float().cpu() for w in ("xy", "mixed")
        )
        base, model = ((s > 0).any(0).float().cpu() for s in spread)
        return Scores(pairs, chance, base, model, group)


Use = Callable[[int, Tensor, Tensor], None]


class TwoNetworks:
    """Base and model, run on the same tokens, with a look at what some of their modules are given.

    Raises FitError ``other-tokenizer`` where the two read a text as other tokens, UsageError for no texts.
    """

    def __init__(self, base: Model, model: Model, texts: Sequence[str], context: Context) -> None:
        if not texts:
            raise UsageError(
                "bad-parameter", "texts: activations are compared on texts", allowed="at least one text", got=0,
                remedy="give some hundred texts such as both models know",
            )  # fmt: skip
        self._models, self._context = (base, model), context
        self._networks = [_network(m).to(context.device).eval() for m in self._models]
        tokenizers = [load_tokenizer(m) for m in self._models]
        longest = min(limit(n, context) for n in self._networks)
        self._sequences, other = (encode(t, texts, longest) for t in tokenizers)
        differing = [i for i, pair in enumerate(zip(self._sequences, other, strict=True)) if pair[0] != pair[1]]
        if differing:
            raise FitError(
                "other-tokenizer", f"{model.path} reads texts as other tokens than {base.path}",
                allowed="the same tokens", got=f"{len(differing)} of {len(texts)} texts differ",
                remedy="match by weights, or use distill, which needs no common tokenizer",
            )  # fmt: skip
        self._pad = pad_id(tokenizers[0])

    def run(self, readers: Sequence[tuple[str, str]], use: Use) -> None:
        """``use(i, x, y)`` for each batch and pair of weights: [tokens, width] that the i-th two are given."""
        set_up(self._context, "align")
        batches = sorted_batches([len(s) for s in self._sequences], _BATCH)
        names = [[pair[side] for pair in readers] for side in (0, 1)]
        with (
            _given(self._networks[0], self._models[0], names[0]) as x,
            _given(self._networks[1], self._models[1], names[1]) as y,
            torch.inference_mode(),
        ):
            for number, rows in enumerate(batches, 1):
                batch = collate([self._sequences[i] for i in rows], self._pad, self._context.device)
                keep = batch["attention_mask"].bool()
                for network in self._networks:
                    network(**batch)
                for i in range(len(readers)):
                    use(i, x[i][keep].float(), y[i][keep].float())
                self._context.progress("activations", number, len(batches))

    def sums(self, pairs: Sequence[tuple[Symmetry, Symmetry]], joint: Sequence[bool]) -> Iterator[tuple[int, Sums]]:
        """The sums of each pair of sets of units, as many at a time as ``context.memory`` holds.

        Where ``joint`` says so, the units of both are taken together, as x and as y alike.
        """
        waiting = list(range(len(pairs)))
        while waiting:
            room, chosen = self._context.memory, list[int]()
            while waiting and (not chosen or room >= 0):
                room -= _room(*pairs[waiting[0]], joint[waiting[0]])
                if not chosen or room >= 0:
                    chosen.append(waiting.pop(0))
            found = self._some([pairs[i] for i in chosen], [joint[i] for i in chosen])
            yield from zip(chosen, found, strict=True)

    def _some(self, pairs: Sequence[tuple[Symmetry, Symmetry]], joint: Sequence[bool]) -> list[Sums]:
        found = [Sums() for _ in pairs]
        generator = torch.Generator().manual_seed(self._context.seeded("chance"))

        def use(i: int, x: Tensor, y: Tensor) -> None:
            x, y = (v.reshape(len(v), s.units, -1) for v, s in zip((x, y), pairs[i], strict=True))
            if joint[i]:
                both = torch.cat([x, y], 1)
                found[i].add(both, both)
                return
            order = torch.randperm(len(y), generator=generator).to(y.device)
            found[i].add(x, y, y[order])

        self.run([(a.reader, b.reader) for a, b in pairs], use)
        return found


def _room(one: Symmetry, other: Symmetry, joint: bool) -> int:
    """Bytes that the sums of two sets of units take: products, and those of shuffled tokens, in float64."""
    block = one.axes[-1].block  # the reader's: a head's numbers, or one neuron
    return 8 * block * (one.units + other.units) ** 2 if joint else 16 * block * one.units * other.units


def activation_scores(
    base: Model, model: Model, pairs: Sequence[tuple[Symmetry, Symmetry]], texts: Sequence[str], context: Context
) -> dict[str, Scores]:
    """Correlations of all units on the same tokens, by the names of the model's sets of units."""
    both = TwoNetworks(base, model, texts, context)
    return {pairs[i][1].name: s.scores(pairs[i][0].group) for i, s in both.sums(pairs, [False] * len(pairs))}


def _network(model: Model) -> Any:
    """The network, with its head where fanbu knows the task; the bare body else."""
    if model.task is not None:
        return load_network(model)
    from transformers import AutoModel

    return load_strictly(AutoModel, model, allowed_missing=("pooler.",))


@contextmanager
def _given(network: Any, model: Model, weights: Sequence[str]) -> Iterator[dict[int, Tensor]]:
    """What the modules that hold these weights were given last, by their number."""
    modules = {plain(model, f"{name}.weight"): m for name, m in network.named_modules()}
    given: dict[int, Tensor] = {}

    def hook(number: int) -> Any:
        def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            given[number] = inputs[0]

        return look

    handles = [modules[plain(model, w)].register_forward_pre_hook(hook(i)) for i, w in enumerate(weights)]
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()
