"""``fanbu plan``: which ways fit, what would make the others fit, what may be wrong, and what each takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_llama, tiny_recipe, write_domain
from fanbu.catalogue import method, methods
from fanbu.doctor.choices import choices, costs
from fanbu.doctor.overlap import overlaps, unhelpful
from fanbu.doctor.ways import ways
from fanbu.domain import Domain, Rows, Specialist
from fanbu.errors import FanbuError, UsageError
from fanbu.feeding import feed
from fanbu.ledger import Workspace
from fanbu.model import Model, open_model
from fanbu.probe_set import gather_probe
from fanbu.recipe import Recipe, load_domains, load_recipe
from fanbu.recipe_parts import Step
from fanbu.round import grow, raise_incumbent
from fanbu.search import costs as trials
from fanbu.turn import Turn
from test_cli import Command, error_of
from test_cli import fanbu as fanbu

BRIEF = {"epochs": 1, "max_steps": 1, "batch_size": 8}
SETUPS: dict[str, dict[str, Any]] = {
    "internal": {"share": "internal"},
    "no kinds": {"share": {"kinds": ["scores", "statistics"]}},
    "labels stay": {"share": {"labels": False}},
    "in sums alone": {"share": {"together": 2}},
    "cut in depth": {"shrink": [{"method": "depth", "layers": 1, "train": BRIEF}]},
    "a causal model": {"task": "causal-lm"},
    "a causal model that stays inside": {"task": "causal-lm", "share": "internal"},
}


def recipe_of(folder: Path, share: Any = "open", task: str = "text-classification", **changes: Any) -> Recipe:
    value = tiny_recipe(folder)
    value |= {"shrink": [{"method": "finetune", "train": BRIEF}], "references": [], **changes}
    value["feedback"] = {"method": "average"}
    for spec in value["domains"].values():
        spec |= {"share": share, "task": task}
    if task == "causal-lm":
        value["model"] = str(make_llama(folder / "llama"))
    return load_recipe(value)


def turn_of(recipe: Recipe, domains: dict[str, Domain]) -> Turn:
    """A round that nobody has planned."""
    base, root = open_model(recipe.model), Workspace(Path(recipe.workspace))
    turn = Turn(root, recipe, recipe.context(), domains, base, None, [], lambda text: None)
    turn.context = replace(turn.context, probe=gather_probe(turn))
    return turn


HEAVY = {"no kinds", "internal"}  # of which the plan refuses most


@pytest.mark.parametrize(
    "setup",
    [pytest.param(setup, id=name, marks=[pytest.mark.slow] * (name in HEAVY)) for name, setup in SETUPS.items()],
)
def test_each_refusal_is_one_of_the_method_itself(setup: dict[str, Any], tmp_path: Path) -> None:
    """What the plan refuses is tried nevertheless, in a round that was not planned: it ends with an error."""
    recipe = recipe_of(tmp_path, **setup)
    domains = load_domains(recipe)
    refused = [w for w in ways(recipe, domains) if not w["fits"]]
    assert refused
    turn = turn_of(recipe, domains)
    incumbent = raise_incumbent(turn)
    specialists = [Specialist(grow(turn, incumbent, d), d, incumbent) for d in turn.feeding]
    for way in refused:
        train = {"train": BRIEF} if "train" in method(way["name"], "feedback").parameters() else {}
        step = Step(method=way["name"], **train)
        refused_by_itself(turn, step, specialists, incumbent)


def refused_by_itself(turn: Turn, step: Step, specialists: list[Specialist], incumbent: Model) -> None:
    try:
        feed(turn, step, specialists, incumbent)
    except FanbuError:
        return
    pytest.fail(f"{step.method} works")


def test_what_would_make_a_way_fit(tmp_path: Path) -> None:
    def would(name: str, **setup: Any) -> str:
        recipe = recipe_of(tmp_path, **setup)
        return next(str(w["would"]) for w in ways(recipe, load_domains(recipe)) if w["name"] == name)

    assert would("distill") == ""
    assert would("distill", share="internal") == (
        "owners made texts up (probe.synthetic); or there were public texts (probe.public); or food, rail shared texts"
    )
    assert would("distill", probe={"domains": False}).startswith("owners' texts joined the probe set")
    assert "food, rail shared samples" in would("distill", share={"kinds": ["scores", "statistics", "predictions"],
                                                                  "texts": True})  # fmt: skip
    assert would("multitask", share="internal") == "food, rail shared texts, and food, rail shared labels"
    assert would("average", **SETUPS["cut in depth"]) == "specialists grew without depth"
    assert would("average", share={"kinds": ["scores", "statistics"]}) == "food, rail shared weights"
    assert would("average", share={"kinds": ["scores", "weights"]}) == "food, rail shared statistics"
    assert would("average", share={"together": 2}) == "it had secure: true"
    assert "were not private" in would("fedavg", share="private")  # the judge needs outcomes
    assert "unlabelled" in would("adapt")  # nothing that can be switched: what the error advises


def test_every_way_is_told_of_and_the_recipes_own_are_marked(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    found, domains = choices(recipe)
    assert {w["name"] for w in found["ways"]} == {m.name for m in methods() if m.family != "shrink"}
    assert [w["name"] for w in found["ways"] if w["chosen"]] == ["average"]
    assert set(domains) == {"food", "rail"}
    assert [w["name"] for w in choices(recipe, ["distill"])[0]["ways"]] == ["distill"]
    with pytest.raises(UsageError, match="did you mean 'distill'"):
        choices(recipe, ["distil"])
    with pytest.raises(UsageError, match="owners-elsewhere"):
        choices(recipe.model_copy(update={"transport": recipe.transport.model_copy(update={"kind": "flower"})}))


def rows(*pairs: tuple[str, int]) -> Rows:
    return Rows(tuple(map(str, range(len(pairs)))), tuple(t for t, _ in pairs), tuple(n for _, n in pairs))


def test_what_domains_have_in_common(domains: dict[str, Domain]) -> None:
    food = domains["food"]
    assert overlaps(list(domains.values())) == []
    twice = replace(food, train=rows(("A soup", 0), ("a  Soup", 1), ("bread", 1)))
    assert "1 training texts have several labels" in overlaps([twice])[0]
    other = replace(food, name="meals", train=rows(("a soup", 0), ("tea", 1)), labels=("Bread", "tea"))
    found = overlaps([replace(twice, train=rows(("a soup", 0), ("rye", 1))), other])
    assert any("50% of the smaller one's training texts" in w for w in found)
    assert any("1 labels have the same name (bread)" in w for w in found)
    assert not any("test texts" in w for w in found)
    seen = replace(other, train=rows((food.test.texts[0].upper(), 0), ("rye", 1)))
    assert any("1 test texts of food are training texts of meals" in w for w in overlaps([food, seen]))
    owners = [
        replace(food, name=f"food@{owner}", train=rows(("a soup", n), ("rye", n))) for n, owner in enumerate("ab")
    ]
    assert any("contradict each other in 2 training texts" in w for w in overlaps(owners))


def test_specialists_that_taught_nothing() -> None:
    def told(score: float, parent: float, digest: str, metric: str = "accuracy") -> dict[str, Any]:
        return {"metric": metric, "specialist": {"score": score, "digest": digest}, "parent": {"score": parent}}

    domains = {"a": told(0.9, 0.8, "x"), "b": told(0.8, 0.8, "y"), "c": told(2.0, 1.9, "y", "loss"), "g": {}}
    found = unhelpful({"round": 2, "domains": domains})
    assert [w[0] for w in found[:2]] == ["b", "c"]
    assert found[2].startswith("b, c: their specialists are one model")
    assert unhelpful(None) == []


def test_what_ways_take_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(tmp_path)
    domains = load_domains(recipe)
    found, _ = choices(recipe, ["average", "distill", "adapt"])
    first = dict(costs(recipe, domains, found))
    assert set(first) == {"average", "distill"}
    few = trials._few(replace(domains["food"], labels=tuple(map(str, range(30)))), 12)
    assert len(few.train) == 42  # with many labels there are rows of each
    assert first["average"]["crossed_bytes"] > 10 * first["distill"]["crossed_bytes"] > 0
    assert all(c["seconds"] > 0 and c["peak_bytes"] > 1e8 for c in first.values())
    assert not (Path(recipe.workspace) / "stages").exists()  # no trial is a part of a round
    kept = Path(recipe.workspace) / "costs"
    assert not [p for p in kept.rglob("*") if p.is_file() and p.stat().st_size > 4000]  # no model, no texts
    assert len([*(kept / "stages").iterdir()]) == 2

    def again(*_: Any) -> None:
        pytest.fail("tried again")

    monkeypatch.setattr(trials, "_apart", again)
    assert dict(costs(recipe, domains, found)) == first


def test_off_the_trials_to_all_rows() -> None:
    """f + p rows + t trained is found again; inner rounds are counted; peaks are no sums."""

    def took(work: trials.Work) -> trials.Cost:
        seconds = 2.0 + 0.01 * work.rows + 0.05 * work.trained
        return trials.Cost(seconds, 1e9 + 100 * work.rows, 10 * work.rows)

    works = [trials.Work(20, 20), trials.Work(60, 60), trials.Work(180, 180), trials.Work(180, 360)]
    whole = trials.Work(900, 2700)
    found = trials.of_all_rows(whole, [(w, took(w)) for w in works], Step(method="multitask"))
    assert found.seconds == pytest.approx(took(whole).seconds)
    assert found.crossed_bytes == pytest.approx(took(whole).crossed_bytes)
    assert found.peak_bytes == took(works[-1]).peak_bytes
    often = trials.of_all_rows(whole, [(w, took(w)) for w in works], Step(method="fedavg", times=6))
    assert often.seconds == pytest.approx(3 * found.seconds)
    assert often.peak_bytes == pytest.approx(found.peak_bytes)
    once = trials.of_all_rows(whole, [(works[1], took(works[1]))], Step(method="average"))
    assert vars(once) == vars(took(works[1]))
    untrained = [(w, took(w)) for w in (trials.Work(20, 0), trials.Work(60, 0))]
    assert trials.of_all_rows(trials.Work(900, 0), untrained, Step(method="probe")).seconds == pytest.approx(11.0)


def test_work_is_counted_as_far_as_training_goes(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path)
    domains = load_domains(recipe)  # 144 training rows each
    train = {"epochs": 3, "batch_size": 10}
    assert trials.Work.of(recipe, Step(method="average"), domains) == trials.Work(288, 0)
    assert trials.Work.of(recipe, Step(method="multitask", train=train), domains) == trials.Work(288, 864)
    capped = Step(method="multitask", train={**train, "max_steps": 5})
    assert trials.Work.of(recipe, capped, domains) == trials.Work(288, 50)
    assert trials.Work.of(recipe, Step(method="fedavg", train={**train, "max_steps": 5}), domains).trained == 100


def test_the_command(fanbu: Command, tmp_path: Path) -> None:
    value = tiny_recipe(tmp_path) | {"references": []}
    write_domain(tmp_path / "data", "food")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(value))
    code, text = fanbu("plan", str(path), "--no-costs")
    assert code == 0
    assert "*distill" in text
    assert "would fit if" in text
    code, found = fanbu("plan", str(path), "--way", "ties", "--no-costs", "--json")
    assert code == 0
    assert [w["name"] for w in found["ways"]] == ["ties"]
    error_of(fanbu("plan", str(path), "--way", "tie", "--json"), 2, "unknown-method")
