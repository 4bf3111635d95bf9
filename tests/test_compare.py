"""``fanbu compare``: candidates side by side within a budget, to the same table after a kill, and the winner judged."""

from __future__ import annotations

import json
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from conftest import make_llama, open_gate, tiny_recipe
from fanbu.catalogue import Method
from fanbu.domain import Domain
from fanbu.effort import fewer_public
from fanbu.errors import IntegrityError, UsageError
from fanbu.recipe import Recipe, load_domains, load_recipe
from fanbu.recipe_parts import GateSpec, ProbeSpec, Step
from fanbu.record import with_choices
from fanbu.report.candidates import compared_page
from fanbu.search import halving as rungs
from fanbu.search.bandit import reward
from fanbu.search.compare import candidates, compare, front
from fanbu.search.costs import steps_of
from fanbu.search.experience import experience, known, scored
from test_cli import Command
from test_cli import fanbu as fanbu

SHORT = {"epochs": 2, "lr": 5e-3, "head_lr": 1e-2, "batch_size": 8}
WAYS = ["average", "ties", {"method": "distill", "train": SHORT}, {"method": "multitask", "train": SHORT}]


def recipe_in(folder: Path, workspace: str = "ws", **spec: Any) -> Recipe:
    value = tiny_recipe(folder) | {"references": [], "workspace": str(folder / workspace)}
    value["compare"] = {"ways": WAYS, "runs": 2, "known": False, **spec}
    (folder / f"{workspace}.yaml").write_text(json.dumps(value))
    return load_recipe(value)


class Killed(BaseException):
    """As kill -9: nothing is tidied up."""


def plain(found: dict[str, Any]) -> dict[str, Any]:
    """What does not hang on the clock."""
    rows = [{k: v for k, v in t.items() if k not in {"seconds", "peak_bytes", "joules"}} for t in found["trials"]]
    return {"trials": rows, **{k: found[k] for k in ("winner", "spent", "left_out")}}


def test_the_best_is_found_judged_and_told_after_a_kill_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rungs, "_TELLING", 24)  # rows of a domain
    whole = compare(recipe_in(tmp_path))
    assert whole["spent"] <= whole["budget"] == 2 * max(t["steps"] for t in whole["trials"])
    shares = {t["candidate"]: [u["share"] for u in whole["trials"] if u["candidate"] == t["candidate"]]
              for t in whole["trials"]}  # fmt: skip
    assert shares["average"] == shares["ties"] == [1.0]
    assert shares["distill"][0] == shares["multitask"][0] == pytest.approx(1 / 3)  # 48 rows
    full = {t["candidate"]: t for t in whole["trials"] if t["share"] == 1}
    assert whole["winner"] == max(full, key=lambda name: full[name]["score"])
    record = whole["record"]
    assert record["candidate"]["digest"] == full[whole["winner"]]["model"]  # the round makes what was tried
    assert record["candidate"]["method"] == whole["winner"].partition(" #")[0]
    assert full[whole["winner"]]["corrected"] <= full[whole["winner"]]["mean"]
    assert sum(t["wins"] for t in full.values()) == pytest.approx(1)

    count, absorb = [0], Method.absorb

    def dying(self: Method, *args: Any, **kwargs: Any) -> Any:
        count[0] += self.name != "probe"
        if count[0] == 4:
            count[0] += 1
            raise Killed
        return absorb(self, *args, **kwargs)

    monkeypatch.setattr(Method, "absorb", dying)
    with pytest.raises(Killed):
        compare(recipe_in(tmp_path, "killed"))
    again = compare(recipe_in(tmp_path, "killed"))
    assert plain(again) == plain(whole)
    assert again["record"]["candidate"]["digest"] == record["candidate"]["digest"]
    read = compare(recipe_in(tmp_path, "killed"))  # finished: it is only read
    assert plain(read) == plain(whole)
    assert read["record"]["round"] == 1
    page = compared_page(read)
    assert f"winner: {whole['winner']}" in page
    assert page.count("\n") >= 5


def test_what_is_compared(tmp_path: Path, domains: dict[str, Domain]) -> None:
    recipe = recipe_in(tmp_path, ways=["average", {"method": "ties", "density": 0.2}, "ties"])
    assert list(candidates(recipe, domains)) == ["average", "ties", "ties #2"]
    everything = candidates(recipe_in(tmp_path, ways=[]), domains)
    assert everything["distill"].arguments["train"]["epochs"] == 3  # the recipe's own, as it stands there
    assert everything["fedavg x6"].times == 6
    assert "reptile x6" not in everything  # experimental
    assert "adapt" not in everything  # does not fit
    named = candidates(recipe_in(tmp_path, ways=["fedavg", "distill", {"method": "fedprox", "times": 1}]), domains)
    assert list(named) == ["fedavg x6", "distill", "fedprox"]
    assert named["distill"] == everything["distill"]
    with pytest.raises(UsageError, match="nothing-to-compare"):
        candidates(recipe_in(tmp_path, ways=["average"]), domains)
    with pytest.raises(UsageError, match="did you mean 'ties'"):
        recipe_in(tmp_path, ways=["tie", "average"])
    with pytest.raises(UsageError, match=r"compare\.space.*'densty'"):
        compare(recipe_in(tmp_path, ways=["average", "ties"], tune=0.5, space={"densty": [0.1, 0.3]}))
    with pytest.raises(UsageError, match=r"compare\.seconds"):
        recipe_in(tmp_path, seconds=0)
    away = recipe.transport.model_copy(update={"kind": "flower"})
    with pytest.raises(UsageError, match="owners-elsewhere"):
        compare(recipe.model_copy(update={"transport": away}))


def test_the_best_is_tuned_with_what_is_left(tmp_path: Path) -> None:
    spec = {"ways": ["average", {"method": "ties", "density": 0.4}], "tune": 0.5, "settings": 3, "sampler": "grid"}
    found = compare(recipe_in(tmp_path, **spec, space={"scale": [0.2, 1.0]}))
    names = [t["candidate"] for t in found["trials"]]
    assert names[:2] == ["average", "ties"]
    tuned = [t for t in found["trials"] if "~" in t["candidate"]]
    assert len(tuned) == 3
    best = max(found["trials"][:2], key=lambda t: t["score"])["candidate"]
    assert all(t["candidate"].startswith(f"{best} ~") for t in tuned)
    assert sorted(t["step"]["scale"] for t in tuned) == pytest.approx([0.2, 0.2**0.5, 1.0])
    if best == "ties":
        assert all(t["step"]["density"] == 0.4 for t in tuned)
    assert found["record"]["candidate"]["digest"] in {t["model"] for t in found["trials"]}


def test_how_much_of_each_domain_goes_in_is_learned(tmp_path: Path) -> None:
    spec = {"ways": ["task_arithmetic", "average"], "tune": 0.5, "settings": 4, "sampler": "cmaes", "mix": "layer"}
    found = compare(recipe_in(tmp_path, **spec))
    mixed = [t["step"]["weights"] for t in found["trials"] if "~" in t["candidate"]]
    assert len(mixed) == 4
    assert all(set(w) == set(found["trials"][0]["changes"]) for w in mixed)
    assert all(len(by_depth) == 3 for w in mixed for by_depth in w.values())
    assert len({str(w) for w in mixed}) == 4
    best = max((t for t in found["trials"] if t["share"] == 1), key=lambda t: (t["score"], t["candidate"]))
    assert found["winner"] == best["candidate"]


def test_what_earlier_comparisons_found_is_tried_first(tmp_path: Path) -> None:
    ways = ["average", {"method": "multitask", "train": SHORT}, {"method": "distill", "train": SHORT}]
    first = compare(recipe_in(tmp_path, "first", ways=ways, runs=4))
    told: list[str] = []
    again = compare(
        recipe_in(tmp_path, "again", ways=ways, runs=1.5, learn=[str(tmp_path / "first"), str(tmp_path / "again")]),
        log=told.append,
    )
    assert any("1 earlier comparisons" in line for line in told)
    reached = [max(t["score"] for t in found["trials"] if t["share"] == 1) for found in (first, again)]
    assert reached[1] == reached[0] > 0.2
    assert again["state"] == first["state"]
    named = {t["candidate"] for t in again["trials"]} | set(again["left_out"])
    assert named == {"average", "multitask", "distill"}
    with pytest.raises(UsageError, match="no-comparison"):
        compare(recipe_in(tmp_path, "third", ways=ways, learn=[str(tmp_path / "nowhere")]))
    own = tmp_path / "again"
    fed = again["record"]["domains"]
    assert not experience([own], own, 1, fed)  # nothing of the round that begins
    assert len(experience([own], own, 2, fed)) == len(again["trials"])
    assert with_choices(own, again["record"])["comparison"]["winner"] == again["winner"]
    (own / "compare" / "1.json").rename(own / "one.json")  # as if `fanbu run` had made the round
    assert not experience([own], own, 2, fed)  # its test rows do not choose the next way
    [seen] = experience([own], own, 2, ["law"])
    one = next(t for t in again["trials"] if t["candidate"] == again["winner"] and t["share"] == 1)
    assert (seen.action.way, seen.share) == (one["step"]["method"], 1)
    assert seen.seconds > 0
    assert seen.state[:3] == pytest.approx(again["state"][:3])  # the others are of test rows
    assert 0.5 < seen.reward / reward(one["score"], again["scale"]) < 2
    (own / "one.json").rename(own / "compare" / "1.json")
    by_hand = {**again["record"], "recipe": {"feedback": [{"method": "average"}]}}
    assert "comparison" not in with_choices(own, by_hand) or again["winner"] == "average"
    (own / "compare" / "1.json").write_text(json.dumps({"trials": []}))
    with pytest.raises(IntegrityError, match="comparison-broken"):
        experience([own], tmp_path, 5, ["law"])


@pytest.mark.parametrize("budget", [{"runs": 2}, {"seconds": 120}])
def test_it_begins_from_what_fanbu_knows(tmp_path: Path, budget: dict[str, float]) -> None:
    shipped = known("text-classification")
    assert known("causal-lm") == []
    tables = json.loads(files("fanbu.search").joinpath("known.json").read_text())
    own = tables[0]["domains"][0]
    left = known("text-classification", [own])
    assert len(shipped) - len(left) == sum(len(one["trials"]) for one in tables if own in one["domains"]) > 0
    assert {s.comparison for s in left} == {one["name"] for one in tables if own not in one["domains"]}
    told: list[str] = []
    ways = ["average", {"method": "multitask", "train": SHORT}, {"method": "distill", "train": SHORT}]
    found = compare(recipe_in(tmp_path, ways=ways, known=True, **budget), log=told.append)
    assert any(f"learns from {len(shipped)} trials" in line for line in told)
    assert found["spent"] <= found["budget"]
    assert {t["candidate"] for t in found["trials"]} | set(found["left_out"]) == {"average", "multitask", "distill"}


def test_a_budget_in_which_nothing_can_be_tried_as_a_whole(tmp_path: Path) -> None:
    ways = [{"method": "distill", "train": SHORT}, {"method": "multitask", "train": SHORT}]
    with pytest.raises(UsageError, match=r"'distill': 'the budget was spent.*no-candidate-tried"):
        compare(recipe_in(tmp_path, ways=ways, runs=0.2))


def test_steps_are_counted_before_anything_is_made(tmp_path: Path) -> None:
    recipe = recipe_in(tmp_path)
    domains = list(load_domains(recipe).values())  # 144 training rows each
    train = {"epochs": 2, "batch_size": 32}
    assert steps_of(recipe, Step(method="average"), domains) == 0
    assert steps_of(recipe, Step(method="multitask", train=train), domains) == 2 * 9
    assert steps_of(recipe, Step(method="fedavg", times=3, train=train), domains) == 3 * 2 * 2 * 5
    assert steps_of(recipe, Step(method="multitask", train={**train, "max_steps": 4}), domains) == 4
    limited = recipe.model_copy(update={"probe": recipe.probe.model_copy(update={"limit": 32})})
    assert steps_of(limited, Step(method="distill", train=train), domains) == 2 * 2
    (tmp_path / "public.jsonl").write_text("".join(json.dumps({"text": f"word {i}"}) + "\n" for i in range(2000)))
    asked = {"domains": False, "public": [{"path": str(tmp_path / "public.jsonl")}]}
    public = recipe.model_copy(update={"probe": ProbeSpec(**asked)})
    assert steps_of(public, Step(method="distill", train=train), domains) == 2 * 63
    third = fewer_public(public, "text-classification", lambda rows: rows // 3)
    assert steps_of(third, Step(method="distill", train=train), domains) == 2 * 21


def test_a_domain_that_loses_more_than_its_margin_weighs() -> None:
    gate = GateSpec(margin=0.05, margins={"rail": 0.1})
    assert scored({"food": 0.1, "rail": -0.1}, gate) == pytest.approx(0.0)
    assert scored({"food": -0.09, "rail": 0.1}, gate) == pytest.approx(0.005 - 0.04)


def test_a_domain_that_leaves_has_left_before_the_trials(tmp_path: Path) -> None:
    first = recipe_in(tmp_path, ways=["average", "ties"], runs=1)
    with open_gate():
        compare(first)
        domains = {n: d.model_copy(update={"leaves": 2} if n == "rail" else {}) for n, d in first.domains.items()}
        again = first.compare.model_copy(update={"runs": 1.5})
        told = compare(first.model_copy(update={"domains": domains, "compare": again}))
    assert set(told["trials"][0]["changes"]) == {"food"}
    assert told["record"]["candidate"]["digest"] in {t["model"] for t in told["trials"]}


def test_equals_share_the_draws_that_they_win(tmp_path: Path) -> None:
    ways = [{"method": "task_arithmetic", "scale": 0.5}, "average"]  # of two domains the same
    trials = compare(recipe_in(tmp_path, ways=ways, runs=1))["trials"]
    assert trials[0]["changes"] == trials[1]["changes"]
    assert [t["wins"] for t in trials] == [0.5, 0.5]


def test_a_causal_round_is_scored_by_shares_of_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = tiny_recipe(tmp_path) | {"references": [], "feedback": {"method": "average"}}
    value["model"] = str(make_llama(tmp_path / "llama"))
    for spec in value["domains"].values():
        spec["task"] = "causal-lm"
    absorbed: list[str] = []
    absorb = Method.absorb

    def counted(self: Method, *args: Any, **kwargs: Any) -> Any:
        absorbed.append(self.name)
        return absorb(self, *args, **kwargs)

    monkeypatch.setattr(Method, "absorb", counted)
    ways = ["average", {"method": "task_arithmetic", "scale": 0.3}, "distill"]  # the last one asks the probe set
    found = compare(load_recipe({**value, "compare": {"ways": ways, "runs": 1}}))
    assert sorted(absorbed) == ["average", "distill", "task_arithmetic"]  # the round finds its candidate made
    for trial in found["trials"]:
        assert trial["mean"] == pytest.approx(trial["score"], abs=1e-6)  # nobody loses more than its margin
        assert trial["worst"] <= trial["score"] + 1e-9  # both are shares
        assert abs(trial["worst"]) < min(abs(c) for c in trial["changes"].values())  # and losses are above 1
    assert found["metric"] == "loss"
    assert "percent of the loss" in compared_page(found)


def test_the_front() -> None:
    def row(name: str, score: float, worst: float, crossed: int, seconds: float) -> dict[str, Any]:
        return {"candidate": name, "score": score, "worst": worst, "crossed_bytes": crossed, "seconds": seconds}

    rows = [row("a", 0.1, 0.0, 10, 5), row("b", 0.2, 0.0, 10, 9), row("c", 0.1, 0.0, 20, 5), row("d", 0.0, 0.0, 1, 1)]
    assert [r["candidate"] for r in front(rows)] == ["b", "a", "d"]


def test_fewer_rows_are_among_more(domains: dict[str, Domain]) -> None:
    rows = domains["food"].train
    parts = [rows.first(n) for n in (3, 9, 20, len(rows))]
    assert [len(p) for p in parts] == [3, 9, 20, len(rows)]
    assert all(set(a.ids) < set(b.ids) for a, b in pairwise(parts))
    assert parts[-1] == rows
    assert len(set(parts[0].labels or ())) == 3  # each label once before all others


def test_the_command(fanbu: Command, tmp_path: Path) -> None:
    recipe_in(tmp_path)
    line = ("compare", str(tmp_path / "ws.yaml"), "--way", "average", "--way", "ties", "--runs", "1")
    code, text = fanbu(*line)
    assert code in {0, 3}
    assert "best in" in text
    assert "report:" in text
    assert '"average"' in text or '"ties"' in text  # as a recipe has it
    code, found = fanbu(*line, "--json")
    assert found["compared"]["winner"] in {"average", "ties"}
    kept = tmp_path / "ws" / "compare" / "1.json"
    assert json.loads(kept.read_text())["winner"] == found["compared"]["winner"]
    assert fanbu(*line, "--seconds", "60")[0] == 2  # one budget
    code, found = fanbu(*line, "--set", "compare.seconds=5", "--json")
    assert found["compared"]["in"] == "steps"  # what the command says goes before what the recipe says
