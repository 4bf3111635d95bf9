"""Panels: few bytes say what a specialist thinks; what a hostile one sends is refused."""

from __future__ import annotations

import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import BoundaryError, FitError, IntegrityError, UsageError
from fanbu.feedback.predictions._balance import row_weights
from fanbu.feedback.predictions._panel import columns_of, heard, heard_tokens, said, variants
from fanbu.feedback.predictions._targets import union_targets
from fanbu.heads import get_head, set_head
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.predict import features
from fanbu.types import PRESETS, Context


def panel(p: torch.Tensor, most: int = 64, mass: float = 0.98) -> Contribution:
    most = min(most, p.shape[1])
    meta = {"most": most, "mass": mass}
    return Contribution("predictions", "a", "distill", said(p, most, mass), meta=meta)


@pytest.mark.parametrize("labels", [2, 5, 77, 300])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 4.0, 40.0])
def test_what_is_said_is_heard(labels: int, sharpness: float) -> None:
    torch.manual_seed(labels)
    p = (sharpness * torch.randn(200, labels)).softmax(1)
    got = heard(panel(p, labels), 200, labels)
    torch.testing.assert_close(got.sum(1), torch.ones(200))
    # half a step for what is said; what is not said comes to 2% and the steps that rounding left out
    assert (got - p).abs().max() < 0.03
    torch.testing.assert_close(got.argmax(1)[p.max(1).values > 0.5], p.argmax(1)[p.max(1).values > 0.5])
    assert torch.equal(heard(panel(p, labels), 200, labels), got)


def test_lists_end_at_the_mass_or_the_number_asked_for() -> None:
    p = torch.tensor([[0.99, 0.01, 0.0], [0.5, 0.3, 0.2], [0.6, 0.385, 0.015]])
    assert list(zlib.decompress(said(p, 3, 0.98)["labels"].numpy())) == [0, 0, 1, 2, 0, 1]
    assert list(zlib.decompress(said(p, 1, 0.98)["labels"].numpy())) == [0, 0, 0]
    alone = heard(panel(p, 1), 3, p.shape[1])
    torch.testing.assert_close(alone[1], torch.tensor([0.5, 0.25, 0.25]), rtol=0, atol=2e-3)  # the rest, evenly


def packed(*values: int) -> torch.Tensor:
    return torch.tensor(list(zlib.compress(bytes(values))), dtype=torch.uint8)


def test_a_sure_panel_takes_two_bytes_a_text_or_less() -> None:
    torch.manual_seed(0)
    p = (25 * torch.randn(1000, 40)).softmax(1)
    sent = said(p, 40, 0.98)
    assert {t.dtype for t in sent.values()} == {torch.uint8}
    assert sum(t.numel() for t in sent.values()) < 2 * 1000 < 1000 * 40 * 4 / 20


@pytest.mark.parametrize(
    "change",
    [
        {"labels": packed(9, 1)},
        {"labels": packed(0)},
        {"labels": torch.tensor([0, 1], dtype=torch.uint8)},
        {"labels": packed(0, 1)[:-1]},
        {"labels": packed(0, 1).int()},
        {"probs": packed(255, 10)},
        {"probs": packed(0, 0, 0, 0), "labels": packed(0, 1, 0, 1)},
        {"probs": packed(100, 100), "labels": packed(1, 1)},
        {"probs": packed(), "labels": packed()},
        {"probs": packed(*[255] * 100_000), "labels": packed(*[0] * 100_000)},
    ],
)
def test_lists_that_do_not_come_out_are_refused(change: dict[str, torch.Tensor]) -> None:
    c = panel(torch.tensor([[0.99, 0.01], [0.01, 0.99]]))
    with pytest.raises(IntegrityError) as caught:
        heard(replace(c, tensors={**c.tensors, **change}), 2, 2)
    assert caught.value.code == "contribution-broken"
    assert heard(c, 2, 2).argmax(1).tolist() == [0, 1]


def test_panels_name_no_labels_and_fit_the_rows_that_they_were_made_for_alone(
    incumbent: Model, specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    food = specialists["food"]
    sent = method("distill", "feedback").contribute(food, incumbent, context)
    assert not any(label in str(dict(sent.meta)) for label in food.domain.labels)
    assert columns_of(sent, incumbent) == [incumbent.labels.index(label) for label in food.domain.full_labels]
    backwards = replace(sent, meta={**sent.meta, "known": [2, 0, 1]})
    assert columns_of(backwards, incumbent) == [columns_of(sent, incumbent)[i] for i in (2, 0, 1)]
    for strange in ({"known": [0, 1, 3]}, {"known": ["a"]}, {"head": "0" * 12}):
        with pytest.raises(FitError) as caught:
            columns_of(replace(sent, meta={**sent.meta, **strange}), incumbent)
        assert caught.value.code == "other-labels"
    without = without_rows(incumbent, "food/bread", tmp_path / "fewer")
    with pytest.raises(FitError):
        method("distill", "feedback").absorb(without, [sent], tmp_path / "out", context)


def without_rows(model: Model, label: str, out: Path) -> Model:
    network = load_network(model)
    set_head(network, get_head(network).take([name for name in model.labels if name != label]))
    return save_network(network, load_tokenizer(model), out, provenance("leave", [model], Context()))


def test_tokens_of_other_lengths_are_refused() -> None:
    tensors: dict[str, Any] = {
        "lengths": torch.tensor([2, 1]), "indices": torch.zeros(3, 4).int(), "probs": torch.zeros(3, 4).half()
    }  # fmt: skip
    c = Contribution("predictions", "a", "distill", tensors)
    assert [len(i) for i, _ in heard_tokens(c, [2, 1])] == [2, 1]
    for lengths in ([1, 2], [2], [2, 1, 1]):
        with pytest.raises(IntegrityError):
            heard_tokens(c, lengths)
    with pytest.raises(IntegrityError):
        heard_tokens(replace(c, tensors={**tensors, "indices": torch.zeros(2, 4).int()}), [2, 1])


def test_variants_are_answered_and_learned_like_other_texts(
    incumbent: Model, specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    way, food = method("distill", "feedback"), specialists["food"]
    plain = way.contribute(food, incumbent, context)
    more = way.contribute(food, incumbent, context, augment=2)
    known = sum(row.domain in {"food", None} for row in context.probe.rows)
    own = sum(row.domain == "food" for row in context.probe.rows)
    made = variants(context, "food", 2)
    assert len(made) == 2 * own
    assert variants(replace(context, seed=context.seed + 1), "food", 2) != made
    assert torch.equal(heard(more, known + 2 * own, 3)[:known], heard(plain, known, 3))
    network, tokenizer = load_network(incumbent), load_tokenizer(incumbent)
    targets = union_targets(incumbent, network, tokenizer, [more], context, 2)
    rows = len(context.probe.rows)
    assert torch.equal(targets[:rows], union_targets(incumbent, network, tokenizer, [plain], context))
    columns = [incumbent.labels.index(label) for label in food.domain.full_labels]
    torch.testing.assert_close(targets[rows:, columns].sum(1).float(), torch.ones(2 * own), rtol=0, atol=2e-3)
    steps = [
        way.absorb(incumbent, [c], tmp_path / str(n), context, augment=n, train={"epochs": 1, "batch_size": 8})
        for n, c in ((0, plain), (2, more))
    ]
    few, many = (m.manifest["parameters"]["steps"] for m in steps)
    assert many - few == pytest.approx(2 * own / 8, abs=1)
    with pytest.raises(IntegrityError):  # what was answered is not what is asked about
        way.absorb(incumbent, [plain], tmp_path / "x", context, augment=1)


def test_variants_are_for_classifiers(llama: Path, texts: dict[str, Domain], context: Context) -> None:
    model = open_model(llama)
    with pytest.raises(UsageError, match="variants"):
        method("distill", "feedback").contribute(Specialist(model, texts["food"]), model, context, augment=1)


def test_features_cross_only_with_texts_and_teach_angles(
    incumbent: Model, specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    way, train = method("distill", "feedback"), {"epochs": 8, "lr": 1e-3, "batch_size": 16}
    sent = [way.contribute(s, incumbent, context, features=1.0) for s in specialists.values()]
    assert all(c.tensors["features"].dtype == torch.int8 and len(c.tensors["features"]) == 48 for c in sent)
    with pytest.raises(BoundaryError, match="features stay with their owner"):
        cross(sent[0], PRESETS["internal"], tmp_path / "kept")
    cross(sent[0], PRESETS["open"], tmp_path / "sent")
    plain = way.absorb(incumbent, sent, tmp_path / "plain", context, train=train)
    taught = way.absorb(incumbent, sent, tmp_path / "taught", context, train=train, features=20.0)

    def apart(model: Model) -> float:
        network, tokenizer = load_network(model), load_tokenizer(model)
        found = []
        for c in sent:
            texts = [r.text for r in context.probe.rows if r.domain == c.domain]
            x, y = features(network, tokenizer, texts, context), c.tensors["features"].float()
            x, y = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.normalize(y, dim=1)
            found.append(float((x @ x.T - y @ y.T).square().mean()))
        return sum(found)

    assert apart(taught) < 0.8 * apart(plain)
    bare = [way.contribute(s, incumbent, context) for s in specialists.values()]
    with pytest.raises(FitError, match="no panel holds any"):
        way.absorb(incumbent, bare, tmp_path / "none", context, train=train, features=1.0)
    few = replace(sent[0], tensors={**sent[0].tensors, "features": sent[0].tensors["features"][:3]})
    with pytest.raises(IntegrityError, match="not those of the rows"):
        way.absorb(incumbent, [few], tmp_path / "few", context, train=train, features=1.0)
    domain = replace(specialists["food"].domain, task="causal-lm")
    with pytest.raises(UsageError, match="for classifiers only"):
        way.contribute(replace(specialists["food"], domain=domain), incumbent, context, features=1.0)


def test_domains_count_by_size_and_by_how_far_the_base_is() -> None:
    domains = ["a"] * 30 + ["b"] * 10 + [None] * 2
    targets, logits = torch.tensor([[0.9, 0.1]] * 42), torch.zeros(42, 2)
    logits[30:40] = torch.tensor([-3.0, 3.0])  # the base is wrong on b
    even = row_weights(domains, 0, 0, targets, logits)
    assert torch.equal(even, torch.ones(42))
    by_size = row_weights(domains, 1, 0, targets, logits)
    assert float(by_size.mean()) == pytest.approx(1)
    assert [float(by_size[k : k + n].sum()) for k, n in ((0, 30), (30, 10), (40, 2))] == pytest.approx([14.0] * 3)
    hard = row_weights(domains, 0, 1, targets, logits)
    apart = torch.nn.functional.kl_div(logits.log_softmax(1), targets, reduction="none").sum(1)
    assert float(hard[30] / hard[0]) == pytest.approx(float(apart[30] / apart[0]), rel=1e-4)
    given = row_weights(domains, 1, 0, targets, logits, {"b": 3.0})
    assert float(given[30] / given[0]) == pytest.approx(9.0)
    assert float(given.mean()) == pytest.approx(1)


def test_balanced_domains_train_otherwise(
    incumbent: Model, specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    way, train = method("distill", "feedback"), {"epochs": 1, "batch_size": 8}
    sent = [way.contribute(s, incumbent, context) for s in specialists.values()]
    made = {
        name: way.absorb(incumbent, sent, tmp_path / name, context, train=train, **more).digest
        for name, more in {
            "plain": {}, "difficult": {"by_difficulty": 1.0}, "again": {"by_difficulty": 1.0},
            "given": {"weights": {next(iter(specialists)): 3.0}},
        }.items()
    }  # fmt: skip
    assert made["again"] == made["difficult"] != made["plain"] != made["given"]


def test_shares_say_how_often_rows_come(
    incumbent: Model, specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    way, train = method("multitask", "feedback"), {"epochs": 1, "batch_size": 1}
    sent = [way.contribute(s, incumbent, context) for s in specialists.values()]
    rows, first = [len(c.rows) for c in sent], sent[0].domain
    for share in (2.5, 0.25, 1e-9):
        made = way.absorb(incumbent, sent, tmp_path / str(share), context, train=train, shares={first: share})
        assert made.manifest["parameters"]["steps"] == max(1, round(share * rows[0])) + sum(rows[1:])
    with pytest.raises(UsageError, match="shares"):
        way.absorb(incumbent, sent, tmp_path / "none", context, shares={first: 0.0})
