"""The rows of a checkpoint that belong to tokens: which tensors have them, and how they are written anew.

A ``Rewrite`` says for each row of the new vocabulary where it comes from: the model's own row, or a sum of rows of
models (its own, the donor's, others'), or the mean. Rows are made some at a time as they are written.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from fanbu.errors import FitError, UsageError
from fanbu.merging.dials import layer_of
from fanbu.merging.engine import shard_bytes
from fanbu.merging.omp import Table, sparse_codes
from fanbu.merging.task_vector import head_tensors
from fanbu.merging.tokens import Row, Vocabulary, matched, pieces_of, rows_of, vocabulary_of
from fanbu.model import Model, open_model, provenance, save_model
from fanbu.tensors import Shards, Tensors, chunks
from fanbu.types import Context

Missing = Literal["omp", "pieces", "mean", "zero", "base"]
Role = Literal["input", "output", "bias"]
MIN_COMMON = 64  # with fewer tokens in common, two vocabularies have nothing to do with each other
_INPUT = re.compile(r"(^|\.)(embed_tokens|word_embeddings|wte|tok_embeddings|embed_in|shared|word_embedding)\.weight$")
_OUTPUT = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|predictions\.decoder|vocab_projector|generator_lm_head|decoder)"
    r"\.(weight|bias)$|(^|\.)(lm_head|predictions)\.bias$"
)
_OTHER = re.compile(r"position|token_type|wpe|norm|pooler")  # tables and matrices outside the layers, not of tokens


def token_tensors(model: Model) -> dict[str, Role]:
    """The tensors whose rows are tokens', and what they do: ``input`` embeddings, ``output`` weights, output ``bias``.

    Raises FitError (``vocabulary-tensors``) where there is no embedding of the config's ``vocab_size``, or a tensor
    outside the layers has as many rows and a name that does not say whose they are.
    """
    rows = rows_of(model)
    found: dict[str, Role] = {}
    doubtful = []
    heads = set(head_tensors(model))
    for name, spec in sorted(model.tensors.items()):
        if layer_of(name) is not None or name in heads or not spec.shape:
            continue
        if _INPUT.search(name) or _OUTPUT.search(name):
            found[name] = "input" if _INPUT.search(name) else "bias" if name.endswith(".bias") else "output"
            doubtful += [name] if spec.shape[0] != rows else []
        elif spec.shape[0] == rows and len(spec.shape) > 1 and not _OTHER.search(name):
            doubtful.append(name)
    if doubtful or "input" not in found.values():
        raise FitError(
            "vocabulary-tensors", f"it is not clear which tensors of {model.path} belong to tokens",
            allowed=f"an embedding and output weights of {rows} rows, by their usual names",
            got=[f"{n} {model.tensors[n].shape}" for n in doubtful] or "no embedding",
            remedy="leave this model out, or use distill, which needs no common vocabulary",
        )  # fmt: skip
    return found


class TokenRows:
    """The token rows of one model, by role. Where output rows are tied to input rows, these stand for both."""

    def __init__(self, model: Model) -> None:
        self.model, self.tensors, self.roles = model, Tensors(model.path), token_tensors(model)

    def name(self, role: Role) -> str | None:
        """The tensor that plays a role; None for a bias that the model has not (it is zero)."""
        first = {r: n for n, r in reversed(self.roles.items())}
        return first.get(role) if role == "bias" else first.get(role, first["input"])

    def take(self, role: Role, ids_n: Tensor) -> Tensor | None:
        """Rows as float32: [n, width], of a bias [n]."""
        name = self.name(role)
        return None if name is None else self.all(name)[ids_n].float()

    def all(self, name: str) -> Tensor:
        """All rows of one tensor: a view of the file, so that only what is picked from it is memory."""
        return self.tensors.rows(name, 0, self.tensors.specs[name].rows)

    @property
    def width(self) -> int:
        """How many numbers the embedding of a token has."""
        return self.tensors.specs[self.name("input") or ""].shape[1]


@dataclass(frozen=True)
class Blend:
    """Rows as sums of a model's rows: row targets[i] += sum over j of coefficients[i, j] rows[ids[i, j]]."""

    targets_n: Tensor
    rows: TokenRows
    ids_nm: Tensor
    coefficients_nm: Tensor

    @staticmethod
    def of(targets: Sequence[int], rows: TokenRows, ids: Sequence[Sequence[int]], weights: Sequence[float]) -> Blend:
        """weights[i] times the sum of the rows ids[i], for ascending targets."""
        most = max(map(len, ids), default=0)
        table = torch.tensor([[*i, *[0] * (most - len(i))] for i in ids], dtype=torch.int64).reshape(-1, most)
        values = torch.tensor([[w] * len(i) + [0.0] * (most - len(i)) for i, w in zip(ids, weights, strict=True)])
        return Blend(torch.tensor(targets, dtype=torch.int64), rows, table, values.reshape(-1, most))

    def add(self, into: Tensor, start: int, stop: int, role: Role) -> None:
        """Adds its part to the new rows ``start`` to ``stop``."""
        low, high = torch.searchsorted(self.targets_n, torch.tensor([start, stop])).tolist()
        for place in range(self.ids_nm.shape[1]) if high > low else ():
            values = self.rows.take(role, self.ids_nm[low:high, place])
            if values is not None:
                weights = self.coefficients_nm[low:high, place].reshape(-1, *[1] * (into.ndim - 1))
                into.index_add_(0, self.targets_n[low:high] - start, (weights * values).to(into.dtype))


@dataclass
class Rewrite:
    """One model's way onto the vocabulary ``new``; ``donor`` is a model that has its rows, if there is one."""

    model: Model
    own: Vocabulary
    new: Vocabulary
    donor: Model | None
    rules: Mapping[str, Row]
    context: Context
    k: int
    blends: list[Blend] = field(default_factory=list)
    groups: dict[str, list[int]] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    named: dict[str, tuple[TokenRows, Vocabulary]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_rules(self.rules, self.new)
        self.match = matched(self.own, self.new)
        for token, rule in self.rules.items():
            if rule.force:
                self.match[self.new.ids[token]] = -1
        self.open = {i for i, m in enumerate(self.match) if m < 0}

    @cached_property
    def rows(self) -> TokenRows:
        """The model's own rows."""
        return TokenRows(self.model)

    @cached_property
    def theirs(self) -> TokenRows:
        """The donor's rows."""
        assert self.donor is not None
        return TokenRows(self.donor)

    def borrow(self, others: Mapping[str, tuple[Model, Vocabulary]]) -> None:
        """Gives tokens that the model lacks, and no rule is for, the mean of the rows of those who know them."""
        free = self.open - {self.new.ids[t] for t in self.rules}
        known = {name: matched(vocabulary, self.new) for name, (_, vocabulary) in others.items()}
        claims = Counter(i for m in known.values() for i in free if i in self.new.tokens and m[i] >= 0)
        for name, match in known.items():
            targets = sorted(i for i in claims if match[i] >= 0)
            if targets:
                rows = self._fitting(others[name][0])
                weights = [1.0 / claims[i] for i in targets]
                self.blends.append(Blend.of(targets, rows, [[match[i]] for i in targets], weights))
        self.open -= set(claims)
        self.counts["others"] = len(claims)

    def plan(self, missing: Missing) -> None:
        """Decides for all rows that are still open. ``missing`` is for tokens that no rule is for."""
        common = sum(self.match[i] >= 0 for i in self.new.tokens)
        if self.open and common < MIN_COMMON:
            raise FitError(
                "vocabulary-common", f"{self.own.where} and {self.new.where} have too few tokens in common",
                allowed=f"at least {MIN_COMMON}", got=common,
                remedy="use distill, which needs no common vocabulary, or leave this model out",
            )  # fmt: skip
        beyond = [i for i in sorted(self.open) if i not in self.new.tokens]
        self.groups["base" if missing == "base" and self.donor else "mean"] = beyond
        for number in sorted(self.open - set(beyond)):
            rule = self.rules.get(self.new.tokens[number], Row(missing))
            if rule.source in get_args(Missing):
                self.groups.setdefault(rule.source, []).append(number)
            else:
                self._from_model(number, rule)
        if self.donor is None and (self.groups.get("base") or self.groups.get("omp")):
            raise _source(["base", "omp"], "zero, mean, pieces or a model's path, in a union")
        self._pieces(self.groups.pop("pieces", []))
        base = sorted(self.groups.get("base", []))
        if base:
            self.blends.append(Blend.of(base, self._fitting(self.theirs.model), [[i] for i in base], [1.0] * len(base)))
        self.counts.update({k: len(v) for k, v in self.groups.items()}, own=self.new.rows - len(self.open))
        self.counts["own"] -= self.counts["others"]

    def _pieces(self, numbers: Sequence[int]) -> None:
        split = pieces_of(self.own, self.new, [self.new.tokens[i] for i in numbers])
        whole = [(i, ids) for i, ids in zip(numbers, split, strict=True) if ids]
        self.groups.setdefault("mean", []).extend(i for i, ids in zip(numbers, split, strict=True) if not ids)
        self.counts["pieces"] += len(whole)
        if whole:
            targets, ids = [i for i, _ in whole], [ids for _, ids in whole]
            self.blends.append(Blend.of(targets, self.rows, ids, [1.0 / len(i) for i in ids]))

    def _from_model(self, number: int, rule: Row) -> None:
        """The row of a token of the model that a rule names."""
        if rule.source not in self.named:
            model = open_model(rule.source, verify=False)
            self.named[rule.source] = (self._fitting(model), vocabulary_of(model))
        rows, vocabulary = self.named[rule.source]
        token = rule.token if rule.token is not None else self.new.tokens[number]
        place = vocabulary.ids.get(token, -1) if rule.token_id is None else rule.token_id
        if not 0 <= place < vocabulary.rows:
            raise _source([token if rule.token_id is None else rule.token_id], f"a token of {rule.source}")
        self.blends.append(Blend.of([number], rows, [[place]], [1.0]))
        self.counts["rules"] += 1

    def _fitting(self, model: Model) -> TokenRows:
        rows = TokenRows(model)
        if rows.width != self.rows.width:
            raise FitError(
                "vocabulary-width", f"{model.path} has embeddings of another width than {self.model.path}",
                allowed=self.rows.width, got=rows.width, remedy="let missing rows be made by omp, pieces or mean",
            )  # fmt: skip
        return rows

    def save(self, out: Path, tokenizer: Path, config: Mapping[str, Any], parents: Sequence[Model]) -> Model:
        """Writes the model with its new rows; all else is copied bit for bit."""
        source, roles = self.rows.tensors, self.rows.roles
        layouts = {n: (s.shape, s.torch_dtype) for n, s in source.specs.items()}
        layouts |= {n: ((self.new.rows, *layouts[n][0][1:]), layouts[n][1]) for n in roles}

        def fill(folder: Path) -> dict[str, str]:
            shards = Shards(folder, layouts, shard_bytes(sum(s.bytes for s in source.specs.values())))
            for done, name in enumerate(sorted(layouts), 1):
                for start, stop in chunks(layouts[name][0]):
                    plain = name not in roles
                    shards.put(name, start, (source.rows if plain else self.made)(name, start, stop))
                self.context.progress("retokenize", done, len(layouts))
            return shards.close()

        counts = {k: v for k, v in sorted(self.counts.items()) if v}
        made = provenance("retokenize", [self.model, *parents], self.context, rows=counts)
        return save_model(out, config, fill, tokenizer, made)

    def made(self, name: str, start: int, stop: int) -> Tensor:
        """The new rows ``start`` to ``stop`` of one tensor."""
        role, old = self.rows.roles[name], self.rows.all(name)
        index_n = torch.tensor(self.match[start:stop])
        mine_n = index_n >= 0
        rows = torch.empty((stop - start, *old.shape[1:]), dtype=old.dtype)
        rows[mine_n] = old[index_n[mine_n]]
        if not bool(mine_n.all()):
            wide = torch.zeros(rows.shape, dtype=torch.promote_types(old.dtype, torch.float32))
            for blend in [*self.blends, *self._omp(role)]:
                blend.add(wide, start, stop, role)
            low, high = torch.searchsorted(self.means, torch.tensor([start, stop])).tolist()
            if high > low:
                wide[self.means[low:high] - start] += self._mean(name).to(wide.dtype)
            rows[~mine_n] = wide[~mine_n].to(rows.dtype)
        return rows

    @cached_property
    def means(self) -> Tensor:
        """The rows that are the mean of the own ones, ascending; known once ``plan`` is done."""
        return torch.tensor(sorted(self.groups.get("mean", [])), dtype=torch.int64)

    def _mean(self, name: str) -> Tensor:
        """The mean row of all own tokens (not of padding)."""
        known: dict[str, Tensor] = self.__dict__.setdefault("_means", {})
        if name not in known:
            old, numbers = self.rows.all(name), torch.tensor(sorted(self.own.ids.values()))
            total = torch.zeros(old.shape[1:], dtype=torch.float64)
            for start, stop in chunks((len(numbers), *old.shape[1:])):
                total += old[numbers[start:stop]].double().sum(0)
            known[name] = total / len(numbers)
        return known[name]

    def _omp(self, role: Role) -> list[Blend]:
        """Sums of common tokens, found in the donor's rows of this role (a bias goes with the output weights)."""
        numbers = sorted(self.groups.get("omp", []))
        if not numbers:
            return []
        known: dict[str, Blend] = self.__dict__.setdefault("_codes", {})
        part: Role = "output" if role == "bias" and "output" in self.rows.roles.values() else role
        part = "input" if part == "bias" else part
        name = cast(str, self.theirs.name(part))
        if name not in known:
            table, width = self.theirs.all(name), self.theirs.width
            common = torch.tensor([i for i in sorted(self.new.tokens) if self.match[i] >= 0])
            targets = torch.tensor(numbers)
            vectors = Table(len(targets), width, lambda ids: table[targets[ids]].float())
            atoms = Table(len(common), width, lambda ids: table[common[ids]].float())
            ids, coefficients = sparse_codes(vectors, atoms, min(self.k, len(common)), self.context)
            mine = torch.tensor(self.match)[common][ids]
            known[name] = Blend(targets, self.rows, mine, coefficients)
        return [known[name]]


def check_rules(rules: Mapping[str, Row], vocabulary: Vocabulary) -> None:
    """Raises UsageError (``vocabulary-source``) where a rule is for a token that the vocabulary has not."""
    unknown = sorted(set(rules) - set(vocabulary.ids))
    if unknown:
        raise _source(unknown, "tokens of the vocabulary that is made")


def _source(got: Sequence[object], allowed: str) -> UsageError:
    return UsageError(
        "vocabulary-source", "a rule for a token's row cannot be followed", allowed=allowed, got=list(got)[:6],
        remedy="change or leave out this rule",
    )  # fmt: skip
