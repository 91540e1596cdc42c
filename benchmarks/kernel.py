"""What the form for CUDA of a layer that drops saves: attention, votes and choice of one layer, half of the rows kept.

    python benchmarks/kernel.py --json kernel.json

Four ways are measured in turns, and medians are compared: torch's attention over all rows (a layer that drops nothing),
the form that writes all probabilities, and the form for CUDA, whose votes are measured alone as well. fp32 is measured
with exact products and with three of TF32 (``tf32x3``). ``--blocks`` tries sizes of the kernel's blocks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from lat_optuna.model import significance as forms
from lat_optuna.model.significance import Keep

SHAPES = ((64, 12, 128, 64), (64, 12, 384, 64), (16, 12, 384, 32), (64, 12, 512, 64), (1, 12, 384, 64))
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BLOCKS = {
    2: ((64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 3), (128, 128, 8, 3)),
    4: ((64, 32, 8, 2), (32, 32, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2)),
}
"""By bytes of a number; see ``lat_optuna.model.kernels.BLOCKS``."""


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

    def without_gradient(function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> None:
            with torch.no_grad():
                function()

        return call

    def with_gradient(function: Callable[[], tuple[Any, torch.Tensor]]) -> Callable[[], Any]:
        gradient = torch.randn_like(function()[1])
        return lambda: torch.autograd.grad(function()[1], parts, gradient)

    def whole() -> tuple[torch.Tensor, torch.Tensor]:
        probabilities = forms.attention_probabilities(query, key, allowed)
        rows = forms.choose_rows(forms.significance(probabilities.detach(), real), keep)
        return rows, forms.context_of_rows(probabilities, value, rows)

    def fused() -> tuple[torch.Tensor, torch.Tensor]:
        return forms._fused(query, key, value, allowed, keep, None, 0.0)

    def dense() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)

    return {
        "sdpa": without_gradient(dense),
        "whole": without_gradient(whole),
        "fused": without_gradient(fused),
        "votes": without_gradient(lambda: forms._votes(query, key, allowed, real)),
        "whole + backward": with_gradient(whole),
        "fused + backward": with_gradient(fused),
    }


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """One call, by the GPU's clock (what the host needs beyond that shows too: the GPU waits for it)."""
    if device == "cpu":
        start = time.perf_counter()
        function()
        return 1000 * (time.perf_counter() - start)
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


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """How numbers of a kind are multiplied in the kernel."""
    return ("ieee", "tf32x3") if dtype == torch.float32 and forms.kernels is not None else ("ieee",)


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Every shape and dtype."""
    found = []
    shapes = SHAPES if args.device == "cuda" else ((2, 2, 40, 16),)
    for name, dtype in DTYPES.items():
        for shape in shapes:
            functions = ways(tensors(shape, dtype, args.device), args.padded)
            for precision in precisions(dtype):
                with patch.object(forms.kernels or forms, "PRECISION", precision, create=True):
                    cell = {"shape": list(shape), "dtype": name, "precision": precision}
                    found.append({**cell, "ms": medians(functions, args.rounds, args.device)})
    return found


def try_blocks(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Votes alone by size of the blocks."""
    found = []
    for name, dtype in DTYPES.items():
        if name == "bf16":
            continue
        for shape in ((64, 12, 384, 64), (1, 12, 384, 64)):
            query, key, _ = (part.detach() for part in tensors(shape, dtype, args.device))
            for precision in precisions(dtype):
                for blocks in BLOCKS[dtype.itemsize]:
                    with (
                        patch.object(forms.kernels, "PRECISION", precision),
                        patch.dict(forms.kernels.BLOCKS, {dtype: blocks}),
                    ):
                        ms = medians({"votes": lambda q=query, k=key: forms._votes(q, k, None, None)}, 20, args.device)
                    cell = {"shape": list(shape), "dtype": name, "precision": precision}
                    found.append({**cell, "blocks": list(blocks), "ms": ms})
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
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: one tiny shape, a smoke test")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--padded", action="store_true", help="an eighth of the rows is padding")
    parser.add_argument("--blocks", action="store_true", help="try sizes of blocks instead; needs a GPU")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = try_blocks(args) if args.blocks else measure(args)
    print(table(rows))
    if args.json is not None:
        hardware = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        kernel = forms.kernels is not None
        content = {"hardware": hardware, "torch": torch.__version__, "kernel": kernel, "rows": rows}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
