"""How long a round may take: what its stages train on and predict, at speeds measured on this machine."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from fanbu.catalogue import method
from fanbu.domain import Domain
from fanbu.effort import asked, public, read_by, taken, trained, training
from fanbu.model import Model
from fanbu.recipe import Recipe
from fanbu.recipe_parts import Step
from fanbu.types import CLASSIFYING, Context, Progress, Train, silent

_BATCHES = 6  # that are timed, after one to warm up
_ENOUGH = 30.0  # seconds of timing; a large model is judged by fewer batches
_TRIAL = 192  # texts that a trial of `search` reads (shrink/_space.py, which imports torch)


@dataclass(frozen=True)
class Speed:
    """Seconds for a row that is trained on or predicted, and for opening a model; the peak of memory in bytes."""

    train: float
    predict: float
    open: float
    peak_bytes: int


@dataclass(frozen=True)
class Work:
    """One stage's work: rows trained on (over all epochs), rows predicted, models opened or written, other seconds."""

    stage: str
    batches: int = 0
    trained: float = 0
    predicted: float = 0
    opened: int = 0
    other: float = 0.0

    def seconds(self, speed: Speed) -> float:
        """How long it may take."""
        return self.trained * speed.train + self.predicted * speed.predict + self.opened * speed.open + self.other


def work(recipe: Recipe, domains: Mapping[str, Domain], model: Model) -> list[Work]:
    """What a round does, stage by stage, in its order."""
    feeding = [d for d in domains.values() if d.role == "feeds"]
    classes = feeding[0].task in CLASSIFYING
    found = []
    if classes:
        rows = sum(len(d.train) + len(d.valid) + min(asked(recipe, d), 500) for d in feeding)
        fits = sum(_fit(len(d.train), len(d.labels), model) for d in feeding)
        found.append(Work("incumbent", predicted=rows, opened=2 + 2 * len(feeding), other=fits))
    for d in feeding:
        found += [_shrink(step, d, model) for step in recipe.shrink]
    for number, step in enumerate(recipe.ways):
        before = "" if number < len(recipe.feedback) else "reference "
        found.append(_feed(before + step.called, recipe, step, feeding))
        if step.tree and not before:  # beside it, what it makes without the tree
            flat = step.model_copy(update={"tree": None})
            found.append(_feed(f"reference {step.method} without the tree", recipe, flat, feeding))
    tested = sum(len(d.test) for d in domains.values())
    own = sum(len(d.test) for d in feeding)
    models = 2 + len(recipe.ways) - len(recipe.feedback)
    found.append(Work("evaluate", predicted=models * tested + own, opened=models * len(domains) + 3 * len(feeding)))
    if "tfidf" in recipe.references:
        found.append(Work("reference tfidf", other=sum(2 + 1e-4 * len(d.train) * len(d.labels) for d in feeding)))
    return found


def _fit(rows: int, labels: int, model: Model) -> float:
    """Seconds of the logistic regressions of a probe, by rule of thumb."""
    return 1e-7 * rows * labels * int(model.config.get("hidden_size") or 768)


def _shrink(step: Step, d: Domain, model: Model) -> Work:
    """A way down; those that learn from a teacher read variants of texts too, and the teacher reads them once."""
    plan, given = training(step, "shrink"), method(step.method, "shrink").check(step.arguments)
    name = f"shrink {step.method} {d.name}"
    if plan is None:
        return Work(name, predicted=0, opened=2)
    taught, finalists, trials = step.method in {"distill", "search"}, given.get("finalists", 1), given.get("trials", 0)
    variants = given["extra"].augment if step.method == "distill" else given.get("augment", 0)
    rows = (1 + variants) * (len(d.train) + (len(d.unlabelled) if taught else 0))
    batches, learned = trained(plan, rows)
    kept = step.arguments.get("layers") if isinstance(step.arguments.get("layers"), int) else None
    all_layers = int(model.config.get("num_hidden_layers") or 0)
    smaller = kept / all_layers if kept and all_layers else 1.0
    epochs = batches / max(math.ceil(rows / plan.batch_size), 1)
    predicted = smaller * epochs * len(d.valid) + (rows if taught else 0)
    return Work(name, finalists * batches, finalists * smaller * learned,
                finalists * predicted + trials * min(len(d.train), _TRIAL), 1 + finalists)  # fmt: skip


def _feed(name: str, recipe: Recipe, step: Step, feeding: Sequence[Domain]) -> Work:
    """A way back, as often as it is taken: it trains on the probe set, or on labelled rows where those cross, or at
    each owner, or not at all."""
    plan, parts, predicted = training(step), read_by(recipe, step, feeding), 0
    if method(step.method, "feedback").needs.probe:
        predicted = (
            sum(parts) + sum(public(recipe, feeding[0].task)) * len(feeding) + sum(2 * len(d.valid) for d in feeding)
        )
    done = [trained(plan, part) for part in parts] if plan else []
    batches, learned = sum(b for b, _ in done), sum(t for _, t in done)
    n = taken(step, feeding)
    return Work(name, n * batches, n * learned, n * predicted, n * (2 + 2 * len(feeding)))


class _EnoughError(Exception):
    """Enough was timed."""


def measure(recipe: Recipe, domains: Mapping[str, Domain], model: Model, progress: Progress = silent) -> Speed:
    """Speeds of the recipe's model on this machine, by a few batches of the domains' own texts; nothing is kept."""
    from fanbu.batches import encode, pad_id
    from fanbu.heads import final_layer, open_classifier
    from fanbu.model import load_network, load_tokenizer
    from fanbu.objectives import labelled, language
    from fanbu.predict import class_logits, limit, token_losses

    context = recipe.context()
    task = next(iter(domains.values())).task
    classes = task in CLASSIFYING
    for _ in range(2):  # the first one imports libraries too
        started = time.monotonic()
        network = open_classifier(model, context, recipe.pooling, task) if classes else load_network(model)
        tokenizer = load_tokenizer(model)
        opened = time.monotonic() - started
    plans = [*(training(s) for s in recipe.feedback), *(training(s, "shrink") for s in recipe.shrink)]
    plan = next(filter(None, plans), Train())
    texts = sample(domains, plan.batch_size * _BATCHES)
    sequences = encode(tokenizer, texts, limit(network, context))
    pad = pad_id(tokenizer)
    network.to(context.device)
    loss = labelled(sequences, [0] * len(texts), pad, context.device) if classes else None
    head = final_layer(network) if classes else None
    times = _train(network, sequences, loss or language(sequences, pad, context.device), head, plan, context, progress)
    started = time.monotonic()
    (class_logits if classes else token_losses)(network, tokenizer, texts, replace(context, progress=progress))
    predicted = time.monotonic() - started
    rows = len(sequences) / math.ceil(len(sequences) / plan.batch_size)
    return Speed(sum(times) / len(times) / rows, predicted / len(texts), opened, _peak(context.device))


def sample(domains: Mapping[str, Domain], count: int) -> list[str]:
    """Texts of all domains, spread evenly over their rows."""
    found = []
    for d in domains.values():
        texts = d.train.texts or d.test.texts
        share = max(1, math.ceil(count / len(domains)))
        found += list(texts[:: max(1, len(texts) // share)])[:share]
    return found


def _train(
    network: Any, sequences: Sequence[list[int]], loss: Any, head: Any, plan: Train, context: Context,
    progress: Progress,
) -> list[float]:  # fmt: skip
    """Seconds of each batch after the first, by the real loop."""
    from fanbu.train import train

    times: list[float] = []
    began = time.monotonic()

    def note(what: str, done: int, total: int) -> None:
        times.append(time.monotonic())
        progress(what, done, total)
        if len(times) > 2 and times[-1] - began > _ENOUGH:
            raise _EnoughError

    batches = math.ceil(len(sequences) / plan.batch_size)
    brief = replace(plan, epochs=1 + math.ceil(2 / batches), max_steps=batches + 1, lr=0.0, head_lr=0.0, accumulate=1)
    try:
        train(network, [len(s) for s in sequences], loss, brief, replace(context, progress=note), "timing", head=head)
        times.pop()  # the last call only says that training is over
    except _EnoughError:
        pass
    return [b - a for a, b in pairwise(times)]


def _peak(device: str) -> int:
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
