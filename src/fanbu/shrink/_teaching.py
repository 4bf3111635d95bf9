"""More of what a teacher shows: relations of its last layer, its likeliest next tokens kept on disk, the student's own
texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fanbu.batches import Sequences, collate
from fanbu.errors import FitError
from fanbu.model import Model, load_network, load_tokenizer
from fanbu.predict import continued, top_tokens
from fanbu.shrink._units import follows
from fanbu.shrink.depth import layers_of
from fanbu.tensors import load_tensors, save_tensors
from fanbu.train import BatchLoss
from fanbu.types import Context, digest

_PROJECTIONS = (
    ("query", "key", "value"), ("q_proj", "k_proj", "v_proj"), ("q_lin", "k_lin", "v_lin"),
    ("query_proj", "key_proj", "value_proj"),
)  # fmt: skip
_HEADS = 12  # of relations, at most; MiniLMv2 takes many small ones


# Relations


def with_relations(
    loss: BatchLoss, weight: float, network: Any, teacher: Any, sequences: tuple[Sequences, Sequences],
    pads: tuple[int, int],
) -> BatchLoss:  # fmt: skip
    """``loss`` + weight x the mean over queries, keys and values of KL(R_T || R_S), R = softmax(A A^T / sqrt(d)).

    A [batch, heads, tokens, d] is what the last layer's projection gives, in as many heads as divide both networks'
    widths; rows are tokens that are not padding. No layers are matched and widths may differ (Wang et al. 2021,
    MiniLMv2). Both must cut texts into as many tokens.
    """
    mine, theirs = sequences
    if [len(s) for s in mine] != [len(s) for s in theirs]:
        raise FitError(
            "other-tokenizer", "relations between tokens need texts cut into the same tokens",
            allowed="the teacher's tokens", got="others", remedy="leave `relations` at 0, or keep more tokens",
        )  # fmt: skip
    own, other = projections(network), projections(teacher)

    def total(student: Any, rows: Sequence[int]) -> Tensor:
        device = next(student.parameters()).device
        batch = collate([theirs[i] for i in rows], pads[1], device)
        with _seen(other) as shown, torch.no_grad():
            teacher(**batch)
        with _seen(own) as made:
            first = loss(student, rows)
        mask = batch["attention_mask"].bool()
        parts = [relation_loss(t, s, mask) for t, s in zip(shown, made, strict=True)]
        return first + weight * torch.stack(parts).mean()

    return total


def projections(network: Any) -> list[nn.Module]:
    """The last layer's query, key and value layers; a layer that only takes the mean has no relations to show."""
    for layer in reversed(list(layers_of(network))):
        by_name = {name.rpartition(".")[2]: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        for names in _PROJECTIONS:
            if set(names) <= set(by_name):
                found = [by_name[n] for n in names]
                if not (follows(found[2].weight.detach()) or not found[0].weight.any()):
                    return list(found)
    raise FitError(
        "no-relations", f"{type(network).__name__} has no layer with queries, keys and values apart",
        allowed=_PROJECTIONS, remedy="leave `relations` at 0",
    )  # fmt: skip


def relation_loss(teacher_btd: Tensor, student_btd: Tensor, mask_bt: Tensor) -> Tensor:
    """Mean over heads and tokens of KL(softmax(T T^T / sqrt(d_T)) || softmax(S S^T / sqrt(d_S)))."""
    heads = max(h for h in range(1, _HEADS + 1) if not (teacher_btd.shape[-1] % h or student_btd.shape[-1] % h))
    log_t, log_s = (_relations(a.float(), heads, mask_bt) for a in (teacher_btd, student_btd))
    kept = mask_bt[:, None, :, None] & mask_bt[:, None, None, :]
    terms = torch.where(kept, log_t.exp() * (log_t - log_s), 0.0)
    return terms.sum() / (heads * mask_bt.sum())


def _relations(a_btd: Tensor, heads: int, mask_bt: Tensor) -> Tensor:
    batch, tokens, width = a_btd.shape
    a = a_btd.reshape(batch, tokens, heads, width // heads).transpose(1, 2)
    scores = a @ a.transpose(2, 3) / math.sqrt(width // heads)
    return scores.masked_fill(~mask_bt[:, None, None, :], -1e9).log_softmax(-1)


@contextmanager
def _seen(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What the layers give in a forward pass, in their order."""
    found: dict[int, Tensor] = {}
    shown: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _, __, out, n=number: found.update({n: out}))
        for number, layer in enumerate(layers)
    ]
    try:
        yield shown
        shown.extend(found[n] for n in range(len(layers)))
    finally:
        for handle in handles:
            handle.remove()


# Answers on disk


def kept(cache: str, what: str, named: Mapping[str, Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ``make`` gives; with a cache it is kept there, under a name made of what ``named`` says of it."""
    if not cache:
        return make()
    path = Path(cache) / f"{what}-{digest(dict(named))[:32]}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, make())
    return load_tensors(path)


def likely_tokens(
    cache: str, teacher: Model, texts: Sequence[str], top_k: int, sampled: bool, context: Context
) -> list[tuple[Tensor, Tensor]]:
    """``predict.top_tokens`` of the teacher; with ``sampled`` k tokens drawn from its distribution, each of mass 1 / k.

    The likeliest k leave the rest's mass to one outcome, which is biased; drawn ones are unbiased and noisier
    (Anshumann et al. 2025, "Sparse logit sampling").
    """

    def make() -> dict[str, Tensor]:
        network, tokenizer = load_network(teacher), load_tokenizer(teacher)
        found = top_tokens(network, tokenizer, texts, context, top_k, sampled=sampled)
        indices, probs = zip(*found, strict=True)
        lengths = torch.tensor([len(i) for i in indices])
        return {"indices": torch.cat(indices), "probs": torch.cat(probs), "lengths": lengths}

    named = {"teacher": teacher.digest, "texts": list(texts), "most": context.max_length, "k": top_k,
             "sampled": context.seed if sampled else None}  # fmt: skip
    known = kept(cache, "tokens", named, make)
    lengths = known["lengths"].tolist()
    return list(zip(known["indices"].split(lengths), known["probs"].split(lengths), strict=True))


# On-policy


def on_policy(loss: BatchLoss, share: float, network: Any, sequences: Sequences, end: int | None) -> BatchLoss:
    """``loss`` where the second half of a text is the student's own, sampled now, for a ``share`` of all texts.

    The teacher then says what it thinks of what the student writes (Agarwal et al. 2024, GKD). Sequences are changed in
    place before each batch, and are the owner's again after it.
    """

    def total(student: Any, rows: Sequence[int]) -> Tensor:
        drawn = [i for i in rows if len(sequences[i]) > 3 and float(torch.rand(())) < share]
        kept = {i: sequences[i] for i in drawn}
        try:
            for i in drawn:
                ids = sequences[i]
                sequences[i] = continued(network, ids[: len(ids) // 2], len(ids), end)
            return loss(student, rows)
        finally:
            for i, ids in kept.items():
                sequences[i] = ids

    return total
