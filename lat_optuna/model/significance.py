"""Attention that also yields significance: the attention that a word vector receives (paper: section 2.2).

A layer that drops asks for three things: probabilities, the rows that they tell to keep, and the context of these
rows. :func:`attend_and_choose` gives the last two. Where a kernel of ours runs (``kernels.py``), it gives votes without
all probabilities in memory, and torch's attention then gives the context; on a CPU without gradients the kernel gives
both at once. On a CPU without a compiler, votes come from blocks of probabilities. Everywhere else (export, fp32 on
GPUs) probabilities are written down once, for both. All are tested against :func:`reference_rows`, the definition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lat_optuna.model import kernels
from lat_optuna.model.rows import Choice, is_exporting, rows_at, take_rows

BLOCK = 2**18
"""Probabilities of a block on a CPU without kernels: 1 MB. Larger ones leave the cache, and fresh pages are faults."""


@dataclass(frozen=True)
class Keep:
    """Which rows of a batch may stay, and how many.

    Attributes:
        width: Rows to keep; of the example that keeps most.
        counts: (batch,) rows to keep; ``None`` where every example keeps ``width``.
        real: (batch, rows) bool; padding neither votes, nor stays unless nothing else is left. ``None`` where nothing
            is padding.
        protected: How many of the first real rows always stay ([CLS]; DeiT's distillation token).
        packed: Whether the real rows are known to come first.
        positions: (batch, rows) positions of the rows in the input; ``None`` where the rows are the input's.
        tokens: Rows of the input, the position of filler.
    """

    width: int
    counts: torch.Tensor | None = None
    real: torch.Tensor | None = None
    protected: int = 1
    packed: bool = False
    positions: torch.Tensor | None = None
    tokens: int = 0


def attend_and_choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    keep: Keep,
    known: Choice | None = None,
    dropout: float = 0.0,
) -> tuple[Choice, torch.Tensor]:
    """Every row votes, and the rows that stay attend.

    A row that is allowed nothing attends to nothing in one form and to everything in another; only padding ever is, and
    nobody reads it.

    Args:
        query: (batch, heads, rows, head size).
        key: (batch, heads, rows, head size).
        value: (batch, heads, rows, head size).
        allowed: bool, broadcastable to (batch, heads, rows, rows); ``None`` allows everything.
        keep: Which rows may stay.
        known: The choice of a run that is replayed now; ``None`` chooses.
        dropout: Dropout on the probabilities.

    Returns:
        The choice, and its rows' context (batch, kept, heads * head size).
    """
    if known is None and not dropout and kernels.attend(query, key, value):
        context, rows, positions, real, flat = kernels.attend_and_choose(
            query, key, value, allowed, keep.real, keep.counts, keep.positions, keep.width, keep.protected, keep.tokens
        )
        return Choice(rows, positions, None if keep.counts is None else real, flat), context
    received = _votes_alone(query, key, value)
    if received is None:
        probabilities = attention_probabilities(query, key, allowed)
        if known is None:
            # Detached: no gradient flows through the choice, and a replay, which does not choose again, must save the
            # same tensors for its backward pass as the first run did.
            known = choose(significance(probabilities.detach(), keep.real), keep)
        return known, context_of_rows(probabilities, value, known.rows, dropout)
    if known is None:
        known = choose(received(query.detach(), key.detach(), allowed, keep.real), keep)
    # Heads last, queries are rows of the projection as it lies in memory.
    kept = known.of(query.transpose(1, 2)).transpose(1, 2)
    return known, attend_from(kept, key, value, allowed, known, dropout)


Votes = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


def _votes_alone(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Votes | None:
    """What gives votes and keeps no probabilities, where that works and pays: see :func:`kernels.received`."""
    if kernels.fit(query, key, value):
        return kernels.received
    if (
        query.device.type != "cpu"
        or torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or kernels.is_watched(query)
    ):
        return None
    probabilities = query.size(0) * query.size(1) * query.size(2) * key.size(2)
    return received_in_blocks if probabilities > BLOCK else None


def received_in_blocks(
    query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor:
    """:func:`kernels.received` by torch's operators: in blocks of heads whose probabilities stay in a CPU's cache."""
    batch, heads, queries, size = query.shape
    keys = key.size(2)
    # Scores in fp32 of low precision's queries and keys too: softmax and sums are fast in fp32 only.
    scaled = (query.float() * size**-0.5).reshape(-1, queries, size)
    columns = key.float().reshape(-1, keys, size).transpose(1, 2)
    refused = None if allowed is None else ~allowed.expand(batch, heads, -1, -1).flatten(0, 1)
    voting = query.new_ones((1, 1, 1), dtype=torch.float32) if real is None else real[:, None, None].float()
    voting = voting.expand(batch, heads, 1, queries).reshape(-1, 1, queries)
    step = max(1, BLOCK // (queries * keys))
    block = torch.empty((min(step, batch * heads), queries, keys), dtype=torch.float32)
    received = torch.empty((batch * heads, 1, keys), dtype=torch.float32)
    for start in range(0, batch * heads, step):
        part = slice(start, start + step)
        probabilities = block[: min(step, batch * heads - start)]
        torch.bmm(scaled[part], columns[part], out=probabilities)
        if refused is not None:
            probabilities.masked_fill_(refused[part], torch.finfo(torch.float32).min)
        torch.softmax(probabilities, -1, out=probabilities)
        torch.bmm(voting[part], probabilities, out=received[part])
    return received.view(batch, heads, keys).sum(1)


def attend_from(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    choice: Choice | None = None,
    dropout: float = 0.0,
    few: bool = False,
) -> torch.Tensor:
    """Attention from some rows to all: by a kernel of ours on a CPU without gradients, else torch's.

    Args:
        query: (batch, heads, kept, head size) of these rows.
        key: (batch, heads, rows, head size).
        value: (batch, heads, rows, head size).
        allowed: bool, broadcastable to (batch, heads, rows, rows); ``None`` allows everything.
        choice: These rows; ``None``: all.
        dropout: Dropout on the probabilities.
        few: Whether they are only one or two, with which torch's attention in fp32 is the faster one.

    Returns:
        (batch, kept, heads * head size).
    """
    if choice is not None and allowed is not None and allowed.size(2) > 1:  # windows: every query has its own keys
        by_row = allowed.expand(query.size(0), -1, -1, -1).transpose(1, 2)
        allowed = choice.of(by_row).transpose(1, 2)
    if not dropout and not (few and query.dtype == torch.float32) and kernels.attend(query, key, value):
        return kernels.context(query, key, value, allowed)
    attention = torch.nn.functional.scaled_dot_product_attention
    if torch.is_grad_enabled() and value.device.type == "cpu" and value.dtype in (torch.bfloat16, torch.float16):
        # Its backward pass on CPUs is slow in low precision (benchmarks/results/kernel.md).
        with torch.autocast("cpu", enabled=False):
            context = attention(query.float(), key.float(), value.float(), allowed, dropout).to(value.dtype)
    else:
        context = attention(query, key, value, allowed, dropout)
    return context.transpose(1, 2).flatten(2)


def first_row_significance(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Attention received from the rows that always stay alone ([CLS]), summed over heads: known before attention.

    Args:
        query: (batch, heads, protected, head size) of the protected rows.
        key: (batch, heads, rows, head size).
        allowed: bool, broadcastable to (batch, heads, protected, rows); ``None`` allows everything.

    Returns:
        (batch, rows) in fp32.
    """
    return attention_probabilities(query, key, allowed).sum((1, 2))


def attention_probabilities(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None) -> torch.Tensor:
    """Softmax of the scaled scores in fp32, whatever the dtype of the projections.

    Args:
        query: (batch, heads, queries, head size).
        key: (batch, heads, keys, head size).
        allowed: bool, broadcastable to (batch, heads, queries, keys); ``None`` allows everything.

    Returns:
        (batch, heads, queries, keys) in fp32, before dropout.
    """
    # Scaling the query touches head size / keys as many numbers as scaling the scores would.
    scores = (query * query.size(-1) ** -0.5) @ key.transpose(-1, -2)
    if allowed is not None:
        # The lowest finite number rather than -inf: a row that allows nothing stays finite, as in transformers.
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, dtype=torch.float32)


def significance(probabilities: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
    """Attention received, summed over heads and real queries.

    Args:
        probabilities: (batch, heads, rows, rows) in fp32, before dropout.
        real: (batch, rows) bool; ``None`` where nothing is padding. Padding does not vote.

    Returns:
        (batch, rows) in fp32.
    """
    # Heads first: the large tensor is read once, and the mask meets one that is smaller by the number of heads.
    received = probabilities.sum(1)
    if real is not None:
        received = received.masked_fill(~real[:, :, None], 0.0)
    return received.sum(1)


def choose(votes: torch.Tensor, keep: Keep) -> Choice:
    """:func:`choose_rows` and :func:`as_choice`, by a kernel where there is one."""
    if not kernels.take(votes):
        return as_choice(choose_rows(votes, keep), keep, votes.size(1))
    # In a graph too: inductor fuses what is around a sort but not the sort, which is several launches.
    rows, positions, real, flat = kernels.choose(
        votes.detach(), keep.real, keep.counts, keep.positions, keep.width, keep.protected, keep.tokens
    )
    return Choice(rows, positions, None if keep.counts is None else real, flat)


def as_choice(rows: torch.Tensor, keep: Keep, entered: int) -> Choice:
    """The rows of :func:`choose_rows`, of ``entered`` ones, with their positions."""
    valid = rows.clamp(max=entered - 1)
    positions = valid if keep.positions is None else keep.positions.gather(1, valid)
    if keep.counts is None:
        return Choice(valid, positions)
    real = rows < entered
    return Choice(valid, torch.where(real, positions, keep.tokens), real)


def choose_rows(votes: torch.Tensor, keep: Keep) -> torch.Tensor:
    """The most significant rows of every example in their original order. No gradient flows through the choice.

    Args:
        votes: (batch, rows) significance. Of equal ones the earlier row stays.
        keep: Which rows may stay.

    Returns:
        (batch, width) rising indices. An example that keeps fewer ends with filler, which equals the number of rows.
    """
    rows = votes.size(1)
    votes = votes.detach()
    if keep.real is not None:
        votes = votes.masked_fill(~keep.real, -torch.inf)
    if keep.real is None or keep.packed:
        first = torch.arange(rows, device=votes.device) < keep.protected
    else:
        first = keep.real & (keep.real.cumsum(-1) <= keep.protected)
    votes = votes.masked_fill(first, torch.inf)
    places = torch.arange(keep.width, device=votes.device)
    # Not a slice: whether it is contiguous, a graph would take for a rule about lengths.
    order = votes.sort(dim=-1, descending=True, stable=True).indices.index_select(1, places)
    if keep.counts is not None:
        order = order.masked_fill(places >= keep.counts[:, None], rows)
    return order.sort(-1).values


def context_of_rows(
    probabilities: torch.Tensor, value: torch.Tensor, rows: torch.Tensor, dropout: float = 0.0
) -> torch.Tensor:
    """What the kept rows attend to; the others are never computed.

    Args:
        probabilities: (batch, heads, queries, keys) in fp32.
        value: (batch, heads, keys, head size).
        rows: (batch, kept) query rows.
        dropout: Dropout on the probabilities.

    Returns:
        (batch, kept, heads * head size) in the value's dtype.
    """
    batch, heads, queries, keys = probabilities.shape
    per_head = rows[:, None].expand(-1, heads, -1)
    if is_exporting():
        kept = rows_at(probabilities, per_head)
    else:
        flat = probabilities.view(batch * heads, queries, keys)
        kept = take_rows(flat, per_head.reshape(batch * heads, -1)).view(batch, heads, -1, keys)
    kept = torch.nn.functional.dropout(kept.to(value.dtype), dropout, training=dropout > 0)
    context = kept @ value
    return context.transpose(1, 2).flatten(2)


def reference_rows(probabilities: torch.Tensor, count: int, protected: int = 1) -> list[int]:
    """Which rows of one unpadded example stay: the definition, written down plainly. The fast form must agree.

    Args:
        probabilities: (heads, rows, rows) of one example without padding, before dropout.
        count: Rows to keep.
        protected: How many of the first rows always stay.

    Returns:
        ``count`` rising indices.
    """
    received = reference_significance(probabilities)
    ranked = sorted(range(len(received)), key=lambda row: (row >= protected, -received[row], row))
    return sorted(ranked[:count])


def reference_significance(probabilities: torch.Tensor) -> Sequence[float]:
    """Attention received by every row of one unpadded example, by the definition.

    Args:
        probabilities: (heads, rows, rows), before dropout.

    Returns:
        One number a row.
    """
    heads, rows, _ = probabilities.shape
    received = [0.0] * rows
    numbers = probabilities.float().tolist()
    for head in range(heads):
        for query in range(rows):
            for key in range(rows):
                received[key] += numbers[head][query][key]
    return received
