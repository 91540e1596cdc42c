"""Studies of three objectives: the metric, FLOPs, and a latency."""

from __future__ import annotations

import itertools
import random

import optuna
import pytest

from lat_optuna.length_config import LengthConfig
from lat_optuna.search.evaluator import StandInEvaluator
from lat_optuna.search.foreign import make_plan
from lat_optuna.search.front import Front, Point
from lat_optuna.search.objectives import WithObjectives
from lat_optuna.search.plan import Candidate, ParetoFront
from lat_optuna.search.study import Ledger, open_study

optuna.logging.set_verbosity(optuna.logging.WARNING)


def latency(config):
    """Late layers cost time, early ones none: a trade that FLOPs know nothing of."""
    return 1.0 if config is None else 0.2 + 0.8 * sum(config.lengths[2:]) / (2 * config.max_length)


def evaluator_with(objective=latency):
    return WithObjectives(StandInEvaluator(4, 64), {"latency_ms": objective})


def searched(tmp_path, sampler, trials):
    evaluator = evaluator_with()
    plan = make_plan(sampler, num_layers=4, max_length=64, p=0.3, num_initial=5, num_mutations=4, cost=evaluator.cost)
    study = open_study(f"sqlite:///{tmp_path}/study.db", "three", evaluator, plan)
    ledger = Ledger(study, plan, trials)
    while (claim := ledger.claim()) is not None:
        ledger.complete(claim, evaluator.evaluate(claim.config))
    return study


@pytest.mark.parametrize("sampler", ["default", "paper", "nsga3", "tpe", "random"])
def test_every_sampler_searches_three_objectives(tmp_path, sampler):
    study = searched(tmp_path, sampler, 24)
    assert [direction.name for direction in study.directions] == ["MAXIMIZE", "MINIMIZE", "MINIMIZE"]
    assert study.metric_names == ["accuracy", "flops_ratio", "latency_ms"]
    for trial in study.trials:
        assert trial.values[2] == latency(LengthConfig.parse(trial.user_attrs["config"], 64))
    best = {trial.number for trial in study.best_trials}  # Optuna's own three-dimensional front
    front = Front.of(study)
    values = {number: study.trials[number].values for number in best}
    assert {tuple(values[number]) for number in best} == {
        (point.metric, point.cost, point.extra["latency_ms"]) for point in front.points
    }


def test_workers_with_other_objectives_are_refused(tmp_path):
    searched(tmp_path, "paper", 3)
    plan = make_plan("paper", num_layers=4, max_length=64, p=0.3, num_initial=5, num_mutations=4)
    url = f"sqlite:///{tmp_path}/study.db"
    with pytest.raises(ValueError, match="latency_ms is '1, "):
        open_study(url, "three", evaluator_with(lambda config: 2 * latency(config)), plan)
    with pytest.raises(ValueError, match="3 objectives there and 2 here"):
        open_study(url, "three", StandInEvaluator(4, 64), plan)


def test_a_race_is_not_run():
    assert evaluator_with().racing is None


def test_the_fronts_hold_what_nothing_beats_in_all_three():
    rng, config = random.Random(0), LengthConfig.full(2, 8)
    values = [tuple(rng.randint(0, 5) for _ in range(3)) for _ in range(120)]

    def beaten(mine):
        return any(o[0] >= mine[0] and o[1] <= mine[1] and o[2] <= mine[2] and o != mine for o in values)

    expected = {value for value in values if not beaten(value)}
    points = [Point((8, 8), float(m), float(c), extra={"latency_ms": float(t)}) for m, c, t in values]
    front = Front.from_points(points, "accuracy", 8, further=["latency_ms"])
    assert [(p.metric, p.cost, p.extra["latency_ms"]) for p in front.points] == sorted(
        expected, key=lambda value: (value[1], -value[0], value[2])
    )
    candidates = [Candidate(slot, slot, config, m, c, (t,)) for slot, (m, c, t) in enumerate(values)]
    for order in (candidates, candidates[::-1]):
        grown = ParetoFront()
        for one in order:
            grown.add(one)
        found = [(one.metric, one.cost, one.further[0]) for one in grown.members]
        assert set(found) == expected
        assert len(found) == len(expected)
        assert all(values.index(value) == one.slot for value, one in zip(found, grown.members, strict=True))
    assert all(a.cost <= b.cost for a, b in itertools.pairwise(grown.members))
