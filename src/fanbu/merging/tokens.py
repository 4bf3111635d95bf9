"""Tokens of checkpoints: which there are, what text they stand for, which of two vocabularies' are the same.

Two vocabularies of one family (byte-level BPE, U+2581 for a space, WordPiece) are matched by the token's
own string. Where families differ, tokens are matched by the bytes that they stand for, with a leading space where they
begin a word: ``Ġbank`` = ``▁bank`` = ``bank`` of WordPiece, and ``ing`` = ``##ing``. That is a good guess and no
identity: WordPiece says of punctuation that it begins a word, the others do not. Added tokens are matched by name, and
special ones (across families) also by role: ``[CLS]`` of one is ``<s>`` of the other where both are ``cls_token``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from fanbu.errors import FitError, IntegrityError
from fanbu.model import Model, load_tokenizer

Family = Literal["bytes", "metaspace", "wordpiece", "words"]
SPACE = "\u2581"
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_KEPT = [*range(33, 127), *range(161, 173), *range(174, 256)]
# byte-level BPE writes each byte as one visible character: printable ones as themselves, the others from U+0100 on
_CHARACTER = {b: chr(b) for b in _KEPT} | {
    b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in set(_KEPT))
}
_BYTE = {c: b for b, c in _CHARACTER.items()}


@dataclass(frozen=True)
class Row:
    """Where the row of one token comes from, in every model that does not know it (with ``force``: in every model).

    ``source`` is a model's path, or ``zero``, ``mean``, ``pieces``, ``base`` or ``omp`` as in ``retokenize``. With a
    path, ``token`` (or its number, ``token_id``) is the token whose row is taken, by default the same one.
    """

    source: str
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclass(frozen=True)
class OneVocabulary:
    """The vocabulary of a merge: the base's, the union of all, or that of the model at a path; rules for tokens."""

    source: str = "base"
    tokens: Mapping[str, Row] = field(default_factory=dict)
    pad_to_multiple_of: int | None = None


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one checkpoint, as plain transformers sees them.

    ``ids`` is token: number, with added and special tokens; ``rows`` is how many rows its embedding has, of which
    those that no token has are padding. ``roles`` says what special tokens are for; ``spec`` is tokenizer.json.
    """

    ids: Mapping[str, int]
    family: Family
    added: frozenset[str]
    roles: Mapping[str, frozenset[str]]
    rows: int
    spec: Mapping[str, Any]
    where: str

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Number: token."""
        return {i: t for t, i in self.ids.items()}

    @property
    def padding(self) -> list[int]:
        """Numbers of the rows that carry no token."""
        return [i for i in range(self.rows) if i not in self.tokens]

    def same(self, other: Vocabulary) -> bool:
        """Whether every row means the same in both."""
        return self.rows == other.rows and dict(self.ids) == dict(other.ids)

    def conflicts(self, other: Vocabulary) -> list[str]:
        """Tokens that stand in a row which has another token in the other vocabulary."""
        return [t for t, i in sorted(self.ids.items(), key=lambda x: x[1]) if other.tokens.get(i, t) != t]


def vocabulary_of(model: Model) -> Vocabulary:
    """The tokens of a model.

    Raises FitError (``vocabulary-unknown``) where its tokenizer is not a fast one, which says no vocabulary that could
    be compared; IntegrityError where there is none, or where it has tokens beyond the embedding's rows.
    """
    tokenizer = load_tokenizer(model)
    if not getattr(tokenizer, "is_fast", False) or not hasattr(tokenizer, "backend_tokenizer"):
        raise FitError(
            "vocabulary-unknown", f"the tokenizer of {model.path} is not a fast one",
            allowed="a tokenizer with a tokenizer.json", got=type(tokenizer).__name__,
            remedy="convert it: AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)",
        )  # fmt: skip
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    ids = tokenizer.get_vocab()
    rows = rows_of(model)
    if max(ids.values(), default=0) >= rows:
        raise IntegrityError(
            "tokenizer-mismatch", f"the tokenizer of {model.path} has tokens beyond the model's embedding rows",
            allowed=f"numbers below {rows}", got=sorted(ids, key=ids.__getitem__)[-4:],
            remedy="use the tokenizer that the model was trained with",
        )  # fmt: skip
    roles: dict[str, set[str]] = {}
    for role in ROLES:
        token = getattr(tokenizer, role, None)
        if token is not None and str(token) in ids:
            roles.setdefault(str(token), set()).add(role)
    added = frozenset(t["content"] for t in spec.get("added_tokens", []))
    told = {t: frozenset(r) for t, r in roles.items()}
    return Vocabulary(ids, family_of(spec), added | frozenset(told), told, rows, spec, str(model.path))


def rows_of(model: Model) -> int:
    """How many rows the embedding of a model has (the config's ``vocab_size``, of the text part where it has parts)."""
    config = model.config
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    if not isinstance(size, int):
        raise FitError(
            "vocabulary-tensors", f"{model.path} does not say how many rows its embedding has",
            allowed="vocab_size in config.json", got=size, remedy="add it, or leave this model out",
        )  # fmt: skip
    return size


def family_of(spec: Mapping[str, Any]) -> Family:
    """How a tokenizer writes spaces and continuations, from its tokenizer.json."""
    kinds = set(_kinds({k: spec.get(k) for k in ("pre_tokenizer", "decoder", "normalizer")}))
    if spec["model"].get("type") == "WordPiece":
        return "wordpiece"
    if "ByteLevel" in kinds:
        return "bytes"
    if "Metaspace" in kinds or SPACE in kinds or spec["model"].get("type") == "Unigram":
        return "metaspace"
    return "words"


def _kinds(value: Any) -> Iterable[str]:
    """The types of all parts of a tokenizer, and the texts that its replacements put in."""
    if isinstance(value, dict):
        yield from (str(value[k]) for k in ("type", "content", "prepend") if isinstance(value.get(k), str))
        for part in value.values():
            yield from _kinds(part)
    elif isinstance(value, list):
        for part in value:
            yield from _kinds(part)


def spelled(token: str, family: Family) -> bytes | None:
    """The bytes that a token stands for, with a leading space where it begins a word; None where it is no such text."""
    if family == "bytes":
        return bytes(_BYTE[c] for c in token) if token and all(c in _BYTE for c in token) else None
    if family == "metaspace":
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)]) if all(c in "0123456789abcdefABCDEF" for c in token[3:5]) else None
        return token.replace(SPACE, " ").encode()
    if family == "wordpiece" and token.startswith("##") and len(token) > 2:
        return token[2:].encode()
    return f" {token}".encode()


def written(text: bytes, family: Family) -> str | None:
    """The same bytes as a tokenizer of this family would write them in one token; None where it cannot."""
    if family == "bytes":
        return "".join(_CHARACTER[b] for b in text)
    try:
        plain = text.decode()
    except UnicodeDecodeError:
        return f"<0x{text[0]:02X}>" if family == "metaspace" and len(text) == 1 else None
    if family == "metaspace":
        return plain.replace(" ", SPACE)
    if plain.startswith(" ") or family == "words":
        return plain.removeprefix(" ")
    return f"##{plain}"


def matched(own: Vocabulary, target: Vocabulary) -> list[int]:
    """For each row of ``target``: the number of the same token in ``own``, or -1.

    Rows that are padding in both go together. Raises FitError (``vocabulary-roles``) where a token that both know has
    quite another role in each: its row does not mean the same.
    """
    for token in sorted(set(own.roles) & set(target.roles)):
        if not own.roles[token] & target.roles[token]:
            raise FitError(
                "vocabulary-roles", f"{token} has another role in {own.where} than in {target.where}",
                allowed=sorted(target.roles[token]), got=sorted(own.roles[token]),
                remedy="make the special tokens of one tokenizer those of the other, or leave this model out",
            )  # fmt: skip
    found = [-1] * target.rows
    known = own.ids if own.family == target.family else _across(own, target)
    for token, number in target.ids.items():
        found[number] = known.get(token, -1)
    for number in target.padding:
        if number < own.rows and number not in own.tokens:
            found[number] = number
    return found


def _across(own: Vocabulary, target: Vocabulary) -> dict[str, int]:
    """Token of ``target``: number in ``own``, by name, role or text; bytes written out (``<0x41>``) come last."""
    texts: dict[bytes, int] = {}
    plain = [(t.startswith("<0x"), i, t) for t, i in own.ids.items() if t not in own.added]
    for _, number, token in sorted(plain):
        text = spelled(token, own.family)
        if text is not None:
            texts.setdefault(text, number)
    found: dict[str, int] = {}
    for token in target.ids:
        text = spelled(token, target.family) if token not in target.added else None
        same = [t for t, roles in own.roles.items() if roles & target.roles.get(token, frozenset())]
        if token in target.added and (token in own.added or same):
            found[token] = own.ids[token if token in own.added else same[0]]
        elif text is not None and text in texts:
            found[token] = texts[text]
    return found


def pieces_of(own: Vocabulary, target: Vocabulary, tokens: Sequence[str]) -> list[list[int]]:
    """What each token of ``target`` falls into by the own tokenizer: numbers of own tokens.

    Empty where its own tokenizer can only say that it does not know the text, and for special tokens, whose names are
    no text. Upper and lower case, and accents, are treated as the own tokenizer does for WordPiece.
    """
    from tokenizers import Tokenizer

    spelling: Any = Tokenizer.from_str(json.dumps(own.spec))
    spelling.no_padding()  # both may be on in the file (sentence encoders: 128 tokens, filled up)
    spelling.no_truncation()
    unknown = {own.ids[t] for t, roles in own.roles.items() if "unk_token" in roles}
    found = []
    for token in tokens:
        text = None if token in target.roles else _text(token, target)
        ids = [] if text is None else _split(spelling, own, text)
        found.append([] if set(ids) & unknown else ids)
    return found


def _text(token: str, vocabulary: Vocabulary) -> bytes | None:
    return token.encode() if token in vocabulary.added else spelled(token, vocabulary.family)


def _split(spelling: Any, own: Vocabulary, text: bytes) -> list[int]:
    if own.family in {"bytes", "metaspace"}:
        surface = written(text, own.family)
        return [] if surface is None else [t.id for t in spelling.model.tokenize(surface)]
    ids = list(spelling.encode(text.decode(errors="replace"), add_special_tokens=False).ids)
    if ids and own.family == "wordpiece" and not text.startswith(b" "):
        ids[0] = own.ids.get(f"##{own.tokens[ids[0]]}", ids[0])
    return ids


def united(base: Vocabulary, others: Mapping[str, Vocabulary], pad_to_multiple_of: int | None = None) -> Vocabulary:
    """The base's tokens, then those of the others that it lacks, by the others' names and then by their numbers.

    Added tokens stay added ones. Others become tokens of the model part: WordPiece finds them where they are the
    longest match; Unigram gets them with the score that they had; BPE gets the merges that make them, behind all its
    own, so that what the base splits stays split as it is up to the merges that are new.

    Raises FitError (``vocabulary-family``) where the tokenizers are of different kinds.
    """
    kind = base.spec["model"]["type"]
    for name, other in others.items():
        if other.family != base.family or other.spec["model"]["type"] != kind:
            raise FitError(
                "vocabulary-family", f"{name} has another kind of tokenizer than the base",
                allowed=f"{kind} ({base.family})", got=f"{other.spec['model']['type']} ({other.family})",
                remedy="take the base's vocabulary (base instead of union)",
            )  # fmt: skip
    spec = json.loads(json.dumps(base.spec))
    ids, added = dict(base.ids), set(base.added)
    for name in sorted(others):
        other = others[name]
        fresh = [t for t in sorted(other.ids, key=other.ids.__getitem__) if t not in ids]
        numbers = {t: max(ids.values()) + 1 + i for i, t in enumerate(fresh)}
        _extend(spec, {**ids, **numbers}, numbers, other)
        ids |= numbers
        added |= set(fresh) & other.added
    step = pad_to_multiple_of or 1
    rows = -(-max(base.rows, len(ids), max(ids.values()) + 1) // step) * step
    return replace(base, ids=ids, added=frozenset(added), rows=rows, spec=spec, where="the union")


def _extend(spec: dict[str, Any], ids: Mapping[str, int], fresh: Mapping[str, int], other: Vocabulary) -> None:
    """Adds tokens of another tokenizer, with what makes them, to a tokenizer.json."""
    own, theirs = spec["model"], other.spec["model"]
    told = {t["content"]: t for t in other.spec.get("added_tokens", [])}
    spec["added_tokens"] += [{**told[t], "id": fresh[t]} for t in fresh if t in told]
    plain = {t: i for t, i in fresh.items() if t not in told}
    if own["type"] == "Unigram":
        scores = dict(map(tuple, theirs["vocab"]))
        lowest = min(score for _, score in own["vocab"])
        for token in sorted(ids, key=ids.__getitem__)[
            len(own["vocab"]) :
        ]:  # a token's number is its place in this list
            own["vocab"].append([token, scores.get(token, lowest) if token in plain else lowest])
        return
    # added tokens keep their numbers only where the model part has them too, since its own now go on behind them
    own["vocab"] |= {**{t["content"]: t["id"] for t in spec["added_tokens"]}, **plain}
    if own["type"] == "BPE":
        lists = not own["merges"] or isinstance(own["merges"][0], list)
        for merge in theirs["merges"]:
            left, right = merge if isinstance(merge, list) else merge.split(" ")
            if left + right in plain:
                own["merges"].append([left, right] if lists else f"{left} {right}")
