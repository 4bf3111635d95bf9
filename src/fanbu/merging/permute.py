"""What may be reordered in a transformer checkpoint without changing what it computes, found from names and config.

A network's neurons have no order: rows of the matrix that writes them and columns of the one that reads them may be
moved together. The same holds for attention heads (with grouped queries: key/value heads with their query heads, and
query heads within their group) and, since LayerNorm and RMSNorm treat channels alike, for the hidden channels.
What is not known is refused by name; nothing is guessed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fanbu.errors import FitError
from fanbu.merging.families import FAMILIES, Family, Port
from fanbu.model import Model
from fanbu.tensors import Tensors, TensorSpec

Kind = Literal["neurons", "heads", "channels"]
HIDDEN = ("hidden_size", "n_embd", "dim", "d_model")  # what configs call it
HEADS = ("num_attention_heads", "n_head", "n_heads", "encoder_attention_heads")
Order = Mapping[str, Tensor]  # by a symmetry's name: the new unit i is the old unit order[i]


@dataclass(frozen=True)
class Axis:
    """One stretch of one dimension of a tensor: ``block`` numbers for each unit, from index ``first`` on.

    ``grouped``: its units are key/value heads, not query heads. ``fixed``: moved, but not looked at when units are
    compared (both dimensions of the tensor move with the same units, which is no linear assignment).
    """

    tensor: str
    dim: int
    block: int = 1
    first: int = 0
    grouped: bool = False
    fixed: bool = False


@dataclass(frozen=True)
class Symmetry:
    """Units that may change places, and all that moves with them. ``reader`` is the weight that multiplies them.

    ``units`` are neurons, query heads or channels; ``group`` query heads share one key/value head.
    """

    name: str
    kind: Kind
    layer: int
    units: int
    axes: tuple[Axis, ...]
    group: int = 1
    reader: str = ""


# Heads of classifiers: whether they read the hidden channels, or what a pooler made of them.
_READ_HIDDEN = r"(classifier|qa_outputs)\.weight|classifier\.dense\.weight"
_READ_NOTHING = r"(classifier|qa_outputs)\.bias|classifier\.(dense\.bias|out_proj\.(weight|bias))"
_LAYER = re.compile(r"^((?:.*\.)?(?:layer|layers|h)\.(\d+)\.)(.+)$")


def setting(model: Model, *names: str) -> Any:
    """The first of some config values that is there; None where none is."""
    return next((model.config[n] for n in names if model.config.get(n) is not None), None)


def hidden_of(model: Model) -> int:
    """How many hidden channels a model has."""
    return int(setting(model, *HIDDEN) or 0)


def heads_of(model: Model) -> tuple[int, int, int]:
    """Query heads, key/value heads and numbers in a head, by the config."""
    heads = int(setting(model, *HEADS) or 1)
    keys = int(setting(model, "num_key_value_heads") or heads)
    return heads, keys, int(setting(model, "head_dim") or hidden_of(model) // heads)


def is_body(model: Model) -> bool:
    """Whether a model has no head, so that it returns its hidden channels."""
    name = str((model.config.get("architectures") or ["Model"])[0])
    return name.endswith("Model") and not name.endswith(("LMHeadModel", "DoubleHeadsModel"))


def is_rotary(model: Model) -> bool:
    """Whether positions are turned into queries and keys, so that a head's numbers have their places."""
    return _family(model).rotary


def head_width_of(model: Model) -> str:
    """The config's name for the numbers in a head, where that is free of the hidden size; else empty."""
    return _family(model).head_width


def plain(model: Model, name: str) -> str:
    """A tensor's name as the bare body has it, so that a body and a classifier on it can be compared."""
    return next((name.removeprefix(p) for p in _family(model).prefixes if name.startswith(p)), name)


def symmetries(model: Model, *, residual: bool = False) -> tuple[Symmetry, ...]:
    """All that may be permuted, layer by layer; with ``residual`` the hidden channels too, first of all.

    Raises FitError ``not-permutable`` for a model type that is not known, and, by name, for a tensor of a layer that
    is not known, is missing or has another size than the config says.
    """
    family, found = _family(model), []
    layers: dict[str, tuple[int, set[str]]] = {}
    for name in model.tensors:
        if part := _LAYER.match(name):
            layers.setdefault(part[1], (int(part[2]), set()))[1].add(part[3])
    heads, keys, width = heads_of(model)
    if heads % max(1, keys) or not layers:
        raise _refused(model, "no layers, or query heads that key/value heads do not divide", f"{heads} and {keys}")
    for before, (layer, inside) in sorted(layers.items(), key=lambda item: item[1][0]):
        neurons = _units(model, family, before + family.neurons[-1].module + ".weight")
        found.append(_symmetry(model, family, before, layer, "neurons", family.neurons, neurons, 1, 1))
        found.append(_symmetry(model, family, before, layer, "heads", family.heads, heads, heads // keys, width))
        _check_known(model, family, before, inside)
    if residual:
        found.insert(0, _channels(model, family))
    return tuple(found)


def _family(model: Model) -> Family:
    kind = str(model.config.get("model_type"))
    for family in FAMILIES.get(kind, ()):
        end = f"{family.heads[0].module}.weight"
        if any(name.endswith(end) for name in model.tensors):
            return family
    known = sorted(FAMILIES)
    if kind in known:
        raise _refused(model, f"no layer of a {kind} as the library stores it", sorted(model.tensors)[:4])
    raise FitError(
        "not-permutable", f"{model.path}: what may be reordered in this model type is not known", allowed=known,
        got=kind, remedy="use distill, which needs nothing in common",
    )  # fmt: skip


def _refused(model: Model, why: str, got: object, allowed: object = None) -> FitError:
    return FitError(
        "not-permutable", f"{model.path} cannot be reordered: {why}", allowed=allowed, got=got,
        remedy="give the checkpoint as plain transformers saves it, or use distill, which needs nothing in common",
    )  # fmt: skip


def _units(model: Model, family: Family, reader: str) -> int:
    spec = model.tensors.get(reader)
    if spec is None or len(spec.shape) != 2:
        raise _refused(model, f"tensor {reader!r} is missing or no matrix", spec and spec.shape)
    return spec.shape[0 if family.input_first else 1]


def _symmetry(
    model: Model, family: Family, before: str, layer: int, kind: Kind, ports: Sequence[Port], units: int, group: int,
    width: int,
) -> Symmetry:  # fmt: skip
    axes: list[Axis] = []
    for port in ports:
        count = units // group if port.grouped else units
        for name, dim in _tensors_of(model, family, before, port):
            block = width * port.wide
            shape, size = model.tensors[name].shape, count * block * port.parts
            if dim >= len(shape) or shape[dim] != size:
                raise _refused(model, f"tensor {name!r} has another size than the config says", shape, size)
            axes.append(Axis(name, dim, block, port.part * count * block, port.grouped))
    return Symmetry(f"{before}{kind}", kind, layer, units, tuple(axes), group, f"{before}{ports[-1].module}.weight")


def _tensors_of(model: Model, family: Family, before: str, port: Port) -> Iterator[tuple[str, int]]:
    name = before + port.module
    if name in model.tensors:
        yield name, 0
    if f"{name}.weight" in model.tensors:
        yield f"{name}.weight", int(port.reads != family.input_first)
        if f"{name}.bias" in model.tensors and not port.reads:
            yield f"{name}.bias", 0
    elif name not in model.tensors and not re.search(r"(pos_\w+|[qv]_bias)$", port.module):  # only some models have it
        raise _refused(model, f"tensor {name + '.weight'!r} is missing", sorted(model.tensors)[:4])


def _check_known(model: Model, family: Family, before: str, inside: Iterable[str]) -> None:
    modules = {p.module for p in (*family.neurons, *family.heads)}
    known = modules | {f"{m}.{end}" for m in modules for end in ("weight", "bias")}
    fine = re.compile(rf"(?:{family.norms})\.(?:weight|bias|gamma|beta)|{family.kept}")
    for rest in sorted(inside):
        if rest not in known and not fine.fullmatch(rest):
            raise _refused(model, f"tensor {before + rest!r} is not known", model.tensors[before + rest].shape)


def _channels(model: Model, family: Family) -> Symmetry:
    """The hidden channels: all tensors that write or read them, in the layers and around them."""
    axes, hidden = [], hidden_of(model)
    for name, spec in sorted(model.tensors.items()):
        part = _LAYER.match(name)
        dims = _hidden_inside(family, part[3]) if part else _hidden_outside(model, family, name)
        for dim in dims:
            if dim >= len(spec.shape) or spec.shape[dim] != hidden:
                raise _refused(model, f"tensor {name!r} does not have the hidden size", spec.shape, hidden)
            axes.append(Axis(name, dim, fixed=len(dims) > 1))
    return Symmetry("channels", "channels", -1, hidden, tuple(axes))


def _hidden_inside(family: Family, rest: str) -> tuple[int, ...]:
    if re.fullmatch(rf"(?:{family.norms})\..*", rest):
        return (0,)
    for port in (*family.neurons, *family.heads):
        if rest == f"{port.module}.weight":
            return (int(port.reads == family.input_first),)
        if rest == f"{port.module}.bias" and port.reads:
            return (0,)
    return ()


def _hidden_outside(model: Model, family: Family, name: str) -> tuple[int, ...]:
    rest = plain(model, name)
    for pattern, dims in family.outside.items():
        if re.fullmatch(pattern, rest):
            return dims
    if re.fullmatch(_READ_NOTHING, rest):
        return ()
    if re.fullmatch(_READ_HIDDEN, rest):
        pooled = any(re.search(r"(^|\.)(pooler\.dense|pre_classifier)\.weight$", n) for n in model.tensors)
        return () if pooled else (1,)
    raise _refused(model, f"whether tensor {name!r} reads hidden channels is not known", model.tensors[name].shape)


# Moving


Moves = dict[str, dict[int, Tensor]]


def moves(specs: Mapping[str, TensorSpec], found: Iterable[Symmetry], order: Order) -> Moves:
    """For each tensor and dimension that moves: where each new index comes from. Symmetries without order stay."""
    result: Moves = {}
    for symmetry in found:
        if symmetry.name not in order:
            continue
        units = order[symmetry.name]
        for axis in symmetry.axes:
            index = result.setdefault(axis.tensor, {})
            size = specs[axis.tensor].shape[axis.dim]
            places = index.setdefault(axis.dim, torch.arange(size))
            chosen = units[:: symmetry.group] // symmetry.group if axis.grouped else units
            taken = axis.first + (chosen[:, None] * axis.block + torch.arange(axis.block)).flatten()
            places[axis.first : axis.first + len(taken)] = taken
    return result


def moved_rows(tensors: Tensors, name: str, start: int, stop: int, moved: Moves) -> Tensor:
    """Rows start..stop of a tensor as it is after moving, in its stored dtype; only these are read."""
    index = moved.get(name, {})
    if 0 in index:
        rows = tensors.rows(name, 0, tensors.specs[name].rows)[index[0][start:stop]]
    else:
        rows = tensors.rows(name, start, stop)
    for dim, places in index.items():
        if dim:
            rows = rows.index_select(dim, places)
    return rows


def units_of(tensor: Tensor, axis: Axis, count: int) -> Tensor:
    """[units, features] in float32: what one tensor holds of each unit."""
    part = tensor.float().narrow(axis.dim, axis.first, count * axis.block).movedim(axis.dim, 0)
    return part.reshape(count, axis.block * math.prod(part.shape[1:]))
