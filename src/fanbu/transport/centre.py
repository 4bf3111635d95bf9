"""The centre of owners who work elsewhere: it asks, and keeps what crosses until the round comes to it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from fanbu.domain import Domain
from fanbu.errors import IntegrityError
from fanbu.model import Model, model_files
from fanbu.transport.parcel import Files, Packing, away, broken, inside, packed, taken_from, unpacked, wanted
from fanbu.types import ProbeSet, Transport

Message = tuple[dict[str, Any], Files]
COST = "owner-cost.json"
_CROSSING = re.compile(
    r"contribution/(contribution\.json|tensors\.safetensors|rows\.jsonl)|model/(fanbu|config|away)\.json|sizes\.json|"
    + re.escape(COST)
)
_SLUG = re.compile(r"[A-Za-z0-9.-]{1,255}")


class Line(Protocol):
    """What connects the centre with owners; it knows nothing of what is said."""

    def greet(self, request: Message, names: Iterable[str], seconds: float) -> Iterator[tuple[str, Message]]:
        """Asks whoever is there, until all the domains ``names`` have answered or so many seconds are over. Gives the
        domain's name with each answer."""

    def ask(self, requests: Mapping[str, Message], seconds: float) -> Iterator[tuple[str, Message | str]]:
        """Asks the owners of these domains; gives each one's answer as it comes, or why there is none."""


@dataclass
class Centre:
    """``folder`` is where what owners sent lies until it is asked for, ``has`` what each has of models and the like."""

    line: Line
    folder: Path
    transport: Transport
    has: dict[str, set[str]] = field(default_factory=dict)

    def domains(self, roles: Mapping[str, str], about: Mapping[str, Any]) -> tuple[dict[str, Domain], dict[str, str]]:
        """The domains whose owners answer, without their rows; and of the others why they take no part."""
        found: dict[str, Domain] = {}
        absent = dict.fromkeys(roles, "its owner did not answer")
        greeting: Message = ({"about": "greeting", **about}, {})
        for name, (said, _) in self.line.greet(greeting, roles, self.transport.arrive):
            if name not in absent:
                continue  # named by nobody, or answered already
            try:
                if error := said.get("error"):
                    absent[name] = str(error)[:1000]
                    continue
                if said["code"] != code():
                    raise broken(f"its owner runs {said['code']}, and the centre {code()}", said["code"])
                domain = away(said["card"])
                if (domain.name, domain.role) != (name, roles[name]):
                    raise broken(f"its owner has it under another name or role: {domain.role}", domain.name)
                self.has[name] = {str(sha) for sha in said["has"]}
                found[name] = domain
                del absent[name]
            except IntegrityError as error:
                absent[name] = error.what
            except (KeyError, TypeError, AttributeError):
                absent[name] = "its answer cannot be read"
        return found, absent

    def ask(
        self, calls: Mapping[str, tuple[str, Any]], packing: Packing, probe: ProbeSet, about: Mapping[str, Any]
    ) -> Iterator[tuple[str, str | None]]:
        """Has calls made, each by its domain's owner, as its answer comes: None, or why there is nothing.

        What crossed lies where ``take`` finds it. An owner who lacks a model is asked again, with it.
        """
        left, again = dict(calls), 2
        while left and again:
            again -= 1
            asked = {d: self._request(d, *call, packing, probe, about) for d, call in left.items()}
            for name, answer in self.line.ask(asked, self.transport.seconds):
                if name not in left:
                    continue
                said, files = ({"error": answer}, {}) if isinstance(answer, str) else answer
                if again and isinstance(said, dict) and said.get("lacks"):
                    self.has[name] = set()  # it lost what it had
                    continue
                del left[name]
                yield name, self._kept(name, said, files, asked[name][0])
        for name in left:
            yield name, "its owner did not answer"

    def knows(self, name: str, model: Model) -> bool:
        """Whether an owner still has a model that it made."""
        return model.digest in self.has.get(name, set())

    def take(self, domain: str, out: Path) -> None:
        """Moves what an owner sent of the stage that is made in ``out`` there. IntegrityError where it sent none."""
        came = self.folder / domain / out.parent.name
        if not came.is_dir():
            raise IntegrityError(
                "owner-away", f"the owner of {domain} has not sent what is asked for: {out.parent.name}",
                remedy="let owner and centre run the same versions of fanbu and its libraries, and run again",
            )  # fmt: skip
        for path in came.iterdir():
            shutil.move(path, out / path.name)
        came.rmdir()

    def _request(
        self, name: str, function: str, call: Any, packing: Packing, probe: ProbeSet, about: Mapping[str, Any]
    ) -> Message:
        body = {"about": "work", **about, "domain": name, "function": function, "call": call, "probe": probe.digest}
        files: Files = {}
        for sha in self._to_send(name, wanted(call, "model") & packing.models.keys()):
            model: Model = packing.models[sha]
            named = [*model_files(model.path), *(["fanbu.json"] if model.manifest else [])]
            files |= packed(model.path, named, f"models/{sha}/")
        for sha in self._to_send(name, wanted(call, "inner")):
            folder = packing.folders[sha]
            files |= packed(folder, [p.name for p in folder.iterdir()], f"said/{sha}/")
        for sha in self._to_send(name, {probe.digest}):
            rows = [[r.id, r.text, r.domain] for r in probe.rows]
            files[f"probes/{sha}/rows.json"] = json.dumps(rows).encode()
        return body, files

    def _to_send(self, name: str, shas: set[str]) -> list[str]:
        return sorted(shas - self.has.get(name, set()))

    def _kept(self, name: str, said: Any, files: Files, asked: Mapping[str, Any]) -> str | None:
        """Keeps what crossed; None, or what is wrong with it."""
        try:
            if error := said.get("error"):
                return str(error)[:1000]
            if lacks := said.get("lacks"):
                return f"it lacks what the centre cannot send: {lacks}"[:1000]
            for slug in said["stages"]:
                if not _SLUG.fullmatch(slug):
                    raise broken("a stage has no such name", slug)
                place = self.folder / name / inside(slug)
                shutil.rmtree(place, ignore_errors=True)  # of an answer that nobody asked for in the end
                unpacked(taken_from(files, f"{slug}/"), place, _CROSSING)
        except IntegrityError as error:
            return error.what
        except (KeyError, TypeError, AttributeError):
            return "its answer cannot be read"
        self.has.setdefault(name, set()).update({*wanted(asked["call"], "model"), asked["probe"]})
        return None


def crossing(stages: Iterable[Path], cards: Mapping[Path, Files]) -> Message:
    """At an owner: what crosses of finished stages. Of models only ``cards``, which say all but their weights."""
    slugs: list[str] = []
    files: Files = {}
    for stage in stages:
        under = f"{stage.name}/"
        found = {
            p.relative_to(stage).as_posix(): p for p in (*stage.glob("contribution/*"), stage / "sizes.json")
        }  # fmt: skip
        files |= packed(stage, [n for n, p in found.items() if p.is_file() and _CROSSING.fullmatch(n)], under)
        files |= {f"{under}model/{name}": content for name, content in cards.get(stage, {}).items()}
        files[f"{under}{COST}"] = (stage / "cost.json").read_bytes()
        slugs.append(stage.name)
    return {"stages": slugs}, files


def code() -> dict[str, str]:
    """What an owner must run as its centre does, for the same bits. What else differs shows where a stage has no such
    name as the centre looks for."""
    return {name: version(name) for name in ("fanbu", "torch", "transformers")}
