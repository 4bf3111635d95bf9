"""Adversarial domain adaptation: labelled rows train a network that cannot tell an industry's owners apart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional

from fanbu.batches import Sequences, collate, encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Specialist, target_rows
from fanbu.feedback.samples.multitask import contribute as labelled_rows
from fanbu.heads import check_labels_known, final_layer
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.predict import limit, without_head
from fanbu.train import BatchLoss
from fanbu.train import train as train_network
from fanbu.types import CLASSIFYING, Context, Needs, Train

NEEDS = Needs(kind="samples", specialist=False, texts=True, labels=True, probe=True, target=True, tasks=CLASSIFYING)
LINEAR = False
SENSITIVITY = None
_HIDDEN = 128


def contribute(specialist: Specialist, base: Model, context: Context) -> Contribution:
    """The domain's training rows: texts with their labels."""
    return labelled_rows(specialist, base, context)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    adversary: Annotated[float, Ge(0)] = 0.1, train: Train = Train(epochs=3, lr=1.5e-4),
) -> Model:  # fmt: skip
    """Trains the base on CE over the owners' rows, against an adversary that tells owners and targets apart.

    L = CE(labels) + CE(owner | R(h)) over pooled features h of the owners' rows and the targets' texts, where R passes
    h on and its gradient back times -``adversary`` (2 / (1 + e^(-10 p)) - 1), with p the part of training that is
    done. It sees everything, and is the baseline of `adapt` where rows may be shared.

    Args:
        adversary: how strongly features are kept from telling owners apart.
        train: how to train; there is no early stopping, since the centre has no validation rows.

    Raises:
        FitError: no probe row belongs to a target.
        IntegrityError: a row's label is not in the base's head.

    Reference: Ganin et al. 2016, "Domain-adversarial training of neural networks".
    """
    targets = target_rows("dann", context, [c.domain for c in contributions])
    rows = [row for c in contributions for row in c.rows]
    check_labels_known(base, sorted({row["label"] for row in rows}))
    texts = [row["text"] for row in rows] + [context.probe.rows[i].text for some in targets.values() for i in some]
    owner = [k for k, c in enumerate(contributions) for _ in c.rows]
    owner += [len(contributions) + k for k, some in enumerate(targets.values()) for _ in some]
    network, tokenizer = load_network(base), load_tokenizer(base)
    network.to(context.device)
    sequences = encode(tokenizer, texts, limit(network, context))
    torch.manual_seed(context.seeded("dann"))
    guess = nn.Sequential(
        nn.Linear(final_layer(network).in_features, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, max(owner) + 1)
    )
    student = nn.ModuleDict({"network": network, "adversary": _Adversary(guess)})
    labels = [base.labels.index(row["label"]) for row in rows]
    steps = train.epochs * -(-len(texts) // train.batch_size)
    loss = _against(sequences, labels, owner, pad_id(tokenizer), context.device, (adversary, steps))
    history = train_network(
        student, [len(s) for s in sequences], loss, train, context, "dann", head=final_layer(network)
    )
    made = provenance(
        "dann", [base], context, train=vars(train), adversary=adversary, domains=[c.domain for c in contributions],
        targets=sorted(targets), steps=history.steps,
    )  # fmt: skip
    return save_network(network, tokenizer, out, made)


class _Adversary(nn.Module):
    """Guesses the owner; ``seen`` counts batches and is kept in checkpoints."""

    def __init__(self, guess: nn.Module) -> None:
        super().__init__()
        self.guess = guess
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, h_bh: Tensor, most: float, steps: int) -> Tensor:
        strength = most * (2 / (1 + torch.exp(-10 * self.seen / max(steps, 1))) - 1)
        self.seen += 1
        reversed_bh = -strength * h_bh + ((1 + strength) * h_bh).detach()  # the value is h, the gradient -strength
        found: Tensor = self.guess(reversed_bh)
        return found


def _against(
    sequences: Sequences, labels: Sequence[int], owner: Sequence[int], pad: int, device: str, how: tuple[float, int]
) -> BatchLoss:
    truth, owners = torch.tensor(labels, device=device), torch.tensor(owner, device=device)

    def loss(student: Any, rows: Sequence[int]) -> Tensor:
        network = student["network"]
        with without_head(network):
            h = network(**collate([sequences[i] for i in rows], pad, device)).logits.float()
        total = functional.cross_entropy(student["adversary"](h, *how), owners[list(rows)])
        known = [k for k, i in enumerate(rows) if i < len(truth)]
        if known:
            z = final_layer(network)(h[known]).float()
            total = total + functional.cross_entropy(z, truth[[rows[k] for k in known]]) * len(known) / len(rows)
        return total

    return loss
