"""mergekit's YAML recipes, read into our words: models, layers and parameters of one merge.

Only plain values are read. The facts are those of mergekit 0.1.5: lists are gradients over the layers, ``filter`` is a
part of a tensor's name, the first one that fits counts, and an entry without ``filter`` stands for all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fanbu.errors import UsageError
from fanbu.merging.dials import Dial, Level
from fanbu.merging.tokens import OneVocabulary, Row

MAX_BYTES = 2**20
DTYPES = {"float32", "float16", "bfloat16"}
_KEYS = {
    "merge_method", "base_model", "models", "slices", "parameters", "dtype", "out_dtype", "tokenizer_source",
    "tokenizer", "name",
}  # fmt: skip
_IGNORED = {"int8_mask"}  # it saves memory that we do not need


@dataclass(frozen=True)
class Member:
    """One model of a merge, with its own parameters."""

    path: str
    parameters: Mapping[str, Dial] = field(default_factory=dict)


@dataclass(frozen=True)
class Slice:
    """Layers ``first`` to ``last`` (not included) of one model."""

    path: str
    first: int
    last: int


@dataclass(frozen=True)
class MergekitRecipe:
    """A checked recipe. ``slices`` is filled for ``passthrough`` alone; without ``tokenizer`` it says nothing of it."""

    method: str
    base: str | None
    members: tuple[Member, ...]
    slices: tuple[Slice, ...]
    parameters: Mapping[str, Dial]
    dtype: str | None
    tokenizer: OneVocabulary | None = None


def read_mergekit(path: Path) -> MergekitRecipe:
    """Reads and checks a recipe. Raises UsageError that names what is wrong, or what we cannot do."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise _wrong("file", f"a YAML file of at most {MAX_BYTES} bytes", path)
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _wrong("file", "YAML", str(error).partition("\n")[0]) from None
    if not isinstance(value, dict):
        raise _wrong("file", "a mapping", type(value).__name__)
    unknown = sorted(map(str, set(value) - _KEYS))
    if unknown:
        raise _wrong("key", sorted(_KEYS), unknown)
    method = str(value.get("merge_method"))
    base = None if value.get("base_model") is None else _path(value["base_model"])
    tokenizer = _tokenizer(value)
    dtype = value.get("out_dtype") or value.get("dtype")
    if dtype is not None and dtype not in DTYPES:
        raise _wrong("dtype", sorted(DTYPES), dtype)
    common = _parameters(value.get("parameters"))
    if method == "passthrough":
        if tokenizer not in (None, OneVocabulary()):
            raise _wrong("tokenizer_source", "base with passthrough", value.get("tokenizer_source", "tokenizer"))
        return MergekitRecipe(method, base, (), _stack(value), common, dtype)
    return MergekitRecipe(method, base, _members(value), (), common, dtype, tokenizer)


def _tokenizer(value: Mapping[str, Any]) -> OneVocabulary | None:
    """``tokenizer_source``, or ``tokenizer`` with a source (union where it says none), rules for tokens and padding."""
    short, long = value.get("tokenizer_source"), value.get("tokenizer")
    if short is not None and long is not None:
        raise _wrong("tokenizer_source", "one of tokenizer_source and tokenizer", "both")
    if long is None:
        return None if short is None else OneVocabulary(_path(short).removeprefix("model:"))
    long = _mapping(long, "tokenizer")
    unknown = sorted(map(str, set(long) - {"source", "tokens", "pad_to_multiple_of"}))
    if unknown:
        raise _wrong("tokenizer", ["source", "tokens", "pad_to_multiple_of"], unknown)
    step = long.get("pad_to_multiple_of")
    if step is not None and (type(step) is not int or step < 1):
        raise _wrong("pad_to_multiple_of", "a whole number from 1", step)
    tokens = {str(t): _row(str(t), r) for t, r in _mapping(long.get("tokens") or {}, "tokens").items()}
    return OneVocabulary(_path(long.get("source", "union")).removeprefix("model:"), tokens, step)


def _row(token: str, value: Any) -> Row:
    """Where the row of one token comes from: ``zero``, a model's path, or a token of a model."""
    rule = _mapping(value, f"tokens: {token}")
    source, force = rule.get("source"), rule.get("force", False)
    if set(rule) - {"source", "force"} or type(force) is not bool:
        raise _wrong(f"tokens: {token}", "source, and force as true or false", value)
    if source == "zero" or source == {"kind": "zero"}:
        return Row("zero", force=force)
    if not isinstance(source, dict) or source.get("kind") != "model_token":
        return Row(_path(source), force=force)
    name, number = source.get("token"), source.get("token_id")
    if set(source) - {"kind", "model", "token", "token_id"} or (name is None) == (number is None):
        raise _wrong(f"tokens: {token}", "kind, model, and one of token and token_id", source)
    if not isinstance(name, str | None) or type(number) not in (int, type(None)):
        raise _wrong(f"tokens: {token}", "token as a text or token_id as a whole number", source)
    return Row(_path(source.get("model")), name, number, force)


def _members(value: Mapping[str, Any]) -> tuple[Member, ...]:
    listed = value.get("models")
    if listed is None and isinstance(value.get("slices"), list) and len(value["slices"]) == 1:
        listed = value["slices"][0].get("sources")  # one slice of all layers
    if not isinstance(listed, list) or not listed:
        raise _wrong("models", "a list of models (several slices: passthrough only)", value.get("slices"))
    return tuple(Member(_path(_mapping(m, "models")["model"]), _parameters(m.get("parameters"))) for m in listed)


def _stack(value: Mapping[str, Any]) -> tuple[Slice, ...]:
    found = []
    for part in value.get("slices") or [{"sources": value.get("models")}]:
        sources = _mapping(part, "slices").get("sources")
        if not isinstance(sources, list) or len(sources) != 1:
            raise _wrong("slices", "one source in each slice of passthrough", sources)
        source = _mapping(sources[0], "sources")
        span: Any = source.get("layer_range")
        numbers = isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
        if not numbers or not 0 <= span[0] < span[1]:
            raise _wrong("layer_range", "[first, last] with 0 <= first < last", span)
        if source.get("parameters") or value.get("parameters"):
            raise _wrong("parameters", "none with passthrough", source.get("parameters") or value.get("parameters"))
        found.append(Slice(_path(source["model"]), span[0], span[1]))
    return tuple(found)


def _parameters(value: Any) -> dict[str, Dial]:
    if value is None:
        return {}
    return {str(k): _dial(str(k), v) for k, v in _mapping(value, "parameters").items() if str(k) not in _IGNORED}


def _dial(name: str, value: Any) -> Dial:
    if isinstance(value, list) and value and all(isinstance(v, dict) for v in value):
        found: dict[str, Level] = {}
        for entry in value:
            if set(entry) - {"filter", "value"} or "value" not in entry:
                raise _wrong(name, "entries with value, and filter where it is not for all", entry)
            found.setdefault(str(entry.get("filter", "*")), _level(name, entry["value"]))
        return found
    return _level(name, value)


def _level(name: str, value: Any) -> Level:
    numbers = value if isinstance(value, list) else [value]
    if not numbers or any(isinstance(n, str | dict | list) or n is None for n in numbers):
        raise _wrong(name, "a number, a list of numbers, or entries with filter and value", value)
    return [float(n) for n in numbers] if isinstance(value, list) else float(value)


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, "a mapping", value)
    return value


def _path(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    if not isinstance(path, str) or "+" in path.rpartition("/")[2]:
        raise _wrong("model", "a directory or hub id (merge an adapter with --specialist instead of +adapter)", value)
    return path


def names_of(paths: Sequence[str]) -> list[str]:
    """Short names that differ: the last part of each path, numbered where it comes twice."""
    found: list[str] = []
    for path in paths:
        name = path.rstrip("/").rpartition("/")[2] or "model"
        found.append(name if name not in found else f"{name}-{len(found)}")
    return found


def _wrong(what: str, allowed: object, got: object) -> UsageError:
    return UsageError(
        "mergekit", f"mergekit recipe: {what}", allowed=allowed, got=got, remedy="see docs/from-mergekit.md"
    )
