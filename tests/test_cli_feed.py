"""``fanbu feed`` without domains: merging what is one's own, keeping what was sent, and taking one away again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fanbu as public
from fanbu.contribution import open_contribution
from fanbu.domain import Specialist
from fanbu.errors import FitError, UsageError
from fanbu.model import Model, open_model, provenance, save_model
from fanbu.tensors import Tensors
from fanbu.types import Context
from test_cli import Command, error_of, fanbu, yaml_of_domains  # noqa: F401 - fixtures


@pytest.fixture
def given(specialists: dict[str, Specialist]) -> list[str]:
    return [f"--specialist={name}={s.model.path}" for name, s in specialists.items()]


def test_directories_are_merged(incumbent: Model, given: list[str], tmp_path: Path, fanbu: Command) -> None:  # noqa: F811
    more = ("--method", "ties", "--set", "density=0.5", "--dtype", "bfloat16", "--memory", "1 GB", "--json")
    code, told = fanbu("feed", incumbent.path, tmp_path / "new", *given, *more)
    made = open_model(tmp_path / "new")
    assert (code, told["digest"]) == (0, made.digest)
    assert made.manifest["method"] == "ties"
    assert made.manifest["parameters"]["density"] == 0.5
    assert {s.dtype for s in made.tensors.values()} <= {"BF16", "I64"}
    assert [p.name for p in tmp_path.iterdir()] == ["new"]  # nothing crossed


@pytest.mark.parametrize("store", ["exact", "int8", "1bit"])
def test_unmerging_is_never_having_merged(
    store: str, incumbent: Model, given: list[str], tmp_path: Path, fanbu: Command  # noqa: F811
) -> None:  # fmt: skip
    ways = ("--method", "task_arithmetic", "--set", "scale=0.4", "--set", f"store={store}", "--json")
    both, one = tmp_path / "both", tmp_path / "one"
    assert fanbu("feed", incumbent.path, both, *given, "--keep", *ways)[0] == 0
    assert fanbu("feed", incumbent.path, one, given[0], *ways)[0] == 0
    code, _ = fanbu("feed", incumbent.path, tmp_path / "less", "--unmerge", "rail", "--of", both, "--json")
    assert code == 0
    assert open_model(tmp_path / "less").files["model.safetensors"] == open_model(one).files["model.safetensors"]
    exact = sum(t.numel() * 4 for t in Tensors(incumbent.path).values() if t.is_floating_point())
    sizes = {"exact": 1.0, "int8": 0.6, "1bit": 0.5}  # tiny matrices: vectors and scales weigh much
    assert open_contribution(tmp_path / "both.food.contribution").bytes < sizes[store] * exact + 40_000


def test_what_cannot_be_unmerged(incumbent: Model, given: list[str], tmp_path: Path, fanbu: Command) -> None:  # noqa: F811
    new, out = tmp_path / "new", tmp_path / "out"
    assert fanbu("feed", incumbent.path, new, *given, "--json")[0] == 0
    again = ("feed", incumbent.path, out, "--of", new, "--json", "--unmerge")
    assert "rail" in error_of(fanbu(*again, "ral"), 2, "unmerge")["allowed"]
    assert "new.food.contribution" in error_of(fanbu(*again, "rail"), 5, "contribution-missing")["got"]
    error_of(fanbu("feed", new, out, "--of", new, "--unmerge", "rail", "--json"), 2, "unmerge")
    error_of(fanbu("feed", incumbent.path, out, "--unmerge", "rail", "--json"), 2, "flag")
    assert not out.exists()


def test_what_needs_domains_says_so(incumbent: Model, specialists: dict[str, Specialist], tmp_path: Path) -> None:
    folders = {name: s.model.path for name, s in specialists.items()}
    for name in ("distill", "regmean", "multitask"):
        with pytest.raises(FitError, match=rf"{name} needs more than weights.*ties.*remedy"):
            public.merge(incumbent, folders, tmp_path / "out", method_name=name)
    with pytest.raises(UsageError, match="no parameter 'densty'"):
        public.merge(incumbent, folders, tmp_path / "out", method_name="ties", densty=0.1)
    assert list(tmp_path.iterdir()) == []


def test_wrong_flags(incumbent: Model, given: list[str], tmp_path: Path, fanbu: Command) -> None:  # noqa: F811
    feed = ("feed", incumbent.path, tmp_path / "out", "--json")
    error_of(fanbu(*feed), 2, "flag")
    error_of(fanbu(*feed, *given, "--memory", "much"), 2, "flag")
    error_of(fanbu(*feed, *given, "--dtype", "int4"), 2, "dtype")
    error_of(fanbu(*feed, *given, "--judge"), 2, "flag")
    error_of(fanbu("feed", incumbent.path, *given, "--json"), 2, "flag")
    assert list(tmp_path.iterdir()) == []


def test_the_judge_decides(
    incumbent: Model, given: list[str], yaml_of_domains: Path, tmp_path: Path, fanbu: Command  # noqa: F811
) -> None:  # fmt: skip
    copy = f"--specialist=food={incumbent.path}"
    domains = ("--domains", yaml_of_domains, "--method", "average", "--judge")
    code, text = fanbu("feed", incumbent.path, tmp_path / "copy", copy, *domains)
    assert code == 3  # what did not move is no better
    assert "food" in text
    code, text = fanbu("feed", incumbent.path, tmp_path / "same", *given, *domains, "--set", "scale=0.0")
    assert code == (0 if "accepted: " in text else 3)  # the specialists' label rows may be better
    old, new = Tensors(incumbent.path), Tensors(tmp_path / "same")
    assert all(torch.equal(old[n], new[n]) for n in old if not n.startswith("classifier"))


def test_an_adapter_of_a_model_and_one_of_several(llama: Path, tmp_path: Path, fanbu: Command) -> None:  # noqa: F811
    base, folders = open_model(llama), []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        tensors = dict(Tensors(llama))
        for name in [n for n in tensors if n.endswith("q_proj.weight")]:
            b, a = (
                torch.randn(s, generator=generator) for s in ((tensors[name].shape[0], 2), (2, tensors[name].shape[1]))
            )
            tensors[name] = tensors[name] + b @ a * 0.01
        save_model(tmp_path / f"m{seed}", base.config, tensors, llama, provenance("test", [base], Context()))
        folders.append(tmp_path / f"a{seed}")
        code, told = fanbu("extract", tmp_path / f"m{seed}", llama, folders[-1], "--rank", "2", "--json")
        assert (code, told["matrices"]) == (0, 2)
        assert told["error"] < 1e-3
    error_of(fanbu("extract", tmp_path / "m1", llama, tmp_path / "x", "--json"), 2, "bad-parameter")
    pairs = [f"--specialist={folder.name}={folder}" for folder in folders]
    feed = ("feed", llama, tmp_path / "joined", *pairs, "--as-adapter", "--json")
    error_of(fanbu(*feed, "--method", "ties"), 2, "flag")
    error_of(fanbu(*feed, "--set", "density=0.1"), 2, "flag")
    assert fanbu(*feed, "--set", "scale=0.5")[0] == 0
    whole = ("--specialist", f"joined={tmp_path / 'joined'}", "--set", "scale=1.0", "--json")
    assert fanbu("feed", llama, tmp_path / "one", *whole)[0] == 0
    assert fanbu("feed", llama, tmp_path / "two", *pairs, "--set", "scale=0.5", "--json")[0] == 0
    one, two = Tensors(tmp_path / "one"), Tensors(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-5, atol=1e-6)


def test_a_domains_own_model_out_of_emr(
    incumbent: Model, given: list[str], specialists: dict[str, Specialist], tmp_path: Path, fanbu: Command  # noqa: F811
) -> None:  # fmt: skip
    assert fanbu("feed", incumbent.path, tmp_path / "shared", *given, "--method", "emr", "--json")[0] == 0
    again = ("feed", incumbent.path, tmp_path / "own", "--of", tmp_path / "shared", "--json", "--only")
    assert "food" in error_of(fanbu(*again, "sea"), 2, "only")["allowed"]
    assert fanbu(*again, "food")[0] == 0
    assert open_model(tmp_path / "own").labels == specialists["food"].model.labels
