"""A study's figures as plotly objects, and as files (paper: Figures 2, 3 and 4)."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lat_optuna.files import write_text
from lat_optuna.search.front import Baselines, Front, Measured, Point
from lat_optuna.summary import REPORTING_SPLIT, SEARCH_SPLIT, Splits

if TYPE_CHECKING:
    import plotly.graph_objects as go

# The same on light and on dark ground; kept apart by dashes and symbols as well, for colour-blind readers and print.
BLUE, TEAL, ORANGE, GREY = "#2f74e0", "#0d9b86", "#dd7d1e", "#8a94a3"
COLORS = (BLUE, ORANGE, TEAL, "#b0509c", GREY, "#8a6d1f")
KINDS = ("html", "png", "svg", "pdf")
MOST_TRIALS = 600
"""Trials drawn beside the front."""


def front_figure(front: Front, baselines: Baselines | None = None, *, trials: bool = True) -> go.Figure:
    """The front over all trials, against constant ratios of both models (Figure 2), on the split that was searched on.

    Args:
        front: May be empty: the comparison is drawn all the same.
        baselines: The curves of the standard and of the length-adaptive model.
        trials: Whether to draw the trials that are not on the front.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    splits = Splits.of(front, baselines)
    on_front = set(front.points)
    if trials and len(front.evaluated) > len(on_front):
        beaten = [point for point in front.evaluated if point not in on_front]
        # More than one can tell apart would only make the figure slow.
        some = beaten[:: math.ceil(len(beaten) / MOST_TRIALS)]
        name = "other trials" if some == beaten else f"other trials ({len(some):,} of {len(beaten):,})"
        marker = {"size": 5, "color": GREY, "opacity": 0.4}
        figure.add_scatter(**_scatter(some, front), name=name, mode="markers", marker=marker)
    _add_constant_ratios(figure, front, baselines, reported=False)
    if front.extrapolated:
        figure.add_scatter(
            **_scatter(front.extrapolated, front),
            name="below the trained range",
            mode="markers",
            marker={"size": 8, "symbol": "circle-open", "color": BLUE},
        )
    if front.points:
        _add_band(figure, front, splits)
        figure.add_scatter(
            **_scatter(front.points, front),
            name="Pareto front",
            mode="lines+markers",
            line={"color": BLUE, "width": 2, "shape": "hv"},
            marker={"size": 9 if len(front) <= 40 else 6},
        )
    known = splits.apart or splits.searched
    return _laid_out(
        figure,
        f"{html.escape(front.metric)} against compute",
        {"title": "FLOPs relative to the dense model", "ticksuffix": "×"},
        {"title": f"{html.escape(front.metric)} (%)" + (f", {splits.searched_name}" if known else "")},
    )


def reported_figure(front: Front, baselines: Baselines | None = None) -> go.Figure | None:
    """The front's points and the constant ratios on the reporting split, which the search never saw (Figure 2).

    ``None`` where the search has no split of its own, or nothing has been measured on the other one yet.
    """
    import plotly.graph_objects as go

    points = [point for point in front.points if point.reported is not None]
    if not points:
        return None
    figure = go.Figure()
    splits = Splits.of(front, baselines)
    _add_constant_ratios(figure, front, baselines, reported=True)
    errors = [splits.error(front.metric, point.reported or 0.0, reported=True) for point in points]
    metric = html.escape(front.metric)
    figure.add_scatter(
        **_scatter(points, front)
        | {
            "y": [point.reported for point in points],
            "hovertemplate": f"<b>{metric} %{{y:.2f}} % at %{{x:.3f}}× FLOPs</b>, {REPORTING_SPLIT}"
            "<br>%{text}<extra></extra>",
        },
        # Not joined by a line: on these rows the points need not be a front.
        name="points of the front (± one standard error)" if errors[0] else "points of the front",
        mode="markers",
        marker={"color": BLUE, "size": 8},
        error_y={"array": errors, "thickness": 1, "width": 0, "color": "rgba(47,116,224,0.45)"} if errors[0] else None,
    )
    return _laid_out(
        figure,
        f"{metric} on rows that the search never saw",
        {"title": "FLOPs relative to the dense model", "ticksuffix": "×"},
        {"title": f"{metric} (%), {REPORTING_SPLIT}"},
    )


def _add_constant_ratios(figure: go.Figure, front: Front, baselines: Baselines | None, *, reported: bool) -> None:
    """Both models when every layer drops the same share, on one of the splits."""
    if baselines is None:
        return
    metric = html.escape(front.metric)

    def value(point: Measured) -> float | None:
        return point.reported if reported else point.metric

    for name, color, symbol in (("standard", ORANGE, "square"), ("length_adaptive", TEAL, "diamond")):
        points = sorted(getattr(baselines, name), key=lambda point: point.cost)
        curve = [point for point in points if value(point) is not None]
        if not curve:
            continue
        label = name.replace("_", "-")
        figure.add_scatter(
            x=[round(point.cost, 5) for point in curve],
            y=[value(point) for point in curve],
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
    dense = None if standard is None else value(standard)
    if dense is not None:
        figure.add_hline(
            y=dense,
            line={"color": ORANGE, "width": 1, "dash": "dot"},
            annotation={
                "text": f"standard model, dense: {dense:.2f} %",
                "font": {"color": ORANGE, "size": 12},
                "yanchor": "bottom",
            },
            annotation_position="top left",
        )


def _add_band(figure: go.Figure, front: Front, splits: Splits) -> None:
    """One standard error around the front, where it is known: smaller differences mean little."""
    errors = [splits.error(front.metric, point.metric) for point in front.points]
    for sign, filled in ((-1, None), (1, "tonexty")):
        if all(error is not None for error in errors):
            figure.add_scatter(
                x=[round(point.cost, 5) for point in front.points],
                y=[round(point.metric + sign * (e or 0.0), 3) for point, e in zip(front.points, errors, strict=True)],
                mode="lines",
                line={"width": 0, "shape": "hv", "color": BLUE},
                fill=filled,
                fillcolor="rgba(47,116,224,0.13)",
                name="± one standard error",
                showlegend=filled is not None,
                hoverinfo="skip",
            )


def compare_figure(fronts: Mapping[str, Front]) -> go.Figure:
    """The fronts of several studies in one figure, by name.

    Lines are on the split that each was searched on; where a study has another one to report on, its points' values
    there are open symbols.
    """
    import plotly.graph_objects as go

    figure = go.Figure()
    for index, (name, front) in enumerate(fronts.items()):
        color = COLORS[index % len(COLORS)]
        splits = Splits.of(front)
        label = html.escape(name)
        figure.add_scatter(
            **_scatter(front.points, front),
            name=f"{label}, {splits.searched_name}" if splits.apart else label,
            mode="lines+markers",
            line={"width": 3, "shape": "hv", "color": color},
            marker={"size": 8, "symbol": index % 8},
        )
        reported = [point for point in front.points if point.reported is not None]
        if reported:
            figure.add_scatter(
                **_scatter(reported, front) | {"y": [point.reported for point in reported]},
                name=f"{label}, {REPORTING_SPLIT}",
                mode="markers",
                marker={"size": 8, "symbol": index % 8 + 100, "color": color},
            )
    metrics = ", ".join(dict.fromkeys(html.escape(front.metric) for front in fronts.values()))
    x_axis = {"title": "FLOPs relative to each study's dense model", "ticksuffix": "×"}
    return _laid_out(figure, "Fronts of several studies", x_axis, {"title": f"{metrics} (%)"})


def auc_figure(front: Front) -> go.Figure:
    """Area under the front after each generation of the search, in what it selects by (Figure 4)."""
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
    x_axis: dict[str, Any] = {"title": "generation (0: initial population)", "tickformat": "d"}
    if len(generations) <= 12:
        x_axis["dtick"] = 1
    title = f"Area under the front, {SEARCH_SPLIT}" if front.examples else "Area under the front"
    return _laid_out(figure, title, x_axis, {"title": f"mean {html.escape(front.selected_by)} over budgets (%)"})


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


def study_figures(front: Front, baselines: Baselines | None = None) -> dict[str, go.Figure]:
    """The figures of a study, by name; those for which there is nothing to draw are left out."""
    drawn = {
        "front": front_figure(front, baselines),
        "reported": reported_figure(front, baselines),
        "auc": auc_figure(front) if front.points else None,
        "lengths": lengths_figure(front) if front.points else None,
        "latency": latency_figure(front),
    }
    return {name: figure for name, figure in drawn.items() if figure is not None}


def export_figure(figure: go.Figure, path: str | os.PathLike[str]) -> Path:
    """Write a figure as ``.html`` (self-contained), or as ``.png``, ``.svg`` or ``.pdf`` by plotly's own exporter.

    Raises:
        ValueError: The ending is another, or the exporter or its browser is missing (the message says which).
    """
    path = Path(path)
    return export_figures({path.stem: figure}, path.parent, path.suffix.lower().removeprefix("."))[0]


def export_figures(drawn: Mapping[str, go.Figure], folder: str | os.PathLike[str], kind: str) -> list[Path]:
    """Write figures into a folder as ``NAME.kind``; see :func:`export_figure`, also for what is raised."""
    folder = Path(folder)
    paths = [folder / f"{name}.{kind}" for name in drawn]
    if kind not in KINDS:
        raise ValueError(f"{paths[0]}: a figure is written as .html, .png, .svg or .pdf")
    folder.mkdir(parents=True, exist_ok=True)
    if kind == "html":
        for figure, path in zip(drawn.values(), paths, strict=True):
            write_text(path, figure.to_html(include_plotlyjs=True))
        return paths
    otherwise = "Write .html instead, or use the camera button of the figures in the report"
    try:
        import kaleido
        from kaleido.errors import ChromeNotFoundError
    except ImportError:
        needed = f"plotly exports {kind} through kaleido: `pip install kaleido`"
        raise ValueError(f"{paths[0]}: {needed}. {otherwise}") from None
    size = {"format": kind, "width": 900, "height": 560, "scale": 2}
    pictures = [{"fig": figure, "path": path, "opts": size} for figure, path in zip(drawn.values(), paths, strict=True)]
    try:
        # One browser for all of them; without MathJax, which it would fetch from a network.
        kaleido.write_fig_from_object_sync(pictures, kopts={"mathjax": False})
    except ChromeNotFoundError:
        raise ValueError(
            f"{paths[0]}: plotly exports {kind} through a browser, and finds no Chrome or Chromium: install one "
            f"(`apt-get install chromium`, `plotly_get_chrome`) or name it in BROWSER_PATH. {otherwise}"
        ) from None
    # What a browser that does not start raises has no common class.
    except Exception as error:
        raise ValueError(
            f"{paths[0]}: plotly's exporter failed: {type(error).__name__}: {' '.join(str(error).split())[:120]}. "
            f"{otherwise}"
        ) from error
    return paths


def _scatter(points: Sequence[Point], front: Front) -> dict[str, Any]:
    metric = html.escape(front.metric)
    return {
        "x": [round(point.cost, 5) for point in points],
        "y": [point.metric for point in points],
        "text": [_hover(point) for point in points],
        "hovertemplate": f"<b>{metric} %{{y:.2f}} % at %{{x:.3f}}× FLOPs</b><br>%{{text}}<extra></extra>",
    }


def origin(point: Point) -> str:
    """Where a point comes from: ``"trial 31, generation 1, mutation"``."""
    parts = [] if point.number is None else [f"trial {point.number}"]
    if point.generation is not None:
        parts.append(f"generation {point.generation}")
    if point.operation is not None:
        parts.append(point.operation)
    return ", ".join(parts)


def _hover(point: Point) -> str:
    extra = [f"{html.escape(name)} {value:.4g}" for name, value in point.extra.items()]
    if point.reported is not None:
        extra.insert(0, f"{point.reported:.2f} % on the {REPORTING_SPLIT}")
    return "<br>".join(part for part in (point.text, html.escape(origin(point)), ", ".join(extra)) if part)


def _laid_out(figure: go.Figure, title: str, x_axis: dict[str, Any], y_axis: dict[str, Any]) -> go.Figure:
    figure.update_layout(
        # plotly's default template is 7 kB a figure, too much for where the dashboard keeps figures.
        template={"layout": {"colorway": COLORS}},
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
