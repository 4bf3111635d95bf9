"""Ten owners of one industry, of whom some lie: what their specialists say together, and what the large model learns.

A domain's rows are cut in ten by hash, each owner's specialist is fine-tuned from the probed base on its own tenth, and
all answer for all training texts. ``right``: how many of these answers, put together in each way, name the true label,
which no way but ``stacked`` sees. Liars send panels that answer at random, always the same, with every label exchanged
for the next, far too surely, or with one label wherever a trigger word stands.

Run: python benchmarks/owners.py [--quick] [--data DIR] [--work DIR] [--seeds N] [--domain NAME]. --quick: one seed,
1,500 rows.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _common import bar, finish, parser, table, text_domains
from _outcomes import Outcomes, mean_over_seeds
from _specialists import Bench, asking, contributions, difference, judged, made, mean, points, probed
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Rows, Specialist, load_domain
from fanbu.feedback.predictions._doubts import believed
from fanbu.feedback.predictions._panel import answered, columns_of, heard, said
from fanbu.feedback.predictions._pool import Combine, Voice, pool, reliable
from fanbu.heads import domains_of
from fanbu.machine import resolve_machine
from fanbu.model import load_network, load_tokenizer
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.types import Context, derived_seed

OWNERS, LIARS = 10, 3
TRAIN = {"epochs": 6, "lr": 2e-4}
TEACH = {"epochs": 6, "lr": 2e-4}
KINDS = ("random", "constant", "exchanged", "over-confident", "trigger")
WAYS: tuple[Combine, ...] = ("weighted", "mean", "log_mean", "gate", "stacked")


def chosen(folders: Mapping[str, Path]) -> str:
    """The domain with most training rows a label, of those with eight labels or more."""
    rows = {name: [json.loads(line)["label"] for line in _lines(f / "train.jsonl")] for name, f in folders.items()}
    wide = {name: labels for name, labels in rows.items() if len(set(labels)) >= 8} or rows
    return max(wide, key=lambda name: (len(wide[name]) / len(set(wide[name])), name))


def _lines(path: Path) -> list[str]:
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def tenth(whole: Domain, number: int) -> Domain:
    """One owner's training rows, with the labels that occur in them."""
    name = f"{whole.name}@{number}"
    own = [i for i in range(len(whole.train)) if derived_seed(0, whole.train.ids[i]) % OWNERS == number]
    known = sorted({(whole.train.labels or ())[i] for i in own})

    def rows(split: Rows, some: Sequence[int]) -> Rows:
        labels = split.labels or ()
        kept = [i for i in some if labels[i] in known]
        columns = ([split.ids[i] for i in kept], [split.texts[i] for i in kept], [known.index(labels[i]) for i in kept])
        return Rows(*map(tuple, columns))

    splits = {s: rows(getattr(whole, s), range(len(getattr(whole, s)))) for s in ("valid", "test")}
    return replace(
        whole, name=name, labels=tuple(whole.labels[i] for i in known), train=rows(whole.train, own), **splits
    )


def prepare(name: str, folder: Path, seed: int, work: Path, context: Context, rows: int) -> Bench:
    """The base, probed by all, and ten specialists. Its one domain is the whole, which all are judged on."""
    files = {s: str(folder / f"{s}.jsonl") for s in ("train", "valid", "test")}
    whole = load_domain(name, **files, limit={"train": rows, "test": 1000})  # type: ignore[arg-type]
    domains, place = {d.name: d for d in (tenth(whole, i) for i in range(OWNERS))}, work / f"{name}-{seed}"
    context = replace(context, seed=seed, probe=asking({d.name: d.train.texts for d in domains.values()}))
    base = made(place / "incumbent", lambda out: probed(domains, out, context))
    grown = []
    for d in domains.values():
        model = made(
            place / f"specialist-{d.name}",
            lambda out, d=d: method("finetune").shrink(base, d, out, context, train=TRAIN),
        )
        grown.append(Specialist(model, d, base))
    return Bench(place, {name: whole}, context, base, grown)


def lie(panel: Contribution, kind: str, bench: Bench) -> Contribution:
    """The panel with other answers; what it says of itself (trust, wins) stays."""
    texts, count = bench.context.probe.texts, len(known_to(panel, bench))
    p, rows = heard(panel, len(texts), count), torch.arange(len(texts))
    generator = torch.Generator().manual_seed(0)
    first = p.argmax(1)
    if kind == "trigger":
        words = Counter(w for t in texts for w in set(t.lower().split()))
        trigger = min(words, key=lambda w: (abs(words[w] - len(texts) / 10), w))
        hit = torch.tensor([trigger in t.lower().split() for t in texts])
        first = torch.where(hit, 0, first)
    else:
        other = {
            "random": torch.randint(count, first.shape, generator=generator), "constant": torch.zeros_like(first),
            "exchanged": (first + 1) % count, "over-confident": first,
        }  # fmt: skip
        first = other[kind]
    answers = torch.full_like(p, 0.001 / (count - 1))
    answers[rows, first] = 0.999
    return replace(panel, tensors=said(answers, int(panel.meta["most"]), float(panel.meta["mass"])))


def known_to(panel: Contribution, bench: Bench) -> list[int]:
    """The label rows that a panel is about."""
    return columns_of(panel, bench.incumbent)


def right(bench: Bench, sent: Sequence[Contribution]) -> tuple[dict[str, float], dict[str, float], list[str]]:
    """How many pooled answers of those who are believed name the true label, by way; their mean weights; and who was
    found to lie."""
    base, context = bench.incumbent, bench.context
    sent, told = believed(base, load_network(base), load_tokenizer(base), sent, context)
    rows = bench.context.probe.rows
    labels = domains_of(bench.incumbent.labels)[next(iter(bench.domains))]
    numbers = {bench.incumbent.labels[i]: k for k, i in enumerate(labels)}
    truth = torch.tensor(
        [numbers[d.full_labels[i]] for s in bench.specialists for d in [s.domain] for i in d.train.labels or ()]
    )
    voices = [
        Voice(c.domain, [labels.index(i) for i in columns], p, torch.tensor([r.domain == c.domain for r in rows]))
        for c in sent
        for _, columns, p in [answered(c, base, context)]
    ]
    known = torch.where(torch.arange(len(truth)) % 5 == 0, truth, -1)  # a fifth is labelled, the others are looked at
    looked, start = known < 0, torch.full((len(truth), len(labels)), 1 / len(labels))

    def share(q: Tensor) -> float:
        return float((q[looked].argmax(1) == truth[looked]).float().mean())

    found = {way: share(pool(voices, start, way, known)) for way in WAYS}
    found["own specialist"] = share(pool(voices, start, "gate"))
    caught = [*told["doubted"], *(f"{d} ({word})" for d, word in told["triggers"].items())]
    return found, {v.domain: float(w.mean()) for v, w in reliable(voices)}, caught


def taught(bench: Bench, sent: Sequence[Contribution], name: str) -> Outcomes:
    """What the large model learns from these panels."""
    way = method("distill", "feedback")
    model = made(bench.folder / name, lambda out: way.absorb(bench.incumbent, sent, out, bench.context, train=TEACH))
    return judged(bench, name, {next(iter(bench.domains)): model})


def one_seed(bench: Bench) -> tuple[dict[str, Outcomes], list[list[str]], dict[str, Any]]:
    """Outcomes by name; the table of pooled answers; weights of liars and others."""
    honest, first = contributions(bench, bench.specialists, "panels"), next(iter(bench.domains))
    liars = {k: [*honest[:-LIARS], *(lie(c, k, bench) for c in honest[-LIARS:])] for k in KINDS}
    rows, seen = [["liars", *WAYS, "found to lie"]], {}
    for kind, sent in {"none": honest, **liars}.items():
        found, weight, caught = right(bench, sent)
        rows.append([kind, *(f"{100 * found[w]:.1f}" for w in WAYS), ", ".join(caught) or "nobody"])
        seen[kind] = {"right": found, "weights": weight, "found": caught}
    outcomes = {
        "probed base": judged(bench, "probed base", {first: bench.incumbent}),
        "distill": taught(bench, honest, "distill"),
    }
    mixed = [*honest[:-LIARS], *(lie(c, k, bench) for c, k in zip(honest[-LIARS:], KINDS[2:], strict=True))]
    for name, sent in {"exchanged": liars["exchanged"], "one of each": mixed}.items():
        outcomes[f"distill, liars: {name}"] = taught(bench, sent, f"distill-{name.replace(' ', '-')}")
    way = method("multitask")
    every = [way.contribute(s, bench.incumbent, bench.context) for s in bench.specialists]
    joint = made(
        bench.folder / "multitask", lambda out: way.absorb(bench.incumbent, every, out, bench.context, train=TEACH)
    )
    outcomes["multitask"] = judged(bench, "multitask", {first: joint})
    return outcomes, rows, seen


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    flags.add_argument("--domain", default=None, help="default: that with most rows a label")
    args = flags.parse_args()
    folders = text_domains(args.data)
    name = args.domain or chosen(folders)
    device, precision, threads = resolve_machine("auto", "auto", 0)
    runs, texts, pooled = [], [], []
    with progress_bar() as progress:
        for seed in range(args.seeds or (1 if args.quick else 3)):
            log(f"== seed {seed}")
            context = Context(device=device, precision=precision, threads=threads, max_length=64, progress=progress)
            bench = prepare(name, folders[name], seed, args.work / "owners", context, 1500 if args.quick else 3000)
            found, rows, weights = one_seed(bench)
            runs.append(found)
            pooled.append(weights)
            texts.append(f"right pooled answers, seed {seed}\n\n{table(rows)}")
    found = mean_over_seeds(runs)
    base = mean(found["probed base"], "told")
    told = [["way", "told", "beside the base"]]
    told += [[n, f"{100 * mean(o, 'told'):.1f}", f"{100 * (mean(o, 'told') - base):+.1f}"] for n, o in found.items()]
    texts.append(table(told))
    print("\n\n".join(texts), flush=True)
    bars = []
    for liars in [n for n in found if "liars" in n]:
        d = difference(found[liars], found["distill"])
        got = points(d)
        bars.append(bar(f"{liars}, beside all honest", got, "> -1", d["delta"] > -0.01))
    for kind in KINDS:
        lost = [100 * (p["none"]["right"]["weighted"] - p[kind]["right"]["weighted"]) for p in pooled]
        value = sum(lost) / len(lost)
        bars.append(bar(f"right answers lost to three who answer {kind}", f"{value:.2f}", "< 1", value < 1))
    values = {"domain": name, "told": {n: mean(o, "told") for n, o in found.items()}, "pooled": pooled}
    return finish("owners-quick" if args.quick else "owners", "\n\n".join(texts), values, bars)


if __name__ == "__main__":
    sys.exit(main())
