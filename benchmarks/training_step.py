"""What an optimiser step of length-adaptive training costs beside a plain one, and beside its FLOPs.

    python benchmarks/training_step.py --shape 32x14 --shape 16x177 --json benchmarks/results/training_step.json

    python benchmarks/training_step.py --shape 32x128 --steps 40 --device cuda --checkpoint FOLDER

Both trainers work on the same model and batch in turns. On a CPU, times are CPU times of one thread, which other work
on the machine disturbs less than wall time; on a GPU (taken where there is one) wall times, synchronised; medians. A
machine without the package of the study's weights takes them from ``--checkpoint FOLDER``. The bound is the FLOPs of
all passes over those of the full one: what the ratio of times would be if every FLOP of a step took as long as in plain
fine-tuning.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, TrainingArguments

from lat_optuna.flops import Architecture
from lat_optuna.pipeline import best_precision, describe_hardware
from lat_optuna.spec import load_spec, resolve_checkpoint
from lat_optuna.trainer import ExactTrainer, LengthAdaptation, LengthAdaptiveTrainer, SubModel

STUDY = Path(__file__).parent.parent / "studies" / "sst2-minilm.yaml"


def pass_flops(architecture: Architecture, sub_model: SubModel, n: int) -> float:
    """FLOPs of one forward pass of a sub-model, layers that LayerDrop skips left out."""
    lengths = (n,) * architecture.layers if sub_model.config is None else sub_model.config.at_length(n)
    total, rows = float(architecture.per_token * n + architecture.per_example), n
    for layer, kept in enumerate(lengths):
        if layer in sub_model.skip_layers:
            continue
        total += rows * architecture.per_row_in + (rows + kept) * rows * architecture.per_pair
        total += kept * architecture.per_row_out
        rows = kept
    return total


def clock(device: str) -> float:
    """Seconds: of the CPU, or on a GPU of the wall, once it has done what it was told."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def step(trainer: Any, batch: dict[str, torch.Tensor], device: str) -> tuple[float, float]:
    """Milliseconds of the passes, and of clipping and updating."""
    start = clock(device)
    trainer.training_step(trainer.model, batch)
    middle = clock(device)
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    return 1000 * (middle - start), 1000 * (clock(device) - middle)


def measure(batch_size: int, tokens: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """One shape of batch: medians in milliseconds, and the three ratios."""
    spec, device, precision = load_spec(STUDY), chosen.device, chosen.precision
    adaptation = LengthAdaptation(p=spec.training.p, layer_drop=spec.training.layer_drop, max_length=max(128, tokens))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, bf16=precision == "bf16", report_to="none", use_cpu=device == "cpu")
        trainers = {}
        for name in ("plain", "adaptive"):
            model = AutoModelForSequenceClassification.from_pretrained(
                chosen.checkpoint or resolve_checkpoint(spec.model), dtype=torch.float32
            )
            made = (
                ExactTrainer(model, args)
                if name == "plain"
                else LengthAdaptiveTrainer(model, args, adaptation=adaptation)
            )
            made.create_optimizer()
            made.current_gradient_accumulation_steps = 1
            trainers[name] = made
        torch.manual_seed(0)
        batch = {
            "input_ids": torch.randint(1000, 20000, (batch_size, tokens)),
            "attention_mask": torch.ones(batch_size, tokens, dtype=torch.long),
            "labels": torch.randint(0, 2, (batch_size,)),
        }
        batch["attention_mask"][0, -2:] = 0  # as in batches of a data set, something is padded
        batch = {name: values.to(device) for name, values in batch.items()}
        architecture = Architecture.of(trainers["plain"].model)
        full = pass_flops(architecture, SubModel("full"), tokens)
        times: dict[str, list[tuple[float, float]]] = {"plain": [], "adaptive": []}
        bounds = []
        for number in range(-2, chosen.steps):
            for name, trainer in trainers.items():
                trainer.state.global_step = max(number, 0)
                taken = step(trainer, batch, device)
                if number >= 0:
                    times[name].append(taken)
            passes = adaptation.passes(architecture.layers, args.seed, max(number, 0))
            if number >= 0:
                bounds.append(sum(pass_flops(architecture, each, tokens) for each in passes) / full)
    result: dict[str, Any] = {"batch": batch_size, "tokens": tokens, "steps": chosen.steps}
    result |= {"device": describe_hardware(device), "precision": precision}
    result["clock"] = "CPU time" if device == "cpu" else "wall clock, synchronised"
    for name, taken in times.items():
        result[f"{name} passes ms"] = round(statistics.median(x for x, _ in taken), 1)
        result[f"{name} update ms"] = round(statistics.median(y for _, y in taken), 1)
    # Sub-models differ from step to step: sums of the same steps, not medians, go with the bound.
    total = {name: sum(map(sum, taken)) for name, taken in times.items()}
    result["ratio of times"] = round(total["adaptive"] / total["plain"], 3)
    result["ratio of passes alone"] = round(sum(x for x, _ in times["adaptive"]) / sum(x for x, _ in times["plain"]), 3)
    result["ratio of FLOPs"] = round(statistics.mean(bounds), 3)
    return result


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="examples x tokens of a batch", default=[])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="by default what the machine is fast at")
    parser.add_argument("--checkpoint", type=Path, help="folder of weights, in place of those of the study")
    chosen = parser.parse_args()
    chosen.precision = chosen.precision or best_precision()
    if chosen.device == "cpu":
        torch.set_num_threads(1)
    rows = []
    for shape in chosen.shape or ["32x14", "16x177"]:
        batch_size, tokens = map(int, shape.split("x"))
        rows.append(measure(batch_size, tokens, chosen))
        print(rows[-1], flush=True)
        if chosen.json is not None:
            content = {"hardware": describe_hardware(chosen.device), "torch": torch.__version__, "rows": rows}
            chosen.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
