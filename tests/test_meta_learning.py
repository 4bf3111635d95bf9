"""Meta-learning: what an episode is, what it changes, and prototypes as sums."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fanbu.catalogue import method
from fanbu.domain import Domain, Rows, Specialist
from fanbu.errors import FitError, IntegrityError
from fanbu.feedback.statistics.prototypes import best_sharpness
from fanbu.feedback.updates import _episodes
from fanbu.feedback.updates._episodes import Episodes
from fanbu.feedback.updates.maml import _loss, adapted
from fanbu.merging.task_vector import HEAD
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import class_logits, features
from fanbu.tensors import Tensors
from fanbu.types import Context, Inner


def few(domain: Domain, counts: dict[int, int]) -> Domain:
    """The domain with so many training rows of each label."""
    left, kept = dict(counts), []
    for row, label in enumerate(domain.train.labels or ()):
        if left.get(label, 0):
            left[label] -= 1
            kept.append(row)
    parts = ([column[i] for i in kept] for column in (domain.train.ids, domain.train.texts, domain.train.labels or ()))
    ids, texts, labels = map(tuple, parts)
    return replace(domain, train=Rows(ids, texts, labels))


def drawn(domain: Domain, episodes: Episodes, seed: int = 0) -> Any:
    sequences = [[i] for i in range(len(domain.train))]  # a row's only token is its number
    return _episodes._drawn(domain, episodes, torch.Generator().manual_seed(seed), sequences)


def test_rows_to_adapt_on_and_to_be_judged_by_are_apart(domains: dict[str, Domain]) -> None:
    food = domains["food"]
    support, queries = drawn(food, Episodes(labels=2, shots=3, queries=4))
    assert (len(support.labels), len(queries.labels)) == (6, 8)
    assert not {s[0] for s in support.sequences} & {s[0] for s in queries.sequences}
    truth = food.train.labels or ()
    for part in (support, queries):
        meant: dict[int, set[int]] = {}
        for (row,), place in zip(part.sequences, part.labels, strict=True):
            meant.setdefault(place, set()).add(truth[row])
        assert sorted(meant) == [0, 1]
        assert all(len(labels) == 1 for labels in meant.values())
    assert drawn(food, Episodes(labels=2), 1) == drawn(food, Episodes(labels=2), 1)
    assert drawn(food, Episodes(labels=2), 1) != drawn(food, Episodes(labels=2), 2)


def test_a_label_of_two_rows_keeps_one_to_be_judged_by(domains: dict[str, Domain]) -> None:
    support, queries = drawn(few(domains["food"], {0: 2, 1: 9, 2: 1}), Episodes(labels=3, shots=5))
    assert len(set(support.labels)) == len(set(queries.labels)) == 2  # the label of one row takes no part
    assert sorted(map(list(support.labels).count, {0, 1})) == [1, 5]
    with pytest.raises(FitError, match="two labels at least"):
        drawn(few(domains["food"], {0: 9, 1: 1}), Episodes())


@pytest.mark.parametrize("order", [1, 2])
def test_the_gradient_through_adapting(order: int, incumbent: Model, domains: dict[str, Domain]) -> None:
    """Order 2 is the slope of the loss after adapting; order 1 leaves out what adapting itself changes."""
    torch.manual_seed(0)
    network = load_network(incumbent).double().eval()
    ids = [[5 + i, 9, 7 + i] for i in range(6)]
    support, queries = _episodes.Rows(ids[:4], (0, 1, 2, 0)), _episodes.Rows(ids[4:], (1, 2))
    layer = network.bert.encoder.layer[0].intermediate.dense.weight
    way = torch.randn_like(layer)

    def after() -> torch.Tensor:
        fast = adapted(network, support, 0, "cpu", 2, 0.02, order)
        return _loss(network, fast, queries, 0, "cpu")

    with sdpa_kernel(SDPBackend.MATH):
        after().backward()
        slope = float((layer.grad * way).sum())
        with torch.no_grad():
            layer += 1e-4 * way
        high = float(after().detach())
        with torch.no_grad():
            layer -= 2e-4 * way
        low = float(after().detach())
    found = (high - low) / 2e-4
    assert abs(found) > 1e-3
    assert (slope == pytest.approx(found, rel=0.02)) == (order == 2)


@pytest.mark.parametrize("way", ["reptile", "maml"])
def test_what_one_episode_changes(
    way: str, specialists: dict[str, Specialist], incumbent: Model, context: Context
) -> None:
    def change(**arguments: Any) -> dict[str, torch.Tensor]:
        c = method(way).contribute(
            specialists["food"], incumbent, context, episodes={"count": 1, "labels": 3}, **arguments
        )
        assert (c.kind, c.meta["steps"], c.meta["rows"]) == ("updates", 1, 48)
        base = Tensors(incumbent.path)
        return {n: c.tensors[n] - base[n] for n in c.tensors if not n.startswith(HEAD) and base[n].is_floating_point()}

    if way == "reptile":  # half the way is half the change
        half, whole = change(step=0.5), change(step=1.0)
        assert max(float(d.abs().max()) for d in whole.values()) > 1e-4
        for name in whole:
            torch.testing.assert_close(half[name], whole[name] / 2, rtol=1e-2, atol=4e-6)
    else:  # plain descent on the queries: no longer than lr times the norm that gradients are brought down to
        sgd = {"optimizer": "SGD", "lr": 0.1, "weight_decay": 0.0, "clip": 0.01}
        first = change(train=sgd)
        length = sum(float(d.square().sum()) for d in first.values()) ** 0.5
        assert 1e-5 < length <= 0.1 * 0.01 * 1.001
        second = change(train=sgd, order=2)
        assert any(not torch.equal(first[n], second[n]) for n in first)


def test_updates_of_other_ways_are_refused(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    sent = method("reptile").contribute(specialists["food"], incumbent, context, episodes={"count": 1})
    for strange in ([replace(sent, method="x")], [sent, replace(sent, domain="rail", method="maml")]):
        with pytest.raises(IntegrityError, match="several ways"):
            method("reptile").absorb(incumbent, strange, tmp_path / "x", context)


def test_inner_rounds_draw_other_episodes(
    specialists: dict[str, Specialist], incumbent: Model, context: Context
) -> None:
    sent = [
        method("reptile").contribute(
            specialists["food"], incumbent, replace(context, inner=Inner(n, of=2)), episodes={"count": 1}
        )
        for n in (0, 0, 1)
    ]
    assert sent[0].digest == sent[1].digest != sent[2].digest


def test_prototypes_of_two_owners_are_those_of_one(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    way, whole = method("prototypes"), specialists["food"].domain
    half = len(whole.train) // 3
    columns = (whole.train.ids, whole.train.texts, whole.train.labels or ())
    parts = {
        "food@north": Rows(*(c[:half] for c in columns)),
        "food@south": Rows(*(c[half:] for c in columns)),
    }
    owners = [replace(specialists["food"], domain=replace(whole, name=n, train=rows)) for n, rows in parts.items()]
    sent = [way.contribute(s, incumbent, context) for s in owners]
    apart = way.absorb(incumbent, sent, tmp_path / "apart", context)
    alone = way.absorb(
        incumbent, [way.contribute(specialists["food"], incumbent, context)], tmp_path / "alone", context
    )
    texts = whole.test.texts
    one, two = (class_logits(load_network(m), load_tokenizer(m), texts, context) for m in (apart, alone))
    own = [alone.labels.index(label) for label in whole.full_labels]
    assert torch.equal(one[:, own].argmax(1), two[:, own].argmax(1))
    network, tokenizer = load_network(incumbent), load_tokenizer(incumbent)
    x, t = (features(network, tokenizer, some, context) for some in (whole.train.texts, texts))
    means = torch.stack([x[torch.tensor(whole.train.labels) == label].mean(0) for label in range(len(own))])
    assert torch.equal(two[:, own].argmax(1), torch.cdist(t, means).argmin(1))


def test_sharpness_leaves_each_row_out_of_its_mean() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    x = torch.randn(6, 4) + 2 * torch.nn.functional.one_hot(labels, 4)
    total, count = torch.zeros(3, 4).index_add_(0, labels, x), torch.bincount(labels).float()
    scale = float(x.square().sum(1).mean())

    def loss(s: float) -> float:
        sums = 0.0
        for i in range(5):  # the sixth is alone in its label
            rest = [j for j in range(6) if j != i]
            means = torch.stack([x[[j for j in rest if labels[j] == label]].mean(0) for label in range(3)])
            sums -= float((-s / 2 * (x[i] - means).square().sum(1)).log_softmax(0)[labels[i]])
        return sums

    best = min((2.0**k / scale for k in range(1, 14)), key=loss)
    assert best_sharpness(x, labels, total, count) == pytest.approx(best)


def test_prototypes_without_sharpness_are_refused(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    sent = method("prototypes").contribute(specialists["food"], incumbent, context)
    for wrong in (torch.zeros(1), -torch.ones(1), torch.ones(2)):
        bad = replace(sent, tensors={**sent.tensors, "sharpness": wrong})
        with pytest.raises(IntegrityError, match="sharpness"):
            method("prototypes").absorb(incumbent, [bad], tmp_path / "x", context)
