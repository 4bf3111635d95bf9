"""Episodes: small tasks that an owner draws from its own rows, on which the trunk learns to adapt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor

from fanbu.batches import Sequences, collate, encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import FitError, IntegrityError
from fanbu.feedback.updates._local import in_folder
from fanbu.feedback.updates._server import How, taken
from fanbu.heads import Head, check_labels_known, set_head
from fanbu.merging.store import task_vector
from fanbu.merging.task_vector import TaskVector
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.predict import limit, without_head
from fanbu.probing import fit_probe, prototype_rows, prototypes
from fanbu.train import set_up
from fanbu.types import Context

_SHARPNESS = 16.0  # of an episode's first label rows: times the mean square of features


@dataclass(frozen=True)
class Episodes:
    """How an owner draws small tasks from its rows: ``count`` of them in an inner round, each of so many of its
    ``labels``, with ``shots`` rows a label to adapt on, and up to ``queries`` others to be judged by."""

    count: Annotated[int, Ge(1)] = 8
    labels: Annotated[int, Ge(2)] = 8
    shots: Annotated[int, Ge(1)] = 5
    queries: Annotated[int, Ge(1)] = 5

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic reads it; a misspelt key is refused


@dataclass(frozen=True)
class Rows:
    """Some rows of an episode: token ids, and labels, numbered from 0 within the episode."""

    sequences: Sequences
    labels: tuple[int, ...]

    def batch(self, pad: int, device: str) -> tuple[dict[str, Tensor], Tensor]:
        """What a network is given, and the labels."""
        return collate(self.sequences, pad, device), torch.tensor(self.labels, device=device)


@dataclass(frozen=True)
class Episode:
    """One small task: rows to adapt on, rows to be judged by, and what they are padded with."""

    name: str
    support: Rows
    queries: Rows
    pad: int


Learn = Callable[[Episode], None]  # changes the trunk of a network by one episode


def meta_update(
    name: str, specialist: Specialist, base: Model, context: Context, episodes: Episodes,
    learner: Callable[[Any], Learn],
) -> Contribution:  # fmt: skip
    """delta = theta - theta_base after learning from episodes; the owner's label rows are fitted anew on that trunk.

    Each episode begins with label rows of its own, the prototypes of the rows to adapt on, so that the trunk learns
    what rows of labels that nobody knows can be built on. ``learner`` is given the network before it learns.

    meta: ``rows`` of the domain, and ``steps``: the episodes.
    Raises FitError where fewer than two labels have two rows.
    """
    domain = specialist.domain
    check_labels_known(base, domain.full_labels)
    network, tokenizer = load_network(base).to(context.device), load_tokenizer(base)
    set_up(context, name, domain.name)
    sequences, learn = encode(tokenizer, domain.train.texts, limit(network, context)), learner(network)
    generator = torch.Generator().manual_seed(context.seeded("episodes", domain.name))
    for number in range(episodes.count):
        support, queries = _drawn(domain, episodes, generator, sequences)
        episode = Episode(f"{name} {domain.name} {number}", support, queries, pad_id(tokenizer))
        set_head(network, _first_rows(network, episode, context.device))
        network.to(context.device)
        learn(episode)
        context.progress(f"{name} {domain.name}", number + 1, episodes.count)
    head, found = fit_probe(network, tokenizer, domain, context)
    set_head(network, Head(head.labels, head.weight_lh, head.bias_l - found["mean_logsumexp"]))

    def sent(folder: Path) -> Contribution:
        model = save_network(network, tokenizer, folder, provenance(name, [base], context))
        return task_vector(TaskVector(model, base), domain.name, model.labels)

    c = in_folder(context, sent)
    meta = {**c.meta, "rows": len(domain.train), "steps": episodes.count}
    return Contribution("updates", domain.name, name, c.tensors, meta=meta)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    scale: Annotated[float, Gt(0)] = 1.0, by_rows: bool = False,
) -> Model:  # fmt: skip
    """theta = theta_base + scale sum_i w_i delta_i, w_i even, or by the owners' rows; label rows from their owners.

    Args:
        scale: the learning rate of the centre.
        by_rows: whether an owner counts by its rows, which it says itself; else all count alike, as tasks do.

    Raises:
        FitError: an update's tensors are not the base's.
        IntegrityError: an update does not say of how many rows it is, or not all are of one way.
    """
    ways = sorted({c.method for c in contributions})
    if ways not in (["maml"], ["reptile"]):
        raise IntegrityError(
            "contribution-broken", "updates are of several ways, or of one that has no episodes",
            allowed="maml, or reptile", got=ways, remedy="ask their owners to send them again",
        )  # fmt: skip
    domains = [c.domain for c in contributions]
    made = provenance(ways[0], [base], context, scale=scale, by_rows=by_rows, domains=domains)
    return taken(base, contributions, out, context, How(scale, by_rows), made)


def _drawn(
    domain: Domain, episodes: Episodes, generator: torch.Generator, sequences: Sequences
) -> tuple[Rows, Rows]:  # fmt: skip
    """Rows to adapt on and rows to be judged by; a label with few rows keeps one of them for the latter."""
    known: dict[int, list[int]] = {}
    for row, label in enumerate(domain.train.labels or ()):
        known.setdefault(label, []).append(row)
    fit = sorted(label for label, rows in known.items() if len(rows) > 1)
    if len(fit) < 2:
        raise FitError(
            "too-few-rows", f"{domain.name}: an episode needs rows to adapt on and rows to be judged by",
            allowed="two labels at least with two training rows each", got=f"{len(fit)} such labels",
            remedy="give it rows, or leave this domain out",
        )  # fmt: skip

    def some(values: Sequence[int], count: int) -> list[int]:
        return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()[:count]]

    parts: list[list[tuple[int, int]]] = [[], []]
    for place, label in enumerate(some(fit, episodes.labels)):
        rows = some(known[label], episodes.shots + episodes.queries)
        cut = min(episodes.shots, len(rows) - 1)
        parts[0] += [(row, place) for row in rows[:cut]]
        parts[1] += [(row, place) for row in rows[cut:]]
    support, queries = (Rows([sequences[r] for r, _ in part], tuple(p for _, p in part)) for part in parts)
    return support, queries


def _first_rows(network: Any, episode: Episode, device: str) -> Head:
    """Label rows of an episode before it begins."""
    batch, truth = episode.support.batch(episode.pad, device)
    network.eval()
    with without_head(network), torch.no_grad():
        x = network(**batch).logits.float().cpu()
    labels = tuple(f"episode/{number}" for number in range(int(truth.max()) + 1))
    sharpness = _SHARPNESS / float(x.square().sum(1).mean().clamp_min(1e-12))
    return prototype_rows(labels, prototypes(x, episode.support.labels, len(labels)), sharpness)
