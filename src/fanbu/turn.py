"""What one round works with: its stages, its models and contributions, its domains, the probe set, the parent."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fanbu.batches import evenly
from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution
from fanbu.data.check import normalised
from fanbu.data.load import RawRow, load_rows
from fanbu.data.split import cap
from fanbu.data.standard_library import function_bodies
from fanbu.data.synthetic import Corpus, synthetic
from fanbu.domain import Domain, is_target
from fanbu.errors import DataError, UsageError
from fanbu.files import write_text
from fanbu.fingerprint import code_digest
from fanbu.ledger import Stage, Workspace
from fanbu.live import Live
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.plan import check_plan
from fanbu.predict import written
from fanbu.private import spend
from fanbu.recipe import PublicTexts, Recipe, load_domains, open_domain
from fanbu.record import read_records
from fanbu.transport import side_by_side
from fanbu.types import CLASSIFYING, MEDIA, Context, ProbeRow, ProbeSet, Progress, Task, digest, industry_of, silent

Log = Callable[[str], None]


@dataclass
class Turn:
    """What one round works with, and what it has written down so far.

    ``parent`` is the champion that it sets out from (None in the first round), ``records`` are those of the rounds
    before.
    """

    workspace: Workspace
    recipe: Recipe
    context: Context
    domains: Mapping[str, Domain]
    base: Model
    parent: Model | None
    records: list[dict[str, Any]]
    log: Log
    live: Live | None = None
    costs: list[dict[str, Any]] = field(default_factory=list)
    crossed: dict[str, dict[Path, dict[str, Any]]] = field(default_factory=dict)  # by domain, then by stage
    warnings: list[str] = field(default_factory=list)
    fresh: set[Path] = field(default_factory=set)  # stages that were made here and now
    elsewhere: set[Path] = field(default_factory=set)  # and by owners side by side, not asked for yet
    spent: Path | None = None  # where each owner's privacy costs are written down

    @property
    def number(self) -> int:
        """The number of the round; the first is 1."""
        return len(self.records) + 1

    @property
    def feeding(self) -> list[Domain]:
        """The domains that send contributions, by name: the order of a recipe changes no bit."""
        return [self.domains[name] for name in sorted(self.domains) if self.domains[name].role == "feeds"]

    def settings(self, *, probe: bool = False) -> dict[str, Any]:
        """What of the context can change a result."""
        c = self.context
        plain = {"seed": c.seed, "device": c.device, "precision": c.precision, "threads": c.threads}
        return {**plain, "max_length": c.max_length, **({"probe": c.probe.digest} if probe else {})}

    def stage(
        self, name: str, module: str, inputs: Mapping[str, Any], produce: Callable[[Path, Context], None],
        shown: str | None = None,
    ) -> Stage:  # fmt: skip
        """One stage of the ledger; its cost is noted. ``shown`` is what it is called here, where it is not its name:
        stages of the same name and inputs are one stage, whoever asks for them."""
        shown = shown or name
        self.log(shown)
        if self.live:
            self.live.stage(shown)
        done = self.workspace.stage(
            name, module, inputs, lambda out, scratch: produce(out, replace(self.context, scratch=scratch)), self.log
        )
        if not done.reused:
            self.fresh.add(done.path)
        reused = done.reused and done.path not in self.elsewhere
        self.elsewhere.discard(done.path)  # it counts once
        self.costs.append({"stage": shown, **done.cost, "reused": reused})
        if self.live:
            self.live.stage_done(shown, float(done.cost.get("seconds", 0.0)), reused)
        return done

    def at_owners(self, function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
        """Has the stages that ``function(turn, *call)`` asks for made side by side, as the recipe's transport says.

        Afterwards the same calls here find them done. Where owners work one after the other there is nothing to do.
        """
        transport = self.recipe.transport.transport()
        if not transport.apart or len(calls) < 2:
            return
        context = replace(self.context, progress=silent)
        bare = replace(
            self, context=context, domains={}, log=_quiet, live=None, costs=[], crossed={}, warnings=[], fresh=set()
        )
        title = f"{len(calls)} owners side by side"
        self.log(title)
        jobs = [(bare, function, call) for call in calls]
        for number, made in enumerate(side_by_side(transport, _stages_of, jobs, self.context.threads), 1):
            self.elsewhere |= made
            self.context.progress(title, number, len(calls))

    def model(self, name: str, module: str, inputs: Mapping[str, Any], make: Callable[[Path, Context], Model]) -> Model:
        """A stage that makes a model."""
        done = self.stage(name, module, inputs, lambda out, context: (make(out / "model", context), None)[1])
        return open_model(done.path / "model", verify=False)  # the ledger has just verified every file

    def contribution(
        self, name: str, module: str, inputs: Mapping[str, Any], domain: Domain,
        make: Callable[[Path, Context], Contribution], shown: str | None = None,
    ) -> tuple[Contribution, Path]:  # fmt: skip
        """A stage at one owner that makes a contribution; the boundary decides whether it is written.

        ``make`` gets the stage's folder, which is the owner's: what else it writes there does not cross. Returns the
        contribution and that folder.
        """

        def produce(out: Path, context: Context) -> None:
            sent = make(out, context)
            if self.spent:
                spend(self.spent / f"{domain.name}.json", digest([name, inputs]), sent, domain.share.budget)
            cross(sent, domain.share, out / "contribution", domain.every_text)

        rules = {"share": domain.share.as_dict(), "boundary": code_digest("fanbu.boundary")}
        done = self.stage(name, module, {**inputs, **rules}, produce, shown)
        found = open_contribution(done.path / "contribution")
        told = {"what": (shown or name).removesuffix(f" {domain.name}"), "kind": found.kind, "bytes": found.bytes}
        cost = {} if found.epsilon is None else {"epsilon": found.epsilon}
        self.crossed.setdefault(domain.name, {}).setdefault(done.path, {**told, **cost})
        return found, done.path


def _stages_of(turn: Turn, function: Callable[..., Any], call: tuple[Any, ...]) -> set[Path]:
    """At an owner, in a process of its own: the stages that were made."""
    import torch

    if turn.context.threads:
        torch.set_num_threads(turn.context.threads)
    function(turn, *call)
    return turn.fresh


def _quiet(text: str) -> None:
    """What is told in a process of its own is heard by nobody."""


def made_of(recipe: Recipe, domains: Mapping[str, Domain], base: Model) -> str:
    """The digest of everything that a person can change between rounds: the base, the rows, what may cross, the ways.
    Where it is the same, a round brings nothing new.

    How many rounds are asked for, when rows arrive, where they lie, what the workspace is called and what machine it
    runs on are not part.
    """
    plain = recipe.model_dump(mode="json", exclude=_NOT_MADE_OF)
    rows = {name: [d.digest, d.share.as_dict()] for name, d in domains.items()}
    probe, task = recipe.probe.model_dump(exclude={"public"}), next(d.task for d in domains.values())
    public = [[row.text for row in public_texts(p, task)] for p in recipe.probe.public]
    return digest({"recipe": plain, "domains": rows, "base": base.digest, "probe": probe, "public": digest(public)})


_NOT_MADE_OF = {
    "rounds", "workspace", "name", "model", "domains", "guards", "probe", "checkpoint_seconds", "device", "precision",
    "threads", "transport",
}  # fmt: skip


def start(
    recipe: Recipe, progress: Progress = silent, log: Log = lambda text: None, live: Live | None = None
) -> Turn:  # fmt: skip
    """The workspace's next round: what ``open_turn`` gives after its finished rounds, with its champion as parent."""
    workspace = Workspace(Path(recipe.workspace))
    records = read_records(workspace.root, workspace.rounds())
    base = open_model(recipe.model)
    first = next((e["base"] for e in workspace.history() if e.get("base")), base.digest)
    if first != base.digest:
        raise UsageError(
            "other-workspace", f"the rounds of {workspace.root} began from another model than the recipe names",
            allowed=first[:12], got=base.digest[:12], remedy="give this recipe a workspace of its own",
        )  # fmt: skip
    pointer = workspace.champion()
    parent = None
    if pointer:  # the base may lie outside a workspace that was moved
        parent = base if pointer["model"] == base.digest else open_model(workspace.root / pointer["path"])
    return open_turn(recipe, base, parent, records, progress, log, live)


def open_turn(
    recipe: Recipe, base: Model, parent: Model | None, records: list[dict[str, Any]], progress: Progress = silent,
    log: Log = lambda text: None, live: Live | None = None,
) -> Turn:  # fmt: skip
    """Loads and checks everything that the round after ``records`` needs, before anything is trained."""
    workspace = Workspace(Path(recipe.workspace))
    domains = load_domains(recipe, len(records) + 1, workspace.left())
    check_plan(recipe, domains)

    def show(what: str, done: int, total: int) -> None:
        progress(what, done, total)
        if live:
            live.progress(what, done, total)

    context = recipe.context(show)
    turn = Turn(
        workspace, recipe, context, domains, base, parent, records, log, live, spent=workspace.root / "privacy"
    )  # fmt: skip
    turn.warnings += _unnamed(turn)
    asking = any(method(step.method, "feedback").needs.probe for step in recipe.ways)
    if asking or any(d.task in CLASSIFYING for d in domains.values()):
        turn.context = replace(context, probe=gather_probe(turn))
        if recipe.probe.written:
            turn.context = replace(context, probe=with_written(turn))
    return turn


def _unnamed(turn: Turn) -> list[str]:
    """Domains that the champion knows and the recipe does not name: nobody looks after them in this round."""
    known = {label.partition("/")[0] for label in turn.parent.labels if "/" in label} if turn.parent else set()
    owners = {d for d in (turn.workspace.champion() or {}).get("domains") or [] if "@" in d}
    known = (known - {industry_of(d) for d in owners}) | (owners - set(turn.workspace.left()) - set(turn.domains))
    return [
        f"{d}: the champion knows it, and this round does not: it keeps its label rows and is not judged; "
        f"`fanbu leave` removes them"
        for d in sorted(known - {d.industry for d in turn.domains.values()} - {"general"})
    ]


def gather_probe(turn: Turn) -> ProbeSet:
    """The probe set: texts (never labels) of domains, their own or synthetic ones, and public ones. Their bytes count.

    A guard gives its texts too where it names unlabelled ones and others of its industry feed: it is a target then,
    that learns from them without labels of its own.

    A text that is in the test rows of any domain is left out, also of one that has yet to join, and of rows that wait
    for their label: test data never trains.
    """
    spec, rows = turn.recipe.probe, []
    later = joining_later(turn.recipe, turn.number, turn.workspace.left())
    for d in [*turn.feeding, *(d for d in turn.domains.values() if is_target(d, turn.feeding))]:
        if (what := spec.from_domain(d.share)) is not None:
            rows += domain_texts(turn, d, what)
    for number, public in enumerate(spec.public):
        rows += [ProbeRow(f"public{number}/{r.id}", r.text, None) for r in public_texts(public, turn.feeding[0].task)]
    kept = without_test_texts(rows, [*turn.domains.values(), *later])
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


def public_texts(public: PublicTexts, task: Task) -> list[RawRow]:
    """The rows of one public file, or area of the standard library."""
    if public.python:
        raw = list(function_bodies(public.python))
    else:
        raw = load_rows(str(public.path), public.columns, labelled=False, kind=MEDIA.get(task, "text"))
    return cap(raw, public.limit, "public")
