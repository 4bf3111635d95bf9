"""Meta decision forests over tables of many industries, beside single forests, plain stacking and pooling.

All are random forests with the same settings. ``pooled`` sees all rows of all domains in one forest. ``unseen``: each
domain in turn is left out, and known by 50 labelled rows at most (five draws); the others are adapted to it.

Run: python benchmarks/meta_forest.py [--quick] [--data DIR] [--seeds N]. --quick: one seed, two draws.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from _common import bar, finish, parser, table
from fanbu.contribution import Contribution
from fanbu.judge.compare import average, compare
from fanbu.progress import bar as progress_bar
from fanbu.tables.meta_forest import MetaForestClassifier

SHOTS = 50
Array = np.ndarray[Any, Any]
Split = tuple[Array, Array]


def tables(folder: Path) -> dict[str, dict[str, Split]]:
    """Domains of tables that have the same columns: numbers as they are, words as one column a word."""
    raw = {
        path.parent.name: {s: _rows(path.with_name(f"{s}.jsonl.gz")) for s in ("train", "test")}
        for path in sorted(folder.glob("*/train.jsonl.gz"))
    }
    if not raw:
        sys.exit(f"no tables in {folder}; give their folder with --data")
    rows = [r for d in raw.values() for r in d["train"]]
    words: dict[str, list[str]] = {
        k: sorted({r["x"][k] for r in rows}) for k, v in rows[0]["x"].items() if isinstance(v, str)
    }
    labels = sorted({r["label"] for r in rows})

    def split(some: Sequence[Mapping[str, Any]]) -> Split:
        columns = [
            [float(r["x"][k] == w) for r in some] if w is not None else [float(r["x"][k]) for r in some]
            for k in rows[0]["x"]
            for w in words.get(k, [None])  # type: ignore[list-item]
        ]
        return np.array(columns).T, np.array([labels.index(r["label"]) for r in some])

    return {name: {s: split(some) for s, some in d.items()} for name, d in raw.items()}


def _rows(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream if line.strip()]


def forest(x: Array, y: Array, seed: int, leaf: int = 3) -> RandomForestClassifier:
    """As the specialists inside a meta forest are."""
    return RandomForestClassifier(200, min_samples_leaf=leaf, n_jobs=-1, random_state=seed).fit(x, y)


def joined(domains: Mapping[str, Mapping[str, Split]]) -> tuple[Array, Array, Array]:
    """All training rows, and which domain each is of."""
    x, y = (np.concatenate([d["train"][i] for d in domains.values()]) for i in (0, 1))
    return x, y, np.concatenate([np.full(len(d["train"][1]), name) for name, d in domains.items()])


def told(domains: Mapping[str, Mapping[str, Split]], seed: int) -> dict[str, dict[str, Array]]:
    """Which test rows each way answers right, by domain."""
    x, y, names = joined(domains)
    single = {name: forest(*d["train"], seed) for name, d in domains.items()}
    right = {
        f"forest of {one}": {n: f.predict(d["test"][0]) == d["test"][1] for n, d in domains.items()}
        for one, f in single.items()
    }
    right["own forests"] = {n: right[f"forest of {n}"][n] for n in domains}
    p = {n: np.concatenate([f.predict_proba(d["test"][0])[:, 1:] for f in single.values()], 1)
         for n, d in domains.items()}  # fmt: skip
    stack = LogisticRegression(max_iter=1000).fit(_out_of_fold(domains, single, seed), y)
    right["plain stacking"] = {n: stack.predict(p[n]) == d["test"][1] for n, d in domains.items()}
    for name, model in (
        ("pooled forest", forest(x, y, seed)),
        ("meta_forest", MetaForestClassifier(random_state=seed, n_jobs=-1).fit(x, y, domains=names)),
        (
            "meta_forest without the rows",
            MetaForestClassifier(random_state=seed, n_jobs=-1, passthrough=False).fit(x, y, domains=names),
        ),
    ):
        right[name] = {n: model.predict(d["test"][0]) == d["test"][1] for n, d in domains.items()}
    return right


def _out_of_fold(domains: Mapping[str, Mapping[str, Split]], single: Mapping[str, Any], seed: int) -> Array:
    parts = []
    for name, d in domains.items():
        x, y = d["train"]
        said = {n: f.predict_proba(x)[:, 1:] for n, f in single.items()}
        for fitted, held in StratifiedKFold(5, shuffle=True, random_state=seed).split(x, y):
            said[name][held] = forest(x[fitted], y[fitted], seed).predict_proba(x[held])[:, 1:]
        parts.append(np.concatenate(list(said.values()), 1))
    return np.concatenate(parts)


def unseen(
    domains: Mapping[str, Mapping[str, Split]], seed: int, draws: int, progress: Any
) -> dict[str, dict[str, Array]]:
    """The same for domains that are left out, the mean over draws of their few rows."""
    right: dict[str, dict[str, Array]] = {}
    for i, (name, d) in enumerate(domains.items()):
        progress("left out", i, len(domains))
        x, y, names = joined({n: o for n, o in domains.items() if n != name})
        meta = MetaForestClassifier(random_state=seed, n_jobs=-1).fit(x, y, domains=names)
        test, truth = d["test"]
        found = {
            "pooled forest": [forest(x, y, seed).predict(test) == truth],
            "as it is": [meta.predict(test) == truth],
        }
        for draw in range(draws):
            few = np.random.default_rng([seed, draw]).permutation(len(d["train"][1]))[:SHOTS]
            own_x, own_y = d["train"][0][few], d["train"][1][few]
            found.setdefault("few rows' forest", []).append(forest(own_x, own_y, seed, 1).predict(test) == truth)
            found.setdefault("adapted", []).append(meta.adapt(own_x, own_y).predict(test) == truth)
        for way, answers in found.items():
            right.setdefault(way, {})[name] = np.mean(answers, 0)
    return right


def shown(right: Mapping[str, Mapping[str, Array]]) -> str:
    """Accuracy by way and domain."""
    names = list(next(iter(right.values())))
    rows = [["way", *names, "mean"]]
    for way, by in right.items():
        values = [100 * by[n].mean() for n in names]
        rows.append([way, *(f"{v:.1f}" for v in values), f"{np.mean(values):.2f}"])
    return table(rows)


def difference(one: Mapping[str, Array], other: Mapping[str, Array]) -> dict[str, float]:
    """Mean over domains of the paired difference, in points, with its interval."""
    found = average([compare(_outcome(n, one[n]), _outcome(n, other[n]), "told", 0) for n in one])
    return {k: 100 * found[k] for k in ("delta", "low", "high")}


def _outcome(name: str, right: Array) -> Contribution:
    tensors = {"told": torch.tensor(right, dtype=torch.float64), "weight": torch.ones(len(right), dtype=torch.float64)}
    return Contribution("scores", name, "evaluate", tensors, meta={"test": name})


def over_seeds(runs: Sequence[Mapping[str, Mapping[str, Array]]]) -> dict[str, dict[str, Array]]:
    """Each row's mean over seeds."""
    return {way: {n: np.mean([run[way][n] for run in runs], 0) for n in by} for way, by in runs[0].items()}


def bars_of(right: Mapping[str, Mapping[str, Array]], few: Mapping[str, Mapping[str, Array]]) -> list[dict[str, Any]]:
    """What was promised."""
    means = {way: np.mean([r.mean() for r in by.values()]) for way, by in right.items()}
    best = max((w for w in means if w.startswith("forest of")), key=lambda w: means[w])
    bars = []
    for other in (best, "own forests", "plain stacking"):
        d = difference(right["meta_forest"], right[other])
        bars.append(bar(f"meta_forest beside {other}", _points(d), "> 0", d["delta"] > 0))
    d = difference(right["meta_forest"], right["pooled forest"])
    bars.append(bar("meta_forest beside the pooled forest", _points(d), ">= -0.5", d["delta"] >= -0.5))
    for other in ("few rows' forest", "pooled forest"):
        d = difference(few["adapted"], few[other])
        bars.append(bar(f"unseen domain: adapted beside {other}", _points(d), "> 0", d["delta"] > 0))
    return bars


def _points(d: Mapping[str, float]) -> str:
    return f"{d['delta']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f})"


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    args = flags.parse_args()
    domains, seeds = tables(args.data), args.seeds or (1 if args.quick else 3)
    with progress_bar() as progress:
        right = over_seeds([told(domains, seed) for seed in range(seeds)])
        print(shown(right), flush=True)
        few = over_seeds([unseen(domains, seed, 2 if args.quick else 5, progress) for seed in range(seeds)])
    print(shown(few), flush=True)
    values = {
        part: {way: {n: float(r.mean()) for n, r in by.items()} for way, by in found.items()}
        for part, found in (("told", right), ("unseen", few))
    }
    text = f"{shown(right)}\n\nUnseen, {SHOTS} labelled rows:\n\n{shown(few)}\n\n{seeds} seed(s)"
    return finish("meta_forest-quick" if args.quick else "meta_forest", text, values, bars_of(right, few))


if __name__ == "__main__":
    sys.exit(main())
