"""Panels: what a specialist says on the probe set, with what its owner knows of its worth."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fanbu.domain import Specialist
from fanbu.errors import FitError
from fanbu.heads import check_labels_known
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import class_logits, token_losses, top_tokens
from fanbu.types import Context


def asked(context: Context, domain: str) -> list[int]:
    """Numbers of the probe rows that a specialist is asked about: its own domain's, and those of nobody's."""
    return [i for i, row in enumerate(context.probe.rows) if row.domain in {domain, None}]


def class_panel(specialist: Specialist, base: Model, context: Context) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Soft labels on the probe rows: the specialist's and the base's, mixed by what validation rows say of either.

    p = w softmax(z_specialist / T_s) + (1 - w) softmax(z_base / T_b). Each T minimises the negative log-likelihood of
    the validation rows (Guo et al. 2017), then w in [0, 1] that of the mixture: the ``trust`` in the specialist. A
    specialist that learned nothing new gets none; one that is no better, but errs elsewhere, gets its share.

    tensors: ``rows`` [asked] and ``probs`` [asked, labels] in float16. meta: both temperatures, ``trust``, and wins and
    losses against the base on validation rows.
    """
    domain = specialist.domain
    rows, target = asked(context, domain.name), torch.tensor(domain.valid.labels)
    texts = [context.probe.rows[i].text for i in rows]
    valid, probs, temperatures = [], [], []
    for model in (specialist.model, base):
        check_labels_known(model, domain.full_labels)
        network, tokenizer = load_network(model), load_tokenizer(model)
        columns = [model.labels.index(label) for label in domain.full_labels]
        z = class_logits(network, tokenizer, [*domain.valid.texts, *texts], context)[:, columns]
        temperatures.append(fit_temperature(z[: len(target)], target))
        p = (z / temperatures[-1]).softmax(1)
        valid.append(p[: len(target)])
        probs.append(p[len(target) :])
    trust = fit_trust(valid[0], valid[1], target)
    right, base_right = (p.argmax(1) == target for p in valid)
    meta = {
        "probe": context.probe.digest, "labels": list(domain.full_labels), "trust": trust,
        "temperature": temperatures[0], "base_temperature": temperatures[1], "valid": len(target),
        "wins": int((right & ~base_right).sum()), "losses": int((~right & base_right).sum()),
    }  # fmt: skip
    mixed = trust * probs[0] + (1 - trust) * probs[1]
    return {"rows": torch.tensor(rows, dtype=torch.int32), "probs": mixed.half()}, meta


def fit_trust(own_nl: Tensor, base_nl: Tensor, target_n: Tensor) -> float:
    """The w of 0, 0.05, ..., 1 that minimises the mean of -log(w own[y] + (1 - w) base[y]); the smallest on a tie."""
    own, base = (p[torch.arange(len(target_n)), target_n].double().clamp_min(1e-12) for p in (own_nl, base_nl))
    weights = [i / 20 for i in range(21)]
    losses = [-float((w * own + (1 - w) * base).log().mean()) for w in weights]
    return next(w for w, loss in zip(weights, losses, strict=True) if loss <= min(losses) + 1e-6)


def fit_temperature(logits_nl: Tensor, target_n: Tensor) -> float:
    """The T in [0.2, 5] that minimises the mean of -log softmax(z / T)[y], by golden-section search on log T."""
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits_nl.double() / torch.tensor(log_t).exp(), target_n))

    found = minimize_scalar(loss, bounds=(-1.609, 1.609), method="bounded", options={"xatol": 1e-3})
    return round(float(torch.tensor(found.x).exp()), 4)


def token_panel(
    specialist: Specialist, base: Model, context: Context, top_k: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The k likeliest next tokens at each place of the probe rows, and validation losses of both models.

    tensors: ``rows`` [asked], ``lengths`` [asked], ``indices`` and ``probs`` [sum of lengths, k].
    """
    domain = specialist.domain
    network, tokenizer = load_network(specialist.model), load_tokenizer(specialist.model)
    other = load_tokenizer(base)
    if tokenizer.get_vocab() != other.get_vocab():
        raise FitError(
            "other-tokenizer", f"the specialist of {domain.name} has another vocabulary than the base",
            allowed="the base's tokenizer, for causal models", remedy="shrink it without changing its vocabulary",
        )  # fmt: skip
    rows = asked(context, domain.name)
    answers = top_tokens(network, tokenizer, [context.probe.rows[i].text for i in rows], context, top_k)
    own = token_losses(network, tokenizer, domain.valid.texts, context)
    before = token_losses(load_network(base), other, domain.valid.texts, context)
    meta = {
        "probe": context.probe.digest, "valid": len(own),
        "wins": int((own[:, 0] < before[:, 0]).sum()), "losses": int((own[:, 0] > before[:, 0]).sum()),
        "trust": float(own[:, 0].sum() < before[:, 0].sum()),
        "loss": float(own[:, 0].sum() / own[:, 1].sum()), "base_loss": float(before[:, 0].sum() / before[:, 1].sum()),
    }  # fmt: skip
    tensors = {
        "rows": torch.tensor(rows, dtype=torch.int32),
        "lengths": torch.tensor([len(i) for i, _ in answers], dtype=torch.int32),
        "indices": torch.cat([i for i, _ in answers]) if answers else torch.zeros(0, 1, dtype=torch.int32),
        "probs": torch.cat([p for _, p in answers]) if answers else torch.zeros(0, 1).half(),
    }
    return tensors, meta
