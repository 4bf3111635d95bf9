"""Orthogonal matching pursuit: vectors as sparse sums of atoms, for many vectors at once and in bounded memory.

Shapes: n vectors, a atoms, d numbers each, k atoms chosen for a vector, b vectors in one block.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from fanbu.merging.engine import devices_of
from fanbu.types import Context

# Numbers that one block of vectors and one block of atoms may hold. Fixed, so that blocks (and with them the last bits
# of every sum) depend on shapes alone and never on the machine.
BLOCK = 2**23
MOST = 1024
_DONE = 1e-6  # a residual this small, against its vector, is rounding: what would be fitted to it is noise
_DEPENDENT = 1e-5  # an atom this near the span of those chosen before it adds nothing but noise


@dataclass(frozen=True)
class Table:
    """Vectors that are read when asked for: ``take`` gives the rows with these numbers, as float32 [n, d]."""

    count: int
    width: int
    take: Callable[[Tensor], Tensor]

    @staticmethod
    def of(rows: Tensor) -> Table:
        """A tensor [n, d] that is in memory."""
        return Table(rows.shape[0], rows.shape[1], lambda ids: rows[ids].float())


def sparse_codes(vectors: Table, atoms: Table, k: int, context: Context) -> tuple[Tensor, Tensor]:
    """x ~ sum over j of c_j a_j, with at most k atoms for each x.

    Atoms are chosen one by one, each time the one with the largest |<r, a>| / ||a|| for what is left, r; then all
    coefficients are fitted anew by least squares (a QR decomposition that grows by one column). It stops early where
    nothing is left. Where two atoms fit equally well the first one counts.

    Args:
        vectors: x, [n, d].
        atoms: a, [a, d]; atoms of length zero are never chosen.
        k: how many atoms at most.

    Returns:
        ids [n, k] (int64) and coefficients [n, k] (float32); places that were not needed have coefficient 0, id 0.

    Reference: Pati, Rezaiifar & Krishnaprasad 1993, "Orthogonal matching pursuit: recursive function approximation
    with applications to wavelet decomposition".
    """
    ids, coefficients = torch.zeros(vectors.count, k, dtype=torch.int64), torch.zeros(vectors.count, k)
    size = max(1, min(MOST, BLOCK // ((k + 3) * max(1, vectors.width))))
    device = devices_of(context)[0]
    spans = [(s, min(vectors.count, s + size)) for s in range(0, vectors.count, size)]
    lengths = torch.cat([atoms.take(torch.arange(s, e)).norm(dim=1) for s, e in _spans(atoms)]).to(device)

    def one(span: tuple[int, int]) -> None:
        x_bd = vectors.take(torch.arange(*span)).to(device)
        found, values = _pursue(x_bd, atoms, lengths, k)
        ids[span[0] : span[1]], coefficients[span[0] : span[1]] = found.cpu(), values.cpu()

    # a block holds up to 3 BLOCK numbers of 4 bytes; each is one thread's work, with one thread inside
    threads = min(context.threads or len(os.sched_getaffinity(0)), max(1, context.memory // (12 * BLOCK)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            for done, _ in enumerate(pool.map(one, spans), 1):
                context.progress("omp", done, len(spans))
    finally:
        torch.set_num_threads(before)
    return ids, coefficients


def _spans(atoms: Table) -> list[tuple[int, int]]:
    step = max(1, BLOCK // 4 // max(MOST, atoms.width))
    return [(s, min(atoms.count, s + step)) for s in range(0, atoms.count, step)]


def _pursue(x_bd: Tensor, atoms: Table, lengths_a: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The codes of one block of vectors."""
    b, d = x_bd.shape
    q_bkd, r_bkk = x_bd.new_zeros(b, k, d), torch.eye(k, device=x_bd.device).repeat(b, 1, 1)
    seen_bk, chosen_bk = x_bd.new_zeros(b, k), torch.full((b, k), -1, dtype=torch.int64, device=x_bd.device)
    left_bd, least_b = x_bd.clone(), _DONE * x_bd.norm(dim=1)
    live_b = x_bd.norm(dim=1) > 0
    for step in range(min(k, atoms.count)):
        if not bool(live_b.any()):
            break
        best_b = _closest(left_bd, atoms, lengths_a, chosen_bk[:, :step])
        v_bd = atoms.take(best_b.cpu()).to(x_bd.device)
        before = v_bd.norm(dim=1)
        for _ in range(2):  # twice is enough for columns that are orthogonal to rounding
            h_bs = torch.einsum("bsd,bd->bs", q_bkd[:, :step], v_bd)
            v_bd = v_bd - torch.einsum("bs,bsd->bd", h_bs, q_bkd[:, :step])
            r_bkk[:, :step, step] += h_bs
        after = v_bd.norm(dim=1)
        live_b = live_b & (after > _DEPENDENT * before)
        keep = live_b[:, None]
        q_bkd[:, step] = torch.where(keep, v_bd / after.clamp(min=1e-30)[:, None], 0.0)
        r_bkk[:, step, step] = torch.where(live_b, after, 1.0)
        r_bkk[:, :step, step] = torch.where(keep, r_bkk[:, :step, step], 0.0)
        chosen_bk[:, step] = torch.where(live_b, best_b, -1)
        seen_bk[:, step] = (q_bkd[:, step] * left_bd).sum(1)
        left_bd -= seen_bk[:, step, None] * q_bkd[:, step]
        live_b = live_b & (left_bd.norm(dim=1) > least_b)
    c_bk = torch.linalg.solve_triangular(r_bkk, seen_bk[:, :, None], upper=True)[:, :, 0]
    return chosen_bk.clamp(min=0), torch.where(chosen_bk < 0, 0.0, c_bk)


def _closest(left_bd: Tensor, atoms: Table, lengths_a: Tensor, chosen_bs: Tensor) -> Tensor:
    """The number of the atom that fits best to what is left of each vector, some atoms at a time."""
    best_b = torch.full(left_bd.shape[:1], -1.0, device=left_bd.device)
    place_b = torch.zeros(left_bd.shape[:1], dtype=torch.int64, device=left_bd.device)
    for start, stop in _spans(atoms):
        length_c = lengths_a[start:stop]
        fit_bc = (left_bd @ atoms.take(torch.arange(start, stop)).to(left_bd.device).T).abs_()
        fit_bc /= length_c.clamp(min=1e-30)
        fit_bc[:, length_c == 0] = -1.0
        inside = (chosen_bs >= start) & (chosen_bs < stop)
        rows, steps = inside.nonzero(as_tuple=True)
        fit_bc[rows, chosen_bs[rows, steps] - start] = -1.0
        value_b, number_b = fit_bc.max(dim=1)
        better = value_b > best_b
        best_b, place_b = torch.where(better, value_b, best_b), torch.where(better, number_b + start, place_b)
    return place_b
