"""What is installed here, and what machine this is."""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

# What the extras are for
EXTRAS = {
    "demo": "the small sentence encoder that `make demo` and `fanbu init` start from",
    "datasets": "data by name: `datasets:NAME:SPLIT`",
    "media": "images and recordings: decoding and preparing them",
    "track": "rounds and champions in MLflow: `fanbu track`",
    "adapters": "low-rank factors: `lora`, and `layers: lora` at owners",
    "onnx": "ONNX files: `fanbu export --to onnx`",
    "quantize": "checkpoints in int8 and int4",
    "search": "searching for a way down, tuning a way back",
    "privacy": "training with differential privacy at the owner: `learns.privacy`",
    "secure": "sums of masked contributions: `secure: true`",
    "ray": "owners side by side on a Ray cluster",
    "flower": "owners on machines of their own: `fanbu serve-center`, `fanbu join`",
    "docs": "building the documentation",
    "dev": "tests and checks of fanbu itself",
}


def installed() -> list[dict[str, Any]]:
    """Python, fanbu, and what fanbu asks for: name, version (None: missing), whether it is fit, its extra or None."""
    found: list[dict[str, Any]] = [
        {"name": "python", "version": platform.python_version(), "fits": True, "extra": None},
        {"name": "fanbu", "version": _version("fanbu"), "fits": True, "extra": None},
    ]
    for line in metadata.requires("fanbu") or []:
        need = Requirement(line)
        if need.name == "fanbu":
            continue
        extra = next((e for e in EXTRAS if need.marker and not need.marker.evaluate() and _asks(need, e)), None)
        version = _version(need.name)
        fits = version is not None and need.specifier.contains(version, prereleases=True)
        found.append(
            {"name": need.name, "version": version, "fits": fits, "extra": extra, "needs": str(need.specifier)}
        )
    return found


def extras(packages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The extras: name, what for, and whether they are there whole."""
    by_extra: dict[str, list[dict[str, Any]]] = {}
    for package in packages:
        if package["extra"]:
            by_extra.setdefault(package["extra"], []).append(package)
    return [
        {
            "name": name, "for": purpose, "installed": all(p["fits"] for p in by_extra[name]),
            "missing": [p["name"] for p in by_extra[name] if not p["fits"]],
        }
        for name, purpose in EXTRAS.items()
        if name in by_extra
    ]  # fmt: skip


def machine(workspace: Path) -> dict[str, Any]:
    """Cores, memory, room on the workspace's disk, accelerator, and the precision that training takes."""
    import psutil

    from fanbu.machine import resolve_machine

    memory = psutil.virtual_memory()
    device, precision, threads = resolve_machine("auto", "auto", 0)
    return {
        "system": f"{platform.system()} {platform.machine()}", "cores": os.cpu_count(), "threads": threads,
        "memory_bytes": memory.total, "memory_free_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(_standing(workspace)).free, "device": device,
        "accelerator": _accelerator(device), "accelerator_bytes": _accelerator_bytes(device), "precision": precision,
    }  # fmt: skip


def _accelerator(device: str) -> str | None:
    if device != "cuda":
        return None if device == "cpu" else device
    import torch

    return str(torch.cuda.get_device_name())


def _accelerator_bytes(device: str) -> int | None:
    if device != "cuda":
        return None
    import torch

    return int(torch.cuda.mem_get_info()[0])


def _standing(path: Path) -> Path:
    """The nearest folder above that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _asks(need: Requirement, extra: str) -> bool:
    return bool(need.marker and need.marker.evaluate({"extra": extra}))
