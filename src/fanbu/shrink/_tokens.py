"""Which tokens a corpus needs, by kind of tokenizer, and the tokenizer that has only those."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from fanbu.errors import FitError
from fanbu.model import Model, load_tokenizer, model_files

KINDS = ("WordPiece", "BPE", "Unigram")
_ALWAYS = string.ascii_letters + string.digits + string.punctuation


def spec_of(tokenizer: Any) -> dict[str, Any]:
    """The tokenizer as the `tokenizers` library writes it. Raises FitError for a kind that is not known."""
    spec = json.loads(tokenizer.backend_tokenizer.to_str()) if hasattr(tokenizer, "backend_tokenizer") else {}
    kind = (spec.get("model") or {}).get("type")
    if kind not in KINDS:
        raise FitError(
            "tokenizer-kind", "vocabulary pruning does not know this kind of tokenizer", allowed=KINDS, got=kind,
            remedy="use depth or width for this model",
        )  # fmt: skip
    return dict(spec)


def vocabulary_of(spec: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token, added ones included."""
    model = spec["model"]
    known = model["vocab"] if model["type"] != "Unigram" else {t: i for i, (t, _) in enumerate(model["vocab"])}
    return {**known, **{t["content"]: t["id"] for t in spec["added_tokens"]}}


def fallback(spec: Mapping[str, Any], tokenizer: Any, texts: Sequence[str]) -> set[int]:
    """Ids that always stay, so that any text can be written: added tokens, the unknown token, single characters of the
    texts, as the normaliser writes them, and of ASCII, all bytes."""
    model, known = spec["model"], vocabulary_of(spec)
    ids = {t["id"] for t in spec["added_tokens"]}
    ids |= {known[t] for t in (model.get("unk_token"),) if t in known}
    if model["type"] == "Unigram":
        ids |= {model["unk_id"]} if model.get("unk_id") is not None else set()
        ids |= {i for t, i in known.items() if len(t) == 1 or _is_byte(t)}
    elif model["type"] == "BPE":
        made = {"".join(m) for m in _merges(model)}
        ids |= {i for t, i in known.items() if t not in made}  # nothing else can make these
    else:
        prefix = model.get("continuing_subword_prefix") or "##"
        normaliser = tokenizer.backend_tokenizer.normalizer
        written = texts if normaliser is None else map(normaliser.normalize_str, texts)
        characters = {c for text in written for c in text} | set(_ALWAYS)
        ids |= {i for t, i in known.items() if t.removeprefix(prefix) in characters}
    return ids


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _merges(model: Mapping[str, Any]) -> list[tuple[str, str]]:
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"])
    return [(str(a), str(b)) for a, b in pairs]


def parts_of(spec: Mapping[str, Any], tokens: Iterable[str]) -> dict[str, set[str]]:
    """For each token the tokens that merging passes through to make it, itself included (only BPE has any)."""
    model = spec["model"]
    if model["type"] != "BPE":
        return {token: {token} for token in tokens}
    ranks = {pair: number for number, pair in enumerate(_merges(model))}
    return {token: _passed(token, ranks) for token in tokens}


def _passed(token: str, ranks: Mapping[tuple[str, str], int]) -> set[str]:
    symbols, seen = list(token), set(token)
    while len(symbols) > 1:
        pairs = [(ranks[p], i) for i, p in enumerate(pairwise(symbols)) if p in ranks]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        seen.add(symbols[i])
    return {*seen, token}


def rewritten(parent: Model, spec: dict[str, Any], kept: Sequence[int], folder: Path) -> Any:
    """The parent's tokenizer with new ids: 0 for the first of ``kept``, and so on; all else stays."""
    new, model = {old: number for number, old in enumerate(kept)}, spec["model"]
    if model["type"] == "Unigram":
        model["vocab"] = [model["vocab"][i] for i in kept if i < len(model["vocab"])]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        model["vocab"] = {t: new[i] for t, i in model["vocab"].items() if i in new}
    if model["type"] == "BPE":
        known = model["vocab"]
        model["merges"] = [[a, b] for a, b in _merges(model) if a in known and b in known and a + b in known]
    spec["added_tokens"] = [{**t, "id": new[t["id"]]} for t in spec["added_tokens"] if t["id"] in new]
    _renumber(spec.get("post_processor"), new)
    for name in model_files(parent.path):
        if name in {"tokenizer_config.json", "special_tokens_map.json"} or name.endswith(".jinja"):
            shutil.copyfile(parent.path / name, folder / name)
    (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False), encoding="utf-8")
    if model["type"] == "WordPiece":
        ordered = sorted(model["vocab"], key=model["vocab"].__getitem__)
        (folder / "vocab.txt").write_text("\n".join(ordered) + "\n", encoding="utf-8")
    config = json.loads((parent.path / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": len(kept)}))
    return load_tokenizer(Model(folder, {"vocab_size": len(kept)}))


def _renumber(processor: Any, new: Mapping[int, int]) -> None:
    """Ids in a post-processor, or in several that follow each other."""
    if not processor:
        return
    for one in processor.get("processors") or ():
        _renumber(one, new)
    for name in ("sep", "cls"):
        if name in processor:
            processor[name][1] = new[processor[name][1]]
    for token in (processor.get("special_tokens") or {}).values():
        token["ids"] = [new[i] for i in token["ids"]]
