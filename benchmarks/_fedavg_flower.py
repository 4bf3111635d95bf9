"""Flower's own mean of checkpoints, by rows, in a process with Flower alone.

Arguments: OUT.safetensors ROWS=FILE.safetensors ...
"""

from __future__ import annotations

import sys

import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from safetensors.torch import load_file, save_file


def main() -> None:
    replies = []
    for argument in sys.argv[2:]:
        rows, _, file = argument.partition("=")
        tensors = load_file(file)
        arrays = ArrayRecord({name: Array(tensors[name].numpy()) for name in sorted(tensors)})
        replies.append(RecordDict({"arrays": arrays, "metrics": MetricRecord({"rows": int(rows)})}))
    mean = aggregate_arrayrecords(replies, "rows")
    save_file({name: torch.tensor(array.numpy()) for name, array in mean.items()}, sys.argv[1])


if __name__ == "__main__":
    main()
