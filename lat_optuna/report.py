"""The report of a study as one HTML file (paper: Figures 2, 3 and 4, Table 1)."""

from __future__ import annotations

import html
import json
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lat_optuna.figures import origin, study_figures
from lat_optuna.files import write_text
from lat_optuna.search.front import Baselines, Front, Point, objective_names
from lat_optuna.summary import (
    REPORTING_SPLIT,
    SEARCH_SPLIT,
    Progress,
    Row,
    Splits,
    counted,
    duration,
    notices,
    row,
    table,
    with_error,
    without_loss,
)

if TYPE_CHECKING:
    import optuna
    import plotly.graph_objects as go

PACKAGES = ("lat-optuna", "torch", "transformers", "optuna", "datasets")
TEMPLATES = Path(__file__).parent / "templates"

FRONT_COMMAND = "lat-optuna front {study} --budget {budget}"
PYTHON_LINES = """\
import lat_optuna, transformers
model = lat_optuna.load("{checkpoint}", budget={budget})
tokenizer = transformers.AutoTokenizer.from_pretrained("{checkpoint}")
outputs = model(**tokenizer("Any text of yours.", return_tensors="pt"))"""

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
    splits = Splits.of(front, baselines)
    drawn = study_figures(front, baselines)
    lossless = without_loss(front, baselines)
    data = {
        "figures": {name: _for_page(figure) for name, figure in drawn.items()},
        "points": [
            {
                "lengths": list(point.lengths),
                "text": point.text,
                "metric": point.metric,
                "cost": point.cost,
                "origin": origin(point),
                "tiles": _tiles(point, front, baselines),
            }
            for point in front.points
        ],
        "maxLength": front.max_length,
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
        lead=_lead(front, baselines, lossless, splits),
        notices="".join(f'<p class="notice">{html.escape(text)}</p>' for text in notices(study, front, progress)),
        chooser="" if front.points else "hidden",
        rows=html.escape(_rows_note(front, splits)),
        tiles=_tiles_html(front, baselines, splits),
        table=_table_html(table(front, baselines), front.metric, splits),
        sections="".join(_section(name, front, splits) for name in _SECTIONS if name in drawn),
        words=_words_section(words),
        points=_points_html(front, splits),
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
    if figure.layout.yaxis.range is None and all(trace.type == "scatter" for trace in figure.data):
        # With ranges of their own, axes are not worked out anew when the mark of the chosen point moves.
        figure.update_layout(xaxis_range=_range(figure, "x"), yaxis_range=_range(figure, "y"))
    content: dict[str, Any] = json.loads(figure.to_json())
    return content


def _range(figure: go.Figure, axis: str) -> list[float] | None:
    values = [value for trace in figure.data for value in trace[axis] if value is not None]
    if not values or figure.layout[f"{axis}axis"].rangemode == "tozero":
        return None
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    return [low - room, high + room]


def _subject(baselines: Baselines | None) -> tuple[str, str]:
    return (baselines.model, baselines.data) if baselines else ("", "")


def _lead(front: Front, baselines: Baselines | None, lossless: Point | None, splits: Splits) -> str:
    metric = html.escape(front.metric)
    if not front.points:
        return "No configuration has been evaluated yet. Once the search has run, this page shows its front."
    standard = baselines.dense() if baselines else None
    if lossless and standard and lossless.cost < 1:  # the dense model itself loses nothing, which is no news
        text = (
            f"<strong>{lossless.cost:.2f}×</strong> the FLOPs of the dense model are enough for "
            f"<strong>{lossless.metric:.2f} %</strong> {metric}; the standard model, dense, has {standard.metric:.2f} %"
        )
        if lossless.reported is not None and standard.reported is not None:
            text += (
                f" ({splits.searched_name}). On rows that the search never saw, <strong>{lossless.reported:.2f} %"
                f"</strong> against {standard.reported:.2f} % ({REPORTING_SPLIT})"
            )
        return f"{text}. One set of weights serves every budget on this page."
    best, smallest = front.points[-1], front.points[0]
    text = (
        f"One set of weights, {len(front)} operating points: from {smallest.metric:.2f} % {metric} at "
        f"<strong>{smallest.cost:.2f}×</strong> the FLOPs of the dense model to {best.metric:.2f} % at {best.cost:.2f}×"
    )
    if smallest.reported is not None and best.reported is not None:
        text += (
            f" ({splits.searched_name}); {smallest.reported:.2f} % to {best.reported:.2f} % on rows that the search "
            f"never saw ({REPORTING_SPLIT})"
        )
    return f"{text}."


def _rows_note(front: Front, splits: Splits) -> str:
    """Which rows the front figure's values are from, and how sure they are."""
    parts = []
    if splits.apart:
        parts.append(f"Measured on the {counted(splits.searched_name, splits.searched)}, which the search chose on.")
        if front.search_metric is not None:
            parts.append(f"It selected by the {front.selected_by}, not by the {front.metric}.")
    elif splits.searched:
        parts.append(f"Measured on the {counted(splits.searched_name, splits.searched)}.")
    error = splits.error(front.metric, front.points[-1].metric) if front.points else None
    if error is not None:
        parts.append(f"Standard error: {error:.2f} points at the best point; smaller differences mean little.")
        if not splits.apart:
            parts.append("The front was chosen on these examples, so its points flatter themselves.")
    return " ".join(parts)


def _tiles(point: Point, front: Front, baselines: Baselines | None) -> dict[str, str]:
    """What the page says of the chosen point, by tile."""
    one = row("", point, front, baselines)
    return {
        "metric": f"{point.metric:.2f} %",
        "metric-error": _plus_minus(one.error),
        "reported": "not measured" if one.reported is None else f"{one.reported:.2f} %",
        "reported-error": _plus_minus(one.reported_error),
        "cost": f"{point.cost:.3f}×",
        "change": "–" if one.change is None else f"{one.change:+.2f}".replace("-", "−"),
    }


def _plus_minus(error: float | None) -> str:
    return "" if error is None else f"± {error:.2f}"


def _tiles_html(front: Front, baselines: Baselines | None, splits: Splits) -> str:
    metric = html.escape(front.metric)
    known = splits.apart or splits.searched
    tiles = [("metric", f"{metric}, {splits.searched_name}" if known else metric)]
    if splits.apart:
        tiles.append(("reported", f"{metric}, {REPORTING_SPLIT}"))
    tiles.append(("cost", "of the dense model’s FLOPs"))
    if baselines and baselines.dense():
        where = f", {REPORTING_SPLIT}" if splits.apart else ""
        tiles.append(("change", f"points against the standard model{where}"))
    return "".join(
        f'<div><b id="tile-{name}"></b>'
        + (f' <i id="tile-{name}-error"></i>' if name in ("metric", "reported") else "")
        + f"<small>{text}</small></div>"
        for name, text in tiles
    )


def _table_html(rows: Sequence[Row], metric: str, splits: Splits) -> str:
    if not rows:
        return '<p class="empty">Nothing has been measured yet.</p>'
    changes = any(row.change is not None for row in rows)
    name = html.escape(metric)
    values = [f"{name} (%)<br>{_where(splits)}", *([f"{name} (%)<br>{_where(splits, True)}"] if splits.apart else [])]
    heading = ["", *values, "FLOPs", *([f"change<br>{_change_where(splits)}"] if changes else []), "configuration"]
    lines = ["<div class=scroll><table><thead><tr>", *(f"<th>{name}</th>" for name in heading), "</tr></thead><tbody>"]
    for one in rows:
        lines.append(f"<tr><th>{html.escape(one.name)}</th>")
        if one.metric is None or one.cost is None:
            lines.append(f'<td colspan="{len(heading) - 1}" class="note">{html.escape(one.note)}</td></tr>')
            continue
        lines.append(f"<td>{with_error(one.metric, one.error)}</td>")
        if splits.apart:
            lines.append(f"<td>{with_error(one.reported, one.reported_error)}</td>")
        change = "" if one.change is None else f"{one.change:+.2f}"
        lines.append(f"<td>{one.cost:.3f}×</td>{f'<td>{change}</td>' if changes else ''}")
        lines.append(f'<td class="config">{"-".join(map(str, one.lengths)) or "dense"}</td></tr>')
    return "".join([*lines, "</tbody></table></div>"])


def _where(splits: Splits, reported: bool = False) -> str:
    if reported:
        return counted(REPORTING_SPLIT, splits.reported)
    return counted(splits.searched_name, splits.searched) if splits.apart or splits.searched else ""


def _change_where(splits: Splits) -> str:
    return REPORTING_SPLIT if splits.apart else ""


def _points_html(front: Front, splits: Splits) -> str:
    if not front.points:
        return ""
    metric = html.escape(front.metric)
    values = [f"{metric} (%)"] if not splits.apart else [f"{metric} (%), {SEARCH_SPLIT}", REPORTING_SPLIT]
    headings = ["FLOPs", *values, "trial", "configuration"]
    lines = [
        f"<details><summary>All {len(front)} points of the front</summary><div class=scroll><table><thead><tr>",
        *(f"<th>{name}</th>" for name in headings),
        "</tr></thead><tbody>",
    ]
    for point in front.points:
        number = "" if point.number is None else point.number
        lines.append(f"<tr><td>{point.cost:.4f}×</td><td>{point.metric:.2f}</td>")
        if splits.apart:
            lines.append(f"<td>{with_error(point.reported)}</td>")
        lines.append(f'<td>{number}</td><td class="config">{point.text}</td></tr>')
    return "".join([*lines, "</tbody></table></div></details>"])


_SECTIONS = {
    "reported": (
        "On rows that the search never saw",
        "The points of the front, measured once more when the search had ended, on the {reported}. Choosing among many "
        "configurations flatters the chosen ones where they were chosen; here it does not.",
    ),
    "auc": (
        "The search",
        "Area under the front after each generation, on the {searched}: the mean {selected} that a budget between the "
        "smallest and the full model buys. Where no point is cheap enough it counts as nothing.",
    ),
    "lengths": ("Lengths along the front", "How many word vectors each layer keeps, from the cheapest point upwards."),
    "latency": ("Latency", "Measured latency of the evaluated configurations over their FLOPs."),
}


def _section(name: str, front: Front, splits: Splits) -> str:
    heading, text = _SECTIONS[name]
    text = text.format(
        reported=counted(REPORTING_SPLIT, splits.reported),
        searched=splits.searched_name,
        selected=html.escape(front.selected_by),
    )
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
        "rows": _rows_fact(front, baselines),
        "front": f"{len(front)} points, area under the front {front.auc():.3f} %" if front.points else "no points yet",
    }
    if front.low is not None:
        facts["trained range"] = f"down to {front.low:.3f}× FLOPs"
    if progress.first and progress.last:
        facts["search"] = (
            f"{progress.first:%Y-%m-%d %H:%M} to {progress.last:%Y-%m-%d %H:%M}, "
            f"{duration(progress.seconds)} of evaluation"
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


def _rows_fact(front: Front, baselines: Baselines | None) -> str:
    splits = Splits.of(front, baselines)
    if not splits.apart:
        return f"searched and reported on the {counted(REPORTING_SPLIT, splits.searched)}" if splits.searched else ""
    searched, reported = counted(SEARCH_SPLIT, splits.searched), counted(REPORTING_SPLIT, splits.reported)
    by = "" if front.search_metric is None else f" by {front.search_metric}"
    return f"searched on the {searched}{by}; reported on the {reported}"


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _facts_html(facts: Mapping[str, str]) -> str:
    lines = [f"<dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd>" for key, value in facts.items()]
    return f"<dl>{''.join(lines)}</dl>"
