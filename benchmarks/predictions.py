"""What specialists say, fed back: distilling from panels beside what users would do instead, on real domains.

All ways start from the probed base and see the domains' training texts, three epochs each; only multitask sees
labels. ``logit mean``: teachers' logits side by side over the union of labels, for every text, at temperature 4 (as
TextBrewer distils from several teachers). ``one after the other``: a domain at a time, from its own teacher.

Run: python benchmarks/predictions.py [--quick] [--data DIR] [--work DIR] [--seeds N]. A second run resumes: what is
in the work folder is not made again, so give a new folder after a change of code. --quick: one seed, 600 rows a domain.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _common import bar, finish, parser, table, text_domains
from _outcomes import Outcomes, mean_over_seeds, score, usable
from _specialists import Bench, difference, judged, made, mean, prepare
from fanbu.batches import Sequences, collate, encode, pad_id
from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution
from fanbu.heads import final_layer
from fanbu.judge.compare import compare, gain_kept, holm
from fanbu.losses import divergence
from fanbu.model import Model, load_network, load_tokenizer, provenance, save_network
from fanbu.predict import class_logits, limit
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.recipe import resolve_machine
from fanbu.train import BatchLoss
from fanbu.train import train as train_network
from fanbu.types import Context, Train

TRAIN = {"epochs": 3, "lr": 2e-4}
TEMPERATURE = 4.0
ROWS = {True: {"train": 600, "valid": 100, "test": 400}, False: {"train": 3000, "test": 1000}}


def panels(bench: Bench) -> list[Contribution]:
    """As they cross: written, checked, read again."""
    found = []
    for s in bench.specialists:
        place = bench.folder / "panels" / s.domain.name
        if not (place / "contribution.json").exists():
            log(f"panel of {s.domain.name}")
            cross(method("distill", "feedback").contribute(s, bench.incumbent, bench.context), s.domain.share, place)
        found.append(open_contribution(place))
    return found


def ours(bench: Bench, out: Path) -> Model:
    """Distilling as a recipe would."""
    return method("distill", "feedback").absorb(bench.incumbent, panels(bench), out, bench.context, train=TRAIN)


def multitask(bench: Bench, out: Path) -> Model:
    """Joint training on all labelled rows: the reference, which sees everything."""
    way = method("multitask")
    sent = [way.contribute(s, bench.incumbent, bench.context) for s in bench.specialists]
    return way.absorb(bench.incumbent, sent, out, bench.context, train=TRAIN)


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
        network, [len(s) for s in sequences], loss, Train(**TRAIN), context, out.name, head=final_layer(network)
    )
    return save_network(network, tokenizer, out, provenance("distill", [start], context))


def _kl(sequences: Sequences, z_nl: Tensor, pad: int, device: str, temperature: float) -> BatchLoss:
    def loss(network: Any, rows: Sequence[int]) -> Tensor:
        logits = network(**collate([sequences[i] for i in rows], pad, device)).logits.float()
        return divergence(z_nl[list(rows)].to(device), logits, "forward", temperature)

    return loss


WAYS: dict[str, Callable[[Bench, Path], Model]] = {
    "distill": ours, "logit mean": logit_mean, "one after the other": one_after_the_other, "multitask": multitask,
}  # fmt: skip
BLIND = ("logit mean", "one after the other")  # that see no labels either


def one_seed(bench: Bench) -> dict[str, Outcomes]:
    """Outcomes by name."""
    found = {
        "probed base": judged(bench, "probed base", dict.fromkeys(bench.domains, bench.incumbent)),
        "specialists": judged(bench, "specialists", {s.domain.name: s.model for s in bench.specialists}),
    }
    for name, way in WAYS.items():
        log(f"== {name}")
        model = made(bench.folder / name.replace(" ", "-"), lambda out, way=way: way(bench, out))
        found[name] = judged(bench, name, dict.fromkeys(bench.domains, model))
    return found


def crossed(bench: Bench) -> dict[str, float]:
    """Bytes of panels on disk, beside float32 logits of each teacher's own labels for its own texts."""
    own = {c.domain: c for c in panels(bench)}
    full = {d: 4 * len(c.meta["labels"]) * len(bench.domains[d].train) for d, c in own.items()}
    return {"panels": sum(c.bytes for c in own.values()), "logits": sum(full.values())}


def scores(found: Mapping[str, Outcomes]) -> list[list[str]]:
    """The table."""
    base, full = found["probed base"], found["specialists"]
    rows = [["way", *base, "told", "untold", "gain kept", "beside distill"]]
    for name, outcome in found.items():
        kept, beside = gain_kept(outcome, base, full, "told", 0), difference(found["distill"], outcome)
        untold = f"{100 * mean(outcome, 'untold'):.1f}" if all("untold" in c.tensors for c in outcome.values()) else "-"
        by_domain = [f"{100 * (score(c, 'told') or 0):.1f}" for c in outcome.values()]
        rows.append([
            name, *by_domain, f"{100 * mean(outcome, 'told'):.1f}", untold,
            "-" if kept is None else f"{kept['value']:.2f} ({kept['low']:.2f} to {kept['high']:.2f})",
            f"{-100 * beside['delta']:+.1f} ({-100 * beside['high']:+.1f} to {-100 * beside['low']:+.1f})",
        ])  # fmt: skip
    return rows


def bars_of(found: Mapping[str, Outcomes], sent: Mapping[str, float]) -> list[dict[str, Any]]:
    """What was promised."""
    base, new = found["probed base"], found["distill"]
    kept = gain_kept(new, base, found["specialists"], "told", 0)
    value = kept["value"] if kept else float("nan")
    bars = [bar("gain kept", f"{value:.2f}", ">= 0.95", value >= 0.95)]
    for name in BLIND:
        d = difference(new, found[name])
        got = f"{100 * d['delta']:+.2f} ({100 * d['low']:+.2f} to {100 * d['high']:+.2f})"
        bars.append(bar(f"beside {name}", got, "interval above 0", d["low"] > 0))
    behind = 100 * (mean(found["multitask"], "told") - mean(new, "told"))
    bars.append(bar("points behind multitask", f"{behind:.2f}", "<= 0.5", behind <= 0.5))
    pairs = {d: compare(new[d], base[d], "told", 0) for d in base}
    adjusted = holm({d: p.p for d, p in pairs.items()})
    worse = [d for d, p in pairs.items() if p.delta < 0 and adjusted[d] < 0.05]
    bars.append(bar("domains significantly worse than the probed base", ", ".join(worse) or "none", "none", not worse))
    apart = 100 * (mean(new, "told") - mean(new, "untold"))
    bars.append(bar("points that untold is behind told", f"{apart:.2f}", "<= 3", apart <= 3))
    share = sent["panels"] / sent["logits"]
    got = f"{sent['panels']:,} of {sent['logits']:,} bytes = 1/{1 / share:.1f}"
    bars.append(bar("panels beside all logits", got, "<= 1/20", share <= 1 / 20))
    return bars


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--seeds", type=int, default=None, help="default: 3, with --quick 1")
    args = flags.parse_args()
    folders = dict(list(usable(text_domains(args.data)).items())[:8])
    device, precision, threads = resolve_machine("auto", "auto", 0)
    runs: list[dict[str, Outcomes]] = []
    with progress_bar() as progress:
        for seed in range(args.seeds or (1 if args.quick else 3)):
            plain = Context(device=device, precision=precision, threads=threads, max_length=64, progress=progress)
            name = "predictions-quick" if args.quick else "predictions"
            bench = prepare(folders, seed, args.work / name, plain, ROWS[args.quick], TRAIN)
            runs.append(one_seed(bench))
    found, sent = mean_over_seeds(runs), crossed(bench)
    text = table(scores(found))
    print(text, flush=True)
    bars = bars_of(found, sent)
    values = {
        "accuracy": {
            n: {d: {m: score(c, m) for m in ("told", "untold")} for d, c in o.items()} for n, o in found.items()
        },
        "crossed": sent, "seeds": len(runs), "rows": ROWS[args.quick],
    }  # fmt: skip
    text += f"\n\n{len(runs)} seed(s); at most {ROWS[args.quick]['train']} training rows a domain"
    return finish("predictions-quick" if args.quick else "predictions", text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
