"""Significance on a GPU without probabilities in memory. Importing this module needs Triton, which torch's builds for
GPUs bring.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LARGEST_SIZE = 128
"""Head sizes up to here fit the blocks."""

DTYPES = (torch.float16, torch.bfloat16)
"""In fp32, exact products cost more in a kernel of ours than writing the probabilities does (H200, from 64 x 384 three
times as much)."""

ROWS, KEYS, WARPS, STAGES = 64, 64, 4, 3
"""Queries and keys of a block. Fixed, as batches change their shape all the time."""

# What changes from batch to batch must not compile the kernel anew, as a multiple of 16 or a 1 otherwise would.
VARYING = ("n", "blocks", "allowed_example", "allowed_head", "allowed_query", "real_example")


def fits(query: torch.Tensor) -> bool:
    """Whether the kernel takes such queries, and their GPU such a kernel (Triton supports those of 2020 and later)."""
    if query.dtype not in DTYPES or query.size(3) > LARGEST_SIZE:
        return False
    return query.device.type != "cuda" or _capable()


@torch.compiler.assume_constant_result
def _capable() -> bool:
    return torch.cuda.get_device_capability()[0] >= 8


def received(
    query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor:
    """Attention received, summed over heads and real queries, in one launch and a sum. No gradient, no atomics.

    Args:
        query: (batch, heads, rows, head size) in fp16 or bf16, with any strides.
        key: The same of the keys.
        allowed: bool, broadcastable to (batch, heads, rows, rows); ``None`` allows everything.
        real: (batch, rows) bool; ``None`` where nothing is padding. Padding does not vote.

    Returns:
        (batch, rows) in fp32.
    """
    batch, heads, n, size = query.shape
    blocks = -(-n // ROWS)
    sums = torch.empty((batch, heads * blocks, n), dtype=torch.float32, device=query.device)
    of_allowed = (0, 0, 0, 0) if allowed is None else allowed.expand(batch, heads, n, n).stride()
    with torch.cuda.device_of(query):
        _received[(batch * heads * blocks,)](
            query,
            key,
            allowed,
            real,
            sums,
            n,
            blocks,
            heads,
            size**-0.5 * 1.4426950408889634,  # log2(e): exp2 is what the hardware has
            *query.stride(),
            *key.stride(),
            *of_allowed,
            *((0, 0) if real is None else real.stride()),
            PER_QUERY=of_allowed[2] != 0,
            SIZE=size,
            WIDTH=max(16, triton.next_power_of_2(size)),
            ROWS=ROWS,
            KEYS=KEYS,
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return sums.sum(1)


@torch.library.custom_op("lat_optuna::received", mutates_args=())
def received_op(
    query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor:
    """:func:`received` as one node of a graph."""
    return received(query, key, allowed, real)


@received_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None) -> torch.Tensor:
    return query.new_empty((query.size(0), query.size(2)), dtype=torch.float32)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]  # Triton has types of its own
    queries,
    key,
    allowed,
    start,
    n,
    scale,
    key_row,
    key_size,
    allowed_key,
    lines,
    inside,
    PER_QUERY: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
):
    """(ROWS, KEYS) scaled scores, base 2; the lowest finite number where nothing is allowed, -inf beyond the keys."""
    columns = start + tl.arange(0, KEYS)
    width = tl.arange(0, WIDTH)
    present = columns < n
    keys = tl.load(
        key + columns[None, :] * key_row + width[:, None] * key_size,
        mask=present[None, :] & (width < SIZE)[:, None],
        other=0.0,
    )
    scores = tl.dot(queries, keys) * scale
    if allowed is not None:
        if PER_QUERY:
            looked_at = tl.load(
                allowed + lines[:, None] + columns[None, :] * allowed_key,
                mask=inside[:, None] & present[None, :],
                other=0,
            )
            scores = tl.where(looked_at != 0, scores, -3.4028234663852886e38)
        else:
            visible = tl.load(allowed + columns * allowed_key, mask=present, other=0)
            scores = tl.where((visible != 0)[None, :], scores, -3.4028234663852886e38)
    return tl.where(present[None, :], scores, float("-inf"))


@triton.jit(do_not_specialize=VARYING)
def _received(  # type: ignore[no-untyped-def]  # Triton has types of its own
    query,
    key,
    allowed,
    real,
    sums,
    n,
    blocks,
    heads,
    scale,
    query_example,
    query_head,
    query_row,
    query_size,
    key_example,
    key_head,
    key_row,
    key_size,
    allowed_example,
    allowed_head,
    allowed_query,
    allowed_key,
    real_example,
    real_row,
    PER_QUERY: tl.constexpr,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries of one head: their softmax's maximum and sum, then what every key receives from them.

    ``sums``: (batch, heads * blocks, n).
    """
    program = tl.program_id(0)
    # int64 as a batch may have more numbers than an int32 counts; one example of one head has fewer.
    example = (program // (blocks * heads)).to(tl.int64)
    head = ((program // blocks) % heads).to(tl.int64)
    rows = (program % blocks) * ROWS + tl.arange(0, ROWS)
    inside = rows < n
    votes = inside
    if real is not None:
        votes = tl.load(real + example * real_example + rows * real_row, mask=inside, other=0) != 0
    width = tl.arange(0, WIDTH)
    query += example * query_example + head * query_head
    places = rows[:, None] * query_row + width[None, :] * query_size
    queries = tl.load(query + places, mask=inside[:, None] & (width < SIZE)[None, :], other=0.0)
    key += example * key_example + head * key_head
    if allowed is not None:
        allowed += example * allowed_example + head * allowed_head
    lines = rows.to(tl.int64) * allowed_query
    sums += program.to(tl.int64) * n

    most = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    # A block of nothing but padding needs no softmax.
    end = tl.where(tl.max(votes.to(tl.int32), 0) > 0, n, 0)
    for start in range(0, end, KEYS):
        scores = _scores(
            queries, key, allowed, start, n, scale, key_row, key_size, allowed_key, lines, inside,
            PER_QUERY, SIZE, WIDTH, KEYS,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(scores, 1))
        total = total * tl.exp2(most - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        most = higher
    share = 1.0 / tl.maximum(total, 1.0)  # the maximum itself adds 1, save where nobody votes
    for start in range(0, end, KEYS):
        scores = _scores(
            queries, key, allowed, start, n, scale, key_row, key_size, allowed_key, lines, inside,
            PER_QUERY, SIZE, WIDTH, KEYS,
        )  # fmt: skip
        given = tl.where(votes[:, None], tl.exp2(scores - most[:, None]) * share[:, None], 0.0)
        columns = start + tl.arange(0, KEYS)
        tl.store(sums + columns, tl.sum(given, 0), mask=columns < n)
    for start in range(end, n, KEYS):
        columns = start + tl.arange(0, KEYS)
        tl.store(sums + columns, tl.zeros((KEYS,), tl.float32), mask=columns < n)
