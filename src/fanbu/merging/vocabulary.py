"""Checkpoints brought onto another vocabulary, so that models with different tokenizers can be merged.

Afterwards all checkpoints have the same shapes and the same token in each row, and every way of merging works as it is.
Rows are taken or computed some at a time; nothing but them is changed.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

from fanbu.errors import FitError, UsageError
from fanbu.files import write_text
from fanbu.merging.token_rows import Missing, Rewrite, check_rules
from fanbu.merging.tokens import OneVocabulary, Row, Vocabulary, united, vocabulary_of
from fanbu.model import Model, load_tokenizer, model_files, open_model, said_anew
from fanbu.types import Context

_VOCABULARY_FILES = {"vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "tokenizer.json"}


def retokenize(
    model: Model, target: Model, out: Path, context: Context, *, sources: Mapping[str, str | Row] | None = None,
    missing: Missing = "omp", k: int = 8,
) -> Model:  # fmt: skip
    """``model`` with the vocabulary, the tokenizer and the number of embedding rows of ``target``.

    Rows of tokens that both know are the model's own, bit for bit, and so is all that is not of tokens. For a token t
    that the model does not know, its row e_t is, with d_t the row of the target (the donor):

    - ``omp``: d_t ~ sum over j of c_j d_j with k tokens j that both know (orthogonal matching pursuit), then
      e_t = sum over j of c_j e_j, apart for input and output rows;
    - ``pieces``: the mean of e over what the model's own tokenizer splits the token into, and ``mean`` where that is
      nothing;
    - ``mean``: the mean of all own rows; ``zero``: zeros; ``base``: d_t itself.

    Padding rows (no token has them) are the model's own where it has padding there too, else the target's with
    ``base``, else the mean. The manifest counts how many rows came from where.

    Args:
        sources: rules for single tokens, each one of the names above or a model's path; a ``Row`` can also say that
            the rule counts for a token that the model knows (``force``), or name another token of that model.
        k: how many tokens ``omp`` adds up at most.

    Raises:
        FitError: too few tokens in common (``vocabulary-common``), special tokens with other roles
            (``vocabulary-roles``), tensors that might be of tokens (``vocabulary-tensors``), rows of another width
            (``vocabulary-width``), no fast tokenizer (``vocabulary-unknown``).
        UsageError: a rule that cannot be meant (``vocabulary-source``, ``bad-parameter``).

    Reference: Goddard & Fernandes Neto 2025, "Training-free tokenizer transplantation via orthogonal matching pursuit".
    """
    if missing not in get_args(Missing) or k < 1:
        raise UsageError(
            "bad-parameter", "retokenize: missing or k", allowed=[*get_args(Missing), "k from 1"], got=[missing, k],
            remedy="take one of these",
        )  # fmt: skip
    rules = {t: r if isinstance(r, Row) else Row(r) for t, r in (sources or {}).items()}
    own, new = vocabulary_of(model), vocabulary_of(target)
    work = Rewrite(model, own, new, target, rules, context, k)
    work.plan(missing)
    return work.save(out, target.path, _config(model, own, new, target.config), [target])


def union(
    base: Model, others: Mapping[str, Model], out: Path, context: Context, *,
    tokens: Mapping[str, Row] | None = None, pad_to_multiple_of: int | None = None,
) -> Model:  # fmt: skip
    """``base`` with the tokens of all models: its own, numbered as they were, then the others' by name and number.

    A new token's row is the mean of the rows of those who know it, so for a token that one specialist brings, its row
    and the base's are the same, and whatever the way of merging, it stays as it is.

    What this means for splitting text: the tokenizer is the base's with tokens added. Tokens that were added ones (and
    special ones) are found in the text before anything else. Others join the model part of the tokenizer; in BPE the
    merges that make them come behind all of the base's. So a text with new tokens in it is split in another way than
    by the base, mostly but not always as the specialist who brought them did, and its other tokens may be fewer. The
    base never saw the new tokens in training, and no specialist saw those of another.

    Args:
        tokens: rules for single tokens; here they count for tokens that the base lacks, or with ``force``.
        pad_to_multiple_of: the number of rows is rounded up to a multiple of this.

    Raises:
        FitError: as in ``retokenize``; tokenizers of different kinds (``vocabulary-family``).
        UsageError: a rule that cannot be meant (``vocabulary-source``).
    """
    own = vocabulary_of(base)
    known = {name: vocabulary_of(model) for name, model in others.items()}
    new = united(own, known, pad_to_multiple_of)
    with tempfile.TemporaryDirectory() as folder:
        _write_tokenizer(base, new, Path(folder))
        return _extended(base, own, others, known, new, None, Path(folder), out, context, tokens or {})


def _extended(
    base: Model, own: Vocabulary, others: Mapping[str, Model], known: Mapping[str, Vocabulary], new: Vocabulary,
    donor: Model | None, tokenizer: Path, out: Path, context: Context, rules: Mapping[str, Row],
) -> Model:  # fmt: skip
    """The base on a new vocabulary; rows that it lacks are those of the models that know them."""
    work = Rewrite(base, own, new, donor, rules, context, 8)
    work.borrow({name: (others[name], known[name]) for name in sorted(others)})
    work.plan("omp" if donor else "mean")
    config = _config(base, own, new, donor.config if donor else base.config)
    return work.save(out, tokenizer, config, [others[n] for n in sorted(others)])


@contextmanager
def one_vocabulary(
    base: Model, others: Mapping[str, Model], out: Path, context: Context, how: OneVocabulary
) -> Iterator[tuple[Model, dict[str, Model]]]:
    """Base and specialists on one vocabulary, those that need it rewritten in a folder beside ``out`` until the end.

    A specialist that does not know a token gets the base's row for it, so it does not change it. Models that have the
    vocabulary already are handed through as they are. Raises as ``retokenize`` and ``union``.
    """
    # the name is one that save_model clears away after a kill
    temporary = out.with_name(f".{out.name}.vocabulary.{os.getpid()}.partial")
    try:
        large = _common_base(base, others, temporary / "base", context, how)
        target = vocabulary_of(large)
        check_rules(how.tokens, target)
        forced = {t: r for t, r in how.tokens.items() if r.force}
        found = {}
        for number, (name, model) in enumerate(others.items()):
            if model.path == base.path:
                found[name] = large
            elif not forced and vocabulary_of(model).same(target):
                found[name] = model
            else:
                found[name] = retokenize(
                    model, large, temporary / str(number), context, sources=how.tokens, missing="base"
                )
        yield large, found
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _common_base(base: Model, others: Mapping[str, Model], out: Path, context: Context, how: OneVocabulary) -> Model:
    step = how.pad_to_multiple_of
    if step is not None and step < 1:
        raise UsageError(
            "bad-parameter", "pad_to_multiple_of", allowed="a whole number from 1", got=step, remedy="leave it out"
        )
    rest = {name: model for name, model in others.items() if model.path != base.path}
    own, known = vocabulary_of(base), {name: vocabulary_of(model) for name, model in rest.items()}
    donor = base if how.source in ("base", "union") else open_model(how.source, verify=False)
    new = united(vocabulary_of(donor), known if how.source == "union" else {}, step)
    if own.same(new) and not any(r.force for r in how.tokens.values()):
        return base
    if how.source == "union":
        return union(base, rest, out, context, tokens=how.tokens, pad_to_multiple_of=step)
    return _extended(base, own, rest, known, new, donor, donor.path, out, context, how.tokens)


def check_one_vocabulary(base: Model, specialist: Model, name: str) -> None:
    """Raises FitError (``other-vocabulary``) where rows of two models' embeddings stand for different tokens.

    A model without a tokenizer is taken at its word, and tokens in rows that are padding in the other are no matter.
    """
    if not all((m.path / "tokenizer.json").exists() for m in (base, specialist)):
        return
    first, second = base.path / "tokenizer.json", specialist.path / "tokenizer.json"
    same_rows = base.config.get("vocab_size") == specialist.config.get("vocab_size")
    if same_rows and first.read_bytes() == second.read_bytes():
        return
    own, other = vocabulary_of(specialist), vocabulary_of(base)
    different = own.conflicts(other)
    if different or own.rows != other.rows:
        raise FitError(
            "other-vocabulary", f"{name} has another vocabulary than the base",
            allowed=f"{other.rows} rows for the same tokens",
            got=f"{own.rows} rows; other tokens: {', '.join(different[:6]) or 'none'}",
            remedy="bring them onto one: --vocabulary base, or union to keep all tokens (mergekit: tokenizer_source)",
        )  # fmt: skip


def _config(model: Model, own: Vocabulary, new: Vocabulary, target: Mapping[str, Any]) -> dict[str, Any]:
    """The model's config with the new number of rows, and the numbers of special tokens in the new vocabulary."""
    config: dict[str, Any] = copy.deepcopy(dict(model.config))
    for part, theirs in ((config, target), (config.get("text_config"), target.get("text_config") or target)):
        if not isinstance(part, dict):
            continue
        if "vocab_size" in part:
            part["vocab_size"] = new.rows
        for key in sorted({k for k in [*part, *theirs] if k.endswith("_token_id")}):
            part[key] = theirs[key] if theirs.get(key) is not None else _translated(part.get(key), own, new)
    return config


def _translated(value: Any, own: Vocabulary, new: Vocabulary) -> Any:
    if isinstance(value, list):
        found = [_translated(v, own, new) for v in value]
        return [v for v in found if v is not None] or None
    return new.ids.get(own.tokens.get(value, "")) if isinstance(value, int) else value


def _write_tokenizer(base: Model, new: Vocabulary, folder: Path) -> None:
    """The base's tokenizer files for more tokens; what would say the same in an older format is left out."""
    for name in model_files(base.path):
        kept = not name.endswith((".safetensors", ".index.json", ".model", ".tiktoken"))
        if kept and name not in _VOCABULARY_FILES | {"config.json"}:
            shutil.copyfile(base.path / name, folder / name)
    write_text(folder / "tokenizer.json", json.dumps(new.spec, ensure_ascii=False))
    told = folder / "tokenizer_config.json"
    settings = json.loads(told.read_text(encoding="utf-8")) if told.exists() else {}
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in new.spec["added_tokens"]
        }
        write_text(told, json.dumps(settings, ensure_ascii=False, indent=2))
    config = {**base.config, "vocab_size": new.rows}
    write_text(folder / "config.json", json.dumps(config, default=str))
    got = load_tokenizer(Model(folder, config)).get_vocab()
    wrong = sorted(t for t in {**got, **new.ids} if got.get(t) != new.ids.get(t))
    if wrong:
        raise FitError(
            "vocabulary-union", "the tokenizer of the union does not load as it was written",
            allowed="a tokenizer that transformers reads from tokenizer.json alone", got=wrong[:6],
            remedy="take the base's vocabulary (base instead of union)",
        )  # fmt: skip


def tell(made: Model, large: Model, base: Model, how: OneVocabulary) -> Model:
    """The merged model with a manifest that names the real base, in place of one that lay beside it for a while."""
    parents = [base.digest if p == large.digest else p for p in made.manifest["parents"]]
    source = how.source.rstrip("/").rpartition("/")[2]  # paths of this machine do not belong in a checkpoint
    return said_anew(made, {"parents": parents, "parameters": {**made.manifest["parameters"], "vocabulary": source}})
