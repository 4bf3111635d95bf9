"""What the centre makes of owners' updates: one change of every tensor and label row, streamed from disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import IntegrityError
from fanbu.heads import Head, sent_head
from fanbu.merging.engine import Combine, Linear, Part, Stack, merge, stacks
from fanbu.merging.geometry import gram
from fanbu.merging.robust import Aggregate, bounded, chosen, middle
from fanbu.merging.task_vector import HEAD, LABEL, Overlaid, head_tensors, rows_of
from fanbu.model import Model, Provenance
from fanbu.tensors import Shards, Tensors, layout
from fanbu.types import Context

_MOST = 10**7  # rows or steps that an owner may claim


@dataclass(frozen=True)
class How:
    """How many changes become one: see ``fedavg.absorb``."""

    scale: float = 1.0
    by_rows: bool = True
    aggregate: Aggregate = "mean"
    liars: float = 0.3
    clip: float = 0.0

    @property
    def by_coordinates(self) -> bool:
        """Whether each number is looked at by itself."""
        return self.aggregate in {"median", "trimmed"}


def taken(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, how: How, made: Provenance,
    memory: Memory | None = None, each: Callable[[Contribution], float] | None = None,
) -> Model:  # fmt: skip
    """theta = theta_base + scale * the changes as one; ``memory`` makes of that what is added instead.

    A label row changes by what those who know the label say. ``each`` gives a factor of an owner's whole change.
    """
    ordered = sorted(contributions, key=lambda c: c.domain)
    heads = [h for h in (label_rows(c, base) for c in ordered) if h]
    weights, factors = _weights(base, ordered, heads, context, how)
    if each:
        factors = [f * each(c) for f, c in zip(factors, ordered, strict=True)]

    def rule(stack: Stack) -> Combine:
        def by_coordinates(part: Part) -> Tensor:
            return middle([d * f for d, f in zip(part.deltas, factors, strict=True)], how.aggregate, how.liars).mul_(
                how.scale
            )

        combine: Combine = (
            by_coordinates
            if how.by_coordinates
            else Linear([how.scale * w * f for w, f in zip(weights, factors, strict=True)])
        )
        return combine if memory is None else lambda part: memory(stack.name, part, combine(part))

    if memory:
        shapes = {s.name: s.shape for s in stacks(base, ordered, context) if s.touched}
        known = {LABEL + label: (head.weight_lh.shape[1] + 1,) for head in heads for label in head.labels}
        memory.open({**shapes, **known}, context)
    if heads:
        ordered = _with_head(base, ordered, _one_head(base, heads, weights, factors, how, memory))
    new = merge(base, ordered, out, context, rule, made)
    if memory:
        memory.close()
    return new


def said_number(c: Contribution, what: str) -> int:
    """How many ``rows`` an owner says that it trained on, or ``steps`` that it made. Raises IntegrityError where that
    is no such number."""
    number = c.meta.get(what)
    if not isinstance(number, int) or isinstance(number, bool) or not 0 < number <= _MOST:
        raise IntegrityError(
            "contribution-broken", f"the update of {c.domain} does not say of how many {what} it is",
            allowed=f"1 to {_MOST}", got=number, remedy="ask its owner to send it again",
        )  # fmt: skip
    return number


def _weights(
    base: Model, ordered: Sequence[Contribution], heads: Sequence[Head], context: Context, how: How
) -> tuple[list[float], list[float]]:
    """Of each owner: its weight, all summing to 1, and the factor that bounds its length."""
    rows = torch.tensor([said_number(c, "rows") for c in ordered], dtype=torch.float64)
    even = torch.ones(len(ordered), dtype=torch.float64)
    weights = (rows if how.by_rows and how.aggregate == "mean" else even) / len(ordered)
    weights, factors = weights / weights.sum(), even
    if how.clip or how.aggregate not in {"mean", "median", "trimmed"}:
        products = torch.zeros(len(ordered), len(ordered), dtype=torch.float64)
        for stack in stacks(base, ordered, context):
            products += gram(stack, deltas=True) if stack.touched else 0
        products += _products(base, heads) if heads else 0
        factors = bounded(products, how.clip)
        if how.aggregate != "mean":
            weights = chosen(products * factors[:, None] * factors, how.aggregate, how.liars)
    return weights.tolist(), factors.tolist()


def label_rows(c: Contribution, base: Model) -> Head | None:
    """An owner's label rows; None for a base without labels. Raises IntegrityError for rows that are not the base's."""
    names, labels = head_tensors(base), c.meta.get("labels")
    sent = {n for n in c.tensors if n.startswith(HEAD)}
    known = isinstance(labels, list) and bool(labels) and set(map(str, labels)) <= set(base.labels)
    width = Tensors(base.path).specs[names[0]].shape[1] if names else 0
    rows = layout(c.tensors, HEAD + names[0])[0] if names and HEAD + names[0] in sent else ()
    if sent != {HEAD + n for n in names} or (names and not (known and rows == (len(labels or ()), width))):
        raise IntegrityError(
            "contribution-broken", f"the label rows of {c.domain} are not the base's", allowed=f"{names} of its labels",
            got=f"{sorted(sent)} of {str(labels)[:60]}", remedy="ask its owner to send its update again",
        )  # fmt: skip
    if not names:
        return None
    parts = {n.rpartition(".")[2]: c.tensors[HEAD + n] for n in names}
    return sent_head(replace(c, tensors={"bias": torch.zeros(len(labels or ())), **parts}))


def _changes(base: Model, heads: Sequence[Head]) -> tuple[Head, list[Tensor]]:
    """The base's rows that the owners know, and what each changed in them: [its labels, hidden + 1]."""
    start = rows_of(base)
    known = start.take(sorted({label for head in heads for label in head.labels}, key=start.labels.index))
    rows = [start.take(head.labels) for head in heads]
    return known, [joined(head) - joined(row) for head, row in zip(heads, rows, strict=True)]


def joined(head: Head) -> Tensor:
    """[labels, hidden + 1]: rows with their biases."""
    return torch.cat([head.weight_lh.float(), head.bias_l.float()[:, None]], 1)


def _products(base: Model, heads: Sequence[Head]) -> Tensor:
    """Inner products of the changes of label rows; a label that one of two does not know adds nothing."""
    known, changes = _changes(base, heads)
    spread = torch.zeros(len(heads), len(known.labels), known.weight_lh.shape[1] + 1, dtype=torch.float64)
    for number, (head, change) in enumerate(zip(heads, changes, strict=True)):
        spread[number, [known.labels.index(label) for label in head.labels]] = change.double()
    flat = spread.flatten(1)
    return flat @ flat.T


def _one_head(
    base: Model, heads: Sequence[Head], weights: Sequence[float], factors: Sequence[float], how: How,
    memory: Memory | None,
) -> Head:  # fmt: skip
    known, changes = _changes(base, heads)
    total = torch.zeros(len(known.labels), known.weight_lh.shape[1] + 1)
    for place, label in enumerate(known.labels):
        rows = [
            (w, f * change[head.labels.index(label)])
            for head, change, w, f in zip(heads, changes, weights, factors, strict=True)
            if label in head.labels
        ]
        if how.by_coordinates:
            total[place] = middle([row for _, row in rows], how.aggregate, how.liars)
        elif share := sum(w for w, _ in rows):
            total[place] = torch.stack([w / share * row for w, row in rows]).sum(0)
    before, total = joined(known), how.scale * total
    if memory:
        total = torch.stack(
            [
                memory(LABEL + label, Part(0, len(row), row, []), change)
                for label, row, change in zip(known.labels, before, total, strict=True)
            ]
        )
    made = before + total
    return Head(known.labels, made[:, :-1], made[:, -1])


def _with_head(base: Model, ordered: Sequence[Contribution], head: Head) -> list[Contribution]:
    """The same with all label rows in the first of them, as if it had sent these."""
    parts = dict(zip([HEAD + n for n in head_tensors(base)], (head.weight_lh, head.bias_l), strict=False))
    first, *others = ordered
    meta = {**first.meta, "labels": list(head.labels)}
    all_rows = replace(first, tensors=Overlaid(first.tensors, HEAD, parts), meta=meta)
    return [all_rows, *(replace(c, tensors=Overlaid(c.tensors, HEAD, {})) for c in others)]


class Memory:
    """An optimizer at the centre and what it remembers of each number: float32 tensors by kind and name, one inner
    round's read while the next one's are written; of label rows one tensor a label, [hidden + 1].

    ``rule`` is given a name, the tensors by kind (zeros at first), which it changes in place, and the change that the
    owners ask for, and returns the one that is made.
    """

    def __init__(self, kinds: Sequence[str], rule: Callable[[str, dict[str, Tensor], Tensor], Tensor]) -> None:
        self.kinds, self.rule = kinds, rule
        self.before: Tensors | None = None
        self.after: Shards | None = None
        self.resting: list[str] = []  # what nobody changes in this inner round

    def open(self, shapes: Mapping[str, tuple[int, ...]], context: Context) -> None:
        """Before the first change; ``shapes`` are of all that may change."""
        inner = context.inner
        self.before = Tensors(inner.before) if inner and inner.before else None
        if inner and inner.after:
            inner.after.mkdir(parents=True, exist_ok=True)
            layouts = {f"{k}:{n}": (s, torch.float32) for k in self.kinds for n, s in shapes.items()}
            known = self.before.specs if self.before else {}
            self.resting = [n for n in known if n not in layouts]
            self.after = Shards(inner.after, {**layouts, **{n: (known[n].shape, torch.float32) for n in self.resting}})

    def __call__(self, name: str, part: Part, change: Tensor) -> Tensor:
        """What some rows change by."""
        kept = {kind: self._read(f"{kind}:{name}", part) for kind in self.kinds}
        made = self.rule(name, kept, change)
        if self.after:
            for kind, rows in kept.items():
                self.after.put(f"{kind}:{name}", part.start, rows)
        return made

    def _read(self, name: str, part: Part) -> Tensor:
        if self.before is None or name not in self.before:
            return torch.zeros_like(part.base)
        rows = self.before.borrowed(name, part.start, part.stop)  # the file's own memory: not to be written
        return torch.empty_like(part.base).copy_(rows)

    def close(self) -> None:
        """Once all rows are there."""
        if self.after and self.before:
            for name in self.resting:
                self.after.put(name, 0, self.before[name])
        if self.after:
            self.after.close()
