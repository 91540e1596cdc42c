"""Anytime prediction under load: examples/serve.py against a server of the dense model, on a ramp of requests.

    python benchmarks/serve_ramp.py FOLDER --texts FILE.parquet --column sentence --output serve.json

Requests come at random moments (a Poisson process) whose rate climbs from a fifth of what the dense server can do to
twice as much, and falls again. Both servers get the same texts at the same moments, one after the other. Run it on an
otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from examples.serve import AnytimeServer, ladder_of

PERCENTILES = (50, 90, 99)
LOADS = (0.2, 0.6, 1.0, 1.5, 2.0, 1.0, 0.4)
"""Rates, as multiples of what the dense server can do, one after the other."""


def capacity(server: AnytimeServer, texts: list[str]) -> float:
    """Requests a second that a server answers when it always has one to do, dense."""
    for text in texts[:8]:
        server.submit(text).result()
    start = time.perf_counter()
    for text in texts:
        server.submit(text).result()
    return len(texts) / (time.perf_counter() - start)


def ramp(server: AnytimeServer, texts: list[str], rate: float, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Latencies in ms of every request, load by load."""
    draw = random.Random(seed)
    waiting: list[tuple[float, float, Any]] = []
    moment = start = time.perf_counter()
    done: dict[int, float] = {}
    for step, load in enumerate(LOADS):
        until = start + (step + 1) * seconds
        while True:
            moment += draw.expovariate(load * rate)
            if moment >= until:
                moment = until
                break
            time.sleep(max(0.0, moment - time.perf_counter()))
            future = server.submit(draw.choice(texts))
            key = len(waiting)
            future.add_done_callback(lambda _, key=key: done.__setitem__(key, time.perf_counter()))
            waiting.append((load, moment, future))
    for _, _, future in waiting:
        future.result()
    time.sleep(0.05)
    return [
        {"step": int((moment - start) // seconds), "load": load, "ms": 1000 * (done[key] - moment)}
        for key, (load, moment, _) in enumerate(waiting)
    ]


def percentile(values: list[float], share: float) -> float:
    """Of values in any order."""
    return sorted(values)[min(len(values) - 1, int(share / 100 * len(values)))]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--texts", required=True)
    parser.add_argument("--column", default="sentence")
    parser.add_argument("--seconds", type=float, default=10, help="of each load")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ratios", type=float, nargs="*", help="constant ratios instead of the folder's front")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = pq.read_table(options.texts)[options.column].to_pylist()
    random.Random(0).shuffle(texts)
    ladder = ladder_of(options.folder, options.ratios)
    dense = AnytimeServer(options.folder, [None])
    rate = capacity(dense, texts[:100])
    servers = {"dense": dense, "anytime": AnytimeServer(options.folder, ladder)}
    found: dict[str, Any] = {"requests_per_second_dense": rate, "ladder": [str(config) for config in ladder]}
    found |= {"threads": options.threads, "seconds_per_load": options.seconds}
    for name, server in servers.items():
        results = ramp(server, texts, rate, options.seconds, seed=1)
        rows = []
        for step, load in enumerate(LOADS):
            values = [one["ms"] for one in results if one["step"] == step]
            rows.append({"load": load, "requests": len(values)})
            rows[-1] |= {f"p{share}": percentile(values, share) for share in PERCENTILES}
            print(name, rows[-1], flush=True)
        everything = [one["ms"] for one in results]
        found[name] = {"steps": rows, "all": {f"p{share}": percentile(everything, share) for share in PERCENTILES}}
        if options.output:
            options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
