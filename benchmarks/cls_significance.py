"""Does significance from the [CLS] row alone cost accuracy? Constant ratios, same weights, both significances.

Prints the people's metric and the mean log-probability of the right answers on the reporting split (and on the
search's, where the study holds one out), with the FLOPs of both::

    python benchmarks/cls_significance.py studies/sst2-minilm.yaml --set output=... --json cls_significance.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from lat_optuna import LengthConfig, adapt, load
from lat_optuna.pipeline import make_task
from lat_optuna.search.evaluator import ModelEvaluator
from lat_optuna.spec import load_spec

RATIOS = (0.0, 0.1, 0.2, 0.3, 0.36, 0.4, 0.5, 0.6)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    spec = load_spec(args.study, args.overrides)
    task: Any = make_task(spec)
    found = []
    for split in sorted({"validation", spec.search_split}):
        for significance in ("all", "cls"):
            model = adapt(load(spec.adaptive_folder), significance=significance)  # type: ignore[arg-type]
            evaluator = ModelEvaluator(model, task, split)
            for ratio in RATIOS:
                config = LengthConfig.constant_ratio(ratio, evaluator.num_layers, evaluator.max_length)
                one = evaluator.evaluate(config)
                found.append(
                    {
                        "split": split,
                        "significance": significance,
                        "ratio": ratio,
                        "metric": one.metric,
                        "cost": one.cost,
                    }
                    | {"log_prob": one.details.get("log_prob"), "rows": len(task.features(split)["input_ids"])}
                )
                print(found[-1], flush=True)
    print("| split | rows | constant ratio | all: metric | log-prob | FLOPs | cls: metric | log-prob | FLOPs |")
    print("| --- " * 9 + "|")
    for one in found:
        if one["significance"] == "all":
            other = next(
                two
                for two in found
                if (two["split"], two["ratio"], two["significance"]) == (one["split"], one["ratio"], "cls")
            )
            cells = [one["split"], one["rows"], one["ratio"]]
            for each in (one, other):
                cells += [f"{each['metric']:.2f}", f"{each['log_prob']:.4f}", f"{each['cost']:.3f}x"]
            print("| " + " | ".join(map(str, cells)) + " |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
