"""Drop-and-Restore on unmodified transformers models (paper: sections 2.2 and 3.3).

``adapt`` is the one door. Names load when they are used: importing this package costs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lat_optuna.model.adapted import adapt, at, is_adapted, num_layers
    from lat_optuna.model.checkpoint import load, save

__all__ = ["adapt", "at", "is_adapted", "load", "num_layers", "save"]

_HOMES = {"load": "checkpoint", "save": "checkpoint"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES.get(name, 'adapted')}"), name)
    globals()[name] = value
    return value
