"""PEFT's add_weighted_adapter on the adapters of one base, beside the merge of the products themselves; prints JSON.

Arguments: BASE JSON ADAPTER...; JSON: ``kinds`` (combination types, each with its arguments). For each: seconds, and
|got - want| / |want| over all matrices, want = the same merge (sum, or TIES) of what each adapter does to its matrix.
That needs copies of the weights: without ``compare`` there are only seconds, and a peak of memory that is PEFT's own.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from typing import Any

warnings.simplefilter("ignore")
began = time.perf_counter()
import torch  # noqa: E402
from peft import PeftModel  # noqa: E402
from peft.tuners.lora import LoraLayer  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402


def change(layer: Any, weight: Tensor, name: str) -> Tensor:
    """What one adapter does to its matrix: scale B A, or DoRA's rows of new length."""
    delta = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
    if name not in layer.lora_magnitude_vector:
        return delta
    whole = weight + delta
    length = whole.norm(dim=1, keepdim=True)
    return whole * (layer.lora_magnitude_vector[name].weight[:, None] / length) - weight


def trimmed(delta: Tensor, density: float) -> Tensor:
    """Its largest numbers."""
    size = delta.abs().flatten()
    return delta * (delta.abs() >= size.kthvalue(size.numel() - int(density * size.numel()) + 1).values)


def wanted(kind: str, deltas: list[Tensor], weight: float, density: float) -> Tensor:
    """The merge of the products."""
    if not kind.startswith("ties"):
        return weight * torch.stack(deltas).sum(0)
    stacked = torch.stack([trimmed(d, density) for d in deltas]) * weight
    agree = stacked.sign() == torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    return (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)


def tried(model: Any, layers: dict[str, Any], before: dict[str, Tensor], names: list[str], kind: str, own: Any) -> Any:
    """One combination: seconds and how far it is from the merge of the products, or the error."""
    arguments, weight = {k: v for k, v in own.items() if k != "weight"}, own["weight"]
    started = time.perf_counter()
    try:
        model.add_weighted_adapter(names, [weight] * len(names), "merged", combination_type=kind, **arguments)
        seconds = time.perf_counter() - started
        if not before:
            return {"seconds": seconds}
        off = size = 0.0
        model.merge_adapter(adapter_names=["merged"])
        after = {n: layer.base_layer.weight.detach().clone() for n, layer in layers.items()}
        for n, layer in layers.items():  # what ``unmerge`` would leave is not quite what was there
            layer.base_layer.weight.data = before[n].clone()
            layer.merged_adapters.clear()
        for n, layer in layers.items():
            want = wanted(kind, [change(layer, before[n], name) for name in names], weight, own.get("density", 1.0))
            off += float((after[n] - before[n] - want).square().sum())
            size += float(want.square().sum())
    except Exception as error:  # any error of theirs is what we want to show
        return {"failed": f"{type(error).__name__}: {str(error)[:160]}"}
    finally:
        if "merged" in model.peft_config:
            model.delete_adapter("merged")
    return {"seconds": seconds, "off": (off / size) ** 0.5}


def main() -> None:
    base, text, *folders = sys.argv[1:]
    settings = json.loads(text)
    started, cpu = time.perf_counter(), time.process_time()
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    weighty = {n: m for n, m in model.named_modules() if settings["compare"] and hasattr(m, "weight")}
    before = {f"base_model.model.{n}": m.weight.detach().clone() for n, m in weighty.items()}
    names = [f"a{i}" for i in range(len(folders))]
    model = PeftModel.from_pretrained(model, folders[0], adapter_name=names[0])
    for name, folder in zip(names[1:], folders[1:], strict=True):
        model.load_adapter(folder, adapter_name=name)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    loaded = time.perf_counter()
    with torch.no_grad():
        found = {k: tried(model, layers, before, names, k, v) for k, v in settings["kinds"].items()}
    told = {"start-up": started - began, "load": loaded - started, "found": found, "cpu": time.process_time() - cpu}
    print(json.dumps(told | {"merge": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
