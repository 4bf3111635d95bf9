"""Small runners: one model, texts in, answers out, the same for a checkpoint, its int8 form and ONNX files."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fanbu.batches import Sequences, collate, encode, pad_id
from fanbu.deploy.latency import milliseconds
from fanbu.deploy.to_onnx import ONNX, in_linear, open_onnx, run_session, session
from fanbu.errors import UsageError
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import by_batches, longest
from fanbu.train import set_up
from fanbu.types import Context, Task


@dataclass(frozen=True)
class Runner:
    """``run`` takes input_ids and attention_mask and gives logits; ``labels`` are empty for causal models.

    ``context.max_length`` is how many tokens of a text the model reads.
    """

    run: Callable[[Mapping[str, Tensor]], Tensor]
    tokenizer: Any
    labels: tuple[str, ...]
    task: Task
    context: Context

    def encoded(self, texts: Sequence[str]) -> Sequences:
        """Token ids of each text."""
        return encode(self.tokenizer, texts, self.context.max_length)


def open_runner(folder: str | Path, context: Context, form: Literal["as-it-is", "int8"] = "as-it-is") -> Runner:
    """A runner of a model folder (torch) or of an ONNX folder.

    ``int8`` quantizes a checkpoint's linear layers in memory: weights in int8, activations as they come (torch.ao).
    The context's threads are kept to (0: as many as the library takes); ONNX files and int8 run on the CPU.
    """
    if (Path(folder) / ONNX).exists():
        if form != "as-it-is":
            raise UsageError(
                "flag", "an ONNX file has its numbers already", allowed="a checkpoint with --int8", got=folder,
                remedy="export it with --to onnx-int8",
            )  # fmt: skip
        found = open_onnx(Path(folder))
        runs = session(found.path / ONNX, context.threads)
        described = Model(found.path, found.config)
        context = replace(context, max_length=int(found.manifest["max_length"]), device="cpu")
        return _runner(lambda batch: run_session(runs, batch), described, load_tokenizer(described), context)
    model = open_model(folder)
    network, tokenizer = load_network(model), load_tokenizer(model)
    context = replace(context, max_length=longest(network, tokenizer, context))
    set_up(context, "predict")
    if form == "int8":
        network, context = _in_int8(network), replace(context, device="cpu")
    network.to(context.device)
    return _runner(lambda batch: network(**batch).logits.float().cpu(), model, tokenizer, context)


def _runner(run: Callable[[Mapping[str, Tensor]], Tensor], model: Model, tokenizer: Any, context: Context) -> Runner:
    if model.task is None:
        raise UsageError(
            "model-task", f"{model.path} is a bare body", allowed="a classifier or a causal language model",
            got=model.config.get("architectures"), remedy="fine-tune it on a domain first",
        )  # fmt: skip
    return Runner(run, tokenizer, model.labels, model.task, context)


def _in_int8(network: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao points to torchao, whose int8 is slower here (docs/log.md)
        return torch.ao.quantization.quantize_dynamic(in_linear(network), {torch.nn.Linear}, dtype=torch.qint8)


def logits_of(runner: Runner, texts: Sequence[str], size: int = 32) -> Tensor:
    """[texts, labels] of a classifier, in the order of the texts."""
    rows = by_batches(
        lambda batch: runner.run(batch).unbind(), runner.tokenizer, runner.encoded(texts), runner.context, "predict",
        size,
    )  # fmt: skip
    return torch.stack(rows)


def answers_of(runner: Runner, texts: Sequence[str], *, tokens: int = 32, size: int = 32) -> list[dict[str, Any]]:
    """For each text the likeliest label with its probability; of a causal model the likeliest next tokens, as text."""
    if runner.task == "causal-lm":
        return [{"text": text, "continuation": _continued(runner, text, tokens)} for text in texts]
    probabilities, chosen = logits_of(runner, texts, size).softmax(-1).max(-1)
    return [
        {"text": text, "label": runner.labels[number], "probability": round(p, 6)}
        for text, number, p in zip(texts, chosen.tolist(), probabilities.tolist(), strict=True)
    ]


def _continued(runner: Runner, text: str, tokens: int) -> str:
    """Greedy, one token at a time; ONNX files hold no cache, so each step reads the whole text again."""
    ids = runner.encoded([text])[0]
    if ids and ids[-1] == runner.tokenizer.eos_token_id:
        ids = ids[:-1]
    start = len(ids)
    if start >= runner.context.max_length:
        raise UsageError(
            "prompt-too-long", "a text fills all that the model reads, so nothing can follow it",
            allowed=f"fewer than {runner.context.max_length} tokens", got=start, remedy="shorten it",
        )  # fmt: skip
    with torch.inference_mode():
        while len(ids) < min(start + tokens, runner.context.max_length):
            token = int(runner.run(collate([ids], 0, runner.context.device))[0, -1].argmax())
            if token == runner.tokenizer.eos_token_id:
                break
            ids.append(token)
    return str(runner.tokenizer.decode(ids[start:]))


def milliseconds_of(runner: Runner, texts: Sequence[str], size: int = 1) -> float:
    """Milliseconds a text in batches of ``size`` (``latency.milliseconds``), texts in their order."""
    sequences, pad = runner.encoded(texts), pad_id(runner.tokenizer)
    batches = [
        collate(sequences[i : i + size], pad, runner.context.device) for i in range(0, len(texts) - size + 1, size)
    ]
    if not batches:
        raise UsageError("no-texts", "too few texts to measure", allowed=f"at least {size}", got=len(texts),
                         remedy="give more")  # fmt: skip
    return milliseconds(runner.run, batches)
