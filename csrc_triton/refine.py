"""refine_scores: the candidates' shares of the softmax, from their keys.

q.k is R(i)q . R(i)k, and the cache holds R(i)k. A program takes the keys of one or a few offsets
i from many blocks at a time, so that queries are turned once for all of these and keys go
straight from the page into the product. A product has 16 rows at least: what a single query's
group leaves empty is filled with the same queries turned to the next offsets.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Pages, Rotary, Tiles
from csrc_triton.primitives import (
    LOG2E,
    cap_logits,
    early_launch,
    load_rows,
    row_strides,
    turn_rows,
    wait_for_previous,
)


@triton.jit
def _refine_scores_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    row_ptr,
    length_ptr,
    candidate_ptr,  # [num_tiles, num_kv_heads or 1, num_candidates]
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
    candidate_stride_tile,
    candidate_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    OFFSETS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    out_row = tile_idx * tl.num_programs(1) + head_idx
    num_rows = tl.load(length_ptr + tile_idx) * GROUP
    first_row = tl.load(row_ptr + tile_idx)
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    wait_for_previous(EARLY)
    first_candidate = tl.program_id(2) * CANDIDATES
    candidate_offs = first_candidate + tl.arange(0, CANDIDATES)
    candidate_mask = candidate_offs < num_candidates
    candidate_ptr += tile_idx * candidate_stride_tile + head_idx * candidate_stride_head
    score_ptr += out_row * num_candidates + candidate_offs
    candidate = tl.load(candidate_ptr + candidate_offs, mask=candidate_mask, other=-1)
    here = (candidate >= 0) & (num_rows > 0)
    if tl.max(here.to(tl.int32)) == 0:
        tl.store(score_ptr, tl.full([CANDIDATES], -1.0, tl.float32), mask=candidate_mask)
        return

    # lanes are (offset, row), keys (candidate, offset); only what has one offset belongs together
    lane = tl.arange(0, OFFSETS * ROWS)
    key = tl.arange(0, CANDIDATES * OFFSETS)
    belongs = (lane // ROWS)[:, None] == (key % OFFSETS)[None, :]
    key_candidate = first_candidate + key // OFFSETS
    mask = key_candidate < num_candidates
    key_candidate = tl.load(candidate_ptr + key_candidate, mask=mask, other=-1)
    page = tl.load(table_ptr + key_candidate, mask=key_candidate >= 0, other=0).to(tl.int64)
    channel_offs = tl.arange(0, PAD_HEAD)
    channel_mask = (channel_offs < HEAD_SIZE)[None, :]
    key_ptr = key_cache_ptr + head_idx.to(tl.int64) * cache_stride_head
    key_ptr += (page * cache_stride_block + key % OFFSETS * HEAD_SIZE)[:, None]
    key_ptr += channel_offs[None, :]

    score = tl.zeros([CANDIDATES], tl.float32)
    for first_of_part in tl.static_range(0, MAX_ROWS, ROWS):
        row_offs = first_of_part + tl.arange(0, ROWS)
        query, partner = load_rows(
            query_ptr, first_row, head_idx, row_offs, num_rows,
            query_stride_token, query_stride_head, HEAD_SIZE, HALF, INTERLEAVED, GROUP, STEP,
            PAD_HEAD,
        )  # fmt: skip
        lane_row = first_of_part + lane % ROWS
        lane_mask = lane_row < num_rows
        log_mass = tl.load(log_mass_ptr + out_row * MAX_ROWS + lane_row, mask=lane_mask, other=0.0)
        log_mass = tl.where(lane_mask, log_mass * LOG2E, float("inf"))  # no row, no share
        share = tl.zeros([OFFSETS * ROWS, CANDIDATES * OFFSETS], tl.float32)
        for offset in tl.range(0, BLOCK_SIZE, OFFSETS, num_stages=STAGES):
            turned = turn_rows(
                query, partner, offset + tl.arange(0, OFFSETS), cos_sin_ptr, query_scale,
                HALF, ROWS, OFFSETS, PAD_HEAD,
            )  # fmt: skip
            if HEAD_SIZE == PAD_HEAD:
                keys = tl.load(key_ptr + offset * HEAD_SIZE)
            else:
                keys = tl.load(key_ptr + offset * HEAD_SIZE, mask=channel_mask, other=0.0)
            logits = tl.dot(turned, tl.trans(keys.to(turned.dtype)))
            if HAS_CAP:
                logits = cap_logits(logits * scale, soft_cap) * LOG2E
            else:
                logits = logits * (scale * LOG2E)
            share += tl.exp2(logits - log_mass[:, None])
        if OFFSETS > 1:
            share = tl.reshape(tl.where(belongs, share, 0.0), [OFFSETS, ROWS, CANDIDATES, OFFSETS])
            share = tl.sum(tl.sum(share, axis=3), axis=0)
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
    candidates  [num_tiles, num_kv_heads or 1, n] int32 block ids; negative: none
    log_mass    [num_tiles, num_kv_heads, max_length * group] fp32, of score_blocks
    returns     [num_tiles, num_kv_heads, n] fp32; negative where there is no candidate
    """
    num_kv_heads, block_size, head_size = pages.key.shape[1:]
    group = query.shape[1] // num_kv_heads
    num_tiles, _, num_candidates = candidates.shape
    max_rows = tiles.max_length * group
    rows = min(triton.next_power_of_2(max_rows), 128)
    at_once, warps, stages = _tile_sizes(rows, head_size)
    shape = (num_tiles, num_kv_heads, num_candidates)
    score = torch.empty(shape, dtype=torch.float32, device=query.device)
    grid = (num_tiles, num_kv_heads, triton.cdiv(num_candidates, at_once))
    _refine_scores_kernel[grid](
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
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        pages.key.stride(0),
        pages.key.stride(1),
        *row_strides(candidates),
        HEAD_SIZE=head_size,
        HALF=rotary.half,
        INTERLEAVED=rotary.interleaved,
        GROUP=group,
        STEP=tiles.step,
        BLOCK_SIZE=block_size,
        MAX_ROWS=max_rows,
        ROWS=rows,
        OFFSETS=max(16 // rows, 1),
        CANDIDATES=at_once,
        HAS_CAP=soft_cap > 0,
        PAD_HEAD=max(triton.next_power_of_2(head_size), 16),
        STAGES=stages,
        num_warps=warps,
        **early_launch(query.device),
    )
    return score


def _tile_sizes(rows: int, head_size: int) -> tuple[int, int, int]:
    """Candidates at once, warps and stages, from a sweep on an H200."""
    if rows <= 16:
        return 16, 2 if head_size <= 128 else 4, 3
    if rows <= 64:
        return 128 if head_size <= 128 else 64, 4, 2
    return 64, 8, 2 if head_size > 128 else 3
