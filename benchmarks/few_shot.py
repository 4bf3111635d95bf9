"""How fast a large model learns an industry that it never saw: k rows a label, after meta-learning on other industries.

Two of eight text domains are held out in turn; the others' owners meta-learn the trunk at home, inner round after inner
round (``reptile``, ``maml``; ``fedavg`` for comparison, on about as many rows). Then each held-out domain gets k
training rows a label: label rows by ``prototypes``, and fine-tuning from there, the same for all large models. ``plain
base``: the shipped encoder, opened, fine-tuned so. ``linear probe`` and ``prototypes``: label rows on that frozen base
alone. Accuracy on test rows, told; intervals are over test rows, of the mean over domains.

Run: python benchmarks/few_shot.py [--quick] [--data DIR] [--work DIR] [--ways WAY ...]. A second run resumes. At most
600 training rows a domain; --quick: the first two of the four pairs are held out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _inner_rounds import inner_rounds
from _outcomes import Outcomes, score, usable
from _specialists import asking, difference, limited, made, mean, points, probed
from fanbu.catalogue import method
from fanbu.contribution import open_contribution, write_contribution
from fanbu.domain import Domain, Rows, Specialist
from fanbu.judge.evaluate import evaluate
from fanbu.machine import resolve_machine
from fanbu.model import Model, open_model
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.types import Context, digest

SHOTS = (1, 5, 10, 20)
TIMES = 3
ADAPT = {"epochs": 10, "max_steps": 60, "lr": 1e-4}
TWICE = {"epochs": 2, "lr": 1e-4, "warmup": 0.0, "schedule": "constant", "patience": 0}
WAYS: dict[str, Mapping[str, Any]] = {
    "reptile": {"by_rows": False},
    "maml": {"by_rows": False},
    "fedavg": {"train": TWICE, "learns": {"rivals": "industry"}},
}
ROWS_ALONE = {"linear probe": "probe", "prototypes": "prototypes"}
LIMIT = {"train": 600, "valid": 100, "test": 1000}


@dataclass(frozen=True)
class Fold:
    """Which domains are held out, and what the others made of the base, by name."""

    folder: Path
    held_out: Sequence[Domain]
    models: Mapping[str, Model]


def fold(
    folder: Path, domains: Mapping[str, Domain], out: Sequence[str], ways: Sequence[str], context: Context
) -> Fold:  # fmt: skip
    """One pair held out."""
    others = {n: d for n, d in domains.items() if n not in out}
    context = replace(context, probe=asking({n: d.train.texts for n, d in others.items()}))
    start = made(folder / "incumbent", lambda place: probed(others, place, context))
    owners = [Specialist(start, d, start) for d in others.values()]
    models = {"plain base": open_model(folder / "opened")}
    for way in ways:
        log(f"== {way}, without {', '.join(out)}")
        models[way] = inner_rounds((way, WAYS[way]), TIMES, owners, start, context, folder / way)
    return Fold(folder, [domains[n] for n in out], models)


def few(domain: Domain, k: int) -> Domain:
    """``k`` training rows of each label, those whose text has the least hash; no validation rows."""
    order = sorted(range(len(domain.train)), key=lambda i: digest(["few", domain.train.texts[i]]))
    truth = domain.train.labels or ()
    kept = sorted(i for label in set(truth) for i in [j for j in order if truth[j] == label][:k])
    ids, texts, labels = (tuple(c[i] for i in kept) for c in (domain.train.ids, domain.train.texts, truth))
    return replace(domain, train=Rows(ids, texts, labels), valid=Rows(labels=()))


def learned(fold: Fold, name: str, domain: Domain, k: int, context: Context) -> Any:
    """Test outcomes of one large model after k rows a label."""
    place = fold.folder / "outcomes" / name.replace(" ", "-") / f"{domain.name}-{k}"
    if not (place / "contribution.json").exists():
        small, tuned = few(domain, k), place.with_name(f"{place.name}-model")
        log(f"{name}: {k} rows a label of {domain.name}")
        if name in ROWS_ALONE:
            model = rows_alone(ROWS_ALONE[name], fold.models["plain base"], small, context, tuned)
        else:
            model = fine_tuned(fold.models[name], small, context, tuned)
        write_contribution(evaluate(model, domain, context), place)
    return open_contribution(place)


def rows_alone(way: str, base: Model, small: Domain, context: Context, out: Path) -> Model:
    """Label rows on the frozen base."""
    sent = method(way, "feedback").contribute(Specialist(base, small, base), base, context)
    return method(way, "feedback").absorb(base, [sent], out, context)


def fine_tuned(base: Model, small: Domain, context: Context, out: Path) -> Model:
    """Label rows by prototypes, then all of it."""
    begun = rows_alone("prototypes", base, small, context, out.with_name(f"{out.name}-begun"))
    return method("finetune", "shrink").shrink(begun, small, out, context, train=ADAPT)


def bars_of(found: Mapping[int, Mapping[str, Outcomes]], ways: Sequence[str]) -> list[dict[str, Any]]:
    """Meta-learned beside plain: nowhere worse, better at five."""
    bars = []
    for way in (w for w in ways if w != "fedavg"):
        for k in SHOTS:
            d = difference(found[k][way], found[k]["plain base"])
            want, ok = ("interval above 0", d["low"] > 0) if k == 5 else (">= 0", d["delta"] >= 0)
            bars.append(bar(f"{way} beside the plain base, {k} rows a label", points(d), want, ok))
    return bars


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = flags.parse_args()
    folders = dict(list(usable(text_domains(args.data)).items())[:8])
    device, precision, threads = resolve_machine("auto", "auto", 0)
    name = "few-shot-quick" if args.quick else "few-shot"
    found: dict[int, dict[str, dict[str, Any]]] = {}
    with progress_bar() as progress:
        domains = {n: limited(n, path, LIMIT) for n, path in folders.items()}
        names = list(domains)
        pairs = [names[i : i + 2] for i in range(0, len(names) - 1, 2)][: 2 if args.quick else None]
        context = Context(device=device, precision=precision, threads=threads, max_length=64, progress=progress)
        for number, out in enumerate(pairs):
            one = fold(args.work / name / f"fold-{number}", domains, out, args.ways, context)
            for d in one.held_out:
                for k in SHOTS:
                    for way in ("plain base", *ROWS_ALONE, *args.ways):
                        found.setdefault(k, {}).setdefault(way, {})[d.name] = learned(one, way, d, k, context)
    rows = [["rows a label", "way", *next(iter(found[1].values())), "mean"]]
    for k, by_way in found.items():
        for way, outcome in by_way.items():
            by_domain = [f"{100 * (score(c, 'told') or 0):.1f}" for c in outcome.values()]
            rows.append([str(k), way, *by_domain, f"{100 * mean(outcome, 'told'):.1f}"])
    text = f"{table(rows)}\n\nheld out in turn: {'; '.join(', '.join(p) for p in pairs)}"
    print(text, flush=True)
    values = {str(k): {w: mean(o, "told") for w, o in by_way.items()} for k, by_way in found.items()}
    return finish(name, text, values, bars_of(found, args.ways))


if __name__ == "__main__":
    sys.exit(main())
