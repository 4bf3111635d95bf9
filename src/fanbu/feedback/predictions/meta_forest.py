"""Meta decision forests: trees over what specialists say, whose leaves say whom to believe, teach the large model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.predictions._pool import Voice, among_all, blind, pool
from fanbu.feedback.predictions._teach import teach
from fanbu.feedback.predictions.ensemble import contribute as as_ensemble
from fanbu.model import Model
from fanbu.objectives import soft_labelled
from fanbu.types import CLASSIFYING, Context, Needs, Train, industry_of

NEEDS = Needs(kind="predictions", probe=True, labels=True, tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None
_LEAST = 1e-4
_STRENGTH = 10.0  # texts that a parent's weights are worth


def contribute(
    specialist: Specialist, base: Model, context: Context, *, top_k: Annotated[int, Ge(1)] = 64,
    mass: Annotated[float, Gt(0), Le(1)] = 0.98,
) -> Contribution:  # fmt: skip
    """What the specialist says by itself, calibrated, on its industry's probe rows, and its owner's labels of those
    that are its own training texts.

    Args:
        top_k: how many labels are said at most.
        mass: labels are said, likeliest first, until their probabilities come to this.
    """
    sent = as_ensemble(specialist, base, context, combine="stacked", top_k=top_k, mass=mass)
    return replace(sent, method="meta_forest")


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    trees: Annotated[int, Ge(1)] = 60, leaf: Annotated[int, Ge(2)] = 20, train: Train = Train(epochs=6, lr=2e-4),
) -> Model:  # fmt: skip
    """Trains the base on p(l | x) = sum_v w_v(x) p_v(l | x), with weights of the leaves that x falls in.

    Voices are the specialists of an industry and the base. Extremely randomised trees grow on what would have been
    gained by believing each, log p_v(y) - log mean(y), over meta-features: log-odds, entropy and margin of each voice,
    and whether it names the label that the mean does. A leaf's weights maximise the likelihood of its labelled texts,
    shrunk towards its parent's, the root's towards trust (``tables.voices``). Nobody gains or loses by texts that it
    was trained on. Where an industry has no labelled text that some specialist has not seen, weights stay at trust.

    The manifest says how far each voice is believed on average. For tables there is
    ``fanbu.tables.meta_forest.MetaForestClassifier``.

    Args:
        trees: how many.
        leaf: labelled texts that a leaf has at least.
        train: how to train; there is no early stopping, since the centre has no labelled rows of its own.

    Raises:
        FitError: the probe set is empty, or a panel does not belong to it.

    Reference: Todorovski and Dzeroski 2003, "Combining classifiers with meta decision trees".
    """
    told: dict[str, Any] = {}

    def together(rows: Sequence[int], voices: Sequence[Voice], start_nl: Tensor, truth_n: Tensor) -> Tensor:
        industry = industry_of(voices[0].domain)
        mean, seed = pool(voices, start_nl, "mean"), context.seeded("meta_forest", industry)
        w_nv = believed(voices, mean, blind(voices, start_nl), truth_n, trees, leaf, seed)
        told[industry] = {v.domain: round(float(w), 4) for v, w in zip(voices, w_nv.mean(0), strict=True)}
        return torch.einsum("nv,vnl->nl", w_nv, torch.stack([among_all(v, mean) for v in voices]))

    facts: Mapping[str, Any] = {"trees": trees, "leaf": leaf, "believed": told}
    return teach("meta_forest", base, contributions, out, context, train, (together, soft_labelled), facts)


def believed(
    voices: Sequence[Voice], mean_nl: Tensor, blind_nl: Tensor, truth_n: Tensor, trees: int, leaf: int, seed: int
) -> Tensor:  # fmt: skip
    """w [texts, voices], rows summing to 1. Where leaves are made, ``blind_nl`` (``_pool.blind``) is the mean."""
    from sklearn.ensemble import ExtraTreesRegressor

    from fanbu.tables.trees import Trees
    from fanbu.tables.voices import weigh_nodes

    prior = torch.tensor([v.weight for v in voices]).clamp_min(1e-3)
    prior = (prior / prior.sum()).double()
    known = (truth_n >= 0).nonzero()[:, 0]
    own_nv = torch.stack([v.own_n for v in voices], 1)[known]
    if len(known) < 2 * leaf or bool(own_nv.all(1).all()) or len(voices) < 2:
        return prior.float().expand(len(truth_n), -1)
    said = torch.stack([among_all(v, mean_nl) for v in voices], 1).double()
    unseen = torch.stack([among_all(v, blind_nl) for v in voices], 1).double()
    of_mean = blind_nl[known, truth_n[known]].double().clamp_min(_LEAST)[:, None]
    likely = unseen[known, :, truth_n[known]].clamp_min(_LEAST)
    gained = torch.where(own_nv, 0.0, (likely / of_mean).log())
    likely[own_nv] = torch.nan  # of these texts it has a memory, no opinion
    x = _features(said, mean_nl.double()).numpy()
    forest = ExtraTreesRegressor(trees, min_samples_leaf=leaf, random_state=seed)
    forest.fit(x[known.numpy()], gained.numpy())
    gate = weigh_nodes(Trees.of(forest), x[known.numpy()], likely.numpy(), prior.numpy(), _STRENGTH)
    return torch.tensor(gate.mean(x)).float()


def _features(said_nvl: Tensor, mean_nl: Tensor) -> Tensor:
    """[texts, 4 a voice]: log-odds of the likeliest label, entropy, margin, agreement with the mean."""
    p = said_nvl.clamp(_LEAST, 1 - _LEAST)
    top = p.topk(min(2, p.shape[2]), 2).values
    same = (said_nvl.argmax(2) == mean_nl.argmax(1)[:, None]).double()
    parts = [top[:, :, 0].logit(), -(p * p.log()).sum(2), top[:, :, 0] - top[:, :, -1], same]
    return torch.cat(parts, 1)
