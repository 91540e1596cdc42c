"""Workers: one process on one device that claims, evaluates and tells; and the launcher of several."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import optuna

from lat_optuna.search.evaluator import Evaluation, Evaluator
from lat_optuna.search.plan import SearchPlan
from lat_optuna.search.storage import PATIENCE, open_storage
from lat_optuna.search.study import (
    BEAT_SECONDS,
    GRACE_SECONDS,
    Claim,
    Ledger,
    SearchError,
    Standing,
    Stop,
    open_study,
    plan_of,
)

MakeEvaluator = Callable[[str], Evaluator]
"""From a device to an evaluator on it; pickles, since every process makes its own."""
MakePlan = Callable[[Evaluator], SearchPlan]
"""From an evaluator to the plan of the search; pickles."""

MAX_DEATHS_WITHOUT_PROGRESS = 10
SECONDS_TO_EXIT = 8.0
"""For how long workers that were told to stop at once may take to."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far a search is, whoever works on it.

    Attributes:
        done: Finished trials of the budget.
        total: The budget.
        running: Trials that are being evaluated.
        failed: Trials that failed so far.
        auc: Area under the front of the finished trials, in what the search selects by; ``None`` before the first.
        rate: Finished trials a second since this run started.
        seconds_left: At that rate; ``None`` while there is none.
        front: ``(metric, cost)`` of the front's points, in rising cost; the metric that people see.
    """

    done: int
    total: int
    running: int
    failed: int
    auc: float | None
    rate: float
    seconds_left: float | None
    front: tuple[tuple[float, float], ...] = ()


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Ended:
    """How a search ended well.

    Attributes:
        standing: ``"done"``: the budget is used up. ``"exhausted"``: every configuration in range was evaluated.
            ``"converged"``: the area under the front grew no more.
        done: Finished trials of the budget.
        total: The budget.
        here: Those that finished during this run.
        seconds: For how long this run worked.
        reason: Why it ended, in a sentence.
    """

    standing: Standing
    done: int
    total: int
    here: int
    seconds: float
    reason: str = ""

    def __str__(self) -> str:
        count = f"{self.done} of {self.total} trials"
        if self.standing == "exhausted":
            count = f"every configuration in the trained range has been evaluated: {count} were possible"
        elif self.standing == "converged":
            count = f"ended early after {count}: {self.reason}"
            return f"{count} ({self.here} trials in {self.seconds:.0f} s)" if self.here else count
        elif not self.here:
            return f"{count}: nothing left to do"
        return f"{count}, {self.here} of them in {self.seconds:.0f} s"


@dataclass(frozen=True)
class Search:
    """What every worker of a search is told. Pickles.

    Attributes:
        storage: URL, see :func:`lat_optuna.search.storage.open_storage`.
        name: Name of the study in the storage.
        make_evaluator: Called once in each worker, with its device.
        make_plan: Called once in each worker, with its evaluator.
        n_trials: How many trials are to finish, earlier runs included.
        metric: What the search selects by, as in :meth:`Evaluation.score`.
        racing: Abandon configurations that cannot join the front, where the evaluator tells its scores example by
            example.
        reproducible: Propose only when all earlier generations are finished: the same trials with any number of
            workers.
        stop: When to end before the budget is used up. A run that goes on with a search asks anew: where it still
            holds, nothing is evaluated; without it, or with another, the search goes on.
        beat: Seconds between a worker's signs of life.
        grace: Seconds without one after which a worker is held for dead.
        patience: Seconds for which a lost connection to the storage is tried again.
        since: Failures of trials below this number are forgiven; by default those before a worker starts.
    """

    storage: str
    name: str
    make_evaluator: MakeEvaluator
    make_plan: MakePlan
    n_trials: int
    metric: str = "metric"
    racing: bool = False
    reproducible: bool = False
    stop: Stop | None = None
    beat: float = BEAT_SECONDS
    grace: float = GRACE_SECONDS
    patience: float = PATIENCE
    since: int | None = None


# ---------------------------------------------------------------------- one worker


def run_worker(
    search: Search,
    device: str = "cpu",
    *,
    on_progress: OnProgress | None = None,
    on_join: Callable[[], None] | None = None,
) -> Ended:
    """Work on a search in this process until its budget is used up.

    In the main thread SIGINT lets the trial in hand finish, a second one stops at once; SIGTERM hands the trial back.

    Args:
        search: What to work on.
        device: Where the evaluator runs: ``"cpu"``, ``"cuda:0"``.
        on_progress: Is told of every trial that is claimed or finished here.
        on_join: Is called when the evaluator stands and the study has let this worker in.

    Raises:
        KeyboardInterrupt: After SIGINT.
        SystemExit: With code 0, after SIGTERM.
        SearchError: Ten trials in a row have failed.
        ValueError: The study measures something else than this worker; see :func:`open_study`.
        OSError: The storage does not answer or cannot be written.
    """
    with _signals() as asked:
        evaluator = search.make_evaluator(device)
        plan = search.make_plan(evaluator)
        study = open_study(search.storage, search.name, evaluator, plan, search.metric)
        ledger = Ledger(
            study,
            plan,
            search.n_trials,
            device=device,
            reproducible=search.reproducible,
            stop=search.stop,
            since=search.since,
            grace=search.grace,
            patience=search.patience,
        )
        if on_join:
            on_join()
        heart = _Heart(ledger, search.beat, asked)
        heart.start()
        try:
            return _work(ledger, evaluator, search.racing, heart, asked, on_progress)
        except (KeyboardInterrupt, SystemExit):
            asked.leaving = True
            ledger.patience = 2.0
            try:
                ledger.hand_back()
            except Exception as error:
                logger.warning("the trial in hand could not be handed back; others will notice: %s", error)
            raise
        finally:
            heart.stop()


def _work(
    ledger: Ledger,
    evaluator: Evaluator,
    racing: bool,
    heart: _Heart,
    asked: _Asked,
    on_progress: OnProgress | None,
) -> Ended:
    meter = _Meter(ledger)
    pause = 0.05
    while not asked.stop:
        if asked.leave:
            raise SystemExit(0)
        heart.claim = claim = ledger.claim()
        if on_progress:
            on_progress(meter.read())
        if claim is None:
            if ledger.standing != "open":
                return meter.ended()
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(1.5 * pause, 1.0)
            continue
        pause = 0.05
        try:
            rival = ledger.rival(claim) if racing else None
            outcome = evaluator.evaluate(claim.config) if rival is None else evaluator.race(claim.config, rival)
            if isinstance(outcome, Evaluation):
                outcome.score(ledger.metric)  # an evaluation without it has failed
        except Exception as error:
            # One line for people; the traceback goes to workers' logs and to those who asked for more.
            wanted = logger.isEnabledFor(logging.INFO)
            logger.warning("trial %d (%s) failed: %s", claim.number, claim.config, _first_line(error), exc_info=wanted)
            ledger.fail(claim, f"error: {type(error).__name__}: {error}")
        else:
            if isinstance(outcome, Evaluation):
                ledger.complete(claim, outcome)
            else:
                ledger.prune(claim, outcome)
        heart.claim = None
    raise KeyboardInterrupt


class _Meter:
    """Counts since a run started."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._start = time.monotonic()
        self._before = ledger.done

    def read(self) -> Progress:
        ledger, seconds = self._ledger, time.monotonic() - self._start
        done = ledger.done
        rate = (done - self._before) / seconds if seconds > 0 else 0.0
        front = ledger.front()
        return Progress(
            done=done,
            total=ledger.n_trials,
            running=ledger.running,
            failed=ledger.failed,
            auc=ledger.auc([(one.metric, one.cost) for one in front]) if done else None,
            rate=rate,
            seconds_left=(ledger.n_trials - done) / rate if rate else None,
            front=tuple((ledger.metric_of(one), one.cost) for one in front),
        )

    def ended(self, standing: Standing | None = None) -> Ended:
        ledger, seconds = self._ledger, time.monotonic() - self._start
        standing = standing or ledger.standing
        reason = ledger.reason or ledger.study.user_attrs.get("ended", {}).get("why", "")
        return Ended(standing, ledger.done, ledger.n_trials, ledger.done - self._before, seconds, reason)


class _Heart(threading.Thread):
    """Shows signs of life while a trial runs, and notices when the launcher is gone."""

    def __init__(self, ledger: Ledger, interval: float, asked: _Asked) -> None:
        super().__init__(daemon=True, name="signs of life")
        self._asked = asked
        self.claim: Claim | None = None
        self._ledger = ledger
        self._interval = interval
        self._stopped = threading.Event()

    def run(self) -> None:
        count, last = 0, time.monotonic()
        parent = multiprocessing.parent_process()
        while not self._stopped.wait(min(1.0, self._interval)):
            orphaned = parent is not None and not parent.is_alive()
            if (orphaned or self._asked.leave) and not self._asked.leaving:
                # An exception that a signal raises inside a library's clean-up may be swallowed there: raise it again.
                os.kill(os.getpid(), signal.SIGTERM)
            claim = self.claim
            if claim is not None and time.monotonic() - last >= self._interval:
                count, last = count + 1, time.monotonic()
                try:
                    self._ledger.beat(claim, count)
                except Exception as error:  # the next one may come through; the loop itself sees to lasting trouble
                    logger.debug("no sign of life for trial %d: %s", claim.number, error)

    def stop(self) -> None:
        """End it, and wait until it has: what it holds (a model on a GPU) must not go while the interpreter does."""
        self._stopped.set()
        self.join(timeout=5.0)  # it may be waiting for a storage that is gone


@dataclass
class _Asked:
    """What signals have asked of a worker.

    Attributes:
        stop: To stop when the trial in hand is finished (SIGINT).
        leave: To hand the trial back and exit (SIGTERM).
        leaving: Whether it is about to: further signals change nothing.
    """

    stop: bool = False
    leave: bool = False
    leaving: bool = False


@contextmanager
def _signals() -> Iterator[_Asked]:
    """Note signals; a second SIGINT interrupts, SIGTERM exits with code 0. Outside the main thread: nothing."""
    asked = _Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        again, asked.stop = asked.stop, True
        if again and not asked.leaving:
            raise KeyboardInterrupt

    def on_terminate(number: int, frame: FrameType | None) -> None:
        asked.leave = True
        if not asked.leaving:
            raise SystemExit(0)

    before = signal.signal(signal.SIGINT, on_interrupt), signal.signal(signal.SIGTERM, on_terminate)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


# ---------------------------------------------------------------------- several workers


@dataclass
class _Process:
    """A worker's process as its launcher sees it."""

    number: int
    device: str
    log: Path
    process: Any
    connection: Connection
    joined: bool = False
    error: Exception | None = None
    standing: Standing | None = None

    def listen(self) -> None:
        """Take in what the worker has told."""
        try:
            while self.connection.poll():
                kind, content = self.connection.recv()
                if kind == "joined":
                    self.joined = True
                elif kind == "ended":
                    self.standing = content
                else:
                    self.error = content
        except (EOFError, OSError):
            pass

    @property
    def label(self) -> str:
        return f"worker {self.number} ({self.device})"


@dataclass
class _Crew:
    """The worker processes of one launch."""

    search: Search
    folder: Path
    threads: int
    on_message: Callable[[str], None]
    at_work: list[_Process] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    standing: Standing | None = None
    deaths: int = 0
    size: int = 0

    def hire(self, number: int, device: str) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=False)
        log = self.folder / f"worker-{number}.log"
        process = context.Process(
            target=_worker_process, args=(self.search, device, log, theirs), name=f"lat-optuna worker {number}"
        )
        with _environment("OMP_NUM_THREADS", str(self.threads)):
            process.start()
        theirs.close()
        self.at_work.append(_Process(number, device, log, process, ours))
        self.size = max(self.size, len(self.at_work))

    def signal(self, number: signal.Signals) -> None:
        for worker in self.at_work:
            if worker.process.is_alive() and worker.process.pid:
                os.kill(worker.process.pid, number)

    def dismiss(self) -> None:
        """End whoever is still at work; only for errors of the launcher itself."""
        self.signal(signal.SIGTERM)
        for worker in self.at_work:
            worker.process.join(SECONDS_TO_EXIT)
            worker.process.kill()

    def check(self, stopping: bool) -> None:
        """See who has ended; replace those that were killed."""
        for worker in list(self.at_work):
            alive = worker.process.is_alive()  # first, so that nothing told before the end is missed
            worker.listen()
            if alive:
                continue
            self.at_work.remove(worker)
            worker.process.join()
            worker.connection.close()
            if worker.error is not None:
                self.errors.append(worker.error)
                when = "failed" if worker.joined else "failed to start"
                self.on_message(f"{worker.label} {when}: {_first_line(worker.error)} (log: {worker.log})")
            elif worker.standing is not None:
                self.standing = worker.standing
                self.on_message(f"{worker.label} is finished")
            elif stopping or worker.process.exitcode == 0:
                self.on_message(f"{worker.label} has stopped")
            else:
                self._replace(worker)

    def _replace(self, worker: _Process) -> None:
        code = worker.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        self.deaths += 1
        if not worker.joined or self.deaths > max(MAX_DEATHS_WITHOUT_PROGRESS, 2 * self.size):
            self.errors.append(SearchError(f"{worker.label} {how}; its log: {worker.log}"))
            self.on_message(f"{worker.label} {how} (log: {worker.log})")
            return
        self.on_message(f"{worker.label} {how} (log: {worker.log}); a new one takes its place")
        self.hire(worker.number, worker.device)


def launch(
    search: Search,
    devices: Sequence[str] = ("cpu",),
    *,
    folder: str | os.PathLike[str] = ".",
    on_progress: OnProgress | None = None,
    on_message: Callable[[str], None] | None = None,
) -> Ended:
    """Work on a search with one local process a device until its budget is used up; one device needs no other process.

    Workers are spawned, in a process group of their own. One that is killed is replaced; its trial is evaluated again.
    One that fails by itself is reported and the others go on. SIGINT, SIGTERM: see :func:`run_worker`, for all workers.

    Args:
        search: What to work on.
        devices: One a worker; a device may be named several times.
        folder: Gets ``worker-1.log`` and so on.
        on_progress: Is told about once a second how far the whole study is.
        on_message: Is told, in a line, of each worker's end.

    Raises:
        KeyboardInterrupt: After SIGINT.
        SystemExit: With code 0, after SIGTERM.
        SearchError: Ten trials in a row have failed, or no worker is left.
        Exception: Whatever the last worker failed with, if all failed.
    """
    if not devices:
        raise ValueError("a search needs at least 1 worker, not 0")
    if len(devices) == 1:
        return run_worker(search, devices[0], on_progress=on_progress)
    storage = open_storage(search.storage)  # creates the tables once, and finds a wrong URL before anything starts
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    search = replace(search, since=_number_of_trials(storage, search.name))
    crew = _Crew(search, folder, max(1, _cpus() // len(devices)), on_message or logger.info)
    told: list[signal.Signals] = []
    with _passing_on(crew, told):
        for number, device in enumerate(devices, start=1):
            crew.hire(number, device)
        watch = _Watch(storage, search)
        try:
            while crew.at_work:
                time.sleep(0.1)
                crew.check(stopping=bool(told))
                if watch.look(on_progress):
                    crew.deaths = 0
        finally:
            crew.dismiss()
    if signal.SIGTERM in told:
        raise SystemExit(0)
    if told:
        raise KeyboardInterrupt
    watch.look(on_progress, now=True)
    if watch.meter is not None and (crew.standing or not crew.errors):
        return watch.meter.ended(crew.standing or "done")
    raise crew.errors[-1] if crew.errors else SearchError("no worker is left")


def _worker_process(search: Search, device: str, log: Path, connection: Connection) -> None:
    """What a launched process runs."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches the launcher alone, which passes it on: once, not twice
    with log.open("a", buffering=1, encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logger.info("worker on %s, process %d", device, os.getpid())
    try:
        ended = run_worker(search, device, on_join=lambda: connection.send(("joined", None)))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        logger.exception("failed")
        connection.send(("failed", _portable(error)))
        sys.exit(1)
    logger.info("%s", ended)
    connection.send(("ended", ended.standing))


class _Watch:
    """Looks at the study from outside, for the one progress bar of all workers."""

    def __init__(self, storage: Any, search: Search) -> None:
        self.meter: _Meter | None = None
        self._storage = storage
        self._search = search
        self._ledger: Ledger | None = None
        self._next = 0.0
        self._done = 0

    def look(self, on_progress: OnProgress | None, now: bool = False) -> bool:
        """Tell the progress, about once a second; says whether trials have finished since the last look."""
        if not now and time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 1.0
        try:
            if self._ledger is None:
                study = optuna.load_study(study_name=self._search.name, storage=self._storage)
                self._ledger = Ledger(study, plan_of(study), self._search.n_trials, patience=2.0)
                self.meter = _Meter(self._ledger)
            self._ledger.refresh()
        except (KeyError, ValueError, OSError, optuna.exceptions.OptunaError):
            return False  # not created yet, or out of reach for the moment: the workers see to that
        assert self.meter is not None
        progress = self.meter.read()
        if on_progress:
            on_progress(progress)
        grown, self._done = progress.done > self._done, progress.done
        return grown


@contextmanager
def _passing_on(crew: _Crew, told: list[signal.Signals]) -> Iterator[None]:
    """Pass SIGINT and SIGTERM on to the workers; ``told`` notes them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def pass_on(number: int, frame: FrameType | None) -> None:
        told.append(signal.Signals(number))
        crew.signal(signal.Signals(number))
        if len(told) > 1 or number == signal.SIGTERM:
            timer = threading.Timer(SECONDS_TO_EXIT, crew.signal, (signal.SIGKILL,))
            timer.daemon = True
            timer.start()

    before = signal.signal(signal.SIGINT, pass_on), signal.signal(signal.SIGTERM, pass_on)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before[0])
        signal.signal(signal.SIGTERM, before[1])


def _number_of_trials(storage: Any, name: str) -> int:
    try:
        return len(optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False))
    except KeyError:
        return 0


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    """Set a variable for processes that start meanwhile, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one with the same message."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return SearchError(f"{type(error).__name__}: {error}")
    return error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
