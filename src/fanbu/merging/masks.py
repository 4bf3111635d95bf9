"""One bit a number for each domain: which numbers of a merged change are the domain's own, and at what scale."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fanbu.errors import UsageError
from fanbu.files import file_sha256
from fanbu.heads import domains_of
from fanbu.merging.engine import Part, Stack
from fanbu.merging.store import pack, unpack
from fanbu.merging.task_vector import head_tensors
from fanbu.model import Model, provenance, save_model
from fanbu.tensors import Shards, Tensors, chunks, save_tensors
from fanbu.types import Context, industry_of

FILE = "masks.safetensors"
MASK, SCALE = "mask:", "scale:"


class Masks:
    """Collects masks while a merge runs: ``mask:DOMAIN:NAME`` uint8 [rows, width / 8], ``scale:DOMAIN`` []."""

    def __init__(self, folder: Path, work: Sequence[Stack]) -> None:
        self.folder, self.domains = folder, work[0].domains if work else ()
        self.sums: dict[tuple[str, int], list[tuple[float, float]]] = {}
        layouts = {
            f"{MASK}{d}:{s.name}": ((_rows(s.shape), -(-_width(s.shape) // 8)), torch.uint8)
            for s in work if s.touched for d in self.domains
        }  # fmt: skip
        self.shards = Shards(folder, layouts, shard_bytes=2**63)

    def put(self, stack: Stack, part: Part, tau: Tensor) -> None:
        """The masks of one part; ``tau`` is the merged change."""
        flat = tau.reshape(tau.shape[0], -1) if tau.ndim else tau.reshape(1, 1)
        sums = []
        for domain, delta in zip(self.domains, part.deltas, strict=True):
            own = delta.reshape_as(flat) * flat > 0
            self.shards.put(f"{MASK}{domain}:{stack.name}", part.start, pack(own.float() - 0.5, flat[:, 0], "1bit"))
            sums.append((_sum(delta.abs()), _sum(flat.abs() * own)))
        self.sums[stack.name, part.start] = sums

    def close(self, out: Path) -> dict[str, str]:
        """Writes all of it to a model's folder; the sha256 by file name."""
        self.shards.close()
        found = Tensors(self.folder)
        scales = {}
        for place, domain in enumerate(self.domains):
            own = math.fsum(self.sums[key][place][0] for key in sorted(self.sums))
            kept = math.fsum(self.sums[key][place][1] for key in sorted(self.sums))
            scales[SCALE + domain] = torch.tensor(own / kept if kept else 1.0)
        save_tensors(out / FILE, {**{n: found.rows(n, 0, found.specs[n].rows) for n in found}, **scales})
        return {FILE: file_sha256(out / FILE)}


def only(merged: Model, base: Model, domain: str, out: Path, context: Context) -> Model:
    """A domain's own model: theta_base + s m (theta_merged - theta_base), with its label rows alone.

    Raises UsageError where the model has no masks, none of this domain, or was made from another base.
    """
    place = merged.path / FILE
    known = list(merged.manifest.get("parameters", {}).get("domains", [])) if place.is_file() else []
    if domain not in known or base.digest not in merged.manifest.get("parents", []):
        raise UsageError(
            "only", f"{merged.path} holds no masks of {domain} over {base.path}",
            allowed=known or "a model that emr made", got=domain,
            remedy="merge with `--method emr`, and name the base that it was made from",
        )  # fmt: skip
    masks, new, old = Tensors(place), Tensors(merged.path), Tensors(base.path)
    scale, heads = float(masks[SCALE + domain]), head_tensors(merged)
    rows = domains_of(merged.labels).get(industry_of(domain), []) if heads else []
    layouts = {n: (((len(rows), *s.shape[1:]) if n in heads else s.shape), s.torch_dtype) for n, s in new.specs.items()}

    def fill(folder: Path) -> dict[str, str]:
        shards = Shards(folder, layouts)
        for done, name in enumerate(new, 1):
            if name in heads:
                shards.put(name, 0, new[name][rows])
            for start, stop in chunks(new.specs[name].shape) if name not in heads else ():
                theta = new.rows(name, start, stop)
                if f"{MASK}{domain}:{name}" in masks:
                    was = old.rows(name, start, stop).float()
                    codes = masks.rows(f"{MASK}{domain}:{name}", start, stop)
                    bits = unpack(codes, torch.ones(len(codes)), (_width(theta.shape),), "1bit").clamp_(0, 1)
                    theta = was + (theta.float() - was) * bits.reshape(theta.shape) * scale
                shards.put(name, start, theta)
            context.progress("only", done, len(new))
        return shards.close()

    config = dict(merged.config)
    if rows:
        labels = [merged.labels[i] for i in rows]
        config["id2label"] = {str(i): label for i, label in enumerate(labels)}
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    made = provenance("only", [merged, base], context, domain=domain)
    return save_model(out, config, fill, merged.path, made)


def _rows(shape: Sequence[int]) -> int:
    return shape[0] if shape else 1


def _width(shape: Sequence[int]) -> int:
    return math.prod(shape[1:])


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))
