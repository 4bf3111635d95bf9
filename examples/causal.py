"""A small causal language model: two domains of plain text, fed back by distillation and by averaging weights.

Run: python examples/causal.py [--model DIR]. Without the flag it trains a Llama of half a million parameters on the
spot. The measure is the held-out loss in nats a token; less is better.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import fanbu
from _stand_ins import llama
from fanbu.data.standard_library import function_bodies
from fanbu.progress import bar, log
from fanbu.report.text import summary

AREAS = ("internet", "developer")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, help="a causal language model")
    flags.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fanbu-causal")
    args = flags.parse_args()
    general = [row.text for row in function_bodies("numbers")[:600]]
    train = {"epochs": 2, "batch_size": 16, "lr": 1e-3}
    limit = {"train": 240, "valid": 40, "test": 100}
    recipe = {
        "fanbu": 1, "name": "causal", "model": str(args.model or llama(args.work / "llama", general)),
        "workspace": str(args.work / "workspace"), "max_length": 64,
        "domains": {a: {"python": a, "test": 0.2, "task": "causal-lm", "limit": limit} for a in AREAS},
        "guards": {"numbers": {"python": "numbers", "test": 0.2, "task": "causal-lm", "limit": {"test": 100}}},
        "shrink": [{"method": "finetune", "train": train}],
        "feedback": {"method": "distill", "train": {**train, "patience": 0}},
        "references": [{"method": "average"}], "gate": {"margin": 0.02},
    }  # fmt: skip
    with bar() as progress:
        record = fanbu.run(recipe, progress=progress, log=log)
    print(summary(record))


if __name__ == "__main__":
    main()
