"""How much of W workers' time goes into evaluations: trials a second as a share of the ideal.

    python benchmarks/scaling.py --storage postgres --seconds 2 --workers 1,2,4,8,16,32
    python benchmarks/scaling.py --storage sqlite --seconds 0.5 --workers 1,2,4,8
    python benchmarks/scaling.py --storage postgres --seconds 2 --workers 4,8,16,32 --reproducible

Evaluations sleep instead of computing. The ideal is W evaluations at any moment, each as long as it was meant to be,
from when all workers have joined until the last slot is claimed; with --reproducible until the end, beside what waiting
for every generation to close leaves to workers that lose no time otherwise.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import optuna
from common import Sleeping, database, make_evaluator, sleeping_search

from lat_optuna.search.evaluator import Evaluation
from lat_optuna.search.plan import SearchPlan
from lat_optuna.search.study import load_study, open_study
from lat_optuna.search.worker import Search, run_worker

Spell = tuple[float, float]
"""When an evaluation began, on the machine's monotonic clock, and for how many seconds it was meant to last."""


class Timed(Sleeping):
    """Notes its evaluations."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.spells: list[Spell] = []

    def evaluate(self, config: Any) -> Evaluation:
        """As it is, and noted."""
        self.spells.append((time.monotonic(), self.planned(config)))
        return super().evaluate(config)


def work(search: Search, barrier: Any, told: Any) -> None:
    """One worker's process."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    timed: list[Timed] = []
    started: list[float] = []

    def make(device: str) -> Timed:
        timed.append(Timed(search.make_evaluator(device).seconds))  # type: ignore[attr-defined]
        return timed[0]

    def join() -> None:
        barrier.wait(300)
        started.append(time.monotonic())

    own = replace(search, make_evaluator=make)
    run_worker(own, on_join=join)
    told.put((started[0], timed[0].spells))


def measure(search: Search, workers: int) -> dict[str, float]:
    """Run a search with so many workers and see where their time went."""
    context = multiprocessing.get_context("spawn")
    evaluator = make_evaluator("cpu", 0.0)
    open_study(search.storage, search.name, evaluator, search.make_plan(evaluator))
    barrier, told = context.Barrier(workers), context.Queue()
    crew = [context.Process(target=work, args=(search, barrier, told)) for _ in range(workers)]
    for process in crew:
        process.start()
    reports = [told.get(timeout=120) for _ in crew]
    for process in crew:
        process.join()
    start = max(began for began, _ in reports)
    spells = [spell for _, own in reports for spell in own]
    last_claim, end = max(begin for begin, _ in spells), max(begin + seconds for begin, seconds in spells)
    until = end if search.reproducible else last_claim
    inside = [(max(0.0, min(begin + seconds, until) - max(begin, start)), seconds) for begin, seconds in spells]
    trials = load_study(search.storage, search.name).get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state.name == "COMPLETE"]
    assert len(finished) == search.n_trials, f"{len(finished)} finished"
    assert len({trial.user_attrs["config"] for trial in finished}) == search.n_trials
    planned = [0.0] * search.n_trials
    for trial in finished:
        planned[trial.user_attrs["slot"]] = sleeper_of(search).planned(config_of(trial))
    return {
        "workers": workers,
        "trials": search.n_trials,
        "seconds": until - start,
        "rate": sum(part / seconds for part, seconds in inside) / (until - start),
        "ideal": workers * len(spells) / sum(seconds for _, seconds in spells),
        "share": sum(part for part, _ in inside) / workers / (until - start),
        "bound": bound(planned, workers, search.make_plan(evaluator)),
        "lost": Counter(trial.user_attrs.get("fail") for trial in trials)["lost claim"],
    }


def sleeper_of(search: Search) -> Sleeping:
    """The search's evaluator."""
    return search.make_evaluator("cpu")  # type: ignore[return-value]


def config_of(trial: optuna.trial.FrozenTrial) -> Any:
    """A trial's configuration."""
    from common import LAYERS, LENGTH

    from lat_optuna.length_config import LengthConfig

    return LengthConfig.from_parameters(trial.params, LAYERS, LENGTH)


def bound(planned: Sequence[float], workers: int, plan: SearchPlan) -> float:
    """Share of the ideal that is left if a generation starts when the last one has ended, and nothing else costs."""
    edges = [0]
    while edges[-1] < len(planned):
        edges.append(min(plan.slots_of(plan.generation_of(edges[-1])).stop, len(planned)))
    took = 0.0
    for start, stop in pairwise(edges):
        free = [0.0] * workers
        for seconds in planned[start:stop]:
            free[free.index(min(free))] += seconds
        took += max(free)
    return sum(planned) / workers / took


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="sqlite", help="sqlite, postgres, grpc, or a URL")
    parser.add_argument("--seconds", type=float, default=0.5, help="mean length of an evaluation")
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--rounds", type=int, default=10, help="evaluations a worker")
    parser.add_argument("--reproducible", action="store_true")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as name, database(arguments.storage, Path(name)) as url:
        kind = "reproducible, " if arguments.reproducible else ""
        print(f"\n{kind}{arguments.storage}, evaluations of about {arguments.seconds} s\n")
        print("| workers | trials | seconds | trials/s | ideal | share of the ideal | waiting leaves | lost claims |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for workers in map(int, arguments.workers.split(",")):
            search = sleeping_search(
                url, f"{workers} workers", arguments.seconds, workers * arguments.rounds, arguments.reproducible
            )
            row = measure(search, workers)
            waiting = f"{row['bound']:.1%}" if arguments.reproducible else ""
            print(
                f"| {workers} | {row['trials']} | {row['seconds']:.1f} | {row['rate']:.2f} | {row['ideal']:.2f} "
                f"| {row['share']:.1%} | {waiting} | {row['lost']} |",
                flush=True,
            )
    sys.exit(0)


if __name__ == "__main__":
    main()
