"""Each example runs by itself, and shows what it says."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
TOLD = {
    "own_classifier": ["labels, of them from your classifier: general/complaint, general/praise"],
    "causal": ["numbers", "nats a token"],
    "private_domains": ["multitask with share: internal is refused", "distill with share: private is refused",
                        "average contribution (weights)", "distill contribution (predictions)"],
}  # fmt: skip


def test_every_example_is_tested() -> None:
    assert {p.stem for p in EXAMPLES.glob("[a-z]*.py")} == set(TOLD)


@pytest.mark.parametrize("name", sorted(TOLD))
def test_every_example_says_how_it_is_run(name: str) -> None:
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"Run: python examples/{name}.py" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TOLD))
def test_an_example_runs_in_two_minutes(name: str, tmp_path: Path) -> None:
    started = time.monotonic()
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for told in TOLD[name]:
        assert told in done.stdout, done.stdout
    print(f"{name}: {time.monotonic() - started:.0f} s")
