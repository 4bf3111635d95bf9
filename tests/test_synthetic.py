"""Synthetic texts: none is an owner's, no word and no pair of them tells of few rows; the boundary looks for itself."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fanbu.boundary import cross, refusal
from fanbu.contribution import Contribution, open_contribution
from fanbu.data.synthetic import LEAST, Corpus, synthetic
from fanbu.domain import Domain, Rows
from fanbu.errors import BoundaryError, DataError
from fanbu.probe_set import synthetic_texts
from fanbu.recipe_parts import ProbeSpec
from fanbu.types import PRESETS, Share

WORDS = ("my card was lost", "my card was stolen", "my new card is lost", "a new card was sent", "my pin is lost")
TEXTS = [f"{a} {b}" for a in WORDS for b in ("today", "and i need help", "in the shop", "again today")]
SECRET = "call Eve on 555"


def test_no_text_is_an_owners_and_nothing_in_it_is_rare() -> None:
    own = [*TEXTS, f"my card was lost {SECRET}", "is card my"]
    made = synthetic(own, 40, 0)
    assert len(made) == len(set(made)) > 10
    assert not set(made) & set(own)
    words, pairs = Counter[str](), Counter[Any]()
    for text in own:
        words.update(set(text.split()))
        pairs.update(set(pairwise(["<", *text.split(), ">"])))
    assert min(words[word] for text in made for word in text.split()) >= LEAST
    assert not {1, 2} & {pairs[pair] for text in made for pair in pairwise(["<", *text.split(), ">"])}
    assert not any("Eve" in text or "is card" in text for text in made)
    spread = Corpus([text.replace(" ", "  ") for text in own])
    assert not any(spread.hides(text) for text in own)  # white space makes no other text
    assert not Corpus(own).hides("my card is card")
    assert not Corpus(own).hides("my card was 555")
    assert Corpus(own).hides("help shop card was lost")  # nobody says so


def test_no_run_of_three_is_one_texts_own() -> None:
    single = "alice owes bob nine thousand euros today"
    pairs = [f"{a} {b} {i} x" for a, b in pairwise(single.split()) for i in range(3)]
    own = [single, *pairs, *(f"{w} {i} x" for i in range(4) for w in single.split())]
    triples = set(zip(*(single.split()[i:] for i in range(3)), strict=False))
    walks = {w for text in synthetic(own, 200, 0) for w in zip(*(text.split()[i:] for i in range(3)), strict=False)}
    assert walks
    assert not walks & triples
    assert not Corpus(own).hides("alice owes bob")


def test_with_labels_a_text_keeps_to_one_of_them() -> None:
    food = [f"{a} {b} soup" for a in ("warm", "more", "some") for b in ("leek", "broth", "pea", "bean")]
    rail = [f"{a} {b} train" for a in ("late", "next", "last") for b in ("east", "west", "north", "south")]
    made = synthetic([*food, *rail], 30, 0, labels=[0] * 12 + [1] * 12)
    of = [{w for t in texts for w in t.split()} for texts in (food, rail)]
    assert all(sum(set(text.split()) <= words for words in of) == 1 for text in made)
    assert {next(k for k, words in enumerate(of) if set(text.split()) <= words) for text in made} == {0, 1}


def test_the_same_seed_gives_the_same_texts() -> None:
    assert synthetic(TEXTS, 20, 1) == synthetic(TEXTS[::-1], 20, 1)
    assert synthetic(TEXTS, 20, 1) != synthetic(TEXTS, 20, 2)


def test_texts_without_spaces_are_made_of_characters() -> None:
    own = [f"{a}{b}" for a in ("我要订", "请帮我订", "我想找") for b in ("酒店", "酒店房间", "便宜的酒店", "好的酒店")]
    made = synthetic(own, 10, 0)
    assert made
    assert not any(" " in text for text in made)
    assert not set(made) & set(own)


def test_texts_that_share_nothing_give_none() -> None:
    with pytest.raises(DataError) as caught:
        synthetic([f"word{i} other{i}" for i in range(50)], 5, 0)
    assert caught.value.code == "nothing-in-common"
    assert synthetic(TEXTS, 0, 0) == []


def test_the_boundary_looks_for_itself(tmp_path: Path) -> None:
    made = synthetic(TEXTS, 10, 0)
    sent = Contribution("samples", "d", "test", rows=[{"text": text} for text in made])
    internal = PRESETS["internal"]
    cross(sent, internal, tmp_path / "sent", TEXTS)
    assert [r["text"] for r in open_contribution(tmp_path / "sent").rows] == made
    for texts in ([*made, TEXTS[0]], [*made, f"my card {SECRET}"]):
        bare = Contribution("samples", "d", "test", rows=[{"text": text} for text in texts])
        with pytest.raises(BoundaryError, match="1 of 11 texts are not synthetic"):
            cross(bare, internal, tmp_path / "not", TEXTS)
    assert refusal(sent, internal) == "texts stay with their owner"  # nobody knows what they were made of
    assert refusal(sent, Share(texts=False, synthetic=False), TEXTS) == "texts stay with their owner"
    labelled = Contribution("samples", "d", "test", rows=[{"text": made[0], "label": "a"}])
    assert refusal(labelled, internal, TEXTS) == "labels stay with their owner"


def test_a_domain_that_keeps_its_texts_gives_synthetic_ones(domains: dict[str, Domain], tmp_path: Path) -> None:
    rows = Rows(tuple(map(str, range(len(TEXTS)))), tuple(TEXTS))
    food = replace(domains["food"], train=rows, unlabelled=Rows())
    sent = cross(synthetic_texts(food, 8, 0), PRESETS["internal"], tmp_path / "sent", food.every_text)
    assert {r["domain"] for r in sent.rows} == {"food"}
    texts = [r["text"] for r in sent.rows]
    assert not set(texts) & set(food.texts)
    held = replace(food, valid=Rows(("v",), (texts[0],)))  # what is held out is the owner's too
    assert texts[0] not in {r["text"] for r in synthetic_texts(held, 8, 0).rows}
    with pytest.raises(BoundaryError, match="of 8 texts"):
        cross(sent, PRESETS["internal"], tmp_path / "held", held.every_text)


def test_what_a_domain_gives() -> None:
    both, own = ProbeSpec(synthetic=5), ProbeSpec()
    internal, private = PRESETS["internal"], PRESETS["private"]
    assert [both.from_domain(s) for s in (PRESETS["open"], internal, private)] == ["own", "synthetic", None]
    assert [own.from_domain(s) for s in (PRESETS["open"], internal)] == ["own", None]
    assert ProbeSpec(domains=False, synthetic=5).from_domain(PRESETS["open"]) == "synthetic"
