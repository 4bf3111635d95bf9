"""Small frozen value types that every room shares. No torch here."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from fanbu.errors import UsageError

Task = Literal["text-classification", "image-classification", "audio-classification", "causal-lm"]
Kind = Literal["weights", "updates", "predictions", "samples", "modules", "statistics", "scores"]
Precision = Literal["fp32", "bf16"]
Form = Literal["copy", "onnx", "onnx-int8", "onnx-int8-static", "onnx-int4"]  # what `fanbu export` makes
Progress = Callable[[str, int, int], None]

TASKS: tuple[Task, ...] = ("text-classification", "image-classification", "audio-classification", "causal-lm")
CLASSIFYING: tuple[Task, ...] = TASKS[:3]
MEDIA: Mapping[str, str] = {"image-classification": "image", "audio-classification": "audio"}  # what a row holds
FORMS: tuple[Form, ...] = ("copy", "onnx", "onnx-int8", "onnx-int8-static", "onnx-int4")
KINDS: tuple[Kind, ...] = ("weights", "updates", "predictions", "samples", "modules", "statistics", "scores")


def silent(what: str, done: int, total: int) -> None:
    """A progress callback that shows nothing."""


def canonical(value: Any) -> str:
    """JSON with sorted keys and no white space: the one text that is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of ``value``."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def derived_seed(seed: int, *names: object) -> int:
    """A seed for one purpose, in [0, 2**31): it depends on names, never on the order of things."""
    return int(digest([seed, *map(str, names)])[:8], 16) & 0x7FFFFFFF


@dataclass(frozen=True)
class Train:
    """How a network is trained.

    ``lr`` is for the body and ``head_lr`` for the label head. ``schedule`` is one of ``cosine``, ``linear``,
    ``cyclic`` and ``constant``, after ``warmup`` (a share of all steps). ``optimizer`` is the name of a class in
    ``torch.optim``. ``patience`` counts epochs without a better validation value before training stops; 0 turns
    that off. ``max_steps`` of 0 means no cap.
    """

    epochs: int = 3
    batch_size: int = 32
    lr: float = 1e-4
    head_lr: float = 1e-3
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "cyclic", "constant"] = "cosine"
    optimizer: str = "AdamW"
    clip: float = 1.0
    accumulate: int = 1
    dropout: float | None = None
    patience: int = 2
    max_steps: int = 0

    def __post_init__(self) -> None:
        least = {"epochs": 1, "batch_size": 1, "accumulate": 1, "patience": 0, "max_steps": 0}
        least |= {"lr": 0, "head_lr": 0, "weight_decay": 0, "warmup": 0, "clip": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if not (bound <= value < float("inf")):
                raise UsageError(
                    "bad-parameter", f"train: {name}", allowed=f"a number from {bound}", got=value, remedy="change it"
                )

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic reads it; a misspelt key is refused


@dataclass(frozen=True)
class Privacy:
    """What training at an owner may tell of any one of its rows: (epsilon, delta)-differential privacy, over all inner
    rounds of the step. ``epsilon`` of 0: no noise, and no promise. A row's gradient counts with ``norm`` at most."""

    epsilon: float = 0.0
    delta: float = 1e-5
    norm: float = 1.0

    def __post_init__(self) -> None:
        wanted = {
            "epsilon": (0 <= self.epsilon < float("inf"), "a number from 0"),
            "delta": (0 < self.delta < 1, "between 0 and 1, well below one over the rows"),
            "norm": (0 < self.norm < float("inf"), "a number above 0"),
        }
        for name, (fits, allowed) in wanted.items():
            if not fits:
                raise UsageError(
                    "bad-parameter", f"privacy: {name}", allowed=allowed, got=getattr(self, name), remedy="change it"
                )

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic reads it; a misspelt key is refused


DOMAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}(@[A-Za-z0-9][A-Za-z0-9_.-]{0,63})?")


def industry_of(domain: str) -> str:
    """What a domain's labels are filed under: ``retail`` for the owners ``retail@north`` and ``retail@south``, who
    share label rows; a domain of one owner is an industry of its own."""
    return domain.partition("@")[0]


@dataclass(frozen=True)
class ProbeRow:
    """One text that specialists are asked about; ``domain`` is None where nobody knows where it came from."""

    id: str
    text: str
    domain: str | None


@dataclass(frozen=True)
class ProbeSet:
    """The texts that specialists are asked about. Their bytes count as crossing."""

    rows: tuple[ProbeRow, ...] = ()

    @property
    def digest(self) -> str:
        """sha256 over ids, texts and domains."""
        return digest([[r.id, r.text, r.domain] for r in self.rows])

    @property
    def texts(self) -> list[str]:
        """The texts, in order."""
        return [r.text for r in self.rows]


@dataclass(frozen=True)
class Needs:
    """What a feedback method needs of specialists and base, and what it sends. The planner matches it to what is there.

    ``kind`` is what crosses; ``texts`` and ``labels`` say that rows with them cross; ``probe`` that specialists are
    asked about shared texts; ``target`` that some of these are of an owner in their industry who has no specialist.
    ``specialist`` is False where what is sent comes of the owner's rows and the base, and not of its specialist.
    ``most`` is how many may feed at once, where that is bounded.
    """

    kind: Kind
    same_architecture: bool = False
    same_tokenizer: bool = False
    probe: bool = False
    texts: bool = False
    labels: bool = False
    target: bool = False
    specialist: bool = True
    most: int | None = None
    tasks: tuple[Task, ...] = TASKS


@dataclass(frozen=True)
class Inner:
    """Where a way back that is taken many times over stands: this is inner round ``number``, from 0.

    ``before`` is the folder that the same owner (or the centre) left in the inner round before and ``after`` the one to
    leave what is to be known in the next; an owner's never crosses. ``said`` is the folder of what the centre told all
    owners in the inner round before, and ``telling``, at the centre, of what it tells them now. None: there is none.
    ``share`` is that of the owners who take part, ``of`` how many inner rounds there are.
    """

    number: int
    before: Path | None = None
    after: Path | None = None
    said: Path | None = None
    telling: Path | None = None
    share: float = 1.0
    of: int = 1


@dataclass(frozen=True)
class Context:
    """What a round hands to every step; what is keyword-only in a method is the user's.

    ``scratch`` is a folder that outlives a kill: a step that is interrupted finds its checkpoints there.
    ``max_length`` is in tokens. ``memory`` bounds what merging holds at once, in bytes; ``dtype`` is what merged
    tensors are stored in (``float32``, ``float16``, ``bfloat16``; None: as the base stores them). ``forebears`` are
    the models that a model to be shrunk came from in this chain, the large one first: one of them may teach it.
    ``inner`` is there where a way back repeats.
    """

    seed: int = 0
    device: str = "cpu"
    precision: Precision = "fp32"
    threads: int = 0
    max_length: int = 128
    probe: ProbeSet = field(default_factory=ProbeSet)
    progress: Progress = silent
    scratch: Path | None = None
    checkpoint_seconds: float = 60.0
    memory: int = 2**29
    dtype: str | None = None
    forebears: tuple[Path, ...] = ()
    inner: Inner | None = None

    def seeded(self, *names: object) -> int:
        """The seed for one purpose of this run, and of this inner round."""
        again = (self.inner.number,) if self.inner and self.inner.number else ()
        return derived_seed(self.seed, *names, *again)


@dataclass(frozen=True)
class Transport:
    """``local``: so many ``processes`` of this machine; ``ray``: a Ray cluster, that of ``address``, or one of this
    machine with so many processors; ``flower``: owners elsewhere, who have ``arrive`` seconds to come and ``seconds``
    to answer."""

    kind: Literal["local", "ray", "flower"] = "local"
    processes: int = 1
    address: str | None = None
    arrive: float = 60.0
    seconds: float = 3600.0

    @property
    def away(self) -> bool:
        """Whether owners hold their rows themselves."""
        return self.kind == "flower"

    @property
    def apart(self) -> bool:
        """Whether owners work in processes of their own."""
        return self.kind != "local" or self.processes > 1


@dataclass(frozen=True)
class Share:
    """What may leave its owner. ``texts`` and ``labels`` are permissions of their own; ``synthetic`` lets texts out
    that are none of the owner's (``data.synthetic``) where texts may not leave.

    ``kinds`` names the kinds of contribution that may cross. ``private`` adds that predictions and probe heads need
    a privacy cost (epsilon), that predictions are made on public texts only, and that scores are paired counts.
    ``budget`` is the epsilon and delta that all noised contributions together may cost, over all rounds. ``together``:
    weights, updates and statistics but label rows cross only masked, in a sum of so many owners (0: alone, too).
    """

    kinds: frozenset[str] = frozenset(KINDS)
    texts: bool = True
    labels: bool = True
    private: bool = False
    synthetic: bool = True
    budget: tuple[float, float] | None = None
    together: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values, sorted, for hashing and for the report."""
        plain = {
            "kinds": sorted(self.kinds), "texts": self.texts, "labels": self.labels, "private": self.private,
            "synthetic": self.synthetic,
        }  # fmt: skip
        plain |= {"together": self.together} if self.together else {}
        return plain if self.budget is None else {**plain, "budget": list(self.budget)}


PRESETS: Mapping[str, Share] = {
    "open": Share(),
    "internal": Share(texts=False, labels=False),
    "private": Share(
        kinds=frozenset({"updates", "statistics", "predictions", "scores"}),
        texts=False,
        labels=False,
        private=True,
        synthetic=False,
    ),
}
