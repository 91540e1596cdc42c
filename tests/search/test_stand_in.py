"""The stand-in evaluator keeps the contract that the search builds on."""

from __future__ import annotations

import random

from lat_optuna.length_config import LengthConfig
from lat_optuna.search.evaluator import Evaluator, StandInEvaluator


def test_it_has_the_interface_of_an_evaluator():
    evaluator: Evaluator = StandInEvaluator(num_layers=4, max_length=64)
    assert evaluator.cost(None) == evaluator.cost(LengthConfig.full(4, 64)) == 1.0
    assert evaluator.identity() != StandInEvaluator(num_layers=4, max_length=65).identity()


def test_values_depend_on_the_configuration_alone():
    rng = random.Random(0)
    configs = [LengthConfig.length_drop(0.4, 6, 128, rng) for _ in range(50)]
    first = [StandInEvaluator().evaluate(config) for config in configs]
    again = [StandInEvaluator().evaluate(config) for config in configs]
    assert [(e.metric, e.cost) for e in first] == [(e.metric, e.cost) for e in again]
    assert len({e.metric for e in first}) > 25


def test_the_metric_trades_against_the_cost():
    evaluator = StandInEvaluator()
    small, full = (evaluator.evaluate(c) for c in (LengthConfig.smallest(0.35, 6, 128), LengthConfig.full(6, 128)))
    assert small.metric < full.metric - 5
    assert small.cost < 0.4
