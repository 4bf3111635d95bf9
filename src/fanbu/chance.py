"""Random numbers that nobody can guess or try through: what privacy rests on. A run's seed has no part in them.

torch's generator on CPUs keeps 32 bits of its seed, which a patient centre tries one by one.
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class Chance:
    """A fresh stream of SHAKE-256 under 32 bytes of the system's entropy."""

    def __init__(self) -> None:
        self._key, self._block = secrets.token_bytes(32), 0

    def uniform(self, count: int) -> Tensor:
        """Numbers between 0 and 1, [count], float64."""
        import torch

        return torch.from_numpy(self._numbers(count))

    def normal(self, like: Tensor, deviation: float) -> Tensor:
        """Gaussian noise of a tensor's shape and kind, on its device."""
        import torch
        from scipy.special import ndtri

        drawn = torch.from_numpy(ndtri(self._numbers(like.numel())) * deviation)
        return drawn.reshape(like.shape).to(like.device, like.dtype)

    def _numbers(self, count: int) -> Any:
        import numpy as np

        self._block += 1
        stream = hashlib.shake_256(self._key + self._block.to_bytes(8, "big")).digest(8 * count)
        return ((np.frombuffer(stream, np.uint64) >> 11) + 0.5) * 2.0**-53
