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
    Field,
    FieldSerializationInfo,
    ValidationError,
    field_serializer,
)

from fanbu.catalogue import method, suggestion
from fanbu.data.load import RawRow, load_rows
from fanbu.data.split import cap
from fanbu.data.standard_library import function_bodies
from fanbu.domain import Domain, load_domain
from fanbu.errors import UsageError
from fanbu.judge.gate import Gate
from fanbu.machine import resolve_machine
from fanbu.recipe_parts import (
    SPLITS,
    Arrival,
    CompareSpec,
    DomainSpec,
    GateSpec,
    Part,
    ProbeSpec,
    PublicTexts,
    ShareSpec,
    Step,
    TransportSpec,
)
from fanbu.recipe_text import apply_change, read_yaml
from fanbu.types import MEDIA, PRESETS, Context, Precision, Progress, Task, silent


def _listed(value: Any) -> Any:
    """One way back may stand alone."""
    return [value] if isinstance(value, (Mapping, Step)) else value


class Recipe(Part):
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
    compare: CompareSpec = CompareSpec()

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
        if idle := sorted(_OF_WAYS_BACK & step.model_dump().keys()):
            raise UsageError(
                "feedback-only", f"shrink: {step.method} is a way down; {', '.join(idle)} would do nothing there",
                allowed="these keys with a way back", got=idle,
                remedy="leave them out; a way down that is to be taken twice is listed twice",
            )  # fmt: skip
    for step in [*recipe.ways, *recipe.compare.ways]:
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
        "transport": TransportSpec,
        "compare": CompareSpec,
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
    return Step.model_validate({"method": step.method, **found})


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


def public_texts(public: PublicTexts, task: Task) -> list[RawRow]:
    """The rows of one public file, or area of the standard library."""
    if public.python:
        raw = list(function_bodies(public.python))
    else:
        raw = load_rows(str(public.path), public.columns, labelled=False, kind=MEDIA.get(task, "text"))
    return cap(raw, public.limit, "public")


_OF_WAYS_BACK = frozenset({"times", "participation", "secure", "noise", "tree"})
_NOT_OF_ROWS = {"share", "arrivals", "joins", "leaves"}
