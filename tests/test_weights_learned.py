"""Merging that looks at texts, and what can be had again of a merged model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import FitError, UsageError
from fanbu.feedback.statistics.surgery import bend
from fanbu.feedback.weights.emr import elected
from fanbu.judge.evaluate import evaluate
from fanbu.merging.live import Live
from fanbu.merging.masks import FILE, only
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import class_logits
from fanbu.tensors import Tensors
from fanbu.types import Context


def sent(name: str, specialists: dict[str, Specialist], base: Model, context: Context) -> list[Contribution]:
    return [method(name).contribute(s, base, context) for s in specialists.values()]


def entropy(model: Model, domains: dict[str, Domain], context: Context) -> float:
    """The mean entropy of told answers on the probe set, in nats."""
    found = []
    network, tokenizer = load_network(model), load_tokenizer(model)
    for d in domains.values():
        texts = [row.text for row in context.probe.rows if row.domain == d.name]
        columns = [model.labels.index(label) for label in d.full_labels]
        log_p = class_logits(network, tokenizer, texts, context)[:, columns].log_softmax(1)
        found.append(float(-(log_p.exp() * log_p).sum(1).mean()))
    return sum(found) / len(found)


def test_adamerging_makes_answers_more_certain(
    specialists: dict[str, Specialist], incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    way, own = method("adamerging"), sent("adamerging", specialists, incumbent, context)
    before = way.absorb(incumbent, own, tmp_path / "before", context, steps=0)
    after = way.absorb(incumbent, own, tmp_path / "after", context, steps=15, lr=0.05)
    assert entropy(after, domains, context) < entropy(before, domains, context)
    learned = torch.tensor(after.manifest["parameters"]["learned"])
    assert learned.shape == (2, 1 + incumbent.config["num_hidden_layers"])
    assert float(learned.std()) > 0
    by_task = way.absorb(incumbent, own, tmp_path / "task", context, steps=2, by="task")
    assert torch.tensor(by_task.manifest["parameters"]["learned"]).shape == (2, 1)


def test_adamerging_follows_the_true_slope(
    specialists: dict[str, Specialist], incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    """<d loss / d theta, delta> is what a difference quotient of the entropy says."""
    from fanbu.feedback.weights.adamerging import _encoded, _slope

    own = sent("adamerging", specialists, incumbent, context)
    live = Live(incumbent, own, context)
    texts = {d: [row.text for row in context.probe.rows if row.domain == d] for d in domains}
    batches = {d: _encoded(live, t, context) for d, t in sorted(texts.items())}
    size = min(map(len, batches.values()))
    shares, groups = torch.full((2, 1), 0.4, dtype=torch.float64), dict.fromkeys(live.stacks, 0)
    found = _slope(live, batches, groups, shares, 0, size)[:, 0]
    for place in range(2):
        values = []
        for step in (0.02, -0.02):
            moved = shares.clone()
            moved[place] += step
            live.blend(lambda stack, moved=moved: moved[:, 0].tolist())
            total = 0.0
            for d, own_texts in texts.items():
                order = torch.randperm(
                    len(own_texts), generator=torch.Generator().manual_seed(context.seeded("adamerging"))
                )[:size]
                log_p = live.logits([own_texts[i] for i in order], d).log_softmax(1)
                total += float(-(log_p.exp() * log_p).sum(1).mean()) / len(texts)
            values.append(total)
        assert float(found[place]) == pytest.approx((values[0] - values[1]) / 0.04, rel=0.05, abs=1e-4)


def test_methods_with_texts_refuse_a_set_that_lacks_a_domain(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    some = replace(context, probe=replace(context.probe, rows=context.probe.rows[:1]))
    for name in ("adamerging", "regmean_plus"):
        own = sent(name, specialists, incumbent, some)
        with pytest.raises(FitError, match=r"texts of every specialist's domain.*remedy"):
            method(name).absorb(incumbent, own, tmp_path / "a", some)
        other = sent(name, specialists, incumbent, some)
        with pytest.raises(FitError, match="another set for"):
            method(name).absorb(incumbent, other, tmp_path / "a", context)
    own = sent("adamerging", specialists, incumbent, context)
    with pytest.raises(UsageError, match="steps or batch"):
        method("adamerging").absorb(incumbent, own, tmp_path / "a", context, batch=0)
    assert not (tmp_path / "a").exists()


def test_soup_leaves_out_who_spoils_it(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    own = sent("soup", specialists, incumbent, context)
    assert all(set(row) == {"text", "label"} for c in own for row in c.rows)
    good = method("soup").absorb(incumbent, own, tmp_path / "good", context)
    assert set(good.manifest["parameters"]["chosen"]) <= {"food", "rail"}
    vector = own[1].tensors
    wild = {n: torch.randn(vector[n].shape, generator=torch.Generator().manual_seed(0)) * 3 for n in vector}
    wild |= {n: vector[n] for n in vector if n.startswith("head:")}
    spoilt = [own[0], replace(own[1], tensors=wild)]
    made = method("soup").absorb(incumbent, spoilt, tmp_path / "new", context)
    assert made.manifest["parameters"]["chosen"] == ["food"]
    a, b = Tensors(specialists["food"].model.path), Tensors(made.path)
    for name in a:
        if not name.startswith("classifier."):
            torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)


def test_regmean_plus_is_regmean_where_nothing_lies_before(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    """The first block sees the merged embeddings; with equal embeddings both methods are given the same there."""
    same = {}
    old = Tensors(incumbent.path)
    for name, s in specialists.items():
        folder = tmp_path / name
        from fanbu.model import provenance, save_model

        tensors = dict(Tensors(s.model.path))
        tensors |= {n: old[n] for n in tensors if "embeddings" in n or (".layer.0." not in n and "classifier" not in n)}
        made = provenance("test", [incumbent], context)
        same[name] = Specialist(save_model(folder, s.model.config, tensors, s.model.path, made), s.domain, incumbent)
    by_sums = [method("regmean").contribute(s, incumbent, context, rows=10**6) for s in same.values()]
    one = method("regmean").absorb(incumbent, by_sums, tmp_path / "one", context)
    probe = context.probe
    texts = {d: [r.text for r in probe.rows if r.domain == d] for d in same}
    assert texts["food"] == list(same["food"].domain.train.texts)  # both look at the same texts
    two = method("regmean_plus").absorb(
        incumbent, sent("regmean_plus", same, incumbent, context), tmp_path / "two", context, rows=10**6
    )
    a, b = Tensors(one.path), Tensors(two.path)
    name = next(n for n in a if ".layer.0." in n and n.endswith("query.weight"))
    torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(a[name], old[name])


def test_emr_elects_by_the_paper() -> None:
    deltas = [torch.tensor([1.0, -2.0, 0.5, 3.0]), torch.tensor([2.0, 1.0, -0.5, 1.0])]
    assert elected(deltas).tolist() == [2.0, -2.0, 0.0, 3.0]


def test_emr_gives_each_domain_its_own_back(
    specialists: dict[str, Specialist], incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    own = sent("emr", specialists, incumbent, context)
    merged = method("emr").absorb(incumbent, own, tmp_path / "merged", context)
    assert FILE in merged.files
    open_model(merged.path)  # its digests are right
    theta_0 = Tensors(incumbent.path)
    for domain, s in specialists.items():
        alone = only(merged, incumbent, domain, tmp_path / domain, context)
        assert alone.labels == s.model.labels
        name = next(n for n in theta_0 if n.endswith("intermediate.dense.weight"))
        delta = [Tensors(x.model.path)[name] - theta_0[name] for x in specialists.values()]
        tau = elected(delta)
        mine = Tensors(s.model.path)[name] - theta_0[name]
        expected = (mine * tau > 0) * tau
        got = Tensors(alone.path)[name] - theta_0[name]
        kept = expected != 0
        scale = float((got[kept] / expected[kept]).median())
        torch.testing.assert_close(got, expected * scale, rtol=1e-3, atol=1e-6)
        near, far = (float((Tensors(m.path)[name] - theta_0[name] - mine).norm()) for m in (alone, merged))
        assert near < far
        evaluate(alone, domains[domain], context)
    with pytest.raises(UsageError, match=r"no masks of sea.*allowed.*food"):
        only(merged, incumbent, "sea", tmp_path / "sea", context)
    with pytest.raises(UsageError, match="a model that emr made"):
        only(incumbent, incumbent, "food", tmp_path / "sea", context)
    assert not (tmp_path / "sea").exists()


def test_surgery_undoes_a_turn_of_the_features() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64)).Q
    weight = torch.randn(3, 8, generator=generator, dtype=torch.float64)
    bent = weight @ bend(own @ turn, own, 0.0)
    torch.testing.assert_close((own @ turn) @ bent.T, own @ weight.T, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bend(own, own, 0.5), torch.eye(8, dtype=torch.float64), rtol=0, atol=1e-9)


def test_surgery_helps_a_merged_body(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    way = method("surgery")
    own = sent("average", specialists, incumbent, context)
    merged = method("average").absorb(incumbent, own, tmp_path / "merged", context)
    rows = [way.contribute(s, merged, context) for s in specialists.values()]
    assert all(not c.rows and set(c.tensors) == {"weight", "bias"} for c in rows)
    made = way.absorb(merged, rows, tmp_path / "made", context)
    body = Tensors(merged.path)
    assert all(torch.equal(Tensors(made.path)[n], body[n]) for n in body if not n.startswith("classifier."))
    for domain, s in specialists.items():
        texts = list(s.domain.train.texts)
        logits = [
            class_logits(load_network(m), load_tokenizer(m), texts, context)[
                :, [m.labels.index(label) for label in s.domain.full_labels]
            ].log_softmax(1)
            for m in (s.model, merged, made)
        ]
        assert (logits[0] - logits[2]).abs().mean() < (logits[0] - logits[1]).abs().mean(), domain


def test_a_kept_contribution_is_the_weights_as_they_are_stored(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    from fanbu.boundary import cross
    from fanbu.types import PRESETS

    c = method("ties").contribute(specialists["food"], incumbent, context)
    cross(c, PRESETS["open"], tmp_path / "c")
    back = open_contribution(tmp_path / "c")
    own = Tensors(specialists["food"].model.path)
    for name in back.tensors:
        assert torch.equal(back.tensors[name], own[name.removeprefix("head:")])
