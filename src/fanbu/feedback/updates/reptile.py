"""Reptile: owners learn small tasks of their own rows, and the large model goes some way towards each."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from annotated_types import Gt, Le

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.updates._episodes import Episode, Episodes, Learn, absorb, meta_update
from fanbu.heads import final_layer
from fanbu.model import Model
from fanbu.objectives import labelled
from fanbu.train import train as train_network
from fanbu.types import CLASSIFYING, Context, Needs, Train, silent

__all__ = ["EXPERIMENTAL", "LINEAR", "NEEDS", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="updates", specialist=False, tasks=CLASSIFYING)
LINEAR = True
EXPERIMENTAL = "on industries held out within chance of the plain base, with any number of rows a label"
SENSITIVITY = 1.0
ADAPT = Train(epochs=2, batch_size=16, lr=1e-4, warmup=0.0, schedule="constant", patience=0)


def contribute(
    specialist: Specialist, base: Model, context: Context, *, episodes: Episodes = Episodes(), train: Train = ADAPT,
    step: Annotated[float, Gt(0), Le(1)] = 0.5,
) -> Contribution:  # fmt: skip
    """theta <- theta + step (theta_e - theta) for each episode e; theta_e is the trunk after training on its rows.

    What comes out is a large model that learns a new industry from few rows; take it many ``times``. Rows to be judged
    by are trained on like the others here. The owner's label rows are fitted anew on its trunk; follow with ``probe``
    to fit them to the one that all owners made.

    Args:
        episodes: how small tasks are drawn from the owner's rows: ``count``, ``labels``, ``shots``, ``queries``.
        train: how the model learns one of them.
        step: how far it goes towards each.

    Raises:
        FitError: fewer than two labels have two rows.

    Reference: Nichol, Achiam and Schulman 2018, "On first-order meta-learning algorithms".
    """

    def learner(network: Any) -> Learn:
        quiet = replace(context, scratch=None, progress=silent)

        def learn(episode: Episode) -> None:
            head = {id(p) for p in final_layer(network).parameters()}
            trunk = [p for p in network.parameters() if id(p) not in head]
            before = [p.detach().clone() for p in trunk]
            sequences = [*episode.support.sequences, *episode.queries.sequences]
            labels = [*episode.support.labels, *episode.queries.labels]
            loss = labelled(sequences, labels, episode.pad, context.device)
            lengths = [len(s) for s in sequences]
            train_network(network, lengths, loss, train, quiet, episode.name, head=final_layer(network))
            with torch.no_grad():
                for p, old in zip(trunk, before, strict=True):
                    p.copy_(old.lerp(p, step))

        return learn

    return meta_update("reptile", specialist, base, context, episodes, learner)
