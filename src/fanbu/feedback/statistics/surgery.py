"""Surgery: each owner bends its label rows so that the merged body's features mean to them what its own body's did."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.feedback.statistics._label_rows import join_rows
from fanbu.heads import Head, get_head
from fanbu.merging.gram import own_texts
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import features
from fanbu.types import CLASSIFYING, Context, Needs

NEEDS = Needs(kind="statistics", tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)


def contribute(specialist: Specialist, base: Model, context: Context, *, rows: int = 2000) -> Contribution:
    """W' = W M and b, where M = argmin of sum over texts of |M x - x_own|^2 + r |M - I|^2, in closed form.

    x are the pooled features of ``base`` (run it on a model that was just merged), x_own those of the specialist, W and
    b its label rows. The strength r is the one of STRENGTHS (times the mean of x^2) with the best accuracy on the
    owner's validation rows. Texts are the owner's own, without labels; only label rows cross.

    Args:
        rows: at most so many texts.

    Reference: Yang et al. 2024, "Representation surgery for multi-task model merging", whose correction is here linear,
    and so becomes part of the label rows.
    """
    texts, domain = own_texts(specialist.domain, rows), specialist.domain
    network, tokenizer = load_network(base), load_tokenizer(base)
    x, v = (features(network, tokenizer, t, context).double() for t in (texts, domain.valid.texts))
    network, tokenizer = load_network(specialist.model), load_tokenizer(specialist.model)
    head = get_head(network).take(domain.full_labels)
    own = features(network, tokenizer, texts, context).double()
    target = torch.tensor(domain.valid.labels or [], dtype=torch.long)
    best: tuple[float, float, Tensor] | None = None
    for strength in STRENGTHS:
        weight = head.weight_lh.double() @ bend(x, own, strength)
        right = float(((v @ weight.T + head.bias_l).argmax(1) == target).double().mean()) if len(target) else strength
        if best is None or right >= best[0]:
            best = (right, strength, weight)
    assert best is not None
    spread = float((x @ best[2].T + head.bias_l).logsumexp(1).mean())
    meta = {"labels": list(head.labels), "strength": best[1], "mean_logsumexp": spread}
    return Contribution(
        "statistics", domain.name, "surgery", {"weight": best[2].float(), "bias": head.bias_l}, meta=meta
    )


def bend(x_nh: Tensor, own_nh: Tensor, strength: float) -> Tensor:
    """M = (X_own^T X + r I) (X^T X + r I)^-1, [hidden, hidden] in float64, r = strength times the mean of x^2 a row."""
    r = strength * float(x_nh.square().sum() / max(1, x_nh.shape[1])) + 1e-12
    eye = torch.eye(x_nh.shape[1], dtype=torch.float64) * r
    return torch.linalg.solve(x_nh.T @ x_nh + eye, x_nh.T @ own_nh + eye).T


def absorb(base: Model, contributions: Sequence[Contribution], out: Path, context: Context) -> Model:
    """Joins the label rows into the base's head, on one level (see ``probe``); other domains' rows stay as they are."""
    heads = [
        Head(tuple(c.meta["labels"]), c.tensors["weight"], c.tensors["bias"] - c.meta["mean_logsumexp"])
        for c in contributions
    ]
    return join_rows(base, heads, out, context, "surgery", [c.domain for c in contributions])
