"""What a recipe is made of: domains, what they share, steps, the probe set, transport, gate, comparison."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from fanbu.domain import Arrived
from fanbu.judge.gate import Gate
from fanbu.types import PRESETS, Privacy, Share, Task, Transport

SPLITS = ("train", "valid", "test", "unlabelled")


class Part(BaseModel):
    """A block of a recipe: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class BudgetSpec(Part):
    """What all noised contributions of an owner may cost together: (epsilon, delta)-differential privacy."""

    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(default=1e-5, gt=0, lt=1)


class ShareSpec(Part):
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


class Arrival(Part):
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


class DomainSpec(Part):
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


Likeness = Literal["weights", "texts", "answers"]


class TreeSpec(Part):
    """A tree of industries along which a way back is taken: ``groups`` of domains, or of groups, or groups of what is
    alike ``by`` task vectors, texts, or answers; and how many rows a group counts for, towards which its members are
    drawn (``shrinkage``)."""

    groups: dict[str, Any] = Field(default_factory=dict)
    by: Likeness | None = None
    shrinkage: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _one_tree(self) -> TreeSpec:
        if bool(self.groups) == bool(self.by):
            raise ValueError("give either groups or by")
        return self


class Step(BaseModel):
    """A method with its parameters; the catalogue checks them against the method's signature. ``times``: a way back is
    taken so often, each time on what it made of the large model before (inner rounds), by a share of the owners
    (``participation``), drawn anew each time. ``secure``: what owners send is masked, and the centre reads the sum of
    all of them alone (linear ways). ``noise``: what an owner changed is brought down to a length (``norm``), and noise
    is added, so that it tells little of the owner as a whole: (epsilon, delta)-differential privacy. ``tree``: it is
    taken group by group."""

    model_config = ConfigDict(extra="allow", frozen=True)
    method: str
    times: Annotated[int, Field(ge=1, le=10_000)] = 1
    participation: Annotated[float, Field(gt=0, le=1)] = 1.0
    secure: bool = False
    noise: Privacy | None = None
    tree: TreeSpec | None = None

    @model_validator(mode="after")
    def _some_of_many(self) -> Step:
        if self.tree and (self.secure or self.noise):
            raise ValueError("a tree needs what each owner sends: leave secure and noise out, or tree")
        if self.participation < 1 and self.times == 1:
            raise ValueError("participation is of inner rounds: say how many times, too")
        return self

    @model_serializer(mode="wrap")
    def _once_goes_without_saying(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        usual = {"times": 1, "participation": 1, "secure": False, "noise": None, "tree": None}
        return {k: v for k, v in handler(self).items() if k not in usual or v != usual[k]}

    @property
    def arguments(self) -> dict[str, Any]:
        """The parameters."""
        return dict(self.model_extra or {})

    @property
    def called(self) -> str:
        """What a report calls it."""
        name = f"{self.method} tree" if self.tree else self.method
        return name if self.times == 1 else f"{name} x{self.times}"


class PublicTexts(Part):
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


class ProbeSpec(Part):
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
        if "samples" not in share.kinds:
            return None
        if self.domains and share.texts:
            return "own"
        return "synthetic" if self.synthetic and (share.texts or share.synthetic) else None


class TransportSpec(Part):
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


class GateSpec(Part):
    """See ``fanbu.judge.gate.Gate``."""

    margin: float = Field(default=0.05, ge=0, le=1)
    margins: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(default_factory=dict)
    mode: Literal["told", "untold"] = "told"
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    def gate(self) -> Gate:
        """The value that the judge takes."""
        return Gate(self.margin, self.margins, self.mode, self.confidence)


class CompareSpec(Part):
    """What `fanbu compare` tries: ``ways``, steps or names (none: every way that fits and is not experimental), within
    a budget of ``seconds``, or of ``runs``, each of so many training steps as the costliest candidate takes with all
    rows. Of the candidates of a rung, the best 1 in ``eta`` go on to ``eta`` times as many rows. A share of the budget
    (``tune``) is for ``settings`` other arguments of the best, at most, which ``sampler`` draws around its own, or from
    ``space``; with ``mix``, how much of each domain goes in, the same at all depths or not. What to try first is
    ``known`` from comparisons that fanbu comes with, and from those of workspaces that ``learn`` names (the recipe's
    own may be one)."""

    ways: list[Step] = Field(default_factory=list)
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    runs: float = Field(default=3.0, gt=0, allow_inf_nan=False)
    eta: int = Field(default=3, ge=2, le=10)
    tune: float = Field(default=0.0, ge=0, lt=1)
    settings: int = Field(default=20, ge=1, le=1000)
    sampler: Literal["tpe", "cmaes", "random", "grid"] = "tpe"
    space: dict[str, list[Any]] = Field(default_factory=dict)
    mix: Literal["domain", "layer"] | None = None
    known: bool = True
    learn: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _tuned(self) -> CompareSpec:
        usual = {name: f.get_default(call_default_factory=True) for name, f in type(self).model_fields.items()}
        idle = [name for name in ("settings", "sampler", "space", "mix") if getattr(self, name) != usual[name]]
        if idle and not self.tune:
            raise ValueError(f"{', '.join(idle)} would do nothing: say what share of the budget is for it under tune")
        if self.space and self.mix:
            raise ValueError("give either space or mix")
        return self

    @field_validator("ways", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return [{"method": v} if isinstance(v, str) else v for v in value] if isinstance(value, list) else value
