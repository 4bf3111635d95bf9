"""Every error has a code that means one thing, a remedy, and an entry in docs/errors.md."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from fanbu import errors

ROOT = Path(__file__).parents[1]
CLASSES = {n for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, errors.FanbuError)}
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Raised:
    """One place that makes an error."""

    place: str
    kind: str
    code: str
    remedy: ast.expr | None


def called(call: ast.Call) -> str:
    """The last name of what is called: ``f`` for ``f(...)`` and ``a.f(...)``."""
    return call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")


def argument(call: ast.Call, name: str, position: int) -> ast.expr | None:
    """What a call gives for a parameter, by name or by position."""
    named = next((k.value for k in call.keywords if k.arg == name), None)
    return named if named is not None else call.args[position] if position < len(call.args) else None


def literals(value: ast.expr | None) -> list[str]:
    """The texts that an expression can be: a literal, or one of two."""
    if isinstance(value, ast.IfExp):
        return [*literals(value.body), *literals(value.orelse)]
    return [value.value] if isinstance(value, ast.Constant) and isinstance(value.value, str) else []


def errors_in(trees: dict[str, ast.Module]) -> Iterator[Raised]:
    """All errors that the sources make; a helper that takes the code as a parameter is followed to its callers."""
    calls = [(name, n) for name, tree in trees.items() for n in ast.walk(tree) if isinstance(n, ast.Call)]
    for name, tree in trees.items():
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
            if called(call) not in CLASSES:
                continue
            first = argument(call, "code", 0)
            codes = [(f"{name}:{call.lineno}", code) for code in literals(first)]
            if isinstance(first, ast.Name):
                own = [f for f in functions if f.lineno <= call.lineno <= (f.end_lineno or 0)]
                helper = max(own, key=lambda f: f.lineno)
                place = [a.arg for a in (*helper.args.posonlyargs, *helper.args.args)].index(first.id)
                codes = [
                    (f"{other}:{c.lineno}", code)
                    for other, c in calls
                    if called(c) == helper.name
                    for code in literals(argument(c, first.id, place))
                ]
            assert codes, f"{name}:{call.lineno}: the code must be a literal here or at the callers of its function"
            for where, code in codes:
                yield Raised(where, called(call), code, argument(call, "remedy", len(call.args)))


def sources() -> dict[str, ast.Module]:
    root = ROOT / "src"
    return {str(p.relative_to(root)): ast.parse(p.read_text(encoding="utf-8")) for p in sorted(root.rglob("*.py"))}


FOUND = list(errors_in(sources()))


def exit_codes() -> dict[str, int]:
    """The exit code that the page gives each error: that of the group it stands in."""
    found: dict[str, int] = {}
    for group in re.split(r"^## ", PAGE, flags=re.M)[1:]:
        headings = re.findall(r"^### `([^`]+)`", group, flags=re.M)
        told = re.search(r"[Ee]xit code (\d+)", group)
        assert told or not headings, f"the group {group.splitlines()[0]!r} names no exit code"
        exceptions = dict(re.findall(r"^### `([^`]+)`\n[^#]*?\(exit code (\d+)\)", group, flags=re.M | re.S))
        for code in headings:
            assert code not in found, f"{code} is there twice"
            assert told
            found[code] = int(exceptions.get(code) or told[1])
    return found


def test_every_code_is_on_the_page_and_nothing_else() -> None:
    raised, told = {e.code for e in FOUND}, set(exit_codes())
    missing = {e.code: e.place for e in FOUND if e.code not in told}
    assert not missing, f"no entry in docs/errors.md: {missing}"
    assert not told - raised, f"docs/errors.md has codes that nothing raises: {sorted(told - raised)}"


def test_the_page_names_the_exit_code() -> None:
    told = exit_codes()
    for error in FOUND:
        assert told.get(error.code, -1) == getattr(errors, error.kind).exit_code, f"{error.code} ({error.kind})"


def test_an_entry_says_something() -> None:
    for code, text in re.findall(r"^### `([^`]+)`\n+(.*?)(?=^#|\Z)", PAGE, flags=re.M | re.S):
        assert len(text.split()) >= 12, f"{code}: too short to help"


def test_a_code_is_kebab_case_and_belongs_to_one_class() -> None:
    kinds: dict[str, dict[str, str]] = defaultdict(dict)
    for error in FOUND:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", error.code), f"{error.place}: {error.code}"
        kinds[error.code][error.kind] = error.place
    assert not {code: by for code, by in kinds.items() if len(by) > 1}


def test_every_error_has_a_remedy() -> None:
    for error in FOUND:
        assert error.remedy is not None, f"{error.place}: {error.code} has no remedy"
        if isinstance(error.remedy, ast.Constant):
            assert isinstance(error.remedy.value, str), error.place
            assert len(error.remedy.value) >= 4, f"{error.place}: {error.code} has no remedy worth the name"


@pytest.mark.parametrize(
    ("source", "codes"),
    [
        ("UsageError('a-b', 'what', remedy='do it')", {"a-b"}),
        ("def f(x, code):\n    raise DataError(code, x, remedy='do it')\nf(1, 'b')\nf(2, code='c')", {"b", "c"}),
        ("ValueError('not-ours')", set()),
    ],
)  # fmt: skip
def test_the_search_finds_codes_behind_helpers(source: str, codes: set[str]) -> None:
    assert {e.code for e in errors_in({"a.py": ast.parse(source)})} == codes


def test_the_search_stops_at_a_code_that_it_cannot_read() -> None:
    with pytest.raises(AssertionError, match="must be a literal"):
        list(errors_in({"a.py": ast.parse("UsageError(f'{x}', 'what', remedy='do it')")}))
