"""Vocabulary pruning: embedding rows that a domain never needs are dropped; the tokenizer is rewritten to fit."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import nn

from fanbu.domain import Domain
from fanbu.errors import UsageError
from fanbu.model import Model, provenance, save_network
from fanbu.shrink._tokens import fallback, parts_of, rewritten, spec_of, vocabulary_of
from fanbu.shrink._tune import open_for
from fanbu.types import Context

CHANGES: frozenset[str] = frozenset({"architecture", "tokenizer"})


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    max_tokens: Annotated[int, Ge(1)] = 8000, min_count: Annotated[int, Ge(1)] = 1,
) -> Model:  # fmt: skip
    """Keeps the tokens that the domain's texts use, and what is needed to write any other text; nothing is trained.

    The normaliser, special tokens and templates stay. Texts made of kept tokens are read as before and get the
    parent's logits exactly. Elsewhere a word whose token was dropped falls apart into shorter kept ones, down to
    characters (WordPiece, Unigram) or bytes (byte-level BPE, byte fall-back): nothing is lost that the parent's
    tokenizer could tell, except characters that are neither in the texts nor in ASCII where it has no bytes.
    For BPE the tokens that merging passes through stay too.

    Args:
        max_tokens: at most so many rows stay, the most frequent first (what any text needs always stays).
        min_count: how often a token must occur in training, validation and unlabelled texts.

    Raises:
        FitError: the tokenizer is neither WordPiece nor BPE nor Unigram.
        UsageError: max_tokens leaves no room for what any text needs.

    Reference: Abdaoui et al. 2020, "Load what you need: smaller versions of multilingual BERT".
    """
    network, tokenizer = open_for(parent, domain, context)
    spec = spec_of(tokenizer)
    texts = [*domain.train.texts, *domain.valid.texts, *domain.unlabelled.texts]
    kept = kept_tokens(spec, tokenizer, texts, max_tokens, min_count)
    keep_embeddings(network, kept)
    made = provenance("vocabulary", [parent], context, domain=domain.name, tokens=len(kept))
    made = replace(made, data={domain.name: domain.digest})
    with tempfile.TemporaryDirectory() as folder:
        smaller = rewritten(parent, spec, kept, Path(folder))
        renumber_config(network, kept)
        if smaller.pad_token_id is not None:  # else the network pads with what renumber_config found
            network.config.pad_token_id = smaller.pad_token_id
        return save_network(network, smaller, out, made)


def kept_tokens(
    spec: dict[str, Any], tokenizer: Any, texts: Sequence[str], max_tokens: int, min_count: int
) -> list[int]:
    """Old ids of the kept tokens, ascending."""
    counts = Counter(i for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in ids)
    known = vocabulary_of(spec)
    kept = fallback(spec, tokenizer, texts) | set(tokenizer.all_special_ids)
    if len(kept) > max_tokens:
        raise UsageError(
            "max-tokens", "vocabulary: max_tokens leaves no room for what any text needs",
            allowed=f"at least {len(kept)}", got=max_tokens, remedy="raise max_tokens",
        )  # fmt: skip
    names = {i: t for t, i in known.items()}
    frequent = [i for i, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if n >= min_count and i not in kept]
    parts = parts_of(spec, [names[i] for i in frequent])
    for i in frequent:
        wanted = {known[t] for t in parts[names[i]] if t in known} - kept
        if len(kept) + len(wanted) <= max_tokens:
            kept |= wanted
    return sorted(kept)


def keep_embeddings(network: Any, kept: Sequence[int]) -> None:
    """Input (and output) embeddings with the kept rows only."""
    old = network.get_input_embeddings()
    smaller = nn.Embedding(len(kept), old.embedding_dim)
    with torch.no_grad():
        smaller.weight.copy_(old.weight[list(kept)])
    network.set_input_embeddings(smaller)
    network.config.vocab_size = len(kept)
    output = network.get_output_embeddings()
    if output is not None:
        output.weight = smaller.weight if output.weight is old.weight else nn.Parameter(output.weight[list(kept)])
        if getattr(output, "bias", None) is not None:
            output.bias = nn.Parameter(output.bias[list(kept)])


def renumber_config(network: Any, kept: Sequence[int]) -> None:
    """Special tokens that the configurations name by id."""
    new = {old: number for number, old in enumerate(kept)}
    for config in (network.config, getattr(network, "generation_config", None)):
        for name, value in list(vars(config or object).items()):
            if name.endswith("_token_id") and isinstance(value, int):
                setattr(config, name, new.get(value))
            elif name.endswith("_token_id") and isinstance(value, list):
                setattr(config, name, [new[i] for i in value if i in new])
