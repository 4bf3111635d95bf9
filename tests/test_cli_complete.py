"""Shell completion: scripts for three shells, and what they offer."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fanbu.catalogue import methods

FANBU = [sys.executable, "-m", "fanbu"]


def offered(shell: str, line: str) -> str:
    """What a shell is told when TAB is pressed at the end of a line."""
    words = line.split(" ")
    environment = {**os.environ, "_FANBU_COMPLETE": f"complete_{shell}"}
    if shell == "bash":
        environment |= {"COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
    else:
        environment |= {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    done = subprocess.run(FANBU, env=environment, capture_output=True, text=True, check=False)
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_method_names_are_offered(shell: str) -> None:
    shown = offered(shell, "fanbu methods show ")
    assert all(m.name in shown for m in methods())
    assert "distill" in offered(shell, "fanbu methods show di")
    assert "average" not in offered(shell, "fanbu methods show di")


@pytest.mark.parametrize(
    ("line", "there", "absent"),
    [
        ("fanbu ex", "export", "report"),
        ("fanbu init --share ", "internal", "recipe"),
        ("fanbu run --device ", "cuda", "internal"),
        ("fanbu run --lang ", "zh", "cuda"),
        ("fanbu shrink --method ", "finetune", "average"),
        ("fanbu feed --method ", "distill", "finetune"),
        ("fanbu run --dr", "--dry-run", "--seed"),
    ],
)
def test_what_is_offered(line: str, there: str, absent: str) -> None:
    shown = offered("bash", line)
    assert there in shown
    assert absent not in shown


def test_it_is_quick() -> None:
    times = []
    for _ in range(3):
        started = time.monotonic()
        offered("bash", "fanbu methods show ")
        times.append(time.monotonic() - started)
    assert min(times) < 1.5


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete -o"), ("zsh", "#compdef fanbu"), ("fish", "complete ")])
def test_the_scripts(shell: str, word: str) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [*FANBU, "--show-completion", shell]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert word in done.stdout
    assert "_FANBU_COMPLETE" in done.stdout


def test_it_installs(tmp_path: Path) -> None:
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    command = [*FANBU, "--install-completion", "bash"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "installed" in done.stdout
    found = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert any("_FANBU_COMPLETE" in p.read_text() for p in found)
