"""Rounds by command: several at once, their pages, leaving, watching, tracking; and what progress shows."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest

from conftest import Done
from fanbu.live import FILE
from fanbu.progress import Bar, Lines, bar, place
from fanbu.report.text import history_tree
from test_cli import Command, error_of
from test_cli import copied as copied
from test_cli import fanbu as fanbu


def test_two_rounds_give_two_blocks_and_their_pages(
    copied: tuple[Done, Path], fanbu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, workspace = copied
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    code, text = fanbu("run", done.recipe, "--workspace", workspace, "--rounds", 2)
    assert code in {0, 3}
    assert "round 2: " in text
    assert "round 1: " not in text  # it was finished before
    code, told = fanbu("run", done.recipe, "--workspace", workspace, "--rounds", 2, "--json")
    assert told["round"] == 2
    assert told["report"] == str(workspace / "report.html")
    pages = sorted(workspace.glob("rounds/*/report.html"))
    assert told["pages"][-1] in map(str, pages)
    for page in [*pages, workspace / "report.html"]:
        page.unlink(missing_ok=True)
    code, told = fanbu("report", workspace, "--open", "--json")
    assert (code, told["round"], len(told["pages"])) == (0, 2, 2)
    assert all(Path(p).is_file() for p in [told["report"], *told["pages"]])
    assert opened == [(workspace / "report.html").as_uri()]
    code, told = fanbu("report", workspace, "--round", 1, "--open", "--json")
    assert (told["round"], opened[-1]) == (1, Path(told["pages"][0]).as_uri())
    error_of(fanbu("report", workspace, "--round", 9, "--json"), 2, "unknown-round")
    assert "文" not in Path(told["report"]).read_text()
    assert fanbu("report", workspace, "--lang", "zh")[1] == f"报告: {workspace / 'report.html'}\n"
    assert 'lang="zh' in (workspace / "report.html").read_text()


def test_a_domain_leaves_and_comes_back(copied: tuple[Done, Path], fanbu: Command) -> None:
    from fanbu.model import open_model

    done, workspace = copied
    code, event = fanbu("leave", workspace, "food", "--json")
    assert (code, event["event"], event["domain"]) == (0, "left", "food")
    assert not any(x.startswith("food/") for x in open_model(workspace / event["path"]).labels)
    error_of(fanbu("leave", workspace, "food", "--json"), 2, "unknown-domain")
    text = fanbu("history", workspace)[1]
    assert "left food" in text
    assert fanbu("rollback", workspace, "--json")[1]["model"] == done.champion
    code, event = fanbu("leave", workspace, "food", "--forget")
    assert code == 0


def test_a_tree_with_everything_in_it() -> None:
    names = [("a", "started"), ("b", "promoted"), ("c", "refused"), ("d", "left"), ("b", "rolled back"), (None, "left")]
    events = [{"model": m, "event": e, "time": "now", "domain": "food", "number": 1} for m, e in names]
    lines = history_tree(events, {"model": "b"}).split("\n")
    assert [line.startswith("*") for line in lines] == [False, True, False, False, True, False]
    depth = [line.find("└") for line in lines]
    assert depth[0] == -1 < depth[1] < depth[2] == depth[3]
    assert depth[4] == depth[1]
    assert "left food" in lines[3]
    assert history_tree([], None) == "nothing yet"


def test_watch_and_track_are_called_with_what_was_said(
    copied: tuple[Done, Path], fanbu: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    done, workspace = copied
    watched: list[Any] = []
    monkeypatch.setattr("fanbu.serve.watch.watch", lambda *arguments: watched.append(arguments))
    assert fanbu("watch", workspace, "--port", 8123, "--open", "--lang", "zh")[0] == 0
    assert fanbu("watch", done.recipe)[0] == 0
    assert watched == [(workspace, 8123, True, "zh"), (done.workspace, 0, False, "en")]
    assert fanbu("watch", workspace, "--port", 99999)[0] == 2
    tracked: list[Any] = []

    def note(*arguments: Any) -> dict[str, Any]:
        tracked.append(arguments)
        return {"uri": "here"}

    monkeypatch.setattr("fanbu.track.track", note)
    code, told = fanbu("track", workspace, "--uri", "sqlite:///x", "--experiment", "e", "--json")
    assert (code, told) == (0, {"uri": "here"})
    code, told = fanbu("run", done.recipe, "--workspace", workspace, "--track", "--json")
    assert (code, told["track"]) == (0, {"uri": "here"})
    assert tracked == [(workspace, "sqlite:///x", "e"), (workspace,)]


# Progress


def live(folder: Path, **changes: Any) -> None:
    value = {"pid": os.getpid(), "round": 2, "rounds": 3, "stages": [{}] * 4, **changes}
    (folder / FILE).write_text(json.dumps(value))


def test_where_a_run_is(tmp_path: Path) -> None:
    assert place(None) == place(tmp_path) == ""
    live(tmp_path)
    assert place(tmp_path) == "round 2/3, stage 5"
    live(tmp_path, pid=1)  # another run's
    assert place(tmp_path) == ""
    (tmp_path / FILE).write_text("{")
    assert place(tmp_path) == ""


def test_lines_where_there_is_no_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    live(tmp_path)
    clock = iter(range(0, 1000, 10))
    monkeypatch.setattr("fanbu.progress.time.monotonic", lambda: float(next(clock)))
    with bar(tmp_path) as show:
        assert isinstance(show, Lines)
        show.log("shrink finetune food")
        for done in range(1, 5):
            show("finetune food", done, 10)
    told = capsys.readouterr().err.split("\n")
    assert told[0].endswith("round 2/3, stage 5: shrink finetune food")
    assert any("finetune food 2/10" in line and "s left" in line for line in told)
    assert "\r" not in "".join(told)


def test_bars_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", terminal)
    live(tmp_path)
    with bar(tmp_path) as show:
        assert isinstance(show, Bar)
        show.log("distill")
        show("distill", 3, 12)
        show.bars.refresh()
        assert [t.description for t in show.bars.tasks] == ["round 2/3, stage 5", "distill"]
        assert show.bars.tasks[0].visible
        assert show.bars.tasks[1].completed == 3
        show("predict", 1, 4)
        assert show.bars.tasks[1].description == "distill: predict"
        assert show.bars.tasks[1].total == 4
    drawn = terminal.getvalue()
    assert "round 2/3, stage 5" in drawn
    assert "3/12" in drawn
