"""How long a model takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fanbu.batches import collate, encode, pad_id
from fanbu.predict import limit
from fanbu.train import set_up
from fanbu.types import Context

Batch = Mapping[str, Tensor]
_TIMES = 5
_MOMENTS = 7


def milliseconds(run: Callable[[Batch], Any], batches: Sequence[Batch]) -> float:
    """For one text: the median over batches of the least of five passes, by the batch's size; after a warm-up.

    The least, because other programs can only make a pass longer. Tokenizing is left out.
    """
    return _milliseconds([run], [batches])[0]


def network_milliseconds(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> float:
    """Of a transformers network, for one of the texts at batch 1."""
    return in_turns([(network, tokenizer)], texts, context)[0]


def in_turns(networks: Sequence[tuple[Any, Any]], texts: Sequence[str], context: Context) -> list[float]:
    """``network_milliseconds`` of each (network, tokenizer); a text is read by one after the other, so that a change
    of the machine's speed meets all of them."""
    set_up(context, "latency")
    runs, read = [], []
    for network, tokenizer in networks:
        network.to(context.device).eval()
        runs.append(lambda batch, network=network: network(**batch))
        sequences = encode(tokenizer, texts, limit(network, context))
        read.append([collate([ids], pad_id(tokenizer), context.device) for ids in sequences])
    return _milliseconds(runs, read)


@dataclass(frozen=True)
class Clock:
    """Tells times at one speed of a machine that is now faster and now slower (clock rates, other programs).

    A network's time is u t / k: with t its time and k that of a known network, measured in turns, and the ``unit`` u
    what the known one takes at the speed that counts.
    """

    network: Any
    tokenizer: Any
    texts: Sequence[str]
    context: Context
    unit: float

    def milliseconds(self, network: Any, tokenizer: Any) -> float:
        """For one of the texts at batch 1."""
        took, known = in_turns([(network, tokenizer), (self.network, self.tokenizer)], self.texts, self.context)
        return self.unit * took / known


def usual_milliseconds(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> float:
    """The median of ``network_milliseconds`` over several moments: a clock's unit."""
    return statistics.median(network_milliseconds(network, tokenizer, texts, context) for _ in range(_MOMENTS))


def _milliseconds(runs: Sequence[Callable[[Batch], Any]], read: Sequence[Sequence[Batch]]) -> list[float]:
    with torch.inference_mode():
        for run, batches in zip(runs, read, strict=True):
            for batch in batches[:3]:
                run(batch)
        times = [
            [min(_pass(run, b) for _ in range(_TIMES)) / _size(b) for run, b in zip(runs, text, strict=True)]
            for text in zip(*read, strict=True)
        ]
    return [1000 * statistics.median(t) for t in zip(*times, strict=True)]


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _pass(run: Callable[[Batch], Any], batch: Batch) -> float:
    started = time.perf_counter()
    run(batch)
    if next(iter(batch.values())).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
