"""Adaptation: sources teach an owner of their industry who has texts and no labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import open_gate, probe_of, probed_for, rail_owners, rows, tiny_recipe, write_rows
from fanbu.batches import encode, pad_id
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import FitError, IntegrityError
from fanbu.feedback.predictions._pool import Voice
from fanbu.feedback.predictions.adapt import nearest, source_weights
from fanbu.feedback.statistics.coral import _bent, _power
from fanbu.generations import leave, run
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.objectives import informed, soft_labelled
from fanbu.predict import class_logits
from fanbu.recipe import load_recipe
from fanbu.types import Context, ProbeSet

TRAIN = {"epochs": 4, "lr": 3e-3, "head_lr": 1e-2, "batch_size": 8}
WAY = method("adapt")


def source(truth: torch.Tensor, right: float, seed: int, sure: float = 0.8) -> Voice:
    generator, labels = torch.Generator().manual_seed(seed), int(truth.max()) + 1
    other = torch.randint(labels, truth.shape, generator=generator)
    said = torch.where(torch.rand(len(truth), generator=generator) < right, truth, other)
    p = torch.full((len(truth), labels), (1 - sure) / (labels - 1))
    p[torch.arange(len(truth)), said] = sure
    return Voice(f"x@{seed}", list(range(labels)), p, torch.zeros(len(truth)).bool())


def test_sources_that_agree_weigh_more_and_constant_ones_hardly() -> None:
    truth = torch.arange(300) % 3
    good = [source(truth, 0.85, 1), source(truth, 0.8, 2), source(truth, 0.75, 3)]
    constant = source(torch.zeros(300, dtype=torch.long) + 2, 1.0, 4)
    a = source_weights([*good, constant], torch.full((300, 3), 1 / 3))
    assert float(a.sum()) == pytest.approx(1)
    assert float(a[3]) < 0.05 < float(a[:3].min())


def test_the_nearest_centroid_mends_what_sources_get_wrong() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(300) % 3
    x = 4 * torch.eye(3)[truth] + torch.randn(300, 3, generator=generator)
    p = source(truth, 0.6, 1).probs_nk
    y = nearest(x, p)
    assert torch.equal(y.sum(1), torch.ones(300))
    assert float((y.argmax(1) == truth).float().mean()) > 0.95 > 0.8 > float((p.argmax(1) == truth).float().mean())
    known = p.clone()
    known[:, 1] = 0
    assert not bool(nearest(x, known)[:, 1].any())  # nobody spoke of it


def test_a_target_that_is_turned_and_moved_is_seen_as_the_source() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=generator) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.5])
    head = torch.randn(3, 6, generator=generator)
    moved = x @ torch.diag(torch.tensor([0.2, 1.5, 4.0, 1.0, 2.0, 0.7])) + 5
    statistics = {
        "weight": head, "bias": torch.zeros(3), "count": torch.ones(3), "mean": x.mean(0),
        "covariance": torch.cov(x.T, correction=0),
    }  # fmt: skip
    sent = Contribution("statistics", "a@b", "coral", statistics, meta={"labels": ["a/x", "a/y", "a/z"]})
    inverse = _power(torch.cov(moved.double().T, correction=0), 1e-6, -0.5)
    bent = _bent(sent, inverse, moved.double().mean(0), 1e-6)
    told = (x @ head.T).argmax(1)
    assert float((told == (moved @ bent.weight_lh.T + bent.bias_l).argmax(1)).float().mean()) > 0.95
    assert float((told == (moved @ head.T).argmax(1)).float().mean()) < 0.8
    with pytest.raises(IntegrityError, match="not of the base's features"):
        _bent(replace(sent, tensors={**statistics, "covariance": torch.eye(5)}), inverse, moved.mean(0), 0.1)


def test_information_asks_for_certain_and_even_answers(incumbent: Model) -> None:
    network, tokenizer = load_network(incumbent), load_tokenizer(incumbent)
    sequences = encode(tokenizer, ["flour yeast", "late platform", "fare refund"], 16)
    targets = torch.full((3, 6), 1 / 6)
    of = {
        weight: float(
            informed(sequences, targets, pad_id(tokenizer), "cpu", [[0, 1, 2]], [0, 0, -1], weight)(
                network, [0, 1, 2]
            ).detach()
        )
        for weight in (0.0, 1.0)
    }
    plain = float(soft_labelled(sequences, targets, pad_id(tokenizer), "cpu")(network, [0, 1, 2]).detach())
    assert of[0.0] == pytest.approx(plain)
    z = torch.stack([network(input_ids=torch.tensor([s])).logits[0, :3] for s in sequences[:2]]).float()
    q = z.softmax(1)
    by_hand = -(q * q.log()).sum(1).mean() + (q.mean(0) * q.mean(0).log()).sum()
    assert of[1.0] - of[0.0] == pytest.approx(2 / 3 * float(by_hand.detach()), abs=1e-4)


@pytest.fixture(scope="module")
def place(
    bert: Path, context: Context, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Model, list[Specialist], Domain, Context]:
    """Two owners with labels, one target without: its texts never stand in a labelled row."""
    folder = tmp_path_factory.mktemp("targets")
    domains = rail_owners(folder)
    context = replace(context, probe=probe_of({d.name: d for d in domains}))
    base, way = probed_for(domains[:2], bert, context, folder), method("finetune")
    grown = [Specialist(way.shrink(base, d, folder / d.name, context, train=TRAIN), d) for d in domains[:2]]
    return base, grown, domains[2], context


@pytest.mark.parametrize("name", ["adapt", "coral", "dann"])
def test_a_target_without_labels_learns_from_its_industry(
    name: str, place: tuple[Model, list[Specialist], Domain, Context], tmp_path: Path
) -> None:
    (base, specialists, target, context), way = place, method(name)
    more: dict[str, Any] = {"train": TRAIN} if "train" in way.parameters() else {}
    sent = [way.contribute(s, base, context) for s in specialists]
    made = way.absorb(base, sent, tmp_path / "made", context, **more)
    assert way.absorb(base, sent[::-1], tmp_path / "again", context, **more).digest == made.digest
    assert sent[0].digest == way.contribute(specialists[0], base, context).digest
    truth = torch.tensor(target.test.labels)

    def right(model: Model) -> float:
        z = class_logits(load_network(model), load_tokenizer(model), target.test.texts, context)
        return float((z.argmax(1) == truth).float().mean())

    if name == "coral":  # the tiny base's features are no better bent
        assert right(made) > 0.5
        return
    assert right(made) > max(0.8, right(base))
    if name == "dann":
        assert made.manifest["parameters"]["targets"] == ["rail"]
        return
    told = made.manifest["parameters"]["sources"]["rail"]
    assert set(told) >= {"rail@east", "rail@north"}
    assert sum(told.values()) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("name", ["adapt", "coral", "dann"])
def test_without_a_target_it_says_what_is_missing(
    name: str, place: tuple[Model, list[Specialist], Domain, Context], tmp_path: Path
) -> None:
    (base, specialists, _, context), way = place, method(name)
    own = replace(context, probe=ProbeSet(tuple(r for r in context.probe.rows if r.domain != "rail@west")))
    sent = [way.contribute(s, base, own) for s in specialists]
    with pytest.raises(FitError, match=r"who has no specialist.*rail@\.\.\.") as caught:
        way.absorb(base, sent, tmp_path / "made", own)
    assert caught.value.code == "no-target"


def test_a_recipe_names_the_target_as_a_guard_with_texts(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path)
    rail = value["domains"].pop("rail")
    texts = write_rows(tmp_path / "texts.jsonl", [{**r, "label": ""} for r in rows("rail", 40, 7)])
    value["domains"]["rail@north"] = rail
    value["guards"] = {"rail@west": {"test": rail["test"], "unlabelled": texts}}
    value["feedback"] = {"method": "adapt", "train": {"epochs": 2, "lr": 3e-3, "batch_size": 8}}
    with pytest.raises(FitError, match=r"adapt needs an owner.*rail@\.\.\."):
        run(load_recipe({**value, "guards": {}}))
    with open_gate():
        record = run(load_recipe(value))
    made = open_model(record["candidate"]["path"])
    assert set(made.manifest["parameters"]["sources"]["rail"]) >= {"rail@north"}
    assert record["domains"]["rail@west"]["role"] == "guard"
    leave(tmp_path / "ws", "rail@west", forget=True)  # it was learned from, so it can be forgotten
