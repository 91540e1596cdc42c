"""What lies beside the weights: ``length_adaptive.json`` makes an ordinary checkpoint a length-adaptive one.

The weights are an ordinary transformers checkpoint, which anyone can load as a dense model.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lat_optuna.files import write_json
from lat_optuna.length_config import LengthConfig, Retention

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

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

    def pick(self, budget: float | None = None, latency_ms: float | None = None) -> LengthConfig:
        """The configuration of the best point within a budget: ``model.length_config = side.pick(budget=0.5)``.

        Args:
            budget: At most this fraction of the dense model's FLOPs.
            latency_ms: At most this latency, for fronts whose points have one.

        Raises:
            ValueError: No point fits.
        """
        return self.config_of(_pick(self, budget, latency_ms))


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
    write_json(path, content)
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


def save(
    model: PreTrainedModel,
    folder: str | os.PathLike[str],
    side: SideFile,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """Save a model as an ordinary checkpoint (safetensors) with its side file.

    Args:
        model: An adapted model; ``config.json`` names its original class.
        folder: Where to; made if it is not there.
        side: What makes it length-adaptive.
        tokenizer: Saved beside it if given.

    Returns:
        The folder.

    Raises:
        ValueError: The side file is for another number of layers.
    """
    from lat_optuna.model.adapted import num_layers

    _check_layers(side, num_layers(model), "the side file")
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    write_side_file(folder, side)
    return Path(folder)


def load(
    folder: str | os.PathLike[str],
    auto_class: Any = None,
    budget: float | None = None,
    *,
    latency_ms: float | None = None,
    mode: Literal["auto", "restore", "eliminate"] = "auto",
    significance: Literal["all", "cls"] | None = None,
    last_layer: Literal["all", "cls"] | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """Load a checkpoint as an adapted model, with the configuration that fits a budget.

    Args:
        folder: A folder that :func:`save` or ``save_pretrained`` wrote. Without a side file the model loads as dense,
            with a warning.
        auto_class: The class to load it with; by default the one that ``config.json`` names.
        budget: FLOPs as a fraction of the dense model's. The most accurate point of the front that costs no more
            is set; by default the configuration that the side file names.
        latency_ms: The same by measured latency, for fronts whose points have it.
        mode: As in :func:`lat_optuna.model.adapt`.
        significance: As in :func:`lat_optuna.model.adapt`; ``"cls"`` for models that were trained and searched with it.
        last_layer: As in :func:`lat_optuna.model.adapt`.
        **kwargs: Go to ``from_pretrained``: ``attn_implementation``, ``dtype``, ...

    Raises:
        FileNotFoundError: There is no such folder, or it holds no checkpoint.
        ValueError: No point of the front fits the budget, or the side file is not valid or not the model's.
    """
    import transformers

    from lat_optuna.model.adapted import adapt, num_layers

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no checkpoint (no config.json); give a folder made by save_pretrained")
    side = read_side_file(folder)
    config = None if side is None else side.length_config
    if budget is not None or latency_ms is not None:
        if side is None:
            raise ValueError(f"{folder} has no {SIDE_FILE}, hence no front to pick a budget from; run a search first")
        try:
            config = side.pick(budget, latency_ms)
        except ValueError as error:
            raise ValueError(f"{folder / SIDE_FILE}: {error}") from None
    if auto_class is None:
        names = transformers.AutoConfig.from_pretrained(folder).architectures or ["AutoModel"]
        auto_class = getattr(transformers, names[0], None)
        if auto_class is None:
            raise ValueError(f"{folder / 'config.json'} names {names[0]}, which transformers lacks; give auto_class")
    model = adapt(auto_class.from_pretrained(folder, **kwargs), mode, significance, last_layer)
    if side is None:
        logger.warning("no %s in %s: the model loads as dense", SIDE_FILE, folder)
    else:
        _check_layers(side, num_layers(model), str(folder / SIDE_FILE))
        model.length_config = config
    return model


def _check_layers(side: SideFile, layers: int, what: str) -> None:
    if side.num_layers != layers:
        raise ValueError(f"{what} is for a model of {side.num_layers} layers, this one has {layers}")


def _pick(side: SideFile, budget: float | None, latency_ms: float | None) -> FrontPoint:
    """The best point within the budget, in what the search selected by; of equal ones the cheapest."""
    if not side.front:
        raise ValueError("the front of this checkpoint is empty; run a search first")
    points = list(side.front)
    if latency_ms is not None:
        points = [point for point in points if "latency_ms" in point.extra]
        if not points:
            raise ValueError("no point has a latency; pick by budget=, or measure latencies")
    fitting = [
        point
        for point in points
        if (budget is None or point.cost <= budget) and (latency_ms is None or point.extra["latency_ms"] <= latency_ms)
    ]
    if not fitting:
        wanted = [f"budget {budget:g}"] if budget is not None else []
        wanted += [f"latency {latency_ms:g} ms"] if latency_ms is not None else []
        cheapest = f"the cheapest costs {min(point.cost for point in points):.3g}x FLOPs"
        if latency_ms is not None:
            cheapest += f", the fastest takes {min(point.extra['latency_ms'] for point in points):.3g} ms"
        raise ValueError(f"no point fits {' and '.join(wanted)}; {cheapest}")
    return max(fitting, key=lambda point: (point.extra.get("score", point.metric), -point.cost))
