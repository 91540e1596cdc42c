"""What people look at: figures, tables, and the report as one HTML file (paper: Figures 2 and 4, Table 1)."""

from __future__ import annotations

import html
import json
import math
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lat_optuna.files import write_text
from lat_optuna.search.front import Baselines, Front, Measured, Point, objective_names, standard_error

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go
    from rich.table import Table

FINISHED = ("COMPLETE", "PRUNED")
NO_FAILURE = ("lost claim", "handed back")
PACKAGES = ("lat-optuna", "torch", "transformers", "optuna", "datasets")
TEMPLATES = Path(__file__).parent / "templates"

# The same on light and on dark ground; kept apart by dashes and symbols as well, for colour-blind readers and print.
BLUE, TEAL, ORANGE, GREY = "#2f74e0", "#0d9b86", "#dd7d1e", "#8a94a3"

FRONT_COMMAND = "lat-optuna front {study} --budget {budget}"
PYTHON_LINES = """\
import lat_optuna, transformers
model = lat_optuna.load("{checkpoint}", budget={budget})
tokenizer = transformers.AutoTokenizer.from_pretrained("{checkpoint}")
outputs = model(**tokenizer("Any text of yours.", return_tensors="pt"))"""

# ---------------------------------------------------------------------- the table (Table 1)


@dataclass(frozen=True)
class Row:
    """A line of the table that sums a study up.

    Attributes:
        name: What the line is about.
        metric: The metric in percent; ``None`` where there is no such point.
        cost: FLOPs as a fraction of the dense model's.
        change: Metric less that of the standard dense model, where that is known.
        lengths: The configuration; empty for dense models.
        number: Number of the trial.
        note: Said instead of figures where there are none.
    """

    name: str
    metric: float | None = None
    cost: float | None = None
    change: float | None = None
    lengths: tuple[int, ...] = ()
    number: int | None = None
    note: str = ""


def table(front: Front, baselines: Baselines | None = None) -> list[Row]:
    """Dense models, most accurate point, cheapest point without loss against the standard model, smallest point."""
    standard = baselines.dense() if baselines else None
    adaptive = baselines.dense("length_adaptive") if baselines else None

    def row(name: str, point: Measured | Point) -> Row:
        change = None if standard is None else point.metric - standard.metric
        number = point.number if isinstance(point, Point) else None
        return Row(name, point.metric, point.cost, change, point.lengths, number)

    rows = []
    if standard:
        rows.append(row("standard model, dense", standard))
    if adaptive:
        rows.append(row("length-adaptive model, dense", adaptive))
    if front.points:
        rows.append(row("most accurate point", front.points[-1]))
        if standard:
            lossless = without_loss(front, baselines)
            name = "cheapest point without loss"
            missing = f"no point reaches the standard model's {standard.metric:.2f}"
            rows.append(row(name, lossless) if lossless else Row(name, note=missing))
        rows.append(row("smallest point", front.points[0]))
    return rows


def without_loss(front: Front, baselines: Baselines | None) -> Point | None:
    """The cheapest point at least as good as the standard dense model; ``None`` if there is none or it is unknown."""
    standard = baselines.dense() if baselines else None
    if standard is None or not front.points or front.points[-1].metric < standard.metric:
        return None
    return front.pick(max_drop=0.0, dense=standard.metric)


# ---------------------------------------------------------------------- the terminal


def front_table(front: Front, baselines: Baselines | None = None, limit: int = 20) -> Table:
    """The front for a terminal.

    Args:
        front: What to show.
        baselines: Adds the change against the standard model, and marks the cheapest point without loss.
        limit: Most points shown, spread over the front; the first, the last and the marked one are always there.
    """
    from rich import box
    from rich.table import Table

    heading, lines = _terminal_rows(front, baselines, limit)
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in heading:
        text = name in ("configuration", "")
        result.add_column(name, justify="left" if text else "right", overflow="fold", no_wrap=name != "configuration")
    for line in lines:
        result.add_row(*line, style="bold green" if line[-1] else None)
    return result


def front_text(front: Front, baselines: Baselines | None = None, limit: int = 20) -> str:
    """The same as plain text, for pipes and logs."""
    return _aligned(*_terminal_rows(front, baselines, limit))


def compare_text(fronts: Mapping[str, Front], baselines: Mapping[str, Baselines | None]) -> str:
    """What stands out of several studies, one under the other, by name (Table 1)."""
    heading = ["study", "point", "metric", "FLOPs", "change", "AUC", "configuration"]
    lines = []
    for name, front in fronts.items():
        for row in table(front, baselines.get(name)) or [Row("nothing has been evaluated yet")]:
            lines.append(
                [
                    name,
                    row.name + (f": {row.note}" if row.note else ""),
                    "" if row.metric is None else f"{row.metric:.2f} {front.metric}",
                    "" if row.cost is None else f"{row.cost:.3f}x",
                    "" if row.change is None else f"{row.change:+.2f}",
                    f"{front.auc():.3f}" if front.points else "",
                    "-".join(map(str, row.lengths)),
                ]
            )
    return _aligned(heading, lines)


def _aligned(heading: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in [heading, *lines]) for i in range(len(heading))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in ("study", "point", "configuration", "") else cell.rjust(width)
            for name, cell, width in zip(heading, line, widths, strict=True)
        ).rstrip()
        for line in [heading, *lines]
    )


def _terminal_rows(front: Front, baselines: Baselines | None, limit: int) -> tuple[list[str], list[list[str]]]:
    standard = baselines.dense() if baselines else None
    lossless = without_loss(front, baselines)
    count = len(front)
    shown = set(range(count))
    if count > limit:
        shown = {round(i * (count - 1) / (max(limit, 2) - 1)) for i in range(max(limit, 2))}
        if lossless:
            shown.add(front.points.index(lossless))
    heading = ["FLOPs", front.metric, *(["change"] if standard else []), "trial", "configuration", ""]
    lines = []
    for index in sorted(shown):
        point = front.points[index]
        line = [f"{point.cost:.3f}x", f"{point.metric:.2f}"]
        if standard:
            line.append(f"{point.metric - standard.metric:+.2f}")
        line += ["" if point.number is None else str(point.number), point.text]
        lines.append([*line, "no loss" if point is lossless else ""])
    return heading, lines


def front_plot(front: Front, width: int = 64, height: int = 12) -> str:
    """The front as a small plot of characters: metric upwards, cost to the right."""
    if len(front) < 2:
        return ""
    low, high = front.points[0].cost, front.points[-1].cost
    bottom, top = front.points[0].metric, front.points[-1].metric
    grid = [[" "] * width for _ in range(height)]
    for points, mark in ((front.evaluated, "·"), (front.points, "●")):
        for point in points:
            x = round((point.cost - low) / (high - low) * (width - 1))
            y = round((point.metric - bottom) / (top - bottom) * (height - 1))
            if 0 <= x < width and 0 <= y < height:
                grid[height - 1 - y][x] = mark
    labels = [f"{top:.1f}", *[""] * (height - 2), f"{bottom:.1f}"]
    margin = max(map(len, labels))
    lines = [f"{label:>{margin}} ┤{''.join(row)}" for label, row in zip(labels, grid, strict=True)]
    right = f"{high:.2f}x FLOPs"
    lines.append(f"{'':>{margin}} └{'─' * width}")
    lines.append(f"{'':>{margin}}  {f'{low:.2f}x':<{width - len(right)}}{right}")
    return "\n".join(lines)


# ---------------------------------------------------------------------- figures


def front_figure(front: Front, baselines: Baselines | None = None, *, trials: bool = True) -> go.Figure:
    """The front over all trials, against constant ratios of both models (Figure 2).

    Args:
        front: May be empty: the comparison is drawn all the same.
        baselines: The curves of the standard and of the length-adaptive model.
        trials: Whether to draw the trials that are not on the front.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    metric = html.escape(front.metric)
    on_front = set(front.points)
    if trials and len(front.evaluated) > len(on_front):
        beaten = [point for point in front.evaluated if point not in on_front]
        marker = {"size": 5, "color": GREY, "opacity": 0.4}
        figure.add_scatter(**_scatter(beaten, front), name="other trials", mode="markers", marker=marker)
    if baselines:
        for name, color, symbol in (("standard", ORANGE, "square"), ("length_adaptive", TEAL, "diamond")):
            curve = sorted(getattr(baselines, name), key=lambda point: point.cost)
            label = name.replace("_", "-")
            figure.add_scatter(
                x=[round(point.cost, 5) for point in curve],
                y=[point.metric for point in curve],
                text=[f"constant ratio {p.ratio:.3g}" if p.ratio else "dense" for p in curve],
                customdata=["-".join(map(str, point.lengths)) for point in curve],
                name=f"{label} model, constant ratio",
                mode="lines+markers",
                line={"color": color, "width": 2, "dash": "dash" if name == "standard" else "dot"},
                marker={"size": 8, "symbol": symbol},
                hovertemplate=f"<b>{label} model</b>, %{{text}}<br>{metric} %{{y:.2f}} %<br>FLOPs %{{x:.3f}}×"
                "<br>%{customdata}<extra></extra>",
            )
        standard = baselines.dense()
        if standard:
            figure.add_hline(
                y=standard.metric,
                line={"color": ORANGE, "width": 1, "dash": "dot"},
                annotation={
                    "text": f"standard model, dense: {standard.metric:.2f} %",
                    "font": {"color": ORANGE, "size": 12},
                    "yanchor": "bottom",
                },
                annotation_position="top left",
            )
    if front.extrapolated:
        figure.add_scatter(
            **_scatter(front.extrapolated, front),
            name="below the trained range",
            mode="markers",
            marker={"size": 8, "symbol": "circle-open", "color": BLUE},
        )
    if front.points:
        figure.add_scatter(
            **_scatter(front.points, front),
            name="Pareto front",
            mode="lines+markers",
            line={"color": BLUE, "width": 2, "shape": "hv"},
            marker={"size": 9 if len(front) <= 40 else 6},
        )
    return _laid_out(
        figure,
        f"{metric} against compute",
        {"title": "FLOPs relative to the dense model", "ticksuffix": "×"},
        {"title": f"{metric} (%)"},
    )


def compare_figure(fronts: Mapping[str, Front]) -> go.Figure:
    """The fronts of several studies in one figure, by name."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (name, front) in enumerate(fronts.items()):
        figure.add_scatter(
            **_scatter(front.points, front),
            name=html.escape(name),
            mode="lines+markers",
            line={"width": 3, "shape": "hv"},
            marker={"size": 8, "symbol": index},
        )
    metrics = ", ".join(dict.fromkeys(html.escape(front.metric) for front in fronts.values()))
    x_axis = {"title": "FLOPs relative to each study's dense model", "ticksuffix": "×"}
    return _laid_out(figure, "Fronts of several studies", x_axis, {"title": f"{metrics} (%)"})


def auc_figure(front: Front) -> go.Figure:
    """Area under the front after each generation of the search (Figure 4)."""
    import plotly.graph_objects as go

    generations = front.generations()
    figure = go.Figure()
    figure.add_scatter(
        x=[generation.number for generation in generations],
        y=[generation.auc for generation in generations],
        customdata=[[generation.trials, round(generation.hypervolume, 4)] for generation in generations],
        mode="lines+markers",
        line={"color": BLUE, "width": 3},
        marker={"size": 8},
        hovertemplate="generation %{x}, %{customdata[0]} trials<br>area %{y:.3f} %<br>"
        "hypervolume %{customdata[1]}<extra></extra>",
    )
    metric = html.escape(front.metric)
    x_axis: dict[str, Any] = {"title": "generation (0: initial population)", "tickformat": "d"}
    if len(generations) <= 12:
        x_axis["dtick"] = 1
    return _laid_out(figure, "Area under the front", x_axis, {"title": f"mean {metric} over budgets (%)"})


def lengths_figure(front: Front) -> go.Figure:
    """How many word vectors each layer keeps, point by point along the front."""
    import plotly.graph_objects as go

    points = front.points
    layers = len(points[0].lengths) if points else 0
    figure = go.Figure()
    figure.add_heatmap(
        # Costs may coincide when they are rounded, so that rows are numbered and only labelled by cost.
        x=list(range(1, layers + 1)),
        y=list(range(len(points))),
        z=[list(point.lengths) for point in points],
        customdata=[[[f"{point.cost:.3f}", f"{point.metric:.2f}"]] * layers for point in points],
        zmin=1,
        zmax=max(front.max_length, 2),
        colorscale=[[0, "#eef4fd"], [0.5, "#6fa3ec"], [1, "#173f7f"]],
        colorbar={"title": {"text": "word<br>vectors"}, "thickness": 12},
        xgap=1,
        hovertemplate=f"layer %{{x}} keeps %{{z}} of {front.max_length}<br>at %{{customdata[0]}}× FLOPs, "
        f"{html.escape(front.metric)} %{{customdata[1]}} %<extra></extra>",
    )
    step = max(1, len(points) // 12)
    ticks = list(range(0, len(points), step))
    y_axis = {
        "title": "FLOPs of the point",
        "tickvals": ticks,
        "ticktext": [f"{points[i].cost:.2f}×" for i in ticks],
        "showgrid": False,
    }
    x_axis = {"title": "layer", "dtick": 1 if layers <= 16 else 4, "showgrid": False}
    return _laid_out(figure, "Word vectors kept, layer by layer", x_axis, y_axis)


def latency_figure(front: Front) -> go.Figure | None:
    """Measured latency over FLOPs; ``None`` where no latency was measured."""
    import plotly.graph_objects as go

    points = [point for point in front.evaluated if "latency_ms" in point.extra]
    if not points:
        return None
    figure = go.Figure()
    trace = _scatter(points, front) | {"y": [point.extra["latency_ms"] for point in points]}
    trace["hovertemplate"] = "%{y:.2f} ms at %{x:.3f}×<br>%{text}<extra></extra>"
    figure.add_scatter(**trace, mode="markers", marker={"color": BLUE, "size": 7})
    x_axis = {"title": "FLOPs relative to the dense model", "ticksuffix": "×"}
    return _laid_out(figure, "Latency against FLOPs", x_axis, {"title": "latency (ms)", "rangemode": "tozero"})


def figures(front: Front, baselines: Baselines | None = None) -> dict[str, go.Figure]:
    """The figures of a report, by name; those for which there is nothing to draw are left out."""
    drawn = {"front": front_figure(front, baselines)}
    if front.points:
        drawn |= {"auc": auc_figure(front), "lengths": lengths_figure(front)}
        latency = latency_figure(front)
        drawn |= {"latency": latency} if latency else {}
    return drawn


def export_figure(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as ``.html`` (self-contained), or as ``.png``, ``.svg`` or ``.pdf`` by plotly's own exporter.

    Raises:
        ValueError: The ending is another, or the exporter or its browser is missing (the message says which).
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    if kind == "html":
        figure.write_html(path, include_plotlyjs=True)
    elif kind in ("png", "svg", "pdf"):
        try:
            figure.write_image(path, format=kind, width=900, height=560, scale=2)
        # kaleido's own errors have no common class.
        except Exception as error:
            raise ValueError(
                f"{path}: plotly exports {kind} through kaleido and a Chrome browser, which failed: "
                f"{' '.join(str(error).split())[:120]}. `pip install kaleido` and install Chrome, write .html instead, "
                "or use the camera button of the figure in the report"
            ) from error
    else:
        raise ValueError(f"{path}: a figure is written as .html, .png, .svg or .pdf")
    return path


def _scatter(points: Sequence[Point], front: Front) -> dict[str, Any]:
    metric = html.escape(front.metric)
    return {
        "x": [round(point.cost, 5) for point in points],
        "y": [point.metric for point in points],
        "text": [_hover(point) for point in points],
        "hovertemplate": f"<b>{metric} %{{y:.2f}} % at %{{x:.3f}}× FLOPs</b><br>%{{text}}<extra></extra>",
    }


def _hover(point: Point) -> str:
    drawn = [] if point.number is None else [f"trial {point.number}"]
    if point.generation is not None:
        drawn.append(f"generation {point.generation}")
    if point.operation is not None:
        drawn.append(html.escape(point.operation))
    extra = [f"{html.escape(name)} {value:.4g}" for name, value in point.extra.items()]
    return "<br>".join(part for part in (point.text, ", ".join(drawn), ", ".join(extra)) if part)


def _laid_out(figure: go.Figure, title: str, x_axis: dict[str, Any], y_axis: dict[str, Any]) -> go.Figure:
    figure.update_layout(
        # plotly's default template is 7 kB a figure, too much for where the dashboard keeps figures.
        template={"layout": {"colorway": [BLUE, ORANGE, TEAL, "#b0509c", GREY, "#8a6d1f"]}},
        title={"text": title[:1].upper() + title[1:], "x": 0.02, "xanchor": "left", "y": 0.98, "yanchor": "top"},
        xaxis={"gridcolor": "#e3e7ec", "zeroline": False, "automargin": True, **x_axis},
        yaxis={"gridcolor": "#e3e7ec", "zeroline": False, "automargin": True, **y_axis},
        legend={"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0},
        hovermode="closest",
        hoverlabel={"align": "left"},
        margin={"l": 60, "r": 20, "t": 110 if len(figure.data) > 1 else 60, "b": 50},
        plot_bgcolor="rgba(0,0,0,0)",
    )
    return figure


# ---------------------------------------------------------------------- which words stay


@dataclass(frozen=True)
class KeptWords:
    """Which tokens of one example each layer keeps.

    Attributes:
        tokens: The example's tokens as the tokenizer writes them (``"##ing"``, ``"Ġthe"``).
        kept: For each layer one flag a token; what a layer drops no later layer keeps.
        title: What is shown: ``"at 0.50x FLOPs, predicted positive (96 %)"``.

    Raises:
        ValueError: A layer has another number of flags, or keeps what was dropped before.
    """

    tokens: tuple[str, ...]
    kept: tuple[tuple[bool, ...], ...]
    title: str = ""

    def __post_init__(self) -> None:
        before: tuple[bool, ...] = (True,) * len(self.tokens)
        for layer, flags in enumerate(self.kept, start=1):
            if len(flags) != len(self.tokens):
                raise ValueError(f"layer {layer} has {len(flags)} flags for {len(self.tokens)} tokens")
            if any(now and not then for now, then in zip(flags, before, strict=True)):
                raise ValueError(f"layer {layer} keeps a token that layer {layer - 1} dropped")
            before = flags


def _words_html(words: KeptWords) -> str:
    lines = [f"<h3>{html.escape(words.title)}</h3>" if words.title else "", '<div class="words">']
    everything = (True,) * len(words.tokens)
    for layer, flags in enumerate((everything, *words.kept)):
        label = f"layer {layer}" if layer else "input"
        lines.append(f'<div class="layer"><span class="label">{label}<br><b>{sum(flags)}</b></span><p>')
        for index, (token, flag) in enumerate(zip(words.tokens, flags, strict=True)):
            # Word pieces of BERT carry a mark inside words, those of RoBERTa and of sentencepiece before words.
            inside = token.startswith("##")
            shown = token.removeprefix("##").replace("Ġ", " ").replace("▁", " ").replace("Ċ", " ")
            gap = "" if inside or index == 0 or shown.startswith(" ") else " "
            if any(t.startswith(("Ġ", "▁")) for t in words.tokens):
                gap = ""
            opened = "<span>" if flag else '<span class="gone">'
            lines.append(f"{gap}{opened}{html.escape(shown)}</span>")
        lines.append("</p></div>")
    return "".join([*lines, "</div>"])


# ---------------------------------------------------------------------- the report


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        finished: Trials that count towards the budget of trials.
        failed: Trials that failed.
        running: Trials that are being evaluated.
        target: Trials that the study shall have, where that is known.
        first: Start of the first trial.
        last: End of the last finished trial.
        seconds: Wall time of all evaluations together.
        workers: Workers that took part.
        devices: Their devices.
    """

    finished: int
    failed: int
    running: int
    target: int | None
    first: datetime | None
    last: datetime | None
    seconds: float
    workers: tuple[str, ...]
    devices: tuple[str, ...]

    @classmethod
    def of(cls, study: optuna.Study, target: int | None = None) -> Progress:
        """Count a study's trials."""
        trials = study.get_trials(deepcopy=False)
        ended = [trial for trial in trials if trial.state.name in FINISHED]
        seconds = [trial.user_attrs.get("seconds") for trial in ended]
        return cls(
            finished=len(ended),
            # A claim that came second, or that was handed back, is no failure.
            failed=sum(t.state.name == "FAIL" and t.user_attrs.get("fail") not in NO_FAILURE for t in trials),
            running=sum(t.state.name == "RUNNING" for t in trials),
            target=target,
            first=min((trial.datetime_start for trial in trials if trial.datetime_start), default=None),
            last=max((trial.datetime_complete for trial in ended if trial.datetime_complete), default=None),
            seconds=sum(value for value in seconds if isinstance(value, int | float)),
            workers=tuple(sorted({str(t.user_attrs["worker"]) for t in ended if "worker" in t.user_attrs})),
            devices=tuple(sorted({str(t.user_attrs["device"]) for t in ended if "device" in t.user_attrs})),
        )

    @property
    def state(self) -> str:
        """``"empty"``, ``"running"``, ``"stopped"`` short of its target, or ``"finished"``."""
        if self.running:
            return "running"
        if not self.finished:
            return "empty"
        return "stopped" if self.target is not None and self.finished < self.target else "finished"

    def __str__(self) -> str:
        of = "" if self.target is None else f" of {self.target}"
        failed = f", {self.failed} failed" if self.failed else ""
        running = f", {self.running} under way" if self.running else ""
        return f"{self.finished}{of} trials{running}{failed}"


def write_report(
    path: str | os.PathLike[str],
    study: optuna.Study,
    baselines: Baselines | None = None,
    *,
    front: Front | None = None,
    n_trials: int | None = None,
    study_file: str = "STUDY.yaml",
    checkpoint: str = "CHECKPOINT",
    words: Sequence[KeptWords] = (),
    about: Mapping[str, str] | None = None,
) -> Path:
    """Write the report of a study: one HTML file with everything in it, no network.

    An empty or a running study has a report too; it says so.

    Args:
        path: The HTML file.
        study: Objectives as :meth:`Front.of` wants them; a third one is named and left out of the front.
        baselines: What the front is compared with, and what was run.
        front: The study's front, where it is at hand.
        n_trials: Trials that the study shall have.
        study_file: As it goes into commands.
        checkpoint: Folder of the length-adaptive model, as it goes into Python.
        words: Examples with the words that each layer keeps.
        about: More of what was run, shown after ``baselines.about``.

    Returns:
        ``path``.

    Raises:
        ValueError: See :meth:`Front.of`.
    """
    from plotly.offline import get_plotlyjs

    front = Front.of(study) if front is None else front
    progress = Progress.of(study, n_trials)
    drawn = figures(front, baselines)
    lossless = without_loss(front, baselines)
    standard = baselines.dense() if baselines else None
    data = {
        "figures": {name: _for_page(figure) for name, figure in drawn.items()},
        "points": [
            {
                "lengths": list(point.lengths),
                "text": point.text,
                "metric": point.metric,
                "cost": point.cost,
                "drawn": ", ".join(_hover(point).split("<br>")[1:2]),
            }
            for point in front.points
        ],
        "metric": front.metric,
        "maxLength": front.max_length,
        "standard": standard.metric if standard else None,
        "lossless": front.points.index(lossless) if lossless else None,
        "command": FRONT_COMMAND.replace("{study}", study_file),
        "python": PYTHON_LINES.replace("{checkpoint}", checkpoint),
    }
    page = _Template((TEMPLATES / "report.html").read_text(encoding="utf-8")).substitute(
        title=html.escape(study.study_name),
        metric=html.escape(front.metric),
        subtitle=html.escape(" on ".join(part for part in _subject(baselines) if part)),
        state=progress.state,
        progress=html.escape(str(progress)),
        lead=_lead(front, baselines, lossless, progress),
        notices="".join(f'<p class="notice">{html.escape(text)}</p>' for text in notices(study, front, progress)),
        chooser="" if front.points else "hidden",
        error=html.escape(_error_note(front, baselines)),
        table=_table_html(table(front, baselines), front.metric),
        sections="".join(_section(name) for name in ("auc", "lengths", "latency") if name in drawn),
        words=_words_section(words),
        points=_points_html(front),
        facts=_facts_html(_facts(study, front, baselines, progress, about or {})),
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "report.js").read_text(encoding="utf-8"),
        data=_script_json(data),
        plotly=get_plotlyjs(),
        written=datetime.now().strftime("%Y-%m-%d %H:%M"),
    )
    path = Path(path)
    write_text(path, page)
    return path


class _Template(string.Template):
    # Neither CSS nor JavaScript nor plotly.js, which goes in as a value, is disturbed by it.
    delimiter = "%%"


def _script_json(value: Any) -> str:
    """JSON that may stand inside ``<script>``: nothing in it can end the element or start another."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _for_page(figure: go.Figure) -> dict[str, Any]:
    # The page has headings of its own and colours text and grid by its own style, for dark mode and print.
    figure.update_layout(title=None, paper_bgcolor="rgba(0,0,0,0)", margin={"l": 55, "r": 12, "t": 10, "b": 50})
    content: dict[str, Any] = json.loads(figure.to_json())
    return content


def _subject(baselines: Baselines | None) -> tuple[str, str]:
    return (baselines.model, baselines.data) if baselines else ("", "")


def _lead(front: Front, baselines: Baselines | None, lossless: Point | None, progress: Progress) -> str:
    metric = html.escape(front.metric)
    if not front.points:
        return "No configuration has been evaluated yet. Once the search has run, this page shows its front."
    if lossless:
        assert baselines is not None
        standard = baselines.dense()
        assert standard is not None
        return (
            f"<strong>{lossless.cost:.2f}×</strong> the FLOPs of the dense model are enough for "
            f"<strong>{lossless.metric:.2f} %</strong> {metric}; the standard model, dense, has "
            f"{standard.metric:.2f} %. One set of weights serves every budget on this page."
        )
    best, smallest = front.points[-1], front.points[0]
    return (
        f"One set of weights, {len(front)} operating points: from {smallest.metric:.2f} % {metric} at "
        f"{smallest.cost:.2f}× the FLOPs of the dense model to {best.metric:.2f} % at {best.cost:.2f}×."
    )


def notices(study: optuna.Study, front: Front, progress: Progress) -> list[str]:
    """What whoever looks at a front has to know of it: that its study is not finished, has other objectives, ..."""
    lines = []
    if progress.state == "running":
        lines.append(f"This study is still running ({progress}); this is how far it was.")
    elif progress.state == "stopped":
        lines.append(f"This study has stopped short of its trials ({progress}).")
    others = objective_names(study)[2:]
    if others:
        lines.append(
            f"This study has {len(others) + 2} objectives. The front shown is that of {front.metric} against FLOPs; "
            f"{', '.join(others)} can be read off the points."
        )
    if front.extrapolated:
        lines.append(
            f"{len(front.extrapolated)} points below {front.low:.3f}× FLOPs are smaller than anything that training "
            "reached. Figures show them as open circles; the front and its area leave them out."
        )
    return lines


def _error_note(front: Front, baselines: Baselines | None) -> str:
    standard = baselines.dense() if baselines else None
    if not baselines or not baselines.examples or not standard or "acc" not in front.metric:
        return ""
    error = standard_error(standard.metric, baselines.examples)
    return (
        f"Standard error of an accuracy over {baselines.examples:,} examples: {error:.2f} points. The front was chosen "
        "on these examples, so its points flatter themselves; differences within the error mean little."
    )


def _table_html(rows: Sequence[Row], metric: str) -> str:
    if not rows:
        return '<p class="empty">Nothing has been measured yet.</p>'
    changes = any(row.change is not None for row in rows)
    heading = ["", f"{html.escape(metric)} (%)", "FLOPs", *(["change"] if changes else []), "configuration"]
    lines = ["<div class=scroll><table><thead><tr>", *(f"<th>{name}</th>" for name in heading), "</tr></thead><tbody>"]
    for row in rows:
        lines.append(f"<tr><th>{html.escape(row.name)}</th>")
        if row.metric is None or row.cost is None:
            lines.append(f'<td colspan="{len(heading) - 1}" class="note">{html.escape(row.note)}</td></tr>')
            continue
        change = "" if row.change is None else f"{row.change:+.2f}"
        lines.append(f"<td>{row.metric:.2f}</td><td>{row.cost:.3f}×</td>{f'<td>{change}</td>' if changes else ''}")
        lines.append(f'<td class="config">{"-".join(map(str, row.lengths)) or "dense"}</td></tr>')
    return "".join([*lines, "</tbody></table></div>"])


def _points_html(front: Front) -> str:
    if not front.points:
        return ""
    lines = [
        f"<details><summary>All {len(front)} points of the front</summary><div class=scroll><table><thead><tr>"
        f"<th>FLOPs</th><th>{html.escape(front.metric)} (%)</th><th>trial</th><th>configuration</th></tr></thead>"
        "<tbody>"
    ]
    for point in front.points:
        number = "" if point.number is None else point.number
        lines.append(f"<tr><td>{point.cost:.4f}×</td><td>{point.metric:.2f}</td><td>{number}</td>")
        lines.append(f'<td class="config">{point.text}</td></tr>')
    return "".join([*lines, "</tbody></table></div></details>"])


_SECTIONS = {
    "auc": (
        "The search",
        "Area under the front after each generation: the mean metric that a budget between the smallest and the full "
        "model buys. Where no point is cheap enough it counts as nothing.",
    ),
    "lengths": ("Lengths along the front", "How many word vectors each layer keeps, from the cheapest point upwards."),
    "latency": ("Latency", "Measured latency of the evaluated configurations over their FLOPs."),
}


def _section(name: str) -> str:
    heading, text = _SECTIONS[name]
    return f'<section><h2>{heading}</h2><p>{text}</p><div class="plot" id="figure-{name}"></div></section>'


def _words_section(words: Sequence[KeptWords]) -> str:
    if not words:
        return ""
    text = "Each line shows what is left after a layer; words that fade have been dropped."
    return f"<section><h2>Which words stay</h2><p>{text}</p>{''.join(map(_words_html, words))}</section>"


def _facts(
    study: optuna.Study, front: Front, baselines: Baselines | None, progress: Progress, about: Mapping[str, str]
) -> dict[str, str]:
    facts = {"study": study.study_name}
    if baselines:
        facts |= {
            "model": baselines.model,
            "data": baselines.data,
            "protocol": baselines.protocol,
            "hardware": baselines.hardware,
        }
    facts |= {
        "objectives": ", ".join(
            f"{name} ({direction.name.lower()})"
            for name, direction in zip(objective_names(study), study.directions, strict=True)
        ),
        "trials": str(progress),
        "front": f"{len(front)} points, area under the front {front.auc():.3f} %" if front.points else "no points yet",
    }
    if front.low is not None:
        facts["trained range"] = f"down to {front.low:.3f}× FLOPs"
    if progress.first and progress.last:
        facts["search"] = (
            f"{progress.first:%Y-%m-%d %H:%M} to {progress.last:%Y-%m-%d %H:%M}, "
            f"{_duration(progress.seconds)} of evaluation"
        )
    if progress.workers or progress.devices:
        count = len(progress.workers)
        workers = f"{count} worker{'s' if count != 1 else ''}" if count else ""
        facts["workers"] = ", ".join(part for part in (workers, ", ".join(progress.devices)) if part)
    facts |= dict(baselines.about) if baselines else {}
    facts |= dict(about)
    if not any(name.lower() == "versions" for name in facts):
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in _versions().items())
    return {key: value for key, value in facts.items() if value}


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    return str(timedelta(seconds=math.ceil(seconds))) + " h"


def _facts_html(facts: Mapping[str, str]) -> str:
    lines = [f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items()]
    return f"<dl>{''.join(lines)}</dl>"
