"""Ways back along a tree of industries: trees that are given or found, and what is made along them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from conftest import all_texts, rows, tiny_recipe, wordpiece, write_rows
from fanbu.errors import BoundaryError, FitError, UsageError
from fanbu.generations import run
from fanbu.hierarchy import _between
from fanbu.model import load_network, open_model
from fanbu.plan import check_plan
from fanbu.recipe import Recipe, load_domains, load_recipe
from fanbu.recipe_parts import Step
from fanbu.search.costs import steps_of
from fanbu.tree import Node, clustered, given, named
from fanbu.turn import start
from fanbu.types import PRESETS

SHORT = {"epochs": 1, "lr": 5e-3, "head_lr": 1e-2, "batch_size": 8}


def test_groups_of_a_recipe() -> None:
    groups = {"money": {"banks": ["a", "b"], "courts": ["c"]}, "care": ["d", "e"], "far": ["f"]}
    assert named(groups) == ["a", "b", "c", "d", "e", "f"]
    tree = given(groups, ["a", "b", "c", "d", "x"])
    assert tree.as_dict() == {
        "name": "all",
        "children": [
            {"name": "d"},  # alone in its group
            {
                "name": "money",
                "children": [{"name": "banks", "children": [{"name": "a"}, {"name": "b"}]}, {"name": "c"}],
            },
            {"name": "x"},  # in no group
        ],
    }  # fmt: skip
    assert tree.leaves == ["d", "a", "b", "c", "x"]
    assert given(groups, ["a", "b"]) == Node("all", (Node("a"), Node("b")))  # a group of all is the root
    assert given({"new": [2024, "a"]}, ["2024", "a", "b"]).leaves == ["b", "2024", "a"]
    for wrong, said in (({"a": "b"}, "group 'a'"), ({"a": []}, "group 'a'"), ({"a": ["x"], "b": ["x"]}, "several")):
        with pytest.raises(UsageError, match=said):
            named(wrong)


def test_what_is_alike_is_one_group() -> None:
    likeness = np.array([[1, 0.1, 0.9, 0, 0], [0.1, 1, 0, 0.8, 0.1], [0.9, 0, 1, 0.1, 0], [0, 0.8, 0.1, 1, 0],
                         [0, 0.1, 0, 0, 1.0]])  # fmt: skip
    tree = clustered(["a", "b", "c", "d", "e"], likeness)
    assert [c.name for c in tree.children] == ["a+c", "b+d", "e"]
    for flat in (np.eye(5), np.ones((5, 5))):
        assert not any(c.children for c in clustered(["a", "b", "c", "d", "e"], flat).children)
    alike = np.kron(np.eye(2), np.ones((5, 5)))
    names = [f"insurance.claims{i:02}@north-branch" for i in range(10)]
    assert [len(c.name) < 120 and len(c.leaves) for c in clustered(names, alike).children] == [5, 5]
    assert clustered(["a", "b"], likeness[:2, :2]) == Node("all", (Node("a"), Node("b")))


def renumbered(values: list[dict[str, str]], first: int) -> list[dict[str, str]]:
    """Texts that differ from others' in their words, and no more in their numbers than those of one domain do."""
    return [{**v, "text": f"{v['text'].rsplit(' ', 1)[0]} 0{first + i}"} for i, v in enumerate(values)]


def recipe_in(folder: Path, tree: dict[str, Any] | None, way: str = "average", **more: Any) -> Recipe:
    """Two domains of food and two of rail; the smallest has a few rows."""
    folder.mkdir(exist_ok=True)
    value = tiny_recipe(folder) | {"references": []}
    for name, like, seed in (("meal", "food", 70), ("tram", "rail", 80)):
        value["domains"][name] = {
            split: write_rows(folder / f"{name}.{split}.jsonl", renumbered(rows(like, count, seed + k), 500 + 100 * k))
            for k, (split, count) in enumerate({"train": 48, "valid": 18, "test": 36}.items())
        }
    step = {"method": way, **({"train": SHORT} if way in ("distill", "multitask") else {})}
    value["feedback"] = {**step, **more, **({"tree": tree} if tree else {})}
    return load_recipe(value)


def made(record: dict[str, Any]) -> dict[str, Any]:
    return dict(record["candidate"]["made"])


def tensors(record: dict[str, Any], who: str = "candidate") -> dict[str, torch.Tensor]:
    return dict(load_network(open_model(Path(record["workspace"]) / record[who]["path"])).state_dict())


def cosines(record: dict[str, Any]) -> np.ndarray[Any, Any]:
    """Of the task vectors of all specialists; label rows, which domains do not have in common, are no part of them."""
    root = Path(record["workspace"])
    base = {n: t for n, t in tensors(record, "incumbent").items() if "classifier" not in n}
    grown = [record["domains"][d]["specialist"]["path"] for d in sorted(record["domains"])]
    states = [load_network(open_model(root / path)).state_dict() for path in grown]
    flat = torch.stack([torch.cat([(s[n] - t).double().flatten() for n, t in base.items()]) for s in states])
    unit = torch.nn.functional.normalize(flat, dim=1)
    return np.asarray((unit @ unit.T).numpy())


GROUPS = {"eating": ["food", "meal"], "riding": ["rail", "tram"]}


SLOW = pytest.mark.slow


@pytest.mark.parametrize("by", ["texts", pytest.param("weights", marks=SLOW), pytest.param("answers", marks=SLOW)])
def test_groups_are_found(by: str, tmp_path: Path) -> None:
    record = run(recipe_in(tmp_path, {"by": by}))
    tree = made(record)["tree"]
    alike = np.array(tree["likeness"])
    assert tree["domains"] == ["food", "meal", "rail", "tram"]
    if by == "weights":
        np.testing.assert_allclose(alike, cosines(record), atol=1e-4)
    else:
        assert min(alike[0, 1], alike[2, 3]) > alike[:2, 2:].max()
    if by == "texts":
        assert [c["name"] for c in tree["children"]] == ["food+meal", "rail+tram"]


def test_pairs_of_pairs_are_averaged_as_all_four(tmp_path: Path) -> None:
    """Means of means of equal groups are the mean; what is made is told, and beside it what is made without a tree."""
    record = run(recipe_in(tmp_path, {"groups": GROUPS}))
    assert [c["name"] for c in made(record)["tree"]["children"]] == ["eating", "riding"]
    stages = [c["stage"] for c in record["costs"]]
    assert {"average tree eating", "average tree riding", "average tree"} <= set(stages)
    flat = run(recipe_in(tmp_path / "flat", None))
    rivals = {row["name"]: row for row in record["table"]}
    assert rivals["new: average tree"]["seconds"] > 0
    assert rivals["average without the tree"]["domains"] == next(
        row["domains"] for row in flat["table"] if row["role"] == "candidate"
    )
    whole, plain = tensors(record), tensors(flat)
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, plain[name], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("way", ["regmean", pytest.param("distill", marks=SLOW), pytest.param("ties", marks=SLOW)])
def test_ways_by_which_specialists_speak_go_along_a_tree(way: str, tmp_path: Path) -> None:
    record = run(recipe_in(tmp_path, {"groups": {"eating": ["food", "meal"]}}, way))
    assert [c["name"] for c in made(record)["tree"]["children"]] == ["eating", "rail", "tram"]
    assert record["candidate"]["method"] == f"{way} tree"
    flat = run(recipe_in(tmp_path / "flat", None, way))
    assert max(float((t - tensors(flat)[n]).abs().max()) for n, t in tensors(record).items()) > 1e-4


def test_drawn_towards_a_group_tied_weights_move_once(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=256, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    for name, seed in (("own", 1), ("group", 2)):
        torch.manual_seed(seed)
        GPT2LMHeadModel(config).save_pretrained(tmp_path / name)
        PreTrainedTokenizerFast(tokenizer_object=wordpiece(all_texts())._tokenizer).save_pretrained(tmp_path / name)
    own, group = (open_model(tmp_path / name) for name in ("own", "group"))
    turn = start(recipe_in(tmp_path / "turn", None))
    between = load_network(_between(turn, own, group, 30, 10, "own", None)).state_dict()
    a, b = (load_network(m).state_dict() for m in (own, group))
    for name, tensor in between.items():
        torch.testing.assert_close(tensor, 0.75 * a[name] + 0.25 * b[name], atol=1e-6, rtol=1e-5)


@SLOW
def test_members_are_drawn_towards_their_group(tmp_path: Path) -> None:
    """With more rows than all have by far, each member becomes its group's, and that the root's."""
    record = run(recipe_in(tmp_path, {"groups": GROUPS, "shrinkage": 1e9}))
    assert "shrinkage food" in [c["stage"] for c in record["costs"]]
    plain, free = tensors(run(recipe_in(tmp_path / "free", {"groups": GROUPS}))), tensors(record)
    for name, tensor in free.items():
        torch.testing.assert_close(tensor, plain[name], atol=1e-4, rtol=1e-3)
    some = run(recipe_in(tmp_path / "some", {"groups": GROUPS, "shrinkage": 50}))
    weights = {c["stage"]: c for c in some["costs"]}
    assert {f"shrinkage {d}" for d in ("eating", "riding", "food", "meal", "rail", "tram")} <= set(weights)


def test_steps_along_a_tree_are_counted(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path, None)
    domains = list(load_domains(recipe).values())  # 144, 144, 48 and 48 rows
    train = {"epochs": 1, "batch_size": 16}

    def steps(way: str, **tree: Any) -> int:
        return steps_of(recipe, Step(method=way, train=train, **({"tree": tree} if tree else {})), domains)

    whole = steps("distill")
    assert whole == 24
    assert steps("distill", groups=GROUPS) == 3 * whole
    assert steps("distill", groups=GROUPS, shrinkage=5) == 6 * whole
    assert steps("distill", by="texts") == 3 * whole  # two groups at most, and the root


def test_trees_that_cannot_be_followed(tmp_path: Path) -> None:
    def refused(tree: dict[str, Any], kind: type[Exception], said: str, **more: Any) -> None:
        recipe = recipe_in(tmp_path, tree).model_copy(update=more)
        with pytest.raises(kind, match=said):
            check_plan(recipe, load_domains(recipe))

    refused({"groups": {"a": ["food", "nobody"]}}, UsageError, "bad-tree")
    pruned = [Step(method="depth", layers=1)]
    refused({"by": "weights"}, FitError, "other-architecture", shrink=pruned)
    refused({"groups": GROUPS, "shrinkage": 5}, FitError, "other-architecture", shrink=pruned)
    for way in ("multitask", "fedavg"):
        refused({"groups": GROUPS}, FitError, "tree-ignored", feedback=[Step(method=way, tree={"groups": GROUPS})])
    four = recipe_in(tmp_path, None, "slerp")
    with pytest.raises(FitError, match="too-many"):  # no tree: a way that takes two specialists at most
        check_plan(four, load_domains(four))
    apart = {"groups": {}, "by": "texts"}
    recipe = recipe_in(tmp_path, apart)
    few = {n: replace(d, train=d.train.first(20), share=PRESETS["internal"]) for n, d in load_domains(recipe).items()}
    with pytest.raises(BoundaryError, match="mean over 32 texts"):
        check_plan(recipe, few)
    sums = {n: replace(d, share=replace(d.share, together=3)) for n, d in load_domains(recipe).items()}
    with pytest.raises(BoundaryError, match="in sums alone"):
        check_plan(recipe_in(tmp_path, apart, "distill"), sums)
    with pytest.raises(UsageError, match="give either groups or by"):
        recipe_in(tmp_path, {"groups": GROUPS, "by": "texts"})
    with pytest.raises(UsageError, match="leave secure"):
        recipe_in(tmp_path, {"groups": GROUPS}, secure=True)
