"""What a run says about itself while it works: at once, seldom, and never at the run's cost."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from fanbu.live import Live


@pytest.fixture
def root(tmp_path: Path) -> Path:
    found = tmp_path / "demo"
    found.mkdir()
    return found


def read(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((root / "live.json").read_text())
    return found


def test_live_writes_stages_at_once_and_progress_soon(root: Path) -> None:
    live = Live(root, "demo", 3)
    live.round(2)
    live.stage("shrink food")
    assert (read(root)["round"], read(root)["rounds"], read(root)["stage"]) == (2, 3, "shrink food")
    live.progress("food", 0, 100)
    time.sleep(0.1)
    live.progress("food", 50, 100)
    time.sleep(0.6)
    assert (read(root)["done"], read(root)["total"]) == (50, 100)
    assert 0.05 < read(root)["left"] < 2
    live.stage_done("shrink food", 1.25, False)
    live.stage_done("probe", 0.5, True)
    assert read(root)["stages"] == [
        {"stage": "shrink food", "seconds": 1.25, "reused": False}, {"stage": "probe", "seconds": 0.5, "reused": True},
    ]  # fmt: skip
    assert (read(root)["stage"], read(root)["total"]) == ("", 0)
    live.end("it broke")
    live.end()
    assert (read(root)["state"], read(root)["error"]) == ("failed", "it broke")
    assert [p.name for p in root.iterdir()] == ["live.json"]


def test_live_writes_seldom(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live, wrote = Live(root, "demo", 1), [0]
    write = live._write

    def counted() -> None:
        wrote[0] += 1
        write()

    monkeypatch.setattr(live, "_write", counted)
    began = time.monotonic()
    while time.monotonic() - began < 1.0:
        live.progress("food", wrote[0], 10**6)
        time.sleep(0.001)
    live.end()
    assert 2 <= wrote[0] <= 6


def test_live_never_stops_a_run(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    live = Live(root, "demo", 1)
    live.stage("a")
    live.progress("a", 1, 2)
    live.end()
    monkeypatch.undo()
    Live(root / "gone", "demo", 1).end()
    assert list(root.iterdir()) == []
