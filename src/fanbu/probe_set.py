"""The probe set of a round: texts of its domains, through their boundaries, and public ones; never a held-out one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from fanbu.batches import evenly
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.data.check import normalised
from fanbu.data.load import RawRow
from fanbu.data.split import cap
from fanbu.data.synthetic import Corpus, synthetic
from fanbu.domain import Domain, is_target
from fanbu.errors import DataError
from fanbu.files import write_text
from fanbu.model import load_network, load_tokenizer
from fanbu.predict import written
from fanbu.recipe import Recipe, open_domain, public_texts
from fanbu.recipe_parts import Step
from fanbu.types import CLASSIFYING, Context, ProbeRow, ProbeSet

if TYPE_CHECKING:
    from fanbu.turn import Turn


def probe_of(turn: Turn, steps: Iterable[Step]) -> ProbeSet:
    """The probe set that a round needs for these ways back and, in a classification round, for its label rows; else an
    empty one."""
    asking = any(method(step.method, "feedback").needs.probe for step in steps)
    if not asking and not any(d.task in CLASSIFYING for d in turn.domains.values()):
        return ProbeSet()
    probe = gather_probe(turn)
    if turn.recipe.probe.written:
        probe = with_written(replace(turn, context=replace(turn.context, probe=probe)))
    return probe


def gather_probe(turn: Turn) -> ProbeSet:
    """The probe set: texts (never labels) of domains, their own or synthetic ones, and public ones. Their bytes count.

    A guard gives its texts too where it names unlabelled ones and others of its industry feed: it is a target then,
    that learns from them without labels of its own.

    A text that is in the test rows of any domain is left out, also of one that has yet to join, and of rows that wait
    for their label: test data never trains.
    """
    spec, rows = turn.recipe.probe, []
    later = [] if turn.centre else joining_later(turn.recipe, turn.number, turn.workspace.left())
    asked = [*turn.feeding, *(d for d in turn.here.values() if is_target(d, turn.feeding))]
    calls = [(d, what) for d in asked if (what := spec.from_domain(d.share)) is not None]
    for _, texts in turn.at_owners(domain_texts, calls):
        rows += texts
    for number, public in enumerate(spec.public):
        rows += [ProbeRow(f"public{number}/{r.id}", r.text, None) for r in public_texts(public, turn.feeding[0].task)]
    kept = without_test_texts(rows, [*turn.domains.values(), *later])
    if turn.centre:  # each owner looks for its own
        asking = replace(turn, context=replace(turn.context, probe=ProbeSet(tuple(kept))))
        told = asking.at_owners(held_out, [(d,) for d in asking.here.values()])
        held = {number for _, numbers in told for number in numbers}
        kept = [row for number, row in enumerate(kept) if number not in held]
    if len(kept) < len(rows):
        turn.warnings.append(f"{len(rows) - len(kept)} probe texts that are also test rows of a domain were left out")
    return ProbeSet(tuple(kept))


def with_written(turn: Turn) -> ProbeSet:
    """The probe set, and texts of each domain in it that the large model has written to the end: what its specialists
    say of these is said of what the large model itself would write."""
    probe, model = turn.context.probe, turn.parent or turn.base
    chosen = [
        row
        for d in sorted({row.domain for row in probe.rows if row.domain})
        for row in evenly([row for row in probe.rows if row.domain == d], turn.recipe.probe.written)
    ]

    def make(out: Path, context: Context) -> None:
        network, tokenizer = load_network(model).to(context.device), load_tokenizer(model)
        texts = written(network, tokenizer, [row.text for row in chosen], context)
        write_text(out / "texts.json", json.dumps(texts))

    inputs = {"model": model.digest, "rows": [row.id for row in chosen], **turn.settings(probe=True)}
    done = turn.stage("written texts", "fanbu.predict", inputs, make)
    texts = json.loads((done.path / "texts.json").read_text(encoding="utf-8"))
    new = [ProbeRow(f"{row.id}/written", text, row.domain) for row, text in zip(chosen, texts, strict=True) if text]
    return ProbeSet((*probe.rows, *new))


def without_test_texts(rows: Iterable[ProbeRow], domains: Iterable[Domain]) -> list[ProbeRow]:
    """The rows whose text no domain holds out for its test."""
    held_out = {normalised(text) for d in domains for text in [*d.test.texts, *d.waiting]}
    return [row for row in rows if normalised(row.text) not in held_out]


def held_out(turn: Turn, d: Domain) -> set[int]:
    """Which rows of the probe set (their numbers) an owner holds out for its test."""

    def make() -> Contribution:
        kept = set(without_test_texts(turn.context.probe.rows, [d]))
        held = [number for number, row in enumerate(turn.context.probe.rows) if row not in kept]
        return Contribution("scores", d.name, "held out", meta={"rows": held})

    inputs = {"domain": d.digest, "probe": turn.context.probe.digest}
    found, _ = turn.contribution(f"held out {d.name}", "fanbu.contribution", inputs, d, lambda out, c: make())
    return {int(number) for number in found.meta["rows"]}


def joining_later(recipe: Recipe, number: int, left: Collection[str]) -> list[Domain]:
    """The domains that join after round ``number``, as they will be then; without those whose files are yet to come."""
    found = []
    for name, spec in {**recipe.domains, **recipe.guards}.items():
        if spec.joins > number and name not in left:
            with contextlib.suppress(DataError):
                found.append(open_domain(name, spec, "guard" if name in recipe.guards else "feeds", spec.joins))
    return found


def domain_texts(turn: Turn, d: Domain, what: Literal["own", "synthetic"]) -> list[ProbeRow]:
    """One domain's texts, through its boundary: its training and unlabelled ones, each once, or synthetic ones."""
    spec, seed = turn.recipe.probe, turn.context.seeded("synthetic", d.name)
    if what == "own":
        name, inputs = "probe texts", {"domain": d.digest, "limit": spec.limit}
        made = partial(probe_texts, d, spec.limit)
    else:
        name, inputs = "synthetic texts", {"domain": d.digest, "count": spec.synthetic, "seed": seed}
        made = partial(synthetic_texts, d, spec.synthetic, seed)
    got, _ = turn.contribution(f"{name} {d.name}", "fanbu.contribution", inputs, d, lambda out, c: made())
    return probe_rows(got)


def probe_texts(d: Domain, limit: int | None) -> Contribution:
    """What a domain gives to the probe set: its training and unlabelled texts, each once, at most ``limit``."""
    texts = d.texts if d.role == "feeds" else list(dict.fromkeys(d.unlabelled.texts))
    chosen = cap([RawRow(str(i), text, None) for i, text in enumerate(texts)], limit, "probe")
    rows = [{"id": f"{d.name}/{r.id}", "text": r.text, "domain": d.name} for r in chosen]
    return Contribution("samples", d.name, "probe texts", rows=rows)


def synthetic_texts(d: Domain, count: int, seed: int) -> Contribution:
    """What a domain that keeps its texts gives instead (``data.synthetic``)."""
    corpus = Corpus(d.every_text)  # a walk may come upon a held-out text
    known = dict(zip(d.train.texts, d.train.labels or (), strict=False)) if d.role == "feeds" else {}
    texts = d.texts if d.role == "feeds" else list(d.unlabelled.texts)
    labels = [known.get(text, -1) for text in texts]
    made = [text for text in synthetic(texts, count, seed, labels=labels) if corpus.hides(text)]
    rows = [{"id": f"{d.name}/synthetic-{i}", "text": text, "domain": d.name} for i, text in enumerate(made)]
    return Contribution("samples", d.name, "synthetic texts", rows=rows)


def probe_rows(texts: Contribution) -> list[ProbeRow]:
    """The probe rows that came from one domain."""
    return [ProbeRow(r["id"], r["text"], r["domain"]) for r in texts.rows]
