"""Do fronts hold on rows that neither training nor search saw? Looks at finished studies of any number of seeds.

At each FLOPs ratio: the metric on unseen rows (the test split and, as the search has a split of its own, the
validation split) of the point that each way of choosing picks among all that the search evaluated, and of the constant
ratio within the same cost; paired differences with 95 % intervals by bootstrap over the unseen examples of every seed.
A way's price of selection is what its pick gains over the constant ratio where it was chosen, less what it gains on
unseen rows.

    python benchmarks/unseen.py studies/sst2-minilm.yaml --set output=runs/sst2-minilm --seeds 42,0,1
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lat_optuna.files import write_json
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import load
from lat_optuna.pipeline import default_device, make_plan, make_task
from lat_optuna.reproduce import constant_ratio_within, with_seed
from lat_optuna.search.evaluator import ModelEvaluator
from lat_optuna.search.front import Front, Point
from lat_optuna.search.racing import Racing
from lat_optuna.search.study import load_study
from lat_optuna.search.surrogate import Surrogate
from lat_optuna.spec import StudySpec, load_spec
from lat_optuna.tasks import Split

RATIOS = (0.35, 0.45, 0.55, 0.65, 0.8)
UNSEEN: tuple[Split, ...] = ("validation", "test")
RESAMPLES = 4000
RIDGE = 1e-2


def smoothed_by_trend(points: Sequence[Point], max_length: int) -> np.ndarray:
    """Scores as ridge regression on lengths and their squares expects them."""
    x = np.array([point.lengths for point in points]) / max_length
    y = np.array([point.score for point in points])
    columns = np.concatenate([x, x * x], 1)
    columns = columns - columns.mean(0)
    weights = np.linalg.solve(columns.T @ columns + RIDGE * np.eye(columns.shape[1]), columns.T @ (y - y.mean()))
    return np.asarray(y.mean() + columns @ weights)


def smoothed_by_process(points: Sequence[Point], max_length: int) -> np.ndarray:
    """Scores as the search's surrogate expects them."""
    x = np.array([point.lengths for point in points]) / max_length
    y = np.array([[point.score] for point in points])
    return Surrogate(x, y).predict(x)[0][:, 0]


WAYS = {
    "by score": lambda points, _: np.array([point.score for point in points]),
    "by metric": lambda points, _: np.array([point.metric for point in points]),
    "smoothed by trend": smoothed_by_trend,
    "smoothed by process": smoothed_by_process,
}


class Seed:
    """One finished study."""

    def __init__(self, spec: StudySpec) -> None:
        self.front = Front.of(load_study(spec.storage, spec.name))
        model, task = load(spec.adaptive_folder), make_task(spec)
        kind = {
            "device": default_device(),
            "precision": spec.search.precision,
            "retention": spec.search.retention,
            "racing": Racing(looks=()),
        }
        if spec.task.search_rows is None or spec.task.test_rows is None:
            raise SystemExit(f"{spec.name}: what is unseen needs task.search_rows and task.test_rows")
        splits: tuple[Split, ...] = ("search", *UNSEEN)
        self.evaluators = {split: ModelEvaluator(model, task, split, **kind) for split in splits}
        self.plan = make_plan(spec, self.evaluators["search"])
        points, max_length = self.front.evaluated, self.front.max_length
        self.values = {way: dict(zip(points, value(points, max_length), strict=True)) for way, value in WAYS.items()}

    def scores(self, config: LengthConfig, *splits: Split) -> np.ndarray:
        """The metric of every example, or of the whole splits where it is no mean over examples."""
        found = [self.evaluators[split].evaluate(config) for split in splits]
        values = [np.atleast_1d(one.by_example.get("metric", one.metric)) for one in found]
        return np.concatenate(values).astype(np.float64)

    def picks(self, ratio: float) -> dict[str, LengthConfig]:
        """What each way picks within a ratio, and the constant ratio."""
        points = [point for point in self.front.evaluated if point.cost <= ratio]
        if not points:
            return {}
        picked = {"constant": constant_ratio_within(self.plan, ratio)}
        for way, values in self.values.items():
            best = max(points, key=lambda point, of=values: (of[point], -point.cost))
            picked[way] = LengthConfig(best.lengths, self.front.max_length, self.plan.retention)
        return picked


def interval(differences: Sequence[np.ndarray], rng: np.random.Generator) -> tuple[float, ...]:
    """95 % interval of the mean over seeds of the mean over examples; each seed's examples are resampled.

    Empty where there are no examples but whole splits.
    """
    if min(map(len, differences)) <= len(UNSEEN):
        return ()
    means = [
        np.mean([own[rng.integers(0, len(own), len(own))].mean() for own in differences]) for _ in range(RESAMPLES)
    ]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", help="by default the study file's")
    parser.add_argument("--output", type=Path, help="JSON; the studies in it stay, this one is replaced")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    spec = load_spec(arguments.study, arguments.set)
    numbers = [int(seed) for seed in arguments.seeds.split(",")] if arguments.seeds else [spec.training.seed]
    found: dict[float, dict[str, dict[str, list[np.ndarray]]]] = {ratio: {} for ratio in RATIOS}
    trials = []
    for number in numbers:
        seed = Seed(with_seed(spec, number))
        trials.append(len(seed.front.evaluated))
        for ratio in RATIOS:
            for way, config in seed.picks(ratio).items():
                for rows_of, splits in (("search", ("search",)), ("unseen", UNSEEN)):
                    found[ratio].setdefault(way, {}).setdefault(rows_of, []).append(seed.scores(config, *splits))
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    print(f"{spec.name} by {spec.search.metric}: seeds {numbers}, evaluated in full {trials}\n")
    print("| ratio | way | unseen | - constant | price of selection |\n| ---: | --- | ---: | ---: | ---: |")
    for ratio, ways in found.items():
        for way, splits in ways.items():
            unseen, constant = splits["unseen"], ways["constant"]["unseen"]
            gains = [a - b for a, b in zip(unseen, constant, strict=True)]
            chosen = [a.mean() - b.mean() for a, b in zip(splits["search"], ways["constant"]["search"], strict=True)]
            gain = float(np.mean([own.mean() for own in gains]))
            row = {
                "ratio": ratio,
                "way": way,
                "unseen": float(np.mean([own.mean() for own in unseen])),
                "gain": [gain, *(interval(gains, rng) if way != "constant" else (0.0, 0.0))],
                "price": float(np.mean(chosen)) - gain,
            }
            rows.append(row)
            shown = f"{gain:+.2f}" + (" [{:+.2f}, {:+.2f}]".format(*row["gain"][1:]) if row["gain"][1:] else "")
            print(f"| {ratio} | {way} | {row['unseen']:.2f} | {shown} | {row['price']:+.2f} |", flush=True)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
        counts = {split: evaluator.num_examples for split, evaluator in seed.evaluators.items()}
        sizes = {"search": counts["search"], "unseen": sum(counts[split] for split in UNSEEN)}
        document = {"seeds": numbers, "trials": trials, "examples": sizes, "rows": rows}
        write_json(arguments.output, {**known, f"{spec.name} by {spec.search.metric}": document})


if __name__ == "__main__":
    main()
