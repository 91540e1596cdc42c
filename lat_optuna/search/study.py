"""A search as an Optuna study: opened, resumed, and shared by workers without losing or repeating a trial."""

from __future__ import annotations

import json
import math
import os
import random
import socket
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from hashlib import sha256
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import optuna
import psutil
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lat_optuna.length_config import LengthConfig, parameter_names
from lat_optuna.search.evaluator import Abandoned, Evaluation, Evaluator
from lat_optuna.search.foreign import make_plan
from lat_optuna.search.plan import Candidate, Either, Fronts, Proposal, SearchPlan
from lat_optuna.search.racing import Rival, pack, unpack
from lat_optuna.search.storage import PATIENCE, open_storage, reading, redact, retrying, turn

LOST_CLAIM = "lost claim"
HANDED_BACK = "handed back"
DIED = "died"
SCORES = "scores"
"""System attribute of trials that were on the front when they finished: scores example by example, for racing."""
NEIGHBOURS = 4
"""Points of the front that a race's rival brings along."""
MAX_FAILURES_OF_CONFIG = 3
MAX_FAILURES_IN_A_ROW = 10
BEAT_SECONDS = 5.0
"""A worker shows a sign of life this often."""
GRACE_SECONDS = 60.0
"""A worker without a sign of life for this long is held for dead."""
LENGTH_OF_REASON = 300


class SearchError(RuntimeError):
    """The search cannot go on; the message holds the last error of a trial."""


# ---------------------------------------------------------------------- opening


def open_study(storage: str, name: str, evaluator: Evaluator, plan: SearchPlan, metric: str = "metric") -> Study:
    """Create a study, or join it if it measures the same thing in the same way.

    The study gets the objectives (metric, up) and (FLOPs ratio, down), those of an evaluator with further ones
    (:class:`lat_optuna.search.objectives.WithObjectives`), and as attributes ``identity`` and ``low``, the
    cost of the smallest configuration that training reached. One that selects by something else than its metric says so
    in the attribute ``search_metric``: a name in its trials' ``details``.

    Args:
        storage: URL, see :func:`lat_optuna.search.storage.open_storage`.
        name: Name of the study in the storage.
        evaluator: Says what the values mean.
        plan: Says what the slots mean.
        metric: What the search selects by, as in :meth:`Evaluation.score`.

    Raises:
        ValueError: The study belongs to another checkpoint, data set, protocol or plan; the message says what differs.
        OSError: The storage cannot be written or does not answer.
    """
    backend = open_storage(storage)
    what = redact(storage)
    identity = json.loads(json.dumps({"evaluator": dict(evaluator.identity()), "plan": plan.settings()}))
    if metric != "metric":
        identity["search"] = {"metric": metric}
    directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * (1 + len(_further(evaluator)))]
    try:
        study = retrying(
            lambda: optuna.create_study(study_name=name, storage=backend, directions=directions), what=what
        )
    except DuplicatedStudyError:
        study = retrying(lambda: optuna.load_study(study_name=name, storage=backend), what=what)
        if _is_described(study):
            _check_identity(study, identity, directions, what)
            return study
        # Whoever created it was killed before it could say what it is.
    _describe(study, identity, evaluator, plan)
    return study


def load_study(storage: str, name: str) -> Study:
    """A study as it is, to look at.

    Raises:
        ValueError: There is no such study in the storage; the message names those that there are.
    """
    backend = open_storage(storage)
    try:
        return retrying(lambda: optuna.load_study(study_name=name, storage=backend), what=redact(storage))
    except KeyError:
        names = optuna.get_all_study_names(backend)
        there = f"it holds {', '.join(names)}" if names else "it is empty; run the search first"
        raise ValueError(f"{redact(storage)} has no study {name!r}: {there}") from None


def _describe(study: Study, identity: Mapping[str, Any], evaluator: Evaluator, plan: SearchPlan) -> None:
    """What a new study says of itself; the identity comes last, for those who wait for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([evaluator.metric_name, "flops_ratio", *_further(evaluator)])
    study.set_user_attr("low", plan.lowest_cost)
    for key, value in identity.get("search", {}).items():
        study.set_user_attr(f"search_{key}", value)
    study.set_user_attr("identity", dict(identity))


def _further(evaluator: Evaluator) -> Sequence[str]:
    return list(getattr(evaluator, "further", ()))


def _is_described(study: Study) -> bool:
    """Whether a study says what it is, or must have been able to; waits for a worker that is just creating it."""
    deadline = time.monotonic() + 5.0
    while "identity" not in study.user_attrs and not study.get_trials(deepcopy=False):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _check_identity(study: Study, ours: Mapping[str, Any], directions: Sequence[StudyDirection], what: str) -> None:
    theirs = study.user_attrs.get("identity")
    if theirs is None or study.directions[:2] != list(directions[:2]) or len(study.directions) < 2:
        raise ValueError(f"study {study.study_name!r} in {what} is another program's; choose another name or storage")
    differing = [
        f"{key} is {there.get(key, 'not set')!r} there and {here.get(key, 'not set')!r} here"
        for there, here in ((theirs.get(part, {}), ours.get(part, {})) for part in ("evaluator", "plan", "search"))
        for key in sorted(there.keys() | here.keys())
        if there.get(key) != here.get(key)
    ]
    if len(study.directions) != len(directions):
        differing.append(f"there are {len(study.directions)} objectives there and {len(directions)} here")
    if differing:
        raise ValueError(
            f"study {study.study_name!r} in {what} was made with other settings, so that its values must not be mixed "
            f"with these: {'; '.join(differing)}. Choose another name or storage, or use what it was made with"
        )


def score_of(trial: FrozenTrial, search_metric: str) -> float:
    """What the search selects a complete trial by; see :meth:`Evaluation.score`."""
    details = trial.user_attrs.get("details", {})
    return float(trial.values[0] if search_metric == "metric" else details.get(search_metric, math.nan))


def plan_of(study: Study) -> SearchPlan:
    """The plan that a study was made with, except for its cost and the bound on it: enough to count what is done.

    Raises:
        ValueError: The study is another program's.
    """
    identity = study.user_attrs.get("identity")
    if not isinstance(identity, dict) or "plan" not in identity:
        raise ValueError(f"study {study.study_name!r} is another program's: it lacks a plan")
    return make_plan(**{key: value for key, value in identity["plan"].items() if key != "max_cost"})


# ---------------------------------------------------------------------- workers and their lives


@dataclass(frozen=True)
class WorkerId:
    """Who runs a trial: enough to tell, on the same machine, whether that process still lives.

    Attributes:
        host: Host name and a hash of what tells machines and containers apart.
        pid: Process id on that host.
        started: When the process started, in seconds since the epoch.
    """

    host: str
    pid: int
    started: int

    @classmethod
    def of_this_process(cls) -> WorkerId:
        """The calling process."""
        return cls(_this_host(), os.getpid(), int(psutil.Process().create_time()))

    @classmethod
    def parse(cls, text: str) -> WorkerId | None:
        """The inverse of ``str``, or ``None`` for another program's text."""
        host, _, rest = text.rpartition(" pid ")
        pid, _, started = rest.partition(" since ")
        return cls(host, int(pid), int(started)) if host and pid.isdigit() and started.isdigit() else None

    def __str__(self) -> str:
        return f"{self.host} pid {self.pid} since {self.started}"

    def is_known_dead(self) -> bool:
        """Whether the process ran on this machine and runs no more."""
        if self.host != _this_host():
            return False
        try:
            process = psutil.Process(self.pid)
            # The start is derived from a boot time that adjustments of the clock move a little.
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 5
        except psutil.NoSuchProcess:
            return True
        except psutil.AccessDenied:
            return False


@cache
def _this_host() -> str:
    """Host name and a hash of boot and process namespace: containers may share a name, and a name may be reused."""
    marks = [str(Path("/proc/self/ns/pid").stat().st_ino)] if Path("/proc/self/ns/pid").exists() else []
    boot = Path("/proc/sys/kernel/random/boot_id")
    marks.append(boot.read_text(encoding="ascii") if boot.exists() else "")
    return f"{socket.gethostname()}/{sha256(' '.join(marks).encode()).hexdigest()[:6]}"


@dataclass
class _Pulse:
    """A running trial's sign of life as this process saw it, by its own clock."""

    beat: int
    since: float
    suspected: float | None = None


# ---------------------------------------------------------------------- the ledger


@dataclass(frozen=True)
class Claim:
    """A trial that this worker runs.

    Attributes:
        trial_id: Optuna's id of the trial.
        number: The trial's number.
        slot: Its place in the plan.
        config: What to evaluate.
    """

    trial_id: int
    number: int
    slot: int
    config: LengthConfig


Standing = Literal["open", "done", "exhausted", "converged"]


@dataclass(frozen=True)
class Stop:
    """When a search ends before its budget is used up (Figure 4: about 15 generations in the paper).

    Attributes:
        epsilon: The area under the front has to grow by more than this, in the unit of what the search selects by ...
        generations: ... within so many generations.
    """

    epsilon: float
    generations: int

    def reason(self, areas: Sequence[float]) -> str:
        """Why a search with these areas, one after each closed generation, is to end; empty if it is not."""
        if len(areas) <= self.generations:
            return ""
        grown = areas[-1] - areas[-1 - self.generations]
        if grown > self.epsilon:
            return ""
        return (
            f"the area under the front has grown by {grown:.4g} in the last {self.generations} generations, and was to "
            f"grow by more than {self.epsilon:g}"
        )


class Ledger:
    """What one worker knows of a study's trials, and its ways of adding to them.

    Slots ``0..n_trials-1`` are the budget: a slot is used up by a COMPLETE or PRUNED trial; a FAIL trial gives it back.
    Everything is read from the trials. What is kept here saves reading finished ones again.

    Args:
        study: As :func:`open_study` gives it.
        plan: What the slots mean.
        n_trials: How many trials are to finish.
        worker: Who claims; by default this process.
        device: Device that the trials are marked with.
        reproducible: Propose only when all earlier generations are finished.
        stop: When to end before the budget is used up.
        since: Failures of trials below this number are forgiven; by default those before now.
        grace: Seconds without a sign of life after which a worker is held for dead.
        patience: Seconds for which a lost connection is tried again.
    """

    def __init__(
        self,
        study: Study,
        plan: SearchPlan,
        n_trials: int,
        *,
        worker: WorkerId | None = None,
        device: str = "cpu",
        reproducible: bool = False,
        stop: Stop | None = None,
        since: int | None = None,
        grace: float = GRACE_SECONDS,
        patience: float = PATIENCE,
    ) -> None:
        if n_trials < 1:
            raise ValueError(f"n_trials must be at least 1, not {n_trials}")
        self.study = study
        self.plan = plan
        self.n_trials = n_trials
        self.worker = worker or WorkerId.of_this_process()
        self.device = device
        self.reproducible = reproducible
        self.grace = grace
        self.patience = patience
        self.stop = stop
        self.standing: Standing = "open"
        self.reason = ""
        self._storage = study._storage
        attrs = self._try(lambda: study.user_attrs)
        self._low = float(attrs["low"])
        self.metric: str = attrs.get("search_metric", "metric")
        self._metrics: dict[int, float] = {}
        self._scores: dict[int, str] = {}
        self._read = 0
        self._claimed = self._company = False
        self._live: dict[int, FrozenTrial] = {}
        self._finished_slots: set[int] = set()
        self._finished_lengths: set[tuple[int, ...]] = set()
        self._first_open = 0
        self._last_finished = 0
        self._done = 0
        self._failures_of: Counter[tuple[int, ...]] = Counter()
        self._last_success = -1
        self._failed: dict[int, str] = {}
        self._fronts = Fronts(plan)
        self._pulses: dict[int, _Pulse] = {}
        self._generations_written = 0
        self._areas: list[float] = []
        self.refresh()
        self._company = bool(self._live)
        self._since = self._read if since is None else since

    # ------------------------------------------------------------------ reading

    def refresh(self) -> None:
        """Read what has changed. Only trials that were not finished when last seen are looked at."""
        with reading():
            trials = self._try(lambda: self.study.get_trials(deepcopy=False))
        for number in [*self._live, *range(self._read, len(trials))]:
            trial = trials[number]
            if number >= self._read:
                self._company |= trial.user_attrs.get("worker") != str(self.worker)
            if trial.state.is_finished():
                self._live.pop(number, None)
                self._fold(trial)
            else:
                self._live[number] = trial
        self._read = len(trials)
        while self._first_open in self._finished_slots:
            self._first_open += 1

    def _fold(self, trial: FrozenTrial) -> None:
        self._pulses.pop(trial.number, None)
        config = self.config_of(trial)
        if trial.state == TrialState.FAIL:
            reason = trial.user_attrs.get("fail", "no reason given")
            if reason not in (LOST_CLAIM, HANDED_BACK):
                self._failed[trial.number] = reason
                if config is not None:
                    self._failures_of[config.lengths] += 1
            return
        self._last_success = max(self._last_success, trial.number)
        if config is None:
            return
        self._finished_lengths.add(config.lengths)
        slot = _slot(trial)
        if slot is None:
            return  # of another program: not to be repeated, and otherwise no part of the plan
        if slot not in self._finished_slots:
            self._finished_slots.add(slot)
            self._last_finished = max(self._last_finished, slot)
            self._done += slot < self.n_trials
        if trial.state == TrialState.COMPLETE:
            metric, cost, *further = trial.values
            marks = trial.user_attrs.get("marks", {})
            score = score_of(trial, self.metric)
            self._metrics[trial.number] = metric
            if SCORES in trial.system_attrs:
                self._scores[trial.number] = trial.system_attrs[SCORES]
            self._fronts.add(Candidate(slot, trial.number, config, score, cost, tuple(further), marks))
        elif "score" in (seen := trial.user_attrs.get("pruned", {})):
            self._fronts.add_abandoned(Candidate(slot, trial.number, config, seen["score"], seen["cost"]))

    def config_of(self, trial: FrozenTrial) -> LengthConfig | None:
        """A trial's configuration, or ``None`` if it lacks lengths."""
        if not self._names <= trial.params.keys():
            return None
        plan = self.plan
        return LengthConfig.from_parameters(trial.params, plan.num_layers, plan.max_length, plan.retention)

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(parameter_names(self.plan.num_layers))

    @property
    def done(self) -> int:
        """Finished trials of the budget."""
        return self._done

    @property
    def running(self) -> int:
        """Trials that somebody is at."""
        return len(self._live)

    @property
    def failed(self) -> int:
        """Trials that failed, handed back and lost ones apart."""
        return len(self._failed)

    def front(self) -> list[Candidate]:
        """The Pareto front of all finished trials, in rising cost; ``metric`` is what the search selects by."""
        return list(self._fronts.before(self.plan.generation_of(self._last_finished) + 1))

    def metric_of(self, candidate: Candidate) -> float:
        """The metric that people see."""
        return self._metrics[candidate.number]

    # ------------------------------------------------------------------ claiming

    def claim(self) -> Claim | None:
        """Take the lowest free slot, with a configuration that nobody has taken.

        Returns:
            A running trial; or ``None``, and ``standing`` says why: ``"open"`` (all slots are being worked on, or the
            generation has to close first: ask again soon), ``"done"``, ``"exhausted"`` or ``"converged"``. The study's
            attribute ``ended`` then says why.

        Raises:
            SearchError: Ten trials in a row have failed.
            OSError: The storage does not answer, or cannot be written.
        """
        while True:
            self.refresh()
            self._end_dead_trials()
            self._write_generations()
            if self._first_open >= self.n_trials:
                self._ended("done", f"all {self.n_trials} trials are finished")
                return None
            if self.stop is not None and (reason := self.stop.reason(self._areas)):
                # Trials that others run are finished by them; whoever asks next, now or in another run, ends as well.
                self._ended("converged", reason)
                return None
            self._check_failures()
            if self._next_slot() is None:
                return None
            # While nobody has added a trial but us there is nobody to take turns with.
            alone = self._claimed and not self._company
            with nullcontext(True) if alone else turn(self._storage, self.study._study_id) as undisturbed:
                if not alone:
                    self.refresh()
                slot = self._next_slot(undisturbed)
                if slot is None:
                    continue
                proposal = self._propose(slot)
                if proposal is None:
                    # A running trial may yet fail and give its configuration back.
                    if self._live:
                        return None
                    self._ended("exhausted", "every configuration in range has been evaluated")
                    return None
                claim = self._take(slot, proposal)
            if claim is not None:
                self._claimed = True
                return claim

    def _ended(self, standing: Standing, reason: str) -> None:
        self.standing, self.reason = standing, reason
        ended = {"why": reason, "trials": self.done}
        if self._try(lambda: self.study.user_attrs).get("ended") != ended:
            self._try(lambda: self.study.set_user_attr("ended", ended))

    def _next_slot(self, undisturbed: bool = True) -> int | None:
        """The slot to claim now, if there is one.

        Args:
            undisturbed: Whether nobody else claims meanwhile. Otherwise any free slot of the generation is drawn, so
                that few who look at the same time take the same. (A lone worker sees no others and takes the first.)
        """
        free = self._free_slots()
        first = next(free, None)
        if first is None:
            return None
        slots = self.plan.slots_of(self.plan.generation_of(first))
        if self.reproducible and self._first_open < slots.start:
            return None
        if undisturbed or not self._live:
            return first
        return random.choice([first, *takewhile(lambda slot: slot in slots, free)])

    def _propose(self, slot: int) -> Proposal | None:
        running = [config for config in map(self.config_of, self._live.values()) if config is not None]
        live = {config.lengths for config in running}
        excluded = {lengths for lengths, n in self._failures_of.items() if n >= MAX_FAILURES_OF_CONFIG}
        taken = Either(self._finished_lengths, live, excluded)
        return self.plan.choose(slot, self._fronts, taken, running, closed=self.reproducible)

    def _take(self, slot: int, proposal: Proposal) -> Claim | None:
        """Create the trial, and look again: ``None`` if somebody else was faster."""
        trial = optuna.trial.create_trial(
            state=TrialState.RUNNING,
            params=dict(proposal.config.parameters()),
            distributions=self._distributions,
            user_attrs={
                "slot": slot,
                "config": str(proposal.config),
                "generation": proposal.generation,
                "operation": proposal.operation,
                "parents": list(proposal.parents),
                "device": self.device,
                "worker": str(self.worker),
            }
            | ({"marks": dict(proposal.marks)} if proposal.marks else {}),
        )
        seen = self._read
        trial_id = self._create_trial(trial)
        if self._number_is(seen, trial_id):
            # Nobody has added a trial since we looked, so that nobody can have taken the slot or the configuration.
            trial.number, trial._trial_id = seen, trial_id
            self._live[seen] = trial
            self._read = seen + 1
            return Claim(trial_id, seen, slot, proposal.config)
        self.refresh()
        number = next((n for n, other in self._live.items() if other._trial_id == trial_id), None)
        if number is not None and self._is_ours(number, slot, proposal.config):
            return Claim(trial_id, number, slot, proposal.config)
        self._end(trial_id, LOST_CLAIM)
        return None

    def _create_trial(self, trial: FrozenTrial) -> int:
        """A RUNNING trial, whole, in one transaction. The one place that uses a call that Optuna does not document."""
        # If the answer is lost and the trial was created twice, the first one is found as our orphan later.
        return self._try(lambda: self._storage.create_new_trial(self.study._study_id, template_trial=trial))

    def _number_is(self, number: int, trial_id: int) -> bool:
        """Whether a trial that was just created has a number; Optuna's storages remember that for RDBs."""
        study_id = self.study._study_id
        return self._try(lambda: self._storage.get_trial_id_from_study_id_trial_number(study_id, number)) == trial_id

    @cached_property
    def _distributions(self) -> dict[str, BaseDistribution]:
        length = IntDistribution(1, self.plan.max_length)
        return dict.fromkeys(parameter_names(self.plan.num_layers), length)

    def _is_ours(self, number: int, slot: int, config: LengthConfig) -> bool:
        """Whether a new trial stands: of two with one slot or one configuration the lower number does."""
        if slot in self._finished_slots or config.lengths in self._finished_lengths:
            return False
        return not any(
            other < number and (_slot(trial) == slot or self.config_of(trial) == config)
            for other, trial in self._live.items()
        )

    def _free_slots(self) -> Iterator[int]:
        """The slots that nobody has finished or is at."""
        busy = {_slot(trial) for trial in self._live.values()}
        slots = range(self._first_open, self.n_trials)
        return (slot for slot in slots if slot not in self._finished_slots and slot not in busy)

    def _check_failures(self) -> None:
        since = max(self._last_success + 1, self._since)
        # A machine that goes away takes many trials with it, which says nothing about the next one.
        row = [n for n, reason in self._failed.items() if n >= since and not reason.startswith(DIED)]
        if len(row) >= MAX_FAILURES_IN_A_ROW:
            raise SearchError(
                f"{len(row)} trials in a row have failed; the last one, trial {max(row)}: {self._failed[max(row)]}"
            )

    # ------------------------------------------------------------------ ending trials

    def complete(self, claim: Claim, evaluation: Evaluation) -> bool:
        """Tell what was measured; NaN fails the trial.

        Returns:
            Whether the values were taken: not if the trial was meanwhile given to somebody else.
        """
        values = (evaluation.metric, evaluation.cost, *evaluation.further)
        score = evaluation.score(self.metric)
        if any(math.isnan(value) for value in (*values, score)):
            selected = "" if self.metric == "metric" else f", the {self.metric} {score}"
            further = "".join(f", further objectives {value}" for value in evaluation.further)
            costs = f"the cost {evaluation.cost}{further}"
            return self.fail(claim, f"error: the metric is {evaluation.metric}{selected}, {costs}")
        by_example = evaluation.by_example.get(self.metric)
        if by_example is not None and self._is_on_front(score, evaluation.cost):
            # Only for those that others may race against: about one trial in ten.
            scores = pack(by_example)
            try:
                self._try(lambda: self._storage.set_trial_system_attr(claim.trial_id, SCORES, scores))
            except UpdateFinishedTrialError:
                return False
        # One attribute, since each is a transaction of its own.
        details = {"seconds": round(evaluation.seconds, 4), **evaluation.details}
        return self._end(claim.trial_id, None, {"details": details}, TrialState.COMPLETE, values)

    def prune(self, claim: Claim, abandoned: Abandoned) -> bool:
        """End a trial that cannot join the front; its attribute ``pruned`` says what was seen of it.

        Returns:
            Whether that was taken, as in :meth:`complete`.
        """
        seen = {
            "examples": abandoned.examples,
            "metric": abandoned.metric,
            **abandoned.details,
            "score": abandoned.score,
            "cost": self.plan.cost_of(claim.config),
            "seconds": round(abandoned.seconds, 4),
        }
        return self._end(claim.trial_id, None, {"pruned": seen}, TrialState.PRUNED)

    def _is_on_front(self, score: float, cost: float) -> bool:
        # What finished since the last look can only make points leave the front: too many are taken for members.
        return not any(one.cost <= cost and one.metric > score for one in self.front())

    def rival(self, claim: Claim) -> Rival | None:
        """The point of the front that a claimed configuration has to beat in a race.

        Returns:
            The best that costs no more; or ``None``: the configuration is of the initial population, which every front
            is compared with, it is cheaper than the front, the point's scores are not known example by example, or
            there are further objectives, in which the configuration may be better.
        """
        generation = self.plan.generation_of(claim.slot)
        if generation == 0 or len(self.study.directions) > 2:
            return None
        front = self._fronts.before(generation) if self.reproducible else self.front()
        cost = self.plan.cost_of(claim.config)
        cheaper = [one for one in front if one.cost <= cost]
        best = max(cheaper, key=lambda one: one.metric, default=None)
        if best is None or best.number not in self._scores:
            return None
        others = [one for one in front if one is not best and one.number in self._scores]
        others.sort(key=lambda one: (_distance(one.config, claim.config), one.slot))
        neighbours = [unpack(self._scores[one.number]) for one in others[:NEIGHBOURS]]
        return Rival(best.number, self.metric, unpack(self._scores[best.number]), neighbours)

    def fail(self, claim: Claim, reason: str) -> bool:
        """End a trial as failed; its slot is free again."""
        return self._end(claim.trial_id, " ".join(redact(reason).split()))

    def hand_back(self) -> None:
        """Give back whatever this worker has claimed and not finished; not a failure."""
        self.refresh()
        self._end_orphans()

    def beat(self, claim: Claim, count: int) -> None:
        """Show a sign of life."""
        self._storage.set_trial_system_attr(claim.trial_id, "beat", count)

    def _end(
        self,
        trial_id: int,
        fail: str | None,
        attrs: Mapping[str, Any] | None = None,
        state: TrialState = TrialState.FAIL,
        values: tuple[float, ...] | None = None,
    ) -> bool:
        attrs = dict(attrs or {}) if fail is None else {"fail": fail[:LENGTH_OF_REASON]}
        try:
            for key, value in attrs.items():
                self._try(lambda key=key, value=value: self._storage.set_trial_user_attr(trial_id, key, value))
            return self._try(lambda: self._storage.set_trial_state_values(trial_id, state, values))
        except UpdateFinishedTrialError:
            return False  # somebody held us for dead, or an earlier attempt arrived after all

    def _end_orphans(self) -> None:
        for trial in list(self._live.values()):
            if trial.user_attrs.get("worker") == str(self.worker):
                self._end(trial._trial_id, HANDED_BACK)
        self.refresh()

    def _end_dead_trials(self) -> None:
        """End trials whose workers are dead, so that their slots are free again."""
        ended = False
        for trial in list(self._live.values()):
            worker = WorkerId.parse(str(trial.user_attrs.get("worker", "")))
            if _slot(trial) is None or worker is None:
                continue
            if worker == self.worker:
                # We are between trials: this one was created by an attempt whose answer was lost.
                ended |= self._end(trial._trial_id, HANDED_BACK)
            elif worker.is_known_dead() or self._has_no_pulse(trial):
                ended |= self._end(trial._trial_id, f"{DIED}: worker {worker}")
        if ended:
            self.refresh()

    def _has_no_pulse(self, trial: FrozenTrial) -> bool:
        """Whether a trial's counter has stood still for too long by our own clock; machines' clocks differ."""
        now, beat = time.monotonic(), int(trial.system_attrs.get("beat", 0))
        pulse = self._pulses.get(trial.number)
        if pulse is None or pulse.beat != beat:
            self._pulses[trial.number] = _Pulse(beat, now)
            return False
        if now - pulse.since < self.grace:
            return False
        # After a time without connection to the storage nobody's counter has moved: give it time to, once.
        if pulse.suspected is None:
            pulse.suspected = now
        return now - pulse.suspected >= min(3 * BEAT_SECONDS, self.grace)

    # ------------------------------------------------------------------ how far the search is

    def _write_generations(self) -> None:
        """Store AUC and hypervolume of every closed generation on the study (Figure 4)."""
        closed = self.plan.generation_of(self._first_open)
        if closed <= self._generations_written:
            return
        rows = self._try(lambda: self.study.user_attrs).get("generations", [])
        if len(rows) < closed:
            # A row is a function of the trials: workers that write at the same time write the same.
            rows = rows + [self._generation_row(generation) for generation in range(len(rows), closed)]
            self._try(lambda: self.study.set_user_attr("generations", rows))
        self._areas = [float(row["auc"]) for row in rows[:closed]]
        self._generations_written = closed

    def _generation_row(self, generation: int) -> dict[str, float]:
        from lat_optuna.search.front import hypervolume

        points = [(one.metric, one.cost) for one in self._fronts.before(generation + 1)]
        return {
            "generation": generation,
            "trials": self.plan.slots_of(generation).stop,
            "auc": self.auc(points),
            "hypervolume": hypervolume(points),
        }

    def auc(self, points: list[tuple[float, float]] | None = None) -> float:
        """Area under the front of all finished trials, or of some points."""
        from lat_optuna.search.front import auc

        if points is None:
            points = [(one.metric, one.cost) for one in self.front()]
        return auc(points, self._low) if self._low < 1 else max((metric for metric, _ in points), default=0.0)

    def _try(self, call: Any) -> Any:
        return retrying(call, self.patience, f"the storage of study {self.study.study_name!r}")


def _distance(one: LengthConfig, other: LengthConfig) -> int:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True))


def _slot(trial: FrozenTrial) -> int | None:
    slot = trial.user_attrs.get("slot")
    return slot if isinstance(slot, int) else None
