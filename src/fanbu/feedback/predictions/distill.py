"""Knowledge distillation: many specialists teach one large model through soft labels on a probe set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fanbu.batches import Sequences, encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.errors import FitError, UsageError
from fanbu.feedback.predictions._panel import asked, class_panel, heard, heard_tokens, token_panel, variants
from fanbu.heads import check_labels_known, domains_of, final_layer
from fanbu.model import Model, copy_model, load_network, load_tokenizer, provenance, save_network
from fanbu.objectives import soft_labelled, soft_language
from fanbu.predict import class_logits, limit, top_tokens
from fanbu.train import train as train_network
from fanbu.types import Context, Needs, Train

NEEDS = Needs(kind="predictions", probe=True)
LINEAR = False
SENSITIVITY = None


def contribute(
    specialist: Specialist, base: Model, context: Context, *, top_k: Annotated[int, Ge(1)] = 64,
    mass: Annotated[float, Gt(0), Le(1)] = 0.98, augment: Annotated[int, Ge(0)] = 0,
) -> Contribution:  # fmt: skip
    """What the specialist says on the probe rows of its own domain and on those of nobody's.

    A classifier sends calibrated probabilities of its own labels, whatever its architecture and vocabulary, mixed
    with the base's by the trust that validation rows give either (``_panel.class_panel``); a causal model its
    next tokens, trusted where its validation loss is below the base's. No text and no label crosses.

    Args:
        top_k: how many labels, or next tokens, are said at most.
        mass: labels are said, likeliest first, until their probabilities come to this.
        augment: so many variants of each of the domain's probe texts are answered too (``_panel.variants``).

    Raises:
        UsageError: variants for a causal model.
    """
    if augment and specialist.domain.task == "causal-lm":
        raise UsageError(
            "bad-parameter", "distill makes variants of texts for classifiers only", allowed="augment: 0", got=augment,
            remedy="leave it out",
        )  # fmt: skip
    if specialist.domain.task == "text-classification":
        tensors, meta = class_panel(specialist, base, context, top_k, mass, augment)
    else:
        tensors, meta = token_panel(specialist, base, context, top_k)
    return Contribution("predictions", specialist.domain.name, "distill", tensors, meta=meta)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    train: Train = Train(epochs=3, lr=2e-4), top_k: Annotated[int, Ge(1)] = 64, augment: Annotated[int, Ge(0)] = 0,
) -> Model:  # fmt: skip
    """Trains the base on T(d/l | x) = q(d | x) p_d(l | x), by KL(T || softmax(z)) over its whole union head.

    q(d | x) is 1 for the domain that a probe row is known to come from, else what the base itself thinks. p_d is the
    specialist's panel where it is trusted at all. Everywhere else p_d is the base's own answer (teacher zero), which
    holds the base where nobody knows better; where nobody teaches at all, the base comes back bit for bit. By the
    chain rule this KL is KL(q || domains) + sum_d q(d) KL(p_d || labels of d). A causal model learns the next-token
    distribution of the row's specialist, or its own before training.

    Args:
        train: how to train; there is no early stopping, since the centre has no labelled rows.
        top_k: how many next tokens of teacher zero are kept (causal models).
        augment: how many variants of each text were answered.

    Raises:
        FitError: the probe set is empty, or a panel does not belong to it.

    Reference: Hinton et al. 2015; teachers with their own label spaces as in Vongkulbhisal et al. 2019 (UHC).
    """
    if not context.probe.rows:
        raise FitError("no-probe-set", "distill needs a probe set", remedy="name one in the recipe under `probe`")
    for c in contributions:
        if c.meta["probe"] != context.probe.digest:
            raise FitError(
                "other-probe-set", f"the panel of {c.domain} was made on another probe set",
                allowed=context.probe.digest[:12], got=str(c.meta["probe"])[:12], remedy="ask its owner again",
            )  # fmt: skip
    teachers = [c for c in contributions if c.meta["trust"] > 0]
    if not teachers:  # training on its own answers could only drift
        return copy_model(base, out)
    network, tokenizer = load_network(base), load_tokenizer(base)
    network.to(context.device)
    texts = context.probe.texts + [t for c in teachers for t in variants(context, c.domain, augment)]
    sequences = encode(tokenizer, texts, limit(network, context))
    pad, head = pad_id(tokenizer), None
    if base.task == "text-classification":
        targets = union_targets(base, network, tokenizer, teachers, context, augment)
        loss = soft_labelled(sequences, targets, pad, context.device)
        head = final_layer(network)
    else:
        answers = token_targets(network, tokenizer, sequences, teachers, context, top_k)
        loss = soft_language(sequences, answers, pad, context.device)
    history = train_network(network, [len(s) for s in sequences], loss, train, context, "distill", head=head)
    made = provenance(
        "distill", [base], context, train=vars(train), augment=augment,
        teachers={c.domain: c.meta["trust"] for c in teachers},
        silent=[c.domain for c in contributions if c not in teachers], steps=history.steps,
    )  # fmt: skip
    return save_network(network, tokenizer, out, made)


def union_targets(
    base: Model, network: Any, tokenizer: Any, teachers: Sequence[Contribution], context: Context, augment: int = 0
) -> Tensor:
    """T [probe rows and each teacher's variants, union labels] in float16, rows summing to 1."""
    probe, groups = context.probe.rows, domains_of(base.labels)
    answers = {c.domain: asked(context, c.domain) for c in teachers}
    taught = {i for d, rows in answers.items() for i in rows if probe[i].domain == d}
    targets = torch.zeros(len(probe), len(base.labels))
    # the base is asked only where a row's own specialist does not answer for it
    rest = [i for i in range(len(probe)) if i not in taught]
    z = class_logits(network, tokenizer, [probe[i].text for i in rest], context)
    for i, logits in zip(rest, z, strict=True):
        known = groups.get(probe[i].domain or "")
        if known:  # the domain is known: all mass to its labels
            targets[i, known] = logits[known].softmax(0)
        else:
            targets[i] = logits.softmax(0)
    more = []
    for c in teachers:
        check_labels_known(base, c.meta["labels"])
        columns = [base.labels.index(label) for label in c.meta["labels"]]
        rows = torch.tensor(answers[c.domain], dtype=torch.long)
        made = len(variants(context, c.domain, augment))
        p = heard(c, len(rows) + made)
        own = torch.tensor([probe[i].domain == c.domain for i in answers[c.domain]], dtype=torch.bool)
        mass = torch.where(own, 1.0, targets[rows][:, groups[c.domain]].sum(1))
        targets[rows[:, None], torch.tensor(columns)[None]] = mass[:, None] * p[: len(rows)]
        more.append(torch.zeros(made, len(base.labels)))
        more[-1][:, columns] = p[len(rows) :]
    targets = torch.cat([targets, *more])
    return (targets / targets.sum(1, keepdim=True)).half()


def token_targets(
    network: Any, tokenizer: Any, sequences: Sequences, teachers: Sequence[Contribution], context: Context, top_k: int
) -> list[tuple[Tensor, Tensor]]:
    """For each probe row the likeliest next tokens and their probabilities: of its specialist, else of the base."""
    taught: dict[int, tuple[Tensor, Tensor]] = {}
    probe = context.probe.rows
    for c in teachers:
        rows = asked(context, c.domain)
        for i, part in zip(rows, heard_tokens(c, [len(sequences[i]) - 1 for i in rows]), strict=True):
            if probe[i].domain == c.domain:
                taught[i] = part
    rest = [i for i in range(len(probe)) if i not in taught]
    own = top_tokens(network, tokenizer, [probe[i].text for i in rest], context, top_k)
    taught |= dict(zip(rest, own, strict=True))
    return [taught[i] for i in range(len(probe))]
