"""Does the racing bound hold, and what does racing save? Replays searches whose every evaluation was kept in full.

For each order of the examples the trials of each search come again in their order; from the first generation on each
races the best point of the front that costs no more, and is abandoned or measured in full. What was abandoned is then
looked up in full: it is lost if it would have joined the front.

    python benchmarks/racing.py runs/landscapes/sst2.ours ... --output benchmarks/results/racing.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from searches import Landscape

from lat_optuna.files import write_json
from lat_optuna.search.racing import LOOKS, Racing

VARIANTS: dict[str, tuple[float, ...]] = {
    "default": LOOKS,
    "four looks": (1 / 8, 1 / 4, 1 / 2, 3 / 4),
    "fifteen looks": tuple(k / 16 for k in range(1, 16)),
}


def replay(
    landscape: Landscape, runs: Sequence[Sequence[dict[str, Any]]], score: str, racing: Racing, initial: int
) -> dict[str, float]:
    """Counts over all runs: trials that raced, were abandoned, belonged on the front, were lost; work done of all."""
    counts = dict.fromkeys(("raced", "abandoned", "belonged", "lost", "work", "full_work"), 0.0)
    for trials in runs:
        front: list[tuple[float, np.ndarray, float]] = []  # cost, scores, mean; dominated ones stay: the best is taken
        for slot, trial in enumerate(trials):
            scores = landscape.scores[tuple(trial["lengths"])][score].astype(np.float64)
            mean, cost, examples = float(np.nanmean(scores)), trial["cost"], len(scores)
            cheaper = [member for member in front if member[0] <= cost]
            seen = examples
            if slot >= initial and cheaper:
                counts["raced"] += 1
                rival = max(cheaper, key=lambda member: member[2])
                belongs = mean > rival[2]
                counts["belonged"] += belongs
                order, differences = racing.order(examples), scores - rival[1]
                for stop in racing.stops(examples):
                    if racing.is_lost(differences[order[:stop]], examples):
                        seen = stop
                        counts["abandoned"] += 1
                        counts["lost"] += belongs
                        break
            if seen == examples:
                front.append((cost, scores, mean))
            counts["work"] += cost * seen / examples
            counts["full_work"] += cost
    return counts


def upper_bound(events: float, trials: float) -> float:
    """Upper end of Wilson's 95 % interval of a share."""
    if not trials:
        return math.nan
    z, share = 1.96, events / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return (centre + spread) / (1 + z * z / trials)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bases", nargs="+", help="NAME.WAY, as benchmarks/searches.py wrote them")
    parser.add_argument("--orders", type=int, default=20)
    parser.add_argument("--initial", type=int, default=22)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results = []
    print(
        "| landscape | examples | score | looks | raced | abandoned | would have joined, of the abandoned | bound "
        "| lost of those that belong | work |\n| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for base in arguments.bases:
        stored = json.loads(Path(f"{base}.json").read_text())
        split = next(iter(stored.values()))["split"]
        landscape = Landscape(Path(f"{base}.{split}.npz"))
        runs = [run["trials"] for run in stored.values()]
        for score in ("metric", "probability"):
            for variant, looks in VARIANTS.items():
                total: dict[str, float] = {}
                for seed in range(arguments.orders):
                    racing = Racing(looks=looks, seed=seed)
                    for name, value in replay(landscape, runs, score, racing, arguments.initial).items():
                        total[name] = total.get(name, 0.0) + value
                examples = len(next(iter(landscape.scores.values()))[score])
                row = {
                    "landscape": Path(base).name,
                    "split": split,
                    "examples": examples,
                    "searches": len(runs),
                    "orders": arguments.orders,
                    "score": score,
                    "looks": variant,
                    **total,
                    "share_lost": total["lost"] / max(1.0, total["abandoned"]),
                    "bound": upper_bound(total["lost"], total["abandoned"]),
                    "share_of_work": total["work"] / total["full_work"],
                }
                results.append(row)
                print(
                    f"| {row['landscape']} | {examples} | {score} | {variant} | {total['raced']:.0f} | "
                    f"{total['abandoned']:.0f} | {100 * row['share_lost']:.2f} % ({total['lost']:.0f}) | "
                    f"{100 * row['bound']:.2f} % | {100 * total['lost'] / max(1.0, total['belonged']):.2f} % of "
                    f"{total['belonged']:.0f} | {row['share_of_work']:.2f} |",
                    flush=True,
                )
    if arguments.output:
        write_json(arguments.output, results)


if __name__ == "__main__":
    main()
