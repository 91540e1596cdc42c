"""What the kernels of a layer that drops save: attention, votes and choice of one layer, half of the rows kept.

    python benchmarks/kernel.py --json kernel.json

All ways are measured in turns, and medians are compared: torch's attention over all rows (a layer that drops nothing),
on a CPU also the kernel's; the form that writes all probabilities, on a CPU also the one that has them in blocks (what
runs without a compiler); and the form with kernels, whose votes and choice are measured alone as well, beside a choice
by sorting.

``--device`` is the GPU where there is one. A CPU's figures are those of ``--threads`` threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lat_optuna.model import kernels
from lat_optuna.model import significance as forms
from lat_optuna.model.significance import Keep
from lat_optuna.pipeline import describe_hardware

SHAPES = {
    "cuda": ((64, 12, 128, 64), (64, 12, 384, 64), (16, 12, 384, 32), (64, 12, 512, 64), (1, 12, 384, 64)),
    "cpu": (
        (16, 12, 128, 32),
        (16, 12, 32, 32),
        (4, 12, 384, 32),
        (1, 12, 32, 32),
        (1, 12, 384, 32),
        (16, 12, 128, 64),
    ),
}
DTYPES = {
    "cuda": {"fp16": torch.float16, "bf16": torch.bfloat16},
    "cpu": {"fp32": torch.float32, "bf16": torch.bfloat16},
}


def tensors(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """Query, key and value in views as a model makes them."""
    batch, heads, n, size = shape
    made = [torch.randn(batch, n, heads, size, device=device, dtype=dtype) for _ in range(3)]
    return [part.transpose(1, 2).requires_grad_() for part in made]


def ways(parts: list[torch.Tensor], padded: bool) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    batch, _, n, _ = parts[0].shape
    real = None
    if padded:
        real = torch.arange(n, device=parts[0].device) < torch.full((batch, 1), n - n // 8, device=parts[0].device)
    allowed = None if real is None else real[:, None, None]
    keep = Keep(n // 2, None, real)
    query, key, value = parts
    votes = torch.rand(batch, n, device=parts[0].device)

    def without_gradient(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                function()

        return call

    def with_gradient(function: Callable[[], tuple[Any, torch.Tensor]]) -> Callable[[], Any]:
        gradient = torch.randn_like(function()[1])
        return lambda: torch.autograd.grad(function()[1], parts, gradient)

    def whole() -> tuple[Any, torch.Tensor]:
        probabilities = forms.attention_probabilities(query, key, allowed)
        choice = forms.choose(forms.significance(probabilities.detach(), real), keep)
        return choice, forms.context_of_rows(probabilities, value, choice.rows)

    def fused() -> tuple[Any, torch.Tensor]:
        return forms.attend_and_choose(query, key, value, allowed, keep)

    def blocks() -> Any:
        with unittest.mock.patch.dict(kernels.BY_DEVICE, cpu=None):
            return fused()

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)

    def all_rows() -> torch.Tensor:
        return forms.attend_from(query, key, value, allowed)

    return {
        "sdpa": without_gradient(dense),
        **({"all rows": without_gradient(all_rows)} if query.device.type == "cpu" else {}),
        "whole": without_gradient(whole),
        **({"blocks": without_gradient(blocks)} if query.device.type == "cpu" else {}),
        "fused": without_gradient(fused),
        "votes": without_gradient(lambda: kernels.received(query, key, allowed, real)),
        "choice": without_gradient(lambda: forms.choose(votes, keep)),
        "sorted": without_gradient(lambda: forms.as_choice(forms.choose_rows(votes, keep), keep, n)),
        "whole + backward": with_gradient(whole),
        "fused + backward": with_gradient(fused),
    }


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """One call, by the GPU's clock (what the host needs beyond that shows too: the GPU waits for it) or a CPU's."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return (time.perf_counter() - start) * 1e3
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    function()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event)


def medians(functions: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, float]:
    """Medians of all, measured in turns."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(-3, rounds):
        for name, function in functions.items():
            value = milliseconds(function, device)
            if number >= 0:
                taken[name].append(value)
    return {name: round(statistics.median(values), 4) for name, values in taken.items()}


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every shape and dtype."""
    found = []
    for name, dtype in DTYPES[args.device].items():
        for shape in SHAPES[args.device]:
            functions = ways(tensors(shape, dtype, args.device), args.padded)
            found.append({"shape": list(shape), "dtype": name, "ms": medians(functions, args.rounds, args.device)})
    return found


def table(found: list[dict[str, Any]]) -> str:
    """Milliseconds in Markdown."""
    names = list(found[0]["ms"])
    keys = [key for key in found[0] if key != "ms"]
    lines = ["| " + " | ".join([*keys, *names]) + " |", "|" + " --- |" * (len(keys) + len(names))]
    for one in found:
        fields = ["x".join(map(str, one[key])) if isinstance(one[key], list) else one[key] for key in keys]
        lines.append("| " + " | ".join([*fields, *(f"{one['ms'][name]:.3f}" for name in names)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=list(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="of a CPU; torch's number if left out")
    parser.add_argument("--padded", action="store_true", help="an eighth of the rows is padding")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    module = kernels.BY_DEVICE[args.device]
    if module is None or not module.available():
        raise SystemExit(
            "there are no kernels: a CPU needs a C++ compiler, a GPU Triton (torch's builds for CUDA bring it)"
        )
    torch.manual_seed(0)
    rows = measure(args)
    print(table(rows))
    if args.json is not None:
        content = {"hardware": describe_hardware(args.device), "torch": torch.__version__, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
