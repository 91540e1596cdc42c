"""The paper's experiments on one study, from training to tables: ``lat-optuna reproduce STUDY`` (paper: section 4).

Every step leaves what it found in the study's folder and is not repeated: a run that was stopped, or that was made
with fewer parts, goes on. What a table or a figure is made of ends as small JSON and CSV files in a results folder.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lat_optuna.files import write_json, write_text
from lat_optuna.length_config import LengthConfig, Retention
from lat_optuna.pipeline import (
    Stage,
    Variant,
    default_device,
    default_devices,
    describe_data,
    describe_hardware,
    describe_run,
    make_plan,
    make_task,
    measure_standard,
    search,
    search_of,
    stages,
)
from lat_optuna.progress import progress

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from lat_optuna.search.evaluator import ModelEvaluator
    from lat_optuna.search.front import Baselines, Front, Point
    from lat_optuna.search.plan import SearchPlan
    from lat_optuna.search.worker import Progress
    from lat_optuna.spec import StudySpec
    from lat_optuna.tasks import Split

Part = Literal["padded", "random", "fixed", "ablations", "latency"]
"""Parts that may be left out: the second protocol; random configurations; one model for each of two budgets
(PoWER-BERT) and plain fine-tuning that goes on; training ablations; Figure 3."""
PARTS: tuple[Part, ...] = get_args(Part)

BUDGETS = (0.5, 0.35)
"""Fractions of the dense model's FLOPs that every way to train and to choose is compared at."""

ABLATIONS: dict[str, dict[str, Any]] = {
    "without LengthDrop": {"p": 0.0},
    "without LayerDrop": {"layer_drop": 0.0},
    "without the sandwich rule": {"sandwich": False},
    "without distillation": {"distillation": False},
    "with the label's loss at half weight": {"label_weight": 0.5},
    "with reverse KL": {"divergence": "reverse"},
    "with temperature 2": {"temperature": 2.0},
    "with a thinned teacher": {"thin_teacher": True},
}
"""Row of the table -> settings of :class:`lat_optuna.trainer.LengthAdaptation` in place of the study's."""

BESIDE = "exact_match"
"""The table shows this after the metric, where a task has it."""

LATENCY_BATCHES = (1, 4, 16, 64)
PROTOCOLS: dict[Retention, str] = {"relative": "real lengths, relative", "absolute": "padded, absolute"}

# ---------------------------------------------------------------------- rows


@dataclass(frozen=True)
class Row:
    """One measured line of a table.

    Attributes:
        name: What was measured.
        protocol: How cost is counted and what short inputs keep: a value of ``PROTOCOLS``.
        config: The configuration; ``"dense"`` without one.
        cost: FLOPs as a fraction of the dense model's, on the reporting split.
        metrics: The metric in percent, by split. Points are chosen on ``search`` where there is one.
        further: Whatever else an evaluation tells (exact match beside F1, say), by split and name.
    """

    name: str
    protocol: str
    config: str
    cost: float
    metrics: Mapping[str, float]
    further: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class _Measurements:
    """Models of one study measured at configurations; a file remembers what was measured before."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        self.file = spec.output / "measured.json"
        self.known: dict[str, dict[str, float]] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.splits: list[Split] = ["search", "validation", "test"]
        if spec.task.test_rows is None:
            self.splits.remove("test")
        if spec.task.search_rows is None:
            self.splits.remove("search")
        self._task: Any = None
        self._evaluators: dict[tuple[Path, Retention], tuple[str, dict[Split, ModelEvaluator]]] = {}

    def evaluators(self, folder: Path, retention: Retention) -> tuple[str, dict[Split, ModelEvaluator]]:
        """The model's hash, and its evaluators by split."""
        from lat_optuna.model import adapt
        from lat_optuna.search.evaluator import ModelEvaluator, weights_hash

        if (folder, retention) not in self._evaluators:
            self._task = self._task or make_task(self.spec)
            made = ModelEvaluator(
                adapt(self._task.build_model(str(folder))),
                self._task,
                "validation",
                default_device(),
                precision=self.spec.search.precision,
                protocol="real" if retention == "relative" else "padded",
                retention=retention,
            )
            everything = {split: made if split == "validation" else made.on(split) for split in self.splits}
            self._evaluators = {(folder, retention): (weights_hash(made.model)[:16], everything)}  # one model at a time
        return self._evaluators[folder, retention]

    def examples(self) -> dict[str, int]:
        """Number of examples of each split."""
        _, evaluators = self.evaluators(self.spec.adaptive_folder, self.spec.search.retention)
        return {str(split): evaluator.num_examples for split, evaluator in evaluators.items()}

    def row(self, name: str, folder: Path, config: LengthConfig | None, retention: Retention) -> Row:
        """Measure one configuration (``None``: dense) on all splits, or remember it."""
        weights, evaluators = self.evaluators(folder, retention)
        metrics, further = {}, {}
        for split, evaluator in evaluators.items():
            data, precision = evaluator.task.fingerprint(split)[:16], evaluator.precision
            key = f"{weights} {data} {precision} {retention} {config}"
            if key not in self.known:
                found = evaluator.evaluate(config)
                self.known[key] = {"metric": found.metric, **found.details}
                write_json(self.file, self.known)
            further[str(split)] = dict(self.known[key])
            metrics[str(split)] = further[str(split)].pop("metric")
        cost = evaluators["validation"].cost(config)
        return Row(name, PROTOCOLS[retention], "dense" if config is None else str(config), cost, metrics, further)


# ---------------------------------------------------------------------- one study, one seed


def reproduce(
    spec: StudySpec, seed: int, results: Path, parts: Collection[Part] = PARTS, devices: Sequence[str] | None = None
) -> list[Row]:
    """Train, search, compare and measure one study with one seed, as far as it is not done.

    Args:
        spec: The study; its model lies in its output folder where ``seed`` is the study's own, else beside it.
        seed: Seed of training, of the search and of the draws of rows.
        results: Folder that gets ``seed-SEED.json`` and the figures' numbers as CSV.
        parts: What is done beside the table's first rows.
        devices: For the search; see :func:`lat_optuna.pipeline.search`.

    Returns:
        The rows of the table.
    """
    study, spec = spec.name, with_seed(spec, seed)
    seconds: dict[str, float] = {}
    for stage in stages(spec):
        _train(stage, seconds)
    with progress("standard model at constant ratios", spec.search.num_initial, "configurations") as update:
        baselines = measure_standard(spec, update)
    with _timed("search", seconds, spec), _trials("search", spec) as on_progress:
        search(spec, devices, on_progress)
    retention = spec.search.retention
    others: list[Retention] = [other for other in PROTOCOLS if other != retention]
    fronts: dict[Retention, Front] = {retention: _front(spec)}
    if "padded" in parts:
        for other in others:
            fronts[other] = _front(_side_search(_with_retention(spec, other), devices, seconds))

    measured = _Measurements(spec)
    rows = []
    with progress("rows of the tables", len(fronts), "protocols") as update:
        for number, (kept, front) in enumerate(fronts.items()):
            rows += _protocol_rows(measured, front, kept)
            update(number + 1)
    plan = make_plan(spec, measured.evaluators(spec.adaptive_folder, retention)[1]["validation"])
    budgets = {budget: constant_ratio_within(plan, budget) for budget in BUDGETS}
    rows += _budget_rows(measured, fronts[retention], budgets, plan, retention)
    if "random" in parts:
        side = _side_search(_with_sampler(spec, "random"), devices, seconds)
        for budget in BUDGETS:
            point = _within(_front(side), budget)
            name = f"random configurations, best within {budget:g}x"
            rows.append(measured.row(name, spec.adaptive_folder, _config(point, plan), retention))
    if "fixed" in parts:
        rows += _fixed_rows(measured, budgets, plan, retention, seconds)
    if "ablations" in parts:
        for name, settings in ABLATIONS.items():
            stage = Stage(spec, adaptive=True, variant=Variant(_slug(name), settings))
            _train(stage, seconds)
            rows += _curve_rows(measured, name, stage.folder, budgets, plan, retention)

    results.mkdir(parents=True, exist_ok=True)
    about = describe_run(spec) | {
        "data": describe_data(measured.evaluators(spec.adaptive_folder, retention)[1]["validation"]),
        "examples": measured.examples(),
        "hardware": describe_hardware(default_device()),
        "seconds of the last run": {name: round(value) for name, value in seconds.items()},
    }
    file = results / f"seed-{seed}.json"
    rows += _rows_left_out_now(file, about, rows)
    content = {"study": study, "metric": baselines.metric, "seed": seed, "about": about}
    write_json(file, content | {"rows": [asdict(row) for row in rows]})
    write_curves(results / f"seed-{seed}-figure2.csv", fronts[retention], baselines)
    generations = fronts[retention].generations()
    _write_csv(results / f"seed-{seed}-figure4.csv", [asdict(generation) for generation in generations])
    if "latency" in parts:
        _write_latencies(results / f"seed-{seed}-figure3.csv", measured, plan, retention)
    return rows


def _rows_left_out_now(file: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Rows of parts that an earlier run of the same had and this one skipped."""
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"about": {}, "rows": []}
    if any(before["about"].get(key) != value for key, value in about.items() if not key.startswith("seconds")):
        return []
    measured = {(row.protocol, row.name) for row in rows}
    return [Row(**row) for row in before["rows"] if (row["protocol"], row["name"]) not in measured]


def with_seed(spec: StudySpec, seed: int) -> StudySpec:
    """The study with another seed, in a folder of its own; the study itself where the seed is its own."""
    if seed == spec.training.seed:
        return spec
    return _changed(
        spec,
        name=f"{spec.name}-seed-{seed}",
        output=spec.output / f"seed-{seed}",
        training=spec.training.model_copy(update={"seed": seed}),
        search=spec.search.model_copy(update={"seed": seed}),
        storage=spec.storage
        if "sqlite" not in spec.storage
        else f"sqlite:///{spec.output / f'seed-{seed}' / 'study.db'}",
    )


def constant_ratio_within(plan: SearchPlan, budget: float) -> LengthConfig:
    """The most expensive configuration of a constant ratio that costs at most ``budget``, but not below the range."""
    low, high = 0.0, plan.p
    for _ in range(30):
        middle = (low + high) / 2
        config = LengthConfig.constant_ratio(round(middle, 6), plan.num_layers, plan.max_length, plan.retention)
        low, high = (low, middle) if plan.cost_of(config) <= budget else (middle, high)
    return LengthConfig.constant_ratio(round(high, 6), plan.num_layers, plan.max_length, plan.retention)


def _changed(spec: StudySpec, **values: Any) -> StudySpec:
    return spec.model_copy(update=values)


def _with_retention(spec: StudySpec, retention: Retention) -> StudySpec:
    """The same model searched under the other protocol, as another study in the same storage."""
    changed = spec.search.model_copy(update={"retention": retention})
    return _changed(spec, name=f"{spec.name}-{retention}", search=changed)


def _with_sampler(spec: StudySpec, sampler: str) -> StudySpec:
    return _changed(spec, name=f"{spec.name}-{sampler}", search=spec.search.model_copy(update={"sampler": sampler}))


def _side_search(spec: StudySpec, devices: Sequence[str] | None, seconds: dict[str, float]) -> StudySpec:
    """Another search of the same model. What is published (dashboard, side file) stays the study's own."""
    from lat_optuna.search.worker import launch

    with _timed(spec.name, seconds, spec), _trials(f"search {spec.name}", spec) as on_progress:
        launch(search_of(spec), devices or default_devices(), folder=spec.output / "logs", on_progress=on_progress)
    return spec


def _front(spec: StudySpec) -> Front:
    from lat_optuna.search.front import Front
    from lat_optuna.search.study import load_study

    return Front.of(load_study(spec.storage, spec.name))


def _train(stage: Stage, seconds: dict[str, float]) -> None:
    if not stage.is_complete:
        with _timed(stage.label, seconds), progress(stage.label, 0, "steps") as update:
            stage.run(update)


@contextmanager
def _timed(name: str, seconds: dict[str, float], spec: StudySpec | None = None) -> Iterator[None]:
    start = time.monotonic()
    yield
    seconds[name] = time.monotonic() - start


@contextmanager
def _trials(label: str, spec: StudySpec) -> Iterator[Callable[[Progress], None]]:
    with progress(label, spec.search.n_trials, "trials") as update:
        yield lambda now: update(now.done, now.total, AUC=now.auc, trials_per_s=now.rate)


# ---------------------------------------------------------------------- what is compared


def _protocol_rows(measured: _Measurements, front: Front, retention: Retention) -> list[Row]:
    """Table 1: the standard model, the most accurate point, the cheapest one without loss, the smallest sub-model."""
    spec = measured.spec
    rows = [measured.row("standard", spec.standard_folder, None, retention)]
    dense = rows[0].metrics.get("search", rows[0].metrics["validation"])  # points are chosen where the search looked
    rows.append(measured.row("length-adaptive, dense", spec.adaptive_folder, None, retention))
    chosen: dict[str, Point | None] = {"length-adaptive, most accurate": front.pick()}
    lossless = [point for point in front.points if point.metric >= dense]
    chosen["length-adaptive, cheapest without loss"] = min(lossless, key=lambda point: point.cost, default=None)
    for name, point in chosen.items():
        if point is not None:
            config = LengthConfig(point.lengths, front.max_length, retention)
            rows.append(measured.row(name, spec.adaptive_folder, config, retention))
    layers = measured.evaluators(spec.adaptive_folder, retention)[1]["validation"].num_layers
    smallest = LengthConfig.smallest(spec.training.p, layers, front.max_length, retention)
    rows.append(measured.row("length-adaptive, smallest", spec.adaptive_folder, smallest, retention))
    return rows


def _budget_rows(
    measured: _Measurements,
    front: Front,
    budgets: Mapping[float, LengthConfig],
    plan: SearchPlan,
    retention: Retention,
) -> list[Row]:
    """At each budget: the searched point and the constant ratio of the length-adaptive model."""
    folder = measured.spec.adaptive_folder
    rows = []
    for budget, constant in budgets.items():
        point = _within(front, budget)
        rows.append(
            measured.row(f"length-adaptive, searched, within {budget:g}x", folder, _config(point, plan), retention)
        )
        rows.append(measured.row(f"length-adaptive, constant ratio, within {budget:g}x", folder, constant, retention))
    return rows


def _fixed_rows(
    measured: _Measurements,
    budgets: Mapping[float, LengthConfig],
    plan: SearchPlan,
    retention: Retention,
    seconds: dict[str, float],
) -> list[Row]:
    """One model for each budget (PoWER-BERT), and the standard model trained on for as long."""
    spec = measured.spec
    stage = Stage(spec, adaptive=True, variant=Variant("longer", fixed=plan.full))
    _train(stage, seconds)
    rows = [measured.row("standard, trained as long as the length-adaptive", stage.folder, None, retention)]
    for budget, config in budgets.items():
        stage = Stage(spec, adaptive=True, variant=Variant(f"fixed-{budget:g}", fixed=config))
        _train(stage, seconds)
        rows.append(measured.row(f"one model for {budget:g}x alone (PoWER-BERT)", stage.folder, config, retention))
        standard = f"standard, constant ratio, within {budget:g}x"
        rows.append(measured.row(standard, spec.standard_folder, config, retention))
    return rows


def _curve_rows(
    measured: _Measurements,
    name: str,
    folder: Path,
    budgets: Mapping[float, LengthConfig],
    plan: SearchPlan,
    retention: Retention,
) -> list[Row]:
    """A way to train at constant ratios: dense, at the budgets, and at the smallest configuration."""
    configs = {
        "dense": None,
        **{f"{budget:g}x": config for budget, config in budgets.items()},
        "smallest": plan.smallest,
    }
    return [measured.row(f"{name}, {where}", folder, config, retention) for where, config in configs.items()]


def _within(front: Front, budget: float) -> Point:
    """The front's best point within the budget, or its cheapest where none is."""
    return front.pick(budget=max(budget, front.points[0].cost))


def _config(point: Point, plan: SearchPlan) -> LengthConfig:
    return LengthConfig(point.lengths, plan.max_length, plan.retention)


# ---------------------------------------------------------------------- figures' numbers


def write_curves(path: Path, front: Front, baselines: Baselines) -> None:
    """Figure 2 of one encoder: its three curves, in rising cost."""
    ratios = {point.lengths: point for point in front.evaluated if point.operation == "constant ratio"}
    curves: dict[str, list[tuple[float, float, float | None, tuple[int, ...]]]] = {
        "standard, constant ratio": [(p.cost, p.metric, p.reported, p.lengths) for p in baselines.standard],
        "length-adaptive, constant ratio": [(p.cost, p.metric, p.reported, p.lengths) for p in ratios.values()],
        "length-adaptive, searched": [(p.cost, p.metric, p.reported, p.lengths) for p in front.points],
    }
    rows = [
        {
            "curve": curve,
            "flops_ratio": round(cost, 6),
            "searched_on": metric,
            "reported": reported,
            "configuration": "-".join(map(str, lengths)) or "dense",
        }
        for curve, points in curves.items()
        for cost, metric, reported, lengths in sorted(points)
    ]
    _write_csv(path, rows)


def _write_latencies(path: Path, measured: _Measurements, plan: SearchPlan, retention: Retention) -> None:
    """Figure 3: FLOPs against latency at the task's own lengths, constant ratios over the trained range."""
    from lat_optuna.latency import LatencyMeter

    if path.exists():
        return
    _, evaluators = measured.evaluators(measured.spec.adaptive_folder, retention)
    evaluator = evaluators["validation"]
    lengths = [len(tokens) for tokens in evaluator.task.features("validation")["input_ids"][:]]
    lengths *= -(-max(LATENCY_BATCHES) // len(lengths))  # of few examples, each several times
    configs = [constant_ratio_within(plan, cost) for cost in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, plan.lowest_cost)]
    rows = []
    with progress("latency", len(LATENCY_BATCHES), "batch sizes") as update:
        for number, batch_size in enumerate(LATENCY_BATCHES):
            meter = LatencyMeter(evaluator.model, lengths, batch_size, measured.spec.search.precision, max_batches=2)
            for latency in meter.measure([None, *configs], rounds=10):
                rows.append(
                    {
                        "batch_size": batch_size,
                        "device": meter.conditions.device,
                        "threads": meter.conditions.threads,
                        "precision": meter.conditions.precision,
                        "flops_ratio": round(evaluator.cost(latency.config), 6),
                        "milliseconds": round(latency.milliseconds, 4),
                        "latency_ratio": round(latency.milliseconds / latency.dense, 4),
                        "configuration": str(latency.config or "dense"),
                    }
                )
            update(number + 1)
    _write_csv(path, rows)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def figures(results: Mapping[str, Path]) -> dict[str, go.Figure]:
    """Figures 2, 3 and 4 from what lies in the results folders of one study or more.

    Args:
        results: Name of an encoder or a study -> its folder; of several seeds the first is drawn.

    Returns:
        Figures by name; those without numbers are left out.
    """
    import plotly.graph_objects as go

    shapes = {
        "figure2": ("curve", "flops_ratio", "searched_on", "FLOPs relative to the dense model", "metric (%)"),
        "figure3": (
            "batch_size",
            "flops_ratio",
            "latency_ratio",
            "FLOPs relative to the dense model",
            "latency, relative",
        ),
        "figure4": (None, "number", "auc", "generation", "area under the front"),
    }
    drawn = {}
    for name, (group, x, y, x_title, y_title) in shapes.items():
        figure = go.Figure()
        for study, folder in results.items():
            for path in sorted(folder.glob(f"seed-*-{name}.csv"))[:1]:
                with path.open(encoding="utf-8", newline="") as file:
                    rows = list(csv.DictReader(file))
                for curve in dict.fromkeys(row[group] if group else "" for row in rows):
                    points = [row for row in rows if not group or row[group] == curve]
                    label = {"curve": curve, "batch_size": f"batch {curve}"}.get(group or "", "")
                    figure.add_scatter(
                        x=[float(row[x]) for row in points],
                        y=[float(row[y]) for row in points],
                        name=f"{study} {label}".strip(),
                        mode="lines+markers",
                    )
        if figure.data:
            figure.update_layout(xaxis_title=x_title, yaxis_title=y_title, template="plotly_white")
            drawn[name] = figure
    return drawn


# ---------------------------------------------------------------------- the table


def table(results: Path) -> str:
    """The table of a results folder as Markdown: mean and, of several seeds, standard deviation of every row.

    Raises:
        FileNotFoundError: The folder holds no results.
    """
    runs = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.glob("seed-*.json"))]
    if not runs:
        raise FileNotFoundError(f"{results} holds no results (seed-*.json); run lat-optuna reproduce STUDY")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        for row in run["rows"]:
            groups.setdefault((row["protocol"], row["name"]), []).append(row | {"seed": run["seed"]})
    first, seeds = runs[0], ", ".join(str(run["seed"]) for run in runs)
    examples = first["about"]["examples"]
    every = [row for run in runs for row in run["rows"]]
    beside = any(BESIDE in figures for row in every for figures in row.get("further", {}).values())
    title = f"{first['metric']} / {BESIDE}" if beside else first["metric"]
    lines = [f"# {first['study']}: {title} in percent", ""]
    lines += [
        f"{first['about']['data']}; {first['about']['hardware']}; {first['about']['Training']}. Seeds: {seeds}.",
        "",
    ]
    splits = [split for split in ("search", "validation", "test") if split in examples]
    heading = " | ".join(f"{split} ({examples[split]:,})" for split in splits)
    for protocol in PROTOCOLS.values():
        names = [name for kind, name in groups if kind == protocol]
        if not names:
            continue
        lines += [f"## {protocol[0].upper()}{protocol[1:]}", ""]
        lines += [f"| | FLOPs | {heading} | configuration |", "|---|---|" + "---|" * (len(splits) + 1)]
        for name in names:
            rows = groups[protocol, name]
            cells = [_mean([row["cost"] for row in rows], 3) + "x"]
            for split in splits:
                cell = _mean([row["metrics"][split] for row in rows if split in row["metrics"]], 2)
                others = [row["further"][split][BESIDE] for row in rows if beside and split in row.get("further", {})]
                cells.append(f"{cell} / {_mean(others, 2)}" if others else cell)
            cells.append(rows[0]["config"] if len({row["config"] for row in rows}) == 1 else "by seed")
            alone = f" (seed {', '.join(str(row['seed']) for row in rows)})" if len(rows) < len(runs) else ""
            lines.append(f"| {name}{alone} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _mean(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
