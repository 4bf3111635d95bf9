"""How long a network takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch

from fanbu.batches import collate, encode, pad_id
from fanbu.predict import limit
from fanbu.train import set_up
from fanbu.types import Context

_TIMES = 5


def milliseconds_of(network: Any, tokenizer: Any, texts: Sequence[str], context: Context) -> float:
    """Median over texts of the least of five forward passes at batch 1, tokenizing left out; after a warm-up.

    The least, because other programs can only make a pass longer.
    """
    set_up(context, "latency")
    network.to(context.device).eval()
    batches = [
        collate([ids], pad_id(tokenizer), context.device) for ids in encode(tokenizer, texts, limit(network, context))
    ]
    with torch.inference_mode():
        for batch in batches[:3]:
            network(**batch)
        return 1000 * statistics.median(min(_pass(network, batch) for _ in range(_TIMES)) for batch in batches)


def _pass(network: Any, batch: dict[str, Any]) -> float:
    started = time.perf_counter()
    network(**batch)
    if next(network.parameters()).is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started
