"""Small runners: one model, texts in, answers out, the same for a checkpoint, its int8 form and ONNX files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fanbu.batches import collate, encode, pad_id, sorted_batches
from fanbu.deploy.latency import milliseconds
from fanbu.deploy.to_onnx import ONNX, open_onnx, run_session, session
from fanbu.errors import UsageError
from fanbu.model import Model, load_network, load_tokenizer, open_model
from fanbu.predict import longest
from fanbu.types import Context, Task


@dataclass(frozen=True)
class Runner:
    """``run`` takes input_ids and attention_mask and gives logits; ``labels`` are empty for causal models."""

    run: Callable[[Mapping[str, Tensor]], Tensor]
    tokenizer: Any
    labels: tuple[str, ...]
    task: Task
    max_length: int

    def batch(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Texts as one padded batch."""
        return collate(encode(self.tokenizer, texts, self.max_length), pad_id(self.tokenizer))


def open_runner(folder: str | Path, context: Context, form: Literal["as-it-is", "int8"] = "as-it-is") -> Runner:
    """A runner of a model folder (torch) or of an ONNX folder.

    ``int8`` quantizes a checkpoint's linear layers in memory: weights in int8, activations as they come (torch.ao).
    The context's threads are kept to (0: as many as the library takes).
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
        most = int(found.manifest["max_length"])
        return _runner(lambda batch: run_session(runs, batch), described, load_tokenizer(described), most)
    model = open_model(folder)
    network = load_network(model)
    tokenizer = load_tokenizer(model)
    most = longest(network, tokenizer, context)
    if form == "int8":
        network = _in_int8(network)
    else:
        network.to(context.device)

    def run(batch: Mapping[str, Tensor]) -> Tensor:
        with torch.inference_mode():
            return network(**{n: v.to(network.device) for n, v in batch.items()}).logits.float().cpu()

    if context.threads:
        torch.set_num_threads(context.threads)
    return _runner(run, model, tokenizer, most)


def _runner(run: Callable[[Mapping[str, Tensor]], Tensor], model: Model, tokenizer: Any, most: int) -> Runner:
    assert model.task is not None
    return Runner(run, tokenizer, model.labels, model.task, most)


def _in_int8(network: Any) -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao points to torchao, whose int8 is slower here (docs/log.md)
        return torch.ao.quantization.quantize_dynamic(network, {torch.nn.Linear}, dtype=torch.qint8)


def logits_of(runner: Runner, texts: Sequence[str], size: int = 32) -> Tensor:
    """[texts, labels] of a classifier, in the order of the texts."""
    sequences = encode(runner.tokenizer, texts, runner.max_length)
    found: dict[int, Tensor] = {}
    for rows in sorted_batches([len(s) for s in sequences], size):
        batch = collate([sequences[i] for i in rows], pad_id(runner.tokenizer))
        found.update(zip(rows, runner.run(batch).unbind(), strict=True))
    return torch.stack([found[i] for i in range(len(sequences))])


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
    ids = encode(runner.tokenizer, [text], runner.max_length)[0]
    if ids and ids[-1] == runner.tokenizer.eos_token_id:
        ids = ids[:-1]
    start = len(ids)
    while len(ids) < min(start + tokens, runner.max_length):
        batch = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
        token = int(runner.run(batch)[0, -1].argmax())
        if token == runner.tokenizer.eos_token_id:
            break
        ids.append(token)
    return str(runner.tokenizer.decode(ids[start:]))


def milliseconds_of(runner: Runner, texts: Sequence[str], size: int = 1) -> float:
    """Milliseconds a text in batches of ``size`` (``latency.milliseconds``), texts in their order."""
    batches = [runner.batch(texts[i : i + size]) for i in range(0, len(texts) - size + 1, size)]
    if not batches:
        raise UsageError("no-texts", "too few texts to measure", allowed=f"at least {size}", got=len(texts),
                         remedy="give more")  # fmt: skip
    return milliseconds(runner.run, batches)
