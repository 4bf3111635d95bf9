"""The public list, and what imports cost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import fanbu

ROOT = Path(__file__).parents[1]


def test_the_public_list_is_short_and_whole() -> None:
    assert fanbu.__all__ == [
        "Context", "FanbuError", "Train", "absorb", "contribute", "judge", "load_domain", "merge", "only", "open_model",
        "run", "shrink", "unmerge",
    ]  # fmt: skip
    for name in fanbu.__all__:
        assert getattr(fanbu, name).__doc__


def test_the_public_functions_stay_functions_whatever_is_imported() -> None:
    code = (
        "import fanbu, fanbu.judge.gate, fanbu.shrink.finetune\n"
        "from fanbu.judge.gate import Gate\n"
        "assert all(callable(getattr(fanbu, name)) for name in fanbu.__all__)\n"
        "assert fanbu.shrink is fanbu.api.shrink and fanbu.judge is fanbu.api.judge"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_says_what_there_is() -> None:
    with pytest.raises(AttributeError, match="open_model"):
        fanbu.nonsense  # noqa: B018


def test_importing_and_listing_load_no_torch() -> None:
    code = (
        "import sys, fanbu, fanbu.cli\n"
        "from fanbu.catalogue import methods\n"
        "[m.summary for m in methods()]\n"
        "assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_pickle_and_no_foreign_code() -> None:
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text()
        for word in ("import pickle", "torch.load(", "trust_remote_code=True", "eval(", "exec("):
            assert word not in text.replace(".eval(", "").replace("network.eval()", ""), f"{path}: {word}"
