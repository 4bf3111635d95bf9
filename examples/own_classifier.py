"""Your own Hugging Face classifier and your CSV files: two new domains, one round.

Run: python examples/own_classifier.py [--model DIR] [--csv a.csv --csv b.csv --text COLUMN --label COLUMN]
Without flags it makes a classifier with two labels of its own and two CSV files, on the spot.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import fanbu
from _stand_ins import classifier, write_csv
from fanbu.progress import bar, log
from fanbu.report.text import summary

TRAIN = {"epochs": 5, "batch_size": 16, "lr": 2e-4, "patience": 3}  # what `fanbu init` writes for so few rows, nearly


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--model", type=Path, help="a classifier, or a bare encoder")
    flags.add_argument("--csv", type=Path, action="append", help="one file a domain; repeatable")
    flags.add_argument("--text", default="body", help="the column with the text")
    flags.add_argument("--label", default="module", help="the column with the label")
    flags.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fanbu-own-classifier")
    args = flags.parse_args()
    model = args.model or classifier(args.work / "classifier")
    files = args.csv or [write_csv(args.work / "data", area, 640, labels=12) for area in ("system", "developer")]
    recipe = {
        "fanbu": 1, "name": "own-classifier", "model": str(model), "workspace": str(args.work / "workspace"),
        "max_length": 32,
        "domains": {
            file.stem: {
                "train": str(file), "test": 0.5, "columns": {"text": args.text, "label": args.label},
                "limit": {"train": 280},  # a short example; without it all rows are used
            }
            for file in files
        },
        "shrink": [{"method": "finetune", "train": TRAIN}],
        "feedback": {"method": "distill", "train": TRAIN},
        "gate": {"margin": 0.1},
    }  # fmt: skip
    with bar() as progress:
        record = fanbu.run(recipe, progress=progress, log=log)
    print(summary(record))
    champion = Path(record["workspace"]) / record["champion"]["path"]
    labels = fanbu.open_model(champion).labels
    general = [label for label in labels if label.startswith("general/")]
    print(f"champion: {champion}\n{len(labels)} labels, of them from your classifier: {', '.join(general) or 'none'}")


if __name__ == "__main__":
    main()
