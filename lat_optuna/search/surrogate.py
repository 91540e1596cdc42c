"""Proposals that a surrogate of the metric has screened: the search's default, beside the paper's (section 3.2).

What a configuration costs is known by arithmetic; what it scores is not, but changes little from one configuration to
its neighbours. So a slot draws many children of the front, and evaluates the one of which a Gaussian process of the
finished trials expects the most: the largest expected gain of the area under the front. Every second slot draws its
parent first, as the paper does, and looks at children of that one alone. Otherwise all slots would go where the process
expects the most already, and neither the rest of the front nor the process would learn anything.
"""

from __future__ import annotations

import bisect
import itertools
import math
import random
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import numpy as np

from lat_optuna.length_config import LengthConfig
from lat_optuna.search.plan import Candidate, Fronts, ParetoFront, Proposal, SearchPlan

POOL = 200
"""Children that a slot looks at."""
MUTATED = 0.8
"""Share of them that the paper's mutation draws."""
MOST_OBSERVATIONS = 1000
"""Trials that the process is fitted to: keeps the time of a proposal flat."""
SCALES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
"""Distances over which the metric may change, see :func:`_distance`; the likelihood chooses."""
NUGGETS = (1e-4, 1e-2, 1e-1)
"""Shares of the variation that neighbours do not have in common; the likelihood chooses."""
LIKELIHOOD_OBSERVATIONS = 256
"""Trials that scale and nugget are chosen by, spread evenly over those that the process is fitted to."""
NEIGHBOURHOOD = 1 / 12
"""Distance from which trials tell how far off the process is at a place, and"""
PRIOR_TRIALS = 3
"""how many such trials the average of all counts for."""
RIDGE = 1e-3
DIGITS = 9
"""Expected gains are compared to so many decimals, so that rounding in another machine's BLAS decides nothing."""


@dataclass(frozen=True)
class ScreenedPlan(SearchPlan):
    """A small initial population, then small generations of configurations that a surrogate has screened.

    Slots ``0..num_initial-1`` are the paper's initial population, fewer of it. A generation is ``num_mutations`` slots
    (and ``num_crossovers``, which are nothing else here). Each looks at :data:`POOL` children of the front of earlier
    generations, of all its members (even slots) or a random one (odd slots): by the paper's mutation, or a step of one
    to three layers. Configurations of the same generation that are running or finished count as evaluated, with what
    the surrogate expects of them: so that slots do not crowd, and a proposal stays a function of (seed, slot, visible
    trials).

    With further objectives each slot weighs them and the cost against each other in its own way, at random.
    """

    num_initial: int = 8
    num_mutations: int = 5
    num_crossovers: int = 0
    mutation_prob: float = 0.3

    @property
    def sampler(self) -> str:
        """See :attr:`SearchPlan.sampler`."""
        return "default"

    def operation_of(self, slot: int) -> str:
        """See :meth:`SearchPlan.operation_of`."""
        return "constant ratio" if slot < self.num_initial else "screened"

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
        finished = seen.finished(generation)
        if slot < self.num_initial or len(finished) < 2:
            return self.propose(slot, (), taken)
        rng = random.Random(f"{self.seed}/{slot}/screened")
        parents = seen.before(generation)
        # Where all children of one parent have been evaluated, it is the next one's turn.
        families = [parents] if slot % 2 == 0 else [[parent] for parent in rng.sample(parents, len(parents))]
        pool = next(filter(None, (self._children(family, taken, rng) for family in families)), None)
        if pool is None:
            return self.propose(slot, parents, taken)
        configs = [config for config, _ in pool]
        later = (one.config for one in seen.later(generation))
        pending = sorted({*later, *running}, key=lambda config: config.lengths)
        surrogate = self._surrogate(seen, generation, parents)
        mean, deviation = surrogate.predict(self._shares([*pending, *configs]))
        price = self._prices(finished, rng)
        front = ParetoFront()
        for one in finished if finished[0].further else parents:
            front.add(Candidate(one.slot, one.number, one.config, one.metric, price(one.cost, one.further)))
        prices = [
            price(self.cost_of(config), further)
            for config, further in zip([*pending, *configs], mean[:, 1:], strict=True)
        ]
        for index, config in enumerate(pending):
            front.add(Candidate(-1, -1, config, float(mean[index, 0]), prices[index]))
        new = slice(len(pending), None)
        highest = max(price(one.cost, one.further) for one in finished)
        floor = min(one.metric for one in finished)
        gains = expected_gain(front.members, mean[new, 0], deviation[new], np.array(prices[new]), highest, floor)
        best = int(np.argmax(np.round(gains / (gains.max() or 1.0), DIGITS)))
        config, parent = pool[best]
        return Proposal(config, generation, "screened", (parent.number,))

    def _children(
        self, parents: Sequence[Candidate], taken: Container[tuple[int, ...]], rng: random.Random
    ) -> list[tuple[LengthConfig, Candidate]]:
        found: dict[tuple[int, ...], tuple[LengthConfig, Candidate]] = {}
        for _ in range(4 * POOL):
            parent, mutated = rng.choice(parents), rng.random() < MUTATED
            config = parent.config.mutate(self.mutation_prob, rng) if mutated else self._step(parent.config, rng)
            if config.lengths not in taken and config.lengths not in found and self.allows(config):
                found[config.lengths] = config, parent
                if len(found) == POOL:
                    break
        return list(found.values())

    def _step(self, config: LengthConfig, rng: random.Random) -> LengthConfig:
        """One to three layers keep up to a third more or less; their neighbours give way."""
        lengths = list(config.lengths)
        for _ in range(rng.randint(1, 3)):
            layer = rng.randrange(self.num_layers)
            change = max(1, round(lengths[layer] * math.exp(rng.uniform(math.log(0.01), math.log(0.3)))))
            lengths[layer] += change if rng.random() < 0.5 else -change
        before, falling = self.max_length, []
        for length in lengths:
            before = max(1, min(before, length))
            falling.append(before)
        return LengthConfig(tuple(falling), self.max_length, self.retention)

    def _shares(self, configs: Sequence[LengthConfig]) -> np.ndarray:
        return np.array([config.lengths for config in configs], dtype=float) / self.max_length

    def _prices(self, finished: Sequence[Candidate], rng: random.Random) -> Callable[[float, Sequence[float]], float]:
        """What the metric is weighed against: the cost or, with further objectives, a mean of all of them."""
        if not finished[0].further:
            return lambda cost, further: cost
        table = np.array([(one.cost, *one.further) for one in finished])
        low, width = table.min(0), np.maximum(np.ptp(table, axis=0), 1e-12)
        draws = [-math.log(1.0 - rng.random()) for _ in low]  # uniform over the weights that sum to one
        weights = np.array(draws) / sum(draws)
        return lambda cost, further: float(weights @ ((np.array([cost, *further]) - low) / width))

    def _surrogate(self, seen: Fronts, generation: int, front: Sequence[Candidate]) -> Surrogate:
        """Fitted to the trials of earlier generations. Of very many, to those nearest to the front and as many others:
        what has turned out bad tells where not to look.

        The slots of a generation share it: it is fitted again when more trials of earlier ones have become visible.
        """
        finished = seen.finished(generation)
        if not finished[0].further:
            finished = [*finished, *seen.abandoned(generation)]
        count = (generation, len(finished))
        if seen.notes.get("fitted to") == count:
            known: Surrogate = seen.notes["surrogate"]
            return known
        if len(finished) > MOST_OBSERVATIONS:
            costs = [one.cost for one in front]
            best = list(itertools.accumulate((one.metric for one in front), max))

            def distance(one: Candidate) -> float:
                place = bisect.bisect_right(costs, one.cost)
                return (best[place - 1] if place else best[0]) - one.metric

            nearest = sorted(finished, key=lambda one: (distance(one), one.slot))
            half = MOST_OBSERVATIONS // 2
            rest = sorted(nearest[half:], key=lambda one: one.slot)
            spread = (rest[index * (len(rest) - 1) // (half - 1)] for index in range(half))
            finished = [*nearest[:half], *spread]
        values = np.array([(one.metric, *one.further) for one in finished])
        surrogate = Surrogate(self._shares([one.config for one in finished]), values)
        seen.notes.update({"fitted to": count, "surrogate": surrogate})
        return surrogate


class Surrogate:
    """A Gaussian process of the metric over kept shares: a trend, and what neighbours have in common.

    The trend is linear in every layer. The kernel falls as ``exp(-distance)``: what counts right answers changes by
    single examples, so that two configurations differ in proportion to their distance however near they are.

    Where little is dropped, the metric hardly changes, and where much is, it changes wildly. So the process's standard
    deviation is multiplied by how far off it is nearby: the root of the mean squared error, in its own standard
    deviations, at trials near by that it would have foreseen from all others (leave-one-out).

    Args:
        x: Kept shares, shape ``(n, L)``.
        y: Metric, then any further objectives, shape ``(n, 1 + k)``. Scale and nugget are chosen for the metric.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self._mean, self._unit = y.mean(0), y.std(0) + 1e-9
        y = (y - self._mean) / self._unit
        distance, some = _distance(x, x), slice(None, None, -(-len(x) // LIKELIHOOD_OBSERVATIONS))
        part = x[some], y[some], distance[some, some]
        fits = (_Fit(*part, scale, nugget) for scale, nugget in itertools.product(SCALES, NUGGETS))
        best = max(fits, key=lambda fit: round(fit.likelihood, 6))
        self._fit = best if len(best.x) == len(x) else _Fit(x, y, distance, best.scale, best.nugget)
        self._surprises = self._fit.surprises()

    def predict(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Expected values, shape ``(m, 1 + k)``, and the standard deviation of the metric, shape ``(m,)``."""
        distance = _distance(x, self._fit.x)
        mean, deviation = self._fit.predict(x, distance)
        near = np.exp(-distance / NEIGHBOURHOOD)
        surprise = near @ self._surprises + PRIOR_TRIALS * self._surprises.mean()
        deviation = deviation * np.sqrt(surprise / (near.sum(1) + PRIOR_TRIALS))
        return mean * self._unit + self._mean, deviation * self._unit[0]


class _Fit:
    """A :class:`Surrogate` of values with mean 0 and standard deviation 1, for one scale and nugget.

    Attributes:
        likelihood: Logarithm of the first value's likelihood, up to a constant.
    """

    def __init__(self, x: np.ndarray, y: np.ndarray, distance: np.ndarray, scale: float, nugget: float) -> None:
        self.x, self.scale, self.nugget = x, scale, nugget
        kernel, trend = np.exp(-distance / scale), _trend(x)
        factor = np.linalg.cholesky(kernel + (nugget + 1e-8) * np.eye(len(x)))
        self._inverse = np.linalg.inv(factor)
        self._whitened, white = self._inverse @ trend, self._inverse @ y
        self._normal = np.linalg.inv(self._whitened.T @ self._whitened + RIDGE * np.eye(trend.shape[1]))
        self._weights = self._normal @ (self._whitened.T @ white)
        rest = white - self._whitened @ self._weights
        self._alpha = self._inverse.T @ rest
        own = self._weights[:, 0]
        self._variance = (rest[:, 0] @ rest[:, 0] + RIDGE * own @ own) / len(x) + 1e-9
        self.likelihood = -0.5 * len(x) * math.log(self._variance) - np.log(np.diag(factor)).sum()

    def surprises(self) -> np.ndarray:
        """Squared error of the first value at each trial, foreseen from all others, over its variance; shape ``(n,)``.

        Without a fit for each: see Rasmussen & Williams, Gaussian Processes for Machine Learning, section 5.4.2.
        """
        half = self._inverse.T @ self._whitened
        precision = (self._inverse**2).sum(0) - ((half @ self._normal) * half).sum(1)
        return self._alpha[:, 0] ** 2 / (precision * self._variance)

    def predict(self, x: np.ndarray, distance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        kernel, trend = np.exp(-distance / self.scale), _trend(x)
        mean = trend @ self._weights + kernel @ self._alpha
        explained = kernel @ self._inverse.T
        beyond = trend - explained @ self._whitened
        variance = 1.0 - (explained**2).sum(1) + ((beyond @ self._normal) * beyond).sum(1)
        return mean, np.sqrt(np.maximum(variance, 1e-9) * self._variance)


def expected_gain(
    front: Sequence[Candidate], mean: np.ndarray, deviation: np.ndarray, cost: np.ndarray, highest: float, floor: float
) -> np.ndarray:
    """By how much the area under a front is expected to grow.

    Args:
        front: Its members in rising cost.
        mean: Expected metrics of the candidates, shape ``(m,)``.
        deviation: Their standard deviations.
        cost: Their costs.
        highest: Cost up to which the area counts.
        floor: Metric that counts where no member is cheap enough.

    Returns:
        Metric times cost, shape ``(m,)``.
    """
    ends = np.array([one.cost for one in front] + [highest])
    starts = np.concatenate([[-math.inf], ends[:-1]])
    heights = np.array([floor] + [one.metric for one in front])
    width = np.maximum(0.0, ends - np.maximum(starts, cost[:, None]))
    z = (mean[:, None] - heights) / deviation[:, None]
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    improvement = deviation[:, None] * (z * _normal_cdf(z) + density)
    return (width * improvement).sum(1)


_erf = np.vectorize(math.erf, otypes=[float])


def _normal_cdf(z: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + _erf(z / math.sqrt(2)))


def _trend(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(x), 1)), x], 1)


def _distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """How much the kept shares of a layer differ on average, shape ``(len(a), len(b))``."""
    total = np.zeros((len(a), len(b)))
    for layer in range(a.shape[1]):
        total += np.abs(a[:, layer, None] - b[None, :, layer])
    return total / a.shape[1]
