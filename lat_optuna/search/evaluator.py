"""From a configuration to its metric and cost. One interface, a real evaluator and a deterministic stand-in."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from lat_optuna.length_config import LengthConfig, Retention


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one configuration.

    Attributes:
        metric: The task's metric in percent, up is better; NaN fails the trial.
        cost: FLOPs of the configuration divided by those of the dense model on the same inputs.
        seconds: Wall time of the evaluation.
        details: Further figures of the same pass, by name (F1 beside EM, say).
    """

    metric: float
    cost: float
    seconds: float
    details: Mapping[str, float] = field(default_factory=dict)


class Evaluator(Protocol):
    """What the search needs to know of a model on a task. Implementations live in one process on one device."""

    num_layers: int
    max_length: int
    retention: Retention
    metric_name: str

    def cost(self, config: LengthConfig | None) -> float:
        """FLOPs relative to the dense model, by arithmetic; ``None`` is dense and costs 1."""
        ...

    def evaluate(self, config: LengthConfig | None) -> Evaluation:
        """Measure one configuration (``None``: dense) on the whole evaluation set."""
        ...

    def identity(self) -> Mapping[str, str]:
        """What makes values comparable: checkpoint hash, data fingerprint, protocol. Differing workers don't mix."""
        ...


class StandInEvaluator:
    """A deterministic landscape behind the evaluator's interface: tests and demonstrations need no model.

    The metric falls smoothly as layers drop vectors, early layers hurting most; a small deterministic ripple makes
    some configurations better than their neighbours, as on real data.

    Args:
        num_layers: ``L``.
        max_length: ``l_0``.
        retention: As in :class:`LengthConfig`.
        sleep: Seconds that an evaluation pretends to take.
    """

    metric_name = "accuracy"

    def __init__(
        self, num_layers: int = 6, max_length: int = 128, retention: Retention = "relative", sleep: float = 0.0
    ) -> None:
        self.num_layers = num_layers
        self.max_length = max_length
        self.retention: Retention = retention
        self.sleep = sleep

    def cost(self, config: LengthConfig | None) -> float:
        """Share of word vectors that the layers compute."""
        return 1.0 if config is None else sum(config.lengths) / (self.num_layers * self.max_length)

    def evaluate(self, config: LengthConfig | None) -> Evaluation:
        """See :class:`Evaluator`."""
        start = time.perf_counter()
        if self.sleep:
            time.sleep(self.sleep)
        lengths = (config or LengthConfig.full(self.num_layers, self.max_length, self.retention)).lengths
        metric = 90.0
        for layer, length in enumerate(lengths):
            dropped = 1 - length / self.max_length
            metric -= 30.0 * dropped**2 / (self.num_layers + 3 * layer)
        metric += 0.2 * (sum((layer + 2) * length for layer, length in enumerate(lengths)) % 7) / 7
        return Evaluation(round(metric, 6), self.cost(config), time.perf_counter() - start)

    def identity(self) -> Mapping[str, str]:
        """See :class:`Evaluator`."""
        return {"evaluator": f"stand-in {self.num_layers}x{self.max_length} {self.retention}"}
