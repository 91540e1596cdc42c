"""Further objectives beside the metric and FLOPs: a latency, a memory, anything that a configuration tells."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lat_optuna.length_config import LengthConfig
from lat_optuna.search.evaluator import Evaluation

Objective = Callable[[LengthConfig | None], float]
"""From a configuration (``None``: dense) to a number; down is better."""


class WithObjectives:
    """An evaluator whose trials have more than two values. Satisfies :class:`lat_optuna.search.evaluator.Evaluator`.

    Nothing is abandoned early: a race compares metrics at one cost, and cannot tell what another objective makes good.

    Args:
        evaluator: Measures the metric and counts FLOPs.
        further: Name -> objective, in the order of the values. Cheap, and the same for all workers: a prediction from
            one calibration, not a measurement of its own. Workers whose objectives differ are refused.
    """

    racing = None

    def __init__(self, evaluator: Any, further: Mapping[str, Objective]) -> None:
        self._evaluator = evaluator
        self.further = dict(further)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_evaluator":
            raise AttributeError(name)
        return getattr(self._evaluator, name)

    def evaluate(self, config: LengthConfig | None) -> Evaluation:
        """See :class:`lat_optuna.search.evaluator.Evaluator`."""
        evaluation: Evaluation = self._evaluator.evaluate(config)
        return replace(evaluation, further=tuple(float(objective(config)) for objective in self.further.values()))

    def identity(self) -> Mapping[str, str]:
        """The evaluator's, and what the objectives say of some configurations."""
        ev = self._evaluator
        shape = (ev.num_layers, ev.max_length, ev.retention)
        probes = [LengthConfig.constant_ratio(ratio, *shape) for ratio in (0.0, 0.1, 0.3)]
        told = {
            name: ", ".join(f"{objective(config):.6g}" for config in probes) for name, objective in self.further.items()
        }
        return dict(ev.identity()) | told
