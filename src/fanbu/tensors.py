"""Tensors on disk: safetensors, read lazily and checked, written in shards; atomic files.

Headers are hostile until checked: their size, their offsets and their shapes are bounded before a byte is read as
numbers (format: https://huggingface.co/docs/safetensors). Pickle is never opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanbu.errors import IntegrityError, RetryError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100 * 2**20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies: ``file``, its shape and its stored dtype (safetensors' name for it)."""

    file: Path
    shape: tuple[int, ...]
    dtype: str

    @property
    def bytes(self) -> int:
        """Stored size."""
        return math.prod(self.shape) * _BYTES[self.dtype]


def read_header(path: Path) -> dict[str, TensorSpec]:
    """The tensors of one safetensors file, with every offset checked against the file's size.

    Raises IntegrityError for a truncated, oversized or inconsistent header.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 10 or length > min(MAX_HEADER, size - 8):
            raise _broken(path, f"its header claims {length} bytes of a file of {size}")
        try:
            header = json.loads(stream.read(length))
            return _check_header(path, header, size - 8 - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _broken(path, f"its header cannot be read ({error})") from None


def _check_header(path: Path, header: dict[str, Any], room: int) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        spec = TensorSpec(path, tuple(entry["shape"]), entry["dtype"])
        if any(type(n) is not int for n in (start, end, *spec.shape)):
            raise _broken(path, f"tensor {name!r} has offsets or a shape that are no whole numbers")
        if any(n < 0 for n in spec.shape) or end - start != spec.bytes or not 0 <= start <= end:
            raise _broken(path, f"tensor {name!r} has a shape that does not match its bytes")
        spans.append((start, end))
        specs[name] = spec
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if any(start != end for (start, _), end in zip(spans, ends, strict=False)) or ends[-1] != room:
        raise _broken(path, f"its tensors do not fill its {room} bytes of data (truncated, or with holes or overlaps)")
    return specs


def _broken(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        "checkpoint-broken",
        f"{path.name} is not a sound safetensors file: {why}",
        allowed="a complete safetensors file",
        got=path,
        remedy="copy or download the checkpoint again",
    )


def index_tensors(folder: Path) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint folder by name, over all shards; nothing but headers is read."""
    if (folder / INDEX).exists():
        try:
            weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
            names = sorted({str(v) for v in weight_map.values()})
        except (ValueError, KeyError, AttributeError, RecursionError) as error:
            raise _broken(folder / INDEX, f"the shard index cannot be read ({error})") from None
        files = [folder / n for n in names if "/" not in n and "\\" not in n]
        missing = [f.name for f in files if not f.exists()]
        if missing or len(files) < len(names):
            raise _missing(folder, missing or names)
        specs = {k: v for f in files for k, v in read_header(f).items()}
        if set(specs) != set(weight_map):
            raise _broken(folder / INDEX, "the shard index and the shards name different tensors")
        return specs
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    raise _missing(folder, [SINGLE])


def _missing(folder: Path, names: Iterable[str]) -> IntegrityError:
    present = sorted(p.name for p in folder.glob("*") if p.suffix in {".safetensors", ".bin", ".pt", ".pth", ".ckpt"})
    return IntegrityError(
        "checkpoint-missing",
        f"{folder} lacks weights: {', '.join(names)}",
        allowed=f"{SINGLE}, or {INDEX} with all its shards",
        got=present or "no weights",
        remedy="save it with save_pretrained(..., safe_serialization=True); pickled weights are never opened",
    )


class Tensors(Mapping[str, "Tensor"]):
    """A checkpoint's tensors, each read when asked for; NaN and Inf are refused as they are read."""

    def __init__(self, folder: Path, *, prefix: str = "") -> None:
        self.specs = {prefix + name: spec for name, spec in index_tensors(folder).items()}
        self._prefix = len(prefix)

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.specs[name].file, "pt") as shard:
            tensor: Tensor = shard.get_tensor(name[self._prefix :])
        check_finite(name, tensor, self.specs[name].file)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.specs))

    def __len__(self) -> int:
        return len(self.specs)


def check_finite(name: str, tensor: Tensor, where: object) -> None:
    """Raises IntegrityError where a tensor holds NaN or Inf."""
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise IntegrityError(
            "not-finite",
            f"tensor {name!r} holds NaN or Inf",
            allowed="finite numbers",
            got=where,
            remedy="this checkpoint diverged in training or was damaged: go back to an earlier one",
        )


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = 4 * 2**30) -> None:
    """Writes tensors as ``model.safetensors``, or as shards with an index where they exceed ``shard_bytes``."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    sizes = {name: _size(tensors, name) for name in sorted(tensors)}
    for name, size in sizes.items():
        if shards[-1] and size > room:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    many = len(shards) > 1
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE
        save_tensors(folder / file, {n: tensors[n] for n in names})
        weight_map |= dict.fromkeys(names, file)
    if many:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_text(folder / INDEX, json.dumps(index, indent=1, sort_keys=True))


def _size(tensors: Mapping[str, Tensor], name: str) -> int:
    if isinstance(tensors, Tensors):
        return tensors.specs[name].bytes
    tensor = tensors[name]
    return tensor.numel() * tensor.element_size()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, durable when this returns; NaN and Inf are refused before anything is written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    plain = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        check_finite(name, tensor, path)
        plain[name] = tensor
    with _durable(path) as temporary:
        try:
            save_file(plain, temporary, metadata={"format": "pt"})
        except SafetensorError as error:  # it tells a full disk by its text alone
            number = re.search(r"\(os error (\d+)\)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), str(error), str(path)) from error


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one checked safetensors file."""
    from safetensors.torch import load_file

    read_header(path)
    tensors: dict[str, Tensor] = load_file(path)
    for name, tensor in tensors.items():
        check_finite(name, tensor, path)
    return tensors


def write_text(path: Path, text: str) -> None:
    """A text file that is there whole or not at all, also after a power cut."""
    with _durable(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def _durable(path: Path) -> Iterator[Path]:
    """temp, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def disk_error(error: OSError, path: Path) -> Exception:
    """A full disk, or a place that cannot be written, as a RetryError; any other OSError as it is."""
    if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
        return RetryError(
            "not-writable",
            f"no permission for {error.filename or path}",
            allowed="a folder that can be written",
            got=os.strerror(error.errno),
            remedy="check owner and mount, or name another workspace, then run again: what was finished is kept",
        )
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return RetryError(
            "disk-full",
            f"no room left to write {path}",
            allowed="free space",
            got=os.strerror(error.errno),
            remedy="free some space and run the same command again: what was finished is kept",
        )
    return error


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
