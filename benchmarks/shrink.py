"""Small specialists of one large encoder: accuracy at 1/2, 1/4 and 1/8 of its parameters, milliseconds, bytes.

Every small model comes from the same fine-tuned large model, whose rarely used tokens went first, and is distilled from
it with the same plan; sizes are shares of the large encoder's parameters as it ships. Beside ours: Torch-Pruning
(its Taylor importance and grouping), a random cut of our sizes, fresh weights in our sizes, TF-IDF regression.
Milliseconds are for one text on one thread, tokenizing left out; beside the sizes stands a "fast" one of five narrow
layers. The other parts look at searches, and halve a small causal model.

Run: python benchmarks/shrink.py [--quick] [--data DIR] [--domains NAME ...] [--work DIR] [--only PART ...]
Parts: cut, steps, speed, search, causal. A second run resumes; two runs on the same work folder with different
--domains share the work, and a last one without makes the table. --quick: two domains at 1/4.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from _common import bar, finish, parser, table, text_domains
from _outcomes import BASE, score
from _shrink_causal import causal
from _shrink_peers import at_random, by_torch_pruning, from_scratch
from _shrink_search import searching
from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution, write_contribution
from fanbu.deploy.runner import logits_of, milliseconds_of, open_runner
from fanbu.deploy.to_onnx import to_onnx
from fanbu.domain import Domain, load_domain
from fanbu.files import write_text
from fanbu.heads import open_classifier
from fanbu.judge.compare import average, compare
from fanbu.judge.evaluate import evaluate, tfidf
from fanbu.ledger import Workspace
from fanbu.model import Model, load_tokenizer, open_model, provenance, save_network
from fanbu.progress import bar as progress_bar
from fanbu.types import Context

DOMAINS = ("banking", "cyber", "legal", "smart_home")
SHIPPED = 22_713_216  # parameters of the encoder as it ships
LENGTH = 64
TEACHER = {"epochs": 4, "lr": 1.5e-4, "patience": 0}
VOCABULARY = {"max_tokens": 4000}
PLAN = {"patience": 0, "dropout": 0.0}


@dataclass(frozen=True)
class Size:
    """One ratio: how ours gets there after the vocabulary, and on what everything is distilled for how long.

    Variants of each text come to the training texts until there are about ``texts``; 0: none. A ratio of 0 stands for
    sizes by shares alone.
    """

    ratio: int
    steps: tuple[tuple[str, dict[str, Any]], ...]
    texts: int
    epochs: int
    lr: float

    @property
    def most(self) -> int:
        """Parameters."""
        return SHIPPED // self.ratio


def _width(ratio: int, **shares: float) -> tuple[str, dict[str, Any]]:
    return "width", {**shares, "parameters": float(SHIPPED // ratio), "train": None}


SIZES = {
    size.ratio: size
    for size in (
        Size(2, (_width(2, neurons=0.3, channels=1.0),), 0, 1, 1e-4),
        Size(4, (_width(4, neurons=0.2, channels=0.6),), 8_000, 1, 1e-3),
        Size(8, (_width(8, neurons=0.1, channels=0.3),), 12_000, 1, 1e-3),
    )
}
# for speed alone: fewer layers, each of which costs a fixed time; no peers
FAST = Size(
    0,
    (("depth", {"layers": 5, "train": None}), ("width", {"neurons": 0.3, "channels": 0.5, "train": None})),
    15_000,
    2,
    1e-3,
)
# to 1/8 with a stop at 1/4, on as many texts in all as 1/8 takes at once
STEPWISE = (
    Size(4, (_width(4, neurons=0.2, channels=0.6),), 4_000, 1, 1e-3),
    Size(8, (_width(8, neurons=0.5, channels=0.5),), 8_000, 1, 1e-3),
)
PARTS = ("cut", "steps", "speed", "search", "causal")
OURS, PEERS = "fanbu", ("Torch-Pruning", "random cut", "from scratch")


@dataclass(frozen=True)
class Bench:
    """One domain: where its stages lie, and its models so far."""

    domain: Domain
    context: Context
    ledger: Workspace
    work: Path

    def model(self, name: str, module: str, inputs: Mapping[str, Any], make: Callable[[Path, Context], Any]) -> Model:
        """One stage that makes a model, once."""
        whole = {**inputs, "domain": self.domain.digest, "seed": self.context.seed, "length": LENGTH}

        def produce(out: Path, scratch: Path) -> None:
            make(out / "model", replace(self.context, scratch=scratch))

        return open_model(self.ledger.stage(f"{name} {self.domain.name}", module, whole, produce).path / "model")

    def step(self, name: str, parent: Model, forebears: tuple[Model, ...] = (), **arguments: Any) -> Model:
        """One way down."""
        way = method(name, "shrink")
        inputs = {"parent": parent.digest, "arguments": json.dumps(arguments, sort_keys=True)}
        given = dict(arguments)
        if name == "distill":
            given["extra"] = {**given["extra"], "cache": str(self.work / "answers")}

        def make(out: Path, context: Context) -> Model:
            known = replace(context, forebears=tuple(m.path for m in forebears))
            return way.shrink(parent, self.domain, out, known, **given)

        return self.model(name, way.module, inputs, make)

    def distilled(self, cut: Model, teacher: Model, size: Size) -> Model:
        """The same for all."""
        plan = {**PLAN, "epochs": size.epochs, "lr": size.lr}
        variants = max(0, round(size.texts / len(self.domain.train)) - 1)
        return self.step("distill", cut, (teacher,), extra={"augment": variants}, train=plan)


def large_model(bench: Bench) -> Model:
    """The shipped encoder, opened as a classifier and fine-tuned on the domain."""
    base = open_model(BASE)

    def opened(out: Path, context: Context) -> Model:
        network = open_classifier(base, context)
        return save_network(network, load_tokenizer(base), out, provenance("open", [base], context))

    return bench.step("finetune", bench.model("open", "fanbu.heads", {"base": base.digest}, opened), train=TEACHER)


def small_models(bench: Bench, teacher: Model, size: Size) -> dict[str, Model]:
    """Ours and the peers' at one size, all distilled alike."""
    fewer = bench.step("vocabulary", teacher, **VOCABULARY)
    cut = _cut(bench, fewer, size)
    cuts = {OURS: cut}
    cuts["Torch-Pruning"] = bench.model(
        "torch-pruning", "fanbu.model", {"parent": fewer.digest, "most": size.most},
        lambda out, c: by_torch_pruning(fewer, bench.domain, out, c, size.most, bench.work),
    )  # fmt: skip
    cuts["random cut"] = bench.model(
        "random", "fanbu.shrink._units", {"parent": fewer.digest, "like": cut.digest},
        lambda out, c: at_random(fewer, cut, bench.domain, out, c),
    )  # fmt: skip
    cuts["from scratch"] = bench.model(
        "scratch", "fanbu.model", {"like": cut.digest}, lambda out, c: from_scratch(cut, out, c)
    )
    return {name: bench.distilled(m, teacher, size) for name, m in cuts.items()}


def _cut(bench: Bench, fewer: Model, size: Size) -> Model:
    for name, arguments in size.steps:
        fewer = bench.step(name, fewer, **arguments)
    return fewer


def judged(bench: Bench, model: Model) -> Contribution:
    """Test outcomes, once."""

    def produce(out: Path, scratch: Path) -> None:
        write_contribution(evaluate(model, bench.domain, bench.context), out / "outcomes")

    inputs = {"model": model.digest, "domain": bench.domain.digest, "length": LENGTH}
    stage = bench.ledger.stage(f"judged {bench.domain.name}", "fanbu.judge.evaluate", inputs, produce)
    return open_contribution(stage.path / "outcomes")


Made = tuple[str, dict[str, Any], list[dict[str, Any]]]  # table, values, bars
Found = dict[int, dict[str, dict[str, tuple[Model, Contribution]]]]  # by ratio, who, domain


def cut_part(benches: Mapping[str, Bench], ratios: list[int]) -> tuple[Made, Any]:
    """Accuracy at each size."""
    large: dict[str, tuple[Model, Contribution]] = {}
    found: Found = {r: {who: {} for who in (OURS, *PEERS)} for r in ratios}
    for name, bench in benches.items():
        teacher = large_model(bench)
        large[name] = teacher, judged(bench, teacher)
        for ratio in ratios:
            for who, model in small_models(bench, teacher, SIZES[ratio]).items():
                found[ratio][who][name] = model, judged(bench, model)
                got = score(found[ratio][who][name][1], "told")
                print(f"{name} 1/{ratio} {who}: {100 * (got or 0):.1f} ({model.parameters:,})", flush=True)
    plain = {name: tfidf(bench.domain, bench.context) for name, bench in benches.items()}
    return _accuracy(large, plain, found), (large, found)


def _mean(outcomes: Mapping[str, Contribution]) -> float:
    return sum(score(c, "told") or 0.0 for c in outcomes.values()) / len(outcomes)


def _row(name: str, size: str, outcomes: Mapping[str, Contribution], whole: float) -> list[str]:
    mean = _mean(outcomes)
    cells = [f"{100 * (score(c, 'told') or 0):.1f}" for c in outcomes.values()]
    return [name, size, *cells, f"{100 * mean:.2f}", f"{mean / whole:.1%}"]


def _accuracy(large: Mapping[str, tuple[Model, Contribution]], plain: Mapping[str, Contribution], found: Found) -> Made:
    known = {n: c for n, (_, c) in large.items()}
    whole, floor = _mean(known), _mean(plain)
    rows = [["accuracy, %", "parameters", *known, "mean", "of the large"]]
    rows.append(_row("large, fine-tuned", f"{max(m.parameters for m, _ in large.values()):,}", known, whole))
    rows.append(_row("TF-IDF regression", "-", plain, whole))
    values: dict[str, Any] = {"large": whole, "tfidf": floor}
    bars: list[Any] = []
    for ratio, by_who in found.items():
        means = {}
        for who, by_domain in by_who.items():
            outcomes = {n: c for n, (_, c) in by_domain.items()}
            means[who] = _mean(outcomes)
            largest = max(m.parameters for m, _ in by_domain.values())
            rows.append(_row(f"1/{ratio} {who}", f"{largest:,}", outcomes, whole))
        values[f"1/{ratio}"] = means
        best = max(PEERS, key=lambda who: means[who])
        ahead = average([compare(by_who[OURS][n][1], by_who[best][n][1], "told", 0) for n in known])
        told = f"{100 * ahead['delta']:+.2f} points ({100 * ahead['low']:+.2f} to {100 * ahead['high']:+.2f})"
        bars.append(bar(f"1/{ratio}: ours beside the best other, {best}", told, "> 0", ahead["delta"] > 0))
        fits = max(m.parameters for m, _ in by_who[OURS].values()) <= SIZES[ratio].most
        bars.append(bar(f"1/{ratio}: parameters", "all fit" if fits else "too many", "all fit", fits))
        share = means[OURS] / whole
        if ratio in (2, 4):
            want = {2: 0.99, 4: 0.975}[ratio]
            bars.append(bar(f"1/{ratio}: accuracy kept", f"{share:.2%}", f">= {want:.1%}", share >= want))
        else:
            above = means[OURS] - floor
            bars.append(bar(f"1/{ratio}: above TF-IDF", f"{100 * above:+.2f} points", ">= 2", above >= 0.02))
    return table(rows), values, bars


def steps_part(benches: Mapping[str, Bench], models: Any) -> Made:
    """1/8 at once and in two steps with distillation between."""
    large, found = models
    stepwise = {}
    for name, bench in benches.items():
        small = bench.step("vocabulary", large[name][0], **VOCABULARY)
        for size in STEPWISE:
            small = bench.distilled(_cut(bench, small, size), large[name][0], size)
        stepwise[name] = judged(bench, small)
    whole, once = _mean({n: c for n, (_, c) in large.items()}), {n: c for n, (_, c) in found[8][OURS].items()}
    rows = [["1/8, accuracy, %", "parameters", *benches, "mean", "of the large"]]
    rows += [_row(how, f"<= {SIZES[8].most:,}", got, whole) for how, got in (("once", once), ("in steps", stepwise))]
    ahead = average([compare(stepwise[n], once[n], "told", 0) for n in benches])
    told = f"{100 * ahead['delta']:+.2f} points ({100 * ahead['low']:+.2f} to {100 * ahead['high']:+.2f})"
    return f"{table(rows)}\n\nin steps beside once: {told}", {"once": _mean(once), "in steps": _mean(stepwise)}, []


FORMS = ("torch fp32", "torch int8", "ONNX fp32", "ONNX int8")


def speed_part(benches: Mapping[str, Bench], models: Any) -> Made:
    """Milliseconds, bytes and accuracy in each form; the large model beside it in the same run."""
    large, found = models
    measured: dict[str, dict[str, list[dict[str, float]]]] = {"large": {f: [] for f in FORMS}}
    for name, bench in benches.items():
        fewer = bench.step("vocabulary", large[name][0], **VOCABULARY)
        fast = bench.distilled(_cut(bench, fewer, FAST), large[name][0], FAST)
        by_size = {"large": large[name][0], **{f"1/{r}": by[OURS][name][0] for r, by in found.items() if r > 2}}
        for which, model in {**by_size, "fast": fast}.items():
            for form in FORMS:
                measured.setdefault(which, {f: [] for f in FORMS})[form].append(_measured(bench, model, form))
                print(name, which, form, measured[which][form][-1], flush=True)
    means = {
        which: {form: {key: sum(v[key] for v in vs) / len(vs) for key in vs[0]} for form, vs in forms.items()}
        for which, forms in measured.items()
    }
    whole = means["large"]["torch fp32"]
    rows = [["model", "form", "ms, batch 1", "times faster", "ms, batch 32", "times faster", "MB", "accuracy kept"]]
    for which, forms in means.items():
        for form, v in forms.items():
            rows.append([
                which, form, f"{v['ms_1']:.2f}", f"{whole['ms_1'] / v['ms_1']:.1f}", f"{v['ms_32']:.2f}",
                f"{whole['ms_32'] / v['ms_32']:.1f}", f"{v['bytes'] / 1e6:.1f}",
                f"{v['accuracy'] / whole['accuracy']:.1%}",
            ])  # fmt: skip
    fit = {
        (which, form): v for which, forms in means.items() for form, v in forms.items()
        if v["accuracy"] >= 0.97 * whole["accuracy"] and v["bytes"] <= whole["bytes"] / 10
    }  # fmt: skip
    bars = []
    faster = {k: min(whole["ms_1"] / v["ms_1"], whole["ms_32"] / v["ms_32"]) for k, v in fit.items()}
    if faster:
        best = max(faster, key=lambda k: faster[k])
        v = fit[best]
        got = f"{whole['ms_1'] / v['ms_1']:.1f} x at batch 1, {whole['ms_32'] / v['ms_32']:.1f} x at batch 32"
        bars.append(bar(f"fastest with >= 97% of the accuracy in 1/10 of the bytes: {' '.join(best)}", got,
                        ">= 8 x", faster[best] >= 8))  # fmt: skip
    else:
        bars.append(bar("a model with >= 97% of the accuracy in 1/10 of the bytes", "none", "one", False))
    return table(rows), {"means": means}, bars


def _measured(bench: Bench, model: Model, form: str) -> dict[str, float]:
    context = replace(bench.context, threads=1)
    folder, size = model.path, model.bytes
    if form.startswith("ONNX"):
        numbers: Any = "int8" if form.endswith("int8") else "float32"
        out = bench.work / "onnx" / f"{bench.domain.name}-{model.digest[:12]}-{numbers}"
        if not out.exists():
            to_onnx(model, out, context, bench.domain.train.texts, numbers)
        folder, size = out, sum(p.stat().st_size for p in out.glob("model.onnx*"))
    runner = open_runner(folder, context, "int8" if form == "torch int8" else "as-it-is")
    texts = bench.domain.test.texts
    right = logits_of(runner, texts).argmax(1) == torch.tensor(bench.domain.test.labels)
    if form == "torch int8":  # what it would take on disk: matrices of linear layers in one byte
        size -= sum(3 * m.weight.numel() for m in _linear(model))
    return {
        "accuracy": float(right.double().mean()), "bytes": float(size),
        "ms_1": milliseconds_of(runner, texts[:48], 1), "ms_32": milliseconds_of(runner, texts[:256], 32),
    }  # fmt: skip


def _linear(model: Model) -> list[Any]:
    from fanbu.model import load_network

    return [m for m in load_network(model).modules() if isinstance(m, torch.nn.Linear)]


def of_encoders(
    folders: Mapping[str, Path], ratios: list[int], parts: list[str], work: Path, context: Context
) -> dict[str, Made]:
    """The parts that look at the encoder's children."""
    ledger, benches = Workspace(work / "shrink"), {}
    for name, folder in folders.items():
        files = {s: str(folder / f"{s}.jsonl") for s in ("train", "valid", "test")}
        benches[name] = Bench(load_domain(name, **files), context, ledger, work)
    found: dict[str, Made] = {}
    if {"cut", "steps", "speed"} & set(parts):
        found["accuracy"], models = cut_part(benches, ratios)
    if "steps" in parts and 8 in ratios:
        found["steps"] = steps_part(benches, models)
    if "speed" in parts:
        found["speed"] = speed_part(benches, models)
    if "search" in parts:
        known = {name: (large_model(bench), bench.domain) for name, bench in benches.items()}
        found["search"] = searching(known, SIZES[8].most, work, context)
    return found


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--domains", nargs="+", help=f"default: {', '.join(DOMAINS)}, or all that --data holds")
    flags.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    flags.add_argument("--ratios", nargs="+", type=int, choices=sorted(SIZES), help="default: all")
    flags.add_argument("--threads", type=int, default=0, help="of each run; 0: as many as there are")
    args = flags.parse_args()
    folders = text_domains(args.data)
    names = args.domains or [n for n in DOMAINS if n in folders] or sorted(folders)
    names, ratios = (names[:2], [4]) if args.quick else (names, args.ratios or sorted(SIZES))
    found: dict[str, Made] = {}
    torch.set_num_threads(args.threads or torch.get_num_threads())
    with progress_bar() as progress:
        context = Context(max_length=LENGTH, threads=args.threads, progress=progress)
        if set(args.only) - {"causal"}:
            found |= of_encoders({n: folders[n] for n in names}, ratios, args.only, args.work, context)
        if "causal" in args.only:
            found["causal"] = causal(args.quick, args.work, context)
    text = "\n\n".join(part for part, _, _ in found.values())
    values, bars = (
        {name: got for name, (_, got, _) in found.items()},
        [b for _, _, held in found.values() for b in held],
    )
    print(text, flush=True)
    if args.domains or args.ratios:  # a share of the work, for a later run to put together
        write_text(args.work / f"shrink-{'-'.join(names)}.json", json.dumps(values, indent=1))
        return 0 if all(b["holds"] for b in bars) else 1
    name = "-".join(["shrink", *(args.only if len(args.only) < len(PARTS) else []), *(["quick"] if args.quick else [])])
    return finish(name, text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
