"""A study's point measured again, and exported: what ``lat-optuna evaluate`` and ``lat-optuna export`` do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lat_optuna import pipeline
from lat_optuna.files import write_json
from lat_optuna.length_config import LengthConfig
from lat_optuna.spec import SpecError, StudySpec, resolve_checkpoint

if TYPE_CHECKING:
    from lat_optuna.export.onnx import OnnxModel
    from lat_optuna.progress import Update
    from lat_optuna.search.front import Baselines, Front, Point
    from lat_optuna.tasks import Split, Task

Kind = Literal["hf", "onnx", "onnx-int8"]
CHECKS_FILE = "export.json"
FORMAT = 1
NEAR_TIES = 0.01
"""Largest share of answers in which a folder in fp32 may differ from the study's model, by rounding of near-ties."""
INT8_LOSS = 0.3
"""Points of the metric that int8 may cost before the ranking of tokens is kept in fp32."""

# ------------------------------------------------------------------------------------------------- choosing


def pick(
    spec: StudySpec,
    *,
    budget: float | None = None,
    latency_ms: float | None = None,
    max_drop: float | None = None,
    config: str | None = None,
) -> tuple[Point, Front]:
    """A point of a study's front, and the front.

    Args:
        spec: The study.
        budget: As in :meth:`lat_optuna.search.front.Front.pick`, like the next two.
        latency_ms: Likewise.
        max_drop: Likewise, against the standard model.
        config: The point's text form instead, ``"128-110-96"``.

    Raises:
        SpecError: ``config`` is not on the front.
        ValueError: There is no front, or no point that fits.
    """
    _, front, baselines = pipeline.load_front(spec)
    if config is None:
        dense = _dense_metric(baselines)
        return front.pick(budget=budget, latency_ms=latency_ms, max_drop=max_drop, dense=dense), front
    front.pick()  # says that there is nothing to choose from
    wanted = parse_config(config, front.max_length, front.retention).lengths
    for point in front.points:
        if point.lengths == wanted:
            return point, front
    near = sorted(front.points, key=lambda point: sum(abs(a - b) for a, b in zip(point.lengths, wanted, strict=False)))
    there = ", ".join(point.text for point in near[:3])
    raise SpecError(f"--config {config}: not a point of the front; near it are {there} (lat-optuna front STUDY)")


def _dense_metric(baselines: Baselines | None) -> float | None:
    dense = baselines.dense() if baselines else None
    return dense.metric if dense else None


def parse_config(text: str, max_length: int, retention: Any) -> LengthConfig:
    """``"128-110-96"`` as a configuration of a study; raises a :class:`SpecError`."""
    try:
        return LengthConfig.parse(text, max_length, retention)
    except ValueError as error:
        raise SpecError(f"--config {text}: {error}") from None


# ---------------------------------------------------------------------------------------------- measuring again


@dataclass(frozen=True)
class Measurement:
    """A configuration of the length-adaptive model on a split or a file.

    Attributes:
        configuration: Text form, or ``"dense"``.
        metric: The task's metric in percent.
        standard_error: Of the metric over the examples; ``None`` where it is no mean over examples (F1 of entities).
        flops_ratio: FLOPs as a fraction of the dense model's on the same examples.
        latency_ms: Median time of one input, over the examples' real lengths; ``None`` where it was not measured.
        dense_latency_ms: The same of the dense model, measured in turns with it.
    """

    configuration: str
    metric: float
    standard_error: float | None
    flops_ratio: float
    latency_ms: float | None = None
    dense_latency_ms: float | None = None


@dataclass(frozen=True)
class Evaluated:
    """What :func:`evaluate` measured, and on what.

    Attributes:
        metric: Name of the metric.
        data: The split, or the user's file.
        examples: Number of examples.
        hardware: Where latencies were measured.
        measurements: One a configuration.
    """

    metric: str
    data: str
    examples: int
    hardware: str
    measurements: tuple[Measurement, ...]


def evaluate(
    spec: StudySpec,
    configs: Sequence[LengthConfig | None],
    split: Split | None = None,
    data: Path | None = None,
    latency: bool = True,
    update: Update | None = None,
) -> Evaluated:
    """Measure configurations of a study's length-adaptive model.

    Args:
        spec: The study; its model must be trained.
        configs: The configurations; ``None`` is dense.
        split: Part of the study's data; by default the one for reporting.
        data: A file of the user's own instead, in the form of the study's files.
        latency: Whether to measure latencies as well (batches of one).
        update: Is told how far it is.

    Raises:
        SpecError: The model is not trained, or the task reads no files.
        ValueError: There is no such split, or the file cannot be read.
    """
    import torch

    from lat_optuna.export.compare import predict, standard_error
    from lat_optuna.latency import LatencyMeter
    from lat_optuna.model import load
    from lat_optuna.search.evaluator import ModelEvaluator

    device = pipeline.default_device()
    if data is None:
        evaluator = pipeline.MakeEvaluator(spec, split=split or pipeline.REPORTING_SPLIT)(device)
    else:
        _need_model(spec)
        protocol: Any = "real" if spec.search.retention == "relative" else "padded"
        task = task_of_file(spec, data)
        evaluator = ModelEvaluator(
            load(spec.adaptive_folder), task, "validation", device, protocol=protocol, retention=spec.search.retention
        )
    task, model = evaluator.task, evaluator.model
    lengths = [len(tokens) for tokens in task.features(evaluator.split)["input_ids"][:]]
    costs = [evaluator.cost(config) for config in configs]  # refuses configurations of another model
    latencies: list[Any] = [None] * len(configs)
    if latency:
        latencies = LatencyMeter(model, lengths).measure(configs, rounds=5, warmup=1)
    measurements = []
    for done, (config, cost, measured) in enumerate(zip(configs, costs, latencies, strict=True), start=1):
        reduced = torch.autocast(evaluator.device.type, torch.bfloat16, enabled=evaluator.precision == "bf16")
        with model.at(config), reduced:
            predictions = predict(model, task, evaluator.split, evaluator.device, evaluator.tokens_per_batch)
        measurements.append(
            Measurement(
                "dense" if config is None else str(config),
                task.score(evaluator.split, predictions)[task.metric_name],
                standard_error(task, evaluator.split, predictions),
                cost,
                None if measured is None else measured.milliseconds,
                None if measured is None else measured.dense,
            )
        )
        if update is not None:
            update(done, len(configs))
    return Evaluated(
        task.metric_name,
        evaluator.split if data is None else str(data),
        evaluator.num_examples,
        pipeline.describe_hardware(device),
        tuple(measurements),
    )


def task_of_file(spec: StudySpec, data: Path) -> Task:
    """A study's task on a file of the user's own, as split ``"validation"``; classes are the trained model's.

    Raises:
        SpecError: The study's task reads no files.
        ValueError: The file is missing or cannot be read.
    """
    from transformers import AutoConfig

    if not hasattr(spec.task, "data"):
        raise SpecError(f"--data: a task of type {spec.task.type} reads no files")
    folder = str(spec.adaptive_folder)
    settings = spec.task.model_dump(include={"max_length", "stride", "text_columns", "label_column"})
    settings |= spec.task.model_dump(include={"tokens_column", "tags_column"})
    files = {"validation": str(data)}
    if spec.task.type == "question_answering":
        from lat_optuna.tasks.question_answering import QuestionAnswering

        return QuestionAnswering(folder, files, train_split=None, **settings)
    names = [name for _, name in sorted(AutoConfig.from_pretrained(folder).id2label.items())]
    if spec.task.type == "token_classification":
        from lat_optuna.tasks.token_classification import TokenClassification

        return TokenClassification(folder, files | {"train": str(data)}, label_names=names, **settings)
    from lat_optuna.tasks.text_classification import TextClassification

    return TextClassification(folder, files, train_split=None, label_names=names, **settings)


def _need_model(spec: StudySpec) -> None:
    if not spec.adaptive_folder.is_dir():
        raise SpecError(f"{spec.adaptive_folder} does not exist; train first: lat-optuna train STUDY")


# ------------------------------------------------------------------------------------------------- exporting


def export(
    spec: StudySpec,
    kind: Kind,
    out: Path,
    point: Point,
    front: Front,
    on_message: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Write a point of a study's front as a folder to deploy, compared with torch on the split for reporting.

    Args:
        spec: The study.
        kind: ``"hf"``, an ordinary checkpoint; ``"onnx"``, one graph; ``"onnx-int8"``, the same quantised.
        out: The folder; it must not exist, and appears whole or not at all.
        point: What :func:`pick` chose.
        front: The front that the point is of.
        on_message: Is told what is being done.

    Returns:
        What was checked, as it lies in ``export.json``.

    Raises:
        SpecError: The folder exists or cannot be made, or the model is not trained.
        ValueError: The architecture cannot be exported, ONNX is not installed, or the result does not agree with torch.
    """
    from lat_optuna.export.card import PICTURE, licence_of, write_card
    from lat_optuna.export.onnx import FILES, need_onnx
    from lat_optuna.model import load
    from lat_optuna.model.checkpoint import read_side_file, save

    if kind not in get_args(Kind):
        raise SpecError(f"an export is of kind {', '.join(get_args(Kind))}, not {kind!r}")
    tell = on_message or (lambda line: None)
    _need_model(spec)
    if kind != "hf":
        need_onnx()
    config = LengthConfig(point.lengths, front.max_length, front.retention)
    with whole_folder(out) as folder:
        side = read_side_file(spec.adaptive_folder)
        if side is None:
            raise ValueError(f"{spec.adaptive_folder} is not a length-adaptive model: it has no length_adaptive.json")
        task = pipeline.make_task(spec)
        model: Any = load(spec.adaptive_folder).eval()
        side = replace(side, metric=front.metric, front=front.side_points(), length_config=config)
        if kind == "hf":
            tell("writing the checkpoint")
            save(model, folder, side, task.tokenizer)
        else:
            from lat_optuna.model.checkpoint import write_side_file

            model.config.save_pretrained(folder)
            task.tokenizer.save_pretrained(folder)
            write_side_file(folder, side)
        checks = (
            _check_checkpoint(model, config, task, folder, tell)
            if kind == "hf"
            else _write_onnx(model, config, task, folder, kind == "onnx-int8", tell)
        )
        checks = {
            "format": FORMAT,
            "kind": kind,
            "study": spec.name,
            "length_config": str(config),
            "max_length": config.max_length,
            "retention": config.retention,
            "flops_ratio": point.cost,
            "split": pipeline.REPORTING_SPLIT,
            "metric_name": task.metric_name,
            **checks,
            "hardware": pipeline.describe_hardware("cpu"),
            "versions": _versions(kind),
        }
        _refuse_what_differs(checks)
        write_json(folder / CHECKS_FILE, checks)
        tell("writing the model card")
        training = {key: str(value) for key, value in side.training.items() if not isinstance(value, Mapping | list)}
        write_card(
            folder,
            name=spec.name,
            kind=kind,
            file=FILES.get(kind),
            architecture=type(model).__name__,
            base_model=spec.model.checkpoint,
            licence=licence_of(spec.model.checkpoint, resolve_checkpoint(spec.model)),
            checks=checks,
            front=front,
            chosen=point,
            about={
                "Base model": spec.model.checkpoint,
                "Data": task.name,
                **pipeline.describe_run(spec),
                "LengthDrop": ", ".join(f"{key} {value}" for key, value in training.items()),
            },
            picture=_draw(front, folder / PICTURE, tell),
        )
    return checks


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder that appears under its name when the block ends well; nothing is left of it otherwise.

    Raises:
        SpecError: It exists, or cannot be made.
    """
    if out.exists():
        raise SpecError(f"{out} exists; name a folder that does not, or delete it")
    partial_folder = out.with_name(out.name + ".partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir()
    except OSError as error:
        raise SpecError(f"cannot write to {out}: {error.strerror or error}") from None
    try:
        yield partial_folder
        partial_folder.rename(out)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _check_checkpoint(
    model: Any, config: LengthConfig, task: Task, folder: Path, tell: Callable[[str], None]
) -> dict[str, Any]:
    from lat_optuna.model import load

    tell("comparing it with the study's model")
    return _compare(model, config, task, load(folder).eval(), None)


def _write_onnx(
    model: Any, config: LengthConfig, task: Task, folder: Path, int8: bool, tell: Callable[[str], None]
) -> dict[str, Any]:
    from lat_optuna.export.onnx import FILES, OPSET, OnnxModel, quantize, to_onnx

    names = [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in task.collate([_row(task)])]
    tell("writing the graph, and a dense one to compare it with")
    path = to_onnx(model, folder / FILES["onnx"], config, names)
    dense_path = to_onnx(model, folder / "dense.onnx", None, names)
    about: dict[str, Any] = {"opset": OPSET}
    if int8:
        tell("quantising both")
        dense_path = quantize(dense_path, folder / "dense_quantized.onnx")
        target = folder / FILES["onnx-int8"]
        quantize(path, target)
        tell("comparing it with torch")
        checks = _compare(model, config, task, OnnxModel(target), OnnxModel(dense_path))
        about["significance"] = "int8"
        if checks["metric"]["torch"] - checks["metric"]["exported"] > INT8_LOSS:
            tell("int8 costs accuracy: once more, with the ranking of tokens in fp32")
            kept = quantize(path, folder / "kept.onnx", keep_significance=True)
            again = _compare(model, config, task, OnnxModel(kept), OnnxModel(dense_path))
            about["metric_with_int8_significance"] = checks["metric"]["exported"]
            if again["metric"]["exported"] > checks["metric"]["exported"]:
                checks, about["significance"] = again, "fp32"
                kept.replace(target)
            kept.unlink(missing_ok=True)
        path.unlink()
    else:
        tell("comparing it with torch")
        checks = _compare(model, config, task, OnnxModel(path), OnnxModel(dense_path))
    for leftover in folder.glob("dense*.onnx"):
        leftover.unlink()
    return about | checks


def _row(task: Task) -> Any:
    return task.features(pipeline.REPORTING_SPLIT)[0]


def _compare(model: Any, config: LengthConfig, task: Task, exported: Any, dense: OnnxModel | None) -> dict[str, Any]:
    """Metric, answers and latency of what was exported, beside torch's and the dense model's of the same kind."""
    from lat_optuna.export.compare import answers, differing, measure, predict, sample_batches, standard_error

    split = pipeline.REPORTING_SPLIT

    def torch_at(config: LengthConfig | None, **inputs: Any) -> Any:
        with model.at(config):
            return model(**inputs)

    runs = {"dense_torch": partial(torch_at, None), "torch": partial(torch_at, config), "exported": exported}
    if dense is not None:
        runs["dense_exported"] = dense
    predictions = {name: predict(run, task, split) for name, run in runs.items()}
    scores = {name: task.score(split, found)[task.metric_name] for name, found in predictions.items()}
    given = {name: answers(task, split, found) for name, found in predictions.items() if name in ("torch", "exported")}
    timing = measure(runs, sample_batches(task, split))
    return {
        "examples": len(given["torch"]),
        "metric": scores,
        "standard_error": standard_error(task, split, predictions["exported"]),
        "differing": differing(given["torch"], given["exported"]),
        "latency": {
            "ms": dict(timing.milliseconds),
            "batch_size": timing.batch_size,
            "tokens": timing.tokens,
            "threads": timing.threads,
        },
    }


def _refuse_what_differs(checks: Mapping[str, Any]) -> None:
    allowed = max(1, round(NEAR_TIES * checks["examples"]))
    if checks["kind"] != "onnx-int8" and checks["differing"] > allowed:
        raise ValueError(
            f"what was exported answers {checks['differing']} of {checks['examples']} examples otherwise than torch: "
            f"{checks['metric_name']} {checks['metric']['exported']:.2f} against {checks['metric']['torch']:.2f}. That "
            "is more than rounding; nothing was written. Please report it"
        )


def _versions(kind: Kind) -> dict[str, str]:
    from importlib import metadata

    names = ["lat-optuna", "torch", "transformers"] + ([] if kind == "hf" else ["onnx", "onnxruntime"])
    return {name: metadata.version(name) for name in names}


def _draw(front: Front, path: Path, tell: Callable[[str], None]) -> bool:
    """The front as a picture, where plotly's exporter and a browser are installed."""
    from lat_optuna.figures import export_figure, front_figure

    try:
        export_figure(front_figure(front), path)
    except ValueError as error:
        tell(f"without a picture of the front: {error}")
        return False
    return True
