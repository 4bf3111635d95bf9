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
from fanbu.errors import IntegrityError
from fanbu.feeding import feed, plain
from fanbu.files import write_text
from fanbu.heads import check_labels_known, get_head, open_classifier, set_head
from fanbu.judge.evaluate import examine, measure, tfidf
from fanbu.judge.examples import examples
from fanbu.judge.gate import judge
from fanbu.ledger import Workspace
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, read_json, save_network
from fanbu.predict import validation_value
from fanbu.recipe_parts import Step
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
    for guard in (d for d in turn.here.values() if d.role == "guard"):
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


def bear(turn: Turn, incumbent: Model, domain: Domain, before: Model | None) -> Birth:
    """The domain's specialist: born from the incumbent, unless its forerunner is at least as good on validation rows.

    Then its parent did not change it for the better, and the forerunner is carried on.
    """
    reborn = grow(turn, incumbent, domain)
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
                partial(_shrunk, way, chain[-1], domain, tuple(m.path for m in chain[:-1]), step.arguments), domain,
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
            if turn.centre and not turn.centre.knows(domain.name, model):
                return None
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


_OWN = "answers.safetensors"


@dataclass(frozen=True)
class Look:
    """What one owner saw of a round on its test rows: outcomes by the name of what was judged, rows that were won and
    lost, and how large and fast its specialist and that one's parent are."""

    outcomes: Mapping[str, Contribution]
    examples: Mapping[str, Any]
    sizes: Mapping[str, Mapping[str, float]]


def look(turn: Turn, d: Domain, models: Mapping[str, Model], own: Mapping[str, Model]) -> Look:
    """At an owner: all that is judged, by name; ``own`` are its ``specialist`` and, where there is one, forerunner.

    Models' answers lie in the owner's folders, and do not cross.
    """
    found, answers = {}, {}
    for name, model in {**models, **own}.items():
        found[name], answers[name] = evaluated(turn, name, model, d)
    if own and "tfidf" in turn.recipe.references:
        found["tfidf"] = _tfidf(turn, d)
    sizes = _sizes(turn, d, own["specialist"], models["incumbent"]) if own else {}
    return Look(found, shown(turn, d, answers["incumbent"], answers["candidate"]), sizes)


def evaluated(turn: Turn, name: str, model: Model, d: Domain) -> tuple[Contribution, Path]:
    """At an owner: outcomes of a model on the domain's test rows; and the folder with its answers, which stays."""

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
    recipe = turn.recipe
    incumbent = raise_incumbent(turn)
    grown = [(incumbent, d, forerunner(turn, d)) for d in turn.feeding]
    births = {call[1].name: birth for call, birth in turn.at_owners(bear, grown)}
    specialists = [birth.specialist for birth in births.values()]
    fed = [incumbent]
    for step in recipe.feedback:
        fed.append(feed(turn, step, specialists, fed[-1]))
    models, order = {"incumbent": incumbent, "candidate": fed[-1]}, ["incumbent", "candidate", "specialist"]
    for reference in recipe.references:
        name = _free_name(reference if isinstance(reference, str) else reference.method, order)
        order.append(name)
        if isinstance(reference, Step):
            models[name] = feed(turn, reference, specialists, incumbent, f"reference {name}")
    if any(step.tree for step in recipe.feedback):
        order.append(name := _free_name(f"{' > '.join(s.method for s in recipe.feedback)} without the tree", order))
        models[name] = _flat(turn, specialists, incumbent, name)
    calls = [(d, models, _own(births.get(name))) for name, d in turn.here.items()]
    looks = {call[0].name: seen for call, seen in turn.at_owners(look, calls)}
    births = {name: birth for name, birth in births.items() if name in looks}

    def of(what: str) -> dict[str, Contribution]:
        return {d: seen.outcomes[what] for d, seen in looks.items() if what in seen.outcomes}

    judged = {"specialists" if name == "specialist" else name: of(name) for name in order}
    gate = recipe.gate.gate()
    gate = replace(gate, margins={d: m for d, m in gate.margins.items() if d in looks})
    verdict = judge(judged["candidate"], judged["incumbent"], judged["specialists"], turn.here, gate, recipe.seed)
    sizes, rows = ({d: getattr(seen, part) for d, seen in looks.items()} for part in ("sizes", "examples"))
    return Result(turn.base, incumbent, fed[-1], fed[1:], births, judged, of("forerunner"), rows, verdict, sizes)


def _flat(turn: Turn, specialists: Sequence[Specialist], incumbent: Model, name: str) -> Model:
    """What the round's ways back make of all specialists at once."""
    model = incumbent
    for step in turn.recipe.feedback:
        model = feed(turn, step.model_copy(update={"tree": None}), specialists, model, f"reference {name}")
    return model


def _own(birth: Birth | None) -> dict[str, Model]:
    if birth is None:
        return {}
    found = {"specialist": birth.specialist.model}
    return found if birth.forerunner is None else {**found, "forerunner": birth.forerunner}


def _free_name(name: str, taken: Sequence[str]) -> str:
    return next(n for n in (name, *(f"{name} {i}" for i in range(2, 1000))) if n not in taken)


def _tfidf(turn: Turn, d: Domain) -> Contribution:
    return turn.contribution(
        f"evaluate tfidf {d.name}", "fanbu.judge.evaluate", {"domain": d.digest}, d, lambda out, c: tfidf(d, c)
    )[0]


def _sizes(turn: Turn, d: Domain, model: Model, parent: Model) -> dict[str, dict[str, float]]:
    """Size and speed of a specialist and of its parent, measured side by side at the owner."""

    def produce(out: Path, context: Context) -> None:
        if turn.taken(d, out):
            _read_sizes(out)  # raises where these are none, before they count as done
            return
        quiet = replace(context, progress=silent)
        found = {name: measure(m, d.test.texts, quiet) for name, m in (("specialist", model), ("parent", parent))}
        write_text(out / "sizes.json", json.dumps(found))

    inputs = {"model": model.digest, "parent": parent.digest, "domain": d.digest, **turn.settings()}
    done = turn.stage(f"measure {d.name}", "fanbu.judge.evaluate", inputs, produce)
    return _read_sizes(done.path)


def _read_sizes(stage: Path) -> dict[str, dict[str, float]]:
    found = read_json(stage / "sizes.json", "contribution-broken")
    told = [found.get(who) for who in ("specialist", "parent")]
    numbers = [v for said in told if isinstance(said, dict) for v in said.values()]
    if not all(isinstance(s, dict) for s in told) or not all(type(v) in {int, float} for v in numbers):
        raise IntegrityError(
            "contribution-broken", f"{stage} tells no sizes", got=str(found)[:80],
            remedy="ask its owner to send them again",
        )  # fmt: skip
    return found
