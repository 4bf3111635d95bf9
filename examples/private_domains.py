"""Domains whose texts and labels may not leave their owners: which ways are left, and what crosses.

Two owners say ``share: internal``. Joint training on their rows is refused, with the reason, before anything is
trained. Averaging weights needs neither texts nor labels. Distillation needs texts to ask the specialists about: here
public ones, of nobody's. (``share: private`` goes further: everything that names labels needs noise. No method of
this version adds any, so such domains are refused.)

Run: python examples/private_domains.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import fanbu
from _stand_ins import ENCODER, write_csv
from fanbu.errors import BoundaryError
from fanbu.progress import bar, log
from fanbu.report.text import summary

TUNE = {"epochs": 2, "lr": 3e-4}


def recipe(work: Path, files: list[Path], feedback: dict[str, Any], share: str) -> dict[str, Any]:
    return {
        "fanbu": 1, "name": feedback["method"], "model": ENCODER, "workspace": str(work / feedback["method"]),
        "max_length": 32,
        "domains": {
            file.stem: {
                "train": str(file), "test": 0.3, "columns": {"text": "body", "label": "module"}, "share": share
            }
            for file in files
        },
        "probe": {"domains": False, "public": [{"python": "numbers", "limit": 400}]},
        "shrink": [{"method": "finetune", "train": TUNE}], "feedback": feedback, "gate": {"margin": 0.1},
    }  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "fanbu-private-domains")
    work = flags.parse_args().work
    files = [write_csv(work / "data", area, 260) for area in ("system", "developer")]
    for method, share in (("multitask", "internal"), ("distill", "private")):
        try:
            fanbu.run(recipe(work, files, {"method": method}, share))
        except BoundaryError as error:
            print(f"{method} with share: {share} is refused: {error}\n")
    with bar() as progress:
        value = recipe(work, files, {"method": "distill", "train": TUNE}, "internal")
        record = fanbu.run({**value, "references": [{"method": "average"}]}, progress=progress, log=log)
    print(summary(record))
    for name, domain in record["domains"].items():
        sent = sorted({f"{c['what']} ({c['kind']})" for c in domain["crossed"]})
        print(f"{name} let out: {', '.join(sent)}")


if __name__ == "__main__":
    main()
