"""Proposals screened by a surrogate."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import optuna
import pytest

from lat_optuna.length_config import LengthConfig, parameter_names
from lat_optuna.search import surrogate
from lat_optuna.search.evaluator import StandInEvaluator
from lat_optuna.search.foreign import make_plan
from lat_optuna.search.front import auc
from lat_optuna.search.plan import Candidate, Fronts, ParetoFront
from lat_optuna.search.sampler import LengthConfigSampler
from lat_optuna.search.study import Ledger, WorkerId, _describe, plan_of
from lat_optuna.search.surrogate import MOST_OBSERVATIONS, ScreenedPlan, Surrogate, _Fit, expected_gain

optuna.logging.set_verbosity(optuna.logging.WARNING)

EVALUATOR = StandInEvaluator(6, 128)
PLAN = ScreenedPlan(6, 128, p=0.3, num_initial=5, num_mutations=4, cost=EVALUATOR.cost)


def run_by_hand(plan, slots, further=lambda config: ()):
    seen, taken, proposals = Fronts(plan), set(), []
    for slot in range(slots):
        proposal = plan.choose(slot, seen, taken)
        value = EVALUATOR.evaluate(proposal.config)
        taken.add(proposal.config.lengths)
        seen.add(Candidate(slot, slot, proposal.config, value.metric, value.cost, further(proposal.config)))
        proposals.append(proposal)
    return proposals


# ---------------------------------------------------------------------- the plan


def test_a_generation_follows_the_initial_population():
    proposals = run_by_hand(PLAN, 21)
    assert [one.operation for one in proposals] == ["constant ratio"] * 5 + ["screened"] * 16
    assert [one.generation for one in proposals] == [0] * 5 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    for one in proposals[5:]:
        assert all(proposals[parent].generation < one.generation for parent in one.parents)


def test_proposals_are_new_and_within_the_range_and_the_budget():
    plan = replace(PLAN, max_cost=0.6)
    configs = [one.config for one in run_by_hand(plan, 25)]
    assert len(set(configs)) == 25
    assert all(plan.lowest_cost <= EVALUATOR.cost(config) <= 0.6 for config in configs)


def test_a_proposal_is_a_function_of_seed_slot_and_what_is_visible():
    assert run_by_hand(PLAN, 15) == run_by_hand(replace(PLAN), 15)
    assert run_by_hand(replace(PLAN, seed=1), 15)[5:] != run_by_hand(PLAN, 15)[5:]


def test_the_order_in_which_trials_became_visible_does_not_matter():
    done = [
        Candidate(slot, slot, one.config, EVALUATOR.evaluate(one.config).metric, EVALUATOR.cost(one.config))
        for slot, one in enumerate(run_by_hand(PLAN, 21))
    ]
    taken, answers = {one.config.lengths for one in done}, set()
    for seed in range(3):
        seen = Fronts(plan := replace(PLAN))
        for one in random.Random(seed).sample(done, len(done)):
            seen.add(one)
        answers.add(plan.choose(21, seen, taken).config)
    assert len(answers) == 1


def test_it_beats_the_papers_search_where_layers_differ():
    """As in trained models, some layers bear a loss of words and others do not; constant ratios know nothing of it."""
    weights = (2.0, 30.0, 1.0, 1.0, 12.0, 0.5)

    def metric(config):
        return 90 - sum(weight * (1 - length / 128) ** 2 for weight, length in zip(weights, config, strict=True))

    def area(plan):
        seen, taken = Fronts(plan), set()
        for slot in range(50):
            config = plan.choose(slot, seen, taken).config
            taken.add(config.lengths)
            seen.add(Candidate(slot, slot, config, metric(config), EVALUATOR.cost(config)))
        return auc([(one.metric, one.cost) for one in seen.finished()], plan.lowest_cost)

    paper = make_plan("paper", num_layers=6, max_length=128, p=0.3, cost=EVALUATOR.cost)
    for seed in range(2):
        assert area(replace(PLAN, seed=seed)) > area(replace(paper, seed=seed)) + 0.1


def test_running_configurations_keep_others_at_a_distance():
    proposals = run_by_hand(PLAN, 13)
    seen, taken = Fronts(PLAN), set()
    for slot, one in enumerate(proposals):
        taken.add(one.config.lengths)
        seen.add(Candidate(slot, slot, one.config, EVALUATOR.evaluate(one.config).metric, EVALUATOR.cost(one.config)))
    running = []
    for slot in range(13, 17):
        running.append(PLAN.choose(slot, seen, taken, running).config)
        taken.add(running[-1].lengths)
    alone = [PLAN.choose(slot, seen, taken - {config.lengths for config in running}).config for slot in range(13, 17)]
    spread = [np.ptp([EVALUATOR.cost(config) for config in configs]) for configs in (running, alone)]
    assert running[0] == alone[0]
    assert running[1:] != alone[1:]
    assert spread[0] > spread[1]


def test_a_small_space_is_drawn_to_the_last_configuration_and_then_ends():
    plan = ScreenedPlan(2, 6, p=0.5, num_initial=2)
    within = {(a, b) for a in range(1, 7) for b in range(1, a + 1) if plan.allows(LengthConfig((a, b), 6))}
    evaluator, seen, taken = StandInEvaluator(2, 6), Fronts(plan), set()
    for slot in range(len(within)):
        proposal = plan.choose(slot, seen, taken)
        taken.add(proposal.config.lengths)
        value = evaluator.evaluate(proposal.config)
        seen.add(Candidate(slot, slot, proposal.config, value.metric, value.cost))
    assert taken == within
    assert plan.choose(len(within), seen, taken) is None


def test_many_trials_are_fitted_by_those_near_the_front_and_by_others(monkeypatch):
    rng, seen, good, bad = random.Random(0), Fronts(PLAN), set(), set()
    for slot in range(MOST_OBSERVATIONS + 120):
        config = LengthConfig.length_drop(0.3, 6, 128, rng)
        hopeless = slot % 3 > 0
        metric = EVALUATOR.evaluate(config).metric - 20 * hopeless
        (bad if hopeless else good).add(metric)
        seen.add(Candidate(slot, slot, config, metric, EVALUATOR.cost(config)))
    fitted = []
    monkeypatch.setattr(surrogate, "Surrogate", lambda x, y: fitted.append(y) or Surrogate(x, y))
    first, second = (PLAN.choose(MOST_OBSERVATIONS + 120 + more, seen, set()) for more in (1, 2))
    assert first.config != second.config
    (y,) = fitted  # once for both
    assert len(y) == MOST_OBSERVATIONS
    assert good <= set(y[:, 0])  # no more than the half that lie nearest
    assert len(bad & set(y[:, 0])) > MOST_OBSERVATIONS / 2


def test_with_a_third_objective_both_prices_are_searched():
    """What is cheap in the third objective differs from what is cheap in the cost: the front holds points for both."""

    def last_layers(config):
        return (sum(config.lengths[3:]) / 384,)

    proposals = run_by_hand(PLAN, 40, further=last_layers)
    early = [sum(one.config.lengths[:3]) / 384 for one in proposals[5:]]
    late = [last_layers(one.config)[0] for one in proposals[5:]]
    assert min(late) < 0.9 * PLAN.lowest_cost
    assert np.ptp(early) > 0.2


# ---------------------------------------------------------------------- in a study


def in_memory(plan):
    study = optuna.create_study(directions=["maximize", "minimize"])
    _describe(study, {"evaluator": {}, "plan": plan.settings()}, EVALUATOR, plan)
    return study


@pytest.mark.parametrize("workers", [2, 7])
def test_reproducible_gives_the_same_trials_with_any_number_of_workers(workers):
    def table(count):
        study, rng, running = in_memory(PLAN), random.Random(count), []
        ledgers = [
            Ledger(study, replace(PLAN), 21, worker=WorkerId("elsewhere", number, 0), reproducible=True)
            for number in range(count)
        ]
        while True:
            for ledger in ledgers:
                claim = ledger.claim() if all(ledger is not other for other, _ in running) else None
                if claim is not None:
                    running.append((ledger, claim))
            if not running:
                return sorted((t.user_attrs["slot"], t.user_attrs["config"]) for t in study.trials if t.values)
            ledger, claim = running.pop(rng.randrange(len(running)))
            ledger.complete(claim, EVALUATOR.evaluate(claim.config))

    assert table(workers) == table(1)


def test_a_study_says_that_it_is_screened():
    assert type(plan_of(in_memory(PLAN))) is ScreenedPlan


def test_it_draws_in_a_plain_study_and_resumes_exactly():
    def objective(trial):
        lengths = [trial.suggest_int(name, 1, 128) for name in parameter_names(6)]
        value = EVALUATOR.evaluate(LengthConfig(tuple(lengths), 128))
        return value.metric, value.cost

    def sampler():
        return LengthConfigSampler(6, 128, p=0.3, preset="default", num_initial=5, num_mutations=4, cost=EVALUATOR.cost)

    study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler())
    study.optimize(objective, n_trials=13)
    study.sampler = sampler()
    study.optimize(objective, n_trials=8)
    drawn = [LengthConfig.from_parameters(trial.params, 6, 128) for trial in study.trials]
    assert drawn == [one.config for one in run_by_hand(PLAN, 21)]


def test_an_unknown_preset_is_named():
    with pytest.raises(ValueError, match="preset must be"):
        LengthConfigSampler(6, 128, preset="best")


# ---------------------------------------------------------------------- the surrogate


def some_configs(count, seed=0):
    rng = random.Random(seed)
    return [LengthConfig.length_drop(0.3, 6, 128, rng) for _ in range(count)]


def test_the_surrogate_knows_what_it_was_told_and_how_well_it_knows_the_rest():
    x = np.array([config.lengths for config in some_configs(60)]) / 128
    far = np.array([config.lengths for config in some_configs(200, seed=1)]) / 128
    truth = lambda x: 90 - 20 * ((1 - x) ** 2 @ np.array([0.4, 0.3, 0.1, 0.1, 0.05, 0.05]))  # noqa: E731
    y = np.stack([truth(x), x.sum(1)], 1)
    fitted = Surrogate(x, y)
    there, certain = fitted.predict(x)
    assert np.abs(there - y).max() < 0.05
    mean, deviation = fitted.predict(far)
    assert np.corrcoef(mean[:, 0], truth(far))[0, 1] > 0.99
    assert np.abs(mean[:, 1] - far.sum(1)).max() < 0.05
    assert certain.max() < deviation.mean()
    assert (np.abs(mean[:, 0] - truth(far)) < 4 * deviation).mean() > 0.95


def test_surprises_are_those_of_fits_without_the_trial():
    x = np.array([config.lengths for config in some_configs(30)]) / 128
    y = np.stack([np.sin(7 * x.sum(1)), x[:, 0]], 1)
    y = (y - y.mean(0)) / y.std(0)
    distance = np.abs(x[:, None] - x).mean(-1)
    whole = _Fit(x, y, distance, scale=0.25, nugget=1e-2)
    for left_out, surprise in enumerate(whole.surprises()):
        others = np.arange(len(x)) != left_out
        fit = _Fit(x[others], y[others], distance[others][:, others], scale=0.25, nugget=1e-2)
        mean, deviation = fit.predict(x[~others], distance[~others][:, others])
        variance = (deviation[0] ** 2 / fit._variance + 1e-2) * whole._variance  # what neighbours do not share, too
        assert surprise == pytest.approx((mean[0, 0] - y[left_out, 0]) ** 2 / variance, rel=1e-5)


def test_where_the_metric_is_wild_it_is_less_certain():
    """Configurations that drop little are the more different ones here: by distance alone it would be the reverse."""

    def truth(x):
        dropped = 1 - x.mean(1)
        return 90 - 10 * dropped + 10 * dropped**4 * np.sin(12 * x).sum(1)

    x = np.array([config.lengths for config in some_configs(400)]) / 128
    fresh = np.array([config.lengths for config in some_configs(200, seed=1)]) / 128
    mean, deviation = Surrogate(x, truth(x)[:, None]).predict(fresh)
    error, (low, high) = np.abs(mean[:, 0] - truth(fresh)), np.quantile(fresh.mean(1), [0.3, 0.7])
    wild, calm = fresh.mean(1) < low, fresh.mean(1) > high
    assert error[wild].mean() > error[calm].mean()
    assert np.median(deviation[wild]) > np.median(deviation[calm])


def test_expected_gain_is_the_mean_gain_of_the_area():
    rng = np.random.default_rng(0)
    front = ParetoFront()
    for cost, metric in ((0.4, 80.0), (0.5, 84.0), (0.7, 86.0)):
        front.add(Candidate(0, 0, LengthConfig.full(2, 8), metric, cost))
    points = [(one.metric - 70.0, one.cost) for one in front.members]
    mean, deviation, cost = (
        np.array([82.0, 85.0, 79.0, 87.0]),
        np.array([1.0, 2.0, 3.0, 0.5]),
        np.array([0.45, 0.6, 0.3, 0.9]),
    )
    exact = expected_gain(front.members, mean, deviation, cost, 1.0, 70.0)
    for index in range(4):
        draws = mean[index] + deviation[index] * rng.standard_normal(20_000)
        gains = [auc([*points, (draw - 70.0, cost[index])], 0.0) - auc(points, 0.0) for draw in draws[:4000]]
        error = np.std(gains) / len(gains) ** 0.5
        assert abs(np.mean(gains) - exact[index]) < 5 * error + 1e-6
