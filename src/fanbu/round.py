"""One turn: open, probe, shrink, contribute, absorb, judge, promote or keep. Every step is a stage of the ledger."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fanbu.boundary import cross
from fanbu.catalogue import Method, method
from fanbu.contribution import Contribution, open_contribution
from fanbu.data.check import normalised
from fanbu.data.load import RawRow, load_rows
from fanbu.data.split import cap
from fanbu.data.standard_library import function_bodies
from fanbu.domain import Domain, Specialist
from fanbu.errors import UsageError
from fanbu.fingerprint import code_digest
from fanbu.heads import check_labels_known, open_classifier
from fanbu.judge.evaluate import evaluate, measure, tfidf
from fanbu.judge.gate import judge
from fanbu.ledger import Stage, Workspace
from fanbu.model import Model, load_tokenizer, open_model, provenance, save_network
from fanbu.plan import check_plan
from fanbu.recipe import PublicTexts, Recipe, Step, load_domains
from fanbu.record import make_record, read_record, write_record
from fanbu.tensors import write_text
from fanbu.types import Context, ProbeRow, ProbeSet, Progress, digest, silent

Log = Callable[[str], None]


@dataclass
class Turn:
    """What one round works with, and what it has written down so far."""

    workspace: Workspace
    recipe: Recipe
    context: Context
    domains: Mapping[str, Domain]
    log: Log
    costs: list[dict[str, Any]] = field(default_factory=list)
    crossed: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def feeding(self) -> list[Domain]:
        """The domains that send contributions."""
        return [d for d in self.domains.values() if d.role == "feeds"]

    def settings(self, *, probe: bool = False) -> dict[str, Any]:
        """What of the context can change a result."""
        c = self.context
        plain = {"seed": c.seed, "device": c.device, "precision": c.precision, "threads": c.threads}
        return {**plain, "max_length": c.max_length, **({"probe": c.probe.digest} if probe else {})}

    def stage(
        self, name: str, module: str, inputs: Mapping[str, Any], produce: Callable[[Path, Context], None]
    ) -> Stage:
        """One stage of the ledger; its cost is noted."""
        self.log(name)
        done = self.workspace.stage(
            name, module, inputs, lambda out, scratch: produce(out, replace(self.context, scratch=scratch)), self.log
        )
        self.costs.append({"stage": name, **done.cost, "reused": done.reused})
        return done

    def model(self, name: str, module: str, inputs: Mapping[str, Any], make: Callable[[Path, Context], Model]) -> Model:
        """A stage that makes a model."""
        done = self.stage(name, module, inputs, lambda out, context: (make(out / "model", context), None)[1])
        return open_model(done.path / "model", verify=False)  # the ledger has just verified every file

    def contribution(
        self, name: str, module: str, inputs: Mapping[str, Any], domain: Domain, make: Callable[[Context], Contribution]
    ) -> Contribution:
        """A stage at one owner that makes a contribution; the boundary decides whether it is written."""

        def produce(out: Path, context: Context) -> None:
            cross(make(context), domain.share, out / "contribution")

        rules = {"share": domain.share.as_dict(), "boundary": code_digest("fanbu.boundary")}
        done = self.stage(name, module, {**inputs, **rules}, produce)
        found = open_contribution(done.path / "contribution")
        sent = {"what": name.removesuffix(f" {domain.name}"), "kind": found.kind, "bytes": found.bytes}
        if sent not in self.crossed.setdefault(domain.name, []):
            self.crossed[domain.name].append(sent)
        return found


def start(recipe: Recipe, progress: Progress = silent, log: Log = lambda text: None) -> Turn:
    """Loads and checks everything that a round needs, before anything is trained."""
    domains = load_domains(recipe)
    check_plan(recipe, domains)
    context = Context(
        seed=recipe.seed, device=recipe.device, precision=recipe.precision, threads=recipe.threads,  # type: ignore[arg-type]
        max_length=recipe.max_length, progress=progress, checkpoint_seconds=recipe.checkpoint_seconds,
    )  # fmt: skip
    turn = Turn(Workspace(Path(recipe.workspace)), recipe, context, domains, log)
    standing(turn, remade=False)
    steps = [recipe.feedback, *(r for r in recipe.references if isinstance(r, Step))]
    asking = any(method(step.method, "feedback").needs.probe for step in steps)
    if asking or any(d.task == "text-classification" for d in domains.values()):
        turn.context = replace(context, probe=gather_probe(turn))
    return turn


def gather_probe(turn: Turn) -> ProbeSet:
    """The probe set: texts (never labels) of the domains that share texts, and public ones. Their bytes count.

    A text that is in the test rows of any domain is left out: test data never trains.
    """
    spec, rows = turn.recipe.probe, []
    held_out = {normalised(text) for d in turn.domains.values() for text in d.test.texts}
    for d in turn.feeding:
        if spec.domains and d.share.texts:
            rows += domain_texts(turn, d, spec.limit)
    for number, public in enumerate(spec.public):
        rows += [ProbeRow(f"public{number}/{r.id}", r.text, None) for r in public_texts(public)]
    kept = [row for row in rows if normalised(row.text) not in held_out]
    if len(kept) < len(rows):
        turn.warnings.append(f"{len(rows) - len(kept)} probe texts that are also test rows of a domain were left out")
    return ProbeSet(tuple(kept))


def domain_texts(turn: Turn, d: Domain, limit: int | None) -> list[ProbeRow]:
    """One domain's training and unlabelled texts, each once, through its boundary."""
    texts = dict.fromkeys([*d.train.texts, *d.unlabelled.texts])
    chosen = cap([RawRow(str(i), text, None) for i, text in enumerate(texts)], limit, "probe")
    rows = [{"id": f"{d.name}/{r.id}", "text": r.text, "domain": d.name} for r in chosen]
    offer = Contribution("samples", d.name, "probe texts", rows=rows)
    inputs = {"domain": d.digest, "limit": limit}
    got = turn.contribution(f"probe texts {d.name}", "fanbu.contribution", inputs, d, lambda _: offer)
    return [ProbeRow(r["id"], r["text"], r["domain"]) for r in got.rows]


def public_texts(public: PublicTexts) -> list[RawRow]:
    """The rows of one public file, or area of the standard library."""
    if public.python:
        raw = list(function_bodies(public.python))
    else:
        raw = load_rows(str(public.path), public.columns, labelled=False)
    return cap(raw, public.limit, "public")


def open_base(turn: Turn) -> tuple[Model, Model]:
    """(the base as it came, the base opened for the task)."""
    base = open_model(turn.recipe.model)
    united = bool(base.manifest) and base.labels and all("/" in label for label in base.labels)
    if turn.feeding[0].task == "causal-lm" or united:
        return base, base

    def make(out: Path, context: Context) -> Model:
        network = open_classifier(base, context, turn.recipe.pooling)
        tokenizer = load_tokenizer(base)
        tokenizer.model_max_length = min(context.max_length, tokenizer.model_max_length)
        return save_network(network, tokenizer, out, provenance("open", [base], context, pooling=turn.recipe.pooling))

    inputs = {"base": base.digest, "pooling": turn.recipe.pooling, **turn.settings()}
    return base, turn.model("open", "fanbu.heads", inputs, make)


def feed(turn: Turn, step: Step, specialists: Sequence[Specialist], base: Model, name: str | None = None) -> Model:
    """Contribute at each owner, absorb at the centre."""
    way, name = method(step.method, "feedback"), name or step.method
    sent = [contribute(turn, way, step.arguments, s, base) for s in specialists]
    inputs = {
        "base": base.digest, "contributions": sorted(c.digest for c in sent),
        "arguments": _plain(way.own("absorb", step.arguments)), **turn.settings(probe=True),
    }  # fmt: skip
    return turn.model(name, way.module, inputs, lambda out, c: way.absorb(base, sent, out, c, **step.arguments))


def contribute(turn: Turn, way: Method, arguments: Mapping[str, Any], s: Specialist, base: Model) -> Contribution:
    """One owner's contribution, through the boundary."""
    inputs = {
        "base": base.digest, "specialist": s.model.digest, "domain": s.domain.digest,
        "arguments": _plain(way.own("contribute", arguments)), **turn.settings(probe=way.needs.probe),
    }  # fmt: skip
    name = f"{way.name} contribution {s.domain.name}"
    return turn.contribution(name, way.module, inputs, s.domain, lambda c: way.contribute(s, base, c, **arguments))


def grow(turn: Turn, incumbent: Model, domain: Domain) -> Specialist:
    """One specialist: the recipe's ways down, one after the other, at its owner."""
    model = incumbent
    for number, step in enumerate(turn.recipe.shrink):
        way, parent = method(step.method, "shrink"), model
        inputs = {
            "parent": parent.digest, "domain": domain.digest, "step": number,
            "arguments": _plain(way.check(step.arguments)), **turn.settings(),
        }  # fmt: skip
        model = turn.model(
            f"shrink {step.method} {domain.name}", way.module, inputs,
            partial(way.shrink, parent, domain, **step.arguments),
        )  # fmt: skip
    return Specialist(model, domain, incumbent)


def _plain(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {k: asdict(v) if is_dataclass(v) and not isinstance(v, type) else v for k, v in arguments.items()}


def outcomes(turn: Turn, name: str, model: Model, domains: Sequence[Domain]) -> dict[str, Contribution]:
    """One model's test outcomes on some domains, each computed at its owner."""
    return {
        d.name: turn.contribution(
            f"evaluate {name} {d.name}",
            "fanbu.judge.evaluate",
            {"model": model.digest, "domain": d.digest, **turn.settings()},
            d,
            partial(evaluate, model, d),
        )
        for d in domains
    }


@dataclass(frozen=True)
class Result:
    """A finished round: models, outcomes by the name of what was judged, and the verdict."""

    base: Model
    incumbent: Model
    candidate: Model
    specialists: Sequence[Specialist]
    outcomes: Mapping[str, Mapping[str, Contribution]]
    verdict: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Mapping[str, float]]]


def turn_once(turn: Turn) -> Result:
    """All stages of one round; nothing is promoted yet."""
    recipe, everything = turn.recipe, list(turn.domains.values())
    base, incumbent = open_base(turn)
    if turn.feeding[0].task == "text-classification":
        unborn = [Specialist(incumbent, d, base) for d in turn.feeding]
        incumbent = feed(turn, Step(method="probe"), unborn, incumbent, "incumbent")
        for guard in (d for d in everything if d.role == "guard"):
            check_labels_known(incumbent, guard.full_labels)
    specialists = [grow(turn, incumbent, d) for d in turn.feeding]
    candidate = feed(turn, recipe.feedback, specialists, incumbent)
    judged = {"incumbent": outcomes(turn, "incumbent", incumbent, everything)}
    judged["candidate"] = outcomes(turn, "candidate", candidate, everything)
    judged["specialists"] = {
        s.domain.name: outcomes(turn, "specialist", s.model, [s.domain])[s.domain.name] for s in specialists
    }
    for reference in recipe.references:
        if isinstance(reference, Step):
            name = _free_name(reference.method, judged)
            model = feed(turn, reference, specialists, incumbent, f"reference {name}")
            judged[name] = outcomes(turn, name, model, everything)
        else:
            judged["tfidf"] = {d.name: _tfidf(turn, d) for d in turn.feeding}
    against, champion = judged["incumbent"], standing(turn)
    if champion is not None and champion.digest not in {incumbent.digest, candidate.digest}:
        against = judged["champion"] = outcomes(turn, "champion", champion, everything)
    verdict = judge(judged["candidate"], against, judged["specialists"], turn.domains, recipe.gate.gate(), recipe.seed)
    sizes = {s.domain.name: _sizes(turn, s, incumbent) for s in specialists}
    return Result(base, incumbent, candidate, specialists, judged, verdict, sizes)


def standing(turn: Turn, *, remade: bool = True) -> Model | None:
    """The workspace's champion, which a candidate must beat too. UsageError where it does not know these domains.

    None where there is none, and before stages are ``remade`` where its stage was removed: this round may make it.
    """
    pointer = turn.workspace.champion()
    if pointer is None or not (remade or (turn.workspace.root / pointer["path"]).exists()):
        return None
    champion = open_model(turn.workspace.root / pointer["path"])
    labels = {label for d in turn.domains.values() for label in d.full_labels}
    if champion.task != turn.feeding[0].task or not labels <= set(champion.labels):
        raise UsageError(
            "other-workspace", f"the champion of {turn.workspace.root} does not know these domains",
            allowed=sorted({label.partition("/")[0] for label in champion.labels}) or champion.task,
            got=list(turn.domains), remedy="give this recipe a workspace of its own",
        )  # fmt: skip
    return champion


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    return next(n for n in (name, *(f"{name} {i}" for i in range(2, 1000))) if n not in taken)


def _tfidf(turn: Turn, d: Domain) -> Contribution:
    return turn.contribution(
        f"evaluate tfidf {d.name}", "fanbu.judge.evaluate", {"domain": d.digest}, d, lambda c: tfidf(d, c)
    )


def _sizes(turn: Turn, s: Specialist, parent: Model) -> dict[str, dict[str, float]]:
    """Size and speed of a specialist and of its parent, measured side by side at the owner."""

    def produce(out: Path, context: Context) -> None:
        quiet = replace(context, progress=silent)
        texts = s.domain.test.texts
        found = {"specialist": measure(s.model, texts, quiet), "parent": measure(parent, texts, quiet)}
        write_text(out / "sizes.json", json.dumps(found))

    inputs = {"model": s.model.digest, "parent": parent.digest, "domain": s.domain.digest, **turn.settings()}
    done = turn.stage(f"measure {s.domain.name}", "fanbu.judge.evaluate", inputs, produce)
    sizes: dict[str, dict[str, float]] = json.loads((done.path / "sizes.json").read_text())
    return sizes


def run(recipe: Recipe, progress: Progress = silent, log: Log = lambda text: None) -> dict[str, Any]:
    """Runs one round to its verdict, writes it down and promotes or keeps. Returns the record.

    Everything that is finished already is skipped, so running again after a kill goes on where it stopped, and
    running a finished round again only reads it.
    """
    turn = start(recipe, progress, log)
    result = turn_once(turn)
    judged = {name: {d: c.digest for d, c in by_domain.items()} for name, by_domain in result.outcomes.items()}
    key = digest([result.candidate.digest, result.incumbent.digest, judged, recipe.gate.model_dump()])
    verdict = result.verdict
    folder = turn.workspace.root / "rounds" / key[:20]
    record = read_record(folder) or make_record(turn, result, key)
    write_record(record, recipe, folder)
    turn.workspace.start(result.incumbent.path, result.incumbent.digest)
    turn.workspace.decide(key, verdict["accepted"], result.candidate.path, result.candidate.digest, verdict["reason"])
    return {
        **record,
        "folder": str(folder),
        "workspace": str(turn.workspace.root),
        "champion": turn.workspace.champion(),
    }
