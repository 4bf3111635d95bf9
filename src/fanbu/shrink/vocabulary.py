"""Vocabulary pruning: embedding rows that a domain never needs are dropped; the tokenizer is rewritten to fit."""

from __future__ import annotations

import json
import shutil
import string
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
from fanbu.errors import FitError, UsageError
from fanbu.model import Model, load_tokenizer, model_files, provenance, save_network
from fanbu.shrink._tune import open_for
from fanbu.types import Context

CHANGES: frozenset[str] = frozenset({"architecture", "tokenizer"})


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    max_tokens: Annotated[int, Ge(1)] = 8000, min_count: Annotated[int, Ge(1)] = 1,
) -> Model:  # fmt: skip
    """Keeps the tokens that the domain's texts use, and single characters to fall back on; nothing is trained.

    For texts made of kept tokens the result gives the parent's logits exactly. A word whose tokens were dropped
    falls apart into shorter kept ones (WordPiece takes the longest match), down to single characters.

    Args:
        max_tokens: at most so many rows stay, the most frequent first (special tokens and characters always stay).
        min_count: how often a token must occur in training, validation and unlabelled texts.

    Raises:
        FitError: the tokenizer is no WordPiece one.
        UsageError: max_tokens leaves no room for the characters.

    Reference: Abdaoui et al. 2020, "Load what you need: smaller versions of multilingual BERT".
    """
    network, tokenizer = open_for(parent, domain, context)
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    if spec.get("model", {}).get("type") != "WordPiece":
        raise FitError(
            "tokenizer-kind", "vocabulary pruning knows WordPiece tokenizers", allowed="WordPiece",
            got=spec.get("model", {}).get("type"), remedy="use depth or finetune for this model",
        )  # fmt: skip
    texts = [*domain.train.texts, *domain.valid.texts, *domain.unlabelled.texts]
    kept = kept_tokens(spec["model"]["vocab"], tokenizer, texts, max_tokens, min_count)
    keep_embeddings(network, kept)
    made = provenance("vocabulary", [parent], context, domain=domain.name, tokens=len(kept))
    made = replace(made, data={domain.name: domain.digest})
    with tempfile.TemporaryDirectory() as folder:
        smaller = rewrite_tokenizer(parent, spec, kept, Path(folder))
        network.config.pad_token_id = smaller.pad_token_id
        return save_network(network, smaller, out, made)


def kept_tokens(
    vocabulary: dict[str, int], tokenizer: Any, texts: Sequence[str], max_tokens: int, min_count: int
) -> list[int]:
    """Old ids of the kept tokens, ascending."""
    counts = Counter(i for ids in tokenizer(list(texts), add_special_tokens=False)["input_ids"] for i in ids)
    characters = {c for text in texts for c in text} | set(string.ascii_lowercase + string.digits + string.punctuation)
    always = {i for t, i in vocabulary.items() if t.removeprefix("##") in characters} | set(tokenizer.all_special_ids)
    if len(always) > max_tokens:
        raise UsageError(
            "max-tokens", "vocabulary: max_tokens leaves no room for single characters",
            allowed=f"at least {len(always)}", got=max_tokens, remedy="raise max_tokens",
        )  # fmt: skip
    frequent = [i for i, n in sorted(counts.items(), key=lambda c: (-c[1], c[0])) if n >= min_count and i not in always]
    return sorted(always | set(frequent[: max_tokens - len(always)]))


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


def rewrite_tokenizer(parent: Model, spec: dict[str, Any], kept: Sequence[int], folder: Path) -> Any:
    """The parent's tokenizer with new ids; normaliser, special tokens and templates stay."""
    new = {old: number for number, old in enumerate(kept)}
    vocabulary = {t: new[i] for t, i in spec["model"]["vocab"].items() if i in new}
    spec["model"]["vocab"] = vocabulary
    spec["added_tokens"] = [{**t, "id": new[t["id"]]} for t in spec["added_tokens"] if t["id"] in new]
    processor = spec.get("post_processor") or {}
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = new[processor[name][1]]
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new[i] for i in token["ids"]]
    for name in model_files(parent.path):
        if name in {"tokenizer_config.json", "special_tokens_map.json"}:
            shutil.copyfile(parent.path / name, folder / name)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    ordered = sorted(vocabulary, key=vocabulary.__getitem__)
    (folder / "vocab.txt").write_text("\n".join(ordered) + "\n", encoding="utf-8")
    shutil.copyfile(parent.path / "config.json", folder / "config.json")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(kept)}))
    return load_tokenizer(Model(folder, {"vocab_size": len(kept)}))
