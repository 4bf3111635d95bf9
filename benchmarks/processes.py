"""Owners as real processes: one SuperLink, eight SuperNodes on loopback, three rounds, two owners killed in the first.

Eight text domains, each of an owner of its own, who joins by `fanbu join`; the centre is `fanbu serve-center`, and has
no row. As soon as the second owner's specialist is there, two owners are killed (kill -9, with all they started); one
comes back as soon as the round is over. Once with ``distill``, once with ``fedavg`` (label rows and low-rank
factors). Then one round with everybody, beside `fanbu run` on the same recipe with all rows in one place: the same
candidate, bit for bit. Six steps of training each time: this is about processes, not about accuracy.

Run: python benchmarks/processes.py [--quick] [--data DIR] [--work DIR] [--only WAY ...]. --quick: four owners, of whom
two are killed; ``distill`` alone unless --only says otherwise.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _common import bar, finish, parser, table, text_domains
from _outcomes import BASE, usable

FAST = {"epochs": 1, "max_steps": 6, "batch_size": 16, "lr": 2e-4}
WAYS: dict[str, Any] = {
    "distill": {"method": "distill", "train": FAST},
    "fedavg": {"method": "fedavg", "train": {**FAST, "lr": 1e-3}, "learns": {"layers": "lora"}},
}
LIMIT = {"train": 600, "valid": 100, "test": 100}
ROUNDS = 3


@dataclass
class Federation:
    """The processes of one recipe, and where they write."""

    folder: Path
    port: int
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    def start(self, name: str, *command: str) -> None:
        """One of fanbu's commands, in a process group of its own."""
        log = (self.folder / f"{name}.log").open("ab")
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        self.processes[name] = subprocess.Popen(
            [sys.executable, "-m", "fanbu", *command], cwd=self.folder, stdout=log, stderr=log, env=environment,
            start_new_session=True,
        )  # fmt: skip

    def join(self, name: str) -> None:
        """An owner, with the file and workspace of its own."""
        own = f"owners/{name}"
        self.start(name, "join", f"127.0.0.1:{self.port}", f"{own}.yaml", "--workspace", own, "--insecure")

    def kill(self, name: str) -> None:
        """An owner, with all it started."""
        process = self.processes.pop(name)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def end(self) -> None:
        """All that is left."""
        for name in list(self.processes):
            self.kill(name)


def recipes(folder: Path, domains: Mapping[str, Path], way: str, rounds: int) -> None:
    """The centre's recipe, each owner's part, and a recipe with all rows in one place."""
    (folder / "owners").mkdir(parents=True, exist_ok=True)
    specs = {}
    for name, place in domains.items():
        files = {split: str(place / f"{split}.jsonl") for split in ("train", "valid", "test")}
        specs[name] = {**files, "limit": LIMIT}
        (folder / "owners" / f"{name}.yaml").write_text(json.dumps({"domains": {name: specs[name]}}))
    common = {
        "fanbu": 1, "name": way, "model": BASE, "device": "cpu", "precision": "fp32", "threads": 1, "max_length": 64,
        "shrink": [{"method": "finetune", "train": FAST}], "feedback": WAYS[way], "rounds": rounds,
        "gate": {"margin": 0.3},
    }  # fmt: skip
    away = {"domains": {n: {} for n in specs}, "transport": {"kind": "flower", "arrive": 60, "seconds": 1800}}
    for name, more in {
        "center": {**away, "workspace": "center"},
        "here": {"domains": specs, "workspace": "here"},
    }.items():
        (folder / f"{name}.yaml").write_text(json.dumps({**common, **more}))


def free_port() -> int:
    """A port that nobody has."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def with_losses(folder: Path, names: Sequence[str], port: int) -> dict[str, Any]:
    """Three rounds; of the first, two owners are killed as soon as two specialists are there, and one comes back."""
    federation, gone = Federation(folder, port), list(names[-2:])
    try:
        for name in names:
            federation.join(name)
        federation.start("center", "serve-center", "center.yaml", "--port", str(port), "--insecure")
        centre, began = federation.processes["center"], time.monotonic()
        to_kill, to_join = list(gone), gone[:1]
        while centre.poll() is None:
            if to_kill and grown(folder, names) >= 2:
                while to_kill:
                    federation.kill(to_kill.pop())
            if to_join and not to_kill and rounds_done(folder):
                federation.join(to_join.pop())
            time.sleep(1.0)
        return {"code": centre.returncode, "seconds": time.monotonic() - began, "killed": gone}
    finally:
        federation.end()


def grown(folder: Path, names: Sequence[str]) -> int:
    """How many owners have a specialist."""
    return sum(bool(list((folder / "owners" / n).glob("stages/shrink-*"))) for n in names)


def rounds_done(folder: Path) -> int:
    """How many rounds have ended."""
    history = folder / "center" / "history.jsonl"
    events = [json.loads(line)["event"] for line in history.read_text().splitlines()] if history.exists() else []
    return sum(event in {"promoted", "refused"} for event in events)


def records(workspace: Path) -> list[dict[str, Any]]:
    """The records of all rounds, oldest first."""
    found = [json.loads(p.read_text()) for p in workspace.glob("rounds/*/record.json")]
    return sorted(found, key=lambda record: record["round"])


def whole(folder: Path, names: Sequence[str], port: int) -> tuple[str, str]:
    """The champions of one round with everybody, over Flower and with all rows in one place."""
    federation = Federation(folder, port)
    try:
        for name in names:
            federation.join(name)
        federation.start("center", "serve-center", "center.yaml", "--port", str(port), "--insecure")
        federation.processes["center"].wait()
    finally:
        federation.end()
    subprocess.run([sys.executable, "-m", "fanbu", "run", "here.yaml"], cwd=folder, check=False, capture_output=True)
    found = [records(folder / place) for place in ("center", "here")]
    there, here = (made[0]["candidate"]["digest"] if made else "none" for made in found)
    return there, here


def main() -> int:
    flags = parser(__doc__ or "")
    flags.add_argument("--only", nargs="+", choices=list(WAYS), default=None)
    args = flags.parse_args()
    domains = dict(list(usable(text_domains(args.data)).items())[: 4 if args.quick else 8])
    name, names = "processes-quick" if args.quick else "processes", list(domains)
    rows, bars, values = [["way", "round", "domains judged", "missed", "decision"]], [], {}
    for way in args.only or (["distill"] if args.quick else list(WAYS)):
        folder = args.work / name / way
        shutil.rmtree(folder, ignore_errors=True)
        recipes(folder, domains, way, ROUNDS)
        ended = with_losses(folder, names, free_port())
        made = records(folder / "center")
        for record in made:
            missed = "; ".join(f"{d}: {why}" for d, why in record["missed"].items()) or "-"
            rows.append([way, str(record["round"]), str(len(record["domains"])), missed, record["decision"]])
        killed = set(ended["killed"])
        told = bool(made) and set(made[0]["missed"]) == killed
        back = len(made) == ROUNDS and ended["killed"][0] in made[-1]["domains"]
        got = f"{len(made)} rounds, exit code {ended['code']}, {ended['seconds']:.0f} s"
        bars.append(
            bar(f"{way}: finishes", got, f"{ROUNDS} rounds, 0 or 3", len(made) == ROUNDS and ended["code"] in {0, 3})
        )
        bars.append(bar(f"{way}: the record of round 1 names both", str(told), "True", told))
        bars.append(bar(f"{way}: who came back is judged in round {ROUNDS}", str(back), "True", back))
        values[way] = {"seconds": ended["seconds"], "missed": [r["missed"] for r in made]}
        alike = args.work / name / f"{way}-whole"
        shutil.rmtree(alike, ignore_errors=True)
        recipes(alike, domains, way, 1)
        there, here = whole(alike, names, free_port())
        bars.append(bar(f"{way}: the candidate of one place", there[:12], here[:12], there == here != "none"))
    text = f"{table(rows)}\n\n{len(names)} owners, of whom two were killed in round 1"
    print(text, flush=True)
    return finish(name, text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
