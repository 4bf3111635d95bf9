"""The Python API, in the words of the command line. Everything here is re-exported by ``fanbu``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.domain import Domain, Specialist, load_domain
from fanbu.generations import run as run_rounds
from fanbu.judge.evaluate import evaluate
from fanbu.judge.gate import Gate
from fanbu.judge.gate import judge as decide
from fanbu.model import Model, open_model
from fanbu.recipe import load_recipe
from fanbu.types import Context, Progress, silent

__all__ = ["absorb", "contribute", "judge", "load_domain", "open_model", "run", "shrink"]


def shrink(
    parent: Model, domain: Domain, out: str | Path, context: Context | None = None, *, method_name: str = "finetune",
    **arguments: Any,
) -> Model:  # fmt: skip
    """A specialist of ``parent`` for ``domain``, made by one way down; ``arguments`` are that method's."""
    return method(method_name, "shrink").shrink(parent, domain, Path(out), context or Context(), **arguments)


def contribute(
    specialist: Specialist, base: Model, context: Context | None = None, *, method_name: str, **arguments: Any
) -> Contribution:
    """What a specialist sends back; pass it through ``fanbu.boundary.cross`` where it leaves its owner."""
    return method(method_name, "feedback").contribute(specialist, base, context or Context(), **arguments)


def absorb(
    base: Model, contributions: Sequence[Contribution], out: str | Path, context: Context | None = None, *,
    method_name: str, **arguments: Any,
) -> Model:  # fmt: skip
    """The new large model."""
    return method(method_name, "feedback").absorb(base, contributions, Path(out), context or Context(), **arguments)


def judge(
    candidate: Model, incumbent: Model, domains: Mapping[str, Domain], context: Context | None = None,
    gate: Gate = Gate(), specialists: Mapping[str, Model] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Evaluates both models on all domains' test rows and gives the verdict (see ``fanbu.judge.gate.judge``)."""
    context = context or Context()
    new = {name: evaluate(candidate, d, context) for name, d in domains.items()}
    old = {name: evaluate(incumbent, d, context) for name, d in domains.items()}
    grown = {name: evaluate(model, domains[name], context) for name, model in (specialists or {}).items()}
    return decide(new, old, grown, domains, gate, context.seed)


def run(
    recipe: str | Path | Mapping[str, Any], changes: Sequence[str] = (), progress: Progress = silent, log: Any = None
) -> dict[str, Any]:
    """Runs the recipe's rounds (or what is left of them), promotes or keeps, and returns the last one's record."""
    return run_rounds(load_recipe(recipe, changes), progress, log or (lambda text: None))
