"""Bad input: every mistake is named, with what to do, and nothing that was finished is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import finished_round, rows, stages, tiny_recipe, write_domain, write_rows
from fanbu.boundary import cross
from fanbu.catalogue import method
from fanbu.contribution import Contribution, open_contribution
from fanbu.data.load import load_rows
from fanbu.domain import load_domain
from fanbu.errors import BoundaryError, DataError, FanbuError, FitError, IntegrityError, RetryError, UsageError
from fanbu.files import write_text
from fanbu.generations import run
from fanbu.heads import open_classifier
from fanbu.ledger import Workspace
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.recipe import load_recipe
from fanbu.tensors import INDEX, SINGLE, Tensors, load_tensors, save_tensors, write_tensors
from fanbu.turn import start
from fanbu.types import PRESETS, Context, Share

CODES = {UsageError: 2, DataError: 4, IntegrityError: 5, BoundaryError: 1, FitError: 1, RetryError: 75}


def refused(kind: type[FanbuError], code: str, call: Callable[[], object], *told: str) -> FanbuError:
    """The error that ``call`` ends with: of the right class and code, with a remedy, and naming ``told``."""
    with pytest.raises(FanbuError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, error
    assert error.code == code, error
    assert error.exit_code == CODES[kind]
    assert error.remedy.strip()
    assert f"remedy: {error.remedy}" in str(error)
    assert len(str(error)) < 2000
    for text in told:
        assert text in str(error)
    return error


# Checkpoints


@pytest.fixture
def body(bert: Path, tmp_path: Path) -> Path:
    """A copy of the bare body, to be damaged."""
    return Path(shutil.copytree(bert, tmp_path / "body"))


@pytest.fixture
def made(opened: Model, tmp_path: Path) -> Path:
    """A copy of a model that fanbu made, to be damaged."""
    return Path(shutil.copytree(opened.path, tmp_path / "made"))


def test_missing_checkpoint(tmp_path: Path) -> None:
    assert refused(UsageError, "model-not-found", lambda: open_model(tmp_path / "nothing"), "nothing")
    assert refused(UsageError, "model-not-found", lambda: open_model("package:no_such_package/model"), "pip install")
    assert refused(UsageError, "model-not-found", lambda: open_model("no-such-owner/no-such-model"))


@pytest.mark.parametrize(
    ("name", "code"), [("config.json", "checkpoint-config"), (SINGLE, "checkpoint-missing")], ids=["config", "weights"]
)
def test_missing_file_of_a_checkpoint(body: Path, name: str, code: str) -> None:
    (body / name).unlink()
    assert refused(IntegrityError, code, lambda: open_model(body), name)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff", "[" * 100_000], ids=["empty", "list", "cut", "bytes", "deep"])
def test_broken_config(body: Path, text: str) -> None:
    (body / "config.json").write_bytes(text.encode("latin1"))
    assert refused(IntegrityError, "checkpoint-config", lambda: open_model(body), "config.json")


@pytest.mark.parametrize("size", [0, 7, 9, 2000, -1])
def test_truncated_weights(body: Path, size: int) -> None:
    whole = (body / SINGLE).read_bytes()
    (body / SINGLE).write_bytes(whole[:size])
    assert refused(IntegrityError, "checkpoint-broken", lambda: open_model(body), SINGLE)


def entry(start: Any = 0, end: Any = 4, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


HOSTILE: dict[str, Any] = {
    "overlap": {"a": entry(0, 8, (2,)), "b": entry(4, 12, (2,))},
    "hole": {"a": entry(0, 4), "b": entry(8, 12)},
    "late start": {"a": entry(4, 12, (2,))},
    "too little": {"a": entry(0, 8, (2,))},
    "too much": {"a": entry(0, 16, (4,))},
    "backwards": {"a": entry(12, 0, (3,))},
    "negative shape": {"a": entry(0, 12, (-3,))},
    "two negatives": {"a": entry(0, 12, (-3, -1))},
    "huge shape": {"a": entry(0, 12, (2**40, 2**40))},
    "infinite shape": {"a": entry(0, 12, (float("inf"),))},
    "unknown dtype": {"a": entry(0, 12, (3,), "F99")},
    "dtype of another size": {"a": entry(0, 12, (3,), "F64")},
    "dtype is a list": {"a": entry(0, 12, (3,), ["F32"])},
    "offsets are floats": {"a": entry(0.0, 12.0, (3,))},
    "offsets are texts": {"a": entry("0", "12", (3,))},
    "shape is a text": {"a": entry(0, 12, "3")},
    "shape of texts": {"a": entry(0, 12, ("3",))},
    "shape is a mapping": {"a": entry(0, 12, {"3": 1})},
    "no offsets": {"a": {"dtype": "F32", "shape": [3]}},
    "no mapping": [1, 2],
    "entry is null": {"a": None},
    "deep": b"[" * 200_000,
    "not JSON": b"nonsense",
    "not UTF-8": b'{"\xff": 1}',
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=list(HOSTILE))
def test_hostile_header(body: Path, header: Any) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (body / SINGLE).write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(12))
    assert refused(IntegrityError, "checkpoint-broken", lambda: open_model(body), SINGLE)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 101 * 2**20, 5000])
def test_header_that_claims_too_much(body: Path, length: int) -> None:
    (body / SINGLE).write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(100))
    assert refused(IntegrityError, "checkpoint-broken", lambda: open_model(body), "claims")


def test_weights_of_a_wrong_shape_or_missing(opened: Model, made: Path) -> None:
    (made / "fanbu.json").unlink()
    tensors = load_file(made / SINGLE)
    name = next(n for n in tensors if "intermediate" in n and n.endswith("weight"))
    save_file({**tensors, name: tensors[name][:3].clone()}, made / SINGLE)
    assert load_network(opened) is not None
    with pytest.raises(IntegrityError, match="remedy"):
        load_network(open_model(made))
    save_file({n: t for n, t in tensors.items() if n != name}, made / SINGLE)
    assert refused(IntegrityError, "checkpoint-incomplete", lambda: load_network(open_model(made)), name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers(body: Path, made: Path, value: float, context: Context, tmp_path: Path) -> None:
    for folder, use in ((body, lambda: open_classifier(open_model(body), context)), (made, lambda: None)):
        tensors = load_file(folder / SINGLE)
        name = next(n for n in sorted(tensors) if tensors[n].ndim == 2)
        tensors[name][0, 0] = value
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
        lazy = Tensors(folder)
        assert refused(IntegrityError, "not-finite", lambda lazy=lazy, name=name: lazy[name], name)
        assert refused(IntegrityError, "not-finite", lambda folder=folder: load_tensors(folder / SINGLE), name)
        if folder == body:
            assert refused(IntegrityError, "not-finite", use)
    (made / "fanbu.json").unlink()
    assert refused(IntegrityError, "not-finite", lambda: load_network(open_model(made)))
    assert refused(IntegrityError, "not-finite", lambda: save_tensors(tmp_path / "x", {"a": torch.tensor([value])}))
    assert not (tmp_path / "x").exists()


def test_sharded_checkpoint(body: Path) -> None:
    whole = load_file(body / SINGLE)
    (body / SINGLE).unlink()
    write_tensors(body, whole, shard_bytes=20_000)
    shards = sorted(body.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert set(open_model(body).tensors) == set(whole)
    index = (body / INDEX).read_text()
    hidden = shards[1].rename(body / "elsewhere")
    assert refused(IntegrityError, "checkpoint-missing", lambda: open_model(body), shards[1].name)
    hidden.rename(shards[1])
    weight_map = json.loads(index)["weight_map"]
    first = next(iter(weight_map))
    for changed, code in (
        ({**weight_map, first: "../body/" + shards[0].name}, "checkpoint-missing"),
        ({**weight_map, "not there": shards[0].name}, "checkpoint-broken"),
        ({k: v for k, v in weight_map.items() if k != first}, "checkpoint-broken"),
        ([], "checkpoint-broken"),
    ):
        (body / INDEX).write_text(json.dumps({"weight_map": changed}))
        assert refused(IntegrityError, code, lambda: open_model(body))
    (body / INDEX).write_text("{")
    assert refused(IntegrityError, "checkpoint-broken", lambda: open_model(body), INDEX)
    (body / INDEX).write_text("[" * 100_000)
    assert refused(IntegrityError, "checkpoint-broken", lambda: open_model(body), INDEX)


def test_pickled_weights_are_never_opened(body: Path) -> None:
    torch.save(load_file(body / SINGLE), body / "pytorch_model.bin")
    (body / SINGLE).unlink()
    error = refused(IntegrityError, "checkpoint-missing", lambda: open_model(body), "pytorch_model.bin")
    assert "pickle" in error.remedy


def test_checkpoint_that_brings_code(body: Path) -> None:
    config = json.loads((body / "config.json").read_text())
    (body / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "evil.Model"}}))
    assert refused(IntegrityError, "checkpoint-code", lambda: open_model(body), "auto_map", "evil.Model")


def test_tokenizer_missing_or_broken(body: Path) -> None:
    (body / "tokenizer.json").write_text("{")
    assert refused(IntegrityError, "tokenizer-broken", lambda: load_tokenizer(open_model(body)))
    (body / "tokenizer.json").unlink()
    assert refused(IntegrityError, "tokenizer-missing", lambda: load_tokenizer(open_model(body)), "tokenizer.json")


def test_tokenizer_with_more_tokens_than_embedding_rows(body: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(body)
    tokenizer.add_tokens([f"new{i}" for i in range(5)])
    tokenizer.save_pretrained(body)
    assert refused(IntegrityError, "tokenizer-mismatch", lambda: load_tokenizer(open_model(body)), str(len(tokenizer)))


def test_a_changed_byte_is_found(made: Path) -> None:
    for name in (SINGLE, "config.json", "tokenizer.json"):
        whole = (made / name).read_bytes()
        open_model(made)
        changed = bytearray(whole)
        changed[-3 if name == SINGLE else -2] ^= 1
        if name == "config.json":
            changed = bytearray(whole.replace(b'"hidden_act"', b'"hidden_bct"'))
        assert changed != whole
        (made / name).write_bytes(changed)
        assert refused(IntegrityError, "file-changed", lambda: open_model(made), name)
        (made / name).write_bytes(whole)
    (made / "tokenizer.json").unlink()
    assert refused(IntegrityError, "file-missing", lambda: open_model(made), "tokenizer.json")
    for text in ("{", "{}", '{"files": 1}'):
        (made / "fanbu.json").write_text(text)
        assert refused(IntegrityError, "manifest-broken", lambda: open_model(made), "fanbu.json")
    (made / "fanbu.json").write_text('{"files": {"../secret": "0"}}')
    assert refused(IntegrityError, "file-missing", lambda: open_model(made))


# Rows


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    return write_domain(tmp_path, "food")


def row(number: int, **changes: Any) -> dict[str, Any]:
    return {**rows("food", 12, 7)[number], **changes}


TWELVE = rows("food", 12, 7)
SPLITS: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "empty train": ("train", [], "empty-split"),
    "empty valid": ("valid", [], "empty-split"),
    "empty test": ("test", [], "empty-split"),
    "one class": ("train", [row(i, label="soup") for i in range(12)], "one-class"),
    "unseen label": ("test", [*TWELVE, row(0, id="x", text="a new one", label="cake")], "unseen-labels"),
    "duplicate ids": ("train", [*TWELVE, row(3, text="a new one")], "duplicate-ids"),
    "empty text": ("train", [*TWELVE, row(0, id="x", text="")], "empty-text"),
    "blank text": ("test", [*TWELVE, row(0, id="x", text=" \n\t")], "empty-text"),
    "no text": ("train", [{"id": "1", "label": "soup"}], "column-missing"),
    "text is a number": ("train", [row(0, text=3)], "column-missing"),
    "no label": ("test", [{"id": "1", "text": "soup"}], "column-missing"),
    "empty label": ("train", [row(0, label="")], "column-missing"),
    "absurdly long text": ("train", [*TWELVE, row(0, id="x", text="soup " * 200_001)], "text-too-long"),
}


@pytest.mark.parametrize(("split", "values", "code"), SPLITS.values(), ids=list(SPLITS))
def test_rows_that_cannot_be_used(
    files: dict[str, str], tmp_path: Path, split: str, values: list[dict[str, Any]], code: str
) -> None:
    files[split] = write_rows(tmp_path / "bad.jsonl", values)
    told = ("bad.jsonl",) if code in {"column-missing", "text-too-long"} else ("food", split)
    assert refused(DataError, code, lambda: load_domain("food", **files), *told)


RAW: dict[str, tuple[str, bytes, str, str]] = {
    "not UTF-8": ("x.jsonl", b'{"text": "a", "label": "b"}\n{"text": "\xe9t\xe9"}\n', "not-utf8", "line 2"),
    "not UTF-8 csv": ("x.csv", b"text,label\na,b\nc,d\n\xff,e\n", "not-utf8", "line 4"),
    "broken line": ("x.jsonl", b'{"text": "a", "label": "b"}\n\n{"text": \n', "data-broken", "line 3"),
    "no object": ("x.jsonl", b'{"text": "a", "label": "b"}\n["a", "b"]\n', "data-broken", "line 2"),
    "deep line": ("x.jsonl", b'{"text": "a", "label": "b"}\n' + b"[" * 100_000, "data-broken", "line 2"),
    "broken JSON": ("x.json", b'[{"text": "a"', "data-broken", "x.json"),
    "JSON is no list": ("x.json", b'{"text": "a"}', "data-broken", "x.json"),
    "JSON list of texts": ("x.json", b'["a", "b"]', "data-broken", "x.json"),
    "broken gzip": ("x.jsonl.gz", b"no gzip at all", "data-broken", "x.jsonl.gz"),
    "cut gzip": ("x.csv.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03", "data-broken", "x.csv.gz"),
    "broken parquet": ("x.parquet", b"PAR1 nothing", "data-broken", "x.parquet"),
    "unknown format": ("x.xlsx", b"PK", "data-format", "x.xlsx"),
    "no suffix": ("x", b"text", "data-format", "x"),
    "csv without the column": ("x.csv", b"words,label\na,b\n", "column-missing", "row 1"),
    "csv row cut short": ("x.csv", b"text,label\na,b\nc\n", "column-missing", "row 2"),
    "csv row too long": ("x.csv", b"words,label\na,b,c\n", "column-missing", "row 1"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "code", "told"), RAW.values(), ids=list(RAW))
def test_files_that_cannot_be_read(tmp_path: Path, name: str, raw: bytes, code: str, told: str) -> None:
    (tmp_path / name).write_bytes(raw)
    assert refused(DataError, code, lambda: load_rows(str(tmp_path / name)), told)


def test_missing_files_and_columns(files: dict[str, str], tmp_path: Path) -> None:
    missing = str(tmp_path / "gone.jsonl")
    assert refused(
        DataError, "data-not-found", lambda: load_domain("food", **{**files, "train": missing}), "gone.jsonl"
    )
    columns = {"text": "body"}
    assert refused(
        DataError, "column-missing", lambda: load_domain("food", **files, columns=columns), "'body'", "row 1"
    )
    assert refused(UsageError, "column-map", lambda: load_domain("food", **files, columns={"texts": "text"}), "texts")


def test_quoted_line_breaks_in_csv_survive(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    path.write_text('text,label\n"one\ntwo",a\nthree\u2028four,b\n', encoding="utf-8")
    assert [r.text for r in load_rows(str(path))] == ["one\ntwo", "three\u2028four"]


def test_overlap_is_found_left_out_and_told(files: dict[str, str], tmp_path: Path) -> None:
    clean = load_domain("food", **files)
    assert not clean.warnings
    train = [json.loads(line) for line in Path(files["train"]).read_text().splitlines()]
    test = [json.loads(line) for line in Path(files["test"]).read_text().splitlines()]
    leaked = [{**r, "id": f"leak{i}", "text": f"  {r['text'].upper()} "} for i, r in enumerate(test[:3])]
    leaky = load_domain("food", **{**files, "train": write_rows(tmp_path / "leaky.jsonl", [*train, *leaked])})
    assert leaky.train == clean.train
    assert leaky.test == clean.test
    (warning,) = leaky.warnings
    assert "3 rows of train" in warning
    assert "test" in warning


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"share": "secret"}, "unknown-preset"),
        ({"task": "vision"}, "unknown-task"),
        ({"metric": "vibes"}, "unknown-metric"),
        ({"test": None}, "no-test"),
        ({"train": None, "test": 0.2}, "no-train"),
        ({"test": 1.5}, "split-share"),
        ({"limit": {"trian": 3}}, "unknown-split"),
        ({"python": "cooking"}, "unknown-area"),
    ],
)
def test_domains_that_cannot_be_meant(files: dict[str, str], changes: dict[str, Any], code: str) -> None:
    assert refused(UsageError, code, lambda: load_domain("food", **{**files, **changes}))
    assert refused(UsageError, "domain-name", lambda: load_domain("../food", **files))


# Recipes


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe that is sound; nothing is ever trained with it."""
    return tiny_recipe(tmp_path_factory.mktemp("recipe"))


def changed(recipe: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A deep copy with one place changed."""
    copy: dict[str, Any] = json.loads(json.dumps(recipe))
    *path, last = place.split(".")
    inner: Any = copy
    for name in path:
        inner = inner[int(name) if isinstance(inner, list) else name]
    inner[last] = value
    return copy


@pytest.mark.parametrize(
    ("place", "meant"),
    [
        ("thread", "threads"),
        ("domain", "domains"),
        ("gate.margn", "margin"),
        ("probe.pubic", "public"),
        ("domains.food.tets", "test"),
        ("domains.food.share", "kinds"),
        ("probe.public", "python"),
    ],
)
def test_unknown_keys_and_what_was_meant(recipe: dict[str, Any], place: str, meant: str) -> None:
    value: Any = {"domains.food.share": {"preset": "open", "kind": []}, "probe.public": [{"pyton": "internet"}]}.get(
        place, 1
    )
    base = changed(recipe, "probe", {})
    error = refused(UsageError, "unknown-key", lambda: load_recipe(changed(base, place, value)), meant)
    assert error.remedy == f"did you mean {meant!r}?"


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        ("seed", "many", "seed"),
        ("seed", -1, "seed"),
        ("fanbu", 2, "fanbu"),
        ("name", "../up", "name"),
        ("model", ["a"], "model"),
        ("threads", 1.5, "threads"),
        ("max_length", 0, "max_length"),
        ("precision", "fp8", "precision"),
        ("domains", {}, "domains"),
        ("domains.food", "file.jsonl", "domains.food"),
        ("domains.food.share", "secret", "domains.food.share"),
        ("domains.food.limit", {"trian": 3}, "domains.food.limit"),
        ("gate.margin", 2, "gate.margin"),
        ("gate.mode", "guess", "gate.mode"),
        ("shrink", [], "shrink"),
        ("shrink", [{"train": {}}], "shrink.0"),
        ("references", ["tf-idf"], "references.0"),
    ],
)
def test_wrong_values_in_a_recipe(recipe: dict[str, Any], place: str, value: Any, told: str) -> None:
    assert refused(UsageError, "bad-recipe", lambda: load_recipe(changed(recipe, place, value)), told)


def test_missing_keys_in_a_recipe(recipe: dict[str, Any]) -> None:
    for key in ("fanbu", "name", "model", "domains", "feedback"):
        less = {k: v for k, v in recipe.items() if k != key}
        assert refused(UsageError, "bad-recipe", lambda less=less: load_recipe(less), key)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a: &x [1]\nb: *x\n", "recipe-alias"),
        ("a: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "recipe-alias"),
        ("a: [1\n", "recipe-broken"),
        ("- a\n- b\n", "recipe-broken"),
        ("", "recipe-broken"),
        ("!!python/object/apply:os.system [echo]\n", "recipe-broken"),
        ("a: !!binary x\n", "recipe-broken"),
        ("a: " + "[" * 600 + "]" * 600, "recipe-broken"),
        ("a: 1\na: 2\n", "recipe-broken"),
        ("#" * (2**20 + 1), "recipe-too-large"),
    ],
    ids=["alias", "laughs", "cut", "list", "empty", "code", "binary", "deep", "key twice", "large"],
)
def test_yaml_that_is_no_recipe(tmp_path: Path, text: str, code: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert refused(UsageError, code, lambda: load_recipe(path), "recipe.yaml")
    path.write_bytes(b"name: \xff\n")
    assert refused(UsageError, "recipe-broken", lambda: load_recipe(path))
    assert refused(UsageError, "recipe-not-found", lambda: load_recipe(tmp_path / "none.yaml"), "none.yaml")


@pytest.mark.parametrize("change", ["margin", "gate", "name.x=1", "gate.margin=[1"])
def test_bad_set(recipe: dict[str, Any], change: str) -> None:
    with pytest.raises(UsageError, match="remedy"):
        load_recipe(recipe, [change])


@pytest.mark.parametrize(
    ("place", "value", "code", "told"),
    [
        ("feedback", {"method": "distil"}, "unknown-method", "did you mean 'distill'"),
        ("feedback", {"method": "finetune"}, "unknown-method", "distill"),
        ("shrink", [{"method": "average"}], "unknown-method", "finetune"),
        ("references", [{"method": "avrage"}], "unknown-method", "did you mean 'average'"),
        ("feedback", {"method": "distill", "topk": 3}, "unknown-parameter", "did you mean 'top_k'"),
        ("shrink", [{"method": "depth", "layer": 3}], "unknown-parameter", "did you mean 'layers'"),
        ("feedback", {"method": "distill", "top_k": "3"}, "bad-parameter", "top_k"),
        ("feedback", {"method": "distill", "top_k": 3.5}, "bad-parameter", "top_k"),
        ("shrink", [{"method": "depth", "importance": "luck"}], "bad-parameter", "importance"),
        ("shrink", [{"method": "finetune", "train": {"epoch": 3}}], "bad-parameter", "train.epoch"),
        ("shrink", [{"method": "finetune", "train": {"epochs": "many"}}], "bad-parameter", "train.epochs"),
        ("shrink", [{"method": "finetune", "train": {"schedule": "random"}}], "bad-parameter", "train.schedule"),
        ("feedback", {"method": "distill", "train": 3}, "bad-parameter", "train"),
    ],
)
def test_methods_that_cannot_be_meant(recipe: dict[str, Any], place: str, value: Any, code: str, told: str) -> None:
    assert refused(UsageError, code, lambda: load_recipe(changed(recipe, place, value)), told)


def refused_early(recipe: dict[str, Any], workspace: Path, kind: type[FanbuError], code: str, *told: str) -> bool:
    """The recipe reads well, and its round is refused, in these words, before anything is made."""
    sound = load_recipe({**recipe, "workspace": str(workspace)})
    said = refused(kind, code, lambda: run(sound), *told)
    return said and not list(workspace.glob("stages/*")) and not list(workspace.glob("rounds/*"))


def test_a_domain_in_two_roles(recipe: dict[str, Any]) -> None:
    twice = {**recipe, "guards": {"food": recipe["domains"]["food"]}}
    assert refused(UsageError, "domain-twice", lambda: load_recipe(twice), "food")


def test_a_margin_of_no_domain(recipe: dict[str, Any]) -> None:
    margins = {**recipe, "gate": {"margins": {"foood": 0.1}}}
    assert refused(UsageError, "unknown-domain", lambda: load_recipe(margins), "foood", "rail")


def test_what_a_domain_does_not_share_is_refused_refused_early(recipe: dict[str, Any], tmp_path: Path) -> None:
    no_labels = changed(recipe, "domains.food.share", {"preset": "open", "labels": False})
    for place, value in (("feedback", {"method": "multitask"}), ("references", [{"method": "multitask"}])):
        assert refused_early(changed(no_labels, place, value), tmp_path, BoundaryError, "not-shared", "labels", "food")
    internal = changed(recipe, "domains.food.share", "internal")
    assert refused_early(
        changed(internal, "feedback", {"method": "multitask"}), tmp_path, BoundaryError, "not-shared", "texts"
    )
    private = changed(recipe, "domains.food.share", "private")
    for feedback in ("distill", "average", "multitask"):
        bare = {**private, "references": [], "feedback": {"method": feedback}}
        assert refused_early(bare, tmp_path, BoundaryError, "not-shared", "food")


def test_what_does_not_fit_is_refused_refused_early(recipe: dict[str, Any], tmp_path: Path) -> None:
    depth = {**recipe, "shrink": [{"method": "depth", "layers": 1}], "references": []}
    assert refused_early(
        {**depth, "feedback": {"method": "average"}}, tmp_path, FitError, "other-architecture", "depth"
    )
    assert refused_early({**depth, "references": [{"method": "average"}]}, tmp_path, FitError, "other-architecture")
    start(load_recipe({**depth, "workspace": str(tmp_path / "sound")}))
    silent = changed(changed(recipe, "domains.food.share", "internal"), "domains.rail.share", "internal")
    assert refused_early({**silent, "references": []}, tmp_path, FitError, "no-probe-set", "probe.public")
    assert refused_early({**recipe, "references": [], "probe": {"domains": False}}, tmp_path, FitError, "no-probe-set")
    mixed = changed(recipe, "domains.food.task", "causal-lm")
    assert refused_early(mixed, tmp_path, UsageError, "mixed-tasks")


def test_a_model_that_is_not_there_is_refused_before_training(recipe: dict[str, Any], tmp_path: Path) -> None:
    gone = load_recipe({**recipe, "model": str(tmp_path / "gone"), "workspace": str(tmp_path / "ws")})
    assert refused(UsageError, "model-not-found", lambda: run(gone))


# The boundary, and contributions as the centre reads them


def contribution(**changes: Any) -> Contribution:
    values: dict[str, Any] = {
        "kind": "predictions", "domain": "food", "method": "distill", "tensors": {"probs": torch.ones(3, 2)},
        "rows": [{"id": "1"}, {"id": "2"}], "meta": {"wins": 3, "losses": 1},
    }  # fmt: skip
    return Contribution(**{**values, **changes})


@pytest.mark.parametrize(
    ("share", "changes"),
    [
        (Share(kinds=frozenset({"scores"})), {}),
        (PRESETS["internal"], {"rows": [{"id": "1", "text": "a secret"}]}),
        (PRESETS["internal"], {"rows": [{"id": "1", "label": "a secret"}]}),
        (PRESETS["private"], {}),
        (PRESETS["private"], {"kind": "weights"}),
        (PRESETS["private"], {"kind": "scores"}),
    ],
    ids=["kind", "text", "label", "no noise", "weights", "outcomes"],
)
def test_what_the_boundary_refuses_is_not_written(tmp_path: Path, share: Share, changes: dict[str, Any]) -> None:
    out = tmp_path / "sent"
    assert refused(BoundaryError, "not-shared", lambda: cross(contribution(**changes), share, out), "food")
    assert not out.exists()


def test_what_is_broken_does_not_cross(tmp_path: Path) -> None:
    out = tmp_path / "sent"
    broken = contribution(tensors={"probs": torch.tensor([1.0, float("nan")])})
    assert refused(IntegrityError, "not-finite", lambda: cross(broken, PRESETS["open"], out))
    odd = contribution(rows=[{"id": "1", "password": "x"}])
    assert refused(IntegrityError, "contribution-broken", lambda: cross(odd, PRESETS["open"], out), "password")
    assert not out.exists()


@pytest.fixture
def sent(tmp_path: Path) -> Path:
    """A sound contribution on disk."""
    cross(contribution(), PRESETS["open"], tmp_path / "sent")
    assert open_contribution(tmp_path / "sent").digest == contribution().digest
    return tmp_path / "sent"


def rewrite(sent: Path, **changes: Any) -> None:
    """Another header, with the hashes of the files as they are now."""
    header = json.loads((sent / "contribution.json").read_text())
    header["files"] = {name: hashlib.sha256((sent / name).read_bytes()).hexdigest() for name in header["files"]}
    (sent / "contribution.json").write_text(json.dumps({**header, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "viruses"},
        {"kind": ["weights"]},
        {"kind": None},
        {"files": None},
        {"files": {"../../secret.safetensors": "0"}},
        {"files": {"tensors.safetensors": "0" * 64}},
        {"files": {"rows.jsonl": "0" * 64}},
        {"files": {"/etc/passwd": "0"}},
        {"files": {"run.py": "0"}},
        {"domain": "../food"},
        {"domain": ""},
        {"domain": 3},
        {"meta": [1]},
        {"meta": {"wins": float("nan")}},
        {"meta": {"wins": 1000, "losses": 0}},
        {"epsilon": "none at all"},
    ],
    ids=str,
)
def test_hostile_header_of_a_contribution(sent: Path, changes: dict[str, Any]) -> None:
    rewrite(sent, **changes)
    assert refused(IntegrityError, "contribution-broken", lambda: open_contribution(sent))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "weights"}', "[" * 100_000], ids=len)
def test_broken_header_of_a_contribution(sent: Path, text: str) -> None:
    (sent / "contribution.json").write_text(text)
    assert refused(IntegrityError, "contribution-broken", lambda: open_contribution(sent))


def test_missing_parts_of_a_contribution(sent: Path, tmp_path: Path) -> None:
    assert refused(IntegrityError, "contribution-broken", lambda: open_contribution(tmp_path / "nothing"))
    (sent / "rows.jsonl").unlink()
    assert refused(IntegrityError, "contribution-broken", lambda: open_contribution(sent), "rows.jsonl")


def test_changed_tensors_of_a_contribution(sent: Path) -> None:
    path = sent / "tensors.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refused(IntegrityError, "contribution-broken", lambda: open_contribution(sent), "tensors.safetensors")
    rewrite(sent)  # even if its sender hashes them anew, they are not what was sent
    assert refused(IntegrityError, "contribution-broken", lambda: open_contribution(sent))
    save_file({"probs": torch.tensor([float("nan")])}, path)
    rewrite(sent)
    assert refused(IntegrityError, "not-finite", lambda: open_contribution(sent), "probs")
    path.write_bytes(whole[:-1])
    rewrite(sent)
    assert refused(IntegrityError, "checkpoint-broken", lambda: open_contribution(sent))


@pytest.mark.parametrize(
    "text",
    ['{"id": "1", "code": "x"}', '["id"]', "{", "3", "[" * 100_000, '{"id": NaN}', "\udcff"],
    ids=["unknown key", "list", "cut", "number", "deep", "nan", "bytes"],
)
def test_hostile_rows_of_a_contribution(sent: Path, text: str) -> None:
    (sent / "rows.jsonl").write_bytes((text + "\n").encode("utf-8", "surrogateescape"))
    rewrite(sent)
    assert refused(IntegrityError, "contribution-broken", lambda: open_contribution(sent))


def test_a_contribution_that_lacks_what_its_method_needs(incumbent: Model, context: Context, tmp_path: Path) -> None:
    empty = contribution(tensors={}, rows=[], meta={})
    assert refused(
        IntegrityError,
        "contribution-broken",
        lambda: method("distill", "feedback").absorb(incumbent, [empty], tmp_path / "new", context),
    )
    other = contribution(kind="weights")
    assert refused(
        FitError,
        "other-kind",
        lambda: method("distill", "feedback").absorb(incumbent, [other], tmp_path / "new", context),
    )
    assert not (tmp_path / "new").exists()


# The machine, and finished work


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = finished_round(tmp_path_factory)
    workspace = Path(shutil.copytree(done.workspace, tmp_path / "ws"))
    before, history = stages(workspace), (workspace / "history.jsonl").read_text()
    other = load_recipe(done.recipe, [f"workspace={workspace}", "feedback.train.epochs=1", "references=[]"])
    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        assert refused(RetryError, "disk-full", lambda: run(other), "free some space")
    assert stages(workspace) == before
    assert (workspace / "history.jsonl").read_text() == history
    record = run(other)
    assert {name.rpartition("-")[0] for name in stages(workspace) - before} >= {"distill", "evaluate-food"}
    assert record["verdict"]["checks"]


def test_a_full_disk_in_any_file(tmp_path: Path, opened: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from fanbu.model import copy_model

    workspace = Workspace(tmp_path / "ws")
    first = workspace.stage("one", "fanbu.types", {}, lambda out, _: write_text(out / "a", "1"))
    for place in ("fanbu.files.sync", "fanbu.ledger.sync", "pathlib.Path.mkdir", "pathlib.Path.write_text"):
        with monkeypatch.context() as patch:
            patch.setattr(place, full)
            two = partial(workspace.stage, place, "fanbu.types", {}, lambda out, _: write_text(out / "a", "2"))
            assert refused(RetryError, "disk-full", two)
            if place != "fanbu.ledger.sync":
                patch.setattr("fanbu.model.sync", full)
                assert refused(RetryError, "disk-full", lambda: copy_model(opened, tmp_path / "copy"))
                assert not (tmp_path / "copy").exists()
    assert workspace.stage("one", "fanbu.types", {}, lambda out, _: None).reused
    assert not workspace.stage("three", "fanbu.types", {}, lambda out, _: write_text(out / "a", "2")).reused
    assert first.path.exists()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM], ids=errno.errorcode.get)
def test_a_workspace_that_cannot_be_written(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise OSError(number, "not here", str(tmp_path))

    monkeypatch.setattr("pathlib.Path.mkdir", closed)
    assert refused(RetryError, "not-writable", lambda: Workspace(tmp_path / "ws"), str(tmp_path))


def test_a_workspace_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "ws").write_text("")
    assert refused(UsageError, "workspace", lambda: Workspace(tmp_path / "ws"), "ws")


def test_a_stage_that_was_changed_afterwards(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")

    def make() -> Path:
        return workspace.stage("one", "fanbu.types", {}, lambda out, _: write_text(out / "a", "1")).path

    made = make()
    (made / "a").write_text("2")
    assert refused(IntegrityError, "stage-changed", make, str(made / "a"))
    (made / "a").unlink()
    assert refused(IntegrityError, "stage-changed", make, str(made / "a"))
    (made / "stage.json").write_text("{")
    assert refused(IntegrityError, "stage-changed", make, str(made))
    shutil.rmtree(made)  # what the remedy says
    assert (make() / "a").read_text() == "1"


def test_a_failing_stage_leaves_the_finished_ones(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    workspace.stage("one", "fanbu.types", {}, lambda out, _: write_text(out / "a", "1"))

    def fail(out: Path, scratch: Path) -> None:
        write_text(out / "half", "1")
        write_text(scratch / "kept", "1")
        raise DataError("no-good", "no good", remedy="none")

    assert refused(DataError, "no-good", lambda: workspace.stage("two", "fanbu.types", {}, fail))
    assert len(stages(workspace.root)) == 1

    def again(out: Path, scratch: Path) -> None:
        assert not (out / "half").exists()
        assert (scratch / "kept").exists()
        write_text(out / "a", "2")

    assert not workspace.stage("two", "fanbu.types", {}, again).reused
    assert workspace.stage("one", "fanbu.types", {}, fail).reused
    assert not list((workspace.root / "partial").iterdir())
