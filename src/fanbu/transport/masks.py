"""Secure aggregation: masks that cancel in the sum, so that the centre reads the sum of all owners and no single one.

Each owner adds to its numbers a mask of its own, and for each neighbour one that the neighbour takes away. Both come
from seeds that neighbours hold in shares: where an owner is lost, enough of them give what opens the masks that it left
in the others' numbers; of those who are heard they give what opens their own mask. Never both of one owner, or its
numbers could be read: so the centre must be one that follows the protocol and passes on keys unchanged (honest but
curious), and a majority of an owner's holders must not help it.

References: Bonawitz et al. 2017, "Practical secure aggregation for privacy-preserving machine learning"; Bell et al.
2020, "Secure single-server aggregation with (poly)logarithmic overhead" (neighbours in place of all pairs).
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanbu.errors import IntegrityError, RetryError, UsageError, needs_extra

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STEP = 2.0**-40  # of the whole numbers that stand for real ones; sums are taken modulo 2^64
_SEED, _NONCE, _PLACE = 16, 12, 2  # bytes


@dataclass(frozen=True)
class Ring:
    """Who takes part in one sum, each with some neighbours; ``name`` is never used twice."""

    name: str
    owners: tuple[str, ...]

    def neighbours(self, owner: str) -> list[str]:
        """Those next to an owner on a ring in an order drawn from ``name``, 4 log2 of all on either side: where owners
        are few, all others."""
        ring = sorted(self.owners, key=lambda o: hashlib.sha256(f"{self.name} {o}".encode()).digest())
        here, side = ring.index(owner), 4 * math.ceil(math.log2(max(2, len(ring))))
        return sorted({ring[(here + step) % len(ring)] for step in range(-side, side + 1)} - {owner})

    def holders(self, owner: str) -> list[str]:
        """Who holds shares of an owner's secrets, in order: its neighbours, and itself."""
        return sorted([*self.neighbours(owner), owner])

    def threshold(self, owner: str) -> int:
        """How many of the holders open a secret: a majority, so that not both of an owner's can be opened."""
        return len(self.holders(owner)) // 2 + 1


@dataclass(frozen=True)
class Secrets:
    """What an owner keeps to itself for one sum: the seed of the masks with its neighbours, that of its own mask, and
    the key by which others' shares reach it."""

    seed: bytes
    own: bytes
    letters: bytes

    def public(self) -> list[str]:
        """Three strings of 64 hex digits that all may know: two public keys, and what its own mask is checked by."""
        keys = [_public(_private(self.seed)), _public(_loaded(self.letters))]
        return [*(k.hex() for k in keys), hashlib.sha256(self.own).hexdigest()]


def drawn() -> Secrets:
    """Fresh secrets, from the system's entropy."""
    return Secrets(secrets.token_bytes(_SEED), secrets.token_bytes(_SEED), secrets.token_bytes(32))


def shares_for(ring: Ring, owner: str, own: Secrets, public: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """One letter for each holder who has told its keys, sealed for it: its shares of both seeds."""
    with needs_extra("secure"):
        from Crypto.Protocol.SecretSharing import Shamir

    holders, least = ring.holders(owner), ring.threshold(owner)
    pieces: list[dict[int, bytes]] = [
        dict(Shamir.split(least, len(holders), secret, ssss=False)) for secret in (own.seed, own.own)
    ]  # fmt: skip
    return {
        holder: _sealed(ring, owner, holder, own, public[holder], place, pieces[0][place] + pieces[1][place])
        for place, holder in enumerate(holders, 1)
        if holder in public
    }


def opened(ring: Ring, holder: str, own: Secrets, letters: Mapping[str, bytes], public: Mapping[str, Sequence[str]]
           ) -> dict[str, tuple[int, bytes, bytes]]:  # fmt: skip
    """Of each sender: the place of this holder among those who hold its secrets, and the shares of its two seeds.
    IntegrityError for a letter that is not from whom it should be."""
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    found = {}
    for sender, letter in letters.items():
        key = _agreed(own.letters, public[sender][1], f"letter {ring.name} {sender} {holder}")
        try:
            plain = ChaCha20Poly1305(key).decrypt(letter[:_NONCE], letter[_NONCE:], ring.name.encode())
        except (InvalidTag, ValueError):
            raise broken(f"a letter from {sender} to {holder} is not whole", sender) from None
        parts = plain[:_PLACE], plain[_PLACE : _PLACE + _SEED], plain[_PLACE + _SEED :]
        found[sender] = (int.from_bytes(parts[0], "big"), parts[1], parts[2])
    return found


def _sealed(
    ring: Ring, sender: str, holder: str, own: Secrets, public: Sequence[str], place: int, shares: bytes
) -> bytes:
    from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

    key = _agreed(own.letters, public[1], f"letter {ring.name} {sender} {holder}")
    nonce = secrets.token_bytes(_NONCE)
    return nonce + ChaCha20Poly1305(key).encrypt(nonce, place.to_bytes(_PLACE, "big") + shares, ring.name.encode())


def joined(ring: Ring, owner: str, shares: Mapping[int, bytes], public: Sequence[str], which: str) -> bytes:
    """A seed from shares of it by place, looked at against what its owner told: ``seed``, or ``own``.

    Raises RetryError where shares are too few, and IntegrityError where they are not of it.
    """
    with needs_extra("secure"):
        from Crypto.Protocol.SecretSharing import Shamir

    least = ring.threshold(owner)
    if len(shares) < least:
        raise RetryError(
            "too-few-owners", f"too few of those who hold shares of {owner}'s secrets were heard to open the sum",
            allowed=least, got=len(shares), remedy="run again when more of them are there: a new sum is begun",
        )  # fmt: skip
    secret: bytes = Shamir.combine(sorted(shares.items())[:least], ssss=False)
    told = _public(_private(secret)).hex() if which == "seed" else hashlib.sha256(secret).hexdigest()
    if told != public[0 if which == "seed" else 2]:
        raise broken(f"the shares of {owner} do not open what it told", owner)
    return secret


Mask = tuple[int, bytes]  # a sign, and the key of a stream of numbers


def pair_masks(ring: Ring, owner: str, seed: bytes, others: Collection[str], public: Mapping[str, Sequence[str]]
               ) -> list[Mask]:  # fmt: skip
    """The masks that an owner shares with each of these neighbours: what one adds the other takes away."""
    return [
        (
            1 if owner < other else -1,
            _agreed_of(_private(seed), public[other][0], f"mask {ring.name} {' '.join(sorted((owner, other)))}"),
        )
        for other in sorted(others)
    ]


def own_mask(ring: Ring, owner: str, own: bytes) -> Mask:
    """The mask that an owner shares with nobody."""
    return 1, _derived(own, f"own {ring.name} {owner}")


def masked(numbers: Tensor, masks: Sequence[Mask], first: int) -> Tensor:
    """Whole numbers [...] int64 with masks added modulo 2^64, in place; ``first`` is the place of the first of them
    among all that are masked in one sum."""
    flat = numbers.view(-1)
    for sign, key in masks:
        flat.add_(_stream(key, first, flat.numel()), alpha=sign)
    return numbers


def whole(values: Tensor, owners: int, name: str) -> Tensor:
    """Real numbers as whole ones: round(x / STEP), int64. UsageError where the sum of so many could overflow."""
    import torch

    bound = 2.0**62 * STEP / owners
    wide = values.double()
    if wide.numel() and not float(wide.abs().max()) < bound:
        raise UsageError(
            "too-large-for-sum", f"{name} holds numbers too large for a masked sum of {owners} owners",
            allowed=f"below {bound:.4g}", got=f"{float(wide.abs().max()):.4g}",
            remedy="take this way without secure, or a base whose numbers are smaller",
        )  # fmt: skip
    return (wide / STEP).round().to(torch.int64)


def real(numbers: Tensor) -> Tensor:
    """What whole numbers stand for, float64."""
    return numbers.double() * STEP


def _stream(key: bytes, first: int, count: int) -> Tensor:
    """Numbers ``first`` to ``first + count`` of the stream of AES-256 in counter mode, two a block."""
    import torch
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    skip = first % 2
    counter = (first // 2).to_bytes(16, "big")
    cipher = Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()  # no key is used for two sums
    room = bytearray(8 * (count + skip) + 15)
    cipher.update_into(bytes(8 * (count + skip)), room)
    found: torch.Tensor = torch.frombuffer(room, dtype=torch.int64, count=count + skip)
    return found[skip:]


def _private(seed: bytes) -> Any:
    return _loaded(_derived(seed, "fanbu masks"))


def _loaded(private: bytes) -> Any:
    with needs_extra("secure"):
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return X25519PrivateKey.from_private_bytes(private)


def _public(private: Any) -> bytes:
    key: bytes = private.public_key().public_bytes_raw()
    return key


def _agreed(private: bytes, public: str, purpose: str) -> bytes:
    return _agreed_of(_loaded(private), public, purpose)


def _agreed_of(private: Any, public: str, purpose: str) -> bytes:
    """Thirty-two bytes that two owners know, for one purpose (X25519, HKDF). IntegrityError for no public key."""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

    try:
        common = private.exchange(X25519PublicKey.from_public_bytes(bytes.fromhex(public)))
    except ValueError:
        raise broken("a public key is none", public) from None
    return _derived(common, purpose)


def _derived(secret: bytes, purpose: str) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, None, purpose.encode()).derive(secret)


def broken(what: str, got: object) -> IntegrityError:
    """A sum that cannot be opened."""
    return IntegrityError(
        "sum-broken", what, got=str(got)[:200],
        remedy="run again: a new sum is begun with the owners who are there; or take this way without secure",
    )  # fmt: skip
