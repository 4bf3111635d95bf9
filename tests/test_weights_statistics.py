"""RegMean and Fisher: sums cross, no text does, and the centre solves what the papers say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fanbu.batches import collate, encode, pad_id
from fanbu.boundary import refusal
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.merging.gram import damped, grams, linear_layers, own_texts
from fanbu.merging.least_squares import FISHER, GRAM, MOMENT, solve
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.tensors import Tensors
from fanbu.types import PRESETS, Context

QUERY = "bert.encoder.layer.0.attention.self.query.weight"
SUM_FIELDS = {"regmean": (GRAM, MOMENT), "fisher": (FISHER, MOMENT)}


def inputs_of(network: Any, tokenizer: Any, texts: list[str], name: str) -> Tensor:
    """What a layer sees, one text at a time, so that nothing is padded."""
    seen: list[Tensor] = []
    layer = linear_layers(network)[name]
    handle = layer.register_forward_pre_hook(lambda _, x: seen.append(x[0].reshape(-1, x[0].shape[-1])))
    with torch.inference_mode():
        for sequence in encode(tokenizer, texts, 16):
            network(**collate([sequence], pad_id(tokenizer)))
    handle.remove()
    return torch.cat(seen)


def test_grams_see_every_token_once(specialists: dict[str, Specialist], context: Context) -> None:
    model = specialists["food"].model
    network, tokenizer = load_network(model), load_tokenizer(model)
    texts = ["soup", "some more bread for the apple pear", "a"] * 15
    names = [n for n in linear_layers(network) if "classifier" not in n]
    found, leaders = grams(network, tokenizer, texts, names, context)
    key, value = (QUERY.replace("query", part) for part in ("key", "value"))
    assert leaders[key] == leaders[value] == leaders[QUERY]  # one matrix for all three
    assert set(leaders) == set(names)
    for name in (leaders[QUERY], "bert.encoder.layer.1.output.dense.weight"):
        x = inputs_of(network, tokenizer, texts, name).double()
        torch.testing.assert_close(found[name].double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_the_solution_is_that_of_least_squares() -> None:
    torch.manual_seed(0)
    xs = [torch.randn(50, 12).double() @ torch.randn(12, 12).double() for _ in range(3)]
    deltas = [torch.randn(7, 12).double() for _ in range(3)]
    gram = sum(x.T @ x for x in xs)
    moment = sum(d @ (x.T @ x) for x, d in zip(xs, deltas, strict=True))
    targets = torch.cat([x @ d.T for x, d in zip(xs, deltas, strict=True)])
    expected = torch.linalg.lstsq(torch.cat(xs), targets).solution.T
    assert isinstance(gram, Tensor)
    assert isinstance(moment, Tensor)
    torch.testing.assert_close(solve(gram, moment, 0.0).double(), expected, rtol=1e-4, atol=1e-5)
    # inputs that nobody ever saw leave the base as it is
    gram[:, 3], gram[3, :], moment[:, 3] = 0, 0, 0
    assert solve(gram, moment, 1e-6)[:, 3].abs().max() < 1e-6


def test_damping_is_linear_and_keeps_the_diagonal() -> None:
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    torch.testing.assert_close(damped(a, 0.9) + damped(b, 0.9), damped(a + b, 0.9))
    assert torch.equal(damped(a, 0.5).diagonal(), a.diagonal())
    assert float(damped(a, 0.5)[0, 1]) == pytest.approx(float(a[0, 1]) / 2)


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_only_sums_cross(
    name: str, specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    """Who has the sum of two contributions has all that the centre needs."""
    way = method(name)
    sent = [way.contribute(s, incumbent, context, rows=12) for s in specialists.values()]
    assert way.code.LINEAR
    for c in sent:
        assert c.rows == ()
        assert refusal(c, PRESETS["internal"]) is None
        longest = max(len(text) for text in specialists[c.domain].domain.train.texts)
        assert longest > 20
        assert not any(text in str(c.meta) for text in specialists[c.domain].domain.train.texts)
    made = Tensors(way.absorb(incumbent, sent, tmp_path / "two", context).path)
    fields = SUM_FIELDS[name]
    total = {n: sum(c.tensors[n] for c in sent) for n in sent[0].tensors if n.startswith(fields)}
    old = Tensors(incumbent.path)
    if name == "regmean":
        gram = total[GRAM + sent[0].meta["leaders"][QUERY]]
        expected = old[QUERY] + solve(gram, total[MOMENT + QUERY], 1e-6)
    else:
        floor = 1e-3
        plain = sum(c.tensors[QUERY] for c in sent)
        expected = old[QUERY] + (total[MOMENT + QUERY] + floor * plain) / (total[FISHER + QUERY] + 2 * floor)
    torch.testing.assert_close(made[QUERY], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_one_contribution_is_the_specialist(
    name: str, specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    way, own = method(name), specialists["food"].model
    plain = {"rows": 48, **({"shrink": 0.5} if name == "regmean" else {})}
    sent = way.contribute(specialists["food"], incumbent, context, **plain)
    made = Tensors(way.absorb(incumbent, [sent], tmp_path / "one", context).path)
    for tensor in (n for n in Tensors(own.path) if "classifier" not in n):
        torch.testing.assert_close(made[tensor], Tensors(own.path)[tensor], rtol=1e-3, atol=1e-4)


def test_fisher_is_squared_example_by_example(
    specialists: dict[str, Specialist], incumbent: Model, context: Context
) -> None:
    specialist = specialists["food"]
    sent = method("fisher").contribute(specialist, incumbent, context, rows=6)
    network, tokenizer = load_network(specialist.model), load_tokenizer(specialist.model)
    generator = torch.Generator().manual_seed(context.seeded("fisher"))
    total = torch.zeros_like(network.get_parameter(QUERY))
    texts = own_texts(specialist.domain, 6)
    for sequence in encode(tokenizer, texts, 16):
        network.zero_grad()
        logits = network(**collate([sequence], pad_id(tokenizer))).logits
        drawn = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[0]
        (-logits.log_softmax(1)[0, drawn]).sum().backward()
        total += network.get_parameter(QUERY).grad.square()
    found = sent.tensors[FISHER + QUERY]
    ratio = found / (total / len(texts)).clamp(min=1e-30)
    torch.testing.assert_close(ratio[found > 0], ratio[found > 0].median().expand_as(ratio[found > 0]))
    everything = [sent.tensors[n] for n in sent.tensors if n.startswith(FISHER)]
    mean = sum(float(t.sum()) for t in everything) / sum(t.numel() for t in everything)
    assert mean == pytest.approx(1.0, rel=1e-3)


def test_owners_look_at_their_own_texts(domains: dict[str, Domain]) -> None:
    d = domains["food"]
    assert len(d.train.texts) == 48
    assert own_texts(d, 5) == list(d.train.texts[::10])
    unlabelled = replace(d, unlabelled=replace(d.train, texts=("a", "b"), ids=("1", "2"), labels=None))
    assert own_texts(unlabelled, 5) == ["a", "b"]


def test_other_texts_make_other_statistics(
    specialists: dict[str, Specialist], incumbent: Model, context: Context
) -> None:
    specialist = specialists["food"]
    other = replace(specialist, domain=replace(specialist.domain, train=specialists["rail"].domain.train))
    one, two = (method("regmean").contribute(s, incumbent, context, rows=9) for s in (specialist, other))
    assert isinstance(one, Contribution)
    assert one.digest != two.digest
