"""What a study comes to, in few lines: how far it is, the table of what stands out, the terminal (paper: Table 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from lat_optuna.search.front import Baselines, Front, Measured, Point, objective_names, seconds_of

if TYPE_CHECKING:
    import optuna
    from rich.table import Table

FINISHED = ("COMPLETE", "PRUNED")
NO_FAILURE = ("lost claim", "handed back")

# ---------------------------------------------------------------------- how far a study is


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
        return cls(
            finished=len(ended),
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
        failed = f", {self.failed} failed" if self.failed else ""
        running = f", {self.running} under way" if self.running else ""
        return f"{self.finished}{of} trials{running}{failed}"


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
