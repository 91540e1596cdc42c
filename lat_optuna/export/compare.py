"""What was exported against torch: predictions that differ, the metric, latency in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch

    from lat_optuna.tasks import Split, Task

Run = Callable[..., Any]
"""A model: tensors by name in, an object with its outputs as attributes out."""
TOKENS_PER_BATCH = 512
ROUNDS = 5
INPUTS = 24
"""Inputs of a latency, evenly spaced from the split's shortest to its longest."""


def predict(
    run: Run, task: Task, split: Split, device: Any = "cpu", tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[np.ndarray]:
    """A model's predictions for a split, in batches of like length, padded on the right.

    Args:
        run: The model.
        task: Gives features and reads the outputs.
        split: Part of its data.
        device: Where the model is.
        tokens_per_batch: Tokens of a batch, padding included.

    Returns:
        What ``task.score`` takes.
    """
    import torch

    features = task.features(split)
    lengths = [len(tokens) for tokens in features["input_ids"][:]]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    found: list[Any] = [None] * len(lengths)
    while order:
        longest = lengths[order[-1]]
        size = max(1, tokens_per_batch // longest)
        order, rows = order[:-size], order[-size:]
        batch = task.collate([features[row] for row in rows])
        with torch.inference_mode():
            outputs = run(**{name: values.to(device) for name, values in inputs_of(batch).items()})
        for row, prediction in zip(rows, task.predictions(outputs, batch), strict=True):
            found[row] = prediction
    return found


def inputs_of(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What a model reads of a batch: not the answers."""
    return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}


def answers(task: Task, split: Split, predictions: Sequence[np.ndarray]) -> list[Any]:
    """What a user gets to see: a class, the text of an answer, the tags of the tokens; one an example."""
    if hasattr(task, "answers"):
        return list(task.answers(split, predictions))
    return [tuple(prediction.argmax(-1).reshape(-1).tolist()) for prediction in predictions]


def differing(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    """How many answers are not the same."""
    return sum(a != b for a, b in zip(ours, theirs, strict=True))


@dataclass(frozen=True)
class Timing:
    """Median latencies of several models on the same inputs, measured in turns.

    Attributes:
        milliseconds: Of a batch, by model; the mean over the batches of each one's median.
        batch_size: Examples in a batch.
        tokens: Mean number of real tokens of an example.
        threads: Threads of each model.
    """

    milliseconds: Mapping[str, float]
    batch_size: int
    tokens: float
    threads: int


def sample_batches(task: Task, split: Split, batch_size: int = 1, count: int = INPUTS) -> list[dict[str, torch.Tensor]]:
    """Batches that stand for a split's lengths: neighbours in length, evenly spaced from shortest to longest."""
    features = task.features(split)
    lengths = [len(tokens) for tokens in features["input_ids"][:]]
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    count = min(count, len(order) // batch_size)
    starts = [int((at + 0.5) * (len(order) // batch_size) / count) * batch_size for at in range(count)]
    return [inputs_of(task.collate([features[row] for row in order[start : start + batch_size]])) for start in starts]


def measure(
    runs: Mapping[str, Run],
    batches: Sequence[Mapping[str, torch.Tensor]],
    rounds: int = ROUNDS,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> Timing:
    """Time models on batches, each batch by all models in turns, in an order drawn anew every time.

    Args:
        runs: The models, by name.
        batches: Their inputs; a batch that needs no padding is given without its mask, as a server would do it.
        rounds: Measurements behind each median.
        warmup: Rounds before, which do not count.
        clock: Seconds; ``time.process_time`` on one thread tells ratios on a machine that others use too.
    """
    import torch

    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
    examples = sum(len(batch["input_ids"]) for batch in batches)
    random, order = Random(0), list(runs)
    medians: dict[str, list[float]] = {name: [] for name in runs}
    with torch.inference_mode():
        for batch in batches:
            given = {k: v for k, v in batch.items() if k != "attention_mask" or not bool(v.all())}
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(warmup + rounds):
                random.shuffle(order)
                for name in order:
                    start = clock()
                    runs[name](**given)
                    if turn >= warmup:
                        times[name].append(clock() - start)
            for name, values in times.items():
                medians[name].append(1000 * statistics.median(values))
    return Timing(
        {name: statistics.fmean(values) for name, values in medians.items()},
        len(batches[0]["input_ids"]),
        tokens / examples,
        torch.get_num_threads(),
    )


def standard_error(task: Task, split: Split, predictions: Sequence[np.ndarray]) -> float | None:
    """Standard error of the task's metric over the examples; ``None`` where the metric is no mean over examples.

    Of an accuracy this is the binomial one.
    """
    score_examples = getattr(task, "score_examples", None)
    if score_examples is None:
        return None
    values = score_examples(split, range(len(predictions)), predictions)[task.metric_name]
    return float(values.std() / max(1, len(values)) ** 0.5)
