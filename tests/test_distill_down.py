"""Distillation downwards: chunked losses are exact, a small student comes closer to its teacher, chains find theirs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn import functional

from conftest import tiny_recipe
from fanbu import losses
from fanbu.api import run
from fanbu.catalogue import method
from fanbu.domain import Domain, Specialist
from fanbu.errors import FanbuError, FitError, UsageError
from fanbu.heads import final_layer
from fanbu.losses import Divergence, chunked_divergence, divergence
from fanbu.model import Model, load_network, load_tokenizer, open_model, provenance, save_network
from fanbu.objectives import taught_tokens
from fanbu.predict import class_logits, token_losses, validation_value
from fanbu.shrink._tune import open_for
from fanbu.types import Context

DISTILL = method("distill", "shrink")
KINDS: list[Divergence] = ["forward", "reverse", "js"]


def by_hand(teacher: torch.Tensor, student: torch.Tensor, kind: str, t: float) -> torch.Tensor:
    """The definitions in float64, written out."""
    p, q = ((z.double() / t).softmax(-1) for z in (teacher, student))
    kl = lambda a, b: (a * (a / b).log()).sum(-1)  # noqa: E731
    m = (p + q) / 2
    found = {"forward": kl(p, q), "reverse": kl(q, p), "js": (kl(p, m) + kl(q, m)) / 2}[kind]
    return t**2 * found.mean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("t", [1.0, 3.0])
def test_divergences_are_what_they_are_defined_as(kind: Divergence, t: float) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(7, 5) * 3, torch.randn(7, 5) * 3
    torch.testing.assert_close(divergence(teacher, student, kind, t).double(), by_hand(teacher, student, kind, t))
    assert float(divergence(teacher, teacher, kind, t)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("labels", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_chunks_give_the_loss_and_gradients_of_the_whole(kind: Divergence, labels: float, bias: bool) -> None:
    torch.manual_seed(1)
    tokens, vocabulary = 2 * losses._TOKENS + 7, 3000  # three chunks, the last one shorter
    teacher, head = torch.randn(tokens, 12), torch.nn.Linear(12, vocabulary, bias=False)
    student = torch.randn(tokens, 8, requires_grad=True)
    own, truth = torch.nn.Linear(8, vocabulary, bias=bias), torch.randint(0, vocabulary, (tokens,))
    watched = [student, *own.parameters()]

    z = own(student)
    whole = (1 - labels) * divergence(head(teacher).detach(), z, kind, 2.0) + labels * functional.cross_entropy(
        z, truth
    )
    want = torch.autograd.grad(3 * whole, watched)
    parts = chunked_divergence(teacher, both(head), student, both(own), kind, 2.0, truth, labels)
    got = torch.autograd.grad(3 * parts, watched)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(b.abs().max()) + 1e-9)


def test_vocabularies_must_be_the_same() -> None:
    with pytest.raises(ValueError, match="50 and 60"):
        chunked_divergence(
            torch.randn(3, 4), both(torch.nn.Linear(4, 50)), torch.randn(3, 4), both(torch.nn.Linear(4, 60))
        )


def both(layer: torch.nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return layer.weight, layer.bias


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_rounds_no_more_than_the_logits(kind: Divergence) -> None:
    torch.manual_seed(2)
    teacher, head, own = torch.randn(20, 12), torch.nn.Linear(12, 500), torch.nn.Linear(8, 500)
    student = torch.randn(20, 8)

    def gradient(low: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = chunked_divergence(teacher, both(head), student, both(own), kind)
        return loss, torch.autograd.grad(loss, own.weight)[0]

    with torch.autocast("cpu", torch.bfloat16):
        z = [layer(x).float() for layer, x in ((head, teacher), (own, student))]
    torch.testing.assert_close(gradient(True)[0], divergence(z[0], z[1], kind), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(True)[1], gradient(False)[1], rtol=0.1, atol=2e-2 * float(own.weight.std()))


def narrow(specialist: Specialist, out: Path, context: Context) -> Model:
    """A small student that has forgotten most of what it knew."""
    cut = method("width").shrink(
        specialist.model, specialist.domain, out.with_name("cut"), context, neurons=0.25, channels=0.5, train=None
    )
    network = load_network(cut)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.5 * p.std() * torch.randn_like(p) if p.ndim > 1 else 0)
    return save_network(network, load_tokenizer(cut), out, provenance("width", [specialist.model], context))


def off(student: Model, teacher: Model, texts: list[str], context: Context) -> float:
    a, b = (class_logits(load_network(m), load_tokenizer(m), texts, context) for m in (teacher, student))
    return float(divergence(a, b))


@pytest.mark.parametrize(
    "settings", [{}, {"divergence": "js", "labels": 0.5}, {"hidden": 0.0, "divergence": "reverse"}]
)
def test_a_student_comes_closer_to_its_teacher(
    settings: dict[str, Any], specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    s = specialists["food"]
    small, texts = narrow(s, tmp_path / "small", context), s.domain.test.texts
    train = {"epochs": 12, "lr": 3e-3, "head_lr": 1e-2, "batch_size": 8}
    made = DISTILL.shrink(
        small, s.domain, tmp_path / "taught", replace(context, forebears=(s.model.path,)), train=train, **settings
    )
    assert off(made, s.model, texts, context) < 0.8 * off(small, s.model, texts, context)
    assert made.parameters == small.parameters
    assert {n: t.shape for n, t in made.tensors.items()} == {n: t.shape for n, t in small.tensors.items()}
    assert made.manifest["parents"] == [small.digest, s.model.digest]


def test_the_map_is_not_saved_and_the_head_learns_at_its_own_rate(
    specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    s = specialists["food"]
    small = narrow(s, tmp_path / "small", context)
    still = {"epochs": 1, "lr": 0.0, "head_lr": 1e-2, "batch_size": 8, "weight_decay": 0.0}
    made = DISTILL.shrink(small, s.domain, tmp_path / "taught", context, teacher=str(s.model.path), train=still)
    before, after = load_network(small), load_network(made)
    changed = {n for n, p in after.state_dict().items() if not torch.equal(p, before.state_dict()[n])}
    assert changed == {f"classifier.{n}" for n, _ in final_layer(after).named_parameters()}


def test_the_best_forebear_teaches(
    specialists: dict[str, Specialist], incumbent: Model, context: Context, tmp_path: Path
) -> None:
    s = specialists["rail"]
    small = narrow(s, tmp_path / "small", context)
    short = {"epochs": 1, "batch_size": 8}
    values = {
        m.digest: validation_value(*open_for(m, s.domain, context), s.domain, context) for m in (incumbent, s.model)
    }
    chain = replace(context, forebears=(incumbent.path, s.model.path, specialists["food"].model.path))
    made = DISTILL.shrink(small, s.domain, tmp_path / "taught", chain, train=short)
    assert values[made.manifest["parents"][1]] == max(values.values())
    # the large model with the rows of both domains is judged by the domain's own
    alone = replace(context, forebears=(incumbent.path,))
    assert (
        DISTILL.shrink(small, s.domain, tmp_path / "other", alone, train=short).manifest["parents"][1]
        == incumbent.digest
    )
    with pytest.raises(UsageError, match="remedy: name one under `teacher`") as caught:
        DISTILL.shrink(small, s.domain, tmp_path / "none", context)
    assert caught.value.code == "no-teacher"


def test_a_teacher_of_other_labels_is_refused(
    specialists: dict[str, Specialist], context: Context, tmp_path: Path
) -> None:
    s = specialists["food"]
    with pytest.raises(FitError, match="does not know all labels of food") as caught:
        DISTILL.shrink(s.model, s.domain, tmp_path / "m", context, teacher=str(specialists["rail"].model.path))
    assert caught.value.code == "teacher-labels"


def test_a_causal_student_learns_next_tokens(
    llama: Path, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    base, domain = open_model(llama), texts["food"]
    train = {"epochs": 4, "lr": 3e-3, "batch_size": 8}
    large = method("finetune").shrink(base, domain, tmp_path / "large", context, train=train)
    small = method("width").shrink(
        large, domain, tmp_path / "small", context, neurons=0.25, train=None, compensate=False
    )
    made = DISTILL.shrink(small, domain, tmp_path / "taught", context, teacher=str(large.path), train=train)

    def loss(model: Model) -> float:
        sums = token_losses(load_network(model), load_tokenizer(model), domain.test.texts, context).sum(0)
        return float(sums[0] / sums[1])

    assert loss(made) < loss(small)


@pytest.mark.slow
def test_a_chain_in_a_recipe_is_taught_by_its_finetuned_model(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path)
    short = {"epochs": 2, "lr": 5e-3, "head_lr": 1e-2, "batch_size": 8}
    recipe["shrink"] = [
        {"method": "finetune", "train": short}, {"method": "width", "neurons": 0.5, "train": None},
        {"method": "distill", "train": short},
    ]  # fmt: skip
    recipe |= {"feedback": {"method": "distill", "train": short}, "references": []}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    run(tmp_path / "recipe.yaml")
    made = {}
    for note in tmp_path.glob("ws/**/model/fanbu.json"):
        manifest = json.loads(note.read_text())
        made[open_model(note.parent).digest] = manifest
    taught = [m for m in made.values() if m["method"] == "distill" and "hidden" in m["parameters"]]
    assert len(taught) == 2
    for manifest in taught:
        student, teacher = manifest["parents"]
        assert made[student]["method"] == "width"
        assert made[teacher]["method"] in {"probe", "finetune"}  # whichever is better on validation rows


def test_a_plan_without_a_teacher_is_refused(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path) | {"feedback": {"method": "distill"}, "references": []}
    for step, match in (({}, "names no teacher"), ({"teacher": "nowhere"}, "nowhere")):
        recipe["shrink"] = [{"method": "distill", **step}]
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        with pytest.raises(FanbuError, match=match):
            run(tmp_path / "recipe.yaml")


def test_rows_that_pad_a_vocabulary_take_no_part() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    wide, narrow_one = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=n)).eval() for n in (70, 60)
    )
    rows, weigh = [[1, 5, 9, 3], [1, 7, 8]], ("forward", 1.0, 0.0)
    got = taught_tokens(rows, wide, narrow_one, 0, weigh)(torch.nn.ModuleDict({"network": narrow_one}), [0, 1])
    z = [torch.cat([n(torch.tensor([ids])).logits[0, :-1, :60] for ids in rows]).detach() for n in (wide, narrow_one)]
    torch.testing.assert_close(got.detach(), divergence(*z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("cap", [None, 2.0])
def test_what_a_network_does_to_its_logits_counts(cap: float | None) -> None:
    sizes = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": 16, "vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Gemma2Config(**sizes, final_logit_softcapping=cap)
    teacher, student = (transformers.Gemma2ForCausalLM(config).eval() for _ in range(2))
    with torch.no_grad():
        for network in (teacher, student):
            for p in network.parameters():
                p.normal_(0, 0.5)
    rows = [[1, 5, 9, 3], [1, 7, 8]]
    got = taught_tokens(rows, teacher, student, 0, ("forward", 2.0, 0.25))(
        torch.nn.ModuleDict({"network": student}), [0, 1]
    )
    z = [[n(torch.tensor([ids])).logits[0, :-1] for ids in rows] for n in (teacher, student)]
    known, own = (torch.cat(part).detach() for part in z)
    truth = torch.tensor([5, 9, 3, 7, 8])
    want = 0.75 * divergence(known, own, "forward", 2.0) + 0.25 * functional.cross_entropy(own, truth)
    torch.testing.assert_close(got.detach(), want, rtol=1e-4, atol=1e-5)
