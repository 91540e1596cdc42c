"""What lies beside the weights: ``length_adaptive.json`` makes an ordinary checkpoint a length-adaptive one."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lat_optuna.length_config import LengthConfig, Retention

SIDE_FILE = "length_adaptive.json"
FORMAT = 1


@dataclass(frozen=True)
class FrontPoint:
    """One point of a Pareto front as it lies in a checkpoint.

    Attributes:
        lengths: The configuration's lengths, layer by layer.
        metric: The task's metric, up is better.
        cost: FLOPs as a fraction of the dense model's, on the task's real lengths.
        extra: Anything else that was measured: ``{"latency_ms": 12.3, ...}``.
    """

    lengths: tuple[int, ...]
    metric: float
    cost: float
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SideFile:
    """Contents of ``length_adaptive.json``.

    Attributes:
        num_layers: Number of layers ``L`` that configurations have.
        max_length: ``l_0`` of every configuration in the file.
        retention: ``"relative"`` or ``"absolute"``.
        training: How the weights were trained: ``p``, ``layer_drop``, number of sub-models, epochs, data.
        metric: Name of the metric of ``front``.
        front: The Pareto front in rising cost; empty before a search.
        length_config: The configuration to run with after loading; ``None`` is dense.
    """

    num_layers: int
    max_length: int
    retention: Retention = "relative"
    training: Mapping[str, Any] = field(default_factory=dict)
    metric: str | None = None
    front: tuple[FrontPoint, ...] = ()
    length_config: LengthConfig | None = None

    def config_of(self, point: FrontPoint) -> LengthConfig:
        """The point's configuration as a :class:`LengthConfig`."""
        return LengthConfig(point.lengths, self.max_length, self.retention)


def write_side_file(folder: str | os.PathLike[str], side: SideFile) -> Path:
    """Write ``length_adaptive.json`` into a checkpoint's folder, atomically."""
    path = Path(folder) / SIDE_FILE
    content = {
        "format": FORMAT,
        "num_layers": side.num_layers,
        "max_length": side.max_length,
        "retention": side.retention,
        "length_config": None if side.length_config is None else list(side.length_config.lengths),
        "metric": side.metric,
        "training": dict(side.training),
        "front": [asdict(point) for point in side.front],
    }
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read_side_file(folder: str | os.PathLike[str]) -> SideFile | None:
    """Read ``length_adaptive.json``, or ``None`` where a checkpoint has none (it is a dense model then).

    Raises:
        ValueError: The file is not JSON, of another format, or breaks a rule; the message names the file.
    """
    path = Path(folder) / SIDE_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads format {FORMAT}")
        side = SideFile(
            num_layers=int(content["num_layers"]),
            max_length=int(content["max_length"]),
            retention=content["retention"],
            training=content["training"],
            metric=content["metric"],
            front=tuple(
                FrontPoint(tuple(point["lengths"]), float(point["metric"]), float(point["cost"]), point["extra"])
                for point in content["front"]
            ),
        )
        for lengths in (*(point.lengths for point in side.front), content["length_config"]):
            if lengths is not None and len(lengths) != side.num_layers:
                raise ValueError(f"configuration {lengths} has {len(lengths)} layers, not {side.num_layers}")
        for point in side.front:
            side.config_of(point)
        if content["length_config"] is not None:
            chosen = LengthConfig(tuple(content["length_config"]), side.max_length, side.retention)
            side = replace(side, length_config=chosen)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a valid {SIDE_FILE}: {error}") from error
    return side
