"""Racing: a configuration that cannot join the front is abandoned before it has seen all examples."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ALPHA = 0.01
"""Largest chance of losing a configuration that belongs on the front."""
LOOKS = tuple(k / 8 for k in range(1, 8))
"""Shares of the examples after which a configuration may be abandoned."""
FEWEST = 100
"""No look at fewer examples than this."""
_MISSING = 65535


@dataclass(frozen=True)
class Rival:
    """The point of the front that a configuration has to beat: the best of those that cost no more.

    Attributes:
        number: Its trial.
        metric: What the search selects by, as in :meth:`lat_optuna.search.evaluator.Evaluation.score`.
        scores: That, of every example, in the order of the split; NaN where an example has none.
        neighbours: The same of other points, those most like the configuration; ``[points, examples]``.
    """

    number: int
    metric: str
    scores: np.ndarray
    neighbours: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Racing:
    """When a configuration is abandoned.

    A configuration belongs on the front if its mean over all ``N`` examples is above that of its rival. Examples come
    in one random order, the same for all, so that after ``n`` of them those seen are a sample without replacement. The
    mean ``d`` over all examples of the differences between the two is estimated from it in one of two ways:

    - by the sample's own mean, with the standard error ``s / sqrt(n) * sqrt(1 - n / N)``, ``s`` being the standard
      deviation of the differences, example by example;
    - where the scores say something of nearly every example (probabilities do, right and wrong do not), by regression
      on the rival and the neighbours, all of whose scores are known: what they explain of the configuration's scores
      needs no sampling, and ``s`` is that of the residuals alone. (Cochran, Sampling Techniques, chapter 7.)

    The configuration is abandoned when ``d`` lies more than ``t`` standard errors below 0, ``t`` being Student's
    quantile at ``alpha / K``, with ``K`` looks in all (Bonferroni: however the looks depend on each other, the chances
    of K errors add up to no more than ``alpha``). So one whose mean is as high as its rival's or higher is lost with a
    chance of at most ``alpha``: of nearly all of those that do belong, far less, since they are better than equal.

    Student's quantile takes means of samples for normal, which they are not when all that speaks for a configuration
    lies in a few examples: a first look may miss them. Against that, one more example is added to every sample, as far
    off as the farthest and in favour of the configuration. How many configurations are lost on real models is counted
    by ``benchmarks/racing.py``.

    Args:
        alpha: See above.
        looks: Rising shares of the examples, below 1.
        seed: Of the order.
    """

    alpha: float = ALPHA
    looks: tuple[float, ...] = LOOKS
    seed: int = 0

    def order(self, examples: int) -> np.ndarray:
        """The order in which examples are looked at: a permutation of ``0..examples-1``."""
        import numpy as np

        return np.random.Generator(np.random.PCG64(self.seed)).permutation(examples)

    def stops(self, examples: int) -> list[int]:
        """Numbers of examples that have been seen at each look, rising; the last one is all of them."""
        counts = (math.ceil(share * examples) for share in self.looks)
        return [*sorted({count for count in counts if FEWEST <= count < examples}), examples]

    def is_lost(self, scores: np.ndarray, rival: Rival) -> bool:
        """Whether a configuration is to be abandoned.

        Args:
            scores: Of every example, as ``rival.scores``; NaN where it has not been seen.
            rival: What the configuration has to beat.
        """
        import numpy as np

        known = ~np.isnan(rival.scores)
        seen = known & ~np.isnan(scores)
        n, examples = int(seen.sum()), int(known.sum())
        differences = scores[seen] - rival.scores[seen]
        if not FEWEST <= n < examples or not differences.any():
            return False
        mean, residuals, fitted = float(differences.mean()), differences - differences.mean(), 1
        largest = float(np.abs(differences).max())
        if len(rival.neighbours) and np.count_nonzero(differences) > n / 2:
            columns = np.stack([np.ones(examples), *(one[known] for one in (rival.scores, *rival.neighbours))])
            sample = columns[:, seen[known]]
            weights = np.linalg.lstsq(sample.T, scores[seen], rcond=None)[0]
            mean = float((weights @ columns).mean() - rival.scores[known].mean())
            residuals, fitted = scores[seen] - weights @ sample, len(columns)
            largest = float(np.abs(residuals).max())
        unseen = 1 - n / examples
        variance = (float(residuals @ residuals) + largest**2) / (n - fitted)
        error = math.sqrt(variance / n * unseen * (1 + fitted / n))
        looks = max(1, len(self.stops(examples)) - 1)
        return mean + largest / n * unseen < -_student(1 - self.alpha / looks, n - fitted) * error


def _student(probability: float, degrees: int) -> float:
    """Student's quantile; the first two terms of its expansion, right to a per cent from 90 degrees on."""
    z = NormalDist().inv_cdf(probability)
    return z + (z**3 + z) / (4 * degrees)


def pack(scores: Sequence[float] | np.ndarray) -> str:
    """Scores of examples, in percent, as a short text: steps of 0.0015, compressed."""
    import numpy as np

    values = np.asarray(scores, dtype=np.float64)
    steps = np.where(np.isnan(values), _MISSING, np.rint(np.clip(np.nan_to_num(values), 0, 100) / 100 * (_MISSING - 1)))
    return base64.b85encode(zlib.compress(steps.astype("<u2").tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """The inverse of :func:`pack`, as fp64."""
    import numpy as np

    steps = np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<u2")
    return np.where(steps == _MISSING, np.nan, steps * (100.0 / (_MISSING - 1)))
