"""Ensembles: what an industry's specialists say together, how alike they are, and what labels add."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import probe_of, probed_for, rail_owners
from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.committee import Committee
from fanbu.domain import Domain, Specialist
from fanbu.errors import BoundaryError, IntegrityError, UsageError
from fanbu.feedback.predictions._diversity import diversity
from fanbu.feedback.predictions._pool import Voice, blind, pool
from fanbu.feedback.predictions._teach import numbers_of
from fanbu.feedback.predictions.meta_forest import believed
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import class_logits
from fanbu.types import PRESETS, Context

TRAIN = {"epochs": 3, "lr": 3e-3, "head_lr": 1e-2, "batch_size": 8}
WAY = method("ensemble")


def says(labels: torch.Tensor, sure: float, own: torch.Tensor, name: str = "x@a") -> Voice:
    p = torch.full((len(labels), 4), (1 - sure) / 3)
    p[torch.arange(len(labels)), labels] = sure
    return Voice(name, [0, 1, 2, 3], p, own)


def noisy(truth: torch.Tensor, right: float, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.where(
        torch.rand(len(truth), generator=generator) < right, truth,
        torch.randint(4, (len(truth),), generator=generator),
    )  # fmt: skip


def test_labels_show_who_counts_and_a_memory_is_not_believed() -> None:
    truth = torch.randint(4, (900,), generator=torch.Generator().manual_seed(0))
    none = torch.zeros(900).bool()
    owner = torch.arange(900) < 300
    memory = torch.where(owner, truth, noisy(truth, 0.1, 1))  # perfect on its own texts, hopeless elsewhere
    voices = [says(memory, 0.95, owner), says(noisy(truth, 0.8, 2), 0.7, none), says(noisy(truth, 0.3, 3), 0.7, none)]
    start = torch.full((900, 4), 0.25)
    known = torch.where(torch.arange(900) < 600, truth, -1)
    unseen = slice(600, None)

    def right(q: torch.Tensor) -> float:
        return float((q[unseen].argmax(1) == truth[unseen]).float().mean())

    assert right(pool(voices, start, "stacked", known)) > right(pool(voices, start, "mean")) + 0.2
    assert torch.equal(pool(voices, start, "stacked"), pool(voices, start, "mean"))  # without labels nothing is learned


def test_leaves_say_whom_to_believe() -> None:
    truth = torch.randint(4, (1200,), generator=torch.Generator().manual_seed(0))
    none, half = torch.zeros(1200).bool(), torch.arange(1200) % 2 == 0
    voices = []
    for number, good in enumerate((half, ~half)):  # each is right on one half, and less sure on the other
        said, p = torch.where(good, noisy(truth, 0.9, number), noisy(truth, 0.2, number + 5)), None
        p = torch.where(good[:, None], says(said, 0.9, none).probs_nk, says(said, 0.6, none).probs_nk)
        voices.append(Voice(f"x@{number}", [0, 1, 2, 3], p, none))
    mean = pool(voices, torch.full((1200, 4), 0.25), "mean")
    known = torch.where(torch.arange(1200) < 600, truth, -1)
    w = believed(voices, mean, mean, known, 30, 20, 0)
    torch.testing.assert_close(w.sum(1), torch.ones(1200))
    assert float(w[half, 0].mean()) > 0.8 > 0.2 > float(w[~half, 0].mean())
    untaught = believed(voices, mean, mean, torch.full((1200,), -1), 30, 20, 0)
    torch.testing.assert_close(untaught, torch.full((1200, 2), 0.5))
    seen = [Voice(v.domain, v.columns, v.probs_nk, torch.ones(1200).bool()) for v in voices]
    torch.testing.assert_close(believed(seen, mean, mean, known, 30, 20, 0), untaught)  # nobody's memory counts


def test_an_owner_gains_nothing_by_its_own_labels() -> None:
    """Three equal ones, of whom one owns all labelled texts and knows them by heart."""
    truth = torch.randint(4, (900,), generator=torch.Generator().manual_seed(0))
    mine, none = torch.arange(900) < 600, torch.zeros(900).bool()
    first = says(torch.where(mine, truth, noisy(truth, 0.6, 1)), 0.8, mine)
    voices = [first, *(says(noisy(truth, 0.6, k), 0.8, none) for k in (2, 3))]
    start, known = torch.full((900, 4), 0.25), torch.where(mine, truth, -1)
    mean, unseen = pool(voices, start, "mean"), blind(voices, start)
    w = believed(voices, mean, unseen, known, 30, 20, 0)[~mine].mean(0)
    assert float(w.max() - w.min()) < 0.25
    q = pool(voices, start, "stacked", known)[~mine]
    right = [float((x.argmax(1) == truth[~mine]).float().mean()) for x in (q, mean[~mine])]
    assert right[0] > right[1] - 0.05


def test_few_labels_move_the_mean_little() -> None:
    truth = torch.randint(4, (50,), generator=torch.Generator().manual_seed(0))
    voices = [says(noisy(truth, r, s), 0.7, torch.zeros(50).bool()) for s, r in enumerate((0.8, 0.7))]
    start, known = torch.full((50, 4), 0.25), torch.full((50,), -1)
    known[0] = truth[0]
    apart = (pool(voices, start, "stacked", known) - pool(voices, start, "mean")).abs().max()
    assert 0 < float(apart) < 0.15


def test_pairs_are_told_apart_by_where_they_err() -> None:
    truth, none = torch.zeros(100, dtype=torch.long), torch.zeros(100).bool()
    first, other, same = truth.clone(), truth.clone(), truth.clone()
    first[:20], same[:20], other[20:40] = 1, 2, 1
    one, copy, apart = (says(x, 0.9, none, n) for n, x in (("a", first), ("b", same), ("c", other)))
    by_pair = {tuple(p["pair"]): p for p in diversity([one, copy, apart], truth)}  # type: ignore[arg-type]
    assert by_pair["a", "b"]["q"] == 1.0
    assert by_pair["a", "b"]["disagreement"] == 0.2
    # 60 right by both, 20 each by one alone, none wrong by both
    assert by_pair["a", "c"]["q"] == -1.0
    assert by_pair["a", "c"]["disagreement"] == 0.4


@pytest.fixture(scope="module")
def place(
    bert: Path, context: Context, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, list[Specialist], Context]:
    """Three owners of rail, the base that is probed for them, and their specialists."""
    folder = tmp_path_factory.mktemp("rail")
    domains = rail_owners(folder)
    context = replace(context, probe=probe_of({d.name: d for d in domains}))
    base, way = probed_for(domains, bert, context, folder), method("finetune")
    return base, [Specialist(way.shrink(base, d, folder / d.name, context, train=TRAIN), d) for d in domains], context


def accuracy(model: Model, domain: Domain, context: Context) -> float:
    z = class_logits(load_network(model), load_tokenizer(model), domain.test.texts, context)
    return float((z.argmax(1) == torch.tensor(domain.test.labels)).float().mean())


@pytest.mark.parametrize("combine", ["weighted", "mean", "log_mean", "gate", "stacked"])
def test_the_large_model_learns_from_them_together(
    combine: str, place: tuple[Model, list[Specialist], Context], tmp_path: Path
) -> None:
    base, specialists, context = place
    given = {"combine": combine}
    sent = [WAY.contribute(s, base, context, **given) for s in specialists]
    assert all(bool(c.rows) == (combine == "stacked") for c in sent)
    made = WAY.absorb(base, sent, tmp_path / "made", context, train=TRAIN, **given)
    domain = specialists[0].domain
    assert accuracy(made, domain, context) > max(0.8, accuracy(base, domain, context))
    told = made.manifest["parameters"]["diversity"]["rail"]
    assert {tuple(p["pair"]) for p in told} >= {("rail@east", "rail@north")}
    assert all(0 <= p["disagreement"] <= 1 for p in told)


def test_a_meta_forest_teaches_too(place: tuple[Model, list[Specialist], Context], tmp_path: Path) -> None:
    (base, specialists, context), way = place, method("meta_forest")
    sent = [way.contribute(s, base, context) for s in specialists]
    assert all(c.rows for c in sent)
    made = way.absorb(base, sent, tmp_path / "made", context, train=TRAIN)
    assert accuracy(made, specialists[0].domain, context) > 0.8
    told = made.manifest["parameters"]["believed"]["rail"]
    assert sum(told.values()) == pytest.approx(1, abs=1e-3)
    assert set(told) >= {"rail@east", "rail@north"}


def test_labels_cross_only_where_they_may(place: tuple[Model, list[Specialist], Context], tmp_path: Path) -> None:
    base, specialists, context = place
    sent = WAY.contribute(specialists[0], base, context, combine="stacked")
    with pytest.raises(BoundaryError, match="labels stay with their owner"):
        cross(sent, PRESETS["internal"], tmp_path / "out")
    assert {row["id"].partition("/")[0] for row in sent.rows} == {"rail@east"}
    for lie in (1e3, float("nan"), "all"):
        with pytest.raises(IntegrityError, match="a trust that is no share"):
            WAY.absorb(base, [replace(sent, meta={**sent.meta, "trust": lie})], tmp_path / "lie", context)
    forged = replace(sent, rows=[{"id": r.id, "label": "rail/seat"} for r in context.probe.rows])
    assert set(numbers_of(base, [forged], context)["rail"]) == {row["id"] for row in sent.rows}


def test_a_committee_answers_with_the_specialists_themselves(
    place: tuple[Model, list[Specialist], Context], incumbent: Model, specialists: dict[str, Specialist]
) -> None:
    base, grown, context = place
    domain, models = grown[0].domain, {s.domain.name: s.model for s in grown}
    panels = [WAY.contribute(s, base, context) for s in grown]
    truth = [domain.full_labels[i] for i in domain.test.labels or ()]
    for combine in ("weighted", "mean", "log_mean", "gate"):
        committee = Committee(base, models, context, panels, combine)  # type: ignore[arg-type]
        p = committee.probabilities(domain.test.texts, domain.name)
        torch.testing.assert_close(p.sum(1), torch.ones(len(domain.test)))
        said = committee.answers(domain.test.texts, domain.name)
        assert sum(s == t for s, t in zip(said, truth, strict=True)) / len(truth) > 0.8
    two = {n: s.model for n, s in specialists.items()}
    rail = specialists["rail"].domain
    untold = Committee(incumbent, two, context).answers(rail.test.texts)
    assert sum(label.startswith("rail/") for label in untold) > 0.6 * len(untold)
    alone = class_logits(load_network(two["rail"]), load_tokenizer(two["rail"]), rail.test.texts, context)
    told = Committee(incumbent, two, context).answers(rail.test.texts, "rail")
    assert told == [two["rail"].labels[i] for i in alone.argmax(1).tolist()]
    with pytest.raises(UsageError, match=r"whose industries the base knows.*allowed: food, rail.*got: sea"):
        Committee(incumbent, {"sea": two["rail"]}, context)
    silent = [replace(c, meta={**c.meta, "trust": 0}) for c in panels]
    own = class_logits(load_network(base), load_tokenizer(base), domain.test.texts, context)
    told = Committee(base, models, context, silent).answers(domain.test.texts, domain.name)
    assert told == [base.labels[i] for i in own.argmax(1).tolist()]  # nobody is trusted: the base answers
    with pytest.raises(UsageError, match="does not know"):
        Committee(incumbent, two, context).answers(["a"], "sea")
    with pytest.raises(UsageError, match="no labels to stack by"):
        Committee(incumbent, two, context, combine="stacked")
