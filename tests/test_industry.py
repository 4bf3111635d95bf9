"""Several owners of one industry: they share label rows, answer for each other's texts, and liars are outvoted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import open_gate, probe_of, probed_for, rows, tiny_recipe, write_domain, write_rows
from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist, load_domain
from fanbu.errors import UsageError
from fanbu.feedback.predictions._pool import Combine, Voice, pool, reliable
from fanbu.feedback.predictions._targets import union_targets
from fanbu.generations import leave, run
from fanbu.heads import Head, join
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import class_logits
from fanbu.recipe import load_recipe
from fanbu.types import Context, industry_of


def voice(probs_nk: Tensor, columns: list[int] | None = None, name: str = "a") -> Voice:
    return Voice(
        name, columns or list(range(probs_nk.shape[1])), probs_nk, torch.zeros(len(probs_nk), dtype=torch.bool)
    )


def restricted(q: Tensor, columns: list[int]) -> Voice:
    p = q[:, columns]
    return voice(p / p.sum(1, keepdim=True), columns)


def even(q: Tensor) -> Tensor:
    return torch.full_like(q, 1 / q.shape[1])


def test_who_knows_the_same_labels_is_averaged() -> None:
    torch.manual_seed(0)
    one, other = torch.rand(9, 4).softmax(1), (3 * torch.rand(9, 4)).softmax(1)
    voices = [voice(one), voice(other)]
    torch.testing.assert_close(pool(voices, even(one), "mean"), (one + other) / 2)
    w, v = one.max(1).values[:, None], other.max(1).values[:, None]
    torch.testing.assert_close(pool(voices, even(one), "weighted"), (w * one + v * other) / (w + v))
    log_mean = (one * other).sqrt()
    torch.testing.assert_close(pool(voices, even(one), "log_mean"), log_mean / log_mean.sum(1, keepdim=True))


@pytest.mark.parametrize("combine", ["mean", "weighted", "log_mean"])
def test_what_each_says_of_its_own_labels_makes_the_whole(combine: Combine) -> None:
    torch.manual_seed(1)
    q = torch.randn(40, 5).softmax(1)
    voices = [restricted(q, columns) for columns in ([0, 1, 2], [2, 3], [3, 4, 0])]
    torch.testing.assert_close(pool(voices, even(q), combine), q, atol=2e-3, rtol=1e-2)


def test_between_labels_that_nobody_knows_both_of_the_base_decides() -> None:
    torch.manual_seed(2)
    q = torch.randn(6, 4).softmax(1)
    found = pool([restricted(q, [0, 1]), restricted(q, [2, 3])], q, "mean")
    torch.testing.assert_close(found, q, atol=1e-4, rtol=1e-3)
    alone = pool([restricted(q, [1, 2])], q)
    assert torch.equal(alone[:, [0, 3]], torch.zeros(6, 2))  # of these nobody says anything


def test_gates_give_each_text_to_its_owner_and_others_to_the_surest() -> None:
    low, high = torch.tensor([[0.6, 0.4]] * 3), torch.tensor([[0.1, 0.9]] * 3)
    mine = Voice("a", [0, 1], low, torch.tensor([True, False, False]))
    yours = Voice("b", [0, 1], high, torch.tensor([False, True, False]))
    assert pool([mine, yours], even(low), "gate")[:, 0].tolist() == pytest.approx([0.6, 0.1, 0.1])


def crowd(liars: str, count: int = 3) -> tuple[Tensor, list[Voice]]:
    """Ten specialists that are right four times in five, of whom the last lie; the truth goes before."""
    generator = torch.Generator().manual_seed(3)
    truth = torch.randint(6, (600,), generator=generator)
    voices = []
    for number in range(10):
        wrong = torch.rand(600, generator=generator) > 0.8
        said = torch.where(wrong, torch.randint(6, (600,), generator=generator), truth)
        sure = 0.8
        if number >= 10 - count:
            said = {
                "random": torch.randint(6, (600,), generator=generator), "constant": torch.full_like(truth, 2),
                "flipped": (truth + 1) % 6, "over-confident": said,
            }[liars]  # fmt: skip
            sure = 0.999
        p = torch.full((600, 6), (1 - sure) / 5)
        p[torch.arange(600), said] = sure
        voices.append(voice(p, name=f"x@{number}"))
    return truth, voices


@pytest.mark.parametrize("kind", ["random", "constant", "flipped", "over-confident"])
def test_three_liars_of_ten_cost_less_than_a_point(kind: str) -> None:
    truth, voices = crowd(kind)
    honest = float((pool(voices[:7], even(voices[0].probs_nk)).argmax(1) == truth).float().mean())
    lied = float((pool(voices, even(voices[0].probs_nk)).argmax(1) == truth).float().mean())
    assert lied > honest - 0.01
    weights = [float(weight.mean()) for _, weight in reliable(voices)]
    if kind == "over-confident":  # they are as good as the others, and no surer after it
        assert min(weights[7:]) > 2
        assert float(reliable(voices)[9][0].probs_nk.max(1).values.mean()) < 0.9
    else:
        assert max(weights[7:]) < 0.3 < 2 < min(weights[:7])


def test_a_specialist_counts_where_it_is_right() -> None:
    """Each is good on its own owner's texts alone; a mean would follow the others."""
    generator = torch.Generator().manual_seed(4)
    truth, owner = torch.randint(10, (400,), generator=generator), torch.arange(400) % 4
    voices = []
    for number in range(4):
        chance = torch.where(owner == number, 0.95, 0.4)
        wrong = torch.rand(400, generator=generator) > chance
        said = torch.where(wrong, torch.randint(10, (400,), generator=generator), truth)
        p = torch.full((400, 10), 0.005)
        p[torch.arange(400), said] = 0.955
        voices.append(Voice(f"x@{number}", list(range(10)), p, owner == number))

    def right(combine: Combine) -> float:
        return float((pool(voices, even(voices[0].probs_nk), combine).argmax(1) == truth).float().mean())

    assert right("weighted") >= 0.95 > right("mean") + 0.1
    assert right("weighted") >= right("gate")


@pytest.fixture(scope="module")
def owners(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Domain]:
    """Two owners of food, of whom one knows no fruit and the other no soup, and one of rail."""
    folder, found = tmp_path_factory.mktemp("owners"), {}
    for name, lacking in (("food@north", "fruit"), ("food@south", "soup"), ("rail", "")):
        files = {}
        for number, (split, count) in enumerate({"train": 60, "valid": 18, "test": 36}.items()):
            seed = number + (10 if name == "food@south" else 0)
            kept = [r for r in rows(industry_of(name), count, seed) if r["label"] != lacking]
            files[split] = write_rows(folder / f"{name}.{split}.jsonl", kept)
        found[name] = load_domain(name, **files)
    return found


@pytest.fixture(scope="module")
def asked(owners: dict[str, Domain], context: Context) -> Context:
    return replace(context, probe=probe_of(owners))


@pytest.fixture(scope="module")
def probed(bert: Path, owners: dict[str, Domain], asked: Context, tmp_path_factory: pytest.TempPathFactory) -> Model:
    return probed_for(list(owners.values()), bert, asked, tmp_path_factory.mktemp("probed"))


def test_owners_share_label_rows(probed: Model, owners: dict[str, Domain]) -> None:
    assert probed.labels[:3] == ("food/bread", "food/fruit", "food/soup")
    assert owners["food@north"].full_labels == ("food/bread", "food/soup")
    assert len(probed.labels) == 6


def test_rows_of_several_owners_are_their_mean_by_training_rows() -> None:
    one = Head(("a/x", "a/y"), torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 4.0]), torch.tensor([3.0, 1.0]))
    other = Head(("a/y", "a/z"), torch.tensor([[6.0], [7.0]]), torch.tensor([8.0, 1.0]), torch.tensor([3.0, 2.0]))
    found = join([one, Head(("b/x",), torch.ones(1, 1), torch.ones(1)), other])
    assert found.labels == ("a/x", "a/y", "a/z", "b/x")
    assert found.weight_lh[:, 0].tolist() == [1, 5, 7, 1]
    assert found.bias_l.tolist() == [0, 7, 1, 1]


def test_owners_answer_for_each_others_texts(
    probed: Model, owners: dict[str, Domain], asked: Context, tmp_path: Path
) -> None:
    way, train = method("finetune"), {"epochs": 4, "lr": 3e-3, "head_lr": 1e-2, "batch_size": 8}
    grown = [Specialist(way.shrink(probed, d, tmp_path / n, asked, train=train), d) for n, d in owners.items()]
    panels = [method("distill", "feedback").contribute(s, probed, asked) for s in grown]
    network, tokenizer = load_network(probed), load_tokenizer(probed)
    targets = union_targets(probed, network, tokenizer, panels, asked).float()
    truth = [label for d in owners.values() for label in (d.full_labels[i] for i in d.train.labels or ())]
    right = [probed.labels[i] == label for i, label in zip(targets.argmax(1).tolist(), truth, strict=True)]
    assert sum(right) / len(right) > 0.9
    food = torch.tensor([industry_of(row.domain or "") == "food" for row in asked.probe.rows])
    torch.testing.assert_close(targets[food][:, :3].sum(1), torch.ones(int(food.sum())), atol=1e-3, rtol=0)
    fruit = torch.tensor([label == "food/fruit" for label in truth])
    assert float(targets[fruit][:, 1].mean()) > 0.7  # the north, asked too, has no word for it


def test_what_no_heard_specialist_knows_is_left_to_the_base(
    probed: Model, owners: dict[str, Domain], asked: Context, tmp_path: Path
) -> None:
    """The south, who alone knows fruit, is not trusted: its texts keep the base's answer for that label."""
    north = owners["food@north"]
    grown = method("finetune").shrink(probed, north, tmp_path / "north", asked, train={"epochs": 1, "batch_size": 8})
    panel = method("distill", "feedback").contribute(Specialist(grown, north), probed, asked)
    panel = replace(panel, meta={**panel.meta, "trust": max(0.5, panel.meta["trust"])})
    network, tokenizer = load_network(probed), load_tokenizer(probed)
    targets = union_targets(probed, network, tokenizer, [panel], asked).float()
    rows = {o: [i for i, r in enumerate(asked.probe.rows) if r.domain == f"food@{o}"] for o in ("north", "south")}
    z = class_logits(network, tokenizer, [asked.probe.rows[i].text for i in rows["south"]], asked)[:, :3].softmax(1)
    torch.testing.assert_close(targets[rows["south"]][:, 1], z[:, 1], atol=2e-3, rtol=1e-2)
    assert float(targets[rows["north"]][:, 1].max()) == 0.0


@pytest.mark.parametrize("way", ["average", "probe", "weak_to_strong", "multitask"])
def test_every_kind_of_way_takes_several_owners(
    way: str, probed: Model, owners: dict[str, Domain], asked: Context, tmp_path: Path
) -> None:
    found, train = method(way, "feedback"), {"epochs": 1, "lr": 1e-3, "batch_size": 8}
    down: dict[str, Any] = {"train": train}
    grown = [
        Specialist(method("finetune").shrink(probed, d, tmp_path / n, asked, **down), d) for n, d in owners.items()
    ]
    sent = [found.contribute(s, probed, asked) for s in grown]
    more: dict[str, Any] = {"train": train} if "train" in found.parameters() else {}
    made = found.absorb(probed, sent, tmp_path / "made", asked, **more)
    assert made.labels == probed.labels


def test_a_round_with_owners_and_one_that_leaves(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path)
    food = value["domains"].pop("food")
    parts = {}
    lines = Path(food["train"]).read_text().splitlines()
    for number, name in enumerate(("food@north", "food@south")):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(lines[72 * number : 72 * (number + 1)]) + "\n")
        parts[name] = {**food, "train": str(path)}
    value["domains"] = {**value["domains"], **parts}
    with open_gate():
        record = run(load_recipe(value))
    assert set(record["domains"]) == {"rail", "food@north", "food@south"}
    labels = open_model(record["candidate"]["path"]).labels
    assert [label for label in labels if label.startswith("food/")] == ["food/bread", "food/fruit", "food/soup"]
    event = leave(tmp_path / "ws", "food@north")
    assert open_model(tmp_path / "ws" / event["path"]).labels == labels  # the south has the same
    with open_gate():
        record = run(load_recipe({**value, "rounds": 2}))
    assert set(record["domains"]) == {"rail", "food@south"}
    guarding = {n: v for n, v in value["domains"].items() if n != "food@south"}
    guard = {"food@south": {"test": food["test"]}}
    with open_gate():  # a guard's label rows stay too
        run(load_recipe({**value, "domains": guarding, "guards": guard, "rounds": 3}))
    leave(tmp_path / "ws", "food@south")
    assert not any("fo" in label for label in open_model(tmp_path / "ws" / _champion(tmp_path)).labels)


def test_owners_of_the_same_rows_make_the_same_specialist(tmp_path: Path, opened: Model, context: Context) -> None:
    files = write_domain(tmp_path, "food", train=24)
    north, south = (load_domain(f"food@{owner}", **files) for owner in ("north", "south"))
    plan = {"epochs": 2, "lr": 5e-3, "batch_size": 8}
    made = [method("finetune").shrink(opened, d, tmp_path / d.name, context, train=plan) for d in (north, south)]
    one, other = (load_network(model).state_dict() for model in made)
    assert all(torch.equal(one[name], other[name]) for name in one)


def _champion(folder: Path) -> str:
    from fanbu.ledger import Workspace

    return str((Workspace(folder / "ws").champion() or {})["path"])


@pytest.mark.parametrize("name", ["food@", "@north", "food@north@east", "food@no/rth"])
def test_names_of_owners_are_checked(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="industry@owner"):
        load_domain(name, train="x", test="y")
