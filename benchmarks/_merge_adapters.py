"""Eight LoRA specialists merged without a full checkpoint of each: seconds and own memory, beside merging full ones and
PEFT's add_weighted_adapter, on LoRA, rsLoRA and DoRA. Factors are random; the base is stored in float32."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from _checkpoints import config_of, make, shapes_of
from _common import HERE, bar
from _merge_parity import Distance, distance
from _merge_watch import watched
from fanbu.tensors import Shards, Tensors, chunks, write_tensors

COUNT, RANK, ALPHA = 8, 16, 32
LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = {"LoRA": {}, "rsLoRA": {"use_rslora": True}, "DoRA": {"use_dora": True}}
METHODS: dict[str, dict[str, Any]] = {"task_arithmetic": {"scale": 0.4}, "ties": {"density": 0.2}, "tsv_m": {}}
# the merges of PEFT that have a product merge to stand beside; svd only on plain LoRA: it takes minutes
COMBINATIONS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.4}, "cat": {"weight": 0.4}, "ties": {"weight": 1.0, "density": 0.2},
    "svd": {"weight": 0.4, "svd_rank": COUNT * RANK, "svd_full_matrices": False},
    "ties_svd": {"weight": 1.0, "density": 0.2, "svd_rank": COUNT * RANK, "svd_full_matrices": False},
}  # fmt: skip
COLUMNS = ["merge", "seconds", "CPU seconds", "peak own memory, GB", "off the merge of products", "note"]


def base_of(work: Path, size: str) -> Path:
    """The base in float32."""
    source, out = Tensors(make(work / size / "base", size, 0)), work / "adapters" / "base"
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps(config_of(size) | {"dtype": "float32"}))
    shards = Shards(out, {n: (s.shape, torch.float32) for n, s in source.specs.items()})
    for name, spec in source.specs.items():
        for start, stop in chunks(spec.shape):
            shards.put(name, start, source.rows(name, start, stop))
    shards.close()
    return out


def scale_of(kind: str) -> float:
    """alpha / r, or alpha / sqrt(r)."""
    return ALPHA / (RANK**0.5 if kind == "rsLoRA" else RANK)


def adapter(out: Path, base: Path, size: str, kind: str, number: int) -> Path:
    """A PEFT adapter of all linear layers with random factors; their product's numbers are near 0.001."""
    source, tensors = Tensors(base), {}
    spread = (0.001 / RANK**0.5 / scale_of(kind)) ** 0.5
    generator = torch.Generator().manual_seed(number)
    for name, (rows, columns) in matrices(size).items():
        key = f"base_model.model.{name.removesuffix('.weight')}"
        b, a = torch.randn(rows, RANK, generator=generator), torch.randn(RANK, columns, generator=generator)
        tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"] = a * spread, b * spread
        if kind == "DoRA":
            length = source[name].norm(dim=1)
            tensors[f"{key}.lora_magnitude_vector"] = length * (1 + 0.01 * torch.randn(rows, generator=generator))
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(LAYERS),
        "base_model_name_or_path": str(base), "bias": "none", "inference_mode": True, **KINDS[kind],
    }  # fmt: skip
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def matrices(size: str) -> dict[str, tuple[int, ...]]:
    """The matrices that the adapters change."""
    return {n: s for n, s in shapes_of(size).items() if any(f".{layer}." in n for layer in LAYERS)}


def change(sent: Tensors, name: str, weight: Tensor, kind: str) -> Tensor:
    """What one adapter does to its matrix, in float64."""
    key = f"base_model.model.{name.removesuffix('.weight')}"
    delta = scale_of(kind) * sent[f"{key}.lora_B.weight"].double() @ sent[f"{key}.lora_A.weight"].double()
    if kind != "DoRA":
        return delta
    whole = weight + delta
    magnitude = sent[f"{key}.lora_magnitude_vector"].double()
    return whole * (magnitude / whole.norm(dim=1))[:, None] - weight


def materialised(out: Path, base: Path, sent: Path) -> Path:
    """The full checkpoint of one specialist (LoRA), in float32."""
    out.mkdir(parents=True)
    shutil.copy(base / "config.json", out)
    source, own = Tensors(base), Tensors(sent / "adapter_model.safetensors")
    changed = {n for n in source if any(f".{layer}." in n for layer in LAYERS)}
    full = {}
    for name in source:
        weight = source[name].double()
        full[name] = (weight + change(own, name, weight, "LoRA") if name in changed else weight).float()
    write_tensors(out, full)
    return out


def ours(method: str, base: Path, inputs: Sequence[Path], out: Path) -> dict[str, Any]:
    """One merge by fanbu in a process of its own."""
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(HERE / "_merge_ours.py"), method, str(out), json.dumps(METHODS[method])]
    told = watched([*command, str(base), *map(str, inputs)])
    print(f"fanbu {method} of {inputs[0].parent.name}", json.dumps(told), flush=True)
    return told


def row_of(name: str, told: dict[str, Any], off: str, note: str) -> list[str]:
    """One line of the table."""
    if "failed" in told:
        return [name, "-", "-", "-", "-", f"failed: {told['failed']}"]
    return [name, f"{told['merge']:.1f}", f"{told['cpu']:.1f}", f"{told['peak_gb']:.2f}", off, note]


def both_ways(folder: Path, base: Path, sent: Sequence[Path]) -> tuple[list[list[str]], list[Any], dict[str, Any]]:
    """Every method on factors and on full checkpoints of the same specialists, and how far the results are apart."""
    full = [materialised(folder / "full" / f"a{i}", base, path) for i, path in enumerate(sent)]
    rows, bars, values = [], [], {}
    for method in METHODS:
        by_factors = ours(method, base, sent, folder / "out-factors")
        by_full = ours(method, base, full, folder / "out-full")
        values[method] = {"factors": by_factors, "full": by_full}
        failed = [told["failed"] for told in (by_factors, by_full) if "failed" in told]
        if failed:
            bars.append(bar(f"{method} of adapters", str(failed[0]), "it runs", False))
            continue
        apart = distance(Tensors(folder / "out-factors"), Tensors(folder / "out-full"), "float32", {})
        note = f"{apart.largest:.1e} from full ones, {apart.beyond:.4%} beyond rounding"
        rows.append(row_of(f"fanbu {method}, {COUNT} adapters", by_factors, "-", note))
        rows.append(row_of(f"fanbu {method}, {COUNT} full checkpoints", by_full, "-", "-"))
        bars += [equal(method, apart), small(method, by_factors)]
    shutil.rmtree(folder / "full")
    return rows, bars, values


def equal(method: str, apart: Distance) -> Any:
    """Equal to rounding; TIES but for numbers whose rounding decides whether they reach a threshold, or their sign."""
    if method != "ties":
        what = f"{method} of adapters beside full checkpoints"
        return bar(what, f"{apart.largest:.1e}", "equal to rounding", not apart.beyond)
    got = f"{apart.beyond:.4%} of the numbers differ"
    return bar("ties of adapters beside full checkpoints", got, "< 0.01% (at a threshold)", apart.beyond < 1e-4)


def small(method: str, told: dict[str, Any]) -> Any:
    """No full checkpoint is made in memory."""
    return bar(f"{method} of adapters, peak own memory", f"{told['peak_gb']:.2f} GB", "< 1 GB", told["peak_gb"] < 1)


def off_products(out: Path, base: Path, sent: Sequence[Path], kind: str) -> tuple[float, float]:
    """Of task arithmetic: |got - want| / |want| of the change, and the largest difference, from float64 products."""
    merged, source = Tensors(out), Tensors(base)
    files = [Tensors(path / "adapter_model.safetensors") for path in sent]
    off = size = largest = 0.0
    for name in source:
        if any(f".{layer}." in name for layer in LAYERS):
            weight = source[name].double()
            want = METHODS["task_arithmetic"]["scale"] * sum(change(f, name, weight, kind) for f in files)
            gap = merged[name].double() - weight - want
            off, size = off + float(gap.square().sum()), size + float(want.square().sum())
            largest = max(largest, float(gap.abs().max()))
    return (off / size) ** 0.5, largest


def by_peft(base: Path, sent: Sequence[Path], kind: str, python: Path) -> tuple[list[list[str]], dict[str, Any]]:
    """PEFT's combinations of the same adapters."""
    kinds = {k: v for k, v in COMBINATIONS.items() if kind == "LoRA" or "svd" not in k}

    def run(chosen: dict[str, Any], compare: bool) -> dict[str, Any]:
        text = json.dumps({"kinds": chosen, "compare": compare})
        told = watched([str(python), str(HERE / "_merge_peft.py"), str(base), text, *map(str, sent)])
        print(f"peft {kind}", json.dumps(told), flush=True)
        return told

    told, plain = run(kinds, True), run({"cat": kinds["cat"]}, False)  # the second for its memory
    if "failed" in told:
        return [[f"peft, {kind}", "-", "-", "-", "-", f"failed: {told['failed']}"]], told
    rows = []
    for name, found in told["found"].items():
        if "failed" in found:
            rows.append([f"peft {name}, {kind}", "-", "-", "-", "-", f"refused: {found['failed']}"])
        else:
            seconds = f"{told['load'] + found['seconds']:.1f}"
            peak = f"{plain['peak_gb']:.2f}" if name == "cat" and "peak_gb" in plain else "-"
            rows.append([f"peft {name}, {kind}", seconds, "-", peak, f"{found['off']:.1e}", note(name, kind)])
    return rows, told | {"for its memory": plain}


def note(name: str, kind: str) -> str:
    """Why PEFT's adapter is not the merge of the products, as its code has it."""
    why = []
    if name in ("linear", "ties"):
        why.append("sums A and B apart: (A1 + A2)(B1 + B2)")
    if name == "ties_svd":
        why.append(f"cut to rank {COUNT * RANK}")
    if kind == "rsLoRA":
        why.append("its new alpha is its rank, so rsLoRA scales by sqrt(rank) once more")
    if kind == "DoRA":
        why.append("magnitudes are not merged")
    return "; ".join(why) or "-"


def adapters(
    work: Path, python_mk: Path | None, size: str = "150M"
) -> tuple[list[list[str]], list[Any], dict[str, Any]]:
    """Rows (the first is the header), bars and values; a peer that is None could not be installed."""
    folder = work / "adapters"
    shutil.rmtree(folder, ignore_errors=True)
    base, rows, bars, values = base_of(work, size), [COLUMNS], [], {}
    for kind in KINDS:
        sent = [adapter(folder / kind / f"a{i}", base, size, kind, i) for i in range(COUNT)]
        if kind == "LoRA":
            rows_, bars, values = both_ways(folder, base, sent)
            rows += rows_
        told = ours("task_arithmetic", base, sent, folder / "out-factors")
        if "failed" in told:
            bars.append(bar(f"task_arithmetic of {kind}", str(told["failed"]), "it runs", False))
        else:
            off, largest = off_products(folder / "out-factors", base, sent, kind)
            rows.append(row_of(f"fanbu task_arithmetic, {kind}", told, f"{off:.1e}", f"{largest:.1e} from float64"))
            what = f"task_arithmetic of {kind} beside the products in float64, relative"
            bars.append(bar(what, f"{off:.1e}", "<= 1e-5 (float32 weights)", off <= 1e-5))
        if python_mk:
            more, values[f"peft {kind}"] = by_peft(base, sent, kind, python_mk)
            rows += more
        else:
            rows.append([f"peft, {kind}", "-", "-", "-", "-", "could not be installed"])
    shutil.rmtree(folder)
    return rows, bars, {"adapters": values}
