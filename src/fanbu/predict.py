"""The only loop that predicts: always in float32, so that plain transformers gives the same answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from fanbu.batches import Sequences, collate, encode, pad_id, sorted_batches
from fanbu.domain import Domain
from fanbu.heads import final_layer, replace_final_layer
from fanbu.train import set_up
from fanbu.types import Context

T = TypeVar("T")


def over_batches(
    network: Any, tokenizer: Any, texts: Sequence[str], context: Context,
    reduce: Callable[[Tensor, dict[str, Tensor]], Sequence[T]], *, name: str = "predict", size: int = 64,
) -> list[T]:  # fmt: skip
    """``reduce(logits, batch)`` gives one value a row; returns them in the order of ``texts``."""
    set_up(context, "predict")
    training = network.training
    network.to(context.device).eval()

    def run(batch: dict[str, Tensor]) -> Sequence[T]:
        return reduce(network(**batch).logits.float().cpu(), {k: v.cpu() for k, v in batch.items()})

    results = by_batches(run, tokenizer, encode(tokenizer, texts, limit(network, context)), context, name, size)
    network.train(training)
    return results


def by_batches(
    run: Callable[[dict[str, Tensor]], Sequence[T]], tokenizer: Any, sequences: Sequences, context: Context, name: str,
    size: int,
) -> list[T]:  # fmt: skip
    """``run(batch)`` gives one value a row; returns them in the order of ``sequences``, which may be of any lengths."""
    results: dict[int, T] = {}
    with torch.inference_mode():
        for rows in sorted_batches([len(s) for s in sequences], size):
            batch = collate([sequences[i] for i in rows], pad_id(tokenizer), context.device)
            results.update(zip(rows, run(batch), strict=True))
            context.progress(name, len(results), len(sequences))
    return [results[i] for i in range(len(sequences))]


def limit(network: Any, context: Context) -> int:
    """How many tokens of a text are read: what the context says, and no more than the network has positions."""
    positions = getattr(network.config, "max_position_embeddings", None) or context.max_length
    return int(min(context.max_length, positions - _before_first(network)))


def _before_first(network: Any) -> int:
    """How many positions are never used: RoBERTa and its like start after the padding id."""
    tables = (m for n, m in network.named_modules() if n.endswith("position_embeddings") and hasattr(m, "padding_idx"))
    return max((1 + m.padding_idx for m in tables if m.padding_idx is not None), default=0)


def longest(network: Any, tokenizer: Any, context: Context) -> int:
    """``limit``, and no more than the tokenizer says that the model was trained on."""
    return int(min(limit(network, context), getattr(tokenizer, "model_max_length", math.inf)))


def class_logits(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> Tensor:
    """[texts, labels]."""
    if not texts:
        return torch.zeros(0, network.config.num_labels)
    return torch.stack(over_batches(network, tokenizer, texts, context, lambda logits, _: logits.clone().unbind()))


def features(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> Tensor:
    """[texts, hidden]: what the final layer is given, pooled as the network pools."""
    with without_head(network):
        rows = over_batches(
            network, tokenizer, texts, context, lambda logits, _: logits.clone().unbind(), name="features"
        )
    return torch.stack(rows) if rows else torch.zeros(0, final_layer(network).in_features)


@contextmanager
def without_head(network: Any) -> Iterator[None]:
    """The final layer replaced by the identity, so that the logits are the pooled features."""
    layer = final_layer(network)
    holder: Any = nn.Linear(1, 1)
    holder.forward = lambda x: x
    holder.in_features, holder.out_features = layer.in_features, layer.in_features
    replace_final_layer(network, holder)
    try:
        yield
    finally:
        replace_final_layer(network, layer)


def token_losses(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> Tensor:
    """[texts, 2]: the sum of -log p(next token) in nats, and the number of predicted tokens."""

    def reduce(logits_btv: Tensor, batch: dict[str, Tensor]) -> Sequence[Tensor]:
        ids, keep = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
        z = logits_btv[:, :-1]
        nll_bt = z.logsumexp(-1) - z.gather(2, ids[..., None])[..., 0]
        return torch.stack([(nll_bt * keep).sum(1), keep.sum(1).float()], 1).unbind()

    rows = over_batches(network, tokenizer, texts, context, reduce, size=16)
    return torch.stack(rows) if rows else torch.zeros(0, 2)


def top_tokens(
    network: Any, tokenizer: Any, texts: Sequence[str], context: Context, k: int, *, sampled: bool = False
) -> list[tuple[Tensor, Tensor]]:
    """For each text: indices [tokens - 1, k] and probabilities of the k likeliest next tokens; ``sampled``: of k that
    are drawn, each with probability 1 / k."""
    generator = torch.Generator().manual_seed(context.seeded("sampled tokens"))

    def reduce(logits_btv: Tensor, batch: dict[str, Tensor]) -> Sequence[tuple[Tensor, Tensor]]:
        probs_btv = logits_btv.softmax(-1)
        if sampled:
            drawn = torch.multinomial(probs_btv.flatten(0, 1), k, replacement=True, generator=generator)
            indices = drawn.reshape(*probs_btv.shape[:2], k)
            probs = torch.full(indices.shape, 1 / k)
        else:
            probs, indices = probs_btv.topk(min(k, probs_btv.shape[-1]))
        lengths = batch["attention_mask"].sum(1).tolist()
        return [(indices[i, : n - 1].int(), probs[i, : n - 1].half()) for i, n in enumerate(lengths)]

    return over_batches(network, tokenizer, texts, context, reduce, size=16)


def written(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> list[str]:
    """Each text's first half, in tokens, and a second one that the network writes: sampled, one seed for all."""
    set_up(context, "written")
    found = []
    for done, ids in enumerate(encode(tokenizer, texts, limit(network, context)), 1):
        made = continued(network, ids[: max(1, len(ids) // 2)], len(ids), tokenizer.eos_token_id)
        found.append(tokenizer.decode(made, skip_special_tokens=True))
        context.progress("written", done, len(texts))
    return found


def continued(network: Any, ids: Sequence[int], length: int, end: int | None) -> list[int]:
    """Token ids up to ``length``, those that are not given sampled from the network."""
    training = network.training
    network.eval()
    with torch.no_grad():
        given = torch.tensor([list(ids)], device=network.device)
        made = network.generate(
            input_ids=given, attention_mask=torch.ones_like(given), do_sample=True, top_k=0,
            max_new_tokens=max(1, length - len(ids)), pad_token_id=end,
        )  # fmt: skip
    network.train(training)
    return [int(i) for i in made[0].tolist()]


def validation_value(network: Any, tokenizer: Any, domain: Domain, context: Context) -> float:
    """The value on the domain's validation rows, higher is better: told accuracy (ties broken by the loss), or minus
    the loss per token in nats."""
    quiet = Context(seed=context.seed, device=context.device, threads=context.threads, max_length=context.max_length)
    state = torch.get_rng_state()  # validating must not move the training's random numbers
    try:
        if domain.task == "causal-lm":
            sums = token_losses(network, tokenizer, domain.valid.texts, quiet).sum(0)
            return -float(sums[0] / sums[1])
        logits = class_logits(network, tokenizer, domain.valid.texts, quiet)
    finally:
        torch.set_rng_state(state)
    target = torch.tensor(domain.valid.labels)
    loss = float(functional.cross_entropy(logits, target))
    return float((logits.argmax(1) == target).double().mean()) - 1e-6 * math.tanh(loss)
