"""From a configuration to its metric and cost. One interface, a real evaluator and a deterministic stand-in."""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from lat_optuna.length_config import LengthConfig, Retention

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from lat_optuna.tasks import Split, Task

EVALUATION = "1"
"""Raised whenever the same model on the same data may get other values than before."""

EvaluationProtocol = Literal["real", "padded"]
Precision = Literal["fp32", "bf16"]
TOKENS_PER_BATCH = {"cpu": 512, "cuda": 65536}
"""Measured with MiniLM on one CPU thread: 256 to 1,024 tokens differ by about 10 %, 4,096 take 30-50 % longer. The
number for GPUs is a guess."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one configuration.

    Attributes:
        metric: The task's metric in percent, up is better; NaN fails the trial.
        cost: FLOPs of the configuration divided by those of the dense model on the same inputs.
        seconds: Wall time of the evaluation.
        details: Further figures of the same pass, by name (F1 beside EM, say).
    """

    metric: float
    cost: float
    seconds: float
    details: Mapping[str, float] = field(default_factory=dict)

    def score(self, name: str) -> float:
        """What a search that selects by ``name`` sees: the metric for ``"metric"``, else one of the details.

        Raises:
            ValueError: Nothing of this name was measured; the message tells what was.
        """
        if name == "metric":
            return self.metric
        if name not in self.details:
            there = ", ".join(["metric", *self.details])
            raise ValueError(f"the search selects by {name!r}, but the task measures {there}; set search.metric")
        return self.details[name]


class Evaluator(Protocol):
    """What the search needs to know of a model on a task. Implementations live in one process on one device."""

    num_layers: int
    max_length: int
    retention: Retention
    metric_name: str

    def cost(self, config: LengthConfig | None) -> float:
        """FLOPs relative to the dense model, by arithmetic; ``None`` is dense and costs 1."""
        ...

    def evaluate(self, config: LengthConfig | None) -> Evaluation:
        """Measure one configuration (``None``: dense) on the whole evaluation set."""
        ...

    def identity(self) -> Mapping[str, str]:
        """What makes values comparable: checkpoint hash, data fingerprint, protocol. Differing workers don't mix."""
        ...


class StandInEvaluator:
    """A deterministic landscape behind the evaluator's interface: tests and demonstrations need no model.

    The metric falls smoothly as layers drop vectors, early layers hurting most; a small deterministic ripple makes
    some configurations better than their neighbours, as on real data.

    Args:
        num_layers: ``L``.
        max_length: ``l_0``.
        retention: As in :class:`LengthConfig`.
        sleep: Seconds that an evaluation pretends to take.
    """

    metric_name = "accuracy"

    def __init__(
        self, num_layers: int = 6, max_length: int = 128, retention: Retention = "relative", sleep: float = 0.0
    ) -> None:
        self.num_layers = num_layers
        self.max_length = max_length
        self.retention: Retention = retention
        self.sleep = sleep

    def cost(self, config: LengthConfig | None) -> float:
        """Share of word vectors that the layers compute."""
        return 1.0 if config is None else sum(config.lengths) / (self.num_layers * self.max_length)

    def evaluate(self, config: LengthConfig | None) -> Evaluation:
        """See :class:`Evaluator`."""
        start = time.perf_counter()
        if self.sleep:
            time.sleep(self.sleep)
        lengths = (config or LengthConfig.full(self.num_layers, self.max_length, self.retention)).lengths
        metric = 90.0
        for layer, length in enumerate(lengths):
            dropped = 1 - length / self.max_length
            metric -= 30.0 * dropped**2 / (self.num_layers + 3 * layer)
        metric += 0.2 * (sum((layer + 2) * length for layer, length in enumerate(lengths)) % 7) / 7
        return Evaluation(round(metric, 6), self.cost(config), time.perf_counter() - start)

    def identity(self) -> Mapping[str, str]:
        """See :class:`Evaluator`."""
        return {"evaluator": f"stand-in {self.num_layers}x{self.max_length} {self.retention}"}


class ModelEvaluator:
    """Measures an adapted model on a task, on one device. Satisfies :class:`Evaluator`.

    The split is tokenised once and lies on the device as tensors, in batches of examples of like length. No example's
    result depends on its batch but by rounding, so batches are the device's affair. A configuration is measured once;
    configurations that keep the same tokens of every example (on short inputs many do) count as one. Beside the metric,
    an evaluation's details hold the task's other metrics and, where the task tells them, two smoother measures than
    counts of right answers: ``log_prob``, the mean natural log-probability of the right answers, and ``probability``,
    their mean probability in percent.

    Args:
        model: An adapted model (:func:`lat_optuna.model.adapt`); it is moved to ``device``, in evaluation mode.
        task: What it is measured on.
        split: Which part of the task's data.
        device: ``"cpu"``, ``"cuda:1"``, ...
        tokens_per_batch: Tokens of a batch, padding included; by default what was fastest on a device of this kind.
            Halved for good when a GPU's memory does not suffice.
        protocol: How cost is counted: ``"real"``, at the examples' own lengths; ``"padded"``, all padded to
            ``max_length``, as in the paper. Predictions are the same, and made without the padding.
        retention: Of all configurations; by default relative, or absolute where the protocol is ``"padded"``.
        precision: ``"bf16"`` is autocast.

    Raises:
        ValueError: An argument is not one of those named, or padded cost is asked for relative retention, where it has
            no meaning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        split: Split = "validation",
        device: str | torch.device = "cpu",
        tokens_per_batch: int | None = None,
        protocol: EvaluationProtocol = "real",
        retention: Retention | None = None,
        precision: Precision = "fp32",
    ) -> None:
        import torch
        from transformers.utils.generic import find_labels

        from lat_optuna.flops import Architecture
        from lat_optuna.model import num_layers

        for name, value, values in (
            ("protocol", protocol, get_args(EvaluationProtocol)),
            ("precision", precision, get_args(Precision)),
        ):
            if value not in values:
                raise ValueError(f"{name} must be one of {', '.join(values)}, not {value!r}")
        self.device = torch.device(device)
        if tokens_per_batch is None:
            tokens_per_batch = TOKENS_PER_BATCH.get(self.device.type, TOKENS_PER_BATCH["cuda"])
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, not {tokens_per_batch}")
        self.retention: Retention = retention or ("relative" if protocol == "real" else "absolute")
        if protocol == "padded" and self.retention == "relative":
            raise ValueError("protocol 'padded' is for absolute retention: relative retention knows no padding")
        model.to(self.device)  # type: ignore[arg-type]
        self.model: Any = model.eval()
        self.task = task
        self.split: Split = split
        self.protocol = protocol
        self.precision = precision
        self.tokens_per_batch = tokens_per_batch
        self.num_layers = num_layers(model)
        self.max_length = task.max_length
        self.metric_name = task.metric_name
        self._features = task.features(split)
        self._lengths = [len(tokens) for tokens in self._features["input_ids"][:]]
        self._counts = Counter(self._lengths)
        self._answers = set(find_labels(type(model)))
        self._architecture = Architecture.of(model)
        self._dense_flops = self._flops(None)
        self._batches: list[_Batch] = []
        self._costs: dict[LengthConfig | None, float] = {None: 1.0}
        self._known: dict[tuple[tuple[int, ...], ...], Evaluation] = {}

    @property
    def num_examples(self) -> int:
        """Number of examples of the split: of questions, say, where one may have several features."""
        examples = getattr(self.task, "examples", None)
        return len(self._lengths) if examples is None else len(set(examples(self.split)))

    def on(self, split: Split) -> ModelEvaluator:
        """The same model, measured on another split."""
        return ModelEvaluator(
            self.model,
            self.task,
            split,
            self.device,
            self.tokens_per_batch,
            self.protocol,
            self.retention,
            self.precision,
        )

    def cost(self, config: LengthConfig | None) -> float:
        """FLOPs of ``config`` divided by those of the dense model on the same inputs, counted as ``protocol`` says."""
        self._check(config)
        if config not in self._costs:
            self._costs[config] = self._flops(config) / self._dense_flops
        return self._costs[config]

    def evaluate(self, config: LengthConfig | None) -> Evaluation:
        """Measure ``config`` (``None``: dense) on the whole split, or remember it.

        Raises:
            ValueError: The configuration is none of this model, task and retention.
        """
        start = time.perf_counter()
        cost = self.cost(config)
        kept = self.kept(config)
        if kept not in self._known:
            self._known[kept] = self._measure(config)
        return replace(self._known[kept], cost=cost, seconds=time.perf_counter() - start)

    def kept(self, config: LengthConfig | None) -> tuple[tuple[int, ...], ...]:
        """Tokens kept by every layer at every length that occurs: where it is the same, so are the predictions."""
        return tuple((n,) * self.num_layers if config is None else config.at_length(n) for n in sorted(self._counts))

    def identity(self) -> Mapping[str, str]:
        """Hashes of weights and data, and how both are put together."""
        return {
            "evaluation": EVALUATION,
            "weights": weights_hash(self.model),
            "data": self.task.fingerprint(self.split),
            "max_length": str(self.max_length),
            "retention": self.retention,
            "protocol": self.protocol,
            "precision": self.precision,
        }

    def _check(self, config: LengthConfig | None) -> None:
        if config is None:
            return
        mine = (self.num_layers, self.max_length, self.retention)
        its = (config.num_layers, config.max_length, config.retention)
        if its != mine:
            raise ValueError(
                f"the configuration {config} is made for {its[0]} layers, max_length {its[1]} and {its[2]} retention; "
                f"the evaluation is of {mine[0]} layers, max_length {mine[1]} and {mine[2]} retention"
            )

    def _flops(self, config: LengthConfig | None) -> float:
        flops = self._architecture.example_flops
        if self.protocol == "padded":
            return float(flops(config, self.max_length))
        return sum(times * flops(config, n) for n, times in self._counts.items()) / len(self._lengths)

    def _measure(self, config: LengthConfig | None) -> Evaluation:
        import torch

        while True:
            try:
                scores = self._run(config)
                break
            except torch.OutOfMemoryError:
                if self.tokens_per_batch <= max(self._lengths):  # a batch is one example already
                    raise
                self.tokens_per_batch //= 2
            # Outside of the handler: the exception holds the frames, and those the tensors, of the failed attempt.
            self._batches = []
            torch.cuda.empty_cache()
        metric = scores.pop(self.metric_name)
        return Evaluation(metric, cost=1.0, seconds=0.0, details=scores)

    def _run(self, config: LengthConfig | None) -> dict[str, float]:
        import torch

        if not self._batches:
            self._batches = list(self._make_batches())
        reduced = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        with torch.inference_mode(), reduced, self.model.at(config):
            # All batches are under way before the first result is asked for: the device never waits for the host.
            outputs = [self.model(**batch.inputs) for batch in self._batches]
        log_probs = getattr(self.task, "log_probs", None)
        predictions: list[np.ndarray | None] = [None] * len(self._lengths)
        right: list[torch.Tensor] = []
        for batch, output in zip(self._batches, outputs, strict=True):
            for row, prediction in zip(batch.rows, self.task.predictions(output, batch.tensors), strict=True):
                predictions[row] = prediction
            if log_probs is not None:
                right.append(log_probs(output, batch.tensors).cpu())
        scores = self.task.score(self.split, predictions)  # type: ignore[arg-type]
        if right:
            joined = torch.cat(right).double()
            scores["log_prob"] = float(joined.nanmean())
            scores["probability"] = 100.0 * float(joined.exp().nanmean())
        return scores

    def _make_batches(self) -> Iterator[_Batch]:
        """Longest examples first: what does not fit into memory shows at once."""
        order = sorted(range(len(self._lengths)), key=lambda row: (-self._lengths[row], row))
        start = 0
        while start < len(order):
            longest = self._lengths[order[start]]
            rows = order[start : start + max(1, self.tokens_per_batch // longest)]
            start += len(rows)
            batch = self.task.collate([self._features[row] for row in rows])
            tensors = {name: values.to(self.device) for name, values in batch.items()}
            inputs = {name: values for name, values in tensors.items() if name not in self._answers}
            if self._lengths[rows[-1]] == longest:
                del inputs["attention_mask"]  # nothing is padded, and attention without a mask is faster
            yield _Batch(rows, tensors, inputs)


@dataclass(frozen=True)
class _Batch:
    """Rows of the split, what the task makes of them, and the part of it that the model reads."""

    rows: list[int]
    tensors: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]


def weights_hash(model: PreTrainedModel) -> str:
    """Sha256 over names, types, shapes and bytes of a model's weights, wherever and however they are stored."""
    import torch

    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
