"""What a way back will take: seconds, memory and bytes that cross, found by trying it on a few rows on this machine.

A way that reads rows is tried with two numbers of them, after a first trial that only loads libraries; what it takes
with all rows is read off the line through both. One that works on weights alone is tried once, on the whole model. Each
way is tried in a process of its own, since memory that one has taken is not given back. What was found is kept, for
this machine, in the workspace.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.errors import FanbuError, RetryError
from fanbu.feeding import feed, plain
from fanbu.files import write_text
from fanbu.ledger import Workspace
from fanbu.model import Model
from fanbu.plan import check_plan
from fanbu.probe_set import gather_probe, with_written
from fanbu.recipe import Recipe
from fanbu.recipe_parts import Step, TransportSpec
from fanbu.round import grow, raise_incumbent
from fanbu.turn import Log, Turn
from fanbu.types import CLASSIFYING, Progress, Train, digest, silent

SIZES = (12, 20, 60)  # rows of a domain that are tried, beside one of each label
_TIMES = 2  # inner rounds that are tried
_FILE = "costs.json"


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
) -> Iterator[tuple[Step, Cost | FanbuError]]:  # fmt: skip
    """What each step will take with all rows of these domains; the error, where its trial ended with one."""
    ledger = Workspace(Path(recipe.workspace) / "costs")
    for number, step in enumerate(steps):
        progress("trials of ways back", number, len(steps))
        log(f"trial of {step.method}")
        try:
            tried = _tried(ledger, recipe, domains, base, step, log)
            yield step, _of_all_rows(recipe, step, list(domains.values()), tried)
        except FanbuError as error:
            yield step, error
    progress("trials of ways back", len(steps), len(steps))


def _tried(
    ledger: Workspace, recipe: Recipe, domains: Mapping[str, Domain], base: Model, step: Step, log: Log
) -> dict[int, Cost]:  # fmt: skip
    """The cost by rows of a domain, found once on a machine."""
    way = method(step.method, "feedback")
    sizes = SIZES if reads_rows(step) else SIZES[-1:]
    brief = _brief(recipe, step, ledger.root)
    small = [{name: _few(d, size) for name, d in domains.items()} for size in sizes]
    inputs = {
        "machine": [platform.node(), platform.machine()], "base": base.digest, "step": step.model_dump(mode="json"),
        "shrink": [s.model_dump(mode="json") for s in brief.shrink], "arguments": plain(way.check(step.arguments)),
        "domains": [[d.digest for d in few.values()] for few in small], "sizes": sizes,
        "probe": digest(recipe.probe.model_dump(mode="json")), "pooling": recipe.pooling,
        "settings": [recipe.seed, recipe.device, recipe.precision, recipe.threads, recipe.max_length],
    }  # fmt: skip

    def produce(out: Path, scratch: Path) -> None:
        found = _apart(brief, small, base)
        write_text(out / _FILE, json.dumps([asdict(cost) for cost in found]))

    done = ledger.stage(f"cost of {way.name}", way.module, inputs, produce, log)
    costs = [Cost(**c) for c in json.loads((done.path / _FILE).read_text())]
    found = dict(zip(sizes, costs, strict=True))
    return {size: found[size] for size in sizes[-2:]}


def reads_rows(step: Step) -> bool:
    """Whether a way back does more where there are more rows."""
    way = method(step.method, "feedback")
    needs = way.needs_with(step.arguments)
    return needs.kind != "weights" or needs.probe or needs.texts or "train" in way.parameters()


def _brief(recipe: Recipe, step: Step, root: Path) -> Recipe:
    """The recipe of a trial: this way back alone, on specialists that have hardly learned."""
    shrink = []
    for down in recipe.shrink:
        known, less = method(down.method, "shrink").parameters(), dict(down.arguments)
        if "train" in known:
            less["train"] = {**_as_mapping(less.get("train")), "epochs": 1, "max_steps": 2}
        less |= {name: least for name, least in (("trials", 2), ("finalists", 1)) if name in known}
        shrink.append(Step(method=down.method, **less))
    few = step.model_copy(update={"times": min(step.times, _TIMES), "participation": 1.0})
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


def _apart(brief: Recipe, small: Sequence[Mapping[str, Domain]], base: Model) -> list[Cost]:
    """The trials of one way, in a process of its own. RetryError where it is killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "transformers"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_trials, brief, small, base).result()
        except BrokenProcessPool:
            raise RetryError(
                "worker-killed", f"the trial of {brief.feedback[0].method} was killed", got=len(small[0]),
                remedy="run again; where memory ran out, leave this way out",
            ) from None  # fmt: skip


def _trials(brief: Recipe, small: Sequence[Mapping[str, Domain]], base: Model) -> list[Cost]:
    import torch

    torch.set_num_threads(brief.threads)
    return [_trial(brief, domains, base) for domains in small]


def _trial(brief: Recipe, domains: Mapping[str, Domain], base: Model) -> Cost:
    check_plan(brief, domains)
    workspace, [step] = Workspace(Path(brief.workspace)), brief.feedback
    turn = Turn(workspace, brief, brief.context(), domains, base, None, [], lambda text: None)
    if method(step.method, "feedback").needs.probe or turn.feeding[0].task in CLASSIFYING:
        turn.context = replace(turn.context, probe=gather_probe(turn))
        if brief.probe.written:
            turn.context = replace(turn.context, probe=with_written(turn))
    incumbent = raise_incumbent(turn)
    specialists = [Specialist(grow(turn, incumbent, d), d, incumbent) for d in turn.feeding]
    before = {d: set(crossed) for d, crossed in turn.crossed.items()}
    turn.costs.clear()
    feed(turn, step, specialists, incumbent)
    sent = [
        told["bytes"]
        for d, crossed in turn.crossed.items()
        for place, told in crossed.items()
        if place not in before.get(d, ())
    ]
    seconds = sum(cost["seconds"] for cost in turn.costs)
    return Cost(seconds, max(cost["peak_bytes"] for cost in turn.costs), sum(sent))


def _of_all_rows(recipe: Recipe, step: Step, domains: Sequence[Domain], tried: Mapping[int, Cost]) -> Cost:
    """Off the line through the trials, at all rows; and as often as the way is taken."""
    sizes = sorted(tried)
    work = [_work(recipe, step, [_few(d, size) for d in domains]) for size in sizes]
    whole, last = _work(recipe, step, domains), tried[sizes[-1]]
    found = {}
    for name, value in asdict(last).items():
        slope = 0.0
        if len(sizes) > 1 and work[1] > work[0]:
            slope = max(0.0, (value - getattr(tried[sizes[0]], name)) / (work[1] - work[0]))
        often = 1.0 if name == "peak_bytes" else step.times * step.participation / min(step.times, _TIMES)
        found[name] = often * (value + slope * (whole - work[-1]))
    return Cost(**found)


def _work(recipe: Recipe, step: Step, domains: Sequence[Domain]) -> float:
    """Rows that a way reads, as far as its training goes."""
    plan, most = _training(step), math.inf
    if plan and plan.max_steps:
        most = plan.max_steps * plan.batch_size / plan.epochs
    return float(sum(min(part, most) for part in _parts(recipe, step, domains)))


def steps_of(recipe: Recipe, step: Step, domains: Sequence[Domain]) -> int:
    """Training steps of a way back, over all inner rounds; 0 where it trains nothing."""
    plan = _training(step)
    if plan is None:
        return 0
    parts = (plan.epochs * math.ceil(part / plan.batch_size) for part in _parts(recipe, step, domains))
    return step.times * sum(min(steps, plan.max_steps or steps) for steps in parts)


def _training(step: Step) -> Train | None:
    found = method(step.method, "feedback").check(step.arguments).get("train")
    return found if isinstance(found, Train) else None


def _parts(recipe: Recipe, step: Step, domains: Sequence[Domain]) -> list[int]:
    """How many rows are read together: those of all owners, or each one's by itself."""
    needs = method(step.method, "feedback").needs_with(step.arguments)
    rows = [_asked(recipe, d) if needs.probe else len(d.train) for d in domains if d.role == "feeds"]
    return rows if needs.kind == "updates" else [sum(rows)]


def _asked(recipe: Recipe, d: Domain) -> int:
    """Texts of a domain in the probe set."""
    if recipe.probe.from_domain(d.share) != "own":
        return recipe.probe.synthetic
    return min(len(d.texts), recipe.probe.limit or len(d.texts))
