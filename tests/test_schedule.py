"""Rounds on a schedule: a round when rows are new, nothing when they are not, and no end by what may be better soon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from conftest import tiny_recipe
from fanbu.cli import app, timer
from fanbu.errors import RetryError, UsageError


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1.5h", 5400), ("2d", 172800)])
def test_spans_are_numbers_with_a_unit(text: str, seconds: float) -> None:
    assert timer.span(text) == seconds


@pytest.mark.parametrize("text", ["", "6", "h", "0m", "-1h", "6 weeks", "1e9h"])
def test_other_spans_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--every"):
        timer.span(text)


class Enough(Exception):
    """As Ctrl-C."""


def test_what_may_be_better_soon_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    tries = iter([RetryError("too-few-owners", "too few owners", remedy="wait"), None, Enough()])

    def once() -> None:
        error = next(tries)
        if error:
            raise error

    monkeypatch.setattr(timer.time, "sleep", lambda seconds: None)
    with pytest.raises(Enough):
        timer.again_and_again("0.05s", once, told.append)
    assert "too few owners" in told[0]
    assert [t.startswith("next look at") for t in told] == [False, True, True]
    with pytest.raises(UsageError):
        timer.again_and_again("1h", lambda: timer.span("no"), told.append)


def test_rows_that_arrive_make_a_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {**tiny_recipe(tmp_path), "references": []}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    train = Path(value["domains"]["food"]["train"])
    looks: list[int] = []
    monkeypatch.setattr(timer.time, "sleep", lambda seconds: None)

    def log(text: str) -> None:
        if text.startswith("next look"):
            looks.append(len((Path(value["workspace"]) / "history.jsonl").read_text().splitlines()))
            if len(looks) == 2:  # at first nothing is new, then there is one more row
                first = json.loads(train.read_text().splitlines()[0])
                train.write_text(train.read_text() + json.dumps({**first, "id": "new", "text": "one more row"}) + "\n")
            if len(looks) == 3:
                raise Enough

    monkeypatch.setattr("fanbu.progress.log", log)
    result: Any = CliRunner().invoke(app, ["run", str(path), "--every", "0.01s", "--json"])
    assert isinstance(result.exception, Enough)
    assert looks[0] == looks[1] < looks[2]
    said = [json.loads(line)["round"] for line in result.stdout.splitlines() if line.startswith("{")]
    assert said == [1, 2]
