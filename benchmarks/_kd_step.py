"""One distillation step in a process of its own: the loss from hidden states, and its gradients. Prints JSON.

Run: python _kd_step.py WHO VOCABULARY TOKENS TIMES FILE; WHO is fanbu, naive or trl. Gradients go to FILE.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

HIDDEN, WIDE = 512, 768  # of student and teacher
TEMPERATURE = 2.0


def naive(teacher: torch.Tensor, head: nn.Linear, student: torch.Tensor, own: nn.Linear) -> torch.Tensor:
    """KL(T || S), mean over tokens, all logits at once."""
    with torch.no_grad():
        p = (head(teacher) / TEMPERATURE).softmax(-1)
    log_q = (own(student) / TEMPERATURE).log_softmax(-1)
    return functional.kl_div(log_q, p, reduction="batchmean") * TEMPERATURE**2


def fanbu(teacher: torch.Tensor, head: nn.Linear, student: torch.Tensor, own: nn.Linear) -> torch.Tensor:
    """The same in chunks."""
    from fanbu.losses import chunked_divergence

    return chunked_divergence(teacher, (head.weight, None), student, (own.weight, None), "forward", TEMPERATURE)


def trl(teacher: torch.Tensor, head: nn.Linear, student: torch.Tensor, own: nn.Linear) -> torch.Tensor:
    """TRL's loss of its distillation trainer; it has no factor of the temperature."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, len(student))
    loss, _, _ = _chunked_divergence_loss(
        student[None], teacher[None], own.weight, head.weight, mask, beta=0.0, temperature=TEMPERATURE
    )
    return loss * TEMPERATURE**2


WAYS = {"fanbu": fanbu, "naive": naive, "trl": trl}


class Peak:
    """Polls this process's anonymous memory; ``above`` is by how much it rose, in bytes."""

    def __init__(self) -> None:
        self.over, self.first, self.most = threading.Event(), own_memory(), 0
        self.thread = threading.Thread(target=self.poll)
        self.thread.start()

    def poll(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, own_memory())

    def above(self) -> int:
        self.over.set()
        self.thread.join()
        return max(0, self.most - self.first)


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("RssAnon"))


def main() -> None:
    who, vocabulary, tokens, times, file = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]
    torch.manual_seed(0)
    torch.set_num_threads(2)
    student = torch.randn(tokens, HIDDEN, requires_grad=True)
    teacher, head, own = torch.randn(tokens, WIDE), *(nn.Linear(n, vocabulary, bias=False) for n in (WIDE, HIDDEN))
    head.weight.requires_grad_(False)
    watched: list[Any] = [student, own.weight]
    way = WAYS[who]
    few = slice(0, 16)
    torch.autograd.grad(way(teacher[few], head, student[few], own), watched)  # imports, and first allocations
    seconds, peak = [], Peak()
    for _ in range(times):
        started = time.perf_counter()
        loss = way(teacher, head, student, own)
        gradients = torch.autograd.grad(loss, watched)
        seconds.append(time.perf_counter() - started)
        if len(seconds) < times:
            del gradients, loss
    above = peak.above()
    rows = gradients[1][:: max(1, vocabulary // 512)].clone()
    save_file({"loss": loss.detach().reshape(1), "student": gradients[0], "head": rows}, file)
    print(
        json.dumps({"seconds": sorted(seconds)[len(seconds) // 2], "least": min(seconds), "peak_own_gb": above / 1e9})
    )


if __name__ == "__main__":
    main()
