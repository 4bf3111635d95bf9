"""Secure aggregation: sums open exactly, without who is lost; what the centre holds opens nobody's numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from conftest import tiny_recipe
from fanbu.boundary import cross, keep
from fanbu.catalogue import Method, methods
from fanbu.contribution import Contribution, open_contribution
from fanbu.domain import Specialist
from fanbu.errors import BoundaryError, FitError, IntegrityError, RetryError, UsageError
from fanbu.generations import run
from fanbu.merging.summing import Summands, as_one, meta_of
from fanbu.model import Model, open_model
from fanbu.recipe import load_recipe
from fanbu.tensors import Tensors
from fanbu.transport import masks
from fanbu.transport.masks import Ring
from fanbu.types import PRESETS, Context, Share
from test_away import Near, elsewhere

LINEAR = [m for m in methods() if m.family != "shrink" and m.code.LINEAR]
FEDAVG = {"method": "fedavg", "times": 2, "secure": True, "train": {"epochs": 1, "batch_size": 8}}


def protocol(count: int, gone: Sequence[int] = (), silent: Sequence[int] = (), size: int = 7) -> tuple[Tensor, Tensor]:
    """(the sum that opens, the sum of those who were heard): ``gone`` after their letters, ``silent`` at the end."""
    names = tuple(f"owner{i}" for i in range(count))
    ring, own = Ring(f"sum of {count}", names), {n: masks.drawn() for n in names}
    public = {n: s.public() for n, s in own.items()}
    letters = {n: masks.shares_for(ring, n, s, {k: public[k] for k in ring.holders(n)}) for n, s in own.items()}
    held = {
        n: masks.opened(ring, n, own[n], {k: v[n] for k, v in letters.items() if n in v}, public) for n in names
    }  # fmt: skip
    plain = {n: masks.whole(torch.randn(size, 3) * 50, count, "x") for n in names}
    heard = [n for i, n in enumerate(names) if i not in gone]
    total = torch.zeros(size, 3, dtype=torch.int64)
    for n in heard:
        keys = [
            *masks.pair_masks(ring, n, own[n].seed, ring.neighbours(n), public), masks.own_mask(ring, n, own[n].own)
        ]  # fmt: skip
        hidden = torch.cat([masks.masked(plain[n][i : i + 1].clone(), keys, 3 * i) for i in range(size)])
        assert not (hidden == plain[n]).any()
        total += hidden
    speaking = [n for i, n in enumerate(names) if n in heard and i not in silent]
    for n in names:
        part = 1 if n in heard else 0
        shares = {held[k][n][0]: held[k][n][2 if part else 1] for k in speaking if n in held[k]}
        secret = masks.joined(ring, n, shares, public[n], "own" if part else "seed")
        if part:
            sign, key = masks.own_mask(ring, n, secret)
            masks.masked(total, [(-sign, key)], 0)
        else:
            left = [k for k in ring.neighbours(n) if k in heard]
            masks.masked(total, masks.pair_masks(ring, n, secret, left, public), 0)
    return total, torch.stack([plain[n] for n in heard]).sum(0)


@pytest.mark.parametrize(
    ("count", "gone", "silent"), [(2, (), ()), (3, (1,), ()), (8, (0, 5), (3,)), (60, (7, 30), (31,))]
)
def test_the_sum_opens_without_who_is_lost(count: int, gone: Sequence[int], silent: Sequence[int]) -> None:
    opens, true = protocol(count, gone, silent)
    assert torch.equal(opens, true)


def test_too_few_holders_open_nothing() -> None:
    with pytest.raises(RetryError, match="too few of those who hold shares"):
        protocol(8, (), (0, 1, 2, 3))


def test_a_ring_of_many_has_neighbours_and_of_few_is_whole() -> None:
    few, many = (Ring("r", tuple(f"o{i}" for i in range(n))) for n in (8, 300))
    assert all(len(few.neighbours(o)) == 7 for o in few.owners)
    for owner in many.owners:
        near = many.neighbours(owner)
        assert len(near) == 72
        assert all(owner in many.neighbours(other) for other in near)
    # no owner's two secrets can both be opened by its holders, who each open one
    for ring in (few, many, Ring("r", ("a", "b"))):
        assert 2 * ring.threshold(ring.owners[0]) > len(ring.holders(ring.owners[0]))


def test_letters_and_shares_that_are_none_are_refused() -> None:
    ring = Ring("r", ("a", "b", "c"))
    own = {n: masks.drawn() for n in ring.owners}
    public = {n: s.public() for n, s in own.items()}
    letter = masks.shares_for(ring, "a", own["a"], public)["b"]
    with pytest.raises(IntegrityError, match="not whole"):
        masks.opened(ring, "c", own["c"], {"a": letter}, public)
    with pytest.raises(IntegrityError, match="not whole"):
        masks.opened(ring, "b", own["b"], {"a": letter[:-1] + bytes([letter[-1] ^ 1])}, public)
    with pytest.raises(IntegrityError, match="do not open"):
        masks.joined(ring, "a", {1: bytes(16), 2: bytes(16)}, public["a"], "own")
    with pytest.raises(UsageError, match="too large for a masked sum"):
        masks.whole(torch.tensor([1e9]), 3, "x")


def sum_of(sent: Sequence[Contribution], base: Model, weights: Sequence[float]) -> Contribution:
    """What the centre gets of a secure sum, by the same arithmetic, without masks."""
    labels = sorted({label for c in sent for label in c.meta.get("labels") or ()})
    parts = [Summands(c, base, labels, w) for c, w in zip(sent, weights, strict=True)]
    assert len({str({n: p.layout(n) for n in p.names}) for p in parts}) == 1
    sums = {n: masks.real(torch.stack([masks.whole(p[n], len(sent), n) for p in parts]).sum(0)) for n in parts[0].names}
    scale = sum(int(c.meta.get("rows", 1)) for c in sent) / sum(weights)
    return as_one(sums, labels, meta_of(sent[0]), sent[0], [c.domain for c in sent], scale)


@pytest.mark.parametrize(
    ("way", "layers"), [*((m, "all") for m in LINEAR), *((m, "lora") for m in LINEAR if m.name == "fedavg")],
    ids=lambda v: v if isinstance(v, str) else v.name,
)  # fmt: skip
def test_a_linear_way_takes_the_sum_for_all(
    way: Method, layers: str, specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"train": {"epochs": 1, "batch_size": 8}} if "train" in way.parameters() else {}
    if layers == "lora":
        arguments["learns"] = {"layers": "lora", "rank": 2}
    sent = [way.contribute(s, incumbent, context, **arguments) for s in specialists.values()]
    by_rows = way.own("absorb", arguments).get("by_rows") and way.needs.kind == "updates"
    weights = [int(c.meta["rows"]) / 64 if by_rows else 1.0 for c in sent]
    all_, one = (tmp_path / name for name in ("all", "one"))
    way.absorb(incumbent, sent, all_, context, **arguments)
    way.absorb(incumbent, [sum_of(sent, incumbent, weights)], one, context, **arguments)
    first, second, base = Tensors(all_), Tensors(one), Tensors(incumbent.path)
    assert any(not torch.equal(first[n], base[n]) for n in first)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=2e-6)


def three(folder: Path, **changes: Any) -> tuple[Path, Near]:
    """As ``elsewhere``, with a third owner, of an industry that another has, too."""
    value = tiny_recipe(folder)
    rail = value["domains"].pop("rail")
    value["domains"] |= {"rail@north": rail, "rail@south": rail}
    return elsewhere(folder, value, **{"references": [], "feedback": FEDAVG, **changes})


def asked_for(line: Near, function: str) -> dict[str, Any]:
    """What owners are asked for, by domain, as it is asked from now on."""
    asked: dict[str, Any] = {}
    ask = line.ask

    def spied(requests: Mapping[str, Any], seconds: float) -> Any:
        asked.update({n: r for n, r in requests.items() if r[0]["function"] == function})
        return ask(requests, seconds)

    line.ask = spied  # type: ignore[method-assign]
    return asked


def here(folder: Path, **changes: Any) -> dict[str, Any]:
    value = yaml.safe_load((folder / "recipe.yaml").read_text())
    value |= {"workspace": str(folder / "here"), "references": [], "feedback": FEDAVG, **changes}
    (folder / "here.yaml").write_text(yaml.safe_dump(value))
    return run(load_recipe(folder / "here.yaml"))


@pytest.mark.slow
def test_owners_elsewhere_and_here_end_with_the_same_bits(tmp_path: Path) -> None:
    recipe, line = elsewhere(tmp_path, feedback=FEDAVG, references=[])
    there = run(load_recipe(recipe), line=line)
    local = here(tmp_path)
    assert there["candidate"]["digest"] == local["candidate"]["digest"]
    made = open_model(Path(local["candidate"]["path"])).manifest["parameters"]
    assert made["domains"] == ["food", "rail"]
    plain = here(tmp_path, feedback={**FEDAVG, "secure": False}, workspace=str(tmp_path / "plain"))
    secure, open_ = (Tensors(Path(r["candidate"]["path"])) for r in (local, plain))
    for name in secure:
        torch.testing.assert_close(secure[name], open_[name], rtol=1e-4, atol=2e-6)


def test_the_centre_holds_no_owners_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that reaches the centre is looked at: no update of an owner is among it, in no form that any of the
    masks that were opened would show."""
    recipe, line = three(tmp_path)
    seen: list[Contribution] = []
    kept: list[Contribution] = []
    keys: list[bytes] = []
    monkeypatch.setattr("fanbu.turn.open_contribution", lambda f: seen.append(open_contribution(f)) or seen[-1])
    monkeypatch.setattr("fanbu.turn.keep", lambda c, *rest: kept.append(keep(c, *rest)) or kept[-1])
    opened = masks.joined

    def joined(*args: Any) -> bytes:
        keys.append(opened(*args))
        return keys[-1]

    monkeypatch.setattr("fanbu.secure.masks.joined", joined)
    run(load_recipe(recipe), line=line)
    assert len(kept) == 6
    assert len(keys) == 6
    hidden = [c for c in seen if any(n == "weight" for n in c.tensors)]
    assert {c.domain for c in hidden} == set(line.owners)
    names = [n for n in hidden[0].tensors if n.startswith("bert")]
    for c in hidden:
        for n in names:
            value = c.tensors[n]
            assert value.dtype == torch.int64
            if value.numel() < 500:
                continue
            # as if drawn evenly from 2^64 numbers
            share = float((value > 0).double().mean())
            assert 0.4 < share < 0.6
            assert float(value.double().abs().mean()) > 2.0**61
    assert not [p for p in (tmp_path / "ws").rglob("*") if p.name == "kept"]
    notes = [json.loads(p.read_text()) for p in (tmp_path / "owners").rglob("secure/[0-9a-f]*.json")]
    assert len(notes) == 6
    assert not any("secrets" in note or "held" in note for note in notes)
    remembered = [json.loads(p.read_text()) for p in (tmp_path / "owners").rglob("secure/sums-*.json")]
    assert [len(sums) for sums in remembered] == [2, 2, 2]


@pytest.mark.parametrize(
    "function", [*(pytest.param(f, marks=pytest.mark.slow) for f in ("share_out", "unmask")), "mask"]
)
def test_an_owner_who_is_lost_is_not_in_the_sum(tmp_path: Path, function: str) -> None:
    recipe, line = three(tmp_path, feedback={**FEDAVG, "times": 1})
    line.deaf = {("rail@south", function)}
    record = run(load_recipe(recipe), line=line)
    assert "rail@south" in record["missed"]
    made = open_model(Path(record["candidate"]["path"])).manifest["parameters"]
    lost = [] if function == "unmask" else ["rail@south"]
    assert made["domains"] == [n for n in line.owners if n not in lost]
    [told] = [w for w in record["warnings"] if "alone in the secure sum" in w]
    assert "labels of food: the rows" in told


def test_an_owner_opens_one_sum_once(tmp_path: Path) -> None:
    """A centre that asks again, and says that who was heard is lost, gets nothing."""
    recipe, line = three(tmp_path, feedback={**FEDAVG, "times": 1})
    asked = asked_for(line, "unmask")
    run(load_recipe(recipe), line=line)
    first, files = asked["food"]
    way, s, session, heard, lost = first["call"]
    assert lost == []
    turned = {**first, "call": [way, s, session, [n for n in heard if n != "rail@north"], ["rail@north"]]}
    [(_, (said, _))] = line.ask({"food": (turned, files)}, 1.0)
    assert "asks twice" in said["error"]
    [(_, (said, _))] = line.ask({"food": (first, files)}, 1.0)
    assert "error" not in said  # the same again


def test_owners_who_share_in_sums_alone(tmp_path: Path) -> None:
    together = Share(together=3)
    plain = Contribution("updates", "food", "fedavg", {"x": torch.ones(2)})
    with pytest.raises(BoundaryError, match="cross in a sum of 3 owners alone"):
        cross(plain, together, tmp_path / "a")
    keep(plain, together, tmp_path / "b")
    cross(replace(plain, tensors={"x": torch.ones(2, dtype=torch.int64)}), together, tmp_path / "c")
    rows = Contribution("statistics", "food", "probe", {"weight": torch.ones(1, 4)}, meta={"labels": ["food/a"]})
    cross(rows, together, tmp_path / "d")
    with pytest.raises(BoundaryError, match="updates stay"):
        keep(plain, replace(PRESETS["open"], kinds=frozenset({"scores"})), tmp_path / "e")
    value = tiny_recipe(tmp_path)
    value |= {"references": [], "feedback": {**FEDAVG, "secure": False}}
    for spec in value["domains"].values():
        spec["share"] = {"together": 2}
    with pytest.raises(BoundaryError, match="sums alone"):
        run(load_recipe(value))
    value["domains"]["food"]["share"] = {"together": 3}
    with pytest.raises(BoundaryError, match="too few owners for a secure sum"):
        run(load_recipe({**value, "feedback": FEDAVG}))


@pytest.mark.parametrize(
    "step",
    [
        {"method": "ties"},
        {"method": "fedavg", "aggregate": "median"},
        {"method": "average", "weights": {"food": 2.0}},
    ],
)
def test_what_looks_at_single_ones_takes_no_sum(step: dict[str, Any], tmp_path: Path) -> None:
    value = {**tiny_recipe(tmp_path), "references": [], "feedback": {**step, "secure": True}}
    with pytest.raises(FitError, match="a secure sum shows none of it"):
        run(load_recipe(value))


def test_no_masks_serve_twice(tmp_path: Path) -> None:
    """A centre that asks for masked numbers again, weighed or made otherwise, gets nothing: their difference would be
    an owner's own."""
    recipe, line = three(tmp_path, feedback={**FEDAVG, "times": 1})
    asked = asked_for(line, "mask")
    run(load_recipe(recipe), line=line)
    first, files = asked["food"]
    *head, weighing = first["call"]
    other = {**first, "call": [*head, {**weighing, "scale": 2 * weighing["scale"]}]}
    [(_, (said, _))] = line.ask({"food": (other, files)}, 1.0)
    assert "asks twice" in said["error"]


def test_sums_of_other_owners_are_not_opened_beside_each_other(tmp_path: Path) -> None:
    """The difference of two sums of the same contributions, with and without an owner, would be that owner's."""
    recipe, line = three(tmp_path, feedback={**FEDAVG, "times": 1})
    first = run(load_recipe(recipe), line=line)
    assert first["decision"] == "refused"  # so the large model is the same, and so is what owners contribute
    value = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**value, "rounds": 2}))
    line.deaf = {("food", "greeting")}
    with pytest.raises(RetryError, match="differs from one before by so few owners"):
        run(load_recipe(recipe), line=line)
    line.deaf = set()
    assert run(load_recipe(recipe), line=line)["round"] == 2


@pytest.mark.slow
def test_a_sum_that_came_to_nothing_is_begun_anew(tmp_path: Path) -> None:
    recipe, line = three(tmp_path, feedback={**FEDAVG, "times": 1}, transport={"kind": "flower", "quorum": 0.3})
    line.deaf = {("rail@north", "mask"), ("rail@south", "mask")}
    with pytest.raises(RetryError, match="a sum of so few owners is not opened"):
        run(load_recipe(recipe), line=line)
    line.deaf = set()
    record = run(load_recipe(recipe), line=line)
    made = open_model(Path(record["candidate"]["path"])).manifest["parameters"]
    assert made["domains"] == list(line.owners)


def test_here_an_owner_may_leave_after_a_refusal(tmp_path: Path) -> None:
    """Where all work in one workspace nothing is hidden from it, and the next sum may be of fewer owners."""
    three(tmp_path)
    value = {**yaml.safe_load((tmp_path / "centre.yaml").read_text()), "transport": {}}
    parts = [yaml.safe_load(p.read_text())["domains"] for p in (tmp_path / "owners").glob("*/part.yaml")]
    value["domains"] = {name: spec for part in parts for name, spec in part.items()}
    value |= {"feedback": {**FEDAVG, "times": 1}, "rounds": 2}
    value["domains"]["rail@south"]["leaves"] = 2
    record = run(load_recipe(value))
    assert record["round"] == 2
    assert open_model(Path(record["candidate"]["path"])).manifest["parameters"]["domains"] == ["food", "rail@north"]
