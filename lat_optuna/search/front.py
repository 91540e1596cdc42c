"""The Pareto front of a study: area under it, hypervolume, and the point for a budget (paper: sections 2.3 and 3.2)."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from lat_optuna.files import write_json
from lat_optuna.length_config import LengthConfig, Retention

if TYPE_CHECKING:
    import optuna
    import pandas as pd

    from lat_optuna.model.checkpoint import FrontPoint, SideFile

MetricAndCost: TypeAlias = tuple[float, float]
"""``(metric, cost)``: the metric in percent, up is better; FLOPs as a fraction of the dense model's, down is better."""

SELECTED_BY = {"probability": "probability of the right answer", "agreement": "agreement with the full model"}
"""What a search may select by instead of the metric, in words."""

TOLERANCE = 1e-9
"""Costs are quotients: the smallest configuration may land this far below its own bound."""

# ---------------------------------------------------------------------- arithmetic of fronts


def non_dominated(points: Iterable[MetricAndCost]) -> list[int]:
    """Indices of the points that no other point beats, in rising cost.

    A point is beaten by one that is at least as good in both and better in one. Of equal points the first stays.
    """
    pairs = list(points)
    front: list[int] = []
    best = -math.inf
    for index in sorted(range(len(pairs)), key=lambda i: (pairs[i][1], -pairs[i][0], i)):
        if pairs[index][0] > best:
            best = pairs[index][0]
            front.append(index)
    return front


def hypervolume(points: Iterable[MetricAndCost], reference: MetricAndCost = (0.0, 1.0)) -> float:
    """Area that the points dominate, up to a reference point.

    Args:
        points: ``(metric, cost)`` pairs; those that do not beat the reference in both add nothing.
        reference: ``(metric, cost)``, the worst of both.

    Returns:
        Area in units of metric times cost. Adding a point never lowers it.
    """
    floor, ceiling = reference
    pairs = [(metric, cost) for metric, cost in points if metric > floor and cost < ceiling]
    area, before = 0.0, floor
    for index in non_dominated(pairs):
        metric, cost = pairs[index]
        area += (metric - before) * (ceiling - cost)
        before = metric
    return area


def auc(points: Iterable[MetricAndCost], low: float, high: float = 1.0) -> float:
    """Area under the front, normalised over cost: the mean metric that a budget in ``[low, high]`` buys (Figure 4).

    The front is the step function "best metric among points that cost at most c". Where no point is cheap enough it
    is 0, so that adding a point never lowers the area. Points below ``low`` were never trained for (extrapolated) and
    points above ``high`` are no use: neither counts.

    Args:
        points: ``(metric, cost)`` pairs, dominated ones included or not.
        low: Cost of the smallest configuration that training reached, ``smallest(p)``.
        high: Cost of the dense model.

    Returns:
        A figure in the metric's unit (percent); 0 without points.

    Raises:
        ValueError: ``low`` does not lie below ``high``.
    """
    if not low < high:
        raise ValueError(f"the area under the front needs low < high, not low={low}, high={high}")
    inside = [(metric, max(cost, low)) for metric, cost in points if low - TOLERANCE <= cost <= high + TOLERANCE]
    return hypervolume(inside, (0.0, high)) / (high - low)


def standard_error(metric: float, examples: int) -> float:
    """Standard error, in percent, of an accuracy of ``metric`` percent over ``examples`` independent examples."""
    if examples < 1:
        raise ValueError(f"a standard error needs at least 1 example, not {examples}")
    return math.sqrt(max(0.0, metric * (100.0 - metric)) / examples)


# ---------------------------------------------------------------------- points


@dataclass(frozen=True)
class Point:
    """One evaluated configuration.

    Attributes:
        lengths: The configuration's lengths, layer by layer.
        metric: The task's metric on the split that was searched on, up is better.
        cost: FLOPs as a fraction of the dense model's.
        number: Number of the trial, where there is one.
        generation: Generation of the search that drew it, 0 for the initial population.
        operation: How it was drawn: ``"constant ratio"``, ``"mutation"``, ``"crossover"``.
        parents: Trial numbers of its parents.
        seconds: Wall time of the evaluation.
        extra: Anything else that was measured, by name: ``{"latency_ms": 12.3}``.
        score: What the search selected by, up is better; the metric where nothing else is said.
        reported: The metric on the reporting split, which the search did not see; ``None`` where it was not measured.
    """

    lengths: tuple[int, ...]
    metric: float
    cost: float
    number: int | None = None
    generation: int | None = None
    operation: str | None = None
    parents: tuple[int, ...] = ()
    seconds: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict, hash=False)
    score: float = math.nan
    reported: float | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.score):
            object.__setattr__(self, "score", self.metric)

    @property
    def text(self) -> str:
        """The configuration's text form, ``"128-110-96"``."""
        return "-".join(map(str, self.lengths))


@dataclass(frozen=True)
class Generation:
    """How far the search was when a generation ended (Figure 4).

    Attributes:
        number: The generation, 0 for the initial population.
        trials: Finished trials of this generation and the earlier ones.
        auc: Area under the front of those trials, in what the search selects by.
        hypervolume: Their hypervolume against ``(0, 1)``, likewise.
    """

    number: int
    trials: int
    auc: float
    hypervolume: float


def points_of(study: optuna.Study) -> list[Point]:
    """Every complete trial of a study as a point, in order of their numbers.

    Args:
        study: A study of ours, or any whose first two objectives are a metric to maximise and a cost to minimise and
            whose parameters are ``length_01 ... length_L``. Further objectives become ``extra``.

    Raises:
        ValueError: The objectives or the parameters are others.
    """
    directions = [direction.name for direction in study.directions]
    if directions[:2] != ["MAXIMIZE", "MINIMIZE"]:
        raise ValueError(
            f"study {study.study_name!r} has the objectives {', '.join(directions).lower()}; a front needs a metric to "
            "maximise, then a cost to minimise"
        )
    names = objective_names(study)
    selected_by = study.user_attrs.get("search_metric")
    reported = study.user_attrs.get("reported", {})
    points = []
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name != "COMPLETE" or not all(map(math.isfinite, trial.values)):
            continue
        layers = sum(name.startswith("length_") for name in trial.params)
        if not layers:
            raise ValueError(f"trial {trial.number} of study {study.study_name!r} has no parameters length_01, ...")
        bounds = (getattr(trial.distributions[name], "high", 0) for name in trial.params if name.startswith("length_"))
        config = LengthConfig.from_parameters(trial.params, layers, max(bounds))
        attrs = trial.user_attrs
        generation, operation, seconds = attrs.get("generation"), attrs.get("operation"), seconds_of(trial)
        measured = {**(attrs.get("details") or {}), **dict(zip(names[2:], trial.values[2:], strict=True))}
        for name in (names[0], "seconds"):
            measured.pop(name, None)
        extra = {name: float(value) for name, value in measured.items() if isinstance(value, int | float)}
        points.append(
            Point(
                lengths=config.lengths,
                metric=float(trial.values[0]),
                cost=float(trial.values[1]),
                number=trial.number,
                generation=int(generation) if isinstance(generation, int | float) else None,
                operation=None if operation is None else str(operation),
                parents=tuple(attrs.get("parents") or ()),
                seconds=seconds,
                extra=extra,
                score=float(trial.values[0]) if selected_by is None else extra.get(selected_by, math.nan),
                reported=reported.get(str(config), {}).get("metric"),
            )
        )
    return points


def seconds_of(trial: optuna.trial.FrozenTrial) -> float | None:
    """How long a trial's evaluation took, if it says so."""
    attrs = trial.user_attrs
    seconds = (attrs.get("details") or attrs.get("pruned") or attrs).get("seconds", attrs.get("seconds"))
    return float(seconds) if isinstance(seconds, int | float) else None


def objective_names(study: optuna.Study) -> list[str]:
    """Names of a study's objectives, as set on it or ``metric, flops_ratio, objective_3, ...``."""
    fallback = ["metric", "flops_ratio", *(f"objective_{i}" for i in range(3, len(study.directions) + 1))]
    return list(study.metric_names or fallback[: len(study.directions)])


def generations(points: Sequence[Point], low: float, high: float = 1.0) -> list[Generation]:
    """Area under the front and hypervolume after each generation (Figure 4).

    Points without a generation (drawn by another sampler, say) count as one generation of their own.

    Args:
        points: All evaluated points.
        low: Cost of the smallest configuration that training reached.
        high: Cost of the dense model.
    """
    by_generation: dict[int, list[MetricAndCost]] = {}
    for point in points:
        by_generation.setdefault(point.generation or 0, []).append((point.score, point.cost))
    result: list[Generation] = []
    front: list[MetricAndCost] = []
    trials = 0
    for number in sorted(by_generation):
        trials += len(by_generation[number])
        seen = [*front, *(pair for pair in by_generation[number] if pair[1] >= low - TOLERANCE)]
        front = [seen[index] for index in non_dominated(seen)]
        result.append(Generation(number, trials, auc(front, low, high), hypervolume(front)))
    return result


# ---------------------------------------------------------------------- the front


@dataclass(frozen=True)
class Front:
    """The Pareto front of evaluated configurations: those that none beats in what the search selected by and in cost.

    Attributes:
        points: Points that no other beats, in rising cost. Costs lie at or above ``low``.
        evaluated: All points that were measured at or above ``low``, in order of their trials.
        extrapolated: The best points below ``low``, in rising cost: smaller than anything that training reached.
        metric: Name of the metric.
        max_length: ``l_0`` of every configuration.
        low: Cost of the smallest configuration that training reached, ``smallest(p)``; ``None`` if unknown.
        retention: What the lengths mean on shorter inputs, see :class:`LengthConfig`.
        search_metric: Name of what the points' ``score`` is; ``None`` where it is the metric itself.
        examples: Number of examples of the split ``"search"``, which ``metric`` and ``score`` were measured on, and of
            the split ``"reported"``; empty where the search had no split of its own.
    """

    points: tuple[Point, ...]
    evaluated: tuple[Point, ...]
    extrapolated: tuple[Point, ...]
    metric: str
    max_length: int
    low: float | None = None
    retention: Retention = "relative"
    search_metric: str | None = None
    examples: Mapping[str, int] = field(default_factory=dict, hash=False)

    @classmethod
    def from_points(
        cls,
        points: Iterable[Point],
        metric: str,
        max_length: int,
        low: float | None = None,
        retention: Retention = "relative",
        search_metric: str | None = None,
        examples: Mapping[str, int] | None = None,
        further: Sequence[str] = (),
    ) -> Front:
        """The front of evaluated points; see the class for the arguments.

        ``further`` names objectives in the points' ``extra`` that the front minimises as well.
        """
        everything = tuple(points)
        bound = -math.inf if low is None else low - TOLERANCE
        inside = tuple(point for point in everything if point.cost >= bound)
        below = tuple(point for point in everything if point.cost < bound)
        return cls(
            _best(inside, further),
            inside,
            _best(below, further),
            metric,
            max_length,
            low,
            retention,
            search_metric,
            dict(examples or {}),
        )

    @classmethod
    def of(cls, study: optuna.Study, low: float | None = None) -> Front:
        """The front of a study's complete trials; empty before the first of them.

        Args:
            study: See :func:`points_of`, also for what is raised. With further objectives than metric and cost, which
                lie in the points' ``extra``, a point stays on the front if it is best at some trade of all of them.
            low: Cost of the smallest configuration that training reached; by default what the study says of it.
        """
        attrs = study.user_attrs
        plan = attrs.get("identity", {}).get("plan", {})
        max_length = plan.get("max_length", 0)
        if not max_length:
            # A study of somebody else's sampler: the bounds tell.
            trials = study.get_trials(deepcopy=False)
            lengths = (d for trial in trials for name, d in trial.distributions.items() if name.startswith("length_"))
            max_length = max((getattr(distribution, "high", 0) for distribution in lengths), default=0)
        return cls.from_points(
            points_of(study),
            objective_names(study)[0],
            max_length,
            attrs.get("low") if low is None else low,
            plan.get("retention", "relative"),
            attrs.get("search_metric"),
            attrs.get("examples"),
            objective_names(study)[2:],
        )

    @classmethod
    def of_side_file(cls, side: SideFile, low: float | None = None) -> Front:
        """The front that lies in a checkpoint."""
        points = []
        for p in side.front:
            extra = dict(p.extra)
            score, reported = extra.pop("score", p.metric), extra.pop("reported", None)
            points.append(Point(p.lengths, p.metric, p.cost, extra=extra, score=score, reported=reported))
        return cls.from_points(points, side.metric or "metric", side.max_length, low, side.retention)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def pairs(self) -> list[MetricAndCost]:
        """``(metric, cost)`` of the front's points."""
        return [(point.metric, point.cost) for point in self.points]

    @property
    def selected_by(self) -> str:
        """What the search selected by, in words."""
        name = self.search_metric or self.metric
        return SELECTED_BY.get(name, name)

    @property
    def range_low(self) -> float:
        """Where the area under the front begins: ``low``, or the cheapest point where that is unknown."""
        return self.low if self.low is not None else min((point.cost for point in self.points), default=0.0)

    def auc(self, high: float = 1.0) -> float:
        """Area under the front, in what the search selected by; from :attr:`range_low` to ``high``; see :func:`auc`."""
        pairs = [(point.score, point.cost) for point in self.points]
        return auc(pairs, self.range_low, high) if self.points and self.range_low < high else 0.0

    def generations(self, high: float = 1.0) -> list[Generation]:
        """Area and hypervolume after each generation of the search; see :func:`generations`."""
        return generations(self.evaluated, self.range_low, high) if self.range_low < high else []

    # ------------------------------------------------------------------ choosing

    def pick(
        self,
        *,
        budget: float | None = None,
        latency_ms: float | None = None,
        max_drop: float | None = None,
        dense: float | None = None,
    ) -> Point:
        """The point for a budget.

        With ``max_drop`` the cheapest point that is good enough, otherwise the best one that is cheap enough, in what
        the search selected by. Conditions add up; without any, the best point. What was measured on the reporting
        split decides nothing here: it would no longer be a fair report.

        Args:
            budget: At most this fraction of the dense model's FLOPs.
            latency_ms: At most this latency, where latencies were measured (``extra["latency_ms"]``).
            max_drop: Metric at most this much worse than ``dense``, in its unit; 0 is "without loss".
            dense: Metric of the dense model that ``max_drop`` refers to, on the split that was searched on.

        Raises:
            ValueError: The front is empty, no point meets the conditions (the message says what the nearest one
                has), or a condition makes no sense.
        """
        if not self.points:
            raise ValueError("the front is empty: no configuration has been evaluated yet; run the search first")
        if budget is not None and not budget > 0:
            raise ValueError(f"the budget is a fraction of the dense model's FLOPs above 0, not {budget:g}")
        if max_drop is not None:
            if not max_drop >= 0:
                raise ValueError(f"the largest drop is at least 0, not {max_drop:g}")
            if dense is None:
                raise ValueError("a largest drop refers to the dense model's metric, which is not known here")
        # A latency does not follow FLOPs exactly: beaten points may be faster.
        candidates = list(self.points)
        if latency_ms is not None:
            measured = [point for point in self.evaluated if "latency_ms" in point.extra]
            if not measured:
                raise ValueError("no latencies were measured in this study; pick by a budget of FLOPs instead")
            candidates = [point for point in measured if point.extra["latency_ms"] <= latency_ms]
            if not candidates:
                fastest = min(point.extra["latency_ms"] for point in measured)
                raise ValueError(f"no point runs within {latency_ms:g} ms; the fastest needs {fastest:.2f} ms")
        if budget is not None:
            cheapest = min(point.cost for point in candidates)
            candidates = [point for point in candidates if point.cost <= budget + TOLERANCE]
            if not candidates:
                raise ValueError(
                    f"no point costs at most {budget:g} of the dense model's FLOPs; the smallest costs {cheapest:.4f}"
                )
        if max_drop is None:
            return max(candidates, key=lambda point: (point.score, -point.cost))
        assert dense is not None
        best = max(point.metric for point in candidates)
        candidates = [point for point in candidates if point.metric >= dense - max_drop - TOLERANCE]
        if not candidates:
            raise ValueError(
                f"no point reaches {dense - max_drop:.2f} {self.metric} ({dense:.2f} of the dense model less "
                f"{max_drop:g}); the best has {best:.2f}"
            )
        return min(candidates, key=lambda point: (point.cost, -point.metric))

    # ------------------------------------------------------------------ for programs

    def rows(self) -> list[dict[str, Any]]:
        """The front's points as plain values, for tables and programs."""
        return [
            {
                "trial": point.number,
                self.metric: point.metric,
                "flops_ratio": point.cost,
                **({} if self.search_metric is None else {"score": point.score}),
                **({} if point.reported is None else {"reported": point.reported}),
                "configuration": point.text,
                "generation": point.generation,
                "operation": point.operation,
                **point.extra,
            }
            for point in self.points
        ]

    def to_frame(self) -> pd.DataFrame:
        """The front as a :class:`pandas.DataFrame`, one row a point in rising cost."""
        import pandas

        return pandas.DataFrame(self.rows(), columns=_columns(self.rows()) or None)

    def to_json(self) -> str:
        """The front as a JSON document: metric, ``max_length``, ``low`` and a list of points."""
        document = {"metric": self.metric, "max_length": self.max_length, "low": self.low, "points": self.rows()}
        return json.dumps(document, indent=1)

    def to_csv(self) -> str:
        """The front as CSV with a heading."""
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, _columns(rows), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def side_points(self) -> tuple[FrontPoint, ...]:
        """The front as it goes into a checkpoint's side file; ``score`` and ``reported`` lie in ``extra``."""
        from lat_optuna.model.checkpoint import FrontPoint

        points = []
        for point in self.points:
            extra = dict(point.extra)
            if self.search_metric is not None:
                extra["score"] = point.score
            if point.reported is not None:
                extra["reported"] = point.reported
            points.append(FrontPoint(point.lengths, point.metric, point.cost, extra))
        return tuple(points)


def _best(points: Sequence[Point], further: Sequence[str] = ()) -> tuple[Point, ...]:
    """The points that no other beats, in rising cost: in score, cost and what lies in ``extra`` under these names."""
    if not further:
        return tuple(points[index] for index in non_dominated([(point.score, point.cost) for point in points]))
    best: list[tuple[tuple[float, ...], Point]] = []
    # Whoever beats a point comes before it in this order, so that what has been kept is all that can.
    values = [(point.cost, -point.score, *(point.extra[name] for name in further)) for point in points]
    for index in sorted(range(len(points)), key=lambda index: (values[index], index)):
        mine = values[index]
        if not any(all(a <= b for a, b in zip(its, mine, strict=True)) for its, _ in best):
            best.append((mine, points[index]))
    return tuple(point for _, point in best)


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


# ---------------------------------------------------------------------- what the front is compared with

BASELINES_FILE = "baselines.json"
FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """A model's figure without a search.

    Attributes:
        metric: The task's metric, in percent, on the split that is searched on.
        cost: FLOPs as a fraction of the dense model's.
        ratio: Share that every layer drops; 0 is the dense model.
        lengths: The configuration; empty for the dense model.
        reported: The metric on the reporting split, where that is another.
    """

    metric: float
    cost: float = 1.0
    ratio: float = 0.0
    lengths: tuple[int, ...] = ()
    reported: float | None = None


@dataclass(frozen=True)
class Baselines:
    """What a study's front is compared with, and what was run (Figure 2, Table 1).

    Attributes:
        metric: Name of the metric.
        standard: The plainly fine-tuned model, dense, then at constant ratios in falling cost.
        length_adaptive: The length-adaptive model, likewise.
        examples: Number of examples that ``metric`` was measured on, for the standard error of an accuracy.
        model: The encoder, as people call it.
        data: Data set, split and number of rows.
        protocol: How inputs are counted and cut: ``"real lengths, relative retention"``.
        hardware: Where it ran.
        about: Anything else worth stating, in order: seeds, epochs, package versions, wall times.
    """

    metric: str
    standard: tuple[Measured, ...] = ()
    length_adaptive: tuple[Measured, ...] = ()
    examples: int | None = None
    model: str = ""
    data: str = ""
    protocol: str = ""
    hardware: str = ""
    about: Mapping[str, str] = field(default_factory=dict)

    def dense(self, which: str = "standard") -> Measured | None:
        """The dense model among ``"standard"`` or ``"length_adaptive"``, where it was measured."""
        return next((point for point in getattr(self, which) if point.ratio == 0), None)


def write_baselines(folder: str | os.PathLike[str], baselines: Baselines) -> Path:
    """Write ``baselines.json`` into a study's folder, atomically."""
    path = Path(folder) / BASELINES_FILE
    document = {"format": FORMAT, **asdict(baselines), "about": dict(baselines.about)}
    write_json(path, document)
    return path


def read_baselines(folder: str | os.PathLike[str]) -> Baselines | None:
    """Read ``baselines.json``, or ``None`` where a study has none.

    Raises:
        ValueError: The file is not JSON, of another format, or holds something impossible; the message names it.
    """
    path = Path(folder) / BASELINES_FILE
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads format {FORMAT}")
        examples = content["examples"]
        return Baselines(
            metric=str(content["metric"]),
            standard=_curve(content["standard"]),
            length_adaptive=_curve(content["length_adaptive"]),
            examples=None if examples is None else int(examples),
            model=str(content["model"]),
            data=str(content["data"]),
            protocol=str(content["protocol"]),
            hardware=str(content["hardware"]),
            about={str(key): str(value) for key, value in content["about"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is not a valid {BASELINES_FILE}: {what}") from error


def _curve(points: Sequence[Mapping[str, Any]]) -> tuple[Measured, ...]:
    curve = []
    for p in points:
        reported = p.get("reported")
        point = Measured(
            float(p["metric"]),
            float(p["cost"]),
            float(p["ratio"]),
            tuple(map(int, p["lengths"])),
            None if reported is None else float(reported),
        )
        if not (math.isfinite(point.metric) and point.cost > 0 and 0 <= point.ratio < 1):
            raise ValueError(f"{point} is impossible: the metric must be finite, cost > 0 and 0 <= ratio < 1")
        curve.append(point)
    return tuple(curve)
