"""Peers in virtual environments of their own: made once in the work folder, or taken from $FANBU_PEERS."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PACKAGES = {
    "mk": ["mergekit==0.1.5", "peft==0.21.2"], "fb": ["fusion-bench==0.2.33"], "trl": ["trl==1.16.0"],
    "flower": ["flwr==1.41.0", "safetensors"],
}  # fmt: skip


def peer_python(name: str, work: Path) -> Path:
    """The interpreter of a peer's environment (``mk``: mergekit and PEFT; ``fb``: FusionBench; ``trl``: TRL;
    ``flower``: Flower)."""
    given = os.environ.get("FANBU_PEERS")
    folder = (Path(given) if given else work / "peers") / name
    python = folder / "bin" / "python"
    if not (folder / "ready").exists() and not given:
        print(f"installing {', '.join(PACKAGES[name])} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages in (["torch==2.13.0"], PACKAGES[name]):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "ready").touch()
    return python
