"""fanbu: one large model, many small ones; what the small ones learned goes back, and a judge decides.

The public names load on first use, so that ``import fanbu`` stays fast and imports no torch.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanbu.api import absorb, contribute, judge, load_domain, merge, only, open_model, run, shrink, unmerge
    from fanbu.errors import FanbuError
    from fanbu.types import Context, Train

__version__ = "0.1.0"
__all__ = [
    "Context",
    "FanbuError",
    "Train",
    "absorb",
    "contribute",
    "judge",
    "load_domain",
    "merge",
    "only",
    "open_model",
    "run",
    "shrink",
    "unmerge",
]

_HOME = {"Context": "fanbu.types", "Train": "fanbu.types", "FanbuError": "fanbu.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fanbu' has no attribute {name!r}; it has {', '.join(__all__)}")
    import importlib

    return getattr(importlib.import_module(_HOME.get(name, "fanbu.api")), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


class _Package(ModuleType):
    """``fanbu.shrink`` and ``fanbu.judge`` are functions and sub-packages: the public names stay the functions."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):  # an import binds the sub-package here
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
