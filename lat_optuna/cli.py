"""The ``lat-optuna`` command. Exit code 0: done, 1: failed at run time, 2: wrong use."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

if TYPE_CHECKING:
    import optuna

    from lat_optuna.deploy import Evaluated
    from lat_optuna.search.front import Baselines, Front
    from lat_optuna.search.worker import OnProgress, Progress
    from lat_optuna.spec import StudySpec

# torch, transformers and optuna take seconds to load: they are imported by the commands that need them.

QUICKSTART = "studies/quickstart.yaml"


class _Group(click.Group):
    """A group that says what went wrong in one line; ``--debug`` shows the traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail("stopped; the same command goes on from here", 130)
        except Exception as error:
            if ctx.params.get("debug"):
                raise
            from lat_optuna.spec import SpecError

            if isinstance(error, SpecError):
                _fail(str(error), 2)
            from lat_optuna.search.study import SearchError

            if isinstance(error, (ValueError, OSError, SearchError)):
                _fail(str(error), 1)
            _fail(f"{type(error).__name__}: {error} (lat-optuna --debug shows where)", 1)


def _fail(message: str, code: int) -> NoReturn:
    # Third-party messages may span lines; the first paragraph says what is wrong.
    for line in message.strip().split("\n\n")[0].splitlines():
        click.echo(f"lat-optuna: {line}", err=True)
    sys.exit(code)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="lat-optuna")
@click.option("--debug", is_flag=True, help="Show tracebacks and the libraries' own logs.")
def main(debug: bool) -> None:
    """Length-adaptive transformers: train once, search the length of every layer, serve any compute budget."""
    import logging
    import os

    if debug:
        logging.basicConfig(level=logging.INFO)
    else:
        # Set before the libraries load; a user's own choice wins.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _study_argument(function: Any) -> Any:
    function = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a key of the study file: --set search.n_trials=600",
    )(function)
    return click.argument("study", type=click.Path(path_type=Path))(function)


def _point_options(function: Any) -> Any:
    """Options that choose a point of the front."""
    positive = click.FloatRange(min=0, min_open=True)
    for option in reversed(
        (
            click.option("--budget", type=positive, help="Most FLOPs, as a fraction of the dense model's."),
            click.option("--latency-ms", type=positive, help="Longest latency, where latencies were measured."),
            click.option("--no-loss", is_flag=True, help="The cheapest point that is as good as the standard model."),
            click.option(
                "--max-drop", type=click.FloatRange(min=0), help="The cheapest point that loses at most this much."
            ),
        )
    ):
        function = option(function)
    return function


def _load(study: Path, overrides: tuple[str, ...]) -> StudySpec:
    from lat_optuna.spec import load_spec

    return load_spec(_bundled(study), overrides)


def _shown(study: Path, overrides: tuple[str, ...]) -> str:
    """The study as one writes it in a command: its file and the options that go with it."""
    file = study if study.exists() else Path(study.name)
    return " ".join([shlex.quote(str(file)), *(f"--set {shlex.quote(override)}" for override in overrides)])


def _bundled(study: Path) -> Path:
    """The file itself or, where there is none, the study of that name that came with the package."""
    packaged = Path(__file__).parent / "studies" / study.name
    return packaged if not study.exists() and packaged.exists() and study.parts[:-1] in ((), ("studies",)) else study


_devices = click.option("--devices", help="Comma-separated devices, one a worker: cuda:0,cuda:2 or cpu,cpu.")
_workers = click.option(
    "--workers", type=click.IntRange(min=1), help="Number of processes; by default one a visible GPU, one without."
)


@main.command()
@click.argument("study", type=click.Path(path_type=Path), default=Path(QUICKSTART))
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the study file.")
@_workers
@_devices
def quickstart(study: Path, overrides: tuple[str, ...], workers: int | None, devices: str | None) -> None:
    """Train, search, front and report in one go (about five minutes on two cores)."""
    start = time.monotonic()
    spec = _load(study, overrides)
    _train(spec)
    _search(spec, workers, devices)
    _front(spec)
    shown = _shown(study, overrides)
    path = _report(spec, shown)
    click.echo(
        f"\nDone in {time.monotonic() - start:.0f} s. The report: {path.resolve()}\n\n"
        "What next:\n"
        f"  lat-optuna dashboard {shown}     the study in optuna-dashboard\n"
        f"  lat-optuna front {shown} --budget 0.5     the best point at half of the FLOPs\n"
        f"  lat-optuna quickstart {shown} --set search.n_trials={2 * spec.search.n_trials}     search on\n"
        "  and in Python:\n"
        "    from lat_optuna import load\n"
        f'    model = load("{spec.adaptive_folder}", budget=0.5)'
    )


@main.command()
@_study_argument
def train(study: Path, overrides: tuple[str, ...]) -> None:
    """Fine-tune as usual, then with LengthDrop. Goes on from where it was stopped."""
    _train(_load(study, overrides))


@main.command()
@_study_argument
@_workers
@_devices
@click.option(
    "--sampler", help="Who draws: default, paper, nsga2, nsga3, tpe, gp or random; short for --set search.sampler=NAME."
)
def search(
    study: Path, overrides: tuple[str, ...], workers: int | None, devices: str | None, sampler: str | None
) -> None:
    """Search length configurations with one or more local workers. Goes on from where it was stopped."""
    spec = _load(study, (*overrides, f"search.sampler={sampler}") if sampler else overrides)
    _search(spec, workers, devices)
    _front(spec)


@main.command()
@_study_argument
@click.option("--storage", help="URL of the trials' database; by default the study file's.")
@click.option("--device", help="Device of this worker; by default by LOCAL_RANK, SLURM_LOCALID or the first GPU.")
def worker(study: Path, overrides: tuple[str, ...], storage: str | None, device: str | None) -> None:
    """Join a search as one worker, from any machine that reaches the storage."""
    from lat_optuna import pipeline
    from lat_optuna.search.front import read_baselines

    extra = (f"storage={storage}",) if storage else ()
    spec = _load(study, (*overrides, *extra))
    with _search_progress(spec, read_baselines(spec.output)) as on_progress:
        ended = pipeline.join(spec, device, on_progress)
    click.echo(ended, err=True)


@main.group()
def storage() -> None:
    """The trials' database, for many machines."""


@storage.command()
@click.argument("url")
@click.option("--host", default="localhost", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--port", type=click.IntRange(1, 65535), default=13000, show_default=True)
def serve(url: str, host: str, port: int) -> None:
    """Stand Optuna's gRPC proxy in front of a database: workers then join with --storage grpc://HOST:PORT.

    URL is postgresql://USER@HOST/DATABASE; give the password by PGPASSWORD or ~/.pgpass, not in the URL.
    """
    import signal

    from lat_optuna.search.storage import redact, serve

    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    click.echo(f"serving {redact(url)} at grpc://{host}:{port}; Ctrl-C ends it", err=True)
    serve(url, host, port)


@main.command()
@_study_argument
@_point_options
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--csv", "as_csv", is_flag=True, help="As CSV.")
def front(study: Path, overrides: tuple[str, ...], **options: Any) -> None:
    """Show the Pareto front, or pick a point of it."""
    _front(_load(study, overrides), **options)


@main.command()
@_study_argument
@click.option(
    "--output", type=click.Path(path_type=Path), help="The HTML file; by default report.html in the study's folder."
)
@click.option(
    "--figures", type=click.Path(path_type=Path, file_okay=False), help="Write each figure into this folder as well."
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["svg", "png", "pdf", "html"]),
    default="svg",
    show_default=True,
    help="Of the figures; all but html need kaleido and Chrome.",
)
def report(study: Path, overrides: tuple[str, ...], output: Path | None, figures: Path | None, kind: str) -> None:
    """Write the HTML report: one file, no network."""
    from lat_optuna import pipeline

    spec = _load(study, overrides)
    click.echo(_report(spec, _shown(study, overrides), output))
    if figures is not None:
        for path in pipeline.export_figures(spec, figures, kind):
            click.echo(path)


@main.command()
@click.argument("studies", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of every study file.")
@click.option("--seeds", metavar="0,1,2", help="Seeds to run one after the other; by default the study file's.")
@click.option(
    "--skip",
    type=click.Choice(["padded", "random", "fixed", "ablations", "latency"]),
    multiple=True,
    help="Leave a part out; it can be made up for later.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("studies/results"),
    show_default=True,
    help="Folder that gets a folder of tables and numbers for every study.",
)
@click.option("--figures", type=click.Path(path_type=Path, file_okay=False), help="Write Figures 2-4 into this folder.")
@click.option(
    "--format",
    "kind",
    type=click.Choice(["svg", "png", "pdf", "html"]),
    default="html",
    show_default=True,
    help="Of the figures; all but html need kaleido and Chrome.",
)
@_workers
@_devices
def reproduce(
    studies: tuple[Path, ...],
    overrides: tuple[str, ...],
    seeds: str | None,
    skip: tuple[str, ...],
    results: Path,
    figures: Path | None,
    kind: str,
    workers: int | None,
    devices: str | None,
) -> None:
    """Run the paper's experiments on studies: training, search, baselines, ablations, tables and figures.

    Goes on from where it was stopped. Several studies (two encoders, say) share the figures.
    """
    from lat_optuna import reproduce as experiments
    from lat_optuna.figures import export_figures

    specs = [_load(study, overrides) for study in studies]
    for what in ("name", "output"):
        if len({getattr(spec, what) for spec in specs}) < len(specs):
            raise click.UsageError(f"two of the studies have the same {what}")
    try:
        numbers = None if seeds is None else [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise click.BadParameter(f"{seeds!r} is no list of whole numbers such as 0,1,2", param_hint="--seeds") from None
    chosen = _chosen_devices(workers, devices)
    parts = [part for part in experiments.PARTS if part not in skip]
    folders = {spec.name: results / spec.name for spec in specs}
    for spec in specs:
        for seed in numbers or [spec.training.seed]:
            experiments.reproduce(spec, seed, folders[spec.name], parts, chosen)
        text = experiments.table(folders[spec.name])
        (folders[spec.name] / "table.md").write_text(text, encoding="utf-8")
        click.echo(text)
    if figures is not None:
        for path in export_figures(experiments.figures(folders), figures, kind):
            click.echo(path)


@main.command()
@click.argument("studies", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of every study file.")
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True, help="The HTML file."
)
def compare(studies: tuple[Path, ...], overrides: tuple[str, ...], output: Path) -> None:
    """Compare the fronts of several studies: a table, and a figure in one HTML file."""
    from lat_optuna import figures, pipeline, summary

    specs = [_load(study, overrides) for study in studies]
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        names = list(map(str, studies))
    if len(set(names)) < len(names):
        raise click.UsageError("a study is named twice")
    fronts, baselines = {}, {}
    for name, spec in zip(names, specs, strict=True):
        study, fronts[name], baselines[name] = pipeline.load_front(spec)
        _tell_notices(study, fronts[name], spec, f"{name}: ")
    click.echo(summary.compare_text(fronts, baselines))
    click.echo(figures.export_figure(figures.compare_figure(fronts), output))


@main.command()
@click.argument("studies", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of every study file.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True)
def dashboard(studies: tuple[Path, ...], overrides: tuple[str, ...], host: str, port: int) -> None:
    """Open studies in optuna-dashboard."""
    from lat_optuna.dashboard import serve

    serve([_load(study, overrides).storage for study in studies], host, port)


@main.command()
@_study_argument
@_point_options
@click.option("--config", help="A configuration instead: 128-110-96-...")
@click.option("--front", "whole_front", is_flag=True, help="Every point of the front.")
@click.option("--dense", is_flag=True, help="The length-adaptive model with nothing dropped.")
@click.option(
    "--split",
    type=click.Choice(["search", "validation", "test"]),
    help="Part of the study's data; by default validation.",
)
@click.option("--data", type=click.Path(path_type=Path), help="A file of your own instead, in the form of the study's.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def evaluate(
    study: Path,
    overrides: tuple[str, ...],
    config: str | None,
    whole_front: bool,
    dense: bool,
    split: Any,
    data: Path | None,
    as_json: bool,
    **choice: Any,
) -> None:
    """Measure a point, the front or the dense model: metric with its standard error, FLOPs, latency."""
    from lat_optuna import deploy, pipeline
    from lat_optuna.length_config import LengthConfig
    from lat_optuna.progress import progress

    spec = _load(study, overrides)
    choice = _choice(**choice)
    if (config is not None) + whole_front + dense + bool(choice) != 1:
        raise click.UsageError(
            "name one thing to measure: a point (--budget, --latency-ms, --no-loss, --max-drop), --config, --front or "
            "--dense"
        )
    if split and data:
        raise click.UsageError("--split is a part of the study's data, --data is your own: give one of them")
    configs: list[LengthConfig | None]
    if dense:
        configs = [None]
    elif config is not None:
        configs = [deploy.parse_config(config, spec.task.max_length, spec.search.retention)]
    else:
        if whole_front:
            front = pipeline.load_front(spec)[1]
            front.pick()  # says that there is nothing to measure
            points = list(front.points)
        else:
            point, front = deploy.pick(spec, **choice)
            points = [point]
        configs = [LengthConfig(point.lengths, front.max_length, front.retention) for point in points]
    with progress("evaluation", len(configs), "configurations") as update:
        found = deploy.evaluate(spec, configs, split, data, update=update)
    click.echo(_evaluated_json(found) if as_json else _evaluated_text(found))


@main.command()
@_study_argument
@_point_options
@click.option("--config", help="The configuration of a point of the front instead: 128-110-96-...")
@click.option(
    "--to",
    "kind",
    type=click.Choice(["hf", "onnx", "onnx-int8"]),
    default="hf",
    show_default=True,
    help="A checkpoint for transformers; one ONNX file; the same in int8.",
)
@click.argument("out", type=click.Path(path_type=Path))
def export(study: Path, overrides: tuple[str, ...], config: str | None, kind: Any, out: Path, **choice: Any) -> None:
    """Write a point of the front as the folder OUT, to deploy: compared with torch, with a model card."""
    from lat_optuna import deploy

    spec = _load(study, overrides)
    choice = _choice(**choice)
    if (config is not None) == bool(choice):
        raise click.UsageError("choose a point: --budget, --latency-ms, --no-loss or --max-drop; or --config")
    point, front = deploy.pick(spec, config=config, **choice)
    checks = deploy.export(spec, kind, out, point, front, lambda line: click.echo(f"export: {line}", err=True))
    metric, latency = checks["metric"], checks["latency"]["ms"]
    base = latency["dense_torch" if kind == "hf" else "dense_exported"]
    click.echo(
        f"{out}: {point.text} at {point.cost:.3f}x FLOPs; {checks['metric_name']} {metric['exported']:.2f} (torch "
        f"{metric['torch']:.2f}, dense {metric['dense_torch']:.2f}), {checks['differing']} of {checks['examples']} "
        f"answers differ from torch; {latency['exported']:.2f} ms an input, dense {base:.2f} ms "
        f"({base / latency['exported']:.2f}x)"
    )


def _choice(budget: float | None, latency_ms: float | None, no_loss: bool, max_drop: float | None) -> dict[str, Any]:
    """The options that choose a point, as :func:`lat_optuna.deploy.pick` takes them; empty if none was given."""
    if no_loss and max_drop:
        raise click.UsageError("--no-loss and --max-drop contradict each other; give one of them")
    given = {"budget": budget, "latency_ms": latency_ms, "max_drop": 0.0 if no_loss else max_drop}
    return {} if all(value is None for value in given.values()) else given


def _evaluated_json(found: Evaluated) -> str:
    import json
    from dataclasses import asdict

    return json.dumps(asdict(found), indent=1)


def _evaluated_text(found: Evaluated) -> str:
    lines = [f"{found.metric} on {found.data}, {found.examples:,} examples; latency of one input, {found.hardware}"]
    for one in found.measurements:
        error = "" if one.standard_error is None else f" ± {one.standard_error:.2f}"
        latency = "" if one.latency_ms is None else f"  {one.latency_ms:.2f} ms (dense {one.dense_latency_ms:.2f} ms)"
        lines.append(f"{one.metric:.2f}{error}  {one.flops_ratio:.3f}x{latency}  {one.configuration}")
    return "\n".join(lines)


def _train(spec: StudySpec) -> None:
    from lat_optuna import pipeline
    from lat_optuna.progress import progress

    for stage in pipeline.stages(spec):
        if stage.is_complete:
            click.echo(f"{stage.label}: done before ({stage.folder})", err=True)
            continue
        with progress(stage.label, 0, "steps") as update:
            stage.run(update)


def _search(spec: StudySpec, workers: int | None, devices: str | None) -> None:
    from lat_optuna import pipeline
    from lat_optuna.progress import progress

    chosen = _chosen_devices(workers, devices)
    with progress("standard model at constant ratios", spec.search.num_initial, "configurations") as update:
        baselines = pipeline.measure_standard(spec, update)
    with _search_progress(spec, baselines) as on_progress:
        ended = pipeline.search(spec, chosen, on_progress, on_message=lambda line: click.echo(line, err=True))
    click.echo(f"search: {ended}", err=True)


def _chosen_devices(workers: int | None, devices: str | None) -> list[str]:
    from lat_optuna.pipeline import default_devices

    named = [name.strip() for name in (devices or "").split(",") if name.strip()]
    if devices is not None and not named:
        raise click.BadParameter("name at least one device, as in cuda:0,cuda:2", param_hint="--devices")
    if named and workers not in (None, len(named)):
        raise click.BadParameter(
            f"{workers} workers for {len(named)} devices; give one of the two", param_hint="--workers"
        )
    available = named or default_devices()
    _check_devices(available)
    return [available[index % len(available)] for index in range(workers or len(available))]


def _check_devices(names: list[str]) -> None:
    import torch

    for name in names:
        try:
            kind = torch.device(name)
        except RuntimeError:
            raise click.BadParameter(
                f"{name!r} is not a device; write cpu, cuda or cuda:1", param_hint="--devices"
            ) from None
        if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise click.BadParameter(f"there is no {name} here: {count} GPUs are visible", param_hint="--devices")


@contextmanager
def _search_progress(spec: StudySpec, baselines: Baselines | None) -> Iterator[OnProgress]:
    import optuna

    from lat_optuna.progress import progress

    if not click.get_current_context().find_root().params.get("debug"):
        optuna.logging.set_verbosity(optuna.logging.WARNING)

    dense = baselines.dense() if baselines else None
    with progress("search", spec.search.n_trials, "trials") as update:

        def on_progress(now: Progress) -> None:
            lossless = [cost for metric, cost in now.front if dense is not None and metric >= dense.metric]
            update(
                now.done,
                now.total,
                AUC=now.auc,
                no_loss=f"{min(lossless):.3f}x" if lossless else None,
                trials_per_s=now.rate,
                failed=now.failed or None,
            )

        yield on_progress


def _front(
    spec: StudySpec,
    budget: float | None = None,
    latency_ms: float | None = None,
    no_loss: bool = False,
    max_drop: float | None = None,
    as_json: bool = False,
    as_csv: bool = False,
) -> None:
    from lat_optuna import pipeline, summary

    choice = _choice(budget, latency_ms, no_loss, max_drop)
    study, front, baselines = pipeline.load_front(spec)
    _tell_notices(study, front, spec)
    point = None
    if choice:
        dense = baselines.dense() if baselines else None
        point = front.pick(**choice, dense=dense.metric if dense else None)
        front = replace(front, points=(point,))
    elif not (front.points or as_json or as_csv):
        front.pick()  # says that there is nothing to show, and what to do
    if as_json:
        click.echo(front.to_json())
    elif as_csv:
        click.echo(front.to_csv(), nl=False)
    elif sys.stdout.isatty():
        from rich.console import Console

        console = Console()
        console.print(summary.front_table(front, baselines))
        if point is None:
            click.echo(summary.front_plot(front))
    else:
        click.echo(summary.front_text(front, baselines))
    if not (as_json or as_csv):
        if splits := summary.splits_line(front, baselines):
            click.echo(splits)
        if point is None:
            click.echo(_lossless_line(front, baselines))


def _lossless_line(front: Front, baselines: Baselines | None) -> str:
    from lat_optuna.summary import REPORTING_SPLIT, Splits, without_loss

    dense = baselines.dense() if baselines else None
    area = f"area under the front: {front.auc():.3f} {front.search_metric or front.metric}"
    if dense is None:
        return area
    standard = f"the standard model's {dense.metric:.2f} {front.metric}"
    if (splits := Splits.of(front, baselines)).apart:
        standard += f" ({splits.searched_name})"
    point = without_loss(front, baselines)
    if point is None:
        return f"{area}; no point reaches {standard}"
    line = f"{area}; cheapest point without loss against {standard}: {point.cost:.3f}x FLOPs, {point.metric:.2f}"
    if point.reported is not None and dense.reported is not None:
        line += f", and {point.reported:.2f} against {dense.reported:.2f} on the {REPORTING_SPLIT}"
    return f"{line} ({point.text})"


def _tell_notices(study: optuna.Study, front: Front, spec: StudySpec, prefix: str = "") -> None:
    from lat_optuna import summary

    for line in summary.notices(study, front, summary.Progress.of(study, spec.search.n_trials)):
        click.echo(prefix + line, err=True)


def _report(spec: StudySpec, shown: str, output: Path | None = None) -> Path:
    from lat_optuna import pipeline

    return pipeline.report(spec, output, study_file=shown)


if __name__ == "__main__":
    main()
