"""What a way back will take: seconds, memory and bytes that cross, found by trying it on a few rows on this machine.

A way that reads rows is tried with more and more of them, after a first trial that only loads libraries, until one
takes twice what the fewest took; and one that trains once more with two epochs. So what it takes is told apart into a
part that does not grow, one for each row, and one for each row of each epoch. One that works on weights alone is tried
once, on the whole model. Each way is tried in a process of its own, since memory that one has taken is not given back.
What was found is kept, for this machine, in the workspace.
"""

from __future__ import annotations

import json
import multiprocessing
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.effort import fewer_public, read_by, taken, trained, training
from fanbu.errors import RetryError
from fanbu.feeding import feed, plain
from fanbu.files import write_text
from fanbu.ledger import Workspace
from fanbu.model import Model
from fanbu.plan import check_plan
from fanbu.probe_set import probe_of
from fanbu.recipe import Recipe
from fanbu.recipe_parts import Step, TransportSpec
from fanbu.round import grow, raise_incumbent
from fanbu.search.halving import FAILURES
from fanbu.turn import Log, Turn
from fanbu.types import Progress, Train, digest, silent

SIZES = (4, 20, 60, 180, 540)  # rows of a domain that are tried, beside one of each label, the first to load libraries
_GROWN = 2  # of SIZES: so many rows specialists are grown on, and ways tried that read none
_TELLS = 2.0  # a trial that takes so many times what the fewest rows took tells what a row takes
_TIMES = 2  # inner rounds that are tried
_FILE = "costs.json"
_GROWING = "grown"  # where the specialists of trials are, until all is told


@dataclass(frozen=True)
class Cost:
    """What a way back takes in a round: seconds of all owners, one after the other, and of the centre; the most memory
    that its process holds, in bytes; and the bytes that cross."""

    seconds: float
    peak_bytes: float
    crossed_bytes: float


def expected(
    recipe: Recipe, domains: Mapping[str, Domain], base: Model, steps: Sequence[Step], progress: Progress = silent,
    log: Log = lambda text: None,
) -> Iterator[tuple[Step, Cost | Exception]]:  # fmt: skip
    """What each step will take with all rows of these domains; the error, where its trial ended with one."""
    ledger = Workspace(Path(recipe.workspace) / "costs")
    try:
        for number, step in enumerate(steps):
            progress("trials of ways back", number, len(steps))
            log(f"trial of {step.method}")
            try:
                tried = _tried(ledger, recipe, domains, base, step, log)
                yield step, of_all_rows(Work.of(recipe, step, domains), tried, step)
            except FAILURES as error:
                yield step, error
        progress("trials of ways back", len(steps), len(steps))
    finally:
        shutil.rmtree(ledger.root / _GROWING, ignore_errors=True)


@dataclass(frozen=True)
class Work:
    """How many rows a way back reads, and how many it trains on over all epochs."""

    rows: float
    trained: float

    @classmethod
    def of(cls, recipe: Recipe, step: Step, domains: Mapping[str, Domain]) -> Work:
        """That of a step: of all owners together, or of each by itself."""
        parts = read_by(recipe, step, [d for d in domains.values() if d.role == "feeds"])
        plan = training(step)
        return cls(sum(parts), sum(trained(plan, part)[1] for part in parts) if plan else 0)


def _tried(
    ledger: Workspace, recipe: Recipe, domains: Mapping[str, Domain], base: Model, step: Step, log: Log
) -> list[tuple[Work, Cost]]:  # fmt: skip
    """What trials took, found once on a machine; without the one that loads libraries."""
    way, plan = method(step.method, "feedback"), training(step)
    briefs = {
        n: _brief(recipe, step, n, ledger.root / _GROWING) for n in ((1, 2) if plan and plan.epochs > 1 else (1,))
    }
    few = {size: {name: _few(d, size) for name, d in domains.items()} for size in SIZES}
    inputs = {
        "machine": [platform.node(), platform.machine()], "trials": [*SIZES, _GROWN, _TELLS, _TIMES],
        "base": base.digest,
        "recipes": [[s.model_dump(mode="json") for s in (*b.shrink, *b.feedback)] for b in briefs.values()],
        "arguments": plain(way.check(step.arguments)),
        "domains": [[d.digest for d in some.values()] for some in few.values()],
        "probe": digest(recipe.probe.model_dump(mode="json")), "pooling": recipe.pooling,
        "settings": [recipe.seed, recipe.device, recipe.precision, recipe.threads, recipe.max_length],
    }  # fmt: skip

    def produce(out: Path, scratch: Path) -> None:
        found = _apart(briefs, few, base, scratch)
        write_text(out / _FILE, json.dumps([asdict(trial) for trial in found]))

    done = ledger.stage(f"cost of {way.name}", way.module, inputs, produce, log)
    found = [Tried(t["size"], t["epochs"], Cost(**t["cost"])) for t in json.loads((done.path / _FILE).read_text())]
    return [(_work(briefs[t.epochs], few, t.size), t.cost) for t in found]


@dataclass(frozen=True)
class Tried:
    """A trial with so many rows of a domain, beside one of each label, and so many epochs."""

    size: int
    epochs: int
    cost: Cost


def reads_rows(step: Step) -> bool:
    """Whether a way back does more where there are more rows."""
    way = method(step.method, "feedback")
    needs = way.needs_with(step.arguments)
    return needs.kind != "weights" or needs.probe or needs.texts or "train" in way.parameters()


def _brief(recipe: Recipe, step: Step, epochs: int, root: Path) -> Recipe:
    """The recipe of a trial: this way back alone, on specialists that have hardly learned."""
    shrink = []
    for down in recipe.shrink:
        known, less = method(down.method, "shrink").parameters(), dict(down.arguments)
        if "train" in known:
            less["train"] = {**_as_mapping(less.get("train")), "epochs": 1, "max_steps": 2}
        less |= {name: least for name, least in (("trials", 2), ("finalists", 1)) if name in known}
        shrink.append(Step(method=down.method, **less))
    fewer: dict[str, Any] = {"times": min(step.times, _TIMES), "participation": 1.0}
    if training(step):
        fewer["train"] = {**_as_mapping(step.arguments.get("train")), "epochs": epochs}
    few = Step(**{**step.model_dump(), **fewer})
    return recipe.model_copy(update={
        "workspace": str(root), "shrink": shrink, "feedback": [few], "references": [], "transport": TransportSpec(),
    })  # fmt: skip


def _as_mapping(value: Any) -> dict[str, Any]:
    return asdict(value) if isinstance(value, Train) else dict(value or {})


def _few(d: Domain, count: int) -> Domain:
    """A domain with so many rows of each split at most, and one more of each label, so that all labels are there."""
    count += len(d.labels)
    train, valid, test, unlabelled = (rows.first(count) for rows in (d.train, d.valid, d.test, d.unlabelled))
    return replace(d, train=train, valid=valid, test=test, unlabelled=unlabelled)


Few = Mapping[int, Mapping[str, Domain]]


def _sized(brief: Recipe, few: Few, size: int) -> Recipe:
    """A trial's recipe with so many rows of each public file, too."""
    task = next(iter(few[size].values())).task
    return fewer_public(brief, task, lambda rows: min(rows, size))


def _work(brief: Recipe, few: Few, size: int) -> Work:
    return Work.of(_sized(brief, few, size), brief.feedback[0], few[size])


def _apart(briefs: Mapping[int, Recipe], few: Few, base: Model, scratch: Path) -> list[Tried]:
    """The trials of one way, in a process of its own. RetryError where it is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_trials, briefs, few, base, scratch).result()
        except BrokenProcessPool:
            raise RetryError(
                "worker-killed", f"the trial of {briefs[1].feedback[0].method} was killed", got=len(few[SIZES[0]]),
                remedy="run again; where memory ran out, leave this way out",
            ) from None  # fmt: skip


def _trials(briefs: Mapping[int, Recipe], few: Few, base: Model, scratch: Path) -> list[Tried]:
    """All with the same specialists. ``briefs`` by epochs, ``few`` by rows of a domain; what trials make is left in
    ``scratch``."""
    import torch

    torch.set_num_threads(briefs[1].threads)
    turn = _turn(_sized(briefs[1], few, SIZES[_GROWN]), few[SIZES[_GROWN]], base)
    incumbent = raise_incumbent(turn)
    grown = {d.name: grow(turn, incumbent, d) for d in turn.feeding}

    def trial(size: int, epochs: int, folder: Path | str) -> Cost:
        brief = _sized(briefs[epochs], few, size).model_copy(update={"workspace": str(folder)})
        return _trial(_turn(brief, few[size], base), incumbent, grown)

    def tried(size: int, epochs: int = 1) -> Tried:
        return Tried(size, epochs, trial(size, epochs, scratch))

    [step] = briefs[1].feedback
    if not reads_rows(step):
        return [tried(SIZES[_GROWN])]
    with TemporaryDirectory(dir=scratch) as once:  # after a kill, too
        trial(SIZES[0], 1, once)
    found = [tried(SIZES[1])]
    for size, fewer in zip(SIZES[2:], SIZES[1:], strict=False):
        told = found[-1].cost.seconds >= _TELLS * found[0].cost.seconds
        if told or _work(briefs[1], few, size) == _work(briefs[1], few, fewer):
            break
        found.append(tried(size))
    return [*found, tried(found[-1].size, 2)] if 2 in briefs else found


def _turn(brief: Recipe, domains: Mapping[str, Domain], base: Model) -> Turn:
    check_plan(brief, domains)
    turn = Turn(Workspace(Path(brief.workspace)), brief, brief.context(), domains, base, None, [], lambda text: None)
    turn.context = replace(turn.context, probe=probe_of(turn, brief.ways))
    return turn


def _trial(turn: Turn, incumbent: Model, grown: Mapping[str, Model]) -> Cost:
    [step], specialists = turn.recipe.feedback, [Specialist(grown[d.name], d, incumbent) for d in turn.feeding]
    measured = replace(turn, costs=[], crossed={})
    feed(measured, step, specialists, incumbent)
    sent = [told["bytes"] for crossed in measured.crossed.values() for told in crossed.values()]
    costs = measured.costs
    return Cost(sum(cost["seconds"] for cost in costs), max(cost["peak_bytes"] for cost in costs), sum(sent))


def of_all_rows(whole: Work, tried: Sequence[tuple[Work, Cost]], step: Step) -> Cost:
    """What trials say of the whole work: f + p rows + t trained, and as often as the way is taken.

    t is the slope between one epoch and two of as many rows, p that between the fewest and the most rows, less what is
    t's. Memory is the most that a trial held: batches are what takes it, not rows.
    """
    often = step.times * step.participation / min(step.times, _TIMES)
    works, costs = [work for work, _ in tried], [cost for _, cost in tried]
    twice = len(works) > 1 and works[-1].rows == works[-2].rows
    last = len(works) - 1 - twice
    more, rows = whole.trained - works[last].trained, whole.rows - works[last].rows
    longer, wider = works[last].trained - works[0].trained, works[last].rows - works[0].rows
    found = {"peak_bytes": max(cost.peak_bytes for cost in costs)}
    for name in ("seconds", "crossed_bytes"):
        values = [float(getattr(cost, name)) for cost in costs]
        value, rise = values[last], values[last] - values[0]
        if twice:
            each = _slope(values[-1] - value, works[-1].trained - works[last].trained)
            value += _slope(rise - each * longer, wider) * rows + each * more
        elif longer:
            value += _slope(rise, longer) * more
        else:
            value += _slope(rise, wider) * rows
        found[name] = often * value
    return Cost(**found)


def _slope(rise: float, run: float) -> float:
    return max(0.0, rise / run) if run > 0 else 0.0


def steps_of(recipe: Recipe, step: Step, domains: Sequence[Domain]) -> int:
    """Training steps of a way back, over all inner rounds and groups of its tree; 0 where it trains nothing."""
    plan, feeding = training(step), [d for d in domains if d.role == "feeds"]
    if plan is None:
        return 0
    return taken(step, feeding) * sum(trained(plan, part)[0] for part in read_by(recipe, step, feeding))
