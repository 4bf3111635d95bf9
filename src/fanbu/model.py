"""A Model: a directory in the Hugging Face layout plus ``fanbu.json``, its manifest.

Opened lazily (headers and JSON only), verified against the manifest's sha256, saved atomically: files first, the
manifest last, then the folder takes its final name, so that its presence means that it is whole.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from fanbu.errors import DataError, IntegrityError, UsageError, needs_extra
from fanbu.files import disk_error, file_sha256, sync, write_text
from fanbu.model_card import model_card
from fanbu.readers import HEARING, PROCESSOR, auto_class, for_media, load_processor, write_processor
from fanbu.tensors import TensorSpec, index_tensors, write_tensors
from fanbu.types import CLASSIFYING, MEDIA, Context, Task, digest

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "fanbu.json"
CARD = "README.md"
AWAY = "away.json"  # where weights stay with their owner: how many there are
MAX_JSON = 200 * 2**20
# What belongs to a model: weights, configuration, tokenizer. Everything else in a folder is left alone.
_SUFFIXES = {".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken"}


@dataclass(frozen=True)
class Model:
    """One checkpoint directory. ``manifest`` is empty where fanbu did not make it. Of a model whose weights stay with
    their owner, ``away`` says how many ``parameters`` and ``bytes`` they have."""

    path: Path
    config: Mapping[str, Any]
    manifest: Mapping[str, Any] = field(default_factory=dict)
    away: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """sha256 over names and contents of its files: the same bytes, the same digest, wherever they lie."""
        return digest(self.files)

    @cached_property
    def files(self) -> dict[str, str]:
        """sha256 of each file by name (from the manifest where there is one)."""
        if self.manifest:
            return dict(self.manifest["files"])
        return {name: file_sha256(self.path / name) for name in model_files(self.path)}

    @cached_property
    def tensors(self) -> dict[str, TensorSpec]:
        """Where each tensor lies; only headers are read. UsageError where they are away."""
        if self.away:
            raise UsageError(
                "weights-away", f"the weights of {self.path} stay with their owner", got=self.path,
                remedy="ask the owner for them, or choose a way that does without",
            )  # fmt: skip
        return index_tensors(self.path)

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        import math

        if self.away:
            return self.away["parameters"]
        return sum(self._numbers(name, math.prod(spec.shape)) for name, spec in self.tensors.items())

    def _numbers(self, name: str, stored: int) -> int:
        """How many weights a tensor stands for: packed ones (compressed-tensors) lie in whole words of 32 bits."""
        groups = (self.config.get("quantization_config") or {}).get("config_groups")
        if not groups:
            return stored
        if name.endswith((".weight_scale", ".weight_shape")):
            return 0
        if not name.endswith(".weight_packed"):
            return stored
        bits: Any = ((groups.get("group_0") or {}).get("weights") or {}).get("num_bits")
        if bits not in range(1, 9):
            raise IntegrityError(
                "checkpoint-config", f"{self.path} does not say how many bits its packed weights have",
                allowed="1 to 8", got=bits, remedy=_RESTORE,
            )  # fmt: skip
        return int(stored * 32 // bits)

    @property
    def bytes(self) -> int:
        """Size of its weights on disk."""
        if self.away:
            return self.away["bytes"]
        return sum(spec.bytes for spec in self.tensors.values())

    @property
    def task(self) -> Task | None:
        """The task that its architecture is made for; None for a bare body."""
        name = str((self.config.get("architectures") or [""])[0])
        if name.endswith("ForSequenceClassification"):
            return "audio-classification" if self.config.get("model_type") in HEARING else "text-classification"
        if name.endswith("ForImageClassification"):
            return "image-classification"
        if name.endswith("ForAudioClassification"):
            return "audio-classification"
        return "causal-lm" if name.endswith(("ForCausalLM", "LMHeadModel")) else None

    @property
    def labels(self) -> tuple[str, ...]:
        """Its label names (``domain/label``), in the order of its rows; empty where it has no label head."""
        if self.task not in CLASSIFYING:
            return ()
        names = self.config.get("id2label") or {}
        return tuple(names[key] for key in sorted(names, key=int))


def model_files(folder: Path) -> list[str]:
    """Names of the files that make up a model, sorted; the manifest and the card are not among them."""
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.is_file() and p.suffix in _SUFFIXES and p.name != MANIFEST and not p.name.startswith(".")
    )


def open_model(source: str | Path, *, verify: bool = True) -> Model:
    """Opens a model by directory, by ``package:NAME/folder`` (inside an installed package), or by hub id.

    With ``verify`` every file is checked against the manifest's sha256. Raises UsageError where nothing is found
    and IntegrityError where a file is missing, truncated or changed.
    """
    folder = resolve(source)
    config = read_json(folder / "config.json", "checkpoint-config")
    if "auto_map" in config:
        raise IntegrityError(
            "checkpoint-code",
            f"{folder} asks to run its own Python code (auto_map in config.json)",
            allowed="architectures that plain transformers knows",
            got=config["auto_map"],
            remedy="use a checkpoint that needs no trust_remote_code",
        )
    manifest: dict[str, Any] = {}
    if (folder / MANIFEST).exists():
        manifest = read_json(folder / MANIFEST, "manifest-broken")
        if not isinstance(manifest.get("files"), dict):
            raise IntegrityError("manifest-broken", f"{folder / MANIFEST} lists no files", remedy=_RESTORE)
    if manifest and (folder / AWAY).exists():
        sizes = read_json(folder / AWAY, "manifest-broken")
        model = Model(folder, config, manifest, {key: int(sizes[key]) for key in ("parameters", "bytes")})
        verify_files(folder, {"config.json": manifest["files"].get("config.json")})
        return model
    model = Model(folder, config, manifest)
    _ = model.tensors
    if verify and manifest:
        verify_files(folder, manifest["files"])
    return model


_RESTORE = "restore the folder from where it came from, or make it again"


def verify_files(folder: Path, files: Mapping[str, str]) -> None:
    """Raises IntegrityError where a file of a manifest is missing, changed, or not in its folder."""
    for name, expected in sorted(files.items()):
        path = folder / name
        if "/" in name or "\\" in name or not path.is_file():
            raise IntegrityError("file-missing", f"{path} is in the manifest and not there", remedy=_RESTORE)
        got = file_sha256(path)
        if got != expected:
            raise IntegrityError(
                "file-changed", f"{path} is not what its manifest says", allowed=expected, got=got, remedy=_RESTORE
            )


def resolve(source: str | Path) -> Path:
    """The directory that a model's name stands for. A hub id is downloaded unless HF_HUB_OFFLINE is set."""
    text = str(source)
    if text.startswith("package:"):
        name, _, rest = text.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise UsageError(
                "model-not-found", f"package {name!r} is not installed", got=text, remedy=f"pip install {name}"
            )
        folder = Path(spec.origin).parent / rest
    else:
        folder = Path(text).expanduser()
    if folder.is_dir():
        return folder
    if text.count("/") == 1 and not text.startswith((".", "~", "/", "package:")):
        return _download(text)
    raise UsageError(
        "model-not-found",
        f"no model at {text!r}",
        allowed="a directory with config.json and *.safetensors, package:NAME/folder, or a hub id owner/name",
        got=text,
        remedy="check the path",
    )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*/config.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise UsageError(
            "model-not-found",
            f"{name!r} is neither a directory here nor a model that the hub gives",
            allowed="a directory, or a hub id that is cached or can be downloaded",
            got=f"{type(error).__name__}: {error}",
            remedy="check the spelling, the connection, HF_TOKEN and HF_HUB_OFFLINE",
        ) from None


def read_json(path: Path, code: str) -> dict[str, Any]:
    """A JSON object from an untrusted file; IntegrityError(code) where it is missing, too large or broken."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"larger than {MAX_JSON} bytes")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except FileNotFoundError:
        raise IntegrityError(code, f"{path} is missing", remedy="give the folder of a whole checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise IntegrityError(code, f"{path} cannot be read: {error}", remedy=_RESTORE) from None
    return value


def load_tokenizer(model: Model) -> Any:
    """The model's tokenizer; IntegrityError where it is missing or does not fit the embedding table.

    What reads images or recordings (an image processor, a feature extractor) takes its place where the model does.
    """
    from transformers import AutoTokenizer

    if (model.path / PROCESSOR).exists() and (model.task in MEDIA or (model.task is None and for_media(model.config))):
        return load_processor(model.path, read_json(model.path / PROCESSOR, "tokenizer-broken"))
    names = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
    if not any((model.path / name).exists() for name in names):
        raise IntegrityError(
            "tokenizer-missing", f"{model.path} has no tokenizer", allowed=names, remedy="copy the tokenizer files too"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError("tokenizer-broken", f"{model.path}: {error}", remedy=_RESTORE) from None
    rows = int(model.config.get("vocab_size") or 0)
    if rows and len(tokenizer) > rows:
        raise IntegrityError(
            "tokenizer-mismatch",
            f"the tokenizer of {model.path} has more tokens than the model has embedding rows",
            allowed=f"at most {rows} tokens",
            got=len(tokenizer),
            remedy="use the tokenizer that the model was trained with",
        )
    return tokenizer


def load_network(model: Model) -> Any:
    """The transformers network of a classifier or causal model, in float32, with every tensor accounted for."""
    if model.task is None:
        raise UsageError(
            "model-task",
            f"{model.path} is a bare body",
            allowed="a classifier or a causal language model",
            got=model.config.get("architectures"),
            remedy="open it as a classifier first (fanbu run and fanbu shrink do that)",
        )
    return load_strictly(auto_class(model.task), model)


def load_strictly(auto: Any, model: Model, allowed_missing: Sequence[str] = (), config: Any = None) -> Any:
    """``auto.from_pretrained`` that refuses missing or mismatched tensors, and NaN and Inf."""
    import torch

    from fanbu.tensors import check_finite

    _ = model.tensors  # raises where they are away
    _quieten()
    try:
        network, info = auto.from_pretrained(
            model.path, dtype=torch.float32, local_files_only=True, trust_remote_code=False,
            use_safetensors=True, output_loading_info=True, **({} if config is None else {"config": config}),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise IntegrityError("checkpoint-broken", f"{model.path} does not load: {error}", remedy=_RESTORE) from None
    _in_floats(network, model)
    missing = [n for n in info["missing_keys"] if not n.startswith(tuple(allowed_missing) or ("\0",))]
    if missing or info["mismatched_keys"]:
        raise IntegrityError(
            "checkpoint-incomplete",
            f"{model.path} lacks tensors that its config asks for",
            got=[*missing, *map(str, info["mismatched_keys"])],
            remedy=_RESTORE,
        )
    for name, tensor in network.state_dict().items():
        check_finite(name, tensor, model.path)
    return network.eval()


def _in_floats(network: Any, model: Model) -> None:
    """A quantized checkpoint as the floats that its whole numbers stand for, in place."""
    kind = (model.config.get("quantization_config") or {}).get("quant_method")
    if kind is None:
        return
    if kind != "compressed-tensors":
        raise IntegrityError(
            "quantized-otherwise", f"{model.path} is quantized by {kind}", allowed="compressed-tensors, or floats",
            got=kind, remedy="take the checkpoint that it was quantized from",
        )  # fmt: skip
    with needs_extra("quantize"):
        from compressed_tensors.compressors import decompress_module

    network.hf_quantizer.compressor.remove_decompression_hook(network)
    for module in network.modules():
        if getattr(module, "quantization_scheme", None) is not None:
            decompress_module(module, leave_decompressed=False)
    del network.hf_quantizer, network.config.quantization_config
    network.is_quantized = False
    network.float()


def _quieten() -> None:
    """The library's load reports and bars: what is missing is checked here and raised."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@dataclass(frozen=True)
class Provenance:
    """What a manifest says of how a model came about."""

    method: str
    parents: tuple[str, ...]
    parameters: Mapping[str, Any]
    seed: int
    data: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    license: str | None = None


def provenance(method: str, parents: Sequence[Model], context: Context, **parameters: Any) -> Provenance:
    """A Provenance from the models and parameters at hand."""
    license_name = next((m.manifest["license"] for m in parents if m.manifest.get("license")), None)
    return Provenance(method, tuple(m.digest for m in parents), parameters, context.seed, license=license_name)


def save_network(network: Any, tokenizer: Any, out: Path, made: Provenance) -> Model:
    """Saves a transformers network with its tokenizer as a Model."""
    config = {**network.config.to_dict(), "architectures": [type(network).__name__], "dtype": "float32"}
    keep = network.state_dict()
    for name in tied_copies(network):
        keep.pop(name, None)
    return save_model(out, config, keep, tokenizer, made)


def tied_copies(network: Any) -> list[str]:
    """Names whose storage another, earlier name already holds: safetensors stores each storage once."""
    declared = set(getattr(network, "all_tied_weights_keys", None) or {})
    seen: dict[int, str] = {}
    copies = []
    for name, tensor in sorted(network.state_dict().items(), key=lambda item: (item[0] in declared, item[0])):
        if tensor.data_ptr() and tensor.data_ptr() in seen:
            copies.append(name)
        seen.setdefault(tensor.data_ptr(), name)
    return copies


def save_model(
    out: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | Callable[[Path], dict[str, str]],
    tokenizer: Any, made: Provenance,
) -> Model:  # fmt: skip
    """Writes a whole Model to ``out`` in one atomic step and opens it.

    ``tensors`` may be a function that writes the weights into a folder and returns the sha256 of each file.
    ``tokenizer`` is a transformers tokenizer, or a folder whose tokenizer files are copied as they are.
    """
    import transformers

    with whole_or_not_at_all(out) as partial:
        # The library's version is in the manifest; in config.json it would change the bytes for nothing.
        plain = {k: v for k, v in config.items() if k not in {"_name_or_path", "transformers_version"}}
        write_text(partial / "config.json", json.dumps(plain, indent=2, sort_keys=True, default=str))
        known = tensors(partial) if callable(tensors) else write_tensors(partial, tensors)
        _save_tokenizer(tokenizer, partial)
        files = {name: known.get(name) or file_sha256(partial / name) for name in model_files(partial)}
        manifest = {
            "format": 1, "method": made.method, "parents": list(made.parents), "parameters": dict(made.parameters),
            "seed": made.seed, "data": dict(made.data), "metrics": dict(made.metrics), "files": files,
            "license": made.license, "loader": (config.get("architectures") or [None])[0],
            "versions": {"transformers": transformers.__version__},
        }  # fmt: skip
        write_text(partial / CARD, model_card(manifest))
        write_text(partial / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, default=str))
    return open_model(out, verify=False)


_NOT_TOKENIZER = {"config.json", "generation_config.json", MANIFEST}


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    if isinstance(tokenizer, Path):
        for name in model_files(tokenizer):
            if not name.endswith((".safetensors", ".index.json")) and name not in _NOT_TOKENIZER:
                shutil.copyfile(tokenizer / name, folder / name)
                sync(folder / name)
        return
    if not hasattr(tokenizer, "init_kwargs"):  # what reads images and recordings
        write_processor(tokenizer, folder)
        return
    before = getattr(tokenizer, "name_or_path", None)
    tokenizer.name_or_path = ""  # paths of this machine do not belong in a checkpoint
    tokenizer.init_kwargs.pop("name_or_path", None)
    for name in tokenizer.save_pretrained(folder):
        sync(Path(name))
    tokenizer.name_or_path = before


@contextmanager
def whole_or_not_at_all(out: Path) -> Iterator[Path]:
    """A folder to write into that takes the name ``out`` at the end; a folder that is not fanbu's is not replaced."""
    if out.exists() and not (out / MANIFEST).exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(
            "out-exists",
            f"{out} exists and is no model of fanbu's",
            allowed="a new folder",
            got=out,
            remedy="name another",
        )
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    for left in [partial, *_left_behind(out)]:
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
        sync(out.parent)
    except OSError as error:
        raise disk_error(error, out) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _left_behind(out: Path) -> list[Path]:
    """Partial folders of processes that were killed."""
    found = [(p, p.name.split(".")[-2]) for p in out.parent.glob(f".{glob.escape(out.name)}.*.partial")]
    return [p for p, number in found if number.isdigit() and not psutil.pid_exists(int(number))]


def copy_model(model: Model, out: Path) -> Model:
    """The same model, bit for bit, in another folder."""
    with whole_or_not_at_all(out) as partial:
        extra = [name for name in (CARD, MANIFEST) if (model.path / name).exists()]
        for name in [*model_files(model.path), *extra]:
            shutil.copyfile(model.path / name, partial / name)
            sync(partial / name)
    return open_model(out, verify=False)


def said_anew(model: Model, changes: Mapping[str, Any]) -> Model:
    """The model with these entries of its manifest changed; its card follows."""
    manifest = {**model.manifest, **changes}
    write_text(model.path / CARD, model_card(manifest))
    write_text(model.path / MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, default=str))
    return open_model(model.path, verify=False)


def require_task(model: Model, task: Task) -> None:
    """Raises DataError where a model is not made for a task."""
    if model.task != task:
        raise DataError(
            "task-mismatch", f"{model.path} is not a model for {task}", allowed=task,
            got=model.config.get("architectures"), remedy="give a model of that task",
        )  # fmt: skip
