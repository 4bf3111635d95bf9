"""A newcomer's path, timed: a fresh clone, pip install, `fanbu init` on four CSV files, `fanbu run`, the report.

Nothing is edited by hand. The files are 500 rows each of four text domains, with columns named as people name them.

Run: python benchmarks/newcomer.py [--data DIR] [--rows 500]. --quick takes 300 rows.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from _common import HERE, bar, finish, parser, table, text_domains

COLUMNS = [("question", "intent"), ("text", "label"), ("message", "category"), ("sentence", "class")]


def write_files(data: Path, folder: Path, rows: int) -> list[str]:
    """Four CSV files, evenly spaced rows of the four first domains that have enough."""
    folder.mkdir()
    names = []
    for name, source in text_domains(data).items():
        lines = (source / "train.jsonl").read_text(encoding="utf-8").splitlines()
        found = [json.loads(line) for line in lines if line.strip()]
        if len(found) >= rows and len(names) < len(COLUMNS):
            columns = COLUMNS[len(names)]
            chosen = [found[i * len(found) // rows] for i in range(rows)]
            with (folder / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream)
                writer.writerow(columns)
                writer.writerows([row["text"], row["label"]] for row in chosen)
            names.append(f"{name}.csv")
    if len(names) < len(COLUMNS):
        sys.exit(f"{data} has fewer than {len(COLUMNS)} text domains with {rows} training rows; name another --data")
    return names


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--rows", type=int, default=None, help="rows a file: 500, with --quick 300")
    args = flags.parse_args()
    rows = args.rows or (300 if args.quick else 500)
    folder = Path(tempfile.mkdtemp(prefix="fanbu-newcomer-"))
    subprocess.run(["git", "clone", "--quiet", str(HERE.parent), str(folder / "fanbu")], check=True)
    files = write_files(args.data, folder / "mine", rows)
    python, fanbu = folder / "venv" / "bin" / "python", str(folder / "venv" / "bin" / "fanbu")
    clone = folder / "fanbu"
    steps = {
        "python -m venv": [sys.executable, "-m", "venv", str(folder / "venv")],
        "pip install": [
            str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
            "-c", str(clone / "constraints.txt"), f"{clone}[demo]",
        ],
        "fanbu init": [fanbu, "init", *files, "--yes"],
        "fanbu run": [fanbu, "run", "recipe.yaml"],
        "fanbu report": [fanbu, "report", "recipe.yaml"],
    }  # fmt: skip
    seconds: dict[str, float] = {}
    codes: dict[str, int] = {}
    said = ""
    for name, command in steps.items():
        started = time.monotonic()
        clean = {k: v for k, v in os.environ.items() if k not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        done = subprocess.run(command, cwd=folder / "mine", stdout=subprocess.PIPE, text=True, check=False, env=clean)
        seconds[name], codes[name], said = time.monotonic() - started, done.returncode, done.stdout
        print(f"$ {name}: exit {done.returncode}, {seconds[name]:.0f} s\n{done.stdout}", flush=True)
        if done.returncode not in {0, 3}:
            break
    page = Path(said.strip().rpartition("report: ")[2].strip()) if "report: " in said else None
    shown = page is not None and (folder / "mine" / page).is_file()
    total = sum(seconds.values())
    text = table([["step", "seconds"], *([n, f"{s:.0f}"] for n, s in seconds.items()), ["in all", f"{total:.0f}"]])
    bars = [
        bar("exit codes", ", ".join(f"{n} {c}" for n, c in codes.items()), "all 0", set(codes.values()) == {0}),
        bar("a report page", str(shown), "True", shown),
        bar("seconds in all", f"{total:.0f}", "< 600", total < 600),
    ]
    shutil.rmtree(folder)
    return finish("newcomer-quick" if args.quick else "newcomer", text, {"seconds": seconds, "rows": rows}, bars)


if __name__ == "__main__":
    sys.exit(main())
