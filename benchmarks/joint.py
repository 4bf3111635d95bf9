"""Joint modelling: three parties hold different columns of the same entities, beside all columns in one place.

Tables of all industries that have the same columns are one table, whose columns go to three parties by turns; the first
has the labels. Each other party lacks a tenth of the training entities, has as many that nobody else has, and has them
in another order. ``joint`` is trained on those that all have; ``pooled`` is the same network on all columns of the same
entities, ``alone`` on the first party's columns of all of its entities; forests beside them. With ``label epsilon`` the
labels are told the joint network by chance. Parties are in processes of their own, in one run in this one: same bits.

Run: python benchmarks/joint.py [--quick] [--data DIR] [--seeds N]. Five seeds; --quick: two.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from _common import bar, finish, parser
from fanbu.progress import bar as progress_bar
from fanbu.tables.joint import Here, JointClassifier
from fanbu.tables.party import Party
from fanbu.transport.session import processes
from meta_forest import _points, _rows, difference, forest, over_seeds, shown

Array = np.ndarray[Any, Any]
PARTIES, LACKS = 3, 0.1
EPSILONS = (4.0, 2.0, 1.0)


@dataclass(frozen=True)
class Table:
    """All domains as one table: numbers by party, labels, and each test row's domain."""

    train: list[Array]
    test: list[Array]
    train_y: Array
    test_y: Array
    test_domain: Array


def read(folder: Path) -> Table:
    """Columns by turns; words become one column a word of the training rows."""
    names = sorted(p.parent.name for p in folder.glob("*/train.jsonl.gz"))
    raw = {s: [(n, r) for n in names for r in _rows(folder / n / f"{s}.jsonl.gz")] for s in ("train", "test")}
    if not raw["train"]:
        sys.exit(f"no tables in {folder}; give their folder with --data")
    first = raw["train"][0][1]["x"]
    keys = list(first)
    words = {k: sorted({r["x"][k] for _, r in raw["train"]}) for k in keys if isinstance(first[k], str)}

    def columns(split: str, party: int) -> Array:
        rows = [r["x"] for _, r in raw[split]]
        found = []
        for key in keys[party::PARTIES]:
            found += [[float(r[key] == w) for r in rows] for w in words[key]] if key in words else [
                [float(r[key]) for r in rows]
            ]  # fmt: skip
        return np.array(found).T

    labels = {s: np.array([r["label"] for _, r in rows]) for s, rows in raw.items()}
    train, test = ([columns(s, p) for p in range(PARTIES)] for s in ("train", "test"))
    return Table(train, test, labels["train"], labels["test"], np.array([n for n, _ in raw["test"]]))


def held(table: Table, number: int, seed: int, split: str) -> Party:
    """A party that is not the first, with the entities that it has."""
    x = getattr(table, split)[number]
    random = np.random.default_rng([seed, number])
    order = random.permutation(len(x))
    if split == "test":
        return Party(f"party {number}", [f"test {i}" for i in order], x[order])
    some = order[int(LACKS * len(x)) :]
    ids = [f"train {i}" for i in some] + [f"party {number}'s own {i}" for i in range(int(LACKS * len(x)))]
    extra = random.integers(len(x), size=int(LACKS * len(x)))
    return Party(f"party {number}", ids, np.concatenate([x[some], x[extra]]), seed=seed)


class Counting:
    """A session that counts what crosses."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.bytes, self.asked = inner, 0, 0
        self.names = inner.names

    def ask(self, name: str, what: str, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """The party's answer."""
        said: dict[str, Array] = self.inner.ask(name, what, arrays)
        self.bytes += sum(a.nbytes for a in (*arrays.values(), *said.values()))
        self.asked += 1
        return said


def joint(table: Table, seed: int, session: Any, others: Sequence[Party], epsilon: float = 0.0) -> Array:
    """Answers on the test rows; the parties get their test entities where they are."""
    ids = [f"train {i}" for i in range(len(table.train_y))]
    own = Party("party 0", ids, table.train[0], seed=seed)
    model = JointClassifier(seed=seed, label_epsilon=epsilon).fit(own, table.train_y, session)
    own.hold([f"test {i}" for i in range(len(table.test_y))], table.test[0])
    for number, party in enumerate(others, 1):
        later = held(table, number, seed, "test")
        party.hold(later.ids, later.x)
    return model.predict(own, Here({p.name: p for p in others}))


def single(train: Array, y: Array, test: Array, seed: int, wide: int) -> Array:
    """The same network in one place."""
    party = Party("one", [str(i) for i in range(len(y))], train, seed=seed, width=16 * wide, hidden=64 * wide)
    model = JointClassifier(seed=seed).fit(party, y, Here({}))
    party.hold([str(i) for i in range(len(test))], test)
    return model.predict(party, Here({}))


def told(table: Table, seed: int) -> tuple[dict[str, dict[str, Array]], dict[str, Any]]:
    """Which test rows each way answers right, by domain; and what the joint one cost."""
    others = [held(table, n, seed, "train") for n in range(1, PARTIES)]
    known = set.intersection(*(set(p.ids) for p in others))
    shared = np.array([i for i in range(len(table.train_y)) if f"train {i}" in known])
    session, started = Counting(Here({p.name: p for p in others})), time.perf_counter()
    answers = joint(table, seed, session, others)
    cost = {"seconds": time.perf_counter() - started, "mb": session.bytes / 1e6, "questions": session.asked}
    cost["shared"] = len(shared)
    whole_train, whole_test = np.concatenate(table.train, 1), np.concatenate(table.test, 1)
    found = {"joint": answers}
    for epsilon in EPSILONS:
        again = [held(table, n, seed, "train") for n in range(1, PARTIES)]
        here = Here({p.name: p for p in again})
        found[f"joint, label epsilon {epsilon:g}"] = joint(table, seed, here, again, epsilon)
    found["pooled"] = single(whole_train[shared], table.train_y[shared], whole_test, seed, PARTIES)
    found["alone"] = single(table.train[0], table.train_y, table.test[0], seed, 1)
    found["forest, pooled"] = forest(whole_train[shared], table.train_y[shared], seed).predict(whole_test)
    found["forest, alone"] = forest(table.train[0], table.train_y, seed).predict(table.test[0])
    right = {way: said == table.test_y for way, said in found.items()}
    names = np.unique(table.test_domain)
    return {way: {n: r[table.test_domain == n] for n in names} for way, r in right.items()}, cost


def apart(table: Table, folder: Path) -> bool:
    """Whether parties in processes of their own end with the same bits as here."""
    makers = {f"party {n}": (_made, (folder, n)) for n in range(1, PARTIES)}
    ids = [f"train {i}" for i in range(len(table.train_y))]
    found = []
    here = Here({f"party {n}": held(table, n, 0, "train") for n in range(1, PARTIES)})
    with processes(makers) as there:
        for session in (here, there):
            own = Party("party 0", ids, table.train[0])
            model = JointClassifier(epochs=3).fit(own, table.train_y, session)
            found.append({k: v.numpy() for k, v in model._top.state_dict().items()})
    return all(np.array_equal(found[0][k], found[1][k]) for k in found[0])


def _made(folder: Path, number: int) -> Party:
    return held(read(folder), number, 0, "train")


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 5, with --quick 2")
    args = flags.parse_args()
    table, seeds = read(args.data), args.seeds or (2 if args.quick else 5)
    runs = []
    with progress_bar() as progress:
        for seed in range(seeds):
            progress("seeds", seed, seeds)
            runs.append(told(table, seed))
    right = over_seeds([r for r, _ in runs])
    costs = [c for _, c in runs]
    cost = {k: float(np.median([c[k] for c in costs])) for k in ("seconds", "mb", "questions")}
    print(shown(right), flush=True)
    bars = []
    d = difference(right["joint"], right["pooled"])
    bars.append(bar("joint beside all columns in one place", _points(d), ">= -0.5", d["delta"] >= -0.5))
    d = difference(right["joint"], right["alone"])
    bars.append(bar("joint beside the first party alone", _points(d), "interval above 0", d["low"] > 0))
    same = apart(table, args.data)
    bars.append(bar("parties in processes of their own", "the same bits" if same else "other bits", "the same", same))
    shared = [c["shared"] for c in costs]
    text = (
        f"{shown(right)}\n\n{seeds} seed(s), {len(table.train_y)} training entities, {shared[0]} of them known to "
        f"all three parties in the first seed; one run took {cost['seconds']:.0f} s, {cost['questions']:.0f} questions "
        f"and {cost['mb']:.0f} MB (median)"
    )
    values = {"told": {w: {n: float(r.mean()) for n, r in by.items()} for w, by in right.items()}, "cost": cost}
    return finish("joint-quick" if args.quick else "joint", text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
