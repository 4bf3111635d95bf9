"""Owners with labels of their own, who train one large model at home: federated rounds beside pooled training.

Eight text domains are eight owners, whose labels are disjoint. All ways start from the probed base, see six epochs of
the training rows and are judged told and untold. ``multitask``: all rows in one place, the reference. ``as is``: plain
federated averaging, where an owner trains all label rows on its few labels and the centre averages everything, as
Flower's FedAvg does.

Run: python benchmarks/federated.py [--quick] [--data DIR] [--work DIR] [--only WAY ...]. A second run resumes. At most
1,000 rows a domain; --quick: 600. One seed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from _common import bar, finish, parser, table, text_domains
from _outcomes import Outcomes, mean_over_seeds, usable
from _specialists import Bench, asking, difference, judged, limited, made, mean, points, probed
from fanbu.batches import encode, pad_id
from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.contribution import open_contribution
from fanbu.domain import Domain, Specialist
from fanbu.heads import final_layer
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.objectives import labelled
from fanbu.predict import limit
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.recipe import resolve_machine
from fanbu.train import train as train_network
from fanbu.types import Context, Inner, Train

TIMES = 6
LOCAL = {"epochs": 1, "lr": 2e-4, "warmup": 0.0, "schedule": "constant", "patience": 0}
POOLED = {"epochs": TIMES, "lr": 2e-4}
ROWS = {True: {"train": 600, "valid": 100, "test": 1000}, False: {"train": 1000, "valid": 300, "test": 1000}}


def multitask(bench: Bench, out: Path) -> Model:
    """All rows in one place."""
    way = method("multitask")
    sent = [way.contribute(s, bench.incumbent, bench.context) for s in bench.specialists]
    return way.absorb(bench.incumbent, sent, out, bench.context, train=POOLED)


def inner_rounds(name: str, arguments: dict[str, Any], bench: Bench, out: Path) -> Model:
    """A federated way, ``TIMES`` times over, each contribution through its owner's boundary."""
    model, way = bench.incumbent, method(name)
    for number in range(TIMES):
        folder = out.with_name(f"{out.name}-rounds") / str(number)
        before = folder.with_name(str(number - 1))
        sent = []
        for s in bench.specialists:
            place = folder / s.domain.name
            if not (place / "sent" / "contribution.json").exists():
                log(f"{name}: inner round {number + 1} of {TIMES}, {s.domain.name}")
                context = replace(bench.context, inner=_inner(number, before / s.domain.name, place, before))
                cross(way.contribute(s, model, context, **arguments), s.domain.share, place / "sent")
            sent.append(open_contribution(place / "sent"))
        context = replace(bench.context, inner=_inner(number, before, folder, before))
        model = made(
            out if number == TIMES - 1 else folder / "model", partial(_absorb, way, model, sent, context, arguments)
        )
    return model


def _inner(number: int, before: Path, after: Path, centre: Path) -> Inner:
    states = [p if p.is_dir() else None for p in (before / "state", centre / "said")]
    return Inner(number, states[0], after / "state", states[1], after / "said")


def _absorb(way: Any, model: Model, sent: Any, context: Context, arguments: dict[str, Any], out: Path) -> Model:
    return way.absorb(model, sent, out, context, **arguments)


def as_is(bench: Bench, out: Path) -> Model:
    """Every owner trains all label rows on its few labels, and everything is averaged by rows."""
    model = bench.incumbent
    for number in range(TIMES):
        last = number == TIMES - 1
        place = out if last else out.with_name(f"{out.name}-{number}")
        model = made(place, partial(_averaged, bench, model, number))
    return model


def _averaged(bench: Bench, start: Model, number: int, out: Path) -> Model:
    network, tokenizer = load_network(start), load_tokenizer(start)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    total = {k: torch.zeros_like(v) for k, v in before.items() if v.is_floating_point()}
    rows = sum(len(d.train) for d in bench.domains.values())
    context = replace(bench.context, inner=Inner(number))
    for name, d in bench.domains.items():
        network.load_state_dict(before)
        _at_home(network, tokenizer, d, start, context, f"as is {number + 1} {name}")
        for key, value in network.state_dict().items():
            if key in total:
                total[key] += len(d.train) / rows * value
    network.load_state_dict({**before, **total})
    return save_network(network, tokenizer, out, provenance("fedavg", [start], context))


def _at_home(network: Any, tokenizer: Any, d: Domain, start: Model, context: Context, name: str) -> None:
    sequences = encode(tokenizer, d.train.texts, limit(network, context))
    numbers = [start.labels.index(d.full_labels[i]) for i in d.train.labels or ()]
    loss = labelled(sequences, numbers, pad_id(tokenizer), context.device)
    lengths, head = [len(s) for s in sequences], final_layer(network)
    train_network(network, lengths, loss, Train(**LOCAL), context, name, head=head)


WAYS: dict[str, Callable[[Bench, Path], Model]] = {
    "multitask": multitask,
    "fedavg": partial(inner_rounds, "fedavg", {"train": LOCAL}),
    "as is": as_is,
    "fedprox": partial(inner_rounds, "fedprox", {"train": LOCAL}),
    "fedavgm": partial(inner_rounds, "fedavgm", {"train": LOCAL, "momentum": 0.5}),
    "fedadam": partial(inner_rounds, "fedadam", {"train": LOCAL}),
}


def one(bench: Bench, names: list[str]) -> dict[str, Outcomes]:
    """Outcomes by name."""
    found = {"probed base": judged(bench, "probed base", dict.fromkeys(bench.domains, bench.incumbent))}
    for name in names:
        log(f"== {name}")
        model = made(bench.folder / name.replace(" ", "-"), partial(WAYS[name], bench))
        found[name] = judged(bench, name, dict.fromkeys(bench.domains, model))
    return found


def bars_of(found: dict[str, Outcomes]) -> list[dict[str, Any]]:
    """What was promised."""
    bars = []
    if "fedavg" in found and "multitask" in found:
        share = mean(found["fedavg"], "told") / mean(found["multitask"], "told")
        apart = points(difference(found["fedavg"], found["multitask"]))
        bars.append(bar("fedavg beside pooled training, told", f"{share:.3f}, {apart}", ">= 0.97", share >= 0.97))
    if "fedavg" in found and "as is" in found:
        d = difference(found["fedavg"], found["as is"])
        bars.append(bar("fedavg beside plain averaging of all rows, told", points(d), "interval above 0", d["low"] > 0))
    return bars


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = flags.parse_args()
    folders = dict(list(usable(text_domains(args.data)).items())[:8])
    device, precision, threads = resolve_machine("auto", "auto", 0)
    rows = ROWS[args.quick]
    with progress_bar() as progress:
        domains = {name: limited(name, path, rows) for name, path in folders.items()}
        probe = asking({d.name: d.train.texts for d in domains.values()})
        context = Context(
            device=device, precision=precision, threads=threads, max_length=64, progress=progress, probe=probe
        )
        folder = args.work / ("federated-quick" if args.quick else "federated")
        base = made(folder / "incumbent", lambda out: probed(domains, out, context))
        bench = Bench(folder, domains, context, base, [Specialist(base, d, base) for d in domains.values()])
        found = one(bench, args.only)
    found = mean_over_seeds([found])
    rows_of_table = [["way", *domains, "told", "untold"]]
    for name, outcome in found.items():
        by_domain = [f"{100 * mean({d: c}, 'told'):.1f}" for d, c in outcome.items()]
        told, untold = (f"{100 * mean(outcome, m):.1f}" for m in ("told", "untold"))
        rows_of_table.append([name, *by_domain, told, untold])
    text = table(rows_of_table)
    print(text, flush=True)
    values = {n: {m: mean(o, m) for m in ("told", "untold")} for n, o in found.items()}
    name = "federated-quick" if args.quick else "federated"
    return finish(name, f"{text}\n\n1 seed; at most {rows['train']} training rows a domain", values, bars_of(found))


if __name__ == "__main__":
    sys.exit(main())
