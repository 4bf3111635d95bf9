"""Strong linear probes: logistic regression on the frozen network's pooled features, strength chosen on validation."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fanbu.domain import Domain
from fanbu.heads import Head
from fanbu.predict import features
from fanbu.types import Context

STRENGTHS = (1.0, 10.0, 100.0, 1000.0)


def fit_probe(network: Any, tokenizer: Any, domain: Domain, context: Context) -> tuple[Head, dict[str, float]]:
    """Label rows for one domain; the strength C that validation chose, and the mean logsumexp of the training rows.

    Features are scaled to unit norm on average (with mean pooling their norm is the same for all texts), all
    training rows are used, C is the one of STRENGTHS with the best validation accuracy (the smaller on a tie).
    """
    x, v = (
        features(network, tokenizer, domain.train.texts, context),
        features(network, tokenizer, domain.valid.texts, context),
    )
    scale = 1.0 / float(x.norm(dim=1).mean().clamp_min(1e-12))
    weight, bias, strength = fit_logistic(
        (x * scale).numpy(), np.array(domain.train.labels), (v * scale).numpy(), np.array(domain.valid.labels),
        context.seeded("probe", domain.industry),
    )  # fmt: skip
    head = Head(domain.full_labels, weight * scale, bias)
    spread = float((x @ head.weight_lh.T + head.bias_l).logsumexp(1).mean())
    return head, {"strength": strength, "mean_logsumexp": spread}


def fit_logistic(x: Any, y: Any, x_valid: Any, y_valid: Any, seed: int) -> tuple[Tensor, Tensor, float]:
    """weight [labels, hidden] and bias [labels] of multinomial logistic regression, and the chosen C: by validation
    rows, or where there are none by cross-validation (``_by_folds``)."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    best: tuple[float, Any, Any, float] | None = None
    model = LogisticRegression(C=STRENGTHS[0], max_iter=300, tol=1e-3, warm_start=True, random_state=seed)
    for strength in STRENGTHS if len(y_valid) else [_by_folds(x, y, seed)]:
        model.set_params(C=strength)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            warnings.filterwarnings("ignore", message="The number of unique classes")  # few rows a label are no mistake
            model.fit(x, y)
        score = float((model.predict(x_valid) == y_valid).mean()) if len(y_valid) else 0.0
        if best is None or score > best[0]:
            best = (score, model.coef_.copy(), model.intercept_.copy(), strength)
    assert best is not None
    _, weight, bias, strength = best
    if len(weight) == 1:  # two classes: one row stands for the difference
        weight, bias = np.concatenate([-weight / 2, weight / 2]), np.concatenate([-bias / 2, bias / 2])
    return torch.tensor(weight, dtype=torch.float32), torch.tensor(bias, dtype=torch.float32), strength


def _by_folds(x: Any, y: Any, seed: int) -> float:
    """The C of STRENGTHS with the best accuracy on rows that were left out, in three parts at most (the smaller on a
    tie); the second one where a label has a single row."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_score

    least = int(np.unique(y, return_counts=True)[1].min())
    if least < 2:
        return STRENGTHS[1]
    folds = StratifiedKFold(min(3, least), shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", message="The number of unique classes")
        models = (LogisticRegression(C=c, max_iter=300, tol=1e-3, random_state=seed) for c in STRENGTHS)
        scores = [float(cross_val_score(model, x, y, cv=folds).mean()) for model in models]
    return STRENGTHS[scores.index(max(scores))]


def prototypes(x_nh: Tensor, labels: Sequence[int], count: int) -> Tensor:
    """[count, hidden]: the mean of the rows of each label; zeros where there are none."""
    index = torch.as_tensor(labels)
    sums = torch.zeros(count, x_nh.shape[1]).index_add_(0, index, x_nh.float())
    return sums / torch.bincount(index, minlength=count).clamp(min=1)[:, None]


def prototype_rows(labels: Sequence[str], means_lh: Tensor, sharpness: float) -> Head:
    """Label rows whose logits are, up to what all labels share, -s/2 |x - mean|^2: w = s mean, b = -s/2 |mean|^2.

    Reference: Snell, Swersky and Zemel 2017, "Prototypical networks for few-shot learning".
    """
    return Head(tuple(labels), sharpness * means_lh, -sharpness / 2 * means_lh.square().sum(1))
