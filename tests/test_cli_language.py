"""Chinese labels: every help text has one, none is there for nothing, and the language is found wherever it stands."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from fanbu.cli import commands
from fanbu.cli.language import PANELS, every, language, parameters
from fanbu.doctor.machine import EXTRAS
from fanbu.doctor.text import SPLITS
from fanbu.lang import table
from fanbu.report.text import aligned, summary, width
from test_cli import Command, error_of
from test_cli import fanbu as fanbu

ROOT = Path(__file__).parents[1] / "src" / "fanbu"
SPOKEN = [
    *(ROOT / room / "*.py" for room in ("cli", "init", "doctor")),
    *(ROOT / "report" / name for name in ("text.py", "candidates.py")),
]
# words that reach the translator from a record or a domain
FROM_VALUES = {
    "started", "promoted", "refused", "rolled back", "left", "feeds", "guard", "texts", "labels", "neither",
    "incumbent (champion)", "incumbent (probed base)", "specialists, oracle router", "TF-IDF regression",
    "uniform average of weights", "joint training on all rows", "new",
}  # fmt: skip


@pytest.fixture
def english(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["fanbu"])
    monkeypatch.delenv("FANBU_LANG", raising=False)


def helps() -> Iterator[tuple[str, str]]:
    """(where, text) of every help text."""
    for command in every(commands()):
        yield str(command.name), str(command.help or "")
        for parameter in parameters(command):
            yield f"{command.name} {parameter.name}", str(getattr(parameter, "help", "") or "")


def spoken() -> set[str]:
    """The texts that the code gives to a translator ``t``."""
    found = set()
    for pattern in SPOKEN:
        for path in pattern.parent.glob(pattern.name):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                called = node.func if isinstance(node, ast.Call) else None
                name = getattr(called, "id", None)
                words = isinstance(called, ast.Call) and getattr(called.func, "attr", "") == "words"
                if isinstance(node, ast.Call) and (name == "t" or words) and isinstance(node.args[0], ast.Constant):
                    found.add(str(node.args[0].value))
    return found


def test_every_command_and_option_has_a_help_text_in_both_languages(english: None) -> None:
    known = table("cli", "zh")
    for where, text in helps():
        assert text, f"{where} has no help text"
        assert text in known, f"{where}: no Chinese for {text!r}"
    assert spoken() <= set(known)
    assert len(spoken()) > 50


def test_no_translation_is_there_for_nothing(english: None) -> None:
    used = {text for _, text in helps()} | spoken() | set(PANELS.values()) | set(EXTRAS.values()) | set(SPLITS)
    assert set(table("cli", "zh")) == used | FROM_VALUES
    assert all(any(c > "\u2e80" for c in text) for text in table("cli", "zh").values())


def test_the_language_is_found_wherever_it_stands() -> None:
    assert language([], {}) == "en"
    assert language([], {"FANBU_LANG": "zh"}) == "zh"
    assert language(["run", "x.yaml", "--lang", "zh"], {}) == "zh"
    assert language(["--lang=zh_CN", "run"], {}) == "zh"
    assert language(["run", "--lang", "en"], {"FANBU_LANG": "zh"}) == "en"
    assert language(["run", "--", "--lang", "zh"], {}) == "en"


def test_help_in_chinese_and_back(fanbu: Command) -> None:
    for line in ("--lang zh --help", "run --help --lang zh", "methods --lang=zh --help"):
        code, text = fanbu(*line.split())
        assert code == 0
        assert "选项" in text
    assert "Options" in fanbu("run", "--help")[1]
    assert "运行各轮" not in fanbu("run", "--help")[1]
    error_of(fanbu("history", "x", "--lang", "fr", "--json"), 2, "unknown-language")


def test_tables_in_chinese_stand_in_columns(fanbu: Command) -> None:
    assert aligned([["领域", "新"], ["food", "0.5"]]) == ["领域   新", "food  0.5"]
    assert width("领域a") == 5
    verdict = {"accepted": True, "reason": "why", "gain_kept": None}
    values = {"food": {"told": 0.5, "untold": None}}
    record = {
        "round": 2, "verdict": verdict, "warnings": [], "table": [{"name": "new: distill", "domains": values}],
        "domains": {"food": {"crossed": [{"bytes": 2e6}]}},
    }  # fmt: skip
    known = table("cli", "zh")
    shown = summary(record, lambda text: known.get(text, text))
    assert "轮次 2: 已晋升: why" in shown
    assert "新: distill" in shown
    assert "2.00 MB" in shown
