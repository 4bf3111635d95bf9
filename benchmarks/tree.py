"""Ways back along trees that are found, beside the same ways without one, on real text domains.

Specialists grown from the probed MiniLM encoder; each way is taken flat, and along trees by texts, task vectors and
answers, and once more with shrinkage towards groups. Accuracy on test rows, told, the mean over domains, and what the
tree changed, with a 95% interval by bootstrap over test rows.

Run: python benchmarks/tree.py [--quick] [--data DIR] [--work DIR] [--ways NAME ...] [--rows N]. All usable domains, at
most 600 training rows each; --quick: 200.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from _common import bar, finish, parser, table, text_domains
from _outcomes import BASE, Outcomes, score, usable
from fanbu.feeding import feed
from fanbu.judge.compare import compare
from fanbu.progress import log
from fanbu.recipe import load_recipe
from fanbu.recipe_parts import Step
from fanbu.round import evaluated
from fanbu.search.compare import opened
from fanbu.types import silent

TREES: dict[str, dict[str, Any]] = {
    "flat": {}, "by texts": {"by": "texts"}, "by weights": {"by": "weights"}, "by answers": {"by": "answers"},
    "by texts, shrinkage 100": {"by": "texts", "shrinkage": 100.0},
}  # fmt: skip


def changed(new: Outcomes, old: Outcomes) -> str:
    """The mean change over domains, in points, with its interval."""
    pairs = [compare(new[d], old[d], "told", 0) for d in sorted(new)]
    low, high = np.quantile(np.mean([p.draws for p in pairs], 0), [0.025, 0.975])
    return f"{100 * np.mean([p.delta for p in pairs]):+.2f} ({100 * low:+.2f} to {100 * high:+.2f})"


def shown(tree: Mapping[str, Any]) -> str:
    """The groups of a manifest's tree."""
    groups = [[leaf["name"] for leaf in c["children"]] for c in tree.get("children", []) if "children" in c]
    return "; ".join("+".join(group) for group in groups) or "no groups"


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--ways", nargs="+", default=["average", "tsv_m", "regmean", "distill"])
    flags.add_argument("--rows", type=int, default=None)
    args = flags.parse_args()
    name, rows = "tree-quick" if args.quick else "tree", args.rows or (200 if args.quick else 600)
    domains = {
        d: {
            **{s: str(folder / f"{s}.jsonl") for s in ("train", "valid", "test")},
            "limit": {"train": rows, "valid": 200, "test": 500},
        }
        for d, folder in usable(text_domains(args.data)).items()
    }
    steps = {
        f"{way}, {kind}": {"method": way, **({"tree": tree} if tree else {})}
        for way in args.ways for kind, tree in TREES.items()
    }  # fmt: skip
    bench = opened(load_recipe({
        "fanbu": 1, "name": "tree", "model": BASE, "workspace": str(args.work / name), "threads": 1, "device": "cpu",
        "precision": "fp32", "max_length": 64, "domains": domains, "feedback": {"method": "distill"},
        "shrink": [{"method": "finetune", "train": {"epochs": 3, "lr": 2e-4}}],
        "compare": {"ways": list(steps.values())},
    }), silent, log)  # fmt: skip
    lines, found = [["way", "told", "change beside flat", "groups"]], {}
    for way in args.ways:
        flat: Outcomes = {}
        for kind in TREES:
            log(f"== {way}, {kind}")
            model = feed(bench.turn, Step(**steps[f"{way}, {kind}"]), bench.specialists, bench.incumbent)
            outcomes = {d.name: evaluated(bench.turn, kind, model, d)[0] for d in bench.turn.feeding}
            flat = flat or outcomes
            told = 100 * float(np.mean([score(c, "told") or 0.0 for c in outcomes.values()]))
            change = "" if kind == "flat" else changed(outcomes, flat)
            groups = "" if kind == "flat" else shown(model.manifest["parameters"].get("tree", {}))
            lines.append([f"{way}, {kind}", f"{told:.2f}", change, groups])
            found[f"{way}, {kind}"] = {"told": told, "change": change, "groups": groups}
    text = f"{table(lines)}\n\n{len(domains)} domains, at most {rows} training rows each; one seed"
    print(text, flush=True)
    gained = [line[0] for line in lines[1:] if "(+" in line[2]]
    bars = [bar("a tree that is better than flat, with an interval", ", ".join(gained) or "none", "one", bool(gained))]
    return finish(name, text, found, bars)


if __name__ == "__main__":
    sys.exit(main())
