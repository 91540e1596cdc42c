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
LOOKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
"""Shares of the examples after which a configuration may be abandoned."""
FEWEST = 50
"""No look at fewer examples than this."""
_MISSING = 65535


@dataclass(frozen=True)
class Rival:
    """The point of the front that a configuration has to beat: the best of those that cost no more.

    Attributes:
        number: Its trial.
        metric: What the search selects by, as in :meth:`lat_optuna.search.evaluator.Evaluation.score`.
        scores: That, of every example, in the order of the split; NaN where an example has none.
    """

    number: int
    metric: str
    scores: np.ndarray


@dataclass(frozen=True)
class Racing:
    """When a configuration is abandoned.

    A configuration belongs on the front if its mean over all ``N`` examples is above that of its rival. Examples come
    in one random order, the same for all, so that after ``n`` of them the differences between the two, example by
    example, are a sample without replacement of all ``N`` differences: their mean ``d`` has the standard error
    ``s / sqrt(n) * sqrt(1 - n / N)``, with ``s`` the standard deviation of the differences. The configuration is
    abandoned when ``d`` lies more than ``t`` such errors below 0, ``t`` being Student's quantile at ``alpha / K``, with
    ``K`` looks in all (Bonferroni: however the looks depend on each other, the chances of K errors add up to no more
    than ``alpha``). So one whose mean is as high as its rival's or higher is lost with a chance of at most ``alpha``:
    of nearly all of those that do belong, far less, since they are better than equal.

    Student's quantile takes means of samples for normal, which they are not when all that speaks for a configuration
    lies in a few examples: a first look may miss them. Against that, one more difference is added to every sample, as
    large as the largest and in favour of the configuration. How many configurations are lost on real models is counted
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

    def is_lost(self, differences: np.ndarray, examples: int) -> bool:
        """Whether a configuration is to be abandoned.

        Args:
            differences: Configuration less rival, of the examples that were seen.
            examples: ``N``, how many there are.
        """
        import numpy as np

        seen = differences[~np.isnan(differences)]
        n = len(seen)
        if not FEWEST <= n < examples or not seen.any():
            return False
        padded = np.append(seen, np.abs(seen).max())
        error = float(padded.std(ddof=1)) / math.sqrt(n) * math.sqrt(1 - n / examples)
        looks = max(1, len(self.stops(examples)) - 1)
        return float(padded.mean()) < -_student(1 - self.alpha / looks, n) * error


def _student(probability: float, degrees: int) -> float:
    """Student's quantile; the first two terms of its expansion, right to a per cent from 50 degrees on."""
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
