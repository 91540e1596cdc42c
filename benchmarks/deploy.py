"""What deploying a length-adaptive model buys on a CPU: torch, ONNX Runtime and int8, each dense and length-adaptive.

The inputs are a study's own, with their real lengths; every runtime gets the same batches in turns. Beside them runs a
dense model of BERT-base's size with random weights. Four steps, results go to WORK/NAME.json as they come:

    python benchmarks/deploy.py prepare  STUDY --ratio 0.25 --work WORK    the graphs
    python benchmarks/deploy.py equality STUDY --ratio 0.25 --work WORK    metric, and answers that differ from torch
    python benchmarks/deploy.py time     STUDY --ratio 0.25 --work WORK    latencies; on an otherwise idle machine
    python benchmarks/deploy.py table    WORK/*.json                       all of it as Markdown

`--model` takes the plainly fine-tuned model (standard) or a checkpoint, where the length-adaptive one is not trained.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from lat_optuna import LengthConfig, adapt, deploy, load, pipeline
from lat_optuna.export.compare import answers, differing, measure, predict, sample_batches, standard_error
from lat_optuna.export.onnx import OnnxModel, quantize, to_onnx
from lat_optuna.files import write_json
from lat_optuna.search.evaluator import ModelEvaluator
from lat_optuna.spec import load_spec

SPLIT = "validation"
NAMES = {
    "base torch": "BERT-base size, torch fp32, dense",
    "torch dense": "torch fp32 (SDPA), dense",
    "torch adaptive": "torch fp32, length-adaptive",
    "onnx dense": "ONNX Runtime fp32, dense",
    "onnx adaptive": "ONNX Runtime fp32, length-adaptive",
    "int8 dense": "ONNX Runtime int8, dense",
    "int8 adaptive": "ONNX Runtime int8, length-adaptive",
    "int8 adaptive, ranking fp32": "ONNX Runtime int8, length-adaptive, ranking in fp32",
}


class Case:
    """A study's model at one configuration, and the files that were made of it."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.spec = load_spec(options.study, options.set)
        self.task = pipeline.make_task(self.spec)
        if options.model == "standard":
            self.model: Any = adapt(self.task.build_model(str(self.spec.standard_folder)))
        else:
            self.model = load(self.spec.adaptive_folder if options.model == "length_adaptive" else options.model)
        self.model.eval()
        layers, longest = self.model.config.num_hidden_layers, self.spec.task.max_length
        if options.config:
            self.config = deploy.parse_config(options.config, longest, "relative")
        else:
            self.config = LengthConfig.constant_ratio(options.ratio, layers, longest)
        self.folder = options.work / f"{self.spec.name}-{options.config or options.ratio}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.result = options.work / f"{self.folder.name}.json"
        self.about = {
            "study": self.spec.name,
            "model": options.model,
            "config": str(self.config),
            "cost": ModelEvaluator(self.model, self.task, SPLIT).cost(self.config),
            "hardware": pipeline.describe_hardware("cpu"),
        }

    def files(self) -> dict[str, Path]:
        """Where each graph lies."""
        names = ("onnx dense", "onnx adaptive", "int8 dense", "int8 adaptive", "int8 adaptive, ranking fp32")
        return {name: self.folder / f"{name.replace(', ', ' ').replace(' ', '_')}.onnx" for name in names}

    def runs(self) -> dict[str, Any]:
        """What is compared: tensors by name in, outputs out."""
        return {
            "torch dense": partial(self._torch, None),
            "torch adaptive": partial(self._torch, self.config),
            **{name: OnnxModel(path) for name, path in self.files().items()},
        }

    def _torch(self, config: LengthConfig | None, **inputs: torch.Tensor) -> Any:
        with self.model.at(config):
            return self.model(**inputs)

    def note(self, **found: Any) -> None:
        """Add results to the case's file."""
        before = json.loads(self.result.read_text()) if self.result.exists() else {}
        write_json(self.result, {**before, **self.about, **found})


def prepare(case: Case) -> None:
    """Make the graphs that are not there."""
    files = case.files()
    names = list(sample_batches(case.task, SPLIT, 1, 1)[0])
    for name, config in (("onnx dense", None), ("onnx adaptive", case.config)):
        if not files[name].exists():
            to_onnx(case.model, files[name], config, names)
    for name, source, keep in (
        ("int8 dense", "onnx dense", False),
        ("int8 adaptive", "onnx adaptive", False),
        ("int8 adaptive, ranking fp32", "onnx adaptive", True),
    ):
        if not files[name].exists():
            quantize(files[source], files[name], keep_significance=keep)
            print(name, flush=True)


def equality(case: Case) -> None:
    """Metric of each, and how many answers are not those of torch at the same configuration."""
    found: dict[str, Any] = {}
    given: dict[str, list[Any]] = {}
    for name, run in case.runs().items():
        predictions = predict(run, case.task, SPLIT)
        given[name] = answers(case.task, SPLIT, predictions)
        like = given["torch dense" if "dense" in name else "torch adaptive"]
        found[name] = {
            "metric": case.task.score(SPLIT, predictions)[case.task.metric_name],
            "standard_error": standard_error(case.task, SPLIT, predictions),
            "differing": differing(given[name], like),
        }
        print(name, found[name], flush=True)
        case.note(equality=found, metric=case.task.metric_name, examples=len(given[name]))


def time(case: Case, sizes: list[int], rounds: int, count: int, cpu: bool) -> None:
    """Latencies in turns; ``count`` batches of one, a quarter as many larger ones."""
    found: dict[str, Any] = {}
    runs = case.runs() | {"base torch": base_sized(type(case.model).__name__)}
    for size in sizes:
        batches = sample_batches(case.task, SPLIT, size, count if size == 1 else count // 4)
        timing = measure(runs, batches, rounds, clock=process_time if cpu else perf_counter)
        found[str(size)] = {"ms": dict(timing.milliseconds), "tokens": timing.tokens, "threads": timing.threads}
        found[str(size)] |= {"rounds": rounds, "clock": "CPU time" if cpu else "wall time"}
        print(size, {name: round(ms, 2) for name, ms in timing.milliseconds.items()}, flush=True)
        case.note(**{"cpu_time" if cpu else "time": found})


def base_sized(head: str) -> Any:
    """A dense BERT-base with a head of that name; its weights are random, which its time does not depend on."""
    import transformers

    return getattr(transformers, head)(transformers.BertConfig()).eval()


def table(paths: list[Path]) -> str:
    """Results as Markdown."""
    lines = []
    for path in paths:
        case = json.loads(path.read_text())
        lines += [f"## {case['study']}: {case['config']}, {case['cost']:.3f}x FLOPs (model: {case['model']})", ""]
        times, equal = case.get("time") or case.get("cpu_time", {}), case.get("equality", {})
        heads = [f"batch {size}, {t['tokens']:.0f} tokens: ms" for size, t in times.items()]
        clocks = {f"{t['clock']}, {t['threads']} thread(s), medians of {t['rounds']} in turns" for t in times.values()}
        lines.append("| |" + "".join(f" {head} | over BERT-base |" for head in heads))
        lines[-1] += f" {case.get('metric', 'metric')} (%) | answers that differ |"
        lines.append("| --- |" + " ---: |" * (2 * len(heads) + 2))
        for name, shown in NAMES.items():
            cells = []
            for t in times.values():
                ms = t["ms"].get(name)
                cells += ["", ""] if ms is None else [f"{ms:.2f}", f"{t['ms']['base torch'] / ms:.2f}x"]
            e = equal.get(name)
            error = "" if e is None or e["standard_error"] is None else f" ± {e['standard_error']:.2f}"
            cells += ["", ""] if e is None else [f"{e['metric']:.2f}{error}", f"{e['differing']} of {case['examples']}"]
            lines.append(f"| {shown} | " + " | ".join(cells) + " |")
        lines.append("")
        for size, t in times.items():
            ms = t["ms"]
            gains = ", ".join(
                f"{kind} {ms[f'{kind} dense'] / ms[f'{kind} adaptive']:.2f}x" for kind in ("torch", "onnx", "int8")
            )
            lines.append(f"Length-adaptive over dense, batch {size}: {gains}.")
        lines += ["", f"{'; '.join([*clocks, case['hardware']])}.", ""]
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    for step in ("prepare", "equality", "time"):
        one = steps.add_parser(step)
        one.add_argument("study")
        one.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
        one.add_argument("--ratio", type=float, default=0.25)
        one.add_argument("--config")
        one.add_argument("--model", default="length_adaptive", help="or standard, or a length-adaptive checkpoint")
        one.add_argument("--work", type=Path, required=True)
        one.add_argument("--threads", type=int, default=2)
        one.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
        one.add_argument("--rounds", type=int, default=5)
        one.add_argument("--cpu-time", action="store_true", help="CPU time, for a machine that others use (threads 1)")
        one.add_argument("--count", type=int, default=16)
    steps.add_parser("table").add_argument("paths", type=Path, nargs="+")
    options = parser.parse_args()
    if options.step == "table":
        print(table(options.paths))
        return
    torch.set_num_threads(options.threads)
    case = Case(options)
    if options.step == "time":
        time(case, options.batch_sizes, options.rounds, options.count, options.cpu_time)
    else:
        {"prepare": prepare, "equality": equality}[options.step](case)


if __name__ == "__main__":
    main()
