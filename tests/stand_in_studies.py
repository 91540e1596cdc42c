"""Finished studies of the stand-in evaluator, in the form that the search writes, made at once."""

from __future__ import annotations

import random
import warnings
from dataclasses import replace

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import create_trial

from lat_optuna.length_config import LengthConfig
from lat_optuna.search.evaluator import StandInEvaluator
from lat_optuna.search.front import Baselines, Front, Measured

P, LAYERS, MAX_LENGTH = 0.35, 4, 64
EVALUATOR = StandInEvaluator(LAYERS, MAX_LENGTH)
LOW = EVALUATOR.cost(LengthConfig.smallest(P, LAYERS, MAX_LENGTH))


def stand_in_study(
    n_trials: int, name: str = "stand-in", storage=None, directions=("maximize", "minimize")
) -> optuna.Study:
    """A study of random configurations within the trained range, the full and the smallest model first."""
    study = optuna.create_study(study_name=name, directions=directions, storage=storage)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names(["accuracy", "flops_ratio", "latency_ms"][: len(directions)])
    rng = random.Random(0)
    configs = [LengthConfig.full(LAYERS, MAX_LENGTH), LengthConfig.smallest(P, LAYERS, MAX_LENGTH)][:n_trials]
    while len(configs) < n_trials:
        configs.append(LengthConfig.length_drop(P, LAYERS, MAX_LENGTH, rng))
    trials = []
    for number, config in enumerate(configs):
        evaluation = EVALUATOR.evaluate(config)
        attrs = {"generation": number // 10, "operation": "mutation", "parents": [0], "seconds": 0.5}
        trials.append(
            create_trial(
                params=config.parameters(),
                distributions={key: IntDistribution(1, MAX_LENGTH) for key in config.parameters()},
                values=[evaluation.metric, evaluation.cost, 10 * evaluation.cost][: len(directions)],
                user_attrs={**attrs, "worker": f"host-{number % 2}", "device": "cpu"},
            )
        )
    study.add_trials(trials)
    return study


def report_on_other_rows(study: optuna.Study) -> None:
    """What a search with a split of its own leaves behind when it has ended: every point is 1.5 worse on fresh rows."""
    reported = {point.text: {"metric": round(point.metric - 1.5, 4)} for point in front_of(study).evaluated}
    study.set_user_attr("reported", reported)
    study.set_user_attr("examples", {"search": 2000, "reported": 872})


def front_of(study: optuna.Study) -> Front:
    return Front.of(study, low=LOW)


def baselines_of(dense: float = 87.0, *, apart: bool = False) -> Baselines:
    """Baselines that a point of the stand-in's front reaches; the texts hold what HTML and Markdown must escape.

    Args:
        dense: Metric of the standard model.
        apart: Whether they were measured on a reporting split too, 1 worse.
    """

    def curve(top: float, loss: float) -> tuple[Measured, ...]:
        configs = {ratio: LengthConfig.constant_ratio(ratio, LAYERS, MAX_LENGTH) for ratio in (0.1, 0.2, 0.3)}
        points = [Measured(top - loss * ratio, EVALUATOR.cost(c), ratio, c.lengths) for ratio, c in configs.items()]
        curve = [Measured(top), *points]
        return tuple(replace(point, reported=point.metric - 1.0) for point in curve) if apart else tuple(curve)

    return Baselines(
        metric="accuracy",
        standard=curve(dense, 40.0),
        length_adaptive=curve(dense + 0.4, 20.0),
        examples=2000 if apart else 872,
        model="MiniLM <small>",
        data="SST-2 & friends, 872 rows",
        protocol="real lengths",
        hardware="2 cores",
        about={"seeds": "training 42, search 0"},
    )
