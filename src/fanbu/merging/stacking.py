"""Layer stacking (passthrough, frankenmerges): a model of layers taken from others, copied and never loaded."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from fanbu.errors import FitError, UsageError
from fanbu.merging.dials import depth_of, layer_of
from fanbu.merging.engine import shard_bytes, stored_dtype
from fanbu.merging.mergekit import Slice
from fanbu.model import Model, open_model, provenance, save_model
from fanbu.tensors import Shards, Tensors, chunks
from fanbu.types import Context

_BEFORE = ("embed", "wte", "wpe", "rotary")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


def stack_layers(slices: Sequence[Slice], out: Path, context: Context) -> Model:
    """A model whose layers are those of the slices, one after the other; embeddings are the first slice's model's, and
    what follows the layers (norm, head) the last's.

    Raises UsageError for layers that a model has not, FitError where two models' layers have other tensors or shapes.
    """
    models = {s.path: open_model(s.path, verify=False) for s in slices}
    tensors = {path: Tensors(model.path) for path, model in models.items()}
    first = models[slices[0].path]
    places = [(s.path, layer) for s in slices for layer in range(s.first, s.last)]
    for s in slices:
        depth = depth_of(tensors[s.path])
        if s.last > depth:
            raise UsageError(
                "bad-parameter", f"layer_range of {s.path}", allowed=f"layers 0 to {depth}", got=[s.first, s.last],
                remedy="name layers that it has",
            )  # fmt: skip
    # what comes before the layers is the first model's, what comes after them the last's
    ends = {True: slices[0].path, False: slices[-1].path}
    outer = [n for n in tensors[slices[0].path] if layer_of(n) is None]
    sources = {n: (ends[any(part in n for part in _BEFORE)], n) for n in outer}
    inner = _inner(tensors[slices[0].path])
    for number, (path, layer) in enumerate(places):
        for rest, (before, after) in inner.items():
            sources[f"{before}{number}{after}"] = (path, f"{before}{layer}{after}")
            _check(tensors[path], tensors[slices[0].path], f"{before}{layer}{after}", f"{before}0{after}", rest)
    for name in outer:
        _check(tensors[sources[name][0]], tensors[slices[0].path], name, name, name)
    dtype = stored_dtype(context)
    layouts = {
        n: (tensors[p].specs[o].shape, dtype or tensors[p].specs[o].torch_dtype) for n, (p, o) in sources.items()
    }

    def fill(folder: Path) -> dict[str, str]:
        shards = Shards(folder, layouts, shard_bytes(sum(tensors[p].specs[o].bytes for p, o in sources.values())))
        for done, name in enumerate(sorted(sources), 1):
            path, old = sources[name]
            for start, stop in chunks(layouts[name][0]):
                shards.put(name, start, tensors[path].rows(old, start, stop))
            context.progress("passthrough", done, len(sources))
        return shards.close()

    config = {**first.config, **{k: len(places) for k in _COUNTS if k in first.config}}
    told = [{"model": models[s.path].digest, "layers": [s.first, s.last]} for s in slices]
    made = provenance("passthrough", list(models.values()), context, slices=told)
    return save_model(out, config, fill, first.path, made)


def _inner(tensors: Tensors) -> dict[str, tuple[str, str]]:
    """The tensors of layer 0, as what stands before and after its number."""
    found = {}
    for name in tensors:
        if layer_of(name) == 0:
            before, after = re.split(r"(?<=\.)0(?=\.)", name, maxsplit=1)
            found[name] = (before, after)
    return found


def _check(tensors: Tensors, reference: Tensors, name: str, expected: str, shown: str) -> None:
    spec = tensors.specs.get(name)
    if spec is None or spec.shape != reference.specs[expected].shape:
        raise FitError(
            "other-architecture", f"a model has no {shown} of the first model's shape",
            allowed=reference.specs[expected].shape, got=name if spec is None else spec.shape,
            remedy="stack layers of models of one architecture",
        )  # fmt: skip
