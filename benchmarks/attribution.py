"""What specialists are worth, on real text domains: a copy, a poisoned one, and drawn orders beside all orders.

The large model knows four domains by probed label rows. Five owners feed: three have these rows, a fourth the very
rows of the first (`NAME@copy`, the first being `NAME@one`), and the labels of a fifth, to train on and to validate by,
were each put in the place of the next one. One round, then `fanbu worth` by all orders, by drawn ones, and in a second
workspace by all orders without the copy.

Run: python benchmarks/attribution.py [--quick] [--data DIR] [--work DIR] [--way NAME]. At most 300 training rows each;
--quick: 120.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _outcomes import BASE, usable
from fanbu.domain import load_domain
from fanbu.generations import run
from fanbu.progress import log
from fanbu.recipe import Recipe, load_recipe
from fanbu.round import raise_incumbent
from fanbu.search.worth import worth
from fanbu.turn import start

PAIRS = 6  # of orders, where they are drawn
SPLITS = ("train", "valid", "test")


def cut(name: str, folder: Path, out: Path, rows: int) -> Path:
    """Files of so many of a domain's rows."""
    files = {split: str(folder / f"{split}.jsonl") for split in SPLITS}
    d = load_domain(name, **files, limit={"train": rows, "valid": 150, "test": 300})
    out.mkdir(parents=True, exist_ok=True)
    for split, part in zip(SPLITS, (d.train, d.valid, d.test), strict=True):
        told = [{"text": t, "label": d.labels[n]} for t, n in zip(part.texts, part.labels or (), strict=True)]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return out


def flipped(folder: Path, out: Path) -> Path:
    """A domain's files with each label of its training and validation rows put in the place of the next."""
    rows = {s: [json.loads(line) for line in (folder / f"{s}.jsonl").read_text().splitlines()] for s in SPLITS}
    names = sorted({row["label"] for part in rows.values() for row in part})
    after = dict(zip(names, [*names[1:], names[0]], strict=True))
    out.mkdir(parents=True, exist_ok=True)
    for split, part in rows.items():
        told = [row if split == "test" else {**row, "label": after[row["label"]]} for row in part]
        (out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in told))
    return out


def recipe_of(folders: dict[str, Path], workspace: Path, way: str, model: str) -> Recipe:
    domains = {name: {split: str(folder / f"{split}.jsonl") for split in SPLITS} for name, folder in folders.items()}
    return load_recipe({
        "fanbu": 1, "name": "attribution", "model": model, "workspace": str(workspace), "threads": 1, "device": "cpu",
        "precision": "fp32", "max_length": 64, "domains": domains, "feedback": {"method": way},
        "shrink": [{"method": "finetune", "train": {"epochs": 3, "lr": 2e-4}}],
    })  # fmt: skip


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--way", default="average")
    args = flags.parse_args()
    name = f"attribution-{args.way}" + ("-quick" if args.quick else "")
    work, rows = args.work / name, 120 if args.quick else 300
    folders = list(usable(text_domains(args.data)).items())[:4]
    [first, second, third, last] = [(d, cut(d, folder, work / "rows" / d, rows)) for d, folder in folders]
    found: dict[str, Any] = {}
    one, copy = f"{first[0]}@one", f"{first[0]}@copy"
    honest = {one: first[1], second[0]: second[1], third[0]: third[1], last[0]: last[1]}
    known = raise_incumbent(start(recipe_of(honest, work / "before", args.way, BASE))).path
    alone = {**honest, last[0]: flipped(last[1], work / "flipped")}
    recipe = recipe_of({**alone, copy: first[1]}, work / "with", args.way, str(known))
    run(recipe, log=log)
    found["all orders"] = worth(recipe, 0, log=log)["shapley"]
    found["drawn orders"] = worth(recipe, PAIRS, log=log)["shapley"]
    found["left out"] = worth(recipe, None, log=log)["left_out"]
    fewer = recipe_of(alone, work / "without", args.way, str(known))
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
