"""Secure aggregation: what each owner contributes is masked, and the centre reads the sum of all of them alone.

Four questions to each owner: its keys, shares of its secrets for its neighbours, its masked numbers, and the shares
that open the sum (``transport.masks``). What it contributes, and its secrets, stay in its workspace.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fanbu.catalogue import Method
from fanbu.contribution import Contribution, open_contribution, write_contribution
from fanbu.domain import Specialist
from fanbu.errors import BoundaryError, IntegrityError, RetryError
from fanbu.files import write_text
from fanbu.merging.noise import Shaken
from fanbu.merging.summing import Summands, as_one, meta_of
from fanbu.model import Model
from fanbu.private import OwnerNoise
from fanbu.tensors import ByRows, Tensors, layout, read_rows, save_tensors
from fanbu.transport import masks
from fanbu.transport.masks import Mask, Ring, Secrets
from fanbu.turn import Turn
from fanbu.types import Context, digest

Session = Mapping[str, Any]  # name, owners and the least of them that it opens with: what all know of one sum
_SEED, _OWN, _FOR, _KEYS = "seed:", "own:", "for:", "keys"
_STALE = 60.0  # seconds after which a half-written file is nobody's
_DESKS, _SUMS = 4, 1000  # of one domain: sums whose notes stay at the owner, and contributions that it remembers


def least_of(owners: int) -> int:
    """How many of so many owners a sum opens with: a majority."""
    return max(2, owners // 2 + 1)


@contextmanager
def begun(turn: Turn, what: Mapping[str, Any], names: Iterable[str], inner: int | None) -> Iterator[Session]:
    """A sum that has a name of its own, the same again after a kill. ``what`` says all that decides what each owner
    contributes: where any of it is another, so is the sum, and no masks serve twice. One that cannot be opened is given
    up, and the next run begins another."""
    owners = sorted(names)
    key = digest({**what, "owners": owners})
    desk = _folder(turn) / f"{key[:20]}.json"
    if not desk.exists():
        write_text(desk, json.dumps({"nonce": secrets.token_hex(16)}))
    name = digest([key, json.loads(desk.read_text())["nonce"]])
    numbered = {} if inner is None else {"inner": inner}
    try:
        yield {"name": name, "owners": owners, "least": least_of(len(owners)), "key": key[:20], **numbered}
    except (IntegrityError, RetryError):
        desk.unlink(missing_ok=True)
        raise


# Owners


def tell_keys(turn: Turn, way: Method, s: Specialist, session: Session) -> Contribution:
    """An owner draws its secrets for one sum, and tells its public keys."""
    ring = _ring(session)

    def make(out: Path, context: Context) -> Contribution:
        _check_many(s, len(ring.owners), session)
        own = masks.drawn()
        desk = _desk(turn, session, s)
        kept = {"seed": own.seed.hex(), "own": own.own.hex(), "letters": own.letters.hex()}
        if not desk.exists():
            _note(desk, {"secrets": kept})
        own_desks = [p for p in desk.parent.iterdir() if p.name[20:] == desk.name[20:]]
        for old in sorted(own_desks, key=os.path.getmtime)[:-_DESKS]:
            old.unlink(missing_ok=True)
        told = [list(bytes.fromhex(part)) for part in _secrets(json.loads(desk.read_text())).public()]
        return _message(way, s, {_KEYS: torch.tensor(told, dtype=torch.uint8)})

    return turn.contribution(f"{way.name} keys {s.domain.name}", __name__, dict(session), s.domain, make)[0]


def share_out(turn: Turn, way: Method, s: Specialist, session: Session, public: Mapping[str, Any]) -> Contribution:
    """An owner's letters to those who hold shares of its secrets, sealed."""
    inputs = {**session, "public": public}

    def make(out: Path, context: Context) -> Contribution:
        with _opened(turn, session, s) as notes:
            _once(notes, "public", public)
            own = _secrets(notes)
            if list(public[s.domain.name]) != own.public():
                raise masks.broken(f"the keys of {s.domain.name} are not those that it told", s.domain.name)
        letters = masks.shares_for(_ring(session), s.domain.name, own, public)
        return _message(way, s, {_FOR + name: _bytes(letter) for name, letter in letters.items()})

    return turn.contribution(f"{way.name} letters {s.domain.name}", __name__, inputs, s.domain, make)[0]


def mask(
    turn: Turn, way: Method, s: Specialist, session: Session, base: Model, folder: Path, letters: Mapping[str, str],
    weighing: Mapping[str, Any],
) -> Contribution:  # fmt: skip
    """An owner's masked numbers; ``letters`` are those to it, of the neighbours that take part."""
    inputs = {**session, "letters": letters, "weighing": weighing, "folder": folder.name, "base": base.digest}
    ring, name = _ring(session), s.domain.name

    def make(out: Path, context: Context) -> Contribution:
        with _opened(turn, session, s) as notes:
            _once(notes, "masked", digest([letters, weighing, folder.name, base.digest]))
            own, public = _secrets(notes), notes["public"]
            found = masks.opened(ring, name, own, {d: bytes.fromhex(v) for d, v in letters.items()}, public)
            notes["held"] = {d: [place, seed.hex(), mine.hex()] for d, (place, seed, mine) in found.items()}
            notes["kept"] = folder.name
        kept = open_contribution(folder / "kept")
        weight = int(kept.meta["rows"]) / float(weighing["scale"]) if weighing["scale"] else 1.0
        _check_many(s, len(found) + len(ring.owners) - len(ring.holders(name)), session)
        keys = masks.pair_masks(ring, name, own.seed, found.keys() - {name}, public)
        noise = weighing["noise"] and OwnerNoise.of(weighing["noise"])
        numbers: ByRows = Summands(kept, base, weighing["labels"], weight)
        numbers = Shaken(numbers, noise.deviation) if noise else numbers
        hidden = Masked(numbers, [*keys, masks.own_mask(ring, name, own.own)], len(ring.owners))
        assert context.scratch is not None
        save_tensors(context.scratch / "masked.safetensors", hidden)
        sent = _message(way, s, Tensors(context.scratch / "masked.safetensors"))
        sent = replace(sent, meta=meta_of(kept), epsilon=kept.epsilon)
        return noise.paid(sent) if noise else sent

    return turn.contribution(f"{way.name} masked contribution {name}", __name__, inputs, s.domain, make)[0]


def unmask(turn: Turn, way: Method, s: Specialist, session: Session, heard: Sequence[str], lost: Sequence[str]
           ) -> Contribution:  # fmt: skip
    """The shares that an owner holds of what opens the sum: of the masks of those who were heard, and of the masks
    that those who were lost left in others' numbers. It answers once, and forgets its secrets."""
    inputs = {**session, "heard": list(heard), "lost": list(lost)}

    def make(out: Path, context: Context) -> Contribution:
        with _opened(turn, session, s) as notes:
            _once(notes, "opened", [list(heard), list(lost)])
            if set(heard) & set(lost) or s.domain.name not in heard:
                raise masks.broken("who was heard and who was lost is not to be told apart", s.domain.name)
            _check_many(s, len(set(heard)), session)
            if "answer" not in notes:
                held = notes.get("held", {})
                _check_apart(turn, s, notes["kept"], heard, session)
                answer = {_OWN + d: [held[d][0], held[d][2]] for d in heard if d in held}
                answer |= {_SEED + d: [held[d][0], held[d][1]] for d in lost if d in held}
                for secret in ("secrets", "held", "public"):
                    notes.pop(secret, None)
                notes["answer"] = answer
        sent = {
            n: _bytes(int(place).to_bytes(2, "big") + bytes.fromhex(v)) for n, (place, v) in notes["answer"].items()
        }
        return _message(way, s, sent)

    return turn.contribution(f"{way.name} opening {s.domain.name}", __name__, inputs, s.domain, make)[0]


# The centre


def summed(
    turn: Turn, way: Method, how: Mapping[str, Any], base: Model, session: Session,
    prepared: Sequence[tuple[Specialist, Contribution, Path]],
) -> Contribution:  # fmt: skip
    """The mean of what all owners contributed, as one contribution; who is lost on the way is not in it. ``how`` says
    whether owners count ``by_rows``, and what ``noise`` they add.

    Raises RetryError where no majority of the owners, or too few of an owner's holders, are heard: run again, a new sum
    is begun.
    """
    ring, owners = _ring(session), {s.domain.name: (s, folder) for s, _, folder in prepared}
    _settled(turn, session, "keys", owners)
    public = {s.domain.name: _public(c) for s, c, _ in prepared}

    def known(name: str) -> dict[str, list[str]]:
        return {n: keys for n, keys in public.items() if n in ring.holders(name)}

    asked: list[tuple[Any, ...]] = [(way, s, session, known(n)) for n, (s, _) in owners.items()]
    letters = {call[1].domain.name: c for call, c in turn.at_owners(share_out, asked)}
    _settled(turn, session, "letters", letters)
    scale, labels = _scale(owners) if how["by_rows"] else 0, _labels(owners)
    weighing = {"scale": scale, "labels": labels, "noise": how["noise"]}
    asked = [
        (way, owners[n][0], session, base, owners[n][1], _letters_to(n, letters), weighing) for n in letters
    ]  # fmt: skip
    sent = _alike(turn, {call[1].domain.name: c for call, c in turn.at_owners(mask, asked)})
    if len(sent) < session["least"]:
        raise RetryError(
            "too-few-owners", "a sum of so few owners is not opened", allowed=session["least"], got=sorted(sent),
            remedy="run again when more of them are there",
        )  # fmt: skip
    heard = _settled(turn, session, "heard", sent)
    lost = sorted(letters.keys() - set(heard))
    asked = [(way, owners[n][0], session, heard, lost) for n in heard]
    answers = [c for _, c in turn.at_owners(unmask, asked)]
    numbers = {n: sent[n] for n in heard}
    inputs = {**session, "sent": {n: c.digest for n, c in numbers.items()}, "base": base.digest}

    def produce(out: Path, context: Context) -> None:
        keys = opening(ring, heard, lost, public, answers)
        first = numbers[heard[0]]
        sums = Opened(list(numbers.values()), keys)
        one = as_one(sums, labels, meta_of(first), first, heard, scale or 1)
        write_contribution(one, out / "contribution")

    done = turn.stage(f"{way.name} sum", __name__, inputs, produce)
    return replace(open_contribution(done.path / "contribution"), owners=len(heard))


def opening(
    ring: Ring, heard: Sequence[str], lost: Sequence[str], public: Mapping[str, Sequence[str]],
    answers: Sequence[Contribution],
) -> list[Mask]:  # fmt: skip
    """What is added to the sum of all masked numbers, so that no mask is left in it."""
    shares: dict[str, dict[int, bytes]] = {}
    for c in answers:
        for name, tensor in c.tensors.items():
            content = bytes(tensor.tolist())
            shares.setdefault(name, {})[int.from_bytes(content[:2], "big")] = content[2:]
    found: list[Mask] = []
    for name in heard:
        seed = masks.joined(ring, name, shares.get(_OWN + name, {}), public[name], "own")
        sign, key = masks.own_mask(ring, name, seed)
        found.append((-sign, key))
    for name in lost:
        left = [n for n in ring.neighbours(name) if n in heard]
        seed = masks.joined(ring, name, shares.get(_SEED + name, {}), public[name], "seed")
        found += masks.pair_masks(ring, name, seed, left, public)
    return found


def _alike(turn: Turn, sent: dict[str, Contribution]) -> dict[str, Contribution]:
    """Those who sent numbers of the same names and shapes as most; whoever did not takes no further part."""
    shapes = {n: digest({k: [str(v) for v in layout(c.tensors, k)] for k in c.tensors}) for n, c in sent.items()}
    most = Counter(sorted(shapes.values())).most_common(1)
    for name, shape in shapes.items():
        if shape != most[0][0] or any(layout(sent[name].tensors, k)[1] != torch.int64 for k in sent[name].tensors):
            if turn.centre is None:
                raise masks.broken(f"{name} sends numbers of other shapes than the others", name)
            turn.miss(name, "mask: it sent other numbers than the others")
            del sent[name]
    return sent


def _settled(turn: Turn, session: Session, what: str, names: Iterable[str]) -> list[str]:
    """Who has told ``what``, written down before any owner is told of it: after a kill it is the same. RetryError where
    one of them is gone by then."""
    desk = _folder(turn) / f"{session['key']}.json"
    notes, here = json.loads(desk.read_text()), sorted(names)
    if what not in notes:
        notes[what] = here
        write_text(desk, json.dumps(notes))
    known: list[str] = notes[what]
    if known != here:
        raise RetryError(
            "too-few-owners", f"since {what} of a sum were settled, owners have come or gone", allowed=known, got=here,
            remedy="run again: a new sum is begun with those who are there",
        )  # fmt: skip
    return known


def _scale(owners: Mapping[str, tuple[Specialist, Path]]) -> int:
    """A power of two that no owner's rows exceed: weights are rows over it, exactly."""
    return int(2 ** math.ceil(math.log2(max(2, *(s.domain.counts["train"] for s, _ in owners.values())))))


def _labels(owners: Mapping[str, tuple[Specialist, Path]]) -> list[str]:
    return sorted({label for s, _ in owners.values() for label in s.domain.full_labels})


def _letters_to(name: str, letters: Mapping[str, Contribution]) -> dict[str, str]:
    found = {n: c.tensors[_FOR + name] for n, c in letters.items() if _FOR + name in c.tensors}
    return {n: bytes(letter.flatten().tolist()).hex() for n, letter in found.items()}


def _public(c: Contribution) -> list[str]:
    told = c.tensors[_KEYS]
    if told.shape != (3, 32) or told.dtype != torch.uint8:
        raise masks.broken(f"the keys of {c.domain} are none", list(told.shape))
    return [bytes(row).hex() for row in told.tolist()]


# Both


class _Places:
    """Where each tensor's numbers begin among all that are masked."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.first, self.width, place = {}, {}, 0
        for name in sorted(tensors):
            shape, _ = layout(tensors, name)
            self.first[name], self.width[name] = place, math.prod(shape[1:])
            place += math.prod(shape)

    def __call__(self, name: str, start: int) -> int:
        return self.first[name] + start * self.width[name]


class Masked(ByRows):
    """Whole numbers with masks, some rows at a time."""

    def __init__(self, numbers: ByRows, added: Sequence[Mask], owners: int) -> None:
        self.numbers, self.masks, self.owners = numbers, added, owners
        self.names, self.places = numbers.names, _Places(numbers)

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return self.numbers.layout(name)[0], torch.int64

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        plain = masks.whole(self.numbers.rows(name, start, stop), self.owners, name)
        return masks.masked(plain, self.masks, self.places(name, start))


class Opened(ByRows):
    """The sum of masked numbers without masks, in float64, some rows at a time."""

    def __init__(self, sent: Sequence[Contribution], opening: Sequence[Mask]) -> None:
        self.sent, self.masks = sent, opening
        self.names, self.places = sorted(sent[0].tensors), _Places(sent[0].tensors)

    def layout(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of one tensor."""
        return layout(self.sent[0].tensors, name)[0], torch.float64

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Some rows of one tensor."""
        total = read_rows(self.sent[0].tensors, name, start, stop).clone()
        for c in self.sent[1:]:
            total.add_(read_rows(c.tensors, name, start, stop))
        return masks.real(masks.masked(total, self.masks, self.places(name, start)))


def _ring(session: Session) -> Ring:
    return Ring(str(session["name"]), tuple(session["owners"]))


def _message(way: Method, s: Specialist, tensors: Mapping[str, Tensor]) -> Contribution:
    return Contribution(way.needs.kind, s.domain.name, way.name, tensors)


def _bytes(content: bytes) -> Tensor:
    return torch.tensor(list(content), dtype=torch.uint8)


def _folder(turn: Turn) -> Path:
    folder = turn.workspace.root / "secure"
    folder.mkdir(mode=0o700, exist_ok=True)
    for old in folder.glob(".*.tmp"):  # of a process that was killed
        if time.time() - old.stat().st_mtime > _STALE:
            old.unlink(missing_ok=True)
    return folder


def _desk(turn: Turn, session: Session, s: Specialist) -> Path:
    return _folder(turn) / f"{session['name'][:20]}-{s.domain.name}.json"


@contextmanager
def _opened(turn: Turn, session: Session, s: Specialist) -> Iterator[dict[str, Any]]:
    """An owner's notes of a sum, which nobody else changes meanwhile; what is changed in them is kept, durably, before
    anything that was made of it can cross."""
    desk = _desk(turn, session, s)
    with turn.workspace.lock(desk.stem):
        if not desk.exists():
            raise masks.broken("an owner has lost its secrets of this sum", desk.name)
        notes: dict[str, Any] = json.loads(desk.read_text())
        yield notes
        _note(desk, notes)


def _note(desk: Path, notes: Mapping[str, Any]) -> None:
    write_text(desk, json.dumps(notes))
    desk.chmod(0o600)


def _check_apart(turn: Turn, s: Specialist, kept: str, heard: Sequence[str], session: Session) -> None:
    """BoundaryError where this owner's contribution was opened before in the sum of other owners, so few of them that
    the difference of both sums would show theirs. Where owners work in the centre's workspace there is nothing to hide
    from it, and an owner may leave at any time."""
    if set(turn.domains) != {s.domain.name}:
        return
    file = _folder(turn) / f"sums-{s.domain.name}.json"
    known: dict[str, list[list[str]]] = json.loads(file.read_text()) if file.exists() else {}
    before = known.setdefault(kept, [])
    for other in before:
        if 0 < len(set(other) ^ set(heard)) < int(session["least"]):
            raise BoundaryError(
                "not-shared", f"{s.domain.name} opens no sum that differs from one before by so few owners",
                allowed="the same owners, or many others", got=sorted(set(other) ^ set(heard)),
                remedy="run again when the same owners are there, or when rows or the large model are others",
            )  # fmt: skip
    before.append(sorted(heard))
    write_text(file, json.dumps(dict(list(known.items())[-_SUMS:])))


def _secrets(notes: Mapping[str, Any]) -> Secrets:
    if "secrets" not in notes:
        raise masks.broken("an owner has opened this sum already", "no secrets")
    return Secrets(**{name: bytes.fromhex(value) for name, value in notes["secrets"].items()})


def _once(notes: dict[str, Any], what: str, asked: Any) -> dict[str, Any]:
    """The notes with what was asked; an owner answers nothing twice, but the same again."""
    if notes.setdefault(what, asked) != asked:
        raise masks.broken(f"the centre asks twice, and not for the same ({what})", what)
    return notes


def _check_many(s: Specialist, got: int, session: Session) -> None:
    """BoundaryError at an owner who takes part in no sum of so few."""
    least = max(2, int(session["least"]), s.domain.share.together)
    if got < least:
        raise BoundaryError(
            "not-shared", f"{s.domain.name} takes part in no sum of so few owners", allowed=f"{least} at least",
            got=got, remedy="let more owners take part, or lower `share.together` with its owner's consent",
        )  # fmt: skip
