"""PEFT adapters as specialists: opened as hostile files, fitted to a base, sent as the factors that they are."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanbu.contribution import Contribution
from fanbu.errors import FitError, IntegrityError, UsageError
from fanbu.merging.factors import FORM, MAGNITUDE, NEW, SCALE, A, B, Factored
from fanbu.merging.store import Store, task_vector
from fanbu.merging.task_vector import HEAD, TaskVector, head_tensors
from fanbu.model import MANIFEST, Model, open_model, read_json, resolve
from fanbu.tensors import Tensors, check_finite, chunks

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 4 * 2**20
PREFIX = "base_model.model."
# model types whose layers (of these names) store weights as [in, out]
CONV1D = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_CONV1D_LAYERS = {"c_attn", "c_proj", "c_fc", "q_attn"}
# what a LoraConfig may say without changing what the factors mean; anything else must be off
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "eva_config",
    "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_dropout", "lora_ga_config", "megatron_config",
    "megatron_core", "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern",
    "revision", "runtime_config", "target_modules", "task_type", "use_dora", "use_rslora", "velora_config",
}  # fmt: skip
# these change the base's weights before training, so the factors alone are not the change
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_KEY = re.compile(
    r"(?P<module>.+)\.(?:lora_(?P<kind>[AB])(?:\.default)?\.weight|lora_embedding_(?P<table>[AB])(?:\.default)?"
    r"|(?P<m>lora_magnitude_vector)(?:\.default)?(?:\.weight)?)"
)


@dataclass(frozen=True)
class LoraSettings:
    """What an adapter_config.json says, checked."""

    rank: int
    alpha: float
    ranks: Mapping[str, Any]
    alphas: Mapping[str, Any]
    rslora: bool
    dora: bool
    bias: str
    fan_in_fan_out: bool

    def of(self, module: str) -> tuple[int, float]:
        """(rank, scaling) of a module: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        rank, alpha = int(_matched(self.ranks, module, self.rank)), float(_matched(self.alphas, module, self.alpha))
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


class Adapter(Mapping[str, Tensor]):
    """A LoRA, rsLoRA or DoRA adapter beside the base that it was trained on: its factors, under the names that
    ``Factored`` knows, read from the file when asked for; label rows have the prefix ``head:``.

    Module names are brought to the base's tensor names; a prefix that the base's checkpoint has or lacks is found.

    Raises:
        IntegrityError: the folder is not a whole adapter in safetensors, or holds NaN or Inf.
        FitError: a kind or option of adapter whose change is no such product, or modules that the base has not.
    """

    def __init__(self, path: Path, base: Model) -> None:
        self.path, self.base = path, base
        self.settings, self.config = read_settings(path)
        _check_base(path, base)
        if not (path / WEIGHTS).is_file():
            raise IntegrityError(
                "adapter-missing", f"{path} has no {WEIGHTS}", allowed="safetensors",
                got=sorted(p.name for p in path.iterdir() if p.is_file())[:6],
                remedy="save the adapter with safe_serialization=True; pickled weights are never opened",
            )  # fmt: skip
        self.file = Tensors(path / WEIGHTS)
        self._check_numbers()
        self.entries: dict[str, tuple[str, bool]] = {}  # our name: its name in the file, and whether it is transposed
        self.scales: dict[str, float] = {}
        self._map()
        # the same check that the centre makes
        Factored(self, body_of(base), str(path))

    def _check_numbers(self) -> None:
        for key, spec in self.file.specs.items():
            if not spec.torch_dtype.is_floating_point:
                raise self._unfit(f"tensor {key!r} holds whole numbers (quantised?)", spec.dtype)
            for start, stop in chunks(spec.shape):
                check_finite(key, self.file.rows(key, start, stop), spec.file)

    def _map(self) -> None:
        modules: dict[str, dict[str, str]] = {}
        replaced: dict[str, str] = {}
        for key in self.file:
            if ".original_module." in key:
                continue
            found = _KEY.fullmatch(key.removeprefix(PREFIX))
            if found:
                kind = found["kind"] or ("table_" + found["table"] if found["table"] else "m")
                modules.setdefault(found["module"], {})[kind] = key
            elif "lora_" in key:
                raise self._unfit(f"tensor {key!r} is of a kind that is not known", key)
            else:
                replaced[re.sub(r"\.(base_layer|modules_to_save(\.default)?)(?=\.)", "", key.removeprefix(PREFIX))] = (
                    key
                )
        if not modules:
            raise self._unfit("it holds no low-rank factors", list(self.file)[:4])
        rename = self._names([m + ".weight" for m in modules])
        for module, keys in modules.items():
            self._add(module, rename(module + ".weight"), keys)
        for name, key in replaced.items():
            self._replace(rename(name), name, key)

    def _names(self, wanted: Sequence[str]) -> Any:
        """How the adapter's names become the base's: as they are, without their first word, or with one before it."""
        known = self.base.tensors
        words = sorted({n.partition(".")[0] for n in known})
        ways = [lambda n: n, lambda n: n.partition(".")[2], *(lambda n, w=w: f"{w}.{n}" for w in words)]
        for way in ways:
            if all(way(n) in known for n in wanted):
                return way
        missing = [n.removesuffix(".weight") for n in wanted if n not in known]
        raise FitError(
            "other-architecture", f"the adapter in {self.path} changes modules that the base lacks or ties",
            allowed=f"modules of {self.base.path}", got=missing[:6],
            remedy="give the base that the adapter was trained on",
        )  # fmt: skip

    def _add(self, module: str, name: str, keys: Mapping[str, str]) -> None:
        table = "table_A" in keys
        a, b = keys.get("table_A" if table else "A"), keys.get("table_B" if table else "B")
        if a is None or b is None or (self.settings.dora and not table) != ("m" in keys):
            raise self._broken(f"{module} lacks a factor, or has one that its config does not name", sorted(keys))
        rank, scaling = self.settings.of(module)
        shape = self.file.specs[a].shape
        if len(shape) != 2 or shape[0] != rank:
            raise self._broken(f"{module} has factors of {shape} where its config says rank {rank}", shape)
        conv = self.base.config.get("model_type") in CONV1D and module.rpartition(".")[2] in _CONV1D_LAYERS
        if self.settings.fan_in_fan_out and not conv and self.base.config.get("model_type") not in CONV1D:
            raise self._unfit("fan_in_fan_out is set for a base that stores weights as [out, in]", module)
        if conv and "m" in keys:
            raise self._unfit("DoRA on weights stored as [in, out]", module)
        turned = table or conv
        self.entries[A + name] = (b, True) if turned else (a, False)
        self.entries[B + name] = (a, True) if turned else (b, False)
        if "m" in keys:
            self.entries[MAGNITUDE + name] = (keys["m"], False)
        self.scales[SCALE + name] = scaling

    def _replace(self, name: str, own: str, key: str) -> None:
        """A tensor that was trained as it is: a bias, or a module to save (label rows among them)."""
        heads = head_tensors(self.base)
        if (head := name if name in heads else own) in heads:
            self.entries[HEAD + head] = (key, False)
        elif name not in self.base.tensors:
            raise self._unfit(f"it replaces {own}, which the base has not", key)
        elif A + name not in self.entries:
            self.entries[NEW + name] = (key, False)
        elif not torch.equal(self.file[key].float(), Tensors(self.base.path)[name].float()):
            raise self._unfit(f"{own} is both replaced and changed by factors", key)

    @cached_property
    def names(self) -> list[str]:
        """The names of its tensors."""
        return sorted([*self.entries, *self.scales])

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        if name in self.scales:
            return (), torch.float64
        key, turned = self.entries[name]
        spec = self.file.specs[key]
        return spec.shape[::-1] if turned else spec.shape, spec.torch_dtype

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one tensor as they are stored."""
        if name in self.scales:
            return torch.tensor([self.scales[name]], dtype=torch.float64)[start:stop]
        key, turned = self.entries[name]
        if turned:
            return self.file.rows(key, 0, self.file.specs[key].rows)[:, start:stop].T.contiguous()
        return self.file.rows(key, start, stop)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.entries and name not in self.scales:
            raise KeyError(name)
        shape, _ = self.layout(name)
        return self.rows(name, 0, shape[0] if shape else 1).reshape(shape).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def _unfit(self, why: str, got: object) -> FitError:
        return _unfit(self.path, why, got)

    def _broken(self, why: str, got: object) -> IntegrityError:
        return _broken(self.path, why, got)


def adapter_contribution(path: Path, base: Model, name: str, labels: Sequence[str] = ()) -> Contribution:
    """The factors of an adapter as they are stored, and its label rows; see ``Adapter`` for what is refused.

    ``labels`` names the rows of a label head that the adapter brings, in their order.
    """
    adapter = Adapter(path, base)
    heads = [n for n in adapter if n.startswith(HEAD)]
    count = adapter.layout(heads[0])[0][0] if heads else 0
    if heads and (len(labels) != count or any(adapter.layout(n)[0][0] != count for n in heads)):
        raise UsageError(
            "adapter-labels", f"{name}: the adapter brings a head of {count} labels", allowed=f"{count} names in order",
            got=list(labels), remedy="name the labels of this adapter, in the order of its rows",
        )  # fmt: skip
    sent = [label if "/" in label else f"{name}/{label}" for label in labels] if heads else []
    return Contribution("weights", name, "adapter", adapter, meta={"form": FORM, "labels": sent})


def weights_contribution(
    path: str | Path, base: Model, name: str, labels: Sequence[str] = (), store: Store = "exact"
) -> Contribution:
    """What a specialist sends in the weights family, whether it is a full checkpoint or an adapter of the base.

    ``labels`` is needed only for an adapter with a label head: its file does not name them. Raises FitError for an
    adapter that shall be packed.
    """
    folder = resolve(path)
    if not (folder / CONFIG).exists():
        model = open_model(folder)
        return task_vector(TaskVector(model, base), name, list(labels or model.labels), store)
    if store != "exact":
        raise FitError(
            "packed-already", f"{name} sends factors, which are small as they are", allowed="store: exact", got=store,
            remedy="leave store out",
        )  # fmt: skip
    return adapter_contribution(folder, base, name, labels)


def body_of(base: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the base's tensors of real numbers, label rows left out."""
    heads = set(head_tensors(base))
    return {n: s.shape for n, s in base.tensors.items() if n not in heads and s.torch_dtype.is_floating_point}


def read_settings(path: Path) -> tuple[LoraSettings, dict[str, Any]]:
    """What adapter_config.json says, and the whole of it; FitError names an option that is not understood."""
    file = path / CONFIG
    if file.is_file() and file.stat().st_size > MAX_CONFIG:
        raise _broken(path, f"{CONFIG} is larger than {MAX_CONFIG} bytes", file.stat().st_size)
    config = read_json(file, "adapter-broken")
    if config.get("peft_type") != "LORA":
        raise _unfit(path, f"adapters of type {config.get('peft_type')!r} are not low-rank changes", "peft_type")
    for option, value in config.items():
        if option not in _KNOWN and value:
            raise _unfit(path, f"option {option!r} is not understood", f"{option}: {value}")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise _unfit(
            path, f"init_lora_weights {start!r} changed the base's own weights; convert it to LoRA first", start
        )
    bias = config.get("bias", "none")
    if bias not in ("none", "all", "lora_only"):
        raise _unfit(path, "bias must be none, all or lora_only", bias)
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    for what, low, values in (
        ("r", 1, [config.get("r"), *_values(path, ranks)]),
        ("lora_alpha", None, [config.get("lora_alpha"), *_values(path, alphas)]),
    ):
        for value in values:
            whole = isinstance(value, int) if low else isinstance(value, (int, float)) and math.isfinite(value)
            if not whole or isinstance(value, bool) or abs(value) > 2**20 or (low is not None and value < low):
                raise _broken(path, f"{what} is no sound number", value)
    switches = [config.get(k, False) for k in ("use_rslora", "use_dora", "fan_in_fan_out")]
    if any(type(s) is not bool for s in switches):
        raise _broken(path, "use_rslora, use_dora and fan_in_fan_out must be true or false", switches)
    return LoraSettings(
        config["r"], config["lora_alpha"], ranks, alphas, switches[0], switches[1], bias, switches[2]
    ), config


def _values(path: Path, patterns: Any) -> list[Any]:
    """The values of a pattern mapping whose patterns cannot take long to match."""
    if not isinstance(patterns, dict):
        raise _broken(path, "rank_pattern and alpha_pattern must be mappings", patterns)
    for pattern in patterns:
        plain = re.fullmatch(r"[\w.^\\|\[\]$*-]{1,256}", pattern) and pattern.count("*") <= 1
        try:
            re.compile(pattern if plain else "(")
        except re.error:
            raise _unfit(path, "a pattern of ranks or alphas is more than names with at most one *", pattern) from None
    return list(patterns.values())


def _matched(patterns: Mapping[str, Any], module: str, default: float) -> Any:
    """The value of the first pattern that is the end of a module's name."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), default)


def _check_base(path: Path, base: Model) -> None:
    """An adapter that was extracted here names its base; what PEFT writes of a base's name is information only."""
    if (path / MANIFEST).exists():
        origin = read_json(path / MANIFEST, "adapter-broken").get("base")
        if origin != base.digest:
            raise FitError(
                "other-base", f"the adapter in {path} was made for another base", allowed=origin, got=base.digest,
                remedy="give the base that it was made for",
            )  # fmt: skip


def _unfit(path: Path, why: str, got: object) -> FitError:
    return FitError(
        "adapter-kind", f"the adapter in {path} cannot be merged as factors: {why}",
        allowed="LoRA, rsLoRA or DoRA of linear layers, LoRA of embeddings", got=got,
        remedy="merge it into its base with PEFT (merge_and_unload) and give the full checkpoint",
    )  # fmt: skip


def _broken(path: Path, why: str, got: object) -> IntegrityError:
    return IntegrityError(
        "adapter-broken", f"the adapter in {path} is broken: {why}", got=got, remedy="save or download it again"
    )
