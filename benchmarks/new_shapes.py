"""What a matrix product costs when its shape is new to the process, and when it is not. One thread, bf16.

python benchmarks/new_shapes.py
"""

from __future__ import annotations

import time
from statistics import median

import torch

HIDDEN, INTERMEDIATE = 384, 1536
ROWS = (256, 512, 1024, 2048)


def main() -> None:
    """Prints a Markdown table; every figure is the median over seven shapes that differ by one row each."""
    torch.set_num_threads(1)
    weight = torch.randn(INTERMEDIATE, HIDDEN).bfloat16()
    print("| rows | first call, ms | second call, ms |\n| ---: | ---: | ---: |")
    with torch.inference_mode():
        torch.nn.functional.linear(torch.randn(100, HIDDEN).bfloat16(), weight)
        for rows in ROWS:
            calls: list[list[float]] = [[], []]
            for shape in range(rows - 7, rows):
                values = torch.randn(shape, HIDDEN).bfloat16()
                for times in calls:
                    start = time.perf_counter()
                    torch.nn.functional.linear(values, weight)
                    times.append(1e3 * (time.perf_counter() - start))
            print(f"| about {rows} | {median(calls[0]):.2f} | {median(calls[1]):.2f} |")


if __name__ == "__main__":
    main()
