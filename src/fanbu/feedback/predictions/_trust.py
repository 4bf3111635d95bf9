"""What validation rows say of a specialist's worth: all in all, and text by text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

_RIDGE = 3.0
_SURE = 1e-4
_STEPS = 100


@dataclass(frozen=True)
class Trust:
    """How much of a mixture is the specialist's: w(x) = sigmoid(b_0 + b . f(x)), or 0 everywhere.

    f: the log-odds of the specialist's and of the base's likeliest label, and whether both name the same one, each
    brought to mean 0 and deviation 1 on the validation rows. ``share`` is the best w that is the same for all texts.
    """

    share: float
    coefficients: tuple[float, ...] = ()
    means: tuple[float, ...] = ()
    deviations: tuple[float, ...] = ()

    def of(self, own_nl: Tensor, base_nl: Tensor) -> Tensor:
        """w [texts]; both [texts, labels] are probabilities."""
        if not self.share:
            return torch.zeros(len(own_nl))
        x = (_features(own_nl, base_nl) - torch.tensor(self.means)) / torch.tensor(self.deviations)
        return torch.sigmoid(self.coefficients[0] + x @ torch.tensor(self.coefficients[1:]))


def fit_trust(own_nl: Tensor, base_nl: Tensor, target_n: Tensor) -> Trust:
    """Minimises sum -log(w own[y] + (1 - w) base[y]): first by one w (``fit_share``), then by texts, where a ridge of 3
    on the coefficients holds what few rows say near the one w."""
    share = fit_share(own_nl, base_nl, target_n)
    if not share:
        return Trust(0.0)
    own, base = _of_truth(own_nl, target_n), _of_truth(base_nl, target_n)
    f = _features(own_nl, base_nl)
    means, deviations = f.mean(0), f.std(0, correction=0).clamp_min(1e-3)
    x = ((f - means) / deviations).double()
    start = torch.zeros(x.shape[1] + 1, dtype=torch.double)
    start[0] = torch.tensor(share).clamp(0.03, 0.97).logit()
    b = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([b], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        w = torch.sigmoid(b[0] + x @ b[1:])
        value = _RIDGE * (b - start).square().sum() - (w * own + (1 - w) * base).log().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    fitted = [tuple(round(float(v), 6) for v in values) for values in (b.detach(), means, deviations)]
    return Trust(share, *fitted)


def _features(own_nl: Tensor, base_nl: Tensor) -> Tensor:
    """[texts, 3]."""
    odds = [p.max(1).values.clamp(_SURE, 1 - _SURE).logit() for p in (own_nl, base_nl)]
    return torch.stack([*odds, (own_nl.argmax(1) == base_nl.argmax(1)).float()], 1)


def _of_truth(p_nl: Tensor, target_n: Tensor) -> Tensor:
    return p_nl[torch.arange(len(target_n)), target_n].double().clamp_min(1e-12)


def fit_share(own_nl: Tensor, base_nl: Tensor, target_n: Tensor) -> float:
    """The w of 0, 0.05, ..., 1 that minimises the mean of -log(w own[y] + (1 - w) base[y]); the smallest on a tie."""
    own, base = _of_truth(own_nl, target_n), _of_truth(base_nl, target_n)
    weights = [i / 20 for i in range(21)]
    losses = [-float((w * own + (1 - w) * base).log().mean()) for w in weights]
    return next(w for w, loss in zip(weights, losses, strict=True) if loss <= min(losses) + 1e-6)


def fit_temperature(logits_nl: Tensor, target_n: Tensor) -> float:
    """The T in [0.2, 5] that minimises the mean of -log softmax(z / T)[y], by golden-section search on log T."""
    from scipy.optimize import minimize_scalar

    def loss(log_t: float) -> float:
        return float(functional.cross_entropy(logits_nl.double() / torch.tensor(log_t).exp(), target_n))

    found = minimize_scalar(loss, bounds=(-1.609, 1.609), method="bounded", options={"xatol": 1e-3})
    return round(float(torch.tensor(found.x).exp()), 4)
