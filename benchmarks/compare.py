"""How often `fanbu compare` finds a champion near the best, replayed on tables of what every candidate does.

A table: real text domains, specialists grown from the probed MiniLM encoder; every candidate with every share of the
rows that `fanbu compare` would try, as it tries it: seconds, training steps, and right or wrong on each test row. There
are six: of the first four domains with short texts (300 training rows each), of the next, four at most (150), of those
with longer texts, four at most (150), and of some of these anew: two or three of short and longer texts (300 each,
twice), and the first two (150). They are measured once and kept under --work, trial by trial, so a stopped run goes on;
results/compare-tables.json is what was measured, and --tables takes it instead of measuring.

The replays: 300 times for each table, the test rows are drawn anew with replacement and serve for validation, and
candidates come in another order. `fanbu compare` chooses by them with a budget of three full runs (of the costliest
candidate) in training steps, as it does where a recipe says nothing else; it knows what it comes with (known.json) but
for comparisons that had a domain of this table. Beside it, on the same draws and budget: halving that knows nothing
(`known: false`); candidates in order of their coming, each with all rows (uniform); Optuna's median pruner, by shares
of the rows; Optuna's TPE, which draws candidates and tries them with all rows; and all candidates with all rows, with
no budget, which tells how far validation rows can choose at all. The same with a budget in seconds, those of judging by
a table's validation rows among them (500 a domain at most), on machines that are up to ten times as fast or slow as the
known trials' (what they take is all scaled alike). A replay finds a good champion where its accuracy on all test rows
is within half a point of the best candidate's. Then one live run on the domains of each of the first three tables (not
with --replays).

Run: python benchmarks/compare.py [--quick] [--data DIR] [--work DIR] [--tables FILE] [--only TABLE ...] [--ship]
[--replays]. Every way that fits, but four of fedavg's kin. --quick: two domains, few rows and six candidates a table;
--ship writes known.json from the tables.
"""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _choices import SHARES, Replay, measured, numbers, told_as_comparison, truths, whole_seconds
from _common import HERE, bar, finish, parser, table, text_domains
from _outcomes import BASE, usable
from fanbu.files import write_text
from fanbu.progress import log
from fanbu.recipe import Recipe, load_domains, load_recipe
from fanbu.recipe_parts import GateSpec, Step
from fanbu.search.bandit import Belief, Prior, certain, explore, rows_err
from fanbu.search.compare import candidates, compare
from fanbu.search.experience import NEAR as NEAR_STATES
from fanbu.search.experience import action_of, known, scored
from fanbu.search.halving import Arm, History, halving
from fanbu.types import digest

REPLAYS, NEAR, RUNS = 300, 0.5, 3.0
KNOWN = HERE.parent / "src/fanbu/search/known.json"
LIVE = ("one", "two", "three")
TABLES = (*LIVE, "four", "five", "six")
ALL = "all of them, no budget"
OURS = ("fanbu compare", "halving, cold", ALL)
SPLITS = ("train", "valid", "test")
MACHINES = math.log(10)  # how much faster or slower, at most
SHORT = 20  # words of a training text, at the median
TIMES = 3  # inner rounds of federated ways
KIN = {"fedavgm", "fednova", "fedprox", "fedyogi"}  # which differ little from fedavg or fedadam over so few
QUICK = ["average", "tsv_m", "ensemble", "probe", "multitask", "distill"]
MORE: list[dict[str, Any]] = [
    {"method": "task_arithmetic", "scale": 0.6}, {"method": "ties", "density": 0.5},
    {"method": "distill", "train": {"lr": 3e-4}}, {"method": "distill", "train": {"lr": 3e-5}},
    {"method": "multitask", "train": {"lr": 3e-4}}, {"method": "multitask", "train": {"lr": 3e-5}},
    {"method": "fedavg", "times": TIMES, "train": {"epochs": 1, "lr": 3e-4}},
]  # fmt: skip


def parted(folders: Mapping[str, Path], quick: bool) -> dict[str, tuple[dict[str, Path], int]]:
    """The domains of each table, and how many training rows they have; no table of a single one."""

    def words(folder: Path) -> float:
        lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
        return float(np.median([len(json.loads(line)["text"].split()) for line in lines]))

    short = {name: folder for name, folder in folders.items() if words(folder) <= SHORT}
    long = {name: folder for name, folder in folders.items() if name not in short}
    a, b = [*short], [*long]
    if quick:
        parts = {"one": (a[:2], 60), "two": (a[2:4], 60), "three": (b[:2], 60)}
    else:
        parts = {
            "one": (a[:4], 300), "two": (a[4:8], 150), "three": (b[:4], 150), "four": (a[4:6] + b[:1], 300),
            "five": (a[6:8] + b[1:2], 300), "six": (a[:2], 150),
        }  # fmt: skip
    return {t: ({n: folders[n] for n in names}, rows) for t, (names, rows) in parts.items() if len(names) > 1}


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
    lines = [line for split in SPLITS for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = list({row["text"]: row for row in map(json.loads, lines)}.values())
    random.Random(0).shuffle(rows)
    first = {row["label"]: row for row in reversed(rows)}  # of each label
    rest = [row for row in rows if first[row["label"]] is not row]
    test, valid = min(1000, int(0.45 * len(rows))), min(500, len(rows) // 4)
    parts = [*first.values(), *rest[test + valid :]], rest[test : test + valid], rest[:test]
    out.mkdir(parents=True, exist_ok=True)
    for split, part in zip(SPLITS, parts, strict=True):
        write_text(out / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in part))
    return {split: str(out / f"{split}.jsonl") for split in SPLITS}


Beliefs = tuple[Belief, Belief, set[str]]


@dataclass(frozen=True)
class Game:
    """A replay of a table: the candidates in the order of their coming, the unit of their costs, and what is expected
    of them."""

    found: Mapping[str, Any]
    order: list[str]
    seed: int
    unit: str
    beliefs: Beliefs | None

    def cost(self, name: str, share: float) -> float:
        """Of one trial; seconds on a machine that is faster or slower."""
        slower = math.exp(random.Random(self.seed).uniform(-1, 1) * MACHINES) if self.unit == "seconds" else 1.0
        return slower * float(self.found["candidates"][name][f"{share:.3f}"][self.unit])

    @property
    def budget(self) -> float:
        """So many full runs of the costliest candidate."""
        return RUNS * max(self.cost(name, 1.0) for name in self.order)

    @property
    def run(self) -> Replay:
        """What makes a trial."""
        return Replay(self.found, self.seed, self.cost)


def ladder(found: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """The shares that `fanbu compare` tries a candidate with."""
    return SHARES[-1 - found["least"] :] if found["grows"][name] else SHARES[-1:]


Way = Callable[[Game], str | None]


def by_halving(game: Game) -> str | None:
    arms = [Arm(n, game.found["grows"][n]) for n in game.order]
    costs = game.cost if game.unit == "steps" else None
    best = halving(arms, game.run, game.budget, least=game.found["least"], costs=costs).best
    return best.arm if best else None


def by_compare(game: Game) -> str | None:
    """`fanbu compare` as it comes."""
    if not game.beliefs:
        return by_halving(game)
    rewards, took, untried = game.beliefs
    points = {(n, s): game.cost(n, s) for n in game.order for s in ladder(game.found, n)}
    costs, unknown = (certain(points), set[str]()) if game.unit == "steps" else (took, untried)
    best = explore(rewards, costs, game.run, game.budget, game.found["scale"], unknown).best
    return best.arm if best else None


def beliefs_in(found: Mapping[str, Any]) -> Beliefs | None:
    """What is expected of a table's candidates by what is known of other domains, and of the seconds that they take,
    and which of them are by no known way; None where nothing is known."""
    past = known("text-classification", found["before"])
    if not past:
        return None
    actions = {name: action_of(Step(**step)) for name, step in found["steps"].items()}
    shares = {name: ladder(found, name) for name in actions}
    rewards, took = (Prior(past, NEAR_STATES, of) for of in ("reward", "seconds"))
    here = ("new", found["state"], actions, shares)
    errs = rows_err([len(numbers(text)) for text in found["before"].values()], found["scale"])
    return rewards.belief(*here, errs), took.belief(*here), took.unknown(actions)


def uniform(game: Game) -> str | None:
    """Each with all rows, in order, while the budget lasts."""
    history, run = History(), game.run
    for name in game.order:
        if history.seconds + game.cost(name, 1.0) <= game.budget:
            history.trials.append(run(name, 1.0))
    return history.best.arm if history.best else None


def everything(game: Game) -> str | None:
    """All with all rows, whatever it takes."""
    best = History([game.run(name, 1.0) for name in game.order]).best
    return best.arm if best else None


def pruned(game: Game) -> str | None:
    """Candidates in order, share by share, ended early by Optuna's median pruner."""
    import optuna

    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.MedianPruner(n_startup_trials=2))
    history, run = History(), game.run
    for name in game.order:
        trial = study.ask()
        last, over = 0.0, False
        for share in (s for s in SHARES if f"{s:.3f}" in game.found["candidates"][name]):
            if history.seconds + game.cost(name, share) > game.budget:
                over = True
                break
            history.trials.append(run(name, share))
            last = history.trials[-1].score
            trial.report(last, SHARES.index(share))
            if share < 1 and trial.should_prune():
                over = True
                break
        state = optuna.trial.TrialState.PRUNED if over else optuna.trial.TrialState.COMPLETE
        study.tell(trial, None if over else last, state=state)
    return history.best.arm if history.best else None


def by_tpe(game: Game) -> str | None:
    """Optuna's tree-structured Parzen estimator over the candidates, each with all rows."""
    import optuna

    sampler = optuna.samplers.TPESampler(seed=game.seed, n_startup_trials=3)
    study, history, run = optuna.create_study(direction="maximize", sampler=sampler), History(), game.run
    for _ in range(3 * len(game.order)):
        trial = study.ask()
        name = trial.suggest_categorical("way", game.order)
        if not history.of(name):
            if history.seconds + game.cost(name, 1.0) > game.budget:
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                continue
            history.trials.append(run(name, 1.0))
        study.tell(trial, history.of(name)[-1].score)
    return history.best.arm if history.best else None


WAYS: dict[str, Way] = {
    "fanbu compare": by_compare, "halving, cold": by_halving, "uniform": uniform, "Optuna, median pruner": pruned,
    "Optuna, TPE": by_tpe, ALL: everything,
}  # fmt: skip


def replayed(found: Mapping[str, Any], replays: int, unit: str) -> dict[str, dict[str, float]]:
    """By way of choosing: the share of replays with a champion within half a point of the best, and the mean loss."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    truth, beliefs = truths(found), beliefs_in(found)
    best, worst = max(truth.values()), min(truth.values())
    lost: dict[str, list[float]] = {name: [] for name in WAYS}
    for seed in range(replays):
        order = list(truth)
        random.Random(seed).shuffle(order)
        for name, way in WAYS.items():
            chosen = way(Game(found, order, seed, unit, beliefs))
            lost[name].append(best - (truth[chosen] if chosen else worst))
    return {
        name: {"near": float(np.mean(np.array(values) <= NEAR)), "lost": float(np.mean(values))}
        for name, values in lost.items()
    }


def score_on_test(found: Mapping[str, Any], told: Mapping[str, Any]) -> float:
    """What `fanbu compare` would say of a trial, by all test rows."""
    pairs = {d: (told["test"][d], text) for d, text in found["before"].items()}
    return scored({d: float((numbers(new) - numbers(old)).mean()) for d, (new, old) in pairs.items()}, GateSpec())


def ship(tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes what fanbu comes with: what candidates of all tables came to on test rows, which chose nothing."""
    told = [
        {
            "name": name, "task": "text-classification", "domains": sorted(found["before"]),
            "state": [round(v, 4) for v in found["state"]], "scale": round(found["scale"], 4),
            "trials": [
                {"step": Step(**found["steps"][n]).model_dump(mode="json", exclude_defaults=True), "share": share,
                 "score": round(score_on_test(found, by[f"{share:.3f}"]), 4),
                 "seconds": round(by[f"{share:.3f}"]["seconds"], 1)}
                for n, by in found["candidates"].items()
                for share in SHARES if f"{share:.3f}" in by
            ],
        }
        for name, found in tables.items()
    ]  # fmt: skip
    lines = ",\n".join(json.dumps(one, sort_keys=True) for one in told)
    write_text(KNOWN, f"[\n{lines}\n]\n")


def live(recipe: Recipe, found: Mapping[str, Any], work: Path) -> tuple[str, float]:
    """One run of `fanbu compare` that learns from the comparisons without these domains: the winner, and how many
    points it lies below the best."""
    told = [one for one in json.loads(KNOWN.read_text()) if not {*one["domains"]} & {*found["before"]}]
    work = work / f"live-{digest(told)[:12]}"
    learn = [told_as_comparison(one, work / "told" / one["name"]) for one in told]
    spec = recipe.compare.model_copy(update={"known": False, "learn": learn, "runs": RUNS})
    asked = recipe.model_copy(update={"compare": spec, "workspace": str(work / "workspace")})
    winner = compare(asked, log=log)["winner"]
    truth = truths(found)
    return winner, max(truth.values()) - truth[winner]


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--replays", action="store_true", help="no live run")
    flags.add_argument("--ship", action="store_true", help="write known.json")
    flags.add_argument("--tables", type=Path, default=None, help="tables that were measured; others are measured")
    flags.add_argument("--only", nargs="+", choices=TABLES, default=None, help="some tables")
    args = flags.parse_args()
    if args.ship and args.quick:
        flags.error("what fanbu comes with is measured as a whole: --ship without --quick")
    name = "compare-quick" if args.quick else "compare"
    work, parts = args.work / name, parted(usable(text_domains(args.data)), args.quick)
    asked = {t: recipe_of(part, work / t, args.quick, rows) for t, (part, rows) in parts.items()}
    tables = json.loads(args.tables.read_text()) if args.tables else {}
    if missing := {*(args.only or ())} - {*tables, *asked}:
        flags.error(f"--only {' '.join(sorted(missing))}: these domains make {', '.join(asked)}")
    new = {t: measured(asked[t], work / t, whole=True) for t in args.only or asked if t not in tables}
    tables = {t: found for t, found in {**tables, **new}.items() if not args.only or t in args.only}
    if new and not args.only:
        (HERE / "results").mkdir(exist_ok=True)
        write_text(HERE / "results" / f"{name}-tables.json", json.dumps(tables, sort_keys=True))
    if args.ship:
        ship(tables)
    texts, bars, values = [], [], {}
    for t, found in tables.items():
        told = values[t] = {unit: replayed(found, REPLAYS, unit) for unit in ("steps", "seconds")}
        texts.append(f"Table {t}: {', '.join(sorted(found['before']))}\n\n{shown(found, told)}")
        print(texts[-1], flush=True)
        ours, others = told["steps"]["fanbu compare"], [told["steps"][w] for w in WAYS if w not in OURS]
        bars += [
            bar(f"{t}: near the best", f"{100 * ours['near']:.0f}% of replays", ">= 90%", ours["near"] >= 0.9),
            bar(f"{t}: beside the others", f"{ours['near']:.2f} and {max(o['near'] for o in others):.2f}", "more",
                ours["near"] > max(o["near"] for o in others)),
        ]  # fmt: skip
        if t in LIVE and not args.replays:
            winner, below = live(asked[t], found, work / t)
            bars.append(bar(f"{t}: one live run", f"{winner}: {below:.2f} points below the best", f"<= {NEAR}",
                            below <= NEAR))  # fmt: skip
    return finish(name, "\n\n".join(texts), {"replays": values}, bars)


def shown(found: Mapping[str, Any], told: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """What candidates come to, and how ways of choosing did."""
    truth, took = truths(found), whole_seconds(found)
    rows = [["candidate", "test accuracy, told", "seconds"]]
    rows += [[n, f"{truth[n]:.2f}", f"{took[n]:.0f}"] for n in sorted(truth, key=lambda n: -truth[n])]
    lines = [["chosen by", *(f"budget in {unit}: within 0.5 points | points lost, mean" for unit in told)]]
    lines += [[w, *(f"{100 * by[w]['near']:.0f}% | {by[w]['lost']:.2f}" for by in told.values())] for w in WAYS]
    split = [" | ".join(line).split(" | ") for line in lines]
    return f"{table(rows)}\n\n{table(split)}"


if __name__ == "__main__":
    sys.exit(main())
