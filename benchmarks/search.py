"""Area under the front and hypervolume at equal numbers of evaluations: our sampler, the paper's, and Optuna's.

    python benchmarks/search.py run studies/sst2-minilm.yaml --set output=runs/sst2-minilm --counts 100 300
    python benchmarks/search.py table

``run`` works on a landscape of a trained model (see ``landscapes.py``), or with ``--emulated`` on what is fitted to the
configurations that have been measured. Every run's trials lie in a file, so that it goes on from where it was stopped;
``table`` prints mean and 95 % interval over the seeds and draws the picture. ``reach`` says after how many evaluations
ours has the area that the paper's search ends with and, with what ``evaluator.py`` found an evaluation to cost, how
much sooner that is. ``ask`` times proposals.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import optuna
from landscapes import Emulated, Measured
from searches import SCORES
from transformers import BertConfig

from lat_optuna.flops import Architecture
from lat_optuna.length_config import LengthConfig
from lat_optuna.search.evaluator import StandInEvaluator
from lat_optuna.search.foreign import make_plan
from lat_optuna.search.front import auc, hypervolume
from lat_optuna.search.plan import Candidate, Fronts, SearchPlan
from lat_optuna.spec import load_spec

SAMPLERS = ("default", "paper", "nsga2", "nsga3", "tpe", "gp", "random")
LABELS = {"default": "ours", "nsga2": "NSGA-II", "nsga3": "NSGA-III", "tpe": "TPE", "gp": "GP"}
COUNTS = (100, 300, 600, 1800)
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}
"""Quantiles of Student's t, by the number of seeds."""


def plan_for(landscape: Any, sampler: str, seed: int) -> SearchPlan:
    """A search of a landscape with a sampler's own sizes."""
    return make_plan(
        sampler,
        num_layers=landscape.num_layers,
        max_length=landscape.max_length,
        retention=landscape.retention,
        p=landscape.p,
        cost=landscape.cost,
        seed=seed,
    )


def search(landscape: Any, metric: str, sampler: str, seed: int, trials: list[list[Any]], count: int) -> None:
    """Go on with a search up to a number of trials; ``trials`` holds ``[lengths, metric, cost, marks]``."""
    plan = plan_for(landscape, sampler, seed)
    seen, taken = Fronts(plan), set()

    def take(slot: int, lengths: Sequence[int], value: float, cost: float, marks: dict[str, Any]) -> None:
        config = LengthConfig(tuple(lengths), plan.max_length, plan.retention)
        taken.add(config.lengths)
        seen.add(Candidate(slot, slot, config, value, cost, (), marks))

    for slot, trial in enumerate(trials):
        take(slot, *trial)
    for slot in range(len(trials), count):
        proposal = plan.choose(slot, seen, taken)
        assert proposal is not None
        value, cost = landscape.value(proposal.config, metric), plan.cost_of(proposal.config)
        trials.append([list(proposal.config.lengths), value, cost, dict(proposal.marks)])
        take(slot, *trials[-1])


def run(arguments: argparse.Namespace) -> None:
    """All samplers, seeds and counts, the small counts first."""
    spec = load_spec(arguments.study, [*arguments.set, "search.precision=bf16"])
    landscape: Any
    if arguments.emulated:
        memo = arguments.memo / f"{spec.name}-{arguments.examples}-bf16.jsonl"
        landscape = Emulated(spec, memo, arguments.stored)
        print(f"{landscape.name}; costs within {landscape.cost_error:.5f}", flush=True)
    else:
        import torch

        torch.set_num_threads(1)
        landscape = Measured(spec, arguments.examples, arguments.memo)
    low = plan_for(landscape, "paper", 0).lowest_cost
    file = (
        arguments.results
        / f"{spec.name}-{landscape.examples}-{arguments.metric}{'-emulated' * arguments.emulated}.json"
    )
    state = {
        "landscape": landscape.name,
        "low": low,
        "examples": landscape.examples,
        "metric": arguments.metric,
        "runs": {},
    }
    if file.exists():
        state["runs"] = json.loads(file.read_text())["runs"]
    arguments.results.mkdir(parents=True, exist_ok=True)
    for count in arguments.counts:
        for seed in arguments.seeds:
            for sampler in arguments.samplers:
                trials = state["runs"].setdefault(sampler, {}).setdefault(str(seed), [])
                start, before = time.monotonic(), len(trials)
                while len(trials) < count:
                    search(landscape, arguments.metric, sampler, seed, trials, min(count, len(trials) + 25))
                    temporary = file.with_suffix(".tmp")
                    temporary.write_text(json.dumps(state))
                    temporary.replace(file)
                if len(trials) > before:
                    area = auc([(trial[1], trial[2]) for trial in trials[:count]], low)
                    print(
                        f"{landscape.name} {sampler} {seed} {count} {area:.3f} {time.monotonic() - start:.0f} s",
                        flush=True,
                    )


def figures(state: dict[str, Any], count: int) -> dict[str, tuple[list[float], list[float]]]:
    """Sampler -> AUC and hypervolume of every seed that got so far."""
    found = {}
    for sampler, seeds in state["runs"].items():
        pairs = [[(t[1], t[2]) for t in trials[:count]] for trials in seeds.values() if len(trials) >= count]
        if len(pairs) > 1:
            found[sampler] = [auc(points, state["low"]) for points in pairs], [hypervolume(points) for points in pairs]
    return found


def interval(values: Sequence[float]) -> str:
    """Mean and half a 95 % interval."""
    half = T95.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.3f} ± {half:.3f}"


def table(arguments: argparse.Namespace) -> None:
    """Markdown of everything that has been run, and the picture."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    states = [json.loads(file.read_text()) for file in sorted(arguments.results.glob("*.json"))]
    for state in states:
        counts = [count for count in arguments.counts if figures(state, count)]
        if not counts:
            continue
        print(f"\n### {state['landscape']}, {state['examples']} examples, {state['metric']}\n")
        print("| sampler | " + " | ".join(f"AUC at {n} | hypervolume at {n}" for n in counts) + " | seeds |")
        print("|---" * (2 * len(counts) + 2) + "|")
        for sampler in SAMPLERS:
            cells, seeds = [], []
            for count in counts:
                areas, volumes = figures(state, count).get(sampler, ([], []))
                cells += [interval(areas), interval(volumes)] if areas else ["–", "–"]
                seeds.append(str(len(areas)))
            if set(seeds) != {"0"}:
                print(f"| {LABELS.get(sampler, sampler)} | {' | '.join(cells)} | {', '.join(seeds)} |")
    if arguments.picture:
        figure = make_subplots(1, len(states), subplot_titles=[f"{s['landscape']}, {s['metric']}" for s in states])
        named: set[str] = set()
        for column, state in enumerate(states, start=1):
            shown = []
            for index, sampler in enumerate(SAMPLERS):
                counts = [n for n in range(10, 1801, 10) if sampler in figures(state, n)]
                mean = [statistics.mean(figures(state, n)[sampler][0]) for n in counts]
                shown += [area for n, area in zip(counts, mean, strict=True) if n >= 40]
                color = f"hsl({index * 51}, 70%, 45%)"
                line = go.Scatter(
                    x=counts,
                    y=mean,
                    mode="lines",
                    name=LABELS.get(sampler, sampler),
                    legendgroup=sampler,
                    line_color=color,
                    showlegend=bool(counts) and sampler not in named,
                )
                named |= {sampler} if counts else set()
                figure.add_trace(line, 1, column)
            figure.update_xaxes(title="evaluations", type="log", row=1, col=column)
            room = 0.05 * (max(shown) - min(shown))
            figure.update_yaxes(range=[min(shown) - room, max(shown) + room], row=1, col=column)
        figure.update_yaxes(title="area under the front, mean over seeds", row=1, col=1)
        figure.update_layout(width=520 * len(states), height=420, template="plotly_white")
        figure.write_image(arguments.picture, scale=1.4)


def first_with(trials: Sequence[Sequence[Any]], low: float, target: float) -> int | None:
    """After how many trials the area under the front is at least ``target``."""
    if auc([(trial[1], trial[2]) for trial in trials], low) < target:
        return None
    count = 0
    for step in (100, 10, 1):  # the area never falls
        while auc([(trial[1], trial[2]) for trial in trials[: count + step]], low) < target:
            count += step
    return count + 1


def reach(arguments: argparse.Namespace) -> None:
    """Markdown: evaluations to the area that the paper's search has at its end, and the time they take."""
    print(
        "| landscape | by | the paper's evaluations | its AUC | ours has it after (by seed) | proposals | evaluator | "
        "in all |\n|---|---|---|---|---|---|---|---|"
    )
    for file in sorted(arguments.results.glob("*.json")):
        state = json.loads(file.read_text())
        name = state["landscape"].split(",")[0]
        paper = [trials for trials in state["runs"].get("paper", {}).values() if len(trials) >= max(arguments.counts)]
        ours = list(state["runs"].get("default", {}).values())
        if not paper or not ours:
            continue
        count = min(map(len, paper))
        target = statistics.mean(auc([(t[1], t[2]) for t in trials[:count]], state["low"]) for trials in paper)
        after = [first_with(trials, state["low"], target) for trials in ours]
        shown = ", ".join(f"not in {len(t)}" if n is None else str(n) for n, t in zip(after, ours, strict=True))
        evaluator = next(
            (found for found in arguments.evaluator if json.loads(found.read_text())["study"] == name), None
        )
        per_evaluation = (
            max(side["ratio"] for side in json.loads(evaluator.read_text())["sides"]) if evaluator else None
        )
        middle = statistics.median([len(t) if n is None else n for n, t in zip(after, ours, strict=True)])
        sooner = count / middle
        sign = "at most " if None in after else ""
        cells = [sign + f"{sooner:.1f}x", f"{per_evaluation:.1f}x" if per_evaluation else "–"]
        cells.append(sign + f"{sooner * per_evaluation:.0f}x" if per_evaluation else "–")
        print(f"| {name} | {state['metric']} | {count} | {target:.3f} | {shown} | {' | '.join(cells)} |")


def ask(arguments: argparse.Namespace) -> None:
    """Milliseconds of a proposal after so many finished trials of the stand-in.

    Costs are those of BERT-base's 12 layers on inputs of 300 different lengths, as a search asks for them.
    """
    evaluator = StandInEvaluator(12, 384)
    architecture = Architecture.of(BertConfig(architectures=["BertForQuestionAnswering"]))
    counts = Counter(range(85, 385))
    dense = architecture.mean_flops(None, counts)

    @cache
    def cost(config: LengthConfig) -> float:
        return architecture.mean_flops(config, counts) / dense

    print("| finished trials | ours | paper |\n|---|---|---|")
    for count in arguments.counts:
        cells = []
        for sampler in ("default", "paper"):
            plan = make_plan(sampler, num_layers=12, max_length=384, p=0.2, cost=cost)
            seen, taken = Fronts(plan), set()
            drawn = SearchPlan(12, 384, p=0.2, cost=cost)
            for slot in range(count):
                proposal = drawn.choose(slot, Fronts(drawn), taken)
                assert proposal is not None
                taken.add(proposal.config.lengths)
                value = evaluator.evaluate(proposal.config)
                seen.add(Candidate(slot, slot, proposal.config, value.metric, cost(proposal.config)))
            times = []
            for slot in range(count, count + 20):
                start = time.perf_counter()
                proposal = plan.choose(slot, seen, taken)
                times.append(1e3 * (time.perf_counter() - start))
                assert proposal is not None
                taken.add(proposal.config.lengths)
                value = evaluator.evaluate(proposal.config)
                seen.add(Candidate(slot, slot, proposal.config, value.metric, cost(proposal.config)))
            cells.append(f"{statistics.median(times):.1f} (mean {statistics.mean(times):.1f})")
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """See the module."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("study")
    runs.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    runs.add_argument("--examples", type=int, default=500)
    runs.add_argument("--metric", choices=SCORES, default="metric")
    runs.add_argument("--memo", type=Path, default=Path("runs/landscapes"))
    runs.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=SAMPLERS)
    runs.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    runs.add_argument("--emulated", action="store_true")
    runs.add_argument("--stored", type=Path, nargs="*", default=(), help="further measurements, of searches.py")
    runs.set_defaults(function=run)
    tables = commands.add_parser("table")
    tables.add_argument("--picture", type=Path)
    tables.set_defaults(function=table)
    reaches = commands.add_parser("reach")
    reaches.add_argument("--evaluator", type=Path, nargs="*", default=(), help="results of evaluator.py")
    reaches.set_defaults(function=reach)
    for command in (runs, tables, reaches):
        command.add_argument("--results", type=Path, default=Path("runs/samplers"))
        command.add_argument("--counts", type=int, nargs="+", default=COUNTS)
    asks = commands.add_parser("ask")
    asks.add_argument("--counts", type=int, nargs="+", default=(100, 1000, 10000))
    asks.set_defaults(function=ask)
    arguments = parser.parse_args()
    arguments.function(arguments)


if __name__ == "__main__":
    main()
