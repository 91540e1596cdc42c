"""By what should a search select? Configurations that were measured in full, selected on one half of the examples.

The examples are parted at random into two halves. At each FLOPs ratio the best configuration on one half is picked, by
the metric or by the mean probability of the right answer, and looked at on the other; so is the constant ratio. Means
over many partitions; intervals by bootstrap over examples, each resample parted anew.

    python benchmarks/selection.py runs/landscapes/sst2.ours --output benchmarks/results/selection.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from searches import RATIOS, Landscape

from lat_optuna.files import write_json

PARTITIONS = 10
RESAMPLES = 400


def gains(
    metric: np.ndarray,
    probability: np.ndarray,
    cost: np.ndarray,
    flat: np.ndarray,
    rng: np.random.Generator,
    ratio: float,
) -> dict[str, float]:
    """Picks on one half, values on the other, of resampled halves that share no example.

    Args:
        metric: ``[configurations, examples]``.
        probability: Likewise.
        cost: Of each configuration.
        flat: Which of them are constant ratios.
        rng: Draws halves and samples.
        ratio: The budget.
    """
    examples = rng.permutation(metric.shape[1])
    here, there = (rng.choice(half, len(half)) for half in np.array_split(examples, 2))
    fitting = np.flatnonzero(cost <= ratio)
    constant = max((one for one in fitting if flat[one]), key=lambda one: cost[one])
    result = {"constant": float(metric[constant, there].mean())}
    for name, scores in (("by metric", metric), ("by probability", probability)):
        best = fitting[np.lexsort((cost[fitting], -scores[fitting][:, here].mean(1)))[0]]
        result[name] = float(metric[best, there].mean())
        gain_here = metric[best, here].mean() - metric[constant, here].mean()
        result[f"price {name}"] = float(gain_here - (result[name] - result["constant"]))
    return result


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", help="FOLDER/NAME.WAY, as benchmarks/searches.py wrote them")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    print(
        "| landscape | pool | half | ratio | constant | by metric | by probability | probability - metric | "
        "probability - constant | price by metric | price by probability |\n" + "| --- " + "| ---: " * 10 + "|"
    )
    for base in arguments.bases:
        stored = json.loads(Path(f"{base}.json").read_text())
        landscape = Landscape(Path(f"{base}.{next(iter(stored.values()))['split']}.npz"))
        pool = list(landscape.scores)
        cost = np.array([landscape.costs[lengths] for lengths in pool])
        metric, probability = (
            np.stack([landscape.scores[lengths][name] for lengths in pool]).astype(np.float64)
            for name in ("metric", "probability")
        )
        first = {tuple(trial["lengths"]) for trial in next(iter(stored.values()))["trials"][:22]}
        flat = np.array([lengths in first for lengths in pool])
        for ratio in RATIOS:
            if not (flat & (cost <= ratio)).any():
                continue
            draws = []
            for _ in range(RESAMPLES):
                parts = [gains(metric, probability, cost, flat, rng, ratio) for _ in range(PARTITIONS)]
                draws.append({name: float(np.mean([part[name] for part in parts])) for name in parts[0]})
            table = {name: np.array([draw[name] for draw in draws]) for name in draws[0]}
            row: dict[str, Any] = {"landscape": Path(base).name, "pool": len(pool), "half": metric.shape[1] // 2}
            row |= {"ratio": ratio, **{name: float(values.mean()) for name, values in table.items()}}
            cells = []
            for other in ("by metric", "constant"):
                difference = table["by probability"] - table[other]
                row[f"by probability - {other}"] = [
                    float(difference.mean()),
                    *map(float, np.percentile(difference, [2.5, 97.5])),
                ]
                cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[f"by probability - {other}"]))
            rows.append(row)
            print(
                f"| {row['landscape']} | {row['pool']} | {row['half']} | {ratio} | {row['constant']:.2f} | "
                f"{row['by metric']:.2f} | {row['by probability']:.2f} | {cells[0]} | {cells[1]} | "
                f"{row['price by metric']:+.2f} | {row['price by probability']:+.2f} |",
                flush=True,
            )
    if arguments.output:
        write_json(arguments.output, rows)


if __name__ == "__main__":
    main()
