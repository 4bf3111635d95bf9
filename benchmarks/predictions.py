"""What specialists say, fed back: distilling from panels beside what users would do instead, on real domains.

All ways start from the probed base and see the domains' training texts, six epochs each; only multitask sees
labels. ``logit mean``: teachers' logits side by side over the union of labels, for every text, at temperature 4 (as
TextBrewer distils from several teachers). ``one after the other``: a domain at a time, from its own teacher.

Parts: ``main``; ``sizes``: the same from specialists of 1/2, 1/4, 1/8 of the parameters and from some that grew from
nothing with a tokenizer of their own, by turns; ``weak``: from specialists of 1/8 that labels alone taught, with and
without the auxiliary confidence loss; ``synthetic``: the same as ``main`` where no text of a domain leaves its owner,
with synthetic ones instead, twice as many as there are training texts, for three epochs at half the rate; ``far``: with
the training texts of the domains that are left over, which are nobody's here.
``then rows``: owners then fitted their label rows on what this made, at home (`distill`, `probe`).

Run: python benchmarks/predictions.py [--quick] [--data DIR] [--work DIR] [--seeds N] [--only PART ...]. A second run
resumes: what is in the work folder is not made again, so give a new folder after a change of code. At most 1,000 rows a
domain and three seeds, for one night on two cores; --quick: 600 rows and one seed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _common import bar, finish, parser, table, text_domains
from _outcomes import Outcomes, mean_over_seeds, score, usable
from _small_specialists import mixed, weak
from _specialists import (
    Bench,
    asking,
    contributions,
    difference,
    judged,
    limited,
    made,
    mean,
    points,
    prepare,
    probed,
    scores,
)
from fanbu.batches import Sequences, collate, encode, pad_id
from fanbu.catalogue import method
from fanbu.data.synthetic import synthetic
from fanbu.domain import Specialist
from fanbu.heads import final_layer
from fanbu.judge.compare import compare, gain_kept, holm
from fanbu.losses import divergence
from fanbu.machine import resolve_machine
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.predict import class_logits, limit
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.train import BatchLoss
from fanbu.train import train as train_network
from fanbu.types import Context, ProbeRow, ProbeSet, Train

TRAIN = {"epochs": 3, "lr": 2e-4}  # specialists
TEACH = {"epochs": 6, "lr": 2e-4}  # all ways back
MADE_UP = {"epochs": 3, "lr": 1e-4}  # distilling on synthetic texts
TEMPERATURE = 4.0
SYNTHETIC, FAR = "distill, synthetic texts", "distill, far texts"
ROWS = {True: {"train": 600, "valid": 100, "test": 1000}, False: {"train": 1000, "valid": 300, "test": 1000}}


def distilled(
    bench: Bench, specialists: Sequence[Specialist], folder: str, out: Path, train: Mapping[str, Any] = TEACH
) -> Model:
    """Distilling as a recipe would."""
    sent = contributions(bench, specialists, folder)
    return method("distill", "feedback").absorb(bench.incumbent, sent, out, bench.context, train=train)


def from_weak(bench: Bench, out: Path, confidence: float) -> Model:
    """From weak specialists; a confidence of 0 is plain distilling."""
    sent = contributions(bench, weak(bench), "panels-weak", "weak_to_strong")
    way = method("weak_to_strong")
    return way.absorb(bench.incumbent, sent, out, bench.context, train=TEACH, confidence=confidence)


def multitask(bench: Bench, out: Path) -> Model:
    """Joint training on all labelled rows: the reference, which sees everything."""
    way = method("multitask")
    sent = [way.contribute(s, bench.incumbent, bench.context) for s in bench.specialists]
    return way.absorb(bench.incumbent, sent, out, bench.context, train=TEACH)


def logit_mean(bench: Bench, out: Path) -> Model:
    """Every teacher answers every text, none knows more than another."""
    texts, labels = bench.context.probe.texts, bench.incumbent.labels
    z_nl = torch.zeros(len(texts), len(labels))
    for s in bench.specialists:
        columns = [labels.index(label) for label in s.model.labels]
        z_nl[:, columns] = _answers(s.model, texts, bench.context)
    return _taught(bench, bench.incumbent, range(len(texts)), z_nl, out)


def one_after_the_other(bench: Bench, out: Path) -> Model:
    """Each teacher in turn, on its own texts and labels."""
    model = bench.incumbent
    for s in bench.specialists:
        rows = [i for i, r in enumerate(bench.context.probe.rows) if r.domain == s.domain.name]
        texts = [bench.context.probe.rows[i].text for i in rows]
        z_nl = torch.full((len(texts), len(model.labels)), -1e4)
        z_nl[:, [model.labels.index(label) for label in s.model.labels]] = _answers(s.model, texts, bench.context)
        last = s is bench.specialists[-1]
        place = out if last else out.with_name(f"{out.name}-{s.domain.name}")
        model = made(place, lambda o, m=model, r=rows, z=z_nl: _taught(bench, m, r, z, o, temperature=1.0))
    return model


def _answers(model: Model, texts: Sequence[str], context: Context) -> Tensor:
    return class_logits(load_network(model), load_tokenizer(model), texts, context)


def _taught(
    bench: Bench, start: Model, rows: Sequence[int], z_nl: Tensor, out: Path, temperature: float = TEMPERATURE
) -> Model:
    network, tokenizer, context = load_network(start), load_tokenizer(start), bench.context
    network.to(context.device)
    sequences = encode(tokenizer, [context.probe.rows[i].text for i in rows], limit(network, context))
    loss = _kl(sequences, z_nl, pad_id(tokenizer), context.device, temperature)
    train_network(
        network, [len(s) for s in sequences], loss, Train(**TEACH), context, out.name, head=final_layer(network)
    )
    return save_network(network, tokenizer, out, provenance("distill", [start], context))


def _kl(sequences: Sequences, z_nl: Tensor, pad: int, device: str, temperature: float) -> BatchLoss:
    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        logits = network(**collate([sequences[i] for i in rows], pad, device)).logits.float()
        return divergence(z_nl[list(rows)].to(device), logits, "forward", temperature)

    return loss


def without_texts(bench: Bench) -> Bench:
    """The same where the probe set is synthetic."""
    made_up = {
        d.name: synthetic(
            d.train.texts, 2 * len(d.train), bench.context.seeded("synthetic", d.name), labels=d.train.labels
        )
        for d in bench.domains.values()
    }
    return _asked_other(bench, asking(made_up), "synthetic")


def _asked_other(bench: Bench, probe: ProbeSet, name: str) -> Bench:
    """The same with another probe set, which the base is probed on too."""
    context = replace(bench.context, probe=probe)
    base = made(bench.folder / f"incumbent-{name}", lambda out: probed(bench.domains, out, context))
    return replace(bench, context=context, incumbent=base)


def from_synthetic(bench: Bench, out: Path) -> Model:
    """Distilling where no text leaves its owner."""
    apart = without_texts(bench)
    return distilled(apart, apart.specialists, "panels-synthetic", out, MADE_UP)


def far_away(bench: Bench) -> Bench:
    """The same where the probe set is of other industries."""
    texts = [text for d in bench.others.values() for text in d.train.texts]
    return _asked_other(bench, ProbeSet(tuple(ProbeRow(f"other/{i}", t, None) for i, t in enumerate(texts))), "far")


def from_far(bench: Bench, out: Path) -> Model:
    """Distilling on texts of other industries, of which a specialist answers those that lie near its own."""
    apart = far_away(bench)
    return distilled(apart, apart.specialists, "panels-far", out)


def kept(bench: Bench, name: str) -> Model:
    """What a way made before."""
    return open_model(bench.folder / folder_of(name), verify=False)


def folder_of(name: str) -> str:
    """Where the work folder holds what a way made."""
    return name.replace(", ", "-").replace(" ", "-")


def refitted(apart: Bench, model: Model, out: Path) -> Model:
    """A distilled model after owners fitted their label rows on it, at home: no text and no label crosses."""
    way = method("probe")
    sent = [way.contribute(replace(s, origin=model), model, apart.context) for s in apart.specialists]
    return way.absorb(model, sent, out, apart.context)


def ours(bench: Bench, out: Path) -> Model:
    """From full-size specialists."""
    return distilled(bench, bench.specialists, "panels", out)


PARTS: dict[str, dict[str, Callable[[Bench, Path], Model]]] = {
    "main": {
        "distill": ours, "logit mean": logit_mean, "one after the other": one_after_the_other, "multitask": multitask,
    },
    "sizes": {
        "distill": ours, "distill from small": lambda bench, out: distilled(bench, mixed(bench), "panels-small", out),
    },
    "synthetic": {
        SYNTHETIC: from_synthetic,
        f"{SYNTHETIC}, then rows": lambda bench, out: refitted(without_texts(bench), kept(bench, SYNTHETIC), out),
    },
    "far": {
        FAR: from_far, f"{FAR}, then rows": lambda bench, out: refitted(far_away(bench), kept(bench, FAR), out),
    },
    "weak": {
        "from weak": lambda bench, out: from_weak(bench, out, 0.0),
        "from weak, own confidence": lambda bench, out: from_weak(bench, out, 0.5),
    },
}  # fmt: skip
BLIND = ("logit mean", "one after the other")  # that see no labels either


def one_seed(bench: Bench, parts: Sequence[str]) -> dict[str, Outcomes]:
    """Outcomes by name."""
    found = {
        "probed base": judged(bench, "probed base", dict.fromkeys(bench.domains, bench.incumbent)),
        "specialists": judged(bench, "specialists", {s.domain.name: s.model for s in bench.specialists}),
    }
    if "sizes" in parts:
        found["small specialists"] = judged(bench, "small specialists", {s.domain.name: s.model for s in mixed(bench)})
    if "weak" in parts:
        found["weak specialists"] = judged(bench, "weak specialists", {s.domain.name: s.model for s in weak(bench)})
    for name, way in {n: w for p in parts for n, w in PARTS[p].items()}.items():
        log(f"== {name}")
        model = made(bench.folder / folder_of(name), lambda out, way=way: way(bench, out))
        found[name] = judged(bench, name, dict.fromkeys(bench.domains, model))
    return found


def crossed(bench: Bench) -> dict[str, float]:
    """Bytes of panels on disk, beside float32 logits of each teacher's own labels for its own texts."""
    own = {c.domain: c for c in contributions(bench, bench.specialists, "panels")}
    full = {d: 4 * len(bench.domains[d].labels) * len(bench.domains[d].train) for d in own}
    return {"panels": sum(c.bytes for c in own.values()), "logits": sum(full.values())}


def main_bars(found: Mapping[str, Outcomes], sent: Mapping[str, float]) -> list[dict[str, Any]]:
    """What was promised of distilling."""
    base, new = found["probed base"], found["distill"]
    kept = gain_kept(new, base, found["specialists"], "told", 0)
    value = kept["value"] if kept else float("nan")
    bars = [bar("gain kept", f"{value:.2f}", ">= 0.95", value >= 0.95)]
    for name in BLIND:
        d = difference(new, found[name])
        bars.append(bar(f"beside {name}", points(d), "interval above 0", d["low"] > 0))
    behind = 100 * (mean(found["multitask"], "told") - mean(new, "told"))
    bars.append(bar("points behind multitask", f"{behind:.2f}", "<= 0.5", behind <= 0.5))
    worse = worse_than(new, base)
    bars.append(bar("domains significantly worse than the probed base", ", ".join(worse) or "none", "none", not worse))
    apart = 100 * (mean(new, "told") - mean(new, "untold"))
    bars.append(bar("points that untold is behind told", f"{apart:.2f}", "<= 3", apart <= 3))
    share = sent["panels"] / sent["logits"]
    got = f"{sent['panels']:,} of {sent['logits']:,} bytes = 1/{1 / share:.1f}"
    bars.append(bar("panels beside all logits", got, "<= 1/20", share <= 1 / 20))
    return bars


def worse_than(new: Outcomes, old: Outcomes) -> list[str]:
    """Domains that got worse beyond chance (Holm)."""
    pairs = {d: compare(new[d], old[d], "told", 0) for d in old}
    adjusted = holm({d: p.p for d, p in pairs.items()})
    return [d for d, p in pairs.items() if p.delta < 0 and adjusted[d] < 0.05]


def size_bars(found: Mapping[str, Outcomes]) -> list[dict[str, Any]]:
    """Other sizes and vocabularies beside full-size specialists."""
    d = difference(found["distill from small"], found["distill"])
    return [bar("from other sizes and vocabularies, beside full-size ones", points(d), ">= -1", d["delta"] >= -0.01)]


def synthetic_bars(found: Mapping[str, Outcomes]) -> list[dict[str, Any]]:
    """No domain's text left its owner."""
    gain = gain_kept(found[f"{SYNTHETIC}, then rows"], found["probed base"], found["specialists"], "told", 0)
    value = gain["value"] if gain else float("nan")
    return [
        bar("gain kept without any domain's text, then label rows by owners", f"{value:.2f}", ">= 0.6", value >= 0.6)
    ]


def far_bars(found: Mapping[str, Outcomes]) -> list[dict[str, Any]]:
    """What specialists say of texts that are none of theirs does no harm."""
    worse = worse_than(found[FAR], found["probed base"])
    return [bar("domains significantly worse after far texts", ", ".join(worse) or "none", "none", not worse)]


def weak_bars(found: Mapping[str, Outcomes]) -> list[dict[str, Any]]:
    """Gaps recovered, (new - weak) / (full-size - weak), where there is a gap of two points or more."""
    low, high = found["weak specialists"], found["specialists"]
    plain, own = found["from weak"], found["from weak, own confidence"]
    rows = [["gap recovered", *low]]
    for name in ("from weak", "from weak, own confidence"):
        cells = []
        for d in low:
            bottom, top, value = (score(o[d], "told") or 0.0 for o in (low, high, found[name]))
            cells.append(f"{(value - bottom) / (top - bottom):.2f}" if top - bottom >= 0.02 else "-")
        rows.append([name, *cells])
    print(table(rows), flush=True)
    worse, wide = worse_than(own, plain), sum(c != "-" for c in rows[1][1:])
    d = difference(own, plain)
    return [
        bar("domains with a gap", str(wide), ">= 4", wide >= 4),
        bar("own confidence beside none", points(d), ">= 0", d["delta"] >= 0),
        bar("domains where own confidence is worse", ", ".join(worse) or "none", "none", not worse),
    ]


BARS = {"sizes": size_bars, "synthetic": synthetic_bars, "far": far_bars, "weak": weak_bars}


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    flags.add_argument("--only", nargs="+", choices=list(PARTS), default=None, help="default: all parts")
    args = flags.parse_args()
    found_domains = list(usable(text_domains(args.data)).items())
    folders, others = dict(found_domains[:8]), dict(found_domains[8:])
    parts = [part for part in args.only or PARTS if part != "far" or others]
    if "far" in (args.only or PARTS) and not others:
        print("left out: the part `far`, which needs a ninth text domain", flush=True)
    if not parts:
        return 1
    device, precision, threads = resolve_machine("auto", "auto", 0)
    runs: list[dict[str, Outcomes]] = []
    rows, name = ROWS[args.quick], "predictions-quick" if args.quick else "predictions"
    with progress_bar() as progress:
        for seed in range(args.seeds or (1 if args.quick else 3)):
            plain = Context(device=device, precision=precision, threads=threads, max_length=64, progress=progress)
            bench = prepare(folders, seed, args.work / name, plain, rows, TRAIN)
            left_over = {d: limited(d, path, rows) for d, path in others.items()}
            runs.append(one_seed(replace(bench, others=left_over), parts))
    found, sent = mean_over_seeds(runs), crossed(bench)
    text = table(scores(found))
    print(text, flush=True)
    bars = main_bars(found, sent) if "main" in parts else []
    for part, judge in BARS.items():
        bars += judge(found) if part in parts else []
    values = {
        "accuracy": {
            n: {d: {m: score(c, m) for m in ("told", "untold")} for d, c in o.items()} for n, o in found.items()
        },
        "crossed": sent, "seeds": len(runs), "rows": rows,
    }  # fmt: skip
    text += f"\n\n{len(runs)} seed(s); at most {rows['train']} training rows a domain"
    return finish("-".join([name, *([] if args.only is None else parts)]), text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
