"""One round: parent, specialists, contributions, candidate, verdict. Every step is a stage of the ledger."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fanbu.catalogue import Method, method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist
from fanbu.feeding import feed, plain
from fanbu.files import write_text
from fanbu.heads import check_labels_known, get_head, open_classifier, set_head
from fanbu.judge.evaluate import examine, measure, tfidf
from fanbu.judge.examples import examples
from fanbu.judge.gate import judge
from fanbu.ledger import Workspace
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.predict import validation_value
from fanbu.recipe import Step
from fanbu.tensors import load_tensors, save_tensors
from fanbu.turn import Turn
from fanbu.types import Context, industry_of, silent


def open_base(turn: Turn) -> Model:
    """The base opened for the task: as it is where it has a head of ``domain/label`` rows, or is a causal model."""
    base = turn.base
    united = bool(base.manifest) and base.labels and all("/" in label for label in base.labels)
    if turn.feeding[0].task == "causal-lm" or united:
        return base

    def make(out: Path, context: Context) -> Model:
        network = open_classifier(base, context, turn.recipe.pooling, turn.feeding[0].task)
        tokenizer = load_tokenizer(base)
        if hasattr(tokenizer, "model_max_length"):
            tokenizer.model_max_length = min(context.max_length, tokenizer.model_max_length)
        return save_network(network, tokenizer, out, provenance("open", [base], context, pooling=turn.recipe.pooling))

    inputs = {"base": base.digest, "pooling": turn.recipe.pooling, **turn.settings()}
    return turn.model("open", "fanbu.heads", inputs, make)


def raise_incumbent(turn: Turn) -> Model:
    """The model to beat, and the parent of this round's specialists: the champion (the opened base in round one),
    with probed label rows for those domains whose labels it does not all know. The rows of other domains stay."""
    parent = turn.parent or open_base(turn)
    if turn.feeding[0].task == "causal-lm":
        return parent
    unknown = {d.industry for d in turn.feeding if not set(d.full_labels) <= set(parent.labels)}
    fresh = [d for d in turn.feeding if d.industry in unknown]
    if fresh:
        unborn = [Specialist(parent, d, turn.base) for d in fresh]
        parent = feed(turn, Step(method="probe"), unborn, parent, "incumbent")
    known = (turn.workspace.champion() or {}).get("domains") or []
    staying = {*turn.domains, *known} - set(turn.workspace.left())
    for name in turn.workspace.left():
        parent = without_domain(turn.workspace, parent, name, staying)
    for guard in (d for d in turn.domains.values() if d.role == "guard"):
        check_labels_known(parent, guard.full_labels)
    return parent


def without_domain(ledger: Workspace, model: Model, domain: str, staying: Iterable[str] = ()) -> Model:
    """The model without one domain's label rows; all else bit for bit. One that has no other rows stays itself, and so
    does one whose rows are those of another owner that stays, too."""
    kept = [label for label in model.labels if label.partition("/")[0] != industry_of(domain)]
    if len(kept) in {0, len(model.labels)} or industry_of(domain) in map(industry_of, staying):
        return model

    def produce(out: Path, scratch: Path) -> None:
        network = load_network(model)
        set_head(network, get_head(network).take(kept))
        save_network(network, load_tokenizer(model), out / "model", provenance("leave", [model], Context()))

    done = ledger.stage(f"leave {domain}", "fanbu.heads", {"model": model.digest}, produce)
    return open_model(done.path / "model", verify=False)


@dataclass(frozen=True)
class Birth:
    """How a domain came to its specialist in this round.

    ``valid`` are validation values (accuracy, or minus the loss) by ``reborn`` and ``forerunner``; ``forerunner`` is
    the specialist of the round before, where there is one of the same kind.
    """

    specialist: Specialist
    how: str
    valid: Mapping[str, float]
    forerunner: Model | None = None


def bear(turn: Turn, incumbent: Model, domain: Domain) -> Birth:
    """The domain's specialist: born from the incumbent, unless its forerunner is at least as good on validation rows.

    Then its parent did not change it for the better, and the forerunner is carried on.
    """
    reborn = grow(turn, incumbent, domain)
    before = forerunner(turn, domain)
    models = {"reborn": reborn} if before is None else {"reborn": reborn, "forerunner": before}
    valid = {name: validated(turn, model, domain) for name, model in models.items()}
    if before is None:
        return Birth(Specialist(reborn, domain, incumbent), "born", valid)
    if valid["reborn"] > valid["forerunner"]:
        return Birth(Specialist(reborn, domain, incumbent), "reborn", valid, before)
    return Birth(Specialist(before, domain, incumbent), "carried on", valid, before)


def grow(turn: Turn, parent: Model, domain: Domain) -> Model:
    """The recipe's ways down, one after the other, at the domain's owner."""
    chain = [parent]
    for number, step in enumerate(turn.recipe.shrink):
        way = method(step.method, "shrink")
        inputs = {
            "parent": chain[-1].digest, "domain": domain.digest, "step": number,
            "arguments": plain(way.check(step.arguments)), **turn.settings(),
            **({"forebears": [m.digest for m in chain[:-1]]} if number else {}),
            **({"teacher": open_model(named).digest} if (named := step.arguments.get("teacher")) else {}),
        }  # fmt: skip
        chain.append(
            turn.model(
                f"shrink {step.method} {domain.name}", way.module, inputs,
                partial(_shrunk, way, chain[-1], domain, tuple(m.path for m in chain[:-1]), step.arguments),
            )
        )  # fmt: skip
    return chain[-1]


def _shrunk(
    way: Method, parent: Model, domain: Domain, forebears: tuple[Path, ...], arguments: Mapping[str, Any], out: Path,
    context: Context,
) -> Model:  # fmt: skip
    return way.shrink(parent, domain, out, replace(context, forebears=forebears), **arguments)


def forerunner(turn: Turn, domain: Domain) -> Model | None:
    """The domain's specialist of the last round that had one; None where it was made in another way, or for other
    labels, or is no longer there."""
    ways = [step.model_dump(mode="json") for step in turn.recipe.shrink]
    forgotten = turn.workspace.forgotten()
    for record in (r for r in reversed(turn.records) if r["round"] not in forgotten):
        grown = record["domains"].get(domain.name, {}).get("specialist")
        if grown:
            folder = turn.workspace.locate(grown["path"])
            if record["recipe"]["shrink"] != ways or not folder.is_dir():
                return None
            model = open_model(folder)
            return model if model.task == "causal-lm" or set(model.labels) == set(domain.full_labels) else None
    return None


def validated(turn: Turn, model: Model, domain: Domain) -> float:
    """A specialist's validation value, measured at its owner; one number crosses."""

    def make(out: Path, context: Context) -> Contribution:
        value = validation_value(load_network(model).to(context.device), load_tokenizer(model), domain, context)
        return Contribution("scores", domain.name, "validate", meta={"value": value})

    inputs = {"model": model.digest, "domain": domain.digest, **turn.settings()}
    sent, _ = turn.contribution(f"validate {domain.name}", "fanbu.predict", inputs, domain, make)
    return float(sent.meta["value"])


Outcomes = dict[str, Contribution]
_OWN = "answers.safetensors"


def outcomes(turn: Turn, name: str, model: Model, domains: Sequence[Domain]) -> tuple[Outcomes, dict[str, Path]]:
    """One model's test outcomes on some domains, each computed at its owner; and the owners' folders, where the
    model's answers lie (they do not cross)."""
    turn.at_owners(_evaluated, [(name, model, d) for d in domains])
    found = {d.name: _evaluated(turn, name, model, d) for d in domains}
    return {d: c for d, (c, _) in found.items()}, {d: folder for d, (_, folder) in found.items()}


def _evaluated(turn: Turn, name: str, model: Model, d: Domain) -> tuple[Contribution, Path]:
    def make(out: Path, context: Context) -> Contribution:
        scores, answers = examine(model, d, context)
        save_tensors(out / _OWN, answers)
        return scores

    inputs = {"model": model.digest, "domain": d.digest, **turn.settings()}
    return turn.contribution(f"evaluate {d.name}", "fanbu.judge.evaluate", inputs, d, make, f"evaluate {name} {d.name}")


def shown(turn: Turn, d: Domain, old: Path, new: Path) -> dict[str, Any]:
    """Rows of one domain that the candidate won and lost, with both answers; or why they are withheld."""
    share = d.share
    if "samples" not in share.kinds or not share.texts or not (share.labels or d.task == "causal-lm"):
        return {"withheld": f"{d.name} does not share texts and labels"}
    inputs = {"domain": d.digest, "old": old.name, "new": new.name}
    found, _ = turn.contribution(
        f"examples {d.name}", "fanbu.judge.examples", inputs, d,
        lambda out, c: examples(d, load_tensors(old / _OWN), load_tensors(new / _OWN)),
    )  # fmt: skip
    kept: dict[str, Any] = {"wins": [], "losses": []}
    for row in found.rows:
        before, after = found.meta["answers"][row["id"]]
        example = {"text": row["text"], "label": row.get("label", ""), "old": before, "new": after}
        kept[str(row["id"]).partition("-")[0]].append(example)
    return kept


@dataclass(frozen=True)
class Result:
    """A finished round: models, outcomes by the name of what was judged, and the verdict."""

    base: Model
    incumbent: Model
    candidate: Model
    fed: Sequence[Model]  # by each way back, the candidate last
    births: Mapping[str, Birth]
    outcomes: Mapping[str, Mapping[str, Contribution]]
    forerunners: Mapping[str, Contribution]
    examples: Mapping[str, Mapping[str, Any]]
    verdict: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, Mapping[str, float]]]

    @property
    def specialists(self) -> list[Specialist]:
        """The specialists that fed back."""
        return [birth.specialist for birth in self.births.values()]


def turn_once(turn: Turn) -> Result:
    """All stages of one round; nothing is promoted yet."""
    recipe, everything = turn.recipe, list(turn.domains.values())
    incumbent = raise_incumbent(turn)
    turn.at_owners(bear, [(incumbent, d) for d in turn.feeding])
    births = {d.name: bear(turn, incumbent, d) for d in turn.feeding}
    specialists = [birth.specialist for birth in births.values()]
    fed = [incumbent]
    for step in recipe.feedback:
        fed.append(feed(turn, step, specialists, fed[-1]))
    candidate = fed[-1]
    old, old_answers = outcomes(turn, "incumbent", incumbent, everything)
    new, new_answers = outcomes(turn, "candidate", candidate, everything)
    turn.at_owners(_evaluated, [("specialist", s.model, s.domain) for s in specialists])
    own = {s.domain.name: _outcome(turn, "specialist", s.model, s.domain) for s in specialists}
    judged: dict[str, Outcomes] = {"incumbent": old, "candidate": new, "specialists": own}
    before = {
        name: _outcome(turn, "forerunner", birth.forerunner, birth.specialist.domain)
        for name, birth in births.items()
        if birth.forerunner
    }
    for reference in recipe.references:
        if isinstance(reference, Step):
            name = _free_name(reference.method, judged)
            model = feed(turn, reference, specialists, incumbent, f"reference {name}")
            judged[name] = outcomes(turn, name, model, everything)[0]
        else:
            judged["tfidf"] = {d.name: _tfidf(turn, d) for d in turn.feeding}
    gate = recipe.gate.gate()
    gate = replace(gate, margins={d: m for d, m in gate.margins.items() if d in turn.domains})
    verdict = judge(new, old, own, turn.domains, gate, recipe.seed)
    sizes = {s.domain.name: _sizes(turn, s, incumbent) for s in specialists}
    rows = {d.name: shown(turn, d, old_answers[d.name], new_answers[d.name]) for d in everything}
    return Result(turn.base, incumbent, candidate, fed[1:], births, judged, before, rows, verdict, sizes)


def _outcome(turn: Turn, name: str, model: Model, d: Domain) -> Contribution:
    return outcomes(turn, name, model, [d])[0][d.name]


def _free_name(name: str, taken: Mapping[str, object]) -> str:
    return next(n for n in (name, *(f"{name} {i}" for i in range(2, 1000))) if n not in taken)


def _tfidf(turn: Turn, d: Domain) -> Contribution:
    return turn.contribution(
        f"evaluate tfidf {d.name}", "fanbu.judge.evaluate", {"domain": d.digest}, d, lambda out, c: tfidf(d, c)
    )[0]


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
