"""What the documents show is what the code takes: recipes, commands, Python, links, and the site itself."""

from __future__ import annotations

import contextlib
import csv
import importlib
import itertools
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from markdown.extensions.toc import slugify
from typer.core import TyperGroup

from conftest import make_bert, rows, write_domain
from fanbu.catalogue import method, methods
from fanbu.cli import commands, main
from fanbu.domain import Domain
from fanbu.model import Model, open_model
from fanbu.recipe import Recipe
from fanbu.recipe_parts import Arrival, CompareSpec, DomainSpec, GateSpec, ProbeSpec, PublicTexts, ShareSpec
from fanbu.tensors import Tensors
from fanbu.types import Context, Train

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", ROOT / "README.zh-CN.md"]
PAGES = [*READMES, *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]


# Reading


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}: {self.text[:60]!r}"


def blocks_of(page: Path) -> list[Block]:
    found = re.findall(r"^ *```(\S*)\n(.*?)^ *```$", page.read_text(encoding="utf-8"), re.S | re.M)
    return [Block(page, language, text) for language, text in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def in_language(*names: str) -> list[Block]:
    return [block for block in BLOCKS if block.language in names]


def numbered(blocks: list[Block]) -> list[str]:
    return [f"{block.page.name}-{number}" for number, block in enumerate(blocks)]


def lines_of(block: Block) -> Iterator[list[str]]:
    """The commands of a block as words. In a console block these are the lines after ``$``; the rest is output."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.language == "console" and not line.startswith("$ "):
            continue
        if words := shlex.split(line.removeprefix("$ "), comments=True):
            yield words


COMMANDS = [(block, words) for block in in_language("console", "bash", "sh") for words in lines_of(block)]


def test_every_block_says_what_it_is() -> None:
    assert {block.language for block in BLOCKS} <= {"console", "bash", "yaml", "python", "toml", "text", ""}
    for block in in_language("text", ""):
        assert not re.search(r"^(\$ )?(\S*/)?(fanbu|make|pip) ", block.text, re.M), f"{block}: commands are no text"


# Recipes

YAML = in_language("yaml")
PART = {
    "fanbu": 1, "name": "part", "model": "models/encoder", "feedback": {"method": "distill"},
    "domains": {"bank": {"train": "bank.csv", "test": 0.2}},
}  # fmt: skip


@pytest.mark.parametrize("block", YAML, ids=numbered(YAML))
def test_recipes_in_the_documents_are_recipes(block: Block) -> None:
    """Whole ones, and parts of one when the rest is added."""
    value = yaml.safe_load(block.text)
    recipe = Recipe.model_validate(value if "fanbu" in value else {**PART, **value})
    for step in recipe.shrink:
        method(step.method, "shrink").check(step.arguments)
    for step in [*recipe.ways, *recipe.compare.ways]:
        method(step.method, "feedback").check(step.arguments)


def test_the_table_of_methods_names_all_their_parameters() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    rows = re.findall(r"^\| (`[^|]*`) \| (shrink|feedback)[^|]*\| ([^|]*)\|", text, re.MULTILINE)
    told = {(name, kind): {*re.findall(r"`(\w+)`", said)} for names, kind, said in rows
            for name in re.findall(r"`(\w+)`", names)}  # fmt: skip
    assert len(told) > 25
    for (name, kind), said in told.items():
        assert said == {*method(name, kind).parameters()}, name


def test_the_recipes_that_ship_are_recipes() -> None:
    found = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "recipes").glob("*.yaml")}
    assert {"demo", "industries"} <= set(found)
    for name, value in found.items():
        assert Recipe.model_validate(value).name == name


def test_every_key_and_every_method_is_documented() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    parts = (Recipe, DomainSpec, Arrival, ProbeSpec, PublicTexts, ShareSpec, GateSpec, CompareSpec)
    for name in [*(f for m in parts for f in m.model_fields), *Train.__dataclass_fields__]:
        assert f"`{name}`" in text, name
    pages = "".join((ROOT / "docs" / page).read_text() for page in ("choosing.md", "merging.md"))
    for name in {m.name for m in methods()}:
        assert f"`{name}`" in pages, name


# Commands


@cache
def command_line() -> click.Command:
    return commands()


def parsed(words: list[str]) -> click.Context:
    """The context of the last command that the words name: every argument and option has been parsed."""
    command = command_line()
    context = command.make_context("fanbu", list(words))
    while isinstance(command, TyperGroup) and (rest := [*context._protected_args, *context.args]):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None
        command, context = found, found.make_context(name, rest, parent=context)
    return context


def check_fanbu(words: list[str]) -> None:
    with contextlib.suppress(click.exceptions.Exit):  # --help and --version end at once
        parsed(words)


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert set(words) <= set(targets)


def check_pip(words: list[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert words[0] == "install"
    for asked in re.findall(r"\[([^\]]+)\]", " ".join(words)):
        assert set(asked.split(",")) <= set(extras), asked
    for given, following in itertools.pairwise(words):
        assert given != "-c" or (ROOT / following).is_file()


def check_python(words: list[str]) -> None:
    if words[0] == "-m":
        assert words[1] in {"venv", "pytest"} or importlib.util.find_spec(words[1])
    else:
        assert (ROOT / words[0]).is_file(), words[0]


KNOWN: dict[str, Callable[[list[str]], None]] = {
    "fanbu": check_fanbu, "make": check_make, "pip": check_pip, "python": check_python, "python3": check_python,
    "source": lambda words: None, "pre-commit": lambda words: None, "mlflow": lambda words: None,
}  # fmt: skip


@pytest.mark.parametrize(("block", "words"), COMMANDS, ids=[f"{b.page.name}: {' '.join(w)[:60]}" for b, w in COMMANDS])
def test_commands_in_the_documents_are_commands(block: Block, words: list[str]) -> None:
    """Every line is checked by what it calls; a program that nobody checks is not shown."""
    KNOWN[Path(words[0]).name](words[1:])


@pytest.mark.parametrize(
    "line",
    ["ran recipe.yaml", "run", "run recipe.yaml more", "run recipe.yaml --nonsense 3", "run r.yaml --rounds three",
     "methods shew distill", "leave runs/mine", "feed base out --specialists a=b"],
)  # fmt: skip
def test_a_wrong_command_would_be_seen(line: str) -> None:
    with pytest.raises(click.UsageError):
        check_fanbu(line.split())


def tree() -> dict[str, click.Command]:
    """All commands by their full names; groups are none."""

    def below(name: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
        else:
            for part, one in inner.items():
                yield from below(f"{name} {part}".strip(), one)

    return dict(below("", command_line()))


def test_every_command_and_every_option_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text()
    common, *sections = re.split(r"^## ", text, flags=re.M)
    for name, command in tree().items():
        section = next((s for s in sections if f"\n### fanbu {name}\n" in s), None)
        assert section, f"docs/cli.md has no section for fanbu {name}"
        options = {o for p in command.params if isinstance(p, click.Option) for o in p.opts if o.startswith("--")}
        missing = {o for o in options if f"`{o}`" not in section and f"`{o}`" not in common}
        assert not missing, f"fanbu {name}: {missing}"
    told = set(re.findall(r"^### fanbu (.+)$", text, re.M))
    assert told == set(tree())


def test_commands_in_running_text_exist() -> None:
    """Inline code such as `fanbu methods show NAME`: the command is there and takes the options."""
    known, root = tree(), {"--help", "--version", "--install-completion", "--show-completion"}
    for page in PAGES:
        for line in re.findall(r"`fanbu ([^`]+)`", page.read_text()):
            words = line.split()
            names = [n for n in (" ".join(words[:2]), words[0]) if n in known]
            options = {w.partition("=")[0] for w in words if w.startswith("--")}
            if words[0] == "methods" and len(words) == 1:
                continue
            if not names:
                assert words[0].isupper() or options, f"{page.name}: fanbu {line}"
                assert options <= root, f"{page.name}: fanbu {line}"
                continue
            has = {o for p in known[names[0]].params for o in p.opts} | {"--help"}
            assert options <= has, f"{page.name}: fanbu {line}"


# Python

# design.md shows signatures only
PYTHON = [block for block in in_language("python") if block.page.name != "design.md"]


@pytest.mark.parametrize("block", PYTHON, ids=numbered(PYTHON))
def test_python_in_the_documents_compiles_and_its_names_exist(block: Block) -> None:
    compile(block.text, str(block.page), "exec")
    for module, names in re.findall(r"^from (fanbu[\w.]*) import (.+)$", block.text, re.M):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


def python_blocks(page: str) -> list[str]:
    return [block.text for block in PYTHON if block.page.name == page]


def test_the_plug_in_of_the_page_is_a_method(
    incumbent: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Installed as the page says (by an entry point), it trains biases and the head, and nothing else."""
    way_down, way_back = python_blocks("add-a-method.md")
    (tmp_path / "biases.py").write_text(way_down)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    point = importlib.metadata.EntryPoint("biases", "biases", "fanbu.methods")
    monkeypatch.setattr("fanbu.catalogue.entry_points", lambda group: [point])
    monkeypatch.setattr("fanbu.catalogue.methods", methods.__wrapped__)  # anew, past the cache
    way = method("biases", "shrink")
    assert way.summary.startswith("Fine-tuning of biases only")
    domain = domains["food"]
    train = {"epochs": 1, "lr": 1e-2, "batch_size": 8}
    made = way.shrink(incumbent, domain, tmp_path / "made", context, train=train)
    old, new = Tensors(incumbent.path), Tensors(made.path)
    body = {name for name in old if not name.startswith("classifier")}
    changed = {name for name in body if not (old[name] == new[name]).all()}
    assert changed
    assert all(name.endswith("bias") for name in changed)
    assert made.manifest["method"] == "biases"
    sketch: dict[str, Any] = {}
    exec(way_back, sketch)
    assert {"NEEDS", "LINEAR", "SENSITIVITY", "NEUTRAL", "contribute", "absorb"} <= set(sketch)


# The pages that are walked through


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str]], int]:
    """``fanbu ...`` in this process: its exit code."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("fanbu.recipe.os.sched_getaffinity", lambda _: {0}, raising=False)  # one thread

    def run(words: list[str]) -> int:
        monkeypatch.setattr(sys, "argv", ["fanbu", *words])
        with pytest.raises(SystemExit) as end:
            main()
        told = capsys.readouterr()
        assert end.value.code in {None, 0, 3}, f"{words}: {told.err[-2000:]}"
        return int(end.value.code or 0)

    return run


def write_csv(path: Path, topic: str, count: int, seed: int) -> None:
    """Rows whose label shows in their words, under names of the file's own."""
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "intent"])
        writer.writerows([row["text"], row["label"]] for row in rows(topic, count, seed))


AREAS = {"banking": "food", "curekart": "rail", "headlines": "food", "legal": "rail"}


@pytest.mark.slow
def test_a_newcomers_page_can_be_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[list[str]], int]
) -> None:
    """Every `fanbu` line of start.md, in its order, on four small CSV files; then what the model is used for."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for seed, (name, topic) in enumerate(AREAS.items()):
        write_csv(tmp_path / "data" / f"{name}.csv", topic, 144, seed)
    tiny = make_bert(tmp_path / "encoder", hidden=16)
    monkeypatch.setattr("fanbu.init.default_model", lambda: str(tiny))
    monkeypatch.setattr(
        "fanbu.init.write.training", lambda rows, size: {"epochs": 3, "batch_size": 8, "lr": 5e-3, "head_lr": 1e-2}
    )
    page = ROOT / "docs" / "start.md"
    walked = [words[1:] for block, words in COMMANDS if block.page == page and words[0] == "fanbu"]
    assert [w[0] for w in walked] == [
        "--version", "init", "doctor", "run", "run", "report", "history", "export", "run",
    ]  # fmt: skip
    codes = [call(words) for words in walked]
    assert set(codes[:-1]) == {0}
    assert (tmp_path / "recipe.yaml").read_text().startswith("# Written by `fanbu init`")
    (code,) = python_blocks("start.md")
    scope: dict[str, Any] = {}
    exec(code, scope)
    (answer,) = scope["classify"]("please late platform today")
    assert answer["label"].partition("/")[0] in AREAS
    runs = [p for p in (tmp_path / "runs").iterdir() if p.is_dir()]
    assert [len(list((run / "rounds").iterdir())) for run in runs] == [2]
    assert (runs[0] / "report.html").is_file()


def test_the_python_page_can_be_walked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[list[str]], int]
) -> None:
    """Its blocks, in their order: a whole round, then its steps one by one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bank").mkdir()
    write_domain(tmp_path / "bank", "food", 90)
    (tmp_path / "bank" / "food.train.jsonl").rename(tmp_path / "bank" / "train.jsonl")
    short = {"epochs": 1, "batch_size": 8}
    recipe = {
        **PART, "model": str(make_bert(tmp_path / "encoder", hidden=16)), "threads": 1, "max_length": 32,
        "domains": {"bank": {"train": "bank/train.jsonl", "test": 0.2}},
        "shrink": [{"method": "finetune", "train": short}], "feedback": {"method": "average"},
    }  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    whole, steps, together = python_blocks("api.md")
    done: dict[str, Any] = {}
    exec(whole, done)
    incumbent = open_model(done["record"]["incumbent"]["path"])
    (tmp_path / "models").mkdir()
    shutil.copytree(incumbent.path, tmp_path / "models" / "classifier")
    made: dict[str, Any] = {}
    exec(steps, made)
    assert made["verdict"]["domains"].keys() == {"bank"}
    assert made["candidate"].digest != incumbent.digest
    exec(together, made)
    assert len(made["answers"]) == len(made["bank"].test)


# Links, and the site


def anchors(page: Path) -> set[str]:
    prose = re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.S | re.M)
    return {slugify(re.sub(r"[`*]", "", h), "-") for h in re.findall(r"^#{1,6} (.+)$", prose, re.M)}


def test_links_between_documents_lead_somewhere() -> None:
    for page in PAGES:
        links = re.findall(r"\]\(([^)]+)\)", page.read_text()) + re.findall(r'(?:src|href)="([^"]+)"', page.read_text())
        for link in links:
            target, _, anchor = link.partition("#")
            if "://" in target:
                continue
            found = page.parent / target if target else page
            assert found.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(found), f"{page.name}: {link}"


def test_the_site_builds_without_a_warning_and_asks_nobody(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    pages = {p.stem: p.read_text() for p in (tmp_path / "site").glob("*.html")}
    assert set(pages) >= {p.stem for p in (ROOT / "docs").glob("*.md")}
    for name, page in pages.items():
        loaded = re.findall(r'<(?:script|link|img|iframe|source)[^>]*(?:src|href)="?(https?:)?//', page)
        assert not loaded, f"{name}.html loads from elsewhere"
    for name in ("shrink", "contribute", "absorb", "judge", "load_domain", "open_model"):
        assert re.search(rf'id="fanbu\.[\w.]*{name}"', pages["api"]), f"api: {name}"
    for code in ("not-shared", "unknown-key"):
        assert f'id="{code}"' in pages["errors"]  # where an error's message sends its reader


# The two front pages


def test_both_front_pages_show_the_same() -> None:
    english, chinese = READMES

    def shape(page: Path) -> list[int]:
        prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M)
        return [len(marks) for marks in re.findall(r"^(#+) ", prose, re.M)]

    def code(page: Path) -> list[tuple[str, str]]:
        """Comments and pictures are in the page's own language."""
        return [
            (b.language, re.sub(r" *#.*", "", b.text)) for b in blocks_of(page) if b.language != "text"
        ]  # fmt: skip

    def numbers(page: Path) -> list[list[str]]:
        table = [line for line in page.read_text().splitlines() if line.startswith("|")]
        return [re.findall(r"\d+(?:\.\d+)?", row) for row in table]

    assert shape(english) == shape(chinese)
    assert code(english) == code(chinese)
    assert numbers(english) == numbers(chinese)
    for page, other in ((english, chinese), (chinese, english)):
        assert f"]({other.name})" in page.read_text()


def test_the_front_page_keeps_its_two_commands_and_a_small_picture() -> None:
    for page in READMES:
        first = next(words for block, words in COMMANDS if block.page == page)
        assert first == ["make", "demo"]
        assert re.search(r"docs/img/report\.png", page.read_text())
    assert (ROOT / "docs" / "img" / "report.png").stat().st_size <= 300_000
