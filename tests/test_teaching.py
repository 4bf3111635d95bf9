"""What else a teacher shows: relations of tokens, kept next tokens, and opinions of what the student writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_llama
from fanbu.batches import collate, encode
from fanbu.catalogue import method
from fanbu.domain import Domain
from fanbu.errors import FanbuError, FitError
from fanbu.losses import top_k_divergence
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import token_losses, top_tokens, validation_value
from fanbu.shrink import _teaching
from fanbu.shrink._teaching import on_policy, projections, relation_loss
from fanbu.types import Context, Train

DISTILL = method("distill", "shrink")
TRAIN = Train(epochs=3, lr=3e-3, batch_size=8, patience=0)


@pytest.fixture(scope="module")
def tuned(texts: dict[str, Domain], context: Context, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("tuned")
    base = open_model(make_llama(folder / "llama"))
    return method("finetune").shrink(base, texts["food"], folder / "m", context, train=Train(epochs=4, lr=5e-3))


def by_hand(a: torch.Tensor, b: torch.Tensor, heads: int, lengths: list[int]) -> float:
    """The definition, one text and one head at a time."""
    total = 0.0
    for row, length in enumerate(lengths):
        for head in range(heads):
            logs = []
            for x in (a, b):
                wide = x.shape[-1] // heads
                part = x[row, :length, head * wide : (head + 1) * wide].double()
                logs.append((part @ part.T / wide**0.5).log_softmax(-1))
            total += float((logs[0].exp() * (logs[0] - logs[1])).sum()) / heads
    return total / sum(lengths)


def test_relations_are_what_they_are_defined_as() -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(3, 5, 48), torch.randn(3, 5, 36)
    lengths = [5, 3, 1]
    mask = torch.arange(5)[None] < torch.tensor(lengths)[:, None]
    teacher[~mask], student[~mask] = 1e3, -1e3  # padding is nobody's business
    assert float(relation_loss(teacher, student, mask)) == pytest.approx(
        by_hand(teacher, student, 12, lengths), rel=1e-4
    )
    assert float(relation_loss(teacher, teacher, mask)) == pytest.approx(0, abs=1e-6)
    some = student.clone().requires_grad_()
    relation_loss(teacher, some, mask).backward()
    assert some.grad is not None
    assert some.grad.isfinite().all()
    assert not some.grad[~mask].any()


def test_relations_are_of_the_last_layer_that_has_any(specialists: dict[str, Any], tuned: Model) -> None:
    network = load_network(specialists["food"].model)  # its last layer takes the mean
    names = {id(m): n for n, m in network.named_modules()}
    assert [names[id(m)] for m in projections(network)] == [
        f"bert.encoder.layer.1.attention.self.{n}" for n in ("query", "key", "value")
    ]
    llama = load_network(tuned)
    assert projections(llama)[0] is llama.model.layers[-1].self_attn.q_proj


def test_a_student_learns_relations(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model, domain = specialists["food"].model, domains["food"]
    cut = method("width").shrink(model, domain, tmp_path / "c", context, neurons=0.25, channels=0.5, train=None)
    tokenizer, whole = load_tokenizer(model), load_network(model)
    sequences = encode(tokenizer, domain.train.texts, 16)
    off = {}
    for name, weight in {"without": 0.0, "with": 3.0}.items():
        made = DISTILL.shrink(
            cut, domain, tmp_path / name, context, teacher=str(model.path), extra={"relations": weight}, train=TRAIN
        )
        with torch.no_grad():
            off[name] = float(_relations_of(load_network(made), whole, sequences))
    assert off["with"] < 0.9 * off["without"]


def _relations_of(student: Any, teacher: Any, sequences: list[list[int]]) -> torch.Tensor:
    batch = collate(sequences, 0)
    shown = []
    for network in (teacher, student):
        with _teaching._seen(projections(network)) as found:
            network(**batch)
        shown.append(found)
    mask = batch["attention_mask"].bool()
    return torch.stack([relation_loss(t, s, mask) for t, s in zip(*shown, strict=True)]).mean()


@pytest.mark.parametrize("sampled", [False, True])
def test_kept_tokens_teach(
    sampled: bool, tuned: Model, texts: dict[str, Domain], context: Context, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    domain, base = texts["food"], open_model(make_llama(tmp_path / "llama"))
    asked = []
    real = _teaching.top_tokens
    monkeypatch.setattr(_teaching, "top_tokens", lambda *a, **k: (asked.append(1), real(*a, **k))[1])
    known: dict[str, Any] = {
        "teacher": str(tuned.path),
        "extra": {"top_k": 8, "sampled": sampled, "cache": str(tmp_path / "kept")},
        "train": Train(epochs=8, lr=5e-3, batch_size=8, patience=0),
    }  # fmt: skip
    made = [DISTILL.shrink(base, domain, tmp_path / f"m{n}", context, **known) for n in range(2)]
    assert len(asked) == 1
    assert made[0].digest == made[1].digest
    (file,) = (tmp_path / "kept").glob("tokens-*.safetensors")
    assert file.stat().st_size < 8 * 6 * 1.5 * sum(len(s) for s in encode(load_tokenizer(base), domain.train.texts, 16))
    values = [validation_value(load_network(m), load_tokenizer(m), domain, context) for m in (base, made[0])]
    assert values[1] > values[0] + 0.1


def test_drawn_tokens_are_unbiased(tuned: Model, texts: dict[str, Domain], context: Context) -> None:
    network, tokenizer, text = load_network(tuned), load_tokenizer(tuned), list(texts["food"].test.texts[:1])
    with torch.no_grad():
        z = network(**tokenizer(text, return_tensors="pt", truncation=True, max_length=16)).logits[0, :-1]
    drawn = top_tokens(network, tokenizer, text, context, 20_000, sampled=True)[0]
    share = torch.zeros_like(z).scatter_add_(1, drawn[0].long(), drawn[1].float())
    torch.testing.assert_close(share, z.softmax(-1), rtol=0, atol=0.02)
    # so is the loss: it is that of the whole distribution up to its entropy
    student = torch.randn_like(z)
    p = z.softmax(-1)
    whole = -(p * student.log_softmax(-1)).sum(-1).mean()
    few = top_k_divergence(student, drawn[0].long(), drawn[1].float())
    constant = (drawn[1].float() * drawn[1].float().log()).sum(-1).mean()
    assert float(few - constant) == pytest.approx(float(whole), abs=0.05)


def test_the_students_own_texts_are_taught(
    tuned: Model, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    domain, base = texts["food"], open_model(make_llama(tmp_path / "llama"))
    network, tokenizer = load_network(base), load_tokenizer(base)
    sequences = encode(tokenizer, domain.train.texts, 16)
    before, seen = [list(s) for s in sequences], []
    torch.manual_seed(0)
    loss = on_policy(lambda n, rows: seen.extend(list(sequences[i]) for i in rows) or torch.zeros(()), 1.0, network,
                     sequences, tokenizer.eos_token_id)  # fmt: skip
    loss(network, range(6))
    assert sequences == before  # the owner's texts are the owner's again
    for old, new in zip(before, seen, strict=False):
        half = len(old) // 2
        assert new[:half] == old[:half]
        assert len(new) <= len(old)
    assert seen != before[:6]
    made = DISTILL.shrink(
        base,
        domain,
        tmp_path / "m",
        context,
        teacher=str(tuned.path),
        divergence="reverse",
        extra={"on_policy": 0.5},
        train=TRAIN,
    )
    sums = [token_losses(load_network(m), tokenizer, domain.test.texts, context).sum(0) for m in (base, made)]
    assert sums[1][0] < sums[0][0]


@pytest.mark.parametrize(
    "arguments",
    [{"sampled": True}, {"top_k": 4, "on_policy": 0.5}, {"top_k": 4, "relations": 1.0}],
)
def test_what_does_not_go_together(
    arguments: dict[str, Any], tuned: Model, texts: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    with pytest.raises(FanbuError, match="bad-parameter"):
        DISTILL.shrink(tuned, texts["food"], tmp_path / "m", context, teacher=str(tuned.path), extra=arguments)


def test_relations_need_the_same_tokens(
    specialists: dict[str, Any], domains: dict[str, Domain], context: Context, tmp_path: Path
) -> None:
    model, domain = specialists["food"].model, domains["food"]
    fewer = method("vocabulary").shrink(model, domain, tmp_path / "v", context, max_tokens=90)
    with pytest.raises(FitError, match="other-tokenizer"):
        DISTILL.shrink(
            fewer, domain, tmp_path / "m", context, teacher=str(model.path), extra={"relations": 1.0}, train=TRAIN
        )
    with pytest.raises(FanbuError, match="bad-parameter"):
        DISTILL.shrink(model, domain, tmp_path / "m", context, teacher=str(model.path), extra={"top_k": 4})
