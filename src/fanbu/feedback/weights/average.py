"""The uniform average of task vectors: the plainest way to feed weights back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import FitError
from fanbu.feedback.weights._task_vector import contribute, head_tensors
from fanbu.heads import Head, replace_rows
from fanbu.model import Model, provenance, save_model
from fanbu.tensors import Tensors
from fanbu.types import Context, Needs

__all__ = ["LINEAR", "NEEDS", "NEUTRAL", "SENSITIVITY", "absorb", "contribute"]

NEEDS = Needs(kind="weights", same_architecture=True)
LINEAR = True
SENSITIVITY = None
NEUTRAL = {"scale": 1.0}


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *, scale: float = 1.0
) -> Model:
    """theta = theta_base + scale / N * sum over the N specialists of delta_i; each domain's label rows as they came.

    Computed tensor by tensor in float32 and stored in the base's dtype. No data is needed.

    Args:
        scale: 1 is the uniform average of the weights.

    Raises:
        FitError: a contribution's tensors are not the base's.

    Reference: Wortsman et al. 2022, "Model soups"; Ilharco et al. 2023 (scale).
    """
    tensors = Tensors(base.path)
    heads = head_tensors(base)
    body = [name for name in tensors if name not in heads]
    for c in contributions:
        if set(body) != {n for n in c.tensors if not n.startswith("head:")}:
            raise FitError(
                "other-architecture", f"{c.domain} sent other tensors than the base has",
                allowed=f"{len(body)} tensors", got=len(c.tensors), remedy="leave this specialist out, or use distill",
            )  # fmt: skip
    result: dict[str, Tensor] = {}
    for number, name in enumerate(body):
        old = tensors[name]
        total = torch.stack([c.tensors[name].float() for c in contributions]).sum(0)
        result[name] = (old.float() + total * (scale / len(contributions))).to(old.dtype)
        context.progress("average", number + 1, len(body))
    config = dict(base.config)
    if heads:
        head = replace_rows(_head(base.labels, tensors, heads), [_sent_head(c) for c in contributions])
        result |= dict(zip(heads, (head.weight_lh, head.bias_l), strict=False))
        config["id2label"] = {str(i): label for i, label in enumerate(head.labels)}
        config["label2id"] = {label: i for i, label in enumerate(head.labels)}
    made = provenance("average", [base], context, scale=scale, domains=[c.domain for c in contributions])
    return save_model(out, config, result, base.path, made)


def _head(labels: Sequence[str], tensors: Tensors, names: Sequence[str]) -> Head:
    weight = tensors[names[0]]
    bias = tensors[names[1]] if len(names) > 1 else torch.zeros(len(labels))
    return Head(tuple(labels), weight, bias)


def _sent_head(c: Contribution) -> Head:
    parts = {n.rpartition(".")[2]: t for n, t in c.tensors.items() if n.startswith("head:")}
    labels = tuple(c.meta["labels"])
    return Head(labels, parts["weight"], parts.get("bias", torch.zeros(len(labels))))
