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
_TIMES, _TURNS, _MOMENTS = 3, 3, 7


def milliseconds(run: Callable[[Batch], Any], batches: Sequence[Batch]) -> float:
    """For one text: the median over batches of the least of three passes, by the batch's size; after a warm-up.

    The least, because other programs can only make a pass longer. Tokenizing is left out.
    """
    with torch.inference_mode():
        for batch in batches[:3]:
            run(batch)
        return 1000 * statistics.median(min(_pass(run, b) for _ in range(_TIMES)) / _size(b) for b in batches)


def network_milliseconds(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> float:
    """Of a transformers network, for one of the texts at batch 1."""
    set_up(context, "latency")
    sequences = encode(tokenizer, texts, limit(network, context))
    network.to(context.device).eval()
    return milliseconds(
        lambda batch: network(**batch), [collate([ids], pad_id(tokenizer), context.device) for ids in sequences]
    )


@dataclass(frozen=True)
class Clock:
    """Tells times at one speed of a machine that is now faster and now slower (clock rates, other programs).

    A network's time is u t / k: with t / k the median share of a known network's time, measured in turns (all texts
    by one, then by the other, so that each finds its weights in the cache), and the ``unit`` u what the known one takes
    at the speed that counts.
    """

    network: Any
    tokenizer: Any
    texts: Sequence[str]
    context: Context
    unit: float

    def milliseconds(self, network: Any, tokenizer: Any) -> float:
        """For one of the texts at batch 1."""
        given = self.texts, self.context
        return self.unit * statistics.median(
            network_milliseconds(network, tokenizer, *given)
            / network_milliseconds(self.network, self.tokenizer, *given)
            for _ in range(_TURNS)
        )


def usual_milliseconds(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> float:
    """The median of ``network_milliseconds`` over several moments: a clock's unit."""
    return statistics.median(network_milliseconds(network, tokenizer, texts, context) for _ in range(_MOMENTS))


def _size(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _pass(run: Callable[[Batch], Any], batch: Batch) -> float:
    started = time.perf_counter()
    run(batch)
    if next(iter(batch.values())).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def fitted(rows: Sequence[Sequence[float]], times: Sequence[float]) -> list[float]:
    """Factors >= 0 of what networks are made of, with the least squared relative error over their times."""
    import numpy as np
    from scipy.optimize import nnls

    y = np.array(times)
    return [float(v) for v in nnls(np.array(rows) / y[:, None], np.ones(len(y)))[0]]
