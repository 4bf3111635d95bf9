"""Round after round: the champion is the parent of the next; domains join, grow and leave; a refusal keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fanbu.errors import UsageError
from fanbu.heads import domains_of
from fanbu.ledger import Workspace
from fanbu.live import Live
from fanbu.model import Model, open_model
from fanbu.recipe import Recipe
from fanbu.record import make_record, read_record, read_records, record_folder, write_record
from fanbu.round import Result, turn_once, without_domain
from fanbu.transport.centre import Line
from fanbu.turn import Log, Turn, centre_of, domains_now, made_of, start
from fanbu.types import Progress, digest, silent


def run(
    recipe: Recipe, progress: Progress = silent, log: Log = lambda text: None, line: Line | None = None
) -> dict[str, Any]:  # fmt: skip
    """Goes on until the workspace has the recipe's number of finished rounds. Returns the record of the last one.

    Everything that is finished already is skipped, so running again after a kill goes on where it stopped. Where all
    rounds are finished, a recipe or rows that changed since make one more round, whose parent is the champion; where
    nothing changed, the last record is only read. ``line`` connects owners who are elsewhere.
    """
    workspace = Workspace(Path(recipe.workspace))
    workspace.mend()
    live = Live(workspace.root, recipe.name, recipe.rounds)
    try:
        while True:
            done = workspace.rounds()
            if len(done) >= recipe.rounds and not _something_new(recipe, workspace, done, line):
                record = read_records(workspace.root, done)[-1]
                break
            leave_by_recipe(recipe, workspace, len(done) + 1)
            live.round(len(done) + 1)
            turn = start(recipe, progress, log, live, line)
            record = settle(turn, turn_once(turn))
            log(f"round {turn.number}: {record['decision']}: {record['verdict']['reason']}")
            if len(done) + 1 >= recipe.rounds:
                break
    except BaseException as error:
        live.end(str(error) or type(error).__name__)
        raise
    live.end()
    folder = record_folder(workspace.root, record["key"])
    where = {"folder": str(folder), "workspace": str(workspace.root)}
    return {**record, **where, "champion": workspace.champion()}


def _something_new(recipe: Recipe, workspace: Workspace, done: list[dict[str, Any]], line: Line | None) -> bool:
    """Whether recipe or rows are other than those of the last finished round."""
    domains, _ = domains_now(recipe, len(done), workspace.left(), centre_of(recipe, workspace, line))
    return made_of(recipe, domains, open_model(recipe.model)) != done[-1]["what"]


def settle(turn: Turn, result: Result) -> dict[str, Any]:
    """Writes a round down and promotes its candidate or keeps the champion. Returns the record."""
    judged = {name: {d: c.digest for d, c in by_domain.items()} for name, by_domain in result.outcomes.items()}
    what = made_of(turn.recipe, turn.here, turn.base)
    made = [turn.number, what, result.candidate.digest, result.incumbent.digest, judged]
    key = digest(made)
    folder = record_folder(turn.workspace.root, key)
    record = read_record(folder) or make_record(turn, result, key)
    write_record(record, turn.recipe, folder)
    before = turn.workspace.champion() or {}
    knowing = set(before.get("domains") or [])
    labelled, feeding = set(domains_of(result.incumbent.labels)), turn.feeding
    probed = {d.name for d in feeding if d.industry in labelled} | (labelled - {d.industry for d in feeding}) | knowing
    # targets: guards whose texts were learned from, or aligned heads
    probed |= {row.domain for row in turn.context.probe.rows if row.domain and turn.domains[row.domain].role == "guard"}
    candidate = _entry(turn, result.candidate, probed | {d.name for d in feeding} | turn.fed)
    turn.workspace.decide(
        {**candidate, "round": key, "number": turn.number},
        {**_entry(turn, result.incumbent, probed), "base": turn.base.digest},
        result.verdict["accepted"], before=turn.parent and turn.parent.digest,
        reason=result.verdict["reason"], what=what,
    )  # fmt: skip
    return record


def _entry(turn: Turn, model: Model, domains: set[str]) -> dict[str, Any]:
    path = turn.workspace.relative(model.path)
    return {"model": model.digest, "path": path, "domains": sorted(domains), "left": turn.workspace.left()}


def leave_by_recipe(recipe: Recipe, workspace: Workspace, number: int) -> None:
    """Domains that the recipe lets leave by this round, and that the champion still knows."""
    champion = workspace.champion()
    for name, spec in recipe.domains.items():
        gone = spec.leaves is not None and number >= spec.leaves
        if champion and gone and name in (champion["domains"] or []) and name not in workspace.left():
            leave(workspace.root, name, alone=True, reason=f"the recipe lets it leave in round {spec.leaves}")


def leave(
    workspace: str | Path, domain: str, *, forget: bool = False, alone: bool = False,
    reason: str = "asked by a person",
) -> dict[str, Any]:  # fmt: skip
    """A domain leaves: its label rows go, and it takes no part in later rounds. Returns the event.

    What its owner taught stays in the other weights. ``forget`` goes back to the last champion that had learned
    nothing from it, or to none (the next round then starts from the base): what other domains taught since has to be
    fed again, and the result is as if the domain had never joined. `fanbu rollback` undoes either. ``alone`` lets the
    only domain leave too: its label rows then stay until another has joined.
    """
    ledger = Workspace(Path(workspace))
    stack = ledger.champions()
    champion = ledger.champion()
    knowing = (champion or {}).get("domains") or []
    if champion is None or domain not in knowing or (domain in ledger.left() and not forget):
        raise UsageError(
            "unknown-domain", f"the champion of {ledger.root} has learned nothing from this domain",
            allowed=sorted(set(knowing) - set(ledger.left())), got=domain, remedy="check the name",
        )  # fmt: skip
    left, before = sorted({*ledger.left(), domain}), champion["model"]
    if forget:
        unaware = [e for e in stack if e["model"] and e["domains"] is not None and domain not in e["domains"]]
        first = (unaware[-1]["number"] or 0) if unaware else 0
        entry = unaware[-1] if unaware else {"model": None, "path": None, "domains": []}
        forgotten = range(first + 1, len(ledger.rounds()) + 1)
        return ledger.leave(domain, before, {**entry, "number": None, "left": left}, reason, forgotten=forgotten)
    old = open_model(ledger.root / champion["path"])
    staying = set(knowing) - set(left)
    model = without_domain(ledger, old, domain, staying)
    if model is old and old.labels and not (alone or staying):
        raise UsageError(
            "last-domain", f"{domain} is the only domain that the champion knows", remedy="use --forget to start anew"
        )
    entry = {"model": model.digest, "path": ledger.relative(model.path), "domains": knowing, "left": left}
    return ledger.leave(domain, before, entry, reason)
