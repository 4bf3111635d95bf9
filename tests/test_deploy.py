"""ONNX files answer as torch does, for every family and for pruned ones; runners give the same answers everywhere."""

from __future__ import annotations

import json
import math
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_llama
from fanbu.catalogue import method
from fanbu.deploy import to_onnx as onnx_files
from fanbu.deploy.latency import milliseconds
from fanbu.deploy.runner import answers_of, logits_of, milliseconds_of, open_runner
from fanbu.deploy.to_onnx import Numbers, export_network, in_factors, open_onnx, run_session, session, to_onnx
from fanbu.domain import Domain
from fanbu.errors import FanbuError, FitError, IntegrityError, UsageError
from fanbu.export import export
from fanbu.merging.permute import Symmetry
from fanbu.model import MANIFEST, Model, load_network, open_model, provenance, save_network
from fanbu.predict import class_logits
from fanbu.shrink._units import best, narrowed, units
from fanbu.types import Context
from test_cli import Command, error_of
from test_cli import fanbu as fanbu
from test_rebasin import CONTEXT, FAMILIES, make
from test_width import network_of

NUMBERS: list[Numbers] = ["int8", "int8-static", "int4"]


def inputs_for(network: Any, seed: int) -> dict[str, torch.Tensor]:
    """What the network reads, three rows, the second with padding."""
    generator, config = torch.Generator().manual_seed(seed), network.config
    if config.model_type in {"vit", "deit"}:
        return {"pixel_values": torch.randn(3, 3, config.image_size, config.image_size, generator=generator)}
    if config.model_type == "wav2vec2":
        return {"input_values": torch.randn(3, 800, generator=generator)}
    if config.model_type == "whisper":
        frames = 2 * config.max_source_positions
        return {"input_features": torch.randn(3, config.num_mel_bins, frames, generator=generator)}
    ids = torch.randint(3, 50, (3, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def random_cut(network: Any, model: Model, seed: int) -> Any:
    """Some units of every kind that can go, as many and as few as it happens."""
    numbers, keep = random.Random(seed), {}
    channels = network.config.model_type != "wav2vec2" and numbers.random() < 0.7
    found = units(network, model, channels=channels)
    generator = torch.Generator().manual_seed(seed)

    def some(s: Symmetry, group: int = 1) -> int:
        return numbers.randint(1, s.units // group) * group

    counts = {"neurons": some(found.of("neurons")[0]), "heads": some(found.of("heads")[0], found.of("heads")[0].group)}
    heads = found.of("heads")[0]
    if found.channels:
        whole = found.channels.units
        hidden = 4 * numbers.randint(1, whole // 4) if found.free_heads else counts["heads"] * (whole // heads.units)
        kept = torch.randperm(whole, generator=generator)[:hidden].sort().values
    for s in found.sets:
        if s.kind == "channels":
            keep[s.name] = kept
        elif s.kind == "neurons" or found.free_heads or channels:
            keep[s.name] = best(torch.rand(s.units, generator=generator), counts[s.kind], s.group)
    return narrowed(network, found, keep, model).eval()


def exported(network: Any, folder: Path, seed: int) -> None:
    """Exports and compares on inputs of other sizes."""
    given = inputs_for(network, seed)
    short = {k: v[:2, :7] if v.dtype == torch.long else v[:2] for k, v in given.items()}
    export_network(network, short, folder / "model.onnx")
    got = run_session(session(folder / "model.onnx"), given)
    with torch.no_grad():
        made = network(**given)
    known = made.logits if "logits" in made else made.last_hidden_state
    keep = given["attention_mask"].bool() if known.ndim == 3 and "attention_mask" in given else slice(None)
    torch.testing.assert_close(got[keep], known[keep], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_cuts_of_random_sizes_are_plain_checkpoints(family: str, seed: int, tmp_path: Path) -> None:
    numbers = random.Random(f"{family}{seed}")
    _, _, known = FAMILIES[family]
    name = "hidden_dim" if family == "DistilBert" else "intermediate_size"
    sizes = {name: numbers.choice([24, 40, 72])} if name in known else {}
    model = make(tmp_path / "model", family, **sizes)
    smaller = random_cut(network_of(model), model, seed)
    saved = save_network(smaller, model.path, tmp_path / "small", provenance("width", [model], CONTEXT))
    again, given = network_of(saved), inputs_for(smaller, seed)
    with torch.no_grad():
        for key, value in again(**given).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, smaller(**given)[key], rtol=1e-5, atol=1e-6)
    assert saved.parameters == sum(p.numel() for p in again.parameters()) <= model.parameters


FAST = ("ViT",)  # and Bert, which all other tests here export
SLOW = [pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES if f not in FAST]


@pytest.mark.parametrize("family", [*FAST, *SLOW])
def test_a_pruned_model_of_every_family_answers_the_same_in_onnx(family: str, tmp_path: Path) -> None:
    model = make(tmp_path / "model", family)
    smaller = random_cut(network_of(model), model, 5)
    exported(smaller, tmp_path, 7)
    assert str(Path(torch.__file__).parent).encode() not in (tmp_path / "model.onnx").read_bytes()


@pytest.fixture(scope="module")
def small(specialists: dict[str, Any]) -> Model:
    return specialists["food"].model


@pytest.fixture(scope="module")
def onnx_folder(small: Model, domains: dict[str, Domain], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("onnx") / "food"
    to_onnx(small, out, Context(max_length=32), domains["food"].train.texts)
    return out


def test_every_form_gives_the_same_answers(
    small: Model, onnx_folder: Path, domains: dict[str, Domain], context: Context
) -> None:
    texts = domains["food"].test.texts
    known = class_logits(load_network(small), open_runner(small.path, context).tokenizer, texts, context)
    for folder in (small.path, onnx_folder):
        torch.testing.assert_close(logits_of(open_runner(folder, context), texts, 5), known, rtol=1e-3, atol=1e-4)
    rounded = logits_of(open_runner(small.path, context, "int8"), texts)
    assert 0 < (rounded - known).abs().max() < 0.1 * known.abs().max()
    answers = answers_of(open_runner(onnx_folder, context), texts[:2])
    assert [a["label"] for a in answers] == [small.labels[i] for i in known[:2].argmax(1).tolist()]
    assert answers[0]["probability"] == pytest.approx(float(known[0].softmax(0).max()), abs=1e-4)
    assert 0 < milliseconds_of(open_runner(onnx_folder, context), texts, 4) < 10_000


@pytest.mark.parametrize("numbers", [n if n == "int8" else pytest.param(n, marks=pytest.mark.slow) for n in NUMBERS])
def test_smaller_numbers_are_smaller_files_and_agree(
    numbers: Numbers, small: Model, onnx_folder: Path, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    made = to_onnx(small, tmp_path / "q", context, domains["food"].train.texts, numbers)
    whole = open_onnx(onnx_folder)
    assert made.manifest["numbers"] == numbers
    assert made.manifest["verified"]["agreement"] >= 0.9
    assert sorted(p.name for p in made.path.glob("*.onnx*")) == ["model.onnx"]
    known = logits_of(open_runner(onnx_folder, context), domains["food"].test.texts)
    got = logits_of(open_runner(made.path, context), domains["food"].test.texts)
    assert 0 < (got - known).abs().max() < 0.3 * known.abs().max()  # rounded, and not by much
    assert made.bytes < 1.3 * whole.bytes  # so small a network is mostly names of nodes


@pytest.mark.slow
def test_an_export_that_answers_otherwise_is_refused(
    small: Model, domains: dict[str, Domain], context: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = onnx_files.run_session
    monkeypatch.setattr(onnx_files, "run_session", lambda *a: real(*a) + 0.05)
    with pytest.raises(IntegrityError, match="export-differs"):
        to_onnx(small, tmp_path / "q", context, domains["food"].train.texts[:8])
    assert not (tmp_path / "q").exists()
    monkeypatch.setattr(onnx_files, "run_session", lambda *a: real(*a) * float("nan"))
    with pytest.raises(IntegrityError, match="export-differs"):
        to_onnx(small, tmp_path / "q", context, domains["food"].train.texts[:8])


def test_what_torch_cannot_export_is_named(small: Model, tmp_path: Path) -> None:
    network = load_network(small)
    network.forward = lambda **given: [1 for _ in range(int(given["input_ids"].sum()))]
    with pytest.raises(FitError, match="no-onnx"):
        export_network(network, {"input_ids": torch.tensor([[3, 4]])}, tmp_path / "m.onnx")


def test_changed_onnx_files_are_not_run(onnx_folder: Path, context: Context, tmp_path: Path) -> None:
    for number, (code, change) in enumerate({
        "file-changed": lambda f: (f / "model.onnx").write_bytes((f / "model.onnx").read_bytes() + b"0"),
        "file-missing": lambda f: _rename(f, "../model.onnx"),
        "manifest-broken": lambda f: (f / MANIFEST).write_text(json.dumps({"files": {}})),
    }.items()):  # fmt: skip
        folder = tmp_path / str(number)
        shutil.copytree(onnx_folder, folder)
        change(folder)
        with pytest.raises(IntegrityError) as caught:
            open_runner(folder, context)
        assert caught.value.code == code


def _rename(folder: Path, name: str) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"]["model.onnx"]
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_a_causal_model_goes_on_the_same_in_onnx(tmp_path: Path, context: Context) -> None:
    causal = open_model(make_llama(tmp_path / "llama"))
    texts = ["soup with leek and", "the late train"]
    made = to_onnx(causal, tmp_path / "o", context, texts)
    known, got = (answers_of(open_runner(f, context), texts, tokens=5) for f in (causal.path, made.path))
    assert got == known
    assert [set(a) for a in got] == [{"text", "continuation"}] * 2


def test_the_commands(small: Model, domains: dict[str, Domain], tmp_path: Path, fanbu: Command) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(domains["food"].test.texts[:6]))
    code, told = fanbu("export", small.path, tmp_path / "o", "--to", "onnx-int8", "--texts", texts, "--json")
    assert code == 0
    assert told["bytes"] == (tmp_path / "o" / "model.onnx").stat().st_size
    assert told["texts"] == 6
    code, answer = fanbu("predict", tmp_path / "o", "broth and ladle")
    assert code == 0
    assert json.loads(answer)["label"] in small.labels
    code, copied = fanbu("export", small.path, tmp_path / "copy", "--json")
    assert (code, copied["digest"]) == (0, small.digest)
    error_of(fanbu("export", small.path, tmp_path / "x", "--domain", "food", "--json"), 2, "flag")
    error_of(fanbu("export", small.path, tmp_path / "x", "--to", "onnx-int8-static", "--json"), 2, "no-texts")
    error_of(fanbu("export", small.path, tmp_path / "x", "--texts", tmp_path / "no.txt", "--to", "onnx", "--json"), 4,
             "data-not-found")  # fmt: skip
    assert not (tmp_path / "x").exists()


def test_wrong_forms_are_named(onnx_folder: Path, small: Model, context: Context, tmp_path: Path) -> None:
    wrong: Any = "onnx-int2"
    for what in (
        lambda: open_runner(onnx_folder, context, "int8"),
        lambda: export(small.path, tmp_path / "x", to=wrong),
    ):
        with pytest.raises(UsageError) as caught:
            what()
        assert caught.value.code == "flag"
    with pytest.raises(FanbuError, match="no-texts"):
        to_onnx(small, tmp_path / "x", context, [])
    with pytest.raises(UsageError, match="no-texts"):
        milliseconds_of(open_runner(onnx_folder, context), ["one"], 2)


def test_a_time_is_for_one_text_and_the_least_of_three() -> None:
    waits = iter([0.0, 0.05, 0.02, 0.05])  # one pass to warm up
    batch = {"input_ids": torch.zeros(2, 3)}
    assert 10 <= milliseconds(lambda _: time.sleep(next(waits)), [batch]) < 24
    assert next(waits, None) is None


@pytest.mark.slow
def test_matrices_of_low_rank_become_two_thin_ones(
    small: Model, onnx_folder: Path, domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    low = method("lowrank").shrink(small, domains["food"], tmp_path / "l", context, share=0.3, train=None)
    made = to_onnx(low, tmp_path / "o", context, domains["food"].train.texts)
    assert made.manifest["verified"]["difference"] < 1e-4
    assert made.bytes < open_onnx(onnx_folder).bytes - 0.5 * 4 * sum(
        (1 - 0.3) * math.prod(load_network(low).get_parameter(n).shape) for n in low.manifest["parameters"]["ranks"]
    )
    network = load_network(small)
    assert in_factors(network, small) is network  # of others nothing changes
    assert not any(isinstance(m, torch.nn.Sequential) for m in network.modules())
