"""The front of a study, the figures that judge it, and choosing from it."""

from __future__ import annotations

import csv
import json
import random

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

from lat_optuna.length_config import LengthConfig
from lat_optuna.model.checkpoint import SideFile
from lat_optuna.search.evaluator import StandInEvaluator
from lat_optuna.search.front import (
    Baselines,
    Front,
    Measured,
    Point,
    auc,
    generations,
    hypervolume,
    non_dominated,
    points_of,
    read_baselines,
    standard_error,
    write_baselines,
)

values = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 12)), max_size=25).map(
    lambda pairs: [(metric * 8.0, cost / 12) for metric, cost in pairs]
)


def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
    return a[0] >= b[0] and a[1] <= b[1] and a != b


# ---------------------------------------------------------------------- arithmetic


@given(values)
def test_the_front_holds_exactly_what_nothing_beats(points):
    front = [points[i] for i in non_dominated(points)]
    assert set(front) == {p for p in points if not any(beats(q, p) for q in points)}
    assert len(front) == len(set(front))
    assert [cost for _, cost in front] == sorted(cost for _, cost in front)


def test_of_equal_points_the_first_trial_stays():
    assert non_dominated([(80.0, 0.5), (80.0, 0.5), (80.0, 0.6)]) == [0]


@given(values)
def test_hypervolume_equals_counting_cells(points):
    # Metrics are multiples of 8 and costs of 1/12: the dominated area is a number of cells of that size.
    cells = sum(
        any(metric >= 8.0 * (i + 1) and cost <= (j + 0.5) / 12 for metric, cost in points)
        for i in range(12)
        for j in range(12)
    )
    assert hypervolume(points) == pytest.approx(cells * 8.0 / 12)


def test_auc_by_hand():
    # From 0.4 to 0.7 a budget buys 60, from 0.7 to 1.0 it buys 90.
    assert auc([(60.0, 0.4), (90.0, 0.7), (50.0, 0.9)], low=0.4) == pytest.approx((60 * 0.3 + 90 * 0.3) / 0.6)


def test_auc_counts_nothing_where_no_point_is_cheap_enough():
    assert auc([(90.0, 0.7)], low=0.4) == pytest.approx(90 * 0.3 / 0.6)
    assert auc([], low=0.4) == 0.0


def test_auc_leaves_out_what_training_never_reached():
    assert auc([(99.0, 0.39), (60.0, 0.4)], low=0.4) == pytest.approx(60.0)
    assert auc([(60.0, 0.4 - 1e-12)], low=0.4) == pytest.approx(60.0)


@given(values, st.tuples(st.floats(0, 100), st.floats(0.1, 1.0)))
def test_one_more_point_never_lowers_the_area(points, point):
    assert auc([*points, point], low=0.25) >= auc(points, low=0.25) - 1e-9
    assert hypervolume([*points, point]) >= hypervolume(points) - 1e-9


@given(values)
def test_auc_lies_between_nothing_and_the_best_metric(points):
    assert 0 <= auc(points, low=1 / 12) <= max((metric for metric, _ in points), default=0.0) + 1e-9


def test_auc_needs_a_range():
    with pytest.raises(ValueError, match=r"low < high.*low=1.0"):
        auc([(80.0, 1.0)], low=1.0)


def test_standard_error_of_an_accuracy():
    assert standard_error(50.0, 100) == pytest.approx(5.0)
    assert standard_error(100.0, 10) == 0.0
    with pytest.raises(ValueError, match="at least 1 example"):
        standard_error(50.0, 0)


# ---------------------------------------------------------------------- from a study


def make_study(n_trials: int = 60, directions=("maximize", "minimize"), num_layers: int = 4) -> optuna.Study:
    """A study as the search writes it, of the stand-in evaluator."""
    study = optuna.create_study(directions=directions)
    study.set_metric_names(["accuracy", "flops_ratio", "latency_ms"][: len(directions)])
    evaluator = StandInEvaluator(num_layers, 64)
    rng = random.Random(1)
    for number in range(n_trials):
        config = LengthConfig.length_drop(0.3, num_layers, 64, rng)
        evaluation = evaluator.evaluate(config)
        parameters = config.parameters()
        study.add_trial(
            create_trial(
                params=parameters,
                distributions={name: IntDistribution(1, 64) for name in parameters},
                values=[evaluation.metric, evaluation.cost, 10 * evaluation.cost][: len(directions)],
                user_attrs={"generation": number // 20, "operation": "mutation", "parents": [0, 1], "seconds": 0.5},
            )
        )
    return study


def test_the_front_of_a_study_knows_its_trials():
    study = make_study()
    front = Front.of(study)
    assert (front.metric, front.max_length) == ("accuracy", 64)
    assert len(front.evaluated) == 60
    assert {point.number for point in front.points} == {trial.number for trial in study.best_trials}
    for point in front.points:
        trial = study.trials[point.number]
        assert dict(zip(sorted(trial.params), point.lengths, strict=True)) == trial.params
        assert (point.metric, point.cost) == tuple(trial.values)
        assert (point.generation, point.operation, point.parents) == (point.number // 20, "mutation", (0, 1))


def test_unfinished_failed_and_pruned_trials_are_no_points():
    study = make_study(20)
    distributions = dict.fromkeys(("length_01", "length_02", "length_03", "length_04"), IntDistribution(1, 64))
    study.enqueue_trial(dict.fromkeys(distributions, 64))
    study.ask(distributions)
    for state in (TrialState.FAIL, TrialState.PRUNED):
        params = dict.fromkeys(distributions, 1)
        study.add_trial(create_trial(state=state, params=params, distributions=distributions))
    assert len(points_of(study)) == 20


def test_points_below_the_trained_range_are_kept_apart():
    everything = Front.of(make_study())
    low = everything.points[len(everything) // 2].cost
    front = Front.of(make_study(), low=low)
    assert min(point.cost for point in front.evaluated) == front.points[0].cost == low
    assert front.extrapolated
    assert all(point.cost < low for point in front.extrapolated)
    assert front.auc() == pytest.approx(auc([(p.metric, p.cost) for p in everything.evaluated], low))


def test_a_third_objective_lies_beside_the_points():
    front = Front.of(make_study(30, ("maximize", "minimize", "minimize")))
    assert front.pairs == Front.of(make_study(30)).pairs
    assert all(point.extra["latency_ms"] == pytest.approx(10 * point.cost) for point in front.points)
    assert front.pick(latency_ms=6.0).cost <= 0.6


def test_a_study_of_ours_says_what_its_lengths_mean():
    study = make_study(20)
    assert (Front.of(study).low, Front.of(study).retention) == (None, "relative")
    study.set_user_attr("low", 0.5)
    study.set_user_attr("identity", {"plan": {"max_length": 96, "retention": "absolute"}})
    front = Front.of(study)
    assert (front.low, front.max_length, front.retention) == (0.5, 96, "absolute")
    assert min(point.cost for point in front.points) >= 0.5


def test_further_figures_of_an_evaluation_lie_beside_the_points():
    study = make_study(1)
    (trial,) = study.trials
    trial.user_attrs["details"] = {"f1": 80.0, "accuracy": 90.0, "note": "none"}
    other = make_study(0)
    other.add_trial(trial)
    (point,) = points_of(other)
    assert point.extra == {"f1": 80.0}


@pytest.mark.parametrize("directions", [("maximize",), ("minimize", "minimize"), ("minimize", "maximize")])
def test_other_objectives_are_refused(directions):
    study = optuna.create_study(directions=directions)
    with pytest.raises(ValueError, match="a metric to maximise, then a cost to minimise"):
        Front.of(study)


def test_an_empty_study_has_an_empty_front():
    front = Front.of(optuna.create_study(directions=["maximize", "minimize"]))
    assert (len(front), front.auc(), front.rows()) == (0, 0.0, [])
    with pytest.raises(ValueError, match="no configuration has been evaluated yet"):
        front.pick(budget=0.5)


def test_area_after_each_generation_is_the_area_of_all_trials_so_far():
    points = points_of(make_study())
    low = min(point.cost for point in points)
    result = generations(points, low)
    assert [(g.number, g.trials) for g in result] == [(0, 20), (1, 40), (2, 60)]
    for generation in result:
        so_far = [(p.metric, p.cost) for p in points if p.generation <= generation.number]
        assert generation.auc == pytest.approx(auc(so_far, low))
        assert generation.hypervolume == pytest.approx(hypervolume(so_far))


# ---------------------------------------------------------------------- choosing


@pytest.fixture
def front() -> Front:
    points = [
        Point((40, 20), 70.0, 0.40, extra={"latency_ms": 5.0}),
        Point((50, 30), 80.0, 0.55, extra={"latency_ms": 9.0}),
        Point((60, 40), 79.5, 0.60, extra={"latency_ms": 6.0}),
        Point((64, 50), 81.0, 0.80, extra={"latency_ms": 12.0}),
        Point((64, 64), 80.5, 1.00, extra={"latency_ms": 14.0}),
    ]
    return Front.from_points(points, "accuracy", 64, low=0.4)


@pytest.mark.parametrize(
    ("condition", "cost"),
    [
        ({}, 0.80),
        ({"budget": 0.4}, 0.40),
        ({"budget": 0.7}, 0.55),
        ({"budget": 1.0}, 0.80),
        ({"max_drop": 0, "dense": 80.0}, 0.55),
        ({"max_drop": 0, "dense": 80.5}, 0.80),
        ({"max_drop": 10, "dense": 80.0}, 0.40),
        ({"latency_ms": 6.0}, 0.60),
        ({"latency_ms": 20.0}, 0.80),
        ({"latency_ms": 20.0, "budget": 0.6}, 0.55),
        ({"max_drop": 1, "dense": 80.5, "latency_ms": 8.0}, 0.60),
    ],
)
def test_picking(front, condition, cost):
    assert front.pick(**condition).cost == cost


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ({"budget": 0.3}, r"at most 0.3 .* the smallest costs 0.4000"),
        ({"budget": 0}, "above 0, not 0"),
        ({"max_drop": 0, "dense": 90.0}, r"reaches 90.00 accuracy .* the best has 81.00"),
        ({"max_drop": -1, "dense": 90.0}, "at least 0, not -1"),
        ({"max_drop": 1}, "not known"),
        ({"latency_ms": 1.0}, "within 1 ms; the fastest needs 5.00 ms"),
    ],
)
def test_what_cannot_be_picked_says_what_can(front, condition, message):
    with pytest.raises(ValueError, match=message):
        front.pick(**condition)


def test_latency_needs_measurements():
    front = Front.from_points([Point((64,), 80.0, 1.0)], "accuracy", 64)
    with pytest.raises(ValueError, match="no latencies were measured"):
        front.pick(latency_ms=5.0)


def test_cheapest_without_loss_equals_brute_force():
    front = Front.of(make_study())
    for dense in (85.0, 88.0, 89.0):
        enough = [point for point in front.evaluated if point.metric >= dense]
        assert front.pick(max_drop=0, dense=dense).cost == min(point.cost for point in enough)


# ---------------------------------------------------------------------- to others


def test_frame_json_and_csv_hold_the_same_points():
    front = Front.of(make_study())
    frame = front.to_frame()
    document = json.loads(front.to_json())
    table = list(csv.DictReader(front.to_csv().splitlines()))
    assert list(frame["configuration"]) == [point.text for point in front.points]
    assert [row["configuration"] for row in document["points"]] == list(frame["configuration"])
    assert [float(row["accuracy"]) for row in table] == list(frame["accuracy"]) == [p.metric for p in front.points]
    assert len(Front.from_points([], "accuracy", 64).to_frame()) == 0


def test_the_front_travels_in_a_checkpoint():
    front = Front.of(make_study())
    side = SideFile(num_layers=4, max_length=64, metric="accuracy", front=front.side_points())
    again = Front.of_side_file(side)
    assert again.pairs == front.pairs
    assert [point.lengths for point in again.points] == [point.lengths for point in front.points]


BASELINES = Baselines(
    metric="accuracy",
    standard=(Measured(90.0), Measured(80.0, 0.6, 0.2, (52, 42, 34, 28))),
    length_adaptive=(Measured(90.5), Measured(89.0, 0.6, 0.2, (52, 42, 34, 28))),
    examples=872,
    model="MiniLM",
    data="SST-2, 872 validation rows",
    protocol="real lengths",
    hardware="2 cores",
    about={"seed": "0"},
)


def test_baselines_come_back_as_written(tmp_path):
    assert read_baselines(tmp_path) is None
    write_baselines(tmp_path, BASELINES)
    assert read_baselines(tmp_path) == BASELINES
    assert BASELINES.dense() == Measured(90.0)
    assert BASELINES.dense("length_adaptive") == Measured(90.5)
    assert Baselines("accuracy").dense() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 9}, "format 9"),
        ({"model": None, "standard": [{"metric": 90.0}]}, "'cost' is missing"),
        ({"standard": [{"metric": float("nan"), "cost": 1, "ratio": 0, "lengths": []}]}, "must be finite"),
        ({"about": []}, "not a valid baselines.json"),
    ],
)
def test_broken_baselines_are_named(tmp_path, change, message):
    path = write_baselines(tmp_path, BASELINES)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message) as error:
        read_baselines(tmp_path)
    assert str(path) in str(error.value)
