"""What a machine computes with."""

from __future__ import annotations

import os

from fanbu.errors import UsageError


def resolve_machine(device: str, precision: str, threads: int) -> tuple[str, str, int]:
    """What ``auto`` means here: CUDA, then MPS, then CPU; bf16 where the CPU or GPU computes in it; all cores."""
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(
            "device",
            "device",
            allowed="auto, cpu, cuda, mps",
            got=f"{device} ({error})".partition("\n")[0],
            remedy="use auto",
        ) from None
    if device == "cuda":  # else its matrix products are not the same twice; read when the first one is made
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if precision == "auto":
        fast = torch.cuda.is_bf16_supported() if device == "cuda" else _cpu_bf16() if device == "cpu" else False
        precision = "bf16" if fast else "fp32"
    return device, precision, threads or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])


def _cpu_bf16() -> bool:
    import torch

    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


_WATTS_OF_CORE, _WATTS_OF_GB = 12.0, 0.3725


def joules(seconds: float, cpu_seconds: float, peak_bytes: float) -> float:
    """The energy that work takes, estimated: 12 W for each second of a core, and 0.3725 W for each GB of memory and
    second. A GPU's part is not in it, nor cooling. Reference: Lannelongue et al. 2021, "Green Algorithms"."""
    return _WATTS_OF_CORE * cpu_seconds + _WATTS_OF_GB * peak_bytes / 1e9 * seconds
