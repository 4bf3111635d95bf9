"""Outcomes: per-example results of one model on one domain's test rows, computed at the owner (kind ``scores``)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fanbu.batches import collate, encode
from fanbu.contribution import Contribution
from fanbu.domain import Domain
from fanbu.heads import check_labels_known
from fanbu.metrics import classification_metrics, reliability
from fanbu.model import Model, load_network, load_tokenizer, require_task
from fanbu.predict import class_logits, token_losses
from fanbu.types import Context, derived_seed

NOBODY = -1


def evaluate(model: Model, domain: Domain, context: Context) -> Contribution:
    """One model's outcomes on one domain's test rows: the part of ``examine`` that crosses."""
    return examine(model, domain, context)[0]


def examine(model: Model, domain: Domain, context: Context) -> tuple[Contribution, dict[str, Tensor]]:
    """One model on one domain's test rows: outcomes that cross, and answers that stay with the owner.

    tensors: ``told`` [n] and ``weight`` [n], and ``untold`` [n] where the model knows other domains too; rows are
    in an order of the owner's that is the same for every model, so that models can be paired without texts or
    labels. A classifier's value is 1 for right and 0 for wrong, its weight 1; a causal model's value is minus the
    sum of its losses, its weight the number of tokens. The metric is sum(value) / sum(weight).
    meta: ``metrics`` told and untold, and ``calibration`` (``metrics.reliability``, told).

    The answers are in the order of the test rows: ``answer`` [n] (number of the domain's label) and ``confidence``
    [n], told; for a causal model ``loss`` [n], in nats a token.
    """
    require_task(model, domain.task)
    network, tokenizer = load_network(model), load_tokenizer(model)
    order = np.random.default_rng(derived_seed(0, "order", domain.test.digest)).permutation(len(domain.test))
    if domain.task == "causal-lm":
        sums = token_losses(network, tokenizer, domain.test.texts, context).double().numpy()[order]
        loss = float(sums[:, 0].sum() / sums[:, 1].sum())
        back = np.argsort(order)
        own = {"loss": torch.tensor((sums[:, 0] / np.maximum(sums[:, 1], 1))[back])}
        return _scores(domain, {"told": -sums[:, 0], "weight": sums[:, 1]}, {"told": {"loss": loss}}), own
    check_labels_known(model, domain.full_labels)
    logits = class_logits(network, tokenizer, domain.test.texts, context)
    columns = [model.labels.index(label) for label in domain.full_labels]
    truth = np.array(domain.test.labels)
    told = logits[:, columns].double().softmax(1).numpy()
    tensors = {"told": told.argmax(1) == truth, "weight": np.ones(len(truth))}
    metrics = {"told": classification_metrics(told, truth)}
    if len(columns) < len(model.labels):
        untold = logits.double().softmax(1).numpy()
        right = untold.argmax(1) == np.array(columns)[truth]
        tensors["untold"] = right
        metrics["untold"] = classification_metrics(_own_and_other(untold, columns), truth)
        metrics["untold"]["accuracy"] = float(right.mean())
    bins = reliability(told.max(1), tensors["told"])
    own = {"answer": torch.tensor(told.argmax(1)), "confidence": torch.tensor(told.max(1))}
    return _scores(domain, {k: v[order] for k, v in tensors.items()}, metrics, calibration=bins), own


def _own_and_other(probs: np.ndarray[Any, Any], columns: Sequence[int]) -> np.ndarray[Any, Any]:
    """The domain's columns, and one more that holds the likeliest foreign label."""
    foreign = np.delete(probs, columns, axis=1)
    return np.concatenate([probs[:, list(columns)], foreign.max(1, keepdims=True)], 1)


def _scores(domain: Domain, columns: dict[str, Any], metrics: dict[str, Any], **more: Any) -> Contribution:
    tensors = {name: torch.tensor(np.asarray(column, dtype=np.float64)) for name, column in columns.items()}
    meta = {"metrics": metrics, "test": domain.test.digest, **more}
    return Contribution("scores", domain.name, "evaluate", tensors, meta=meta)


def tfidf(domain: Domain, context: Context) -> Contribution:
    """The outcomes of TF-IDF (words and pairs of words, sublinear) with logistic regression, strength by validation."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    vectors = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=1)
    x = vectors.fit_transform(domain.train.texts)
    valid, target = vectors.transform(domain.valid.texts), np.array(domain.valid.labels)
    models = [LogisticRegression(C=c, max_iter=300, tol=1e-3).fit(x, domain.train.labels) for c in (1.0, 10.0, 100.0)]
    best = max(models, key=lambda m: float((m.predict(valid) == target).mean()))
    truth = np.array(domain.test.labels)
    probs = np.zeros((len(truth), len(domain.labels)))
    probs[:, best.classes_] = best.predict_proba(vectors.transform(domain.test.texts))
    order = np.random.default_rng(derived_seed(0, "order", domain.test.digest)).permutation(len(truth))
    columns = {"told": (probs.argmax(1) == truth)[order], "weight": np.ones(len(truth))}
    return _scores(domain, columns, {"told": classification_metrics(probs, truth)})


def measure(model: Model, texts: Sequence[str], context: Context, repeats: int = 20) -> dict[str, float]:
    """Parameters, bytes, and the median milliseconds of one text at a time, tokenizing included."""
    import time

    network, tokenizer = load_network(model).to(context.device), load_tokenizer(model)
    times = []
    with torch.inference_mode():
        for text in [*texts[:3], *texts[:repeats]]:
            started = time.perf_counter()
            network(**collate(encode(tokenizer, [text], context.max_length), 0, context.device))
            times.append(1000 * (time.perf_counter() - started))
    return {"parameters": model.parameters, "bytes": model.bytes, "latency_ms": float(np.median(times[3:]))}
