"""How alike domains are, by what their owners share: task vectors, texts, or what specialists answer.

Each owner contributes what it is known by, through the boundary; the centre compares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fanbu.batches import evenly
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.merging.engine import stacks
from fanbu.merging.geometry import gram
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import class_logits, features
from fanbu.recipe_parts import Likeness
from fanbu.turn import Turn
from fanbu.types import Context

_TEXTS = 256  # of a domain, whose mean stands for it


def likeness(turn: Turn, by: Likeness, specialists: Sequence[Specialist], base: Model) -> NDArray[np.float64]:
    """[specialists, specialists], 1 on the diagonal. ``weights``: cosines of task vectors. ``texts``: cosines of mean
    features on the base, less the mean over domains. ``answers``: linear centred kernel alignment of what specialists
    say of the probe texts (Kornblith et al. 2019), which needs no labels in common."""
    sent = [c for _, c in turn.at_owners(known_by, [(by, s, base) for s in specialists])]
    if by == "weights":
        total = sum(gram(stack, deltas=True) for stack in stacks(base, sent, turn.context))
        return _cosines(torch.as_tensor(total))
    traits = [c.tensors["trait"].double() for c in sent]
    if by == "texts":
        mean_dh = torch.stack(traits)
        apart = mean_dh - mean_dh.mean(0)
        return _cosines(apart @ apart.T)
    centred = [x - x.mean(0) for x in traits]
    products = torch.tensor([[float((a.T @ b).square().sum()) for b in centred] for a in centred], dtype=torch.float64)
    return _cosines(products)


def _cosines(products: Tensor) -> NDArray[np.float64]:
    products = products.double()
    lengths = products.diagonal().sqrt().clamp_min(1e-150)  # what has no length is like nothing
    found: NDArray[np.float64] = (products / lengths[:, None] / lengths[None, :]).numpy()
    np.fill_diagonal(found, 1.0)
    return found


def known_by(turn: Turn, by: Likeness, s: Specialist, base: Model) -> Contribution:
    """What a domain is compared by, from its owner."""
    way = method("average", "feedback")

    def make(out: Path, context: Context) -> Contribution:
        if by == "weights":
            return way.contribute(s, base, context)
        model = base if by == "texts" else s.model
        network, tokenizer = load_network(model).to(context.device), load_tokenizer(model)
        if by == "texts":
            texts = evenly([*s.domain.train.texts, *s.domain.unlabelled.texts], _TEXTS)
            mean_h = features(network, tokenizer, texts, context).float().mean(0)
            return Contribution("statistics", s.domain.name, "tree", {"trait": mean_h.cpu()})
        p_nl = class_logits(network, tokenizer, context.probe.texts, context).float().softmax(1)
        return Contribution("predictions", s.domain.name, "tree", {"trait": p_nl.half().cpu()})

    inputs = {
        "by": by, "base": base.digest, "specialist": s.model.digest, "domain": s.domain.digest,
        **turn.settings(probe=by == "answers"),
    }  # fmt: skip
    sent, _ = turn.contribution(f"tree contribution {s.domain.name}", "fanbu.likeness", inputs, s.domain, make)
    return sent
