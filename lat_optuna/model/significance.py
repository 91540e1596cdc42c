"""Attention that also yields significance: the attention that a word vector receives (paper: section 2.2).

A layer that drops asks for three things: probabilities, the rows that they tell to keep, and the context of these
rows. :func:`attend_and_choose` gives the last two. It has a form that takes the batch whole (for compilers, export,
and fp32 on GPUs), one that takes it in blocks whose probabilities stay in a CPU's cache and are not kept for the
backward pass, and one for half precision on CUDA that has no probabilities in memory. All are tested against
:func:`reference_rows`, the definition.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lat_optuna.model.rows import Choice, is_exporting, rows_at, take_rows

try:
    from lat_optuna.model import kernels
except ImportError:  # no Triton
    kernels = None  # type: ignore[assignment]

BLOCK = 2**18
"""Probabilities of a block on a CPU: 1 MB. Larger ones leave the cache, and every fresh page of memory is a fault: at
16 x 128 tokens and 12 heads the whole form took 2.6 times as long (2 Intel cores with AMX)."""


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

    def of(self, examples: slice) -> Keep:
        """The same for :func:`choose_rows` of some of the examples."""
        counts = None if self.counts is None else self.counts[examples]
        real = None if self.real is None else self.real[examples]
        return Keep(self.width, counts, real, self.protected, self.packed)


def attend_and_choose(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    keep: Keep,
    known: Choice | None = None,
    dropout: float = 0.0,
) -> tuple[Choice, torch.Tensor]:
    """Every row votes, and the rows that stay attend. Probabilities are computed once, or once more for a gradient.

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
    if dropout == 0 and _in_blocks(query, key):
        form = _Blocks.apply if torch.is_grad_enabled() else _by_blocks
        rows, context = form(query, key, value, allowed, keep, None if known is None else known.rows)
        return as_choice(rows, keep, query.size(2)) if known is None else known, context
    if _by_kernel(query, key, value):
        return _fused(query, key, value, allowed, keep, known, dropout)
    probabilities = attention_probabilities(query, key, allowed)
    if known is None:
        # Detached: no gradient flows through the choice, and a replay, which does not choose again, must save the
        # same tensors for its backward pass as the first run did.
        known = choose(significance(probabilities.detach(), keep.real), keep)
    return known, context_of_rows(probabilities, value, known.rows, dropout)


def _in_blocks(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the form in blocks works and pays.

    It writes in place, in a number of steps that depends on the batch. With gradients it pays from where an example
    fills a block.
    """
    if query.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._get_tracing_state():
        return False
    return not torch.is_grad_enabled() or query.size(1) * query.size(2) * key.size(2) >= BLOCK


def _has_kernels(tensor: torch.Tensor) -> bool:
    """Whether kernels of ours run where a tensor lies. Graphs for export have none."""
    if kernels is None or tensor.device.type != "cuda" or is_exporting():
        return False
    return torch.compiler.is_compiling() or not torch._C._get_tracing_state()


def _by_kernel(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the form for CUDA works and pays: in half precision."""
    return _has_kernels(query) and query.dtype == key.dtype == value.dtype and kernels.fits(query)


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    keep: Keep,
    known: Choice | None,
    dropout: float,
) -> tuple[Choice, torch.Tensor]:
    """Votes by a kernel that keeps nothing, then torch's attention for the rows that stay. fp16 and bf16.

    A row that is allowed nothing gets zeros here and a mean in the other forms; only padding ever is, and nobody
    reads it.
    """
    if known is None:
        # A graph needs the operator; outside of one, its dispatch would cost as many microseconds as the launch.
        received = kernels.received_op if torch.compiler.is_compiling() else kernels.received
        known = choose(received(query.detach(), key.detach(), allowed, keep.real), keep)
    # Heads last, queries are rows of the projection as it lies in memory.
    kept = known.of(query.transpose(1, 2)).transpose(1, 2)
    return known, attend_from(kept, key, value, allowed, known, dropout)


def attend_from(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    choice: Choice,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Torch's attention from some rows to all.

    Args:
        query: (batch, heads, kept, head size) of these rows.
        key: (batch, heads, rows, head size).
        value: (batch, heads, rows, head size).
        allowed: bool, broadcastable to (batch, heads, rows, rows); ``None`` allows everything.
        choice: These rows.
        dropout: Dropout on the probabilities.

    Returns:
        (batch, kept, heads * head size).
    """
    if allowed is not None and allowed.size(2) > 1:  # windows: every query has keys of its own
        by_row = allowed.expand(query.size(0), -1, -1, -1).transpose(1, 2)
        allowed = choice.of(by_row).transpose(1, 2)
    context = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout)
    return context.transpose(1, 2).flatten(2)


class _Blocks(torch.autograd.Function):
    """:func:`_by_blocks` with gradients. No probabilities are kept; those of kept rows are made again."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        allowed: torch.Tensor | None,
        keep: Keep,
        rows: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows, context = _by_blocks(query, key, value, allowed, keep, rows)
        ctx.save_for_backward(query, key, value, rows)
        ctx.allowed, ctx.keep = allowed, keep
        ctx.mark_non_differentiable(rows)
        return rows, context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, rows = ctx.saved_tensors
        batch, heads, queries, size = query.shape
        keys, width = key.size(2), rows.size(1)
        scale = size**-0.5
        refused = None if ctx.allowed is None else ~ctx.allowed.expand(batch, -1, -1, -1)
        if ctx.keep.counts is not None:  # filler goes to a row of its own, which is cut off in the end
            rows = rows.masked_fill(torch.arange(width) >= ctx.keep.counts[:, None], queries)
        readable = rows.clamp(max=queries - 1)
        gradient = gradient.view(batch, width, heads, size).transpose(1, 2)
        of_query = torch.zeros((batch, heads, queries + 1, size), dtype=query.dtype)
        of_key, of_value = torch.empty_like(key), torch.empty_like(value)
        together = max(1, BLOCK // (width * keys))  # heads of a block
        examples, several = max(1, together // heads), min(heads, together)
        for start in range(0, batch, examples):
            for first in range(0, heads, several):
                part = slice(start, start + examples), slice(first, first + several)
                q, k, v, out = query[part], key[part], value[part], gradient[part]
                index = readable[part[0], None, :, None]
                kept = q.gather(2, index.expand(-1, q.size(1), -1, size))
                scores = (kept.float() * scale) @ k.float().transpose(-1, -2)
                if refused is not None:
                    away = refused[part[0]] if refused.size(1) == 1 else refused[part]
                    if away.size(2) > 1:
                        away = away.gather(2, index.expand(-1, away.size(1), -1, keys))
                    scores.masked_fill_(away, torch.finfo(torch.float32).min)
                probabilities = torch.softmax(scores, -1, out=scores)
                of_value[part] = probabilities.to(v.dtype).transpose(-1, -2) @ out
                of_scores = (out @ v.transpose(-1, -2)).float()
                of_scores = torch._softmax_backward_data(of_scores, probabilities, -1, torch.float32)
                low = of_scores.mul_(scale).to(k.dtype)
                of_key[part] = low.transpose(-1, -2) @ kept
                of_query[part].scatter_(2, rows[part[0], None, :, None].expand_as(kept), low @ k)
        return of_query[:, :, :-1], of_key, of_value, None, None, None


def _by_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None,
    keep: Keep,
    known: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, queries, size = query.shape
    keys = key.size(2)
    step = min(batch, max(1, BLOCK // (heads * queries * keys)))
    refused = None if allowed is None else ~allowed.expand(batch, -1, -1, -1)
    # Scores in fp32 of low precision's queries and keys too: softmax and sums are fast in fp32 only.
    scores = torch.empty((step * heads, queries, keys), dtype=torch.float32)
    chosen = []
    context = torch.empty((batch, keep.width, heads, size), dtype=value.dtype)
    for start in range(0, batch, step):
        part = slice(start, start + step)
        examples = min(step, batch - start)
        probabilities = scores[: examples * heads]
        scaled = (query[part].float() * size**-0.5).reshape(-1, queries, size)
        torch.bmm(scaled, key[part].float().reshape(-1, keys, size).transpose(1, 2), out=probabilities)
        by_head = probabilities.view(examples, heads, queries, keys)
        if refused is not None:
            by_head.masked_fill_(refused[part], torch.finfo(torch.float32).min)
        torch.softmax(probabilities, -1, out=probabilities)
        own = keep.of(part)
        rows = choose_rows(significance(by_head, own.real), own) if known is None else known[part]
        chosen.append(rows)
        per_head = rows.clamp(max=queries - 1)[:, None].expand(-1, heads, -1).reshape(examples * heads, -1)
        kept = take_rows(probabilities, per_head).to(value.dtype)
        attended = torch.bmm(kept, value[part].reshape(-1, keys, size))
        context[part] = attended.view(examples, heads, keep.width, size).transpose(1, 2)
    return chosen[0] if len(chosen) == 1 else torch.cat(chosen), context.flatten(2)


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
    """:func:`choose_rows` and :func:`as_choice`, on a GPU in one launch."""
    if not _has_kernels(votes) or not kernels.takes(votes):
        return as_choice(choose_rows(votes, keep), keep, votes.size(1))
    # In a graph too: inductor fuses what is around a sort but not the sort, which is several launches.
    kernel = kernels.choose_op if torch.compiler.is_compiling() else kernels.choose
    rows, positions, real, flat = kernel(
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
