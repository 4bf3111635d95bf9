"""The laws that hold for every method; methods are found by themselves."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import probe_of
from fanbu.boundary import cross
from fanbu.catalogue import Method, method, methods
from fanbu.contribution import Contribution, open_contribution
from fanbu.domain import Domain, Specialist
from fanbu.errors import FanbuError, UsageError
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import class_logits
from fanbu.tensors import Tensors
from fanbu.types import KINDS, PRESETS, Context, Needs, Train

WAYS_BACK = [m for m in methods() if m.family != "shrink"]
WAYS_DOWN = [m for m in methods() if m.family == "shrink"]
# what needs a target is held to the same laws in test_adapt.py
CLASSIFYING = [m for m in WAYS_BACK if "text-classification" in m.needs.tasks and not m.needs.target]
FAST: dict[str, Any] = {"epochs": 1, "batch_size": 8}


def quick(way: Method) -> dict[str, Any]:
    """Arguments that keep training short."""
    return {"train": FAST} if "train" in way.parameters() else {}


def by_name(ways: list[Method]) -> Any:
    return pytest.mark.parametrize("way", ways, ids=[w.name for w in ways])


def sent_by(way: Method, specialists: dict[str, Specialist], base: Model, context: Context) -> list[Contribution]:
    return [way.contribute(s, base, context, **quick(way)) for s in specialists.values()]


@by_name(WAYS_BACK)
def test_declares_what_it_needs(way: Method) -> None:
    assert isinstance(way.needs, Needs)
    assert way.family in KINDS
    assert way.needs.kind == way.family
    assert isinstance(way.code.LINEAR, bool)
    assert way.code.SENSITIVITY is None or way.code.SENSITIVITY > 0
    if way.family == "weights":
        assert set(way.code.NEUTRAL) <= set(way.parameters())


@by_name(WAYS_DOWN)
def test_says_what_it_changes(way: Method) -> None:
    assert {"architecture", "tokenizer"} >= way.code.CHANGES


@by_name(WAYS_BACK + WAYS_DOWN)
def test_signature_is_a_schema(way: Method) -> None:
    assert way.summary
    assert len(way.parameters()) <= 8
    for function in way.functions:
        assert inspect.getdoc(function)
    for kind, default in way.parameters().values():
        assert kind is not inspect.Parameter.empty
        assert default is not inspect.Parameter.empty


@by_name(WAYS_BACK + WAYS_DOWN)
def test_bad_parameters_are_named(way: Method) -> None:
    with pytest.raises(UsageError, match=r"no parameter 'nonsense'.*allowed.*remedy"):
        way.check({"nonsense": 1})
    for name, (_, default) in way.parameters().items():
        wrong = {"epochs": "many"} if isinstance(default, Train) else object()
        with pytest.raises(UsageError, match=rf"{way.name}: {name}.*allowed.*remedy"):
            way.check({name: wrong})


@by_name(WAYS_BACK)
def test_no_contribution_gives_the_base_bit_for_bit(
    way: Method, incumbent: Model, context: Context, tmp_path: Path
) -> None:
    result = way.absorb(incumbent, [], tmp_path / "new", context)
    assert result.digest == incumbent.digest
    assert open_model(tmp_path / "new").files == incumbent.files


@by_name(CLASSIFYING)
def test_order_does_not_matter_and_the_seed_decides(
    way: Method, specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    sent = sent_by(way, specialists, incumbent, context)
    one = way.absorb(incumbent, sent, tmp_path / "one", context, **quick(way))
    two = way.absorb(incumbent, sent[::-1], tmp_path / "two", context, **quick(way))
    assert one.digest == two.digest
    assert one.digest != incumbent.digest


@by_name(CLASSIFYING)
def test_contributions_are_the_same_twice_and_survive_the_disk(
    way: Method, specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    specialist = specialists["food"]
    first = way.contribute(specialist, incumbent, context, **quick(way))
    again = way.contribute(specialist, incumbent, context, **quick(way))
    assert first.digest == again.digest
    written = cross(first, PRESETS["open"], tmp_path / "sent")
    read = open_contribution(tmp_path / "sent")
    assert read.digest == first.digest
    assert read.bytes == written.bytes > 0
    result = way.absorb(incumbent, [read], tmp_path / "a", context, **quick(way))
    assert result.digest == way.absorb(incumbent, [first], tmp_path / "b", context, **quick(way)).digest


@by_name(CLASSIFYING)
def test_leaving_is_never_having_joined(
    way: Method, specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    both = sent_by(way, specialists, incumbent, context)
    way.absorb(incumbent, both, tmp_path / "both", context, **quick(way))
    after = way.absorb(incumbent, both[:1], tmp_path / "after", context, **quick(way))
    alone = sent_by(way, {"food": specialists["food"]}, incumbent, context)
    assert after.digest == way.absorb(incumbent, alone, tmp_path / "alone", context, **quick(way)).digest


@by_name(CLASSIFYING)
def test_no_contribution_holds_what_its_needs_do_not_name(
    way: Method, specialists: dict[str, Specialist], incumbent: Model, context: Context
) -> None:
    for c in sent_by(way, specialists, incumbent, context):
        assert c.kind == way.needs.kind
        assert way.needs.texts or not any("text" in row for row in c.rows)
        assert way.needs.labels or not any("label" in row for row in c.rows)


@pytest.fixture(scope="module")
def unlearned(incumbent: Model, domains: dict[str, Domain], tmp_path_factory: pytest.TempPathFactory) -> Specialist:
    """A specialist after a single step."""
    context, train = Context(seed=5, device="cpu", precision="fp32", threads=1, max_length=16), {"max_steps": 1}
    folder = tmp_path_factory.mktemp("unlearned") / "food"
    made = method("finetune", "shrink").shrink(incumbent, domains["food"], folder, context, train=train)
    return Specialist(made, domains["food"], incumbent)


@by_name(CLASSIFYING)
def test_specialists_have_a_part_where_needs_say_so(
    way: Method, specialists: dict[str, Specialist], unlearned: Specialist, incumbent: Model, context: Context
) -> None:
    one, two = (way.contribute(s, incumbent, context, **quick(way)) for s in (specialists["food"], unlearned))
    assert (one.digest != two.digest) == way.needs.specialist


@by_name(CLASSIFYING)
def test_the_result_is_a_plain_checkpoint(
    way: Method, specialists: dict[str, Specialist], incumbent: Model, domains: dict[str, Domain], context: Context,
    tmp_path: Path,
) -> None:  # fmt: skip
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sent = sent_by(way, specialists, incumbent, context)
    result = way.absorb(incumbent, sent, tmp_path / "new", context, **quick(way))
    texts = list(domains["food"].test.texts)
    ours = class_logits(load_network(result), load_tokenizer(result), texts, context)
    tokenizer = AutoTokenizer.from_pretrained(result.path)
    network = AutoModelForSequenceClassification.from_pretrained(result.path).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.inference_mode():
        theirs = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert set(result.labels) == {label for d in domains.values() for label in d.full_labels}


@by_name([m for m in CLASSIFYING if m.needs.probe])
def test_another_probe_set_gives_another_result(
    way: Method, specialists: dict[str, Specialist], incumbent: Model, domains: dict[str, Domain], context: Context
) -> None:
    other = dataclasses.replace(context, probe=probe_of({"food": domains["food"]}))
    one = way.contribute(specialists["rail"], incumbent, context, **quick(way))
    assert one.digest != way.contribute(specialists["rail"], incumbent, other, **quick(way)).digest
    empty = dataclasses.replace(context, probe=dataclasses.replace(context.probe, rows=()))
    with pytest.raises(FanbuError, match="probe set"):
        way.contribute(specialists["rail"], incumbent, empty, **quick(way))


@by_name([m for m in WAYS_BACK if m.family == "weights"])
def test_one_full_weight_contribution_is_the_specialist(
    way: Method, specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    specialist = specialists["food"]
    sent = way.contribute(specialist, incumbent, context)
    result = way.absorb(incumbent, [sent], tmp_path / "new", context, **way.code.NEUTRAL)
    own, new = Tensors(specialist.model.path), Tensors(result.path)
    for name in own:
        if name.startswith("classifier."):
            rows = [result.labels.index(label) for label in specialist.model.labels]
            torch.testing.assert_close(new[name][rows], own[name], rtol=0, atol=0)
        else:
            torch.testing.assert_close(new[name], own[name], rtol=1e-5, atol=1e-6)


@by_name([m for m in WAYS_BACK if "causal-lm" in m.needs.tasks])
def test_causal_models_too(
    way: Method, llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    base = open_model(llama)
    grown = {
        name: Specialist(
            method("finetune").shrink(base, d, tmp_path / name, context, train={**FAST, "lr": 3e-3}), d, base
        )
        for name, d in texts.items()
    }
    sent = sent_by(way, grown, base, context)
    assert way.needs.labels is False or not any("label" in row for c in sent for row in c.rows)
    one = way.absorb(base, sent, tmp_path / "one", context, **quick(way))
    two = way.absorb(base, sent[::-1], tmp_path / "two", context, **quick(way))
    assert one.digest == two.digest != base.digest
    assert set(one.tensors) == set(base.tensors)
    mixed = dataclasses.replace(context, precision="bf16")
    assert way.absorb(base, sent, tmp_path / "bf16", mixed, **quick(way)).digest != base.digest


@by_name(WAYS_DOWN)
def test_a_way_down_makes_a_plain_specialist(
    way: Method, incumbent: Model, specialists: dict[str, Specialist], domains: dict[str, Domain], context: Context,
    tmp_path: Path,
) -> None:  # fmt: skip
    needed: dict[str, dict[str, Any]] = {"depth": {"layers": 2}, "search": {"budget": {"parameters": 0.6}, "trials": 3}}
    arguments = {**quick(way), **needed.get(way.name, {})}
    context = dataclasses.replace(context, forebears=(specialists["food"].model.path,))
    made = way.shrink(incumbent, domains["food"], tmp_path / "one", context, **arguments)
    again = way.shrink(incumbent, domains["food"], tmp_path / "two", context, **arguments)
    assert made.digest == again.digest
    assert made.labels == domains["food"].full_labels
    body = [{n: spec.shape for n, spec in m.tensors.items() if "classifier" not in n} for m in (made, incumbent)]
    assert ("architecture" in way.code.CHANGES) == (body[0] != body[1])
    open_model(made.path)
    taught = [specialists["food"].model.digest] if "teacher" in way.parameters() else []
    assert made.manifest["parents"] == [incumbent.digest, *taught]
