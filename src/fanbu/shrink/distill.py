"""Distillation: a small model learns what a larger one answers on the domain's texts, labelled or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from fanbu.batches import Sequences, encode, pad_id
from fanbu.data.augment import augmented
from fanbu.domain import Domain
from fanbu.errors import FitError, UsageError
from fanbu.heads import final_layer
from fanbu.losses import Divergence
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.objectives import Weigh, soft_language, taught_labels, taught_tokens
from fanbu.predict import features, limit, validation_value
from fanbu.shrink._teaching import kept, likely_tokens, with_relations
from fanbu.shrink._teaching import on_policy as written_anew
from fanbu.shrink._tune import open_for
from fanbu.train import BatchLoss, set_up
from fanbu.train import train as train_network
from fanbu.types import CLASSIFYING, Context, Train

CHANGES: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Extra:
    """What else a student is taught on, and by.

    ``augment``: so many variants of each text are added, which the teacher labels (``data.augment``). ``cache``: a
    folder for the teacher's answers; those that are there, of the same teacher to the same texts, are taken again.
    ``relations``: how much relations between tokens in the last layer count (``_teaching.with_relations``); for
    networks with separate queries, keys and values that read the same tokens. Causal models: ``top_k``: the teacher
    says so many next tokens once, before training, instead of all at each step, and D is the forward one at
    temperature 1; ``sampled``: these are drawn from its distribution (unbiased) instead of the likeliest;
    ``on_policy``: the share of texts whose second half the student writes anew each time.
    """

    augment: Annotated[int, Ge(0)] = 0
    cache: str = ""
    relations: Annotated[float, Ge(0)] = 0.0
    top_k: Annotated[int, Ge(0)] = 0
    sampled: bool = False
    on_policy: Annotated[float, Ge(0), Le(1)] = 0.0

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic reads it


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    teacher: str = "", divergence: Divergence = "forward", temperature: Annotated[float, Gt(0)] = 2.0,
    labels: Annotated[float, Ge(0), Le(1)] = 0.0, hidden: Annotated[float, Ge(0)] = 1.0,
    extra: Extra = Extra(), train: Train = Train(epochs=20, lr=3e-4, patience=6),
) -> Model:  # fmt: skip
    """Trains the parent, which keeps its size, on a teacher's answers to the training and unlabelled texts.

    L = (1 - labels) t^2 D + labels CE(y) + hidden |P h_S - h_T|^2 / |h_T|^2. D compares softmax(z_T / t) with
    softmax(z_S / t): ``forward`` KL(T || S), ``reverse`` KL(S || T), ``js`` the mean of both to their middle. h are
    pooled features and P a learned matrix that is thrown away afterwards. Student and teacher need the same labels
    and nothing else; causal models the same tokens (they have no third term, and where logits are what the head makes
    of hidden states, no tensor of tokens x vocabulary is held). Rows that pad a vocabulary take no part.

    Args:
        teacher: a model folder; empty: among the models that this one came from, the best on validation rows.
        divergence: D.
        temperature: t.
        labels: how much true labels (next tokens) count; texts without labels have the teacher alone.
        hidden: how much features count.
        extra: what else it is taught on, and by (``Extra``).
        train: how to train; the epoch that is best on validation rows is kept.

    Raises:
        UsageError: there is no teacher.
        FitError: it does not know the labels, or reads texts as other tokens.

    References: Hinton et al. 2015; Romero et al. 2015 (FitNets, features through a learned map); Agarwal et al. 2024
        (GKD, divergences).
    """
    _check(domain, labels, extra)
    asked = _Asked((divergence, temperature, labels), hidden, extra)
    network, tokenizer = open_for(parent, domain, context)
    chosen = _teacher(parent, domain, teacher, context)
    texts = [*domain.train.texts, *domain.unlabelled.texts]
    texts += augmented(texts, extra.augment, context.seeded("augment", domain.industry))
    sequences = encode(tokenizer, texts, limit(network, context))
    network.to(context.device)
    student = nn.ModuleDict({"network": network})
    taught = _by_labels if domain.task in CLASSIFYING else _by_tokens
    loss, head = taught(student, tokenizer, chosen, domain, texts, sequences, asked, context)
    history = train_network(
        student, [len(s) for s in sequences], loss, train, context, f"distill {domain.industry}", head=head,
        validate=(lambda _: validation_value(network, tokenizer, domain, context)) if len(domain.valid) else None,
    )  # fmt: skip
    made = provenance(
        "distill", [parent, chosen], context, domain=domain.name, divergence=divergence, temperature=temperature,
        labels=labels, hidden=hidden, extra={k: v for k, v in vars(extra).items() if k != "cache"}, train=vars(train),
    )  # fmt: skip
    metrics = {"steps": history.steps, **({"valid": max(history.values)} if history.values else {})}
    return save_network(network, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))


@dataclass(frozen=True)
class _Asked:
    """What the user asked for, in the words of ``shrink``."""

    weigh: Weigh
    hidden: float
    extra: Extra


Taught = tuple[BatchLoss, nn.Module | None]


def _by_labels(
    student: nn.ModuleDict, tokenizer: Any, teacher: Model, domain: Domain, texts: list[str], sequences: Sequences,
    asked: _Asked, context: Context,
) -> Taught:  # fmt: skip
    """A classifier's loss, and the layers that learn at the head's rate."""
    network, pad = student["network"], pad_id(tokenizer)
    named = {"teacher": teacher.digest, "labels": domain.full_labels, "texts": texts, "most": context.max_length}
    answers = kept(asked.extra.cache, "answers", named, lambda: _answers(teacher, domain, texts, context))
    h_nt, z_nl = answers["features"], answers["logits"]
    if asked.hidden:
        set_up(context, "distill", domain.industry)
        student["map"] = nn.Linear(final_layer(network).in_features, h_nt.shape[1]).to(context.device)
    loss = taught_labels(sequences, h_nt, z_nl, domain.train.labels or (), pad, asked.weigh, asked.hidden)
    if asked.extra.relations:
        whole, other = load_network(teacher).to(context.device).eval(), load_tokenizer(teacher)
        theirs = encode(other, texts, limit(network, context))
        loss = with_relations(loss, asked.extra.relations, network, whole, (sequences, theirs), (pad, pad_id(other)))
    return loss, nn.ModuleList([final_layer(network), *([student["map"]] if asked.hidden else [])])


def _by_tokens(
    student: nn.ModuleDict, tokenizer: Any, teacher: Model, domain: Domain, texts: list[str], sequences: Sequences,
    asked: _Asked, context: Context,
) -> Taught:  # fmt: skip
    """A causal model's loss."""
    _same_tokens(teacher, domain, tokenizer, texts[:64])
    network, pad = student["network"], pad_id(tokenizer)
    if asked.extra.top_k:
        targets = likely_tokens(asked.extra.cache, teacher, texts, asked.extra.top_k, asked.extra.sampled, context)
        return soft_language(sequences, targets, pad, context.device, asked.weigh[2]), None
    whole = load_network(teacher).to(context.device).eval()
    loss = taught_tokens(sequences, whole, network, pad, asked.weigh)
    if asked.extra.relations:
        loss = with_relations(loss, asked.extra.relations, network, whole, (sequences, sequences), (pad, pad))
    if asked.extra.on_policy:
        loss = written_anew(loss, asked.extra.on_policy, network, sequences, tokenizer.eos_token_id)
    return loss, None


def _check(domain: Domain, labels: float, extra: Extra) -> None:
    wrong = {
        "top_k and on_policy are for causal models": domain.task != "causal-lm" and (extra.top_k or extra.on_policy),
        "sampled needs top_k": extra.sampled and not extra.top_k,
        "what the student writes has no true next tokens, so labels cannot count": extra.on_policy and labels,
        "answers that were kept know nothing of what the student writes, nor of relations": extra.top_k
        and (extra.on_policy or extra.relations),
    }
    if said := [why for why, is_so in wrong.items() if is_so]:
        raise UsageError("bad-parameter", f"distill: {said[0]}", remedy="leave one out")


def _teacher(parent: Model, domain: Domain, named: str, context: Context) -> Model:
    if named:
        return open_model(named)
    known = [m for m in map(open_model, context.forebears) if _can_teach(m, domain) and m.digest != parent.digest]
    if not known:
        raise UsageError(
            "no-teacher", "distill: no model that this one came from knows the domain", allowed="a model folder",
            got="", remedy="name one under `teacher`, or put `finetune` before what makes the model smaller",
        )  # fmt: skip
    # by the domain's own rows: the large model may have those of many domains
    values = [validation_value(*open_for(m, domain, context), domain, context) for m in known]
    return known[values.index(max(values))]


def _can_teach(model: Model, domain: Domain) -> bool:
    return model.task == domain.task and (domain.task == "causal-lm" or set(domain.full_labels) <= set(model.labels))


def _answers(teacher: Model, domain: Domain, texts: Sequence[str], context: Context) -> dict[str, Tensor]:
    """The teacher's pooled ``features`` [texts, hidden], and its ``logits`` over the domain's labels."""
    if not _can_teach(teacher, domain):
        raise FitError(
            "teacher-labels", f"the teacher {teacher.path} does not know all labels of {domain.name}",
            allowed=sorted(domain.full_labels), got=sorted(teacher.labels)[:20],
            remedy="fine-tune it on the domain first",
        )  # fmt: skip
    network, tokenizer = load_network(teacher), load_tokenizer(teacher)
    h_nt = features(network, tokenizer, texts, context)
    with torch.inference_mode():
        z_nl = final_layer(network).cpu()(h_nt)
    own = [teacher.labels.index(label) for label in domain.full_labels]
    return {"features": h_nt.clone(), "logits": z_nl[:, own].clone()}


def _same_tokens(teacher: Model, domain: Domain, tokenizer: Any, texts: Sequence[str]) -> None:
    other = load_tokenizer(teacher)
    if not _can_teach(teacher, domain) or any(
        tokenizer(text)["input_ids"] != other(text)["input_ids"] for text in texts
    ):
        raise FitError(
            "other-tokenizer", f"the teacher {teacher.path} reads texts as other tokens", allowed="the same tokens",
            remedy="distil before the vocabulary is made smaller",
        )  # fmt: skip
