"""What a secure sum costs, and whether it is the sum: masks at owners and opening at the centre, beside Flower's.

Updates of a Llama-shaped model, made of random numbers (--quick: 17M parameters and eight owners; else 96M and eight).
Each owner's numbers are made whole, masked and written, by the functions of a round; the centre adds up what it was
sent, with all owners, and without two who are lost after their letters. Flower's SecAgg+ needs its old API, so what is
timed of it is what an owner does there to the same arrays: rounding, its own mask, and one for each neighbour.

Run: python benchmarks/secure.py [--quick] [--work DIR].
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from _checkpoints import make
from _common import HERE, bar, finish, parser, table
from _peers import peer_python
from aggregate import update
from fanbu.contribution import Contribution, open_contribution
from fanbu.merging.summing import WEIGHT, Summands
from fanbu.model import Model, open_model
from fanbu.secure import Masked, Opened, opening
from fanbu.tensors import Tensors, save_tensors
from fanbu.transport import masks
from fanbu.transport.masks import Ring, Secrets

OWNERS, LOST = 8, 2


def prepared(names: tuple[str, ...]) -> tuple[Ring, dict[str, Secrets], dict[str, list[str]], dict[str, Any]]:
    """A ring, secrets, public keys, and what each owner finds in the letters to it."""
    ring, own = Ring("benchmark", names), {n: masks.drawn() for n in names}
    public = {n: s.public() for n, s in own.items()}
    letters = {n: masks.shares_for(ring, n, s, public) for n, s in own.items()}
    held = {n: masks.opened(ring, n, own[n], {k: v[n] for k, v in letters.items()}, public) for n in names}
    return ring, own, public, held


def hidden(c: Contribution, base: Model, ring: Ring, own: Secrets, public: dict[str, list[str]], out: Path) -> float:
    """One owner's masked numbers on disk; the seconds that it took."""
    started = time.perf_counter()
    keys = masks.pair_masks(ring, c.domain, own.seed, ring.neighbours(c.domain), public)
    numbers = Summands(c, base, [], 1.0)
    save_tensors(out, Masked(numbers, [*keys, masks.own_mask(ring, c.domain, own.own)], len(ring.owners)))
    return time.perf_counter() - started


def opened(
    sent: dict[str, Contribution], lost: list[str], ring: Ring, public: dict[str, list[str]], held: dict[str, Any]
) -> tuple[dict[str, torch.Tensor], float]:
    """The sum of who was heard, and the seconds that it took."""
    heard, answers = [n for n in sent if n not in lost], []
    for n in heard:
        told = {f"own:{k}": (held[n][k][0], held[n][k][2]) for k in heard if k in held[n]}
        told |= {f"seed:{k}": (held[n][k][0], held[n][k][1]) for k in lost if k in held[n]}
        tensors = {k: torch.tensor(list(place.to_bytes(2, "big") + v), dtype=torch.uint8)
                   for k, (place, v) in told.items()}  # fmt: skip
        answers.append(Contribution("updates", n, "fedavg", tensors))
    started = time.perf_counter()
    keys = opening(ring, heard, lost, public, answers)
    total = Opened([sent[n] for n in heard], keys)
    return {n: total[n] for n in total.names}, time.perf_counter() - started


def apart(total: dict[str, torch.Tensor], parts: list[Summands]) -> tuple[float, float]:
    """The largest difference to the sum in float64, and the largest number of the sum."""
    worst = largest = 0.0
    for name in parts[0].names:
        true = torch.zeros(parts[0].shapes[name], dtype=torch.float64)
        for part in parts:
            true += part[name]
        worst = max(worst, float((total[name] - true).abs().max()))
        largest = max(largest, float(true.abs().max())) if name != WEIGHT else largest
    return worst, largest


def main() -> int:
    args = parser(__doc__ or "").parse_args()
    size = "20M" if args.quick else "100M"
    work = args.work / f"secure-{size}"
    base = open_model(make(work / "base", size, 0))
    folders = [update(base.path, work, number, size) for number in range(OWNERS)]
    plain = {c.domain: c for c in map(open_contribution, folders)}
    ring, own, public, held = prepared(tuple(plain))
    seconds, sent = [], {}
    for name, c in plain.items():
        out = work / f"masked-{name}.safetensors"
        seconds.append(hidden(c, base, ring, own[name], public, out))
        sent[name] = Contribution("updates", name, "fedavg", Tensors(out))
    names, found, bars = list(plain), {}, []
    for what, lost in {"all": [], "two lost": names[:LOST]}.items():
        total, took = opened(sent, lost, ring, public, held)
        worst, largest = apart(total, [Summands(plain[n], base, [], 1.0) for n in names if n not in lost])
        found[what] = {"seconds": took, "difference": worst, "largest": largest}
        want = f"<= {len(names) - len(lost)} steps of 2^-40"
        ok = worst <= (len(names) - len(lost)) * masks.STEP
        bars.append(bar(f"sum of {what}, largest difference to that in float64", f"{worst:.2e}", want, ok))
    one, true = sent[names[0]].tensors, Summands(plain[names[0]], base, [], 1.0)
    key = max((n for n in true.names if n != WEIGHT), key=lambda n: true[n].numel())
    pair = torch.stack([one[key].double().flatten(), true[key].flatten()])
    r, chance = float(torch.corrcoef(pair)[0, 1]), 5 / pair.shape[1] ** 0.5
    got, want = f"correlation {r:.1e}", f"within chance ({chance:.1e})"
    bars.append(bar("what one owner sent, beside its numbers", got, want, abs(r) < chance))
    python = peer_python("flower", args.work)
    command = [str(python), str(HERE / "_secure_flower.py"), str(OWNERS - 1), str(folders[0] / "tensors.safetensors")]
    told = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    mine, theirs = min(seconds), told["seconds"]
    size_mb = (work / f"masked-{names[0]}.safetensors").stat().st_size / 1e6
    rows = [
        ["", "owner, s", "opening, s", "two lost, s", "MB an owner", "rounding of the sum, at most"],
        ["fanbu", f"{mine:.1f}", *(f"{found[w]['seconds']:.1f}" for w in found), f"{size_mb:.0f}",
         f"{OWNERS * masks.STEP / 2:.1e}"],
        ["Flower", f"{theirs:.1f}", "", "", "", f"{OWNERS * told['step']:.1e}"],
    ]  # fmt: skip
    text = table(rows)
    print(text, flush=True)
    bars.append(bar("an owner's masks beside Flower's", f"{theirs / mine:.1f} x faster", ">= 1", theirs >= mine))
    values = {**found, "owner_seconds": seconds, "mb": size_mb, "flower": told}
    return finish("secure-quick" if args.quick else "secure", text, values, bars)


if __name__ == "__main__":
    sys.exit(main())
