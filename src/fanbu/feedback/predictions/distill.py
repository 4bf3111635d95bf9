"""Knowledge distillation: many specialists teach one large model through soft labels on a probe set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from fanbu.batches import encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Specialist
from fanbu.errors import UsageError
from fanbu.feedback.predictions._balance import balanced
from fanbu.feedback.predictions._doubts import believed
from fanbu.feedback.predictions._features import seen, shown
from fanbu.feedback.predictions._panel import check_probe, class_panel, made_for, token_panel, variants
from fanbu.feedback.predictions._targets import token_targets, union_targets
from fanbu.heads import final_layer
from fanbu.model import Model, copy_model, load_network, load_tokenizer, provenance, save_network
from fanbu.objectives import related, soft_labelled, soft_language
from fanbu.predict import limit
from fanbu.train import train as train_network
from fanbu.types import CLASSIFYING, Context, Needs, Train

NEEDS = Needs(kind="predictions", probe=True)
LINEAR = False
SENSITIVITY = None


def needs_with(arguments: Mapping[str, Any]) -> Needs:
    """Texts can be guessed from features, so these need that texts may cross."""
    return replace(NEEDS, texts=bool(arguments.get("features")))


def contribute(
    specialist: Specialist, base: Model, context: Context, *, top_k: Annotated[int, Ge(1)] = 64,
    mass: Annotated[float, Gt(0), Le(1)] = 0.98, augment: Annotated[int, Ge(0)] = 0,
    features: Annotated[float, Ge(0)] = 0.0,
) -> Contribution:  # fmt: skip
    """What the specialist says on the probe rows of its own industry and on those of nobody's.

    A classifier sends calibrated probabilities of its own labels, whatever its architecture and vocabulary, mixed
    with the base's by the trust that validation rows give either (``_panel.class_panel``); a causal model its
    next tokens, trusted where its validation loss is below the base's. No text and no label crosses.

    Args:
        top_k: how many labels, or next tokens, are said at most.
        mass: labels are said, likeliest first, until their probabilities come to this.
        augment: so many variants of each of the domain's probe texts are answered too (``_panel.variants``).
        features: with more than 0 a classifier sends its pooled features of the probe rows too, a byte a number. Texts
            can be guessed from features, so they cross only where texts may.

    Raises:
        UsageError: variants or features of a causal model.
    """
    if (augment or features) and specialist.domain.task == "causal-lm":
        raise UsageError(
            "bad-parameter", "distill makes variants of texts, and learns from features, for classifiers only",
            allowed="augment: 0 and features: 0", got=f"{augment} and {features}", remedy="leave them out",
        )  # fmt: skip
    if specialist.domain.task in CLASSIFYING:
        tensors, meta = class_panel(specialist, base, context, top_k, mass, augment)
        tensors |= shown(specialist, context) if features else {}
    else:
        tensors, meta = token_panel(specialist, base, context, top_k)
    return Contribution("predictions", specialist.domain.name, "distill", tensors, meta=meta)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: Path, context: Context, *,
    train: Train = Train(epochs=6, lr=2e-4), top_k: Annotated[int, Ge(1)] = 64, augment: Annotated[int, Ge(0)] = 0,
    features: Annotated[float, Ge(0)] = 0.0, by_size: Annotated[float, Ge(0), Le(1)] = 0.0,
    by_difficulty: Annotated[float, Ge(0), Le(1)] = 0.0, weights: Mapping[str, Annotated[float, Gt(0)]] = {},
) -> Model:  # fmt: skip
    """Trains the base on T(d/l | x) = q(d | x) p_d(l | x), by KL(T || softmax(z)) over its whole union head.

    q(d | x) is 1 for the domain that a probe row is known to come from, else what the base itself thinks. p_d is the
    specialist's panel where it is trusted at all. Everywhere else p_d is the base's own answer (teacher zero), which
    holds the base where nobody knows better; where nobody teaches at all, the base comes back bit for bit. A teacher
    whose answers agree with the base's no more than chance would is not heard (``_doubts.believed``), and the record
    names it. By the chain rule this KL is KL(q || domains) + sum_d q(d) KL(p_d || labels of d). A causal model learns
    the next-token distribution of the row's specialist, or its own before training.

    Args:
        train: how to train; there is no early stopping, since the centre has no labelled rows.
        top_k: how many next tokens of teacher zero are kept (causal models).
        augment: how many variants of each text were answered.
        features: how much it counts that texts lie to each other as they do in a specialist's features
            (``objectives.related``), whatever their width.
        by_size: 0: all texts count alike; 1: all domains do, whatever their number of texts (classifiers).
        by_difficulty: how much more a domain counts whose specialist the base is further from (classifiers).
        weights: how much a text of a domain counts, 1 where it is not named (classifiers).

    Raises:
        UsageError: weights for a causal model.
        FitError: the probe set is empty, or a panel does not belong to it.

    Reference: Hinton et al. 2015; teachers with their own label spaces as in Vongkulbhisal et al. 2019 (UHC).
    """
    check_probe("distill", contributions, context)
    if weights and base.task not in CLASSIFYING:
        raise UsageError(
            "bad-parameter", "distill weighs texts by domain for classifiers only", allowed="weights: {}",
            got=dict(weights), remedy="leave them out",
        )  # fmt: skip
    network, tokenizer = load_network(base), load_tokenizer(base)
    network.to(context.device)
    teachers, told = believed(base, network, tokenizer, contributions, context, augment)
    if not teachers:  # training on its own answers could only drift
        return copy_model(base, out)
    texts = context.probe.texts + [t for c in teachers for t in variants(context, c.domain, augment)]
    sequences = encode(tokenizer, texts, limit(network, context))
    pad, head = pad_id(tokenizer), None
    if base.task in CLASSIFYING:
        targets = union_targets(base, network, tokenizer, teachers, context, augment)
        origin = [row.domain for row in context.probe.rows]
        origin += [c.domain for c in teachers for _ in range(made_for(context, c.domain, augment))]
        counted = balanced(network, tokenizer, texts, origin, targets, context, by_size, by_difficulty, weights)
        loss = soft_labelled(sequences, targets, pad, context.device, counted)
        if features:
            loss = related(sequences, targets, pad, context.device, *seen(teachers, context), features, counted)
        head = final_layer(network)
    else:
        answers = token_targets(network, tokenizer, sequences, teachers, context, top_k)
        loss = soft_language(sequences, answers, pad, context.device)
    history = train_network(network, [len(s) for s in sequences], loss, train, context, "distill", head=head)
    made = provenance(
        "distill", [base], context, train=vars(train), augment=augment, features=features, by_size=by_size,
        by_difficulty=by_difficulty, weights=dict(weights), steps=history.steps, **told,
    )  # fmt: skip
    return save_network(network, tokenizer, out, made)
