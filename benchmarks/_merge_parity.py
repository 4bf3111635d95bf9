"""Whether merging gives what mergekit and FusionBench give: the same small checkpoints through both, in two dtypes.

Two results are equal to rounding where every number differs by at most one step of the stored dtype and 1e-6 of its
tensor's largest number. Where they are not, both are laid beside a float64 reference (``_merge_references``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from _checkpoints import config_of, shapes_of
from _common import HERE, bar
from _merge_references import ELEMENTWISE, SETTINGS, SPECTRAL, regmean
from _merge_watch import watched
from fanbu import api
from fanbu.contribution import Contribution
from fanbu.from_mergekit import run_mergekit
from fanbu.merging.gram import damped
from fanbu.merging.least_squares import FORM, Moments
from fanbu.merging.task_vector import TaskVector
from fanbu.model import open_model
from fanbu.tensors import Shards, Tensors
from fanbu.types import Context

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
EMBEDDINGS = "model.embed_tokens.weight"
# FusionBench's function: our method, its settings
FUSION: dict[str, tuple[str, dict[str, Any]]] = {
    "tsv": ("tsv_m", {}), "iso": ("iso_c", {}), "wudi": ("wudi", {"solver": "adam"}),
}  # fmt: skip
RATIO = 0.9
COLUMNS = ["merge", "stored in", "from the peer", "beyond rounding", "ours, off float64", "peer, off float64", "why"]
WHY = {
    "ties": "of numbers that equal a threshold mergekit keeps what its sort puts first, we keep all",
    "breadcrumbs": "of numbers that equal a threshold mergekit keeps what its sort puts first; ours lie on one side",
    "breadcrumbs_ties": "where changes cancel exactly, rounding of the weights elects the sign in both",
    "bfloat16": "mergekit computes in bfloat16, we in float32 with one rounding at the end",
    "float32": "mergekit's sums are float32, our inner products float64",
    "spectral": "its singular vectors are float32, ours float64",
    "wudi": "both are 300 steps of Adam in float32, whose sums go in another order",
    "regmean": "it inverts in float32, we solve in float64",
}  # fmt: skip


def models_of(work: Path, kind: str, count: int = 3) -> list[Path]:
    """A base and specialists whose changes have something in common, as those of one base have; of size tiny."""
    found, shapes = [], shapes_of("tiny")
    for number in range(count + 1):
        folder = work / f"{kind}-{number}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config_of("tiny") | {"dtype": kind}))
        shards = Shards(folder, {n: (s, DTYPES[kind]) for n, s in shapes.items()})
        for place, (name, shape) in enumerate(shapes.items()):
            made = [torch.randn(shape, generator=_seeded(place, k)) for k in (0, 1, number + 2)]
            shards.put(name, 0, made[0] * 0.02 + (made[1] * 0.001 + made[2] * 0.002 if number else 0.0))
        shards.close()
        found.append(folder)
    return found


def _seeded(*seeds: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(s * 1000**k for k, s in enumerate(seeds)))


def recipe(name: str, models: Sequence[Path], kind: str) -> dict[str, Any]:
    """One recipe, for both."""
    base, *others = map(str, models)
    weights = {"weight": SETTINGS["weight"], "density": SETTINGS["density"], "gamma": SETTINGS["gamma"]}
    own: dict[str, dict[str, float]] = {
        "linear": {"weight": 1.0}, "karcher": {}, "model_stock": {}, "slerp": {}, "nearswap": {},
        "ties": {"weight": 1.0, "density": SETTINGS["density"]}, "task_arithmetic": {"weight": SETTINGS["weight"]},
        "breadcrumbs": weights, "breadcrumbs_ties": weights,
    }  # fmt: skip
    value: dict[str, Any] = {"merge_method": name, "dtype": kind}
    if name == "passthrough":
        spans = ((others[0], [0, 2]), (others[1], [1, 4]))
        return value | {"slices": [{"sources": [{"model": m, "layer_range": r}]} for m, r in spans]}
    if name in ("slerp", "nearswap"):
        value["parameters"] = {"t": SETTINGS["t" if name == "slerp" else "limit"]}
        others = others[:1]
    listed = [{"model": m, "parameters": own[name]} for m in others]
    return value | {"models": listed} | ({} if name in ("linear", "karcher") else {"base_model": base})


@dataclass(frozen=True)
class Distance:
    """How far two checkpoints are apart: the largest difference, its root mean square, the share beyond rounding."""

    largest: float
    rms: float
    beyond: float


def distance(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], kind: str, leave: Mapping[str, Tensor]
) -> Distance:
    """Over all numbers but those in the masks of ``leave``."""
    largest, squares, beyond, count = 0.0, 0.0, 0, 0
    for name, given in one.items():
        a, b = given.double(), other[name].double()
        keep = ~leave[name] if name in leave else torch.ones_like(a, dtype=torch.bool)
        gap = (a - b).abs()[keep]
        room = 1e-6 * b.abs().max() + (step(b)[keep] if kind == "bfloat16" else 0.0)
        largest, squares = max(largest, float(gap.max()) if len(gap) else 0.0), squares + float(gap.square().sum())
        beyond, count = beyond + int((gap > room).sum()), count + gap.numel()
    return Distance(largest, (squares / count) ** 0.5, beyond / count)


def step(x: Tensor) -> Tensor:
    """The distance between neighbours in bfloat16 (8 binary digits) at these numbers."""
    return torch.exp2(torch.floor(torch.log2(x.abs().clamp(min=1e-38))) - 7)


State = Mapping[str, Tensor]


def judged(name: str, kind: str, states: tuple[State, State, State], leave: State, why: str) -> tuple[list[str], Any]:
    """A row and a bar for ours, the peer's and the reference's result; ``leave`` marks what is left open."""
    ours, peer, reference = states
    apart = distance(ours, peer, kind, {})
    mine, theirs = (distance(s, reference, kind, leave) for s in (ours, peer))
    what = f"parity, {name}, {kind}"
    told = [name, kind, f"{apart.largest:.1e}", f"{apart.beyond:.2%}", f"{mine.largest:.1e}", f"{theirs.largest:.1e}"]
    if not apart.beyond:
        return [*told, "-"], bar(what, f"largest difference {apart.largest:.1e}", "equal to rounding", True)
    if leave and not distance(ours, peer, kind, leave).beyond:
        got = f"the rest by {distance(ours, peer, kind, leave).largest:.1e}"
        want = "equal to rounding, but for numbers that the definition leaves open"
        return [*told, why], bar(what, got, want, not mine.beyond)
    nearer = mine.rms < theirs.rms and mine.largest <= theirs.largest and not mine.beyond
    got = f"root mean square {mine.rms:.1e} against {theirs.rms:.1e}"
    want = "equal to the float64 reference, and nearer to it than the peer"
    return [*told, why if nearer else "not explained"], bar(what, got, want, nearer)


def references(models: Sequence[Path], rule: Callable[[Tensor, Sequence[Tensor]], Any]) -> tuple[State, State]:
    """The reference's tensors, and the masks of what it leaves open."""
    base, *others = (Tensors(m) for m in models)
    found = {n: rule(base[n].double(), [o[n].double() for o in others]) for n in base}
    return {n: v for n, (v, _) in found.items()}, {n: o for n, (_, o) in found.items() if bool(o.any())}


def reason(name: str, kind: str, leave: State) -> str:
    """Why an elementwise method differs."""
    if not leave:
        return WHY[kind]
    crumbs = WHY["breadcrumbs"] + "; " if name == "breadcrumbs_ties" else ""
    return (WHY[kind] + "; " if kind == "bfloat16" else "") + crumbs + WHY[name]


def beside_mergekit(work: Path, python: Path, kind: str) -> tuple[list[list[str]], list[Any]]:
    """Every shared deterministic method, the same recipe through both."""
    models, rows, bars = models_of(work, kind), [], []
    names = [*ELEMENTWISE, "passthrough"]
    outs = {n: (work / f"mk-{n}", work / f"{n}.yml") for n in names}
    for name, (_, config) in outs.items():
        config.write_text(json.dumps(recipe(name, models, kind)))  # JSON is YAML
    pairs = [str(p) for pair in outs.values() for p in pair]
    said = watched([str(python), str(HERE / "_merge_mergekit.py"), *pairs])
    if "failed" in said:
        return [["mergekit", kind, f"failed: {said['failed']}", *["-"] * 4]], [
            bar(f"parity with mergekit, {kind}", str(said["failed"]), "it runs", False)
        ]
    for name, (out, config) in outs.items():
        mine = run_mergekit(config, work / "ours", Context(threads=2))
        ours, peer = dict(Tensors(mine.path)), dict(Tensors(out))
        if name == "passthrough":
            other = [n for n in sorted(ours | peer) if not _same(ours.get(n), peer.get(n))]
            got = f"others in {', '.join(other)}" if other else "the same bits"
            rows.append([name, kind, got, *["-"] * 4])
            bars.append(bar(f"parity, {name}, {kind}", got, "the same bits", not other))
        else:
            chosen = models[:2] if name in ("slerp", "nearswap") else models
            reference, leave = references(chosen, ELEMENTWISE[name])
            row, one = judged(name, kind, (ours, peer, reference), leave, reason(name, kind, leave))
            rows.append(row)
            bars.append(one)
        for folder in (mine.path, out):
            shutil.rmtree(folder)
    return rows, bars


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def spectral_reference(models: Sequence[Path], name: str) -> State:
    """Matrices by the method; embeddings and vectors by the mean."""
    base, *others = (Tensors(m) for m in models)
    rule, found = SPECTRAL[name], {}
    for n in base:
        b, thetas = base[n].double(), [o[n].double() for o in others]
        found[n] = rule(b, thetas)[0] if b.ndim == 2 and n != EMBEDDINGS else torch.stack(thetas).mean(0)
    return found


def grams_of(models: Sequence[Path], work: Path) -> tuple[list[dict[str, Tensor]], dict[str, str], list[Path]]:
    """Random Gram matrices of each specialist (one for query, key and value; one for gate and up), also as files."""
    shapes = {n: s for n, s in shapes_of("tiny").items() if len(s) == 2 and n != EMBEDDINGS}
    leaders = {
        n: n.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj") for n in shapes
    }
    grams, files = [], []
    for number in range(len(models) - 1):
        own = {}
        for place, name in enumerate(sorted(set(leaders.values()))):
            width = shapes[name][1]
            seen = torch.randn(4 * width, width, generator=_seeded(place, number + 90)) + 0.5
            own[name] = seen.T @ seen / len(seen)
        files.append(work / f"grams-{number}.safetensors")
        save_file(own, files[-1])
        grams.append(own)
    return grams, leaders, files


def by_regmean(
    models: Sequence[Path], grams: Sequence[State], leaders: Mapping[str, str], out: Path
) -> dict[str, Tensor]:
    """Ours from these Gram matrices, damped and without a ridge."""
    base, *others = (open_model(m, verify=False) for m in models)
    sent = []
    for number, (model, own) in enumerate(zip(others, grams, strict=True)):
        tensors = Moments(TaskVector(model, base), {n: damped(g, RATIO) for n, g in own.items()}, leaders, ())
        meta = {"labels": [], "form": FORM, "leaders": dict(leaders), "turned": []}
        sent.append(Contribution("statistics", f"s{number}", "regmean", tensors, meta=meta))
    made = api.absorb(base, sent, out, Context(threads=2), method_name="regmean", ridge=0.0)
    return dict(Tensors(made.path))


def regmean_reference(models: Sequence[Path], grams: Sequence[State], leaders: Mapping[str, str]) -> State:
    """In float64; the mean for all else."""
    base, *others = (Tensors(m) for m in models)
    found = {}
    for n in base:
        thetas = [o[n].double() for o in others]
        if n in leaders:
            found[n] = regmean(thetas, [damped(g[leaders[n]].double(), RATIO) for g in grams])
        else:
            found[n] = torch.stack(thetas).mean(0)
    return found


def beside_fusion(work: Path, python: Path | None, kind: str) -> tuple[list[list[str]], list[Any]]:
    """TSV-M, Iso-C, WUDI and RegMean; without FusionBench, against the float64 references alone."""
    models, rows, bars = models_of(work, kind), [], []
    base, *others = (str(m) for m in models)
    grams, leaders, files = grams_of(models, work)
    for name in (*FUSION, "regmean"):
        shutil.rmtree(work / "ours", ignore_errors=True)
        if name == "regmean":
            ours: State = by_regmean(models, grams, leaders, work / "ours")
            reference = regmean_reference(models, grams, leaders)
        else:
            method, settings = FUSION[name]
            folders = {Path(m).name: m for m in others}
            context = Context(threads=2)
            made = api.merge(open_model(base), folders, work / "ours", context, method_name=method, **settings)
            ours, reference = dict(Tensors(made.path)), spectral_reference(models, name)
        told = {"grams": [str(f) for f in files], "leaders": leaders, "prefix": "", "ratio": RATIO}
        peer = by_fusion(name, work / "peer.safetensors", told, models, python)
        why = WHY.get(name, WHY["spectral"])
        if isinstance(peer, str):
            mine = distance(ours, reference, kind, {})
            rows.append([f"fusion_bench {name}", kind, peer, "-", f"{mine.largest:.1e}", "-", "no peer"])
            bars.append(bar(f"{name}, {kind}, off float64", f"{mine.largest:.1e}", "rounding", not mine.beyond))
            continue
        row, one = judged(f"fusion_bench {name}", kind, (ours, peer, reference), {}, why)
        rows.append(row)
        bars.append(one)
    return rows, [*bars, minimum(models, work / "ours", kind)]


def by_fusion(name: str, out: Path, told: Any, models: Sequence[Path], python: Path | None) -> State | str:
    """FusionBench's result, or why there is none."""
    if python is None:
        return "could not be installed"
    command = [str(python), str(HERE / "_merge_fusion.py"), name, str(out), json.dumps(told), *map(str, models)]
    said = watched(command)
    return f"failed: {said['failed']}" if "failed" in said else dict(Tensors(out))


def minimum(models: Sequence[Path], out: Path, kind: str) -> Any:
    """Our closed form of WUDI beside the pseudo-inverse in float64."""
    base, *others = map(str, models)
    shutil.rmtree(out, ignore_errors=True)
    folders = {Path(m).name: m for m in others}
    made = api.merge(open_model(base), folders, out, Context(threads=2), method_name="wudi")
    off = distance(dict(Tensors(made.path)), spectral_reference(models, "wudi_closed"), kind, {})
    return bar(f"wudi in closed form, {kind}, off float64", f"{off.largest:.1e}", "rounding", not off.beyond)


def parity(
    work: Path, python_mk: Path | None, python_fb: Path | None
) -> tuple[list[list[str]], list[Any], dict[str, Any]]:
    """Rows (the first is the header), bars and values; a peer that is None could not be installed."""
    rows, bars = [COLUMNS], []
    folder = work / "parity"
    for kind in DTYPES:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if python_mk:
            more, held = beside_mergekit(folder, python_mk, kind)
            rows, bars = rows + more, bars + held
        else:
            rows.append(["mergekit", kind, "could not be installed", *["-"] * 4])
        more, held = beside_fusion(folder, python_fb, kind)
        rows, bars = rows + more, bars + held
    shutil.rmtree(folder)
    return rows, bars, {"parity": [dict(zip(COLUMNS, row, strict=True)) for row in rows[1:]]}
