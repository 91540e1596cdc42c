"""Length-Adaptive Transformers, searched as an Optuna study.

Public names load when they are used: importing the package imports neither torch nor optuna.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from lat_optuna.length_config import LengthConfig

if TYPE_CHECKING:
    from lat_optuna.flops import Architecture
    from lat_optuna.latency import LatencyMeter, LatencyModel
    from lat_optuna.model import adapt, load, save
    from lat_optuna.search.evaluator import ModelEvaluator
    from lat_optuna.search.front import Front
    from lat_optuna.search.plan import SearchPlan
    from lat_optuna.search.sampler import LengthConfigSampler
    from lat_optuna.search.study import open_study
    from lat_optuna.search.worker import run_worker
    from lat_optuna.trainer import LengthAdaptation, LengthAdaptiveTrainer

__version__ = "0.1.0"

__all__ = [
    "Architecture",
    "Front",
    "LatencyMeter",
    "LatencyModel",
    "LengthAdaptation",
    "LengthAdaptiveTrainer",
    "LengthConfig",
    "LengthConfigSampler",
    "ModelEvaluator",
    "SearchPlan",
    "adapt",
    "load",
    "open_study",
    "run_worker",
    "save",
]

_HOMES = {
    "Architecture": "flops",
    "Front": "search.front",
    "LatencyMeter": "latency",
    "LatencyModel": "latency",
    "LengthAdaptation": "trainer",
    "LengthAdaptiveTrainer": "trainer",
    "LengthConfigSampler": "search.sampler",
    "ModelEvaluator": "search.evaluator",
    "SearchPlan": "search.plan",
    "adapt": "model",
    "load": "model",
    "open_study": "search.study",
    "run_worker": "search.worker",
    "save": "model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
