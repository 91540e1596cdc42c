"""Searches of a trained model whose every evaluation is kept, example by example: what other benchmarks replay.

Runs the paper's evolutionary search several times, selecting on the search split by the task's metric, by the mean
probability of the right answer or by agreement with the full model, or by the metric on the validation split
(``paper``). Configurations that several runs meet are measured once. Then the points that each front offers at some
budgets, and constant ratios, are measured on the test split. Long, resumable; other benchmarks read what is there.

    python benchmarks/searches.py studies/sst2-minilm.yaml probability --set output=runs/sst2-minilm
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lat_optuna import pipeline
from lat_optuna.files import write_json
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import load
from lat_optuna.search.evaluator import ModelEvaluator
from lat_optuna.search.plan import Candidate, Fronts, SearchPlan
from lat_optuna.search.racing import Racing
from lat_optuna.spec import load_spec

RATIOS = (0.35, 0.45, 0.55, 0.65, 0.8)
SCORES = ("metric", "probability", "agreement")
WAYS = {**{score: ("search", score) for score in SCORES}, "paper": ("validation", "metric")}
"""Way of selecting -> split and score."""


class Landscape:
    """Scores of configurations, example by example, on one split; kept in a file.

    Args:
        path: ``NAME.WAY.SPLIT.npz`` with ``lengths [C, L]``, ``cost [C]`` and, each ``[C, N]``, the :data:`SCORES`.
        evaluator: Measures what is not there yet; ``None`` to only read.
    """

    def __init__(self, path: Path, evaluator: ModelEvaluator | None = None) -> None:
        self.path = path
        self.evaluator = evaluator
        self.costs: dict[tuple[int, ...], float] = {}
        self.scores: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
        if path.exists():
            with np.load(path) as stored:
                parts = {name: stored[name] for name in SCORES}
                for row, (lengths, cost) in enumerate(zip(stored["lengths"].tolist(), stored["cost"], strict=True)):
                    self.costs[tuple(lengths)] = float(cost)
                    self.scores[tuple(lengths)] = {name: values[row] for name, values in parts.items()}

    def __getitem__(self, config: LengthConfig) -> dict[str, np.ndarray]:
        if config.lengths not in self.scores:
            if self.evaluator is None:
                raise KeyError(f"{config} was not measured in {self.path}")
            evaluation = self.evaluator.evaluate(config)
            self.costs[config.lengths] = evaluation.cost
            self.scores[config.lengths] = dict(evaluation.by_example)
            if len(self.scores) % 10 == 0:
                self.save()
        return self.scores[config.lengths]

    def save(self) -> None:
        """Write the file, atomically."""
        names = list(self.scores)
        columns: dict[str, Any] = {part: np.stack([self.scores[lengths][part] for lengths in names]) for part in SCORES}
        temporary = self.path.with_suffix(".tmp.npz")
        np.savez_compressed(
            temporary, lengths=np.array(names), cost=np.array([self.costs[n] for n in names]), **columns
        )
        temporary.replace(self.path)


def search(plan: SearchPlan, landscape: Landscape, score: str, trials: int) -> list[dict[str, Any]]:
    """One run of the search; every trial as ``lengths``, ``cost`` and ``score``."""
    fronts, taken, done = Fronts(plan), set(), []
    for slot in range(trials):
        proposal = plan.choose(slot, fronts, taken)
        assert proposal is not None
        config = proposal.config
        taken.add(config.lengths)
        value = float(np.nanmean(landscape[config][score].astype(np.float64)))
        fronts.add(Candidate(slot, slot, config, value, plan.cost_of(config)))
        done.append({"lengths": config.lengths, "cost": plan.cost_of(config), "score": value})
    return done


def pick(trials: list[dict[str, Any]], budget: float) -> dict[str, Any]:
    """The best trial within a budget."""
    return max((t for t in trials if t["cost"] <= budget), key=lambda t: (t["score"], -t["cost"]))


def constant(plan: SearchPlan, budget: float) -> LengthConfig:
    """The constant-ratio configuration that comes nearest to a budget from below."""
    low, high = 0.0, plan.p
    for _ in range(30):
        middle = (low + high) / 2
        config = LengthConfig.constant_ratio(middle, plan.num_layers, plan.max_length, plan.retention)
        low, high = (low, middle) if plan.cost_of(config) <= budget else (middle, high)
    return LengthConfig.constant_ratio(high, plan.num_layers, plan.max_length, plan.retention)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("way", choices=list(WAYS))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--folder", type=Path, default=Path("runs/landscapes"))
    parser.add_argument("--name", help="of the files; the study's by default")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--trials", type=int, default=62)
    parser.add_argument("--generation", type=int, default=20, help="trials a generation")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    spec = load_spec(arguments.study, arguments.set)
    task, model = pipeline.make_task(spec), load(spec.adaptive_folder)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    base = arguments.folder / f"{arguments.name or spec.name}.{arguments.way}"
    splits = {
        split: Landscape(
            Path(f"{base}.{split}.npz"),
            ModelEvaluator(model, task, split, precision="bf16", racing=Racing(), agreement=True),
        )
        for split in ("search", "validation", "test")
    }
    runs_file = Path(f"{base}.json")
    runs: dict[str, Any] = json.loads(runs_file.read_text()) if runs_file.exists() else {}
    split, score = WAYS[arguments.way]
    evaluator = splits[split].evaluator
    assert evaluator is not None
    for seed in range(arguments.seeds):
        plan = SearchPlan(
            num_layers=evaluator.num_layers,
            max_length=evaluator.max_length,
            retention=evaluator.retention,
            seed=seed,
            p=spec.training.p,
            num_mutations=arguments.generation // 2,
            num_crossovers=arguments.generation // 2,
            cost=evaluator.cost,
        )
        try:
            done = search(plan, splits[split], score, arguments.trials)
        finally:
            splits[split].save()
        picked = {str(ratio): pick(done, ratio)["lengths"] for ratio in RATIOS if ratio >= plan.lowest_cost}
        flat = {ratio: constant(plan, float(ratio)).lengths for ratio in picked}
        for lengths in (*picked.values(), *flat.values()):
            for part in splits.values():  # the same points on all splits: what selection costs
                _ = part[LengthConfig(lengths, plan.max_length, plan.retention)]
        runs[str(seed)] = {"split": split, "score": score, "trials": done, "picked": picked, "constant": flat}
        for part in splits.values():
            part.save()
        write_json(runs_file, runs)
        print(seed, {ratio: "-".join(map(str, lengths)) for ratio, lengths in picked.items()}, flush=True)


if __name__ == "__main__":
    main()
