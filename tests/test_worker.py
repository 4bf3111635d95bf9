"""An owner's process that stays: messages come out as they went in, and without it there is no answer from it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest
import yaml

from conftest import tiny_recipe
from fanbu.errors import UsageError
from fanbu.serve import worker
from fanbu.transport.centre import Message

REQUEST: Message = ({"about": "work", "domain": "food", "x": [1, "ü"]}, {"a/b": b"\0\1" * 10, "empty": b""})


def test_messages_pass_through_as_they_are(tmp_path: Path) -> None:
    heard: list[Message] = []

    def answer(request: Message) -> dict[str, Message]:
        heard.append(request)
        return {"food": ({"stages": ["s"]}, {"s/file": bytes(3_000_000)}), "rail": ({"error": "no"}, {})}

    threading.Thread(target=worker.stay, args=(tmp_path, answer), daemon=True).start()
    end = time.monotonic() + 20
    while not worker._address(tmp_path).exists() and time.monotonic() < end:
        time.sleep(0.05)
    for _ in range(2):
        found = worker.asked(REQUEST, tmp_path)
        assert found == {"food": ({"stages": ["s"]}, {"s/file": bytes(3_000_000)}), "rail": ({"error": "no"}, {})}
    assert heard == [REQUEST, REQUEST]
    assert worker._address(tmp_path).parent.stat().st_mode & 0o077 == 0  # nobody else may ask


def test_where_there_is_none_nobody_answers(tmp_path: Path) -> None:
    assert worker.asked(REQUEST, tmp_path) is None
    place = worker._address(tmp_path)
    place.parent.mkdir(mode=0o755)
    place.parent.chmod(0o755)
    place.touch()
    assert worker.asked(REQUEST, tmp_path) is None
    with pytest.raises(UsageError, match="not this user's own folder"):
        worker.stay(tmp_path, lambda request: {})


def test_it_is_started_again_where_it_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "_AGAIN", 0.1)
    value = tiny_recipe(tmp_path)
    part, root = tmp_path / "part.yaml", tmp_path / "owner"
    part.write_text(yaml.safe_dump({"domains": {"food": value["domains"]["food"]}}))
    root.mkdir()
    greeting: Message = ({"about": "greeting", "round": 1}, {})

    def greeted() -> str:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            if found := worker.asked(greeting, root):
                return str(found["food"][0]["card"]["name"])
            time.sleep(0.1)
        return "nobody"

    with worker.kept(part, root):
        assert greeted() == "food"
        [child] = [p for p in psutil.Process().children() if "fanbu.serve.worker" in " ".join(p.cmdline())]
        os.kill(child.pid, signal.SIGKILL)
        child.wait(20)
        assert greeted() == "food"
