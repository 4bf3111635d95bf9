"""Benchmarks take hours, so tests do not run them; but what they call is there, and takes what they give it."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest

FOLDERS = [Path(__file__).parents[1] / name for name in ("benchmarks", "examples")]
SCRIPTS = sorted(p for folder in FOLDERS for p in folder.glob("*.py"))


def imported(tree: ast.Module) -> dict[str, Any]:
    """What a script takes from fanbu, by the name that it uses. Fails where something is not there."""
    found: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fanbu":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                if not hasattr(module, alias.name):
                    importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


@pytest.mark.parametrize("path", SCRIPTS, ids=[p.stem for p in SCRIPTS])
def test_what_a_script_calls_takes_what_it_gives(path: Path) -> None:
    tree = ast.parse(path.read_text())
    known = {name: what for name, what in imported(tree).items() if inspect.isroutine(what) or inspect.isclass(what)}
    stored = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    for node in ast.walk(tree):
        if not (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in known.keys() - stored
        ):
            continue
        if any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords):
            continue
        try:
            signature = inspect.signature(known[node.func.id])
        except ValueError:
            continue
        try:
            signature.bind(*node.args, **{str(k.arg): k.value for k in node.keywords})
        except TypeError as error:
            pytest.fail(f"{path.name}:{node.lineno}: {node.func.id}: {error}")
