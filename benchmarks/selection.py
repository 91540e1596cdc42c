"""By what should a search select? Configurations that were measured in full, selected on one half of the examples.

The examples are parted at random into two halves. At each FLOPs ratio the best configuration on one half is picked, by
the metric, by the mean probability of the right answer or by agreement with the full model, and looked at on the other;
so is the constant ratio. Means over many partitions; intervals by bootstrap over examples, each resample parted anew.

    python benchmarks/selection.py runs/landscapes/sst2.probability --output benchmarks/results/selection.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from searches import RATIOS, SCORES, Landscape

from lat_optuna.files import write_json

PARTITIONS = 10
RESAMPLES = 400


def gains(
    scores: Mapping[str, np.ndarray], cost: np.ndarray, flat: np.ndarray, rng: np.random.Generator, ratio: float
) -> dict[str, float]:
    """Picks on one half, values on the other, of resampled halves that share no example.

    Args:
        scores: Name -> ``[configurations, examples]``.
        cost: Of each configuration.
        flat: Which of them are constant ratios.
        rng: Draws halves and samples.
        ratio: The budget.
    """
    metric = scores["metric"]
    examples = rng.permutation(metric.shape[1])
    here, there = (rng.choice(half, len(half)) for half in np.array_split(examples, 2))
    fitting = np.flatnonzero(cost <= ratio)
    constant = max((one for one in fitting if flat[one]), key=lambda one: cost[one])
    result = {"constant": float(metric[constant, there].mean())}
    for name, values in scores.items():
        best = fitting[np.lexsort((cost[fitting], -values[fitting][:, here].mean(1)))[0]]
        result[name] = float(metric[best, there].mean() - result["constant"])
        result[f"price by {name}"] = float(metric[best, here].mean() - metric[constant, here].mean() - result[name])
    return result


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", help="FOLDER/NAME.WAY, as benchmarks/searches.py wrote them")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    print("| landscape | pool | half | ratio | constant | by | - constant | price of selection |")
    print("| --- | ---: | ---: | ---: | ---: | --- | ---: | ---: |")
    for base in arguments.bases:
        stored = json.loads(Path(f"{base}.json").read_text())
        landscape = Landscape(Path(f"{base}.{next(iter(stored.values()))['split']}.npz"))
        pool = list(landscape.scores)
        cost = np.array([landscape.costs[lengths] for lengths in pool])
        scores = {
            name: np.stack([landscape.scores[lengths][name] for lengths in pool]).astype(np.float64) for name in SCORES
        }
        first = {tuple(trial["lengths"]) for trial in next(iter(stored.values()))["trials"][:22]}
        flat = np.array([lengths in first for lengths in pool])
        for ratio in RATIOS:
            if not (flat & (cost <= ratio)).any():
                continue
            draws = []
            for _ in range(RESAMPLES):
                parts = [gains(scores, cost, flat, rng, ratio) for _ in range(PARTITIONS)]
                draws.append({name: float(np.mean([part[name] for part in parts])) for name in parts[0]})
            table = {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
            here = {"landscape": Path(base).name, "pool": len(pool), "half": scores["metric"].shape[1] // 2}
            for name in SCORES:
                low, high = map(float, np.percentile(table[name], [2.5, 97.5]))
                row = {**here, "ratio": ratio, "constant": float(table["constant"].mean()), "by": name}
                row |= {"gain": [float(table[name].mean()), low, high]}
                row |= {"price": float(table[f"price by {name}"].mean())}
                rows.append(row)
                print(
                    f"| {row['landscape']} | {row['pool']} | {row['half']} | {ratio} | {row['constant']:.2f} "
                    f"| {name} | {row['gain'][0]:+.2f} [{low:+.2f}, {high:+.2f}] | {row['price']:+.2f} |",
                    flush=True,
                )
    if arguments.output:
        write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
