"""Fisher merging: the mean of the specialists' numbers, each weighted by how much it matters to its owner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fanbu.batches import collate, encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.merging.engine import Combine, Part, Stack, merge
from fanbu.merging.gram import own_texts
from fanbu.merging.least_squares import FISHER, FORM, MOMENT
from fanbu.merging.task_vector import TaskVector
from fanbu.model import Model, load_network, load_tokenizer, provenance
from fanbu.predict import limit
from fanbu.tensors import read_rows
from fanbu.types import Context, Needs

NEEDS = Needs(kind="statistics", same_architecture=True)
LINEAR = True
SENSITIVITY = None


def contribute(specialist: Specialist, base: Model, context: Context, *, rows: int = 128) -> Contribution:
    """F_i and F_i delta_i for each number, F_i the diagonal of the Fisher information; the label rows.

    F_i is the mean over at most ``rows`` of the owner's own texts of (d log p(y | x) / d theta)^2, example by example,
    with y drawn from the specialist's own prediction (for a causal model the next tokens). No label is used, no text
    crosses, and all of it only needs to be summed. Scaled to a mean of 1 over all numbers, so that owners count alike.

    Args:
        rows: how many texts are looked at; each costs a backward pass.

    Raises:
        FitError: the specialist's architecture is not the base's.
    """
    vector = TaskVector(specialist.model, base)
    network, tokenizer = load_network(specialist.model), load_tokenizer(specialist.model)
    squares = diagonal(network, tokenizer, own_texts(specialist.domain, rows), vector.body, context)
    mean = sum(float(f.sum()) for f in squares.values()) / max(1, sum(f.numel() for f in squares.values()))
    scaled = {n: f / max(mean, 1e-30) for n, f in squares.items()}
    meta = {"labels": list(specialist.model.labels), "form": FORM}
    return Contribution("statistics", specialist.domain.name, "fisher", Weighted(vector, scaled), meta=meta)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, floor: float = 1e-3
) -> Model:
    """theta = theta_base + sum of (F_i + floor) delta_i / sum of (F_i + floor), for each number.

    Args:
        floor: of F, whose mean over a specialist is 1: where nobody cares, this is the plain mean.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Matena & Raffel 2022, "Merging models with Fisher-weighted averaging".
    """

    def rule(stack: Stack) -> Combine:
        def combine(part: Part) -> Tensor:
            total, weight = torch.zeros_like(part.base), torch.zeros_like(part.base)
            for c in contributions:
                total.add_(read_rows(c.tensors, MOMENT + stack.name, part.start, part.stop).to(total.device))
                total.add_(read_rows(c.tensors, stack.name, part.start, part.stop).to(total.device), alpha=floor)
                weight.add_(read_rows(c.tensors, FISHER + stack.name, part.start, part.stop).to(total.device) + floor)
            return total.div_(weight)

        return combine

    made = provenance("fisher", [base], context, floor=floor, domains=[c.domain for c in contributions])
    return merge(base, contributions, out, context, rule, made)


class Weighted(Mapping[str, Tensor]):
    """delta, ``fisher:NAME`` F and ``moment:NAME`` F delta, each made when asked for."""

    def __init__(self, vector: TaskVector, fisher: Mapping[str, Tensor]) -> None:
        self.vector, self.fisher = vector, fisher
        self.names = sorted([*vector.names, *(kind + n for kind in (FISHER, MOMENT) for n in vector.body)])

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.vector.layout(name.removeprefix(FISHER).removeprefix(MOMENT))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        if name.startswith(FISHER):
            return self.fisher[name.removeprefix(FISHER)][start:stop]
        if name.startswith(MOMENT):
            own = name.removeprefix(MOMENT)
            return self.vector.rows(own, start, stop) * self.fisher[own][start:stop]
        return self.vector.rows(name, start, stop)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        shape, _ = self.layout(name)
        return self.rows(name, 0, shape[0]).reshape(shape).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def diagonal(
    network: Any, tokenizer: Any, texts: Sequence[str], names: set[str], context: Context
) -> dict[str, Tensor]:
    """The mean over texts of the squared gradient of log p(y | x), y drawn from p; one text at a time.

    The square of a batch's mean gradient would be another, smaller thing.
    """
    network.to(context.device).eval()
    chosen = {n: p for n, p in network.named_parameters() if n in names}
    sums = {n: torch.zeros_like(p) for n, p in chosen.items()}
    generator = torch.Generator().manual_seed(context.seeded("fisher"))
    sequences = encode(tokenizer, texts, limit(network, context))
    for number, sequence in enumerate(sequences, 1):
        logits = network(**collate([sequence], pad_id(tokenizer), context.device)).logits.float()
        rows = logits.reshape(-1, logits.shape[-1])
        drawn = torch.multinomial(rows.detach().softmax(1).cpu(), 1, generator=generator)[:, 0].to(rows.device)
        loss = functional.cross_entropy(rows, drawn, reduction="sum")
        found = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
        for name, gradient in zip(chosen, found, strict=True):
            if gradient is not None:
                sums[name].add_(gradient.square())
        context.progress("fisher", number, len(sequences))
    return {n: (s / max(1, len(sequences))).cpu() for n, s in sums.items()}
