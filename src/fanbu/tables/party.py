"""A party of joint modelling: it holds some columns of the entities, and the part of the network that sees them."""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import nn

from fanbu.errors import DataError, IntegrityError, UsageError
from fanbu.files import write_text
from fanbu.model import read_json
from fanbu.tables.alignment import Array, blinded, points
from fanbu.tensors import load_tensors, save_tensors
from fanbu.types import canonical, derived_seed

Arrays = Mapping[str, Array]


class Session(Protocol):
    """What connects who has the labels with the other parties: arrays go out, and arrays come back."""

    @property
    def names(self) -> Sequence[str]:
        """The other parties."""

    def ask(self, name: str, what: str, arrays: Arrays) -> dict[str, Array]:
        """What ``Party.answer`` of this party gives."""


class Party:
    """Columns of entities, ``x`` [rows, columns] of finite numbers with a name for each row, and a network of its own:
    e = V relu(W x + a) + b, x standardised on the rows that all parties have.

    Names and columns stay here. What leaves is the answer to what it is asked: its names as points that a secret of
    its own blinds, and e of rows that all parties have.

    Args:
        name: of the party.
        ids: one name a row; parties share an entity where they call it the same, to the letter.
        x: the columns.
        width: numbers that leave for each row.
        hidden: neurons of the layer between.
        lr: learning rate (AdamW).
        seed: of the network's first weights.

    Raises:
        DataError: names twice, or of another number than rows; numbers that are not finite.
    """

    def __init__(
        self, name: str, ids: Sequence[str], x: Any, *, width: int = 16, hidden: int = 64, lr: float = 2e-3,
        seed: int = 0,
    ) -> None:  # fmt: skip
        if min(width, hidden) < 1 or not lr > 0:
            raise UsageError(
                "bad-parameter", f"party {name}", allowed="width and hidden from 1, lr above 0",
                got=(width, hidden, lr), remedy="change it",
            )  # fmt: skip
        self.name, self.width, self.hidden, self.lr, self.seed = name, width, hidden, lr, seed
        self.centre = self.spread = np.zeros(0)
        self.network: nn.Sequential | None = None
        self.hold(ids, x)

    def hold(self, ids: Sequence[str], x: Any) -> None:
        """Other entities from now on, with the same columns."""
        values = np.asarray(x, dtype=np.float64)
        columns = len(self.centre) or (values.shape[1] if values.ndim == 2 else 0)
        if values.ndim != 2 or values.shape != (len(ids), columns) or not columns or not np.isfinite(values).all():
            raise DataError(
                "bad-table", f"the table of {self.name} cannot be used",
                allowed=f"finite numbers, one row for each of {len(ids)} names, {columns or 'some'} columns",
                got=str(values.shape), remedy="code words as numbers, and fill or leave out what is missing",
            )  # fmt: skip
        self.ids, self.x = list(map(str, ids)), values
        self._points = points(self.ids)
        self.rows = np.zeros(0, dtype=np.int64)  # those that all have, in the common order
        self._secret = secrets.token_bytes(32)
        self.places = np.arange(len(self.ids))  # which row each point is of: points leave in an order of no meaning
        self._pending: torch.Tensor | None = None

    def answer(self, what: str, arrays: Arrays) -> dict[str, Array]:
        """What the party says: ``blind``: its points, blinded; ``reblind``: others' ``points``, blinded; ``order``: it
        takes ``rows`` of its points as those that all have; ``begin``: its network begins anew, on the rows ``train``;
        ``forward``: ``e`` of ``rows``, to learn from; ``backward``: it learns from ``g``, the gradient of that;
        ``embed``: ``e`` of ``rows``; ``keep`` and ``back``: the network as it is is kept, and as it was kept is back.

        Raises DataError for anything else, and for what is not of the right kind.
        """
        known = {
            "blind": self._blind, "reblind": self._reblind, "order": self._order, "begin": self._begin,
            "forward": self._forward, "backward": self._backward, "embed": self._embed, "keep": self._keep,
            "back": self._back,
        }  # fmt: skip
        if what not in known:
            raise broken(f"{self.name} is asked for what no party does", what)
        return known[what](arrays)

    def _blind(self, arrays: Arrays) -> dict[str, Array]:
        self._secret = secrets.token_bytes(32)  # of one alignment
        self.places = np.array(sorted(range(len(self.ids)), key=lambda _: secrets.randbits(64)), dtype=np.int64)
        return {"points": blinded(self._points[self.places], self._secret)}

    def _reblind(self, arrays: Arrays) -> dict[str, Array]:
        return {"points": blinded(_of(arrays, "points"), self._secret)}

    def _order(self, arrays: Arrays) -> dict[str, Array]:
        rows = _of(arrays, "rows")
        if rows.ndim != 1 or rows.dtype != np.int64 or len(np.unique(rows)) != len(rows):
            raise broken(f"{self.name}: the common rows are none", rows.shape)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self.ids)):
            raise broken(f"{self.name}: the common rows are not all there", len(self.ids))
        self.rows = self.places[rows]
        return {}

    def _begin(self, arrays: Arrays) -> dict[str, Array]:
        x = self.x[self._chosen(arrays, "train")]
        self.centre, spread = x.mean(0), x.std(0)
        self.spread = np.where(spread > 0, spread, 1.0)
        self.network = self._fresh()
        self._optimizer = torch.optim.AdamW(self.network.parameters(), self.lr)
        return {}

    def _fresh(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, "party", self.name))
            columns = self.x.shape[1]
            return nn.Sequential(nn.Linear(columns, self.hidden), nn.ReLU(), nn.Linear(self.hidden, self.width))

    def _forward(self, arrays: Arrays) -> dict[str, Array]:
        self._pending = self._e(arrays)
        return {"e": self._pending.detach().numpy()}

    def _backward(self, arrays: Arrays) -> dict[str, Array]:
        g, pending = _of(arrays, "g"), self._pending
        if pending is None or g.shape != tuple(pending.shape) or g.dtype != np.float32 or not np.isfinite(g).all():
            raise broken(f"{self.name}: a gradient is not of what was sent", g.shape)
        self._optimizer.zero_grad()
        pending.backward(torch.from_numpy(g.copy()))
        self._optimizer.step()
        self._pending = None
        return {}

    def _embed(self, arrays: Arrays) -> dict[str, Array]:
        with torch.no_grad():
            return {"e": self._e(arrays).numpy()}

    def _e(self, arrays: Arrays) -> torch.Tensor:
        rows = self._chosen(arrays, "rows")
        if self.network is None:
            raise broken(f"{self.name} has not learnt anything", self.name)
        x = torch.from_numpy((self.x[rows] - self.centre) / self.spread).float()
        found: torch.Tensor = self.network(x.clamp(-10, 10))  # a far value moves no other
        return found

    def _keep(self, arrays: Arrays) -> dict[str, Array]:
        self._kept = copy.deepcopy(self.network)
        return {}

    def _back(self, arrays: Arrays) -> dict[str, Array]:
        self.network = self._kept
        return {}

    def _chosen(self, arrays: Arrays, name: str) -> Array:
        places = _of(arrays, name)
        whole = places.ndim == 1 and places.dtype == np.int64
        if not whole or (len(places) and not (places.min() >= 0 and places.max() < len(self.rows))):
            raise broken(f"{self.name} is asked about rows that not all parties have", len(self.rows))
        return self.rows[places]

    def save(self, folder: Path) -> None:
        """Its network, in its own folder: safetensors and JSON."""
        if self.network is None:
            raise broken(f"{self.name} has not learnt anything", self.name)
        folder.mkdir(parents=True, exist_ok=True)
        scale = {"centre": torch.from_numpy(self.centre), "spread": torch.from_numpy(self.spread)}
        save_tensors(folder / "party.safetensors", {**self.network.state_dict(), **scale})
        facts = {"name": self.name, "width": self.width, "hidden": self.hidden, "lr": self.lr, "seed": self.seed}
        write_text(folder / "party.json", canonical(facts))

    @classmethod
    def load(cls, folder: Path, ids: Sequence[str], x: Any) -> Self:
        """A party as it was saved, with entities. Raises IntegrityError for files that are broken, or
        of other columns."""
        with read_part(folder, "party") as (facts, tensors):
            made = cls(ids=ids, x=x, **facts)
            made.network = made._fresh()
            made.network.load_state_dict({n: t for n, t in tensors.items() if n not in {"centre", "spread"}})
            made.centre, made.spread = (tensors[n].numpy() for n in ("centre", "spread"))
        return made


@contextmanager
def read_part(folder: Path, name: str) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor]]]:
    """The facts and tensors of a saved part of the network, to make it of; IntegrityError where that fails."""
    facts, tensors = read_json(folder / f"{name}.json", "party-broken"), load_tensors(folder / f"{name}.safetensors")
    try:
        yield facts, tensors
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise IntegrityError(
            "party-broken", f"{folder} holds no {name} part of these columns: {str(error)[:200]}", got=str(folder),
            remedy="give the columns that it was trained on, in their order, or ask for the files again",
        ) from None  # fmt: skip


def _of(arrays: Arrays, name: str) -> Array:
    if name not in arrays:
        raise broken("a question lacks an array", name)
    return arrays[name]


def broken(what: str, got: object) -> DataError:
    """A session in which something else is said than parties say."""
    return DataError("session-broken", what, got=str(got)[:200], remedy="let all parties run the same version of fanbu")
