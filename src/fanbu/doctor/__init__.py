"""``fanbu doctor`` and ``fanbu run --dry-run``: what there is, what will not work and why, and how long it may take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fanbu.doctor.machine import extras, installed, machine
from fanbu.errors import FanbuError, UsageError
from fanbu.types import CLASSIFYING, MEDIA, Progress, silent

if TYPE_CHECKING:
    from fanbu.domain import Domain
    from fanbu.model import Model
    from fanbu.recipe import Recipe

T = TypeVar("T")
__all__ = ["examine", "plan"]
_AHEAD = 20  # rounds that are looked at one by one


class Findings:
    """Problems and warnings, one after the other."""

    def __init__(self) -> None:
        self.problems: list[dict[str, Any]] = []
        self.warnings: list[str] = []

    def attempt(self, where: str, what: Callable[[], T]) -> T | None:
        """The result of ``what``; an error is noted, once, and the search goes on."""
        try:
            return what()
        except FanbuError as error:
            self.note(where, error)
            return None

    def note(self, where: str, error: FanbuError) -> None:
        """One problem."""
        entry = {"where": where, **error.as_dict(), "message": str(error), "see": f"docs/errors.md#{error.code}"}
        if entry["message"] not in {p["message"] for p in self.problems}:
            self.problems.append(entry)


def examine(path: Path | None, progress: Progress = silent) -> dict[str, Any]:
    """Everything that can be said before a run, as plain values; ``ok`` says that it will work."""
    found, packages = Findings(), installed()
    for package in packages:
        if not package["fits"] and not package["extra"]:
            needed = f"{package['name']}{package['needs']}"
            got, remedy = package["version"] or "nothing", f"pip install '{needed}'"
            found.note(package["name"], UsageError("package-unfit", f"fanbu needs {needed}", got=got, remedy=remedy))
    told: dict[str, Any] = {"recipe": None}
    workspace = Path()
    if path is not None:
        told, workspace = _recipe(path, found, packages, progress)
    here = machine(workspace)
    if told["recipe"]:
        _room(told, here, found)
    return {
        "ok": not found.problems, "installed": packages, "extras": extras(packages), "machine": here, **told,
        "problems": found.problems, "warnings": found.warnings,
    }  # fmt: skip


def _recipe(
    path: Path, found: Findings, packages: Sequence[Mapping[str, Any]], progress: Progress
) -> tuple[dict[str, Any], Path]:  # fmt: skip
    """What can be said of a recipe; what depends on something that is broken is left out."""
    from fanbu.doctor.ways import ways
    from fanbu.model import open_model
    from fanbu.plan import check_plan
    from fanbu.recipe import load_recipe
    from fanbu.recipe_text import read_yaml

    told: dict[str, Any] = {"recipe": str(path), "domains": {}, "methods": [], "estimate": None}
    value = found.attempt("recipe", lambda: read_yaml(path))
    if value is None:
        return told, Path()
    recipe = found.attempt("recipe", lambda: load_recipe(path))
    if recipe is None:
        _parts(path, value, found)
        return told, Path()
    _extras_needed(recipe, packages, found)
    model = found.attempt("model", lambda: open_model(recipe.model))
    if recipe.transport.transport().away:
        found.warnings.append("rows are at their owners: what depends on them is not looked at here")
        return told, Path(recipe.workspace)
    domains = _domains(recipe, found, told)
    if domains and len(domains) == len({**recipe.domains, **recipe.guards}):
        found.attempt("plan", lambda: check_plan(recipe, domains))
    if domains:
        told["methods"] = ways(recipe, domains)
    if model is not None and domains:
        _lengths(recipe, domains, model, found)
        if not found.problems:
            told["estimate"] = found.attempt("timing", lambda: _estimate(recipe, domains, model, progress))
    return told, Path(recipe.workspace)


def _check_step(name: str, way: str, arguments: Mapping[str, Any]) -> None:
    from fanbu.catalogue import method

    method(name, way).check(arguments)


def _parts(path: Path, value: Mapping[str, Any], found: Findings) -> None:
    """Where a recipe cannot be read as a whole: each of its parts by itself."""
    from fanbu.model import open_model
    from fanbu.recipe import read_domains

    if isinstance(value.get("model"), str):
        local = path.resolve().parent / value["model"]
        found.attempt("model", lambda: open_model(local if local.is_dir() else value["model"], verify=False))
    loaders = found.attempt("domains", lambda: read_domains(path)) or {}
    for name, load in loaders.items():
        found.attempt(name, load)
    given = [(key, value.get(key)) for key in ("shrink", "references", "feedback")]
    for key, step in [(key, step) for key, many in given for step in (many if isinstance(many, list) else [many])]:
        if isinstance(step, dict) and isinstance(step.get("method"), str):
            arguments = {k: v for k, v in step.items() if k != "method"}
            way = "shrink" if key == "shrink" else "feedback"
            found.attempt(key, partial(_check_step, step["method"], way, arguments))


def _extras_needed(recipe: Recipe, packages: Sequence[Mapping[str, Any]], found: Findings) -> None:
    """Extras that the recipe's data or transport need."""
    specs = [*recipe.domains.values(), *recipe.guards.values(), *recipe.probe.public]
    sources = [s for spec in specs for v in vars(spec).values() for s in (v if isinstance(v, list) else [v])]
    named = any(isinstance(s, str) and s.startswith("datasets:") for s in sources)
    there = {p["name"] for p in packages if p["fits"]}
    kind = recipe.transport.kind
    for where, why, extra, package in (
        ("data", "the recipe names data of the datasets library", "datasets", "datasets" if named else None),
        ("transport", f"the recipe's transport is {kind}", kind, {"ray": "ray", "flower": "flwr"}.get(kind)),
    ):
        if package and package not in there:
            found.note(where, UsageError("extra-missing", why, remedy=f"pip install 'fanbu[{extra}]'"))


def _domains(recipe: Recipe, found: Findings, told: dict[str, Any]) -> dict[str, Domain]:
    """The domains that load, each as it is in the first round that it takes part in."""
    from fanbu.doctor.warn import warnings_of
    from fanbu.recipe import open_domain

    loaded = {}
    for name, spec in {**recipe.domains, **recipe.guards}.items():
        role: Any = "guard" if name in recipe.guards else "feeds"
        d = found.attempt(name, partial(open_domain, name, spec, role, spec.joins))
        if d is not None:
            loaded[name] = d
            told["domains"][name] = {
                "role": d.role, "task": d.task, "labels": len(d.labels), "share": d.share.as_dict(),
                "rows": d.counts, "from_round": spec.joins,
                "warnings": warnings_of(d, recipe.gate.margins.get(name, recipe.gate.margin), recipe.gate.confidence),
            }  # fmt: skip
    return loaded


def _lengths(recipe: Recipe, domains: Mapping[str, Domain], model: Model, found: Findings) -> None:
    """How much of the texts is read; the model must be one for the task."""
    from fanbu.doctor.estimate import sample
    from fanbu.model import load_tokenizer

    task = next(iter(domains.values())).task
    if task == "causal-lm" and model.task != task:
        found.note("model", UsageError(
            "model-task", f"{recipe.model} is no causal language model", allowed=task,
            got=model.config.get("architectures"), remedy="name a causal model, or domains with labels",
        ))  # fmt: skip
        return
    tokenizer = found.attempt("model", lambda: load_tokenizer(model))
    texts = sample(domains, 500)
    if tokenizer is None or not texts or task in MEDIA:
        return
    lengths = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
    cut = sum(n > recipe.max_length for n in lengths) / len(lengths)
    if cut > 0.1:
        found.warnings.append(
            f"{cut:.0%} of the texts are longer than max_length ({recipe.max_length} tokens; the longest of "
            f"{len(texts)} has {max(lengths)}): what comes after is not read"
        )


def _estimate(recipe: Recipe, domains: Mapping[str, Domain], model: Model, progress: Progress) -> dict[str, Any]:
    """Seconds by stage of the next round, and of all rounds that are still to come."""
    from fanbu.doctor.estimate import measure, work
    from fanbu.record import finished

    speed = measure(recipe, domains, model, progress)
    records, left = finished(Path(recipe.workspace))
    done = len(records)
    coming = list(range(done + 1, recipe.rounds + 1)) or [done + 1]
    each = {n: work(recipe, _in_round(recipe, n, domains, left), model) for n in coming[:_AHEAD]}
    totals = {n: sum(w.seconds(speed) for w in stages) for n, stages in each.items()}
    stages = [{**asdict(w), "seconds": round(w.seconds(speed), 1)} for w in each[coming[0]]]
    all_seconds = sum(totals.values()) * len(coming) / len(totals)
    size = model.bytes + 20_000_000  # with its tokenizer
    grown = sum(d.role == "feeds" for d in domains.values()) * len(recipe.shrink)
    kept = size * (grown + 2 + len(recipe.feedback) + len(recipe.references)) * len(coming)
    if any(step.times > 1 for step in recipe.ways):  # an inner round and the one before it
        kept += 2 * size * (1 + sum(d.role == "feeds" for d in domains.values()))
    return {
        "speed": asdict(speed), "stages": stages, "round": coming[0], "rounds": len(coming),
        "round_seconds": round(totals[coming[0]], 1), "seconds": round(all_seconds, 1),
        "memory_bytes": round(1.5 * speed.peak_bytes) + model.bytes, "disk_bytes": kept,  # the best epoch is kept too
    }  # fmt: skip


def _in_round(
    recipe: Recipe, number: int, known: Mapping[str, Domain], left: Sequence[str]
) -> Mapping[str, Domain]:  # fmt: skip
    """The domains as they are in one round."""
    from fanbu.recipe import load_domains

    if number == 1 and not any(s.arrivals or s.joins > 1 or s.leaves for s in recipe.domains.values()):
        return known
    return load_domains(recipe, number, left)


def _room(told: Mapping[str, Any], here: Mapping[str, Any], found: Findings) -> None:
    """Memory and disk against what is there."""
    estimate = told["estimate"]
    if not estimate:
        return
    memory = here["accelerator_bytes"] or here["memory_free_bytes"]
    for what, needed, free, remedy in (
        ("memory", estimate["memory_bytes"], memory, "take a smaller batch_size or max_length"),
        ("disk", estimate["disk_bytes"], here["disk_free_bytes"], "free some, or take fewer rounds"),
    ):
        if needed > free:
            found.note(what, UsageError(
                "too-little-room", f"a run may need more {what} than is free", allowed=f"{free / 1e9:.1f} GB",
                got=f"about {needed / 1e9:.1f} GB", remedy=remedy,
            ))  # fmt: skip


def plan(recipe: Recipe, progress: Progress = silent) -> dict[str, Any]:
    """What a run of the recipe would do: rounds, domains, ways, what crosses from whom, steps and time."""
    from fanbu.model import open_model
    from fanbu.plan import check_plan, need_rows_here
    from fanbu.recipe import load_domains
    from fanbu.record import finished

    need_rows_here(recipe, "what a run would do")
    root = Path(recipe.workspace)
    records, left = finished(root)
    done, number = len(records), len(records) + 1
    domains = load_domains(recipe, number, left)
    check_plan(recipe, domains)
    return {
        "name": recipe.name, "workspace": str(root), "model": recipe.model, "rounds": max(recipe.rounds, number),
        "finished": done, "device": recipe.device, "precision": recipe.precision,
        "domains": {
            n: {"role": d.role, "rows": d.counts, "labels": len(d.labels), "crosses": _crosses(recipe, d),
                "warnings": list(d.warnings)}
            for n, d in domains.items()
        },
        "shrink": [s.model_dump() for s in recipe.shrink],
        "feedback": [s.model_dump() for s in recipe.feedback],
        "references": [r if isinstance(r, str) else r.model_dump() for r in recipe.references],
        "gate": recipe.gate.model_dump(),
        "estimate": _estimate(recipe, domains, open_model(recipe.model), progress),
    }  # fmt: skip


def _crosses(recipe: Recipe, d: Domain) -> list[str]:
    """What leaves a domain's owner in a round."""
    from fanbu.catalogue import method

    ways = recipe.ways if d.role == "feeds" else []
    needs = [method(step.method, "feedback").needs for step in ways]
    asking = any(n.probe for n in needs) or d.task in CLASSIFYING
    found = ["statistics (probe)"] if d.task in CLASSIFYING and d.role == "feeds" else []
    given = recipe.probe.from_domain(d.share) if d.role == "feeds" and asking else None
    if given is not None:
        found.append("samples (texts without labels)" if given == "own" else "samples (synthetic texts)")
    for step, need in zip(ways, needs, strict=True):
        more = [word for word, crosses in (("texts", need.texts), ("labels", need.labels)) if crosses]
        found.append(f"{need.kind} ({', '.join([step.method, *more])})")
    return [*found, "scores"]
