"""Tensors on disk: safetensors, read lazily and checked, written in shards while they are computed; atomic files.

Headers are hostile until checked: their size, their offsets and their shapes are bounded before a byte is read as
numbers (format: https://huggingface.co/docs/safetensors). Pickle is never opened.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanbu.errors import IntegrityError
from fanbu.files import durable, write_text

if TYPE_CHECKING:
    import torch
    from torch import Tensor

MAX_HEADER = 100 * 2**20
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
_TORCH = {
    "F64": "float64", "I64": "int64", "U64": "uint64", "F32": "float32", "I32": "int32", "U32": "uint32",
    "F16": "float16", "BF16": "bfloat16", "I16": "int16", "U16": "uint16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
CHUNK = 2**19  # numbers that are worked on at once: a fixed number, so that results do not depend on the machine
_LOAN = 4 * CHUNK  # bytes that a thread lends again and again
_SYNC = 2**28  # bytes written after which they are made durable while others are computed
_thread = threading.local()


@dataclass(frozen=True)
class TensorSpec:
    """Where one tensor lies: ``file``, its shape, its stored dtype (safetensors' name for it) and its first byte."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    start: int = 0

    @property
    def rows(self) -> int:
        """The size of its first dimension; a scalar is one row."""
        return self.shape[0] if self.shape else 1

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype as torch knows it."""
        import torch

        dtype: torch.dtype = getattr(torch, _TORCH[self.dtype])
        return dtype

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
            return _check_header(path, header, 8 + length, size - 8 - length)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise _broken(path, f"its header cannot be read ({error})") from None


def _check_header(path: Path, header: dict[str, Any], first: int, room: int) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    spans = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        spec = TensorSpec(path, tuple(entry["shape"]), entry["dtype"], first + start)
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
    """The tensors of a checkpoint folder, or of one safetensors file, each read when asked for.

    Files are mapped read-only, so what is read is no memory of this process's own. NaN and Inf are refused as whole
    tensors are read; who reads ``rows`` looks himself.
    """

    def __init__(self, source: Path) -> None:
        self.specs = read_header(source) if source.is_file() else index_tensors(source)
        self._files: dict[Path, mmap.mmap] = {}
        self._handles: dict[Path, int] = {}

    def __getitem__(self, name: str) -> Tensor:
        spec = self.specs[name]
        tensor = self.rows(name, 0, spec.rows).reshape(spec.shape).clone()
        check_finite(name, tensor, spec.file)
        return tensor

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows start..stop of a tensor in its stored dtype: a view of the file, to be read only."""
        import torch

        spec = self.specs[name]
        count = (stop - start) * math.prod(spec.shape[1:])
        shape = (stop - start, *spec.shape[1:])
        if not count:
            return torch.empty(shape, dtype=spec.torch_dtype)
        width = _BYTES[spec.dtype]
        offset = spec.start + start * math.prod(spec.shape[1:]) * width
        raw = torch.frombuffer(self._mapped(spec.file), dtype=torch.uint8, count=count * width, offset=offset)
        return raw.view(spec.torch_dtype).view(shape)

    def borrowed(self, name: str, start: int, stop: int) -> Tensor:
        """Rows as ``rows`` gives them, in memory that the next call of this thread overwrites.

        Reading into memory that is warm takes a third of the time of mapping pages that are looked at once. More than
        a few chunks at once are mapped all the same. Raises IntegrityError where the file has become shorter.
        """
        spec = self.specs[name]
        width = math.prod(spec.shape[1:]) * _BYTES[spec.dtype]
        count = (stop - start) * width
        if not 0 < count <= _LOAN:
            return self.rows(name, start, stop)
        raw = _lent("read", count)
        if os.preadv(self._handle(spec.file), [raw_bytes(raw)], spec.start + start * width) != count:
            raise _broken(spec.file, "it has become shorter while it was read")
        return raw.view(spec.torch_dtype).view(stop - start, *spec.shape[1:])

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            handle = os.open(file, os.O_RDONLY)
            if self._handles.setdefault(file, handle) is not handle:  # another thread was first
                os.close(handle)
            else:
                weakref.finalize(self, os.close, handle)
        return self._handles[file]

    def _mapped(self, file: Path) -> mmap.mmap:
        if file not in self._files:
            with file.open("rb") as stream, warnings.catch_warnings():
                self._files[file] = mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
                warnings.simplefilter("ignore", UserWarning)  # torch says once that the view is read-only
                _view(mapped)
        return self._files[file]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.specs))

    def __len__(self) -> int:
        return len(self.specs)


def _view(mapped: mmap.mmap) -> None:
    import torch

    torch.frombuffer(mapped, dtype=torch.uint8, count=1)


def _lent(use: str, count: int) -> Tensor:
    """``count`` bytes that this thread uses again and again: fresh memory costs more than the arithmetic."""
    import torch

    if not hasattr(_thread, use):
        setattr(_thread, use, torch.empty(_LOAN, dtype=torch.uint8))
    room: Tensor = getattr(_thread, use)[:count]
    return room


def layout(tensors: Mapping[str, Tensor], name: str) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of one tensor; a lazy mapping that has ``layout`` need not make it."""
    if isinstance(tensors, Tensors):
        return tensors.specs[name].shape, tensors.specs[name].torch_dtype
    if hasattr(tensors, "layout"):
        shape, dtype = tensors.layout(name)
        return shape, dtype
    return tuple(tensors[name].shape), tensors[name].dtype


def chunks(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Spans of whole rows with about CHUNK numbers each (at least one row)."""
    rows = shape[0] if shape else 1
    step = max(1, CHUNK // max(1, math.prod(shape[1:])))
    for start in range(0, rows, step):
        yield start, min(rows, start + step)


def read_rows(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Some rows of one tensor; only these are made where the mapping is lazy and has ``rows``."""
    if hasattr(tensors, "rows"):
        rows: Tensor = tensors.rows(name, start, stop)
        return rows
    tensor = tensors[name].detach()
    return (tensor.reshape(1) if tensor.ndim == 0 else tensor)[start:stop]


def borrow_rows(tensors: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """As ``read_rows``, for who is done with them before this thread asks again."""
    if hasattr(tensors, "borrowed"):
        rows: Tensor = tensors.borrowed(name, start, stop)
        return rows
    return read_rows(tensors, name, start, stop)


def check_finite(name: str, tensor: Tensor, where: object) -> None:
    """Raises IntegrityError where a tensor holds NaN or Inf."""
    if not tensor.is_floating_point():
        return
    # the sum is one cheap pass; only where it is not finite (which large numbers can do too) each number is looked at
    values = tensor.float() if tensor.element_size() == 1 else tensor
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        raise IntegrityError(
            "not-finite",
            f"tensor {name!r} holds NaN or Inf",
            allowed="finite numbers",
            got=where,
            remedy="this checkpoint diverged in training or was damaged: go back to an earlier one",
        )


Layouts = Mapping[str, tuple[tuple[int, ...], "torch.dtype"]]
Put = Callable[[str, int, "Tensor"], object]


class ByRows(Mapping[str, "torch.Tensor"]):
    """Tensors whose rows are computed when they are asked for. Who inherits this gives ``names``, ``layout(name)``
    (shape and dtype) and ``rows(name, start, stop)``."""

    names: Collection[str]

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        raise NotImplementedError

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        shape, _ = self.layout(name)
        return self.rows(name, 0, shape[0] if shape else 1).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Shards:
    """``model.safetensors``, or shards with an index above ``shard_bytes``, filled in any order by any thread.

    Headers are written first, so nothing is held in memory. What is there is made durable and hashed while the rest is
    computed; ``close`` waits for that. The folder must be one that takes its name only when it is whole.
    """

    def __init__(self, folder: Path, layouts: Layouts, shard_bytes: int = 4 * 2**30) -> None:
        groups: list[list[str]] = [[]]
        room = shard_bytes
        self._sizes = {name: _bytes_of(*layouts[name]) for name in sorted(layouts)}
        for name, size in self._sizes.items():
            if groups[-1] and size > room:
                groups.append([])
                room = shard_bytes
            groups[-1].append(name)
            room -= size
        self._folder, self._many = folder, len(groups) > 1
        self._files: dict[str, _Filling] = {}
        self._behind = ThreadPoolExecutor(2)
        self._jobs: list[Future[None]] = []
        for number, names in enumerate(groups, 1):
            file = f"model-{number:05d}-of-{len(groups):05d}.safetensors" if self._many else SINGLE
            self._files |= dict.fromkeys(names, _Filling(folder / file, {n: layouts[n] for n in names}))

    def put(self, name: str, first: int, rows: Tensor) -> None:
        """Rows of one tensor from row ``first`` on; each row comes once. NaN and Inf are refused."""
        file = self._files[name]
        if file.put(name, first, rows):
            self._jobs.append(self._behind.submit(file.hash))
        if file.unsynced >= _SYNC:
            self._jobs.append(self._behind.submit(file.sync))

    def close(self) -> dict[str, str]:
        """The sha256 of each file by name, once all rows are there; writes the index."""
        for job in self._jobs:
            job.result()
        digests = {file.path.name: file.close() for file in dict.fromkeys(self._files.values())}
        self._behind.shutdown()
        if self._many:
            weight_map = {name: file.path.name for name, file in self._files.items()}
            index = {"metadata": {"total_size": sum(self._sizes.values())}, "weight_map": weight_map}
            write_text(self._folder / INDEX, json.dumps(index, indent=1, sort_keys=True))
        return digests


class _Filling:
    """One safetensors file whose tensors are put in row by row; wide numbers first, so that all are aligned."""

    def __init__(self, path: Path, layouts: Layouts) -> None:
        names = {str(getattr(_torch(), value)): key for key, value in _TORCH.items()}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        self.path, self._layouts, end = path, layouts, 0
        self._starts: dict[str, int] = {}
        for name in sorted(layouts, key=lambda n: (-layouts[n][1].itemsize, n)):
            shape, dtype = layouts[name]
            self._starts[name], size = end, _bytes_of(shape, dtype)
            header[name] = {"dtype": names[str(dtype)], "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._first, self._lock, self.unsynced = 8 + len(text), threading.Lock(), 0
        self._left = {name: _bytes_of(*layouts[name]) for name in self._starts}
        self._state, self._hashed, self._hashing = hashlib.sha256(), 0, threading.Lock()
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
        weakref.finalize(self, os.close, self._handle)
        _reserve(self._handle, self._first + end)
        _write(self._handle, len(text).to_bytes(8, "little") + text, 0)

    def put(self, name: str, row: int, rows: Tensor) -> bool:
        """Whether the tensor is whole now."""
        shape, dtype = self._layouts[name]
        values = rows.detach()
        if values.dtype != dtype and values.numel() * dtype.itemsize <= _LOAN:
            room = _lent("write", values.numel() * dtype.itemsize)
            values = room.view(dtype).view(values.shape).copy_(values)
        else:
            values = values.to("cpu", dtype).contiguous()
        check_finite(name, values, self.path)
        offset = self._first + self._starts[name] + row * math.prod(shape[1:]) * dtype.itemsize
        data = raw_bytes(values)
        _write(self._handle, data, offset)
        with self._lock:
            self._left[name] -= len(data)
            self.unsynced += len(data)
            return self._left[name] == 0

    def hash(self) -> None:
        """Goes on with the sha256 as far as there is no gap."""
        with self._hashing:
            end = next((s for n, s in self._starts.items() if self._left[n]), None)
            end = os.fstat(self._handle).st_size if end is None else self._first + end
            room = raw_bytes(_lent("hash", _LOAN))
            while self._hashed < end:
                count = os.preadv(self._handle, [room[: end - self._hashed]], self._hashed)
                self._state.update(room[:count])
                self._hashed += count

    def sync(self) -> None:
        """Makes durable what was written so far."""
        self.unsynced = 0
        os.fsync(self._handle)

    def close(self) -> str:
        """The sha256 of the file, which is whole and durable. IntegrityError where rows are missing."""
        left = sum(self._left.values())
        if left:
            raise IntegrityError(
                "checkpoint-incomplete", f"{self.path.name} lacks {left} bytes", remedy="put every row of it"
            )
        self.sync()
        self.hash()
        return self._state.hexdigest()


def _reserve(handle: int, size: int) -> None:
    """Gives a file its place on the disk: a full disk shows at once, and writing is several times faster."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.truncate(handle, size)


def _torch() -> Any:
    import torch

    return torch


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as they are stored (numpy knows no bfloat16)."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(plain.view(_torch().uint8).numpy().data) if plain.numel() else memoryview(b"")


def _bytes_of(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _write(handle: int, data: bytes | memoryview, offset: int) -> None:
    view = memoryview(data)
    while view:
        done = os.pwrite(handle, view, offset)
        view, offset = view[done:], offset + done


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = 4 * 2**30) -> dict[str, str]:
    """Writes tensors as ``model.safetensors``, or as shards with an index where they exceed ``shard_bytes``.

    Returns the sha256 of each file of weights.
    """
    layouts = {name: layout(tensors, name) for name in tensors}
    made = Shards(folder, layouts, shard_bytes)
    _fill(made.put, tensors, layouts)
    return made.close()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """One safetensors file, durable when this returns; with NaN or Inf in it, none."""
    layouts = {name: layout(tensors, name) for name in tensors}
    with durable(path) as temporary:
        made = _Filling(temporary, layouts)
        _fill(made.put, tensors, layouts)
        made.close()


def _fill(put: Put, tensors: Mapping[str, Tensor], layouts: Layouts) -> None:
    for name in sorted(layouts):
        for start, stop in chunks(layouts[name][0]):
            put(name, start, read_rows(tensors, name, start, stop))


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one checked safetensors file."""
    return dict(Tensors(path))
