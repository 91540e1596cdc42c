"""Kernels of ours: significance without all probabilities in memory, and the choice of rows without a sort.

``cuda_kernels.py`` has them for GPUs (in Triton), ``cpu_kernels.cpp`` for CPUs, with the context of the rows that stay
in the same pass, or of all rows. Both are tested against torch's operators, which do the work where there are none. In
graphs they are operators of torch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from lat_optuna.model import cpu_kernels
from lat_optuna.model.rows import Chosen, empty_choice, is_exporting

try:
    from lat_optuna.model import cuda_kernels
except ImportError:  # no Triton
    cuda_kernels = None  # type: ignore[assignment]

BY_DEVICE: dict[str, ModuleType | None] = {"cpu": cpu_kernels, "cuda": cuda_kernels}


def fit(query: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether :func:`received` works and pays for these projections."""
    return all(other.dtype == query.dtype for other in others) and _run_on(query) and _of(query).fits(query)


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


def _directly(tensor: torch.Tensor) -> bool:
    """Whether Triton is called and not an operator, whose dispatch would cost as many microseconds as the launch."""
    return _of(tensor) is cuda_kernels and not torch.compiler.is_compiling()


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
    kernel = cuda_kernels.received if _directly(query) else received_op
    return kernel(query, key, allowed, real)


def attend(*given: torch.Tensor) -> bool:
    """Whether :data:`attend_and_choose` and :data:`context` work for projections, or for those of hidden states.

    That is on a CPU, without gradients.
    """
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    return BY_DEVICE.get(given[0].device.type) is cpu_kernels and not learning and fit(*given)


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
    kernel = cuda_kernels.choose if _directly(votes) else choose_op
    return kernel(votes, real, counts, positions, width, protected, tokens)


def _define(name: str, schema: str) -> Any:
    """One of torch's operators: a node of a graph. ``cpu_kernels.cpp`` has it for CPUs."""
    torch.library.define(f"lat_optuna::{name}", schema)
    if hasattr(cuda_kernels, name):
        torch.library.impl(f"lat_optuna::{name}", "cuda")(getattr(cuda_kernels, name))
    return getattr(torch.ops.lat_optuna, name).default


received_op = _define("received", "(Tensor query, Tensor key, Tensor? allowed, Tensor? real) -> Tensor")
""":func:`received`."""

choose_op = _define(
    "choose",
    "(Tensor votes, Tensor? real, Tensor? counts, Tensor? positions, SymInt width, SymInt protected, SymInt tokens)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
""":func:`choose`."""

attend_and_choose = _define(
    "attend_and_choose",
    "(Tensor query, Tensor key, Tensor value, Tensor? allowed, Tensor? real, Tensor? counts, Tensor? positions,"
    " SymInt width, SymInt protected, SymInt tokens) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
""":func:`received`, :func:`choose` and the context of the rows that stay, at once; on a CPU. No gradient.

``value`` is (batch, heads, rows, head size), the other arguments are those of the two. Returns the context, (batch,
width, heads * head size), zero of filler and padding; and what :func:`choose` returns.
"""


context = _define("context", "(Tensor query, Tensor key, Tensor value, Tensor? allowed) -> Tensor")
"""Attention of some rows to all; on a CPU. No gradient.

``query`` is (batch, heads, queries, head size), ``key`` and ``value`` are (batch, heads, rows, head size), ``allowed``
is broadcastable to (batch, heads, queries, rows). Returns (batch, queries, heads * head size).
"""


@torch.library.register_fake("lat_optuna::received")
def _(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None) -> torch.Tensor:
    return query.new_empty((query.size(0), query.size(2)), dtype=torch.float32)


@torch.library.register_fake("lat_optuna::choose")
def _(votes: torch.Tensor, real: Any, counts: Any, positions: Any, width: int, protected: int, tokens: int) -> Chosen:
    return empty_choice(votes, width)


@torch.library.register_fake("lat_optuna::context")
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    return value.new_empty((query.size(0), query.size(2), query.size(1) * value.size(3)))


@torch.library.register_fake("lat_optuna::attend_and_choose")
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
) -> tuple[torch.Tensor, ...]:
    context = value.new_empty((query.size(0), width, query.size(1) * value.size(3)))
    return context, *empty_choice(query, width)
