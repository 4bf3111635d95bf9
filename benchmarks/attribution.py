"""What specialists are worth, on real text domains: a copy, a poisoned one, and drawn orders beside all orders.

Five owners: three domains of their own, a fourth who has the very rows of the first (`NAME@copy`, the first being
`NAME@one`), and a fifth whose training labels were shuffled. One round, then `fanbu worth` by all orders, by drawn
ones, and in a second workspace by all orders without the copy.

Run: python benchmarks/attribution.py [--quick] [--data DIR] [--work DIR] [--way NAME]. At most 300 training rows each;
--quick: 120.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _outcomes import BASE, usable
from fanbu.generations import run
from fanbu.progress import log
from fanbu.recipe import Recipe, load_recipe
from fanbu.search.worth import worth

PAIRS = 6  # of orders, where they are drawn
SPLITS = ("train", "valid", "test")


def shuffled(folder: Path, out: Path) -> Path:
    """A domain's files with the labels of its training and validation rows in another order."""
    out.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        rows = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        labels = [row["label"] for row in rows]
        if split != "test":
            random.Random(0).shuffle(labels)
        text = "".join(json.dumps({**row, "label": label}) + "\n" for row, label in zip(rows, labels, strict=True))
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return out


def recipe_of(folders: dict[str, Path], workspace: Path, way: str, rows: int) -> Recipe:
    domains = {
        name: {**{s: str(folder / f"{s}.jsonl") for s in SPLITS}, "limit": {"train": rows, "valid": 150, "test": 300}}
        for name, folder in folders.items()
    }
    return load_recipe({
        "fanbu": 1, "name": "attribution", "model": BASE, "workspace": str(workspace), "threads": 1, "device": "cpu",
        "precision": "fp32", "max_length": 64, "domains": domains, "feedback": {"method": way},
        "shrink": [{"method": "finetune", "train": {"epochs": 3, "lr": 2e-4}}],
    })  # fmt: skip


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--way", default="average")
    args = flags.parse_args()
    name = f"attribution-{args.way}" + ("-quick" if args.quick else "")
    work, rows = args.work / name, 120 if args.quick else 300
    [first, second, third, last], found = list(usable(text_domains(args.data)).items())[:4], {}
    one, copy = f"{first[0]}@one", f"{first[0]}@copy"
    alone = {one: first[1], second[0]: second[1], third[0]: third[1], last[0]: shuffled(last[1], work / "shuffled")}
    recipe = recipe_of({**alone, copy: first[1]}, work / "with", args.way, rows)
    run(recipe, log=log)
    found["all orders"] = worth(recipe, 0, log=log)["shapley"]
    found["drawn orders"] = worth(recipe, PAIRS, log=log)["shapley"]
    found["left out"] = worth(recipe, None, log=log)["left_out"]
    fewer = recipe_of(alone, work / "without", args.way, rows)
    run(fewer, log=log)
    found["without the copy"] = worth(fewer, 0, log=log)["shapley"]
    return report(name, found, one, copy, last[0])


def report(name: str, found: dict[str, Any], one: str, copy: str, poisoned: str) -> int:
    def told(part: dict[str, float] | None) -> str:
        return f"{100 * part['value']:+.2f} ({100 * part['low']:+.2f} to {100 * part['high']:+.2f})" if part else ""

    whole = found["all orders"]
    lines = [["specialist", *found]]
    lines += [[d, *(told(values.get(d)) for values in found.values())] for d in sorted(whole)]
    text = f"Points of the mean change on test rows, with 95% intervals.\n\n{table(lines)}"
    print(text, flush=True)
    drawn = found["drawn orders"]
    off = [d for d in whole if not drawn[d]["low"] <= whole[d]["value"] <= drawn[d]["high"]]
    single = found["without the copy"][one]
    both = whole[one]["value"] + whole[copy]["value"]
    bars = [
        bar("a copy and its original are worth the same", f"{told(whole[one])} and {told(whole[copy])}",
            "each within the other's interval",
            whole[copy]["low"] <= whole[one]["value"] <= whole[copy]["high"]
            and whole[one]["low"] <= whole[copy]["value"] <= whole[one]["high"]),
        bar("a copied one is worth less than where it is alone", f"{told(whole[one])} and {told(single)}", "less",
            whole[one]["value"] < single["value"]),
        bar("a poisoned one", told(whole[poisoned]), "below 0, with its interval", whole[poisoned]["high"] < 0),
        bar("drawn orders beside all orders", f"{len(whole) - len(off)} of {len(whole)} within the interval", "all",
            not off),
    ]  # fmt: skip
    return finish(name, text, {**found, "both": both}, bars)


if __name__ == "__main__":
    sys.exit(main())
