"""A study's budget, its claims, and who may join it. Several workers are several ledgers here, in one process."""

from __future__ import annotations

import copy
import os
import random
import subprocess
import sys

import optuna
import pytest

from lat_optuna.length_config import LengthConfig
from lat_optuna.search import study as study_module
from lat_optuna.search.evaluator import Abandoned, Evaluation, StandInEvaluator
from lat_optuna.search.front import generations, points_of
from lat_optuna.search.plan import Candidate, Fronts, SearchPlan
from lat_optuna.search.study import (
    HANDED_BACK,
    LOST_CLAIM,
    Ledger,
    SearchError,
    Stop,
    WorkerId,
    _describe,
    load_study,
    open_study,
)

optuna.logging.set_verbosity(optuna.logging.WARNING)

EVALUATOR = StandInEvaluator(4, 64)
PLAN = SearchPlan(4, 64, p=0.3, num_initial=4, num_mutations=3, num_crossovers=3, cost=EVALUATOR.cost)


def in_memory(plan=PLAN):
    study = optuna.create_study(directions=["maximize", "minimize"])
    _describe(study, {"evaluator": {}, "plan": plan.settings()}, EVALUATOR, plan)
    return study


def ledger_of(study, n_trials, worker=0, plan=PLAN, **options):
    return Ledger(study, plan, n_trials, worker=WorkerId("elsewhere", worker, 0), **options)


def finish(ledger, claim):
    assert ledger.complete(claim, EVALUATOR.evaluate(claim.config))


def work(ledger, limit=10_000):
    """Until nothing is left or open; returns how many trials were finished."""
    for count in range(limit):
        claim = ledger.claim()
        if claim is None:
            return count
        finish(ledger, claim)
    return limit


def table(study):
    """(slot, configuration, values) of the finished trials, in order of the slots."""
    finished = [trial for trial in study.trials if trial.state.name == "COMPLETE"]
    return sorted((t.user_attrs["slot"], t.user_attrs["config"], tuple(t.values)) for t in finished)


def unbroken(n_trials, plan=PLAN):
    study = in_memory(plan)
    assert work(ledger_of(study, n_trials, plan=plan)) == n_trials
    return table(study)


def ends(study):
    return [trial.user_attrs.get("fail") for trial in study.trials if trial.state.name == "FAIL"]


# ---------------------------------------------------------------------- the budget


def test_one_worker_runs_the_plan():
    fronts, taken, expected = Fronts(PLAN), set(), []
    for slot in range(30):
        config = PLAN.propose(slot, fronts.before(PLAN.generation_of(slot)), taken).config
        value = EVALUATOR.evaluate(config)
        fronts.add(Candidate(slot, slot, config, value.metric, value.cost))
        taken.add(config.lengths)
        expected.append((slot, str(config), (value.metric, value.cost)))
    assert unbroken(30) == expected


def test_a_trial_says_what_it_is():
    study = in_memory()
    ledger = ledger_of(study, 8, device="cuda:3")
    work(ledger)
    trial = study.trials[7]
    config = LengthConfig.from_parameters(trial.params, 4, 64)
    assert trial.user_attrs["config"] == str(config)
    assert trial.values == [EVALUATOR.evaluate(config).metric, EVALUATOR.cost(config)]
    assert (trial.user_attrs["generation"], trial.user_attrs["operation"]) == (1, "crossover")
    assert (trial.user_attrs["device"], trial.user_attrs["worker"]) == ("cuda:3", str(ledger.worker))
    assert len(trial.user_attrs["parents"]) == 2
    assert trial.user_attrs["details"]["seconds"] >= 0
    assert study.metric_names == ["accuracy", "flops_ratio"]
    assert len(trial.user_attrs) <= 8  # more break the dashboard's tooltips


def test_asked_for_more_trials_it_goes_on_and_asked_for_fewer_it_is_done():
    study = in_memory()
    assert work(ledger_of(study, 12)) == 12
    assert work(ledger_of(study, 25)) == 13
    assert table(study) == unbroken(25)
    ledger = ledger_of(study, 12)
    assert ledger.claim() is None
    assert (ledger.standing, ledger.done) == ("done", 12)


def test_pruned_trials_count():
    study = in_memory()
    ledger = ledger_of(study, 10)
    study.tell(ledger.claim().number, state=optuna.trial.TrialState.PRUNED)
    assert work(ledger) == 9
    assert ledger.standing == "done"


def test_an_exhausted_space_ends_with_success():
    plan = SearchPlan(2, 5, p=0.5, num_initial=2, num_mutations=2, num_crossovers=1)
    evaluator, study = StandInEvaluator(2, 5), in_memory(plan)
    ledger = ledger_of(study, 1000, plan=plan)
    while (claim := ledger.claim()) is not None:
        ledger.complete(claim, evaluator.evaluate(claim.config))
    assert ledger.standing == "exhausted"
    expected = {f"{a}-{b}" for a in range(1, 6) for b in range(1, a + 1) if a + b >= sum(plan.smallest.lengths)}
    assert {config for _, config, _ in table(study)} == expected


def test_of_an_exhausted_space_a_running_trial_may_come_back():
    plan = SearchPlan(1, 3, p=0.5, num_initial=2, num_mutations=1, num_crossovers=0)
    study = in_memory(plan)
    first, second = ledger_of(study, 9, 1, plan), ledger_of(study, 9, 2, plan)
    held = first.claim()  # which leaves one configuration of two
    claim = second.claim()
    assert second.complete(claim, Evaluation(1.0, 0.5, 0.0))
    while (claim := second.claim()) is not None:
        second.complete(claim, Evaluation(1.0, 0.5, 0.0))
    assert second.standing == "open"
    first.fail(held, HANDED_BACK)
    assert second.claim().config == held.config


def test_no_trials_make_no_study():
    with pytest.raises(ValueError, match="at least 1"):
        ledger_of(in_memory(), 0)


# ---------------------------------------------------------------------- broken off and resumed


@pytest.mark.parametrize("seed", range(3))
def test_a_run_that_is_broken_off_again_and_again_equals_the_unbroken_one(seed):
    rng, study = random.Random(seed), in_memory()
    for attempt in range(12):
        ledger = ledger_of(study, 30, worker=attempt)
        work(ledger, rng.randint(0, 4))
        if ledger.claim() is not None and rng.random() < 0.8:
            ledger.hand_back()
        for trial in study.trials:  # the others died with the trial in hand
            if trial.state.name == "RUNNING":
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    work(ledger_of(study, 30, worker=99))
    assert table(study) == unbroken(30)


# ---------------------------------------------------------------------- several at once


@pytest.mark.parametrize("seed", range(3))
def test_workers_in_any_order_finish_exactly_the_budget_and_repeat_nothing(seed):
    rng, study = random.Random(seed), in_memory()
    ledgers = [ledger_of(study, 40, worker) for worker in range(5)]
    hands = {}
    while any(ledger.standing == "open" for ledger in ledgers):
        ledger = rng.choice(ledgers)
        if ledger in hands:
            claim = hands.pop(ledger)
            if rng.random() < 0.1:
                ledger.fail(claim, HANDED_BACK)
            else:
                finish(ledger, claim)
        elif (claim := ledger.claim()) is not None:
            hands[ledger] = claim
    rows = table(study)
    assert [slot for slot, _, _ in rows] == list(range(40))
    assert len({config for _, config, _ in rows}) == 40
    assert {trial.state.name for trial in study.trials} <= {"COMPLETE", "FAIL"}


def claim_in_between(loser, winner):
    """The loser claims; between its look and its creation of the trial the winner claims too."""
    create, won = loser._create_trial, []

    def late(trial):
        if not won:
            won.append(winner.claim())
        return create(trial)

    loser._create_trial = late
    return loser.claim(), won[0]


def test_of_two_who_claim_one_slot_at_once_the_first_has_it():
    study = in_memory()
    loser, winner = ledger_of(study, 30, 1), ledger_of(study, 30, 2)
    work(winner, 6)
    late, first = claim_in_between(loser, winner)
    assert (first.slot, late.slot) == (6, 7)
    assert first.config != late.config
    assert ends(study) == [LOST_CLAIM]
    assert loser.failed == 0


def test_one_configuration_in_two_slots_is_evaluated_once():
    study = in_memory()
    loser, winner = ledger_of(study, 30, 1), ledger_of(study, 30, 2)
    create, done = loser._create_trial, []

    def late(trial):
        if not done:  # somebody takes the same configuration for another slot, and finishes it
            theirs = copy.deepcopy(trial)
            theirs.user_attrs |= {"slot": 20, "worker": str(winner.worker)}
            done.append(winner._create_trial(theirs))
            winner._end(done[0], None, {}, optuna.trial.TrialState.COMPLETE, (50.0, 0.5))
        return create(trial)

    loser._create_trial = late
    claim = loser.claim()
    assert claim.slot == 0
    assert claim.config != PLAN.full
    assert ends(study) == [LOST_CLAIM]


@pytest.mark.parametrize("workers", [1, 4, 9])
def test_reproducible_gives_the_same_trials_with_any_number_of_workers(workers):
    rng, study = random.Random(workers), in_memory()
    ledgers = [ledger_of(study, 33, worker, reproducible=True) for worker in range(workers)]
    hands = {}
    while any(ledger.standing == "open" for ledger in ledgers):
        ledger = rng.choice(ledgers)
        if ledger in hands:
            claim = hands.pop(ledger)
            if rng.random() < 0.15:
                ledger.fail(claim, HANDED_BACK if rng.random() < 0.8 else "died: somebody")
            else:
                finish(ledger, claim)
        elif (claim := ledger.claim()) is not None:
            hands[ledger] = claim
    assert table(study) == unbroken(33)


def test_reproducible_waits_for_the_generation_to_close():
    study = in_memory()
    ledgers = [ledger_of(study, 30, worker, reproducible=True) for worker in range(5)]
    claims = [ledger.claim() for ledger in ledgers]
    assert [claim and claim.slot for claim in claims] == [0, 1, 2, 3, None]
    assert ledgers[4].standing == "open"
    for ledger, claim in zip(ledgers[:4], claims[:4], strict=True):
        finish(ledger, claim)
    assert ledgers[4].claim().slot == 4


def test_a_trial_that_was_created_twice_by_a_lost_answer_is_given_back():
    study = in_memory()
    ledger = ledger_of(study, 10)
    create, unheard = ledger._storage.create_new_trial, []

    def create_new_trial(*args, **options):
        if not unheard:
            unheard.append(create(*args, **options))
        return create(*args, **options)

    ledger._storage.create_new_trial = create_new_trial
    assert work(ledger) == 10
    assert sorted(ends(study)) == [HANDED_BACK, LOST_CLAIM]
    assert table(study) == unbroken(10)


# ---------------------------------------------------------------------- failures


def run_with_failures(ledger, fails):
    while (claim := ledger.claim()) is not None:
        if fails(claim):
            ledger.fail(claim, f"error: cannot evaluate {claim.config}")
        else:
            finish(ledger, claim)


def test_a_failed_trial_gives_its_slot_back():
    study, seen = in_memory(), set()

    def first_time(claim):
        return claim.slot % 3 == 0 and claim.slot not in seen and not seen.add(claim.slot)

    run_with_failures(ledger_of(study, 20), first_time)
    assert table(study) == unbroken(20)
    assert len(ends(study)) == 7


def test_after_three_failures_a_configuration_is_excluded_and_drawn_anew():
    bad = unbroken(20)[9][1]
    study = in_memory()
    ledger = ledger_of(study, 20)
    run_with_failures(ledger, lambda claim: str(claim.config) == bad)
    assert ends(study) == [f"error: cannot evaluate {bad}"] * 3
    rows = table(study)
    assert ledger.standing == "done"
    assert [slot for slot, _, _ in rows] == list(range(20))
    assert bad not in {config for _, config, _ in rows}
    assert rows[:9] == unbroken(20)[:9]


def test_ten_failures_in_a_row_end_the_search_with_the_last_error_and_a_new_run_may_try_again():
    study = in_memory()
    ledger = ledger_of(study, 20)
    work(ledger, 5)
    with pytest.raises(SearchError, match=r"10 trials in a row .* cannot evaluate"):
        run_with_failures(ledger, lambda claim: True)
    assert len(ends(study)) == 10
    assert work(ledger_of(study, 20)) == 15


def test_a_machine_that_goes_away_with_its_workers_does_not_end_the_search():
    study = in_memory()
    others = [ledger_of(study, 30, worker) for worker in range(14)]
    survivor = ledger_of(study, 30, 99)
    for claim in [ledger.claim() for ledger in others]:
        survivor._end(claim.trial_id, "died: worker elsewhere")
    assert work(survivor) == 30
    assert table(study) == unbroken(30)


def test_handing_back_is_no_failure():
    study = in_memory()
    for worker in range(12):
        ledger = ledger_of(study, 5, worker)
        assert ledger.claim().slot == 0
        ledger.hand_back()
    assert work(ledger_of(study, 5)) == 5
    assert table(study) == unbroken(5)


@pytest.mark.parametrize("value", [(float("nan"), 0.5), (90.0, float("nan"))])
def test_nan_fails_the_trial_and_not_the_study(value):
    study = in_memory()
    ledger = ledger_of(study, 5)
    ledger.complete(ledger.claim(), Evaluation(*value, seconds=0.0))
    assert "nan" in ends(study)[0]
    assert work(ledger) == 5


# ---------------------------------------------------------------------- the dead


def test_a_killed_worker_of_this_machine_is_noticed_at_once():
    study = in_memory()
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    worker = WorkerId(
        WorkerId.of_this_process().host, process.pid, int(study_module.psutil.Process(process.pid).create_time())
    )
    claim = Ledger(study, PLAN, 5, worker=worker).claim()
    other = ledger_of(study, 5)
    assert other.claim().slot == claim.slot + 1  # alive
    other.hand_back()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet collected by its parent
    assert other.claim().slot == claim.slot  # a zombie is dead
    process.wait()
    assert [end for end in ends(study) if end != HANDED_BACK] == [f"died: worker {worker}"]


def test_a_process_with_the_same_number_is_not_the_worker():
    here = WorkerId.of_this_process()
    assert not here.is_known_dead()
    assert WorkerId(here.host, here.pid, here.started - 1000).is_known_dead()
    assert not WorkerId("elsewhere", here.pid, 0).is_known_dead()
    assert WorkerId.parse(str(here)) == here
    assert WorkerId.parse("somebody") is None


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

    monkeypatch.setattr(study_module.time, "monotonic", lambda: Clock.now)
    return Clock


def test_a_worker_elsewhere_without_a_sign_of_life_is_held_for_dead(clock):
    study = in_memory()
    lost, watcher = ledger_of(study, 5, 1), ledger_of(study, 5, 2)
    claim = lost.claim()
    slots = []
    for _ in range(8):
        clock.now += 20
        slots.append(watcher.claim().slot)
        watcher.hand_back()
    assert slots[:3] == [1, 1, 1]
    assert slots[-1] == claim.slot == 0
    # Its values come too late: the slot is somebody else's.
    assert not lost.complete(claim, EVALUATOR.evaluate(claim.config))
    assert work(watcher) == 5
    assert table(study) == unbroken(5)


def test_a_worker_that_shows_signs_of_life_keeps_its_trial(clock):
    study = in_memory()
    slow, watcher = ledger_of(study, 5, 1), ledger_of(study, 5, 2)
    claim = slow.claim()
    for beat in range(40):
        clock.now += 20
        if beat % 2:
            slow.beat(claim, beat)
        assert watcher.claim().slot == 1
        watcher.hand_back()
    finish(slow, claim)


def test_after_a_gap_in_the_connection_everybody_gets_the_time_to_beat(clock):
    study = in_memory()
    slow, watcher = ledger_of(study, 5, 1), ledger_of(study, 5, 2)
    claim = slow.claim()
    watcher.refresh()
    watcher._end_dead_trials()
    clock.now += 600  # nobody could write
    watcher.refresh()
    watcher._end_dead_trials()
    clock.now += 5
    slow.beat(claim, 1)
    clock.now += 30
    watcher.refresh()
    watcher._end_dead_trials()
    finish(slow, claim)


# ---------------------------------------------------------------------- generations


def test_auc_and_hypervolume_of_every_closed_generation_are_on_the_study():
    study = in_memory()
    work(ledger_of(study, 25))  # generations end at 4, 10, 16, 22
    rows = study.user_attrs["generations"]
    assert [(row["generation"], row["trials"]) for row in rows] == [(0, 4), (1, 10), (2, 16), (3, 22)]
    expected = generations(points_of(study), study.user_attrs["low"])
    for row, other in zip(rows, expected, strict=False):
        assert row["auc"] == pytest.approx(other.auc)
        assert row["hypervolume"] == pytest.approx(other.hypervolume)
    assert rows[0]["auc"] < rows[3]["auc"]


# ---------------------------------------------------------------------- the same study or none


def test_a_study_is_created_joined_and_loaded(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    created = open_study(url, "mine", EVALUATOR, PLAN)
    work(Ledger(created, PLAN, 6))
    joined = open_study(url, "mine", EVALUATOR, PLAN)
    assert isinstance(joined, optuna.Study)
    work(Ledger(joined, PLAN, 12))
    assert table(load_study(url, "mine")) == unbroken(12)
    assert joined.user_attrs["low"] == EVALUATOR.cost(PLAN.smallest)


def test_another_checkpoint_or_plan_is_refused_with_what_differs(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    open_study(url, "mine", EVALUATOR, PLAN)

    class Other(StandInEvaluator):
        def identity(self):
            return {**super().identity(), "checkpoint": "abc"}

    with pytest.raises(ValueError, match="checkpoint is 'not set' there and 'abc' here"):
        open_study(url, "mine", Other(4, 64), PLAN)
    with pytest.raises(ValueError, match="seed is 0 there and 7 here"):
        open_study(url, "mine", EVALUATOR, SearchPlan(**PLAN.settings() | {"seed": 7}))
    open_study(url, "another", Other(4, 64), PLAN)


def test_another_programs_study_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="mine", storage=url, directions=["maximize", "minimize"])
    study.add_trial(optuna.create_trial(values=[1.0, 1.0]))
    with pytest.raises(ValueError, match="another program"):
        open_study(url, "mine", EVALUATOR, PLAN)


def test_a_study_whose_creator_was_killed_half_way_is_finished_by_the_next(tmp_path, monkeypatch):
    url = f"sqlite:///{tmp_path}/study.db"
    optuna.create_study(study_name="mine", storage=url, directions=["maximize", "minimize"])
    moments = iter(range(0, 1000, 3))
    monkeypatch.setattr(study_module.time, "monotonic", lambda: float(next(moments)))
    monkeypatch.setattr(study_module.time, "sleep", lambda seconds: None)
    assert open_study(url, "mine", EVALUATOR, PLAN).user_attrs["identity"]["plan"] == PLAN.settings()


def test_a_missing_study_is_named_beside_those_that_there_are(tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(ValueError, match="no study 'mine': it is empty"):
        load_study(url, "mine")
    open_study(url, "yours", EVALUATOR, PLAN)
    with pytest.raises(ValueError, match="no study 'mine': it holds yours"):
        load_study(url, "mine")


# ---------------------------------------------------------------------- ending early


def test_a_search_ends_when_the_area_grows_no_more_and_the_study_says_so():
    study = in_memory()
    ledger = ledger_of(study, 400, stop=Stop(0.01, 3))
    done = work(ledger)
    assert ledger.standing == "converged"
    areas = [row["auc"] for row in study.user_attrs["generations"]]
    grown = [after - before for before, after in zip(areas, areas[3:], strict=False)]
    assert grown[-1] <= 0.01 < min(grown[:-1])  # at the first moment when the rule holds
    assert done == PLAN.slots_of(len(areas) - 1).stop == ledger.done < 400
    assert study.user_attrs["ended"] == {"why": ledger.reason, "trials": done}
    assert "in the last 3 generations" in ledger.reason


def test_a_search_that_ended_early_goes_on_only_if_asked_to():
    study = in_memory()
    done = work(ledger_of(study, 60, stop=Stop(0.5, 2)))
    assert 0 < done < 60
    assert work(ledger_of(study, 60, stop=Stop(0.5, 2))) == 0
    assert work(ledger_of(study, 60)) == 60 - done
    assert table(study) == unbroken(60)
    assert study.user_attrs["ended"] == {"why": "all 60 trials are finished", "trials": 60}


def test_whoever_runs_a_trial_when_the_search_ends_early_finishes_it():
    study = in_memory()
    first, second = (ledger_of(study, 60, worker, stop=Stop(100.0, 1)) for worker in (0, 1))
    work(first, 9)
    held = [second.claim(), first.claim()]
    assert [claim.slot for claim in held] == [9, 10]
    finish(second, held[0])
    assert second.claim() is None
    assert second.standing == "converged"
    finish(first, held[1])
    assert first.claim() is None
    assert first.done == 11


def test_an_abandoned_trial_teaches_and_is_no_parent():
    study = in_memory()
    ledger = ledger_of(study, 30)
    work(ledger, 4)
    claim = ledger.claim()
    ledger.prune(claim, Abandoned(50, 40.0, {}, 0.1, 41.5))
    ledger.refresh()
    (seen,) = ledger._fronts.abandoned(2)
    assert (seen.config, seen.metric, seen.cost) == (claim.config, 41.5, EVALUATOR.cost(claim.config))
    assert seen.config not in [one.config for one in ledger._fronts.finished()]
