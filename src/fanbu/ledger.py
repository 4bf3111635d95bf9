"""The ledger: stages keyed by what they are made of, rounds, and one pointer, the champion.

A stage writes into ``partial/`` and is renamed into ``stages/`` when it is whole, so a folder in ``stages/`` means
done and resuming after ``kill -9`` is skipping. Locks are the kernel's (flock): they end with their process.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanbu.errors import IntegrityError, RetryError, UsageError
from fanbu.files import disk_error, file_sha256, sync, write_text
from fanbu.fingerprint import code_digest
from fanbu.machine import joules
from fanbu.types import digest

if TYPE_CHECKING:
    from collections.abc import Iterator

STAGE, COST = "stage.json", "cost.json"
_LONGEST = 120  # letters of a stage's name that its folder shows
_ENTRY = ("model", "path", "round", "number", "domains", "left")


@dataclass(frozen=True)
class Stage:
    """A finished stage: its folder, the digest of what it holds, what it cost, and whether it was there already."""

    path: Path
    digest: str
    cost: Mapping[str, Any]
    reused: bool


class Workspace:
    """One folder with stages, rounds, history and the champion. Safe for several runs at once."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        try:
            for name in ("stages", "partial", "rounds", "locks"):
                (self.root / name).mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UsageError("workspace", f"{root} is no folder", got=root, remedy="name another workspace") from None
        except OSError as error:
            raise disk_error(error, root) from error

    def stage(
        self,
        name: str,
        module: str,
        inputs: Mapping[str, Any],
        produce: Callable[[Path, Path], None],
        log: Callable[[str], None] = lambda text: None,
    ) -> Stage:
        """Runs ``produce(out, scratch)`` unless a finished stage of the same inputs and code is there.

        ``scratch`` outlives a kill and is gone when the stage is done. Raises IntegrityError where a finished
        stage was changed afterwards.
        """
        key = digest({"stage": name, "inputs": inputs, "code": code_digest(module)})
        slug = f"{re.sub(r'[^A-Za-z0-9.]+', '-', name)[:_LONGEST]}-{key[:20]}"  # a folder's name has 255 bytes at most
        final, partial = self.root / "stages" / slug, self.root / "partial" / slug
        with self.lock(slug, log):
            if (final / STAGE).exists():
                shutil.rmtree(partial, ignore_errors=True)
                return _reopen(final)
            out, scratch = partial / "out", partial / "scratch"
            try:
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir(parents=True)
                scratch.mkdir(exist_ok=True)
                with _measured() as cost:
                    produce(out, scratch)
                _finish(out, name, key, inputs, cost)
                out.rename(final)
                sync(final.parent)
            except OSError as error:
                raise disk_error(error, out) from error
            shutil.rmtree(partial, ignore_errors=True)
        return Stage(final, json.loads((final / STAGE).read_text())["digest"], cost, reused=False)

    @contextmanager
    def lock(self, name: str, log: Callable[[str], None] = lambda text: None) -> Iterator[None]:
        """An exclusive lock that its process's end frees."""
        from filelock import FileLock, Timeout

        lock = FileLock(self.root / "locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log(f"another run works on {name}; waiting for it")
            try:
                lock.acquire(timeout=6 * 3600)
            except Timeout:
                raise RetryError(
                    "locked", f"another run held {name} for six hours", remedy="end that run, then run again"
                ) from None
        except OSError as error:
            raise disk_error(error, self.root) from error
        try:
            yield
        finally:
            lock.release()

    # The champion and its history

    def champion(self) -> dict[str, Any] | None:
        """The pointer: model digest, folder (relative to the workspace), round; None before the first promotion.

        ``domains`` are those whose knowledge is in its weights, ``left`` those that have left. History is the one
        truth; ``champion.json`` is its last word, for other programs to read.
        """
        stack = self.champions()
        if not stack or stack[-1]["model"] is None:
            return None
        return {**stack[-1], "previous": stack[-2]["model"] if len(stack) > 1 else None}

    def left(self) -> list[str]:
        """The domains that have left."""
        stack = self.champions()
        return list(stack[-1]["left"] or []) if stack else []

    def rounds(self) -> list[dict[str, Any]]:
        """The events that ended a round, in order; the first is round 1. UsageError for an older kind of history."""
        ended = [e for e in self.history() if e["event"] in {"promoted", "refused"}]
        if any("number" not in e for e in ended):
            raise UsageError(
                "old-workspace", f"{self.root} was written by a version that did not number its rounds",
                remedy="give the recipe another workspace; the models of this one stay where they are",
            )  # fmt: skip
        return [e for e in ended if e["number"]]

    def champions(self) -> list[dict[str, Any]]:
        """The champions that rollback goes back through, replayed from history; the last is the one of now."""
        stack: list[dict[str, Any]] = []
        for event in self.history():
            entry = {k: event.get(k) for k in _ENTRY}
            if event["event"] == "rolled back":
                stack.pop()
            elif event["event"] in {"started", "promoted", "left"} and (not stack or _differs(stack[-1], entry)):
                stack.append(entry)
        return stack

    def history(self) -> list[dict[str, Any]]:
        """Everything that happened, oldest first."""
        path = self.root / "history.jsonl"
        if not path.exists():
            return []
        lines = path.read_text().split("\n")
        return [json.loads(line) for line in lines if line.endswith("}")]

    def decide(self, entry: Mapping[str, Any], parent: Mapping[str, Any], accepted: bool, **said: Any) -> bool:
        """Writes a round's decision down, once; promotes where it was accepted. False if it was written before.

        ``entry`` and ``parent`` name a model each (``model``, ``path``, ``domains``, ``left``), ``entry`` also the
        ``round`` and its ``number``; ``parent`` becomes the first champion where there is none. ``before``, among
        what is ``said``, is the champion (its digest, or None) that the round set out from: RetryError where it is no
        longer the champion, since then the candidate was not compared with the one of now.
        """
        before = said.pop("before")
        with self.lock("champion"):
            if any(e["event"] in {"promoted", "refused"} and e.get("round") == entry["round"] for e in self.history()):
                self._write_pointer()
                return False
            now = (self.champion() or {}).get("model")
            if now not in {before, parent["model"]} or entry["number"] != len(self.rounds()) + 1:
                raise RetryError(
                    "champion-moved", "the champion changed, or another round ended, while this round was at work",
                    got=now and now[:12], remedy="run again: the round is made anew from the champion of now",
                )  # fmt: skip
            if now is None:
                self._point({**dict.fromkeys(_ENTRY), **parent}, "started")
            whole = {**dict.fromkeys(_ENTRY), **entry}
            if accepted:
                self._point(whole, "promoted", parent=parent["model"], **said)
            else:
                self._log({"event": "refused", **whole, "parent": parent["model"], **said})
        return True

    def leave(
        self, domain: str, before: str, entry: Mapping[str, Any], reason: str, *, forgotten: Sequence[int] = ()
    ) -> dict[str, Any]:  # fmt: skip
        """Makes a model without one domain the champion (``model`` None: none, the next round starts anew).

        ``before`` is the champion that it was made from: RetryError where it is no longer the champion. ``forgotten``
        are the rounds of which nothing may be carried on.
        """
        with self.lock("champion"):
            now = (self.champion() or {}).get("model")
            if now != before:
                raise RetryError(
                    "champion-moved", f"the champion changed while {domain} was leaving", allowed=before[:12],
                    got=now and now[:12], remedy="let it leave again",
                )  # fmt: skip
            told = {"domain": domain, "reason": reason, "forgotten": list(forgotten)}
            self._point({**dict.fromkeys(_ENTRY), **entry}, "left", **told)
            return self.history()[-1]

    def forgotten(self) -> set[int]:
        """The rounds of which nothing may be carried on, since a domain was forgotten after them."""
        return {number for e in self.history() if e["event"] == "left" for number in e["forgotten"]}

    def mend(self) -> None:
        """Writes ``champion.json`` again: a kill may have come between history and it."""
        with self.lock("champion"):
            self._write_pointer()

    def find(self, sha: str) -> dict[str, Any]:
        """The last event of the one model of the history whose digest starts like this (six characters at least)."""
        known = {e["model"]: e for e in self.history() if e["model"]}
        found = [e for m, e in known.items() if m.startswith(sha)] if len(sha) >= 6 else []
        if len(found) != 1:
            raise UsageError(
                "unknown-model", "no single model of the history", allowed=[m[:12] for m in known], got=sha,
                remedy="give at least six characters of one of these",
            )  # fmt: skip
        return found[0]

    def promote(self, sha: str) -> dict[str, Any]:
        """Makes a model of the history the champion, by (a prefix of) its digest. For a person, over the gate."""
        with self.lock("champion"):
            found = self.find(sha)
            entry = {k: found.get(k) for k in _ENTRY}
            # who left stays away; only a rollback brings a domain back
            self._point({**entry, "number": None, "left": self.left()}, "promoted", reason="by hand")
            return self.champion() or {}

    def rollback(self) -> dict[str, Any]:
        """Swaps the pointer back to the champion before this one; no training is needed."""
        with self.lock("champion"):
            stack = self.champions()
            if len(stack) < 2:
                raise UsageError("nothing-before", "there is no champion before this one", remedy="see `fanbu history`")
            back = {**stack[-2], "number": None}
            self._log({"event": "rolled back", **back, "from": stack[-1]["model"]})
            self._write_pointer()
            return self.champion() or {}

    def _point(self, entry: dict[str, Any], event: str, **extra: Any) -> None:
        self._log({"event": event, **entry, **extra})
        self._write_pointer()

    def _write_pointer(self) -> None:
        champion, path = self.champion(), self.root / "champion.json"
        if champion:
            write_text(path, json.dumps(champion, indent=1))
        else:
            path.unlink(missing_ok=True)

    def _log(self, event: Mapping[str, Any]) -> None:
        path = self.root / "history.jsonl"
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        before = path.read_text() if path.exists() else ""
        write_text(path, before + json.dumps({**event, "time": now}) + "\n")

    def locate(self, path: str) -> Path:
        """Where a model of a stage lies now: a record names where it lay, and the workspace may have been moved."""
        return self.root.joinpath("stages", *Path(path).parts[-2:])

    def relative(self, path: Path) -> str:
        """A path as the ledger writes it: relative to the workspace, so that the workspace can be moved."""
        return os.path.relpath(path.resolve(), self.root)


def _differs(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    return bool(one["model"] != two["model"] or (one["left"] or []) != (two["left"] or []))


def _finish(out: Path, name: str, key: str, inputs: Mapping[str, Any], cost: Mapping[str, Any]) -> None:
    files = {str(p.relative_to(out)): file_sha256(p) for p in sorted(out.rglob("*")) if p.is_file()}
    entry = {"stage": name, "key": key, "inputs": inputs, "files": files, "digest": digest(files)}
    write_text(out / COST, json.dumps(cost))
    write_text(out / STAGE, json.dumps(entry, indent=1, sort_keys=True))


def _reopen(final: Path) -> Stage:
    try:
        entry = json.loads((final / STAGE).read_text())
        files, sha = dict(entry["files"]), str(entry["digest"])
    except (ValueError, KeyError, TypeError):
        files, sha = {STAGE: "a list of its files"}, ""
    for name, expected in files.items():
        if not (final / name).is_file() or file_sha256(final / name) != expected:
            raise IntegrityError(
                "stage-changed", f"{final / name} was changed or removed after it was finished", allowed=expected,
                remedy=f"remove {final} and run again: only this step is made anew",
            )  # fmt: skip
    cost = json.loads((final / COST).read_text()) if (final / COST).exists() else {}
    return Stage(final, sha, cost, reused=True)


@contextmanager
def _measured() -> Iterator[dict[str, Any]]:
    """Wall and CPU seconds, the peak of resident memory (sampled ten times a second), and the energy, estimated."""
    import psutil

    process, peak, stop = psutil.Process(), [0], threading.Event()

    def sample() -> None:
        while not stop.wait(0.1):
            peak[0] = max(peak[0], process.memory_info().rss)

    cost: dict[str, Any] = {}
    thread = threading.Thread(target=sample, daemon=True)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    thread.start()
    try:
        yield cost
    finally:
        stop.set()
        thread.join()
    after = resource.getrusage(resource.RUSAGE_SELF)
    cost["seconds"] = round(time.monotonic() - started, 3)
    cost["cpu_seconds"] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 3)
    cost["peak_bytes"] = max(peak[0], process.memory_info().rss)
    cost["joules"] = round(joules(cost["seconds"], cost["cpu_seconds"], cost["peak_bytes"]), 1)
