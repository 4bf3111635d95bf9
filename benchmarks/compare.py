"""How often `fanbu compare` finds a champion near the best, replayed on a table of what every candidate does.

The table: real text domains, specialists grown from the probed MiniLM encoder; every candidate with every share of the
rows (1/27, 1/9, 1/3, all), as `fanbu compare` tries it: right or wrong on each validation row, seconds, and with all
rows also right or wrong on each test row. It is measured once and kept under --work, trial by trial, so a stopped run
goes on; results/compare-table.json is what was measured, and --table takes it instead of measuring.

The replays: 300 times, validation rows are drawn anew with replacement and candidates come in another order.
`fanbu compare`'s halving, with a budget of three full runs (of the costliest candidate), chooses by them; beside it, on
the same draws and budget: candidates in order of their coming, each with all rows (uniform); Optuna's median pruner;
and Optuna's TPE, which draws candidates and tries them with all rows. A replay finds a good champion where its accuracy
on test rows is within half a point of the best candidate's. Then one live run of `fanbu compare` (not with --replays).

Run: python benchmarks/compare.py [--quick] [--data DIR] [--work DIR] [--table FILE] [--domains N] [--rows N]
[--replays]. Four domains, at most 100 training rows each, and every way that fits, but four of fedavg's kin; --quick:
three domains, and six candidates.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from _choices import SHARES, Replay, measured, truths, whole_seconds
from _common import HERE, bar, finish, parser, table, text_domains
from _outcomes import BASE, usable
from fanbu.files import write_text
from fanbu.progress import log
from fanbu.recipe import Recipe, load_domains, load_recipe
from fanbu.search.compare import candidates, compare
from fanbu.search.halving import Arm, History, halving

REPLAYS, NEAR, RUNS = 300, 0.5, 3.0
SPLITS = ("train", "valid", "test")
TIMES = 3  # inner rounds of federated ways
KIN = {"fedavgm", "fednova", "fedprox", "fedyogi"}  # which differ little from fedavg or fedadam over so few
QUICK = ["average", "tsv_m", "ensemble", "probe", "multitask", "distill"]
MORE: list[dict[str, Any]] = [
    {"method": "task_arithmetic", "scale": 0.6}, {"method": "ties", "density": 0.5},
    {"method": "distill", "train": {"lr": 3e-4}}, {"method": "distill", "train": {"lr": 3e-5}},
    {"method": "multitask", "train": {"lr": 3e-4}}, {"method": "multitask", "train": {"lr": 3e-5}},
    {"method": "fedavg", "times": TIMES, "train": {"epochs": 1, "lr": 3e-4}},
]  # fmt: skip


def recipe_of(folders: Mapping[str, Path], work: Path, quick: bool, rows: int) -> Recipe:
    """All domains in one place, one thread; ``compare`` lists the candidates."""
    domains = {
        name: {**drawn(folder, work / "rows" / name), "limit": {"train": rows}} for name, folder in folders.items()
    }
    plain: dict[str, Any] = {
        "fanbu": 1, "name": "compare", "model": BASE, "workspace": str(work / "workspace"), "threads": 1,
        "device": "cpu", "precision": "fp32", "max_length": 64, "domains": domains, "feedback": {"method": "distill"},
        "shrink": [{"method": "finetune", "train": {"epochs": 3, "lr": 2e-4}}],
    }  # fmt: skip
    if quick:
        return load_recipe({**plain, "compare": {"ways": QUICK}})
    usual = candidates(load_recipe(plain), load_domains(load_recipe(plain))).values()
    every = [
        {**s.model_dump(mode="json"), **({"times": TIMES} if s.times > 1 else {})} for s in usual if s.method not in KIN
    ]
    return load_recipe({**plain, "compare": {"ways": [*every, *MORE]}})


def drawn(folder: Path, out: Path) -> dict[str, str]:
    """A domain's rows in new splits, so that validation rows are as test rows are: at most 45% and 1,000 for testing,
    25% and 500 for validation; each label has a row to train on."""
    rows = {
        row["text"]: line for split in SPLITS for line in (folder / f"{split}.jsonl").read_text().splitlines()
        if (row := json.loads(line))
    }  # fmt: skip
    lines = list(rows.values())
    random.Random(0).shuffle(lines)
    first = {json.loads(line)["label"]: line for line in reversed(lines)}  # of each label
    rest = [line for line in lines if first[json.loads(line)["label"]] is not line]
    test, valid = min(1000, int(0.45 * len(lines))), min(500, len(lines) // 4)
    parts = [*first.values(), *rest[test + valid :]], rest[test : test + valid], rest[:test]
    out.mkdir(parents=True, exist_ok=True)
    for split, part in zip(SPLITS, parts, strict=True):
        write_text(out / f"{split}.jsonl", "".join(line + "\n" for line in part))
    return {split: str(out / f"{split}.jsonl") for split in SPLITS}


Way = Callable[[Mapping[str, Any], list[str], Replay, float, int], str | None]


def by_halving(found: Mapping[str, Any], order: list[str], run: Replay, budget: float, seed: int) -> str | None:
    best = halving([Arm(n, found["grows"][n]) for n in order], run, budget, least=found["least"]).best
    return best.arm if best else None


def uniform(found: Mapping[str, Any], order: list[str], run: Replay, budget: float, seed: int) -> str | None:
    """Each with all rows, in order, while the budget lasts."""
    history, costs = History(), whole_seconds(found)
    for name in order:
        if history.seconds + costs[name] <= budget:
            history.trials.append(run(name, 1.0))
    return history.best.arm if history.best else None


def pruned(found: Mapping[str, Any], order: list[str], run: Replay, budget: float, seed: int) -> str | None:
    """Candidates in order, share by share, ended early by Optuna's median pruner."""
    import optuna

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    history = History()
    for name in order:
        trial = study.ask()
        trial.set_user_attr("name", name)
        shares = SHARES[-1 - found["least"] :] if found["grows"][name] else SHARES[-1:]
        last, over = 0.0, False
        for step, share in enumerate(shares, len(SHARES) - len(shares)):
            cost = found["candidates"][name][f"{share:.3f}"]["seconds"]
            if history.seconds + cost > budget:
                over = True
                break
            done = run(name, share)
            history.trials.append(done)
            last = done.score
            trial.report(last, step)
            if share < 1 and trial.should_prune():
                over = True
                break
        state = optuna.trial.TrialState.PRUNED if over else optuna.trial.TrialState.COMPLETE
        study.tell(trial, None if over else last, state=state)
    return history.best.arm if history.best else None


def by_tpe(found: Mapping[str, Any], order: list[str], run: Replay, budget: float, seed: int) -> str | None:
    """Optuna's tree-structured Parzen estimator over the candidates, each with all rows."""
    import optuna

    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=3)
    study, history, costs = optuna.create_study(direction="maximize", sampler=sampler), History(), whole_seconds(found)
    for _ in range(3 * len(order)):
        trial = study.ask()
        name = trial.suggest_categorical("way", order)
        known = history.of(name)
        if not known:
            if history.seconds + costs[name] > budget:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            history.trials.append(run(name, 1.0))
        study.tell(trial, history.of(name)[-1].score)
    return history.best.arm if history.best else None


WAYS: dict[str, Way] = {
    "fanbu compare": by_halving, "uniform": uniform, "Optuna, median pruner": pruned, "Optuna, TPE": by_tpe,
}  # fmt: skip


def replayed(found: Mapping[str, Any], replays: int) -> dict[str, dict[str, float]]:
    """By way of choosing: the share of replays with a champion within half a point of the best, and the mean loss."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    truth = truths(found)
    budget, best = RUNS * max(whole_seconds(found).values()), max(truth.values())
    lost: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(replays):
        order = list(truth)
        random.Random(seed).shuffle(order)
        for name, way in WAYS.items():
            chosen = way(found, order, Replay(found, seed), budget, seed)
            lost[name].append(best - truth[chosen] if chosen else best)
    return {
        name: {"near": float(np.mean(np.array(values) <= NEAR)), "lost": float(np.mean(values))}
        for name, values in lost.items()
    }


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--replays", action="store_true", help="no live run")
    flags.add_argument("--domains", type=int, default=None, help="how many, from the first")
    flags.add_argument("--rows", type=int, default=300, help="training rows of each, at most")
    flags.add_argument("--table", type=Path, default=None, help="a table that was measured")
    args = flags.parse_args()
    name = "compare-quick" if args.quick else "compare"
    work = args.work / name
    recipe = recipe_of(args.data, work, args.quick, args.domains or (3 if args.quick else 4), args.rows)
    if args.table:
        found = json.loads(args.table.read_text())
    else:
        found = measured(recipe, work, whole=True)
        (HERE / "results").mkdir(exist_ok=True)
        write_text(HERE / "results" / f"{name}-table.json", json.dumps(found, sort_keys=True))
    told = replayed(found, REPLAYS)
    truth, took = truths(found), whole_seconds(found)
    whole = [[n, f"{truth[n]:.2f}", f"{took[n]:.0f}"] for n in truth]
    lines = [["chosen by", "within 0.5 points of the best", "points lost, mean"]]
    lines += [[way, f"{100 * r['near']:.0f}%", f"{r['lost']:.2f}"] for way, r in told.items()]
    ranked = sorted(whole, key=lambda row: -float(row[1]))
    text = f"{table([['candidate', 'test accuracy, told', 'seconds'], *ranked])}\n\n{table(lines)}"
    print(text, flush=True)
    ours, others = told["fanbu compare"], [r for way, r in told.items() if way != "fanbu compare"]
    bars = [
        bar("near the best", f"{100 * ours['near']:.0f}% of replays", ">= 90%", ours["near"] >= 0.9),
        bar("beside the others", f"{ours['near']:.2f} and {max(o['near'] for o in others):.2f}", "more",
            ours["near"] > max(o["near"] for o in others)),
    ]  # fmt: skip
    if not args.replays:
        seconds = RUNS * max(took.values())
        spec = recipe.compare.model_copy(update={"seconds": seconds})
        live = compare(recipe.model_copy(update={"compare": spec, "workspace": str(work / "live")}), log=log)
        best, chosen = float(ranked[0][1]), next(float(row[1]) for row in ranked if row[0] == live["winner"])
        bars.append(bar("one live run", f"{live['winner']}: {best - chosen:.2f} points below the best", f"<= {NEAR}",
                        best - chosen <= NEAR))  # fmt: skip
    return finish(name, text, {"replays": told}, bars)


if __name__ == "__main__":
    sys.exit(main())
