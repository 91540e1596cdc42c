"""Does the racing bound hold, and what does racing save? Replays searches whose every evaluation was kept in full.

For each order of the examples the trials of each search come again in their order; from the first generation on each
races the best point of the front that costs no more, and is abandoned or measured in full. What was abandoned is then
looked up in full: it is lost if it would have joined the front.

    python benchmarks/racing.py runs/landscapes/sst2.probability ... --output benchmarks/results/racing.json
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from searches import SCORES, Landscape

from lat_optuna.files import write_json
from lat_optuna.search.racing import LOOKS, Racing, Rival
from lat_optuna.search.study import NEIGHBOURS

VARIANTS: dict[str, tuple[tuple[float, ...], int]] = {
    "default": (LOOKS, NEIGHBOURS),
    "without neighbours": (LOOKS, 0),
    "three looks": ((1 / 4, 1 / 2, 3 / 4), NEIGHBOURS),
}
"""Name -> looks, and points of the front that a rival brings along."""


def replay(
    landscape: Landscape,
    runs: Sequence[Sequence[dict[str, Any]]],
    score: str,
    racing: Racing,
    initial: int,
    neighbours: int,
) -> dict[str, float]:
    """Counts over all runs: trials that raced, were abandoned, belonged on the front, were lost; work done of all."""
    counts = dict.fromkeys(("raced", "abandoned", "belonged", "lost", "work", "full_work"), 0.0)
    for trials in runs:
        complete: list[dict[str, Any]] = []
        for slot, trial in enumerate(trials):
            scores = landscape.scores[tuple(trial["lengths"])][score].astype(np.float64)
            mean, cost, examples = float(np.nanmean(scores)), trial["cost"], len(scores)
            front = [
                one
                for one in complete
                if not any(
                    (other["cost"], -other["mean"]) < (one["cost"], -one["mean"]) and other["mean"] >= one["mean"]
                    for other in complete
                )
            ]
            cheaper = [one for one in front if one["cost"] <= cost]
            seen = examples
            if slot >= initial and cheaper:
                counts["raced"] += 1
                best = max(cheaper, key=lambda one: one["mean"])
                belongs = mean > best["mean"]
                counts["belonged"] += belongs
                near = sorted(
                    (one for one in front if one is not best),
                    key=lambda one: sum(abs(a - b) for a, b in zip(one["lengths"], trial["lengths"], strict=True)),
                )[:neighbours]
                rival = Rival(0, score, best["scores"], [one["scores"] for one in near])
                order = racing.order(examples)
                for stop in racing.stops(examples):
                    so_far = np.full(examples, np.nan)
                    so_far[order[:stop]] = scores[order[:stop]]
                    if racing.is_lost(so_far, rival):
                        seen = stop
                        counts["abandoned"] += 1
                        counts["lost"] += belongs
                        break
            if seen == examples:
                complete.append({**trial, "scores": scores, "mean": mean})
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
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
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
        for score in SCORES:
            for variant in arguments.variants:
                looks, neighbours = VARIANTS[variant]
                total: dict[str, float] = {}
                for seed in range(arguments.orders):
                    racing = Racing(looks=looks, seed=seed)
                    counts = replay(landscape, runs, score, racing, arguments.initial, neighbours)
                    for name, value in counts.items():
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
