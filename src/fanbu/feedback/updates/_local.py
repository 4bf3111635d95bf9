"""What an owner does in an inner round: train the large model on its own rows, and send what that changed."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import mkdtemp

from torch import Tensor, nn

from fanbu.batches import encode, pad_id
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.heads import check_labels_known, final_layer, get_head, set_head
from fanbu.merging.store import Store, task_vector
from fanbu.merging.task_vector import TaskVector
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.objectives import labelled, language
from fanbu.predict import limit
from fanbu.train import BatchLoss
from fanbu.train import train as train_network
from fanbu.types import CLASSIFYING, Context, Train

LOCAL = Train(epochs=1, lr=1e-4, warmup=0.0, schedule="constant", patience=0)
Pull = Callable[[nn.Module], Tensor]  # what is added to the loss of a network


def update(
    name: str, specialist: Specialist, base: Model, context: Context, train: Train, store: Store,
    pull: Callable[[nn.Module], Pull] | None = None,
) -> Contribution:  # fmt: skip
    """delta = theta - theta_base after training on the domain's rows; of the label head its own rows, as they became.

    Only the domain's own labels are told apart (its softmax has no others), so an owner does not unlearn the labels of
    others, which it has no rows of. ``pull`` is given the network before it trains.

    meta: ``rows`` it was trained on, ``steps`` that were made.
    """
    domain = specialist.domain
    folder = context.scratch / "local" if context.scratch else Path(mkdtemp()) / "local"
    model, steps = _trained(name, domain, base, folder, context, train, pull)
    vector = TaskVector(model, base)
    if context.scratch is None:  # it goes when nobody reads from it any more
        weakref.finalize(vector, shutil.rmtree, folder.parent, ignore_errors=True)
    sent = task_vector(vector, domain.name, model.labels, store)
    meta = {**sent.meta, "rows": len(domain.train), "steps": steps}
    return Contribution("updates", domain.name, name, sent.tensors, meta=meta)


def _trained(
    name: str, domain: Domain, base: Model, out: Path, context: Context, train: Train,
    pull: Callable[[nn.Module], Pull] | None,
) -> tuple[Model, int]:  # fmt: skip
    network, tokenizer = load_network(base), load_tokenizer(base)
    sequences, head = encode(tokenizer, domain.train.texts, limit(network, context)), None
    if domain.task in CLASSIFYING:
        check_labels_known(base, domain.full_labels)
        set_head(network, get_head(network).take(domain.full_labels))
        loss = labelled(sequences, domain.train.labels or (), pad_id(tokenizer), context.device)
        head = final_layer(network)
    else:
        loss = language(sequences, pad_id(tokenizer), context.device)
    network.to(context.device)
    if pull:
        loss = _pulled(loss, pull(network))
    history = train_network(
        network, [len(s) for s in sequences], loss, train, context, f"{name} {domain.name}", head=head
    )
    return save_network(network, tokenizer, out, provenance(name, [base], context)), history.steps


def _pulled(loss: BatchLoss, pull: Pull) -> BatchLoss:
    return lambda network, rows: loss(network, rows) + pull(network)
