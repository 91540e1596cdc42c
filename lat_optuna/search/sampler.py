"""The search as an Optuna sampler: the paper's (section 3.2), or ours, whose proposals a surrogate has screened.

Needs only optuna, ``length_config``, ``plan`` and ``surrogate``.
"""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Container, Sequence
from typing import Any, Literal

from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from lat_optuna.length_config import LengthConfig, Retention, parameter_names
from lat_optuna.search.plan import Candidate, Cost, Either, Fronts, SearchPlan
from lat_optuna.search.surrogate import ScreenedPlan


class LengthConfigSampler(BaseSampler):
    """The search in any Optuna program.

    The objective suggests ``trial.suggest_int("length_01", 1, max_length)`` and so on for every layer and returns the
    metric and, as the second objective, the cost; directions are the study's. Lengths come out non-increasing.
    A trial's number is its slot. With one process a study repeats and resumes exactly; several are best effort.
    Other parameters are drawn at random.

    Args:
        num_layers: ``L``.
        max_length: ``l_0``.
        seed: Of every draw.
        p: LengthDrop probability of the training: no proposal costs less than ``smallest(p)``.
        cost: Configuration to number, rising with every length; by default the sum of the lengths.
        preset: ``"paper"``, its evolutionary search, or ``"default"``, which
            screens children of the front with a surrogate (``surrogate.py``) and needs a fraction of the trials.
        retention: As in :class:`LengthConfig`; matters to ``cost`` alone.
        max_cost: No proposal costs more, where this is given.
        num_initial: Constant-ratio configurations of the initial population; like all sizes the preset's by default.
        num_mutations: Mutations a generation.
        num_crossovers: Crossovers a generation.
        mutation_prob: Chance of a layer to mutate.

    Example:
        >>> sampler = LengthConfigSampler(6, 128, preset="default")
        >>> study = optuna.create_study(directions=["maximize", "minimize"], sampler=sampler)
        >>> study.optimize(objective, n_trials=100)
    """

    def __init__(
        self,
        num_layers: int = 12,
        max_length: int = 384,
        seed: int = 0,
        p: float = 0.2,
        cost: Cost | None = None,
        *,
        preset: Literal["default", "paper"] = "paper",
        retention: Retention = "relative",
        max_cost: float | None = None,
        num_initial: int | None = None,
        num_mutations: int | None = None,
        num_crossovers: int | None = None,
        mutation_prob: float | None = None,
    ) -> None:
        if preset not in ("default", "paper"):
            raise ValueError(f"preset must be 'default' or 'paper', not {preset!r}")
        kind: type[SearchPlan] = ScreenedPlan if preset == "default" else SearchPlan
        sizes = {
            "num_initial": num_initial,
            "num_mutations": num_mutations,
            "num_crossovers": num_crossovers,
            "mutation_prob": mutation_prob,
        }
        self.plan = kind(
            num_layers=num_layers,
            max_length=max_length,
            retention=retention,
            seed=seed,
            p=p,
            max_cost=max_cost,
            cost=cost,
            **{name: size for name, size in sizes.items() if size is not None},  # type: ignore[arg-type]
        )
        self._space: dict[str, BaseDistribution] = {
            name: IntDistribution(1, max_length) for name in parameter_names(num_layers)
        }
        self._seen: _Seen | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_seen": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The lengths of all layers, whatever earlier trials suggested."""
        return self._space.copy()

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """One configuration; values of parameters that are no lengths are drawn one by one."""
        values: dict[str, Any] = {}
        if any(name in self._space for name in search_space):
            values = dict(self._propose(study, trial).parameters())
        return {
            name: values[name] if name in values else self.sample_independent(study, trial, name, distribution)
            for name, distribution in search_space.items()
        }

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """A random value.

        Raises:
            ValueError: The parameter is a length whose bounds or layer the sampler was not made for. Drawn by itself
                it would not fit the other layers.
        """
        if re.fullmatch(r"length_\d+", param_name):
            names, high = list(self._space), self.plan.max_length
            raise ValueError(
                f"{param_name} is suggested as {param_distribution}, but the sampler was made for {names[0]} ... "
                f"{names[-1]} in 1..{high}; suggest_int(name, 1, {high}), or give LengthConfigSampler the "
                "num_layers and max_length of the model"
            )
        draws = RandomSampler(seed=random.Random(f"{self.plan.seed}/{trial.number}/{param_name}").getrandbits(32))
        return draws.sample_independent(study, trial, param_name, param_distribution)

    def _propose(self, study: Study, trial: FrozenTrial) -> LengthConfig:
        with self._lock:
            if self._seen is None or not self._seen.belongs_to(study):
                self._seen = _Seen(self.plan, study)
            self._seen.update()
            running = self._seen.running()
            proposal = self.plan.choose(trial.number, self._seen.fronts, self._seen.taken(running), running)
        # A plain study goes on when everything has been evaluated; what is repeated then is of no consequence.
        return self.plan.smallest if proposal is None else proposal.config


class _Seen:
    """The trials of one study as far as they were read."""

    def __init__(self, plan: SearchPlan, study: Study) -> None:
        self.fronts = Fronts(plan)
        self._plan = plan
        self._study = study
        self._signs = [1.0 if d == StudyDirection.MAXIMIZE else -1.0 for d in study.directions]
        self._finished: set[tuple[int, ...]] = set()
        self._running: dict[int, FrozenTrial] = {}
        self._read = 0

    def belongs_to(self, study: Study) -> bool:
        return self._study._storage is study._storage and self._study._study_id == study._study_id

    def update(self) -> None:
        """Read the trials that were not finished when they were last read."""
        trials = self._study.get_trials(deepcopy=False)
        for number in [*self._running, *range(self._read, len(trials))]:
            trial = trials[number]
            if not trial.state.is_finished():
                self._running[number] = trial
                continue
            self._running.pop(number, None)
            config = self._config(trial)
            if config is None or trial.state == TrialState.FAIL:
                continue
            self._finished.add(config.lengths)
            if trial.state == TrialState.COMPLETE:
                self.fronts.add(self._candidate(trial, config))
        self._read = len(trials)

    def running(self) -> list[LengthConfig]:
        """What other trials are evaluating."""
        return [config for config in map(self._config, self._running.values()) if config is not None]

    def taken(self, running: Sequence[LengthConfig]) -> Container[tuple[int, ...]]:
        """Lengths of what other trials have evaluated or are evaluating."""
        return Either(self._finished, {config.lengths for config in running})

    def _config(self, trial: FrozenTrial) -> LengthConfig | None:
        plan = self._plan
        if not all(name in trial.params for name in parameter_names(plan.num_layers)):
            return None
        return LengthConfig.from_parameters(trial.params, plan.num_layers, plan.max_length, plan.retention)

    def _candidate(self, trial: FrozenTrial, config: LengthConfig) -> Candidate:
        metric = self._signs[0] * trial.values[0]
        rest = [-sign * value for sign, value in zip(self._signs[1:], trial.values[1:], strict=True)]
        cost, *further = rest or [self._plan.cost_of(config)]
        return Candidate(trial.number, trial.number, config, metric, cost, tuple(further))
