"""What a study comes to, in few lines: how far it is, the table of what stands out, the terminal (paper: Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from lat_optuna.search.front import Baselines, Front, Measured, Point, objective_names, seconds_of, standard_error

if TYPE_CHECKING:
    import optuna
    from rich.table import Table

FINISHED = ("COMPLETE", "PRUNED")
NO_FAILURE = ("lost claim", "handed back")
SHARES = ("accuracy", "exact_match")
"""Metrics that are a share of right answers, whose standard error follows from the number of examples."""
SEARCH_SPLIT, REPORTING_SPLIT = "search split", "validation split"

# ---------------------------------------------------------------------- how far a study is


@dataclass(frozen=True)
class Progress:
    """How far a study is.

    Attributes:
        finished: Trials that count towards the budget of trials.
        pruned: Those of them that were given up on before their last example, and so have no values.
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
    pruned: int
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
        return cls(
            finished=len(ended),
            pruned=sum(trial.state.name == "PRUNED" for trial in ended),
            # A claim that came second, or that was handed back, is no failure.
            failed=sum(t.state.name == "FAIL" and t.user_attrs.get("fail") not in NO_FAILURE for t in trials),
            running=sum(t.state.name == "RUNNING" for t in trials),
            target=target,
            first=min((trial.datetime_start for trial in trials if trial.datetime_start), default=None),
            last=max((trial.datetime_complete for trial in ended if trial.datetime_complete), default=None),
            seconds=sum(seconds_of(trial) or 0.0 for trial in ended),
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
        pruned = f", {self.pruned} of them pruned" if self.pruned else ""
        failed = f", {self.failed} failed" if self.failed else ""
        running = f", {self.running} under way" if self.running else ""
        return f"{self.finished}{of} trials{pruned}{running}{failed}"


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


def duration(seconds: float) -> str:
    """A wall time for people: ``"30.5 s"``, ``"6 min 34 s"``, ``"1 h 05 min"``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min {rest:02} s"


# ---------------------------------------------------------------------- which rows a figure is from


@dataclass(frozen=True)
class Splits:
    """Which rows a study's figures were measured on.

    Attributes:
        apart: Whether the search selected on rows of its own, so that those of the report are fresh.
        searched: Number of examples that the search selected on, where it is known.
        reported: Number of examples of the reporting split, where they are others and measured.
    """

    apart: bool
    searched: int | None
    reported: int | None

    @classmethod
    def of(cls, front: Front, baselines: Baselines | None = None) -> Splits:
        """The splits of a front and of what it is compared with."""
        measured: tuple[Measured | Point, ...] = (*front.points, *(baselines.standard if baselines else ()))
        return cls(
            apart=bool(front.examples) or any(point.reported is not None for point in measured),
            searched=front.examples.get("search", baselines.examples if baselines else None),
            reported=front.examples.get("reported"),
        )

    @property
    def searched_name(self) -> str:
        """``"search split"``, or ``"validation split"`` where the search has none of its own."""
        return SEARCH_SPLIT if self.apart else REPORTING_SPLIT

    def error(self, metric: str, value: float, *, reported: bool = False) -> float | None:
        """Standard error of a share of right answers; ``None`` for other metrics, or if the number is unknown."""
        examples = self.reported if reported else self.searched
        return standard_error(value, examples) if examples and metric in SHARES else None


def counted(name: str, examples: int | None) -> str:
    """A split's name with its number of examples: ``"search split, 2,000 examples"``."""
    return f"{name}, {examples:,} examples" if examples else name


# ---------------------------------------------------------------------- the table (Table 1)


@dataclass(frozen=True)
class Row:
    """A line of the table that sums a study up.

    Attributes:
        name: What the line is about.
        metric: The metric in percent, on the split that was searched on; ``None`` where there is no such point.
        cost: FLOPs as a fraction of the dense model's.
        change: Metric less that of the standard dense model, where that is known: on the reporting split where the
            study has one, else on the one that was searched on.
        lengths: The configuration; empty for dense models.
        number: Number of the trial.
        note: Said instead of figures where there are none.
        error: Standard error of ``metric``, where it is known.
        reported: The metric on the reporting split, where it was measured.
        reported_error: Its standard error.
    """

    name: str
    metric: float | None = None
    cost: float | None = None
    change: float | None = None
    lengths: tuple[int, ...] = ()
    number: int | None = None
    note: str = ""
    error: float | None = None
    reported: float | None = None
    reported_error: float | None = None


def row(name: str, point: Measured | Point, front: Front, baselines: Baselines | None = None) -> Row:
    """The line about a point; ``front`` and ``baselines`` say which rows it was measured on, and the change."""
    splits = Splits.of(front, baselines)
    reported = point.reported
    return Row(
        name,
        point.metric,
        point.cost,
        change(point, splits, baselines),
        point.lengths,
        point.number if isinstance(point, Point) else None,
        error=splits.error(front.metric, point.metric),
        reported=reported,
        reported_error=None if reported is None else splits.error(front.metric, reported, reported=True),
    )


def change(point: Measured | Point, splits: Splits, baselines: Baselines | None) -> float | None:
    """A point's metric less the standard dense model's, both on the reporting split where the study has one."""
    standard = baselines.dense() if baselines else None
    if standard is None:
        return None
    if not splits.apart:
        return point.metric - standard.metric
    return None if point.reported is None or standard.reported is None else point.reported - standard.reported


def table(front: Front, baselines: Baselines | None = None) -> list[Row]:
    """Dense models, best point, cheapest point without loss against the standard model, smallest point."""
    standard = baselines.dense() if baselines else None
    adaptive = baselines.dense("length_adaptive") if baselines else None
    rows = []
    if standard:
        rows.append(row("standard model, dense", standard, front, baselines))
    if adaptive:
        rows.append(row("length-adaptive model, dense", adaptive, front, baselines))
    if front.points:
        rows.append(row("best point", front.points[-1], front, baselines))
        if standard:
            lossless = without_loss(front, baselines)
            name = "cheapest point without loss"
            missing = f"no point reaches the standard model's {standard.metric:.2f}"
            rows.append(row(name, lossless, front, baselines) if lossless else Row(name, note=missing))
        rows.append(row("smallest point", front.points[0], front, baselines))
    return rows


def without_loss(front: Front, baselines: Baselines | None) -> Point | None:
    """The cheapest point at least as good as the standard dense model; ``None`` if there is none or it is unknown.

    Both on the split that was searched on: what is reported on another one has no part in choosing.
    """
    standard = baselines.dense() if baselines else None
    if standard is None or not any(point.metric >= standard.metric for point in front.points):
        return None
    return front.pick(max_drop=0.0, dense=standard.metric)


def with_error(value: float | None, error: float | None = None) -> str:
    """``"88.65 ± 0.71"``; empty where there is no value."""
    if value is None:
        return ""
    return f"{value:.2f}" if error is None else f"{value:.2f} ± {error:.2f}"


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
    apart = any(Splits.of(front, baselines.get(name)).apart for name, front in fronts.items())
    heading = ["study", "point", "metric", *(["validation"] if apart else []), "FLOPs", "change", "AUC"]
    lines = []
    for name, front in fronts.items():
        splits = Splits.of(front, baselines.get(name))
        for line in table(front, baselines.get(name)) or [Row("nothing has been evaluated yet")]:
            shown, reported = with_error(line.metric, line.error), with_error(line.reported, line.reported_error)
            where = " (search)" if splits.apart and shown else ""
            lines.append(
                [
                    name,
                    line.name + (f": {line.note}" if line.note else ""),
                    f"{shown} {front.metric}{where}" if shown else "",
                    *([reported] if apart else []),
                    "" if line.cost is None else f"{line.cost:.3f}x",
                    "" if line.change is None else f"{line.change:+.2f}",
                    f"{front.auc():.3f}" if front.points else "",
                    "-".join(map(str, line.lengths)),
                ]
            )
    return _aligned([*heading, "configuration"], lines)


def splits_line(front: Front, baselines: Baselines | None = None) -> str:
    """Which rows the figures of a terminal's table are from; empty where that is unknown."""
    splits = Splits.of(front, baselines)
    if not splits.apart:
        return f"{front.metric}: on the {counted(splits.searched_name, splits.searched)}" if splits.searched else ""
    chosen = f"search: {front.metric} on the {counted(splits.searched_name, splits.searched)}, where points were chosen"
    return f"{chosen}; validation: on the {counted(REPORTING_SPLIT, splits.reported)}, which the search never saw"


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
    splits = Splits.of(front, baselines)
    changes = baselines is not None and baselines.dense() is not None
    lossless = without_loss(front, baselines)
    count = len(front)
    shown = set(range(count))
    if count > limit:
        shown = {round(i * (count - 1) / (max(limit, 2) - 1)) for i in range(max(limit, 2))}
        if lossless:
            shown.add(front.points.index(lossless))
    values = ["search", "validation"] if splits.apart else [front.metric]
    heading = ["FLOPs", *values, *(["change"] if changes else []), "trial", "configuration", ""]
    lines = []
    for index in sorted(shown):
        point = front.points[index]
        one = row("", point, front, baselines)
        line = [f"{point.cost:.3f}x", with_error(one.metric, one.error)]
        if splits.apart:
            line.append(with_error(one.reported, one.reported_error))
        if changes:
            line.append("" if one.change is None else f"{one.change:+.2f}")
        line += ["" if point.number is None else str(point.number), point.text]
        lines.append([*line, "no loss" if point is lossless else ""])
    return heading, lines


def front_plot(front: Front, width: int = 64, height: int = 12) -> str:
    """The front as a small plot of characters: metric upwards, cost to the right."""
    if len(front) < 2:
        return ""
    low, high = front.points[0].cost, front.points[-1].cost
    metrics = [point.metric for point in front.points]
    bottom, top = min(metrics), max(metrics)
    if bottom == top:
        return ""
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
