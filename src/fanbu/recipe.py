"""The recipe: YAML that names the large model, the domains, the methods and the gate. Unknown keys are refused."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FieldSerializationInfo,
    PositiveInt,
    SerializerFunctionWrapHandler,
    ValidationError,
    field_serializer,
    model_serializer,
    model_validator,
)

from fanbu.catalogue import method, suggestion
from fanbu.domain import Arrived, Domain, load_domain
from fanbu.errors import UsageError
from fanbu.judge.gate import Gate
from fanbu.machine import resolve_machine
from fanbu.recipe_text import apply_change, read_yaml
from fanbu.types import PRESETS, Context, Precision, Privacy, Progress, Share, Task, Transport, silent

SPLITS = ("train", "valid", "test", "unlabelled")


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetSpec(_Part):
    """What all noised contributions of an owner may cost together: (epsilon, delta)-differential privacy."""

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(default=1e-5, gt=0, lt=1)


class ShareSpec(_Part):
    """What may leave the owner: a preset, and changes to it; ``together`` is how many owners' numbers a sum must be of,
    of which this owner's are a part."""

    preset: Literal["open", "internal", "private"] = "open"
    kinds: list[Literal["weights", "updates", "predictions", "samples", "modules", "statistics", "scores"]] | None = (
        None
    )
    texts: bool | None = None
    labels: bool | None = None
    synthetic: bool | None = None
    budget: BudgetSpec | None = None
    together: Annotated[int, Field(ge=2, le=10_000)] | None = None

    def share(self) -> Share:
        """The value that the boundary checks."""
        base = PRESETS[self.preset]
        return Share(
            base.kinds if self.kinds is None else frozenset(self.kinds),
            base.texts if self.texts is None else self.texts,
            base.labels if self.labels is None else self.labels,
            base.private,
            base.synthetic if self.synthetic is None else self.synthetic,
            None if self.budget is None else (self.budget.epsilon, self.budget.delta),
            self.together or 0,
        )


class Arrival(_Part):
    """Files of a domain that are there from a round, or from a day, on."""

    round: PositiveInt | None = None
    date: datetime.date | None = None
    train: str | None = None
    valid: str | None = None
    test: str | None = None
    unlabelled: str | None = None

    @model_validator(mode="after")
    def _one_moment(self) -> Arrival:
        if (self.round is None) == (self.date is None):
            raise ValueError("give either round or date")
        if not any(getattr(self, split) for split in SPLITS):
            raise ValueError(f"name a file under one of {', '.join(SPLITS)}")
        return self

    def is_there(self, number: int, today: datetime.date) -> bool:
        """Whether its files belong to round ``number``, run on the day ``today``."""
        return self.round <= number if self.round else bool(self.date and self.date <= today)


class DomainSpec(_Part):
    """One domain: where its rows are, when they arrive, and what may leave its owner."""

    task: Task = "text-classification"
    train: str | list[str] | None = None
    valid: str | list[str] | float = 0.1
    test: str | list[str] | float | None = None
    unlabelled: str | list[str] | None = None
    arrivals: PositiveInt | list[Arrival] = Field(default_factory=list)
    joins: PositiveInt = 1
    leaves: PositiveInt | None = None
    python: str | None = None
    columns: dict[str, str] | None = None
    labels: list[str] | dict[str | int, str] | None = None
    limit: dict[Literal["train", "valid", "test", "unlabelled"], PositiveInt] = Field(default_factory=dict)
    metric: str | None = None
    share: Literal["open", "internal", "private"] | ShareSpec = "open"

    @model_validator(mode="after")
    def _in_time(self) -> DomainSpec:
        if self.leaves is not None and self.leaves <= self.joins:
            raise ValueError(f"leaves must come after joins ({self.joins})")
        for split in ("valid", "test"):
            if isinstance(getattr(self, split), float) and any(getattr(a, split) for a in self.files):
                raise ValueError(f"{split} is a share of train, so no {split} file can arrive")
        return self

    @property
    def files(self) -> list[Arrival]:
        """The files that arrive."""
        return self.arrivals if isinstance(self.arrivals, list) else []

    def takes_part(self, number: int) -> bool:
        """Whether the domain has joined by round ``number`` and not left."""
        return self.joins <= number and (self.leaves is None or number < self.leaves)

    def at(self, number: int, today: datetime.date) -> tuple[DomainSpec, Arrived]:
        """The domain as it is in round ``number``: with the files that have arrived, and how much is yet to come."""
        here = [a for a in self.files if a.is_there(number, today)]
        grown = {s: _joined(getattr(self, s), [getattr(a, s) for a in here]) for s in SPLITS}
        arrived = Arrived(more=len(here) < len(self.files))
        if isinstance(self.arrivals, int):
            arrived = Arrived(min(number - self.joins + 1, self.arrivals), self.arrivals)
        return self.model_copy(update=grown), arrived


def _joined(first: Any, more: list[str | None]) -> Any:
    added = [m for m in more if m is not None]
    return first if not added else [*([first] if isinstance(first, str) else first or []), *added]


class Step(BaseModel):
    """A method with its parameters; the catalogue checks them against the method's signature. ``times``: a way back is
    taken so often, each time on what it made of the large model before (inner rounds), by a share of the owners
    (``participation``), drawn anew each time. ``secure``: what owners send is masked, and the centre reads the sum of
    all of them alone (linear ways). ``noise``: what an owner changed is brought down to a length (``norm``), and noise
    is added, so that it tells little of the owner as a whole: (epsilon, delta)-differential privacy."""

    model_config = ConfigDict(extra="allow", frozen=True)
    method: str
    times: Annotated[int, Field(ge=1, le=10_000)] = 1
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    secure: bool = False
    noise: Privacy | None = None

    @model_validator(mode="after")
    def _some_of_many(self) -> Step:
        if self.participation < 1 and self.times == 1:
            raise ValueError("participation is of inner rounds: say how many times, too")
        return self

    @model_serializer(mode="wrap")
    def _once_goes_without_saying(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        usual = {"times": 1, "participation": 1, "secure": False, "noise": None}
        return {k: v for k, v in handler(self).items() if k not in usual or v != usual[k]}

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters."""
        return dict(self.model_extra or {})

    @property
    def called(self) -> str:
        """What a report calls it."""
        return self.method if self.times == 1 else f"{self.method} x{self.times}"


class PublicTexts(_Part):
    """A file of texts that belong to no domain."""

    path: str | None = None
    python: str | None = None
    columns: dict[str, str] | None = None
    limit: PositiveInt | None = None

    @model_validator(mode="after")
    def _one_source(self) -> PublicTexts:
        if (self.path is None) == (self.python is None):
            raise ValueError("give either path or python")
        return self


class ProbeSpec(_Part):
    """The texts that specialists are asked about: of the domains that share texts, public ones, and of each domain
    whose own do not join so many ``synthetic`` ones; and for causal models so many of each domain's that the large
    model has ``written`` to the end."""

    domains: bool = True
    limit: PositiveInt | None = None
    public: list[PublicTexts] = Field(default_factory=list)
    synthetic: int = Field(default=0, ge=0)
    written: int = Field(default=0, ge=0)

    def from_domain(self, share: Share) -> Literal["own", "synthetic"] | None:
        """What a feeding domain that shares so gives to the probe set."""
        if self.domains and share.texts:
            return "own"
        return "synthetic" if self.synthetic and (share.texts or share.synthetic) else None


class TransportSpec(_Part):
    """Where owners work: one after the other (the default), side by side in ``processes`` of this machine, or on a Ray
    cluster, that of ``address`` or one of this machine; or on machines of their own, by Flower, which hold their rows:
    those who have not answered ``arrive`` seconds after a round began, or ``seconds`` after they were asked, are left
    out of it, and the round goes on while a ``quorum`` of those who feed is left."""

    kind: Literal["local", "ray", "flower"] = "local"
    processes: int = Field(default=1, ge=1, le=1024)
    address: str | None = None
    arrive: float = Field(default=60.0, gt=0, le=86400)
    seconds: float = Field(default=3600.0, gt=0, le=30 * 86400)
    quorum: float = Field(default=0.5, gt=0, le=1)

    @model_validator(mode="after")
    def _an_address_of_ray(self) -> TransportSpec:
        if self.address is not None and self.kind != "ray":
            raise ValueError("address is that of a Ray cluster: give kind: ray")
        return self

    def transport(self) -> Transport:
        """The value that the round takes."""
        return Transport(self.kind, self.processes, self.address, self.arrive, self.seconds)


class GateSpec(_Part):
    """See ``fanbu.judge.gate.Gate``."""

    margin: float = Field(default=0.05, ge=0, le=1)
    margins: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    mode: Literal["told", "untold"] = "told"
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    def gate(self) -> Gate:
        """The value that the judge takes."""
        return Gate(self.margin, self.margins, self.mode, self.confidence)


def _listed(value: Any) -> Any:
    """One way back may stand alone."""
    return [value] if isinstance(value, (Mapping, Step)) else value


class Recipe(_Part):
    """Everything that the rounds need. ``feedback`` is a way back, or several: each on what the one before made of the
    large model. ``references`` are compared and never promoted."""

    fanbu: Literal[1]
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    model: str
    workspace: str = ""
    pooling: Literal["auto", "mean", "native"] = "auto"
    seed: int = Field(0, ge=0)
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: int = Field(0, ge=0)
    max_length: int = Field(128, ge=4, le=131072)
    checkpoint_seconds: float = Field(60.0, ge=0)
    rounds: int = Field(1, ge=1, le=1000)
    domains: dict[str, DomainSpec] = Field(min_length=1)
    guards: dict[str, DomainSpec] = Field(default_factory=dict)
    probe: ProbeSpec = ProbeSpec()
    shrink: list[Step] = Field(default_factory=lambda: [Step(method="finetune")], min_length=1)
    feedback: Annotated[list[Step], BeforeValidator(_listed)] = Field(min_length=1)
    references: list[Literal["tfidf"] | Step] = Field(default_factory=list)
    gate: GateSpec = GateSpec()
    transport: TransportSpec = TransportSpec()

    @field_serializer("feedback")
    def _as_written(self, steps: list[Step], info: FieldSerializationInfo) -> Any:
        plain = [step.model_dump(mode=info.mode, exclude_none=bool(info.exclude_none)) for step in steps]
        return plain if len(plain) > 1 else plain[0]

    @property
    def ways(self) -> list[Step]:
        """All ways back: those that feed, then those that are compared."""
        return [*self.feedback, *(r for r in self.references if isinstance(r, Step))]

    def context(self, progress: Progress = silent) -> Context:
        """What every step gets, without a probe set. The recipe must have been loaded: `auto` is no precision."""
        return Context(
            seed=self.seed, device=self.device, precision=cast(Precision, self.precision), threads=self.threads,
            max_length=self.max_length, progress=progress, checkpoint_seconds=self.checkpoint_seconds,
        )  # fmt: skip


def load_recipe(source: str | Path | Mapping[str, Any], changes: Sequence[str] = ()) -> Recipe:
    """Reads and checks a recipe; ``changes`` are ``key.key=value`` with YAML values.

    Paths in it are relative to its folder. Device, precision and threads are resolved to what this machine gives,
    and methods and their parameters are checked. Raises UsageError that names the key.
    """
    if isinstance(source, Mapping):
        value, folder = dict(source), Path.cwd()
    else:
        path = Path(source)
        value, folder = read_yaml(path), path.resolve().parent
    for change in changes:
        apply_change(value, change)
    try:
        recipe = Recipe.model_validate(value)
    except ValidationError as error:
        raise _explain(error) from None
    for step in recipe.shrink:
        method(step.method, "shrink").check(step.arguments)
        if step.times > 1:
            raise UsageError(
                "repeats", f"shrink: {step.method} is a way down, and taken once", allowed="times with a way back",
                got=step.times, remedy="list the step as often as it is to be taken",
            )  # fmt: skip
    for step in recipe.ways:
        method(step.method, "feedback").check(step.arguments)
    twice = set(recipe.domains) & set(recipe.guards)
    if twice:
        raise UsageError("domain-twice", "a domain feeds and is a guard", got=twice, remedy="name it once")
    known = [*recipe.domains, *recipe.guards]
    if unknown := set(recipe.gate.margins) - set(known):
        raise UsageError("unknown-domain", "gate.margins", allowed=known, got=unknown, remedy="fix the name")
    return _resolve(recipe, folder)


def _explain(error: ValidationError, at: tuple[str, ...] = ()) -> UsageError:
    """The first thing that is wrong below the key ``at``; an unknown key before anything else."""
    found = error.errors()
    first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
    place = (*at, *first["loc"])
    # where a value may be of two kinds, pydantic names the kind too
    kinds = {"ShareSpec", "Step"}
    where = ".".join(str(p) for p in place if p not in kinds and not str(p).startswith("literal["))
    if first["type"] == "extra_forbidden":
        model: Any = _model_at(place[:-1])
        known = list(model.model_fields) if model else []
        name = str(first["loc"][-1])
        return UsageError(
            "unknown-key",
            f"recipe: unknown key {where}",
            allowed=known,
            got=name,
            remedy=suggestion(name, dict.fromkeys(known)),
        )
    return UsageError(
        "bad-recipe", f"recipe: {where}", allowed=first["msg"], got=first.get("input"), remedy="see docs/recipes.md"
    )


def _model_at(place: tuple[int | str, ...]) -> type[BaseModel] | None:
    names: dict[str, type[BaseModel]] = {
        "domains": DomainSpec,
        "guards": DomainSpec,
        "probe": ProbeSpec,
        "gate": GateSpec,
    }
    if not place:
        return Recipe
    if "share" in place:
        return ShareSpec
    if "public" in place:
        return PublicTexts
    return names.get(str(place[0]))


def _resolve(recipe: Recipe, folder: Path) -> Recipe:
    """Paths made absolute, device, precision and threads fixed."""
    local = folder / recipe.model
    device, precision, threads = resolve_machine(recipe.device, recipe.precision, recipe.threads)
    public = [p.model_copy(update={"path": _absolute(p.path, folder)}) for p in recipe.probe.public]
    return recipe.model_copy(
        update={
            "model": str(local) if local.is_dir() else recipe.model,
            "workspace": recipe.workspace or f"runs/{recipe.name}",
            "domains": {n: _located(s, folder) for n, s in recipe.domains.items()},
            "guards": {n: _located(s, folder) for n, s in recipe.guards.items()},
            "shrink": [_placed(step, folder) for step in recipe.shrink],
            "probe": recipe.probe.model_copy(update={"public": public}),
            "device": device,
            "precision": precision,
            "threads": threads,
        }
    )


def _placed(step: Step, folder: Path) -> Step:
    """A teacher that is a folder is found from the recipe's; so are the places that a way down writes to and reads."""
    found = dict(step.arguments)
    for name in ("teacher", "history"):
        if (path := found.get(name)) and (name != "teacher" or (folder / path).is_dir()):
            found[name] = str((folder / path).resolve())
    for block, name in (("extra", "cache"), ("budget", "table")):
        inner = found.get(block)
        if isinstance(inner, Mapping) and inner.get(name):
            found[block] = {**inner, name: str((folder / str(inner[name])).resolve())}
    return Step.model_validate({"method": step.method, "times": step.times, **found})


def _absolute(source: Any, folder: Path) -> Any:
    if isinstance(source, list):
        return [_absolute(one, folder) for one in source]
    if not isinstance(source, str) or source.startswith("datasets:"):
        return source
    path = os.path.expandvars(source)
    if left := re.search(r"\$(\w+|\{\w+\})", path):
        raise UsageError(
            "variable-unset", f"the path {source} names a variable that is not set", got=left.group(),
            remedy=f"set it, for example: export {left.group(1).strip('{}')}=/path/to/data",
        )  # fmt: skip
    return os.path.normpath(folder / Path(path).expanduser())


def _located(spec: DomainSpec, folder: Path) -> DomainSpec:
    def here(part: DomainSpec | Arrival) -> dict[str, Any]:
        return {split: _absolute(getattr(part, split), folder) for split in SPLITS}

    arrivals = [a.model_copy(update=here(a)) for a in spec.files] if spec.files else spec.arrivals
    return spec.model_copy(update={**here(spec), "arrivals": arrivals})


def read_domains(path: Path) -> dict[str, Callable[..., Domain]]:
    """The domains and guards of a YAML file (a recipe, or its ``domains:`` alone), each loaded when called, as they are
    in round ``number`` where that is given."""

    class Section(BaseModel):
        domains: dict[str, DomainSpec] = Field(min_length=1)
        guards: dict[str, DomainSpec] = Field(default_factory=dict)

    try:
        found = Section.model_validate(read_yaml(path))
    except ValidationError as error:
        raise _explain(error) from None
    folder, roles = path.resolve().parent, {"guards": found.guards, "domains": found.domains}
    return {
        name: partial(open_domain, name, _located(spec, folder), "guard" if role == "guards" else "feeds")
        for role, specs in roles.items()
        for name, spec in specs.items()
    }


def read_gate(values: Mapping[str, Any]) -> Gate:
    """The gate from plain values, checked as in a recipe."""
    try:
        return GateSpec.model_validate(values).gate()
    except ValidationError as error:
        raise _explain(error, ("gate",)) from None


def load_domains(recipe: Recipe, number: int = 1, left: Collection[str] = ()) -> dict[str, Domain]:
    """The domains and guards of a recipe that take part in round ``number``, loaded and checked.

    Those that have ``left`` are left out. Raises UsageError where nobody feeds.
    """
    known = {**recipe.domains, **recipe.guards}
    here = taking_part(recipe, number, left)
    return {n: open_domain(n, known[n], "guard" if n in recipe.guards else "feeds", number) for n in here}


def taking_part(recipe: Recipe, number: int, left: Collection[str] = ()) -> list[str]:
    """Names of the domains and guards that take part in round ``number``. UsageError where nobody feeds."""
    known = {**recipe.domains, **recipe.guards}
    here = [name for name, spec in known.items() if spec.takes_part(number) and name not in left]
    if not set(here) & set(recipe.domains):
        raise UsageError(
            "no-domains", f"no domain takes part in round {number}", allowed=f"joins <= {number} < leaves",
            got={n: [s.joins, s.leaves] for n, s in recipe.domains.items()}, remedy="let one join, or run fewer rounds",
        )  # fmt: skip
    return here


def open_domain(name: str, spec: DomainSpec, role: Literal["feeds", "guard"] = "feeds", number: int = 1) -> Domain:
    """One domain as it is in round ``number``, loaded and checked."""
    spec, arrived = spec.at(number, datetime.date.today())
    arguments = {f: getattr(spec, f) for f in DomainSpec.model_fields if f not in _NOT_OF_ROWS}
    share = PRESETS[spec.share] if isinstance(spec.share, str) else spec.share.share()
    return load_domain(name, **arguments, share=share, role=role, arrived=arrived)


_NOT_OF_ROWS = {"share", "arrivals", "joins", "leaves"}
