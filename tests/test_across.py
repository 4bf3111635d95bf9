"""Causal specialists with tokens of their own: what they expect is told in the base's tokens, where both end one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from conftest import TOPICS, make_llama, open_gate, rows, tiny_recipe
from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.errors import UsageError
from fanbu.feedback.predictions._across import Cut, characters, cut, projection, tokens_across
from fanbu.feedback.predictions._targets import token_targets
from fanbu.generations import run
from fanbu.merging.tokens import rows_of, vocabulary_of
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import token_losses, top_tokens
from fanbu.recipe import load_recipe
from fanbu.types import Context
from test_vocabulary_merge import bpe, corpus, llama_of, unigram


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return llama_of(tmp_path_factory.mktemp("base") / "m", bpe(corpus(0), 400))


@pytest.fixture(scope="module", params=["bytes", "metaspace", "unigram"])
def other(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    made = {
        "bytes": lambda: bpe(corpus(1), 330), "metaspace": lambda: bpe(corpus(0), 300, metaspace=True),
        "unigram": lambda: unigram(corpus(0), 200),
    }  # fmt: skip
    return llama_of(tmp_path_factory.mktemp("other") / "m", made[request.param](), seed=1)


TEXTS = [t[:60] for t in corpus(0)[:6]]


def told(
    specialist: Model, base: Model, context: Context, k: int
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], Cut, Cut]:
    theirs = cut(load_network(base), load_tokenizer(base), TEXTS, context)
    network, tokenizer = load_network(specialist), load_tokenizer(specialist)
    first = projection(specialist, base)
    answers = tokens_across(network, tokenizer, theirs, first, rows_of(base), TEXTS, context, k)
    return answers, theirs, cut(network, tokenizer, TEXTS, context)


def test_with_the_same_tokens_nothing_changes(base: Model, context: Context) -> None:
    assert projection(base, base).tolist() == list(range(rows_of(base)))
    answers, _, _ = told(base, base, context, 400)
    known = top_tokens(load_network(base), load_tokenizer(base), TEXTS, context, 400)
    for (indices, probs), (expected, likely) in zip(answers, known, strict=True):
        dense, other = (
            torch.zeros(len(p), 400).scatter_(1, i.long(), p.float()) for i, p in ((indices, probs), (expected, likely))
        )
        torch.testing.assert_close(dense, other, rtol=1e-2, atol=1e-4)


def test_a_token_goes_to_what_begins_its_text(base: Model, other: Model) -> None:
    first, own, theirs = projection(other, base), vocabulary_of(base), vocabulary_of(other)
    assert (first >= 0).float().mean() > 0.9
    assert int(first[theirs.ids["<eos>"]]) == own.ids["<eos>"]
    texts = {i: load_tokenizer(other).decode([i]).strip() for i in theirs.tokens}
    for number, text in texts.items():
        to = int(first[number])
        if to >= 0 and len(text) > 2 and text.isalpha():
            assert text.startswith(load_tokenizer(base).decode([to]).strip())


def test_the_true_token_gets_what_its_span_is_worth(base: Model, other: Model, context: Context) -> None:
    answers, theirs, own = told(other, base, context, rows_of(base))
    losses = token_losses(load_network(other), load_tokenizer(other), TEXTS, context)
    said = 0
    for text, (indices, probs) in enumerate(answers):
        dense = torch.zeros(len(probs), rows_of(base)).scatter_(1, indices.long(), probs.float())
        assert float(dense.sum(1).max()) <= 1.01
        common = set(own.boundaries(text)) & set(theirs.boundaries(text))
        silent = [
            end not in common or theirs.boundaries(text)[end] != i for i, end in enumerate(theirs.ends[text][:-1])
        ]
        assert ((dense.sum(1) == 0) | ~torch.tensor(silent)).all()
        # between two boundaries that both have, the base's tokens are worth as much as the specialist's
        for i in range(len(dense)):
            end, after = theirs.ends[text][i], theirs.ends[text][i + 1]
            if {end, after} <= common and not silent[i] and theirs.boundaries(text)[after] == i + 1:
                j, until = own.boundaries(text)[end], own.boundaries(text)[after]
                z = load_network(other)(torch.tensor([own.ids[text]])).logits[0].log_softmax(-1)
                worth = sum(float(z[n, own.ids[text][n + 1]].detach()) for n in range(j, until))
                assert float(dense[i, theirs.ids[text][i + 1]]) >= 0.99 * torch.tensor(worth).exp() - 1e-4
                said += 1
    assert said > 5
    assert losses[:, 0].isfinite().all()


def test_characters_are_those_after_the_first_token() -> None:
    assert characters(Cut([[1, 2, 3], []], [[2, 5, 9], []])).tolist() == [7.0, 0.0]


def test_a_specialist_with_other_tokens_teaches(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    base, food = open_model(llama), texts["food"]
    stranger = llama_of(tmp_path / "stranger", bpe(list(food.train.texts), 300), width=32)
    grown = method("finetune").shrink(
        stranger, food, tmp_path / "s", context, train={"epochs": 20, "lr": 5e-3, "batch_size": 8}
    )
    way = method("distill", "feedback")
    sent = way.contribute(Specialist(grown, food, stranger), base, context)
    assert sent.meta["trust"] == 1.0
    network, tokenizer = load_network(base), load_tokenizer(base)
    sequences = [tokenizer(row.text)["input_ids"][:16] for row in context.probe.rows]
    targets = token_targets(network, tokenizer, sequences, [sent], context, 64)
    assert all(bool((p.float().sum(1) > 0).all()) for _, p in targets)  # where it says nothing, the base answers
    made = way.absorb(base, [sent], tmp_path / "m", context, train={"epochs": 6, "lr": 3e-3, "batch_size": 8})
    before, after = (
        token_losses(load_network(m), load_tokenizer(m), food.test.texts, context)[:, 0].sum() for m in (base, made)
    )
    assert after < before


def test_the_large_model_writes_and_its_specialists_answer(tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path)
    make_llama(tmp_path / "llama")
    value.update(model=str(tmp_path / "llama"), references=[], probe={"written": 5, "limit": 12})
    value["domains"] = {n: {**spec, "task": "causal-lm"} for n, spec in value["domains"].items()}
    with open_gate():
        record = run(load_recipe(value))
    (stage,) = (p for p in (tmp_path / "ws" / "stages").iterdir() if p.name.startswith("written"))
    made = json.loads((stage / "texts.json").read_text())
    assert 5 < len(made) <= 10
    given = [row["text"] for name in TOPICS for row in rows(name, 144, 0)]
    begun = [t for t in given if any(w.startswith(t[: len(t) // 4]) for w in made)]
    assert len(begun) >= 5  # they begin as the domains' texts do, and go on otherwise
    assert not set(made) & set(given)
    assert record["domains"]["food"]["crossed"]
    (tmp_path / "other").mkdir()
    with pytest.raises(UsageError, match="a classifier writes no texts"):
        run(load_recipe({**tiny_recipe(tmp_path / "other"), "probe": {"written": 5}}))
