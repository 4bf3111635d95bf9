"""A speaker without labels: what other speakers' specialists of spoken digits teach the large network for one's sake.

Each speaker in turn is the target: its training recordings are there without labels, and nothing of it trained anything
else. ``probed base``, ``multitask``: what the other speakers' label rows, and their labelled recordings, make of it.
``adapt`` sees their answers alone; ``coral`` sees their features' covariance, ``dann`` their labelled recordings.
``specialist``: the target's own, which all its labels taught: what there was to be known.

Run: python benchmarks/adapt.py [--quick] [--data DIR] [--work DIR] [--seeds N]. --quick: one seed.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from _common import bar, finish, parser, table
from _media_bodies import body
from _outcomes import Outcomes, mean_over_seeds
from _specialists import Bench, asking, contributions, difference, judged, made, mean, points
from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.machine import resolve_machine
from fanbu.model import Model
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.types import Context
from media import TEACH, TUNE, domains_of, opened

WAYS = {"multitask": {"train": TEACH}, "coral": {}, "dann": {"train": TEACH}, "adapt": {"train": TEACH}}


def specialists(domains: Mapping[str, Domain], work: Path, context: Context) -> dict[str, Specialist]:
    """One a speaker, all from the body, which knows none of them."""
    start = made(work / "audio-body-4", lambda out: body("audio", 4, out, replace(context, seed=0)))
    way, grown = method("finetune"), {}
    for name, d in domains.items():
        place = work / f"audio-{context.seed}" / "from-body" / name
        model = made(place, lambda out, d=d: way.shrink(start, d, out, context, train=TUNE))
        grown[name] = Specialist(model, d, start)
    return grown


def one_target(target: str, known: Mapping[str, Specialist], folder: Path, context: Context) -> dict[str, Outcomes]:
    """Outcomes on the target's test recordings, by way."""
    sources = {name: s.domain for name, s in known.items() if name != target}
    texts = {name: s.domain.train.texts for name, s in known.items()}
    context = replace(context, probe=asking(texts))
    base = made(folder / "large", lambda out: opened("audio", 4, out, sources, context))
    bench = Bench(folder, {target: known[target].domain}, context, base, [known[s] for s in sources])
    models = {"probed base": base, "specialist": known[target].model}
    models |= {name: made(folder / name, lambda out, name=name: _way(name, bench, out)) for name in WAYS}
    return {name: judged(bench, name, {target: model}) for name, model in models.items()}


def _way(name: str, bench: Bench, out: Path) -> Model:
    sent = contributions(bench, bench.specialists, f"sent-{name}", name)
    return method(name, "feedback").absorb(bench.incumbent, sent, out, bench.context, **WAYS[name])


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    args = flags.parse_args()
    device, precision, threads = resolve_machine("auto", "auto", 0)
    runs, work = [], args.work / "media"
    with progress_bar() as progress:
        for seed in range(args.seeds or (1 if args.quick else 3)):
            context = Context(device=device, precision=precision, threads=threads, progress=progress, seed=seed)
            known = specialists(domains_of("audio", args.data, work / "data"), work, context)
            found: dict[str, dict[str, object]] = {}
            for target in known:
                log(f"== {target}, seed {seed}")
                for name, outcome in one_target(target, known, work / f"without-{seed}-{target}", context).items():
                    found.setdefault(name, {}).update(outcome)
            runs.append(found)
    means = mean_over_seeds(runs)
    rows = [["way", *next(iter(means.values())), "mean"]]
    for name, outcome in means.items():
        by_target = [f"{100 * mean({d: c}, 'told'):.1f}" for d, c in outcome.items()]
        rows.append([name, *by_target, f"{100 * mean(outcome, 'told'):.1f}"])
    text = table(rows)
    print(text, flush=True)
    bars = []
    for name in ("probed base", "coral", "dann"):
        d = difference(means["adapt"], means[name])
        bars.append(bar(f"adapt beside {name}", points(d), ">= 0", d["delta"] >= 0))
    values = {"told": {n: mean(o, "told") for n, o in means.items()}, "seeds": len(runs)}
    return finish("adapt-quick" if args.quick else "adapt", f"{text}\n\n{len(runs)} seed(s)", values, bars)


if __name__ == "__main__":
    sys.exit(main())
