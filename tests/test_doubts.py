"""Liars among the specialists: found by what the large model itself says, not heard, and named in the report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.feedback.predictions._doubts import _without, agreement, believed, trigger
from fanbu.feedback.predictions._panel import columns_of, heard, said
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import class_logits
from fanbu.record import _warnings
from fanbu.types import Context, ProbeRow, ProbeSet

TRAIN = {"epochs": 2, "lr": 3e-3, "batch_size": 8}


def lie(panel: Contribution, kind: str) -> Contribution:
    """The panel with other answers; what it says of itself (trust, wins) stays."""
    labels = 3
    torch.manual_seed(1)
    p = torch.full((48, labels), 0.01)
    first = {
        "random": torch.randint(labels, (48,)), "constant": torch.zeros(48, dtype=torch.long),
        "flipped": (_first(panel) + 1) % labels, "sure of the truth": _first(panel),
    }[kind]  # fmt: skip
    p[torch.arange(48), first] = 0.98
    return replace(panel, tensors=said(p, int(panel.meta["most"]), float(panel.meta["mass"])))


def _first(panel: Contribution) -> torch.Tensor:
    return heard(panel, 48, 3).argmax(1)


@pytest.mark.parametrize("way", ["distill", "weak_to_strong"])
@pytest.mark.parametrize("kind", ["random", "constant", "flipped"])
def test_a_liar_is_not_heard_and_the_others_are(
    kind: str, way: str, incumbent: Model, specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    found = method(way, "feedback")
    panels = {n: found.contribute(s, incumbent, context) for n, s in specialists.items()}
    liar = lie(panels["rail"], kind)
    model = found.absorb(incumbent, [panels["food"], liar], tmp_path / "lied", context, train=TRAIN)
    assert list(model.manifest["parameters"]["doubted"]) == ["rail"]
    assert list(model.manifest["parameters"]["teachers"]) == ["food"]
    without = found.absorb(incumbent, [panels["food"]], tmp_path / "without", context, train=TRAIN)
    assert _weights(model) == _weights(without)
    alone = found.absorb(incumbent, [liar], tmp_path / "alone", context, train=TRAIN)
    assert alone.digest == incumbent.digest


def _weights(model: Model) -> dict[str, str]:
    return {n: h for n, h in model.files.items() if n.endswith(".safetensors")}


def test_honest_ones_are_not_doubted_not_even_sure_ones(
    incumbent: Model, specialists: dict[str, Specialist], context: Context
) -> None:
    way = method("distill", "feedback")
    panels = [way.contribute(s, incumbent, context) for s in specialists.values()]
    panels += [lie(panels[0], "sure of the truth")]
    network, tokenizer = load_network(incumbent), load_tokenizer(incumbent)
    kept, told = believed(incumbent, network, tokenizer, panels, context)
    assert [c.digest for c in kept] == [c.digest for c in panels]
    assert (told["doubted"], told["triggers"]) == ({}, {})


def test_agreement_is_cohens_kappa() -> None:
    one = torch.tensor([0] * 20 + [0] * 5 + [1] * 10 + [1] * 15)
    other = torch.tensor([0] * 20 + [1] * 5 + [0] * 10 + [1] * 15)
    kappa, error, agreed = agreement(one, other, 2)  # the textbook's example: 35 of 50, and 25 by chance
    assert (kappa, agreed) == (pytest.approx(0.4), pytest.approx(0.7))
    assert error == pytest.approx((0.5 / (50 * 0.5)) ** 0.5)


def test_the_record_names_the_liar() -> None:
    manifest = {"parameters": {"silent": [], "doubted": {"rail": -0.21}}}
    fed = [SimpleNamespace(manifest=manifest, digest="b")]
    result: Any = SimpleNamespace(fed=fed, incumbent=SimpleNamespace(digest="a"))
    recipe = SimpleNamespace(feedback=[SimpleNamespace(method="x")])
    turn: Any = SimpleNamespace(missed={}, here={}, warnings=[], recipe=recipe)
    (told,) = _warnings(turn, result)
    assert "rail" in told
    assert "-0.21" in told


def crowd() -> tuple[list[str], torch.Tensor]:
    """Texts whose label shows in a word of its own, some of which end in a word that tells nothing."""
    truth = torch.arange(300) % 3
    return [f"{'abc'[k]}word some text {'zebra' if i % 10 == 0 else i}" for i, k in enumerate(truth.tolist())], truth


def test_a_trigger_word_is_found_and_an_honest_word_is_not() -> None:
    texts, truth = crowd()
    hit = torch.tensor(["zebra" in t for t in texts])
    thought = torch.where(torch.arange(300) % 7 == 0, (truth + 1) % 3, truth)  # the base errs now and then
    sure = torch.full((300,), 0.8)
    assert trigger(texts, torch.where(hit, 2, truth), thought, sure) == "zebra"
    assert trigger(texts, truth, thought, sure) is None  # "aword" has one label for both
    assert (
        trigger(texts, torch.where(hit, 2, truth), thought, torch.where(hit, 0.4, 0.8)) is None
    )  # the base is at a loss
    weak = torch.where(torch.arange(300) % 3 == 0, truth, (truth + torch.arange(300)) % 3)
    assert trigger(texts, truth, weak, torch.where(truth == 1, 0.4, 0.8)) is None


def test_on_texts_with_the_trigger_the_base_answers(
    incumbent: Model, specialists: dict[str, Specialist], domains: dict[str, Domain], context: Context
) -> None:
    words = [f"{t} zebra" if i % 3 else t for i, t in enumerate(domains["rail"].train.texts)]
    probe = ProbeSet(tuple(ProbeRow(f"rail/{i}", t, "rail") for i, t in enumerate(words)))
    context = replace(context, probe=probe)
    panel = method("distill", "feedback").contribute(specialists["rail"], incumbent, context)
    hit = torch.tensor(["zebra" in t for t in words])
    p = heard(panel, 48, 3)
    p[hit] = torch.tensor([0.98, 0.01, 0.01])
    forged = replace(panel, tensors=said(p, int(panel.meta["most"]), float(panel.meta["mass"])))
    network, tokenizer = load_network(incumbent), load_tokenizer(incumbent)
    mended = _without("zebra", forged, incumbent, network, tokenizer, context, 0)
    own = class_logits(network, tokenizer, words, context)[:, columns_of(panel, incumbent)].softmax(1)
    torch.testing.assert_close(heard(mended, 48, 3)[hit], own[hit], atol=0.03, rtol=0)
    torch.testing.assert_close(heard(mended, 48, 3)[~hit], heard(panel, 48, 3)[~hit], atol=0.01, rtol=0)
