"""Which entities several parties all have, without any party showing its names of others.

References: Meadows 1986, "A more efficient cryptographic matchmaking protocol"; Huberman, Franklin and Hogg 1999
(private set intersection by exponents that commute); RFC 7748 (X25519).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fanbu.errors import DataError, needs_extra

Array = np.ndarray[Any, np.dtype[Any]]
_SIZE, _P = 32, 2**255 - 19  # bytes of a point, and the field of its coordinates


def points(ids: Sequence[str]) -> Array:
    """[ids, 32] uint8: a point of the curve for each name. DataError where a name comes twice."""
    if len(set(ids)) != len(ids):
        twice = sorted({i for i in ids if ids.count(i) > 1})[:3] if len(ids) < 10_000 else []
        raise DataError(
            "id-twice", "an entity has several rows", allowed="each name once", got=twice or "some twice",
            remedy="make one row of those that are of one entity",
        )  # fmt: skip
    return np.frombuffer(b"".join(map(_point, ids)), dtype=np.uint8).reshape(len(ids), _SIZE)


def _point(name: str) -> bytes:
    """A hash of a name that is a point of the curve and not of its twist: no blinding hides which of the two."""
    for number in range(256):
        hashed = hashlib.sha256(f"fanbu alignment {number} {name}".encode()).digest()
        u = int.from_bytes(hashed, "little") % 2**255 % _P
        if pow(u * (u * u + 486662 * u + 1), (_P - 1) // 2, _P) == 1:
            return hashed
    raise AssertionError("no point in 256 hashes")


def blinded(points_n32: Array, secret: bytes) -> Array:
    """Each point times the secret. Blinding by several parties commutes: it is the same in whatever order they do it,
    and who lacks one of the secrets cannot try out which name a point was made of."""
    with needs_extra("secure"):
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

    if points_n32.ndim != 2 or points_n32.shape[1] != _SIZE or points_n32.dtype != np.uint8:
        raise DataError(
            "session-broken", "points of an alignment are no points", allowed="[rows, 32] bytes",
            got=f"{points_n32.shape} {points_n32.dtype}", remedy="let all parties run the same version of fanbu",
        )  # fmt: skip
    key = X25519PrivateKey.from_private_bytes(secret)
    made = [key.exchange(X25519PublicKey.from_public_bytes(p.tobytes())) for p in points_n32]
    return np.frombuffer(b"".join(made), dtype=np.uint8).reshape(-1, _SIZE)


def common(blinded_by: Mapping[str, Array]) -> dict[str, Array]:
    """From each party's points, blinded by all: the places [shared] of those that all have, in the order in which the
    first party has them."""
    places = {
        name: {point.tobytes(): place for place, point in enumerate(p_n32)} for name, p_n32 in blinded_by.items()
    }  # fmt: skip
    first, *others = places.values()
    shared = [point for point in first if all(point in known for known in others)]
    return {name: np.array([known[p] for p in shared], dtype=np.int64) for name, known in places.items()}
