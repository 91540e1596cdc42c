"""What asking for a trial and telling its values costs, with nothing evaluated in between.

    python benchmarks/overhead.py --prepare --folder /tmp/overhead     # fills the databases, once
    python benchmarks/overhead.py --folder /tmp/overhead

Our loop (a Ledger: claim and complete) and our sampler through ``study.optimize``, beside Optuna's RandomSampler,
NSGAIISampler and TPESampler through ``study.optimize``, all on studies of the same finished trials and on storages
with the same settings. Milliseconds a trial are medians; commits and SELECTs are means. TPE is left out where a trial
takes it seconds.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from statistics import median
from typing import Any

import optuna
import sqlalchemy
from common import LAYERS, LENGTH, database, make_evaluator, make_plan, proxy
from optuna.distributions import IntDistribution, distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import TrialState

from lat_optuna.length_config import LengthConfig, parameter_names
from lat_optuna.search.sampler import LengthConfigSampler
from lat_optuna.search.study import Ledger, open_study

NAMES = parameter_names(LAYERS)
SPACE = dict.fromkeys(NAMES, IntDistribution(1, LENGTH))
MOST_FOR_TPE = 10_000


def finished_trials(n_trials: int) -> Iterator[dict[str, Any]]:
    """Trials as our search and NSGA-II leave them behind, with the values of the stand-in."""
    rng, evaluator, plan = random.Random(0), make_evaluator("cpu", 0.0), make_plan(make_evaluator("cpu", 0.0))
    seen: set[tuple[int, ...]] = set()
    while len(seen) < n_trials:
        config = LengthConfig.length_drop(plan.p, LAYERS, LENGTH, rng)
        if config.lengths in seen:
            continue
        slot = len(seen)
        seen.add(config.lengths)
        value = evaluator.evaluate(config)
        yield {
            "params": dict(config.parameters()),
            "values": [value.metric, value.cost],
            "user_attrs": {
                "slot": slot,
                "config": str(config),
                "generation": plan.generation_of(slot),
                "operation": plan.operation_of(slot),
                "parents": [0, 1],
                "device": "cpu",
                "worker": "elsewhere/abcdef pid 1234 since 1700000000",
                "details": {"seconds": 1.234},
            },
            "system_attrs": {"NSGAIISampler:generation": slot // 50},
        }


def fill(study: optuna.Study, n_trials: int) -> None:
    """Put finished trials into an empty study: in bulk, past Optuna, where there is a database."""
    engine = getattr(getattr(study._storage, "_backend", None), "engine", None)
    if engine is None:
        for trial in finished_trials(n_trials):
            frozen = optuna.trial.create_trial(distributions=SPACE, **trial)
            study._storage.create_new_trial(study._study_id, template_trial=frozen)
        return
    now, distribution = datetime.now(), distribution_to_json(SPACE[NAMES[0]])
    with engine.begin() as connection:
        first = 1 + (connection.scalar(sqlalchemy.select(sqlalchemy.func.max(models.TrialModel.trial_id))) or 0)
        rows: dict[Any, list[dict[str, Any]]] = {}

        def flush() -> None:
            for model, inserts in rows.items():
                connection.execute(sqlalchemy.insert(model.__table__), inserts)
            rows.clear()

        for number, trial in enumerate(finished_trials(n_trials)):
            trial_id = first + number
            own = {"trial_id": trial_id}
            rows.setdefault(models.TrialModel, []).append(
                own
                | {"number": number, "study_id": study._study_id, "state": TrialState.COMPLETE}
                | {"datetime_start": now, "datetime_complete": now}
            )
            rows.setdefault(models.TrialValueModel, []).extend(
                own | {"objective": objective, "value": value, "value_type": "FINITE"}
                for objective, value in enumerate(trial["values"])
            )
            rows.setdefault(models.TrialParamModel, []).extend(
                own | {"param_name": name, "param_value": float(value), "distribution_json": distribution}
                for name, value in trial["params"].items()
            )
            for model, key in (
                (models.TrialUserAttributeModel, "user_attrs"),
                (models.TrialSystemAttributeModel, "system_attrs"),
            ):
                rows.setdefault(model, []).extend(
                    own | {"key": name, "value_json": json.dumps(value)} for name, value in trial[key].items()
                )
            if number % 1000 == 999:
                flush()
        flush()
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT setval('trials_trial_id_seq', (SELECT max(trial_id) FROM trials))")
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE")


def study_of(url: str | None, n_trials: int) -> optuna.Study:
    """The study with so many finished trials; it is filled where it is empty. ``None``: in memory."""
    evaluator = make_evaluator("cpu", 0.0)
    plan = make_plan(evaluator)
    if url is None:
        study = optuna.create_study(study_name=f"{n_trials} trials", directions=["maximize", "minimize"])
        study.set_user_attr("low", plan.lowest_cost)
    else:
        study = open_study(url, f"{n_trials} trials", evaluator, plan)
    if not url or not url.startswith("grpc"):
        if not study._storage.get_n_trials(study._study_id):
            fill(study, n_trials)
        if "generations" not in study.user_attrs:
            # A search writes them as they close.
            study.set_user_attr("generations", [{}] * plan.generation_of(n_trials))
        # So does NSGA-II with the parents of its generations, which it finds from those before.
        key = f"{optuna.samplers.NSGAIISampler._get_parent_cache_key_prefix()}{n_trials // 50}"
        last = [trial._trial_id for trial in study.get_trials(deepcopy=False)[n_trials - 50 : n_trials]]
        study._storage.set_study_system_attr(study._study_id, key, last)
    return study


# ---------------------------------------------------------------------- measuring


class Counts:
    """Commits and SELECTs on an engine while it is asked to count."""

    def __init__(self, engine: sqlalchemy.Engine | None) -> None:
        self.counter: Counter[str] = Counter()
        if engine is not None:
            sqlalchemy.event.listen(engine, "commit", lambda connection: self.counter.update(["commits"]))
            sqlalchemy.event.listen(engine, "before_cursor_execute", self._on_statement)

    def _on_statement(self, connection: Any, cursor: Any, statement: str, *rest: Any) -> None:
        self.counter.update([statement.split(None, 1)[0].upper()])


def by_ledger(study: optuna.Study, n_trials: int) -> Callable[[], None]:
    """A trial of our loop."""
    evaluator = make_evaluator("cpu", 0.0)
    plan = make_plan(evaluator)
    ledger = Ledger(study, plan, n_trials + 1_000_000)

    def one() -> None:
        claim = ledger.claim()
        assert claim is not None
        ledger.complete(claim, evaluator.evaluate(claim.config))

    return one


def by_sampler(study: optuna.Study, sampler: optuna.samplers.BaseSampler) -> Callable[[], None]:
    """A trial of ``study.optimize``."""
    evaluator = make_evaluator("cpu", 0.0)
    study.sampler = sampler

    def objective(trial: optuna.Trial) -> tuple[float, float]:
        lengths = [trial.suggest_int(name, 1, LENGTH) for name in NAMES]
        config = LengthConfig(sorted(lengths, reverse=True), LENGTH)
        value = evaluator.evaluate(config)
        return value.metric, value.cost

    return lambda: study.optimize(objective, n_trials=1)


def samplers(study: optuna.Study, n_trials: int) -> Iterator[tuple[str, Callable[[], Callable[[], None]], int]]:
    """Name, what makes the loop, and how many trials to time."""
    yield "lat_optuna's loop", lambda: by_ledger(study, n_trials), 15
    yield "LengthConfigSampler", lambda: by_sampler(study, LengthConfigSampler(LAYERS, LENGTH)), 10
    yield "RandomSampler", lambda: by_sampler(study, optuna.samplers.RandomSampler(seed=0)), 10
    yield "NSGAIISampler", lambda: by_sampler(study, optuna.samplers.NSGAIISampler(seed=0)), 10
    if n_trials <= MOST_FOR_TPE:
        yield "TPESampler", lambda: by_sampler(study, optuna.samplers.TPESampler(seed=0)), 3


def measure(label: str, url: str | None, n_trials: int) -> None:
    """Print a row a sampler."""
    study = study_of(url, n_trials)
    engine = getattr(getattr(study._storage, "_backend", None), "engine", None)
    counts = Counts(engine)
    for name, make, repeats in samplers(study, n_trials):
        start = time.perf_counter()
        one = make()
        one()  # reads all trials
        first = time.perf_counter() - start
        counts.counter.clear()
        times, computed = [], []
        for _ in range(repeats):
            start, cpu = time.perf_counter(), time.process_time()
            one()
            times.append(time.perf_counter() - start)
            computed.append(time.process_time() - cpu)
        commits, selects = (f"{counts.counter[key] / repeats:.1f}" if engine else "" for key in ("commits", "SELECT"))
        print(
            f"| {label} | {n_trials:,} | {name} | {1000 * median(times):.1f} "
            f"| {1000 * median(computed):.1f} | {1000 * first:.0f} "
            f"| {commits} | {selects} |",
            flush=True,
        )


def dashboard(url: str, n_trials: int) -> None:
    """Print how long ``lat-optuna dashboard`` takes to answer what a browser asks it."""
    import threading
    import urllib.request

    from lat_optuna.dashboard import make_servers

    study_id = study_of(url, n_trials)._study_id
    (server,) = make_servers([url], port=0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://127.0.0.1:{server.server_address[1]}/api/studies"
    for what, path in (
        ("list of studies", ""),
        ("all trials, for the first time", f"/{study_id}?after=0"),
        ("all trials, again", f"/{study_id}?after=0"),
        ("new trials, as a page polls", f"/{study_id}?after={n_trials}"),
    ):
        start = time.perf_counter()
        size = len(urllib.request.urlopen(root + path, timeout=120).read())
        took = time.perf_counter() - start
        print(f"| {n_trials:,} | {what} | {took:.2f} | {size / 1e6:.1f} |", flush=True)
    server.shutdown()
    server.server_close()


@contextmanager
def storages(names: list[str], folder: Path) -> Iterator[dict[str, str | None]]:
    """URL by name of the storage."""
    urls: dict[str, str | None] = dict.fromkeys(names)
    if "sqlite" in names:
        folder.mkdir(parents=True, exist_ok=True)
        urls["sqlite"] = f"sqlite:///{folder}/study.db"
    if "postgres" in names or "grpc" in names:
        with database("postgres", folder, keep=True) as url:
            urls |= {"postgres": url} if "postgres" in names else {}
            if "grpc" in names:
                with proxy(url) as served:
                    yield urls | {"grpc": served}
                    return
            yield urls
        return
    yield urls


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="keeps the filled databases")
    parser.add_argument("--storages", default="memory,sqlite,postgres,grpc")
    parser.add_argument("--sizes", default="100,1000,10000,50000")
    parser.add_argument("--prepare", action="store_true", help="only fill the databases")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sizes = [int(size) for size in arguments.sizes.split(",")]
    with storages(arguments.storages.split(","), arguments.folder) as urls:
        if arguments.prepare:
            for name in urls.keys() & {"sqlite", "postgres"}:
                for size in sizes:
                    start = time.monotonic()
                    study_of(urls[name], size)
                    print(f"{name}: {size} trials, {time.monotonic() - start:.0f} s", flush=True)
            return
        print("| storage | finished trials | | ms a trial | of them CPU, here | first one, ms | commits | SELECTs |")
        print("| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for name, url in urls.items():
            for size in sizes:
                measure(name, url, size)
        if sqlite := urls.get("sqlite"):
            print("\n| finished trials (SQLite) | the dashboard is asked for | seconds | MB |")
            print("| ---: | --- | ---: | ---: |", flush=True)
            for size in sizes:
                dashboard(sqlite, size)


if __name__ == "__main__":
    main()
