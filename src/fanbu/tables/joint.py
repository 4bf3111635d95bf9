"""Joint modelling: parties who hold different columns of the same entities train one network, cut between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from fanbu.chance import Chance
from fanbu.errors import DataError, UsageError
from fanbu.files import write_text
from fanbu.tables.alignment import Array, common
from fanbu.tables.party import Arrays, Party, Session, broken, read_part
from fanbu.tensors import save_tensors
from fanbu.types import Progress, canonical, derived_seed, silent


@dataclass(frozen=True)
class Here:
    """A session with parties of this process."""

    parties: Mapping[str, Party]

    @property
    def names(self) -> Sequence[str]:
        """The other parties."""
        return list(self.parties)

    def ask(self, name: str, what: str, arrays: Arrays) -> dict[str, Array]:
        """The party's answer."""
        return self.parties[name].answer(what, arrays)


@dataclass
class JointClassifier:
    """A classifier at the party who has the labels, over the columns of all parties.

    p(y | x) = softmax(top([e_1, ..., e_k])), e_i = bottom_i(x_i). Each bottom network lies with its party (``Party``),
    the top one with the labels. A batch is one exchange: e_i of its rows come, the gradients of the loss in them go
    back. So neither columns, nor names, nor labels leave their owner. What others can still learn: whoever has the
    labels sees e_i; whoever has none sees gradients, from which labels can be guessed, unless ``label_epsilon`` holds
    them back: then each label is told the network by randomised response, once, and the loss is that of such labels.

    Args:
        hidden: neurons of the top network's layer.
        epochs: at most; training ends when ``patience`` epochs brought nothing on a tenth of the rows held out.
        batch_size: rows an exchange.
        lr: learning rate at the top (AdamW).
        patience: epochs.
        label_epsilon: what gradients of one ``fit`` may tell of any one label (label differential privacy); each fit
            spends it anew. 0: no bound.
        seed: of weights, batches and held-out rows.

    Attributes:
        classes_: [classes], sorted.

    References: Vepakomma et al. 2018, "Split learning for health"; Ghazi et al. 2021, "Deep learning with label
    differential privacy"; Patrini et al. 2017 (the loss of noised labels).
    """

    hidden: int = 64
    epochs: int = 100
    batch_size: int = 128
    lr: float = 2e-3
    patience: int = 10
    label_epsilon: float = 0.0
    seed: int = 0
    progress: Progress = silent
    classes_: Array = field(init=False, repr=False)
    _top: nn.Sequential = field(init=False, repr=False)
    _widths: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        sound = min(self.hidden, self.epochs, self.batch_size, self.patience) >= 1 and self.lr > 0
        if not sound or not 0 <= self.label_epsilon < math.inf:
            raise UsageError(
                "bad-parameter", "joint modelling", got=self,
                allowed="whole numbers from 1, lr above 0, label_epsilon from 0", remedy="change it",
            )  # fmt: skip

    def fit(self, own: Party, labels: Sequence[Any], others: Session) -> Self:
        """Trains all parts on the entities that all parties have. ``labels`` are of the rows of ``own``.

        Raises:
            DataError: too few common entities, labels of another number, one class alone; a party that says what no
                party says.
        """
        truth = np.asarray(labels)
        if truth.shape != (len(own.ids),):
            raise DataError(
                "bad-table", "there is not one label a row", allowed=(len(own.ids),), got=truth.shape,
                remedy="give one label for each row of who has them",
            )  # fmt: skip
        rows = align(own, others)
        self.classes_, codes = np.unique(truth[rows], return_inverse=True)
        if len(rows) < 20 or len(self.classes_) < 2:
            raise DataError(
                "too-few-shared", "there is too little that all parties have", allowed="20 entities, of two classes",
                got=f"{len(rows)} entities, {len(self.classes_)} classes", remedy="compare how parties name entities",
            )  # fmt: skip
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "joint"))
        order = torch.randperm(len(rows), generator=generator)
        held, learnt = order[: len(rows) // 10], order[len(rows) // 10 :]
        told, response = self._told(torch.from_numpy(codes), generator)
        talk = _Talk(own, others)
        talk.all("begin", {"train": np.sort(learnt.numpy())})
        self._widths = [e.shape[1] for e in talk.embed(learnt[:1])]
        self._top = self._fresh()
        self._train(talk, learnt, held, told, response, generator)
        return self

    def predict_proba(self, own: Party, others: Session) -> Array:
        """[rows of ``own``, classes]. DataError where not all parties have all of them."""
        rows = align(own, others)
        if len(rows) < len(own.ids):
            raise DataError(
                "not-shared-by-all", f"{len(own.ids) - len(rows)} of {len(own.ids)} entities are not known to all "
                "parties", allowed="entities that all parties have", got=f"{len(rows)} of them",
                remedy="leave the others out: `fanbu.tables.joint.align` says which rows are common",
            )  # fmt: skip
        with torch.no_grad():
            logits = self._logits(_Talk(own, others).embed(torch.arange(len(rows))))
        found = np.empty((len(rows), len(self.classes_)))
        found[rows] = logits.softmax(1).double().numpy()
        return found

    def predict(self, own: Party, others: Session) -> Array:
        """[rows of ``own``] of classes."""
        return np.asarray(self.classes_[self.predict_proba(own, others).argmax(1)])

    def _fresh(self) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(self.seed, "top"))
            wide = nn.Linear(sum(self._widths), self.hidden)
            return nn.Sequential(nn.ReLU(), wide, nn.ReLU(), nn.Linear(self.hidden, len(self.classes_)))

    def _told(self, codes: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The labels that training sees, and [classes, classes] how likely each true one is told as each."""
        count = len(self.classes_)
        if not self.label_epsilon:
            return codes, torch.eye(count)
        rest = 1 / (math.exp(min(self.label_epsilon, 700.0)) + count - 1)
        response = torch.full((count, count), rest).fill_diagonal_(1 - (count - 1) * rest)
        below = response.double().cumsum(1)[codes]  # who knows the run's seed could take other noise away
        told = (Chance().uniform(len(codes))[:, None] >= below).sum(1).clamp(max=count - 1)
        return told, response

    def _logits(self, parts: Sequence[Tensor]) -> Tensor:
        found: Tensor = self._top(torch.cat(list(parts), 1))
        return found

    def _loss(self, parts: Sequence[Tensor], told: Tensor, response: Tensor) -> Tensor:
        likely = self._logits(parts).softmax(1) @ response
        return nn.functional.nll_loss(likely.clamp_min(1e-12).log(), told)

    def _train(
        self, talk: _Talk, learnt: Tensor, held: Tensor, told: Tensor, response: Tensor, generator: torch.Generator
    ) -> None:
        optimizer = torch.optim.AdamW(self._top.parameters(), self.lr)
        best, waited, kept = math.inf, 0, self._top.state_dict()
        for epoch in range(self.epochs):
            for batch in learnt[torch.randperm(len(learnt), generator=generator)].split(self.batch_size):
                parts = [e.requires_grad_() for e in talk.forward(batch)]
                optimizer.zero_grad()
                self._loss(parts, told[batch], response).backward()
                optimizer.step()
                talk.backward([e.grad for e in parts if e.grad is not None])
            with torch.no_grad():
                loss = float(self._loss(talk.embed(held), told[held], response))
            self.progress("joint modelling", epoch + 1, self.epochs)
            waited += 1
            if loss < best:
                best, waited = loss, 0
                kept = {n: t.clone() for n, t in self._top.state_dict().items()}
                talk.all("keep", {})
            if waited == self.patience:
                break
        self._top.load_state_dict(kept)
        talk.all("back", {})

    def save(self, folder: Path) -> None:
        """The top network, in the folder of who has the labels; each party saves its own."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / "joint.safetensors", self._top.state_dict())
        facts = {"classes": self.classes_.tolist(), "widths": self._widths, "hidden": self.hidden, "seed": self.seed}
        write_text(folder / "joint.json", canonical(facts))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """As it was saved. Raises IntegrityError for files that are broken."""
        with read_part(folder, "joint") as (facts, tensors):
            made = cls(hidden=facts["hidden"], seed=facts["seed"])
            made.classes_, made._widths = np.array(facts["classes"]), list(map(int, facts["widths"]))
            made._top = made._fresh()
            made._top.load_state_dict(tensors)
        return made


def align(own: Party, others: Session) -> Array:
    """The rows of ``own`` that all parties have, in its order, which all of them know from now on.

    Each party's names, as points in an order of no meaning, go once round all parties, who blind them; those that are
    equal in the end are common. No two parties' points reach a third one blinded by the same parties, so it can match
    none. Who has the labels learns how many entities each party has, which of its own rows each other party has, and
    how many any of them share; the others which of theirs all have, in what order, and how many entities there are.
    """
    talk = _Talk(own, others)
    final = {name: talk.ask(name, "blind", {})["points"] for name in talk.names}
    for place, name in enumerate(talk.names):
        for other in [*talk.names[place + 1 :], *talk.names[:place]]:
            final[name] = talk.ask(other, "reblind", {"points": final[name]})["points"]
    rows = common(final)
    there = own.places[rows[own.name]]
    order = np.argsort(there)
    for name in talk.names:
        talk.ask(name, "order", {"rows": rows[name][order]})
    return there[order]


class _Talk:
    """All parties, the one who has the labels first. What they say is looked at."""

    def __init__(self, own: Party, others: Session) -> None:
        self.own, self.others, self.names = own, others, [own.name, *sorted(others.names)]
        if len(set(self.names)) != len(self.names):
            raise UsageError(
                "bad-parameter",
                "two parties have one name",
                allowed="each its own",
                got=self.names,
                remedy="rename one",
            )

    def ask(self, name: str, what: str, arrays: Arrays) -> dict[str, Array]:
        return self.own.answer(what, arrays) if name == self.own.name else self.others.ask(name, what, arrays)

    def all(self, what: str, arrays: Arrays) -> list[dict[str, Array]]:
        return [self.ask(name, what, arrays) for name in self.names]

    def forward(self, rows: Tensor) -> list[Tensor]:
        return self._e("forward", rows)

    def embed(self, rows: Tensor) -> list[Tensor]:
        return self._e("embed", rows)

    def backward(self, gradients: Sequence[Tensor]) -> None:
        for name, g in zip(self.names, gradients, strict=True):
            self.ask(name, "backward", {"g": g.numpy()})

    def _e(self, what: str, rows: Tensor) -> list[Tensor]:
        found = []
        for name, said in zip(self.names, self.all(what, {"rows": rows.numpy()}), strict=True):
            e = said.get("e")
            sound = e is not None and e.ndim == 2 and e.dtype == np.float32 and len(e) == len(rows)
            if e is None or not sound or not np.isfinite(e).all():
                raise broken(f"{name} does not say one row of finite numbers for each that it was asked for", name)
            found.append(torch.from_numpy(e.copy()))
        return found
