"""Latency of length configurations on this machine: measured beside the dense model, or predicted layer by layer.

A measurement costs many forward passes. A :class:`LatencyModel` is calibrated once per device, precision and batch size
and tells the latency of any configuration from then on, so that a search needs no timing run per trial.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import statistics
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal, get_args

from lat_optuna.length_config import MIN_LENGTH, LengthConfig

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Precision = Literal["fp32", "bf16", "fp16"]
Lengths = int | Sequence[int]
MAX_BATCHES = 8
"""Batches that stand for a distribution of lengths, evenly spaced from the shortest to the longest."""
FINER = 8
"""Lengths of a calibration's configurations are of so many times the tokens of its batches."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt``."""


@dataclass(frozen=True)
class Conditions:
    """What a latency depends on beside the model and its configuration: two of them compare only if these are equal.

    Attributes:
        device: ``"cpu"`` with the kind of processor, or the GPU's name.
        precision: ``"fp32"``, or autocast to ``"bf16"`` or ``"fp16"``.
        threads: Threads of torch (on a GPU: of its host).
        batch_size: Examples in a batch.
        lengths: Real tokens of the examples, batch by batch, shortest batch first.
    """

    device: str
    precision: str
    threads: int
    batch_size: int
    lengths: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Latency:
    """One configuration beside the dense model.

    Attributes:
        config: The configuration; ``None`` is dense.
        milliseconds: Median time of a batch; of several batches their mean.
        dense: The same for the dense model, measured in turns with the configuration.
        rounds: Measurements behind each median.
    """

    config: LengthConfig | None
    milliseconds: float
    dense: float
    rounds: int

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model."""
        return self.dense / self.milliseconds


class LatencyMeter:
    """Measures an adapted model where it lies, in inference mode.

    Warmed up, synchronised, in turns with the dense model, medians. Batches hold random tokens, as latency depends on
    their number alone. A batch that needs no padding gets no attention mask. On a CPU, glibc is told to keep freed
    memory, in this process from then on: latencies are steadier.

    Args:
        model: An adapted model, on its device; it is put in evaluation mode.
        lengths: Real tokens of an example; or of many, a task's say, which are sorted and cut into batches of like
            length as an evaluation does it.
        batch_size: Examples in a batch.
        precision: ``"bf16"`` and ``"fp16"`` are autocast.
        max_batches: Measure at most so many batches, evenly spaced.

    Attributes:
        conditions: What the results depend on.

    Raises:
        ValueError: The model is not adapted, or lengths, batch size or precision are out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        lengths: Lengths,
        batch_size: int = 1,
        precision: Precision = "fp32",
        max_batches: int = MAX_BATCHES,
    ) -> None:
        import torch

        from lat_optuna.model import is_adapted

        if not is_adapted(model):
            raise ValueError("the model is not adapted; call lat_optuna.adapt(model) first")
        if precision not in get_args(Precision):
            raise ValueError(f"precision must be one of {', '.join(get_args(Precision))}, not {precision!r}")
        batches = batches_of(lengths, batch_size, max_batches)
        self.conditions = Conditions(
            _device_name(model.device), precision, torch.get_num_threads(), batch_size, tuple(batches)
        )
        self._passes = _Passes(model, batches, precision)

    def measure(self, configs: Sequence[LengthConfig | None], rounds: int = 20, warmup: int = 3) -> list[Latency]:
        """Median latency of each configuration.

        Args:
            configs: The configurations; ``None`` is dense.
            rounds: How often each is measured. In every round all of them and the dense model take their turns, in
                an order drawn anew.
            warmup: Rounds before, which do not count.

        Returns:
            One result a configuration, in their order.
        """
        runs: dict[LengthConfig | None, list[float]] = {config: [] for config in (None, *configs)}
        order, random = list(runs), Random(0)
        batches = range(len(self.conditions.lengths))
        with self._passes.running():
            for turn in range(warmup + rounds):
                random.shuffle(order)
                for config in order:
                    seconds = sum(self._passes.time(batch, config) for batch in batches)
                    if turn >= warmup:
                        runs[config].append(1000 * seconds / len(batches))
        medians = {config: statistics.median(times) for config, times in runs.items()}
        return [Latency(config, medians[config], medians[None], rounds) for config in configs]


def _keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the system, here and from now on.

    Else activations are on fresh pages in one pass and not in the next, as the heap happens to lie, and the same pass
    takes up to a fifth longer or less.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):  # another libc, another system
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**25)  # the highest that it takes
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


class _Passes:
    """Forward passes of one model over a few batches, on its device."""

    def __init__(self, model: PreTrainedModel, batches: Sequence[Sequence[int]], precision: Precision) -> None:
        self.model: Any = model.eval()
        self.device = model.device
        self.precision = precision
        self.inputs = [random_inputs(model, batch) for batch in batches]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Inference mode, and one autocast around everything: it casts the weights once, in the first pass."""
        import torch

        if self.device.type == "cpu":
            _keep_freed_memory()
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        reduced = torch.autocast(self.device.type, dtype=dtype, enabled=self.precision != "fp32")
        with torch.inference_mode(), reduced:
            yield

    def time(self, batch: int, config: LengthConfig | None, skip_layers: Collection[int] = frozenset()) -> float:
        """Seconds of one forward pass.

        In low precision on a CPU, oneDNN generates code for every shape of a product and remembers 1,024 of them; many
        configurations have more. So there a pass goes before the one that counts.
        """
        with self.model.at(config, skip_layers):
            if self.device.type == "cpu" and self.precision != "fp32":
                self.model(**self.inputs[batch])
            self._synchronize()
            start = time.perf_counter()
            self.model(**self.inputs[batch])
            self._synchronize()
            return time.perf_counter() - start

    def _synchronize(self) -> None:
        import torch

        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize(self.device)


class LatencyModel:
    """Predicts the latency of any configuration from tables that were measured once.

    A pass takes what lies outside of the layers, planning included, plus every layer's time. A layer that drops
    nothing takes a time that depends on the rows that enter it; one that drops, on the rows that enter, the rows that
    leave, and their product (attention). Each dependence is a table over numbers of rows, read with straight lines in
    between, for batches with and without padding of their own; a dense pass, whose layers are the unadapted model's,
    has tables of its own.

    Args:
        conditions: What it was calibrated under.
        layers: Layers of the model.
        knots: Numbers of rows at which the tables have entries.
        tables: Milliseconds at the knots, by name.
        error: Mean relative error on the measurements that it was calibrated on.

    Example::

        latency = LatencyModel.fit(model, lengths=task_lengths, batch_size=16)
        latency.predict(LengthConfig.constant_ratio(0.2, 6, 128))
    """

    def __init__(
        self,
        conditions: Conditions,
        layers: int,
        knots: Sequence[int],
        tables: Mapping[str, Sequence[float]],
        error: float,
    ) -> None:
        self.conditions = conditions
        self.layers = layers
        self.knots = tuple(knots)
        self.tables = {name: tuple(values) for name, values in tables.items()}
        self.error = error

    @classmethod
    def fit(
        cls,
        model: PreTrainedModel,
        lengths: Lengths,
        batch_size: int = 1,
        precision: Precision = "fp32",
        max_batches: int = MAX_BATCHES,
        rounds: int = 6,
        seed: int = 0,
    ) -> LatencyModel:
        """Calibrate on the machine at hand: some hundred forward passes.

        Args:
            model: An adapted model, on its device.
            lengths: As in :class:`LatencyMeter`; predictions are for these unless others are asked for.
            batch_size: As in :class:`LatencyMeter`.
            precision: As in :class:`LatencyMeter`.
            max_batches: As in :class:`LatencyMeter`.
            rounds: How often each calibration pass is measured; its median counts.
            seed: Of the configurations that it is calibrated on.
        """
        import numpy as np

        from lat_optuna.model import num_layers

        layers = num_layers(model)
        task = LatencyMeter(model, lengths, batch_size, precision, max_batches)
        longest = max(max(batch) for batch in task.conditions.lengths)
        knots = _knots(longest)
        uniform = [(rows,) * batch_size for rows in knots]
        batches = list(dict.fromkeys([*uniform, *task.conditions.lengths]))
        runner = _Passes(model, batches, precision)
        passes: list[_Pass] = []
        for index, batch in enumerate(batches):
            passes += [_Pass(index, None, frozenset(range(layers))), _Pass(index, None)]
            configs = _calibration(layers, max(batch), seed + index)
            # Batches that predictions are for by default get all kinds of configurations, others some in turn.
            few = configs if batch in task.conditions.lengths else configs[index % 2 :: 2]
            passes += [_Pass(index, config) for config in few]
        seconds: list[list[float]] = [[] for _ in passes]
        with runner.running():
            for turn in range(rounds + 1):
                for one, times in zip(passes, seconds, strict=True):
                    taken = runner.time(one.batch, one.config, one.skip)
                    if turn:
                        times.append(taken)
        measured = np.array([1000 * statistics.median(times) for times in seconds])

        self = cls(task.conditions, layers, knots, {}, 0.0)
        rows = [self._features(batches[one.batch], one.config, bool(one.skip)) for one in passes]
        names = sorted({name for row in rows for name, _ in row})
        place = {name: at * len(knots) for at, name in enumerate(names)}
        matrix = np.zeros((len(rows), len(names) * len(knots)))
        for number, row in enumerate(rows):
            for name, weights in row:
                matrix[number, place[name] : place[name] + len(knots)] += weights
        # Relative errors count. Where measurements say nothing, tables go on straight: a light penalty on bends.
        bends = np.zeros((0, matrix.shape[1]))
        for at in place.values():
            for knot in range(1, len(knots) - 1):
                bend = np.zeros((1, matrix.shape[1]))
                left, right = knots[knot] - knots[knot - 1], knots[knot + 1] - knots[knot]
                bend[0, at + knot - 1 : at + knot + 2] = (1 / left, -1 / left - 1 / right, 1 / right)
                bends = np.vstack([bends, bend * left])
        scale = float(np.median(measured)) / layers
        system = np.vstack([matrix / measured[:, None], 0.02 * bends / scale, 1e-4 * np.eye(matrix.shape[1]) / scale])
        wanted = np.concatenate([np.ones(len(rows)), np.zeros(len(system) - len(rows))])
        solution = np.linalg.lstsq(system, wanted, rcond=None)[0]
        tables = {name: solution[at : at + len(knots)].tolist() for name, at in place.items()}
        error = float(np.mean(np.abs(matrix @ solution / measured - 1)))
        return cls(task.conditions, layers, knots, tables, error)

    def predict(self, config: LengthConfig | None, lengths: Lengths | None = None) -> float:
        """Milliseconds of a batch, as :class:`LatencyMeter` would measure them.

        Args:
            config: The configuration; ``None`` is dense.
            lengths: Real tokens of other examples than those of the calibration, not longer than its longest.

        Raises:
            ValueError: The configuration has another number of layers, or an example is too long.
        """
        import numpy as np

        if config is not None and config.num_layers != self.layers:
            raise ValueError(f"the configuration {config} has {config.num_layers} layers, the model has {self.layers}")
        if lengths is None:
            batches: Sequence[tuple[int, ...]] = self.conditions.lengths
        else:
            batches = batches_of(lengths, self.conditions.batch_size, None)
        longest = max(max(batch) for batch in batches)
        if longest > self.knots[-1]:
            raise ValueError(f"calibrated up to {self.knots[-1]} tokens, not {longest}; fit it with longer lengths")
        total = 0.0
        for batch in batches:
            for name, weights in self._features(batch, config):
                # Calibrated without padding, it has no tables of padded batches: the others come nearest.
                table = self.tables.get(name) or self.tables.get(name.removesuffix(" padded"))
                total += float(np.dot(weights, table)) if table else 0.0
        return total / len(batches)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {
            "conditions": asdict(self.conditions),
            "layers": self.layers,
            "knots": list(self.knots),
            "tables": {name: list(values) for name, values in self.tables.items()},
            "error": self.error,
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LatencyModel:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: Its tables are those of an earlier version.
        """
        tables = content["tables"]
        padded = any(name.endswith(" padded") for name in tables)
        if "dense" not in tables or (padded and "outside padded" not in tables):
            raise ValueError("this latency model was calibrated by an earlier version, fit it again")
        given = dict(content["conditions"])
        given["lengths"] = tuple(tuple(batch) for batch in given["lengths"])
        return cls(Conditions(**given), content["layers"], content["knots"], tables, content["error"])

    def _features(
        self, batch: Sequence[int], config: LengthConfig | None, skipped: bool = False
    ) -> list[tuple[str, Any]]:
        """Which tables a pass reads, and with which weight at each knot."""
        widest = max(batch)
        suffix = " padded" if len(set(batch)) > 1 else ""
        found = [(f"outside{suffix}", self._at(widest))]
        if skipped:
            return found
        rows, before = widest, list(batch)
        kept = [(n,) * self.layers if config is None else config.at_length(n) for n in batch]
        keeps_all = "dense" if config is None else "whole"
        for layer in range(self.layers):
            after = [lengths[layer] for lengths in kept]
            if after == before:
                found.append((f"{keeps_all}{suffix}", self._at(rows)))
                continue
            leave = max(after)
            found.append((f"enter{suffix}", self._at(rows)))
            found.append((f"leave{suffix}", self._at(leave)))
            # Context: a product of rows and columns, in units of one table that grows with the rows that enter.
            found.append(("pairs", self._at(rows) * (leave / rows)))
            rows, before, suffix = leave, after, " padded" if len(set(after)) > 1 else ""
        return found

    def _at(self, rows: int) -> Any:
        """Weights of the knots for a number of rows."""
        import numpy as np

        return np.array([np.interp(rows, self.knots, unit) for unit in np.eye(len(self.knots))])


@dataclass(frozen=True)
class _Pass:
    """One forward pass of the calibration."""

    batch: int
    config: LengthConfig | None
    skip: frozenset[int] = frozenset()


def batches_of(lengths: Lengths, batch_size: int, max_batches: int | None) -> list[tuple[int, ...]]:
    """Sort lengths and cut them into batches of neighbours, at most ``max_batches`` of them, evenly spaced.

    Raises:
        ValueError: There are fewer lengths than a batch holds, or a number is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    sorted_lengths = [lengths] * batch_size if isinstance(lengths, int) else sorted(int(n) for n in lengths)
    if len(sorted_lengths) < batch_size:
        raise ValueError(f"{len(sorted_lengths)} lengths do not fill a batch of {batch_size}; give more lengths")
    if sorted_lengths[0] < 1:
        raise ValueError(f"an input has at least 1 token, not {sorted_lengths[0]}")
    whole = len(sorted_lengths) // batch_size
    batches = [tuple(sorted_lengths[at * batch_size : (at + 1) * batch_size]) for at in range(whole)]
    if max_batches is None or whole <= max_batches:
        return batches
    # Each stands for as many as its neighbours do: the middle of every equal share.
    return [batches[int((at + 0.5) * whole / max_batches)] for at in range(max_batches)]


def _knots(longest: int) -> tuple[int, ...]:
    found, rows = [min(MIN_LENGTH, longest)], 8
    while rows < longest:
        found.append(rows)
        rows = rows * 3 // 2 if rows & (rows - 1) == 0 else rows * 4 // 3
    return tuple(sorted({*found, longest}))


def _calibration(layers: int, longest: int, seed: int) -> list[LengthConfig]:
    """Configurations that drop at once, late, bit by bit, and at random.

    They are finer than the batch, as a task's are: examples of nearly the same length then part on the way.
    """
    if longest <= MIN_LENGTH:
        return []
    random = Random(seed)
    longest *= FINER
    found = [LengthConfig.constant_ratio(ratio, layers, longest) for ratio in (0.05, 0.15, 0.3)]
    found.append(LengthConfig((max(1, longest * 3 // 4),) * layers, longest))
    found.append(LengthConfig((longest,) * (layers // 2) + ((longest + 1) // 2,) * (layers - layers // 2), longest))
    found += [LengthConfig.length_drop(0.4, layers, longest, random) for _ in range(2)]
    # Half of the layers drop and half do not.
    lengths = LengthConfig.length_drop(0.5, layers, longest, random).lengths
    found.append(LengthConfig(tuple(lengths[layer // 2 * 2] for layer in range(layers)), longest))
    return list(dict.fromkeys(found))


def random_inputs(model: PreTrainedModel, batch: Sequence[int]) -> dict[str, torch.Tensor]:
    """Random inputs of a model with so many real tokens each; a batch of like lengths gets no attention mask."""
    import torch

    base: Any = model.base_model
    if hasattr(base.config, "patch_size"):
        size = base.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(len(batch), base.config.num_channels, height, width, device=model.device)}
    widest = max(batch)
    usual = [token for token in range(base.config.vocab_size) if token != base.config.pad_token_id]
    random = torch.Generator().manual_seed(0)
    ids = torch.tensor(usual)[torch.randint(len(usual), (len(batch), widest), generator=random)]
    inputs = {"input_ids": ids}
    if len(set(batch)) > 1:
        real = torch.arange(widest) < torch.tensor(batch)[:, None]
        inputs = {"input_ids": ids.masked_fill(~real, base.config.pad_token_id or 0), "attention_mask": real.long()}
    if type(model).__name__.endswith("ForMultipleChoice"):
        inputs = {name: values[:, None] for name, values in inputs.items()}
    return {name: values.to(model.device) for name, values in inputs.items()}


def _device_name(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return f"cpu: {line.partition(':')[2].strip()}"
    return f"cpu: {platform.processor() or platform.machine()}"
