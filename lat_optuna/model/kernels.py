"""Kernels of ours: significance without all probabilities in memory, and the choice of rows without a sort.

``cuda_kernels.py`` has them for GPUs (in Triton), ``cpu_kernels.cpp`` for CPUs, with the context of the rows that stay
in the same pass. Both are tested against torch's operators, which do the work where there are none. In graphs they are
operators of torch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lat_optuna.model import cpu_kernels
from lat_optuna.model.rows import Attended, Chosen, empty_choice, is_exporting

try:
    from lat_optuna.model import cuda_kernels
except ImportError:  # no Triton
    cuda_kernels = None  # type: ignore[assignment]

BY_DEVICE: dict[str, ModuleType | None] = {"cpu": cpu_kernels, "cuda": cuda_kernels}


def fit(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether :func:`received` works and pays for these projections."""
    return query.dtype == key.dtype == value.dtype and _run_on(query) and _of(query).fits(query)


def take(votes: torch.Tensor) -> bool:
    """Whether :func:`choose` works for these votes."""
    return _run_on(votes) and _of(votes).takes(votes)


def _run_on(tensor: torch.Tensor) -> bool:
    """Whether there are kernels where a tensor lies. Graphs for export have none."""
    if BY_DEVICE.get(tensor.device.type) is None or is_exporting() or not _of(tensor).available():
        return False
    return torch.compiler.is_compiling() or not (torch._C._get_tracing_state() or is_watched(tensor))


def is_watched(tensor: torch.Tensor) -> bool:
    """Whether somebody sees torch's operators on a CPU (a counter of FLOPs, say), who would miss what runs beside them.

    Or the tensor has no numbers of its own in memory.
    """
    return tensor.device.type == "cpu" and (
        type(tensor) is not torch.Tensor or torch._C._len_torch_dispatch_stack() > 0
    )


def _of(tensor: torch.Tensor) -> Any:
    return BY_DEVICE[tensor.device.type]


def received(
    query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor:
    """Attention received, summed over heads and real queries, without the probabilities in memory. No gradient.

    Args:
        query: (batch, heads, rows, head size), with any strides.
        key: The same of the keys.
        allowed: bool, broadcastable to (batch, heads, rows, rows); ``None`` allows everything.
        real: (batch, rows) bool; ``None`` where nothing is padding. Padding does not vote.

    Returns:
        (batch, rows) in fp32. The same input gives the same numbers.
    """
    return _of(query).received(query, key, allowed, real)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether :func:`attend_and_choose` works for these projections: on a CPU, without gradients."""
    learning = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    return query.device.type == "cpu" and not learning and fit(query, key, value)


def attend_and_choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    real: torch.Tensor | None,
    counts: torch.Tensor | None,
    positions: torch.Tensor | None,
    width: int,
    protected: int,
    tokens: int,
) -> Attended:
    """:func:`received`, :func:`choose` and the context of the rows that stay, at once. No gradient.

    Args:
        query: (batch, heads, rows, head size), with any strides.
        key: The same of the keys.
        value: The same of the values.
        allowed: bool, broadcastable to (batch, heads, rows, rows); ``None`` allows everything.
        real: (batch, rows) bool; ``None`` where nothing is padding. Padding does not vote.
        counts: See :func:`choose`, as for what follows.
        positions: (batch, rows).
        width: Rows to keep, of the example that keeps most.
        protected: How many of the first real rows always stay.
        tokens: The position of filler.

    Returns:
        The context, (batch, width, heads * head size), zero of filler and padding; and what :func:`choose` returns.
    """
    return _of(query).attend_and_choose(query, key, value, allowed, real, counts, positions, width, protected, tokens)


def choose(
    votes: torch.Tensor,
    real: torch.Tensor | None,
    counts: torch.Tensor | None,
    positions: torch.Tensor | None,
    width: int,
    protected: int,
    tokens: int,
) -> Chosen:
    """What ``significance.choose_rows`` and ``as_choice`` give, at once. No gradient, no sort.

    Args:
        votes: (batch, rows) in fp32.
        real: (batch, rows) bool; ``None`` where nothing is padding.
        counts: (batch,) rows to keep; ``None`` where every example keeps ``width``.
        positions: (batch, rows) positions of the rows in the input; ``None`` where the rows are the input's.
        width: Rows to keep, of the example that keeps most.
        protected: How many of the first real rows always stay.
        tokens: The position of filler.

    Returns:
        ``rows``, ``positions``, ``real`` and ``flat`` of a ``Choice``; ``real`` also where nothing is filler.
    """
    return _of(votes).choose(votes, real, counts, positions, width, protected, tokens)


received_op = torch.library.custom_op("lat_optuna::received", received, mutates_args=())
""":func:`received` as one node of a graph."""


@received_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None) -> torch.Tensor:
    return query.new_empty((query.size(0), query.size(2)), dtype=torch.float32)


choose_op = torch.library.custom_op("lat_optuna::choose", choose, mutates_args=())
""":func:`choose` as one node of a graph."""


@choose_op.register_fake
def _(votes: torch.Tensor, real: Any, counts: Any, positions: Any, width: int, protected: int, tokens: int) -> Chosen:
    return empty_choice(votes, width)


attend_and_choose_op = torch.library.custom_op("lat_optuna::attend_and_choose", attend_and_choose, mutates_args=())
""":func:`attend_and_choose` as one node of a graph."""


@attend_and_choose_op.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: Any,
    real: Any,
    counts: Any,
    positions: Any,
    width: int,
    protected: int,
    tokens: int,
) -> Attended:
    context = value.new_empty((query.size(0), width, query.size(1) * value.size(3)))
    return context, *empty_choice(query, width)
