"""Three rounds with arriving rows: is every champion better than the one before, and does it forget nothing?

Two domains in three get their labelled rows in three portions, one a round; every third (a quiet one) has all its rows
in round one and no new ones after. Beside it: a chain that merges weights (average) in each round, and joint training
from scratch on all labelled rows so far, with as many steps as the champion's centre has made in all rounds so far.

Run: python benchmarks/generations.py [--quick] [--data DIR]. Resumable: run it again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _outcomes import BASE, Outcomes, mean_over_seeds, score, usable
from fanbu.domain import Specialist
from fanbu.feeding import feed
from fanbu.judge.compare import Paired, average, compare
from fanbu.model import Model, open_model
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.recipe import load_recipe
from fanbu.recipe_parts import Step
from fanbu.record import make_record
from fanbu.round import Result, evaluated, raise_incumbent, turn_once
from fanbu.turn import Turn, open_turn

ROUNDS = 3
MARGIN = 0.05
TUNE = {"epochs": 2, "lr": 2e-4}
CENTRE = {"epochs": 3, "lr": 2e-4}


def recipe(folders: Mapping[str, Path], seed: int, feedback: dict[str, Any], work: Path) -> dict[str, Any]:
    """Domains in the order of their names; every third is quiet."""
    domains = {
        name: {
            **{split: str(folder / f"{split}.jsonl") for split in ("train", "valid", "test")},
            "limit": {"train": 600, "valid": 150, "test": 500}, "arrivals": 1 if quiet(folders, name) else ROUNDS,
        }
        for name, folder in folders.items()
    }  # fmt: skip
    return {
        "fanbu": 1, "name": "generations", "model": BASE, "workspace": str(work / "generations"), "seed": seed,
        "max_length": 64, "rounds": ROUNDS, "domains": domains, "shrink": [{"method": "finetune", "train": TUNE}],
        "feedback": feedback, "gate": {"margin": MARGIN},
    }  # fmt: skip


def quiet(folders: Mapping[str, Path], name: str) -> bool:
    """Whether all rows of a domain are there in round one."""
    return sorted(folders).index(name) % 3 == 2


@dataclass(frozen=True)
class Round:
    """A round, and the outcomes of the champion that stood after it."""

    turn: Turn
    result: Result
    standing: Outcomes
    champion: Model

    @property
    def promoted(self) -> bool:
        """Whether the gate took the candidate."""
        return bool(self.result.verdict["accepted"])


def chain(value: dict[str, Any]) -> list[Round]:
    """Three rounds, each from the champion of the one before; all stages are kept, so a second run only reads them."""
    wanted, rounds, records, parent = load_recipe(value), [], [], None
    with progress_bar() as progress:
        for number in range(1, ROUNDS + 1):
            log(f"== {value['feedback']['method']}, seed {value['seed']}, round {number}")
            turn = open_turn(wanted, open_model(BASE), parent, records, progress, log)
            result = turn_once(turn)
            accepted = result.verdict["accepted"]
            parent = result.candidate if accepted else result.incumbent
            rounds.append(Round(turn, result, result.outcomes["candidate" if accepted else "incumbent"], parent))
            records = [*records, make_record(turn, result, f"{number}")]
    return rounds


def from_scratch(turn: Turn, steps: int) -> tuple[Outcomes, Outcomes]:
    """(probed base, joint training) on all rows that are there in a round, as if there had been no round before."""
    fresh = replace(turn, parent=None, records=[], costs=[], crossed={})
    probed = raise_incumbent(fresh)
    way = Step.model_validate({"method": "multitask", "train": {**CENTRE, "epochs": 1000, "max_steps": steps}})
    owners = [Specialist(probed, d) for d in fresh.feeding]
    joint = feed(fresh, way, owners, probed, "scratch")
    everything = list(fresh.domains.values())
    models = {"probed": probed, "scratch": joint}
    first, second = ({d.name: evaluated(fresh, n, m, d)[0] for d in everything} for n, m in models.items())
    return first, second


def one_seed(
    folders: Mapping[str, Path], seed: int, work: Path
) -> tuple[dict[str, Outcomes], list[Round], list[Round]]:
    """Outcomes by name and round, and the two chains."""
    rounds = chain(recipe(folders, seed, {"method": "distill", "train": CENTRE}, work))
    merged = chain(recipe(folders, seed, {"method": "average"}, work))
    found: dict[str, Outcomes] = {}
    steps = 0
    with progress_bar() as progress:
        for number, (own, other) in enumerate(zip(rounds, merged, strict=True), 1):
            steps += int(own.result.candidate.manifest["parameters"].get("steps", 0))
            own.turn.context = replace(own.turn.context, progress=progress)
            probed, scratch = from_scratch(own.turn, max(steps, 1))
            found[f"probed base {number}"] = probed
            found[f"specialists {number}"] = own.result.outcomes["specialists"]
            found[f"average, champion {number}"] = other.standing
            found[f"from scratch {number}"] = scratch
            found[f"champion {number}"] = own.standing
    return found, rounds, merged


def over_rounds(found: Mapping[str, Outcomes], mode: str) -> str:
    """Mean accuracy over domains, a row a system and a column a round."""
    names = {
        "probed base": "probed base, rows so far", "specialists": "specialists, each on its own domain",
        "average, champion": "champion of the merging chain (average)",
        "from scratch": "joint training from scratch, rows so far", "champion": "champion (distill)",
    }  # fmt: skip
    rows = [[f"mean accuracy, {mode}", *(f"round {n}" for n in range(1, ROUNDS + 1))]]
    for key, title in names.items():
        values = [[score(c, mode) for c in found[f"{key} {n}"].values()] for n in range(1, ROUNDS + 1)]
        if all(v is not None for by in values for v in by):
            rows.append([title, *(f"{100 * sum(by) / len(by):.1f}" for by in values)])
    return table(rows)


def by_domain(found: Mapping[str, Outcomes], folders: Mapping[str, Path]) -> str:
    """The champion's told accuracy, a row a domain."""
    rows = [["told accuracy of the champion", *(f"round {n}" for n in range(1, ROUNDS + 1)), "new rows after round 1"]]
    for name in folders:
        values = [score(found[f"champion {n}"][name], "told") for n in range(1, ROUNDS + 1)]
        rows.append([name, *(f"{100 * (v or 0):.1f}" for v in values), "none" if quiet(folders, name) else "yes"])
    return table(rows)


def steps_between(found: Mapping[str, Outcomes]) -> dict[int, dict[str, Paired]]:
    """Champion against champion of the round before, by the later round and by domain."""
    return {
        n: {d: compare(c, found[f"champion {n - 1}"][d], "told", 0) for d, c in found[f"champion {n}"].items()}
        for n in range(2, ROUNDS + 1)
    }


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    args = flags.parse_args()
    folders = usable(text_domains(args.data))
    if args.quick:
        folders = dict(list(folders.items())[:6])
    runs = [one_seed(folders, seed, args.work) for seed in range(args.seeds or (1 if args.quick else 3))]
    return report(runs, folders, args.quick)


def report(
    runs: Sequence[tuple[dict[str, Outcomes], list[Round], list[Round]]], folders: Mapping[str, Path], quick: bool
) -> int:
    """Prints the tables and the bars."""
    found = mean_over_seeds([outcomes for outcomes, _, _ in runs])
    changes = steps_between(found)
    # the gate's own criterion, seed by seed: the one-sided lower bound of each change
    lowest = min(
        (p.floor, d, n, seed)
        for seed, (outcomes, _, _) in enumerate(runs)
        for n, pairs in steps_between(outcomes).items()
        for d, p in pairs.items()
    )
    pairs = [compare(c, found["champion 1"][d], "told", 0) for d, c in found[f"champion {ROUNDS}"].items()]
    gained = average(pairs)
    still = [name for name in folders if quiet(folders, name)]
    kept = {n: {d: changes[n][d].delta for d in still} for n in changes}
    means = {n: sum(by.values()) / len(by) for n, by in kept.items()}
    decisions = {
        name: [["promoted" if r.promoted else "refused" for r in chains[i]] for chains in runs]
        for name, i in (("distill", 1), ("average", 2))
    }
    text = "\n\n".join([over_rounds(found, "told"), over_rounds(found, "untold"), by_domain(found, folders)])
    said = [f"{name}: " + "; ".join(", ".join(one) for one in seeds) for name, seeds in decisions.items()]
    text += f"\n\n{len(runs)} seed(s); decisions by round, seeds apart by semicolons. " + ". ".join(said)
    each = ", ".join(f"{d} in round {n} {100 * v:+.1f}" for n, by in kept.items() for d, v in by.items())
    text += f"\n\nchange on domains without new rows, points: {each}"
    print(text, flush=True)
    bars = [
        bar(
            "lowest lower bound of a champion's change in a domain over one round (points)",
            f"{100 * lowest[0]:+.1f} ({lowest[1]}, round {lowest[2]}, seed {lowest[3]})", f">= {-100 * MARGIN:.0f}",
            lowest[0] >= -MARGIN,
        ),
        bar(
            "mean change from the first champion to the last (points)",
            f"{100 * gained['delta']:+.1f} ({100 * gained['low']:+.1f} to {100 * gained['high']:+.1f})",
            "interval above 0", gained["low"] > 0,
        ),
        bar(
            "least mean change over a round on domains that got no new rows (points)",
            f"{100 * min(means.values()):+.2f}", ">= -1", min(means.values()) >= -0.01,
        ),
    ]  # fmt: skip
    scores = {n: {d: {m: score(c, m) for m in ("told", "untold")} for d, c in o.items()} for n, o in found.items()}
    values = {"accuracy": scores, "gained": gained, "decisions": decisions, "quiet": kept, "seeds": len(runs)}
    return finish("generations-quick" if quick else "generations", text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
