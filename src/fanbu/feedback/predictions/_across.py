"""Next tokens across vocabularies: what a specialist expects, told in the tokens of the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from fanbu.batches import Sequences
from fanbu.merging.tokens import matched, pieces_of, vocabulary_of
from fanbu.model import Model
from fanbu.predict import limit, over_batches
from fanbu.types import Context


@dataclass(frozen=True)
class Cut:
    """Texts cut into tokens; ``ends`` are the characters of a text that are read after each token, one more after a
    closing special token."""

    ids: Sequences
    ends: list[list[int]]

    def boundaries(self, text: int) -> dict[int, int]:
        """Number of the last token by where it ends: bytes of one character end together."""
        return {end: number for number, end in enumerate(self.ends[text])}


def cut(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> Cut:
    """By a fast tokenizer, no longer than the network reads."""
    if not texts:
        return Cut([], [])
    found = tokenizer(
        list(texts), truncation=True, max_length=limit(network, context), return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )  # fmt: skip
    ends = []
    for offsets, special in zip(found["offset_mapping"], found["special_tokens_mask"], strict=True):
        last, row = 0, []
        for number, ((_, end), mark) in enumerate(zip(offsets, special, strict=True)):
            last = last + 1 if mark and number else max(last, end)
            row.append(last)
        ends.append(row)
    return Cut([list(ids) for ids in found["input_ids"]], ends)


def characters(texts: Cut) -> Tensor:
    """How many characters of each text are predicted: those after its first token."""
    return torch.tensor([float(row[-1] - row[0]) if row else 0.0 for row in texts.ends])


def projection(specialist: Model, base: Model) -> Tensor:
    """For each token of the specialist the base's token that begins its text (the same one where the base has it), or
    -1. Special tokens go by name and role."""
    own, target = vocabulary_of(base), vocabulary_of(specialist)
    first = matched(own, target)
    plain = [t for t, i in target.ids.items() if first[i] < 0]
    for token, pieces in zip(plain, pieces_of(own, target, plain), strict=True):
        if pieces:
            first[target.ids[token]] = pieces[0]
    return torch.tensor(first)


def tokens_across(
    network: Any, tokenizer: Any, theirs: Cut, first: Tensor, rows: int, texts: Sequence[str], context: Context, k: int
) -> list[tuple[Tensor, Tensor]]:
    """For each text: indices [tokens - 1, k] and probabilities of the base's likeliest next tokens, by the specialist.

    Where both tokenizers end a token at the same character, the specialist's next-token distribution is handed on by
    ``projection``. The base's true next token, if it ends where one of the specialist's ends, gets the product of the
    specialist's probabilities over that span, which its beginning gives up. Elsewhere nothing is said: all
    probabilities are 0.

    Args:
        theirs: the texts in the base's tokens; rows: how many rows the base's vocabulary has.
    """
    own = cut(network, tokenizer, texts, context)
    answers = _answers(network, tokenizer, texts, context, k)
    return [_one(own, theirs, number, answer, first, rows, min(k, rows)) for number, answer in enumerate(answers)]


_Answer = tuple[Tensor, Tensor, Tensor]  # indices [n, k], probabilities [n, k], log p of the true next token [n]


def _answers(network: Any, tokenizer: Any, texts: Sequence[str], context: Context, k: int) -> list[_Answer]:
    def reduce(logits_btv: Tensor, batch: dict[str, Tensor]) -> list[_Answer]:
        log_p = logits_btv[:, :-1].log_softmax(-1)
        truth = log_p.gather(2, batch["input_ids"][:, 1:, None])[..., 0]
        values, indices = log_p.topk(min(k, log_p.shape[-1]))
        lengths = (batch["attention_mask"].sum(1) - 1).tolist()
        return [(indices[i, :n], values[i, :n].exp(), truth[i, :n]) for i, n in enumerate(lengths)]

    return over_batches(network, tokenizer, texts, context, reduce, size=16)


def _one(own: Cut, theirs: Cut, text: int, answer: _Answer, first: Tensor, rows: int, k: int) -> tuple[Tensor, Tensor]:
    indices, probs, truth = answer
    mine, base = own.boundaries(text), theirs.boundaries(text)
    ids, ends = theirs.ids[text], theirs.ends[text]
    dense = torch.zeros(max(len(ids) - 1, 0), rows)
    for place, (end, following) in enumerate(pairwise(ends)):
        at = mine.get(end)
        if at is None or at >= len(truth) or base[end] != place:
            continue
        to = first[indices[at]]
        dense[place].index_add_(0, to.clamp_min(0), probs[at] * (to >= 0))
        until = mine.get(following)
        if until is None or base[following] != place + 1:
            continue
        span, word = truth[at:until].sum().exp(), own.ids[text][at + 1]
        begins, said = int(first[word]), bool((indices[at] == word).any())
        if until == at + 1 and begins == ids[place + 1] and said:
            continue
        if said and begins >= 0:
            dense[place, begins] = (dense[place, begins] - span).clamp_min(0)
        dense[place, ids[place + 1]] += span
    p, likeliest = dense.topk(k)
    return likeliest.int(), p.half()
