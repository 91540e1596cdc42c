"""A study in optuna-dashboard: a note, our figures, and the server."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import click

from lat_optuna import figures, summary
from lat_optuna.search.front import Baselines, Front, objective_names

if TYPE_CHECKING:
    import optuna
    from optuna.storages import BaseStorage

MOST_POINTS = 40
"""Points of the front in a figure of the dashboard, which keeps figures as attributes of the study, 2,045 characters
each, that samplers which look at study attributes read at every trial."""

# ---------------------------------------------------------------------- what a study says of itself


def annotate(
    study: optuna.Study,
    baselines: Baselines | None = None,
    *,
    front: Front | None = None,
    n_trials: int | None = None,
) -> None:
    """Write the study's note and our figures, in place of those of the last call.

    One process at a time: two would mix their pieces.

    Args:
        study: Objectives as :meth:`Front.of` wants them.
        baselines: What the front is compared with, and what was run.
        front: The study's front, where it is at hand.
        n_trials: Trials that the study shall have.

    Raises:
        ValueError: See :meth:`Front.of`.
    """
    from optuna_dashboard import save_note, save_plotly_graph_object

    front = Front.of(study) if front is None else front
    save_note(study, note(study, baselines, front=front, n_trials=n_trials))
    few = replace(front, points=_spread(front.points, MOST_POINTS))
    drawn = {"front": figures.front_figure(few, baselines, trials=False)}
    reported = figures.reported_figure(few, baselines)
    drawn |= {"reported": reported} if reported else {}
    if front.points:
        drawn |= {"area-under-the-front": figures.auc_figure(front), "lengths": figures.lengths_figure(few)}
    if any("latency_ms" in point.extra for point in front.evaluated):
        latency = figures.latency_figure(replace(front, evaluated=few.points))
        drawn |= {"latency": latency} if latency else {}
    for name, figure in drawn.items():
        figure.update_layout(height=480)
        save_plotly_graph_object(study, figure, graph_object_id=name)


def note(study: optuna.Study, baselines: Baselines | None = None, *, front: Front, n_trials: int | None = None) -> str:
    """The study's note in Markdown: what was trained on what, how far the search is, the best points."""
    lines = [f"## {_plain(study.study_name)}", ""]
    if baselines:
        subject = " on ".join(_plain(part) for part in (baselines.model, baselines.data) if part)
        lines += [f"**{subject}**" if subject else "", ""]
        named = (("Protocol", baselines.protocol), ("Hardware", baselines.hardware), *baselines.about.items())
        lines += [f"- {_plain(name)}: {_plain(value)}" for name, value in named if value]
    progress = summary.Progress.of(study, n_trials)
    lines += [f"- Search: {progress.state}, {progress}"]
    if front.points:
        lines += [f"- Front: {len(front)} points, area under it {front.auc():.3f} %"]
    if front.low is not None:
        lines += [f"- Trained range: down to {front.low:.3f}× FLOPs; points below are extrapolated"]
    splits = summary.Splits.of(front, baselines)
    if line := summary.splits_line(front, baselines):
        lines += [f"- Rows: {_plain(line)}"]
    lines += [f"- Objectives: {', '.join(map(_plain, objective_names(study)))}", ""]
    rows = summary.table(front, baselines)
    if rows:
        metric = _plain(front.metric)
        values = [f"{metric} (%), search", f"{metric} (%), validation"] if splits.apart else [f"{metric} (%)"]
        heading = ["", *values, "FLOPs", "change", "trial", "configuration"]
        lines += [f"| {' | '.join(heading)} |", f"| --- |{' ---: |' * (len(values) + 3)} --- |"]
    for row in rows:
        if row.metric is None or row.cost is None:
            lines.append(f"| {row.name} |{' |' * (4 + splits.apart)} {_plain(row.note)} |")
            continue
        cells = [row.name, summary.with_error(row.metric, row.error)]
        if splits.apart:
            cells.append(summary.with_error(row.reported, row.reported_error))
        cells += [f"{row.cost:.3f}×", "" if row.change is None else f"{row.change:+.2f}"]
        cells += ["" if row.number is None else f"{row.number}", "-".join(map(str, row.lengths)) or "dense"]
        lines.append(f"| {' | '.join(cells)} |")
    if not front.points:
        lines.append("No configuration has been evaluated yet.")
    return "\n".join(lines) + "\n"


def _plain(text: str) -> str:
    """The text without a meaning in Markdown."""
    for mark in ("\\", "`", "*", "_", "|", "<", "[", "]"):
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())


def _spread(points: Sequence[Any], most: int) -> tuple[Any, ...]:
    if len(points) <= most:
        return tuple(points)
    return tuple(points[round(i * (len(points) - 1) / (most - 1))] for i in range(most))


# ---------------------------------------------------------------------- the server


class DashboardServer(ThreadingMixIn, WSGIServer):
    """A server of one storage.

    Attributes:
        studies: Names of the studies in it, for people.
    """

    daemon_threads = True
    studies: str = ""


class _Handler(WSGIRequestHandler):
    def log_message(self, *args: Any, **kwargs: Any) -> None:
        """A dashboard polls: a line for each request would bury everything else."""


def serve(
    urls: Sequence[str],
    host: str = "127.0.0.1",
    port: int = 8080,
    announce: Callable[[str], Any] = click.echo,
) -> None:
    """Serve optuna-dashboard until interrupted, one port after the other for one storage after the other.

    Args:
        urls: Storages; one that is named twice is served once.
        host: Address to listen on.
        port: Port of the first storage.
        announce: Told the addresses, line by line.

    Raises:
        FileNotFoundError: A SQLite file does not exist.
        ValueError: A URL or a file that cannot be a study's storage.
        OSError: The address cannot be listened on, or a port is taken.
    """
    servers = make_servers(urls, host, port)
    threads = [threading.Thread(target=server.serve_forever, daemon=True) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        thread.start()
        announce(f"{address(server)} ({server.studies})")
    announce("Ctrl-C ends it.")
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:
        pass
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def make_servers(urls: Sequence[str], host: str = "127.0.0.1", port: int = 8080) -> list[DashboardServer]:
    """The servers behind :func:`serve`, listening but not serving yet; port 0 takes a free one."""
    from optuna_dashboard import wsgi

    servers: list[DashboardServer] = []
    try:
        for url in dict.fromkeys(urls):
            storage = _storage(url)
            place = port + len(servers) if port else 0
            try:
                server = make_server(host, place, wsgi(storage), server_class=DashboardServer, handler_class=_Handler)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise OSError(f"port {place} of {host} is taken; choose another with --port") from None
                raise OSError(f"cannot listen on {host}:{place}: {error.strerror or error}") from None
            names = [study.study_name for study in storage.get_all_studies()]
            server.studies = ", ".join(names) or "no studies yet"
            servers.append(server)
    except BaseException:
        for server in servers:
            server.server_close()
        raise
    return servers


def address(server: DashboardServer) -> str:
    """Where a browser finds the server."""
    host, port = server.server_address[:2]
    shown = host.decode() if isinstance(host, bytes) else str(host)
    return f"http://{f'[{shown}]' if ':' in shown else shown}:{port}/dashboard"


def _storage(url: str) -> BaseStorage:
    import optuna
    import sqlalchemy

    from lat_optuna.search.rdb import LeanStorage
    from lat_optuna.search.storage import BUSY_TIMEOUT, open_storage

    if not url.startswith("sqlite"):
        return open_storage(url)
    path = Path(sqlalchemy.make_url(url).database or "")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such database; run the search first")
    open_storage(url)  # says what is wrong with the file
    # A worker's storage takes the lock for writing even to read. A dashboard reads all the time and must not.
    plain = LeanStorage(url, engine_kwargs={"connect_args": {"timeout": BUSY_TIMEOUT}})
    return optuna.storages.get_storage(plain)
