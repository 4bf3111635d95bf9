"""What every benchmark shares: flags, finding text domains, tables, bars and result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: see fanbu.cli
os.environ.setdefault("HF_HUB_OFFLINE", "1")

HERE = Path(__file__).parent
WORK = HERE / "work"


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that every benchmark accepts."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument("--quick", action="store_true", help="smaller, for a first look")
    flags.add_argument("--data", type=Path, default=HERE.parents[1] / "shared" / "data", help="folder of domains")
    flags.add_argument("--work", type=Path, default=WORK, help="where stages are kept; a second run resumes")
    return flags


def text_domains(folder: Path, minimum: int = 1000) -> dict[str, Path]:
    """Folders with train, valid and test.jsonl, in Latin script, with at least ``minimum`` rows in all."""
    found = {}
    for train in sorted(folder.glob("*/train.jsonl")):
        files = [train.with_name(f"{split}.jsonl") for split in ("train", "valid", "test")]
        if all(f.is_file() for f in files):
            lines = [line for f in files for line in f.read_text(encoding="utf-8").splitlines() if line.strip()]
            texts = [json.loads(line).get("text") for line in lines]
            if len(texts) >= minimum and all(isinstance(t, str) for t in texts) and _latin("".join(texts)):
                found[train.parent.name] = train.parent
    if not found:
        sys.exit(f"no text domains with at least {minimum} rows in {folder}; give their folder with --data")
    return found


def _latin(text: str) -> bool:
    letters = [c for c in text[:200_000] if c.isalpha()]
    return bool(letters) and sum(c < "\u0250" for c in letters) > 0.9 * len(letters)


def table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that is also readable as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def bar(what: str, got: str, want: str, holds: bool) -> dict[str, Any]:
    """One bar, printed as its line."""
    print(f"bar: {what}: got {got}, want {want}: {'holds' if holds else 'falls short'}", flush=True)
    return {"what": what, "got": got, "want": want, "holds": bool(holds)}


def finish(name: str, text: str, values: Mapping[str, Any], bars: Sequence[Mapping[str, Any]]) -> int:
    """Writes results/NAME.json and .md; the exit code is 0 only if every bar holds."""
    import torch
    import transformers

    machine = {
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "machine": platform.machine(), "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    lines = [f"- {b['what']}: {b['got']} (want {b['want']}): {'holds' if b['holds'] else 'falls short'}" for b in bars]
    (results / f"{name}.md").write_text(f"# {name}\n\n{text}\n\n" + "\n".join(lines) + f"\n\n{machine}\n")
    (results / f"{name}.json").write_text(
        json.dumps({"values": values, "bars": bars, "machine": machine}, indent=1, sort_keys=True)
    )
    return 0 if all(b["holds"] for b in bars) else 1
