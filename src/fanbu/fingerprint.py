"""The code that a stage runs, as a hash: a stage whose code changed runs again, nothing else does."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path

_SKIPPED = {"rich", "typer"}  # they draw and parse, and change no result


@cache
def code_digest(module: str) -> str:
    """sha256 over the syntax trees of a module and of all of fanbu that it imports (lazily too), and library versions.

    Comments, docstrings and formatting do not count. A plug-in module counts with all Python files of its folder.
    """
    package = module.partition(".")[0]
    seen: dict[str, str] = {}
    libraries: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        path = _source(name)
        if name in seen or path is None:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        seen[name] = hashlib.sha256(ast.dump(_bare(tree)).encode()).hexdigest()
        for imported in _imports(tree):
            if imported.partition(".")[0] in {"fanbu", package}:
                todo.append(imported)
            else:
                libraries.add(imported.partition(".")[0])
    origin = _source(module)
    if package != "fanbu" and origin is not None:  # a plug-in: relative imports and what else lies beside it
        for path in sorted(origin.parent.rglob("*.py")):
            seen[str(path.relative_to(origin.parent))] = hashlib.sha256(path.read_bytes()).hexdigest()
    own = packages_distributions()
    versions = sorted(f"{d}=={version(d)}" for lib in libraries - _SKIPPED for d in set(own.get(lib, ())))
    state = hashlib.sha256(repr(sorted(seen.items())).encode())
    state.update(repr(versions).encode())
    return state.hexdigest()


@cache
def _source(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # `from package.module import name`: the name is no module
        return None
    return Path(spec.origin) if spec and spec.origin and spec.origin.endswith(".py") else None


def _imports(tree: ast.AST) -> list[str]:
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return names


def _bare(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                node.body = node.body[1:]
    return tree
