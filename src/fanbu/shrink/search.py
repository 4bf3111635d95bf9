"""Search: the mix of depth, width, vocabulary and bits that keeps most within a budget, found without training."""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge

from fanbu.deploy.latency import Clock, fitted, usual_milliseconds
from fanbu.domain import Domain
from fanbu.errors import DataError, FitError, UsageError, needs_extra
from fanbu.files import noted, write_text
from fanbu.merging.gram import own_texts
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_model
from fanbu.predict import validation_value
from fanbu.shrink import depth, distill, quantize, vocabulary, width
from fanbu.shrink._space import Choice, Sketch, Space, shape_row
from fanbu.tensors import Tensors
from fanbu.types import CLASSIFYING, Context, Train, digest

if TYPE_CHECKING:
    from collections.abc import Iterator

CHANGES: frozenset[str] = frozenset({"architecture", "tokenizer"})
Bits = Literal[32, 8, 4]
_NEURONS = (0.02, 1.0)
_CHANNELS = (0.2, 1.0)
_LEAST, _AIM, _MOST = 0.95, 1.05, 1.1  # of a budget of time: between the first two is met, above the last refused
_SPENT = 0.9  # of a budget; what takes less is only taken where nothing else is found
_STEP = 0.05  # by which channels are raised where all neurons fit
_TIMES = 4  # so often neurons are chosen anew where a time is not met


@dataclass(frozen=True)
class Budget:
    """Upper bounds; 0 stands for none.

    ``parameters``: at most so many; up to 1 as a share of the parent's. ``bytes``: for the weights on disk.
    ``milliseconds``: for one text at batch 1, on this machine or on that of ``table``, a JSON file:
    [{"layers": 6, "hidden": 384, "neurons": 1536, "milliseconds": 5.1}, ...], at least four rows.
    """

    parameters: Annotated[float, Ge(0)] = 0.0
    bytes: Annotated[int, Ge(0)] = 0
    milliseconds: Annotated[float, Ge(0)] = 0.0
    table: str = ""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic reads it


@dataclass(frozen=True)
class _Bounds:
    """A budget in numbers: ``factors`` are those of ``_space.shape_row``; ``clock`` tells this machine's times."""

    parameters: float
    bytes: int
    milliseconds: float
    factors: tuple[float, ...] = ()
    clock: Clock | None = None

    def allows(self, sketch: Sketch, choice: Choice) -> bool:
        """Whether a sub-network is within all bounds."""
        return self.spent(sketch, choice) <= 1

    def spent(self, sketch: Sketch, choice: Choice) -> float:
        """The largest share of any bound that a sub-network takes."""
        shares = [sketch.parameters / self.parameters] if self.parameters else []
        shares += [sketch.bytes(choice.bits) / self.bytes] if self.bytes else []
        shares += [self.predicted(sketch, choice) / self.milliseconds] if self.milliseconds else []
        return max(shares)

    def predicted(self, sketch: Sketch, choice: Choice) -> float:
        """Milliseconds, by the factors."""
        row = shape_row(choice.layers, sketch.hidden, sketch.neurons)
        return sum(f * v for f, v in zip(self.factors, row, strict=True))


def shrink(
    parent: Model, domain: Domain, out: Path, context: Context, *,
    budget: Budget = Budget(), tokens: Sequence[int] = (), bits: Sequence[Bits] = (32,),
    trials: Annotated[int, Ge(1)] = 40, finalists: Annotated[int, Ge(1)] = 2, history: str = "",
    augment: Annotated[int, Ge(0)] = 3, train: Train = Train(epochs=4, lr=1e-3, dropout=0.0),
) -> Model:  # fmt: skip
    """Finds the sub-network within a budget that promises most, and distils it from the parent.

    Layers and units are ordered by importance once; a trial draws layers, channels, tokens and bits, takes as many
    neurons (and then channels) as the budget allows, and is scored untrained (``_space.Space.score``), so that all
    trials share the parent's weights. Trials are drawn by a tree-structured Parzen estimator (Optuna), and kept in the
    scratch folder: a search that was stopped goes on, with the same result. The best few are cut as ``vocabulary``,
    ``depth`` and ``width`` cut, distilled, and compared on validation rows; a choice with fewer bits is then quantized.

    Args:
        budget: what it is to fit (``Budget``). A time is fitted as a + b L + c L h^2 + d L h n.
        tokens: sizes of vocabulary to choose between (``vocabulary``'s max_tokens); none: it is left alone. For
            classifiers.
        bits: what to choose between for the weights on disk (``quantize``).
        trials: how many sub-networks are scored.
        finalists: how many of them are distilled.
        history: a folder; what this search found is written there, and choices that earlier searches of the same
            task found best, of the most similar domains and budgets, are tried first.
        augment: variants of each text for distilling.
        train: how finalists are distilled.

    ``metrics`` of the result hold all trials (parameters, predicted milliseconds, score), and for a budget of time
    here the ``milliseconds`` that the cut network took, and those that the whole one took beside it.

    Raises:
        UsageError: no budget, or one that no sub-network meets, predicted or measured.
        FitError: units of the architecture are not known, or the parent does not know the domain.

    References: Cai et al. 2020 (Once-for-all; weight sharing); Bergstra et al. 2011 (the sampler).
    """
    if tokens and domain.task == "causal-lm":
        raise UsageError(
            "bad-parameter", "search chooses tokens for classifiers only: a causal parent teaches no model that reads "
            "other tokens", allowed="no tokens", got=list(tokens), remedy="put `vocabulary` after the search",
        )  # fmt: skip
    if not (budget.parameters or budget.bytes or budget.milliseconds):
        raise UsageError(
            "bad-parameter", "search has no budget", allowed="budget: parameters, bytes or milliseconds", got=0,
            remedy="say how small or how fast it is to be",
        )  # fmt: skip
    if domain.task in CLASSIFYING and not set(domain.full_labels) <= set(parent.labels):
        raise FitError(
            "teacher-labels", f"{parent.path} does not know the labels of {domain.name}, so it teaches nothing",
            allowed=sorted(domain.full_labels), got=sorted(parent.labels)[:20], remedy="let `finetune` go before",
        )  # fmt: skip
    with _places(context) as place:
        spaces = _spaces(parent, domain, tokens, place, context)
        bounds = _bounds(budget, parent, spaces[0], place)
        asked = _asked(domain, parent, bounds)
        found = _trials(spaces, bounds, list(bits), trials, _earlier(history, asked), place, context)
        _remember(history, asked, found)
        chosen = _cut_best(found, finalists, spaces, domain, bounds, place, context)
        made = [_distilled(c, parent, domain, place, context, augment, train) for c in chosen]
        values = [_value(m, domain, context) for m in made]
        best = values.index(max(values))
        metrics = {"valid": values[best], "trials": found, "choice": asdict(chosen[best].choice)}
        if bounds.clock is not None:
            metrics |= {"milliseconds": chosen[best].took, "whole_milliseconds": bounds.clock.unit}
        told = provenance(
            "search", [parent], context, domain=domain.name, budget=vars(budget), tokens=list(tokens), bits=list(bits),
            trials=trials, finalists=finalists, augment=augment, train=vars(train),
        )  # fmt: skip
        told = replace(told, metrics=metrics, data={domain.name: domain.digest})
        model = made[best]
        return save_model(out, model.config, Tensors(model.path), model.path, told)


@contextmanager
def _places(context: Context) -> Iterator[Path]:
    """A folder for what a search makes on its way: the scratch folder, which outlives a kill, or a passing one."""
    if context.scratch is not None:
        yield context.scratch
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _step(name: str, place: Path, context: Context, make: Callable[[Path, Context], Model]) -> Model:
    """A model on the way, made once; its training has a scratch folder of its own."""
    done = place / name
    if (done / "fanbu.json").exists():
        return open_model(done)
    scratch = place / f"{name}.scratch"
    scratch.mkdir(exist_ok=True)
    return make(done, replace(context, scratch=scratch))


def _spaces(parent: Model, domain: Domain, tokens: Sequence[int], place: Path, context: Context) -> list[Space]:
    if not tokens:
        return [Space(parent, domain, context)]
    steps = (
        _step(f"tokens-{n}", place, context, partial(vocabulary.shrink, parent, domain, max_tokens=n)) for n in tokens
    )
    return [Space(model, domain, context) for model in steps]


def _bounds(budget: Budget, parent: Model, space: Space, place: Path) -> _Bounds:
    most = budget.parameters * parent.parameters if budget.parameters <= 1 else budget.parameters
    if not budget.milliseconds:
        return _Bounds(most, budget.bytes, 0.0)
    if budget.table:
        return _Bounds(most, budget.bytes, budget.milliseconds, tuple(fitted(*_table(Path(budget.table)))))
    clock = _clock(space, place)
    return _Bounds(most, budget.bytes, budget.milliseconds, _factors(space, clock, place), clock)


def _clock(space: Space, place: Path) -> Clock:
    known = space.network, space.tokenizer, own_texts(space.domain, 32), space.context
    return Clock(*known, noted(place / "clock.json", lambda: usual_milliseconds(*known)))


def _factors(space: Space, clock: Clock, place: Path) -> tuple[float, ...]:
    """Of times that are measured here, once."""

    def measured() -> tuple[float, ...]:
        rows, times = [], []
        for layers in dict.fromkeys((space.count, max(1, space.count // 2), 1)):
            for channels, neurons in ((1.0, 1.0), (0.5, 0.5), (1.0, 0.25), (0.5, 0.1)):
                choice = Choice(layers, channels, neurons)
                sketch = space.sketch(choice)
                rows.append(shape_row(layers, sketch.hidden, sketch.neurons))
                times.append(clock.milliseconds(space.cut(choice), space.tokenizer))
        return tuple(fitted(rows, times))

    return tuple(noted(place / "times.json", measured))


def _table(path: Path) -> tuple[list[list[float]], list[float]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        known = [(float(r["milliseconds"]), shape_row(int(r["layers"]), int(r["hidden"]), int(r["neurons"])))
                 for r in rows]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "latency-table", f"{path}: {type(error).__name__}: {error}",
            allowed='a JSON list of {"layers", "hidden", "neurons", "milliseconds"}', got=path,
            remedy="repair the file",
        ) from None  # fmt: skip
    if len(known) < 4 or not all(math.isfinite(t) and t > 0 for t, _ in known):
        raise DataError(
            "latency-table", f"{path} has too few times, or some that are not above 0", allowed="at least 4",
            got=len(known), remedy="measure more sizes",
        )  # fmt: skip
    return [row for _, row in known], [t for t, _ in known]


# Trials


def _trials(
    spaces: list[Space], bounds: _Bounds, bits: list[int], trials: int, warm: list[dict[str, Any]], place: Path,
    context: Context,
) -> list[dict[str, Any]]:  # fmt: skip
    """All trials that met the budget and made use of it, in their order; where none did, those that met it."""
    with needs_extra("search"):
        import optuna
        from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(place / "trials.log")))
    study = optuna.create_study(direction="maximize", storage=storage, study_name="search", load_if_exists=True)
    warm = noted(place / "warm.json", lambda: warm)  # other searches may add to the history meanwhile
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    for number in range(len(study.get_trials(states=ended)), trials):
        # a sampler of its own for each, so that a search that was stopped draws the same
        sampler: Any = optuna.samplers.TPESampler(seed=context.seeded("search", number), n_startup_trials=8)
        if number < len(warm):
            layers = min(max(warm[number]["layers"], spaces[0].least), spaces[0].count)
            known = {**warm[number], "layers": layers}
            with warnings.catch_warnings(category=optuna.exceptions.ExperimentalWarning, action="ignore"):
                sampler = optuna.samplers.PartialFixedSampler(known, sampler)
        study.sampler = sampler
        trial = study.ask()
        told = _trial(trial, spaces, bounds, bits)
        if told is not None:
            trial.set_user_attr("told", told)
        if told is None or told["spent"] < _SPENT:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(trial, told["score"])
        context.progress("search", number + 1, trials)
    met = [t for t in study.get_trials(states=ended) if "told" in t.user_attrs]
    complete = [t for t in met if t.state is ended[0]] or met
    if not complete:
        raise UsageError(
            "target-not-met", f"search: none of {trials} sub-networks is within the budget",
            allowed="a larger budget", got=f"{bounds.parameters:g} parameters, {bounds.bytes} bytes, "
            f"{bounds.milliseconds:g} ms", remedy="raise it, or choose a smaller vocabulary under `tokens`",
        )  # fmt: skip
    return [t.user_attrs["told"] for t in complete]


def _trial(trial: Any, spaces: list[Space], bounds: _Bounds, bits: list[int]) -> dict[str, Any] | None:
    tokens = trial.suggest_int("tokens", 0, len(spaces) - 1) if len(spaces) > 1 else 0
    few = trial.suggest_categorical("bits", bits) if len(bits) > 1 else bits[0]
    layers = trial.suggest_int("layers", spaces[tokens].least, spaces[tokens].count)
    channels = trial.suggest_float("channels", *_CHANNELS)
    choice = _filled(spaces[tokens], Choice(layers, channels, _NEURONS[1], tokens, few), bounds)
    if choice is None:
        return None
    sketch = spaces[tokens].sketch(choice)
    spent = bounds.spent(sketch, choice)
    if spent < _SPENT and spaces[tokens].whole(choice):  # there is nothing more to spend it on
        spent = 1.0
    told = {
        "choice": asdict(choice), "parameters": sketch.parameters, "bytes": sketch.bytes(few), "spent": spent,
    }  # fmt: skip
    if bounds.milliseconds:
        told["milliseconds"] = bounds.predicted(sketch, choice)
    return {**told, "score": spaces[tokens].score(choice)}


def _filled(space: Space, choice: Choice, bounds: _Bounds) -> Choice | None:
    """The choice with as many neurons as the bounds allow, and more channels where they allow all; None where they
    allow no neurons."""
    found = _with_neurons(space, choice, bounds)
    while found and found.neurons == _NEURONS[1] and found.channels < _CHANNELS[1]:
        more = replace(found, channels=min(_CHANNELS[1], found.channels + _STEP))
        wider = _with_neurons(space, more, bounds)
        if wider is None:
            break
        found = wider
    return found


def _with_neurons(space: Space, choice: Choice, bounds: _Bounds) -> Choice | None:
    """Neurons alone."""

    def fits(neurons: float) -> bool:
        some = replace(choice, neurons=neurons)
        return bounds.allows(space.sketch(some), some)

    low, high = _NEURONS
    if fits(high):
        return replace(choice, neurons=high)
    if not fits(low):
        return None
    for _ in range(7):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return replace(choice, neurons=low)


# What earlier searches found


def _asked(domain: Domain, parent: Model, bounds: _Bounds) -> dict[str, Any]:
    """What a search was about, in numbers that can be compared: logarithms of counts and of budgets."""
    lengths = [len(t.split()) for t in domain.train.texts[:500]]
    most = bounds.parameters or bounds.bytes / 4 or 1e6 * bounds.milliseconds
    return {
        "task": domain.task, "domain": domain.name,
        "features": {
            "rows": math.log(len(domain.train)), "labels": math.log(1 + len(domain.labels)),
            "words": math.log(1 + sum(lengths) / len(lengths)), "parameters": math.log(parent.parameters),
            "budget": math.log(most / parent.parameters),
        },
    }  # fmt: skip


def _earlier(history: str, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The best choices of the nearest earlier searches."""
    found = []
    for path in sorted(Path(history).glob("search-*.json")) if history else []:
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            if told["asked"]["task"] != asked["task"] or told["asked"]["domain"] == asked["domain"]:
                continue
            far = sum(abs(v - told["asked"]["features"][k]) for k, v in asked["features"].items())
            best = [Choice(**c) for c in told["best"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                "history-broken", f"{path}: {type(error).__name__}: {error}", allowed="a file that search wrote",
                got=path, remedy="remove it",
            ) from None  # fmt: skip
        found.append((far, path.name, best))
    near = [choice for _, _, best in sorted(found, key=lambda f: f[:2])[:3] for choice in best[:2]]
    return [{"layers": c.layers, "channels": c.channels} for c in near]


def _remember(history: str, asked: dict[str, Any], found: list[dict[str, Any]]) -> None:
    if not history:
        return
    folder = Path(history)
    folder.mkdir(parents=True, exist_ok=True)
    best = [t["choice"] for t in sorted(found, key=lambda t: -t["score"])[:5]]
    write_text(folder / f"search-{digest(asked)[:16]}.json", json.dumps({"asked": asked, "best": best}, indent=1))


# The finalists


@dataclass(frozen=True)
class _Finalist:
    """A sub-network that was cut; ``took``: its milliseconds, measured where they have a budget, else 0."""

    number: int
    choice: Choice
    model: Model
    took: float


def _cut_best(
    found: Sequence[Mapping[str, Any]], finalists: int, spaces: list[Space], domain: Domain, bounds: _Bounds,
    place: Path, context: Context,
) -> list[_Finalist]:  # fmt: skip
    """The best by score that keep a budget of time when they are measured."""
    made: list[_Finalist] = []
    slow: list[float] = []
    for number, told in enumerate(sorted(found, key=lambda t: -t["score"])):
        choice = Choice(**told["choice"])
        finalist = _cut(number, choice, spaces[choice.tokens], domain, bounds, place, context)
        if finalist.took <= _MOST * bounds.milliseconds:
            made.append(finalist)
        else:
            slow.append(finalist.took)
        if len(made) == finalists:
            break
    if not made:
        raise UsageError(
            "target-not-met", f"search: none of {len(found)} sub-networks is as fast as predicted",
            allowed=f"at least {min(slow):.2f} ms", got=f"{bounds.milliseconds:g} ms",
            remedy="raise the budget, or search again when nothing else runs on this machine",
        )  # fmt: skip
    return made


def _cut(
    number: int, choice: Choice, space: Space, domain: Domain, bounds: _Bounds, place: Path, context: Context
) -> _Finalist:
    """Cut by ``depth`` and ``width``, with other neurons where it takes longer or less than predicted."""
    model = space.model
    if choice.layers < space.count:
        fewer_layers = partial(depth.shrink, model, domain, layers=choice.layers, train=None)
        model = _step(f"{number}-depth", place, context, fewer_layers)
    tries: list[_Finalist] = []
    for tried in range(_TIMES):
        cut = model
        if space.drops(choice):
            narrower = partial(
                width.shrink, model, domain, neurons=choice.neurons, channels=choice.channels, train=None
            )
            cut = _step(f"{number}-width-{tried}", place, context, narrower)
        if bounds.clock is None:
            return _Finalist(number, choice, cut, 0.0)
        took = noted(place / f"{number}-time-{tried}.json", partial(_took, bounds.clock, cut))
        tries.append(_Finalist(number, choice, cut, took))
        if _LEAST <= took / bounds.milliseconds <= _AIM:
            break
        off = bounds.predicted(space.sketch(choice), choice) / took
        again = _filled(space, choice, replace(bounds, milliseconds=bounds.milliseconds * off))
        again = again or replace(choice, neurons=_NEURONS[0])
        if again == choice:
            break
        choice = again
    return min(tries, key=lambda t: (t.took > _MOST * bounds.milliseconds, abs(t.took - bounds.milliseconds)))


def _took(clock: Clock, cut: Model) -> float:
    return clock.milliseconds(load_network(cut), load_tokenizer(cut))


def _distilled(
    cut: _Finalist, parent: Model, domain: Domain, place: Path, context: Context, augment: int, train: Train
) -> Model:
    """A finalist taught by the parent, and quantized."""
    extra = distill.Extra(augment=augment, cache=str(place / "answers"))
    taught = partial(distill.shrink, cut.model, domain, teacher=str(parent.path), extra=extra, train=train)
    small = _step(f"{cut.number}-distill", place, context, taught)
    if cut.choice.bits == 32:
        return small
    fewer: Any = cut.choice.bits
    rounded = partial(quantize.shrink, small, domain, bits=fewer, rounding="gptq")
    return _step(f"{cut.number}-quantize", place, context, rounded)


def _value(model: Model, domain: Domain, context: Context) -> float:
    return validation_value(load_network(model), load_tokenizer(model), domain, context)
