"""Owners with rows of their own, who train one large model at home: federated rounds beside pooled training.

``disjoint``: eight text domains are eight owners, whose labels are disjoint; low-rank factors of the trunk and label
rows learn. All ways start from the probed base, see six epochs of the training rows and are judged told and untold.
``own rivals``: an owner's labels compete at home with its own alone, not with all that the model knows.
``multitask``: all rows in one place, by the same factors, the reference; ``all layers``: both, by whole weights. ``as
is``: every owner trains the whole model with all label rows on its few labels, and Flower's FedAvg averages everything.
``split``: the domain with the most labels is cut into ten owners by Dirichlet(0.1) over its labels; label rows learn
from nothing on frozen features; every strategy beside all rows in one place, over five seeds. ``lies``: the domain with
the most rows a label is cut evenly, three of ten owners are false, in three ways, under every aggregate, beside the
honest seven alone. ``private``: label rows of all domains learn from nothing on frozen features, with differential
privacy of a row at epsilon 8, 4 and 2 and delta 1e-5, and of a whole owner at 8, alone and in a secure sum.

Run: python benchmarks/federated.py [--quick] [--data DIR] [--work DIR] [--only PART ...] [--ways WAY ...] [--seeds N].
A second run resumes. At most 1,000 rows a domain; --quick: 600.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from _common import HERE, bar, finish, parser, table, text_domains
from _federated_split import LIES, STRATEGIES, lied_models, private_models, split_models
from _inner_rounds import inner_rounds
from _outcomes import Outcomes, mean_over_seeds, score, usable
from _peers import peer_python
from _specialists import Bench, asking, difference, judged, limited, made, mean, points, probed
from fanbu.batches import encode, pad_id
from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.heads import final_layer
from fanbu.machine import resolve_machine
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.objectives import labelled
from fanbu.predict import limit
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.train import train as train_network
from fanbu.types import Context, Inner, Train

TIMES = 6
LOW = {"layers": "lora", "rank": 16}
LOCAL = {"epochs": 1, "lr": 1e-3, "warmup": 0.0, "schedule": "constant", "patience": 0}
WHOLE = {**LOCAL, "lr": 2e-4}
POOLED_TRAIN = {"epochs": TIMES, "lr": 1e-3}
ROWS = {True: {"train": 600, "valid": 100, "test": 1000}, False: {"train": 1000, "valid": 300, "test": 1000}}
EPSILONS = (0.0, 8.0, 4.0, 2.0)
PARTS = ("disjoint", "split", "lies", "private")


def multitask(bench: Bench, out: Path, train: Mapping[str, Any], learns: Mapping[str, Any]) -> Model:
    """All rows in one place."""
    way = method("multitask")
    sent = [way.contribute(s, bench.incumbent, bench.context) for s in bench.specialists]
    return way.absorb(bench.incumbent, sent, out, bench.context, train=train, **learns)


def federated(name: str, arguments: Mapping[str, Any], bench: Bench, out: Path) -> Model:
    """A federated way, ``TIMES`` times over."""
    learns = {**LOW, **arguments.get("learns", {})}
    way = (name, {"train": LOCAL, **arguments, "learns": learns})
    return inner_rounds(way, TIMES, bench.specialists, bench.incumbent, bench.context, out)


def as_is(bench: Bench, out: Path) -> Model:
    """Every owner trains all label rows on its few labels, and Flower averages everything."""
    model, python = bench.incumbent, peer_python("flower", bench.folder.parent)
    for number in range(TIMES):
        last = number == TIMES - 1
        place = out if last else out.with_name(f"{out.name}-{number}")
        model = made(place, partial(_averaged, bench, python, model, number))
    return model


def _averaged(bench: Bench, python: Path, start: Model, number: int, out: Path) -> Model:
    network, tokenizer = load_network(start), load_tokenizer(start)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    context = replace(bench.context, inner=Inner(number))
    folder, sent = out.with_name("flower"), []
    folder.mkdir(parents=True, exist_ok=True)
    for name, d in bench.domains.items():
        network.load_state_dict(before)
        _at_home(network, tokenizer, d, start, context, f"as is {number + 1} {name}")
        save_file({k: v.contiguous() for k, v in network.state_dict().items()}, folder / f"{name}.safetensors")
        sent.append(f"{len(d.train)}={folder / f'{name}.safetensors'}")
    mean_file = folder / "mean.safetensors"
    subprocess.run([str(python), str(HERE / "_fedavg_flower.py"), str(mean_file), *sent], check=True)
    network.load_state_dict(load_file(mean_file))
    return save_network(network, tokenizer, out, provenance("fedavg", [start], context))


def _at_home(network: Any, tokenizer: Any, d: Domain, start: Model, context: Context, name: str) -> None:
    sequences = encode(tokenizer, d.train.texts, limit(network, context))
    numbers = [start.labels.index(d.full_labels[i]) for i in d.train.labels or ()]
    loss = labelled(sequences, numbers, pad_id(tokenizer), context.device)
    lengths, head = [len(s) for s in sequences], final_layer(network)
    train_network(network, lengths, loss, Train(**WHOLE), context, name, head=head)


WAYS: dict[str, Callable[[Bench, Path], Model]] = {
    "multitask": partial(multitask, train=POOLED_TRAIN, learns=LOW),
    "fedavg": partial(federated, "fedavg", {}),
    "fedavg, own rivals": partial(federated, "fedavg", {"learns": {"rivals": "industry"}}),
    "multitask, all layers": partial(multitask, train={**POOLED_TRAIN, "lr": WHOLE["lr"]}, learns={}),
    "fedavg, all layers": partial(federated, "fedavg", {"train": WHOLE, "learns": {"layers": "all"}}),
    "fedavg, all layers, own rivals": partial(
        federated, "fedavg", {"train": WHOLE, "learns": {"layers": "all", "rivals": "industry"}}
    ),
    "as is": as_is,
    "fedprox": partial(federated, "fedprox", {}),
    "fedavgm": partial(federated, "fedavgm", {"momentum": 0.5}),
    "fedadam": partial(federated, "fedadam", {}),
}


def disjoint(bench: Bench, names: Sequence[str]) -> tuple[dict[str, Outcomes], list[dict[str, Any]]]:
    """Outcomes by name, and bars."""
    found = {"probed base": judged(bench, "probed base", dict.fromkeys(bench.domains, bench.incumbent))}
    for name in names:
        log(f"== {name}")
        model = made(bench.folder / name.replace(", ", "-").replace(" ", "-"), partial(WAYS[name], bench))
        found[name] = judged(bench, name, dict.fromkeys(bench.domains, model))
    bars = []
    for what in ("", ", all layers"):
        if {f"fedavg{what}", f"multitask{what}"} <= found.keys():
            one, pooled = found[f"fedavg{what}"], found[f"multitask{what}"]
            share, apart = mean(one, "told") / mean(pooled, "told"), points(difference(one, pooled))
            name = f"fedavg{what}, beside pooled training, told"
            bars.append(bar(name, f"{share:.3f}, {apart}", ">= 0.97", share >= 0.97))
    if {"fedavg", "as is"} <= found.keys():
        d = difference(found["fedavg"], found["as is"])
        bars.append(bar("fedavg beside Flower's averaging of all rows", points(d), "interval above 0", d["low"] > 0))
    return found, bars


def largest(domains: Mapping[str, Domain]) -> Domain:
    """The domain with the most labels, which is hardest to cut."""
    return max(domains.values(), key=lambda d: (len(d.labels), d.name))


def outcomes_of(d: Domain, models: Mapping[Any, Model], bench: Bench, folder: Path) -> dict[str, Outcomes]:
    """Outcomes on the whole domain, by the model's name."""
    apart = replace(bench, folder=folder, domains={d.name: d})
    named = {name if isinstance(name, str) else ", ".join(name): model for name, model in models.items()}
    return {name: judged(apart, name, {d.name: model}) for name, model in named.items()}


def split(bench: Bench, seeds: int) -> tuple[dict[str, Outcomes], list[dict[str, Any]]]:
    """Ten owners of one domain by Dirichlet, and bars."""
    d, opened, runs = largest(bench.domains), open_model(bench.folder / "opened"), []
    for seed in range(seeds):
        folder, context = bench.folder / f"split-{seed}", replace(bench.context, seed=seed)
        runs.append(outcomes_of(d, split_models(d, opened, folder, context, list(STRATEGIES)), bench, folder))
    found = mean_over_seeds(runs)
    apart = difference(found["scaffold"], found["fedavg, SGD"])
    ok = apart["delta"] >= -0.005
    return found, [bar(f"scaffold beside fedavg by the same SGD, {seeds} seeds", points(apart), ">= -0.5", ok)]


def lies(bench: Bench) -> tuple[dict[str, Outcomes], list[dict[str, Any]]]:
    """Three of ten owners lie, and bars: what the most robust aggregate loses against nobody's lying and the mean."""
    opened, folder = open_model(bench.folder / "opened"), bench.folder / "lies"
    d = max(bench.domains.values(), key=lambda d: (len(d.train) / len(d.labels), d.name))
    found = outcomes_of(d, lied_models(d, opened, folder, bench.context), bench, folder)
    honest, bars = found["none, mean"], []
    for lie in LIES:
        for aggregate in ROBUST:
            apart = difference(found[f"{lie}, {aggregate}"], honest)
            what = f"{lie} by three of ten, {aggregate}, beside no lies and the mean"
            bars.append(bar(what, points(apart), ">= -1", apart["delta"] >= -0.01))
    return found, bars


def private(bench: Bench) -> tuple[dict[str, Outcomes], list[dict[str, Any]]]:
    """What privacy costs; no bar, but that more privacy is no free gain."""
    opened, folder = open_model(bench.folder / "opened"), bench.folder / "private"
    models = private_models(bench.domains, opened, folder, bench.context, EPSILONS)
    apart = replace(bench, folder=folder)
    found = {name: judged(apart, name, dict.fromkeys(bench.domains, model)) for name, model in models.items()}
    first, *others = (mean(o, "told") for n, o in found.items() if "whole" not in n)
    got = ", ".join(f"{100 * value:.1f}" for value in others)
    return found, [bar("told at epsilon 8, 4, 2", got, f"at most {100 * first:.1f}, without", max(others) <= first)]


ROBUST = ("multi_krum",)  # what the documentation recommends; the others are in the table


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--only", nargs="+", choices=PARTS, default=None, help="default: all parts")
    flags.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="of the part `disjoint`")
    flags.add_argument("--seeds", type=int, default=5, help="of the part `split`")
    args = flags.parse_args()
    folders = dict(list(usable(text_domains(args.data)).items())[:8])
    device, precision, threads = resolve_machine("auto", "auto", 0)
    rows, bars, values, texts = ROWS[args.quick], [], {}, []
    name = "federated-quick" if args.quick else "federated"
    with progress_bar() as progress:
        domains = {n: limited(n, path, rows) for n, path in folders.items()}
        probe = asking({d.name: d.train.texts for d in domains.values()})
        context = Context(
            device=device, precision=precision, threads=threads, max_length=64, progress=progress, probe=probe
        )
        base = made(args.work / name / "incumbent", lambda out: probed(domains, out, context))
        bench = Bench(args.work / name, domains, context, base, [Specialist(base, d, base) for d in domains.values()])
        for part in args.only or PARTS:
            found, more = {
                "disjoint": partial(disjoint, bench, args.ways), "split": partial(split, bench, args.seeds),
                "lies": partial(lies, bench), "private": partial(private, bench),
            }[part]()  # fmt: skip
            bars += more
            values[part] = {n: {m: mean(o, m) for m in ("told", "untold")} for n, o in found.items()}
            texts.append(f"{part}\n\n{shown(found)}")
            print(texts[-1], flush=True)
    text = "\n\n".join([*texts, f"at most {rows['train']} training rows a domain"])
    return finish("-".join([name, *(args.only or ())]), text, values, bars)


def shown(found: Mapping[str, Outcomes]) -> str:
    """Told accuracy by domain, and the means."""
    domains = next(iter(found.values()))
    rows = [["way", *domains, "told", "untold"]]
    for name, outcome in found.items():
        by_domain = [f"{100 * (score(c, 'told') or 0):.1f}" for c in outcome.values()]
        told, untold = (f"{100 * mean(outcome, m):.1f}" for m in ("told", "untold"))
        rows.append([name, *by_domain, told, untold])
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
