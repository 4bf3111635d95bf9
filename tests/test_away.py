"""Owners who hold their rows elsewhere: the same champion, nothing but what crosses, rounds without some of them."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from conftest import TOPICS, tiny_recipe
from fanbu.contribution import TENSORS, open_contribution, write_contribution
from fanbu.errors import IntegrityError, RetryError, UsageError
from fanbu.generations import run
from fanbu.model import load_network, open_model
from fanbu.owner import answer
from fanbu.recipe import load_recipe, read_domains
from fanbu.transport.centre import Message
from fanbu.transport.parcel import Packing, Unpacking, away, card, inside, packed, taken_from, unpacked


@dataclass
class Near:
    """Owners with files and folders of their own, within this process; what is said passes through JSON."""

    owners: dict[str, tuple[Path, Path]]
    deaf: set[tuple[str, str]] = field(default_factory=set)  # a domain, and what its owner does not answer
    twist: Callable[[str, Message], Message] = lambda function, said: said
    asked: list[tuple[str, str]] = field(default_factory=list)
    sent: int = 0

    def greet(self, request: Message, names: Iterable[str], seconds: float) -> Iterator[tuple[str, Message]]:
        for name, (part, root) in self.owners.items():
            if (name, "greeting") not in self.deaf:
                yield from answer(plain(request), part, root).items()

    def ask(self, requests: Mapping[str, Message], seconds: float) -> Iterator[tuple[str, Message | str]]:
        for name, request in requests.items():
            function = request[0]["function"]
            self.asked.append((name, function))
            self.sent += sum(map(len, request[1].values()))
            if (name, function) in self.deaf:
                yield name, "it went away"
            else:
                yield name, self.twist(function, plain(answer(plain(request), *self.owners[name])[name]))


def plain(message: Message) -> Message:
    return json.loads(json.dumps(message[0])), dict(message[1])


def elsewhere(folder: Path, value: dict[str, Any] | None = None, **changes: Any) -> tuple[Path, Near]:
    """A centre's recipe without rows, and the owners of its domains; of the tiny one, or of another ``value``."""
    value = value or tiny_recipe(folder)
    owners = {}
    for name, spec in value["domains"].items():
        part = folder / "owners" / name / "part.yaml"
        part.parent.mkdir(parents=True)
        part.write_text(yaml.safe_dump({"domains": {name: spec}}))
        owners[name] = (part, folder / "owners" / name / "ws")
    value = {**value, "domains": {name: {} for name in owners}, "transport": {"kind": "flower"}, **changes}
    (folder / "centre.yaml").write_text(yaml.safe_dump(value))
    return folder / "centre.yaml", Near(owners)


TWICE = {"method": "scaffold", "times": 2, "train": {"epochs": 1, "batch_size": 8}}


@pytest.mark.parametrize(
    "ways",
    [{"rounds": 2}, pytest.param({"feedback": TWICE, "references": []}, marks=pytest.mark.slow)],
    ids=["distill", "scaffold"],
)
def test_the_same_champion_as_with_rows_at_the_centre(tmp_path: Path, ways: dict[str, Any]) -> None:
    recipe, line = elsewhere(tmp_path, **ways)
    there = run(load_recipe(recipe), line=line)
    here = {**yaml.safe_load((tmp_path / "recipe.yaml").read_text()), **ways}
    here["workspace"] = str(tmp_path / "here")
    (tmp_path / "here.yaml").write_text(yaml.safe_dump(here))
    local = run(load_recipe(tmp_path / "here.yaml"))
    assert there["champion"]["model"] == local["champion"]["model"]
    assert there["verdict"] == local["verdict"]
    assert there["missed"] == {}
    assert {d: r["crossed"] for d, r in there["domains"].items()}.keys() == local["domains"].keys()
    # running again asks for nothing but what owners are like
    line.asked.clear()
    assert run(load_recipe(recipe), line=line)["champion"] == there["champion"]
    assert line.asked == []


def test_nothing_crosses_but_what_the_boundary_lets_through(tmp_path: Path) -> None:
    recipe, line = elsewhere(tmp_path)
    for part, _ in line.owners.values():
        value = yaml.safe_load(part.read_text())
        for spec in value["domains"].values():
            spec["share"] = "internal"
        part.write_text(yaml.safe_dump(value))
    value = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump({**value, "probe": {"synthetic": 40}}))
    record = run(load_recipe(recipe), line=line)
    # each owner was sent the base as it is and opened, the incumbent, the candidate and a reference, once each
    assert line.sent < 2 * 5 * record["incumbent"]["bytes"] + 2**20
    root = Path(record["workspace"])
    own = [t for part, _ in line.owners.values() for load in read_domains(part).values() for t in load().every_text]
    assert own
    for path in root.rglob("*"):
        if path.is_file() and path.suffix in {".json", ".jsonl", ".yaml"}:
            text = path.read_text()
            assert not [t for t in own if t in text], path
    grown = [Path(d["specialist"]["path"]) for d in record["domains"].values()]
    assert len(grown) == 2
    for path in grown:
        assert not list(path.glob("*.safetensors"))
        model = open_model(path)
        assert model.parameters == record["incumbent"]["parameters"] - 3 * 17
        with pytest.raises(UsageError, match="stay with their owner"):
            load_network(model)
    assert not list((root / "owners").glob("*/*"))  # all that came was asked for


@pytest.mark.parametrize("function", ["contribute", "look"])
def test_a_round_goes_on_without_an_owner(tmp_path: Path, function: str) -> None:
    recipe, line = elsewhere(tmp_path, probe={"domains": False, "public": [public(tmp_path)]})
    line.deaf = {("rail", function)}
    record = run(load_recipe(recipe), line=line)
    assert list(record["domains"]) == ["food"]
    assert record["missed"] == {"rail": f"{function}: it went away"}
    assert any("rail took no part to the end" in w for w in record["warnings"])
    # what it contributed before is in the champion all the same
    assert set(record["champion"]["domains"]) == ({"food"} if function == "contribute" else {"food", "rail"})
    if function == "contribute":
        return
    # when it is back there is something new
    line.deaf = set()
    again = run(load_recipe(recipe), line=line)
    assert again["round"] == 2
    assert set(again["domains"]) == {"food", "rail"}


def public(folder: Path) -> dict[str, str]:
    lines = [
        {"text": f"{w} the {v} please"} for t in TOPICS.values() for ws in t.values() for w in ws.split() for v in "ab"
    ]
    (folder / "public.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {"path": str(folder / "public.jsonl")}


def test_too_few_owners_end_a_run_that_can_go_on(tmp_path: Path) -> None:
    recipe, line = elsewhere(tmp_path, transport={"kind": "flower", "quorum": 0.6})
    line.deaf = {("rail", "look")}
    with pytest.raises(RetryError, match="too few owners"):
        run(load_recipe(recipe), line=line)
    line.deaf, line.asked = set(), []
    record = run(load_recipe(recipe), line=line)
    assert set(record["domains"]) == {"food", "rail"}
    assert all(cost["reused"] for cost in record["costs"] if cost["stage"].startswith("shrink"))
    line.deaf = {("rail", "greeting")}  # who never came counts, too
    with pytest.raises(RetryError, match="too few owners"):
        run(load_recipe(recipe, ["rounds=2"]), line=line)
    line.deaf = {("food", "greeting"), ("rail", "greeting")}
    with pytest.raises(RetryError, match="no owner who feeds has answered"):
        run(load_recipe(recipe, ["rounds=2"]), line=line)


def garbage(function: str, said: Message) -> Message:
    """A contribution whose tensors are others than its header says."""
    body, files = said
    if function != "contribute":
        return said
    return body, {n: c[:-4] + b"\0\0\0\1" if n.endswith(TENSORS) else c for n, c in files.items()}


def foreign(function: str, said: Message) -> Message:
    """A file that no owner sends."""
    body, files = said
    return body, {**files, f"{body['stages'][0]}/model/model.safetensors": b"x"} if function == "bear" else files


@pytest.mark.parametrize("twist", [garbage, foreign])
def test_what_cannot_be_used_is_left_out(tmp_path: Path, twist: Callable[[str, Message], Message]) -> None:
    recipe, line = elsewhere(tmp_path)
    bad = {"rail"}
    line.twist = lambda function, said: twist(function, said) if f"-{min(bad)}-" in str(said[0]) else said
    record = run(load_recipe(recipe), line=line)
    assert list(record["domains"]) == ["food"]
    assert re.search("is missing or not what its header says|another name", record["missed"]["rail"])
    if twist is foreign:
        return
    line.twist = lambda function, said: said  # nothing of it stays
    again = run(load_recipe(recipe), line=line)
    assert (again["round"], set(again["domains"]), again["missed"]) == (2, {"food", "rail"}, {})


STEPS: dict[str, Any] = {
    "distill": {"method": "distill", "train": {"epochs": 1}},
    "fedavg": {"method": "fedavg", "train": {"epochs": 1}},
    "fedadam": {"method": "fedadam", "times": 2, "train": {"epochs": 1}},
    "means": {"method": "prototypes"},
}


@pytest.mark.parametrize("step", STEPS.values(), ids=list(STEPS))
def test_a_contribution_that_is_sound_and_does_not_fit_is_left_out(tmp_path: Path, step: dict[str, Any]) -> None:
    recipe, line = elsewhere(tmp_path, feedback=step)

    def misfit(function: str, said: Message) -> Message:
        body, files = said
        if function != "contribute" or "-rail-" not in str(body):
            return said
        under = f"{body['stages'][0]}/contribution/"
        came, sent = (Path(tempfile.mkdtemp(dir=tmp_path)) / name for name in ("came", "sent"))
        unpacked(taken_from(files, under), came, re.compile(".*"))
        c = open_contribution(came)
        write_contribution(replace(c, tensors={n: torch.cat([t, t], -1) for n, t in c.tensors.items()}), sent)
        return body, {**files, **packed(sent, [p.name for p in sent.iterdir()], under)}

    line.twist = misfit
    record = run(load_recipe(recipe), line=line)
    assert list(record["domains"]) == ["food"]
    assert re.match("absorb: ", record["missed"]["rail"])


def test_an_owner_who_lost_its_workspace_is_sent_what_it_lacks(tmp_path: Path) -> None:
    recipe, line = elsewhere(tmp_path)

    def lose(function: str, said: Message) -> Message:
        if function == "bear":
            shutil.rmtree(line.owners["rail"][1], ignore_errors=True)
        return said

    line.twist = lose
    record = run(load_recipe(recipe), line=line)
    assert ("rail", "contribute") in line.asked[line.asked.index(("rail", "contribute")) + 1 :]  # asked again
    # its specialist is gone for good, so it cannot go on in this round
    assert "rail" in record["missed"]


def test_a_run_needs_the_line_that_its_transport_names(tmp_path: Path) -> None:
    recipe, line = elsewhere(tmp_path)
    with pytest.raises(UsageError, match="serve-center"):
        run(load_recipe(recipe))
    with pytest.raises(UsageError, match="fanbu run"):
        run(load_recipe(tmp_path / "recipe.yaml"), line=line)


def work(line: Near, **changes: Any) -> dict[str, Any]:
    """What an owner says to a request for work."""
    recipe = {"fanbu": 1, "name": "x", "feedback": [{"method": "distill"}]}
    body = {"about": "work", "domain": "food", "round": 1, "recipe": recipe, "function": "look", "call": [], **changes}
    from fanbu.types import ProbeSet

    sha = ProbeSet().digest
    return answer(({**body, "probe": sha}, {f"probes/{sha}/rows.json": b"[]"}), *line.owners["food"])["food"][0]


def test_an_owner_does_only_what_owners_do(tmp_path: Path) -> None:
    _, line = elsewhere(tmp_path)
    assert "no owner does" in work(line, function="system")["error"]
    teacher = {"fanbu": 1, "name": "x", "feedback": [], "shrink": [{"method": "distill", "teacher": "/etc"}]}
    assert "names" in work(line, recipe={**teacher, "feedback": [{"method": "average"}]})["error"]
    hidden = {"method": "search", "budget": {"parameters": 0.5, "table": "/home/x"}}
    assert "names" in work(line, recipe={**teacher, "feedback": [{"method": "average"}], "shrink": [hidden]})["error"]
    assert "failed (AttributeError)" in work(line, call=[{"~": "path", "value": "x"}], function="held_out")["error"]
    assert "leads out" in work(line, call=[{"~": "path", "value": "../../x"}], function="held_out")["error"]
    assert (
        "no such domain" in answer(({"about": "work", "domain": "rail"}, {}), *line.owners["food"])["rail"][0]["error"]
    )


def test_an_owner_whose_rows_cannot_be_read_says_so(tmp_path: Path) -> None:
    recipe, line = elsewhere(tmp_path)
    part = line.owners["rail"][0]
    value = yaml.safe_load(part.read_text())
    value["domains"]["rail"]["train"] = "nowhere.jsonl"
    part.write_text(yaml.safe_dump(value))
    said = answer(({"about": "greeting", "round": 1}, {}), *line.owners["rail"])["rail"][0]
    assert "nowhere.jsonl" in said["error"]
    lines: list[str] = []
    with pytest.raises(RetryError, match="too few owners"):
        run(load_recipe(recipe, ["transport.quorum=1"]), log=lines.append, line=line)
    assert any("rail is missing" in text and "nowhere.jsonl" in text for text in lines)


@pytest.mark.parametrize("path", ["/etc/passwd", "../x", "a/../../b", "", "a\\b"])
def test_paths_stay_inside(path: str) -> None:
    with pytest.raises(IntegrityError):
        inside(path)


def test_files_are_written_only_under_names_that_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(IntegrityError, match="another name"):
        unpacked({"b.txt": b"1"}, tmp_path / "x", re.compile("a"))
    assert not (tmp_path / "x").exists()
    left = tmp_path / ".x.partial"  # of a process that was killed
    left.mkdir()
    (left / "old").write_text("old")
    unpacked({"a": b"1"}, tmp_path / "x", re.compile("a"))
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["a"]


def test_a_card_says_no_text_and_is_checked(tmp_path: Path) -> None:
    _, line = elsewhere(tmp_path)
    domain = read_domains(line.owners["food"][0])["food"]()
    told = card(domain)
    assert not [t for t in domain.every_text if t in json.dumps(told)]
    back = away(json.loads(json.dumps(told)))
    assert (back.digest, back.counts, back.full_labels, back.share) == (
        domain.digest, domain.counts, domain.full_labels, domain.share,
    )  # fmt: skip
    for key, wrong in {"name": "../x", "task": "x", "role": "x", "digest": "x", "counts": {}, "labels": [3]}.items():
        with pytest.raises(IntegrityError):
            away({**told, key: wrong})


def test_what_cannot_travel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot travel"):
        Packing(tmp_path).encoded(object())
    with pytest.raises(TypeError, match="cannot travel"):
        Packing(tmp_path).encoded({"~": 1})
    domain = away(card(read_domains(elsewhere(tmp_path)[1].owners["food"][0])["food"]()))
    back = Unpacking(tmp_path, domain, lambda sha: open_model(sha), lambda sha: Path(sha))
    assert back.decoded(Packing(tmp_path).encoded([domain, tmp_path / "a/b", {"x": [1, None]}])) == [
        domain, tmp_path / "a/b", {"x": [1, None]},
    ]  # fmt: skip
    with pytest.raises(IntegrityError):
        back.decoded({"~": "domain", "value": "rail"})
