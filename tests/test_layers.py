"""A module imports only from rooms above its own; strangers stay strangers; files and functions stay small."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1] / "src" / "fanbu"
LAYERS = [
    {"errors", "types", "lang", "machine", "chance"},
    {"files", "tensors", "readers", "model_card", "model"},
    {"data"},
    {"domain", "contribution", "boundary"},
    {"fingerprint", "ledger"},
    {"heads", "losses", "metrics", "batches"},
    {"train", "objectives", "predict", "probing", "private"},
    {"deploy"},
    {"merging", "tables"},
    {"shrink"},
    {"feedback"},
    {"judge"},
    {"catalogue"},
    {"recipe", "recipe_parts", "recipe_text", "effort", "plan", "tree"},
    {"transport"},
    {
        "live",
        "record",
        "turn",
        "probe_set",
        "likeness",
        "hierarchy",
        "feeding",
        "secure",
        "round",
        "generations",
        "owner",
    },
    {"search"},
    {"serve", "report", "track", "progress"},
    {"api", "committee", "from_mergekit", "init", "doctor", "export", "cli", "__main__"},
]
# shrink, feedback and judge know nothing of each other, and neither do the families of feedback
STRANGERS = ({"shrink"}, {"feedback"}, {"judge"})


def modules() -> dict[str, Path]:
    return {
        ".".join(("fanbu", *p.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): p
        for p in ROOT.rglob("*.py")
    }


def imported(path: Path, *, lazily: bool = True) -> set[str]:
    """Names of fanbu's modules that a file imports; those under TYPE_CHECKING do not count."""
    known = modules()
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree) if lazily else tree.body:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fanbu"):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{a.name}" for a in node.names}
            found |= {n if n in known else node.module for n in names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name in known}
    return found - {"fanbu"}


def room(module: str) -> str:
    return module.split(".")[1]


def layer(module: str) -> int:
    return next(i for i, rooms in enumerate(LAYERS) if room(module) in rooms)


def test_every_module_has_a_layer() -> None:
    for module in modules():
        if module != "fanbu":
            assert any(room(module) in rooms for rooms in LAYERS), f"{module} is in no layer"


def test_imports_point_upwards() -> None:
    for module, path in modules().items():
        if module == "fanbu":
            continue
        for other in imported(path):
            assert layer(other) <= layer(module), f"{module} imports {other}, which lies below it"


def test_strangers_stay_strangers() -> None:
    for module, path in modules().items():
        if module == "fanbu":
            continue
        for other in imported(path):
            for rooms in STRANGERS:
                if room(module) in set().union(*STRANGERS) and room(other) in rooms:
                    assert room(module) in rooms, f"{module} imports {other}"
            if module.startswith("fanbu.feedback.") and other.startswith("fanbu.feedback."):
                assert module.split(".")[2] == other.split(".")[2], f"{module} imports {other}"


def test_no_import_cycle() -> None:
    graph = {m: imported(p) for m, p in modules().items() if m != "fanbu"}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' > '.join((*path, module))}"
        if module not in done:
            for other in graph.get(module, ()):
                visit(other, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_files_and_functions_stay_small() -> None:
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        assert text.count("\n") <= 500, f"{path} has over 500 lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno + 1 <= 80, f"{path}: {node.name} has over 80 lines"
