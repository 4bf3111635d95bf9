"""Training with differential privacy at the owner (DP-SGD), and what it costs."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fanbu.chance import Chance
from fanbu.contribution import Contribution
from fanbu.errors import BoundaryError, UsageError, needs_extra
from fanbu.files import write_text
from fanbu.train import BatchLoss, optimizer_of, schedule
from fanbu.types import Context, Privacy, Train


@dataclass(frozen=True)
class Mechanism:
    """So many steps that each draw every row with probability ``rate``, and add noise of standard deviation ``noise``
    times the norm that a row's gradient is brought down to."""

    noise: float
    rate: float
    steps: int

    def as_dict(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def cost(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """The epsilon of (epsilon, delta)-differential privacy of all of them together, by Renyi differential privacy.

    For each order a > 1: epsilon = sum of RDP_a + log((a - 1) / a) - (log delta + log a) / (a - 1); the least of all.
    References: Mironov, Talwar and Zhang 2019 (the sampled Gaussian mechanism); Balle et al. 2020 (the conversion).
    """
    with needs_extra("privacy"):
        from opacus.accountants import RDPAccountant
    accountant: Any = RDPAccountant()
    accountant.history = [(m.noise, m.rate, m.steps) for m in mechanisms if m.steps]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the best order is the largest: then epsilon is tiny
        return float(accountant.get_epsilon(delta)) if accountant.history else 0.0


def spend(ledger: Path, key: str, sent: Contribution, budget: tuple[float, float] | None) -> None:
    """Writes down what a contribution costs its owner, beside all that it spent before, in the file ``ledger``.

    What has the same ``key`` counts once: it was cut off before it crossed. Raises BoundaryError where all together
    would cost more than ``budget`` (epsilon, delta).
    """
    told = sent.meta.get("privacy")
    if told is None:
        return
    known: dict[str, Any] = json.loads(ledger.read_text()) if ledger.exists() else {}
    known[key] = {name: told[name] for name in ("noise", "rate", "steps")}
    if budget:
        epsilon, delta = budget
        total = cost([Mechanism(**m) for m in known.values()], delta)
        if total > epsilon:
            raise BoundaryError(
                "budget-spent", f"{sent.domain} would have spent epsilon {total:.3g} with this, at delta {delta:g}",
                allowed=f"{epsilon:g} over all rounds", got=f"{len(known)} noised contributions",
                remedy="train with a smaller privacy.epsilon or fewer times, or raise `share.budget` with the owner's "
                "consent",
            )  # fmt: skip
    ledger.parent.mkdir(parents=True, exist_ok=True)
    write_text(ledger, json.dumps(known, indent=1, sort_keys=True))


def noise_for(privacy: Privacy, rate: float, steps: int) -> float:
    """The least noise with which so many steps cost no more than ``privacy.epsilon``."""
    with needs_extra("privacy"):
        from opacus.accountants.utils import get_noise_multiplier
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(
            get_noise_multiplier(
                target_epsilon=privacy.epsilon, target_delta=privacy.delta, sample_rate=rate, steps=steps,
                accountant="rdp", epsilon_tolerance=privacy.epsilon / 1000,
            )
        )  # fmt: skip


@dataclass(frozen=True)
class OwnerNoise:
    """Noise that hides which rows an owner has, in inner round ``number`` of ``times``; that it takes
    part is no secret.

    Its numbers are ``privacy.norm`` long at most, so for any other rows they would be 2 norm away at most. In a secure
    sum of ``among`` owners at least, each adds to every number its share of the noise that this takes, such that
    there is enough without what any one of them knows of it: its own.
    """

    privacy: Privacy
    times: int
    number: int
    among: int = 0

    @cached_property
    def each(self) -> Mechanism:
        """What one contribution costs."""
        return Mechanism(noise_for(self.privacy, 1.0, self.times), 1.0, 1)

    @property
    def deviation(self) -> float:
        """The standard deviation of the noise that the owner adds to each of its numbers."""
        return self.each.noise * 2 * self.privacy.norm / math.sqrt(max(1, self.among - 1))

    def paid(self, sent: Contribution) -> Contribution:
        """A contribution that has this noise, with what it costs."""
        epsilon = cost([replace(self.each, steps=self.number + 1)], self.privacy.delta)
        told = {**self.each.as_dict(), "delta": self.privacy.delta, "norm": self.privacy.norm, "of": "owner"}
        return replace(sent, meta={**sent.meta, "privacy": told}, epsilon=epsilon)

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> OwnerNoise:
        """From plain values."""
        return cls(**{**plain, "privacy": Privacy(**plain["privacy"])})


def train_privately(
    learning: nn.Module, rows: int, loss: BatchLoss, plan: Train, context: Context, name: str, privacy: Privacy,
    head: tuple[nn.Module, int] | None = None,
) -> Mechanism:  # fmt: skip
    """Trains in place; each step takes a Poisson sample of the rows, brings each row's gradient down to
    ``privacy.norm`` and adds noise to their sum. Noise suffices for all inner rounds together.

    Neighbours differ in one row; how many there are is told. Batches and noise are drawn from the system's entropy, not
    from the run's seed: who knows the seed could take the noise away again (``chance``). So two runs differ, and after
    a kill training begins anew. ``head`` names the label rows, and how many of them
    learn.

    Raises UsageError where there are fewer rows than two.

    Reference: Abadi et al. 2016, "Deep learning with differential privacy".
    """
    if rows < 2:
        raise UsageError(
            "nothing-to-train", f"{name}: one row cannot be hidden among others", allowed="two rows at least", got=rows,
            remedy="give it more rows, or train without privacy",
        )  # fmt: skip
    with needs_extra("privacy"):
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    steps = min(plan.epochs * math.ceil(rows / plan.batch_size), plan.max_steps or 2**62)
    rate, inner = min(1.0, plan.batch_size / rows), context.inner
    mechanism = Mechanism(noise_for(privacy, rate, steps * (inner.of if inner else 1)), rate, steps)
    chance = Chance()
    wrapped, plain = GradSampleModule(learning), optimizer_of(learning, head and head[0], plan)
    optimizer: Any = DPOptimizer(
        plain, noise_multiplier=mechanism.noise, max_grad_norm=privacy.norm,
        expected_batch_size=max(1, round(rate * rows)),
    )  # fmt: skip
    optimizer.add_noise = partial(_add_noise, optimizer, chance)
    rates = [group["lr"] for group in plain.param_groups]
    learning.train()
    for step in range(steps):
        for group, base in zip(plain.param_groups, rates, strict=True):
            group["lr"] = base * schedule(plan, step / steps)
        chosen = (chance.uniform(rows) < rate).nonzero().flatten().tolist()
        optimizer.zero_grad()
        if chosen:
            with warnings.catch_warnings():  # features and tokens want no gradient
                warnings.filterwarnings("ignore", message="Full backward hook is firing")
                loss(wrapped, chosen).backward()
        for p in learning.parameters():
            if p.requires_grad:
                _only_first(p, head, bool(chosen))
        optimizer.step()
        context.progress(name, step + 1, steps)
    wrapped.to_standard_module()
    learning.eval()
    return mechanism


def _add_noise(optimizer: Any, chance: Chance) -> None:
    """As Opacus adds it, whose own comes from a seed of 32 bits on CPUs."""
    for p in optimizer.params:
        noise = chance.normal(p.summed_grad, optimizer.noise_multiplier * optimizer.max_grad_norm)
        p.grad = (p.summed_grad + noise).view_as(p)
        p.summed_grad._processed = True


def _only_first(p: Any, head: tuple[nn.Module, int] | None, any_row: bool) -> None:
    """Of the label rows those learn that are the owner's; an empty batch has gradients of no rows."""
    if not any_row:
        p.grad_sample = torch.zeros(0, *p.shape, device=p.device)
    elif head and any(p is q for q in head[0].parameters()):
        samples: Tensor = p.grad_sample
        samples[:, head[1] :] = 0
