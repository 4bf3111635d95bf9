"""Flower as the line: what the grid does to messages, and real processes with TLS and keys."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from flwr.supercore.task_identity import TaskIdentity

from fanbu.errors import IntegrityError, UsageError
from fanbu.generations import run
from fanbu.recipe import load_recipe
from fanbu.serve.flower import Security, _free_port, join
from fanbu.transport import flower
from fanbu.transport.flower import FlowerLine, from_record, to_record
from test_away import elsewhere


@dataclass
class Error:
    reason: str
    code: int = 1


@dataclass
class Reply:
    """As much of Flower's message as a line reads."""

    metadata: Any
    content: Any = None
    error: Error | None = None

    def has_error(self) -> bool:
        return self.error is not None


@dataclass
class Grid:
    """Nodes that answer at once: by number, the domains of each; some are silent, some fail, some go away."""

    nodes: dict[int, list[str]]
    silent: set[int] = field(default_factory=set)
    failing: set[int] = field(default_factory=set)
    waiting: dict[str, Any] = field(default_factory=dict)
    pushed: list[tuple[int, dict[str, Any]]] = field(default_factory=list)

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        for message in messages:
            node, said = message.metadata.dst_node_id, from_record(message.content)[0]
            self.pushed.append((node, said))
            key = f"m{len(self.pushed)}"
            if node not in self.silent:
                self.waiting[key] = self._reply(node, key, said)
            yield key

    def _reply(self, node: int, key: str, said: dict[str, Any]) -> Reply:
        metadata = type("M", (), {"reply_to_message_id": key})()
        if node in self.failing:
            return Reply(metadata, error=Error("out of memory"))
        if said["about"] == "greeting":
            return Reply(metadata, to_record({"domains": {d: {"card": d} for d in self.nodes[node]}}, {}))
        return Reply(metadata, to_record({"stages": [], "of": said["domain"]}, {"a/b": b"\0\1" * 3}))

    def pull_messages(self, keys: Iterable[str]) -> Iterable[Any]:
        return [self.waiting.pop(k) for k in list(keys) if k in self.waiting]


HELLO = ({"about": "greeting"}, {})


def work(*domains: str) -> dict[str, Any]:
    return {d: ({"about": "work", "domain": d}, {}) for d in domains}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower, "_PAUSE", 0.01)
    monkeypatch.setattr(flower, "_GONE", 0.2)
    for part in ("_run_id", "_task_id", "_node_id"):  # what Flower knows inside a ServerApp
        monkeypatch.setattr(TaskIdentity, part, 1)


def test_messages_come_out_as_they_went_in() -> None:
    said, files = {"a": [1, None, "ü"]}, {"x/y.json": b"{}", "big": bytes(10**6)}
    assert from_record(to_record(said, files)) == (said, files)
    assert from_record(to_record(said, {})) == (said, {})
    with pytest.raises(IntegrityError, match="no object"):
        from_record(to_record([1], {}))  # type: ignore[arg-type]
    with pytest.raises(IntegrityError, match="cannot be read"):
        from_record({})


def test_a_message_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    record = to_record({}, {"a": bytes(100)})
    monkeypatch.setattr(flower, "MAX_BYTES", 99)
    for refused in (lambda: from_record(record), lambda: to_record({}, {"a": bytes(100)})):
        with pytest.raises(IntegrityError, match=r"too large|larger"):
            refused()


def test_owners_are_found_and_asked() -> None:
    line = FlowerLine(Grid({1: ["food"], 2: ["rail", "sea"]}))
    assert dict(line.greet(HELLO, ["food", "rail"], 5)) == {
        "food": ({"card": "food"}, {}), "rail": ({"card": "rail"}, {}), "sea": ({"card": "sea"}, {}),
    }  # fmt: skip
    answers = dict(line.ask(work("food", "sea"), 5))
    assert {d: a[0]["of"] for d, a in answers.items() if not isinstance(a, str)} == {"food": "food", "sea": "sea"}
    assert [node for node, said in line.grid.pushed if said["about"] == "work"] == [1, 2]


def test_who_is_silent_or_fails_or_goes_is_told_apart() -> None:
    grid = Grid({1: ["food"], 2: ["rail"], 3: ["sea"], 4: ["air"]})
    line = FlowerLine(grid)
    assert len(dict(line.greet(HELLO, ["food", "rail", "sea", "air"], 5))) == 4
    grid.silent, grid.failing = {2, 3}, {4}
    found = {}
    for domain, answer in line.ask(work("food", "rail", "sea", "air"), 1.0):
        found[domain] = answer
        grid.nodes.pop(3, None)
    assert not isinstance(found.pop("food"), str)
    assert found == {
        "rail": "its owner did not answer within 1 s", "sea": "its owner went away",
        "air": "its owner's node failed: out of memory",
    }  # fmt: skip


def test_who_comes_back_as_another_node_is_found_again() -> None:
    grid = Grid({1: ["food"], 2: ["rail"]})
    line = FlowerLine(grid)
    list(line.greet(HELLO, ["food", "rail"], 5))
    grid.nodes = {1: ["food"], 7: ["rail"]}
    assert not any(isinstance(a, str) for a in dict(line.ask(work("food", "rail"), 5)).values())
    assert line.nodes == {"food": 1, "rail": 7}
    grid.nodes = {1: ["food"]}
    assert dict(line.ask(work("rail"), 5)) == {"rail": "its owner is not there"}


def test_a_greeting_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid({1: ["food"], 2: ["rail"]}, silent={2})
    began = time.monotonic()
    assert dict(FlowerLine(grid).greet(HELLO, ["food", "rail"], 0.3)) == {"food": ({"card": "food"}, {})}
    assert time.monotonic() - began < 3


def test_a_connection_is_encrypted_or_said_not_to_be(tmp_path: Path) -> None:
    for wrong in ({}, {"insecure": True, "ca": tmp_path}, {"certificate": tmp_path, "key": tmp_path}):
        with pytest.raises(UsageError, match="encrypted or not"):
            Security(**wrong)
    with pytest.raises(UsageError, match="no such file"):
        Security(insecure=True, owners=[tmp_path / "none.pub"])
    with pytest.raises(UsageError, match="encrypted or not"):
        join("x:1", tmp_path, tmp_path, None, None, None, insecure=False)


def start(folder: Path, name: str, *command: str) -> subprocess.Popen[bytes]:
    log = (folder / f"{name}.log").open("ab")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "fanbu", *command], cwd=folder, stdout=log, stderr=log, env=environment,
        start_new_session=True,
    )  # fmt: skip


def end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def shell(folder: Path, command: str) -> None:
    subprocess.run(command, shell=True, cwd=folder, check=True, capture_output=True)


@pytest.mark.slow
def test_real_processes_with_tls_and_keys_make_the_same_champion(tmp_path: Path) -> None:
    recipe, line = elsewhere(tmp_path, transport={"kind": "flower", "arrive": 120}, references=[])
    page = (Path(__file__).parents[1] / "docs" / "federation.md").read_text()
    for command in page.partition("```text\n")[2].partition("```")[0].splitlines():
        shell(tmp_path, command.replace("printf", "/usr/bin/printf"))
    for name in line.owners:
        shell(tmp_path, f'ssh-keygen -t ecdsa -b 384 -N "" -f {name}')
    shell(tmp_path, 'ssh-keygen -t ecdsa -b 384 -N "" -f stranger')
    port = _free_port()
    owners = [
        start(
            tmp_path, f"owner-{name}", "join", f"127.0.0.1:{port}", str(part), "--workspace", str(root), "--ca",
            "ca.pem", "--key", name,
        )
        for name, (part, root) in line.owners.items()
    ]  # fmt: skip
    stranger = start(
        tmp_path, "stranger", "join", f"127.0.0.1:{port}", str(line.owners["food"][0]), "--workspace", "strange",
        "--ca", "ca.pem", "--key", "stranger",
    )  # fmt: skip
    keys = [flag for name in line.owners for flag in ("--owner", f"{name}.pub")]
    centre = start(
        tmp_path, "centre", "serve-center", str(recipe), "--port", str(port), "--certificate", "server.pem", "--key",
        "server.key", "--ca", "ca.pem", *keys,
    )  # fmt: skip
    try:
        assert centre.wait(900) == 0, (tmp_path / "centre.log").read_text()[-3000:]
    finally:
        for process in (centre, stranger, *owners):
            end(process)
    here = {**yaml.safe_load((tmp_path / "recipe.yaml").read_text()), "references": []}
    (tmp_path / "here.yaml").write_text(yaml.safe_dump({**here, "workspace": str(tmp_path / "here")}))
    local = run(load_recipe(tmp_path / "here.yaml"))
    champion = yaml.safe_load((tmp_path / "ws" / "champion.json").read_text())
    assert champion["model"] == local["champion"]["model"]
    assert not list((tmp_path / "strange").glob("stages/*"))
