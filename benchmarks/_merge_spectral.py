"""Spectral and least-squares merging of base + three 150M checkpoints: seconds, CPU seconds and own memory, beside
FusionBench's own functions where they can run on the same state dicts."""

from __future__ import annotations

import inspect
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from _checkpoints import SHAPES, family, shapes_of
from _common import HERE, bar
from _merge_watch import median, repeated, watched
from fanbu.catalogue import method
from fanbu.contribution import Contribution, write_contribution
from fanbu.merging.least_squares import FORM, GRAM, Moments
from fanbu.merging.task_vector import TaskVector
from fanbu.model import open_model

OURS = ("tsv_m", "iso_c", "wudi", "regmean")
FUSION = {"tsv_m": "tsv", "iso_c": "iso", "wudi": "wudi", "regmean": "regmean"}
ONE_LAYER = ("wudi",)  # FusionBench's takes 300 steps of Adam a matrix: an hour for all layers
LAYER = "layers.0."
EMBEDDINGS = "model.embed_tokens.weight"
COLUMNS = ["merge", "seconds", "CPU seconds", "peak own memory, GB", "start-up"]


def leaders_of(size: str) -> dict[str, str]:
    """The Gram matrix of each linear layer: query, key and value see the same, and so do gate and up."""
    names = [n for n, s in shapes_of(size).items() if len(s) == 2 and n != EMBEDDINGS]
    return {n: n.replace("k_proj", "q_proj").replace("v_proj", "q_proj").replace("up_proj", "gate_proj") for n in names}


class RandomGrams(Mapping[str, Tensor]):
    """G = X^T X / n of n random rows, damped; each made when asked for and the last one kept."""

    def __init__(self, size: str, leaders: Mapping[str, str], seed: int) -> None:
        self.widths = {n: shapes_of(size)[n][1] for n in sorted(set(leaders.values()))}
        self.seed = seed
        self.last: tuple[str, Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        if self.last is None or self.last[0] != name:
            place = list(self.widths).index(name)
            generator = torch.Generator().manual_seed(1000 * self.seed + place)
            seen = torch.randn(512, self.widths[name], generator=generator) + 0.2
            gram = seen.T @ seen / len(seen)
            self.last = (name, gram * 0.9 + torch.diag(gram.diagonal() * 0.1))
        return self.last[1]

    def __iter__(self) -> Any:
        return iter(self.widths)

    def __len__(self) -> int:
        return len(self.widths)


def statistics_of(work: Path, size: str, models: Sequence[Path]) -> list[Path]:
    """Contributions of RegMean on disk: Gram matrices of random inputs, and what they make of the task vectors."""
    base, leaders, found = open_model(models[0], verify=False), leaders_of(size), []
    for number, folder in enumerate(models[1:]):
        out = work / size / f"regmean-{number}"
        found.append(out)
        if (out / "contribution.json").exists():
            continue
        vector = TaskVector(open_model(folder, verify=False), base)
        meta = {"labels": [], "form": FORM, "leaders": leaders, "turned": []}
        tensors = Moments(vector, RandomGrams(size, leaders, number), leaders, ())
        write_contribution(Contribution("statistics", f"s{number}", "regmean", tensors, meta=meta), out)
    return found


def ours(name: str, models: Sequence[Path], sent: Sequence[Path], out: Path) -> dict[str, Any]:
    """One merge by fanbu in a process of its own."""
    script, inputs = ("_merge_absorb.py", sent) if name == "regmean" else ("_merge_ours.py", models[1:])
    return watched([sys.executable, str(HERE / script), name, str(out), "{}", str(models[0]), *map(str, inputs)])


def theirs(
    name: str, size: str, models: Sequence[Path], sent: Sequence[Path], out: Path, python: Path
) -> dict[str, Any]:
    """One merge by FusionBench's function."""
    told: dict[str, Any] = {"only": LAYER} if name in ONE_LAYER else {}
    if name == "regmean":
        grams = [str(s / "tensors.safetensors") for s in sent]
        told |= {"grams": grams, "leaders": leaders_of(size), "prefix": GRAM, "ratio": 1.0}
    command = [str(python), str(HERE / "_merge_fusion.py"), FUSION[name], str(out), json.dumps(told)]
    return watched([*command, *map(str, models)])


def needed(name: str, size: str, specialists: int) -> float:
    """What the largest matrix needs by the method's own declaration, in GB: some float32 copies of it for each of
    T + 1, or, for ``regmean``, its Gram matrix and moments.
    """
    code = method(name).code
    shapes = [s for n, s in shapes_of(size).items() if len(s) == 2 and n != EMBEDDINGS]
    if hasattr(code, "held"):
        return max(code.held(s) for s in shapes) / 1e9
    found = re.search(r"whole=(\d+)", inspect.getsource(code))
    assert found, f"{name} declares nothing"
    return int(found[1]) * (specialists + 1) * 4 * max(math.prod(s) for s in shapes) / 1e9


def row_of(name: str, values: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line of the table, of the medians."""
    failed = [str(v["failed"]) for v in values if "failed" in v]
    if failed:
        return [name, f"failed: {failed[0][:80]}", "-", "-", "-"]
    seconds, cpu, peak, start = (median(list(values), k) for k in ("merge", "cpu", "peak_gb", "start-up"))
    return [name, f"{seconds:.1f}", f"{cpu:.1f}", f"{peak:.2f}", f"{start:.1f}"]


def spectral(
    work: Path, times: int, python_fb: Path | None, size: str = "150M"
) -> tuple[list[list[str]], list[Any], dict[str, Any]]:
    """Rows (the first is the header), bars and values; a peer that is None could not be installed."""
    models, out, file = family(work, size, 3), work / "out-spectral", work / "fusion.safetensors"
    sent = statistics_of(work, size, models)
    runs: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in OURS:
        runs[f"fanbu {name}"] = lambda name=name: ours(name, models, sent, out)
        if python_fb:
            part = f", 1 of {SHAPES[size][2]} layers" if name in ONE_LAYER else ""
            runs[f"fusion_bench {name}{part}"] = lambda name=name: theirs(name, size, models, sent, file, python_fb)
    found = repeated(times, out, runs)
    file.unlink(missing_ok=True)
    rows = [COLUMNS, *(row_of(name, values) for name, values in found.items())]
    if not python_fb:
        rows.append(["fusion_bench", "could not be installed", "-", "-", "-"])
    bars = []
    for name in OURS:
        peak, need = median(found[f"fanbu {name}"], "peak_gb"), needed(name, size, 3)
        what = f"{name}: peak own memory above the largest layer's needs"
        bars.append(bar(what, f"{peak:.2f} GB - {need:.2f} GB", "< 1 GB", peak - need < 1))
    for folder in sent:
        shutil.rmtree(folder)
    return rows, bars, {"spectral": found}
