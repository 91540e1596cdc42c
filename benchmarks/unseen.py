"""Do fronts hold on rows that neither training nor search saw? Reads what ``benchmarks/searches.py`` kept.

At each FLOPs ratio: the metric on the test split of the point picked from our front, from the paper's way, and of the
constant ratio; means over the seeds of the search, with 95 % intervals of the paired differences by bootstrap over test
examples and seeds.

    python benchmarks/unseen.py runs/landscapes/sst2 runs/landscapes/stdlib --output benchmarks/results/unseen.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from searches import Landscape

from lat_optuna.files import write_json

RESAMPLES = 4000


def interval(differences: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the mean of ``differences [seeds, examples]``, both resampled."""
    seeds, examples = differences.shape
    means = []
    for _ in range(RESAMPLES):
        rows = differences[rng.integers(0, seeds, seeds)].mean(0)
        means.append(rows[rng.integers(0, examples, examples)].mean())
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", help="FOLDER/NAME, as benchmarks/searches.py wrote them")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    results: list[dict[str, Any]] = []
    print(
        "| landscape | ratio | ours | paper | constant | ours - constant | ours - paper | price, ours | paper "
        "|\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for base in arguments.bases:
        runs = {way: json.loads(Path(f"{base}.{way}.json").read_text()) for way in ("ours", "paper")}
        seeds = sorted(set(runs["ours"]) & set(runs["paper"]))
        tests = {way: Landscape(Path(f"{base}.{way}.test.npz")) for way in runs}
        selected = {way: Landscape(Path(f"{base}.{way}.{next(iter(runs[way].values()))['split']}.npz")) for way in runs}
        for ratio in runs["ours"][seeds[0]]["picked"]:
            test: dict[str, np.ndarray] = {}
            price: dict[str, float] = {}
            for way, stored in runs.items():
                picks = [tuple(stored[seed]["picked"][ratio]) for seed in seeds]
                flat = tuple(stored[seeds[0]]["constant"][ratio])
                test[way] = np.stack([tests[way].scores[pick]["metric"] for pick in picks]).astype(np.float64)
                test["constant"] = np.stack([tests[way].scores[flat]["metric"]] * len(seeds)).astype(np.float64)
                # What the pick gains over the constant ratio where it was selected, less what it gains elsewhere.
                there = np.mean([selected[way].scores[pick]["metric"].mean(dtype=np.float64) for pick in picks])
                gain = there - selected[way].scores[flat]["metric"].mean(dtype=np.float64)
                price[way] = float(gain - (test[way].mean() - test["constant"].mean()))
            row: dict[str, Any] = {
                "landscape": Path(base).name,
                "ratio": float(ratio),
                "seeds": len(seeds),
                "trials": len(runs["ours"][seeds[0]]["trials"]),
                "test_examples": test["ours"].shape[1],
                **{name: float(values.mean()) for name, values in test.items()},
                "price": price,
            }
            for other in ("constant", "paper"):
                difference = test["ours"] - test[other]
                row[f"ours - {other}"] = [float(difference.mean()), *interval(difference, rng)]
            results.append(row)
            cells = ["{:+.2f} [{:+.2f}, {:+.2f}]".format(*row[f"ours - {other}"]) for other in ("constant", "paper")]
            print(
                f"| {row['landscape']} | {ratio} | {row['ours']:.2f} | {row['paper']:.2f} | {row['constant']:.2f} | "
                f"{cells[0]} | {cells[1]} | {price['ours']:+.2f} | {price['paper']:+.2f} |",
                flush=True,
            )
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
