"""The union head: mean pooling in a plain checkpoint, joining, alignment, 300 domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_bert
from fanbu.batches import collate, encode
from fanbu.contribution import Contribution
from fanbu.domain import Domain
from fanbu.errors import FitError, IntegrityError
from fanbu.heads import (
    Head,
    align_domains,
    domains_of,
    get_head,
    join,
    open_classifier,
    replace_rows,
    sent_head,
    set_head,
)
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.predict import class_logits, features
from fanbu.types import Context


def random_head(domain: str, labels: int, hidden: int, seed: int) -> Head:
    generator = torch.Generator().manual_seed(seed)
    names = tuple(f"{domain}/{i}" for i in range(labels))
    return Head(names, torch.randn(labels, hidden, generator=generator), torch.randn(labels, generator=generator))


def test_mean_pooling_is_part_of_the_plain_checkpoint(bert: Path, domains: dict[str, Domain], context: Context) -> None:
    from transformers import AutoModel

    base = open_model(bert)
    network, tokenizer = open_classifier(base, context), load_tokenizer(base)
    texts = list(domains["food"].test.texts[:8])
    ours = features(network, tokenizer, texts, context)
    batch = collate(encode(tokenizer, texts, 16), 0)
    with torch.inference_mode():
        hidden = AutoModel.from_pretrained(bert).eval()(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    mean = (hidden * mask).sum(1) / mask.sum(1)
    expected = torch.nn.functional.layer_norm(mean, mean.shape[-1:])
    assert torch.cosine_similarity(ours, expected).min() > 0.999
    # of unit norm on average, whatever the width: what probes and learning rates rely on
    norms = ours.norm(dim=1)
    assert norms.std() / norms.mean() < 0.01


def test_the_appended_layer_can_learn(bert: Path, context: Context, domains: dict[str, Domain]) -> None:
    network, tokenizer = open_classifier(open_model(bert), context), load_tokenizer(open_model(bert))
    batch = collate(encode(tokenizer, domains["food"].test.texts[:8], 16), 0)
    network(**batch).logits.square().sum().backward()
    layer = network.bert.encoder.layer[-1]
    for part in (layer.attention.self.query, layer.attention.self.value, layer.output.dense):
        assert part.weight.grad.abs().max() > 0


def test_native_pooling_appends_nothing(bert: Path, context: Context) -> None:
    base = open_model(bert)
    assert open_classifier(base, context, "native").config.num_hidden_layers == base.config["num_hidden_layers"]


def test_a_domain_joins_and_the_others_stay_bit_for_bit() -> None:
    a, b = random_head("a", 3, 8, 0), random_head("b", 2, 8, 1)
    both = join([b, a])
    assert both.labels == (*a.labels, *b.labels)
    assert torch.equal(both.take(a.labels).weight_lh, a.weight_lh)
    new = random_head("b", 4, 8, 2)
    replaced = replace_rows(both, [new])
    assert torch.equal(replaced.take(a.labels).weight_lh, a.weight_lh)
    assert torch.equal(replaced.take(new.labels).bias_l, new.bias_l)
    assert domains_of(replaced.labels) == {"a": [0, 1, 2], "b": [3, 4, 5, 6]}
    torch.testing.assert_close(join([a, a]).weight_lh, a.weight_lh)


def test_labels_of_an_owner_who_is_absent_stay() -> None:
    head = join([random_head("a", 3, 8, 1), random_head("b", 2, 8, 2)])
    new = random_head("a", 2, 8, 3)  # a/2 is known to somebody else
    replaced = replace_rows(head, [new])
    assert replaced.labels == head.labels
    assert torch.equal(replaced.take(new.labels).weight_lh, new.weight_lh)
    kept = ("a/2", "b/0", "b/1")
    assert torch.equal(replaced.take(kept).weight_lh, head.take(kept).weight_lh)


@pytest.mark.parametrize(
    "change",
    [
        {"labels": ["a/0", "b/1"]}, {"labels": ["a/0", "a/0"]}, {"labels": ["a/0"]}, {"labels": ["a/0", "x"]},
        {"bias": torch.zeros(3)}, {"count": torch.ones(5)}, {"weight": torch.zeros(2)},
    ],
)  # fmt: skip
def test_label_rows_that_are_not_the_senders_are_refused(change: dict[str, Any]) -> None:
    tensors = {"weight": torch.ones(2, 4), "bias": torch.zeros(2), "count": torch.tensor([1.0, 1e30])}
    tensors |= {k: v for k, v in change.items() if k != "labels"}
    labels = change.get("labels", ["a/0", "a/1"])
    with pytest.raises(IntegrityError, match="not its industry's"):
        sent_head(Contribution("statistics", "a@north", "probe", tensors, meta={"labels": labels}))
    good = {"weight": torch.ones(2, 4), "bias": torch.zeros(2), "count": torch.tensor([1.0, 1e30])}
    head = sent_head(Contribution("statistics", "a@north", "probe", good, meta={"labels": ["a/0", "a/1"]}))
    assert head.count_l is not None
    assert float(head.count_l.max()) <= 1e6


def test_alignment_finds_the_domain_and_leaves_told_answers_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(60, 8, generator=generator) + 1, torch.randn(60, 8, generator=generator) - 1])
    truth = ["a"] * 60 + ["b"] * 60
    # heads of incomparable scale: b shouts
    head = join([random_head("a", 3, 8, 1), Head(("b/0", "b/1"), *[20 * t for t in (torch.ones(2, 8), torch.ones(2))])])
    aligned = align_domains(head, x, truth, ["a", "b"])

    def answers(h: Head) -> tuple[torch.Tensor, float]:
        z = x @ h.weight_lh.T + h.bias_l
        rows = domains_of(h.labels)
        found = ["a" if i in rows["a"] else "b" for i in z.argmax(1).tolist()]
        told = torch.cat([z[:, rows[d]].log_softmax(1) for d in ("a", "b")], 1)
        return told, sum(f == t for f, t in zip(found, truth, strict=True)) / len(truth)

    before, after = answers(head), answers(aligned)
    torch.testing.assert_close(before[0], after[0], rtol=1e-3, atol=1e-3)
    assert after[1] > 0.95 > before[1]
    assert torch.equal(align_domains(head, x, truth, ["a"]).take(("b/0", "b/1")).weight_lh, head.weight_lh[3:])


def test_a_domain_without_texts_is_not_pushed_away() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 16, generator=generator) * 2
    x = torch.cat([centres[i] + torch.randn(50, 16, generator=generator) for i in range(3)])
    heads = []
    for i, name in enumerate("abc"):
        weight = torch.randn(2, 16, generator=generator) * 0.1 + centres[i] / 4
        own = (x[50 * i : 50 * i + 50] @ weight.T).logsumexp(1).mean()
        heads.append(Head((f"{name}/0", f"{name}/1"), weight, torch.full((2,), -float(own))))
    head, truth = join(heads), ["a"] * 50 + ["b"] * 50

    def found(h: Head) -> float:
        rows = domains_of(h.labels)["c"]
        return float(sum(i in rows for i in (x[100:] @ h.weight_lh.T + h.bias_l).argmax(1).tolist()) / 50)

    aligned = align_domains(head, x[:100], truth, ["a", "b", "c"])
    assert torch.equal(aligned.take(("c/0", "c/1")).weight_lh, heads[2].weight_lh)
    assert found(aligned) > 0.8


def test_300_domains_in_one_plain_pipeline(opened: Model, context: Context, tmp_path: Path) -> None:
    from transformers import pipeline

    network, tokenizer = load_network(opened), load_tokenizer(opened)
    heads = [random_head(f"d{i:03d}", 4, network.config.hidden_size, i) for i in range(300)]
    set_head(network, join(heads[:299]))
    texts = ["a soup with leek", "my late train today"]
    before = class_logits(network, tokenizer, texts, context)
    set_head(network, join([get_head(network), heads[299]]))
    after = class_logits(network, tokenizer, texts, context)
    torch.testing.assert_close(after[:, : 299 * 4], before)
    save_network(network, tokenizer, tmp_path / "m", provenance("test", [opened], context))
    # the last columns of what plain transformers answers
    answers = pipeline("text-classification", model=str(tmp_path / "m"))(texts, top_k=None)
    assert len(answers[0]) == 1200
    best = [network.config.id2label[int(i)] for i in after.argmax(1)]
    assert [a[0]["label"] for a in answers] == best


def test_electra_like_models_are_refused_mean_pooling(bert: Path, context: Context, tmp_path: Path) -> None:
    import json
    import shutil

    folder = make_bert(tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    shutil.copytree(folder, tmp_path / "distil")
    (tmp_path / "distil" / "config.json").write_text(json.dumps({**config, "model_type": "electra"}))
    with pytest.raises(FitError, match="mean pooling"):
        open_classifier(open_model(tmp_path / "distil"), context, "mean")


def test_the_strength_of_a_probe_without_validation_rows_is_cross_validated() -> None:
    from fanbu.probing import STRENGTHS, fit_logistic

    rng = np.random.default_rng(0)
    means = rng.normal(size=(8, 16))
    y = np.repeat(np.arange(8), 6)
    x, none = means[y] + 0.5 * rng.normal(size=(48, 16)), np.zeros((0, 16))
    close = 0.02 * x  # rows so close to each other that a weak fit tells nothing apart
    _, _, strength = fit_logistic(close, y, none, np.zeros(0), 0)
    assert strength > STRENGTHS[0]
    weight, bias, again = fit_logistic(close, y, close, y, 0)  # with validation rows these decide, and these are easy
    assert again == STRENGTHS[0]
    assert weight.shape == (8, 16)
    assert bias.shape == (8,)
    assert fit_logistic(close[::6], y[::6], none, np.zeros(0), 0)[2] == STRENGTHS[1]  # one row a label
