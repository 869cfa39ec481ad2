"""score_blocks: each block's share of the position-free softmax, from its summary alone.

Two passes, because a share needs its row's denominator. Single queries (decode) keep the first
pass's log-mass: reading the summaries is its whole cost. Tiles (prefill), bound by the product
itself, take the denominator of a long context from every 8th block (it only weighs rows against
each other) and multiply once in full, blocks by rows, so that a share sums along the fast axis.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import SAMPLE_EVERY, Pages, Rotary, Scope, Tiles
from csrc_triton.primitives import (
    LOG2E,
    early_launch,
    selecting_tile,
    slot_sizes,
    source_channel,
    wait_for_previous,
)

MAX_SPLITS = 64  # of the block axis


@triton.jit
def _load_query(
    query_ptr, first_row, head_idx, row_offs, num_rows, query_scale, scale,
    query_stride_token, query_stride_head,
    HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, PAD_HEAD: tl.constexpr,
):  # fmt: skip
    """[q | q^2 * scale / 2], what [mean | variance] is multiplied with: [ROWS, 2 * PAD_HEAD]."""
    joint_offs = tl.arange(0, 2 * PAD_HEAD)
    channel_offs = joint_offs % PAD_HEAD
    row_ptr = (
        query_ptr
        + (first_row + row_offs // GROUP * STEP).to(tl.int64) * query_stride_token
        + (head_idx * GROUP + row_offs % GROUP) * query_stride_head
    )
    at = source_channel(channel_offs, HALF, INTERLEAVED)
    mask = (row_offs < num_rows)[:, None] & (channel_offs < HEAD_SIZE)[None, :]
    query = tl.load(row_ptr[:, None] + at[None, :], mask=mask, other=0.0)
    wide = query * tl.where(channel_offs < 2 * HALF, query_scale, 1.0)[None, :]
    joint = tl.where((joint_offs < PAD_HEAD)[None, :], wide, wide * wide * (0.5 * scale))
    if query.dtype == tl.float16:  # squares may not fit
        joint = tl.minimum(joint, 65504.0)
    return joint.to(query.dtype)


@triton.jit
def _load_summaries(
    summary_ptr, table_ptr, head_idx, block_offs, block_mask,
    summary_stride_block, summary_stride_head,
    HEAD_SIZE: tl.constexpr, PAD_HEAD: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """[mean | variance] of the blocks' keys: [len(block_offs), 2 * PAD_HEAD]."""
    page = tl.load(table_ptr + block_offs, mask=block_mask, other=0).to(tl.int64)
    joint_offs = tl.arange(0, 2 * PAD_HEAD)
    channel_offs = joint_offs % PAD_HEAD
    at = summary_ptr + page * summary_stride_block + head_idx * summary_stride_head
    if HEAD_SIZE == PAD_HEAD:
        summary = tl.load(at[:, None] + joint_offs[None, :])
    else:
        at = at[:, None] + (joint_offs // PAD_HEAD * HEAD_SIZE + channel_offs)[None, :]
        summary = tl.load(at, mask=(channel_offs < HEAD_SIZE)[None, :], other=0.0)
    return summary.to(dtype)


@triton.jit
def _row_totals(
    partial_ptr, out_row, row_offs, num_rows, partials,
    MAX_ROWS: tl.constexpr, MAX_SPLITS: tl.constexpr,
):  # fmt: skip
    """log2 of each row's denominator, inf for rows that are not there."""
    split_offs = tl.arange(0, MAX_SPLITS)
    row_mask = row_offs < num_rows
    at = (out_row * MAX_ROWS + row_offs)[:, None] * partials + split_offs[None, :]
    mask = row_mask[:, None] & (split_offs < partials)[None, :]
    partial = tl.load(partial_ptr + at, mask=mask, other=-1e30)
    best = tl.max(partial, axis=1)
    total = best + tl.log2(tl.sum(tl.exp2(partial - best[:, None]), axis=1))
    return tl.where(row_mask, total, float("inf"))


@triton.jit(do_not_specialize=["max_blocks", "splits"])
def _sum_mass_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    summary_ptr,  # [num_blocks, num_kv_heads, 2, head_size]
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    row_ptr,
    length_ptr,
    position_ptr,
    dense_ptr,
    mass_ptr,  # [num_tiles, num_kv_heads, group, max_blocks] log2, decode only
    partial_ptr,  # [num_tiles, num_kv_heads, num_rows, splits] log2
    scale,
    query_scale,
    max_blocks,
    splits,
    query_stride_token,
    query_stride_head,
    table_stride,
    summary_stride_block,
    summary_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    KEEPS_MASS: tl.constexpr,
    SAMPLE_FROM: tl.constexpr,
    SAMPLE_EVERY: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    ROW_PARTS: tl.constexpr = (MAX_ROWS + ROWS - 1) // ROWS
    tile_idx = (tl.program_id(0) // ROW_PARTS).to(tl.int64)
    row_offs = (tl.program_id(0) % ROW_PARTS) * ROWS + tl.arange(0, ROWS)
    head_idx = tl.program_id(1)
    split_idx = tl.program_id(2)
    num_rows, selects, local = selecting_tile(
        tile_idx, length_ptr, position_ptr, dense_ptr, GROUP, BLOCK_SIZE, GLOBAL, RECALL, LOCAL
    )
    if not selects:
        return
    query = _load_query(
        query_ptr, tl.load(row_ptr + tile_idx), head_idx, row_offs, num_rows, query_scale, scale,
        query_stride_token, query_stride_head, HEAD_SIZE, HALF, INTERLEAVED, GROUP, STEP, PAD_HEAD,
    )  # fmt: skip
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    out_row = tile_idx * tl.num_programs(1) + head_idx

    every = 1
    if not KEEPS_MASS:
        every = tl.where(local >= SAMPLE_FROM, SAMPLE_EVERY, 1)
    count = GLOBAL + tl.cdiv(local - GLOBAL, every)
    # BLOCKS at a time, split so that every program starts on a multiple
    per_split = tl.cdiv(tl.cdiv(count, BLOCKS), splits) * BLOCKS
    start = split_idx * per_split
    end = tl.minimum(start + per_split, count)
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for first in tl.range(start, end, BLOCKS, num_stages=STAGES):
        index = first + tl.arange(0, BLOCKS)
        block_mask = index < end
        block_offs = tl.where(index < GLOBAL, index, GLOBAL + (index - GLOBAL) * every)
        summary = _load_summaries(
            summary_ptr, table_ptr, head_idx, block_offs, block_mask,
            summary_stride_block, summary_stride_head, HEAD_SIZE, PAD_HEAD, query.dtype,
        )  # fmt: skip
        mass = tl.dot(query, tl.trans(summary)) * (scale * LOG2E) + tl.log2(float(BLOCK_SIZE))
        mass = tl.where(block_mask[None, :], mass, float("-inf"))
        if KEEPS_MASS:
            at = (out_row * GROUP + row_offs)[:, None] * max_blocks + block_offs[None, :]
            tl.store(mass_ptr + at, mass, mask=(row_offs < num_rows)[:, None] & block_mask[None, :])
        else:
            stands_for = tl.where(index < GLOBAL, 1, every).to(tl.float32)
            mass += tl.log2(stands_for)[None, :]
        new_best = tl.maximum(best, tl.max(mass, axis=1))
        total = total * tl.exp2(best - new_best)
        total += tl.sum(tl.exp2(mass - new_best[:, None]), axis=1)
        best = new_best
    tl.store(
        partial_ptr + (out_row * MAX_ROWS + row_offs) * splits + split_idx,
        tl.where(total > 0, best + tl.log2(tl.maximum(total, 1e-37)), -1e30),
        mask=row_offs < num_rows,
    )


@triton.jit(do_not_specialize=["max_blocks", "partials", "splits"])
def _share_mass_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    summary_ptr,  # [num_blocks, num_kv_heads, 2, head_size]
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    row_ptr,
    length_ptr,
    position_ptr,
    dense_ptr,
    mass_ptr,  # [num_tiles, num_kv_heads, group, max_blocks] log2, decode only
    partial_ptr,  # [num_tiles, num_kv_heads, num_rows, partials] log2
    score_ptr,  # [num_tiles, num_kv_heads, max_blocks]
    extent_ptr,  # [num_tiles]
    scale,
    query_scale,
    max_blocks,
    partials,
    splits,
    query_stride_token,
    query_stride_head,
    table_stride,
    summary_stride_block,
    summary_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    KEEPS_MASS: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    split_idx = tl.program_id(2)
    num_rows, selects, local = selecting_tile(
        tile_idx, length_ptr, position_ptr, dense_ptr, GROUP, BLOCK_SIZE, GLOBAL, RECALL, LOCAL
    )
    if (head_idx == 0) & (split_idx == 0):
        tl.store(extent_ptr + tile_idx, tl.where(selects, local, 0))
    out_row = tile_idx * tl.num_programs(1) + head_idx
    if not selects:
        return

    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    score_ptr += out_row * max_blocks
    per_split = tl.cdiv(tl.cdiv(local, BLOCKS), splits) * BLOCKS
    start = split_idx * per_split
    end = tl.minimum(start + per_split, local)
    for first_of_part in tl.static_range(0, MAX_ROWS, ROWS):
        row_offs = first_of_part + tl.arange(0, ROWS)
        if not KEEPS_MASS:
            query = _load_query(
                query_ptr, tl.load(row_ptr + tile_idx), head_idx, row_offs, num_rows,
                query_scale, scale, query_stride_token, query_stride_head,
                HEAD_SIZE, HALF, INTERLEAVED, GROUP, STEP, PAD_HEAD,
            )  # fmt: skip
        total = _row_totals(
            partial_ptr, out_row, row_offs, num_rows, partials, MAX_ROWS, MAX_SPLITS
        )  # fmt: skip
        for first in tl.range(start, end, BLOCKS, num_stages=STAGES):
            block_offs = first + tl.arange(0, BLOCKS)
            block_mask = block_offs < end
            if KEEPS_MASS:
                at = (out_row * GROUP + row_offs)[:, None] * max_blocks + block_offs[None, :]
                mask = (row_offs < num_rows)[:, None] & block_mask[None, :]
                mass = tl.load(mass_ptr + at, mask=mask, other=float("-inf"))
                share = tl.sum(tl.exp2(tl.minimum(mass - total[:, None], 0.0)), axis=0)
            else:
                summary = _load_summaries(
                    summary_ptr, table_ptr, head_idx, block_offs, block_mask,
                    summary_stride_block, summary_stride_head, HEAD_SIZE, PAD_HEAD, query.dtype,
                )  # fmt: skip
                mass = tl.dot(summary, tl.trans(query)) * (scale * LOG2E)
                mass += (tl.log2(float(BLOCK_SIZE)) - total)[None, :]
                share = tl.sum(tl.exp2(tl.minimum(mass, 0.0)), axis=1)
            if first_of_part > 0:
                share += tl.load(score_ptr + block_offs, mask=block_mask, other=0.0)
            share = tl.where(block_offs < GLOBAL, -1.0, share)
            tl.store(score_ptr + block_offs, share, mask=block_mask)


def score_blocks(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    scope: Scope,
    rotary: Rotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Each block's share of the position-free softmax, estimated from summaries.

    query        [num_tokens, num_heads, head_size] bf16 | fp16, not rotated
    block_table  [num_requests, max_blocks] int32
    returns      score [num_tiles, num_kv_heads, max_blocks] fp32, defined below the extent;
                 extent [num_tiles] int32, 0 for tiles that recall nothing
    """
    num_kv_heads, block_size, head_size = pages.key.shape[1:]
    group = query.shape[1] // num_kv_heads
    num_tiles, max_blocks = tiles.row.shape[0], block_table.shape[1]
    max_rows = tiles.max_length * group
    keeps_mass = tiles.max_length == 1
    # wide heads by fewer rows and blocks, so that what GPUs with 99 KB for it may share is enough
    rows = min(triton.next_power_of_2(max_rows), 128 if head_size <= 128 else 64)
    row_parts = math.ceil(max_rows / rows)
    blocks, warps, num_stages, wanted = _tile_sizes(head_size, keeps_mass)
    splits = _splits(num_tiles * num_kv_heads * row_parts, wanted)
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    mass = torch.empty((num_tiles, num_kv_heads, group, max_blocks) if keeps_mass else 1, **fp32)
    partial = torch.empty((num_tiles, num_kv_heads, max_rows, splits), **fp32)
    score = torch.empty((num_tiles, num_kv_heads, max_blocks), **fp32)
    extent = torch.empty(num_tiles, dtype=torch.int32, device=query.device)
    tensors = (query, pages.summary, block_table, *tiles.columns, mass, partial)
    numbers = (scale, rotary.query_scale, max_blocks)
    strides = (
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        pages.summary.stride(0),
        pages.summary.stride(1),
    )
    fixed = {
        "HEAD_SIZE": head_size,
        "HALF": rotary.half,
        "INTERLEAVED": rotary.interleaved,
        "GROUP": group,
        "STEP": tiles.step,
        "BLOCK_SIZE": block_size,
        **slot_sizes(scope),
        "MAX_ROWS": max_rows,
        "ROWS": rows,
        "KEEPS_MASS": keeps_mass,
        "PAD_HEAD": max(triton.next_power_of_2(head_size), 16),
        **early_launch(query.device),
    }
    _sum_mass_kernel[(num_tiles * row_parts, num_kv_heads, splits)](
        *tensors, *numbers, splits, *strides, **fixed, BLOCKS=blocks, STAGES=num_stages,
        SAMPLE_FROM=scope.sample_from, SAMPLE_EVERY=SAMPLE_EVERY, num_warps=warps,
    )  # fmt: skip
    share_blocks, share_warps, share_stages, wanted = _share_sizes(head_size, keeps_mass)
    share_splits = _splits(num_tiles * num_kv_heads, wanted)
    _share_mass_kernel[(num_tiles, num_kv_heads, share_splits)](
        *tensors, score, extent, *numbers, splits, share_splits, *strides, **fixed,
        BLOCKS=share_blocks, MAX_SPLITS=MAX_SPLITS, STAGES=share_stages, num_warps=share_warps,
    )  # fmt: skip
    return score, extent


def _tile_sizes(head_size: int, keeps_mass: bool) -> tuple[int, int, int, int]:
    """Blocks per step, warps, stages, and programs to aim at, from a sweep on an H200."""
    if keeps_mass:
        return 32, 4, 3, 528
    return (64 if head_size <= 128 else 32), 4, 2, 528


def _share_sizes(head_size: int, keeps_mass: bool) -> tuple[int, int, int, int]:
    """The same for the second pass."""
    if keeps_mass:
        return 256, 4, 3, 264
    return (64, 4, 1, 264) if head_size <= 128 else (32, 8, 1, 264)


def _splits(programs: int, wanted: int) -> int:
    """Parts of the block axis, a power of two, so that about `wanted` programs run."""
    return min(triton.next_power_of_2(max(1, wanted // max(programs, 1))), MAX_SPLITS)
