"""A Domain: one industry's task, its rows, and what may leave its owner. A Specialist: a Model with its Domain."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeGuard

from fanbu.data.check import check_labels, check_split, without_overlap
from fanbu.data.load import RawRow, load_rows
from fanbu.data.split import by_hash, cap, carve, not_carved, portion
from fanbu.data.standard_library import function_bodies
from fanbu.errors import DataError, FitError, UsageError
from fanbu.model import Model
from fanbu.types import CLASSIFYING, DOMAIN_NAME, MEDIA, PRESETS, TASKS, Context, Share, Task, digest, industry_of

Role = Literal["feeds", "guard"]
METRICS = {task: ("loss",) if task == "causal-lm" else ("accuracy",) for task in TASKS}


@dataclass(frozen=True)
class Rows:
    """Columns of one split; ``labels`` are indices into the domain's label names, None where there are none."""

    ids: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    labels: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def digest(self) -> str:
        """sha256 over ids, texts and labels."""
        return digest([self.ids, self.texts, self.labels])

    def first(self, count: int) -> Rows:
        """So many of the rows, chosen by hash; each label once before all others, and fewer rows are always among
        more."""
        order = by_hash(list(zip(self.ids, self.texts, strict=True)), self.labels or (None,) * len(self))
        kept = sorted(order[:count])
        labels = None if self.labels is None else tuple(self.labels[i] for i in kept)
        return Rows(tuple(self.ids[i] for i in kept), tuple(self.texts[i] for i in kept), labels)


@dataclass(frozen=True)
class Domain:
    """One industry's task. ``role`` is ``guard`` for a domain that feeds nothing and only must not get worse;
    ``waiting`` are texts of held-out rows that are not tested yet, and must not train anything meanwhile. Of a domain
    whose rows lie with an owner elsewhere, ``away`` says the digest and the number of rows by split."""

    name: str
    task: Task
    labels: tuple[str, ...]
    train: Rows
    valid: Rows
    test: Rows
    unlabelled: Rows
    metric: str
    share: Share
    role: Role = "feeds"
    warnings: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()
    away: Mapping[str, Any] | None = None

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that can change a result; what is shared is the boundary's affair."""
        if self.away:
            return str(self.away["digest"])
        splits = [r.digest for r in (self.train, self.valid, self.test, self.unlabelled)]
        return digest([self.name, self.task, self.labels, splits, self.metric, self.role])

    @property
    def counts(self) -> dict[str, int]:
        """Rows by split."""
        if self.away:
            return dict(self.away["counts"])
        return {split: len(getattr(self, split)) for split in ("train", "valid", "test", "unlabelled")}

    @property
    def texts(self) -> list[str]:
        """Training and unlabelled texts, each once."""
        return list(dict.fromkeys([*self.train.texts, *self.unlabelled.texts]))

    @property
    def every_text(self) -> list[str]:
        """Those, and the held-out ones: what must not be said of the owner word for word."""
        return [*self.texts, *self.valid.texts, *self.test.texts, *self.waiting]

    @property
    def industry(self) -> str:
        """What its labels are filed under: the name, up to an ``@`` (``retail@north`` is an owner of ``retail``)."""
        return industry_of(self.name)

    @property
    def full_labels(self) -> tuple[str, ...]:
        """Label names as the union head knows them: ``industry/label``."""
        return tuple(f"{self.industry}/{label}" for label in self.labels)


@dataclass(frozen=True)
class Specialist:
    """A Model with its Domain, and the Model it came from."""

    model: Model
    domain: Domain
    origin: Model | None = None


@dataclass(frozen=True)
class Arrived:
    """How much of a domain's rows is there: the first ``portion`` of ``of`` portions of its labelled rows.

    ``more`` says that further rows are expected, so a label may be tested whose training rows have yet to come.
    """

    portion: int = 1
    of: int = 1
    more: bool = False


def is_target(domain: Domain, feeding: Iterable[Domain]) -> bool:
    """Whether a guard has texts that others of its industry, who feed, can answer for it."""
    return (
        domain.role == "guard" and domain.counts["unlabelled"] > 0 and domain.industry in {d.industry for d in feeding}
    )


def target_rows(way: str, context: Context, sources: Sequence[str]) -> dict[str, list[int]]:
    """By industry, numbers of the probe rows of owners who are not among the sources, but of a source's industry.

    Raises FitError where there are none.
    """
    found: dict[str, list[int]] = {}
    taught = {industry_of(d) for d in sources}
    for number, row in enumerate(context.probe.rows):
        if row.domain is not None and row.domain not in sources and industry_of(row.domain) in taught:
            found.setdefault(industry_of(row.domain), []).append(number)
    if not found:
        raise FitError(
            "no-target", f"{way} needs texts of an owner who has no specialist",
            allowed=[f"rows of {i}@..." for i in sorted(taught)],
            got=sorted({str(r.domain) for r in context.probe.rows}),
            remedy="name it under guards, with its texts under unlabelled and test rows to judge by",
        )  # fmt: skip
    return found


Source = str | float | Sequence[str] | None


def load_domain(
    name: str,
    *,
    train: Source = None,
    valid: Source = 0.1,
    test: Source = None,
    unlabelled: str | Sequence[str] | None = None,
    python: str | None = None,
    columns: Mapping[str, str] | None = None,
    labels: Sequence[str] | Mapping[Any, str] | None = None,
    task: Task = "text-classification",
    metric: str | None = None,
    share: Share | str = "open",
    limit: Mapping[str, int] | None = None,
    role: Role = "feeds",
    arrived: Arrived = Arrived(),
) -> Domain:
    """Loads and checks one domain.

    Splits are files (or ``datasets:NAME:SPLIT``, or lists of these); ``valid`` and ``test`` may be a number in
    (0, 1), the share that is carved out of train by hash. ``arrived`` leaves rows out that are yet to come.
    ``python`` takes an area of Python's standard library instead of files.
    ``labels`` renames raw labels (a list for numbers, a mapping for names). ``limit`` caps the rows of a split.
    Training rows whose text is also in valid or test are left out, and the warning says how many.
    Raises DataError for rows that cannot be used and UsageError for arguments that cannot be meant.
    """
    _check_arguments(name, task, metric, train, python, test)
    raw = _read(name, train, valid, test, unlabelled, python, columns, task, limit or {}, role, arrived)
    warnings = list(_overlap(name, raw))
    waiting: list[RawRow] = []
    if arrived.more and role == "feeds" and task in CLASSIFYING:
        waiting = _set_aside(raw)
        warnings += [f"{name}: {len(waiting)} held-out rows wait for training rows of their label"] if waiting else []
    for split in ("train", "valid", "test"):
        if raw[split] or role == "feeds" or split == "test":
            check_split(name, split, raw[split])
    if task in CLASSIFYING:
        raw = {split: _renamed(rows, labels) for split, rows in raw.items()}
        if role == "feeds":
            check_labels(name, raw["train"], {s: raw[s] for s in ("valid", "test")})
    names = sorted({r.label for s in ("train", "valid", "test") for r in raw[s] if r.label is not None})
    index = {label: number for number, label in enumerate(names)} if task in CLASSIFYING else None
    splits = {split: _columns(rows, index if split != "unlabelled" else None) for split, rows in raw.items()}
    if isinstance(share, str):
        if share not in PRESETS:
            raise UsageError("unknown-preset", f"{name}: share", allowed=sorted(PRESETS), got=share, remedy="take one")
        share = PRESETS[share]
    return Domain(
        name, task, tuple(names) if index else (), splits["train"], splits["valid"], splits["test"],
        splits["unlabelled"], metric or METRICS[task][0], share, role, tuple(warnings),
        tuple(row.text for row in waiting),
    )  # fmt: skip


def _check_arguments(name: str, task: str, metric: str | None, train: Source, python: str | None, test: Source) -> None:
    if not DOMAIN_NAME.fullmatch(name):
        raise UsageError(
            "domain-name",
            "a domain's name",
            allowed="letters, digits, _ . - (64 at most); industry@owner where several owners share labels",
            got=name,
            remedy="rename it",
        )
    if task not in TASKS:
        raise UsageError("unknown-task", f"{name}: task", allowed=TASKS, got=task, remedy="take one of these")
    if metric is not None and metric not in METRICS[task]:
        raise UsageError("unknown-metric", f"{name}: metric", allowed=METRICS[task], got=metric, remedy="take one")
    if python is None and test is None:
        raise UsageError(
            "no-test",
            f"{name} has no test rows",
            allowed="test: a file, or a share of train such as 0.2",
            remedy="name them: without test rows no judge can decide",
        )
    if python is None and not train and (test is None or isinstance(test, float)):
        raise UsageError("no-train", f"{name} has no training rows", remedy="name a file under train")


def _read(
    name: str, train: Source, valid: Source, test: Source, unlabelled: str | Sequence[str] | None, python: str | None,
    columns: Mapping[str, str] | None, task: Task, limit: Mapping[str, int], role: Role, arrived: Arrived,
) -> dict[str, list[RawRow]]:  # fmt: skip
    labelled, kind = task in CLASSIFYING, MEDIA.get(task, "text")
    raw: dict[str, list[RawRow]] = {}
    if python is not None:
        raw["train"], test, valid = list(function_bodies(python)), test or 0.2, valid or 0.1
    else:
        raw["train"] = load_rows(train, columns, labelled=labelled, kind=kind) if _named(train) else []
    # test first, then valid: a smaller valid share never moves a row into or out of test
    for split, source in (("test", test), ("valid", valid)):
        if _named(source):
            raw[split] = load_rows(source, columns, labelled=labelled, kind=kind)
        elif source is None or (role == "guard" and split == "valid"):
            raw[split] = []
        elif isinstance(source, float) and 0 < source < 1:
            raw["train"], raw[split] = carve(raw["train"], source, f"{name}/{split}")
        else:
            raise UsageError(
                "split-share",
                f"{name}: {split}",
                allowed="a file or 0 < share < 1",
                got=source,
                remedy="name a file, or write a number between 0 and 1",
            )
    raw["unlabelled"] = load_rows(unlabelled, columns, labelled=False, kind=kind) if unlabelled else []
    if isinstance(test, float):  # they may get a label later, and be tested then
        raw["unlabelled"] = not_carved(raw["unlabelled"], test, f"{name}/test")
    unknown = set(limit) - set(raw)
    if unknown:
        raise UsageError("unknown-split", f"{name}: limit", allowed=sorted(raw), got=unknown, remedy="fix the name")
    raw = {split: cap(rows, limit.get(split), f"{name}/{split}") for split, rows in raw.items()}
    # test rows are the same in all rounds, so that champions can be compared over them
    waiting = ("train", "valid", "unlabelled") if isinstance(valid, float) else ("train", "unlabelled")
    for split in waiting:
        raw[split] = portion(raw[split], arrived.portion, arrived.of, f"{name}/arrivals")
    return raw


def _named(source: Source) -> TypeGuard[str | Sequence[str]]:
    return isinstance(source, (str, list, tuple))


def _set_aside(raw: dict[str, list[RawRow]]) -> list[RawRow]:
    """Takes the held-out rows away whose label no training row has yet, and returns them."""
    known, waiting = {row.label for row in raw["train"]}, []
    for split in ("valid", "test"):
        waiting += [row for row in raw[split] if row.label not in known]
        raw[split] = [row for row in raw[split] if row.label in known]
    return waiting


def _overlap(name: str, raw: dict[str, list[RawRow]]) -> list[str]:
    """Leaves training and unlabelled rows out whose text is in test (or valid), and says so."""
    warnings = []
    for split, held in (("valid", "test"), ("train", "test"), ("train", "valid"), ("unlabelled", "test")):
        kept = without_overlap(raw[split], raw[held])
        if lost := len(raw[split]) - len(kept):
            warnings.append(f"{name}: {lost} rows of {split} whose text is also in {held} were left out of {split}")
            raw[split] = kept
    return warnings


def _renamed(rows: Sequence[RawRow], labels: Sequence[str] | Mapping[Any, str] | None) -> list[RawRow]:
    if labels is None:
        return list(rows)
    table = {str(k): v for k, v in (labels.items() if isinstance(labels, Mapping) else enumerate(labels))}
    missing = {str(r.label) for r in rows if r.label is not None} - set(table)
    if missing:
        raise DataError(
            "label-names", "rows carry labels that `labels` does not name", allowed=sorted(table), got=missing,
            remedy="name them under labels",
        )  # fmt: skip
    return [RawRow(r.id, r.text, None if r.label is None else table[r.label]) for r in rows]


def _columns(rows: Sequence[RawRow], index: Mapping[str, int] | None) -> Rows:
    labels = tuple(index[str(r.label)] for r in rows) if index else None
    return Rows(tuple(r.id for r in rows), tuple(r.text for r in rows), labels)
