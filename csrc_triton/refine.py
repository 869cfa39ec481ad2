"""refine_scores: the candidates' shares of the softmax, from keys.

q.k is R(i)q . R(i)k, and the cache holds R(i)k. A program takes the keys of one or a few offsets
i from many blocks at a time, so that queries are turned once for all of these and keys go
straight from the page into the product. A product has 16 rows at least: what a single query's
group leaves empty is filled with the same queries turned to the next offsets.

The blocks are the candidates, then the global ones, then probes: equally spaced blocks that tell
what all the others weigh. A second kernel adds them up to each row's denominator.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import PROBES, Pages, Rotary, Scope, Tiles
from csrc_triton.primitives import (
    LOG2E,
    add_power,
    beside_cache,
    cap_logits,
    early_launch,
    load_rows,
    row_strides,
    selecting_tile,
    slot_sizes,
    turn_rows,
    wait_for_previous,
)

SHARE_ROWS = 8  # of one tile and head at once, in the second kernel


@triton.jit
def _probe_distance(local, GLOBAL: tl.constexpr, PROBES: tl.constexpr):
    """Blocks from one probe to the next."""
    return tl.maximum(tl.cdiv(local - GLOBAL, PROBES), 1)


@triton.jit
def _listed_block(
    entry, candidate_ptr, num_candidates, selects, local, every,
    GLOBAL: tl.constexpr, PROBES: tl.constexpr,
):  # fmt: skip
    """The blocks of entries of the list [candidates | global | probes]; -1: none."""
    named = tl.load(candidate_ptr + entry, mask=entry < num_candidates, other=-1)
    beside = entry - num_candidates
    probe = GLOBAL + (beside - GLOBAL) * every
    fixed = tl.where(beside < GLOBAL, beside, probe)
    is_there = selects & (fixed < local) & (beside < GLOBAL + PROBES)
    return tl.where(beside < 0, tl.where(selects, named, -1), tl.where(is_there, fixed, -1))


@triton.jit
def _key_mass_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    row_ptr,
    length_ptr,
    position_ptr,
    dense_ptr,
    candidate_ptr,  # [num_tiles, num_kv_heads or 1, num_candidates], or null
    cos_sin_ptr,  # [num_positions, 2, half]
    mass_ptr,  # [num_tiles, num_kv_heads, MAX_ROWS, num_listed] log2
    scale,  # of the logits, times the keys' scale
    query_scale,
    soft_cap,
    num_candidates,
    num_listed,
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
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    PROBES: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCKS: tl.constexpr,
    EVERY_BLOCK: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    out_row = tile_idx * tl.num_programs(1) + head_idx
    if EVERY_BLOCK:  # for tiles that the kernel launched before this one may have computed
        wait_for_previous(EARLY)
    num_rows, selects, local = selecting_tile(
        tile_idx, length_ptr, position_ptr, dense_ptr, GROUP, BLOCK_SIZE, GLOBAL, RECALL, LOCAL
    )
    every = _probe_distance(local, GLOBAL, PROBES)
    first_row = tl.load(row_ptr + tile_idx)
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    if not EVERY_BLOCK:
        wait_for_previous(EARLY)
    first_entry = tl.program_id(2) * BLOCKS

    # lanes are (offset, row), keys (block, offset); only what has one offset belongs together
    lane = tl.arange(0, OFFSETS * ROWS)
    key = tl.arange(0, BLOCKS * OFFSETS)
    belongs = (lane // ROWS)[:, None] == (key % OFFSETS)[None, :]
    entry = first_entry + key // OFFSETS
    if EVERY_BLOCK:
        block = tl.where(selects & (entry < local), entry, -1)
    else:
        candidate_ptr += tile_idx * candidate_stride_tile + head_idx * candidate_stride_head
        block = _listed_block(
            entry, candidate_ptr, num_candidates, selects, local, every, GLOBAL, PROBES
        )
    if tl.max(block) < 0:
        return
    page = tl.load(table_ptr + block, mask=block >= 0, other=0).to(tl.int64)
    channel_offs = tl.arange(0, PAD_HEAD)
    channel_mask = (channel_offs < HEAD_SIZE)[None, :]
    key_ptr = key_cache_ptr + head_idx.to(tl.int64) * cache_stride_head
    key_ptr += (page * cache_stride_block + key % OFFSETS * HEAD_SIZE)[:, None]
    key_ptr += channel_offs[None, :]

    entry_offs = first_entry + tl.arange(0, BLOCKS)
    for first_of_part in tl.static_range(0, MAX_ROWS, ROWS):
        row_offs = first_of_part + tl.arange(0, ROWS)
        query, partner = load_rows(
            query_ptr, first_row, head_idx, row_offs, num_rows,
            query_stride_token, query_stride_head, HEAD_SIZE, HALF, INTERLEAVED, GROUP, STEP,
            PAD_HEAD,
        )  # fmt: skip
        query, partner = beside_cache(query, key_cache_ptr), beside_cache(partner, key_cache_ptr)
        best = tl.full([OFFSETS * ROWS, BLOCKS * OFFSETS], float("-inf"), tl.float32)
        mass = tl.zeros([OFFSETS * ROWS, BLOCKS * OFFSETS], tl.float32)
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
            best, mass = add_power(best, mass, logits)
        mass = best + tl.log2(mass)
        if OFFSETS > 1:
            mass = tl.where(belongs, mass, float("-inf"))
            mass = tl.reshape(mass, [OFFSETS, ROWS, BLOCKS, OFFSETS])
            best = tl.max(tl.max(mass, axis=3), axis=0)
            mass = tl.exp2(mass - best[None, :, :, None])
            mass = best + tl.log2(tl.sum(tl.sum(mass, axis=3), axis=0))
        at = (out_row * MAX_ROWS + row_offs)[:, None] * num_listed + entry_offs[None, :]
        is_there = (row_offs < num_rows)[:, None] & (entry_offs < num_listed)[None, :]
        tl.store(mass_ptr + at, mass, mask=is_there)


@triton.jit
def _refined_share_kernel(
    length_ptr,  # [num_tiles]
    position_ptr,
    dense_ptr,
    candidate_ptr,  # [num_tiles, num_kv_heads or 1, num_candidates]
    mass_ptr,  # [num_tiles, num_kv_heads, MAX_ROWS, num_listed] log2
    score_ptr,  # [num_tiles, num_kv_heads, num_candidates]
    num_candidates,
    num_listed,
    candidate_stride_tile,
    candidate_stride_head,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    PROBES: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    LISTED: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    out_row = tile_idx * tl.num_programs(1) + head_idx
    num_rows, selects, local = selecting_tile(
        tile_idx, length_ptr, position_ptr, dense_ptr, GROUP, BLOCK_SIZE, GLOBAL, RECALL, LOCAL
    )
    every = _probe_distance(local, GLOBAL, PROBES)
    wait_for_previous(EARLY)
    candidate_ptr += tile_idx * candidate_stride_tile + head_idx * candidate_stride_head
    entry_offs = tl.arange(0, LISTED)
    block = _listed_block(
        entry_offs, candidate_ptr, num_candidates, selects, local, every, GLOBAL, PROBES
    )
    # A probe stands for all that lie between it and the next, but for candidates: these stand for
    # themselves, and one that is probed, too, takes itself off what its probe stands for.
    is_probe = entry_offs >= num_candidates + GLOBAL
    is_probed = (entry_offs < num_candidates) & ((block - GLOBAL) % every == 0)
    stands_for = tl.where(is_probe, every, tl.where(is_probed, 1 - every, 1)).to(tl.float32)
    score = tl.zeros([LISTED], tl.float32)
    if selects:
        for first in range(0, MAX_ROWS, ROWS):
            row_offs = first + tl.arange(0, ROWS)
            at = (out_row * MAX_ROWS + row_offs)[:, None] * num_listed + entry_offs[None, :]
            mask = (row_offs < num_rows)[:, None] & (block >= 0)[None, :]
            mass = tl.load(mass_ptr + at, mask=mask, other=-1e30)
            mass = tl.exp2(mass - tl.max(mass, axis=1)[:, None])
            total = tl.sum(mass * stands_for[None, :], axis=1)
            share = tl.minimum(tl.where(mask, mass / total[:, None], 0.0), 1.0)
            score += tl.sum(share, axis=0)
    score_ptr += out_row * num_candidates + entry_offs
    tl.store(score_ptr, tl.where(block >= 0, score, -1.0), mask=entry_offs < num_candidates)


def key_mass(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    candidates: Tensor | None,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    soft_cap: float,
) -> Tensor:
    """log2 of the sum of e to the logits of the keys of each listed block, by row of the tile.

    candidates  [num_tiles, num_kv_heads or 1, n] int32 block ids; None: all blocks are listed
    returns     [num_tiles, num_kv_heads, max_length * group, num_listed] fp32, undefined where no
                block or row is
    """
    num_kv_heads, block_size, head_size = pages.key.shape[1:]
    group = query.shape[1] // num_kv_heads
    num_tiles, max_rows = len(tiles.row), tiles.max_length * group
    if candidates is None:
        num_candidates, strides = 0, (0, 0)
        num_listed = triton.cdiv(block_table.shape[1], 16) * 16  # one kernel for all lengths
    else:
        num_candidates, strides = candidates.shape[-1], row_strides(candidates)
        num_listed = num_candidates + scope.global_blocks + PROBES
    rows = min(triton.next_power_of_2(max_rows), 128)
    at_once, warps, stages = _tile_sizes(rows, head_size)
    mass = torch.empty(
        (num_tiles, num_kv_heads, max_rows, num_listed), dtype=torch.float32, device=query.device
    )
    grid = (num_tiles, num_kv_heads, triton.cdiv(num_listed, at_once))
    _key_mass_kernel[grid](
        query,
        pages.key,
        block_table,
        *tiles.columns,
        candidates,
        rotary.cos_sin,
        mass,
        scale * pages.key_scale,
        rotary.query_scale,
        soft_cap,
        num_candidates,
        num_listed,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        pages.key.stride(0),
        pages.key.stride(1),
        *strides,
        HEAD_SIZE=head_size,
        HALF=rotary.half,
        INTERLEAVED=rotary.interleaved,
        GROUP=group,
        STEP=tiles.step,
        BLOCK_SIZE=block_size,
        PROBES=PROBES,
        MAX_ROWS=max_rows,
        ROWS=rows,
        OFFSETS=max(16 // rows, 1),
        BLOCKS=at_once,
        EVERY_BLOCK=candidates is None,
        HAS_CAP=soft_cap > 0,
        PAD_HEAD=max(triton.next_power_of_2(head_size), 16),
        STAGES=stages,
        num_warps=warps,
        **slot_sizes(scope),
        **early_launch(query.device),
    )
    return mass


def refine_scores(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    candidates: Tensor,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    soft_cap: float = 0.0,
) -> Tensor:
    """The candidates' shares of the position-free softmax, from keys.

    query       [num_tokens, num_heads, head_size] bf16 | fp16, not rotated
    candidates  [num_tiles, num_kv_heads or 1, n] int32 block ids; negative: none
    returns     [num_tiles, num_kv_heads, n] fp32; negative where there is no candidate
    """
    mass = key_mass(query, pages, block_table, tiles, candidates, scope, rotary, scale, soft_cap)
    num_tiles, num_kv_heads, max_rows, num_listed = mass.shape
    num_candidates = candidates.shape[-1]
    shape = num_tiles, num_kv_heads, num_candidates
    score = torch.empty(shape, dtype=torch.float32, device=query.device)
    _refined_share_kernel[(num_tiles, num_kv_heads)](
        tiles.length,
        tiles.position,
        tiles.dense,
        candidates,
        mass,
        score,
        num_candidates,
        num_listed,
        *row_strides(candidates),
        GROUP=query.shape[1] // num_kv_heads,
        BLOCK_SIZE=pages.block_size,
        PROBES=PROBES,
        MAX_ROWS=max_rows,
        ROWS=min(triton.next_power_of_2(max_rows), SHARE_ROWS),
        LISTED=triton.next_power_of_2(num_listed),
        num_warps=4,
        **slot_sizes(scope),
        **early_launch(query.device),
    )
    return score


def _tile_sizes(rows: int, head_size: int) -> tuple[int, int, int]:
    """Blocks at once, warps and stages, from a sweep on an H200."""
    if rows <= 16:
        return 16, 2 if head_size <= 128 else 4, 3
    if rows <= 64:
        return (128, 4, 3) if head_size <= 128 else (64, 4, 2)
    return 64, 8, 2 if head_size > 128 else 3
