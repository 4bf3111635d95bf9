"""Federated ways: what an owner sends, what the centre makes of it, and what is remembered between inner rounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fanbu.feedback.updates._local
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Rows, Specialist
from fanbu.errors import IntegrityError, UsageError
from fanbu.heads import domains_of
from fanbu.merging.robust import bounded, chosen, false_ones, middle
from fanbu.merging.task_vector import HEAD, head_tensors
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import class_logits, token_losses
from fanbu.tensors import Tensors
from fanbu.types import Context, Inner

ROWS_ALONE = {"layers": "head"}
FAST = {"epochs": 2, "lr": 3e-3, "head_lr": 1e-2, "batch_size": 8}


def body_of(model: Model) -> dict[str, Tensor]:
    tensors, heads = Tensors(model.path), set(head_tensors(model))
    names = [n for n, s in tensors.specs.items() if n not in heads and s.torch_dtype.is_floating_point]
    return {n: tensors[n].float() for n in names}


def update(base: Model, domain: str, push: float, rows: int = 10, **meta: Any) -> Contribution:
    """Every number of the body moves by ``push``, and so do the domain's label rows."""
    names = [base.labels[i] for i in domains_of(base.labels)[domain.partition("@")[0]]]
    tensors = {n: torch.full_like(t, push) for n, t in body_of(base).items()}
    for name in head_tensors(base):
        rows_l = Tensors(base.path)[name][[base.labels.index(n) for n in names]]
        tensors[HEAD + name] = rows_l + push
    return Contribution("updates", domain, "fedavg", tensors, meta={"labels": names, "rows": rows, "steps": 5, **meta})


def moved(new: Model, base: Model) -> float:
    """By how much every number of the body moved; fails where they did not all move alike."""
    before, after = body_of(base), body_of(new)
    gone = torch.cat([(after[n] - before[n]).reshape(-1) for n in before])
    assert float(gone.max() - gone.min()) < 1e-5
    return float(gone.mean())


def rows_moved(new: Model, base: Model, industry: str) -> float:
    name = head_tensors(base)[0]
    rows = domains_of(base.labels)[industry]
    there = [new.labels.index(base.labels[i]) for i in rows]
    return float((Tensors(new.path)[name][there] - Tensors(base.path)[name][rows]).mean())


@pytest.fixture
def absorbed(incumbent: Model, context: Context, tmp_path: Path) -> Any:
    def make(sent: list[Contribution], way: str = "fedavg", inner: Inner | None = None, **arguments: Any) -> Model:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        return method(way).absorb(incumbent, sent, out, replace(context, inner=inner), **arguments)

    return make


def test_owners_count_by_their_rows_and_label_rows_by_who_knows_them(absorbed: Any, incumbent: Model) -> None:
    sent = [
        update(incumbent, "food@a", 0.1, 30),
        update(incumbent, "food@b", 0.2, 10),
        update(incumbent, "rail", 0.4, 40),
    ]
    new = absorbed(sent)
    assert moved(new, incumbent) == pytest.approx((30 * 0.1 + 10 * 0.2 + 40 * 0.4) / 80, abs=1e-5)
    assert rows_moved(new, incumbent, "food") == pytest.approx(0.125, abs=1e-5)
    assert rows_moved(new, incumbent, "rail") == pytest.approx(0.4, abs=1e-5)
    assert moved(absorbed(sent, by_rows=False, scale=0.5), incumbent) == pytest.approx(0.5 * 0.7 / 3, abs=1e-5)
    for rows in (0, -1, 1.5, True, "many", None, 10**9):
        with pytest.raises(IntegrityError, match="how many rows"):
            absorbed([update(incumbent, "rail", 0.1, rows)])


def test_label_rows_of_another_industry_are_refused(absorbed: Any, incumbent: Model) -> None:
    sent = update(incumbent, "food", 0.1)
    with pytest.raises(IntegrityError):
        absorbed([replace(sent, domain="rail")])


@pytest.mark.parametrize("aggregate", ["median", "trimmed", "krum", "multi_krum", "geometric"])
def test_a_minority_does_not_carry_the_centre_away(absorbed: Any, incumbent: Model, aggregate: str) -> None:
    pushes = {"a": 0.09, **dict.fromkeys("bcdef", 0.1), "g": 0.11}
    honest = [update(incumbent, f"food@{n}", push) for n, push in pushes.items()]
    liars = [update(incumbent, f"food@{n}", push, 10**6) for n, push in (("x", -5.0), ("y", 9.0), ("z", 30.0))]
    new = absorbed([*honest, *liars], aggregate=aggregate)
    assert moved(new, incumbent) == pytest.approx(0.1, abs=0.02)
    assert rows_moved(new, incumbent, "food") == pytest.approx(0.1, abs=0.02)
    assert moved(absorbed([*honest, *liars]), incumbent) > 5


@pytest.mark.parametrize("aggregate", ["median", "trimmed", "krum", "multi_krum", "geometric"])
@pytest.mark.parametrize("length", [1e2, 1e6, 1e12])
def test_however_long_a_lie_is(aggregate: Any, length: float) -> None:
    torch.manual_seed(0)
    changes = torch.randn(10, 50).double() / 50**0.5
    changes[7] *= length
    if aggregate in {"median", "trimmed"}:
        made = middle(list(changes), aggregate, 0.3)
    else:
        made = (chosen(changes @ changes.T, aggregate, 0.3)[:, None] * changes).sum(0)
    assert float(made.norm()) < 2


@pytest.mark.parametrize("way", ["fedavg", "fedadam"])
@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["food/soup", "food/strange", "food/bread"]}, {"labels": None}, {"labels": 3},
        {"labels": ["food/soup"]},
        {"head:classifier.bias": None}, {"head:classifier.weight": None}, {"head:other.weight": torch.zeros(3, 4)},
        {"head:classifier.weight": torch.zeros(3, 1)}, {"head:classifier.weight": torch.zeros(3)},
        {"head:classifier.bias": torch.zeros(2)},
    ],
    ids=str,
)  # fmt: skip
def test_label_rows_that_are_not_the_bases_are_refused(
    absorbed: Any, incumbent: Model, change: dict[str, Any], way: str
) -> None:
    honest, sent = update(incumbent, "food@b", 0.1), update(incumbent, "food@a", 0.1)
    if "labels" in change:
        broken = replace(sent, meta={**sent.meta, **change})
    else:
        tensors = {n: t for n, t in {**sent.tensors, **change}.items() if t is not None}
        broken = replace(sent, tensors=tensors)
    for both in ([broken, honest], [honest, replace(broken, domain="food@c")]):
        with pytest.raises(IntegrityError) as caught:
            absorbed(both, way)
        assert caught.value.code == "contribution-broken"


def test_who_claims_many_steps_does_not_scale_the_others(absorbed: Any, incumbent: Model) -> None:
    honest = [update(incumbent, f"food@{n}", 0.1) for n in "abcde"]
    new = absorbed([*honest, update(incumbent, "food@x", 0.1, steps=10**7)], "fednova")
    assert 0 < moved(new, incumbent) < 0.3


def test_long_updates_are_brought_down(absorbed: Any, incumbent: Model) -> None:
    sent = [update(incumbent, f"food@{n}", push) for n, push in (("a", 0.1), ("b", 0.1), ("c", 100.0))]
    assert moved(absorbed(sent, clip=1.0), incumbent) == pytest.approx(0.1, abs=1e-3)
    assert moved(absorbed(sent, clip=2.0), incumbent) == pytest.approx(0.4 / 3, abs=1e-3)


def test_who_makes_more_steps_does_not_pull_further(absorbed: Any, incumbent: Model) -> None:
    sent = [update(incumbent, "food@a", 0.1, steps=5), update(incumbent, "food@b", 0.9, steps=45)]
    assert moved(absorbed(sent, "fednova"), incumbent) == pytest.approx(25 * (0.1 / 5 + 0.9 / 45) / 2, abs=1e-5)
    same = [update(incumbent, "food@a", 0.1), update(incumbent, "food@b", 0.9)]
    assert moved(absorbed(same, "fednova"), incumbent) == pytest.approx(0.5, abs=1e-5)


@pytest.mark.parametrize("way", ["fedavgm", "fedadam", "fedyogi"])
def test_the_centre_remembers_between_inner_rounds(absorbed: Any, incumbent: Model, tmp_path: Path, way: str) -> None:
    pushes, m, v, before = (0.3, -0.1, 0.2), 0.0, 0.0, None
    for number, push in enumerate(pushes):
        after = tmp_path / f"state-{number}"
        new = absorbed([update(incumbent, "food", push)], way, Inner(number, before, after))
        got = moved(new, incumbent)
        if way == "fedavgm":
            m = 0.9 * m + push
            expected = m
        else:
            m = 0.9 * m + 0.1 * push
            v = 0.99 * v + 0.01 * push**2 if way == "fedadam" else v - 0.01 * push**2 * (1 if v > push**2 else -1)
            expected = 1e-3 * m / (v**0.5 + 1e-3)
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-6)
        assert rows_moved(new, incumbent, "food") == pytest.approx(
            expected * (1 if way == "fedavgm" else 10), rel=1e-3, abs=1e-6
        )
        before = after
    assert (
        absorbed([update(incumbent, "food", 0.3)], way).digest == absorbed([update(incumbent, "food", 0.3)], way).digest
    )


def test_pieces_of_robust_aggregation() -> None:
    assert [false_ones(n, 0.3) for n in (1, 2, 3, 4, 10)] == [0, 0, 0, 1, 3]
    x = torch.tensor([[0.0, 5], [1, 6], [2, 7], [100, -100]])
    assert middle(list(x), "median", 0.3).tolist() == [1.5, 5.5]
    assert middle(list(x), "trimmed", 0.3).tolist() == [1.5, 5.5]
    assert middle(list(x[:3]), "median", 0.3).tolist() == [1.0, 6.0]
    for count in (1, 2, 9, 32, 33):  # sorted in two ways
        many = torch.randn(count, 50)
        torch.testing.assert_close(middle(list(many), "median", 0.3), many.quantile(0.5, 0))
        cut = false_ones(count, 0.3)
        torch.testing.assert_close(middle(list(many), "trimmed", 0.3), many.sort(0).values[cut : count - cut].mean(0))
    products = (x @ x.T).double()
    assert chosen(products, "krum", 0.3).tolist() == [1, 0, 0, 0]  # as near as the next two; the first counts
    assert chosen(products, "multi_krum", 0.3).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])
    w = chosen(products, "geometric", 0.3)
    point = (w[:, None] * x).sum(0)
    around = [float((x - p).norm(dim=1).sum()) for p in (point, point + 0.05, point - 0.05, x.mean(0), x[1])]
    assert around[0] <= min(around) + 1e-3
    assert bounded(products, 0.0).tolist() == [1, 1, 1, 1]
    assert bounded(torch.diag(torch.tensor([1.0, 4.0, 100.0])).double(), 1.0).tolist() == pytest.approx([1, 1, 0.2])


def test_an_owner_trains_on_its_own_labels_alone(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    food = Specialist(incumbent, domains["food"], incumbent)
    sent = method("fedavg").contribute(food, incumbent, context, train=FAST)
    assert set(sent.meta["labels"]) == set(domains["food"].full_labels)
    assert sent.meta["rows"] == len(domains["food"].train)
    new = method("fedavg").absorb(incumbent, [sent], tmp_path / "new", context)
    assert rows_moved(new, incumbent, "food") != 0
    assert rows_moved(new, incumbent, "rail") == 0
    held = method("fedprox").contribute(food, incumbent, context, train=FAST, mu=100.0)
    before = body_of(incumbent)

    def length(c: Contribution) -> float:
        return sum(float((c.tensors[n].float() - before[n]).square().sum()) for n in before) ** 0.5

    assert 0 < length(held) < 0.5 * length(sent)
    free = method("fedprox").contribute(food, incumbent, context, train=FAST, mu=0.0)
    assert length(free) == pytest.approx(length(sent), rel=0.5)


def test_scaffold_keeps_the_mean_gradient(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    way, folders = method("scaffold"), {n: tmp_path / n for n in ("own", "said", "own2")}
    given = {"train": {"batch_size": 8, "lr": 1e-4, "clip": 0.0, "dropout": 0.0}, "learns": {"rivals": "industry"}}
    food = Specialist(incumbent, domains["food"], incumbent)
    first = way.contribute(food, incumbent, replace(context, inner=Inner(0, after=folders["own"])), **given)
    control = {n: first.tensors[f"control:{n}"] for n in body_of(incumbent) if f"control:{n}" in first.tensors}
    before, steps = body_of(incumbent), first.meta["steps"]
    for name, mean in control.items():  # no other correction yet: theta_base - theta is lr times the sum of gradients
        torch.testing.assert_close(mean, (before[name] - first.tensors[name].float()) / (1e-4 * steps))
    inner = Inner(0, telling=folders["said"])
    way.absorb(incumbent, [first], tmp_path / "new", replace(context, inner=inner))
    told = Tensors(folders["said"] / "control.safetensors")
    name = max(control, key=lambda n: float(control[n].norm()))
    torch.testing.assert_close(told[name], control[name])
    # its own control is what the centre tells: nothing is corrected, and the same seed gives the same update
    alike = Inner(0, before=folders["own"], after=folders["own2"], said=folders["said"])
    again = way.contribute(food, incumbent, replace(context, inner=alike), **given)
    torch.testing.assert_close(again.tensors[name], first.tensors[name])
    alone = way.contribute(food, incumbent, replace(context, inner=replace(alike, said=None)), **given)
    push = 1e-4 * steps * control[name]  # g - c_i: held back by what it did before
    assert float((alone.tensors[name] - first.tensors[name] - push).norm()) < 0.2 * float(push.norm())
    with pytest.raises(UsageError, match="SGD"):
        way.contribute(food, incumbent, context, train={"optimizer": "AdamW"})
    with pytest.raises(UsageError, match="clip: 0"):
        way.contribute(food, incumbent, context, train={"clip": 1.0})
    with pytest.raises(IntegrityError):
        way.absorb(incumbent, [replace(first, tensors=dict(list(first.tensors.items())[:3]))], tmp_path / "x", context)


@pytest.mark.parametrize("way", ["fedavg", "fedprox", "fedavgm", "fedadam"])
@pytest.mark.parametrize("layers", ["lora", "head"])
def test_less_than_all_crosses_where_less_learns(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, way: str, layers: str
) -> None:
    train, before = {**FAST, "epochs": 6, "lr": 1e-2, "weight_decay": 0.0}, body_of(incumbent)
    own, centre, base = (tmp_path / n for n in ("own", "centre", "base"))
    food, model = Specialist(incumbent, domains["food"], incumbent), incumbent
    for number in range(2):
        states = [p / str(number - 1) if number else None for p in (own, centre)]
        inner = Inner(number, states[0], own / str(number))
        sent = method(way).contribute(
            food, model, replace(context, inner=inner), train=train, learns={"layers": layers, "rank": 2}
        )
        assert sum(t.numel() for t in sent.tensors.values()) < sum(t.numel() for t in before.values()) / 4
        at_centre = Inner(number, states[1], centre / str(number))
        model = method(way).absorb(model, [sent], base / str(number), replace(context, inner=at_centre))
    after = body_of(model)
    changed = [n for n in before if not torch.equal(before[n], after[n])]
    assert bool(changed) == (layers == "lora")
    assert all(before[n].ndim > 1 for n in changed)
    assert rows_moved(model, incumbent, "food") != 0
    assert rows_moved(model, incumbent, "rail") == 0
    domain = domains["food"]

    def sure(model: Model) -> float:
        network, labels = load_network(model), [model.labels.index(n) for n in domain.full_labels]
        logits = class_logits(network, load_tokenizer(model), domain.train.texts, context)[:, labels]
        return float(logits.log_softmax(1)[range(len(logits)), list(domain.train.labels or ())].mean())

    if way in {"fedavg", "fedprox"}:  # the others go further than two inner rounds want
        assert sure(model) > sure(incumbent)


def test_features_that_stand_still_are_computed_once(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    food, way = Specialist(incumbent, domains["food"], incumbent), method("fedavg")
    first = replace(context, inner=Inner(0, after=tmp_path / "own"))
    sent = way.contribute(food, incumbent, first, train=FAST, learns=ROWS_ALONE)
    again = replace(context, inner=Inner(0, tmp_path / "own", tmp_path / "own2"))
    moved_head = way.absorb(incumbent, [sent], tmp_path / "new", context)

    def asked(*_: Any) -> Tensor:
        raise AssertionError("features were computed again")

    monkeypatch.setattr("fanbu.feedback.updates._local.features", asked)
    assert way.contribute(food, incumbent, again, train=FAST, learns=ROWS_ALONE).digest == sent.digest
    way.contribute(food, moved_head, again, train=FAST, learns=ROWS_ALONE)  # the body is the same
    other = way.absorb(incumbent, [update(incumbent, "food", 0.1)], tmp_path / "other", context)
    with pytest.raises(AssertionError, match="again"):
        way.contribute(food, other, again, train=FAST, learns=ROWS_ALONE)


def test_label_rows_alone_have_control_variates(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    way, train = method("scaffold"), {"batch_size": 8, "lr": 1e-4, "head_lr": 0.5}
    food, rail = (Specialist(incumbent, domains[n], incumbent) for n in ("food", "rail"))
    sent = [
        way.contribute(
            s,
            incumbent,
            replace(context, inner=Inner(0, after=tmp_path / s.domain.name)),
            train=train,
            learns=ROWS_ALONE,
        )
        for s in (food, rail)
    ]
    controls = {n for n in sent[0].tensors if n.startswith("control:")}
    assert controls == {f"control:label:{label}" for label in domains["food"].full_labels}
    said = replace(context, inner=Inner(0, telling=tmp_path / "said"))
    new = way.absorb(incumbent, sent, tmp_path / "new", said)
    told = Tensors(tmp_path / "said" / "control.safetensors")
    assert set(told) == {f"label:{n}" for s in (food, rail) for n in s.domain.full_labels}
    label = domains["food"].full_labels[0]
    mean = told[f"label:{label}"]  # nobody else knows it
    torch.testing.assert_close(mean, sent[0].tensors[f"control:label:{label}"])
    name, place = head_tensors(incumbent)[0], incumbent.labels.index(label)
    row = Tensors(incumbent.path)[name][place] - Tensors(new.path)[name][new.labels.index(label)]
    torch.testing.assert_close(mean[:-1], row / (0.5 * sent[0].meta["steps"]), rtol=1e-3, atol=1e-5)
    inner = Inner(1, tmp_path / "food", tmp_path / "food2", tmp_path / "said")
    alike = way.contribute(food, new, replace(context, inner=inner), train=train, learns=ROWS_ALONE)
    alone = way.contribute(food, new, replace(context, inner=Inner(1)), train=train, learns=ROWS_ALONE)
    head = HEAD + name
    torch.testing.assert_close(alike.tensors[head], alone.tensors[head])  # c_i = c: nothing is added
    pushed = way.contribute(
        food, new, replace(context, inner=replace(inner, said=None)), train=train, learns=ROWS_ALONE
    )
    push = 0.5 * sent[0].meta["steps"] * Tensors(tmp_path / "food" / "control.safetensors")[f"label:{label}"][:-1]
    apart = pushed.tensors[head][0] - alone.tensors[head][0]
    assert float((apart - push).norm()) < 0.3 * float(push.norm())  # g - c_i: held back by what it did before
    still = way.contribute(food, new, replace(context, inner=inner), train={**train, "head_lr": 0.0}, learns=ROWS_ALONE)
    assert torch.equal(still.tensors[head][0], Tensors(new.path)[name][new.labels.index(label)])
    bare = replace(sent[0], tensors={n: t for n, t in sent[0].tensors.items() if not n.startswith("control:")})
    with pytest.raises(IntegrityError, match="control variate"):
        way.absorb(incumbent, [bare, sent[1]], tmp_path / "broken", context)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "SGD"])
@pytest.mark.parametrize(("layers", "privacy"), [("all", 0.0), ("lora", 0.0), ("head", 0.0), ("head", 4.0)])
def test_labels_of_others_compete_and_do_not_move(
    incumbent: Model, domains: dict[str, Domain], context: Context, optimizer: str, layers: str, privacy: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    food, kept = domains["food"], []
    rows = [i for i, label in enumerate(food.train.labels or ()) if label < 2]
    columns = ([column[i] for i in rows] for column in (food.train.ids, food.train.texts, food.train.labels or ()))
    some = Rows(*map(tuple, columns))
    part = replace(food, name="food@a", labels=food.labels[:2], train=some)
    held = fanbu.feedback.updates._local._held

    def watched(loss: Any, head: Any, count: int) -> Any:
        inner, before = held(loss, head, count), [p.detach()[count:].clone() for p in head.parameters()]

        def look(network: Any, chosen: Any) -> Tensor:
            value = inner(network, chosen)
            kept.append(all(torch.equal(p[count:], b) for p, b in zip(head.parameters(), before, strict=True)))
            kept.append(before[0].shape[0] == len(incumbent.labels) - 2)
            return value

        return look

    monkeypatch.setattr("fanbu.feedback.updates._local._held", watched)
    arguments = {"train": {**FAST, "optimizer": optimizer, "weight_decay": 0.1}}
    arguments["learns"] = {"layers": layers, "rank": 2, "privacy": {"epsilon": privacy}}
    sent = method("fedavg").contribute(Specialist(incumbent, part, incumbent), incumbent, context, **arguments)
    assert len(kept) > 4
    assert all(kept)
    assert sent.meta["labels"] == [f"food/{label}" for label in food.labels[:2]]
    assert sent.tensors[HEAD + head_tensors(incumbent)[0]].shape[0] == 2


def test_all_labels_compete_where_that_is_asked_for(
    incumbent: Model, domains: dict[str, Domain], context: Context
) -> None:
    food, way = Specialist(incumbent, domains["food"], incumbent), method("fedavg")
    own, everyone = (
        way.contribute(food, incumbent, context, train=FAST, learns={"layers": "head", "rivals": r})
        for r in ("industry", "all")
    )
    assert own.meta["labels"] == everyone.meta["labels"]
    name = HEAD + head_tensors(incumbent)[0]
    assert own.tensors[name].shape == everyone.tensors[name].shape
    assert not torch.equal(own.tensors[name], everyone.tensors[name])


def test_who_rests_is_remembered(absorbed: Any, incumbent: Model, tmp_path: Path) -> None:
    both = [update(incumbent, "food", 0.1), update(incumbent, "rail", 0.2)]
    for number, sent in enumerate([both, both[:1], both]):
        inner = Inner(number, tmp_path / str(number - 1) if number else None, tmp_path / str(number))
        new = absorbed(sent, "fedavgm", inner)
    assert rows_moved(new, incumbent, "rail") == pytest.approx(0.2 + 0.9 * 0.2, abs=1e-5)


@pytest.mark.parametrize("labels", [None, 3, [], "food"])
def test_controls_of_no_labels_are_refused(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, labels: Any
) -> None:
    way, train = method("scaffold"), {"batch_size": 8, "lr": 1e-4, "head_lr": 1e-3}
    sent = way.contribute(
        Specialist(incumbent, domains["food"], incumbent), incumbent, context, train=train, learns=ROWS_ALONE
    )
    with pytest.raises(IntegrityError):
        way.absorb(incumbent, [replace(sent, meta={**sent.meta, "labels": labels})], tmp_path / "x", context)
    odd = {n: t.to(torch.float8_e4m3fn) if n.startswith("control:") else t for n, t in sent.tensors.items()}
    with pytest.raises(IntegrityError, match="float32"):
        way.absorb(incumbent, [replace(sent, tensors=odd)], tmp_path / "y", context)


def test_training_at_the_owner_is_the_same_whatever_is_kept(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    food = Specialist(incumbent, domains["food"], incumbent)
    scratch = replace(context, scratch=tmp_path / "scratch")
    (tmp_path / "scratch").mkdir()
    digests = {method("fedavg").contribute(food, incumbent, c, train=FAST).digest for c in (context, scratch)}
    again = method("fedavg").contribute(food, incumbent, replace(context, inner=Inner(1)), train=FAST)
    assert len(digests) == 1
    assert again.digest not in digests  # another inner round, another order of batches


@pytest.mark.parametrize("way", ["fedavg", "fedprox", "fedadam", "fednova", "scaffold"])
def test_causal_models_learn_from_all_owners(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path, way: str
) -> None:
    base, known = open_model(llama), {"batch_size": 8, "epochs": 2}
    train = known if way == "scaffold" else {**known, "lr": 3e-3}
    arguments = {"rate": 1e-2} if way == "fedadam" else {}
    sent = [
        method(way).contribute(Specialist(base, d, base), base, context, train=train, **arguments)
        for d in texts.values()
    ]
    new = method(way).absorb(base, sent, tmp_path / "new", context, **arguments)
    for d in texts.values():
        losses = []
        for model in (base, new):
            sums = token_losses(load_network(model), load_tokenizer(model), d.valid.texts, context).sum(0)
            losses.append(float(sums[0] / sums[1]))
        assert losses[1] < losses[0] - 0.02
