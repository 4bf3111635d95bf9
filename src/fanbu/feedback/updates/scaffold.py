"""SCAFFOLD: federated averaging whose owners are told, by control variates, where the others are going."""

from __future__ import annotations

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
from fanbu.feedback.updates._local import Learns, Pull, update
from fanbu.feedback.updates._server import How, joined, label_rows, said_number, taken
from fanbu.merging.factors import FORM as FACTORS
from fanbu.merging.summing import CONTROL
from fanbu.merging.task_vector import HEAD, LABEL, Overlaid, body_shapes, head_tensors, rows_of
from fanbu.model import Model, provenance
from fanbu.tensors import ByRows, Tensors, layout, load_tensors, read_rows, save_tensors
from fanbu.train import schedule
from fanbu.types import Context, Inner, Needs, Train

NEEDS = Needs(kind="updates", specialist=False)
LINEAR = True
SENSITIVITY = None
_FILE = "control.safetensors"


def contribute(
    specialist: Specialist, base: Model, context: Context, *,
    train: Train = Train(
        epochs=1, lr=0.02, head_lr=0.02, warmup=0.0, schedule="constant", patience=0, optimizer="SGD",
        weight_decay=0.0, clip=0.0,
    ),
    learns: Learns = Learns(),
) -> Contribution:  # fmt: skip
    """As ``fedavg``, by steps along g - c_i + c: c_i is the owner's control variate, c the centre's.

    Afterwards c_i becomes c_i - c + (theta_base - theta) / (sum of learning rates), the mean of the gradients that it
    saw; what that changed crosses with the update. c_i is kept from one inner round to the next, and never crosses.

    Args:
        train: how an owner trains in one inner round; by plain SGD, since the displacement must be a sum of gradients.
        learns: as in ``fedavg``; all layers or label rows alone, stored exactly.

    Raises:
        UsageError: another optimizer, or gradients that are clipped, or weights that decay.

    Reference: Karimireddy et al. 2020, "SCAFFOLD: stochastic controlled averaging for federated learning" (option II).
    """
    if train.optimizer != "SGD" or train.clip or train.weight_decay:
        raise UsageError(
            "bad-parameter", "scaffold: train", allowed="optimizer: SGD, clip: 0, weight_decay: 0",
            got=f"{train.optimizer}, {train.clip}, {train.weight_decay}", remedy="leave these out",
        )  # fmt: skip
    if learns.layers == "lora" or learns.store != "exact":
        raise UsageError(
            "bad-parameter", "scaffold: learns", allowed="layers: all or head, store: exact",
            got=f"{learns.layers}, {learns.store}", remedy="leave these out",
        )  # fmt: skip
    inner, labels = context.inner, specialist.domain.full_labels
    own, common = (_controls(folder) for folder in ((inner.before, inner.said) if inner else (None, None)))
    along = _along(own, common, head_tensors(base), labels if base.labels else ())
    sent = update("scaffold", specialist, base, context, train, learns, along)
    way, grown = _way(train, int(sent.meta["steps"])), {}
    for name, gone in _gone(base, sent, learns.layers).items():
        rate = train.head_lr if name.startswith(LABEL) else train.lr
        before = gone / (rate * way) if rate else gone  # which is zero: it stands still
        grown[name] = before + _or_zero(own, name, gone) - _or_zero(common, name, gone)
    if inner and inner.after:
        inner.after.mkdir(parents=True, exist_ok=True)
        save_tensors(inner.after / _FILE, grown)
    change = {CONTROL + n: c - _or_zero(own, n, c) for n, c in grown.items()}
    return replace(sent, tensors=Overlaid(sent.tensors, CONTROL, change))


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    scale: Annotated[float, Gt(0)] = 1.0, by_rows: bool = True,
) -> Model:  # fmt: skip
    """theta = theta_base + scale mean of delta_i, c = c_before + s mean of what the c_i changed; all owners are told c.

    s is the share of the owners who take part. For a label's row the means are over those who know the label.

    Args:
        scale: the learning rate of the centre.
        by_rows: whether an owner counts by its rows, which it says itself, in both means; else all count alike.

    Raises:
        FitError: an update's tensors are not the base's.
        IntegrityError: an update comes without its control variate, or with one of other shapes.
    """
    inner, bare = context.inner, [replace(c, tensors=Overlaid(c.tensors, CONTROL, {})) for c in contributions]
    shapes: dict[str, tuple[int, ...]] = {}
    for c, update_alone in zip(contributions, bare, strict=True):
        head = label_rows(update_alone, base)
        own = {} if c.meta.get("form") == FACTORS else body_shapes(base)
        if head:
            own |= dict.fromkeys([LABEL + label for label in head.labels], (head.weight_lh.shape[1] + 1,))
        sent = {n.removeprefix(CONTROL) for n in c.tensors if n.startswith(CONTROL)}
        wrong = sent ^ own.keys() or [n for n in own if not _is_control(layout(c.tensors, CONTROL + n), own[n])]
        if wrong:
            raise IntegrityError(
                "contribution-broken", f"the control variate of {c.domain} is not of what it trained",
                allowed="one for each tensor and label row, of its shape, in float32", got=sorted(wrong)[:3],
                remedy="ask its owner to send it again",
            )  # fmt: skip
        shapes |= own
    if inner and inner.telling:
        inner.telling.mkdir(parents=True, exist_ok=True)
        save_tensors(inner.telling / _FILE, _Told(shapes, contributions, inner, by_rows))
    domains = [c.domain for c in contributions]
    made = provenance("scaffold", [base], context, scale=scale, by_rows=by_rows, domains=domains)
    return taken(base, bare, out, context, How(scale, by_rows), made)


def _is_control(found: tuple[tuple[int, ...], torch.dtype], shape: tuple[int, ...]) -> bool:
    return found == (shape, torch.float32)


class _Told(ByRows):
    """c as it becomes, some rows at a time."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], contributions: Sequence[Contribution], inner: Inner, by_rows: bool,
    ) -> None:  # fmt: skip
        self.before, self.share = Tensors(inner.said / _FILE) if inner.said else None, inner.share
        known = {n: self.before.specs[n].shape for n in self.before} if self.before else {}
        self.shapes = {**known, **shapes}
        self.names = list(self.shapes)
        counted = [(said_number(c, "rows") if by_rows else 1, c.tensors) for c in contributions]
        self.sent = {n: [(k, t) for k, t in counted if CONTROL + n in t] for n in self.shapes}

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        total = torch.zeros((stop - start, *self.shapes[name][1:]))
        whole = sum(count for count, _ in self.sent[name])
        for count, tensors in self.sent[name]:
            total.add_(read_rows(tensors, CONTROL + name, start, stop), alpha=self.share * count / whole)
        known = self.before is not None and name in self.before
        return total.add_(self.before.borrowed(name, start, stop)) if self.before and known else total

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.shapes[name], torch.float32


def _controls(folder: Path | None) -> Mapping[str, Tensor]:
    return load_tensors(folder / _FILE) if folder else {}


def _or_zero(controls: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return controls[name].float() if name in controls else torch.zeros(like.shape)


def _along(
    own: Mapping[str, Tensor], common: Mapping[str, Tensor], heads: Sequence[str], labels: Sequence[str]
) -> Callable[[nn.Module], Pull] | None:
    """<c - c_i, theta>, whose gradient is c - c_i."""
    if not own and not common:
        return None

    def pull(learning: nn.Module) -> Pull:
        named: dict[str, Any] = dict(learning.named_parameters())
        pushes = {n: _apart(common, own, n, named[n]) for n in sorted({*own, *common}) if n in named}
        there = [n if n in named else n.rpartition(".")[2] for n in heads]  # the layer may learn alone
        if there:  # weight, and bias where there is one
            row = torch.zeros(named[there[0]].shape[1] + 1)
            push = torch.stack([_apart(common, own, LABEL + label, row) for label in labels])
            pushes |= dict(zip(there, (push[:, :-1], push[:, -1]), strict=False))
        pushes = {n: push.to(named[n].device) for n, push in pushes.items()}

        def along(moved: nn.Module) -> Tensor:
            parameters = dict(moved.named_parameters())
            return torch.stack([(parameters[n][: len(push)] * push).sum() for n, push in pushes.items()]).sum()

        return along

    return pull


def _apart(one: Mapping[str, Tensor], other: Mapping[str, Tensor], name: str, like: Tensor) -> Tensor:
    return _or_zero(one, name, like) - _or_zero(other, name, like)


def _gone(base: Model, sent: Contribution, layers: str) -> dict[str, Tensor]:
    """theta_base - theta of all that learned: by tensor, and by label."""
    start, found = Tensors(base.path), {}
    for name in body_shapes(base) if layers == "all" else ():
        found[name] = start[name].float() - sent.tensors[name].float()
    labels, names = sent.meta.get("labels") or (), head_tensors(base)
    if labels:
        before = rows_of(base).take(labels)
        weight = sent.tensors[HEAD + names[0]].float()
        bias = sent.tensors[HEAD + names[1]].float() if len(names) > 1 else before.bias_l
        found |= dict(
            zip([LABEL + n for n in labels], joined(before) - torch.cat([weight, bias[:, None]], 1), strict=True)
        )
    return found


def _way(train: Train, steps: int) -> float:
    """The sum of the learning rate's factors over all batches, each of which gives its share of a step's gradient."""
    return sum(schedule(train, k / steps) for k in range(steps)) / train.accumulate
