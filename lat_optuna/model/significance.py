"""Attention that also yields significance: the attention that a word vector receives (paper: section 2.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lat_optuna.model.rows import take_rows


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


def choose_rows(
    votes: torch.Tensor,
    width: int,
    counts: torch.Tensor | None = None,
    real: torch.Tensor | None = None,
    protected: int = 1,
) -> torch.Tensor:
    """The most significant rows of every example in their original order. No gradient flows through the choice.

    Args:
        votes: (batch, rows) significance. Of equal ones the earlier row stays.
        width: Rows to keep; of the example that keeps most.
        counts: (batch,) rows to keep; ``None`` where every example keeps ``width``.
        real: (batch, rows) bool; padding stays only when nothing else is left. ``None`` where nothing is padding.
        protected: How many of the first real rows always stay ([CLS]; DeiT's distillation token).

    Returns:
        (batch, width) rising indices. An example that keeps fewer ends with filler, which equals the number of rows.
    """
    rows = votes.size(1)
    votes = votes.detach()
    if real is None:
        first = torch.arange(rows, device=votes.device) < protected
    else:
        votes = votes.masked_fill(~real, -torch.inf)
        first = real & (real.cumsum(-1) <= protected)
    votes = votes.masked_fill(first, torch.inf)
    order = votes.sort(dim=-1, descending=True, stable=True).indices[:, :width]
    if counts is not None:
        order = order.masked_fill(torch.arange(width, device=votes.device) >= counts[:, None], rows)
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
    per_head = rows[:, None].expand(-1, heads, -1).reshape(batch * heads, -1)
    kept = take_rows(probabilities.view(batch * heads, queries, keys), per_head).to(value.dtype)
    kept = torch.nn.functional.dropout(kept, dropout, training=dropout > 0)
    context = kept.view(batch, heads, -1, keys) @ value
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
