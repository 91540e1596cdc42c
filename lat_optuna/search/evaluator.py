"""From a configuration to its metric and cost. One interface, a real evaluator and a deterministic stand-in."""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from lat_optuna.length_config import LengthConfig, Retention

if TYPE_CHECKING:
    import numpy as np
    import torch
    from transformers import PreTrainedModel

    from lat_optuna.search.racing import Racing, Rival
    from lat_optuna.tasks import Split, Task

EVALUATION = "1"
"""Raised whenever the same model on the same data may get other values than before."""

EvaluationProtocol = Literal["real", "padded"]
Precision = Literal["fp32", "bf16"]
TOKENS_PER_BATCH: Mapping[tuple[str, Precision], int] = {
    ("cpu", "fp32"): 512,
    ("cpu", "bf16"): 2048,
    ("cuda", "fp32"): 65536,
    ("cuda", "bf16"): 65536,
}
"""Measured with MiniLM on one CPU thread: in fp32, 256 to 1,024 tokens differ by about 10 %, 4,096 take 30-50 % longer;
in bf16 on AMX, 2,048 are 1.24 to 1.30 times as fast as 512. The numbers for GPUs are a guess."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one configuration.

    Attributes:
        metric: The task's metric in percent, up is better; NaN fails the trial.
        cost: FLOPs of the configuration divided by those of the dense model on the same inputs.
        seconds: Wall time of the evaluation.
        details: Further figures of the same pass, by name (F1 beside EM, say).
        further: Further objectives, down is better, in the order of the study's.
        by_example: What the metric and some of the details are the means of, example by example; empty where it was
            not asked for.
    """

    metric: float
    cost: float
    seconds: float
    details: Mapping[str, float] = field(default_factory=dict)
    further: tuple[float, ...] = ()
    by_example: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False, repr=False)

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


@dataclass(frozen=True)
class Abandoned:
    """What was seen of a configuration that cannot join the front.

    Attributes:
        examples: How many examples it was measured on.
        metric: The task's metric on these.
        details: Further figures, likewise.
        seconds: Wall time.
        score: What the search selects by, on all examples as far as one can tell: the rival's plus the mean difference
            to it. (The examples seen may be easy ones or hard ones, for both.)
    """

    examples: int
    metric: float
    details: Mapping[str, float]
    seconds: float
    score: float


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

    def race(self, config: LengthConfig, rival: Rival) -> Evaluation | Abandoned:
        """Measure one configuration as long as it may beat a point of the front.

        Asked only of an evaluator that tells its evaluations ``by_example``.
        """
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
        racing: When a configuration is abandoned; never without it.
    """

    metric_name = "accuracy"

    def __init__(
        self,
        num_layers: int = 6,
        max_length: int = 128,
        retention: Retention = "relative",
        sleep: float = 0.0,
        racing: Racing | None = None,
    ) -> None:
        self.racing = racing
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
        metric = round(metric, 6)
        by_example = {} if self.racing is None else {"metric": self._by_example(metric)}
        return Evaluation(metric, self.cost(config), time.perf_counter() - start, by_example=by_example)

    def race(self, config: LengthConfig, rival: Rival) -> Evaluation | Abandoned:
        """See :class:`Evaluator`."""
        import numpy as np

        assert self.racing is not None
        evaluation = self.evaluate(config)
        ours, order = evaluation.by_example["metric"], self.racing.order(len(rival.scores))
        for stop in self.racing.stops(len(rival.scores)):
            seen = order[:stop]
            so_far = np.full(len(ours), np.nan)
            so_far[seen] = ours[seen]
            if self.racing.is_lost(so_far, rival):
                score = float(rival.scores.mean() + (ours - rival.scores)[seen].mean())
                return Abandoned(stop, float(ours[seen].mean()), {}, evaluation.seconds, score)
        return evaluation

    @staticmethod
    def _by_example(metric: float, examples: int = 512) -> np.ndarray:
        """Scores with this mean; those of two metrics differ by other amounts at every example."""
        import numpy as np

        waves = np.sin(np.arange(examples) * (1 + metric % 1))
        return metric + 2 * (waves - waves.mean())

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
        tokens_per_batch: Tokens of a batch, padding included, up to a factor of 1.42, as batches have 1, 2, 4, ...
            examples; by default what was fastest on a device of this kind. Halved for good when a GPU's memory does
            not suffice.
        protocol: How cost is counted: ``"real"``, at the examples' own lengths; ``"padded"``, all padded to
            ``max_length``, as in the paper. Predictions are the same, and made without the padding.
        retention: Of all configurations; by default relative, or absolute where the protocol is ``"padded"``.
        precision: ``"bf16"`` is autocast.
        compiled: Run configurations through ``torch.compile``: one graph for all of them, in which every layer gathers.
            On a CPU the weights are part of it: changing them later changes nothing.
        racing: When a configuration is abandoned, and in which order examples are looked at then. Evaluations tell
            their scores example by example. Without effect on a task that cannot (see :class:`lat_optuna.tasks.Task`).
        agreement: Evaluations tell, as the detail ``agreement``, how far predictions agree with the full model's, in
            percent; see :func:`lat_optuna.tasks.data.overlap`. It asks for no right answers, and for one more pass over
            the split.

    Raises:
        ValueError: An argument is not one of those named, padded cost is asked for relative retention, where it has
            no meaning, there is nothing that ``torch.compile`` could compile with, or the task cannot tell agreement.
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
        racing: Racing | None = None,
        compiled: bool = False,
        agreement: bool = False,
    ) -> None:
        import numpy as np
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
            kind = self.device.type if self.device.type in ("cpu", "cuda") else "cuda"
            tokens_per_batch = TOKENS_PER_BATCH[kind, precision]
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
        self.compiled = compiled
        self._run_model: Any = model
        if compiled:
            _check_compiler(self.device)
            self._run_model = torch.compile(model, dynamic=True)
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
        examples = getattr(task, "examples", None)
        self._examples = np.arange(len(self._lengths)) if examples is None else np.asarray(examples(split))
        self.num_examples = len(np.unique(self._examples))
        self.racing = racing if hasattr(task, "score_examples") else None
        self._compare = getattr(task, "agreement", None) if agreement else None
        if agreement and self._compare is None:
            raise ValueError(f"the task {task.name} cannot tell how far predictions agree; set search.metric to metric")
        self._chunks: list[_Chunk] = []
        self._full: list[np.ndarray] = []  # what the full model predicts, feature by feature
        self._costs: dict[LengthConfig | None, float] = {None: 1.0}
        self._known: dict[tuple[tuple[int, ...], ...], Evaluation] = {}

    @property
    def arithmetic(self) -> str:
        """What values differ in by rounding: the precision, and whether the model is compiled."""
        return f"{self.precision}, compiled" if self.compiled else self.precision

    def on(self, split: Split, exact: bool = False) -> ModelEvaluator:
        """The same model, measured on another split, or in fp32 and not compiled (``exact``); in full."""
        return ModelEvaluator(
            self.model,
            self.task,
            split,
            self.device,
            self.tokens_per_batch,
            self.protocol,
            self.retention,
            "fp32" if exact else self.precision,
            compiled=self.compiled and not exact,
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
            evaluation = self._measure(config)
            assert isinstance(evaluation, Evaluation)
            self._known[kept] = evaluation
        return replace(self._known[kept], cost=cost, seconds=time.perf_counter() - start)

    def race(self, config: LengthConfig, rival: Rival) -> Evaluation | Abandoned:
        """Measure ``config`` until all examples are seen, or until it is clear that it does not beat ``rival``.

        Raises:
            ValueError: The evaluator was made without racing, the rival's scores are of other data, or the
                configuration is none of this model, task and retention.
        """
        start = time.perf_counter()
        if self.racing is None or rival.scores.shape != (self.num_examples,):
            raise ValueError(
                f"a race on {self.num_examples} examples needs racing and a rival of as many, not of "
                f"{len(rival.scores)}"
            )
        self._check(config)
        kept = self.kept(config)
        if kept not in self._known:
            outcome = self._measure(config, rival)
            if isinstance(outcome, Abandoned):
                return replace(outcome, seconds=time.perf_counter() - start)
            self._known[kept] = outcome
        return replace(self._known[kept], cost=self.cost(config), seconds=time.perf_counter() - start)

    def kept(self, config: LengthConfig | None) -> tuple[tuple[int, ...], ...]:
        """Tokens kept by every layer at every length that occurs: where it is the same, so are the predictions."""
        return tuple((n,) * self.num_layers if config is None else config.at_length(n) for n in sorted(self._counts))

    def identity(self) -> Mapping[str, str]:
        """Hashes of weights and data, and how both are put together."""
        options = {"significance": self._architecture.significance, "last_layer": self._architecture.last_layer}
        return {
            "evaluation": EVALUATION,
            "weights": weights_hash(self.model),
            "data": self.task.fingerprint(self.split),
            "max_length": str(self.max_length),
            "retention": self.retention,
            "protocol": self.protocol,
            "precision": self.arithmetic,
            # Only what differs from the usual: studies from before there was a choice go on.
            **{name: chosen for name, chosen in options.items() if chosen != "all"},
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
        counts = {self.max_length: 1} if self.protocol == "padded" else self._counts
        return self._architecture.mean_flops(config, counts)

    def _measure(self, config: LengthConfig | None, rival: Rival | None = None) -> Evaluation | Abandoned:
        import torch

        while True:
            try:
                return self._run(config, rival)
            except torch.OutOfMemoryError:
                if _power_of_two(self.tokens_per_batch / max(self._lengths)) == 1:  # a batch is one example already
                    raise
                self.tokens_per_batch //= 2
            # Outside of the handler: the exception holds the frames, and those the tensors, of the failed attempt.
            self._chunks = []
            torch.cuda.empty_cache()

    def _run(self, config: LengthConfig | None, rival: Rival | None) -> Evaluation | Abandoned:
        import numpy as np

        if not self._chunks:
            self._chunks = list(self._make_chunks())
        if self._compare is not None and not self._full:
            self._full = self._full_predictions()
        columns: dict[str, np.ndarray] = {}  # NaN where an example was not seen or has no such score
        seen = np.zeros(self.num_examples, dtype=bool)
        whole: dict[str, float] = {}
        for number, chunk in enumerate(self._chunks, start=1):
            predictions, log_probs = self._forward(config, chunk)
            if hasattr(self.task, "score_examples"):
                parts = dict(self.task.score_examples(self.split, chunk.features, predictions))
            else:
                parts, whole = {}, self.task.score(self.split, predictions)
            if log_probs is not None:
                parts["log_prob"] = _mean_by(chunk.owners, log_probs)
                parts["probability"] = 100.0 * _mean_by(chunk.owners, np.exp(log_probs))
            if self._compare is not None:
                full = [self._full[row] for row in chunk.features]
                overlaps = self._compare(self.split, chunk.features, predictions, full)
                parts["agreement"] = _mean_by(chunk.owners, overlaps)
            for name, values in parts.items():
                columns.setdefault(name, np.full(self.num_examples, np.nan))[chunk.examples] = values
            seen[chunk.examples] = True
            if rival is not None and self.racing is not None and number < len(self._chunks):
                name = self.metric_name if rival.metric == "metric" else rival.metric
                if self.racing.is_lost(columns[name], rival):
                    differences = (columns[name] - rival.scores)[seen]
                    metric, details = self._means(columns, seen, whole)
                    score = float(np.nanmean(rival.scores) + np.nanmean(differences))
                    return Abandoned(int(seen.sum()), metric, details, seconds=0.0, score=score)
        metric, details = self._means(columns, seen, whole)
        by_example = {}
        if self.racing is not None:
            names = {"metric": self.metric_name, "probability": "probability", "agreement": "agreement"}
            by_example = {to: columns[name].astype(np.float32) for to, name in names.items() if name in columns}
        return Evaluation(metric, cost=1.0, seconds=0.0, details=details, by_example=by_example)

    def _full_predictions(self) -> list[np.ndarray]:
        full = LengthConfig.full(self.num_layers, self.max_length, self.retention)
        found: dict[int, np.ndarray] = {}
        for chunk in self._chunks:
            found.update(zip(chunk.features.tolist(), self._forward(full, chunk)[0], strict=True))
        return [found[row] for row in range(len(found))]

    def _means(
        self, columns: Mapping[str, np.ndarray], seen: np.ndarray, whole: Mapping[str, float]
    ) -> tuple[float, dict[str, float]]:
        """The metric, and the details, of the examples that were seen."""
        import numpy as np

        means = dict(whole)
        for name, values in columns.items():
            values = values[seen]
            if name in ("log_prob", "probability", "agreement") and not np.isnan(values).all():
                values = values[~np.isnan(values)]  # an example without a right answer just has no probability
            means[name] = float(values.mean())
        return means.pop(self.metric_name), means

    def _forward(self, config: LengthConfig | None, chunk: _Chunk) -> tuple[list[np.ndarray], np.ndarray | None]:
        """Predictions, and log-probabilities of the right answers, in the order of the chunk's features."""
        import numpy as np
        import torch

        from lat_optuna.model.backends import weights_in_graphs, without_cudnn_attention

        reduced = torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16")
        at = self.model.at(config, drop_everywhere=self.compiled)
        # Graphs differ between batches of one example and of more, with padding and without.
        graphs = torch._dynamo.config.patch(recompile_limit=64) if self.compiled else nullcontext()
        packed = weights_in_graphs(self.device) if self.compiled else nullcontext()
        with torch.inference_mode(), without_cudnn_attention(), reduced, at, graphs, packed:
            # All batches are under way before the first result is asked for: the device never waits for the host.
            outputs = [self._run_model(**batch.inputs) for batch in chunk.batches]
        log_probs = getattr(self.task, "log_probs", None)
        predictions: dict[int, np.ndarray] = {}
        right: dict[int, float] = {}
        for batch, output in zip(chunk.batches, outputs, strict=True):
            predictions.update(zip(batch.rows, self.task.predictions(output, batch.tensors), strict=True))
            if log_probs is not None:
                right.update(zip(batch.rows, log_probs(output, batch.tensors).cpu().tolist(), strict=True))
        rows = chunk.features.tolist()
        return [predictions[row] for row in rows], np.array([right[row] for row in rows]) if right else None

    def _make_chunks(self) -> Iterator[_Chunk]:
        """Everything at once, or what lies between one look of a race and the next."""
        import numpy as np

        order, stops = np.arange(self.num_examples), [self.num_examples]
        if self.racing is not None:
            order, stops = self.racing.order(self.num_examples), self.racing.stops(self.num_examples)
        for start, stop in zip([0, *stops], stops, strict=False):
            examples = np.sort(order[start:stop])
            features = np.flatnonzero(np.isin(self._examples, examples))
            owners = np.searchsorted(examples, self._examples[features])
            yield _Chunk(features, owners, examples, list(self._make_batches(features.tolist())))

    def _make_batches(self, rows: list[int]) -> Iterator[_Batch]:
        """Longest examples first: what does not fit into memory shows at once.

        Sizes are powers of two. Every configuration makes matrices of other shapes, and for a shape that is new to it
        a library of kernels generates code (oneDNN on CPUs) or looks for the fastest; so there are few of them.
        """
        order = sorted(rows, key=lambda row: (-self._lengths[row], row))
        start = 0
        while start < len(order):
            longest = self._lengths[order[start]]
            rows = order[start : start + _power_of_two(self.tokens_per_batch / longest)]
            start += len(rows)
            batch = self.task.collate([self._features[row] for row in rows])
            tensors = {name: values.to(self.device) for name, values in batch.items()}
            inputs = {name: values for name, values in tensors.items() if name not in self._answers}
            if self._lengths[rows[-1]] == longest:
                del inputs["attention_mask"]  # nothing is padded, and attention without a mask is faster
            yield _Batch(rows, tensors, inputs)


def _check_compiler(device: torch.device) -> None:
    import torch

    try:
        torch.compile(torch.neg)(torch.ones(2, device=device))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"compiled evaluation needs what torch.compile compiles with on {device.type} (a C++ compiler; on a GPU "
            f"Triton, too), and it said: {reason}; install it, or set search.compiled to false"
        ) from error


def _power_of_two(number: float) -> int:
    """The nearest one, by ratio; at least 1."""
    return 2 ** max(0, round(math.log2(number)))


@dataclass(frozen=True)
class _Batch:
    """Rows of the split, what the task makes of them, and the part of it that the model reads."""

    rows: list[int]
    tensors: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]


@dataclass(frozen=True)
class _Chunk:
    """Examples that are looked at together.

    Attributes:
        features: Rows of the split's features, rising.
        owners: Of each feature, the place of its example among ``examples``.
        examples: The examples, rising.
        batches: The features, as the model reads them.
    """

    features: np.ndarray
    owners: np.ndarray
    examples: np.ndarray
    batches: list[_Batch]


def _mean_by(owners: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means of the values of each owner, those that are NaN apart; NaN for an owner without any."""
    import numpy as np

    there = ~np.isnan(values)
    count = owners.max() + 1
    sums = np.bincount(owners[there], values[there], count)
    counts = np.bincount(owners[there], minlength=count)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def weights_hash(model: PreTrainedModel) -> str:
    """Sha256 over names, types, shapes and bytes of a model's weights, wherever and however they are stored."""
    import torch

    digest = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}".encode())
        digest.update(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
