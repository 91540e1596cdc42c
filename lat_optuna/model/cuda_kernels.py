"""Significance on a GPU without probabilities in memory, and the choice of rows in one launch. Importing this module
needs Triton, which torch's builds for GPUs bring.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from lat_optuna.model.rows import Chosen, empty_choice

LARGEST_SIZE = 128
"""Head sizes up to here fit the blocks."""

DTYPES = (torch.float16, torch.bfloat16)
"""In fp32, exact products cost more in a kernel of ours than writing the probabilities does (H200, from 64 x 384 three
times as much)."""

ROWS, KEYS, WARPS, STAGES = 64, 64, 4, 3
"""Queries and keys of a block. Fixed, as batches change their shape all the time."""

LONGEST = 4096
"""Rows of an example, of which the choice holds all at once."""

# What changes from batch to batch must not compile the kernel anew, as a multiple of 16 or a 1 otherwise would.
VARYING = ("n", "blocks", "allowed_example", "allowed_head", "allowed_query", "real_example")
VARYING_CHOICE = ("n", "width", "protected", "tokens")


def available() -> bool:
    """Whether the kernels are there: where this module could be imported, they are."""
    return True


def fits(query: torch.Tensor) -> bool:
    """Whether the kernel takes such queries, and their GPU such a kernel (Triton supports those of 2020 and later)."""
    if query.dtype not in DTYPES or query.size(3) > LARGEST_SIZE:
        return False
    return query.device.type != "cuda" or _capable()


def takes(votes: torch.Tensor) -> bool:
    """Whether :func:`choose` takes such votes."""
    return votes.size(1) <= LONGEST and (votes.device.type != "cuda" or _capable())


@torch.compiler.assume_constant_result
def _capable() -> bool:
    return torch.cuda.get_device_capability()[0] >= 8


def received(
    query: torch.Tensor, key: torch.Tensor, allowed: torch.Tensor | None, real: torch.Tensor | None
) -> torch.Tensor:
    """See :func:`lat_optuna.model.kernels.received`: fp16 or bf16, in one launch and a sum, without atomics."""
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


def choose(
    votes: torch.Tensor,
    real: torch.Tensor | None,
    counts: torch.Tensor | None,
    positions: torch.Tensor | None,
    width: int,
    protected: int,
    tokens: int,
) -> Chosen:
    """See :func:`lat_optuna.model.kernels.choose`: in one launch, up to ``LONGEST`` rows."""
    batch, n = votes.shape
    made = empty_choice(votes, width)
    block = max(128, triton.next_power_of_2(n))
    with torch.cuda.device_of(votes):
        _choose[(batch,)](
            *(None if each is None else each.contiguous() for each in (votes, real, counts, positions)),
            *made,
            n,
            width,
            protected,
            tokens,
            BLOCK=block,
            num_warps=min(8, block // 128),
        )
    return made


# Rows of a table, as counts are, begin anywhere.
@triton.jit(do_not_specialize=VARYING_CHOICE, do_not_specialize_on_alignment=("counts",))
def _choose(  # type: ignore[no-untyped-def]  # Triton has types of its own
    votes,
    real,
    counts,
    positions,
    to_rows,
    to_positions,
    to_real,
    to_flat,
    n,
    width,
    protected,
    tokens,
    BLOCK: tl.constexpr,
):
    """One example. The vote of the last row that stays is found bit by bit, by counting those that are no lower."""
    example = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, BLOCK)
    inside = rows < n
    vote = tl.load(votes + example * n + rows, mask=inside, other=0.0)
    if real is None:
        first = rows < protected
    else:
        is_real = tl.load(real + example * n + rows, mask=inside, other=0) != 0
        vote = tl.where(is_real, vote, float("-inf"))
        first = is_real & (tl.cumsum(is_real.to(tl.int32), 0) <= protected)
    vote = tl.where(first, float("inf"), vote)
    count = width
    if counts is not None:
        count = tl.minimum(tl.load(counts + example).to(tl.int32), width)

    # Integers in the order of the votes. As in a sort, zeros are equal, and what is no number comes first.
    vote = tl.where(vote == 0.0, 0.0, vote)
    bits = vote.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where(vote != vote, 0x7FFFFFFF, key)
    lowest = -0x7FFFFFFF - 1
    key = tl.where(inside, key, lowest)
    cut = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= count, 0, lowest)
    for bit in range(31):
        higher = cut + (1 << (30 - bit))
        cut = tl.where(tl.sum((key >= higher).to(tl.int32), 0) >= count, higher, cut)
    above = key > cut
    level = ((key == cut) & inside).to(tl.int32)
    missing = count - tl.sum(above.to(tl.int32), 0)
    stays = above | ((level != 0) & (tl.cumsum(level, 0) <= missing))

    if positions is None:
        position = rows.to(tl.int64)
    else:
        position = tl.load(positions + example * n + rows, mask=inside, other=0)
    start = example * width
    place = start + tl.cumsum(stays.to(tl.int32), 0) - 1
    tl.store(to_rows + place, rows.to(tl.int64), mask=stays)
    tl.store(to_positions + place, position, mask=stays)
    tl.store(to_flat + place, example * n + rows, mask=stays)
    filler = (rows >= count) & (rows < width)
    last = tl.zeros((BLOCK,), tl.int64) + n - 1
    tl.store(to_rows + start + rows, last, mask=filler)
    tl.store(to_positions + start + rows, tl.zeros((BLOCK,), tl.int64) + tokens, mask=filler)
    tl.store(to_flat + start + rows, example * n + last, mask=filler)
    tl.store(to_real + start + rows, rows < count, mask=rows < width)
