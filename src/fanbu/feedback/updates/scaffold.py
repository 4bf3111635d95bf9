"""SCAFFOLD: federated averaging whose owners are told, by control variates, where the others are going."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Gt
from torch import Tensor, nn

from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.errors import IntegrityError, UsageError
from fanbu.feedback.updates._local import Pull, update
from fanbu.feedback.updates._server import How, Overlaid, taken
from fanbu.heads import final_layer
from fanbu.model import Model, load_network, provenance
from fanbu.tensors import layout, load_tensors, save_tensors
from fanbu.train import schedule
from fanbu.types import CLASSIFYING, Context, Needs, Train

NEEDS = Needs(kind="updates")
LINEAR = True
SENSITIVITY = None
CONTROL, _FILE = "control:", "control.safetensors"


def contribute(
    specialist: Specialist, base: Model, context: Context, *,
    train: Train = Train(
        epochs=1, lr=0.05, head_lr=0.05, warmup=0.0, schedule="constant", patience=0, optimizer="SGD", weight_decay=0.0
    ),
) -> Contribution:  # fmt: skip
    """As ``fedavg``, by steps along g - c_i + c: c_i is the owner's control variate, c the centre's, both of the body.

    Afterwards c_i becomes c_i - c + (theta_base - theta) / (sum of learning rates), the mean of the gradients that it
    saw; what that changed crosses with the update. c_i is kept from one inner round to the next, and never crosses.

    Args:
        train: how an owner trains in one inner round; by SGD, since the displacement must be a sum of gradients.

    Raises:
        UsageError: another optimizer.

    Reference: Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated learning" (option II).
    """
    if train.optimizer != "SGD":
        raise UsageError(
            "bad-parameter", "scaffold: train.optimizer", allowed="SGD", got=train.optimizer, remedy="take SGD"
        )
    inner = context.inner
    own, common = (_controls(folder) for folder in ((inner.before, inner.said) if inner else (None, None)))
    sent = update("scaffold", specialist, base, context, train, "exact", _along(own, common))
    body = [n for n in sent.tensors if n in _trained(base)]
    start, far = load_network(base).state_dict(), _way(train, int(sent.meta["steps"]))
    grown = {n: _or_zero(own, n, start[n]) - _or_zero(common, n, start[n]) for n in body}
    for name in body:
        grown[name] += (start[name].float() - sent.tensors[name].float()) / far
    if inner and inner.after:
        inner.after.mkdir(parents=True, exist_ok=True)
        save_tensors(inner.after / _FILE, grown)
    change = {CONTROL + n: grown[n] - _or_zero(own, n, start[n]) for n in body}
    return replace(sent, tensors=Overlaid(sent.tensors, CONTROL, change))


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    scale: Annotated[float, Gt(0)] = 1.0,
) -> Model:  # fmt: skip
    """theta = theta_base + scale mean of delta_i, c = c_before + mean of what the c_i changed; c is told to all owners.

    Args:
        scale: the learning rate of the centre.

    Raises:
        FitError: an update's tensors are not the base's.
        IntegrityError: an update comes without its control variate, or with one of other shapes.
    """
    inner, names = context.inner, sorted(_trained(base))
    start = load_network(base).state_dict()
    for c in contributions:
        if any(layout(c.tensors, CONTROL + n)[0] != tuple(start[n].shape) for n in names):
            raise IntegrityError(
                "contribution-broken", f"the control variate of {c.domain} has other shapes than the base",
                allowed="those of the base", got=c.domain, remedy="ask its owner to send it again",
            )  # fmt: skip
    if inner and inner.telling:
        common = _controls(inner.said)
        told = {
            n: _or_zero(common, n, start[n])
            + torch.stack([c.tensors[CONTROL + n].float() for c in contributions]).mean(0)
            for n in names
        }
        inner.telling.mkdir(parents=True, exist_ok=True)
        save_tensors(inner.telling / _FILE, told)
    bare = [replace(c, tensors=Overlaid(c.tensors, CONTROL, {})) for c in contributions]
    made = provenance("scaffold", [base], context, scale=scale, domains=[c.domain for c in contributions])
    return taken(base, bare, out, context, How(scale, by_rows=False), made)


def _trained(base: Model) -> set[str]:
    """The parameters of the body, by the names that they have on disk."""
    network = load_network(base)
    head = set(map(id, final_layer(network).parameters())) if base.task in CLASSIFYING else set()
    return {n for n, p in network.named_parameters() if id(p) not in head} & set(base.tensors)


def _controls(folder: Path | None) -> Mapping[str, Tensor]:
    return load_tensors(folder / _FILE) if folder else {}


def _or_zero(controls: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return controls[name].float() if name in controls else torch.zeros(like.shape)


def _along(own: Mapping[str, Tensor], common: Mapping[str, Tensor]) -> Callable[[nn.Module], Pull] | None:
    """<c - c_i, theta>, whose gradient is c - c_i."""
    if not own and not common:
        return None

    def pull(network: nn.Module) -> Pull:
        named: dict[str, Any] = dict(network.named_parameters())
        known = [n for n in named if n in own or n in common]
        pushes = {n: (_or_zero(common, n, named[n]) - _or_zero(own, n, named[n])).to(named[n].device) for n in known}

        def along(moved: nn.Module) -> Tensor:
            parameters = dict(moved.named_parameters())
            return torch.stack([(parameters[n] * push).sum() for n, push in pushes.items()]).sum()

        return along

    return pull


def _way(train: Train, steps: int) -> float:
    """The sum of the learning rates of all steps."""
    batches = math.ceil(steps / train.accumulate)
    return train.lr * sum(schedule(train, k / steps) for k in range(0, steps, train.accumulate)) if batches else 1.0
