"""The same trials whatever happens: what the search promises, looked at on real processes and databases.

    python benchmarks/exact.py --storage sqlite
    python benchmarks/exact.py --storage postgres

Reproducible: any number of workers gives the (slot, configuration, values) of one unbroken worker, also when all are
killed three times on the way. Killed: one worker, not reproducible, SIGKILLed at random moments and started again.
Workers come from a fork server that has loaded the packages and nothing else, so that starting hundreds is quick.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna
from common import database, make_evaluator, make_plan, sleeping_search

from lat_optuna.search.study import Ledger, load_study, open_study
from lat_optuna.search.worker import Search, run_worker

Table = list[tuple[int, str, tuple[float, ...]]]


def unbroken(n_trials: int) -> Table:
    """What one worker gives whom nobody disturbs."""
    evaluator = make_evaluator("cpu", 0.0)
    plan = make_plan(evaluator)
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.set_user_attr("low", plan.lowest_cost)
    ledger = Ledger(study, plan, n_trials)
    while (claim := ledger.claim()) is not None:
        ledger.complete(claim, evaluator.evaluate(claim.config))
    return table(study)


def table(study: optuna.Study) -> Table:
    """(slot, configuration, values) of the finished trials."""
    finished = [trial for trial in study.get_trials(deepcopy=False) if trial.state.name == "COMPLETE"]
    return sorted((t.user_attrs["slot"], t.user_attrs["config"], tuple(t.values)) for t in finished)


def work(search: Search) -> None:
    """One worker's process."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    run_worker(search)


def finished(study: optuna.Study) -> int:
    """How many trials are finished."""
    return len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))


def run(search: Search, workers: int, kill_at: list[int], rng: random.Random) -> optuna.Study:
    """Run to the end; all workers are killed, and as many started, a moment after so many trials are finished."""
    context = multiprocessing.get_context("forkserver")
    evaluator = search.make_evaluator("cpu")
    study = open_study(search.storage, search.name, evaluator, search.make_plan(evaluator))

    def hire() -> list[multiprocessing.process.BaseProcess]:
        crew = [context.Process(target=work, args=(search,)) for _ in range(workers)]
        for process in crew:
            process.start()
        return crew

    crew = hire()
    for goal in kill_at:
        while finished(study) < goal:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 0.1))
        for process in crew:
            process.kill()
        for process in crew:
            process.join()
        crew = hire()
    for process in crew:
        process.join()
        assert process.exitcode == 0, process.exitcode
    return load_study(search.storage, search.name)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", default="sqlite", help="sqlite, postgres, grpc, or a URL")
    parser.add_argument("--workers", default="1,4,8,16")
    parser.add_argument("--trials", type=int, default=120)
    parser.add_argument("--seconds", type=float, default=0.03, help="mean length of an evaluation")
    parser.add_argument("--kills", type=int, default=20, help="random moments at which the lone worker is killed")
    arguments = parser.parse_args()
    multiprocessing.get_context("forkserver").set_forkserver_preload(["common", "lat_optuna.search.worker"])
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    rng, expected, exact = random.Random(0), unbroken(arguments.trials), True
    cases = [(int(workers), True, kills) for workers in arguments.workers.split(",") for kills in (0, 3)]
    cases.append((1, False, arguments.kills))
    print("| storage | workers | reproducible | times killed | trials | died, lost, handed back | as unbroken |")
    print("| --- | ---: | --- | ---: | ---: | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as folder, database(arguments.storage, Path(folder)) as url:
        for number, (workers, reproducible, kills) in enumerate(cases):
            search = sleeping_search(url, f"case {number}", arguments.seconds, arguments.trials, reproducible)
            kill_at = sorted(rng.sample(range(arguments.trials - 5), kills))
            study = run(search, workers, kill_at, rng)
            same = table(study) == expected
            ends = Counter(
                str(t.user_attrs.get("fail")).partition(":")[0] for t in study.trials if t.state.name == "FAIL"
            )
            running = sum(not trial.state.is_finished() for trial in study.trials)
            exact &= same and not running
            print(
                f"| {arguments.storage} | {workers} | {'yes' if reproducible else 'no'} | {kills} | {arguments.trials} "
                f"| {ends['died']}, {ends['lost claim']}, {ends['handed back']} "
                f"| {'yes' if same and not running else 'NO'} |",
                flush=True,
            )
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    main()
