"""What earlier comparisons are worth to a new one: a bandit that learned from them, beside halving that begins cold.

Twelve recipes of two to four real text domains each, with few rows or more and specialists trained little or much; in
each, nine candidates with every share of the rows, as `fanbu compare` tries them, measured once and kept under --work
(results/bandit-tables.json is what was measured, and --tables takes it instead).

Each recipe is left out in turn. The bandit (`fanbu.search.bandit`) learns from the other eleven. Then, many times, its
validation rows are drawn anew with replacement, and the bandit, successive halving and uniform trials (in order, with
all rows) choose within budgets of one, two and three full runs of the costliest candidate. Regret is how many points of
test accuracy the chosen one lies below the best candidate. The interval is over recipes. Then one live run of `fanbu
compare` with `learn` (not with --replays).

Run: python benchmarks/bandit.py [--quick] [--data DIR] [--work DIR] [--tables FILE] [--replays]. --quick: four recipes.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from _choices import SHARES, Replay, measured, numbers, told_as_comparison, truths, whole_seconds
from _common import HERE, bar, finish, parser, table
from _histories import RECIPES, recipes
from fanbu.files import write_text
from fanbu.progress import log
from fanbu.recipe_parts import Step
from fanbu.search.bandit import Prior, Seen, explore, reward, rows_err
from fanbu.search.compare import compare
from fanbu.search.experience import NEAR, action_of
from fanbu.search.halving import Arm, History, halving

REPLAYS, BUDGETS, DRAWS = 25, (1.0, 2.0, 3.0), 10_000
WAYS = ("bandit", "halving, cold", "uniform")


def seen_of(number: int, found: Mapping[str, Any]) -> list[Seen]:
    """A table as the trials of a comparison."""
    return [
        Seen(str(number), tuple(found["state"]), action_of(Step(**found["steps"][name])), float(share),
             reward(told["score"], found["scale"]), told["seconds"])
        for name, by in found["candidates"].items()
        for share, told in zip(_shares(found, name), by.values(), strict=True)
        if share in _ladder(found, name)
    ]  # fmt: skip


def _ladder(found: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """The shares that a comparison tries."""
    return _shares(found, name)[-1 - found["least"] :]


def _shares(found: Mapping[str, Any], name: str) -> tuple[float, ...]:
    return SHARES if found["grows"][name] else SHARES[-1:]


def uniform(found: Mapping[str, Any], order: Sequence[str], run: Replay, budget: float) -> History:
    """Each with all rows, in order, while the budget lasts."""
    history, costs = History(), whole_seconds(found)
    for name in order:
        if history.seconds + costs[name] <= budget:
            history.trials.append(run(name, 1.0))
    return history


def regrets(left_out: int, tables: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """By way of choosing, its mean regret for each budget, in points."""
    found = tables[left_out]
    past = [seen for i, other in enumerate(tables) if i != left_out for seen in seen_of(i, other)]
    priors, truth = (Prior(past, NEAR), Prior(past, NEAR, "seconds")), truths(found)
    actions = {name: action_of(Step(**step)) for name, step in found["steps"].items()}
    shares = {name: _ladder(found, name) for name in actions}
    told = next(iter(found["candidates"].values()))["1.000"]["valid"]
    errs = rows_err([len(numbers(text)) for text in told.values()], found["scale"])
    lost: dict[str, list[list[float]]] = {way: [[] for _ in BUDGETS] for way in WAYS}
    for seed in range(REPLAYS):
        run, order = Replay(found, seed), list(truth)
        random.Random(seed).shuffle(order)
        for i, runs in enumerate(BUDGETS):
            budget = runs * max(whole_seconds(found).values())
            here = ("new", found["state"], actions, shares)
            beliefs = priors[0].belief(*here, errs), priors[1].belief(*here)
            chosen = {
                "bandit": explore(*beliefs, run, budget, found["scale"], priors[0].unknown(actions)),
                "halving, cold": halving([Arm(n, found["grows"][n]) for n in order], run, budget, least=found["least"]),
                "uniform": uniform(found, order, run, budget),
            }
            for way, history in chosen.items():
                reached = truth[history.best.arm] if history.best else min(truth.values())
                lost[way][i].append(max(truth.values()) - reached)
    return {way: [float(np.mean(each)) for each in by] for way, by in lost.items()}


def comparison(found: Mapping[str, Any]) -> dict[str, Any]:
    """A table as a finished comparison."""
    trials = [
        {"candidate": name, "step": found["steps"][name], "share": share, "score": told["score"], "seconds":
         told["seconds"]}
        for name, by in found["candidates"].items()
        for share, told in zip(_shares(found, name), by.values(), strict=True)
        if share in _ladder(found, name)
    ]  # fmt: skip
    return {"state": found["state"], "scale": found["scale"], "trials": trials}


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95% of the mean, by bootstrap over recipes."""
    rng = np.random.default_rng(0)
    means = np.array(values)[rng.integers(0, len(values), (DRAWS, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def live(work: Path, asked: Sequence[Any], tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`fanbu compare` on the first recipe, with what the others found, for two full runs."""
    others = [told_as_comparison(comparison(t), work / "told" / str(n)) for n, t in enumerate(tables) if n]
    budget = 2 * max(whole_seconds(tables[0]).values())
    spec = asked[0].compare.model_copy(update={"seconds": budget, "known": False, "learn": others})
    found = compare(asked[0].model_copy(update={"compare": spec, "workspace": str(work / "live")}), log=log)
    truth = truths(tables[0])
    return {"winner": found["winner"], "below": max(truth.values()) - truth[found["winner"]], "spent": found["spent"],
            "budget": budget, "trials": [[t["candidate"], t["share"]] for t in found["trials"]]}  # fmt: skip


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--tables", type=Path, default=None, help="tables that were measured")
    flags.add_argument("--replays", action="store_true", help="no live run")
    args = flags.parse_args()
    count, name = (4, "bandit-quick") if args.quick else (RECIPES, "bandit")
    work = args.work / "bandit"
    asked = recipes(args.data, work, count)
    if args.tables:
        tables = json.loads(args.tables.read_text())[:count]
    else:
        tables = [measured(recipe, work / str(number)) for number, recipe in enumerate(asked)]
        (HERE / "results").mkdir(exist_ok=True)
        write_text(HERE / "results" / f"{name}-tables.json", json.dumps(tables, sort_keys=True))
    by_recipe = []
    for number in range(len(tables)):
        log(f"left out: recipe {number}")
        by_recipe.append(regrets(number, tables))
    lines = [["chosen by", *(f"{runs:g} full runs" for runs in BUDGETS), "mean"]]
    for way in WAYS:
        means = np.mean([lost[way] for lost in by_recipe], 0)
        lines.append([way, *(f"{m:.2f}" for m in means), f"{means.mean():.2f}"])
    apart = [float(np.mean(lost["bandit"]) - np.mean(lost["halving, cold"])) for lost in by_recipe]
    low, high = interval(apart)
    text = (
        f"Regret in points of test accuracy, mean over {len(tables)} recipes, each left out in turn.\n\n{table(lines)}"
    )
    print(text, flush=True)
    bars = [
        bar("the bandit's regret less that of halving", f"{np.mean(apart):+.2f} ({low:+.2f} to {high:+.2f})",
            "below 0, with its interval", high < 0),
    ]  # fmt: skip
    values: dict[str, Any] = {"by recipe": by_recipe, "apart": apart}
    if not args.replays:
        values["live"] = one = live(work, asked, tables)
        got = f"{one['winner']}, {one['below']:.2f} points below the best, {one['spent']:.0f} of {one['budget']:.0f} s"
        bars.append(bar("one live run within its budget", got, "within it", one["spent"] <= one["budget"]))
    return finish(name, text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
