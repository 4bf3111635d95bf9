"""What a search chooses from: sub-networks of one network, cut along one order of importance, scored untrained."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fanbu.batches import evenly
from fanbu.domain import Domain
from fanbu.merging.gram import columns, linear_layers, own_texts
from fanbu.merging.permute import Symmetry
from fanbu.model import Model
from fanbu.predict import class_logits, features, token_losses
from fanbu.shrink._rounding import on_grid
from fanbu.shrink._tune import open_for
from fanbu.shrink._units import (
    Shapes,
    Units,
    counts_of,
    importances,
    inner_layers,
    kept_of,
    narrowed,
    parameters_of,
    shapes_of,
    shapes_with,
    units,
)
from fanbu.shrink.depth import SAMPLE, by_influence, keep_layers, layers_of, pinned
from fanbu.shrink.quantize import table_of
from fanbu.types import Context

_SAMPLE = 192
_RIDGE = 1e-3


@dataclass(frozen=True)
class Choice:
    """One sub-network: ``neurons`` and ``channels`` are shares, ``tokens`` the number of the vocabulary."""

    layers: int
    channels: float
    neurons: float
    tokens: int = 0
    bits: int = 32

    @property
    def shares(self) -> dict[str, float]:
        """As ``counts_of`` takes them."""
        return {"neurons": self.neurons, "heads": 1.0, "channels": self.channels}


@dataclass(frozen=True)
class Sketch:
    """A sub-network in numbers: ``inner`` names the matrices inside its blocks, ``table`` its token embedding, if that
    is no other matrix too."""

    shapes: Shapes
    hidden: int
    neurons: int
    inner: frozenset[str]
    table: str | None

    @property
    def parameters(self) -> int:
        """How many numbers it has."""
        return parameters_of(self.shapes)

    def bytes(self, bits: int) -> int:
        """On disk, as ``quantize`` stores whole rows in so many bits (32: floats)."""
        total = 0
        for name, shape in self.shapes.items():
            numbers, rows = math.prod(shape), 4 * shape[0] if shape else 0
            if bits < 32 and name in self.inner:
                total += math.ceil(shape[1] * bits / 32) * rows + rows + 16  # whole words, a scale a row, the shape
            elif bits < 32 and name == self.table:
                total += numbers + rows
            else:
                total += 4 * numbers
        return total


class Space:
    """All sub-networks of a model for a domain: which layers and units go first is found once."""

    def __init__(self, model: Model, domain: Domain, context: Context) -> None:
        self.model, self.domain, self.context = model, domain, context
        self.network, self.tokenizer = open_for(model, domain, context)
        self.count = self.network.config.num_hidden_layers
        self.least = len(pinned(layers_of(self.network)))
        self._known_layers: dict[int, tuple[Shapes, Units, frozenset[str], str | None]] = {}
        self._known_scores: dict[str, float] = {}

    @cached_property
    def order(self) -> list[int]:
        """Layers as ``depth`` keeps them by influence, those that stay longest first."""
        texts = self.domain.train.texts[:SAMPLE]
        return by_influence(self.network, self.tokenizer, texts, layers_of(self.network), self.context)

    @cached_property
    def scores(self) -> dict[tuple[str, int], Tensor]:
        """Importance of units by what they are and the layer that they are in."""
        found = units(self.network, self.model, channels=True)
        own = importances(self.network, self.tokenizer, self.domain, found.sets, "activation", self.context)
        return {(s.kind if s.layer >= 0 else s.name, s.layer): own[s.name] for s in found.sets}

    def layers_kept(self, layers: int) -> list[int]:
        """Their numbers, ascending."""
        return sorted(self.order[:layers])

    def shallower(self, layers: int) -> tuple[Any, Units]:
        """A copy with so many layers, and its units."""
        network = copy.deepcopy(self.network)
        keep_layers(network, layers_of(network), self.layers_kept(layers))
        return network, units(network, self.model, channels=True)

    def cut(self, choice: Choice) -> Any:
        """The sub-network, untrained, its weights on a grid where the choice has fewer bits."""
        network, found = self.shallower(choice.layers)
        counts, kept = counts_of(found, choice.shares), self.layers_kept(choice.layers)
        scores = {s.name: self._importance(s, kept) for s in found.chosen(counts)}
        smaller = narrowed(network, found, kept_of(found, counts, scores), self.model).eval()
        if choice.bits < 32:
            layers = linear_layers(smaller)
            for name in inner_layers(smaller):
                weight = columns(layers[name])
                weight.copy_(on_grid(weight, None, choice.bits, 0, "nearest")[0])
        return smaller

    def whole(self, choice: Choice) -> bool:
        """Whether the choice leaves nothing out."""
        return choice.layers == self.count and not self.drops(choice)

    def drops(self, choice: Choice) -> bool:
        """Whether the choice leaves out any unit of its layers: shares just below 1 may round to all."""
        _, found = self.shallower(choice.layers)
        counts = counts_of(found, choice.shares)
        return any(counts[s.name] < s.units for s in found.sets if s.name in counts)

    def _importance(self, units_of: Symmetry, kept: Sequence[int]) -> Tensor:
        """As in the whole network; heads of a lone mean layer are channels there, whose numbers they follow."""
        at = (units_of.kind, kept[units_of.layer]) if units_of.layer >= 0 else (units_of.name, units_of.layer)
        if at in self.scores:
            return self.scores[at]
        return self.scores["channels", at[1]].reshape(units_of.units, -1).sum(1)

    def sketch(self, choice: Choice) -> Sketch:
        """What the sub-network will be, without making it."""
        if choice.layers not in self._known_layers:
            network, found = self.shallower(choice.layers)
            self._known_layers[choice.layers] = (
                shapes_of(network), found, frozenset(inner_layers(network)), table_of(network)
            )  # fmt: skip
        shapes, found, inner, table = self._known_layers[choice.layers]
        counts = counts_of(found, choice.shares)
        channels, neurons = found.channels, found.of("neurons")[0]
        assert channels is not None
        return Sketch(
            shapes_with(shapes, found, counts), counts.get(channels.name, channels.units),
            counts.get(neurons.name, neurons.units), inner, table,
        )  # fmt: skip

    @cached_property
    def taught(self) -> tuple[list[str], Tensor]:
        """Texts of the owner, and the whole network's logits for them, centred."""
        texts = own_texts(self.domain, _SAMPLE)
        z = class_logits(self.network, self.tokenizer, texts, self.context)
        return texts, z - z.mean(1, keepdim=True)

    def score(self, choice: Choice) -> float:
        """How much a sub-network still knows, untrained.

        Classifiers: R^2 of the whole network's logits, fitted on the sub-network's pooled features by ridge regression
        on two of three texts and measured on the third. Causal models: minus the loss a token on 64 validation (else
        training) texts.
        """
        at = str((self.sketch(choice).shapes, choice.bits))  # shares that come to the same numbers
        if at not in self._known_scores:
            self._known_scores[at] = self._scored(self.cut(choice))
        return self._known_scores[at]

    def _scored(self, network: Any) -> float:
        if self.domain.task == "causal-lm":
            texts = evenly(self.domain.valid.texts or self.domain.train.texts, 64)
            total, count = token_losses(network, self.tokenizer, texts, self.context).sum(0)
            return -float(total / count)
        texts, z_nl = self.taught
        h_nd = torch.nn.functional.pad(features(network, self.tokenizer, texts, self.context), (0, 1), value=1.0)
        held = torch.arange(len(texts)) % 3 == 2
        known, truth = h_nd[~held].double(), z_nl[~held].double()
        gram = known.T @ known
        gram += _RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        made = h_nd[held].double() @ torch.linalg.solve(gram, known.T @ truth)
        aim = z_nl[held].double()
        return 1 - float((made - aim).square().sum() / (aim - aim.mean(0)).square().sum().clamp_min(1e-12))


def shape_row(layers: int, hidden: int, neurons: int) -> list[float]:
    """What a forward pass of one text costs, up to factors: a constant, layers, and their matrices."""
    return [1.0, layers, layers * hidden * hidden / 1e5, layers * hidden * neurons / 1e5]
