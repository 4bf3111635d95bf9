"""Flower's weighted mean of updates, in a process of its own with Flower alone; prints its times as JSON.

Arguments: UPDATE... (folders with tensors.safetensors in bf16). Loading is not timed.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from safetensors.torch import load_file


def main() -> None:
    replies = []
    for folder in sys.argv[1:]:
        tensors = load_file(Path(folder) / "tensors.safetensors")
        arrays = ArrayRecord({name: Array(tensors[name].float().numpy()) for name in sorted(tensors)})
        replies.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"rows": 100})}))
        del tensors, arrays
    started, cpu = time.perf_counter(), time.process_time()
    mean = aggregate_arrayrecords(replies, "rows")
    told = {"merge": time.perf_counter() - started, "cpu": time.process_time() - cpu, "arrays": len(mean)}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
