"""The only loop that trains. Checkpoints are safetensors and JSON; on a CPU, resuming is bit-exact."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits
from torch import Tensor, nn

from fanbu.batches import shuffled_batches
from fanbu.errors import FanbuError, UsageError
from fanbu.files import write_text
from fanbu.tensors import load_tensors, save_tensors
from fanbu.types import Context, Train

_UNFIT = {"Optimizer", "LBFGS", "SparseAdam"}  # these need a closure, or sparse gradients
BatchLoss = Callable[[nn.Module, Sequence[int]], Tensor]


@dataclass
class History:
    """What happened: steps taken, the validation value after each epoch (higher is better), and which was kept."""

    steps: int = 0
    losses: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    best_epoch: int = -1


def train(
    network: nn.Module,
    lengths: Sequence[int],
    loss: BatchLoss,
    plan: Train,
    context: Context,
    name: str,
    *,
    head: nn.Module | None = None,
    validate: Callable[[nn.Module], float] | None = None,
) -> History:
    """Trains ``network`` in place by ``loss(network, row indices)`` and leaves the best epoch's weights in it.

    ``lengths`` are the rows' token counts (batches are made of rows of like length). ``head`` is the part that
    learns at ``plan.head_lr``. ``validate`` returns a value where higher is better; with it, training stops after
    ``plan.patience`` epochs without a better one. With ``context.scratch``, an interrupted call continues where its
    last checkpoint was, to the same bits. Raises FanbuError when the loss is not finite.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    if not lengths:
        raise UsageError("nothing-to-train", f"{name} has no rows to train on", remedy="give it rows")
    set_up(context, "train", name)
    AcceleratorState._reset_state(reset_partial_state=True)  # one process may train at several precisions, devices
    accelerator = Accelerator(
        mixed_precision="bf16" if context.precision == "bf16" else "no", cpu=context.device == "cpu"
    )
    if plan.dropout is not None:
        _set_dropout(network, plan.dropout)
    masking = _without_masking(network)
    run = _Run(network, accelerator, lengths, plan, context, name, head)
    checkpoint = None if context.scratch is None else context.scratch / f"{name}.checkpoint"
    if checkpoint is not None:
        run.restore(checkpoint)
    saved = time.monotonic()
    while not run.finished:
        run.step(loss)
        if run.epoch_ended:
            run.end_epoch(validate)
        due = run.settled and time.monotonic() - saved >= context.checkpoint_seconds
        if checkpoint is not None and due and not run.finished:
            run.save(checkpoint)
            saved = time.monotonic()
    run.close()
    for config in masking:
        config.apply_spec_augment = True
    return run.history


def set_up(context: Context, *names: object) -> None:
    """Seeds torch for one purpose, and sets its threads and those that scikit-learn's arithmetic is done in: how many
    there are decides the last bits of either."""
    torch.manual_seed(context.seeded(*names))
    if context.threads:
        torch.set_num_threads(context.threads)
        threadpool_limits(context.threads, user_api="blas")
    if context.device != "cpu":  # there a sum's order is otherwise left to chance
        torch.use_deterministic_algorithms(True, warn_only=True)


def _set_dropout(network: nn.Module, rate: float) -> None:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate


def _without_masking(network: nn.Module) -> list[Any]:
    """Turns SpecAugment off: it draws from numpy's one generator for all, which no checkpoint holds. Returns the
    configs that had it on."""
    configs = {id(c): c for m in network.modules() if (c := getattr(m, "config", None)) is not None}
    found = [c for c in configs.values() if getattr(c, "apply_spec_augment", False)]
    for config in found:
        config.apply_spec_augment = False
    return found


class _Run:
    """The state of one training: everything that a checkpoint must hold."""

    def __init__(
        self, network: nn.Module, accelerator: Any, lengths: Sequence[int], plan: Train, context: Context, name: str,
        head: nn.Module | None,
    ) -> None:  # fmt: skip
        self.network, self.accelerator, self.lengths, self.plan = network, accelerator, lengths, plan
        self.context, self.name, self.seed = context, name, context.seeded("batches", name)
        per_epoch = math.ceil(len(lengths) / plan.batch_size)
        self.total = min(per_epoch * plan.epochs, plan.max_steps or per_epoch * plan.epochs)
        self.history, self.epoch, self.position = History(), 0, 0
        self.best: dict[str, Tensor] = {}
        self.best_value, self.idle, self.running, self.slot = -math.inf, 0, 0.0, 0
        self.settled = True  # no gradients wait for the next step: a checkpoint holds none
        self.batches = shuffled_batches(lengths, plan.batch_size, self.seed, 0)
        self.wrapped = accelerator.prepare_model(network.to(context.device), device_placement=False)
        optimizer = optimizer_of(network, head, plan)
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self.bases = [group["lr"] for group in optimizer.param_groups]
        network.train()

    @property
    def finished(self) -> bool:
        stopped = self.plan.patience and self.idle >= self.plan.patience
        return bool(self.history.steps >= self.total or stopped)

    @property
    def epoch_ended(self) -> bool:
        return self.position >= len(self.batches) or self.history.steps >= self.total

    def step(self, loss: BatchLoss) -> None:
        plan = self.plan
        factor = schedule(plan, self.history.steps / self.total)
        for group, base in zip(self.optimizer.param_groups, self.bases, strict=True):
            group["lr"] = base * factor
        with self.accelerator.autocast():
            value = loss(self.wrapped, self.batches[self.position])
        self.accelerator.backward(value / plan.accumulate)
        self.history.steps += 1
        self.position += 1
        self.settled = self.history.steps % plan.accumulate == 0 or self.epoch_ended
        if self.settled:
            if plan.clip:
                self.accelerator.clip_grad_norm_(self.network.parameters(), plan.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.running += float(value.detach())
        if not math.isfinite(self.running):
            raise FanbuError(
                "diverged", f"{self.name}: the loss is not finite at step {self.history.steps}",
                remedy="lower lr, or use fp32; nothing was saved over",
            )  # fmt: skip
        self.context.progress(self.name, self.history.steps, self.total)

    def end_epoch(self, validate: Callable[[nn.Module], float] | None) -> None:
        self.history.losses.append(self.running / self.position)
        self.running = 0.0
        if validate is not None:
            self.network.eval()
            value = validate(self.network)
            self.network.train()
            self.history.values.append(value)
            if value > self.best_value:
                self.best_value, self.idle, self.history.best_epoch = value, 0, self.epoch
                self.best = {k: v.detach().clone() for k, v in self.network.state_dict().items()}
            else:
                self.idle += 1
        self.epoch, self.position = self.epoch + 1, 0
        self.batches = shuffled_batches(self.lengths, self.plan.batch_size, self.seed, self.epoch)

    def close(self) -> None:
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        if self.best and self.history.best_epoch < self.epoch - 1:
            self.network.load_state_dict(self.best)
        self.network.eval()
        self.context.progress(self.name, self.total, self.total)

    def save(self, folder: Path) -> None:
        """Two generations by turns, the JSON last: whichever is whole and newest counts."""
        folder.mkdir(parents=True, exist_ok=True)
        slot, self.slot = self.slot, 1 - self.slot
        tensors = {f"network.{k}": v for k, v in _unshared(self.network.state_dict()).items()}
        tensors |= {f"best.{k}": v for k, v in _unshared(self.best).items()}
        for number, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{k}": torch.as_tensor(v) for k, v in state.items()}
        tensors["rng"] = torch.get_rng_state()
        (folder / f"{slot}.json").unlink(missing_ok=True)
        save_tensors(folder / f"{slot}.safetensors", tensors)
        state = {
            "history": asdict(self.history), "epoch": self.epoch, "position": self.position, "idle": self.idle,
            "best_value": None if self.best_value == -math.inf else self.best_value, "running": self.running,
        }  # fmt: skip
        write_text(folder / f"{slot}.json", json.dumps(state))

    def restore(self, folder: Path) -> None:
        found = [(json.loads(p.read_text()), p) for p in folder.glob("?.json")]
        if not found:
            return
        state, path = max(found, key=lambda item: item[0]["history"]["steps"])
        self.slot = 1 - int(path.stem)
        tensors = load_tensors(path.with_suffix(".safetensors"))
        self.history = History(**state["history"])
        self.epoch, self.position, self.idle, self.running = (
            state["epoch"], state["position"], state["idle"], state["running"],
        )  # fmt: skip
        self.best_value = -math.inf if state["best_value"] is None else state["best_value"]
        self.network.load_state_dict(_part(tensors, "network."), strict=False)
        best = _part(tensors, "best.")
        self.best = {**_part(tensors, "network."), **best} if best else {}
        groups = self.optimizer.state_dict()["param_groups"]
        slots: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _part(tensors, "optimizer.").items():
            number, _, key = name.partition(".")
            slots.setdefault(int(number), {})[key] = tensor
        self.optimizer.load_state_dict({"state": slots, "param_groups": groups})
        self.batches = shuffled_batches(self.lengths, self.plan.batch_size, self.seed, self.epoch)
        torch.set_rng_state(tensors["rng"])


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _unshared(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each storage once: tied weights are restored by their tie."""
    seen: set[int] = set()
    kept = {}
    for name, tensor in state.items():
        if tensor.data_ptr() not in seen or not tensor.data_ptr():
            kept[name] = tensor
        seen.add(tensor.data_ptr())
    return kept


def optimizer_of(network: nn.Module, head: nn.Module | None, plan: Train) -> torch.optim.Optimizer:
    """Four groups: head or body, decayed or not (biases and norms are not)."""
    allowed = {n: k for n, k in vars(torch.optim).items() if isinstance(k, type) and n not in _UNFIT}
    kind: Any = allowed.get(plan.optimizer)
    if kind is None:
        raise UsageError(
            "unknown-optimizer", "optimizer", allowed=sorted(allowed), got=plan.optimizer, remedy="take one of these"
        )
    in_head = set() if head is None else set(map(id, head.parameters()))
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for parameter in network.parameters():
        if parameter.requires_grad:
            groups.setdefault((id(parameter) in in_head, parameter.ndim > 1), []).append(parameter)
    settings = [
        {"params": p, "lr": plan.head_lr if h else plan.lr, "weight_decay": plan.weight_decay if decayed else 0.0}
        for (h, decayed), p in sorted(groups.items())
    ]
    fused = {"fused": True} if plan.optimizer in {"Adam", "AdamW", "SGD"} else {}
    optimizer: torch.optim.Optimizer = kind(settings, lr=plan.lr, **fused)
    return optimizer


def schedule(plan: Train, done: float) -> float:
    """The learning rate's factor after a share ``done`` in [0, 1) of all steps.

    After a linear warm-up: cosine 0.5 (1 + cos(pi x)); linear 1 - x; cyclic, three cosine cycles (Loshchilov and
    Hutter 2017); constant 1.
    """
    if done < plan.warmup:
        return (done + 1e-3) / (plan.warmup + 1e-3)
    x = (done - plan.warmup) / max(1 - plan.warmup, 1e-9)
    if plan.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * x))
    if plan.schedule == "linear":
        return 1 - x
    if plan.schedule == "cyclic":
        return 0.5 * (1 + math.cos(math.pi * (3 * x % 1)))
    return 1.0
