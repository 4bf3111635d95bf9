"""``fanbu init``: what it makes of files, what it asks, and that its recipe runs."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import TOPICS, rows
from fanbu.errors import FanbuError
from fanbu.init import Options, write_recipe
from fanbu.init.columns import describe, guess
from fanbu.init.files import find, legal
from fanbu.init.write import margin, training
from fanbu.recipe import load_domains, load_recipe
from test_cli import Command, error_of
from test_cli import fanbu as fanbu

Rows = list[dict[str, Any]]


def save(path: Path, values: Rows) -> Path:
    """Rows in the format that the file's name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if ".csv" in path.name or ".tsv" in path.name:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(values[0]), delimiter="\t" if ".tsv" in path.name else ",")
        writer.writeheader()
        writer.writerows(values)
        plain = text.getvalue().encode()
        path.write_bytes(gzip.compress(plain) if path.suffix == ".gz" else plain)
    elif path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(values), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(values))
    else:
        path.write_text("".join(json.dumps(v) + "\n" for v in values))
    return path


def named(name: str, count: int, text: str = "text", label: str = "label", seed: int = 0) -> Rows:
    return [{text: r["text"], label: r["label"]} for r in rows(name, count, seed)]


def error(code: str, *arguments: Any, **options: Any) -> FanbuError:
    with pytest.raises(FanbuError) as found:
        write_recipe(*arguments, **options)
    assert found.value.code == code
    return found.value


# Files


def test_files_are_grouped_into_domains(tmp_path: Path) -> None:
    for name in ("bank.train.csv", "bank_test.csv", "bank-dev.csv", "law.jsonl", "zoo/train.tsv", "zoo/test.tsv"):
        save(tmp_path / name, named("food", 4))
    found = {f.name: {s: p.name for s, p in f.splits.items()} for f in find([*tmp_path.glob("*.*"), tmp_path / "zoo"])}
    assert found == {
        "bank": {"train": "bank.train.csv", "test": "bank_test.csv", "valid": "bank-dev.csv"},
        "law": {"train": "law.jsonl"},
        "zoo": {"train": "train.tsv", "test": "test.tsv"},
    }  # fmt: skip


def test_folders_of_folders_and_names_that_meet(tmp_path: Path) -> None:
    for name in ("a/data.csv", "b/data.csv"):
        save(tmp_path / name, named("food", 4))
    (tmp_path / "a" / "config.json").write_text("{}")
    assert [f.name for f in find([tmp_path])] == ["a_data", "b_data"]
    assert legal("My data: v1.2") == "My_data_v1_2"
    assert legal("数据", {"domain"}) == "domain_2"


def test_files_that_cannot_be_meant(tmp_path: Path) -> None:
    save(tmp_path / "a.test.csv", named("food", 4))
    with pytest.raises(FanbuError, match="no training rows"):
        find([tmp_path])
    save(tmp_path / "a.csv", named("food", 4))
    save(tmp_path / "a.jsonl", named("food", 4))
    with pytest.raises(FanbuError, match="two files are the train rows"):
        find([tmp_path])
    (tmp_path / "notes.docx").write_text("x")
    for path in (tmp_path / "notes.docx", tmp_path / "gone.csv"):
        with pytest.raises(FanbuError, match=r"format|no file"):
            find([path])


# Columns


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"id": "{n}", "message": "please help me {n}", "intent": "{l}"}, ("message", "intent", "id")),
        ({"a": "one two three {n} four", "b": "{l}"}, ("a", "b", None)),
        ({"text": "short {n}", "document": "far longer text {n} " * 9, "label": "{l}"}, ("text", "label", None)),
        ({"评论": "这家酒店很好 {n}", "标签": "{l}"}, ("评论", "标签", None)),
        ({"text": "a b {n}", "label": "{i}", "label_name": "{l}"}, ("text", "label_name", None)),
        ({"text": "a b {n}", "label": "{i}"}, ("text", "label", None)),
        ({"text": "a b {n}", "score": "{n}.5"}, ("text", None, None)),
        ({"text": "some words {n}"}, ("text", None, None)),
    ],
)
def test_columns_are_found_by_name_and_content(
    values: dict[str, str], expected: tuple[str, str | None, str | None]
) -> None:
    records = [{k: v.format(n=n, i=n % 3, l="xyz"[n % 3]) for k, v in values.items()} for n in range(60)]
    found = guess(records, "file")
    assert (found.text, found.label, found.id) == expected


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"title": "some words {n}", "body": "other words {n} more", "label": "{l}"}, "text"),
        ({"left": "some words {n}", "right": "other words {n}", "label": "{l}"}, "text"),
        ({"text": "some words {n}", "country": "{l}", "plan": "{i}"}, "label"),
        ({"text": "some words {n}", "intent": "{l}", "topic": "{i}"}, "label"),
        ({"text": "some words {n}", "country": "{l}", "age": "{n}"}, "label"),
    ],
)
def test_what_is_not_clear_is_asked_or_refused(values: dict[str, str], what: str) -> None:
    records = [{k: v.format(n=n, i=n // 7 % 3, l="xyz"[n % 3]) for k, v in values.items()} for n in range(60)]
    with pytest.raises(FanbuError) as found:
        guess(records, "file")
    assert found.value.code == "column-unclear"
    assert f"--{what}" in found.value.remedy
    assert all(name in str(found.value.allowed) for name in values if name != "text")
    asked = []

    def ask(question: str, choices: Sequence[str], default: str) -> str:
        asked.append(question)
        return list(choices)[-1]

    guess(records, "file", ask=ask)
    assert what in asked[0]
    assert len(asked) == 1
    said = {what: next(n for n in values if n not in {"text", "label"})}
    assert getattr(guess(records, "file", **said), what) == said[what]


def test_a_column_that_is_not_there() -> None:
    with pytest.raises(FanbuError) as found:
        guess([{"a": "b c"}], "file", text="b")
    assert found.value.code == "no-column"
    assert describe([{"a": None}, {"a": "x y"}])[0].filled == 1


# The recipe


def test_four_formats_give_a_recipe_that_loads(bert: Path, tmp_path: Path) -> None:
    sources = [
        save(tmp_path / "data" / "food.csv", named("food", 120, "question", "intent")),
        save(tmp_path / "data" / "rail.train.jsonl", named("rail", 60)),
        save(tmp_path / "data" / "rail.test.jsonl", named("rail", 40, seed=1)),
        save(tmp_path / "data" / "more.tsv.gz", named("food", 60, "message", "topic", 2)),
        save(tmp_path / "data" / "wide.parquet", named("rail", 60, "review", "category", 3)),
        save(tmp_path / "data" / "list.json", named("rail", 60, "sentence", "class", 4)),
    ]
    out = tmp_path / "recipe.yaml"
    found = write_recipe(sources, Options(str(bert), out, rounds=2))
    assert found["domains"]["food"]["rows"] == {"train": 120}
    assert found["domains"]["food"]["labels"] == 3
    text = out.read_text()
    plain = yaml.safe_load(text)
    assert plain["domains"]["food"]["train"] == "data/food.csv"
    assert plain["domains"]["food"]["columns"] == {"text": "question", "label": "intent"}
    assert "columns" not in plain["domains"]["rail"]
    assert plain["domains"]["rail"]["test"] == "data/rail.test.jsonl"
    assert plain["rounds"] == 2
    assert "# " in text
    assert "sqrt(0.15/n)" in text
    recipe = load_recipe(out)
    assert 16 <= recipe.max_length <= 32
    domains = load_domains(recipe)
    assert set(domains) == {"food", "rail", "more", "wide", "list"}
    assert len(domains["food"].test) > 15
    assert not domains["food"].share.labels
    assert recipe.gate.margins or recipe.gate.margin == margin(15)


def test_numbers_suit_the_rows_and_the_model() -> None:
    assert margin(100) == pytest.approx(0.1)
    assert margin(10_000) == pytest.approx(0.01)
    assert margin(3) == pytest.approx(0.25)
    assert training(600, 22_000_000)["lr"] == pytest.approx(2e-4)
    assert training(600, 110_000_000)["lr"] == pytest.approx(5e-5)
    assert [training(n, 0)["epochs"] for n in (500, 2000, 5000)] == [6, 3, 2]
    assert training(500, 0)["batch_size"] < training(2000, 0)["batch_size"]


@pytest.mark.parametrize("parameters", [22e6, 110e6, 900e6])
def test_rates_are_numbers_for_yaml_too(parameters: float) -> None:
    from fanbu.init.write import _flow

    rate = training(100, int(parameters))["lr"]
    assert yaml.safe_load(_flow({"lr": rate})) == {"lr": rate}


def test_rows_that_cannot_be_used_are_left_out_and_said(bert: Path, tmp_path: Path) -> None:
    values = named("food", 60)
    values += [
        {"text": "", "label": "soup"},
        {"text": "no label here", "label": ""},
        {"text": "rare one", "label": "x"},
    ]
    values += [dict(values[0]), {**values[1], "label": "soup"}]
    tested = [*named("food", 20, seed=1), {"text": "what is this", "label": "unheard"}]
    sources = [save(tmp_path / "food.csv", values), save(tmp_path / "food.test.csv", tested)]
    out = tmp_path / "recipe.yaml"
    found = write_recipe(sources, Options(str(bert), out))["domains"]["food"]
    told = " ".join(found["warnings"])
    for words in ("1 rows of train have no text", "1 rows of train have no label", "1 labels have one row", "repeat",
                  "more than one label", "1 rows of test have no label, or one that no training row has"):  # fmt: skip
        assert words in told
    domain = load_domains(load_recipe(out))["food"]
    assert len(domain.test) == 20
    assert "no label here" in domain.unlabelled.texts
    assert (tmp_path / "recipe-data" / "food.train.jsonl").is_file()
    assert sources[0].read_text().count("\n") == 66  # the user's file is as it was


def test_ids_that_repeat_are_not_taken(bert: Path, tmp_path: Path) -> None:
    values = [{"id": 7, **row} for row in named("food", 60)]
    out = tmp_path / "recipe.yaml"
    write_recipe([save(tmp_path / "food.jsonl", values)], Options(str(bert), out))
    assert yaml.safe_load(out.read_text())["domains"]["food"]["columns"] == {"id": "row number"}
    assert load_domains(load_recipe(out))


def test_texts_alone_need_a_causal_model(bert: Path, llama: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "law.jsonl", [{"text": r["text"]} for r in rows("food", 80, 0)])
    out = tmp_path / "recipe.yaml"
    assert "--model" in str(error("no-labels", [source], Options(str(bert), out)))
    write_recipe([source], Options(str(llama), out))
    assert load_domains(load_recipe(out))["law"].task == "causal-lm"
    labelled = save(tmp_path / "food.jsonl", named("food", 80))
    other = tmp_path / "other.yaml"
    assert "--task" in error("task-unclear", [labelled], Options(str(llama), other)).remedy
    for task in ("causal-lm", "text-classification"):
        write_recipe([labelled], Options(str(llama), other, task=task, force=True))
        assert load_domains(load_recipe(other))["food"].task == task
    mixed = error("no-labels", [source, labelled], Options(str(bert), other, force=True))
    assert "law" in str(mixed)


def test_what_is_shared(bert: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "food.csv", named("food", 90))
    public = save(tmp_path / "public.jsonl", [{"text": r["text"]} for r in rows("rail", 30, 0)])
    out = tmp_path / "recipe.yaml"

    def made(**options: Any) -> Any:
        write_recipe([source], Options(str(bert), out, force=True, **options))
        return load_recipe(out)

    assert made(share="open").domains["food"].share == "open"
    assert made(share="internal").feedback[0].method == "average"
    with_public = made(share="internal", public=public)
    assert with_public.feedback[0].method == "distill"
    assert with_public.probe.public[0].path == str(public)
    error("unknown-preset", [source], Options(str(bert), out, share="secret", force=True))


def test_nothing_is_overwritten_or_left_half(bert: Path, tmp_path: Path) -> None:
    source = save(tmp_path / "food.csv", named("food", 60))
    out = tmp_path / "recipe.yaml"
    out.write_text("mine")
    error("out-exists", [source], Options(str(bert), out))
    one = save(tmp_path / "one.csv", [{"text": f"a b {i}", "label": "x"} for i in range(60)])
    error("one-class", [one], Options(str(bert), out, force=True))
    assert out.read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"food.csv", "one.csv", "recipe.yaml"}
    semicolons = tmp_path / "semi.csv"
    semicolons.write_text("text;label\n" + "a b c;x\n" * 20)
    assert "';'" in str(error("data-format", [semicolons], Options(str(bert), out, force=True)))
    numbers = save(tmp_path / "numbers.csv", [{"a": i, "b": i % 3} for i in range(60)])
    error("no-text", [numbers], Options(str(bert), out, force=True))


# The command


def test_init_then_run(bert: Path, tmp_path: Path, fanbu: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """From files to a verdict without an edit; every error names its page."""
    monkeypatch.chdir(tmp_path)
    for name in TOPICS:
        save(tmp_path / "data" / f"{name}.csv", named(name, 60, "question", "intent"))
    code, text = fanbu("init", "data", "--model", bert, "--yes", "--name", "mine")
    assert code == 0
    assert "fanbu run recipe.yaml" in text
    error_of(fanbu("init", "data", "--model", bert, "--yes", "--json"), 2, "out-exists")
    error_of(fanbu("init", "--force", "--json"), 2, "no-files")
    again = ("init", "data", "--model", bert, "--yes", "--force", "--json")
    code, found = fanbu(*again, "--label", "food=intent", "--text", "question", "--rounds", 1)
    assert code == 0
    assert found["domains"]["food"]["label"] == "intent"
    error_of(fanbu(*again, "--label", "fod=intent"), 2, "unknown-domain")
    error_of(fanbu(*again, "--label", "intnt"), 2, "no-column")
    quick = ("--set", "feedback.train.epochs=1", "--set", "shrink=[{method: finetune, train: {epochs: 1}}]")
    code, record = fanbu("run", "recipe.yaml", "--device", "cpu", *quick, "--json")
    assert code in {0, 3}
    assert set(record["domains"]) == set(TOPICS)


def test_it_asks_on_a_terminal(bert: Path, tmp_path: Path, fanbu: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [{**row, "kind": row["label"], "tone": "ab"[i // 5 % 2]} for i, row in enumerate(named("food", 60))]
    for row in values:
        del row["label"]
    source = save(tmp_path / "food.csv", values)
    answers = iter([str(source), str(bert), "asked", "nonsense", "open", 1, "kind"])
    asked: list[str] = []

    def prompt(question: str, **_: Any) -> Any:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    monkeypatch.setattr("typer.prompt", prompt)
    out = tmp_path / "recipe.yaml"
    assert fanbu("init", "--out", out)[0] == 0
    assert len(asked) == 7
    assert "which column is the label" in asked[-1]
    recipe = load_recipe(out)
    assert (recipe.name, recipe.domains["food"].share) == ("asked", "open")
    assert recipe.domains["food"].columns == {"label": "kind"}
    assert fanbu("init", source, "--model", bert, "--out", tmp_path / "b.yaml", "--yes", "--label", "kind")[0] == 0
    assert len(asked) == 7
