"""The Python API, in the words of the command line. Everything here is re-exported by ``fanbu``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from fanbu.catalogue import Method, method
from fanbu.contribution import Contribution, open_contribution, write_contribution
from fanbu.domain import Domain, Specialist, load_domain
from fanbu.errors import FitError, IntegrityError, UsageError
from fanbu.generations import run as run_rounds
from fanbu.judge.evaluate import evaluate
from fanbu.judge.gate import Gate
from fanbu.judge.gate import judge as decide
from fanbu.model import Model, open_model
from fanbu.recipe import load_recipe
from fanbu.types import Context, Progress, silent

__all__ = ["absorb", "contribute", "judge", "load_domain", "merge", "only", "open_model", "run", "shrink", "unmerge"]


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


def merge(
    base: Model, specialists: Mapping[str, str | Path], out: str | Path, context: Context | None = None, *,
    method_name: str = "task_arithmetic", keep: bool = False, vocabulary: Literal["base", "union"] | None = None,
    **arguments: Any,
) -> Model:  # fmt: skip
    """Merges checkpoints, or adapters, that are all yours into ``base``: no domains, no boundary, no data.

    ``specialists`` are directories by name. With ``keep`` what each of them sends is written beside ``out``, so that
    ``unmerge`` can take one away again (``store="int8"`` keeps it small). ``vocabulary`` brings checkpoints whose
    tokenizers differ onto the base's tokens, or onto the union of all; without it they are refused. Raises FitError
    for a method that needs texts, labels or statistics: those come from domains.
    """
    from fanbu.merging.adapter import weights_contribution

    way, place, context = method(method_name, "feedback"), Path(out), context or Context()
    way.check(arguments)
    needs = way.needs
    if needs.kind != "weights" or needs.probe or needs.texts or needs.labels:
        raise FitError(
            "needs-domains", f"{way.name} needs more than weights", allowed=_data_free(), got=way.name,
            remedy="name the domains (--domains), or take a method that needs no data",
        )  # fmt: skip
    store = way.own("contribute", arguments).get("store", "exact")
    if keep and vocabulary == "union":
        raise UsageError(
            "vocabulary-keep", "what was sent fits the union's base, which is not kept", allowed="keep with base",
            got="keep with union", remedy="leave out one, or extend the base first (merging.vocabulary.union)",
        )  # fmt: skip
    with _one_vocabulary(base, specialists, place, context, vocabulary) as (large, folders):
        sent = [weights_contribution(folder, large, name, store=store) for name, folder in folders.items()]
        if keep:
            sent = [open_contribution(_keep(c, place)) for c in sent]
        return _named(way.absorb(large, sent, place, context, **arguments), large, base, vocabulary)


@contextmanager
def _one_vocabulary(
    base: Model, specialists: Mapping[str, str | Path], out: Path, context: Context, vocabulary: str | None
) -> Iterator[tuple[Model, dict[str, str | Path]]]:
    """Base and specialists on one vocabulary; adapters have none of their own and are handed through."""
    from fanbu.merging.adapter import CONFIG
    from fanbu.merging.tokens import OneVocabulary
    from fanbu.merging.vocabulary import check_one_vocabulary, one_vocabulary
    from fanbu.model import resolve

    whole = {n: open_model(f) for n, f in specialists.items() if not (resolve(f) / CONFIG).exists()}
    if vocabulary is None:
        for name, model in whole.items():
            check_one_vocabulary(base, model, name)
        yield base, dict(specialists)
        return
    if vocabulary not in ("base", "union"):
        raise UsageError(
            "bad-parameter", "vocabulary", allowed="base or union", got=vocabulary, remedy="take one of these"
        )
    with one_vocabulary(base, whole, out, context, OneVocabulary(vocabulary)) as (large, found):
        yield large, {**specialists, **{name: model.path for name, model in found.items()}}


def _named(made: Model, large: Model, base: Model, vocabulary: str | None) -> Model:
    from fanbu.merging.tokens import OneVocabulary
    from fanbu.merging.vocabulary import tell

    return tell(made, large, base, OneVocabulary(vocabulary)) if vocabulary else made


def _data_free() -> list[str]:
    from fanbu.catalogue import methods

    ways: list[Method] = [m for m in methods() if m.family == "weights"]
    return [m.name for m in ways if not (m.needs.probe or m.needs.texts or m.needs.labels)]


def _keep(contribution: Contribution, out: Path) -> Path:
    folder = kept_beside(out, contribution.domain)
    write_contribution(contribution, folder)
    return folder


def kept_beside(out: Path, domain: str) -> Path:
    """Where a domain's contribution to the model ``out`` is kept."""
    return out.with_name(f"{out.name}.{domain}.contribution")


def unmerge(
    base: Model, merged: Model, domains: Sequence[str], out: str | Path, context: Context | None = None
) -> Model:  # fmt: skip
    """The merged model as if ``domains`` had never joined: absorbs what the others sent once more, with the same
    method, parameters, seed and dtype. Exact for every method, since nothing is subtracted.

    Raises UsageError for another base or an unknown domain, IntegrityError where a contribution is no longer there.
    """
    made, names = merged.manifest, list(merged.manifest.get("parameters", {}).get("domains", []))
    unknown = sorted(set(domains) - set(names))
    if unknown or base.digest not in made.get("parents", []):
        raise UsageError(
            "unmerge", f"{merged.path} was not made of {', '.join(unknown) or base.path}",
            allowed=names or "a model that `fanbu feed` made", got=unknown or base.digest[:12],
            remedy="name the base and the domains that it was made of",
        )  # fmt: skip
    if made["parameters"].get("vocabulary", "base") != "base":
        raise UsageError(
            "unmerge", f"{merged.path} has other tokens than {base.path}", allowed="a merge onto the base's vocabulary",
            got=made["parameters"]["vocabulary"], remedy="merge the other specialists again",
        )  # fmt: skip
    places = {name: kept_beside(merged.path, name) for name in names if name not in domains}
    missing = [str(p) for p in places.values() if not p.is_dir()]
    if missing:
        raise IntegrityError(
            "contribution-missing", f"contributions to {merged.path} are no longer beside it", got=missing,
            remedy="merge again with --keep, or put them back",
        )  # fmt: skip
    way = method(str(made["method"]), "feedback")
    own = {k: v for k, v in made["parameters"].items() if k in way.own("absorb", {})}
    dtype = next((str(s.torch_dtype) for s in merged.tensors.values() if s.torch_dtype.is_floating_point), "")
    context = replace(context or Context(), seed=int(made["seed"]), dtype=dtype.removeprefix("torch.") or None)
    return way.absorb(base, [open_contribution(p) for p in places.values()], Path(out), context, **own)


def only(base: Model, merged: Model, domain: str, out: str | Path, context: Context | None = None) -> Model:
    """A domain's own model out of one that ``emr`` made (see ``fanbu.merging.masks.only``)."""
    from fanbu.merging import masks

    return masks.only(merged, base, domain, Path(out), context or Context())


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
