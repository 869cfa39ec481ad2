"""recall_blocks: the best blocks in sequence order, without a sort and without the host.

The k-th largest score is found digit by digit, counting how many share each digit (scores are not
negative, so their bits order as integers). Long rows go through two rounds: the best k runs of
blocks hold the best k blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Memory, own_part
from csrc_triton.primitives import early_launch, wait_for_previous

# Registers of one program hold so many runs, and so many blocks of the best runs.
MAX_RUNS = 4096
MIN_RUN = 8


@triton.jit
def _order_key(score):
    """Non-negative scores as 22-bit integers of the same order; -1: cannot be recalled."""
    return tl.where(score >= 0, score.to(tl.int32, bitcast=True) >> 9, -1)


@triton.jit
def _next_digit(key, found, wanted, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The next BITS of the wanted-th largest of the keys that begin as found does."""
    digit_offs = tl.arange(0, 1 << BITS)
    digit = (key >> SHIFT) & ((1 << BITS) - 1)
    count = tl.histogram(digit, 1 << BITS, mask=(key >> (SHIFT + BITS)) == found)
    at_least = tl.cumsum(count, 0, reverse=True)
    last = tl.max(tl.where(at_least >= wanted, digit_offs, 0))
    return (found << BITS) + last, wanted - tl.sum(tl.where(digit_offs > last, count, 0))


@triton.jit
def _take_largest(key, k):
    """Which of key are the k largest (of equals, the first; never -1), and their places."""
    found, wanted = _next_digit(key, 0, k, 16, 6)
    found, wanted = _next_digit(key, found, wanted, 10, 6)
    found, wanted = _next_digit(key, found, wanted, 5, 5)
    found, wanted = _next_digit(key, found, wanted, 0, 5)
    larger = (key > found).to(tl.int32)
    equal = (key == found).to(tl.int32)
    # how many there are up to each key
    if key.shape[0] < 1 << 15:  # in one scan: larger ones in the low half, equals in the high half
        both = tl.cumsum(larger + (equal << 16), 0)
        larger_ones, equals = both & 0xFFFF, both >> 16
    else:
        larger_ones, equals = tl.cumsum(larger, 0), tl.cumsum(equal, 0)
    takes = (larger > 0) | ((equal > 0) & (equals <= wanted))
    return takes, larger_ones + tl.minimum(equals, wanted) - 1


@triton.jit
def _load_scores(score_ptr, row_idx, n, column, extent, SUMMED: tl.constexpr):
    """Scores of SUMMED heads' rows together; -1 from extent on."""
    score_ptr += row_idx * SUMMED * n + column
    mask = column < extent
    score = tl.load(score_ptr, mask=mask, other=-1.0)
    for head in tl.static_range(1, SUMMED):
        score += tl.load(score_ptr + head * n, mask=mask, other=-1.0)
    return score


@triton.jit(do_not_specialize=["n", "num_runs", "found_stride"])
def _best_of_runs_kernel(
    score_ptr,  # [num_tiles, num_rows * SUMMED, n]
    extent_ptr,  # [num_tiles], or null
    found_ptr,  # [num_tiles, found_stride], or null
    run_key_ptr,  # [num_tiles, num_rows, num_runs]
    n,
    num_runs,
    two_rounds_from,
    found_stride,
    HAS_EXTENT: tl.constexpr,
    COUNTS: tl.constexpr,
    SUMMED: tl.constexpr,
    RUN: tl.constexpr,
    RUNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    tile_idx = tl.program_id(0).to(tl.int64)
    row_idx = tile_idx * tl.num_programs(1) + tl.program_id(1)
    extent = n
    if HAS_EXTENT:
        extent = tl.load(extent_ptr + tile_idx)
    first_run = tl.program_id(2) * RUNS
    if (extent <= two_rounds_from) | (first_run * RUN >= extent):
        return
    offs = first_run * RUN + tl.arange(0, RUNS * RUN)
    score = _load_scores(score_ptr, row_idx, n, offs, extent, SUMMED)
    if COUNTS:
        score += tl.load(found_ptr + tile_idx * found_stride + offs, mask=score >= 0, other=0.0)
    best = tl.max(tl.reshape(score, [RUNS, RUN]), axis=1)
    run_offs = first_run + tl.arange(0, RUNS)
    tl.store(
        run_key_ptr + row_idx * num_runs + run_offs, _order_key(best), mask=run_offs < num_runs
    )


@triton.jit(do_not_specialize=["n", "num_runs", "num_own", "num_shared", "found_stride"])
def _recall_blocks_kernel(
    score_ptr,  # [num_tiles, num_rows * SUMMED, n]
    extent_ptr,  # [num_tiles]: columns of score that count; or null
    name_ptr,  # [num_tiles, num_rows, n]: block ids, or null
    found_ptr,  # [num_tiles, found_stride], or null
    most_ptr,  # [num_tiles, found_stride], or null
    length_ptr,  # [num_tiles], or null
    shared_ptr,  # [num_tiles, num_rows, num_shared]: block ids, or null
    run_key_ptr,  # [num_tiles, num_rows, num_runs]
    run_ptr,  # [num_tiles, num_rows, PAD_RECALLED] scratch
    out_ptr,  # [num_tiles, num_rows, num_recalled]
    n,
    num_runs,
    num_recalled,
    num_own,
    num_shared,
    found_stride,
    weight,
    PAD_RECALLED: tl.constexpr,
    HAS_EXTENT: tl.constexpr,
    HAS_NAMES: tl.constexpr,
    HAS_SHARED: tl.constexpr,
    REMEMBERS: tl.constexpr,
    HAS_MOST: tl.constexpr,
    COUNTS: tl.constexpr,
    SUMMED: tl.constexpr,
    TWO_ROUNDS: tl.constexpr,
    RUN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAD_RUNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    tile_idx = tl.program_id(0).to(tl.int64)
    row_idx = tile_idx * tl.num_programs(1) + tl.program_id(1)
    extent = n
    if HAS_EXTENT:
        extent = tl.load(extent_ptr + tile_idx)
    recalled_offs = tl.arange(0, PAD_RECALLED)
    out_ptr += row_idx * num_recalled
    if extent == 0:
        tl.store(out_ptr + recalled_offs, -1, mask=recalled_offs < num_recalled)
        return

    column = tl.arange(0, COLUMNS)
    if TWO_ROUNDS:
        if extent > COLUMNS:
            run_offs = tl.arange(0, PAD_RUNS)
            key = tl.load(
                run_key_ptr + row_idx * num_runs + run_offs,
                mask=run_offs < tl.cdiv(extent, RUN),
                other=-1,
            )
            takes, place = _take_largest(key, num_recalled)
            run_ptr += row_idx * PAD_RECALLED
            tl.store(run_ptr + place, run_offs, mask=takes)
            taken = tl.sum(takes.to(tl.int32))
            tl.debug_barrier()
            run = tl.load(run_ptr + column // RUN, mask=column // RUN < taken, other=-1)
            column = tl.where(run >= 0, run * RUN + column % RUN, extent)

    score = _load_scores(score_ptr, row_idx, n, column, extent, SUMMED)
    name = column
    if HAS_NAMES:
        name = tl.load(name_ptr + row_idx * n + column, mask=score >= 0, other=-1)
    if REMEMBERS:
        found_ptr += tile_idx * found_stride + name
        found = tl.load(found_ptr, mask=score >= 0, other=0.0)
        if HAS_NAMES:
            own = score * (weight / tl.load(length_ptr + tile_idx))
            tl.store(found_ptr, found + own, mask=score >= 0)
            if HAS_MOST:
                most_ptr += tile_idx * found_stride + name
                most = tl.load(most_ptr, mask=score >= 0, other=0.0)
                tl.store(most_ptr, tl.maximum(most, score), mask=score >= 0)
        if COUNTS:
            score += found
    key = _order_key(score)
    if HAS_SHARED:
        is_best, _ = _take_largest(key, num_own)
        shared_ptr += row_idx * num_shared
        rank = tl.zeros([COLUMNS], tl.int32)
        for shared_idx in range(num_shared):
            rank |= (name == tl.load(shared_ptr + shared_idx)).to(tl.int32)
        rank = tl.where(is_best, 2, rank)
        key = tl.where(key >= 0, (rank << 20) + (key >> 2), -1)
    takes, place = _take_largest(key, num_recalled)
    tl.store(out_ptr + place, name, mask=takes)
    behind = recalled_offs >= tl.sum(takes.to(tl.int32))
    tl.store(out_ptr + recalled_offs, -1, mask=behind & (recalled_offs < num_recalled))


def recall_blocks(
    score: Tensor,
    num_recalled: int,
    extent: Tensor | None = None,
    blocks: Tensor | None = None,
    per_layer: bool = False,
    memory: Memory | None = None,
    length: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """The best blocks, in sequence order; of equals, the earlier.

    Scores count to 14 bits of mantissa, 12 beside what is shared: what differs by less is equal.

    score    [num_tiles, num_kv_heads, n] fp32; negative: not to be recalled
    extent   [num_tiles] int32: only so many columns of a tile count; default: all
    blocks   [num_tiles, num_rows, n] int32, the block each column stands for, ascending
    memory   counts too, and takes up the scores of named blocks; per_layer alone
    length   [num_tiles] int32: queries that these scores are sums over; for the memory
    shared   [num_tiles, num_rows, m] int32: named blocks that come before all others but the best,
             one of OWN_PART recalled
    returns  [num_tiles, num_rows, num_recalled] int32, ascending; -1 behind the last. A row for
             each KV head, or, per_layer, one for all by the sum of their scores
    """
    num_tiles, num_kv_heads, n = score.shape
    summed = num_kv_heads if per_layer else 1
    padded = triton.next_power_of_2(max(num_recalled, 4))
    run = max(MIN_RUN, triton.next_power_of_2(triton.cdiv(n, MAX_RUNS)))
    # named blocks are few, and all of them are to be taken up, not those of the best runs alone
    looks_at_all = blocks is not None and (memory is not None or shared is not None)
    two_rounds = n > max(padded * run, MAX_RUNS) and not looks_at_all
    assert shared is None or blocks is not None, "what is shared is looked for among named blocks"
    columns = padded * run if two_rounds else triton.next_power_of_2(max(n, 4))
    num_runs = triton.cdiv(n, run) if two_rounds else 0
    pad_runs = triton.next_power_of_2(num_runs) if two_rounds else 1
    widest = max(columns, pad_runs)
    grid = (num_tiles, num_kv_heads // summed)
    device = score.device
    early = early_launch(device)
    out = torch.empty((*grid, num_recalled), dtype=torch.int32, device=device)
    run_key = torch.empty((*grid, num_runs), dtype=torch.int32, device=device)
    best_runs = torch.empty((*grid, padded if two_rounds else 0), dtype=torch.int32, device=device)
    found = most = stride = weight = None
    if memory is not None:
        found, most, stride = memory.found, memory.most, memory.found.stride(0)
        weight = memory.weight
        assert most is None or most.stride(0) == stride
    counts = memory is not None and memory.counts
    if two_rounds:
        runs = 1024 // run
        runs_grid = (*grid, triton.cdiv(num_runs, runs))
        _best_of_runs_kernel[runs_grid](
            score,
            extent,
            found,
            run_key,
            n,
            num_runs,
            columns,
            stride,
            HAS_EXTENT=extent is not None,
            COUNTS=counts,
            SUMMED=summed,
            RUN=run,
            RUNS=runs,
            num_warps=4,
            **early,
        )
    _recall_blocks_kernel[grid](
        score,
        extent,
        blocks,
        found,
        most,
        length,
        shared,
        run_key,
        best_runs,
        out,
        n,
        num_runs,
        num_recalled,
        own_part(num_recalled),
        0 if shared is None else shared.shape[-1],
        stride,
        weight,
        PAD_RECALLED=padded,
        HAS_EXTENT=extent is not None,
        HAS_NAMES=blocks is not None,
        HAS_SHARED=shared is not None,
        REMEMBERS=memory is not None,
        HAS_MOST=most is not None,
        COUNTS=counts,
        SUMMED=summed,
        TWO_ROUNDS=two_rounds,
        RUN=run,
        COLUMNS=columns,
        PAD_RUNS=pad_runs,
        num_warps=4 if widest <= 1024 else 8 if widest <= 8192 else 16,
        **early,
    )
    return out
