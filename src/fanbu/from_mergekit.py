"""Runs a recipe of mergekit's with our methods, to the same result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fanbu.catalogue import method
from fanbu.errors import UsageError
from fanbu.merging.dials import Dial
from fanbu.merging.mergekit import MergekitRecipe, names_of, read_mergekit
from fanbu.merging.stacking import stack_layers
from fanbu.merging.store import task_vector
from fanbu.merging.task_vector import TaskVector
from fanbu.merging.tokens import OneVocabulary
from fanbu.merging.vocabulary import check_one_vocabulary, one_vocabulary, tell
from fanbu.model import Model, open_model
from fanbu.types import Context

Translate = Callable[[MergekitRecipe, Mapping[str, Mapping[str, Dial]]], dict[str, Any]]


def run_mergekit(path: Path, out: Path, context: Context) -> Model:
    """Merges as a recipe of mergekit's says. Raises UsageError for what it asks and we cannot do."""
    recipe = read_mergekit(path)
    context = replace(context, dtype=context.dtype or recipe.dtype)
    if recipe.method == "passthrough":
        return stack_layers(recipe.slices, out, context)
    if recipe.method not in METHODS:
        raise UsageError(
            "mergekit", "mergekit recipe: merge_method", allowed=sorted([*METHODS, "passthrough"]), got=recipe.method,
            remedy="see docs/from-mergekit.md",
        )  # fmt: skip
    name, translate = METHODS[recipe.method]
    base_path = recipe.base or recipe.members[0].path
    base = open_model(base_path, verify=False)
    # full weights are averaged as differences to one of them, which counts as a model where it is listed
    members = [m for m in recipe.members if m.path != base_path or recipe.method in WHOLE]
    labels = names_of([m.path for m in members])
    models = {label: open_model(m.path, verify=False) for label, m in zip(labels, members, strict=True)}
    own = {label: {**recipe.parameters, **m.parameters} for label, m in zip(labels, members, strict=True)}
    arguments = translate(recipe, own)
    with _one_vocabulary(base, models, out, context, recipe.tokenizer) as (large, found):
        sent = [task_vector(TaskVector(model, large), label, ()) for label, model in found.items()]
        made = method(name, "feedback").absorb(large, sent, out, context, **arguments)
        return tell(made, large, base, recipe.tokenizer) if recipe.tokenizer else made


@contextmanager
def _one_vocabulary(
    base: Model, models: Mapping[str, Model], out: Path, context: Context, how: OneVocabulary | None
) -> Iterator[tuple[Model, Mapping[str, Model]]]:
    """On one vocabulary where the recipe says which; otherwise all must have the same."""
    if how is None:
        for label, model in models.items():
            check_one_vocabulary(base, model, label)
        yield base, models
        return
    with one_vocabulary(base, models, out, context, how) as found:
        yield found


WHOLE = {"linear", "karcher"}  # methods that merge weights, and not changes of a base


def _one(recipe: MergekitRecipe, own: Mapping[str, Mapping[str, Dial]], key: str, default: Dial) -> Dial:
    """A parameter that must be the same for all models."""
    values = [p.get(key, default) for p in own.values()]
    if any(v != values[0] for v in values):
        raise UsageError(
            "mergekit", f"mergekit recipe: {key}", allowed="the same for all models", got=values,
            remedy="give one value under parameters",
        )  # fmt: skip
    return values[0]


def _weights(own: Mapping[str, Mapping[str, Dial]], default: float | None = None) -> dict[str, Dial]:
    missing = [label for label, p in own.items() if "weight" not in p]
    if missing and default is None:
        raise UsageError(
            "mergekit", "mergekit recipe: weight", allowed="a weight for each model", got=f"none for {missing}",
            remedy="add it",
        )  # fmt: skip
    return {label: p.get("weight", default if default is not None else 1.0) for label, p in own.items()}


def _scale(recipe: MergekitRecipe) -> Dial:
    return recipe.parameters.get("lambda", 1.0)


def _flag(recipe: MergekitRecipe, key: str, default: bool) -> bool:
    value = recipe.parameters.get(key, float(default))
    if isinstance(value, list | dict):
        raise UsageError("mergekit", f"mergekit recipe: {key}", allowed="true or false", got=value, remedy="write one")
    return bool(value)


def _average(recipe: MergekitRecipe, own: Mapping[str, Mapping[str, Dial]]) -> dict[str, Any]:
    _must_be(recipe, "normalize", True)
    return {"weights": _weights(own)}


def _must_be(recipe: MergekitRecipe, key: str, value: bool) -> None:
    if _flag(recipe, key, value) is not value:
        raise UsageError(
            "mergekit", f"mergekit recipe: {key}", allowed=f"{value} with {recipe.method}", got=not value,
            remedy="see docs/from-mergekit.md",
        )  # fmt: skip


def _sum(recipe: MergekitRecipe, own: Mapping[str, Mapping[str, Dial]]) -> dict[str, Any]:
    _must_be(recipe, "normalize", False)
    _must_be(recipe, "rescale", False)
    return {"scale": _scale(recipe), "weights": _weights(own)}


def _ties(recipe: MergekitRecipe, own: Mapping[str, Mapping[str, Dial]]) -> dict[str, Any]:
    _must_be(recipe, "rescale", False)
    density = _one(recipe, own, "density", 1.0)
    chosen = {"scale": _scale(recipe), "weights": _weights(own), "density": density}
    return chosen | {"normalise": _flag(recipe, "normalize", True)}


def _dropping(elect: bool, *more: str, rescaled: bool = True, normalised: bool = False) -> Translate:
    def translate(recipe: MergekitRecipe, own: Mapping[str, Mapping[str, Dial]]) -> dict[str, Any]:
        _must_be(recipe, "rescale", rescaled)
        defaults = {"gamma": 0.01, "epsilon": 0.15}
        extra = {key: _one(recipe, own, key, defaults[key]) for key in more}
        return {
            "scale": _scale(recipe), "weights": _weights(own), "density": _one(recipe, own, "density", 1.0), **extra,
            "elect": elect, "normalise": _flag(recipe, "normalize", normalised),
        }  # fmt: skip

    return translate


# mergekit's name: our method, and how its parameters are ours
METHODS: dict[str, tuple[str, Translate]] = {
    "linear": ("average", _average),
    "slerp": ("slerp", lambda recipe, own: {"t": _one(recipe, own, "t", 0.5)}),
    "karcher": ("karcher", lambda recipe, own: {"weights": _weights(own, 1.0)}),
    "model_stock": ("model_stock", lambda recipe, own: {}),
    "nearswap": ("nearswap", lambda recipe, own: {"t": _one(recipe, own, "t", 0.001)}),
    "task_arithmetic": ("task_arithmetic", _sum),
    "ties": ("ties", _ties),
    "dare_linear": ("dare", _dropping(False)),
    "dare_ties": ("dare", _dropping(True)),
    "della": ("della", _dropping(True, "epsilon", normalised=True)),
    "della_linear": ("della", _dropping(False, "epsilon")),
    "breadcrumbs": ("breadcrumbs", _dropping(False, "gamma", rescaled=False)),
    "breadcrumbs_ties": ("breadcrumbs", _dropping(True, "gamma", rescaled=False)),
}
