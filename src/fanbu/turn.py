"""What one round works with: its stages, its models and contributions, its domains, the probe set, the parent."""

from __future__ import annotations

import json
import secrets
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fanbu.boundary import cross, keep
from fanbu.contribution import Contribution, open_contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import FanbuError, IntegrityError, RetryError, UsageError
from fanbu.files import write_text
from fanbu.fingerprint import code_digest
from fanbu.ledger import Stage, Workspace
from fanbu.live import Live
from fanbu.model import Model, open_model
from fanbu.plan import check_plan
from fanbu.private import spend
from fanbu.probe_set import probe_of
from fanbu.recipe import Recipe, load_domains, public_texts, taking_part
from fanbu.record import read_records
from fanbu.transport import side_by_side
from fanbu.transport.centre import COST, Centre, Line
from fanbu.transport.parcel import Packing
from fanbu.types import Context, Progress, digest, industry_of, silent

Log = Callable[[str], None]
T = TypeVar("T")


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
    centre: Centre | None = None  # what asks owners who are elsewhere
    missed: dict[str, str] = field(default_factory=dict)  # whose owner was not heard, by domain: when, and why
    used: list[Path] = field(default_factory=list)  # stages that were asked for

    @property
    def number(self) -> int:
        """The number of the round; the first is 1."""
        return len(self.records) + 1

    @property
    def here(self) -> dict[str, Domain]:
        """The domains whose owners were heard whenever they were asked."""
        return {name: d for name, d in self.domains.items() if name not in self.missed}

    @property
    def feeding(self) -> list[Domain]:
        """Those of them that send contributions, by name: the order of a recipe changes no bit."""
        return [d for _, d in sorted(self.here.items()) if d.role == "feeds"]

    @property
    def fed(self) -> set[str]:
        """The domains that have contributed to a way back, also those whose owner was not heard afterwards."""
        sent = {d: [c["what"] for c in crossed.values()] for d, crossed in self.crossed.items()}
        return {d for d, what in sent.items() if any(name.endswith("contribution") for name in what)}

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
        self.used.append(done.path)
        reused = done.reused and done.path not in self.elsewhere
        self.elsewhere.discard(done.path)  # it counts once
        paid = done.path / COST  # by its owner
        cost = json.loads(paid.read_text()) if paid.exists() else done.cost
        self.costs.append({"stage": shown, **cost, "reused": reused})
        if self.live:
            self.live.stage_done(shown, float(done.cost.get("seconds", 0.0)), reused)
        return done

    def at_owners(self, function: Callable[..., T], calls: Sequence[Any]) -> list[tuple[Any, T]]:
        """Each call with what ``function(turn, *call)`` gives; its stages are made by owners, as the recipe's transport
        says: one after the other, side by side, or by owners who are elsewhere (one call each).

        A call whose owner is elsewhere and is not heard, or sends what cannot be used, is left out (``miss``).
        """
        if self.centre is None:
            self._side_by_side(function, calls)
            return [(call, function(self, *call)) for call in calls]
        found = []
        for call in self._asked(self.centre, function, calls):
            try:
                found.append((call, function(self, *call)))
            except (IntegrityError, KeyError, TypeError, ValueError) as error:  # what it sent is not what it should be
                what = error.what if isinstance(error, FanbuError) else f"its answer cannot be read ({error!r:.80})"
                self.miss(_owner(call).name, f"{_title(function)}: {what}")
        return found

    def _side_by_side(self, function: Callable[..., Any], calls: Sequence[Any]) -> None:
        """Has the stages of all calls made, so that they are found done."""
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

    def _asked(self, centre: Centre, function: Callable[..., Any], calls: Sequence[Any]) -> list[Any]:
        """Has the stages of all calls made by owners elsewhere; returns the calls of those who were heard."""
        packing, by_owner = Packing(self.workspace.root), {_owner(call).name: call for call in calls}
        title = f"{_title(function)}: {len(calls)} owners asked"
        self.log(title)
        told = {d: (function.__name__, packing.encoded(list(call))) for d, call in by_owner.items()}
        answers = centre.ask(told, packing, self.context.probe, asked_of(self.recipe, self.number))
        for number, (domain, why) in enumerate(answers, 1):
            if why is not None:
                self.miss(domain, f"{_title(function)}: {why}")
            self.context.progress(title, number, len(calls))
        return [call for d, call in by_owner.items() if d not in self.missed]

    def miss(self, domain: str, why: str) -> None:
        """Goes on without an owner who was not heard. RetryError where too few are left."""
        self.missed[domain] = why
        self.log(f"{domain} is missing: {why}")
        named = {n for n, d in self.domains.items() if d.role == "feeds"}
        feeding = named | (self.missed.keys() & self.recipe.domains.keys())  # also who never came
        if len(self.feeding) < max(1, self.recipe.transport.quorum * len(feeding)):
            raise RetryError(
                "too-few-owners", "too few owners were heard in this round",
                allowed=f"{self.recipe.transport.quorum:g} of those who feed", got=self.missed,
                remedy="run again when they are back: what was finished is kept; or lower transport.quorum",
            )  # fmt: skip

    def model(
        self, name: str, module: str, inputs: Mapping[str, Any], make: Callable[[Path, Context], Model],
        domain: Domain | None = None,
    ) -> Model:  # fmt: skip
        """A stage that makes a model; ``domain`` is its owner's, where it is made there."""

        def produce(out: Path, context: Context) -> None:
            if self.taken(domain, out):
                open_model(out / "model")  # raises where it is none, before it counts as done
            else:
                make(out / "model", context)

        done = self.stage(name, module, inputs, produce)
        return open_model(done.path / "model", verify=False)  # the ledger has just verified every file

    def contribution(
        self, name: str, module: str, inputs: Mapping[str, Any], domain: Domain,
        make: Callable[[Path, Context], Contribution], shown: str | None = None,
    ) -> tuple[Contribution, Path]:  # fmt: skip
        """A stage at one owner that makes a contribution; the boundary decides whether it is written.

        ``make`` gets the stage's folder, which is the owner's: what else it writes there does not cross. Returns the
        contribution and that folder.
        """
        place = self._at_owner(name, module, inputs, domain, make, shown)
        found = _sent_by(domain, place)
        told = {"what": (shown or name).removesuffix(f" {domain.name}"), "kind": found.kind, "bytes": found.bytes}
        cost = {} if found.epsilon is None else {"epsilon": found.epsilon}
        self.crossed.setdefault(domain.name, {}).setdefault(place, {**told, **cost})
        return found, place

    def kept(
        self, name: str, module: str, inputs: Mapping[str, Any], domain: Domain,
        make: Callable[[Path, Context], Contribution],
    ) -> Path:  # fmt: skip
        """As ``contribution``, which stays with its owner, under ``kept`` in the folder that is returned."""
        return self._at_owner(f"kept {name}", module, inputs, domain, make, stays=True)

    def _at_owner(
        self, name: str, module: str, inputs: Mapping[str, Any], domain: Domain,
        make: Callable[[Path, Context], Contribution], shown: str | None = None, stays: bool = False,
    ) -> Path:  # fmt: skip
        def produce(out: Path, context: Context) -> None:
            if self.taken(domain, out):
                if not stays:
                    _sent_by(domain, out)  # raises where it is none, before it counts as done
                return
            sent = make(out, context)
            drawn = context.scratch / "drawn" if context.scratch else out / "drawn"
            if self.spent:  # noise that is drawn anew is paid anew; what was cut off before it crossed is paid once
                if not drawn.exists():
                    write_text(drawn, secrets.token_hex(16))
                key = digest([name, inputs, drawn.read_text()])
                with self.workspace.lock(f"privacy-{domain.name}"):
                    spend(self.spent / f"{domain.name}.json", key, sent, domain.share.budget)
            through, folder = (keep, "kept") if stays else (cross, "contribution")
            through(sent, domain.share, out / folder, domain.every_text)
            drawn.unlink(missing_ok=True)

        rules = {"share": domain.share.as_dict(), "boundary": code_digest("fanbu.boundary")}
        return self.stage(name, module, {**inputs, **rules}, produce, shown).path

    def taken(self, domain: Domain | None, out: Path) -> bool:
        """Whether a stage is an owner's who is elsewhere; what came of it is then in ``out``."""
        if domain is None or domain.away is None:
            return False
        if self.centre is None:
            raise UsageError(
                "rows-away", f"the rows of {domain.name} lie with an owner elsewhere", remedy="ask it to work there"
            )
        self.centre.take(domain.name, out)
        return True


def _sent_by(domain: Domain, stage: Path) -> Contribution:
    found = open_contribution(stage / "contribution")
    if found.domain != domain.name:
        raise IntegrityError(
            "contribution-broken", f"the owner of {domain.name} sent a contribution in another's name",
            allowed=domain.name, got=found.domain, remedy="ask who that is",
        )  # fmt: skip
    return found


def _title(function: Callable[..., Any]) -> str:
    return function.__name__.replace("_", " ")


def _owner(call: Sequence[Any]) -> Domain:
    """The domain whose owner a call is for."""
    found = next(v for v in call if isinstance(v, (Domain, Specialist)))
    return found.domain if isinstance(found, Specialist) else found


def asked_of(recipe: Recipe, number: int) -> dict[str, Any]:
    """What owners elsewhere are told of a round: its number, and of the recipe what they have to do."""
    return {"recipe": recipe.model_dump(mode="json", include=_TOLD), "round": number}


_TOLD = {
    "fanbu", "name", "seed", "device", "precision", "threads", "max_length", "checkpoint_seconds", "probe", "shrink",
    "feedback", "references",
}  # fmt: skip


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
    "threads", "transport", "compare",
}  # fmt: skip


def start(
    recipe: Recipe, progress: Progress = silent, log: Log = lambda text: None, live: Live | None = None,
    line: Line | None = None,
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
    return open_turn(recipe, base, parent, records, progress, log, live, line)


def open_turn(
    recipe: Recipe, base: Model, parent: Model | None, records: list[dict[str, Any]], progress: Progress = silent,
    log: Log = lambda text: None, live: Live | None = None, line: Line | None = None,
) -> Turn:  # fmt: skip
    """Loads and checks everything that the round after ``records`` needs, before anything is trained."""
    workspace = Workspace(Path(recipe.workspace))
    centre = centre_of(recipe, workspace, line)
    domains, absent = domains_now(recipe, len(records) + 1, workspace.left(), centre)
    check_plan(recipe, domains)

    def show(what: str, done: int, total: int) -> None:
        progress(what, done, total)
        if live:
            live.progress(what, done, total)

    context = recipe.context(show)
    turn = Turn(
        workspace, recipe, context, domains, base, parent, records, log, live, spent=workspace.root / "privacy",
        centre=centre,
    )  # fmt: skip
    for name, why in absent.items():
        turn.miss(name, f"at the beginning: {why}")
    turn.warnings += [*_unnamed(turn), *_alone(turn)]
    turn.context = replace(context, probe=probe_of(turn, recipe.ways))
    return turn


def centre_of(recipe: Recipe, workspace: Workspace, line: Line | None) -> Centre | None:
    """What asks owners who are elsewhere; None where they are here. UsageError where nothing connects them."""
    transport = recipe.transport.transport()
    if (line is None) == transport.away:
        raise UsageError(
            "owners-elsewhere", "the recipe's transport and the way it is run do not fit",
            allowed="fanbu serve-center for kind: flower, fanbu run for all others", got=transport.kind,
            remedy="run it by the other command",
        )  # fmt: skip
    return None if line is None else Centre(line, workspace.root / "owners", transport)


def domains_now(
    recipe: Recipe, number: int, left: Collection[str], centre: Centre | None
) -> tuple[dict[str, Domain], dict[str, str]]:
    """The domains of round ``number``; and those whose owners are elsewhere and did not answer, with the reason."""
    if centre is None:
        return load_domains(recipe, number, left), {}
    names = taking_part(recipe, number, left)
    roles = {name: "guard" if name in recipe.guards else "feeds" for name in names}
    found, absent = centre.domains(roles, asked_of(recipe, number))
    if not any(d.role == "feeds" for d in found.values()):
        raise RetryError(
            "too-few-owners", "no owner who feeds has answered", allowed=sorted(recipe.domains), got=absent,
            remedy="let them join (`fanbu join`), and run again",
        )  # fmt: skip
    return {name: found[name] for name in names if name in found}, absent


def _alone(turn: Turn) -> list[str]:
    """Whose label rows are alone in a secure sum, as far as all are heard."""
    known = Counter(label for d in turn.feeding for label in d.full_labels)
    alone = sorted(d.name for d in turn.feeding if any(known[label] == 1 for label in d.full_labels))
    return [
        f"{step.called}: no other owner knows all labels of {', '.join(alone)}: the rows of those that one owner alone "
        f"knows are alone in the secure sum, and the centre can read them"
        for step in turn.recipe.feedback
        if step.secure and alone
    ]


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
