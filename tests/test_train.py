"""Losses, schedules and targets against plain computations."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from threadpoolctl import threadpool_info
from torch.nn import functional

from fanbu.batches import collate, shuffled_batches, sorted_batches
from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.errors import UsageError
from fanbu.feedback.predictions._panel import heard
from fanbu.feedback.predictions._targets import union_targets
from fanbu.feedback.predictions._trust import fit_share, fit_temperature, fit_trust
from fanbu.heads import domains_of
from fanbu.losses import next_token_loss, soft_cross_entropy, top_k_divergence
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import class_logits, token_losses, top_tokens
from fanbu.shrink.depth import influence, layers_of
from fanbu.train import schedule, set_up
from fanbu.types import Context, ProbeRow, ProbeSet, Train


def test_union_cross_entropy_is_domains_plus_labels_within() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5), torch.tensor([0, 1, 2, 3, 4, 0])
    rows = [[0, 1, 2], [3, 4]]
    domain = torch.tensor([0 if label < 3 else 1 for label in labels])
    over = torch.stack([logits[:, r].logsumexp(1) for r in rows], 1)
    within = sum(-logits[i, rows[domain[i]]].log_softmax(0)[rows[domain[i]].index(int(labels[i]))] for i in range(6))
    expected = functional.cross_entropy(over, domain) + within / 6
    torch.testing.assert_close(functional.cross_entropy(logits, labels), expected)


def test_soft_cross_entropy_is_kl() -> None:
    z, t = torch.randn(4, 3), torch.randn(4, 3).softmax(1)
    expected = (t * (t.log() - z.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(soft_cross_entropy(z, t), expected)
    assert soft_cross_entropy(t.log(), t).abs() < 1e-6


def test_top_k_divergence_with_all_tokens_is_kl_and_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    z, p = torch.randn(10, 7), torch.randn(10, 7).softmax(1)
    probs, indices = p.topk(7)
    expected = (p * (p.log() - z.log_softmax(1))).sum(1).mean()
    torch.testing.assert_close(top_k_divergence(z, indices, probs), expected, rtol=1e-3, atol=1e-4)
    probs, indices = p.topk(3)
    whole = top_k_divergence(z, indices, probs)
    monkeypatch.setattr("fanbu.losses._CHUNK", 4)
    torch.testing.assert_close(top_k_divergence(z, indices, probs), whole)
    assert top_k_divergence(p.log(), indices, probs).abs() < 1e-5


def test_next_token_loss_leaves_padding_out() -> None:
    z, ids, mask = (
        torch.randn(2, 4, 9),
        torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0]]),
        torch.tensor([[1] * 4, [1, 1, 0, 0]]),
    )
    expected = -torch.stack(
        [z[0, i].log_softmax(0)[ids[0, i + 1]] for i in range(3)] + [z[1, 0].log_softmax(0)[ids[1, 1]]]
    ).mean()
    torch.testing.assert_close(next_token_loss(z, ids, mask), expected)


@pytest.mark.parametrize("name", ["cosine", "linear", "cyclic", "constant"])
def test_schedules(name: str) -> None:
    plan = Train(schedule=name, warmup=0.1)  # type: ignore[arg-type]
    values = [schedule(plan, i / 100) for i in range(100)]
    assert 0 < values[0] < 0.05
    assert max(values) <= 1.0
    assert values[10] == pytest.approx(1.0, abs=0.01)
    ends = {"cosine": 0.0, "linear": 0.0, "cyclic": 0.0, "constant": 1.0}
    assert values[-1] == pytest.approx(ends[name], abs=0.02)


def test_batches_hold_each_row_once_and_follow_the_seed() -> None:
    lengths = [i % 7 + 1 for i in range(103)]
    for batches in (shuffled_batches(lengths, 8, 1, 0), sorted_batches(lengths, 8)):
        assert sorted(i for b in batches for i in b) == list(range(103))
    assert shuffled_batches(lengths, 8, 1, 0) == shuffled_batches(lengths, 8, 1, 0)
    assert shuffled_batches(lengths, 8, 1, 0) != shuffled_batches(lengths, 8, 1, 1)
    # rows of like length lie together
    assert all(max(lengths[i] for i in b) - min(lengths[i] for i in b) <= 2 for b in shuffled_batches(lengths, 8, 1, 0))
    batch = collate([[1, 2, 3], [4]], pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


def test_unknown_optimizer_is_named(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"AdamW.*got: Adamw"):
        method("finetune").shrink(incumbent, domains["food"], tmp_path / "m", context, train={"optimizer": "Adamw"})


def test_temperature_undoes_overconfidence() -> None:
    torch.manual_seed(0)
    z = torch.randn(4000, 5)
    target = torch.distributions.Categorical(logits=z).sample()
    assert fit_temperature(3 * z, target) == pytest.approx(3, rel=0.1)


def test_token_losses_and_top_tokens_match_plain_transformers(
    llama: Path, texts: dict[str, Domain], context: Context
) -> None:
    model = open_model(llama)
    network, tokenizer = load_network(model), load_tokenizer(model)
    some = list(texts["food"].test.texts[:5])
    sums = token_losses(network, tokenizer, some, context)
    for text, (total, count) in zip(some, sums.tolist(), strict=True):
        ids = tokenizer(text, truncation=True, max_length=16, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            expected = network(input_ids=ids, labels=ids).loss
        assert total / count == pytest.approx(float(expected), rel=1e-4)
    indices, probs = top_tokens(network, tokenizer, some, context, 4)[0]
    assert indices.shape == probs.shape
    assert indices.shape[1] == 4


def test_targets_are_the_teachers_where_they_teach_and_the_base_elsewhere(
    incumbent: Model, specialists: dict[str, Specialist], domains: dict[str, Domain], context: Context
) -> None:
    from dataclasses import replace

    rows = tuple(
        ProbeRow(str(i), text, where)
        for i, (text, where) in enumerate(
            [
                (domains["food"].train.texts[0], "food"),
                (domains["rail"].train.texts[0], "rail"),
                (domains["food"].train.texts[1], None),
            ]
        )
    )
    small = replace(context, probe=ProbeSet(rows))
    way = method("distill", "feedback")
    panel = way.contribute(specialists["food"], incumbent, small)
    told = heard(panel, 2, 3)  # asked about its own row and nobody's
    network, tokenizer = load_network(incumbent), load_tokenizer(incumbent)
    targets = union_targets(incumbent, network, tokenizer, [panel], small).float()
    base = class_logits(network, tokenizer, small.probe.texts, small)
    groups = domains_of(incumbent.labels)
    torch.testing.assert_close(targets.sum(1), torch.ones(3), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(targets[0, groups["food"]], told[0], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(targets[1, groups["rail"]], base[1, groups["rail"]].softmax(0), rtol=1e-2, atol=1e-3)
    share = base[2].softmax(0)[groups["food"]].sum()
    torch.testing.assert_close(targets[2, groups["food"]], share * told[1], rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(targets[2, groups["rail"]], base[2].softmax(0)[groups["rail"]], rtol=1e-2, atol=1e-3)


def test_a_specialist_that_is_no_better_teaches_nothing(
    incumbent: Model, specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    from dataclasses import replace

    way = method("distill", "feedback")
    sent = [way.contribute(s, incumbent, context) for s in specialists.values()]
    mute = replace(sent[0], meta={**sent[0].meta, "trust": 0.0})
    made = way.absorb(incumbent, [mute, sent[1]], tmp_path / "m", context, train={"epochs": 1})
    assert made.manifest["parameters"]["silent"] == [mute.domain]
    assert made.manifest["parameters"]["teachers"] == {sent[1].domain: sent[1].meta["trust"]}


def test_trust_is_what_validation_rows_say() -> None:
    target = torch.tensor([0, 0, 1, 1])
    good, bad = torch.tensor([[0.9, 0.1]] * 2 + [[0.1, 0.9]] * 2), torch.tensor([[0.4, 0.6]] * 2 + [[0.6, 0.4]] * 2)
    assert fit_share(good, bad, target) == 1.0
    assert fit_share(bad, good, target) == 0.0
    assert fit_share(good, good, target) == 0.0  # nothing new
    # each is sure and right on one half, and wrong on the other: together they are better than either
    one = torch.tensor([[0.9, 0.1]] * 2 + [[0.9, 0.1]] * 2)
    two = torch.tensor([[0.1, 0.9]] * 2 + [[0.1, 0.9]] * 2)
    assert fit_share(one, two, target) == 0.5


def test_trust_goes_by_how_sure_either_is() -> None:
    torch.manual_seed(0)
    target = torch.randint(4, (400,))
    truth = torch.nn.functional.one_hot(target, 4).float()
    sure = torch.arange(400) % 2 == 0  # the specialist: of these it is sure, and right; of others it knows less
    own = torch.where(sure[:, None], 0.96 * truth + 0.01, 0.32 * truth + 0.17)
    base = 0.6 * truth + 0.1
    trust = fit_trust(own, base, target)
    w = trust.of(own, base)
    assert w[sure].min() > 0.8
    assert w[~sure].max() < 0.35
    mixed = (w[:, None] * own + (1 - w[:, None]) * base)[torch.arange(400), target]
    flat = (trust.share * own + (1 - trust.share) * base)[torch.arange(400), target]
    assert mixed.log().mean() > flat.log().mean() + 0.03
    assert fit_trust(base, base, target).of(own, base).tolist() == [0.0] * 400
    few = fit_trust(own[:6], base[:6], target[:6])  # few rows say little: all near the one share
    assert max(abs(c) for c in few.coefficients[1:]) < max(abs(c) for c in trust.coefficients[1:])


def test_a_panel_mixes_specialist_and_base_by_trust(
    incumbent: Model, specialists: dict[str, Specialist], context: Context
) -> None:
    panel = method("distill", "feedback").contribute(specialists["food"], incumbent, context, mass=1.0)
    food = specialists["food"]
    texts = [row.text for row in context.probe.rows if row.domain in {"food", None}]
    own, base = (
        (class_logits(load_network(model), load_tokenizer(model), texts, context)[:, columns] / t).softmax(1)
        for model, t, columns in (
            (m, panel.meta[key], [m.labels.index(label) for label in food.domain.full_labels])
            for m, key in ((food.model, "temperature"), (incumbent, "base_temperature"))
        )
    )
    got = heard(panel, len(texts), own.shape[1])
    between = torch.minimum(own, base) - 4e-3 <= got
    assert bool((between & (got <= torch.maximum(own, base) + 4e-3)).all())
    assert 0 < panel.meta["trust"] <= 1
    assert len(panel.meta["trust_by"]) == 4
    apart = (own - base).abs() > 0.05
    w = ((got - base) / (own - base))[apart]
    assert 0 < float(w.mean()) <= 1.05


def test_influence_is_zero_for_a_layer_that_does_nothing(
    incumbent: Model, domains: dict[str, Domain], context: Context
) -> None:
    network, tokenizer = load_network(incumbent), load_tokenizer(incumbent)
    stack = layers_of(network)
    stack[1].forward = lambda hidden_states, *args, **kwargs: hidden_states  # type: ignore[method-assign]
    scores = influence(network, tokenizer, domains["food"].train.texts[:16], stack, context)
    assert scores[1] == pytest.approx(0, abs=1e-5)
    assert scores[0] > 1e-6
    assert math.isfinite(sum(scores))


def test_vocabulary_keeps_the_logits_of_known_texts(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    domain = domains["food"]
    small = method("vocabulary").shrink(incumbent, domain, tmp_path / "m", context, max_tokens=380)
    columns = [incumbent.labels.index(label) for label in domain.full_labels]
    texts = list(domain.train.texts)
    before = class_logits(load_network(incumbent), load_tokenizer(incumbent), texts, context)[:, columns]
    after = class_logits(load_network(small), load_tokenizer(small), texts, context)
    assert small.parameters < incumbent.parameters
    torch.testing.assert_close(before, after, rtol=1e-4, atol=1e-5)
    # a word it never saw falls apart into characters, not into nothing
    tokens = load_tokenizer(small).tokenize("zebra")
    assert "[UNK]" not in tokens


def test_threads_are_those_of_scikit_learn_too() -> None:
    def most() -> int:
        return max(int(pool["num_threads"]) for pool in threadpool_info() if pool["user_api"] == "blas")

    before = torch.get_num_threads()
    try:
        set_up(Context(threads=2), "x")
        np.ones((2, 2)) @ np.ones((2, 2))
        assert most() == 2
        set_up(Context(threads=1), "x")
        assert most() == 1
    finally:
        torch.set_num_threads(before)
