"""The plan, the front and the Optuna sampler (paper: section 3.2)."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
from dataclasses import replace

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.testing.pytest_samplers import (
    BasicSamplerTestCase,
    MultiObjectiveSamplerTestCase,
    RelativeSamplerTestCase,
)

from lat_optuna.length_config import LengthConfig, parameter_names
from lat_optuna.search.evaluator import StandInEvaluator
from lat_optuna.search.front import non_dominated
from lat_optuna.search.plan import Candidate, Fronts, ParetoFront, SearchPlan
from lat_optuna.search.sampler import LengthConfigSampler

optuna.logging.set_verbosity(optuna.logging.WARNING)

PLAN = SearchPlan(num_layers=6, max_length=128, p=0.2, num_initial=5, num_mutations=4, num_crossovers=3)


def candidate(slot, metric, cost, config=None):
    return Candidate(slot, slot, config or LengthConfig.full(2, 64), metric, cost)


def run_by_hand(plan, slots):
    """One worker: every slot is evaluated before the next one is proposed."""
    evaluator = StandInEvaluator(plan.num_layers, plan.max_length)
    fronts, taken, proposals = Fronts(plan), set(), []
    for slot in range(slots):
        proposal = plan.propose(slot, fronts.before(plan.generation_of(slot)), taken)
        assert proposal is not None
        value = evaluator.evaluate(proposal.config)
        taken.add(proposal.config.lengths)
        fronts.add(Candidate(slot, slot, proposal.config, value.metric, value.cost))
        proposals.append(proposal)
    return proposals


# ---------------------------------------------------------------------- plan


def test_slots_are_laid_out_as_the_papers_run():
    assert [PLAN.generation_of(slot) for slot in range(13)] == [0] * 5 + [1] * 7 + [2]
    assert [PLAN.operation_of(slot) for slot in range(5, 13)] == ["mutation"] * 4 + ["crossover"] * 3 + ["mutation"]
    for generation in range(4):
        assert all(PLAN.generation_of(slot) == generation for slot in PLAN.slots_of(generation))
    assert [len(PLAN.slots_of(g)) for g in range(3)] == [5, 7, 7]


@given(st.integers(2, 24), st.integers(64, 512), st.sampled_from([0.1, 0.2, 0.35]), st.integers(2, 30))
@settings(max_examples=30, deadline=None)
def test_the_initial_population_is_spread_evenly_in_cost(L, n, p, initial):
    plan = SearchPlan(num_layers=L, max_length=n, p=p, num_initial=initial)
    configs = [plan.initial(slot) for slot in range(initial)]
    assert configs[0].is_full
    assert configs[-1] == LengthConfig.smallest(p, L, n)
    costs = [plan.cost_of(config) for config in configs]
    assert costs == sorted(costs, reverse=True)
    step = (costs[0] - costs[-1]) / (initial - 1)
    # No ratio changes fewer than the lengths that round at once: a layer's length in all of them at worst.
    assert all(abs(costs[0] - step * slot - cost) <= L * L for slot, cost in enumerate(costs))


def test_proposals_are_new_within_the_range_and_of_the_planned_kind():
    proposals = run_by_hand(PLAN, 60)
    configs = [proposal.config for proposal in proposals]
    assert len(set(configs)) == 60
    assert min(map(PLAN.cost_of, configs)) == PLAN.lowest_cost == PLAN.cost_of(configs[4])
    for slot, proposal in enumerate(proposals):
        assert proposal.generation == PLAN.generation_of(slot)
        assert all(PLAN.generation_of(parent) < proposal.generation for parent in proposal.parents)
        if proposal.operation == "crossover":
            first, second = proposal.parents
            assert first != second
            assert proposal.config == configs[first].crossover(configs[second])
    later = [proposal.operation for proposal in proposals[5:]]
    assert later.count("mutation") > 20
    assert later.count("crossover") > 10


def test_a_proposal_is_a_function_of_seed_slot_and_what_is_visible():
    assert run_by_hand(PLAN, 40) == run_by_hand(PLAN, 40)
    other = replace(PLAN, seed=1)
    assert run_by_hand(other, 40)[:5] == run_by_hand(PLAN, 40)[:5]
    assert run_by_hand(other, 40)[5:] != run_by_hand(PLAN, 40)[5:]


def test_draws_are_the_same_in_every_process():
    code = (
        "from lat_optuna.length_config import LengthConfig\n"
        "from lat_optuna.search.plan import Candidate, SearchPlan\n"
        "plan = SearchPlan(6, 128)\n"
        "front = [Candidate(0, 0, LengthConfig.full(6, 128), 90.0, 1.0)]\n"
        "print([str(plan.propose(slot, front, set()).config) for slot in (1, 22, 30, 60)])"
    )
    outputs = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    plan = SearchPlan(6, 128)
    front = [Candidate(0, 0, LengthConfig.full(6, 128), 90.0, 1.0)]
    here = [str(plan.propose(slot, front, set()).config) for slot in (1, 22, 30, 60)]
    assert outputs == {f"{here}\n"}


def test_crossover_with_one_parent_mutates_it_and_without_parents_draws_at_random():
    crossover = PLAN.slots_of(1)[-1]
    only = candidate(0, 90.0, 768.0, PLAN.full)
    assert PLAN.propose(crossover, [only], set()).operation == "mutation"
    lonely = PLAN.propose(crossover, [], set())
    assert (lonely.operation, lonely.parents) == ("random", ())


def test_a_small_space_is_drawn_to_the_last_configuration_and_then_ends():
    plan = SearchPlan(num_layers=2, max_length=6, p=0.5, num_initial=2, num_mutations=2, num_crossovers=1)
    within = {(a, b) for a in range(1, 7) for b in range(1, a + 1) if a + b >= sum(plan.smallest.lengths)}
    evaluator, fronts, taken = StandInEvaluator(2, 6), Fronts(plan), set()
    for slot in range(len(within)):
        proposal = plan.propose(slot, fronts.before(plan.generation_of(slot)), taken)
        taken.add(proposal.config.lengths)
        value = evaluator.evaluate(proposal.config)
        fronts.add(Candidate(slot, slot, proposal.config, value.metric, value.cost))
    assert taken == within
    assert plan.propose(len(within), fronts.before(9), taken) is None


def test_nothing_is_left_below_the_full_model_without_length_drop():
    plan = SearchPlan(num_layers=12, max_length=384, p=0.0)
    assert plan.propose(0, [], set()).config.is_full
    assert plan.propose(1, [], {plan.full.lengths}) is None


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"p": 1.0}, "p must lie"),
        ({"num_initial": 1}, "num_initial"),
        ({"num_mutations": 0, "num_crossovers": 0}, "one of them"),
        ({"mutation_prob": 1.5}, "mutation_prob"),
        ({"num_layers": 0}, "at least 1 layer"),
        ({"retention": "some"}, "retention"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        SearchPlan(**{"num_layers": 6, "max_length": 128} | wrong)


# ---------------------------------------------------------------------- front

values = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30)


@given(values, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_grown_front_is_the_non_dominated_set_in_any_order(pairs, rng):
    candidates = [candidate(slot, metric, cost) for slot, (metric, cost) in enumerate(pairs)]
    expected = [candidates[index] for index in non_dominated([(float(m), float(c)) for m, c in pairs])]
    rng.shuffle(candidates)
    front = ParetoFront()
    for one in candidates:
        front.add(one)
    assert list(front.members) == expected


def test_nan_never_joins_the_front():
    front = ParetoFront()
    front.add(candidate(0, float("nan"), 1.0))
    front.add(candidate(1, 1.0, float("nan")))
    assert not front.members


def test_fronts_of_generations_leave_out_their_own_and_later_trials():
    rng, fronts = random.Random(3), Fronts(PLAN)
    everything = []
    for slot in rng.sample(range(60), 60):  # late finishers included
        one = candidate(slot, rng.randint(0, 30), rng.randint(0, 30))
        everything.append(one)
        fronts.add(one)
        for generation in (1, 3, 2, 6, 4, 1):
            earlier = sorted((c for c in everything if PLAN.generation_of(c.slot) < generation), key=lambda c: c.slot)
            expected = [earlier[i] for i in non_dominated([(c.metric, c.cost) for c in earlier])]
            assert list(fronts.before(generation)) == expected


# ---------------------------------------------------------------------- in any study of Optuna


class TestOptunasOwnCases(BasicSamplerTestCase, RelativeSamplerTestCase, MultiObjectiveSamplerTestCase):
    @pytest.fixture
    def sampler(self):
        return LengthConfigSampler


def small_sampler(**changes):
    return LengthConfigSampler(6, 128, num_initial=5, num_mutations=4, num_crossovers=3, **changes)


def objective(trial):
    lengths = [trial.suggest_int(name, 1, 128) for name in parameter_names(6)]
    value = StandInEvaluator().evaluate(LengthConfig(tuple(lengths), 128))  # raises if a length rises
    return value.metric, value.cost


def test_a_plain_study_follows_the_plan():
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=small_sampler())
    study.optimize(objective, n_trials=40)
    drawn = [LengthConfig.from_parameters(trial.params, 6, 128) for trial in study.trials]
    assert drawn == [proposal.config for proposal in run_by_hand(PLAN, 40)]


def test_a_plain_study_resumes_exactly_with_a_new_sampler():
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=small_sampler())
    study.optimize(objective, n_trials=23)
    study.sampler = pickle.loads(pickle.dumps(small_sampler()))
    study.optimize(objective, n_trials=17)
    drawn = [LengthConfig.from_parameters(trial.params, 6, 128) for trial in study.trials]
    assert drawn == [proposal.config for proposal in run_by_hand(PLAN, 40)]


def test_directions_are_the_studys():
    flipped = optuna.create_study(directions=["minimize", "maximize"], sampler=small_sampler())
    flipped.optimize(lambda trial: tuple(-value for value in objective(trial)), n_trials=30)
    usual = optuna.create_study(directions=["maximize", "minimize"], sampler=small_sampler())
    usual.optimize(objective, n_trials=30)
    assert [t.params for t in flipped.trials] == [t.params for t in usual.trials]


def test_one_sampler_serves_two_studies():
    sampler = small_sampler()
    studies = [optuna.create_study(directions=["maximize", "minimize"], sampler=sampler) for _ in range(2)]
    for _ in range(20):
        for study in studies:
            study.optimize(objective, n_trials=1)
    assert [t.params for t in studies[0].trials] == [t.params for t in studies[1].trials]


def test_other_parameters_are_drawn_beside_the_lengths():
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=small_sampler())

    def with_more(trial):
        trial.suggest_float("temperature", 0.5, 2.0)
        trial.suggest_categorical("precision", ["fp32", "bf16"])
        return objective(trial)

    study.optimize(with_more, n_trials=20)
    assert len({trial.params["temperature"] for trial in study.trials}) == 20
    assert {trial.params["precision"] for trial in study.trials} == {"fp32", "bf16"}


def test_failed_and_running_trials_are_no_parents():
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=small_sampler())
    study.ask()

    def failing(trial):
        metric, cost = objective(trial)
        return (float("nan"), cost) if trial.number % 3 == 0 else (metric, cost)

    study.optimize(failing, n_trials=30)
    assert sum(trial.state.name == "COMPLETE" for trial in study.trials) == 20


@pytest.mark.parametrize(("name", "high"), [("length_01", 64), ("length_07", 128), ("length_1", 128)])
def test_lengths_that_the_sampler_was_not_made_for_are_refused(name, high):
    study = optuna.create_study(directions=["maximize", "minimize"], sampler=small_sampler())
    with pytest.raises(ValueError, match=r"length_01 \.\.\. length_06 in 1\.\.128"):
        study.optimize(lambda trial: (trial.suggest_int(name, 1, high), 0.0), n_trials=1)


# ---------------------------------------------------------------------- a budget


@given(st.integers(2, 12), st.integers(16, 256), st.floats(0.02, 0.98), st.randoms(use_true_random=False))
@settings(max_examples=50, deadline=None)
def test_scaling_into_the_range_changes_no_more_than_it_must(L, n, share, rng):
    plan = SearchPlan(num_layers=L, max_length=n, p=0.3)
    width = plan.cost_of(plan.full) - plan.lowest_cost
    plan = replace(plan, max_cost=plan.lowest_cost + max(1.0, share * width))
    any_config = LengthConfig(tuple(sorted((rng.randint(1, n) for _ in range(L)), reverse=True)), n)
    fitted = plan.fit(any_config)
    if plan.allows(any_config):
        assert fitted == any_config
    elif plan.cost_of(any_config) < plan.lowest_cost:
        assert all(a >= b for a, b in zip(fitted, any_config, strict=True))
        assert plan.cost_of(fitted) >= plan.lowest_cost
    else:
        assert all(a <= b for a, b in zip(fitted, any_config, strict=True))
        assert plan.cost_of(fitted) <= plan.max_cost


def test_no_proposal_exceeds_the_budget():
    plan = replace(PLAN, max_cost=0.6 * 768)
    costs = [plan.cost_of(proposal.config) for proposal in run_by_hand(plan, 60)]
    assert min(costs) == plan.lowest_cost
    assert 0.57 * 768 < max(costs) <= 0.6 * 768
    assert plan.settings() == PLAN.settings() | {"max_cost": 0.6 * 768}


def test_a_small_space_under_a_budget_is_drawn_to_the_last_configuration():
    plan = SearchPlan(num_layers=3, max_length=6, p=0.5, max_cost=12.0)
    expected = {
        (a, b, c)
        for a in range(1, 7)
        for b in range(1, a + 1)
        for c in range(1, b + 1)
        if plan.lowest_cost <= a + b + c <= 12
    }
    taken = set()
    for slot in range(len(expected)):
        taken.add(plan.propose(slot, [], taken).config.lengths)
    assert taken == expected
    assert plan.propose(0, [], taken) is None


def test_a_budget_below_the_trained_range_is_refused():
    with pytest.raises(ValueError, match="max_cost must lie above"):
        replace(PLAN, max_cost=PLAN.lowest_cost)
