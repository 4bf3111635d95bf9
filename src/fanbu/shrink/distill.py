"""Distillation: a small model learns what a larger one answers on the domain's texts, labelled or not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from fanbu.batches import encode, pad_id
from fanbu.data.augment import augmented
from fanbu.domain import Domain
from fanbu.errors import FitError, UsageError
from fanbu.heads import final_layer
from fanbu.losses import Divergence
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.objectives import taught_labels, taught_tokens
from fanbu.predict import features, limit, validation_value
from fanbu.shrink._tune import open_for
from fanbu.tensors import load_tensors, save_tensors
from fanbu.train import BatchLoss, set_up
from fanbu.train import train as train_network
from fanbu.types import Context, Train, digest

CHANGES: frozenset[str] = frozenset()


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    teacher: str = "", divergence: Divergence = "forward", temperature: Annotated[float, Gt(0)] = 2.0,
    labels: Annotated[float, Ge(0), Le(1)] = 0.0, hidden: Annotated[float, Ge(0)] = 1.0,
    augment: Annotated[int, Ge(0)] = 0,
    cache: str = "", train: Train = Train(epochs=20, lr=5e-4, patience=6, dropout=0.0),
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
        augment: so many variants of each text are added, which the teacher labels (``data.augment``).
        cache: a folder for the teacher's answers; those that are there, of the same teacher to the same texts, are
            taken again.
        train: how to train; the epoch that is best on validation rows is kept.

    Raises:
        UsageError: there is no teacher.
        FitError: it does not know the labels, or reads texts as other tokens.

    References: Hinton et al. 2015; Romero et al. 2015 (FitNets, features through a learned map); Agarwal et al. 2024
        (GKD, divergences).
    """
    network, tokenizer = open_for(parent, domain, context)
    chosen = _teacher(parent, domain, teacher, context)
    texts = [*domain.train.texts, *domain.unlabelled.texts]
    texts += augmented(texts, augment, context.seeded("augment", domain.name))
    sequences = encode(tokenizer, texts, limit(network, context))
    network.to(context.device)
    student, weigh = nn.ModuleDict({"network": network}), (divergence, temperature, labels)
    loss: BatchLoss
    if domain.task == "text-classification":
        h_nt, z_nl = _kept(cache, chosen, domain, texts, context)
        if hidden:
            set_up(context, "distill", domain.name)
            student["map"] = nn.Linear(final_layer(network).in_features, h_nt.shape[1]).to(context.device)
        loss = taught_labels(sequences, h_nt, z_nl, domain.train.labels or (), pad_id(tokenizer), weigh, hidden)
        head = nn.ModuleList([final_layer(network), *([student["map"]] if hidden else [])])
    else:
        _same_tokens(chosen, domain, tokenizer, texts[:64])
        taught = load_network(chosen).to(context.device).eval()
        loss, head = taught_tokens(sequences, taught, network, pad_id(tokenizer), weigh), None
    history = train_network(
        student, [len(s) for s in sequences], loss, train, context, f"distill {domain.name}", head=head,
        validate=(lambda _: validation_value(network, tokenizer, domain, context)) if len(domain.valid) else None,
    )  # fmt: skip
    made = provenance(
        "distill", [parent, chosen], context, domain=domain.name, divergence=divergence, temperature=temperature,
        labels=labels, hidden=hidden, augment=augment, train=vars(train),
    )  # fmt: skip
    metrics = {"steps": history.steps, **({"valid": max(history.values)} if history.values else {})}
    return save_network(network, tokenizer, out, replace(made, metrics=metrics, data={domain.name: domain.digest}))


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


def _kept(
    cache: str, teacher: Model, domain: Domain, texts: Sequence[str], context: Context
) -> tuple[torch.Tensor, torch.Tensor]:
    """``_answers``, kept on disk under a name that says whose they are, to what, and read how."""
    if not cache:
        return _answers(teacher, domain, texts, context)
    asked = {"teacher": teacher.digest, "labels": domain.full_labels, "texts": list(texts), "most": context.max_length}
    path = Path(cache) / f"answers-{digest(asked)[:32]}.safetensors"
    if not path.exists():
        h_nt, z_nl = _answers(teacher, domain, texts, context)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"features": h_nt, "logits": z_nl})
    known = load_tensors(path)
    return known["features"], known["logits"]


def _answers(
    teacher: Model, domain: Domain, texts: Sequence[str], context: Context
) -> tuple[torch.Tensor, torch.Tensor]:
    """The teacher's pooled features [texts, hidden], and its logits over the domain's labels."""
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
    return h_nt.clone(), z_nl[:, [teacher.labels.index(label) for label in domain.full_labels]].clone()


def _same_tokens(teacher: Model, domain: Domain, tokenizer: Any, texts: Sequence[str]) -> None:
    other = load_tokenizer(teacher)
    if not _can_teach(teacher, domain) or any(
        tokenizer(text)["input_ids"] != other(text)["input_ids"] for text in texts
    ):
        raise FitError(
            "other-tokenizer", f"the teacher {teacher.path} reads texts as other tokens", allowed="the same tokens",
            remedy="distil before the vocabulary is made smaller",
        )  # fmt: skip
