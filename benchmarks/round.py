"""One round on real domains: what comes back from the specialists, by which way, against what references.

Run: python benchmarks/round.py [--quick] [--data DIR] [--task causal-lm]. Resumable: run it again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _outcomes import BASE, Outcomes, mean_over_seeds, score, usable
from fanbu.judge.compare import compare, gain_kept, holm
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.recipe import load_recipe
from fanbu.round import Result, turn_once
from fanbu.turn import Turn, start

SMALL_LIMIT = 22_713_216 // 2


def recipe(folders: Mapping[str, Path], seed: int, quick: bool, small: bool, work: Path) -> dict[str, Any]:
    """The round: specialists of full or small size, fed back by distill; labels do not leave their owners."""
    epochs = 2 if quick else 3
    tune = {"epochs": epochs, "lr": 2e-4}
    shrink: list[dict[str, Any]] = [{"method": "finetune", "train": tune}]
    if small:
        shrink = [
            {"method": "vocabulary", "max_tokens": 7000},
            {"method": "depth", "layers": 4, "train": {**tune, "epochs": 4}},
        ]
    domains = {
        name: {
            **{split: str(folder / f"{split}.jsonl") for split in ("train", "valid", "test")},
            "share": {"preset": "open", "labels": False},
            "limit": {"train": 2000} if quick else {},
        }
        for name, folder in folders.items()
    }
    return {
        "fanbu": 1, "name": "round", "model": BASE, "workspace": str(work / "round"), "seed": seed, "max_length": 64,
        "domains": domains, "shrink": shrink,
        "feedback": {"method": "distill", "train": {"epochs": 3, "lr": 2e-4}},
        "references": [] if small else ["tfidf", {"method": "average"}], "gate": {"margin": 0.05},
    }  # fmt: skip


def joint(value: dict[str, Any], epochs: int) -> dict[str, Any]:
    """The same round where all share labelled rows: joint training, which sees everything."""
    domains = {name: {**spec, "share": "open"} for name, spec in value["domains"].items()}
    way = {"method": "multitask", "train": {"epochs": epochs, "lr": 2e-4}}
    return {**value, "domains": domains, "feedback": way, "references": []}


def one_seed(folders: Mapping[str, Path], seed: int, quick: bool, work: Path) -> dict[str, tuple[Turn, Result]]:
    """All three rounds of one seed; they share their stages."""
    full = recipe(folders, seed, quick, False, work)
    rounds = {"full": full, "small": recipe(folders, seed, quick, True, work), "joint": joint(full, 2 if quick else 3)}
    done = {}
    with progress_bar() as progress:
        for name, value in rounds.items():
            log(f"== seed {seed}: {name}")
            turn = start(load_recipe(value), progress, log)
            done[name] = (turn, turn_once(turn))
    return done


def collect(rounds: Mapping[str, tuple[Turn, Result]]) -> dict[str, Outcomes]:
    """Outcomes by the name of what was judged."""
    full, small, together = (rounds[name][1].outcomes for name in ("full", "small", "joint"))
    return {
        "probed base": full["incumbent"], "TF-IDF regression": full["tfidf"],
        "full-size specialists": full["specialists"],
        "small specialists": small["specialists"], "average": full["average"],
        "distill from full-size": full["candidate"],
        "distill from small": small["candidate"], "multitask (sees all labels)": together["candidate"],
    }  # fmt: skip


def scores_table(outcomes: Mapping[str, Outcomes], mode: str) -> str:
    """Accuracy by domain and on average."""
    names = list(outcomes["probed base"])
    rows = [[mode, *names, "mean"]]
    for name, by_domain in outcomes.items():
        values = [score(by_domain[d], mode) for d in names]
        if None not in values:
            known = [v for v in values if v is not None]
            rows.append([name, *(f"{100 * v:.1f}" for v in known), f"{100 * sum(known) / len(known):.1f}"])
    return table(rows)


def cost_table(rounds: Mapping[str, tuple[Turn, Result]]) -> tuple[str, dict[str, Any]]:
    """Seconds and peak memory by what they were spent on (last seed)."""
    groups = {
        "probed base": ("full", ("probe", "incumbent", "open")),
        "full-size specialists": ("full", ("shrink",)),
        "small specialists": ("small", ("shrink",)),
        "average": ("full", ("average contribution", "reference average")),
        "distill from full-size": ("full", ("distill",)),
        "distill from small": ("small", ("distill",)),
        "multitask (sees all labels)": ("joint", ("multitask",)),
        "TF-IDF regression": ("full", ("evaluate tfidf",)),
        "evaluation": ("full", ("evaluate", "measure")),
    }
    values = {}
    for name, (which, prefixes) in groups.items():
        chosen = [c for c in rounds[which][0].costs if c["stage"].startswith(prefixes)]
        values[name] = {
            "seconds": sum(c.get("seconds", 0) for c in chosen),
            "peak_gb": max((c.get("peak_bytes", 0) for c in chosen), default=0) / 1e9,
        }
    rows = [
        ["cost", "seconds", "peak GB"],
        *([n, f"{v['seconds']:.0f}", f"{v['peak_gb']:.2f}"] for n, v in values.items()),
    ]
    return table(rows), values


def classification(quick: bool, data: Path, work: Path, seeds: int) -> int:
    """The bars on text domains."""
    folders = usable(text_domains(data))
    if quick:
        folders = dict(list(folders.items())[:6])
    runs = [one_seed(folders, seed, quick, work) for seed in range(seeds)]
    outcomes = mean_over_seeds([collect(r) for r in runs])
    costs, spent = cost_table(runs[-1])
    base, full = outcomes["probed base"], outcomes["full-size specialists"]
    kept = {
        name: {mode: gain_kept(outcomes[name], base, full, mode, 0) for mode in ("told", "untold")}
        for name in ("average", "distill from full-size", "distill from small", "multitask (sees all labels)")
    }
    sizes = [s.model.parameters for s in runs[-1]["small"][1].specialists]
    text = "\n\n".join([scores_table(outcomes, "told"), scores_table(outcomes, "untold"), kept_table(kept), costs])
    text += f"\n\n{seeds} seed(s); small specialists have at most {max(sizes):,} parameters"
    text += f"\n\nbytes that crossed, outcomes aside: {crossed(runs[-1])}"
    print(text, flush=True)
    pairs = {d: compare(outcomes["distill from full-size"][d], base[d], "told", 0) for d in base}
    adjusted = holm({d: p.p for d, p in pairs.items()})
    worse = [d for d, p in pairs.items() if p.delta < 0 and adjusted[d] < 0.05]
    got = kept["distill from full-size"]["told"] or {"value": float("nan"), "low": float("nan"), "high": float("nan")}
    bars = [
        bar("gain kept, distill from full-size", f"{got['value']:.2f}", ">= 0.80", got["value"] >= 0.80),
        bar("its interval's lower end", f"{got['low']:.2f}", "> 0.5", got["low"] > 0.5),
        bar("domains significantly worse than the probed base (Holm)", ", ".join(worse) or "none", "none", not worse),
        bar("parameters of small specialists", f"{max(sizes):,}", f"<= {SMALL_LIMIT:,}", max(sizes) <= SMALL_LIMIT),
    ]
    by_domain = {
        n: {d: {m: score(c, m) for m in ("told", "untold")} for d, c in o.items()} for n, o in outcomes.items()
    }
    changes = {d: {"delta": p.delta, "low": p.low, "high": p.high, "p_holm": adjusted[d]} for d, p in pairs.items()}
    values = {
        "accuracy": by_domain,
        "gain_kept": kept,
        "costs": spent,
        "changes": changes,
        "seeds": seeds,
        "quick": quick,
    }
    return finish("round-quick" if quick else "round", text, values, bars)


def kept_table(kept: Mapping[str, Mapping[str, Mapping[str, float] | None]]) -> str:
    """Gain kept with its interval."""
    rows = [["gain kept of full-size specialists'", "told", "untold"]]
    for name, modes in kept.items():
        cells = ["-" if v is None else f"{v['value']:.2f} ({v['low']:.2f} to {v['high']:.2f})" for v in modes.values()]
        rows.append([name, *cells])
    return table(rows)


def crossed(rounds: Mapping[str, tuple[Turn, Result]]) -> str:
    """Megabytes by round."""
    totals = {
        name: sum(c["bytes"] for sent in turn.crossed.values() for c in sent if "evaluate" not in c["what"]) / 1e6
        for name, (turn, _) in rounds.items()
    }
    return ", ".join(f"{name} {total:.1f} MB" for name, total in totals.items())


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--task", choices=("text-classification", "causal-lm"), default="text-classification")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    args = flags.parse_args()
    if args.task == "causal-lm":
        from _causal import causal

        return causal(args.quick, args.work)
    return classification(args.quick, args.data, args.work, args.seeds or (1 if args.quick else 3))


if __name__ == "__main__":
    sys.exit(main())
