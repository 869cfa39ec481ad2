"""refine_scores: the candidates' shares of the softmax, from their keys.

q.k is R(i)q . R(i)k, and the cache holds R(i)k. Single queries, bound by reading the keys, take
them block by block and turn them back. A tile of many queries, bound by the products, takes the
keys of one offset from many blocks, so that its queries are turned once for all of these and keys
go straight from the page into the product.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Pages, Rotary, Tiles
from csrc_triton.primitives import LOG2E, cap_logits, source_channel


@triton.jit(do_not_specialize=["splits"])
def _refine_blocks_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    row_ptr,
    length_ptr,
    candidate_ptr,  # [num_tiles, num_kv_heads, num_candidates]
    log_mass_ptr,  # [num_tiles, num_kv_heads, MAX_ROWS]
    cos_sin_ptr,  # [num_positions, 2, half]
    score_ptr,  # [num_tiles, num_kv_heads, num_candidates]
    scale,  # of the logits, times the keys' scale
    query_scale,
    soft_cap,
    num_candidates,
    splits,
    query_stride_token,
    query_stride_head,
    table_stride,
    cache_stride_block,
    cache_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROW_PARTS: tl.constexpr = (MAX_ROWS + ROWS - 1) // ROWS
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    split_idx = tl.program_id(2)
    out_row = tile_idx * tl.num_programs(1) + head_idx
    num_rows = tl.load(length_ptr + tile_idx) * GROUP
    per_split = tl.cdiv(tl.cdiv(num_candidates, CANDIDATES), splits) * CANDIDATES
    start = split_idx * per_split
    end = tl.minimum(start + per_split, num_candidates)
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    first_row = tl.load(row_ptr + tile_idx)
    candidate_ptr += out_row * num_candidates
    score_ptr += out_row * num_candidates
    key_cache_ptr += head_idx.to(tl.int64) * cache_stride_head

    # a tile of keys is [CANDIDATES, BLOCK_SIZE, channels]
    KEYS: tl.constexpr = CANDIDATES * BLOCK_SIZE
    candidate_offs = tl.arange(0, CANDIDATES)
    offset = tl.arange(0, BLOCK_SIZE)
    half_offs = tl.arange(0, PAD_HALF)
    half_mask = half_offs < HALF
    rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
    rest_mask = rest_offs < HEAD_SIZE
    if HALF > 0:
        angle_ptr = cos_sin_ptr + (offset * (2 * HALF))[None, :, None] + half_offs[None, None, :]
        cos = tl.load(angle_ptr, mask=half_mask[None, None, :], other=0.0)
        sin = tl.load(angle_ptr + HALF, mask=half_mask[None, None, :], other=0.0)
    for part in tl.static_range(ROW_PARTS):
        row_offs = part * ROWS + tl.arange(0, ROWS)
        row_mask = row_offs < num_rows
        log_mass = tl.load(log_mass_ptr + out_row * MAX_ROWS + row_offs, mask=row_mask, other=0.0)
        log_mass = tl.where(row_mask, log_mass * LOG2E, float("inf"))  # no row, no share
        query_row_ptr = (
            query_ptr
            + (first_row + row_offs // GROUP).to(tl.int64) * query_stride_token
            + (head_idx * GROUP + row_offs % GROUP) * query_stride_head
        )[:, None]
        if HALF > 0:
            mask = row_mask[:, None] & half_mask[None, :]
            at = source_channel(half_offs, HALF, INTERLEAVED)[None, :]
            query_first = tl.load(query_row_ptr + at, mask=mask, other=0.0)
            at = source_channel(half_offs + HALF, HALF, INTERLEAVED)[None, :]
            query_second = tl.load(query_row_ptr + at, mask=mask, other=0.0)
            dtype = query_first.dtype
            query_first = (query_first.to(tl.float32) * query_scale).to(dtype)
            query_second = (query_second.to(tl.float32) * query_scale).to(dtype)
        if 2 * HALF < HEAD_SIZE:
            mask = row_mask[:, None] & rest_mask[None, :]
            query_rest = tl.load(query_row_ptr + rest_offs[None, :], mask=mask, other=0.0)
        for first_candidate in tl.range(start, end, CANDIDATES, num_stages=STAGES):
            out_offs = first_candidate + candidate_offs
            out_mask = out_offs < end
            candidate = tl.load(candidate_ptr + out_offs, mask=out_mask, other=-1)
            here = candidate >= 0
            page = tl.load(table_ptr + candidate, mask=here, other=0).to(tl.int64)
            key_row = (page * cache_stride_block)[:, None] + (offset * HEAD_SIZE)[None, :]
            if HALF > 0:
                key_mask = here[:, None, None] & half_mask[None, None, :]
                key_ptr = key_cache_ptr + key_row[:, :, None] + half_offs[None, None, :]
                first = tl.load(key_ptr, mask=key_mask, other=0.0).to(tl.float32)
                second = tl.load(key_ptr + HALF, mask=key_mask, other=0.0).to(tl.float32)
                raw_first = (first * cos + second * sin).to(query_first.dtype)
                raw_first = tl.reshape(raw_first, [KEYS, PAD_HALF])
                raw_second = (second * cos - first * sin).to(query_first.dtype)
                raw_second = tl.reshape(raw_second, [KEYS, PAD_HALF])
                logits = tl.dot(query_first, tl.trans(raw_first))
                logits = tl.dot(query_second, tl.trans(raw_second), logits)
            if 2 * HALF < HEAD_SIZE:
                rest = tl.load(
                    key_cache_ptr + key_row[:, :, None] + rest_offs[None, None, :],
                    mask=here[:, None, None] & rest_mask[None, None, :],
                    other=0.0,
                ).to(query_rest.dtype)
                rest = tl.reshape(rest, [KEYS, PAD_REST])
                if HALF > 0:
                    logits = tl.dot(query_rest, tl.trans(rest), logits)
                else:
                    logits = tl.dot(query_rest, tl.trans(rest))
            if HAS_CAP:
                logits = cap_logits(logits * scale, soft_cap) * LOG2E
            else:
                logits = logits * (scale * LOG2E)
            weight = tl.exp2(tl.minimum(logits - log_mass[:, None], 80.0))
            share = tl.sum(tl.reshape(weight, [ROWS, CANDIDATES, BLOCK_SIZE]), axis=2)
            score = tl.sum(tl.minimum(share, 1.0), axis=0)
            if part > 0:
                score += tl.load(score_ptr + out_offs, mask=out_mask, other=0.0)
            score = tl.where((candidate >= 0) & (num_rows > 0), score, -1.0)
            tl.store(score_ptr + out_offs, score, mask=out_mask)


@triton.jit
def _refine_offsets_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    row_ptr,
    length_ptr,
    candidate_ptr,  # [num_tiles, num_kv_heads, num_candidates]
    log_mass_ptr,  # [num_tiles, num_kv_heads, MAX_ROWS]
    cos_sin_ptr,  # [num_positions, 2, half]
    score_ptr,  # [num_tiles, num_kv_heads, num_candidates]
    scale,  # of the logits, times the keys' scale
    query_scale,
    soft_cap,
    num_candidates,
    query_stride_token,
    query_stride_head,
    table_stride,
    cache_stride_block,
    cache_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROW_PARTS: tl.constexpr = (MAX_ROWS + ROWS - 1) // ROWS
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    out_row = tile_idx * tl.num_programs(1) + head_idx
    num_rows = tl.load(length_ptr + tile_idx) * GROUP
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    first_row = tl.load(row_ptr + tile_idx)
    candidate_offs = tl.program_id(2) * CANDIDATES + tl.arange(0, CANDIDATES)
    candidate_mask = candidate_offs < num_candidates
    at = out_row * num_candidates + candidate_offs
    candidate = tl.load(candidate_ptr + at, mask=candidate_mask, other=-1)
    here = (candidate >= 0) & (num_rows > 0)
    score_ptr += at
    if tl.sum(here.to(tl.int32)) == 0:
        tl.store(score_ptr, tl.full([CANDIDATES], -1.0, tl.float32), mask=candidate_mask)
        return
    page = tl.load(table_ptr + candidate, mask=candidate >= 0, other=0).to(tl.int64)
    key_cache_ptr += head_idx.to(tl.int64) * cache_stride_head

    half_offs = tl.arange(0, PAD_HALF)
    half_mask = half_offs < HALF
    rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
    rest_mask = rest_offs < HEAD_SIZE
    key_ptr = key_cache_ptr + (page * cache_stride_block)[:, None]
    dtype: tl.constexpr = query_ptr.dtype.element_ty
    score = tl.zeros([CANDIDATES], tl.float32)
    for part in tl.static_range(ROW_PARTS):
        row_offs = part * ROWS + tl.arange(0, ROWS)
        row_mask = row_offs < num_rows
        log_mass = tl.load(log_mass_ptr + out_row * MAX_ROWS + row_offs, mask=row_mask, other=0.0)
        log_mass = tl.where(row_mask, log_mass * LOG2E, float("inf"))  # no row, no share
        query_row_ptr = (
            query_ptr
            + (first_row + row_offs // GROUP).to(tl.int64) * query_stride_token
            + (head_idx * GROUP + row_offs % GROUP) * query_stride_head
        )[:, None]
        if HALF > 0:
            mask = row_mask[:, None] & half_mask[None, :]
            at = source_channel(half_offs, HALF, INTERLEAVED)[None, :]
            query_first = tl.load(query_row_ptr + at, mask=mask, other=0.0)
            at = source_channel(half_offs + HALF, HALF, INTERLEAVED)[None, :]
            query_second = tl.load(query_row_ptr + at, mask=mask, other=0.0)
        if 2 * HALF < HEAD_SIZE:
            mask = row_mask[:, None] & rest_mask[None, :]
            query_rest = tl.load(query_row_ptr + rest_offs[None, :], mask=mask, other=0.0)
        share = tl.zeros([ROWS, CANDIDATES], tl.float32)
        for offset in tl.range(0, BLOCK_SIZE, num_stages=STAGES):
            if HALF > 0:
                angle_ptr = cos_sin_ptr + offset * (2 * HALF) + half_offs
                cos = tl.load(angle_ptr, mask=half_mask, other=0.0)[None, :] * query_scale
                sin = tl.load(angle_ptr + HALF, mask=half_mask, other=0.0)[None, :] * query_scale
                turned_first = (query_first * cos - query_second * sin).to(dtype)
                turned_second = (query_second * cos + query_first * sin).to(dtype)
                row = key_ptr + offset * HEAD_SIZE + half_offs[None, :]
                if HALF == PAD_HALF:
                    first = tl.load(row)
                    second = tl.load(row + HALF)
                else:
                    first = tl.load(row, mask=half_mask[None, :], other=0.0)
                    second = tl.load(row + HALF, mask=half_mask[None, :], other=0.0)
                logits = tl.dot(turned_first, tl.trans(first.to(dtype)))
                logits = tl.dot(turned_second, tl.trans(second.to(dtype)), logits)
            if 2 * HALF < HEAD_SIZE:
                rest = tl.load(
                    key_ptr + offset * HEAD_SIZE + rest_offs[None, :],
                    mask=rest_mask[None, :],
                    other=0.0,
                ).to(dtype)
                if HALF > 0:
                    logits = tl.dot(query_rest, tl.trans(rest), logits)
                else:
                    logits = tl.dot(query_rest, tl.trans(rest))
            if HAS_CAP:
                logits = cap_logits(logits * scale, soft_cap) * LOG2E
            else:
                logits = logits * (scale * LOG2E)
            share += tl.exp2(tl.minimum(logits - log_mass[:, None], 80.0))
        score += tl.sum(tl.minimum(share, 1.0), axis=0)
    tl.store(score_ptr, tl.where(here, score, -1.0), mask=candidate_mask)


def refine_scores(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    candidates: Tensor,
    log_mass: Tensor,
    rotary: Rotary,
    scale: float,
    soft_cap: float = 0.0,
) -> Tensor:
    """The candidates' shares from their keys instead of their summaries.

    query       [num_tokens, num_heads, head_size] bf16 | fp16, not rotated
    candidates  [num_tiles, num_kv_heads, n] int32 block ids; negative: none
    log_mass    [num_tiles, num_kv_heads, max_length * group] fp32, of score_blocks
    returns     [num_tiles, num_kv_heads, n] fp32; negative where there is no candidate
    """
    num_kv_heads, block_size, head_size = pages.key.shape[1:]
    group = query.shape[1] // num_kv_heads
    num_tiles, _, num_candidates = candidates.shape
    max_rows = tiles.max_length * group
    rows = min(max(triton.next_power_of_2(max_rows), 16), 128)
    score = torch.empty(candidates.shape, dtype=torch.float32, device=query.device)
    arguments = (
        query,
        pages.key,
        block_table,
        *tiles[:3],
        candidates,
        log_mass,
        rotary.cos_sin,
        score,
        scale * pages.key_scale,
        rotary.query_scale,
        soft_cap,
        num_candidates,
    )
    strides = (
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        pages.key.stride(0),
        pages.key.stride(1),
    )
    single = tiles.max_length == 1
    at_once, warps, stages, wanted = _tile_sizes(single, rows, head_size, block_size)
    fixed = {
        "HEAD_SIZE": head_size,
        "HALF": rotary.half,
        "INTERLEAVED": rotary.interleaved,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "MAX_ROWS": max_rows,
        "ROWS": rows,
        "CANDIDATES": at_once,
        "HAS_CAP": soft_cap > 0,
        "PAD_HALF": max(triton.next_power_of_2(rotary.half), 16),
        "PAD_REST": max(triton.next_power_of_2(head_size - 2 * rotary.half), 16),
        "STAGES": stages,
        "num_warps": warps,
    }
    parts = math.ceil(num_candidates / at_once)
    if not single:
        _refine_offsets_kernel[(num_tiles, num_kv_heads, parts)](*arguments, *strides, **fixed)
        return score
    splits = min(parts, max(1, wanted // (num_tiles * num_kv_heads)))
    _refine_blocks_kernel[(num_tiles, num_kv_heads, splits)](*arguments, splits, *strides, **fixed)
    return score


def _tile_sizes(single: bool, rows: int, head_size: int, block_size: int) -> tuple[int, ...]:
    """Candidates per step, warps, stages, and programs to aim at, from a sweep on an H200."""
    if single:
        return max(64 // block_size, 1), 2, 1, 2112
    return 64, 8 if rows > 64 else 4, 2 if head_size > 128 else 3, 0
