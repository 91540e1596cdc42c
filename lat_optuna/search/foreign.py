"""Optuna's own samplers in a search of ours: for comparison, and for people who prefer them."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.study import StudyDirection
from optuna.trial import TrialState, create_trial

from lat_optuna.length_config import LengthConfig, parameter_names
from lat_optuna.search.plan import Candidate, Fronts, Proposal, SearchPlan
from lat_optuna.search.surrogate import ScreenedPlan

MAKE: dict[str, Callable[[int], BaseSampler]] = {
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed),
    "nsga3": lambda seed: optuna.samplers.NSGAIIISampler(seed=seed),
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed, multivariate=True),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, deterministic_objective=True),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
"""From a seed to a sampler with Optuna's own settings, but that TPE models all lengths together, which suits ordered
ones, and the Gaussian process knows that a configuration has one value. Each imports what it needs when it is made."""


@dataclass(frozen=True)
class ForeignPlan(SearchPlan):
    """A search whose configurations one of Optuna's samplers draws.

    The sampler is made anew for every slot, with a seed of the slot, and shown the finished trials of the search: so
    its proposals are functions of (seed, slot, visible trials) as ours are, for any number of workers. What it draws is
    sorted to fall from layer to layer and scaled into the range of costs; a configuration that is taken is mutated
    until it is not. The sampler sees what was evaluated, not what it drew. Slots have no initial population; their
    generations only say when a search that is reproducible lets it see more.

    Args:
        drawn_by: ``"nsga2"``, ``"nsga3"``, ``"tpe"``, ``"gp"`` or ``"random"``.
    """

    drawn_by: str = "random"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drawn_by not in MAKE:
            raise ValueError(f"drawn_by must be one of {', '.join(MAKE)}, not {self.drawn_by!r}")

    @property
    def sampler(self) -> str:
        """See :attr:`SearchPlan.sampler`."""
        return self.drawn_by

    def choose(
        self,
        slot: int,
        seen: Fronts,
        taken: Container[tuple[int, ...]],
        running: Sequence[LengthConfig] = (),
        closed: bool = False,
    ) -> Proposal | None:
        """See :meth:`SearchPlan.choose`."""
        generation = self.generation_of(slot)
        rng = random.Random(f"{self.seed}/{slot}/{self.sampler}")
        seed = rng.getrandbits(32)
        trial = self._mirror.ask(lambda: MAKE[self.sampler](seed), seen.finished(generation if closed else None))
        config = self.fit(LengthConfig.from_parameters(trial.params, self.num_layers, self.max_length, self.retention))
        for _ in range(256):
            if config.lengths not in taken and self.allows(config):
                return Proposal(config, generation, self.sampler, marks=trial.system_attrs)
            config = self.fit(config.mutate(self.mutation_prob, rng))
        return self.propose(slot, (), taken)

    def operation_of(self, slot: int) -> str:
        """See :meth:`SearchPlan.operation_of`."""
        return self.sampler

    @cached_property
    def _mirror(self) -> _Mirror:
        return _Mirror(parameter_names(self.num_layers), self.max_length)


def make_plan(sampler: str = "paper", **settings: Any) -> SearchPlan:
    """The plan of a search by the name of its sampler: ``"default"``, ``"paper"`` or one of :data:`MAKE`.

    The inverse of :meth:`SearchPlan.settings`, but for the cost.
    """
    if sampler == "paper":
        return SearchPlan(**settings)
    return ScreenedPlan(**settings) if sampler == "default" else ForeignPlan(drawn_by=sampler, **settings)


class _Mirror:
    """The finished trials of a search in a study in memory, for a sampler to look at and to write in.

    Nothing in it matters beyond one question: it is kept to save making it again.
    """

    def __init__(self, names: Sequence[str], max_length: int) -> None:
        self._space: dict[str, BaseDistribution] = dict.fromkeys(names, IntDistribution(1, max_length))
        self._shown: set[int] = set()
        self._study: optuna.Study | None = None

    def ask(self, make: Callable[[], BaseSampler], finished: Sequence[Candidate]) -> optuna.trial.FrozenTrial:
        """A trial with parameters, and what the sampler notes on it."""
        numbers = {one.number for one in finished}
        objectives = 2 + len(finished[0].further) if finished else 2
        if self._study is None or not self._shown <= numbers or len(self._study.directions) != objectives:
            directions = [StudyDirection.MAXIMIZE, *[StudyDirection.MINIMIZE] * (objectives - 1)]
            storage = optuna.storages.InMemoryStorage()
            storage.create_new_study(directions, name := "mirror")  # without the log's line of create_study
            self._study, self._shown = optuna.load_study(study_name=name, storage=storage), set()
        study = self._study
        for one in finished:
            if one.number not in self._shown:
                study.add_trial(
                    create_trial(
                        params=dict(one.config.parameters()),
                        distributions=self._space,
                        values=[one.metric, one.cost, *one.further],
                        system_attrs=dict(one.marks),
                    )
                )
        self._shown = numbers
        while True:
            before = study._storage.get_study_system_attrs(study._study_id)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                study.sampler = make()
            trial = study.ask(self._space)
            frozen = study.get_trials(deepcopy=False)[trial.number]
            # Failed trials teach nobody anything.
            study._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
            # Genetic samplers note a generation's parents on the study and read them in another order than they chose
            # them: once more, or the first slot of a generation would depend on whether somebody had asked before.
            if study._storage.get_study_system_attrs(study._study_id) == before:
                return frozen
