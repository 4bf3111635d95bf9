"""Merging weights on real domains: every way of the weights and statistics families beside joint training and distill.

Specialists are fine-tuned from one base (the probed incumbent of a round). A method's grid is decided on validation
rows of the first seed, at the owners; test rows are read once, with the setting chosen.

``+ heads``: label rows that owners fitted anew with their labels on the merged body (a probe: a matrix of labels x
hidden a domain crosses) stand in the place of the specialists'. ``+ surgery``: the same without labels, bent so that
merged features mean what the specialist's did. ``emr`` keeps a mask for each domain, so each is judged on a model of
its own. "nothing" in the column "needs" is without any data, but for the few validation rows that choose a scale.

Run: python benchmarks/weights.py [--quick] [--data DIR] [--work DIR] [--seeds N] [--only METHOD ...]. A second run
resumes: what is in the work folder is not made again, so give a new folder after a change of code.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _outcomes import Outcomes, mean_over_seeds, score, usable
from _specialists import Bench, difference, judged, mean, prepare
from fanbu.catalogue import method
from fanbu.judge.compare import gain_kept
from fanbu.judge.evaluate import evaluate
from fanbu.machine import resolve_machine
from fanbu.merging.masks import only
from fanbu.model import Model
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.types import Context, ProbeSet

TUNE = {"epochs": 3, "lr": 3e-4}
ROWS = 1000
JUDGED = {"train": ROWS, "valid": 60, "test": 400}  # rows of a domain that merged models are chosen and judged on
ALIGNED = 100  # probe texts of a domain on which label rows are put on one level
BY_MERGEKIT = ("average", "task_arithmetic", "ties", "dare", "della", "breadcrumbs", "model_stock", "karcher")


@dataclass(frozen=True)
class Way:
    """One line of the table: a method, the settings that validation rows decide between, what it needs."""

    method: str
    grid: Mapping[str, Sequence[Any]]
    needs: str = "nothing"
    name: str = ""
    refit: Sequence[str] = ()  # also with label rows that owners fit anew on the merged body, by these methods
    masks: bool = False  # each domain has a model of its own, by its mask

    @property
    def label(self) -> str:
        """What it is called in the table."""
        return self.name or self.method

    @property
    def lines(self) -> dict[str, str]:
        """Its lines in the table, and what each of them needs."""
        more = {f"{self.label} + {OWNERS[m]}": f"{self.needs}; label rows by owners" for m in self.refit}
        return {self.label: self.needs, **more}

    def settings(self, quick: bool) -> list[dict[str, Any]]:
        """All points of the grid; with --quick the middle of each axis."""
        axes = {k: [v[len(v) // 2]] if quick else v for k, v in self.grid.items()}
        return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


SCALES = [0.1, 0.2, 0.3, 0.5]
STRONG = [0.3, 0.6, 1.0]
WAYS = [
    Way("average", {}, refit=("probe", "surgery")),
    Way("task_arithmetic", {"scale": SCALES}),
    Way("ties", {"scale": STRONG, "density": [0.2]}),
    Way("dare", {"scale": SCALES[:3], "density": [0.5]}),
    Way("della", {"scale": SCALES[:3], "density": [0.5]}),
    Way("breadcrumbs", {"scale": SCALES[:3]}),
    Way("model_stock", {}),
    Way("karcher", {}),
    Way("consensus", {"scale": SCALES[1:]}),
    Way("pcb", {"scale": STRONG}),
    Way("magmax", {"scale": STRONG}),
    Way("tsv_m", {"scale": STRONG}, refit=("probe",)),
    Way("iso_c", {"scale": STRONG}),
    Way("iso_cts", {"scale": STRONG}),
    Way("svc", {"scale": STRONG}),
    Way("wudi", {"scale": STRONG}),
    Way("opcm", {"scale": STRONG}),
    Way("emr", {}, "nothing; a mask of each domain is kept", masks=True),
    Way("fisher", {}, "statistics"),
    Way("regmean", {}, "statistics", refit=("probe", "surgery")),
    Way("regmean_plus", {}, "shared texts"),
    Way("adamerging", {"init": [0.3], "steps": [30]}, "shared texts"),
    Way("soup", {}, "some labels"),
    Way("distill", {"train": [{"epochs": 1, "lr": 2e-4}]}, "shared texts"),
    Way("multitask", {"train": [{"epochs": 2, "lr": 2e-4}]}, "all labels", "joint"),
]
OWNERS = {"probe": "heads", "surgery": "surgery"}  # what owners may add to a merged model, and its name in the table


def merged(bench: Bench, way: Way, setting: Mapping[str, Any], out: Path) -> tuple[Model, float]:
    """One candidate, and the seconds that contributions and absorbing took."""
    started, code = time.perf_counter(), method(way.method)
    sent = [code.contribute(s, bench.incumbent, bench.context, **setting) for s in bench.specialists]
    made = code.absorb(bench.incumbent, sent, out, bench.context, **setting)
    return made, time.perf_counter() - started


def refitted(bench: Bench, model: Model, name: str, out: Path) -> Model:
    """The same body with label rows that each owner fitted on it; few texts are enough to put them on one level."""
    few = [row for d in bench.domains for row in [r for r in bench.context.probe.rows if r.domain == d][:ALIGNED]]
    way, context = method(name), replace(bench.context, probe=ProbeSet(tuple(few)))
    sent = [way.contribute(s, model, context) for s in bench.specialists]
    return way.absorb(model, sent, out, context)


def validated(bench: Bench, model: Model) -> float:
    """The mean over domains of the told accuracy on validation rows."""
    rows = {name: replace(d, test=d.valid) for name, d in bench.domains.items()}
    return mean({name: evaluate(model, d, bench.context) for name, d in rows.items()}, "told")


def try_way(bench: Bench, way: Way, quick: bool, chosen: Mapping[str, Any] | None) -> dict[str, Any]:
    """The best setting by validation, its seconds; outcomes on test of it and of its refitted form are kept.

    ``chosen`` is the setting that the first seed's validation rows decided for, which later seeds take.
    """
    note = bench.folder / "outcomes" / f"{way.label}.json"
    if note.exists():
        return dict(json.loads(note.read_text()))
    tries, best = [], None
    out = bench.folder / "try"
    settings = way.settings(quick) if chosen is None else [chosen]
    for number, setting in enumerate(settings):
        shutil.rmtree(out / str(number), ignore_errors=True)
        model, seconds = merged(bench, way, setting, out / str(number))
        value = validated(bench, model) if len(settings) > 1 else 0.0
        tries.append({"setting": setting, "valid": value, "seconds": seconds})
        log(f"{way.label} {setting}: valid {100 * value:.2f}, {seconds:.0f} s")
        if best is None or value > best[0]:
            best = (value, model, setting)
    assert best is not None
    if way.masks:
        own = {d: only(best[1], bench.incumbent, d, out / f"own-{d}", bench.context) for d in bench.domains}
        judged(bench, way.label, own)
    else:
        judged(bench, way.label, dict.fromkeys(bench.domains, best[1]))
    for name in way.refit:
        model = refitted(bench, best[1], name, out / name)
        judged(bench, f"{way.label} + {OWNERS[name]}", dict.fromkeys(bench.domains, model))
    shutil.rmtree(out)
    found = {"setting": best[2], "tries": tries}
    note.write_text(json.dumps(found))
    return found


def one_seed(
    bench: Bench, ways: Sequence[Way], quick: bool, first: Mapping[str, Any]
) -> tuple[dict[str, Outcomes], dict[str, Any]]:
    """Outcomes by name, and what was tried; ``first`` is what the first seed tried, nothing for itself."""
    found = {
        "probed base": judged(bench, "probed base", dict.fromkeys(bench.domains, bench.incumbent)),
        "specialists": judged(bench, "specialists", {s.domain.name: s.model for s in bench.specialists}),
    }
    tried = {}
    for way in ways:
        chosen = first[way.label]["setting"] if way.label in first else None
        tried[way.label] = try_way(bench, way, quick, chosen)
        for name in way.lines:
            found[name] = judged(bench, name, dict.fromkeys(bench.domains, bench.incumbent))
    return found, tried


def rows_of(found: Mapping[str, Outcomes], ways: Sequence[Way], tried: Mapping[str, Any]) -> list[list[str]]:
    """The table: told, untold, gain kept of the specialists', difference to the average of weights."""
    needs = {name: need for w in ways for name, need in w.lines.items()}
    base, full = found["probed base"], found["specialists"]
    rows = [["way", "needs", "told", "untold", "gain kept", "beside average", "seconds"]]
    for name, outcome in found.items():
        kept = gain_kept(outcome, base, full, "told", 0)
        against = difference(outcome, found["average"])
        seconds = tried.get(name.partition(" + ")[0], {}).get("tries", [{}])[0].get("seconds")
        untold = f"{100 * mean(outcome, 'untold'):.1f}" if all("untold" in c.tensors for c in outcome.values()) else "-"
        rows.append([
            name, needs.get(name, "-"), f"{100 * mean(outcome, 'told'):.1f}", untold,
            "-" if kept is None else f"{kept['value']:.2f} ({kept['low']:.2f} to {kept['high']:.2f})",
            f"{100 * against['delta']:+.1f} ({100 * against['low']:+.1f} to {100 * against['high']:+.1f})",
            "-" if seconds is None else f"{seconds:.0f}",
        ])  # fmt: skip
    return rows


def best_of(found: Mapping[str, Outcomes], names: Sequence[str]) -> str:
    """The name with the highest told accuracy."""
    return max((n for n in names if n in found), key=lambda n: mean(found[n], "told"))


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    flags.add_argument("--only", nargs="*", help="methods by their names in the table")
    args = flags.parse_args()
    folders = dict(list(usable(text_domains(args.data)).items())[: 4 if args.quick else 8])
    ways = [w for w in WAYS if not args.only or w.label in {"average", *args.only}]
    device, precision, threads = resolve_machine("auto", "auto", 0)
    runs: list[Mapping[str, Outcomes]] = []
    tried: dict[str, Any] = {}
    with progress_bar() as progress:
        for seed in range(args.seeds or (1 if args.quick else 3)):
            plain = Context(device=device, precision=precision, threads=threads, max_length=48, progress=progress)
            bench = prepare(folders, seed, args.work / "weights", plain, {"train": ROWS}, TUNE, JUDGED)
            outcomes, now = one_seed(bench, ways, args.quick, tried)
            tried = tried or now
            runs.append(outcomes)
    found = mean_over_seeds(runs)
    rows = rows_of(found, ways, tried)
    print(table(rows), flush=True)
    free = best_of(found, [w.label for w in ways if w.needs == "nothing"])
    fed = best_of(found, [n for w in ways for n, need in w.lines.items() if need.startswith("statistics")] or [free])
    owners = best_of(found, [n for w in ways for n in w.lines if " + " in n] or [free])
    peer = best_of(found, [w.label for w in ways if w.method in BY_MERGEKIT])
    bars = []
    bests = (("best without data", free), ("best with statistics", fed), ("best with label rows by owners", owners))
    for what, name in bests:
        for against in ("average", peer):
            d = difference(found[name], found[against])
            got = f"{name} {100 * d['delta']:+.2f} ({100 * d['low']:+.2f} to {100 * d['high']:+.2f})"
            bars.append(bar(f"{what} beside {against}", got, "interval above 0", d["low"] > 0))
    values = {
        "accuracy": {
            n: {d: {m: score(c, m) for m in ("told", "untold")} for d, c in o.items()} for n, o in found.items()
        },
        "tried": tried, "seeds": len(runs), "domains": list(folders),
    }  # fmt: skip
    text = table(rows) + f"\n\n{len(runs)} seed(s); domains: {', '.join(folders)}; at most {ROWS} training rows each"
    return finish("weights-quick" if args.quick else "weights", text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
