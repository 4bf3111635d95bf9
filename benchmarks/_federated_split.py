"""One text domain cut into ten owners, by labels (Dirichlet) or evenly, some of whom may lie; label rows on frozen
features, from nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from _inner_rounds import Twist, inner_rounds
from _specialists import made
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Rows, Specialist
from fanbu.heads import Head, set_head
from fanbu.merging.noise import noised
from fanbu.merging.task_vector import rows_of
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.private import OwnerNoise
from fanbu.progress import log
from fanbu.types import Context, Privacy, derived_seed

ROWS_ALONE = {"layers": "head"}
WHOLE = Privacy(epsilon=8.0)  # of an owner
OWNERS, LIARS, TIMES = 10, 3, 10
POOLED = "all rows in one place"
ADAPTIVE = {"epochs": 5, "batch_size": 16, "head_lr": 1e-2, "warmup": 0.0, "schedule": "constant", "patience": 0}
SGD = {
    "epochs": 5, "batch_size": 16, "lr": 5.0, "head_lr": 5.0, "warmup": 0.0, "schedule": "constant", "patience": 0,
    "optimizer": "SGD", "weight_decay": 0.0, "clip": 0.0,
}  # fmt: skip
PRIVATE = {"epochs": 2, "batch_size": 128, "head_lr": 3e-2, "warmup": 0.0, "schedule": "constant", "patience": 0}
STRATEGIES: dict[str, tuple[str, dict[str, Any]]] = {
    "fedavg": ("fedavg", {"train": ADAPTIVE}),
    "fedprox": ("fedprox", {"train": ADAPTIVE, "mu": 0.01}),
    "fednova": ("fednova", {"train": ADAPTIVE}),
    "fedavgm": ("fedavgm", {"train": ADAPTIVE, "momentum": 0.5}),
    "fedadam": ("fedadam", {"train": ADAPTIVE, "head_rate": 0.1}),
    "fedyogi": ("fedyogi", {"train": ADAPTIVE, "head_rate": 0.1}),
    "fedavg, SGD": ("fedavg", {"train": SGD}),
    "scaffold": ("scaffold", {"train": SGD}),
}
AGGREGATES = ("mean", "median", "trimmed", "krum", "multi_krum", "geometric")
LIES = ("sign flip", "scaled noise", "label flip")


def blank(opened: Model, labels: Sequence[str], out: Path, context: Context) -> Model:
    """The opened base with label rows of zeros."""
    network = load_network(opened)
    width = rows_of(opened).weight_lh.shape[1]
    set_head(network, Head(tuple(labels), torch.zeros(len(labels), width), torch.zeros(len(labels))))
    return save_network(network, load_tokenizer(opened), out, provenance("open", [opened], context))


def cut(d: Domain, seed: int, alpha: float | None) -> list[Domain]:
    """Ten owners of its training rows: each label's rows shared out by Dirichlet(alpha), or all evenly.

    Every owner has at least a row of two labels; an owner's labels are those that it has rows of.
    """
    labels = np.array(d.train.labels)
    for attempt in range(1000):
        draw = np.random.default_rng(derived_seed(seed, "cut", d.name, attempt))
        if alpha is None:
            owner = draw.permutation(len(labels)) % OWNERS
        else:
            owner = np.zeros(len(labels), int)
            for label in range(len(d.labels)):
                rows = draw.permutation(np.flatnonzero(labels == label))
                ends = np.floor(np.cumsum(draw.dirichlet([alpha] * OWNERS)) * len(rows) + 1e-9)
                owner[rows] = np.searchsorted(ends, np.arange(len(rows)), side="right").clip(max=OWNERS - 1)
        if all(len(set(labels[owner == o])) > 1 for o in range(OWNERS)):
            return [_owned(d, o, np.flatnonzero(owner == o)) for o in range(OWNERS)]
    raise SystemExit(f"{d.name} cannot be cut into {OWNERS} owners of two labels each")


def _owned(d: Domain, number: int, rows: Any) -> Domain:
    all_labels = d.train.labels or ()
    known = sorted({all_labels[i] for i in rows})
    ids, texts = ([column[i] for i in rows] for column in (d.train.ids, d.train.texts))
    train = Rows(tuple(ids), tuple(texts), tuple(known.index(all_labels[i]) for i in rows))
    labels, none = tuple(d.labels[k] for k in known), Rows(labels=())
    return replace(d, name=f"{d.name}@owner{number}", labels=labels, train=train, valid=none, test=none)


def pooled(d: Domain, base: Model, context: Context, out: Path, train: Mapping[str, Any]) -> Model:
    """All rows at one owner."""
    whole = replace(d, name=f"{d.name}@all", valid=Rows(labels=()), test=Rows(labels=()))
    return inner_rounds(
        ("fedavg", {"train": train, "learns": ROWS_ALONE}), TIMES, [_at(base, whole)], base, context, out
    )


def _at(base: Model, d: Domain) -> Specialist:
    return Specialist(base, d, base)


def split_models(d: Domain, opened: Model, folder: Path, context: Context, names: Sequence[str]) -> dict[str, Model]:
    """By strategy, the model made of ten owners' label rows, Dirichlet(0.1); and of all rows in one place."""
    base = made(folder / "blank", lambda out: blank(opened, d.full_labels, out, context))
    owners = [_at(base, o) for o in cut(d, context.seed, 0.1)]
    found = {POOLED: pooled(d, base, context, folder / "pooled", ADAPTIVE)}
    for name in names:
        way, arguments = STRATEGIES[name]
        log(f"== {name}, seed {context.seed}")
        place = folder / name.replace(", ", "-")
        found[name] = inner_rounds((way, {**arguments, "learns": ROWS_ALONE}), TIMES, owners, base, context, place)
    return found


def lied_models(d: Domain, opened: Model, folder: Path, context: Context) -> dict[tuple[str, str], Model]:
    """By lie and aggregate, the model made of ten owners' label rows, three of them false; all honest first."""
    base = made(folder / "blank", lambda out: blank(opened, d.full_labels, out, context))
    honest = cut(d, context.seed, None)
    found = {}
    alone = [_at(base, o) for o in honest[:-LIARS]]
    way: tuple[str, dict[str, Any]] = ("fedavg", {"train": ADAPTIVE, "learns": ROWS_ALONE})
    found["none", "the honest alone"] = inner_rounds(way, TIMES, alone, base, context, folder / "honest-alone")
    for lie in ("none", *LIES):
        false = [o.name for o in honest[-LIARS:]] if lie != "none" else []
        owners = [_at(base, _flipped(o) if o.name in false and lie == "label flip" else o) for o in honest]
        twists = {name: _twist(lie, context) for name in false}
        for aggregate in AGGREGATES:
            log(f"== {lie}, {aggregate}")
            way = ("fedavg", {"train": ADAPTIVE, "learns": ROWS_ALONE, "aggregate": aggregate})
            place = folder / f"{lie}-{aggregate}".replace(" ", "-")
            found[lie, aggregate] = inner_rounds(way, TIMES, owners, base, context, place, twists)
    return found


def _flipped(d: Domain) -> Domain:
    """The first label for the last, and so on."""
    last = len(d.labels) - 1
    return replace(d, train=replace(d.train, labels=tuple(last - i for i in d.train.labels or ())))


def _twist(lie: str, context: Context) -> Twist:
    def twist(number: int, sent: Contribution, base: Model) -> Contribution:
        if lie == "label flip":
            return sent
        start, tensors = rows_of(base).take(sent.meta["labels"]), {}
        for name, value in sent.tensors.items():
            before = start.weight_lh if name.endswith("weight") else start.bias_l
            change = value - before
            if lie == "scaled noise":
                draw = torch.Generator().manual_seed(context.seeded(lie, sent.domain, number, name))
                noise = torch.randn(value.shape, generator=draw)
                change = -change.norm() / noise.norm() * noise
            tensors[name] = before - 10 * change
        return replace(sent, tensors=tensors)

    return twist


def private_models(
    domains: Mapping[str, Domain], opened: Model, folder: Path, context: Context, epsilons: Sequence[float]
) -> dict[str, Model]:
    """By epsilon (0: no privacy), the model made of the label rows of all domains, each an owner, from nothing; and
    with privacy of whole owners."""
    labels = [label for d in domains.values() for label in d.full_labels]
    base = made(folder / "blank", lambda out: blank(opened, labels, out, context))
    owners = [_at(base, d) for d in domains.values()]
    found = {}
    for epsilon in epsilons:
        learns = {**ROWS_ALONE, "rivals": "industry", "privacy": {"epsilon": epsilon}}
        arguments = {"train": PRIVATE, "learns": learns}
        name = f"epsilon {epsilon:g}" if epsilon else "no privacy"
        log(f"== {name}")
        place = folder / name.replace(" ", "-")
        found[name] = inner_rounds(("fedavg", arguments), TIMES, owners, base, context, place)
    arguments = {"train": PRIVATE, "learns": {**ROWS_ALONE, "rivals": "industry"}, "by_rows": False}
    for name, least in (("a whole owner alone", 0), ("a whole owner in a sum", len(owners) // 2 + 1)):
        log(f"== {name}")
        place = folder / name.replace(" ", "-")
        twists = {s.domain.name: _hidden(folder / "noised", least, len(owners)) for s in owners}
        found[f"{name}, epsilon {WHOLE.epsilon:g}"] = inner_rounds(
            ("fedavg", arguments), TIMES, owners, base, context, place, twists
        )
    return found


def _hidden(folder: Path, least: int, owners: int) -> Twist:
    """An update with noise of its whole owner; in a sum of so many owners each number has the noise of all of them."""

    def twist(number: int, sent: Contribution, base: Model) -> Contribution:
        noise = OwnerNoise(WHOLE, TIMES, number, least)
        deviation = noise.deviation * (owners**0.5 if least else 1.0)
        folder.mkdir(parents=True, exist_ok=True)
        made = noised(sent, base, noise.privacy.norm, deviation, folder / f"{sent.domain}-{number}.safetensors")
        return noise.paid(made)

    return twist
