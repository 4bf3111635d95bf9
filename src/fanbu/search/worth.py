"""``fanbu worth``: what each specialist was worth in the last round, by the verdict's gain without it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fanbu.catalogue import method
from fanbu.domain import Specialist
from fanbu.errors import FitError, UsageError
from fanbu.feeding import feed
from fanbu.files import write_text
from fanbu.ledger import Workspace
from fanbu.model import Model, open_model
from fanbu.plan import need_rows_here
from fanbu.recipe import Recipe
from fanbu.recipe_parts import Step
from fanbu.record import WORTH, read_records, with_choices
from fanbu.round import bear, evaluated, forerunner, raise_incumbent
from fanbu.search.shares import Floats, leave_one_out, shapley
from fanbu.turn import Log, Turn, made_of, open_turn
from fanbu.types import Progress, silent


def worth(
    recipe: Recipe, pairs: int | None = None, progress: Progress = silent, log: Log = lambda text: None
) -> dict[str, Any]:  # fmt: skip
    """What leaving each specialist out of the last round would have changed, and with ``pairs`` (of an order and its
    reverse; 0: all orders, of five specialists at most) what it was worth on average over orders, its Shapley value.

    The value of a set of specialists is the mean change, over the feeding domains, that the judge would have seen on
    test rows had they alone fed back. Their contributions are those of the round, and every set's model is a stage, so
    that this goes on after a kill. Returns what ``worth/NUMBER.json`` of the workspace holds.

    Raises UsageError where no round is finished, recipe or rows are others than in it, or one specialist fed alone; and
    where owners share sums alone or add noise, since every set would ask them anew.
    """
    recipe = _as_taken(recipe)
    _need_single_ones(recipe)
    turn = _of_last_round(recipe, progress, log)
    incumbent = raise_incumbent(turn)
    births = turn.at_owners(bear, [(incumbent, d, forerunner(turn, d)) for d in turn.feeding])
    specialists = {call[1].name: birth.specialist for call, birth in births}
    if len(specialists) < 2:
        raise UsageError(
            "one-specialist", "what a specialist is worth beside others needs others", allowed="two that feed",
            got=list(specialists), remedy="let another domain feed",
        )  # fmt: skip
    known: dict[frozenset[str], dict[str, Floats]] = {}

    def value(chosen: frozenset[str]) -> Mapping[str, Floats]:
        if chosen not in known:
            log(f"with {', '.join(sorted(chosen)) or 'nobody'}")
            known[chosen] = _changes(turn, incumbent, {n: s for n, s in specialists.items() if n in chosen})
        return known[chosen]

    names, seed = sorted(specialists), turn.context.seeded("worth")
    left_out = leave_one_out(names, value)
    values = None if pairs is None else shapley(names, value, pairs, seed)
    parts = left_out if values is None else values
    found = {
        "round": turn.number, "way": " > ".join(step.called for step in recipe.feedback),
        "metric": turn.feeding[0].metric,
        "whole": float(np.mean([rows.mean() for rows in value(frozenset(names)).values()])),
        "left_out": {n: asdict(p) for n, p in left_out.items()},
        "shapley": None if values is None else {n: asdict(p) for n, p in values.items()},
        "harmful": [n for n in names if parts[n].harmful],
    }  # fmt: skip
    (turn.workspace.root / WORTH).mkdir(exist_ok=True)
    file = turn.workspace.root / WORTH / f"{turn.number}.json"
    write_text(file, json.dumps(found, indent=1, sort_keys=True))
    return {**found, "sets": len(known)}


def _as_taken(recipe: Recipe) -> Recipe:
    """The recipe with the way back that a comparison chose for the last round, where one did."""
    root = Path(recipe.workspace)
    last = read_records(root)[-1:]
    if not last or "comparison" not in with_choices(root, last[0]):
        return recipe
    taken = last[0]["recipe"]["feedback"]
    steps = taken if isinstance(taken, list) else [taken]
    return recipe.model_copy(update={"feedback": [Step(**step) for step in steps]})


def _need_single_ones(recipe: Recipe) -> None:
    for step in recipe.feedback:
        learns = method(step.method, "feedback").check(step.arguments).get("learns")
        if step.secure or step.noise is not None or (learns and learns.privacy.epsilon):
            raise UsageError(
                "no-worth", f"what {step.called} made of some specialists alone would ask owners for more than they "
                "gave", allowed="ways back without secure, noise and learns.privacy", got=step.called,
                remedy="compare rounds with and without a domain (`fanbu leave`), with its owner's consent",
            )  # fmt: skip


def _of_last_round(recipe: Recipe, progress: Progress, log: Log) -> Turn:
    """The last finished round, as it was before its verdict."""
    need_rows_here(recipe, "what specialists were worth")
    ledger = Workspace(Path(recipe.workspace))
    done = ledger.rounds()
    records = read_records(ledger.root, done)
    if not records:
        raise UsageError(
            "no-rounds", f"no finished round in {ledger.root}", got=ledger.root, remedy="run the recipe first"
        )
    base, sha = open_model(recipe.model), records[-1]["parent"]
    parent = None
    if sha:
        paths = {e["model"]: str(e["path"]) for e in ledger.history() if e.get("model") and e.get("path")}
        parent = base if sha == base.digest else open_model(ledger.locate(paths[sha]))
    turn = open_turn(recipe, base, parent, records[:-1], progress, log)
    if made_of(recipe, turn.domains, base) != done[-1]["what"]:
        raise UsageError(
            "other-recipe", "recipe or rows are others than in the last round", allowed=f"those of round {len(done)}",
            got=recipe.name, remedy="take the recipe that is kept beside the round's record, or run a round first",
        )  # fmt: skip
    return turn


def _changes(turn: Turn, incumbent: Model, specialists: Mapping[str, Specialist]) -> dict[str, Floats]:
    """By feeding domain, what a round with these specialists alone would have changed on each test row; of a loss, as
    a share of the incumbent's."""
    model = incumbent
    for step in turn.recipe.feedback if specialists else ():
        try:
            model = feed(turn, step, list(specialists.values()), model)
        except FitError as error:
            if error.code != "no-target":  # nobody of these is of a target's industry: none of them teaches anything
                raise
    mode, found = turn.recipe.gate.mode, {}
    for d in turn.feeding:
        new, old = (evaluated(turn, who, m, d)[0].tensors for who, m in (("a set", model), ("incumbent", incumbent)))
        column = mode if mode in new and mode in old else "told"
        whole = float(old[column].sum()) if d.metric == "loss" else float(new["weight"].sum())
        found[d.name] = (len(new["weight"]) / abs(whole) * (new[column] - old[column]).double()).numpy()
    return found
