"""Which of the user's files belong together: a domain is a file, files that name their split, or a folder of splits."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fanbu.data.load import FORMATS
from fanbu.errors import DataError, UsageError

_SPLITS = {
    "train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test", "unlabelled": "unlabelled", "unlabeled": "unlabelled",
}  # fmt: skip
_NAMED = re.compile(rf"(?:(?P<name>.+?)[-._ ])?(?P<split>{'|'.join(_SPLITS)})", re.I)
_SUFFIX = re.compile(r"\.(?:(?:jsonl|json|csv|tsv)(?:\.gz)?|parquet)$", re.I)


@dataclass(frozen=True)
class Files:
    """One domain's files by split; ``train`` is always there."""

    name: str
    splits: Mapping[str, Path]


def find(sources: Sequence[Path]) -> list[Files]:
    """The domains in files and folders, in the order given.

    A folder's files are taken as if each were named; where it has none, those of the folders in it are. Raises
    DataError where nothing is found, a file is in no known format, a split is there twice or training rows are not.
    """
    groups: dict[tuple[Path, str], dict[str, Path]] = defaultdict(dict)
    for path in dict.fromkeys(f.absolute() for source in sources for f in _files(source)):
        own, split = _named(path)
        taken = groups[path.parent, own]
        if split in taken:
            raise DataError(
                "split-twice", f"two files are the {split} rows of {own}", got=[taken[split].name, path.name],
                remedy="give one of them",
            )  # fmt: skip
        taken[split] = path
    for (folder, own), splits in groups.items():
        if "train" not in splits:
            raise UsageError(
                "no-train", f"{own} in {folder} has no training rows", got=sorted(p.name for p in splits.values()),
                remedy=f"add {own}.train.csv (or the like) beside it, or rename the file",
            )  # fmt: skip
    found: list[Files] = []
    twice = {own for _, own in groups if sum(own == other for _, other in groups) > 1}
    for (folder, own), splits in groups.items():
        name = f"{folder.name}_{own}" if own in twice else own
        found.append(Files(legal(name, {f.name for f in found}), splits))
    return found


def legal(name: str, taken: Collection[str] = ()) -> str:
    """A name that a recipe takes, and that is not ``taken``: other letters become ``_``."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_-")[:60] or "domain"
    return next(n for n in (plain, *(f"{plain}_{i}" for i in range(2, 10_000))) if n not in taken)


def _files(source: Path) -> list[Path]:
    if source.is_dir():
        own = _data_files(source)
        inner = [p for f in sorted(source.iterdir()) if f.is_dir() and f.name[0] != "." for p in _data_files(f)]
        if own or inner:
            return own or inner
        raise DataError("data-not-found", f"no data in {source}", allowed=FORMATS, got=source, remedy="name the files")
    if not source.is_file():
        raise DataError("data-not-found", f"no file {source}", allowed=FORMATS, got=source, remedy="check the path")
    if not _SUFFIX.search(source.name):
        raise DataError("data-format", f"{source} is in no known format", allowed=FORMATS, remedy="convert it")
    return [source]


def _data_files(folder: Path) -> list[Path]:
    """The files of a folder that hold rows; a .json that is no list (a configuration) is none of them."""
    found = [p for p in sorted(folder.iterdir()) if p.is_file() and p.name[0] != "." and _SUFFIX.search(p.name)]
    return [p for p in found if p.suffix != ".json" or _starts_with_list(p)]


def _starts_with_list(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")


def _named(path: Path) -> tuple[str, str]:
    """(the domain's name, the split) that a file's name says; a file without a split's name is training rows."""
    stem = _SUFFIX.sub("", path.name)
    if match := _NAMED.fullmatch(stem):
        return match["name"] or path.parent.name or "data", _SPLITS[match["split"].lower()]
    return stem, "train"


def choose_sources(sources: Sequence[Path]) -> list[Path]:
    """The sources, checked to be at least one."""
    if not sources:
        raise UsageError(
            "no-files", "fanbu init needs files or folders", allowed=FORMATS, remedy="name them: fanbu init data/"
        )
    return list(sources)
