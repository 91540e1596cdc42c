"""What an evaluation costs under the paper's protocol and under ours, part by part, side by side on one machine.

The paper pads every input to ``max_length`` and computes attention eagerly in fp32, without kernels. That side runs the
rectangles that it would run: every example is given ``max_length`` tokens that count as real. The other sides run the
same constant ratios at real lengths. Sides take turns; times are medians over the rounds: of one thread, or of the GPU
where there is one.

    python benchmarks/evaluator.py studies/sst2-minilm.yaml --set output=runs/sst2-minilm --rows 512
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch

from lat_optuna import pipeline
from lat_optuna.files import write_json
from lat_optuna.length_config import LengthConfig
from lat_optuna.model import kernels, load, significance
from lat_optuna.search.evaluator import ModelEvaluator
from lat_optuna.spec import load_spec

RATIOS = (0.05, 0.12, 0.2, 0.3)
PADDED_BATCH = {"cpu": 32, "cuda": 128}


class Part:
    """A task with the first rows of a split alone."""

    def __init__(self, task: Any, split: str, rows: int) -> None:
        self._task, self._split, self._rows = task, split, rows

    def __getattr__(self, name: str) -> Any:
        if name in ("score_examples", "examples", "log_probs"):
            raise AttributeError(name)
        return getattr(self._task, name)

    def features(self, split: str) -> Any:
        """The first rows' features."""
        whole = self._task.features(split)
        return whole.select(range(min(self._rows, len(whole))))

    def score(self, split: str, predictions: Any) -> dict[str, float]:
        """Their metrics."""
        scores = self._task.score_examples(split, range(len(predictions)), predictions)
        return {name: float(values.mean()) for name, values in scores.items()}


@contextmanager
def probabilities_written() -> Iterator[None]:
    """Attention of layers that drop by torch's operators on the whole batch, as eager attention is."""
    none = dict.fromkeys(kernels.BY_DEVICE)
    with patch.dict(kernels.BY_DEVICE, none), patch.object(significance, "BLOCK", 2**62):
        yield


def padded(model: Any, task: Part, split: str) -> Callable[[LengthConfig], float | None]:
    """An evaluation under the paper's protocol; its predictions are of no use, its time is."""
    features = task.features(split)
    vocabulary = torch.tensor([tokens for row in features["input_ids"][:] for tokens in row])
    count = len(features)
    ids = vocabulary[torch.arange(count * task.max_length) % len(vocabulary)].view(count, task.max_length)
    batches = ids.to(model.device).split(PADDED_BATCH[model.device.type])

    def evaluate(config: LengthConfig) -> None:
        absolute = LengthConfig(config.lengths, config.max_length, "absolute")
        with probabilities_written(), torch.inference_mode(), model.at(absolute):
            for batch in batches:
                model(input_ids=batch)
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    return evaluate


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu-time", action="store_true", help="count the thread's own time: on a busy machine")
    parser.add_argument("--no-compiled", action="store_true", help="compiling takes minutes")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    spec = load_spec(arguments.study, arguments.set)
    split = spec.search_split
    task: Any = Part(pipeline.make_task(spec), split, arguments.rows)
    device = pipeline.default_device()
    model = load(spec.adaptive_folder).eval().to(device)
    eager = load(spec.adaptive_folder, attn_implementation="eager").eval().to(device)

    def ours(model: Any, written: bool = False, **settings: Any) -> Callable[[LengthConfig], float | None]:
        evaluator = ModelEvaluator(model, task, split, device, **settings)

        def evaluate(config: LengthConfig) -> float | None:
            with probabilities_written() if written else nullcontext():
                return evaluator._measure(config).metric

        return evaluate

    sides = {
        "padded, eager, fp32 (the paper)": padded(eager, task, split),
        "real lengths, eager, fp32": ours(eager, written=True),
        "real lengths, SDPA, fp32": ours(model),
        "real lengths, SDPA, fp32, compiled": ours(model, compiled=True),
        "real lengths, SDPA, bf16": ours(model, precision="bf16"),
        "real lengths, SDPA, bf16, compiled": ours(model, precision="bf16", compiled=True),
    }
    if arguments.no_compiled:
        sides = {name: side for name, side in sides.items() if not name.endswith("compiled")}
    layers = model.config.num_hidden_layers
    configs = [LengthConfig.constant_ratio(ratio, layers, task.max_length) for ratio in RATIOS]
    seconds: dict[str, list[list[float]]] = {name: [[] for _ in configs] for name in sides}
    metrics: dict[str, list[float | None]] = {}
    for name, side in sides.items():  # the first pass makes batches, compiles, and warms caches
        metrics[name] = [side(configs[-1])]
    for round_number in range(arguments.rounds):
        for number, config in enumerate(configs):
            for name, side in sides.items():
                start = clock()
                metric = side(config)
                seconds[name][number].append(clock() - start)
                if round_number == 0:
                    metrics[name].append(metric)
        table = {name: [median(times) for times in rows] for name, rows in seconds.items()}
        first = sum(next(iter(table.values())))
        rows = [
            {
                "side": name,
                "seconds": times,
                "per_second": arguments.rows * len(configs) / sum(times),
                "ratio": first / sum(times),
                "metric": metrics[name][1:],
            }
            for name, times in table.items()
        ]
        if arguments.output:
            document = {
                "study": spec.name,
                "rows": arguments.rows,
                "ratios": RATIOS,
                "rounds": round_number + 1,
                "clock": "CPU time" if arguments.cpu_time else "wall time",
            }
            write_json(arguments.output, {**document, "device": pipeline.describe_hardware(device), "sides": rows})
    print("| side | examples/s | times the paper's | metric at the ratios |\n| --- | ---: | ---: | --- |")
    for row in rows:
        shown = " ".join("-" if metric is None else f"{metric:.2f}" for metric in row["metric"])
        print(f"| {row['side']} | {row['per_second']:.0f} | {row['ratio']:.1f} | {shown} |")


if __name__ == "__main__":
    main()
