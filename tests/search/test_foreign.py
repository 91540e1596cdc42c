"""Optuna's own samplers behind the search's slots and ledger."""

from __future__ import annotations

import optuna
import pytest

from lat_optuna.length_config import LengthConfig
from lat_optuna.search.evaluator import StandInEvaluator
from lat_optuna.search.foreign import MAKE, ForeignPlan, make_plan
from lat_optuna.search.plan import Candidate, Fronts, SearchPlan
from lat_optuna.search.study import Ledger, WorkerId, _describe, plan_of

optuna.logging.set_verbosity(optuna.logging.WARNING)

EVALUATOR = StandInEvaluator(4, 64)
SETTINGS = {"num_layers": 4, "max_length": 64, "p": 0.3, "num_initial": 4, "num_mutations": 3, "num_crossovers": 3}
QUICK = [name for name in MAKE if name != "gp"]


def plan_for(name, **changes):
    return make_plan(name, **SETTINGS, cost=EVALUATOR.cost, **changes)


def in_memory(plan):
    study = optuna.create_study(directions=["maximize", "minimize"])
    _describe(study, {"evaluator": {}, "plan": plan.settings()}, EVALUATOR, plan)
    return study


def work(study, plan, n_trials, workers=1, **options):
    """Workers take turns; each claims while the others' trials run. Returns (slot, configuration), sorted."""
    ledgers = [Ledger(study, plan, n_trials, worker=WorkerId("elsewhere", w, 0), **options) for w in range(workers)]
    while True:
        claims = [(ledger, ledger.claim()) for ledger in ledgers]
        for ledger, claim in claims:
            if claim is not None:
                ledger.complete(claim, EVALUATOR.evaluate(claim.config))
        if not any(claim for _, claim in claims):
            return sorted((t.user_attrs["slot"], t.user_attrs["config"]) for t in study.trials if t.values)


@pytest.mark.parametrize(
    ("name", "first", "then"), [("nsga2", 61, 110), ("nsga3", 61, 110), ("tpe", 21, 40), ("random", 21, 40)]
)
def test_a_run_that_is_broken_off_equals_the_unbroken_one(name, first, then):
    study = in_memory(plan_for(name))
    work(study, plan_for(name), first)
    resumed = work(study, plan_for(name), then)
    unbroken = in_memory(plan_for(name))
    assert resumed == work(unbroken, plan_for(name), then)
    assert len({config for _, config in resumed}) == then


@pytest.mark.parametrize("name", ["nsga2", "tpe"])
def test_reproducible_gives_the_same_trials_with_any_number_of_workers(name):
    runs = [work(in_memory(plan_for(name)), plan_for(name), 60, workers, reproducible=True) for workers in (1, 3)]
    assert runs[0] == runs[1]


@pytest.mark.parametrize("name", QUICK)
def test_what_is_drawn_is_new_and_lies_within_the_range_of_costs(name):
    plan = plan_for(name, max_cost=0.7)
    study = in_memory(plan)
    work(study, plan, 60)
    costs = [trial.values[1] for trial in study.trials]
    assert plan.lowest_cost <= min(costs) < max(costs) <= 0.7
    assert {trial.user_attrs["operation"] for trial in study.trials} == {name}


def test_a_genetic_sampler_knows_its_generations_as_in_a_study_of_its_own():
    study = in_memory(plan_for("nsga2"))
    work(study, plan_for("nsga2"), 110)
    generations = [trial.user_attrs["marks"]["NSGAIISampler:generation"] for trial in study.trials]
    assert generations == [0] * 50 + [1] * 50 + [2] * 10


def test_the_gaussian_process_draws_too():
    pytest.importorskip("torch")
    plan = plan_for("gp")
    seen, taken = Fronts(plan), set()
    for slot in range(11):  # ten draws at random come first
        proposal = plan.choose(slot, seen, taken)
        taken.add(proposal.config.lengths)
        value = EVALUATOR.evaluate(proposal.config)
        seen.add(Candidate(slot, slot, proposal.config, value.metric, value.cost))
    assert len(taken) == 11


def test_samplers_are_told_the_values():
    def drawn(sign):
        plan = plan_for("nsga2")
        seen, taken = Fronts(plan), set()
        for slot in range(70):
            proposal = plan.choose(slot, seen, taken)
            taken.add(proposal.config.lengths)
            value = EVALUATOR.evaluate(proposal.config)
            seen.add(Candidate(slot, slot, proposal.config, sign * value.metric, value.cost, (), proposal.marks))
        return [one.config for one in seen.finished()]

    usual, flipped = drawn(1), drawn(-1)
    assert usual[:50] == flipped[:50]
    assert usual[50:] != flipped[50:]


def test_a_study_says_who_draws():
    plan = plan_for("tpe", max_cost=0.7)
    again = plan_of(in_memory(plan))
    assert isinstance(again, ForeignPlan)
    assert again.sampler == "tpe"
    assert plan.settings()["max_cost"] == 0.7
    paper = make_plan("paper", **SETTINGS)
    assert type(plan_of(in_memory(paper))) is SearchPlan
    assert "sampler" not in paper.settings()  # studies of earlier versions go on


def test_an_unknown_sampler_is_named():
    with pytest.raises(ValueError, match=r"nsga2.*not 'cmaes'"):
        make_plan("cmaes", **SETTINGS)


def test_a_small_space_is_drawn_to_the_last_configuration_and_then_ends():
    plan = make_plan("tpe", num_layers=2, max_length=5, p=0.5, num_initial=2, num_mutations=2, num_crossovers=1)
    within = {(a, b) for a in range(1, 6) for b in range(1, a + 1) if plan.allows(LengthConfig((a, b), 5))}
    seen, taken = Fronts(plan), set()
    for slot in range(len(within)):
        proposal = plan.choose(slot, seen, taken)
        taken.add(proposal.config.lengths)
        seen.add(Candidate(slot, slot, proposal.config, 1.0, plan.cost_of(proposal.config), (), proposal.marks))
    assert taken == within
    assert plan.choose(len(within), seen, taken) is None
