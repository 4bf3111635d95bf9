"""The causal part of benchmarks/round.py: a small Llama trained on the spot, three areas of the standard library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from _common import bar, finish, table
from fanbu.batches import encode, pad_id
from fanbu.domain import load_domain
from fanbu.ledger import Workspace
from fanbu.machine import resolve_machine
from fanbu.model import Model, open_model, provenance, save_network
from fanbu.objectives import language
from fanbu.progress import bar as progress_bar
from fanbu.progress import log
from fanbu.recipe import load_recipe
from fanbu.round import Result, turn_once
from fanbu.train import train
from fanbu.turn import Turn, start
from fanbu.types import Context, Train

AREAS = ("internet", "system", "developer")
GENERAL = "numbers"
LENGTH = 96


def tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE tokenizer of 4,096 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<eos>"], show_progress=False)
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>", pad_token="<eos>", model_max_length=LENGTH)


def pretrained(out: Path, texts: list[str], context: Context, plan: Train, **sizes: int) -> Model:
    """A Llama of these sizes with a tokenizer of its own, trained on the texts; two heads share a key."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = tokenizer(texts)
    torch.manual_seed(context.seeded("large model"))
    config = LlamaConfig(
        vocab_size=len(tokens), num_key_value_heads=sizes["num_attention_heads"] // 2, max_position_embeddings=LENGTH,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0, **sizes,
    )  # fmt: skip
    network = LlamaForCausalLM(config).to(context.device)
    sequences = encode(tokens, texts, LENGTH)
    loss = language(sequences, pad_id(tokens), context.device)
    train(network, [len(s) for s in sequences], loss, plan, context, "large model")
    return save_network(network, tokens, out, provenance("pretrained", [], context))


def large_model(out: Path, context: Context) -> Model:
    """Trains the large model on general text and a little of each area; test rows stay unseen."""
    texts = list(load_domain(GENERAL, python=GENERAL, test=0.2, task="causal-lm").train.texts)
    for area in AREAS:
        texts += load_domain(area, python=area, test=0.2, task="causal-lm", limit={"train": 150}).train.texts
    plan = Train(epochs=10, batch_size=16, lr=2e-3, patience=0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 8}
    return pretrained(out, texts, context, plan, **sizes)


def recipe(model: Path, quick: bool, work: Path) -> dict[str, Any]:
    """Three areas feed, general text is the guard; the probe set has general text of nobody's."""
    train_plan = {"epochs": 4 if quick else 6, "batch_size": 16, "lr": 1e-3}
    domains = {
        a: {"python": a, "test": 0.2, "task": "causal-lm", "limit": {"train": 700, "valid": 100, "test": 300}}
        for a in AREAS
    }
    return {
        "fanbu": 1, "name": "causal", "model": str(model), "workspace": str(work / "causal"), "max_length": LENGTH,
        "domains": domains, "guards": {GENERAL: {"python": GENERAL, "test": 0.2, "task": "causal-lm"}},
        "shrink": [{"method": "finetune", "train": train_plan}],
        "probe": {"public": [{"python": GENERAL, "limit": 300}]},
        "feedback": {"method": "distill", "train": {**train_plan, "patience": 0}},
        "references": [{"method": "average"}], "gate": {"margin": 0.02},
    }  # fmt: skip


def play(quick: bool, work: Path) -> tuple[Turn, Result]:
    """Trains the large model (once) and runs the round."""
    with progress_bar() as progress:
        device, precision, threads = resolve_machine("auto", "auto", 0)
        context = Context(device=device, precision=precision, threads=threads, max_length=LENGTH, progress=progress)
        base = Workspace(work / "causal").stage(
            "large model", "fanbu.train", {"setting": 1},
            lambda out, scratch: (large_model(out / "model", context), None)[1], log,
        )  # fmt: skip
        open_model(base.path / "model")
        turn = start(load_recipe(recipe(base.path / "model", quick, work)), progress, log)
        return turn, turn_once(turn)


def loss(result: Result, name: str, domain: str) -> float:
    """Held-out loss in nats a token."""
    return float(result.outcomes[name][domain].meta["metrics"]["told"]["loss"])


def causal(quick: bool, work: Path) -> int:
    """The bars on causal models."""
    turn, result = play(quick, work)
    rows = [["held-out loss", "base", "specialist", "average", "distill", "closed by average", "closed by distill"]]
    closed = {}
    for area in AREAS:
        base, own = loss(result, "incumbent", area), loss(result, "specialists", area)
        new, mean = loss(result, "candidate", area), loss(result, "average", area)
        closed[area] = (base - new) / (base - own)
        other = (base - mean) / (base - own)
        rows.append([area, *(f"{v:.3f}" for v in (base, own, mean, new)), f"{other:.0%}", f"{closed[area]:.0%}"])
    before, after = loss(result, "incumbent", GENERAL), loss(result, "candidate", GENERAL)
    average = loss(result, "average", GENERAL)
    rows.append([f"{GENERAL} (fed by nobody)", f"{before:.3f}", "-", f"{average:.3f}", f"{after:.3f}", "-", "-"])
    seconds = sum(c.get("seconds", 0) for c in turn.costs)
    text = (
        table(rows) + f"\n\n{result.base.parameters:,} parameters; {seconds:.0f} s in all stages after the large model"
    )
    print(text, flush=True)
    least = min(closed.values())
    verdict = result.verdict
    bars = [
        bar("least share of a specialist's gain that distill closes", f"{least:.0%}", ">= 50%", least >= 0.5),
        bar("general loss after / before", f"{after / before:.4f}", "<= 1.02", after <= 1.02 * before),
        bar("gate", verdict["reason"], "accepted", verdict["accepted"]),
    ]
    return finish("round-causal-lm", text, {"closed": closed, "general": [before, after]}, bars)
