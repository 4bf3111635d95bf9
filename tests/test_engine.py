"""The streaming engine: exact, bounded, the same whatever the machine, and whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.errors import FanbuError, FitError, IntegrityError, UsageError
from fanbu.merging.dials import Dial, level
from fanbu.merging.select import kth_largest
from fanbu.merging.task_vector import TaskVector
from fanbu.model import Model, open_model
from fanbu.tensors import INDEX, Shards, Tensors, chunks
from fanbu.types import Context


def variant(base: Path, folder: Path, seed: int, change: Callable[[str, Tensor], Tensor] | None = None) -> Path:
    """A copy of a checkpoint whose every number is a little different."""
    shutil.copytree(base, folder)
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        n: (t.float() + 0.01 * torch.randn(t.shape, generator=generator)).to(t.dtype)
        for n, t in load_file(folder / "model.safetensors").items()
    }
    if change:
        tensors = {n: change(n, t) for n, t in tensors.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def sent(base: Model, *folders: Path) -> list[Contribution]:
    return [
        Contribution("weights", f.name, "task_vector", TaskVector(open_model(f), base), meta={"labels": []})
        for f in folders
    ]


@pytest.fixture
def family(llama: Path, tmp_path: Path) -> tuple[Model, list[Contribution]]:
    base = open_model(llama)
    return base, sent(base, *(variant(llama, tmp_path / f"s{i}", i) for i in range(3)))


@pytest.mark.parametrize("name", ["average", "ties"])
def test_threads_and_chunks_change_no_bit(
    name: str, family: tuple[Model, list[Contribution]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, contributions = family
    one = method(name).absorb(base, contributions, tmp_path / "one", Context(threads=1))
    two = method(name).absorb(base, contributions, tmp_path / "two", Context(threads=4, memory=1))
    monkeypatch.setattr("fanbu.tensors.CHUNK", 200)
    small = method(name).absorb(base, contributions, tmp_path / "small", Context(threads=2))
    assert one.files == two.files == small.files


def test_average_in_float32_whatever_is_stored(llama: Path, tmp_path: Path) -> None:
    half = variant(llama, tmp_path / "base", 9, lambda _, t: t.to(torch.bfloat16))
    base = open_model(half)
    folders = [variant(half, tmp_path / f"s{i}", i) for i in range(3)]
    made = method("average").absorb(base, sent(base, *folders), tmp_path / "out", Context())
    wide = method("average").absorb(base, sent(base, *folders), tmp_path / "wide", Context(dtype="float32"))
    for name in Tensors(made.path):
        exact = torch.stack([Tensors(f)[name].double() for f in folders]).mean(0)
        assert Tensors(made.path)[name].dtype == torch.bfloat16
        torch.testing.assert_close(Tensors(wide.path)[name].double(), exact, rtol=1e-6, atol=1e-7)
        assert (Tensors(made.path)[name] != exact.to(torch.bfloat16)).float().mean() < 0.01
    assert wide.config["dtype"] == "float32"


def test_dtype_is_checked(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"dtype.*allowed.*float32.*got: int8"):
        method("average").absorb(*family, tmp_path / "out", Context(dtype="int8"))
    assert not (tmp_path / "out").exists()


def test_weights_and_dials(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    base, contributions = family
    made = method("task_arithmetic").absorb(
        base, contributions, tmp_path / "out", Context(), scale={"layers": [0.0, 1.0], "*": 0.5},
        weights={"s1": 2.0, "s2": {"mlp": 0.0, "*": 1.0}},
    )  # fmt: skip
    result, old = Tensors(made.path), Tensors(base.path)
    for name in old:
        scale = {"layers.0.": 0.0, "layers.1.": 1.0}.get(name[6:15], 0.5)
        w = [1.0, 2.0, 0.0 if "mlp" in name else 1.0]
        expected = old[name] + scale * sum(w[i] * c.tensors[name] for i, c in enumerate(contributions))
        torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("dial", "name", "value"),
    [
        (0.3, "x", 0.3), ([0.0, 1.0], "m.layers.2.w", 0.5), ([0.0, 1.0], "m.embed", 0.0), ([1.0], "m.layers.4.w", 1.0),
        ([0.0, 2.0, 0.0], "m.layers.2.w", 2.0), ({"mlp": [0.0, 4.0], "*": 1.0}, "m.layers.1.mlp.w", 1.0),
        ({"mlp": 2.0, "*": 1.0}, "m.layers.1.attn.w", 1.0),
    ],
)  # fmt: skip
def test_levels(dial: Dial, name: str, value: float) -> None:
    assert level(dial, name, 5) == pytest.approx(value)


def test_a_dial_that_says_nothing() -> None:
    with pytest.raises(UsageError, match=r"no pattern fits.*allowed: mlp.*remedy"):
        level({"mlp": 1.0}, "attn", 2)
    with pytest.raises(UsageError, match=r"gradient has no values"):
        level([], "attn", 2)


def pieces_of(x: Tensor) -> Callable[[int], Iterator[Sequence[Tensor]]]:
    def pieces(share: int) -> Iterator[Sequence[Tensor]]:
        for start, stop in chunks(tuple(x.shape)):
            yield [x[start : start + -(-(stop - start) // share)]]

    return pieces


@pytest.mark.parametrize("kind", ["normal", "few values", "zeros", "bfloat16", "ordered"])
@pytest.mark.parametrize("count", [1, 7, 300_000, 900_000])
def test_the_kth_largest_is_exact(kind: str, count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(count)
    x = {
        "normal": x, "few values": (3 * x).round(), "zeros": 0 * x, "bfloat16": x.bfloat16().float(),
        "ordered": torch.arange(count).float(),
    }[kind]  # fmt: skip
    ordered = x.sort(descending=True).values
    wanted = sorted({1, count, max(1, count // 2), max(1, count // 10)})
    found = kth_largest(pieces_of(x[:, None]), [(0, k) for k in [0, *wanted]], count)
    assert found == [float("inf"), *(float(ordered[k - 1]) for k in wanted)]


def test_ties_is_its_formula(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    base, contributions = family
    made = method("ties").absorb(base, contributions, tmp_path / "out", Context(), density=0.3, scale=0.7)
    for name, new in Tensors(made.path).items():
        deltas = torch.stack([c.tensors[name].double().flatten() for c in contributions])
        keep = int(0.3 * deltas.shape[1])
        limits = deltas.abs().sort(dim=1, descending=True).values[:, keep - 1 : keep]
        trimmed = torch.where(deltas.abs() >= limits, deltas, 0)
        sign = torch.where(trimmed.sum(0) >= 0, 1.0, -1.0)
        agrees = trimmed * sign > 0
        expected = 0.7 * (trimmed * agrees).sum(0) / agrees.sum(0).clamp(min=1)
        got = (new.double() - Tensors(base.path)[name].double()).flatten()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_ties_over_the_whole_model(family: tuple[Model, list[Contribution]], tmp_path: Path) -> None:
    base, contributions = family
    made = method("ties").absorb(base, contributions[:1], tmp_path / "out", Context(), density=0.25, scope="model")
    deltas = {n: contributions[0].tensors[n] for n in contributions[0].tensors}
    every = torch.cat([d.abs().flatten() for d in deltas.values()])
    limit = every.sort(descending=True).values[int(0.25 * every.numel()) - 1]
    for name, delta in deltas.items():
        kept = Tensors(made.path)[name] != Tensors(base.path)[name]
        assert (kept == (delta.abs() >= limit)).float().mean() > 0.99
    with pytest.raises(UsageError, match="one number with scope: model"):
        method("ties").absorb(base, contributions, tmp_path / "x", Context(), density=[0.1, 0.2], scope="model")


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (lambda t: t.pop("model.norm.weight"), "other-architecture"),
        (lambda t: t.update(more=torch.ones(2)), "other-architecture"),
        (lambda t: t.update({"model.norm.weight": torch.ones(3)}), "other-architecture"),
        (lambda t: t.update({"model.norm.weight": torch.ones(32).to(torch.int8)}), "other-architecture"),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), "not-finite"),
        (lambda t: t["model.norm.weight"].fill_(float("inf")), "not-finite"),
    ],
)
@pytest.mark.parametrize("name", ["average", "ties"])
def test_a_specialist_that_cannot_be_merged(
    name: str, damage: Callable[[dict[str, Tensor]], object], code: str, llama: Path, tmp_path: Path
) -> None:
    folder = variant(llama, tmp_path / "bad", 1)
    tensors = load_file(folder / "model.safetensors")
    damage(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    base = open_model(llama)
    with pytest.raises(FanbuError, match=rf"remedy.*\[{code}\]") as caught:
        method(name).absorb(base, sent(base, folder), tmp_path / "out", Context())
    assert isinstance(caught.value, FitError if code == "other-architecture" else IntegrityError)
    assert "model.norm.weight" in str(caught.value) or "more" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["bad"]


def test_shards_are_read_by_plain_transformers(
    family: tuple[Model, list[Contribution]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    base, contributions = family
    monkeypatch.setattr("fanbu.merging.engine.shard_bytes", lambda total: 20_000)
    many = method("average").absorb(base, contributions, tmp_path / "many", Context())
    monkeypatch.undo()
    one = method("average").absorb(base, contributions, tmp_path / "one", Context())
    assert (many.path / INDEX).exists()
    assert len(list(many.path.glob("*.safetensors"))) > 3
    open_model(many.path)
    networks = [AutoModelForCausalLM.from_pretrained(m.path).state_dict() for m in (many, one)]
    assert all(torch.equal(networks[0][n], networks[1][n]) for n in networks[1])


def test_shards_that_lack_rows(tmp_path: Path) -> None:
    shards = Shards(tmp_path, {"a": ((4, 2), torch.float32)})
    shards.put("a", 0, torch.ones(2, 2))
    with pytest.raises(IntegrityError, match="lacks 16 bytes"):
        shards.close()
    shards.put("a", 2, torch.ones(2, 2))
    assert shards.close().keys() == {"model.safetensors"}
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], torch.ones(4, 2))


KILLED = """
import sys
from pathlib import Path
import fanbu.tensors, os, time
from fanbu.catalogue import method
from fanbu.contribution import Contribution
from fanbu.merging.task_vector import TaskVector
from fanbu.model import open_model
from fanbu.types import Context
base = open_model(sys.argv[1])
sent = [Contribution("weights", "s", "task_vector", TaskVector(open_model(sys.argv[2]), base), meta={"labels": []})]
put = fanbu.tensors.Shards.put
def slow(self, *a):
    put(self, *a)
    print("written", flush=True)
    time.sleep(0.5)
if len(sys.argv) > 4:
    fanbu.tensors.Shards.put = slow
method("average").absorb(base, sent, Path(sys.argv[3]), Context(threads=1))
"""


def test_kill_9_leaves_no_half_model(llama: Path, tmp_path: Path) -> None:
    folder, out = variant(llama, tmp_path / "s", 1), tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(llama), str(folder), str(out)]
    process = subprocess.Popen([*command, "slowly"], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert len(list(tmp_path.glob(".out.*.partial"))) == 1
    subprocess.run(command, check=True, timeout=120)
    open_model(out)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "s"]


def test_the_files_of_inputs_are_no_memory_of_ours(tmp_path: Path) -> None:
    """A model of 200 MB is merged by a process that may have 100 MB more than it had before."""
    from transformers import LlamaConfig

    folder = tmp_path / "base"
    config = LlamaConfig(hidden_size=64, num_hidden_layers=1, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    save_file({"model.embed_tokens.weight": torch.ones(400_000, 128)}, folder / "model.safetensors")
    (folder / "tokenizer.json").write_text("{}")
    limited = (
        "import resource, torch, fanbu.heads, fanbu.merging.engine\n"
        "used = int([l for l in open('/proc/self/status') if l.startswith('VmData')][0].split()[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (used + 100 * 2**20,) * 2)\n"
    )
    command = [sys.executable, "-c", limited + KILLED, str(folder), str(folder), str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "out" / "fanbu.json").read_text())["method"] == "average"


def test_a_context_says_what_merged_tensors_are_stored_in(
    family: tuple[Model, list[Contribution]], tmp_path: Path
) -> None:
    made = method("average").absorb(*family, tmp_path / "out", replace(Context(), dtype="float16"))
    assert {s.dtype for s in made.tensors.values()} == {"F16"}
