"""What a search chooses from: sub-networks of one network, cut along one order of importance, scored untrained."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fanbu.batches import collate, encode, evenly, pad_id
from fanbu.deploy.latency import milliseconds
from fanbu.domain import Domain
from fanbu.merging.gram import linear_layers, own_texts
from fanbu.model import Model
from fanbu.predict import features, limit, token_losses
from fanbu.shrink._rounding import on_grid
from fanbu.shrink._tune import open_for
from fanbu.shrink._units import (
    Keep,
    Shapes,
    Units,
    best,
    channels_counted,
    counted,
    importances,
    narrowed,
    shapes_of,
    shapes_with,
    units,
)
from fanbu.shrink.depth import influence, keep_layers, layers_of
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

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


class Space:
    """All sub-networks of a model for a domain: which layers and units go first is found once."""

    def __init__(self, model: Model, domain: Domain, context: Context) -> None:
        self.model, self.domain, self.context = model, domain, context
        self.network, self.tokenizer = open_for(model, domain, context)
        self.count = self.network.config.num_hidden_layers
        self._sketches: dict[int, tuple[Shapes, Units]] = {}
        self._known: dict[str, float] = {}

    @cached_property
    def order(self) -> list[int]:
        """Layers by what they change (``depth``'s influence), the last one first: it always stays."""
        texts = self.domain.train.texts[:_SAMPLE]
        scores = influence(self.network, self.tokenizer, texts, layers_of(self.network), self.context)
        return [self.count - 1, *sorted(range(self.count - 1), key=lambda i: -scores[i])]

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

    def counts(self, found: Units, choice: Choice) -> dict[str, int]:
        """How many units of each set stay."""
        assert found.channels is not None
        counts = {s.name: counted(s.units, choice.neurons) for s in found.of("neurons")}
        heads = found.of("heads")
        hidden = channels_counted(found.channels.units, choice.channels, heads[0].units)
        if not found.free_heads:
            some = counted(heads[0].units // heads[0].group, choice.channels) * heads[0].group
            counts |= {s.name: some for s in heads}
            hidden = some * (found.channels.units // heads[0].units)
        counts |= {s.name: hidden for s in (found.channels, found.pooled, *found.followers) if s}
        return counts

    def cut(self, choice: Choice) -> Any:
        """The sub-network, untrained, its weights on a grid where the choice has fewer bits."""
        network, found = self.shallower(choice.layers)
        counts, kept, keep = self.counts(found, choice), self.layers_kept(choice.layers), Keep()
        for s in found.chosen(counts):
            at = (s.kind, kept[s.layer]) if s.layer >= 0 else (s.name, s.layer)
            # heads of a lone mean layer: in the whole network their numbers follow the channels
            own = self.scores[at] if at in self.scores else self.scores["channels", at[1]].reshape(s.units, -1).sum(1)
            keep[s.name] = best(own, counts[s.name], s.group)
        assert found.channels is not None
        keep |= {s.name: keep[found.channels.name] for s in found.followers}
        smaller = narrowed(network, found, keep, self.model).eval()
        if choice.bits < 32:
            for layer in linear_layers(smaller).values():
                weight: Any = layer.weight
                weight.detach().copy_(on_grid(weight.detach(), None, choice.bits, 0, "nearest")[0])
        return smaller

    def sketch(self, choice: Choice) -> tuple[Shapes, int, int]:
        """(shapes by name, hidden size, neurons), without making it."""
        if choice.layers not in self._sketches:
            network, found = self.shallower(choice.layers)
            self._sketches[choice.layers] = shapes_of(network), found
        shapes, found = self._sketches[choice.layers]
        counts = self.counts(found, choice)
        assert found.channels is not None
        return shapes_with(shapes, found, counts), counts[found.channels.name], counts[found.of("neurons")[0].name]

    @cached_property
    def taught(self) -> tuple[list[str], Tensor]:
        """Texts of the owner, and the whole network's logits for them, centred."""
        from fanbu.predict import class_logits

        texts = own_texts(self.domain, _SAMPLE)
        z = class_logits(self.network, self.tokenizer, texts, self.context)
        return texts, z - z.mean(1, keepdim=True)

    def score(self, choice: Choice) -> float:
        """How much a sub-network still knows, untrained.

        Classifiers: R^2 of the whole network's logits, fitted on the sub-network's pooled features by ridge regression
        on two of three texts and measured on the third. Causal models: minus the loss a token on 64 validation (else
        training) texts.
        """
        at = str((self.sketch(choice)[0], choice.bits))  # shares that come to the same numbers
        if at not in self._known:
            self._known[at] = self._scored(self.cut(choice))
        return self._known[at]

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

    def milliseconds(self, network: Any) -> float:
        """Of a network, for one of the owner's texts at batch 1, on this machine."""
        texts = encode(self.tokenizer, own_texts(self.domain, 24), limit(network, self.context))
        batches = [collate([ids], pad_id(self.tokenizer), self.context.device) for ids in texts]
        network.to(self.context.device).eval()
        return milliseconds(lambda batch: network(**batch), batches)


def parameters_of(shapes: Shapes) -> int:
    """How many numbers."""
    return sum(map(math.prod, shapes.values()))


def bytes_of(shapes: Shapes, bits: int) -> int:
    """On disk: in ``bits`` below 32 matrices inside the blocks, and embeddings in 8, have a scale a row (``quantize``);
    all else takes four bytes."""
    total = 0.0
    for name, shape in shapes.items():
        numbers = math.prod(shape)
        if bits == 32 or len(shape) != 2:
            total += 4 * numbers
        elif ".layer." in name or ".layers." in name or ".h." in name:
            total += numbers * bits / 8 + 4 * shape[0]
        elif "word_embeddings" in name or "embed_tokens" in name:
            total += numbers + 4 * shape[0]
        else:
            total += 4 * numbers
    return int(total)


def shape_row(layers: int, hidden: int, neurons: int) -> list[float]:
    """What a forward pass of one text costs, up to factors: a constant, layers, and their matrices."""
    return [1.0, layers, layers * hidden * hidden / 1e5, layers * hidden * neurons / 1e5]


def fitted(rows: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Factors >= 0 with the least squared relative error over measured (or given) times."""
    import numpy as np
    from scipy.optimize import nnls

    y = np.array(times)
    return [float(v) for v in nnls(np.array(rows) / y[:, None], np.ones(len(y)))[0]]
