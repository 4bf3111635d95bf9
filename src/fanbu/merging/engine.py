"""The streaming engine: reads checkpoints row by row, combines them in float32, writes shards while it computes.

A method is a rule: given a ``Stack`` (one tensor of the base with what each specialist changed in it), it may look at
all its parts first, and returns the function that combines one part. Only what a rule holds itself is in memory.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import FitError, UsageError
from fanbu.heads import Head, replace_rows
from fanbu.merging.dials import Dial, depth_of, level
from fanbu.merging.factors import Factored
from fanbu.merging.sources import Mean, Own, Source, source_of
from fanbu.merging.task_vector import HEAD, body_shapes, head_tensors
from fanbu.model import Model, Provenance, save_model
from fanbu.tensors import Shards, Tensors, check_finite, chunks
from fanbu.types import Context

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Part:
    """Rows ``start`` to ``stop`` of one tensor, in float32: the base's, and what each specialist changed in them.

    All may be changed in place, and all are gone once the next part is asked for.
    """

    start: int
    stop: int
    base: Tensor
    deltas: list[Tensor]


@dataclass(frozen=True)
class Stack:
    """One tensor of the base with what the specialists changed in it; they come in the order of their names."""

    name: str
    shape: tuple[int, ...]
    domains: tuple[str, ...]
    owners: tuple[int, ...]
    layers: int
    base: Tensors
    sources: tuple[Source, ...]
    device: torch.device
    context: Context

    def parts(self, share: int = 1) -> Iterator[Part]:
        """All rows, some at a time; with ``share`` only one row in so many, a few from everywhere."""
        spans = [(start, start + -(-(stop - start) // share)) for start, stop in chunks(self.shape)]
        # the same memory for all parts: fresh pages for each would cost more than the arithmetic
        room = self._room(max((stop - start for start, stop in spans), default=0))
        for start, stop in spans:
            yield self._fill(start, stop, [r[: stop - start] for r in room])

    def blended(self, weights: Sequence[float]) -> Iterator[Part]:
        """Parts whose base is already (1 - sum w) base + sum of w_i theta_i = base + sum of w_i delta_i.

        One pass over each input, where differences take three.
        """
        spans, rest = list(chunks(self.shape)), 1.0 - math.fsum(weights)
        room = self._room(max((stop - start for start, stop in spans), default=0), 2)
        for start, stop in spans:
            total, own = (r[: stop - start] for r in room)
            total.copy_(self.base.borrowed(self.name, start, stop)).mul_(rest)  # 0 times NaN is NaN
            for source, weight in zip(self.sources, weights, strict=True):
                assert isinstance(source, Own)
                total.add_(source.whole(self.name, start, stop, own), alpha=weight)
            if not bool(total.sum().isfinite()):
                self._fill(start, stop, self._room(stop - start))  # it says whose fault it is
            yield Part(start, stop, total, [])

    @property
    def blends(self) -> bool:
        """Whether all sources are weights of sixteen bits, like the base's and the result's.

        Float32 rounds ``blended`` otherwise than differences, and what nobody changed would not stay bit for bit; in
        sixteen bits it does.
        """
        kinds = [self.base.specs[self.name].torch_dtype, stored_dtype(self.context)]
        return all(k is None or k.itemsize == 2 for k in kinds) and all(
            isinstance(s, Own) and s.bits(self.name) == 16 for s in self.sources
        )

    def whole(self) -> Part:
        """The whole tensor at once, for rules that need it (declare it in ``merge``)."""
        rows = self.shape[0] if self.shape else 1
        return self._fill(0, rows, self._room(rows))

    def _room(self, rows: int, tensors: int | None = None) -> list[Tensor]:
        shape = (rows, *self.shape[1:])
        return [torch.empty(shape, device=self.device) for _ in range(tensors or 1 + len(self.sources))]

    def _fill(self, start: int, stop: int, room: list[Tensor]) -> Part:
        """Raises IntegrityError where one of the inputs holds NaN or Inf."""
        base, *deltas = room
        base.copy_(self.base.borrowed(self.name, start, stop))
        for domain, source, delta in zip(self.domains, self.sources, deltas, strict=True):
            source.rows(self.name, start, stop, base, delta)
            if not bool(delta.sum().isfinite()):
                check_finite(self.name, base, self.base.specs[self.name].file)
                check_finite(self.name, delta, domain)
        return Part(start, stop, base, deltas)

    def factors(self) -> list[tuple[Tensor, Tensor]] | None:
        """(b [rows, r], a [r, columns]) of each specialist, delta = b a, where all are low-rank (LoRA); else None."""
        if not self.matrix:
            return None
        found = [s.factors(self.name, self.device) for s in self.sources if isinstance(s, Factored)]
        kept = [pair for pair in found if pair]
        return kept if len(kept) == len(self.sources) else None

    @property
    def touched(self) -> bool:
        """Whether any specialist may have changed it."""
        return any(not isinstance(s, (Factored, Mean)) or s.touches(self.name) for s in self.sources)

    def level(self, dial: Dial) -> float:
        """The value of a dial for this tensor."""
        return level(dial, self.name, self.layers)

    def levels(self, dial: Dial, by_domain: Mapping[str, Dial]) -> list[float]:
        """The value for each specialist: its own dial where it has one, else the common one; what stands for several
        owners counts as often."""
        each = zip(self.domains, self.owners, strict=True)
        return [count * self.level(by_domain.get(domain, dial)) for domain, count in each]

    def generator(self, domain: str, start: int) -> torch.Generator:
        """Random numbers for one specialist and the part that begins at row ``start``, whatever the order."""
        seed = self.context.seeded(domain, self.name, start)
        return torch.Generator(device=self.device).manual_seed(seed)

    @property
    def matrix(self) -> bool:
        """Whether it is a matrix that multiplies (neither a vector nor a table of embeddings)."""
        return len(self.shape) == 2 and min(self.shape) > 1 and "embed" not in self.name and "wte" not in self.name


Combine = Callable[[Part], Tensor]
Rule = Callable[[Stack], Combine]
Whole = int | Callable[[Stack], int]


def merge(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, rule: Rule, made: Provenance, *,
    whole: Whole = 0, more: Callable[[Path], Mapping[str, str]] | None = None,
) -> Model:  # fmt: skip
    """theta = theta_base + rule's delta, for every tensor of the body; each domain's label rows as they came.

    Args:
        rule: returns what is added to the base's rows, in float32.
        whole: how many float32 copies of a whole matrix a rule holds for each specialist, or a function that gives the
            bytes that it holds for a stack; 0 where it holds parts. It
            decides how many tensors are worked on at once within ``context.memory``.
        more: writes further files into the new model's folder, and returns the sha256 of each.

    Raises:
        FitError: a contribution's tensors are not the base's.
        IntegrityError: NaN or Inf in an input.
    """
    tensors = Tensors(base.path)
    heads = head_tensors(base)
    dtype = stored_dtype(context)
    layouts = {}
    for name, spec in tensors.specs.items():
        kind = spec.torch_dtype
        layouts[name] = (spec.shape, dtype if dtype and kind.is_floating_point else kind)
    config = dict(base.config)
    if dtype:
        config["dtype"] = str(dtype).removeprefix("torch.")
        config.pop("torch_dtype", None)
    head = head_of(base, contributions)
    if head:
        config["id2label"] = {str(i): label for i, label in enumerate(head.labels)}
        config["label2id"] = {label: i for i, label in enumerate(head.labels)}
        for name, value in zip(heads, (head.weight_lh, head.bias_l), strict=False):
            layouts[name] = (tuple(value.shape), layouts[name][1])
    work = stacks(base, contributions, context)

    def fill(folder: Path) -> dict[str, str]:
        shards = Shards(folder, layouts, shard_bytes(sum(s.bytes for s in tensors.specs.values())))
        if head:
            for name, value in zip(heads, (head.weight_lh, head.bias_l), strict=False):
                shards.put(name, 0, value)
        for name in set(layouts) - {s.name for s in work} - set(heads):
            shards.put(name, 0, tensors[name])

        def put(stack: Stack, part: Part, delta: Tensor | None) -> None:
            shards.put(stack.name, part.start, part.base if delta is None else part.base.add_(delta))

        run(work, rule, put, context, made, whole)
        return {**shards.close(), **(more(folder) if more else {})}

    return save_model(out, config, fill, base.path, made)


def shard_bytes(total: int) -> int:
    """About eight files, each of 512 MiB to 4 GiB: a file is made durable and hashed while the next is computed."""
    return max(2**29, min(2**32, total // 8))


def stacks(base: Model, contributions: Sequence[Contribution], context: Context) -> list[Stack]:
    """One Stack for every tensor of numbers of the body, in the order of the files; specialists come by name."""
    tensors, shapes = Tensors(base.path), body_shapes(base)
    body = list(shapes)
    ordered = sorted(contributions, key=lambda c: c.domain)
    sources = tuple(source_of(c, shapes) for c in ordered)
    for c, source in zip(ordered, sources, strict=True):
        different = set(body) ^ set(source.names)
        if different:
            raise FitError(
                "other-architecture", f"{c.domain} sent other tensors than the base has",
                allowed=f"{len(body)} tensors", got=sorted(different)[:6],
                remedy="leave this specialist out, or use distill",
            )  # fmt: skip
    devices = devices_of(context)
    layers = depth_of(body)
    body.sort()
    return [
        Stack(
            n, tensors.specs[n].shape, tuple(c.domain for c in ordered), tuple(c.owners for c in ordered), layers,
            tensors, sources, devices[i % len(devices)], context,
        )
        for i, n in enumerate(body)
    ]  # fmt: skip


def run(
    work: Sequence[Stack], rule: Rule, use: Callable[[Stack, Part, Tensor | None], None], context: Context,
    made: Provenance, whole: Whole = 0,
) -> None:  # fmt: skip
    """Applies a rule to all stacks, several at a time, and hands each part's result to ``use``: what the rule adds to
    the part's base, or None where the part's base is the result already.

    Each tensor is one thread's work, with one thread inside: the number of threads changes no bit.
    """

    def one(stack: Stack) -> None:
        # what nobody changed is copied, bit for bit (x + 0.0 is not x where x is -0.0)
        stack = stack if stack.touched else replace(stack, domains=(), owners=(), sources=())
        combine = rule(stack) if stack.sources else None
        ready = combine is None or (isinstance(combine, Linear) and stack.blends)
        parts = stack.blended(combine.weights) if ready and isinstance(combine, Linear) else stack.parts()
        for part in parts:
            use(stack, part, None if ready or combine is None else combine(part))

    before, threads = torch.get_num_threads(), context.threads or len(os.sched_getaffinity(0))
    running: dict[Future[None], int] = {}
    done = 0
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                for stack in work:
                    need = _held(stack, whole) if stack.matrix else 0
                    while running and (len(running) >= threads or sum(running.values()) + need > context.memory):
                        done += _finished(running, FIRST_COMPLETED)
                        context.progress(made.method, done, len(work))
                    running[pool.submit(one, stack)] = need
                while running:
                    done += _finished(running, FIRST_COMPLETED)
                    context.progress(made.method, done, len(work))
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(before)


def _held(stack: Stack, whole: Whole) -> int:
    return whole(stack) if callable(whole) else whole * (len(stack.sources) + 1) * 4 * math.prod(stack.shape)


def _finished(running: dict[Future[None], int], when: str) -> int:
    ready, _ = wait(running, return_when=when)
    for future in ready:
        del running[future]
        future.result()
    return len(ready)


def devices_of(context: Context) -> list[torch.device]:
    """Where tensors are combined: all accelerators of ``cuda``, or the one device that is named."""
    if context.device == "cuda":
        return [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    return [torch.device(context.device)]


def stored_dtype(context: Context) -> torch.dtype | None:
    """What merged tensors are stored in; None as the base's. UsageError where the name is not known."""
    if context.dtype is None:
        return None
    if context.dtype not in DTYPES:
        raise UsageError("dtype", "dtype", allowed=DTYPES, got=context.dtype, remedy="take one of these")
    dtype: torch.dtype = getattr(torch, context.dtype)
    return dtype


@dataclass(frozen=True)
class Linear:
    """sum over i of w_i delta_i; the engine knows a shorter way to it where checkpoints lie beside the base."""

    weights: Sequence[float]

    def __call__(self, part: Part) -> Tensor:
        """The change of some rows."""
        total = part.deltas[0].mul_(self.weights[0])
        for delta, weight in zip(part.deltas[1:], self.weights[1:], strict=True):
            total.add_(delta, alpha=weight)
        return total


def head_of(base: Model, contributions: Sequence[Contribution]) -> Head | None:
    """The base's label rows with those of the contributions in their place; None where the model has no labels."""
    names, tensors = head_tensors(base), Tensors(base.path)
    if not names:
        return None
    weight = tensors[names[0]]
    bias = tensors[names[1]] if len(names) > 1 else torch.zeros(len(base.labels))
    sent = [_sent_head(c) for c in contributions]
    return replace_rows(Head(base.labels, weight, bias), [head for head in sent if head])


def _sent_head(c: Contribution) -> Head | None:
    parts: dict[str, Any] = {n.rpartition(".")[2]: c.tensors[n] for n in c.tensors if n.startswith(HEAD)}
    if not parts:
        return None
    labels = tuple(c.meta["labels"])
    return Head(labels, parts["weight"], parts.get("bias", torch.zeros(len(labels))))
