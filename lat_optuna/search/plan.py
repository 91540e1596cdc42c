"""The evolutionary search over length configurations (paper: section 3.2): which slot evaluates what.

Nothing here keeps state that matters: a proposal is a function of the seed, the slot and the trials that are visible.
What is kept between calls only saves reading them again. Needs nothing but ``length_config``.
"""

from __future__ import annotations

import bisect
import math
import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from lat_optuna.length_config import LengthConfig, Retention

Cost = Callable[[LengthConfig], float]

OPERATION_ATTEMPTS = 64
"""Draws of a slot's own operation before anything else within the trained range will do."""
RANDOM_ATTEMPTS = 192
"""Draws by LengthDrop before the space is searched for what is left of it."""
CACHED_GENERATIONS = 3


@dataclass(frozen=True)
class Candidate:
    """A finished trial as a possible parent.

    Attributes:
        slot: Its place in the plan.
        number: Its number in the study.
        config: What was evaluated.
        metric: Up is better.
        cost: Down is better.
        further: Further objectives; down is better.
        marks: What Optuna's own samplers have noted on the trial.
    """

    slot: int
    number: int
    config: LengthConfig
    metric: float
    cost: float
    further: tuple[float, ...] = ()
    marks: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Proposal:
    """What to evaluate in a slot, and where it comes from.

    Attributes:
        config: The configuration.
        generation: 0 for the initial population.
        operation: ``"constant ratio"``, ``"mutation"``, ``"crossover"`` or ``"random"``.
        parents: Trial numbers of the parents.
        marks: What the trial is to carry for the sampler that drew it.
    """

    config: LengthConfig
    generation: int
    operation: str
    parents: tuple[int, ...] = ()
    marks: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class SearchPlan:
    """The layout of a search: which slot belongs to which generation and operation (section 3.2).

    Slots ``0..num_initial-1`` hold the initial population, from the full model to ``smallest(p)``. Every later
    generation is ``num_mutations`` mutations, then ``num_crossovers`` crossovers.

    Args:
        num_layers: ``L``.
        max_length: ``l_0``.
        retention: As in :class:`LengthConfig`.
        seed: Of every draw.
        p: LengthDrop probability of the training: no proposal costs less than ``smallest(p)``.
        num_initial: Constant-ratio configurations of the initial population, at least 2.
        num_mutations: ``n_m``.
        num_crossovers: ``n_c``.
        mutation_prob: ``p_m``.
        max_cost: No proposal costs more, where this is given.
        cost: Configuration to number, rising with every length; by default the sum of the lengths.
    """

    num_layers: int
    max_length: int
    retention: Retention = "relative"
    seed: int = 0
    p: float = 0.2
    num_initial: int = 22
    num_mutations: int = 30
    num_crossovers: int = 30
    mutation_prob: float = 0.5
    max_cost: float | None = None
    cost: Cost | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise ValueError(f"p must lie in [0, 1), not {self.p}")
        if not 0 <= self.mutation_prob <= 1:
            raise ValueError(f"mutation_prob must lie in [0, 1], not {self.mutation_prob}")
        if self.num_initial < 2:
            raise ValueError(
                f"num_initial must be at least 2 (the full and the smallest model), not {self.num_initial}"
            )
        if min(self.num_mutations, self.num_crossovers) < 0 or self.num_mutations + self.num_crossovers < 1:
            raise ValueError(
                "num_mutations and num_crossovers must not be negative, and one of them at least 1; "
                f"they are {self.num_mutations} and {self.num_crossovers}"
            )
        LengthConfig.full(self.num_layers, self.max_length, self.retention)
        if self.max_cost is not None and not self.max_cost > self.lowest_cost:
            raise ValueError(
                f"max_cost must lie above {self.lowest_cost:g}, what the smallest sub-model of p = {self.p} costs, "
                f"and is {self.max_cost:g}"
            )

    def settings(self) -> dict[str, Any]:
        """Everything that decides what a slot holds, the cost apart: part of a study's identity."""
        names = ("num_layers", "max_length", "retention", "seed", "p")
        sizes = ("num_initial", "num_mutations", "num_crossovers", "mutation_prob")
        later: dict[str, Any] = {} if self.sampler == "paper" else {"sampler": self.sampler}
        if self.max_cost is not None:
            later["max_cost"] = self.max_cost
        return {name: getattr(self, name) for name in names + sizes} | later

    @property
    def sampler(self) -> str:
        """Name of the kind of search."""
        return "paper"

    # ------------------------------------------------------------------ layout

    @property
    def generation_size(self) -> int:
        """Slots of every generation but the initial one."""
        return self.num_mutations + self.num_crossovers

    def generation_of(self, slot: int) -> int:
        """The generation that a slot belongs to; the initial population is 0."""
        return 0 if slot < self.num_initial else 1 + (slot - self.num_initial) // self.generation_size

    def slots_of(self, generation: int) -> range:
        """The slots of a generation."""
        if generation == 0:
            return range(self.num_initial)
        start = self.num_initial + (generation - 1) * self.generation_size
        return range(start, start + self.generation_size)

    def operation_of(self, slot: int) -> str:
        """How a slot's configuration is drawn."""
        if slot < self.num_initial:
            return "constant ratio"
        place = (slot - self.num_initial) % self.generation_size
        return "mutation" if place < self.num_mutations else "crossover"

    # ------------------------------------------------------------------ the trained range

    def cost_of(self, config: LengthConfig) -> float:
        """The cost that spreads the initial population and bounds the search."""
        return float(sum(config.lengths) if self.cost is None else self.cost(config))

    @cached_property
    def full(self) -> LengthConfig:
        """The configuration that drops nothing."""
        return LengthConfig.full(self.num_layers, self.max_length, self.retention)

    @cached_property
    def smallest(self) -> LengthConfig:
        """The smallest sub-model that training reached."""
        return LengthConfig.smallest(self.p, self.num_layers, self.max_length, self.retention)

    @cached_property
    def lowest_cost(self) -> float:
        """Cost of :attr:`smallest`."""
        return self.cost_of(self.smallest)

    @property
    def highest_cost(self) -> float:
        """What no proposal may exceed."""
        return math.inf if self.max_cost is None else self.max_cost

    def allows(self, config: LengthConfig) -> bool:
        """Whether a configuration costs neither less than ``smallest(p)`` nor more than the budget."""
        return self.lowest_cost <= self.cost_of(config) <= self.highest_cost

    def fit(self, config: LengthConfig) -> LengthConfig:
        """The configuration itself if it is allowed, else scaled evenly towards the full or the smallest model."""
        if self.allows(config):
            return config
        dear = self.cost_of(config) > self.highest_cost
        ends = [min(pair) if dear else self.max_length for pair in zip(config, self.smallest, strict=True)]
        low, high = 0, 1024  # of 1024 parts of the way; whole numbers, for the same result on every machine
        while high - low > 1:
            middle = (low + high) // 2
            enough = self.cost_of(self._between(config, ends, middle))
            far = enough <= self.highest_cost if dear else enough >= self.lowest_cost
            low, high = (low, middle) if far else (middle, high)
        return self._between(config, ends, high)

    def _between(self, config: LengthConfig, ends: Sequence[int], parts: int) -> LengthConfig:
        # Rounded in the direction of the way, so that its last step has an effect.
        steps = [(end - length) * parts for length, end in zip(config, ends, strict=True)]
        lengths = (n + (-(-step // 1024) if step > 0 else step // 1024) for n, step in zip(config, steps, strict=True))
        return LengthConfig(tuple(lengths), self.max_length, self.retention)

    def initial(self, slot: int) -> LengthConfig:
        """The constant-ratio configuration of an initial slot, evenly spaced in cost."""
        if slot not in self._initial:
            self._initial[slot] = self._solve(slot)
        return self._initial[slot]

    @cached_property
    def _initial(self) -> dict[int, LengthConfig]:
        return {}

    def _solve(self, slot: int) -> LengthConfig:
        if slot <= 0:
            return self.fit(self.full)
        if slot >= self.num_initial - 1:
            return self.smallest
        highest = min(self.highest_cost, self.cost_of(self.full))
        target = highest + (self.lowest_cost - highest) * slot / (self.num_initial - 1)
        low, high = 0.0, float(self.p)
        # The cost is a falling step function of the ratio: 30 halvings pin down the step on both sides of the target.
        for _ in range(30):
            middle = (low + high) / 2
            low, high = (middle, high) if self.cost_of(self._constant(middle)) > target else (low, middle)
        sides = [self._constant(low), self._constant(high)]
        return min(sides, key=lambda config: abs(self.cost_of(config) - target))

    def _constant(self, ratio: float) -> LengthConfig:
        return LengthConfig.constant_ratio(ratio, self.num_layers, self.max_length, self.retention)

    # ------------------------------------------------------------------ proposals

    def choose(
        self,
        slot: int,
        seen: Fronts,
        taken: Container[tuple[int, ...]],
        running: Sequence[LengthConfig] = (),
        closed: bool = False,
    ) -> Proposal | None:
        """What to evaluate in a slot, given what is visible: what a search asks.

        Args:
            slot: The slot.
            seen: The finished trials.
            taken: As in :meth:`propose`.
            running: What is being evaluated.
            closed: Whether trials of this and later generations must not matter, whichever sampler it is.

        Returns:
            As :meth:`propose`.
        """
        return self.propose(slot, seen.before(self.generation_of(slot)), taken)

    def propose(self, slot: int, front: Sequence[Candidate], taken: Container[tuple[int, ...]]) -> Proposal | None:
        """What to evaluate in a slot: a function of its arguments and the plan.

        Args:
            slot: The slot.
            front: The Pareto front of the finished trials of earlier generations, as :class:`Fronts` gives it.
            taken: Lengths of the configurations that must not be drawn: finished, running or excluded ones.

        Returns:
            The first draw that is not taken and within the range of costs, or ``None`` if no such configuration is
            left.
        """
        generation = self.generation_of(slot)
        for attempt in range(OPERATION_ATTEMPTS + RANDOM_ATTEMPTS):
            # Seeding from a string hashes it: neighbouring slots and attempts are independent, on every machine alike.
            rng = random.Random(f"{self.seed}/{slot}/{attempt}")
            operation, config, parents = self._draw(slot, attempt, front, rng)
            if config.lengths not in taken and self.allows(config):
                return Proposal(config, generation, operation, parents)
        for config in self._within_range():
            if config.lengths not in taken:
                return Proposal(config, generation, "random")
        return None

    def _draw(
        self, slot: int, attempt: int, front: Sequence[Candidate], rng: random.Random
    ) -> tuple[str, LengthConfig, tuple[int, ...]]:
        operation = self.operation_of(slot)
        if attempt < OPERATION_ATTEMPTS:
            if operation == "constant ratio":
                # On short inputs neighbouring ratios coincide: move on to a neighbour of the configuration.
                config = self.initial(slot)
                return operation, config if attempt == 0 else config.mutate(self.mutation_prob, rng), ()
            if operation == "crossover" and len(front) >= 2:
                first, second = rng.sample(front, 2)
                return operation, first.config.crossover(second.config), (first.number, second.number)
            if front:
                parent = rng.choice(front)
                return "mutation", parent.config.mutate(self.mutation_prob, rng), (parent.number,)
        # LengthDrop never leaves the trained range, so that these draws are not wasted below it.
        config = LengthConfig.length_drop(self.p, self.num_layers, self.max_length, rng, self.retention)
        return "random", config if self.max_cost is None else self.fit(config), ()

    def _within_range(self) -> Iterator[LengthConfig]:
        """Every allowed configuration, from the full model down, without repetition."""

        def extend(prefix: tuple[int, ...]) -> Iterator[LengthConfig]:
            for length in range(prefix[-1] if prefix else self.max_length, 0, -1):
                # The dearest configuration that starts like this repeats the last length.
                flat = (*prefix, length) + (length,) * (self.num_layers - len(prefix) - 1)
                config = LengthConfig(flat, self.max_length, self.retention)
                if self.cost_of(config) < self.lowest_cost:
                    return
                if self.max_cost is not None:
                    thin = (*prefix, length) + (1,) * (self.num_layers - len(prefix) - 1)
                    if self.cost_of(LengthConfig(thin, self.max_length, self.retention)) > self.max_cost:
                        continue
                if len(prefix) + 1 == self.num_layers:
                    yield config
                else:
                    yield from extend((*prefix, length))

        return extend(())


class ParetoFront:
    """The non-dominated candidates, grown one by one; the order in which they come does not matter.

    Of candidates with equal metric and cost the one with the lowest slot stays.
    """

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._members: list[Candidate] = []  # in rising cost, hence in rising metric if there are no further objectives

    def add(self, new: Candidate) -> None:
        """Take a candidate in, unless it is dominated; drop those that it dominates."""
        if any(map(math.isnan, (new.metric, new.cost, *new.further))):
            return
        if new.further:
            self._add_one_by_one(new)
            return
        place = bisect.bisect_right(self._costs, new.cost)
        if place:
            before = self._members[place - 1]
            equal = (before.metric, before.cost) == (new.metric, new.cost)
            if before.metric > new.metric or (before.metric == new.metric and not (equal and new.slot < before.slot)):
                return
        start = place - 1 if place and self._costs[place - 1] == new.cost else place
        end = start
        while end < len(self._members) and self._members[end].metric <= new.metric:
            end += 1
        self._costs[start:end] = [new.cost]
        self._members[start:end] = [new]

    def _add_one_by_one(self, new: Candidate) -> None:
        if not any(_dominates(one, new) for one in self._members):
            kept = [one for one in self._members if not _dominates(new, one)]
            self._members[:] = sorted([*kept, new], key=lambda one: (one.cost, one.slot))

    @property
    def members(self) -> Sequence[Candidate]:
        """The front in rising cost. Not a copy: do not change it."""
        return self._members


def _dominates(one: Candidate, other: Candidate) -> bool:
    """Whether a candidate is at least as good in everything, and better in something or an equal of a lower slot."""
    mine, its = ((-x.metric, x.cost, *x.further) for x in (one, other))
    return all(a <= b for a, b in zip(mine, its, strict=True)) and (mine != its or one.slot <= other.slot)


class Fronts:
    """The front of the finished trials of earlier generations, for any generation.

    A new trial is folded into the fronts that were asked for lately; others are rebuilt.

    Args:
        plan: Says which slot belongs to which generation.

    Attributes:
        notes: What a plan keeps to save working it out again from the same trials.
    """

    def __init__(self, plan: SearchPlan) -> None:
        self._plan = plan
        self._finished: list[Candidate] = []  # in the order of their slots
        self._abandoned: list[Candidate] = []
        self._fronts: dict[int, ParetoFront] = {}
        self.notes: dict[str, Any] = {}

    def add(self, candidate: Candidate) -> None:
        """Take a finished trial in."""
        bisect.insort(self._finished, candidate, key=lambda one: one.slot)
        own = self._plan.generation_of(candidate.slot)
        for generation, front in self._fronts.items():
            if own < generation:
                front.add(candidate)

    def add_abandoned(self, candidate: Candidate) -> None:
        """Take in what was seen of a trial that could not join the front: it is no parent, but teaches something."""
        self._abandoned.append(candidate)

    def abandoned(self, generation: int) -> Sequence[Candidate]:
        """Those of generations below ``generation``, in the order of their slots."""
        found = (one for one in self._abandoned if self._plan.generation_of(one.slot) < generation)
        return sorted(found, key=lambda one: one.slot)

    def finished(self, generation: int | None = None) -> Sequence[Candidate]:
        """All finished trials, or those of generations below ``generation``, in the order of their slots."""
        return self._finished[: self._count_before(generation)]

    def later(self, generation: int) -> Sequence[Candidate]:
        """Finished trials of this and later generations, in the order of their slots."""
        return self._finished[self._count_before(generation) :]

    def _count_before(self, generation: int | None) -> int | None:
        if generation is None:
            return None
        return bisect.bisect_left(self._finished, self._plan.slots_of(generation).start, key=lambda one: one.slot)

    def before(self, generation: int) -> Sequence[Candidate]:
        """The front of the trials of generations below ``generation``, in rising cost."""
        front = self._fronts.pop(generation, None)
        if front is None:
            front = ParetoFront()
            for candidate in self._finished:
                if self._plan.generation_of(candidate.slot) < generation:
                    front.add(candidate)
        while len(self._fronts) >= CACHED_GENERATIONS:
            self._fronts.pop(next(iter(self._fronts)))
        self._fronts[generation] = front
        return front.members


class Either(Container[tuple[int, ...]]):
    """What any of several containers holds, without copying them."""

    def __init__(self, *parts: Container[tuple[int, ...]]) -> None:
        self._parts = parts

    def __contains__(self, lengths: object) -> bool:
        return any(lengths in part for part in self._parts)
