"""A Contribution: what one specialist sends back. Plain tensors and rows, with its kind and its cost in bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanbu.errors import IntegrityError
from fanbu.files import file_sha256, write_text
from fanbu.model import read_json
from fanbu.tensors import Tensors, check_finite, chunks, layout, raw_bytes, read_rows, save_tensors
from fanbu.types import DOMAIN_NAME, KINDS, Kind, canonical

if TYPE_CHECKING:
    from torch import Tensor

HEADER, TENSORS, ROWS = "contribution.json", "tensors.safetensors", "rows.jsonl"
MAX_BYTES = 64 * 2**30
FEATURES = "features"  # the tensor that pooled features of texts are sent in: texts can be guessed from them
_ROW_KEYS = {"id", "text", "label", "domain"}


@dataclass(frozen=True)
class Contribution:
    """What crosses from one owner to the centre.

    ``tensors`` may be a lazy mapping; ``rows`` have the keys id, text, label, domain, each optional; ``meta`` is
    plain JSON. ``epsilon`` is the privacy cost where noise was added. ``bytes`` is its size on disk once written.
    ``owners`` is how many it stands for: more than one where it is their sum (secure aggregation), which the centre
    says, never what was sent.
    """

    kind: Kind
    domain: str
    method: str
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Sequence[Mapping[str, Any]] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    epsilon: float | None = None
    bytes: int = 0
    owners: int = 1

    @cached_property
    def digest(self) -> str:
        """sha256 over its content, the same in memory and on disk."""
        state = hashlib.sha256(canonical(self._header()).encode())
        for row in self.rows:
            state.update(canonical(row).encode())
        for name in sorted(self.tensors):
            shape, dtype = layout(self.tensors, name)
            state.update(canonical([name, str(dtype), list(shape)]).encode())
            for start, stop in chunks(shape):
                rows = read_rows(self.tensors, name, start, stop)
                check_finite(name, rows, self.domain)
                state.update(raw_bytes(rows))
        return state.hexdigest()

    def _header(self) -> dict[str, Any]:
        return {
            "format": 1, "kind": self.kind, "domain": self.domain, "method": self.method, "meta": dict(self.meta),
            "epsilon": self.epsilon, "rows": len(self.rows),
        }  # fmt: skip


def write_contribution(contribution: Contribution, out: Path) -> Contribution:
    """Writes it to the folder ``out``, its header last; returns it with its size. Of an owner's only the
    boundary calls this."""
    out.mkdir(parents=True, exist_ok=True)
    files = {}
    if contribution.tensors:
        save_tensors(out / TENSORS, contribution.tensors)
        files[TENSORS] = file_sha256(out / TENSORS)
    if contribution.rows:
        write_text(out / ROWS, "".join(canonical(row) + "\n" for row in contribution.rows))
        files[ROWS] = file_sha256(out / ROWS)
    header = {**contribution._header(), "files": files, "digest": contribution.digest}
    write_text(out / HEADER, canonical(header))
    return replace(contribution, bytes=_size(out))


def open_contribution(folder: Path) -> Contribution:
    """Reads a contribution as the centre must: hostile until its sizes, names, hashes and numbers are checked."""
    header = read_json(folder / HEADER, "contribution-broken")
    size = _size(folder)
    if size > MAX_BYTES:
        raise _refuse(folder, f"it is larger than {MAX_BYTES} bytes", size)
    files = header.get("files")
    if header.get("kind") not in KINDS or not isinstance(files, dict) or not set(files) <= {TENSORS, ROWS}:
        raise _refuse(folder, "its header names an unknown kind or unknown files", header.get("kind"))
    if not DOMAIN_NAME.fullmatch(str(header.get("domain"))) or not isinstance(header.get("meta"), dict):
        raise _refuse(folder, "its header has no sound domain or meta", header.get("domain"))
    for name, expected in files.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != expected:
            raise _refuse(folder, f"{name} is missing or not what its header says", expected)
    tensors: Mapping[str, Tensor] = Tensors(folder / TENSORS) if TENSORS in files else {}
    rows = _read_rows(folder / ROWS) if ROWS in files else ()
    found = Contribution(
        header["kind"], header["domain"], str(header.get("method")), tensors, rows, header["meta"],
        header.get("epsilon"), size,
    )  # fmt: skip
    try:
        same = found.digest == header.get("digest")
    except (ValueError, RecursionError):  # NaN in its header or rows
        same = False
    if not same:
        raise _refuse(folder, "its content has not the digest that its header names", header.get("digest"))
    return found


def _read_rows(path: Path) -> tuple[Mapping[str, Any], ...]:
    rows = []
    try:
        for line in path.read_text(encoding="utf-8").split("\n"):
            if line:
                row = json.loads(line)
                if not isinstance(row, dict) or not set(row) <= _ROW_KEYS:
                    raise ValueError(f"a row has other keys than {sorted(_ROW_KEYS)}")
                rows.append(row)
    except (ValueError, RecursionError) as error:
        raise _refuse(path, f"its rows cannot be read: {error}", path.name) from None
    return tuple(rows)


def _size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.name in {HEADER, TENSORS, ROWS})


def _refuse(where: Path, why: str, got: object) -> IntegrityError:
    return IntegrityError(
        "contribution-broken", f"the contribution in {where} is refused: {why}", got=got,
        remedy="ask its owner to send it again",
    )  # fmt: skip


def check_contribution(contribution: Contribution) -> None:
    """Raises IntegrityError where a contribution holds NaN or Inf, or rows with unknown keys."""
    for name in contribution.tensors:
        for start, stop in chunks(layout(contribution.tensors, name)[0]):
            check_finite(name, read_rows(contribution.tensors, name, start, stop), contribution.domain)
    keys = {key for row in contribution.rows for key in row} - _ROW_KEYS
    if keys:
        raise _refuse(Path(contribution.domain), f"a row has other keys than {sorted(_ROW_KEYS)}", keys)
