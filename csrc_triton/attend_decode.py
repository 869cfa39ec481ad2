"""attend for tiles of one query: the query is rotated to each slot, keys stay as they are.

The scope is split over programs; a second kernel merges their softmax states.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Pages, Rotary, Scope, Tiles
from csrc_triton.primitives import LOG2E, cap_logits, source_channel, tile_slots


@triton.jit
def _attend_slots_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache_ptr,
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    row_ptr,
    length_ptr,
    position_ptr,
    recalled_ptr,  # [num_tiles, num_kv_heads, recall_blocks]
    cos_sin_ptr,  # [num_positions, 2, half]
    partial_ptr,  # [num_tiles, num_kv_heads, SPLITS, PAD_GROUP, head_size]
    log_mass_ptr,  # [num_tiles, num_kv_heads, SPLITS, PAD_GROUP] log2
    scale,  # of the logits, times the keys' scale
    query_scale,
    soft_cap,
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
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    DENSE: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    PAD_GROUP: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    split_idx = tl.program_id(2)
    if tl.load(length_ptr + tile_idx) == 0:
        return
    out_row = tile_idx * tl.num_programs(1) + head_idx
    position = tl.load(position_ptr + tile_idx)
    block_idx = position // BLOCK_SIZE
    num_global, num_recalled, local = tile_slots(
        block_idx, BLOCK_SIZE, GLOBAL, RECALL, LOCAL, DENSE, WINDOW
    )
    num_slots = num_global + num_recalled + block_idx - local + 1
    own = (num_slots - 1) * BLOCK_SIZE + position % BLOCK_SIZE
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride

    group_offs = tl.arange(0, PAD_GROUP)
    group_mask = group_offs < GROUP
    slot_offs = tl.arange(0, BLOCK_SIZE)
    half_offs = tl.arange(0, PAD_HALF)
    half_mask = half_offs < HALF
    rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
    rest_mask = rest_offs < HEAD_SIZE
    head_offs = tl.arange(0, PAD_HEAD)
    head_mask = head_offs < HEAD_SIZE
    query_row_ptr = (
        query_ptr
        + tl.load(row_ptr + tile_idx).to(tl.int64) * query_stride_token
        + (head_idx * GROUP + group_offs) * query_stride_head
    )[:, None]
    dtype = query_ptr.dtype.element_ty
    if HALF > 0:
        mask = group_mask[:, None] & half_mask[None, :]
        at = source_channel(half_offs, HALF, INTERLEAVED)[None, :]
        first = tl.load(query_row_ptr + at, mask=mask, other=0.0).to(tl.float32) * query_scale
        at = source_channel(half_offs + HALF, HALF, INTERLEAVED)[None, :]
        second = tl.load(query_row_ptr + at, mask=mask, other=0.0).to(tl.float32) * query_scale
    if 2 * HALF < HEAD_SIZE:
        mask = group_mask[:, None] & rest_mask[None, :]
        query_rest = tl.load(query_row_ptr + rest_offs[None, :], mask=mask, other=0.0)

    per_split = tl.cdiv(num_slots, SPLITS)
    start = split_idx * per_split
    end = tl.minimum(start + per_split, num_slots)
    best = tl.full([PAD_GROUP], -1e30, tl.float32)
    total = tl.zeros([PAD_GROUP], tl.float32)
    acc = tl.zeros([PAD_GROUP, PAD_HEAD], tl.float32)
    for slot in tl.range(start, end, num_stages=STAGES):
        block = tl.where(slot < num_global, slot, local + slot - num_global - num_recalled)
        is_recalled = (slot >= num_global) & (slot < num_global + num_recalled)
        named = tl.load(
            recalled_ptr + out_row * RECALL + slot - num_global, mask=is_recalled, other=0
        )
        block = tl.where(is_recalled, named, block)
        page = tl.load(table_ptr + block).to(tl.int64)
        page_offs = page * cache_stride_block + head_idx * cache_stride_head
        key_ptr = key_cache_ptr + page_offs + slot_offs[:, None] * HEAD_SIZE
        logits = tl.zeros([PAD_GROUP, BLOCK_SIZE], tl.float32)
        if HALF > 0:
            angle_ptr = cos_sin_ptr + (own - slot * BLOCK_SIZE) * (2 * HALF)
            cos = tl.load(angle_ptr + half_offs, mask=half_mask, other=0.0)[None, :]
            sin = tl.load(angle_ptr + HALF + half_offs, mask=half_mask, other=0.0)[None, :]
            turned_first = (first * cos - second * sin).to(dtype)
            turned_second = (second * cos + first * sin).to(dtype)
            key_first = tl.load(key_ptr + half_offs[None, :], mask=half_mask[None, :], other=0.0)
            logits = tl.dot(turned_first, tl.trans(key_first.to(dtype)), logits)
            key_second = tl.load(
                key_ptr + HALF + half_offs[None, :], mask=half_mask[None, :], other=0.0
            )
            logits = tl.dot(turned_second, tl.trans(key_second.to(dtype)), logits)
        if 2 * HALF < HEAD_SIZE:
            key_rest = tl.load(key_ptr + rest_offs[None, :], mask=rest_mask[None, :], other=0.0)
            logits = tl.dot(query_rest, tl.trans(key_rest.to(dtype)), logits)
        logits = logits * scale
        if HAS_CAP:
            logits = cap_logits(logits, soft_cap)
        key_at = block * BLOCK_SIZE + slot_offs
        seen = key_at <= position
        if WINDOW > 0:
            seen = seen & (key_at > position - WINDOW)
        logits = tl.where(seen[None, :], logits * LOG2E, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, axis=1))
        weight = tl.exp2(logits - new_best[:, None])
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.sum(weight, axis=1)
        # A page's unwritten rows may hold anything, nan too: keep them out of the product.
        value_ptr = value_cache_ptr + page_offs + slot_offs[:, None] * HEAD_SIZE
        value = tl.load(
            value_ptr + head_offs[None, :], mask=seen[:, None] & head_mask[None, :], other=0.0
        )
        acc = tl.dot(weight.to(dtype), value.to(dtype), acc * rescale[:, None])
        best = new_best
    part_row = out_row * SPLITS + split_idx
    tl.store(
        log_mass_ptr + part_row * PAD_GROUP + group_offs,
        tl.where(total > 0, best + tl.log2(total), -1e30),
    )
    at = (part_row * PAD_GROUP + group_offs)[:, None] * HEAD_SIZE + head_offs[None, :]
    tl.store(
        partial_ptr + at,
        acc / tl.where(total > 0, total, 1.0)[:, None],
        mask=group_mask[:, None] & head_mask[None, :],
    )


@triton.jit
def _merge_splits_kernel(
    partial_ptr,  # [num_tiles, num_kv_heads, SPLITS, PAD_GROUP, head_size]
    log_mass_ptr,  # [num_tiles, num_kv_heads, SPLITS, PAD_GROUP] log2
    row_ptr,  # [num_tiles]
    length_ptr,
    sink_ptr,  # [num_heads], or null
    out_ptr,  # [num_tokens, num_heads, head_size]
    value_scale,
    out_stride_token,
    out_stride_head,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PAD_GROUP: tl.constexpr,
    PAD_HEAD: tl.constexpr,
):
    tile_idx = tl.program_id(0).to(tl.int64)
    num_heads = tl.num_programs(1)
    head_idx = tl.program_id(1)  # a query head
    if tl.load(length_ptr + tile_idx) == 0:
        return
    out_row = tile_idx * (num_heads // GROUP) + head_idx // GROUP
    split_offs = tl.arange(0, SPLITS)
    head_offs = tl.arange(0, PAD_HEAD)
    part_row = (out_row * SPLITS + split_offs) * PAD_GROUP + head_idx % GROUP
    log_mass = tl.load(log_mass_ptr + part_row)
    best = tl.max(log_mass, axis=0)
    if HAS_SINKS:
        sink = tl.load(sink_ptr + head_idx).to(tl.float32) * LOG2E
        best = tl.maximum(best, sink)
    weight = tl.exp2(log_mass - best)
    total = tl.sum(weight, axis=0)
    if HAS_SINKS:
        total += tl.exp2(sink - best)
    partial = tl.load(
        partial_ptr + part_row[:, None] * HEAD_SIZE + head_offs[None, :],
        mask=(head_offs < HEAD_SIZE)[None, :],
        other=0.0,
    )
    merged = tl.sum(partial * weight[:, None], axis=0) / total * value_scale
    row = tl.load(row_ptr + tile_idx).to(tl.int64)
    at = row * out_stride_token + head_idx * out_stride_head + head_offs
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=head_offs < HEAD_SIZE)


def attend_decode(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    recalled: Tensor,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    out: Tensor,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> None:
    """Causal attention of single queries over [global | recalled | local].

    query     [num_tokens, num_heads, head_size] bf16 | fp16, not rotated
    tiles     max_length 1
    recalled  [num_tiles, num_kv_heads, recall_blocks] int32, ascending
    sinks     [num_heads] or None
    out       [num_tokens, num_heads, head_size]: only the tiles' rows are written
    """
    num_kv_heads, block_size, head_size = pages.key.shape[1:]
    num_tiles, num_heads = tiles.row.shape[0], query.shape[1]
    group = num_heads // num_kv_heads
    pad_group = max(triton.next_power_of_2(group), 16)
    splits = min(triton.next_power_of_2(max(1, 264 // (num_tiles * num_kv_heads))), 64)
    shape = (num_tiles, num_kv_heads, splits, pad_group)
    partial = torch.empty((*shape, head_size), dtype=torch.float32, device=query.device)
    log_mass = torch.empty(shape, dtype=torch.float32, device=query.device)
    _attend_slots_kernel[(num_tiles, num_kv_heads, splits)](
        query,
        pages.key,
        pages.value,
        block_table,
        *tiles[:4],
        recalled,
        rotary.cos_sin,
        partial,
        log_mass,
        scale * pages.key_scale,
        rotary.query_scale,
        soft_cap,
        query.stride(0),
        query.stride(1),
        block_table.stride(0),
        pages.key.stride(0),
        pages.key.stride(1),
        HEAD_SIZE=head_size,
        HALF=rotary.half,
        INTERLEAVED=rotary.interleaved,
        GROUP=group,
        BLOCK_SIZE=block_size,
        GLOBAL=scope.global_blocks,
        RECALL=scope.recall_blocks,
        LOCAL=scope.local_blocks,
        DENSE=scope.dense_blocks,
        WINDOW=scope.window,
        SPLITS=splits,
        HAS_CAP=soft_cap > 0,
        PAD_GROUP=pad_group,
        PAD_HALF=max(triton.next_power_of_2(rotary.half), 16),
        PAD_REST=max(triton.next_power_of_2(head_size - 2 * rotary.half), 16),
        PAD_HEAD=triton.next_power_of_2(head_size),
        STAGES=3,
        num_warps=4,
    )
    _merge_splits_kernel[(num_tiles, num_heads)](
        partial,
        log_mass,
        tiles.row,
        tiles.length,
        sinks,
        out,
        pages.value_scale,
        out.stride(0),
        out.stride(1),
        HEAD_SIZE=head_size,
        GROUP=group,
        SPLITS=splits,
        HAS_SINKS=sinks is not None,
        PAD_GROUP=pad_group,
        PAD_HEAD=triton.next_power_of_2(head_size),
        num_warps=4,
    )
