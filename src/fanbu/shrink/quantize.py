"""Quantization: matrices and embeddings in int8 or int4 on disk, in a format that transformers and vLLM load."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fanbu.domain import Domain
from fanbu.errors import FitError, needs_extra
from fanbu.merging.gram import columns, linear_layers, stores_input_first
from fanbu.model import Model, provenance, save_model, tied_copies
from fanbu.predict import validation_value
from fanbu.shrink._rounding import Rounding, on_grid, rounded, scales
from fanbu.shrink._tune import open_for, tune
from fanbu.shrink._units import inner_layers, own_grams
from fanbu.train import set_up
from fanbu.types import Context, Train

CHANGES: frozenset[str] = frozenset({"architecture"})


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    bits: Literal[8, 4] = 8, group: Annotated[int, Ge(0)] = 0, rounding: Rounding = "nearest",
    embeddings: bool = True, train: Train | None = None,
) -> Model:  # fmt: skip
    """Stores the matrices of the layers, and embeddings, as whole numbers with a scale for each row or group.

    w = s q, q in -2^(bits-1) .. 2^(bits-1) - 1; layers outside the blocks (label head, pooler, output embedding) stay
    as they are. The checkpoint is in the ``compressed-tensors`` format: plain transformers loads it where that package
    is installed, and computes in floats; vLLM computes in whole numbers on GPUs. On a CPU it is smaller, not faster:
    for speed there, export to ``onnx-int8`` or ``onnx-int4``, or ``fanbu predict --int8``.

    Args:
        bits: 8 or 4.
        group: so many columns share a scale; 0: a whole row. 4 bits want groups of 32 to 128.
        rounding: ``nearest``; ``activation``: scales that lose least on the domain's texts; ``gptq``: those, and
            columns that make good for others' rounding.
        embeddings: whether token embeddings are quantized too (always in int8, to the nearest, a scale a row).
        train: training with rounded weights first, the gradient passing as if they were not (quantization-aware).

    ``metrics`` of the result hold the validation value before and after.

    Raises:
        FitError: columns do not come in such groups, or there is nothing to quantize.

    References: Frantar et al. 2023 (GPTQ); Lin et al. 2024 (AWQ; its clips, not its scaling of channels); Bengio et
        al. 2013 (straight-through gradient).
    """
    _group([], bits, group)  # before anything is trained: is the library there
    network, tokenizer = open_for(parent, domain, context)
    set_up(context, "quantize", domain.industry)
    names = _layers(network, group)
    before = validation_value(network, tokenizer, domain, context) if len(domain.valid) else None
    metrics: dict[str, float] = {} if before is None else {"valid_before": before}
    if train is not None:
        with _rounding(network, names, bits, group):
            metrics |= tune(network, tokenizer, domain, train, context, f"quantize {domain.industry}")
    steps = _round_layers(network, tokenizer, domain, names, (bits, group, rounding), context)
    table = table_of(network) if embeddings else None
    if table is not None:
        steps[table] = _round_table(network)
    if before is not None:
        metrics["valid"] = validation_value(network, tokenizer, domain, context)
    made = provenance(
        "quantize", [parent], context, domain=domain.name, bits=bits, group=group, rounding=rounding,
        embeddings=embeddings, train=train and vars(train),
    )  # fmt: skip
    made = replace(made, metrics=metrics, data={domain.name: domain.digest})
    return _save(network, tokenizer, out, made, names, steps, bits, group)


def _layers(network: Any, group: int) -> list[str]:
    """The weights of the linear layers inside the blocks."""
    layers, names = linear_layers(network), inner_layers(network)
    if not names or any(stores_input_first(layers[n]) for n in names):
        raise FitError(
            "no-layers", f"{type(network).__name__} has no linear layers in blocks that store [out, in]",
            remedy="export it to onnx-int8 instead",
        )  # fmt: skip
    for name in names:
        width = columns(layers[name]).shape[1]
        if group and width % group:
            raise FitError(
                "not-in-groups", f"inputs of {name} do not come in groups of {group}",
                allowed=f"a divisor of {width}", got=group, remedy="take another group, or 0 for whole rows",
            )  # fmt: skip
    return names


class _Rounded(nn.Module):
    """w -> s round(w / s), with the gradient of w."""

    def __init__(self, bits: int, group: int) -> None:
        super().__init__()
        self.bits, self.group = bits, group

    def forward(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            off = rounded(weight, scales(weight, self.bits, self.group), self.bits) - weight
        return weight + off


@contextmanager
def _rounding(network: Any, names: list[str], bits: int, group: int) -> Iterator[None]:
    """Weights of the named layers are rounded in every forward pass, and are themselves afterwards."""
    layers = [network.get_submodule(n.removesuffix(".weight")) for n in names]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", _Rounded(bits, group))
    yield
    for layer in layers:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)


def _round_layers(
    network: Any, tokenizer: Any, domain: Domain, names: list[str], form: tuple[int, int, Rounding], context: Context
) -> dict[str, Tensor]:
    """Rounds weights in place; their scales by name."""
    bits, group, how = form
    found: Iterable[tuple[str, Tensor | None]] = ((n, None) for n in names)
    if how != "nearest":
        found = own_grams(network, tokenizer, domain, names, context)
    layers = linear_layers(network)
    made = {name: on_grid(columns(layers[name]).cpu(), gram, bits, group, how) for name, gram in found}
    for name, (weight, _) in made.items():  # only now, so that all Gram matrices are of the network as it was
        columns(layers[name]).copy_(weight)
    return {name: step for name, (_, step) in made.items()}


def table_of(network: Any) -> str | None:
    """The name of the token embedding; None where the output embedding is the same matrix, which stays in floats."""
    table, output = network.get_input_embeddings(), network.get_output_embeddings()
    if output is not None and output.weight is table.weight:
        return None
    return next(f"{name}.weight" for name, m in network.named_modules() if m is table)


def _round_table(network: Any) -> Tensor:
    weight = network.get_input_embeddings().weight.detach()
    step = scales(weight.float().cpu(), 8, 0)
    weight.copy_(rounded(weight.float().cpu(), step, 8))
    return step


def _save(
    network: Any, tokenizer: Any, out: Path, made: Any, names: list[str], steps: dict[str, Tensor],
    bits: int, group: int,
) -> Model:  # fmt: skip
    modules = {n: network.get_submodule(n.removesuffix(".weight")) for n in steps}
    copies = tied_copies(network)
    state = {n: t for n, t in network.state_dict().items() if n not in copies}
    groups = [_group(names, bits, group)]
    schemes = dict.fromkeys(names, groups[0])
    tables = [n for n in steps if n not in schemes]
    if tables:
        groups.append(_group(tables, 8, 0, packed=False))
        schemes |= dict.fromkeys(tables, groups[1])
    for name in modules:
        weight = state.pop(name).float().cpu()
        packed = schemes[name][1].compress({"weight": weight, "weight_scale": steps[name]}, schemes[name][0])
        state |= {f"{name.removesuffix('.weight')}.{key}": value.contiguous() for key, value in packed.items()}
    config = {
        **network.config.to_dict(), "architectures": [type(network).__name__], "dtype": "float32",
        "quantization_config": _config([g[0] for g in groups], [g[2] for g in groups]),
    }  # fmt: skip
    return save_model(out, config, state, tokenizer, made)


def _group(names: list[str], bits: int, group: int, packed: bool = True) -> tuple[Any, Any, str]:
    """(scheme, compressor, format) of the compressed-tensors library for some tensors."""
    with needs_extra("quantize"):
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(
        num_bits=bits, type="int", symmetric=True, strategy="group" if group else "channel", group_size=group or None
    )
    form = "pack-quantized" if packed else "int-quantized"
    scheme = QuantizationScheme(targets=[n.removesuffix(".weight") for n in names], weights=weights, format=form)
    return scheme, BaseCompressor.get_value_from_registry(form), form


def _config(schemes: list[Any], forms: list[str]) -> dict[str, Any]:
    from compressed_tensors.quantization import QuantizationConfig

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydantic's notes on enums
        config = QuantizationConfig(
            config_groups={f"group_{i}": s for i, s in enumerate(schemes)}, quantization_status="compressed",
            format=forms[0] if len(set(forms)) == 1 else "mixed-precision",
        )  # fmt: skip
        return dict(config.model_dump(mode="json"))
