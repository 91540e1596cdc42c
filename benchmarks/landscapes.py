"""Landscapes for comparing samplers: a trained model on at most 500 examples, measured once a configuration.

What was measured lies in a file that all samplers, seeds and runs share (:class:`Measured`). Where an hour of a
small machine does not buy enough evaluations, :class:`Emulated` fits every example's answers to what was measured: a
landscape made of real ones, and named as such.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lat_optuna.length_config import LengthConfig
from lat_optuna.pipeline import MakeEvaluator, default_device
from lat_optuna.search.evaluator import Evaluation, ModelEvaluator
from lat_optuna.search.racing import Racing
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
        search = spec.search.model_copy(update={"metric": "agreement"})  # so that everything is measured
        ev: ModelEvaluator = MakeEvaluator(spec.model_copy(update={"search": search}))(default_device())
        first = int(np.searchsorted(ev._examples, examples))  # features are in the order of their examples
        ev._features = ev._features.select(range(first))
        ev._examples, ev._lengths = ev._examples[:first], ev._lengths[:first]
        ev._counts = type(ev._counts)(ev._lengths)
        ev._dense_flops = ev._flops(None)
        ev.num_examples = len(np.unique(ev._examples))
        ev.racing = Racing(looks=())  # every example's scores, and nothing abandoned
        self._ev = ev
        self.num_layers, self.max_length, self.retention = ev.num_layers, ev.max_length, ev.retention
        self.examples = ev.num_examples
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
        """``"metric"`` (the task's), ``"probability"`` or ``"agreement"``, in percent."""
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
        start = time.perf_counter()
        found = self._ev._run(config, None)
        assert isinstance(found, Evaluation)
        probability = found.by_example["probability"].astype(np.float64)
        return {
            "metric": found.metric,
            "probability": found.details["probability"],
            "agreement": found.details["agreement"],
            "seconds": round(time.perf_counter() - start, 3),
            "scores": [round(float(score), 2) for score in found.by_example["metric"]],
            "log_probs": [round(float(value), 4) for value in np.log(np.maximum(probability, 1e-4) / 100)],
        }


class Emulated:
    """Every example's log-odds of the right answer as a Gaussian process of the lengths, fitted to what was measured.

    An example counts as right where its log-odds lie above what separates its right answers from its wrong ones in the
    measurements. So the landscape has the steps, the plateaus and the luck of the real one between the configurations
    that were measured, and nearly its values at them.

    What a configuration costs is a polynomial of the lengths; it is fitted as well, and needs no model to be loaded.

    Args:
        spec: The study that was measured.
        memo: File that :class:`Measured` has written.
        stored: Further measurements of ``searches.py``: ``NAME.WAY.search.npz``.
        scale: Length scale of the kernel, in units of ``max_length``.
        nugget: Share of the variation that neighbours do not have in common.
    """

    def __init__(
        self, spec: StudySpec, memo: Path, stored: Sequence[Path] = (), scale: float = 0.8, nugget: float = 1e-3
    ) -> None:
        rows = [json.loads(line) for line in memo.read_text().splitlines()] if memo.exists() else []
        self.examples = len(rows[0]["scores"])
        known = {
            tuple(row["lengths"]): (row["cost"], np.array(row["scores"]), np.exp(np.array(row["log_probs"])))
            for row in rows
        }
        for path in stored:
            with np.load(path) as arrays:
                parts = (arrays[name][:, : self.examples].astype(float) for name in ("metric", "probability"))
                for lengths, right, probability in zip(arrays["lengths"].tolist(), *parts, strict=True):
                    # Costs of the file are those of all its examples, the others' of the first ones.
                    known.setdefault(tuple(lengths), (np.nan, right, probability / max(1.0, probability.max())))
        self.name, self.p = f"{spec.name}, emulated from {len(known)} measured configurations", spec.training.p
        self.num_layers, self.max_length = len(rows[0]["lengths"]), spec.task.max_length
        self.retention = spec.search.retention
        self._x = np.array(list(known)) / self.max_length
        costs = np.array([value[0] for value in known.values()])
        there = ~np.isnan(costs)
        products = _products(self._x[there])
        self._flops = np.linalg.lstsq(products, costs[there], rcond=None)[0]
        self.cost_error = float(np.abs(products @ self._flops - costs[there]).max())
        right = np.array([value[1] for value in known.values()]) > 50
        clipped = np.clip(np.array([value[2] for value in known.values()]), 1e-4, 1 - 1e-4)
        odds = np.log(clipped / (1 - clipped))
        low = np.where(right, odds, np.inf).min(0)  # an example's least certain right answer
        high = np.where(right, -np.inf, odds).max(0)  # its most certain wrong one
        self._bar = np.where(np.isinf(low), np.inf, np.where(np.isinf(high), -np.inf, (low + high) / 2))
        self._scale = scale
        self._trend = np.linalg.lstsq(_trend(self._x), odds, rcond=None)[0]
        factor = np.linalg.cholesky(self._kernel(self._x) + nugget * np.eye(len(known)))
        rest = odds - _trend(self._x) @ self._trend
        self._weights = np.linalg.solve(factor.T, np.linalg.solve(factor, rest))
        self._known: dict[tuple[int, ...], tuple[float, float]] = {}

    def cost(self, config: LengthConfig) -> float:
        """FLOPs as a fraction of the dense model's, within :attr:`cost_error` of the arithmetic."""
        return round(float((_products(np.array([config.lengths]) / self.max_length) @ self._flops)[0]), 6)

    def value(self, config: LengthConfig, metric: str = "metric") -> float:
        """As :meth:`Measured.value`; agreement is not emulated."""
        if metric == "agreement":
            raise ValueError("an emulated landscape knows the right answers alone: select by metric or probability")
        if config.lengths not in self._known:
            x = np.array([config.lengths]) / self.max_length
            odds = (_trend(x) @ self._trend + self._kernel(x, self._x) @ self._weights)[0]
            probability = 1 / (1 + np.exp(-odds))
            self._known[config.lengths] = 100 * float((odds > self._bar).mean()), 100 * float(probability.mean())
        return self._known[config.lengths][metric == "probability"]

    def _kernel(self, a: np.ndarray, b: np.ndarray | None = None) -> np.ndarray:
        distance = np.sqrt(((a[:, None] - (a if b is None else b)[None]) ** 2).sum(-1))
        return np.exp(-distance / self._scale)


def _trend(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(x), 1)), x, x * x], 1)


def _products(x: np.ndarray) -> np.ndarray:
    before = np.concatenate([np.ones((len(x), 1)), x[:, :-1]], 1)
    return np.concatenate([np.ones((len(x), 1)), x, before * x, x * x], 1)
