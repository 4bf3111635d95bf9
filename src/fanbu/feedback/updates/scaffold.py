"""SCAFFOLD: federated averaging whose owners are told, by control variates, where the others are going."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from fanbu.merging.task_vector import body_shapes
from fanbu.model import Model, provenance
from fanbu.tensors import Tensors, layout, load_tensors, read_rows, save_tensors
from fanbu.train import schedule
from fanbu.types import Context, Needs, Train

NEEDS = Needs(kind="updates")
LINEAR = True
SENSITIVITY = None
CONTROL, _FILE = "control:", "control.safetensors"


def contribute(
    specialist: Specialist, base: Model, context: Context, *,
    train: Train = Train(
        epochs=1, lr=0.02, head_lr=0.02, warmup=0.0, schedule="constant", patience=0, optimizer="SGD",
        weight_decay=0.0, clip=0.0,
    ),
) -> Contribution:  # fmt: skip
    """As ``fedavg``, by steps along g - c_i + c: c_i is the owner's control variate, c the centre's, both of the body.

    Afterwards c_i becomes c_i - c + (theta_base - theta) / (sum of learning rates), the mean of the gradients that it
    saw; what that changed crosses with the update. c_i is kept from one inner round to the next, and never crosses.

    Args:
        train: how an owner trains in one inner round; by plain SGD, since the displacement must be a sum of gradients.

    Raises:
        UsageError: another optimizer, or gradients that are clipped, or weights that decay.

    Reference: Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated learning" (option II).
    """
    if train.optimizer != "SGD" or train.clip or train.weight_decay:
        raise UsageError(
            "bad-parameter", "scaffold: train", allowed="optimizer: SGD, clip: 0, weight_decay: 0",
            got=f"{train.optimizer}, {train.clip}, {train.weight_decay}", remedy="leave these out",
        )  # fmt: skip
    inner = context.inner
    own, common = (_controls(folder) for folder in ((inner.before, inner.said) if inner else (None, None)))
    sent = update("scaffold", specialist, base, context, train, "exact", _along(own, common))
    start, far = Tensors(base.path), _way(train, int(sent.meta["steps"]))
    grown = {}
    for name in body_shapes(base):
        before = start[name].float()
        gone = (before - sent.tensors[name].float()) / far
        grown[name] = _or_zero(own, name, before) - _or_zero(common, name, before) + gone
    if inner and inner.after:
        inner.after.mkdir(parents=True, exist_ok=True)
        save_tensors(inner.after / _FILE, grown)
    change = {CONTROL + n: c - _or_zero(own, n, c) for n, c in grown.items()}
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
    inner, shapes = context.inner, body_shapes(base)
    for c in contributions:
        names = [n for n in shapes if CONTROL + n not in c.tensors]
        if names or any(layout(c.tensors, CONTROL + n)[0] != shape for n, shape in shapes.items()):
            raise IntegrityError(
                "contribution-broken", f"the control variate of {c.domain} is not one of the base's tensors",
                allowed="one for each, of its shape", got=f"without {names[:3]}" if names else "other shapes",
                remedy="ask its owner to send it again",
            )  # fmt: skip
    if inner and inner.telling:
        inner.telling.mkdir(parents=True, exist_ok=True)
        save_tensors(inner.telling / _FILE, _Told(shapes, contributions, inner.said))
    bare = [replace(c, tensors=Overlaid(c.tensors, CONTROL, {})) for c in contributions]
    made = provenance("scaffold", [base], context, scale=scale, domains=[c.domain for c in contributions])
    return taken(base, bare, out, context, How(scale, by_rows=False), made)


class _Told(Mapping[str, Tensor]):
    """c as it becomes, some rows at a time."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], contributions: Sequence[Contribution], said: Path | None
    ) -> None:
        self.shapes = shapes
        self.sent = [c.tensors for c in contributions]
        self.before = Tensors(said / _FILE) if said else None

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        shape = self.shapes[name]
        total = torch.zeros((stop - start, *shape[1:]))
        for tensors in self.sent:
            total.add_(read_rows(tensors, CONTROL + name, start, stop), alpha=1 / len(self.sent))
        return total if self.before is None else total.add_(self.before.borrowed(name, start, stop))

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.shapes[name], torch.float32

    def __getitem__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        return self.rows(name, 0, shape[0] if shape else 1).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


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
    """The sum of the learning rates over all batches, each of which gives its share of a step's gradient."""
    return train.lr * sum(schedule(train, k / steps) for k in range(steps)) / train.accumulate
