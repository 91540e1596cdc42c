"""Length configurations and their algebra (paper: sections 2.2, 3.1 and 3.2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

if TYPE_CHECKING:
    import numpy as np

Retention = Literal["relative", "absolute"]
MIN_LENGTH = 2
"""Fewest word vectors that an input keeps in any layer (all of them, if it has fewer)."""


class Rng(Protocol):
    """The part of :class:`random.Random` that the algebra draws from."""

    def random(self) -> float:
        """A float in [0, 1)."""

    def randint(self, a: int, b: int) -> int:
        """An integer in [a, b], both ends included."""


@dataclass(frozen=True, slots=True)
class LengthConfig:
    """How many word vectors each layer keeps (section 2.2).

    Args:
        lengths: ``(l_1, ..., l_L)``, non-increasing, each in ``1..max_length``.
        max_length: Length ``l_0`` of the longest input, which the lengths refer to.
        retention: What an input of ``n < max_length`` tokens keeps. ``"relative"`` scales every
            length by ``n / max_length``; ``"absolute"`` (the paper) cuts it at ``n``.

    Raises:
        ValueError: Names the layer and the rule that it breaks.
        TypeError: A length is not an integer.
    """

    lengths: tuple[int, ...]
    max_length: int
    retention: Retention = "relative"

    def __post_init__(self) -> None:
        object.__setattr__(self, "lengths", tuple(self.lengths))
        object.__setattr__(self, "max_length", _integer(self.max_length, "max_length"))
        if self.max_length < 1:
            raise ValueError(f"max_length must be at least 1, not {self.max_length}")
        if self.retention not in get_args(Retention):
            raise ValueError(f"retention must be one of {get_args(Retention)}, not {self.retention!r}")
        if not self.lengths:
            raise ValueError("a length configuration needs at least one layer")
        before = self.max_length
        checked = []
        for layer, length in enumerate(self.lengths, start=1):
            length = _integer(length, f"length of layer {layer}")
            if length < 1:
                raise ValueError(f"layer {layer} keeps {length} vectors; at least 1 must stay")
            if length > self.max_length:
                raise ValueError(f"layer {layer} keeps {length} vectors, more than max_length={self.max_length}")
            if length > before:
                raise ValueError(f"layer {layer} keeps {length} vectors, more than the {before} of layer {layer - 1}")
            checked.append(length)
            before = length
        object.__setattr__(self, "lengths", tuple(checked))

    # ------------------------------------------------------------------ named configurations

    @classmethod
    def full(cls, num_layers: int, max_length: int, retention: Retention = "relative") -> LengthConfig:
        """The configuration that drops nothing."""
        return cls((max_length,) * _layers(num_layers), max_length, retention)

    @classmethod
    def constant_ratio(
        cls, ratio: float, num_layers: int, max_length: int, retention: Retention = "relative"
    ) -> LengthConfig:
        """Every layer drops the same share: ``l_{j+1} = ceil((1 - ratio) * l_j)`` (section 3.2)."""
        lengths, length = [], max_length
        for _ in range(_layers(num_layers)):
            length = shortest(length, ratio)
            lengths.append(length)
        return cls(tuple(lengths), max_length, retention)

    @classmethod
    def smallest(cls, p: float, num_layers: int, max_length: int, retention: Retention = "relative") -> LengthConfig:
        """The smallest sub-model that LengthDrop with probability ``p`` trains (section 3.1)."""
        return cls.constant_ratio(p, num_layers, max_length, retention)

    @classmethod
    def length_drop(
        cls, p: float, num_layers: int, max_length: int, rng: Rng, retention: Retention = "relative"
    ) -> LengthConfig:
        """A random sub-model: ``l_{j+1} ~ U(ceil((1 - p) * l_j), l_j)`` (LengthDrop, section 3.1)."""
        lengths, length = [], max_length
        for _ in range(_layers(num_layers)):
            length = rng.randint(shortest(length, p), length)
            lengths.append(length)
        return cls(tuple(lengths), max_length, retention)

    # ------------------------------------------------------------------ search moves (section 3.2)

    def mutate(self, prob: float, rng: Rng) -> LengthConfig:
        """Sweep ``i = 1..L``; with probability ``prob``, ``l'_i ~ U(l_{i+1}, l'_{i-1})``.

        ``l'_0`` is ``max_length`` and ``l_{L+1}`` is 1. Layers that are not drawn keep ``l_i``.
        """
        if not 0 <= prob <= 1:
            raise ValueError(f"the mutation probability must lie in [0, 1], not {prob}")
        lengths, before = [], self.max_length
        for length, after in zip(self.lengths, (*self.lengths[1:], 1), strict=True):
            if rng.random() < prob:
                length = rng.randint(after, before)
            lengths.append(length)
            before = length
        return LengthConfig(tuple(lengths), self.max_length, self.retention)

    def crossover(self, other: LengthConfig) -> LengthConfig:
        """The layer-wise mean of two parents, rounded down."""
        if (self.num_layers, self.max_length, self.retention) != (other.num_layers, other.max_length, other.retention):
            raise ValueError(f"cannot cross {self!r} with {other!r}: layers, max_length or retention differ")
        lengths = tuple((a + b) // 2 for a, b in zip(self.lengths, other.lengths, strict=True))
        return LengthConfig(lengths, self.max_length, self.retention)

    # ------------------------------------------------------------------ use

    @property
    def num_layers(self) -> int:
        """``L``, the number of layers."""
        return len(self.lengths)

    @property
    def is_full(self) -> bool:
        """Whether nothing is dropped from any input."""
        return self.lengths[-1] == self.max_length

    def at_length(self, n: int, min_length: int = MIN_LENGTH) -> tuple[int, ...]:
        """How many of ``n`` real tokens each layer keeps.

        Args:
            n: Number of real tokens of one input, at least 1.
            min_length: No layer keeps fewer than this, or than ``n`` if that is less.

        Returns:
            ``L`` non-increasing ints, each at most ``n``.
        """
        if n < 1:
            raise ValueError(f"an input has at least 1 token, not {n}")
        if self.retention == "relative":
            kept = [-(-length * n // self.max_length) for length in self.lengths]
        else:
            kept = list(self.lengths)
        return tuple(min(n, max(k, min_length)) for k in kept)

    def at_lengths(self, ns: np.ndarray) -> np.ndarray:
        """:meth:`at_length` of many inputs at once: (inputs,) integers, each at least 1, to (``L``, inputs)."""
        import numpy as np  # here, as reading and writing a configuration needs none

        lengths = np.array(self.lengths)[:, None]
        kept = -(-lengths * ns // self.max_length) if self.retention == "relative" else lengths
        return np.minimum(np.maximum(kept, MIN_LENGTH), ns)

    def __iter__(self) -> Iterator[int]:
        return iter(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    # ------------------------------------------------------------------ text and parameters

    def __str__(self) -> str:
        return "-".join(map(str, self.lengths))

    @classmethod
    def parse(cls, text: str, max_length: int | None = None, retention: Retention = "relative") -> LengthConfig:
        """The inverse of ``str(config)``: ``"128-110-96"``.

        Args:
            text: Lengths joined by hyphens.
            max_length: ``l_0``; by default the first length.
            retention: As in the constructor.
        """
        try:
            lengths = tuple(int(part) for part in text.strip().split("-"))
        except ValueError:
            raise ValueError(f"{text!r} is not a length configuration; write it as 128-110-96") from None
        return cls(lengths, lengths[0] if max_length is None else max_length, retention)

    def parameters(self) -> dict[str, int]:
        """The configuration as parameters of an Optuna trial: ``{"length_01": l_1, ...}``."""
        return dict(zip(parameter_names(self.num_layers), self.lengths, strict=True))

    @classmethod
    def from_parameters(
        cls, parameters: Mapping[str, Any], num_layers: int, max_length: int, retention: Retention = "relative"
    ) -> LengthConfig:
        """The inverse of :meth:`parameters`; sorted in falling order, so that any sampler's draw is valid.

        Sorting maps independent uniform draws to a uniform draw over the multisets of lengths, and leaves a
        configuration that is monotone already as it is.
        """
        names = parameter_names(num_layers)
        missing = [name for name in names if name not in parameters]
        if missing:
            raise ValueError(f"the trial lacks the parameters {', '.join(missing)}")
        lengths: Sequence[int] = sorted((int(parameters[name]) for name in names), reverse=True)
        return cls(tuple(lengths), max_length, retention)


def parameter_names(num_layers: int) -> tuple[str, ...]:
    """``("length_01", ..., "length_L")``, zero-padded because Optuna sorts search spaces by name."""
    width = max(2, len(str(num_layers)))
    return tuple(f"length_{layer:0{width}d}" for layer in range(1, _layers(num_layers) + 1))


def shortest(length: int, p: float) -> int:
    """``ceil((1 - p) * length)``, exact for decimal ``p`` and at least 1."""
    if not 0 <= p < 1:
        raise ValueError(f"a drop ratio must lie in [0, 1), not {p}")
    return max(1, math.ceil((1 - Fraction(str(p))) * length))


def _layers(num_layers: int) -> int:
    if num_layers < 1:
        raise ValueError(f"a model has at least 1 layer, not {num_layers}")
    return num_layers


def _integer(value: Any, what: str) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{what} must be an integer, not {value!r}")
    return int(value.__index__())
