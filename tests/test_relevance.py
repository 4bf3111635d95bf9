"""Specialists answer for texts that lie near their own; of others the large model's answers stand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.errors import IntegrityError
from fanbu.feedback.predictions._doubts import _far
from fanbu.feedback.predictions._panel import answered
from fanbu.feedback.predictions._relevance import near
from fanbu.feedback.predictions._targets import union_targets
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import class_logits
from fanbu.record import _untaught
from fanbu.types import Context, ProbeRow, ProbeSet

WAY = method("distill", "feedback")


def test_near_is_as_near_as_the_domains_own_texts_are() -> None:
    torch.manual_seed(0)
    axis = torch.eye(8)
    train, valid, own, other = (axis[k] + 0.1 * torch.randn(400, 8) for k in (0, 0, 0, 1))
    assert 0.90 < float(near(train, valid, own).double().mean()) < 0.99
    assert not near(train, valid, other).any()
    assert near(train, valid, 7 * train).all()  # what it was trained on; lengths do not count
    for nothing in (near(train[:0], valid, other), near(train, valid[:0], other)):
        assert nothing.all()
    assert near(train, valid, other[:0]).tolist() == []


def test_texts_of_others_are_not_a_specialists_to_answer(
    incumbent: Model, specialists: dict[str, Specialist], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    food, own = specialists["food"], domains["food"].train.texts
    strange = [f"{word} " * times for word in ("qq", "late qq", "zone zone") for times in range(1, 6)]

    def asking(texts: list[str]) -> Context:
        return replace(context, probe=ProbeSet(tuple(ProbeRow(str(i), t, None) for i, t in enumerate(texts))))

    both = asking([*own, *strange])
    sent = WAY.contribute(food, incumbent, both)
    assert sent.meta["trust"] > 0
    assert _far(sent, both, 0) == round(len(strange) / len(both.probe.rows), 4)
    alone = answered(method("weak_to_strong").contribute(food, incumbent, both), incumbent, both).probs_nk
    mixed = answered(sent, incumbent, both).probs_nk
    columns = [incumbent.labels.index(label) for label in food.domain.full_labels]
    network, tokenizer = load_network(incumbent), load_tokenizer(incumbent)
    thought = class_logits(network, tokenizer, strange, context).softmax(1)
    assert not mixed[len(own) :].any()
    targets = union_targets(incumbent, network, tokenizer, [sent], both)[len(own) :].float()
    torch.testing.assert_close(targets, thought, rtol=0, atol=2e-3)
    would = alone[len(own) :] - thought[:, columns] / thought[:, columns].sum(1, keepdim=True)
    assert would.abs().max() > 0.1  # the specialist itself would have said otherwise
    assert (mixed[: len(own)] - alone[: len(own)]).abs().mean() < 0.1

    named = ProbeSet(tuple(replace(row, domain="food") for row in both.probe.rows))
    own_rows = replace(sent, meta={**sent.meta, "probe": named.digest})
    with pytest.raises(IntegrityError, match="own industry"):
        answered(own_rows, incumbent, replace(both, probe=named))

    silent = WAY.contribute(food, incumbent, asking(strange))
    assert (_far(silent, asking(strange), 0), silent.meta["trust"]) == (1.0, 0.0)
    assert WAY.absorb(incumbent, [silent], tmp_path / "same", asking(strange)).digest == incumbent.digest

    for bits in (sent.tensors["silent"][:-1], sent.tensors["silent"].int()):
        with pytest.raises(IntegrityError, match="silent"):
            answered(replace(sent, tensors={**sent.tensors, "silent": bits}), incumbent, both)


def test_the_record_says_that_texts_were_far() -> None:
    said = _untaught({"silent": ["a", "b", "c"], "far": {"b": 0.97, "c": 1.0}})
    assert [line[:2] for line in said] == ["a:", "b:", "b:", "c:"]
    assert all("adds nothing" in line for line in said[:2])
    assert "97%" in said[2]
