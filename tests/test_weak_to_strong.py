"""Weak-to-strong: the student's own answers, as frequent as the teachers say; what is not believed teaches nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.feedback.predictions._panel import answered, heard, said
from fanbu.feedback.predictions.weak_to_strong import _believed
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.objectives import Confidence, confident
from fanbu.predict import class_logits
from fanbu.types import Context

WAY = method("weak_to_strong")


def state(prior: torch.Tensor, most: float = 0.5, ramp: float = 0.0) -> Confidence:
    return Confidence(most, ramp, prior[None].repeat(4, 1), [list(range(len(prior)))], [0] * 4)


def test_two_classes_are_cut_where_each_is_as_frequent_as_the_teachers_say() -> None:
    torch.manual_seed(0)
    found, z = state(torch.tensor([0.5, 0.5])), torch.randn(2000, 2)
    z[:, 0] += 1.0  # the student says 0 far too often
    rows = torch.zeros(2000, dtype=torch.long)
    for _ in range(200):
        labels = found.own_labels(z, rows)[0]
    assert (z.argmax(1) == 0).float().mean() > 0.7
    assert 0.42 < float((labels == 0).float().mean()) < 0.58
    sure = (z[:, 0] - z[:, 1]).abs() > 3
    assert torch.equal(labels[sure], z.argmax(1)[sure])


def test_a_surer_teacher_is_followed() -> None:
    targets = torch.tensor([[0.95, 0.05], [0.6, 0.4]]).repeat(20, 1)
    state, own = Confidence(1.0, 0.0, targets, [[0, 1]], [0] * 40), [0] * 40
    loss = confident([[1]] * 40, targets, torch.ones(40), own, 0, "cpu")
    z = torch.tensor([[0.0, 2.0]] * 2, requires_grad=True)  # sure by 0.88 of the second label
    student = nn.ModuleDict({"network": nn.Identity(), "confidence": state})
    student["network"].forward = lambda **_: SimpleNamespace(logits=z)
    loss(student, [0, 1]).backward()
    assert z.grad is not None
    assert float(z.grad[0, 0]) < 0 < float(z.grad[1, 0])  # towards the teacher's; towards its own
    state.most = 0.0
    z.grad = None
    loss(student, [0, 1]).backward()
    assert float(z.grad[0, 0]) < 0 > float(z.grad[1, 0])


def test_labels_of_other_domains_are_no_answer() -> None:
    targets = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    found = Confidence(0.5, 0.0, targets.repeat(20, 1), [[0, 1], [2, 3]], [0, 1] * 20)
    z = torch.tensor([[0.0, 1, 9, 0], [9, 0, 0, 1], [9, 0, 0, 1]])
    assert found.own_labels(z, torch.tensor([0, 1, -1]))[0].tolist() == [1, 3, 0]


def test_a_domain_without_texts_has_no_say() -> None:
    found = Confidence(0.5, 0.0, torch.tensor([[0.5, 0.5, 0, 0]]).repeat(20, 1), [[0, 1], [2, 3]], [0] * 20)
    assert bool(found.log_prior_l.isfinite().all())
    assert found.own_labels(torch.tensor([[0.0, 1, 9, 0]]), torch.tensor([0]))[0].tolist() == [1]


def test_own_answers_count_more_and_more() -> None:
    found = state(torch.tensor([0.5, 0.5]), 0.8, 4.0)
    assert [round(found.share(), 6) for _ in range(6)] == [0.2, 0.4, 0.6, 0.8, 0.8, 0.8]
    again = state(torch.tensor([0.5, 0.5]), 0.8, 4.0)
    again.load_state_dict(found.state_dict())
    assert int(again.seen) == 6  # a training that was stopped goes on where it was


def test_the_surest_answers_are_believed() -> None:
    targets = torch.tensor(
        [[0.9, 0.1, 0], [0.6, 0.4, 0], [0.8, 0.2, 0], [0.7, 0.3, 0], [0.0, 0.0, 1.0], [0.4, 0.3, 0.3]]
    )
    weights = _believed(targets, [[0, 1], [2]], [0, 0, 0, 0, 1, -1], 0.5)
    assert weights.tolist() == [1, 0, 1, 0, 1, 1]
    assert _believed(targets, [[0, 1], [2]], [0, 0, 0, 0, 1, -1], 1.0).tolist() == [1.0] * 6


def test_panels_are_the_teachers_own(incumbent: Model, specialists: dict[str, Specialist], context: Context) -> None:
    food = specialists["food"]
    sent = WAY.contribute(food, incumbent, context, mass=1.0)
    texts = [row.text for row in context.probe.rows if row.domain in {"food", None}]
    columns = [food.model.labels.index(label) for label in food.domain.full_labels]
    z = class_logits(load_network(food.model), load_tokenizer(food.model), texts, context)[:, columns]
    torch.testing.assert_close(
        heard(sent, len(texts), len(columns)), (z / sent.meta["temperature"]).softmax(1), rtol=0, atol=0.5 / 255 + 2e-3
    )


def test_confidence_decides_who_is_followed(
    incumbent: Model, specialists: dict[str, Specialist], domains: dict[str, Domain], context: Context, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("fanbu.feedback.predictions._doubts._look", lambda *_: None)  # else nobody is heard
    sent = []
    for s in specialists.values():  # teachers who say the next label, and are not sure of it
        panel = WAY.contribute(s, incumbent, context)
        heard_nl = answered(panel, incumbent, context).probs_nk.roll(1, 1)
        unsure = 0.15 * heard_nl + 0.85 / heard_nl.shape[1]
        sent.append(replace(panel, tensors=said(unsure, int(panel.meta["most"]), float(panel.meta["mass"]))))
    given: dict[str, Any] = {"keep": 1.0, "train": {"epochs": 24, "batch_size": 8, "lr": 1e-3}}

    def followed(confidence: float) -> float:
        made = WAY.absorb(incumbent, sent, tmp_path / str(confidence), context, confidence=confidence, **given)
        assert made.manifest["parameters"]["confidence"] == confidence
        shares = []
        for name, s in specialists.items():
            columns = [incumbent.labels.index(label) for label in s.domain.full_labels]
            before, after = (
                class_logits(load_network(m), load_tokenizer(m), domains[name].train.texts, context)[:, columns]
                for m in (incumbent, made)
            )
            shares.append(float((after.argmax(1) != before.argmax(1)).float().mean()))
        return sum(shares) / len(shares)

    assert followed(0.0) > followed(1.0) + 0.2


def test_causal_models_learn_too(llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path) -> None:
    base = open_model(llama)
    grown = method("finetune").shrink(base, texts["food"], tmp_path / "s", context, train={"epochs": 2, "lr": 3e-3})
    sent = [WAY.contribute(Specialist(grown, texts["food"], base), base, context)]
    assert sent[0].meta["trust"] == 1.0
    given: dict[str, Any] = {"train": {"epochs": 2, "lr": 3e-3}}
    made = WAY.absorb(base, sent, tmp_path / "m", context, **given)
    plain = WAY.absorb(base, sent, tmp_path / "n", context, confidence=0.0, **given)
    assert made.digest not in {base.digest, plain.digest}
