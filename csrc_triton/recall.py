"""recall_blocks: the best blocks in sequence order, without a sort and without the host.

The k-th largest score is found bit by bit (scores are not negative, so their bits order as
integers). Long rows go through two rounds: the best k runs of 16 blocks hold the best k blocks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

RUN = 16


@triton.jit
def _order_key(score):
    """Non-negative scores as integers of the same order; -1 for what cannot be recalled."""
    return tl.where(score >= 0, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def _kth_largest(key, k):
    """The k-th largest of key, or 0 if fewer than k are positive; and how many are larger."""
    found = 0
    for bit in range(30, -1, -1):
        higher = found | (1 << bit)
        found = tl.where(tl.sum((key >= higher).to(tl.int32)) >= k, higher, found)
    return found, tl.sum((key > found).to(tl.int32))


@triton.jit
def _recall_blocks_kernel(
    score_ptr,  # [num_tiles, num_kv_heads, n]
    extent_ptr,  # [num_tiles]: columns of score that count
    name_ptr,  # [num_tiles, num_kv_heads, n]: block ids, or null
    run_key_ptr,  # [num_tiles, num_kv_heads, max_runs] scratch
    run_ptr,  # [num_tiles, num_kv_heads, PAD_RECALLED] scratch
    out_ptr,  # [num_tiles, num_kv_heads, num_recalled]
    n,
    max_runs,
    num_recalled,
    PAD_RECALLED: tl.constexpr,
    HAS_EXTENT: tl.constexpr,
    HAS_NAMES: tl.constexpr,
    TWO_ROUNDS: tl.constexpr,
    CHUNK: tl.constexpr,
    RUN: tl.constexpr,
):
    tile_idx = tl.program_id(0).to(tl.int64)
    row_idx = tile_idx * tl.num_programs(1) + tl.program_id(1)
    extent = n
    if HAS_EXTENT:
        extent = tl.load(extent_ptr + tile_idx)
    recalled_offs = tl.arange(0, PAD_RECALLED)
    out_base = out_ptr + row_idx * num_recalled
    if extent == 0:
        tl.store(out_base + recalled_offs, -1, mask=recalled_offs < num_recalled)
        return
    score_base = score_ptr + row_idx * n

    element_offs = tl.arange(0, PAD_RECALLED * RUN)
    column = element_offs
    if TWO_ROUNDS:
        if extent > PAD_RECALLED * RUN:
            num_runs = tl.cdiv(extent, RUN)
            key_base = run_key_ptr + row_idx * max_runs
            for first in range(0, num_runs, CHUNK // RUN):
                offs = first * RUN + tl.arange(0, CHUNK)
                score = tl.load(score_base + offs, mask=offs < extent, other=-1.0)
                best = tl.max(tl.reshape(score, [CHUNK // RUN, RUN]), axis=1)
                run_offs = first + tl.arange(0, CHUNK // RUN)
                tl.store(key_base + run_offs, _order_key(best), mask=run_offs < num_runs)
            tl.debug_barrier()

            found = 0
            for bit in range(30, -1, -1):
                higher = found | (1 << bit)
                count = 0
                for first in range(0, num_runs, CHUNK):
                    offs = first + tl.arange(0, CHUNK)
                    key = tl.load(key_base + offs, mask=offs < num_runs, other=-1)
                    count += tl.sum((key >= higher).to(tl.int32))
                found = tl.where(count >= num_recalled, higher, found)
            larger = 0
            for first in range(0, num_runs, CHUNK):
                offs = first + tl.arange(0, CHUNK)
                key = tl.load(key_base + offs, mask=offs < num_runs, other=-1)
                larger += tl.sum((key > found).to(tl.int32))
            # Of equal runs take the earliest; runs are written in order.
            run_base = run_ptr + row_idx * PAD_RECALLED
            taken = 0
            equals = 0
            for first in range(0, num_runs, CHUNK):
                offs = first + tl.arange(0, CHUNK)
                key = tl.load(key_base + offs, mask=offs < num_runs, other=-1)
                is_equal = (key == found).to(tl.int32)
                rank = equals + tl.cumsum(is_equal, 0)
                takes = (key > found) | ((is_equal > 0) & (rank <= num_recalled - larger))
                place = taken + tl.cumsum(takes.to(tl.int32), 0) - 1
                tl.store(run_base + place, offs, mask=takes)
                taken += tl.sum(takes.to(tl.int32))
                equals += tl.sum(is_equal)
            tl.debug_barrier()
            run = element_offs // RUN
            run = tl.load(run_base + run, mask=run < taken, other=-1)
            column = tl.where(run >= 0, run * RUN + element_offs % RUN, extent)

    score = tl.load(score_base + column, mask=column < extent, other=-1.0)
    key = _order_key(score)
    found, larger = _kth_largest(key, num_recalled)
    is_equal = (key == found).to(tl.int32)
    rank = tl.cumsum(is_equal, 0)
    takes = (key > found) | ((is_equal > 0) & (rank <= num_recalled - larger))
    place = tl.cumsum(takes.to(tl.int32), 0) - 1
    name = column
    if HAS_NAMES:
        name = tl.load(name_ptr + row_idx * n + column, mask=takes, other=-1)
    tl.store(out_base + place, name, mask=takes)
    taken = tl.sum(takes.to(tl.int32))
    behind = (recalled_offs >= taken) & (recalled_offs < num_recalled)
    tl.store(out_base + recalled_offs, -1, mask=behind)


def recall_blocks(
    score: Tensor, num_recalled: int, extent: Tensor | None = None, blocks: Tensor | None = None
) -> Tensor:
    """The best blocks, in sequence order; of equals, the earlier.

    score    [num_tiles, num_kv_heads, n] fp32; negative: not to be recalled
    extent   [num_tiles] int32: only so many columns of a tile count; default: all
    blocks   [num_tiles, num_kv_heads, n] int32, the block each column stands for, ascending
    returns  [num_tiles, num_kv_heads, num_recalled] int32, ascending; -1 behind the last
    """
    num_tiles, num_kv_heads, n = score.shape
    padded = triton.next_power_of_2(max(num_recalled, 4))
    two_rounds = blocks is None and n > padded * RUN
    if blocks is not None and n > padded * RUN:
        raise ValueError(f"{n} named candidates for {num_recalled} places; at most {padded * RUN}")
    out = torch.empty(
        (num_tiles, num_kv_heads, num_recalled), dtype=torch.int32, device=score.device
    )
    max_runs = triton.cdiv(n, RUN) if two_rounds else 0
    run_key = out.new_empty((num_tiles, num_kv_heads, max_runs))
    run = out.new_empty((num_tiles, num_kv_heads, padded if two_rounds else 0))
    _recall_blocks_kernel[(num_tiles, num_kv_heads)](
        score,
        extent,
        blocks,
        run_key,
        run,
        out,
        n,
        max_runs,
        num_recalled,
        PAD_RECALLED=padded,
        HAS_EXTENT=extent is not None,
        HAS_NAMES=blocks is not None,
        TWO_ROUNDS=two_rounds,
        CHUNK=4096,
        RUN=RUN,
        num_warps=8,
    )
    return out
