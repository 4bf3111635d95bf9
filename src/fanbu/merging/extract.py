"""Adapters written here: what a model changed as a LoRA adapter in PEFT's layout, and several adapters as one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import FitError, UsageError
from fanbu.files import file_sha256, write_text
from fanbu.merging.adapter import CONFIG, PREFIX, WEIGHTS, body_of
from fanbu.merging.factors import FORM, Factored
from fanbu.merging.spectral import Svd, factored_svd, svd
from fanbu.merging.task_vector import HEAD, TaskVector, head_tensors
from fanbu.model import MANIFEST, Model, whole_or_not_at_all
from fanbu.readers import auto_class
from fanbu.tensors import chunks, save_tensors
from fanbu.types import Context

TASKS = {"text-classification": "SEQ_CLS", "causal-lm": "CAUSAL_LM", None: "FEATURE_EXTRACTION"}


@dataclass(frozen=True)
class Extracted:
    """What an adapter holds of a change: rank and relative error |delta - b a| / |delta| of each matrix, by tensor.

    ``left_out`` has the norm of each change that is in no factor (embeddings, norms, biases); ``error`` is over
    everything, those among it. ``bytes`` is the size of its weights.
    """

    path: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    left_out: Mapping[str, float] = field(default_factory=dict)
    error: float = 0.0
    bytes: int = 0


def extract(
    model: Model, base: Model, out: Path, context: Context, *, rank: int | None = None, error: float | None = None
) -> Extracted:  # fmt: skip
    """b a = the best approximation of theta_model - theta_base of ``rank``, or of the least rank that is within
    ``error`` (relative, Frobenius), for each linear layer; PEFT loads the folder that is written.

    One matrix is in memory at a time. A linear layer that did not change has no factors; label rows are kept whole.
    What else changed is left out, and the report says how much that was.

    Raises:
        FitError: the two architectures differ, or no linear layer changed.
        UsageError: not exactly one of rank (1 or more) and error (above 0, below 1).

    Reference: Eckart and Young 1936; Hu et al. 2022, "LoRA".
    """
    _check_aim(rank, error, needed=True)
    vector, linear = TaskVector(model, base), linear_layers(base)
    kept: dict[str, Tensor] = {}
    turned = set()
    ranks, errors, lost, left_out, whole = {}, {}, 0.0, {}, 0.0
    for name in sorted(vector.body):
        power = _power(vector, name)
        whole += power
        if not power:
            continue
        if name not in linear:
            left_out[name] = math.sqrt(power)
            lost += power
            continue
        module, conv = linear[name]
        delta = vector[name].to(context.device)
        b, a, _ = cut(svd(delta.T if conv else delta), rank, error)
        rest = float(torch.addmm(delta.T if conv else delta, b, a, alpha=-1).double().square().sum())
        ranks[name], errors[name] = a.shape[0], math.sqrt(rest / power)
        lost += rest
        kept |= _factors(module, b, a)
        turned |= {conv}
    if not kept:
        raise FitError(
            "nothing-to-extract", f"no linear layer of {model.path} differs from the base", got=list(left_out)[:6],
            remedy="give a model that was trained from this base",
        )  # fmt: skip
    heads = [n for n in vector if n.startswith(HEAD)]
    kept |= {PREFIX + n.removeprefix(HEAD): vector[n] for n in heads}
    modules = {m: r for (m, _), r in ((linear[n], r) for n, r in ranks.items())}
    origin = {"base": base.digest, "parents": [base.digest, model.digest], "method": "extract"}
    size = _save(out, base, modules, kept, heads, True in turned, origin)
    return Extracted(out, ranks, errors, left_out, math.sqrt(lost / whole), size)


def join_adapters(
    contributions: Sequence[Contribution], base: Model, out: Path, context: Context, *, scale: float = 1.0,
    weights: Mapping[str, float] | None = None, rank: int | None = None, error: float | None = None,
) -> Extracted:  # fmt: skip
    """One adapter for scale * sum over the specialists of w_i delta_i (what task_arithmetic adds): b = [w_i b_i ...],
    a = [a_i ...], exact and of the sum of the ranks; with ``rank`` or ``error`` cut to that by the SVD of b a, which
    is never made.

    Label rows are left out: they stay in the contributions.

    Raises FitError for contributions that are no adapters, or whose change is no sum of products (DoRA, biases,
    modules that were saved whole); UsageError as ``extract``.
    """
    _check_aim(rank, error, needed=False)
    ordered, linear = sorted(contributions, key=lambda c: c.domain), linear_layers(base)
    sources = [_products(c, base) for c in ordered]
    levels = [scale * (weights or {}).get(c.domain, 1.0) for c in ordered]
    kept: dict[str, Tensor] = {}
    turned, ranks, errors, lost, whole = set(), {}, {}, 0.0, 0.0
    for name in sorted({n for s in sources for n in s.low}):
        if name not in linear:
            raise _no_product(name, "a change of an embedding cannot be joined into factors of linear layers")
        module, conv = linear[name]
        pairs = [p for s in sources if (p := s.factors(name, torch.device(context.device)))]
        b = torch.cat([pair[0] * w for pair, w in zip(pairs, levels, strict=True)], 1)
        a = torch.cat([pair[1] for pair in pairs])
        rest, power = 0.0, 0.0
        if rank or error or a.shape[0] > min(b.shape[0], a.shape[1]):
            found = factored_svd(b, a)
            b, a, rest = cut(found, rank, error)
            power = float(found.s.square().sum())
        ranks[name], errors[name] = a.shape[0], math.sqrt(rest / power) if power else 0.0
        lost, whole = lost + rest, whole + power
        kept |= _factors(module, *((a.T, b.T) if conv else (b, a)))
        turned |= {conv}
    modules = {linear[n][0]: r for n, r in ranks.items()}
    origin = {
        "base": base.digest, "parents": [base.digest], "method": "join_adapters",
        "contributions": {c.domain: c.digest for c in ordered}, "weights": levels,
    }  # fmt: skip
    size = _save(out, base, modules, kept, [], True in turned, origin)
    return Extracted(out, ranks, errors, {}, math.sqrt(lost / whole) if whole else 0.0, size)


def cut(found: Svd, rank: int | None, error: float | None) -> tuple[Tensor, Tensor, float]:
    """(b [rows, r], a [r, columns], |what is left out|^2) in float32, the singular values shared evenly by b and a.

    r is ``rank``, or the least whose rest is within ``error`` of all; at least 1, and at most the rank there is.
    """
    powers = found.s.square()
    count = rank or len(powers)
    if error is not None:
        rest = powers.sum() - powers.cumsum(0)
        # a little stricter than asked: factors are stored in float32
        count = 1 + int((rest > powers.sum() * (error * (1 - 1e-4)) ** 2).sum())
    part = found.top(max(1, count))
    root = part.s.sqrt()
    b, a = (part.u * root).float(), (part.v * root).T.float()
    return b, a, float(powers[len(root) :].sum())


def linear_layers(base: Model) -> dict[str, tuple[str, bool]]:
    """(module, whether its weight is stored as [in, out]) by the name of its weight in the base's checkpoint.

    Modules have the names that transformers gives them; label rows are left out. No weight is read.
    """
    import transformers
    from torch import nn

    config = transformers.AutoConfig.from_pretrained(base.path, local_files_only=True, trust_remote_code=False)
    kind = auto_class(base.task) if base.task else transformers.AutoModel
    with torch.device("meta"):
        network = kind.from_config(config, trust_remote_code=False)
    known, heads = base.tensors, set(head_tensors(base))
    prefix = f"{network.base_model_prefix}."
    found = {}
    for module, layer in network.named_modules():
        conv = type(layer).__name__ == "Conv1D"
        # a checkpoint of the bare body lacks the prefix
        names = [f"{module}.weight", f"{module}.weight".removeprefix(prefix)]
        name = next((n for n in names if n in known), None)
        if name and name not in heads and (conv or isinstance(layer, nn.Linear)):
            found[name] = (module, conv)
    return found


def _products(c: Contribution, base: Model) -> Factored:
    if c.meta.get("form") != FORM:
        raise _no_product(c.domain, "it is no adapter")
    source = Factored(c.tensors, body_of(base), c.domain)
    if source.dora or source.new:
        raise _no_product(c.domain, "DoRA, biases and modules saved whole are no products of factors")
    return source


def _no_product(what: str, why: str) -> FitError:
    return FitError(
        "no-product", f"{what} cannot become part of one adapter: {why}", allowed="LoRA and rsLoRA of linear layers",
        got=what, remedy="merge into a full model (fanbu feed) and extract an adapter from that",
    )  # fmt: skip


def _check_aim(rank: int | None, error: float | None, *, needed: bool) -> None:
    given = [v for v in (rank, error) if v is not None]
    sound = (rank is None or rank >= 1) and (error is None or 0 < error < 1)
    if len(given) > 1 or (needed and not given) or not sound:
        raise UsageError(
            "bad-parameter", "an adapter's size", allowed="either rank >= 1 or 0 < error < 1",
            got=f"rank {rank}, error {error}", remedy="give one of the two",
        )  # fmt: skip


def _power(vector: TaskVector, name: str) -> float:
    """|delta|^2 of one tensor."""
    shape, _ = vector.layout(name)
    return sum(float(vector.rows(name, *span).double().square().sum()) for span in chunks(shape))


def _factors(module: str, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{module}.lora_A.weight": a.contiguous().cpu(), f"{PREFIX}{module}.lora_B.weight": b.contiguous().cpu()
    }  # fmt: skip


def _save(
    out: Path, base: Model, modules: Mapping[str, int], kept: Mapping[str, Tensor], heads: Sequence[str], conv: bool,
    origin: Mapping[str, Any],
) -> int:  # fmt: skip
    """The folder as PEFT reads it, alpha = r everywhere so that nothing is scaled; returns the bytes of its weights."""
    common = max(set(modules.values()), key=lambda r: (list(modules.values()).count(r), r))
    other = {f"^{m}": r for m, r in sorted(modules.items()) if r != common}
    config = {
        "peft_type": "LORA", "task_type": TASKS.get(base.task), "base_model_name_or_path": None, "r": common,
        "lora_alpha": common, "rank_pattern": other, "alpha_pattern": other, "target_modules": sorted(modules),
        "bias": "none", "fan_in_fan_out": conv, "lora_dropout": 0.0, "inference_mode": True, "init_lora_weights": True,
        "modules_to_save": sorted({n.removeprefix(HEAD).rpartition(".")[0] for n in heads}) or None,
        "use_rslora": False, "use_dora": False,
    }  # fmt: skip
    with whole_or_not_at_all(out) as partial:
        save_tensors(partial / WEIGHTS, kept)
        write_text(partial / CONFIG, json.dumps(config, indent=1, sort_keys=True))
        files = {name: file_sha256(partial / name) for name in (WEIGHTS, CONFIG)}
        write_text(partial / MANIFEST, json.dumps({"format": 1, "files": files, **origin}, indent=1, sort_keys=True))
    return sum(t.numel() * t.element_size() for t in kept.values())
