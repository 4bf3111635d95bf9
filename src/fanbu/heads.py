"""The label head of one plain checkpoint for many domains.

``id2label`` is the union of the domains' labels, written ``domain/label``; a domain restricts the logits to its own
rows (told), or nothing is restricted and the model finds the domain itself (untold).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fanbu.contribution import Contribution
from fanbu.errors import FitError, IntegrityError
from fanbu.model import Model, load_network, load_strictly
from fanbu.readers import auto_class
from fanbu.types import CLASSIFYING, Context, Task, industry_of

_PATHS = ("classifier.out_proj", "classifier", "score", "classifier.dense")
_POOLED = 0.05  # at most: tanh stays linear, |tanh(x) - x| < 1% of x below 0.17
_MEAN = 30.0  # how far the mean outweighs the residual of the first token


@dataclass(frozen=True)
class Head:
    """Rows of a label head: names ``industry/label``, weight_lh [labels, hidden], bias_l [labels], and from how many
    training rows each was made, where that is known (count_l)."""

    labels: tuple[str, ...]
    weight_lh: Tensor
    bias_l: Tensor
    count_l: Tensor | None = None

    def take(self, labels: Sequence[str]) -> Head:
        """The rows of some labels, in the order given."""
        index = [self.labels.index(label) for label in labels]
        count_l = None if self.count_l is None else self.count_l[index]
        return Head(tuple(labels), self.weight_lh[index], self.bias_l[index], count_l)


def domains_of(labels: Sequence[str]) -> dict[str, list[int]]:
    """Row numbers by industry (``types.industry_of`` a domain), in the order of first appearance."""
    rows: dict[str, list[int]] = {}
    for number, label in enumerate(labels):
        domain, slash, _ = label.partition("/")
        if slash:
            rows.setdefault(domain, []).append(number)
    return rows


def final_layer(network: nn.Module) -> nn.Linear:
    """The linear layer that makes the logits."""
    for path in _PATHS:
        try:
            layer = network.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(layer, nn.Linear):
            return layer
    raise FitError(
        "no-label-head", f"{type(network).__name__} has no linear label head", allowed=_PATHS,
        remedy="use an architecture whose sequence classifier ends in a linear layer",
    )  # fmt: skip


def replace_final_layer(network: nn.Module, layer: nn.Module) -> None:
    """Puts another module in the place of the final layer."""
    old = final_layer(network)
    for path in _PATHS:
        parent, _, name = path.rpartition(".")
        try:
            if network.get_submodule(path) is old:
                setattr(network.get_submodule(parent), name, layer)
                return
        except AttributeError:
            continue


def get_head(network: Any) -> Head:
    """The network's label rows; a head without bias has zeros."""
    layer = final_layer(network)
    labels = tuple(network.config.id2label[i] for i in range(layer.out_features))
    bias = torch.zeros(layer.out_features) if layer.bias is None else layer.bias.detach().clone()
    return Head(labels, layer.weight.detach().clone(), bias)


def set_head(network: Any, head: Head) -> None:
    """Gives the network these label rows and names them in its config."""
    old = final_layer(network)
    layer = nn.Linear(old.in_features, len(head.labels), bias=old.bias is not None)
    with torch.no_grad():
        layer.weight.copy_(head.weight_lh)
        if layer.bias is not None:
            layer.bias.copy_(head.bias_l)
    replace_final_layer(network, layer)
    network.config.id2label = dict(enumerate(head.labels))
    network.config.label2id = {label: number for number, label in enumerate(head.labels)}
    network.config.num_labels = len(head.labels)
    network.config.problem_type = "single_label_classification"
    network.num_labels = len(head.labels)


def sent_head(c: Contribution, bias_l: Tensor | None = None) -> Head:
    """An owner's label rows, as they were sent under ``weight``, ``bias`` (or as given), ``count`` and meta's labels.

    Raises IntegrityError for labels of another industry than the sender's, labels that come twice, or other lengths.
    """
    labels, weight_lh, count_l = tuple(map(str, c.meta["labels"])), c.tensors["weight"], c.tensors.get("count")
    bias_l = c.tensors["bias"] if bias_l is None else bias_l
    own = c.owners > 1 or all(label.partition("/")[0] == industry_of(c.domain) and "/" in label for label in labels)
    shapes = {t.shape for t in (bias_l, count_l) if t is not None}
    fitting = weight_lh.ndim == 2 and len(weight_lh) == len(labels) and shapes == {(len(labels),)}
    if not (own and fitting and len(set(labels)) == len(labels)):
        raise IntegrityError(
            "contribution-broken", f"the label rows of {c.domain} are not its industry's, or not one a label",
            allowed=f"{industry_of(c.domain)}/..., each once, with a row and a bias", got=list(labels)[:5],
            remedy="ask its owner to send them again",
        )  # fmt: skip
    return Head(labels, weight_lh, bias_l, None if count_l is None else count_l.float().clamp(1e-6, 1e6))


def join(heads: Sequence[Head]) -> Head:
    """All rows in one head, industries by name. What one head brings is copied bit for bit; where several owners of an
    industry bring rows for a label, it is their mean, weighted by ``count_l`` where the heads say it."""
    rows: dict[str, list[Head]] = {}
    for head in heads:
        for industry, numbers in domains_of(head.labels).items():
            rows.setdefault(industry, []).append(head.take([head.labels[n] for n in numbers]))
    parts = [rows[industry][0] if len(rows[industry]) == 1 else _mean(rows[industry]) for industry in sorted(rows)]
    return Head(
        tuple(label for p in parts for label in p.labels),
        torch.cat([p.weight_lh for p in parts]),
        torch.cat([p.bias_l for p in parts]),
    )


def _mean(heads: Sequence[Head]) -> Head:
    """One row a label, labels by name."""
    labels = sorted({label for head in heads for label in head.labels})
    weight_lh, bias_l, total_l = torch.zeros(len(labels), heads[0].weight_lh.shape[1]), *torch.zeros(2, len(labels))
    for head in heads:
        rows = torch.tensor([labels.index(label) for label in head.labels])
        count_l = torch.ones(len(rows)) if head.count_l is None else head.count_l
        weight_lh.index_add_(0, rows, count_l[:, None] * head.weight_lh.float())
        bias_l.index_add_(0, rows, count_l * head.bias_l.float())
        total_l.index_add_(0, rows, count_l)
    dtype = heads[0].weight_lh.dtype
    return Head(tuple(labels), (weight_lh / total_l[:, None]).to(dtype), (bias_l / total_l).to(dtype))


def replace_rows(head: Head, new: Sequence[Head]) -> Head:
    """``head`` with the rows of ``new`` put in the place of its own of the same names, all others untouched: also of an
    industry's labels that only an owner knows who is not heard now."""
    fresh = {label for h in new for label in h.labels}
    kept = [label for label in head.labels if "/" in label and label not in fresh]
    return join([*([head.take(kept)] if kept else []), *new])


def align_domains(head: Head, features_nh: Tensor, domains: Sequence[str], movable: Sequence[str]) -> Head:
    """Makes separately fitted heads comparable: a shift v_d (and b_d) common to all rows of a domain d.

    Minimises the mean of -log softmax_d(logsumexp over rows l of d of (w_l + v_d) x + b_l + b_d) plus
    1e-4 |v|^2 over the texts whose domain is known, by L-BFGS (convex). A common shift leaves softmax within the
    domain as it is, so told answers do not change; no label is needed. Only domains that have texts here take part;
    of those, the ones not in ``movable`` stay put, and if none stays put, the mean logsumexp of texts in their own
    domain is brought to 0, the level that heads without texts are set to.
    """
    rows = {d: numbers for d, numbers in domains_of(head.labels).items() if d in set(domains)}
    names = sorted(rows)
    movable = [d for d in movable if d in rows]
    known = [i for i, d in enumerate(domains) if d in rows]
    if not known or not movable or len(names) < 2:
        return head
    x, target = features_nh[known].float(), torch.tensor([names.index(domains[i]) for i in known])
    z = x @ head.weight_lh.float().T + head.bias_l.float()
    lse_nd = torch.stack([z[:, rows[d]].logsumexp(1) for d in names], 1)
    free = torch.tensor([[1.0] if d in set(movable) else [0.0] for d in names])
    shift = torch.zeros(len(names), x.shape[1] + 1, requires_grad=True)
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    optimizer = torch.optim.LBFGS([shift], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        moved = shift * free
        loss = nn.functional.cross_entropy(lse_nd + ones @ moved.T, target) + 1e-4 * moved.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    moved = (shift * free).detach()
    if len(movable) == len(names):
        own = (lse_nd + ones @ moved.T)[torch.arange(len(x)), target]
        moved[:, -1] -= own.mean()
    weight, bias = head.weight_lh.clone(), head.bias_l.clone()
    for number, d in enumerate(names):
        if d in set(movable):
            weight[rows[d]] += moved[number, :-1]
            bias[rows[d]] += moved[number, -1]
    return Head(head.labels, weight, bias)


# Opening a base as a classifier


def open_classifier(model: Model, context: Context, pooling: str = "auto", task: Task = "text-classification") -> Any:
    """A classifier over an arbitrary base: its own head where it has one, else a fresh one over the pooled text.

    ``pooling`` is ``mean``, ``native`` (what the architecture does) or ``auto``: mean where it can be had. Mean
    pooling is part of the plain checkpoint: the config's own option where there is one, else one attention layer is
    appended that computes it (see ``append_mean_layer``). Images and recordings are pooled as the architecture does.
    Raises FitError where ``mean`` cannot be had.
    """
    from transformers import AutoConfig

    if model.task in CLASSIFYING:
        if pooling == "mean":
            raise FitError(
                "no-mean-pooling", f"{model.path} is a classifier already and pools as it was trained to",
                allowed="auto, native", got=pooling, remedy="give the bare body, or leave pooling out",
            )  # fmt: skip
        network = load_network(model)
        # labels of its own become a domain of their own
        network.config.id2label = {i: f"general/{label}" for i, label in enumerate(model.labels)}
        network.config.label2id = {label: i for i, label in network.config.id2label.items()}
        return network
    config = AutoConfig.from_pretrained(model.path, local_files_only=True, trust_remote_code=False)
    config.num_labels = 2
    option = hasattr(config, "classifier_pooling")
    appended = task == "text-classification" and not option and config.model_type in _MEAN_LAYERS
    if pooling == "mean" and not option and not appended:
        raise FitError(
            "no-mean-pooling", f"{config.model_type} cannot be opened with mean pooling",
            allowed=[*sorted(_MEAN_LAYERS), "models with classifier_pooling in their config"], got=config.model_type,
            remedy="use pooling: native",
        )  # fmt: skip
    if option and pooling != "native":
        config.classifier_pooling = "mean"
    if appended and pooling != "native":
        config.num_hidden_layers += 1
    if task == "text-classification" and config.pad_token_id is None:
        config.pad_token_id = config.eos_token_id if isinstance(config.eos_token_id, int) else 0
    torch.manual_seed(context.seeded("open", model.digest))
    last = f"encoder.layer.{config.num_hidden_layers - 1}."
    fresh = ["classifier", "score", "head.", "pooler.", "pre_classifier", *_prefixed("pooler.", config.model_type)]
    fresh += ["projector."] if task == "audio-classification" else []
    if appended and pooling != "native":
        fresh += [last, *_prefixed(last, config.model_type)]
    network = load_strictly(auto_class(task), model, fresh, config)
    if appended and pooling != "native":
        append_mean_layer(network, config.model_type)
    return network


_MEAN_LAYERS = {"bert": "bert", "roberta": "roberta", "xlm-roberta": "roberta"}


def _prefixed(name: str, model_type: str) -> list[str]:
    return [f"{_MEAN_LAYERS.get(model_type, model_type)}.{name}"]


def append_mean_layer(network: Any, model_type: str) -> None:
    """Turns the last encoder layer and the pooler into mean pooling over the unmasked tokens.

    Queries are zero, so attention is uniform; keys are random, so that it can learn; values are the identity, the
    attention output 30 times the identity, so that the mean outweighs the residual; the feed-forward's second matrix
    is zero. The last layer norm's gain is g = min(0.05, hidden ** -0.5), so that tanh is linear and pooled texts have
    unit norm (at most), and the pooler is the identity: pooled = g layer_norm(mean), up to the residual. (A small
    multiple of the identity in the pooler instead gives the same values, and is wrecked by a few steps of Adam,
    whose step does not shrink with the weights: docs/log.md.)
    """
    body = network.get_submodule(_MEAN_LAYERS[model_type])
    layer = body.encoder.layer[-1]
    hidden = network.config.hidden_size
    eye = torch.eye(hidden)
    attention = layer.attention.self
    dense = body.pooler.dense if model_type == "bert" else network.classifier.dense
    with torch.no_grad():
        for linear, weight in (
            (attention.query, torch.zeros(hidden, hidden)),
            (attention.value, eye),
            (layer.attention.output.dense, _MEAN * eye),
            (dense, eye),
        ):
            linear.weight.copy_(weight)
            linear.bias.zero_()
        layer.output.dense.weight.zero_()
        layer.output.dense.bias.zero_()
        attention.key.bias.zero_()
        layer.intermediate.dense.bias.zero_()
        gain = min(_POOLED, hidden**-0.5)
        for norm, value in ((layer.attention.output.LayerNorm, 1.0), (layer.output.LayerNorm, gain)):
            norm.weight.fill_(value)
            norm.bias.zero_()


def check_labels_known(model: Model, labels: Sequence[str]) -> None:
    """Raises IntegrityError where a model lacks a label's row."""
    missing = set(labels) - set(model.labels)
    if missing:
        raise IntegrityError(
            "label-missing", f"{model.path} has no row for some labels", allowed=model.labels, got=missing,
            remedy="use the model that was made with this domain, or open the base with it first",
        )  # fmt: skip
