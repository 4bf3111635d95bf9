"""Metrics of a classifier on one split, from probabilities."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def classification_metrics(probs_nl: Floats, labels_n: Ints) -> dict[str, float]:
    """Accuracy, macro and weighted F1, macro precision and recall, expected calibration error (15 bins) and loss.

    probs_nl: [rows, labels], rows summing to at most 1; labels_n: [rows]. Macro averages run over the labels that
    occur in either the truth or the answers, and a label never predicted has precision 0.
    """
    from sklearn.metrics import f1_score, precision_score, recall_score

    answers = probs_nl.argmax(1)
    return {
        "accuracy": float((answers == labels_n).mean()),
        "macro_f1": float(f1_score(labels_n, answers, average="macro", zero_division=0)),
        "weighted_f1": float(f1_score(labels_n, answers, average="weighted", zero_division=0)),
        "precision": float(precision_score(labels_n, answers, average="macro", zero_division=0)),
        "recall": float(recall_score(labels_n, answers, average="macro", zero_division=0)),
        "calibration_error": calibration_error(probs_nl.max(1), answers == labels_n),
        "loss": float(-np.log(np.maximum(probs_nl[np.arange(len(labels_n)), labels_n], 1e-12)).mean()),
    }


def calibration_error(confidence_n: Floats, correct_n: NDArray[np.bool_], bins: int = 15) -> float:
    """Expected calibration error: sum over bins of (rows in bin / rows) |accuracy - confidence| (Guo et al. 2017)."""
    which = np.minimum((confidence_n * bins).astype(int), bins - 1)
    gaps = [
        abs(correct_n[which == b].mean() - confidence_n[which == b].mean()) * (which == b).mean()
        for b in np.unique(which)
    ]
    return float(sum(gaps))


def reliability(confidence_n: Floats, correct_n: NDArray[np.bool_], bins: int = 10) -> list[list[float]]:
    """[count, mean confidence, accuracy] of each of ``bins`` equal bins of confidence (a reliability diagram).

    Empty bins are [0, 0, 0]. Reference: DeGroot and Fienberg 1983; Niculescu-Mizil and Caruana 2005.
    """
    which = np.minimum((confidence_n * bins).astype(int), bins - 1)
    found = []
    for b in range(bins):
        inside = which == b
        n = int(inside.sum())
        found.append([n, float(confidence_n[inside].mean()), float(correct_n[inside].mean())] if n else [0, 0.0, 0.0])
    return found
