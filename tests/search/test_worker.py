"""Workers as real processes on real databases."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import optuna
import psutil
import pytest
from databases import postgres_server

from lat_optuna.search import storage as storage_module
from lat_optuna.search.evaluator import StandInEvaluator
from lat_optuna.search.front import non_dominated
from lat_optuna.search.plan import SearchPlan
from lat_optuna.search.storage import open_storage
from lat_optuna.search.study import HANDED_BACK, LOST_CLAIM, Ledger, SearchError, load_study, open_study
from lat_optuna.search.worker import Ended, Search, launch, run_worker

optuna.logging.set_verbosity(optuna.logging.WARNING)

# ---------------------------------------------------------------------- what the processes run: picklable


def make_evaluator(device, sleep=0.0):
    return StandInEvaluator(4, 64, sleep=sleep)


def make_plan(evaluator):
    return SearchPlan(4, 64, p=0.3, num_initial=4, num_mutations=3, num_crossovers=3, cost=evaluator.cost)


class Troublesome(StandInEvaluator):
    """Kills its process, or raises, when it gets to some configurations."""

    def __init__(self, kills=(), raises=False):
        super().__init__(4, 64)
        self.kills = kills
        self.raises = raises

    def evaluate(self, config):
        if str(config) in self.kills:
            os.kill(os.getpid(), signal.SIGKILL)
        if self.raises:
            raise RuntimeError("CUDA error: device-side assert\nsecond line")
        return super().evaluate(config)


def make_troublesome(device, **trouble):
    if device == "broken":
        raise MemoryError("no room for the model")
    return Troublesome(**trouble)


def search_in(folder, n_trials, make=make_evaluator, **options):
    return Search(f"sqlite:///{folder}/study.db", "search", make, make_plan, n_trials, **options)


def table(search):
    finished = [t for t in load_study(search.storage, search.name).trials if t.state.name == "COMPLETE"]
    return sorted((t.user_attrs["slot"], t.user_attrs["config"], tuple(t.values)) for t in finished)


def unbroken(n_trials):
    evaluator = make_evaluator("cpu")
    study = optuna.create_study(directions=["maximize", "minimize"])
    study.set_user_attr("low", make_plan(evaluator).lowest_cost)
    ledger = Ledger(study, make_plan(evaluator), n_trials)
    while (claim := ledger.claim()) is not None:
        ledger.complete(claim, evaluator.evaluate(claim.config))
    return [(t.user_attrs["slot"], t.user_attrs["config"], tuple(t.values)) for t in study.trials]


def assert_exact(search):
    """Exactly the budget, nothing twice, nobody left at work, and everything can be read."""
    study = load_study(search.storage, search.name)
    finished = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert sorted(t.user_attrs["slot"] for t in finished) == list(range(search.n_trials))
    assert len({t.user_attrs["config"] for t in finished}) == search.n_trials
    assert not [t for t in study.trials if t.state.name == "RUNNING"]
    points = [tuple(t.values) for t in finished]
    assert {points[i] for i in non_dominated(points)} == {tuple(t.values) for t in study.best_trials}


def ends(search):
    return Counter(
        t.user_attrs.get("fail") for t in load_study(search.storage, search.name).trials if t.state.name == "FAIL"
    )


def start(search):
    process = multiprocessing.get_context("spawn").Process(target=run_worker, args=(search,))
    process.start()
    return process


def wait_for(condition, seconds=180):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
    return found


def count(search, state):
    """How many trials are in a state, read past Optuna so as not to disturb."""
    try:
        with sqlite3.connect(search.storage.removeprefix("sqlite:///"), timeout=30) as connection:
            return connection.execute("SELECT count(*) FROM trials WHERE state = ?", (state,)).fetchone()[0]
    except sqlite3.OperationalError:
        return 0


# ---------------------------------------------------------------------- one worker


def test_two_runs_with_one_worker_are_the_same_trials_and_values(tmp_path):
    for folder in ("a", "b"):
        ended = run_worker(search_in(tmp_path / folder, 14))
        assert (ended.standing, ended.done, ended.here) == ("done", 14, 14)
    assert table(search_in(tmp_path / "a", 14)) == table(search_in(tmp_path / "b", 14)) == unbroken(14)


def test_run_again_it_evaluates_nothing_and_with_more_trials_it_goes_on(tmp_path):
    run_worker(search_in(tmp_path, 8))
    again = run_worker(search_in(tmp_path, 8, partial(make_troublesome, raises=True)))
    assert (again.done, again.here) == (8, 0)
    assert "nothing left to do" in str(again)
    more = run_worker(search_in(tmp_path, 15))
    assert (more.done, more.here) == (15, 7)
    assert table(search_in(tmp_path, 15)) == unbroken(15)


def test_nothing_goes_on_behind_a_worker_that_has_ended(tmp_path):
    run_worker(search_in(tmp_path, 8))
    assert [thread.name for thread in threading.enumerate() if thread.name == "signs of life"] == []


def test_progress_tells_how_far_the_study_is(tmp_path):
    told = []
    run_worker(search_in(tmp_path, 8), on_progress=told.append)
    assert [p.done for p in told] == list(range(9))
    assert told[0].auc is None
    assert told[-1].auc > told[1].auc
    assert (told[-1].running, told[-1].total, told[-1].seconds_left) == (0, 8, 0.0)


def test_an_evaluator_that_always_raises_ends_the_search_with_its_error(tmp_path):
    search = search_in(tmp_path, 20, partial(make_troublesome, raises=True))
    with pytest.raises(SearchError, match=r"10 trials in a row .* RuntimeError: CUDA error: device-side assert"):
        run_worker(search)
    assert not count(search, "RUNNING")


def test_killed_at_random_moments_and_started_again_it_equals_the_unbroken_run(tmp_path):
    search = search_in(tmp_path, 16, partial(make_evaluator, sleep=0.02))
    rng = random.Random(5)
    for goal in (2, 9):
        process = start(search)
        wait_for(lambda goal=goal: count(search, "COMPLETE") >= goal)
        time.sleep(rng.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    run_worker(search)
    assert_exact(search)
    assert table(search) == unbroken(16)


def test_sigterm_hands_the_trial_back_and_exits_with_0(tmp_path):
    search = search_in(tmp_path, 5, partial(make_evaluator, sleep=600))
    process = start(search)
    wait_for(lambda: count(search, "RUNNING"))
    process.terminate()
    process.join(60)
    assert process.exitcode == 0
    assert ends(search) == {HANDED_BACK: 1}
    run_worker(search_in(tmp_path, 5))
    assert table(search) == unbroken(5)


class Deaf(StandInEvaluator):
    """Swallows the first attempts to end it, as a library's clean-up may."""

    def __init__(self):
        super().__init__(4, 64)
        self.asked = 0

    def evaluate(self, config):
        while True:
            try:
                time.sleep(600)
            except SystemExit:
                self.asked += 1
                if self.asked == 3:
                    raise


def test_sigterm_is_obeyed_even_if_something_swallows_it(tmp_path):
    search = search_in(tmp_path, 5, lambda device: Deaf(), beat=0.1)

    def terminate():
        wait_for(lambda: count(search, "RUNNING"))
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    with pytest.raises(SystemExit) as exit_:
        run_worker(search)
    thread.join()
    assert exit_.value.code == 0
    assert ends(search) == {HANDED_BACK: 1}


def test_ctrl_c_finishes_the_trial_in_hand_and_a_second_one_stops_at_once(tmp_path):
    search = search_in(tmp_path, 5, partial(make_evaluator, sleep=1.5))

    def interrupt(times):
        before = count(search, "RUNNING"), count(search, "COMPLETE")
        wait_for(lambda: count(search, "RUNNING") and (count(search, "RUNNING"), count(search, "COMPLETE")) != before)
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for times, complete in ((1, 1), (2, 1)):
        thread = threading.Thread(target=interrupt, args=(times,))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            run_worker(search)
        thread.join()
        assert count(search, "COMPLETE") == complete
    assert ends(search) == {HANDED_BACK: 1}
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers


# ---------------------------------------------------------------------- several


def test_several_workers_finish_exactly_the_budget(tmp_path):
    search = search_in(tmp_path, 24, partial(make_evaluator, sleep=0.2))
    told, lines = [], []
    ended = launch(search, ["cpu"] * 3, folder=tmp_path, on_progress=told.append, on_message=lines.append)
    assert (ended.standing, ended.done, ended.total) == ("done", 24, 24)
    assert_exact(search)
    assert set(ends(search)) <= {LOST_CLAIM}
    assert lines == [f"worker {line[7]} (cpu) is finished" for line in lines]
    assert len(lines) == 3
    assert told[-1].done == 24
    workers = {t.user_attrs["worker"] for t in load_study(search.storage, search.name).trials}
    assert len(workers) > 1
    assert (tmp_path / "worker-3.log").read_text().count("worker on cpu") == 1


@pytest.mark.slow
def test_reproducible_with_several_workers_equals_one_worker(tmp_path):
    search = search_in(tmp_path, 20, reproducible=True)
    launch(search, ["cpu", "cpu"], folder=tmp_path)
    assert table(search) == unbroken(20)


def test_a_worker_that_fails_to_start_is_reported_and_the_others_go_on(tmp_path):
    lines = []
    search = search_in(tmp_path, 6, make_troublesome)
    launch(search, ["broken", "cpu"], folder=tmp_path, on_message=lines.append)
    assert_exact(search)
    log = tmp_path / "worker-1.log"
    assert f"worker 1 (broken) failed to start: no room for the model (log: {log})" in lines
    assert "MemoryError" in log.read_text()


@pytest.mark.slow
def test_if_no_worker_can_start_the_search_fails_with_their_error(tmp_path):
    with pytest.raises(MemoryError, match="no room"):
        launch(search_in(tmp_path, 9, make_troublesome), ["broken", "broken"], folder=tmp_path)


@pytest.mark.slow
def test_a_configuration_that_kills_its_worker_three_times_is_excluded_and_the_search_goes_on(tmp_path):
    bad = unbroken(6)[5][1]
    lines = []
    search = search_in(tmp_path, 8, partial(make_troublesome, kills=(bad,)))
    launch(search, ["cpu", "cpu"], folder=tmp_path, on_message=lines.append)
    assert_exact(search)
    assert sum("killed by SIGKILL" in line for line in lines) == 3
    assert bad not in {config for _, config, _ in table(search)}
    assert sum(n for reason, n in ends(search).items() if reason.startswith("died")) == 3


def launch_in(folder, n_trials):
    launch(search_in(folder, n_trials, partial(make_evaluator, sleep=0.5)), ["cpu", "cpu"], folder=folder)


def pids_at_work(search):
    trials = load_study(search.storage, search.name).get_trials(states=(optuna.trial.TrialState.RUNNING,))
    return {int(t.user_attrs["worker"].split(" pid ")[1].split()[0]) for t in trials}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_to_the_launcher_reach_its_workers(tmp_path, number):
    search = search_in(tmp_path, 1000)
    process = multiprocessing.get_context("spawn").Process(target=launch_in, args=(tmp_path, 1000))
    process.start()
    wait_for(lambda: count(search, "RUNNING") == 2)
    pids = wait_for(lambda: len(found := pids_at_work(search)) == 2 and found)
    os.kill(process.pid, number)
    process.join(120)
    assert process.exitcode == {signal.SIGTERM: 0, signal.SIGINT: 1, signal.SIGKILL: -9}[number]
    # Also when the launcher could not tell them anything any more.
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert not count(search, "RUNNING")


def test_no_workers_make_no_search(tmp_path):
    with pytest.raises(ValueError, match="at least 1 worker"):
        launch(search_in(tmp_path, 5), [])


def test_a_worker_with_another_checkpoint_refuses_to_join(tmp_path):
    run_worker(search_in(tmp_path, 3))
    with pytest.raises(ValueError, match="evaluator is 'stand-in 4x64 relative' there"):
        run_worker(search_in(tmp_path, 3, lambda device: StandInEvaluator(4, 32)))


# ---------------------------------------------------------------------- PostgreSQL


@pytest.fixture(scope="module")
def postgres():
    with postgres_server() as server:
        yield server.get_uri()


@pytest.mark.slow
@pytest.mark.postgres
def test_several_workers_on_postgresql_finish_exactly_the_budget(tmp_path, postgres):
    search = replace(search_in(tmp_path, 30, partial(make_evaluator, sleep=0.1)), storage=postgres)
    launch(search, ["cpu"] * 2, folder=tmp_path)
    assert_exact(search)


@pytest.mark.slow
@pytest.mark.postgres
def test_a_database_that_is_stopped_and_started_again_loses_nothing(tmp_path):
    with postgres_server() as server:
        search = replace(search_in(tmp_path, 30, partial(make_evaluator, sleep=0.1)), storage=server.get_uri())
        evaluator = make_evaluator("cpu")
        study = open_study(search.storage, search.name, evaluator, make_plan(evaluator))
        crew = [start(search), start(search)]
        wait_for(lambda: len(study.get_trials(deepcopy=False)) >= 8)
        server.stop()
        time.sleep(2)
        assert all(process.is_alive() for process in crew)
        server.start()
        for process in crew:
            process.join(300)
            assert process.exitcode == 0
        assert_exact(search)


CUT_EVERYBODY_OFF = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname IS NOT NULL"
)


@pytest.mark.postgres
def test_connections_that_break_are_made_again_and_nothing_is_lost(postgres):
    import psycopg

    evaluator = make_evaluator("cpu")
    plan = make_plan(evaluator)
    study = open_study(postgres, "broken connections", evaluator, plan)
    ledger = Ledger(study, plan, 12)
    with psycopg.connect(postgres, autocommit=True) as admin:
        while (claim := ledger.claim()) is not None:
            admin.execute(CUT_EVERYBODY_OFF)
            ledger.complete(claim, evaluator.evaluate(claim.config))
    finished = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert [(t.user_attrs["slot"], t.user_attrs["config"], tuple(t.values)) for t in finished] == unbroken(12)


# ---------------------------------------------------------------------- Optuna's gRPC proxy


@contextmanager
def proxy(url, port=None):
    """``lat-optuna storage serve`` in front of a database."""
    if port is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
    command = [sys.executable, "-m", "lat_optuna", "storage", "serve", url, "--port", str(port)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield f"grpc://localhost:{port}", process
        finally:
            process.send_signal(signal.SIGTERM)


def wait_until_served(url):
    def answers():
        try:
            return open_storage(url)
        except ConnectionError:
            return None

    wait_for(answers)


@pytest.mark.slow
def test_workers_behind_a_proxy_finish_exactly_the_budget_even_if_it_goes_away_for_a_while(tmp_path):
    pytest.importorskip("grpc")
    database = f"sqlite:///{tmp_path}/study.db"
    with proxy(database) as (url, process):
        wait_until_served(url)
        search = replace(search_in(tmp_path, 24, partial(make_evaluator, sleep=0.1)), storage=url)
        crew = [start(search), start(search)]
        behind = replace(search, storage=database)
        wait_for(lambda: count(behind, "COMPLETE") >= 4)
        crew[0].kill()
        process.kill()
        process.wait()
    with proxy(database, int(url.rpartition(":")[2])) as (_, process):
        crew[1].join(300)
        assert crew[1].exitcode == 0
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert f"serving {database} at {url}" in process.stderr.read()
    assert_exact(behind)


def test_a_proxy_that_is_not_there_is_one_clear_line(monkeypatch):
    pytest.importorskip("grpc")
    monkeypatch.setattr(storage_module, "PROXY_SECONDS", 0.2)
    with pytest.raises(ConnectionError, match="grpc://localhost:1 does not answer; is `lat-optuna storage serve`"):
        open_storage("grpc://localhost:1")


def test_how_it_ended_reads_well():
    assert str(Ended("done", 20, 20, 8, 12.3)) == "20 of 20 trials, 8 of them in 12 s"
    assert "every configuration" in str(Ended("exhausted", 20, 50, 20, 1.0))
