"""What travels between centre and owners: calls as plain JSON, and files as bytes. Hostile until checked."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from fanbu.catalogue import Method, method
from fanbu.domain import Domain, Rows, Specialist
from fanbu.errors import IntegrityError
from fanbu.files import file_sha256
from fanbu.model import AWAY, MANIFEST, Model
from fanbu.types import DOMAIN_NAME, KINDS, TASKS, Inner, Share, digest

Files = dict[str, bytes]  # by relative path, with / between folders
MAX_BYTES = 16 * 2**30  # of one message
_MARK = "~"


@dataclass
class Packing:
    """A call as JSON (``encoded``), and the models and folders that it names, by digest; ``root`` is the workspace that
    paths are told from."""

    root: Path
    models: dict[str, Model] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)

    def encoded(self, value: Any) -> Any:
        """Plain JSON. TypeError for what cannot travel."""
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (list, tuple)):
            return [self.encoded(v) for v in value]
        if isinstance(value, Mapping):
            if _MARK in value:
                raise TypeError(f"a value with the key {_MARK!r} cannot travel to an owner")
            return {str(k): self.encoded(v) for k, v in value.items()}
        kind, told = self._special(value)
        return {_MARK: kind, "value": told}

    def _special(self, value: Any) -> tuple[str, Any]:
        if isinstance(value, Model):
            if not value.away:
                self.models[value.digest] = value
            return "model", value.digest
        if isinstance(value, Domain):
            return "domain", value.name
        if isinstance(value, Specialist):
            return "specialist", self.encoded([value.model, value.domain, value.origin])
        if isinstance(value, Method):
            return "method", value.name
        if isinstance(value, Path):
            return "path", value.relative_to(self.root).as_posix()
        if isinstance(value, Inner):
            said = value.said and self._folder(value.said)
            return "inner", [value.number, self.encoded(value.before), said, value.share, value.of]
        raise TypeError(f"{type(value).__name__} cannot travel to an owner")

    def _folder(self, folder: Path) -> str:
        key = digest({p.name: file_sha256(p) for p in sorted(folder.iterdir())})
        self.folders[key] = folder
        return key


@dataclass(frozen=True)
class Unpacking:
    """The way back, at an owner: what stands for models and folders there, its one domain, its workspace."""

    root: Path
    domain: Domain
    model: Callable[[str], Model]
    folder: Callable[[str], Path]

    def decoded(self, value: Any) -> Any:
        """What was encoded. IntegrityError for anything else."""
        if isinstance(value, list):
            return [self.decoded(v) for v in value]
        if not isinstance(value, dict):
            return value
        if _MARK not in value:
            return {k: self.decoded(v) for k, v in value.items()}
        try:
            return self._special(value[_MARK], value["value"])
        except (KeyError, TypeError, ValueError) as error:
            raise broken(f"a call holds {value[_MARK]!r} that cannot be read: {error}", value) from None

    def _special(self, kind: str, told: Any) -> Any:
        if kind == "model":
            return self.model(_sha(told))
        if kind == "domain":
            if told != self.domain.name:
                raise ValueError(f"this owner has {self.domain.name}")
            return self.domain
        if kind == "specialist":
            return Specialist(*self.decoded(told))
        if kind == "method":
            return method(str(told), "feedback")
        if kind == "path":
            return self.root / inside(str(told))
        if kind == "inner":
            number, before, said, share, of = told
            said = None if said is None else self.folder(_sha(said))
            return Inner(int(number), self.decoded(before), said=said, share=float(share), of=int(of))
        raise ValueError("unknown kind")


def wanted(value: Any, kind: str) -> set[str]:
    """Digests of all models (``model``), or of what the centre told owners (``inner``), that an encoded call names."""
    if isinstance(value, list):
        return set().union(*(wanted(v, kind) for v in value))
    if not isinstance(value, dict):
        return set()
    if value.get(_MARK) == kind:
        told = value.get("value")
        return {str(told)} if kind == "model" else {str(told[2])} - {"None"} if isinstance(told, list) else set()
    return set().union(*(wanted(v, kind) for v in value.values()))


def inside(path: str) -> PurePosixPath:
    """A relative path that leads out of no folder. IntegrityError for any other."""
    found = PurePosixPath(path)
    if found.is_absolute() or ".." in found.parts or not found.parts or "\\" in path or "\0" in path:
        raise broken("a path leads out of its folder", path)
    return found


def packed(folder: Path, names: Iterable[str], under: str = "") -> Files:
    """Some files of a folder."""
    return {f"{under}{name}": (folder / name).read_bytes() for name in names}


def unpacked(files: Mapping[str, bytes], folder: Path, allowed: re.Pattern[str]) -> None:
    """Writes files into a folder that is not there yet, which appears whole. IntegrityError for names not allowed."""
    if folder.exists():
        return
    if strange := [name for name in files if not allowed.fullmatch(name)]:
        raise broken("a file has another name than such a folder holds", strange[0])
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    for name, content in files.items():
        place = partial / inside(name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    partial.mkdir(parents=True, exist_ok=True)
    partial.rename(folder)


def taken_from(files: Mapping[str, bytes], under: str) -> Files:
    """The files below a folder, with names from there."""
    return {name.removeprefix(under): content for name, content in files.items() if name.startswith(under)}


def card_of(model: Model) -> dict[str, bytes]:
    """Files by name that say all of a model but its weights and its tokenizer: what ``open_model`` opens as away."""
    sizes = {"parameters": model.parameters, "bytes": model.bytes}
    kept = {name: (model.path / name).read_bytes() for name in (MANIFEST, "config.json")}
    return {**kept, AWAY: json.dumps(sizes).encode()}


def card(domain: Domain) -> dict[str, Any]:
    """What a centre is told of an owner's domain, as plain JSON: no text, and no row."""
    return {
        "name": domain.name, "task": domain.task, "labels": list(domain.labels), "metric": domain.metric,
        "role": domain.role, "share": domain.share.as_dict(), "warnings": list(domain.warnings),
        "digest": domain.digest, "counts": domain.counts,
    }  # fmt: skip


def away(told: Mapping[str, Any]) -> Domain:
    """The domain that a card tells of, without rows. IntegrityError for a card that is none."""
    try:
        share, counts = told["share"], {s: int(told["counts"][s]) for s in ("train", "valid", "test", "unlabelled")}
        if not DOMAIN_NAME.fullmatch(told["name"]) or told["task"] not in TASKS or told["role"] not in _ROLES:
            raise ValueError("its name, task or role")
        labels, warnings = ([_short(v) for v in told[key]] for key in ("labels", "warnings"))
        together = int(share.get("together", 0))
        sizes = [*counts.values(), together]
        if min(sizes) < 0 or max(len(labels), together) > _MOST or not set(share["kinds"]) <= set(KINDS):
            raise ValueError("its counts, labels or kinds")
        budget = None if share.get("budget") is None else (float(share["budget"][0]), float(share["budget"][1]))
        yes = {key: bool(share[key]) for key in ("texts", "labels", "private", "synthetic")}
        return Domain(
            told["name"], told["task"], tuple(labels), Rows(), Rows(), Rows(), Rows(), _short(told["metric"]),
            Share(frozenset(share["kinds"]), **yes, budget=budget, together=together), told["role"], tuple(warnings),
            away={"digest": _sha(told["digest"]), "counts": counts},
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise broken(f"what an owner says of its domain cannot be read: {error}", str(told)[:80]) from None


_ROLES, _MOST = ("feeds", "guard"), 100_000


def _short(value: Any) -> str:
    if not isinstance(value, str) or len(value) > 1000:
        raise ValueError("a name, or a warning, is no short string")
    return value


def _sha(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("no sha256")
    return value


def broken(what: str, got: object) -> IntegrityError:
    """A message that is not what it should be."""
    return IntegrityError(
        "message-broken", what, got=str(got)[:200], remedy="let owner and centre run the same version of fanbu"
    )
