"""Landscapes for comparing samplers: a trained model on at most 500 examples, measured once a configuration.

What was measured lies in a file that all samplers, seeds and runs share (:class:`Measured`). Where an hour of a small
machine does not buy enough evaluations, :class:`Emulated` fits every example's margin to what was measured: a landscape
made of real ones, and named as such.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lat_optuna.length_config import LengthConfig
from lat_optuna.pipeline import MakeEvaluator
from lat_optuna.search.evaluator import ModelEvaluator
from lat_optuna.spec import StudySpec


class Measured:
    """A trained model on the first examples of its search split, with a memo on disk.

    Args:
        spec: The study; ``search.precision`` holds.
        examples: Number of examples (of questions).
        memo: Folder of the memo.
    """

    def __init__(self, spec: StudySpec, examples: int, memo: Path) -> None:
        self.name, self.p = spec.name, spec.training.p
        ev: ModelEvaluator = MakeEvaluator(spec)("cpu")
        self._ev, task = ev, ev.task
        owners = task.examples(ev.split) if hasattr(task, "examples") else range(len(ev._lengths))
        self._owners = [owner for owner in owners if owner < examples]  # features are in the order of their examples
        ev._features = ev._features.select(range(len(self._owners)))
        ev._lengths = ev._lengths[: len(self._owners)]
        ev._counts = type(ev._counts)(ev._lengths)
        ev._dense_flops = ev._flops(None)
        self.num_layers, self.max_length, self.retention = ev.num_layers, ev.max_length, ev.retention
        self.examples = len(set(self._owners))
        self._file = memo / f"{spec.name}-{self.examples}-{spec.search.precision}.jsonl"
        self._known: dict[str, dict[str, Any]] = {}
        if self._file.exists():
            for line in self._file.read_text().splitlines():
                row = json.loads(line)
                self._known[row["kept"]] = row
        self.new = 0

    def cost(self, config: LengthConfig) -> float:
        """FLOPs as a fraction of the dense model's, on these examples."""
        return self._ev.cost(config)

    def value(self, config: LengthConfig, metric: str = "metric") -> float:
        """``"metric"`` (the task's) or ``"probability"``, in percent."""
        return float(self.row(config)[metric])

    def row(self, config: LengthConfig) -> dict[str, Any]:
        """Everything that was measured of a configuration, now or before."""
        key = "/".join("-".join(map(str, kept)) for kept in self._ev.kept(config))
        if key not in self._known:
            row = {"kept": key, "lengths": config.lengths, "cost": self.cost(config), **self._measure(config)}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._known[key] = json.loads(json.dumps(row))
            self.new += 1
        return self._known[key]

    def rows(self) -> list[dict[str, Any]]:
        """All that has been measured."""
        return list(self._known.values())

    def _measure(self, config: LengthConfig) -> dict[str, Any]:
        import torch

        ev, task = self._ev, self._ev.task
        if not ev._batches:
            ev._batches = list(ev._make_batches())
        predictions: list[Any] = [None] * len(self._owners)
        log_probs = np.zeros(len(self._owners))
        with (
            torch.inference_mode(),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=ev.precision == "bf16"),
            ev.model.at(config),
        ):
            for batch in ev._batches:
                output = ev.model(**batch.inputs)
                for row, prediction in zip(batch.rows, task.predictions(output, batch.tensors), strict=True):
                    predictions[row] = prediction
                log_probs[batch.rows] = task.log_probs(output, batch.tensors).double().numpy()
        scores = task.score_examples(ev.split, range(len(self._owners)), predictions)[ev.metric_name]
        row = {
            "metric": float(scores.mean()),
            "probability": 100 * float(np.nanmean(np.exp(log_probs))),
            "scores": [round(float(score), 2) for score in scores],
            "log_probs": [round(float(value), 4) for value in log_probs],
        }
        if predictions[0].ndim == 1:  # a classifier: by how much the right class leads
            labels = np.array(ev._features["labels"])
            logits = np.stack(predictions)
            right = logits[np.arange(len(labels)), labels]
            logits[np.arange(len(labels)), labels] = -np.inf
            row["margins"] = [round(float(value), 3) for value in right - logits.max(1)]
        return row


class Emulated:
    """Every example's margin as a Gaussian process of the lengths, fitted to what was measured of the model.

    Accuracy counts the margins above zero, so that the landscape has the steps, the plateaus and the luck of the real
    one between the measured configurations, and its values at them.
    """

    def __init__(self, measured: Measured, scale: float = 0.8, nugget: float = 1e-3) -> None:
        rows = measured.rows()
        self.name, self.p = f"{measured.name} (emulated from {len(rows)} measured)", measured.p
        self.num_layers, self.max_length = measured.num_layers, measured.max_length
        self.retention, self.cost = measured.retention, measured.cost
        self._x = np.array([row["lengths"] for row in rows]) / self.max_length
        self._scale = scale
        self._weights: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        factor = np.linalg.cholesky(self._kernel(self._x) + nugget * np.eye(len(rows)))
        for name in ("margins", "log_probs"):
            y = np.array([row[name] for row in rows])
            trend = np.linalg.lstsq(_trend(self._x), y, rcond=None)[0]
            rest = y - _trend(self._x) @ trend
            self._weights[name] = (trend, np.linalg.solve(factor.T, np.linalg.solve(factor, rest)))
        self._known: dict[tuple[int, ...], tuple[float, float]] = {}

    def value(self, config: LengthConfig, metric: str = "metric") -> float:
        """As :meth:`Measured.value`."""
        if config.lengths not in self._known:
            x = np.array([config.lengths]) / self.max_length
            kernel = self._kernel(x, self._x)
            margins, log_probs = (
                (_trend(x) @ trend + kernel @ weights)[0]
                for trend, weights in (self._weights["margins"], self._weights["log_probs"])
            )
            self._known[config.lengths] = (
                100 * float((margins > 0).mean()),
                100 * float(np.exp(np.minimum(log_probs, 0)).mean()),
            )
        return self._known[config.lengths][metric == "probability"]

    def _kernel(self, a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        distance = np.sqrt(((a[:, None] - (a if b is None else b)[None]) ** 2).sum(-1))
        return np.exp(-distance / self._scale)


def _trend(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(x), 1)), x, x * x], 1)


def seen_in_training(landscape: Any, count: int, seed: int = 0) -> Iterable[LengthConfig]:
    """Configurations as LengthDrop draws them, the constant ratios first."""
    import random

    rng = random.Random(seed)
    shape: Sequence[Any] = (landscape.num_layers, landscape.max_length)
    for step in range(12):
        yield LengthConfig.constant_ratio(round(landscape.p * step / 11, 4), *shape, landscape.retention)
    for _ in range(count - 12):
        yield LengthConfig.length_drop(landscape.p * rng.random() ** 0.5, *shape, rng, landscape.retention)
