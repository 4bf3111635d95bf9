"""Which units of a network stay when it becomes narrower, and the smaller network that they make.

Units are neurons, heads (with shared keys and values: all heads of a group) and hidden channels, as
``merging.permute`` finds them; what it does not know is refused by name.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fanbu.batches import encode, evenly, pad_id, sorted_batches
from fanbu.domain import Domain
from fanbu.errors import FitError
from fanbu.merging.gram import columns, grams, linear_layers, own_texts, stores_input_first
from fanbu.merging.permute import (
    HEADS,
    HIDDEN,
    Axis,
    Kind,
    Symmetry,
    head_width_of,
    heads_of,
    hidden_of,
    symmetries,
    units_of,
)
from fanbu.model import Model
from fanbu.predict import limit
from fanbu.shrink._tune import of_rows
from fanbu.tensors import TensorSpec
from fanbu.types import Context

Importance = Literal["activation", "taylor", "magnitude"]
Keep = dict[str, Tensor]  # by a symmetry's name: the units that stay, ascending

_SAMPLE = 256
_POOLER = re.compile(r"(?:^|\.)(?:pooler\.dense|pre_classifier|classifier\.dense)\.(?:weight|bias)$")
_AFTER_POOLER = re.compile(r"(?:^|\.)(?:classifier|classifier\.out_proj|qa_outputs|score)\.weight$")
_VALUES = re.compile(r"\.value\.weight$")
_SIZES: dict[Kind, tuple[str, ...]] = {
    "neurons": ("intermediate_size", "n_inner", "hidden_dim", "encoder_ffn_dim"),
    "heads": HEADS,
    "channels": HIDDEN,
}


@dataclass(frozen=True)
class Units:
    """A network's units: of each layer its neurons and heads; the channels and what a pooler makes of them.

    ``followers`` are sets whose units go with the channels of the same number: what ``heads.append_mean_layer`` made,
    where the values and the pooler are close to the identity. ``free_heads``: the config says how wide a head is, so
    heads can go without channels. ``hidden``: the hidden size, where the config insists that heads divide it; else 0.
    """

    layers: tuple[Symmetry, ...]
    channels: Symmetry | None = None
    pooled: Symmetry | None = None
    followers: tuple[Symmetry, ...] = ()
    free_heads: bool = False
    hidden: int = 0

    @property
    def sets(self) -> list[Symmetry]:
        """All of them."""
        return [*self.layers, *self.followers, *(s for s in (self.channels, self.pooled) if s)]

    def chosen(self, counts: Mapping[str, int]) -> list[Symmetry]:
        """Those of which some go, and which are chosen by their own importance."""
        return [s for s in self.sets if s.name in counts and s not in self.followers]

    def of(self, kind: Kind) -> list[Symmetry]:
        """The sets of one kind, layer by layer."""
        if kind == "channels":
            return [s for s in (self.channels,) if s]
        return [s for s in self.layers if s.kind == kind]


def units(network: Any, model: Model, *, channels: bool) -> Units:
    """What can be cut in a network that is in memory. Raises FitError for what is not known, by name."""
    seen = _described(network, model)
    found = symmetries(seen, residual=channels)
    layers, free = tuple(s for s in found if s.kind != "channels"), head_width_of(seen) != ""
    divided = hidden_of(seen) if free and _heads_divide(network, hidden_of(seen)) else 0
    if not channels:
        return Units(layers, free_heads=free, hidden=divided)
    state, pooled = network.state_dict(), _pooled(seen)
    following = [
        s
        for s in layers
        if s.kind == "heads" and any(_VALUES.search(a.tensor) and follows(state[a.tensor]) for a in s.axes)
    ]
    if len(following) == sum(s.kind == "heads" for s in layers):
        following = []  # then they are all the heads there are, and go as heads
    followers = [
        replace(s, kind="channels", units=hidden_of(seen), axes=tuple(replace(a, block=1) for a in s.axes))
        for s in following
    ]
    if pooled and follows(state[pooled.axes[0].tensor]):
        followers, pooled = [*followers, pooled], None
    return Units(tuple(s for s in layers if s not in following), found[0], pooled, tuple(followers), free, divided)


def _heads_divide(network: Any, hidden: int) -> bool:
    """Whether the config takes no number of heads that does not divide the hidden size (Llama)."""
    heads = {"num_attention_heads": hidden + 1, "num_key_value_heads": hidden + 1}
    try:
        type(network.config).from_dict({**network.config.to_dict(), **heads})
    except Exception:  # each library has an error of its own for a config that it refuses
        return True
    return False


def _pooled(seen: Model) -> Symmetry | None:
    """What a pooler makes of the channels: as many numbers, in an order of their own."""
    axes = [Axis(n, 0) for n in sorted(seen.tensors, reverse=True) if _POOLER.search(n)]
    if not axes:
        return None
    readers = [Axis(n, 1) for n in seen.tensors if _AFTER_POOLER.search(n)]
    return Symmetry("pooled", "channels", -1, hidden_of(seen), (*axes, *readers))


def _described(network: Any, model: Model) -> Model:
    """The network as a Model: names and shapes, nothing on the disk."""
    config = {**network.config.to_dict(), "architectures": [type(network).__name__]}
    described = Model(model.path, config)
    specs = {n: TensorSpec(model.path, tuple(t.shape), "F32") for n, t in network.state_dict().items()}
    described.__dict__["tensors"] = specs
    return described


# Importance


def importances(
    network: Any, tokenizer: Any, domain: Domain, found: Sequence[Symmetry], how: Importance, context: Context
) -> dict[str, Tensor]:
    """[units] for each set, in float32.

    activation: sum over the layers that read a unit of sqrt(E |W_u x_u|^2 taken number by number), that is
    sqrt(sum_i E x_i^2 |W_i|^2) over the unit's numbers i and the layer's columns W_i (forward only, no labels).
    taylor: E |sum_i x_i dL/dx_i| over texts, what zeroing the unit changes to first order (Michel et al. 2019).
    magnitude: the length of all weights that move with the unit.
    """
    if how == "magnitude":
        state = network.state_dict()
        return {s.name: _magnitude(s, state) for s in found}
    readers = {s.name: _readers(network, s) for s in found}
    if how == "taylor":
        return _taylor(network, tokenizer, domain, found, readers, context)
    squares = _mean_squares(network, tokenizer, domain, sorted({r for rs in readers.values() for r in rs}), context)
    return {
        s.name: sum((_written(network, s, r, squares[r]) for r in readers[s.name]), torch.zeros(s.units)) for s in found
    }


def _magnitude(symmetry: Symmetry, state: Mapping[str, Tensor]) -> Tensor:
    total = torch.zeros(symmetry.units)
    for axis in symmetry.axes:
        group = symmetry.group if axis.grouped else 1
        squares = units_of(state[axis.tensor], axis, symmetry.units // group).square().sum(1).cpu()
        total += squares.repeat_interleave(group) / group
    return total.sqrt()


def _readers(network: Any, symmetry: Symmetry) -> list[str]:
    """The weights of the linear layers that multiply a set's units."""
    if symmetry.reader:
        return [symmetry.reader]
    layers = linear_layers(network)
    return [
        a.tensor for a in symmetry.axes
        if a.tensor in layers and (a.dim == (0 if stores_input_first(layers[a.tensor]) else 1))
    ]  # fmt: skip


def inner_layers(network: Any) -> list[str]:
    """The weights of the linear layers inside the blocks: no embeddings, poolers or heads."""
    stacks = [name for name, m in network.named_modules() if isinstance(m, nn.ModuleList)]
    return [n for n in linear_layers(network) if any(n.startswith(f"{s}.") for s in stacks)]


def _written(network: Any, symmetry: Symmetry, reader: str, squares: Tensor) -> Tensor:
    lengths = columns(linear_layers(network)[reader]).float().square().sum(0).cpu()
    return (squares * lengths).reshape(symmetry.units, -1).sum(1).sqrt()


def _mean_squares(
    network: Any, tokenizer: Any, domain: Domain, names: Sequence[str], context: Context
) -> dict[str, Tensor]:
    return {n: g.diagonal().clone() for n, g in own_grams(network, tokenizer, domain, names, context)}


def own_grams(
    network: Any, tokenizer: Any, domain: Domain, names: Sequence[str], context: Context
) -> Iterator[tuple[str, Tensor]]:
    """Each layer's G [in, in] = E x x^T over the domain's texts, as many at a time as ``context.memory`` holds.

    Raises FitError for a layer that no text reaches.
    """
    for part in _parts(network, names, context):
        matrices, leader = grams(network, tokenizer, own_texts(domain, _SAMPLE), part, context)
        for name in part:
            if name not in leader:
                raise FitError(
                    "layer-unused", f"layer {name} was given nothing by any text", remedy="take importance: magnitude"
                )
            yield name, matrices[leader[name]]


def _parts(network: Any, names: Sequence[str], context: Context) -> Iterator[list[str]]:
    layers, part, room = linear_layers(network), list[str](), context.memory
    for name in names:
        size = 4 * columns(layers[name]).shape[1] ** 2
        if part and size > room:
            yield part
            part, room = [], context.memory
        part.append(name)
        room -= size
    if part:
        yield part


def _taylor(
    network: Any, tokenizer: Any, domain: Domain, found: Sequence[Symmetry], readers: Mapping[str, Sequence[str]],
    context: Context,
) -> dict[str, Tensor]:  # fmt: skip
    numbers = evenly(range(len(domain.train)), _SAMPLE)
    sequences = encode(tokenizer, [domain.train.texts[i] for i in numbers], limit(network, context))
    loss = of_rows(domain, sequences, numbers, pad_id(tokenizer), context.device)
    totals = {s.name: torch.zeros(s.units) for s in found}
    layers, given, sizes = linear_layers(network), dict[str, Tensor](), set[int]()

    def look(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if name in given or inputs[0][..., 0].numel() not in sizes:
                return inputs  # DeBERTa's layers read embeddings of distances too
            x = inputs[0] if inputs[0].requires_grad else inputs[0].requires_grad_()
            x.retain_grad()
            given[name] = x
            return (x, *inputs[1:])

        return hook

    used = sorted({r for rs in readers.values() for r in rs})
    handles = [layers[n].register_forward_pre_hook(look(n)) for n in used]
    network.to(context.device).eval()
    try:
        for rows in sorted_batches([len(s) for s in sequences], 16):
            sizes.clear()
            sizes.update({len(rows), len(rows) * max(len(sequences[i]) for i in rows)})
            with torch.enable_grad():
                (loss(network, rows) * len(rows)).backward()
            for s in found:
                for x in {id(given[r]): given[r] for r in readers[s.name] if r in given}.values():
                    if x.grad is not None:
                        product = (x.detach() * x.grad).float().reshape(len(rows), -1, s.units, x.shape[-1] // s.units)
                        totals[s.name] += product.sum((1, 3)).abs().sum(0).cpu()
            given.clear()
            network.zero_grad()
    finally:
        for handle in handles:
            handle.remove()
    return totals


# Choosing


def best(scores: Tensor, count: int, group: int = 1) -> Tensor:
    """The ``count`` most important units, ascending; with ``group`` whole groups of so many, by their sum."""
    blocks = scores.reshape(-1, group).sum(1)
    chosen = blocks.topk(count // group).indices.sort().values
    return (chosen[:, None] * group + torch.arange(group)).flatten()


def first_units(counts: Mapping[str, int]) -> Keep:
    """Any units, of the right numbers: sizes and times do not depend on which."""
    return {name: torch.arange(count) for name, count in counts.items()}


def counted(total: int, share: float) -> int:
    """How many of ``total`` stay: a multiple of 8 where there are many, and at least one (or eight)."""
    unit = 1 if total < 64 else 8
    return max(unit, min(total, round(total * share / unit) * unit))


def counts_of(found: Units, shares: Mapping[str, float]) -> dict[str, int]:
    """How many units of each set stay, by the shares of ``neurons``, ``heads`` and ``channels``; sets that stay whole
    are not named."""
    counts: dict[str, int] = {}
    if shares["neurons"] < 1:
        counts |= {s.name: counted(s.units, shares["neurons"]) for s in found.of("neurons")}
    heads, share = found.of("heads"), shares["heads"] if found.free_heads else shares["channels"]
    if share < 1:
        whole = found.hidden if shares["channels"] == 1 else 0
        counts |= {s.name: _dividing(whole, s, counted(s.units // s.group, share) * s.group) for s in heads}
    if found.channels and shares["channels"] < 1:
        total, some = found.channels.units, counts.get(heads[0].name, heads[0].units)
        if found.free_heads:  # plain configs insist on a multiple of the number of heads
            wanted = counted(total, shares["channels"])
            hidden = max(some, min(total // some, round(wanted / some)) * some)
        else:
            hidden = some * (total // heads[0].units)
        counts |= {s.name: hidden for s in (found.channels, found.pooled, *found.followers) if s}
    return counts


def _dividing(hidden: int, heads: Symmetry, count: int) -> int:
    """At least so many heads, and a number that divides the hidden size (0: any)."""
    return next(n for n in range(count, heads.units + 1, heads.group) if hidden % n == 0)


def kept_of(found: Units, counts: Mapping[str, int], scores: Mapping[str, Tensor]) -> Keep:
    """The units that stay, by their importance; followers go with the channels."""
    keep = {s.name: best(scores[s.name], counts[s.name], s.group) for s in found.chosen(counts)}
    if found.channels and found.channels.name in keep:
        keep |= {s.name: keep[found.channels.name] for s in found.followers}
    return keep


# The smaller network


def follows(weight: Tensor) -> bool:
    """Whether a square matrix carries channel i to number i above all: more than half its squares on the diagonal."""
    square = weight.ndim == 2 and weight.shape[0] == weight.shape[1]
    return square and bool(weight.diagonal().square().sum() > 0.5 * weight.square().sum())


Indices = dict[str, dict[int, Tensor]]


def indices(found: Iterable[Symmetry], keep: Keep, shapes: Mapping[str, Sequence[int]]) -> Indices:
    """For each tensor and dimension that becomes smaller: the places that stay, ascending."""
    stay: dict[str, dict[int, Tensor]] = {}
    for s in found:
        if s.name not in keep:
            continue
        for axis in s.axes:
            dims = stay.setdefault(axis.tensor, {})
            mask = dims.setdefault(axis.dim, torch.ones(shapes[axis.tensor][axis.dim], dtype=torch.bool))
            group = s.group if axis.grouped else 1
            kept = torch.zeros(s.units // group, dtype=torch.bool)
            kept[keep[s.name][::group] // group] = True
            stretch = kept.repeat_interleave(axis.block)
            mask[axis.first : axis.first + len(stretch)] &= stretch
    return {name: {dim: mask.nonzero()[:, 0] for dim, mask in dims.items()} for name, dims in stay.items()}


Shapes = dict[str, list[int]]


def shapes_of(network: Any) -> Shapes:
    """Shapes by name, of tied tensors once."""
    seen, shapes = set[int](), Shapes()
    for name, tensor in network.state_dict().items():
        if tensor.data_ptr() not in seen:
            shapes[name] = list(tensor.shape)
        seen.add(tensor.data_ptr())
    return shapes


def shapes_with(shapes: Shapes, found: Units, counts: Mapping[str, int]) -> Shapes:
    """What they would be with so many units."""
    cut = [replace(s, axes=tuple(a for a in s.axes if a.tensor in shapes)) for s in found.sets]
    places = indices(cut, first_units(counts), shapes)
    return {
        name: [len(places.get(name, {}).get(dim, range(size))) for dim, size in enumerate(shape)]
        for name, shape in shapes.items()
    }


def size_of(network: Any, found: Units | None = None, counts: Mapping[str, int] | None = None) -> int:
    """How many parameters a network has, tied ones once; with ``counts`` how many it would have with so many units."""
    shapes = shapes_of(network)
    if found is not None and counts is not None:
        shapes = shapes_with(shapes, found, counts)
    return parameters_of(shapes)


def parameters_of(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(map(math.prod, shapes.values()))


def narrowed(network: Any, found: Units, keep: Keep, model: Model) -> Any:
    """A network with the kept units alone, of the same class, whose plain config says its sizes."""
    state = network.state_dict()
    places = indices(found.sets, keep, {n: t.shape for n, t in state.items()})
    config = smaller_config(network, found, {k: len(v) for k, v in keep.items()}, model)
    smaller = type(network)._from_config(config, dtype=next(network.parameters()).dtype)
    cut = {}
    for name, tensor in state.items():
        for dim, index in places.get(name, {}).items():
            tensor = tensor.index_select(dim, index.to(tensor.device))
        cut[name] = tensor
    smaller.load_state_dict(cut, strict=True)
    smaller.tie_weights()
    _rescale_embeddings(network, smaller)
    return smaller.to(next(network.parameters()).device)


def _rescale_embeddings(network: Any, smaller: Any) -> None:
    """Gemma multiplies embeddings by sqrt(hidden size): what that lost goes into their rows, and, where the head is
    the same matrix, out of the final norm, whose gain is 1 + its weight."""
    factor = math.sqrt(network.config.hidden_size / smaller.config.hidden_size)
    if not str(network.config.model_type).startswith("gemma") or factor == 1:
        return
    with torch.no_grad():
        smaller.get_input_embeddings().weight.mul_(factor)
        output = smaller.get_output_embeddings()
        if output is not None and output.weight is smaller.get_input_embeddings().weight:
            norm = smaller.base_model.norm.weight
            norm.copy_((1 + norm) / factor - 1)


def smaller_config(network: Any, found: Units, counts: Mapping[str, int], model: Model) -> Any:
    """The network's config with other sizes; ``counts`` are the units that stay, by the sets' names."""
    config, seen = copy.deepcopy(network.config), _described(network, model)
    if found.free_heads:  # said even where heads stay: some configs take it from the hidden size
        setattr(config, head_width_of(seen), heads_of(seen)[2])
    for kind in ("neurons", "heads", "channels"):
        numbers = {counts[s.name] for s in found.of(kind) if s.name in counts}
        if len(numbers) > 1:
            raise FitError(
                "uneven", f"layers of {type(network).__name__} would have different numbers of {kind}",
                allowed="the same in each: a plain config has one size", got=sorted(numbers), remedy="cut all alike",
            )  # fmt: skip
        if not numbers:
            continue
        name = next(n for n in _SIZES[kind] if hasattr(config, n))
        number = numbers.pop()
        if kind == "heads":
            group = found.of("heads")[0].group
            if getattr(config, "num_key_value_heads", None):
                config.num_key_value_heads = number // group
        if kind == "channels":
            old = hidden_of(seen)
            for other in ("pooler_hidden_size", "pooler_output_size", "embedding_size"):
                if getattr(config, other, None) == old:
                    setattr(config, other, number)
        setattr(config, name, number)
    return config
