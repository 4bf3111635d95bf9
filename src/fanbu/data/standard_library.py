"""Real text that is on every machine: the bodies of the functions of Python's own standard library.

A row is one function's body without its ``def`` line and docstring; its label is the top-level module that it
belongs to; the names of the area's modules are masked. Which functions there are depends on the Python version.
"""

from __future__ import annotations

import ast
import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

from fanbu.data.load import RawRow
from fanbu.errors import UsageError

AREAS: dict[str, tuple[str, ...]] = {
    "internet": (
        "email", "http", "urllib", "xmlrpc", "ftplib", "smtplib", "imaplib", "poplib", "nntplib", "socketserver",
        "ssl", "wsgiref", "html", "xml", "mailbox", "ipaddress", "asyncio", "webbrowser",
    ),
    "system": (
        "subprocess", "multiprocessing", "threading", "shutil", "pathlib", "tarfile", "zipfile", "logging",
        "concurrent", "selectors", "tempfile", "ctypes", "os", "posixpath", "ntpath", "curses", "argparse", "optparse",
        "gzip", "bz2", "lzma", "platform", "sched", "queue", "importlib", "zoneinfo", "locale", "gettext",
    ),
    "developer": (
        "unittest", "pdb", "doctest", "trace", "ast", "inspect", "dis", "lib2to3", "distutils", "pydoc", "idlelib",
        "cProfile", "profile", "pstats", "bdb", "traceback", "tokenize", "pickletools", "code", "venv", "ensurepip",
    ),
    "numbers": (
        "decimal", "_pydecimal", "fractions", "statistics", "random", "datetime", "_pydatetime", "calendar",
        "collections", "heapq", "functools", "typing", "dataclasses", "enum", "difflib", "json", "csv", "string",
    ),
}  # fmt: skip
_MIN_ROWS, _MIN_CHARACTERS = 20, 60


@cache
def function_bodies(area: str) -> tuple[RawRow, ...]:
    """The rows of one area of AREAS, without exact duplicates, labels with fewer than 20 rows left out."""
    if area not in AREAS:
        raise UsageError(
            "unknown-area",
            f"no area {area!r} of the standard library",
            allowed=sorted(AREAS),
            remedy="take one of these",
        )
    mask = re.compile(r"\b(" + "|".join(AREAS[area]) + r")\b")
    rows: dict[str, RawRow] = {}
    for module in AREAS[area]:
        for path in _sources(module):
            for number, body in enumerate(_bodies(path)):
                text = mask.sub("module", body)
                if len(text) >= _MIN_CHARACTERS:
                    rows.setdefault(text, RawRow(f"{module}/{path.stem}/{len(rows)}-{number}", text, module))
    counts = Counter(row.label for row in rows.values())
    return tuple(row for row in rows.values() if counts[row.label] >= _MIN_ROWS)


def _sources(module: str) -> list[Path]:
    root = Path(sysconfig.get_paths()["stdlib"])
    if (root / f"{module}.py").is_file():
        return [root / f"{module}.py"]
    found = sorted((root / module).rglob("*.py")) if (root / module).is_dir() else []
    return [p for p in found if not {"test", "tests", "idle_test", "__pycache__"} & set(p.parts)]


def _bodies(path: Path) -> list[str]:
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (SyntaxError, UnicodeDecodeError):
        return []  # test fixtures with broken syntax on purpose
    lines = source.split("\n")
    texts = []
    for node in _functions(tree):
        first = 1 if ast.get_docstring(node, clean=False) is not None else 0
        if len(node.body) > first:
            body = lines[node.body[first].lineno - 1 : node.end_lineno]
            texts.append(" ".join(" ".join(body).split()))
    return texts


def _functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods; not the ones inside functions, whose text is part of the outer one's already."""
    found: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.append(node)
        else:
            found += _functions(node)
    return found
