"""Long work shows a bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import click

SECONDS_BETWEEN_LINES = 10.0


class Update(Protocol):
    """Tells how far the work is; ``figures`` are shown beside the count."""

    def __call__(self, done: float, total: float | None = None, **figures: Any) -> None:
        """Show that ``done`` of ``total`` (unchanged if ``None``) is done."""


@contextmanager
def progress(label: str, total: float, unit: str = "") -> Iterator[Update]:
    """Show the progress of one piece of work.

    Args:
        label: What is being done.
        total: How much there is to do; an update may correct it.
        unit: What is counted: ``"steps"``, ``"trials"``.

    Yields:
        A function to call with what is done so far, and figures such as ``loss=0.31``.
    """
    if sys.stderr.isatty():
        with _bar(label, total, unit) as update:
            yield update
    else:
        with _lines(label, total, unit) as update:
            yield update


@contextmanager
def _bar(label: str, total: float, unit: str) -> Iterator[Update]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.fields[figures]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bars:
        task = bars.add_task(label, total=total, figures="")

        def update(done: float, total: float | None = None, **figures: Any) -> None:
            bars.update(task, completed=done, total=total)
            if figures:
                bars.update(task, figures=_figures(figures))

        yield update


@contextmanager
def _lines(label: str, total: float, unit: str) -> Iterator[Update]:
    start = time.monotonic()
    last_line = -1e9
    last: tuple[float, float, str] = (0, total, "")

    def show() -> None:
        done, of, figures = last
        seconds = time.monotonic() - start
        click.echo(f"{label}: {done:g}/{of:g} {unit}, {seconds:.0f} s  {figures}".rstrip(), err=True)

    shown: tuple[float, float, str] | None = None

    def update(done: float, total: float | None = None, **figures: Any) -> None:
        nonlocal last, last_line, shown
        last = (done, total or last[1], _figures(figures) or last[2])
        if time.monotonic() - last_line >= SECONDS_BETWEEN_LINES:
            show()
            shown, last_line = last, time.monotonic()

    yield update
    if shown != last:
        show()


def _figures(figures: dict[str, Any]) -> str:
    return "  ".join(
        f"{name.replace('_', ' ')} {value:.4g}" if isinstance(value, float) else f"{name.replace('_', ' ')} {value}"
        for name, value in figures.items()
        if value is not None
    )
