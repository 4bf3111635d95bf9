"""What an owner does in an inner round: train the large model on its own rows, and send what that changed."""

from __future__ import annotations

import hashlib
import shutil
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fanbu.batches import encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import UsageError
from fanbu.feedback.updates._feedback import with_feedback
from fanbu.heads import check_labels_known, domains_of, final_layer, get_head, set_head
from fanbu.merging.adapter import adapter_contribution
from fanbu.merging.factors import FORM as FACTORS
from fanbu.merging.low_rank import save_adapter, with_adapters
from fanbu.merging.store import Store, task_vector
from fanbu.merging.task_vector import HEAD, TaskVector, body_shapes, head_tensors, rows_of
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.objectives import labelled, language
from fanbu.predict import features, limit
from fanbu.private import Mechanism, cost, train_privately
from fanbu.tensors import Tensors, load_tensors, raw_bytes, save_tensors
from fanbu.train import BatchLoss, set_up
from fanbu.train import train as train_network
from fanbu.types import CLASSIFYING, Context, Privacy, Train, digest

LOCAL = Train(epochs=1, lr=1e-4, warmup=0.0, schedule="constant", patience=0)
Pull = Callable[[nn.Module], Tensor]  # what is added to the loss of a network
Layers = Literal["all", "lora", "head"]
Rivals = Literal["industry", "all"]
_FEATURES = "features.safetensors"


@dataclass(frozen=True)
class Learns:
    """What of the large model an owner trains, and what of that crosses.

    ``layers``: ``all``; ``lora``: low-rank factors of the linear layers (W + 2 B A with B from zeros, A drawn anew in
    each inner round), of which only these cross, and whose products the centre adds up exactly, and the label rows;
    ``head``: the label rows alone, on features that are computed once. ``rank`` is of the factors, which want about ten
    times the learning rate of ``all``. ``store``: ``exact``, or delta's matrices in eight bits or one bit a number
    (``int8``, ``1bit``), or the largest hundredth of them (``topk``); what that leaves out is added to the owner's next
    update. ``rivals`` are the labels that an owner's own compete with: ``all`` that the large model knows, so that it
    learns where a text is from, too, or those of its ``industry``; they are others', and do not move. ``privacy`` is
    what may be told of any one row (``private.train_privately``); for ``lora`` and ``head``.
    """

    layers: Layers = "all"
    rank: Annotated[int, Ge(1)] = 8
    store: Store = "exact"
    rivals: Rivals = "all"
    privacy: Privacy = field(default_factory=Privacy)

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic reads it; a misspelt key is refused

    def labels(self, domain: Domain, base: Model) -> tuple[str, ...]:
        """The domain's own labels, then those that they compete with."""
        industries = domains_of(base.labels)
        others = base.labels if self.rivals == "all" else [base.labels[i] for i in industries[domain.industry]]
        return (*domain.full_labels, *(n for n in others if n not in domain.full_labels))


def update(
    name: str, specialist: Specialist, base: Model, context: Context, train: Train, learns: Learns,
    pull: Callable[[nn.Module], Pull] | None = None,
) -> Contribution:  # fmt: skip
    """delta = theta - theta_base after training on the domain's rows; of the label head its own rows, as they became.

    The labels of others compete with the domain's own, and do not move: an owner has no rows of them, and would only
    unlearn them. ``pull`` is given what learns before it does.

    meta: ``rows`` it was trained on, ``steps`` that were made, and what noise was added in them, if any.
    """
    domain = specialist.domain
    if learns.layers != "all" and learns.store != "exact":
        raise UsageError(
            "bad-parameter", f"{name}: learns: store", allowed="exact, where factors or label rows alone cross",
            got=learns.store, remedy="leave it out",
        )  # fmt: skip
    if learns.privacy.epsilon and (learns.layers == "all" or pull):
        raise UsageError(
            "bad-parameter", f"{name}: learns: privacy",
            allowed="layers: lora or head, and fedavg or its kin with momentum", got=f"layers: {learns.layers}",
            remedy="choose one of these, or leave privacy out",
        )  # fmt: skip
    if domain.task in CLASSIFYING:
        check_labels_known(base, domain.full_labels)
    fit = _Fit(name, domain, base, context, train, pull, learns)
    if learns.layers == "head":
        sent = fit.label_rows()
    else:
        sent = in_folder(context, fit.adapter if learns.layers == "lora" else fit.whole)
    meta = {**sent.meta, "rows": len(domain.train), "steps": fit.steps}
    if fit.mechanism is None:
        return Contribution("updates", domain.name, name, sent.tensors, meta=meta)
    each, inner = fit.mechanism, context.inner
    so_far = replace(each, steps=each.steps * (inner.number + 1 if inner else 1))
    meta["privacy"] = {**each.as_dict(), "delta": learns.privacy.delta, "norm": learns.privacy.norm}
    epsilon = cost([so_far], learns.privacy.delta)
    return Contribution("updates", domain.name, name, sent.tensors, meta=meta, epsilon=epsilon)


def in_folder(context: Context, make: Callable[[Path], Contribution]) -> Contribution:
    """What ``make`` makes, and may read from the folder that it is given for as long as anybody does."""
    folder = context.scratch / "local" if context.scratch else Path(mkdtemp()) / "local"
    sent = make(folder)
    if context.scratch is None:  # it goes when nobody reads from it any more
        weakref.finalize(sent.tensors, shutil.rmtree, folder.parent, ignore_errors=True)
    return sent


@dataclass
class _Fit:
    """One owner's training; ``steps`` says how many were made."""

    name: str
    domain: Domain
    base: Model
    context: Context
    plan: Train
    pull: Callable[[nn.Module], Pull] | None
    learns: Learns
    steps: int = 0
    mechanism: Mechanism | None = None

    def whole(self, out: Path) -> Contribution:
        """All of it learns."""
        network, tokenizer = self._opened()
        self._on_rows(network, tokenizer)
        model = save_network(network, tokenizer, out, provenance(self.name, [self.base], self.context))
        vector = TaskVector(model, self.base)
        if self.learns.store == "exact" or not self.context.inner:
            return task_vector(vector, self.domain.name, model.labels, self.learns.store)
        return with_feedback(vector, self.base, self.domain.name, model.labels, self.learns.store, self.context.inner)

    def adapter(self, out: Path) -> Contribution:
        """Low-rank factors learn, and label rows."""
        rank = self.learns.rank
        network, tokenizer = self._opened()
        set_up(self.context, "adapter", self.domain.name)
        wrapped = with_adapters(network, self.domain.task, rank=rank, alpha=2 * rank)
        self._on_rows(network, tokenizer)
        save_adapter(wrapped, self.base, out)
        return adapter_contribution(out, self.base, self.domain.name, self.domain.full_labels)

    def label_rows(self) -> Contribution:
        """Label rows learn, on frozen features. UsageError where there are none."""
        if self.domain.task not in CLASSIFYING:
            raise UsageError(
                "bad-parameter", f"{self.name}: learns: layers", allowed="all or lora, for causal models", got="head",
                remedy="choose one of these",
            )  # fmt: skip
        device, names = self.context.device, head_tensors(self.base)
        start = rows_of(self.base).take(self.learns.labels(self.domain, self.base))
        own, x = self.domain.full_labels, self._features().to(device)
        layer = nn.Linear(start.weight_lh.shape[1], len(start.labels), bias=len(names) > 1)
        parts = dict(zip(names, layer.parameters(), strict=True))
        with torch.no_grad():
            for part, value in zip(parts.values(), (start.weight_lh, start.bias_l), strict=False):
                part.copy_(value)
        truth = torch.tensor(self.domain.train.labels or (), device=device)

        def loss(head: nn.Module, rows: Sequence[int]) -> Tensor:
            chosen = torch.tensor(rows, device=device)
            return cross_entropy(head(x[chosen]), truth[chosen])

        self._fit(layer.to(device), [1] * len(x), loss, layer)
        sent = {HEAD + name: part.detach()[: len(own)].cpu() for name, part in parts.items()}
        meta = {"labels": list(own), "form": FACTORS}
        return Contribution("updates", self.domain.name, self.name, sent, meta=meta)

    def _opened(self) -> tuple[Any, Any]:
        network, tokenizer = load_network(self.base), load_tokenizer(self.base)
        if self.domain.task in CLASSIFYING:
            set_head(network, get_head(network).take(self.learns.labels(self.domain, self.base)))
        return network.to(self.context.device), tokenizer

    def _on_rows(self, network: Any, tokenizer: Any) -> None:
        sequences = encode(tokenizer, self.domain.train.texts, limit(network, self.context))
        pad, device, head = pad_id(tokenizer), self.context.device, None
        if self.domain.task in CLASSIFYING:
            loss, head = labelled(sequences, self.domain.train.labels or (), pad, device), final_layer(network)
        else:
            loss = language(sequences, pad, device)
        self._fit(network, [len(s) for s in sequences], loss, head)
        if head is not None:
            set_head(network, get_head(network).take(self.domain.full_labels))

    def _fit(self, learning: nn.Module, lengths: Sequence[int], loss: BatchLoss, head: nn.Module | None) -> None:
        title, own = f"{self.name} {self.domain.name}", len(self.domain.full_labels)
        if head is not None:
            loss = _held(loss, head, own)
        if self.learns.privacy.epsilon:
            known = None if head is None else (head, own)
            self.mechanism = train_privately(
                learning, len(lengths), loss, self.plan, self.context, title, self.learns.privacy, known
            )
            self.steps = self.mechanism.steps
            return
        for rows in head.parameters() if head is not None else ():
            rows.register_hook(partial(_first, own))
        if self.pull:
            loss = _pulled(loss, self.pull(learning))
        self.steps = train_network(learning, lengths, loss, self.plan, self.context, title, head=head).steps

    def _features(self) -> Tensor:
        """[rows, hidden], kept at the owner from one inner round to the next: what they are made of stands still."""
        texts, inner = self.domain.train.texts, self.context.inner
        made_of = digest([_body_digest(self.base), texts, self.context.max_length])
        kept = inner.before / _FEATURES if inner and inner.before else None
        x = load_tensors(kept).get(made_of) if kept and kept.exists() else None
        if x is None:
            x = features(*self._opened(), texts, self.context)
        if inner and inner.after:
            inner.after.mkdir(parents=True, exist_ok=True)
            save_tensors(inner.after / _FEATURES, {made_of: x})
        return x


def _held(loss: BatchLoss, head: nn.Module, count: int) -> BatchLoss:
    """The same, with all label rows but the first as they were: optimizers move rows whose gradient is zero, too."""
    start = [rows.detach()[count:].clone() for rows in head.parameters()]

    def held(network: nn.Module, rows: Sequence[int]) -> Tensor:
        with torch.no_grad():
            for part, before in zip(head.parameters(), start, strict=True):
                part[count:] = before.to(part.device)
        return loss(network, rows)

    return held


def _first(count: int, gradient: Tensor) -> Tensor:
    """The gradient of the first rows alone."""
    return torch.cat([gradient[:count], torch.zeros_like(gradient[count:])])


def _body_digest(base: Model) -> str:
    tensors, state = Tensors(base.path), hashlib.sha256()
    for name in sorted(body_shapes(base)):
        state.update(name.encode())
        state.update(raw_bytes(tensors[name]))
    return state.hexdigest()


def _pulled(loss: BatchLoss, pull: Pull) -> BatchLoss:
    return lambda network, rows: loss(network, rows) + pull(network)
