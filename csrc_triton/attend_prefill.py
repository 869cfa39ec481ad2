"""attend for tiles of many queries: keys are rotated to their slot, once for the tile's group."""

import math

import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Pages, Rotary, Scope, Tiles
from csrc_triton.primitives import LOG2E, cap_logits, source_channel, tile_slots


@triton.jit
def _attend_tile_kernel(
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
    sink_ptr,  # [num_heads], or null
    out_ptr,  # [num_tokens, num_heads, head_size]
    scale,  # of the logits, times the keys' scale
    value_scale,
    query_scale,
    soft_cap,
    query_stride_token,
    query_stride_head,
    out_stride_token,
    out_stride_head,
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
    ROW_PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The last tiles of a step see the most; starting with them evens out the end.
    tile_idx = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64)
    row_part = (tile_idx % ROW_PARTS).to(tl.int32)
    tile_idx = tile_idx // ROW_PARTS
    head_idx = tl.program_id(1)
    row_offs = row_part * ROWS + tl.arange(0, ROWS)
    row_mask = row_offs < tl.load(length_ptr + tile_idx) * GROUP
    if row_part * ROWS >= tl.load(length_ptr + tile_idx) * GROUP:
        return
    first_position = tl.load(position_ptr + tile_idx)
    block_idx = first_position // BLOCK_SIZE
    num_global, num_recalled, local = tile_slots(
        block_idx, BLOCK_SIZE, GLOBAL, RECALL, LOCAL, DENSE, WINDOW
    )
    num_slots = num_global + num_recalled + block_idx - local + 1
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    recalled_base = recalled_ptr + (tile_idx * tl.num_programs(1) + head_idx) * RECALL
    position = first_position + row_offs // GROUP

    slot_offs = tl.arange(0, BLOCK_SIZE)
    half_offs = tl.arange(0, PAD_HALF)
    half_mask = half_offs < HALF
    rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
    rest_mask = rest_offs < HEAD_SIZE
    head_offs = tl.arange(0, PAD_HEAD)
    head_mask = head_offs < HEAD_SIZE
    row = (tl.load(row_ptr + tile_idx) + row_offs // GROUP).to(tl.int64)
    head = head_idx * GROUP + row_offs % GROUP
    query_row_ptr = (query_ptr + row * query_stride_token + head * query_stride_head)[:, None]
    dtype = query_ptr.dtype.element_ty
    if HALF > 0:
        mask = row_mask[:, None] & half_mask[None, :]
        at = source_channel(half_offs, HALF, INTERLEAVED)[None, :]
        first = tl.load(query_row_ptr + at, mask=mask, other=0.0).to(tl.float32) * query_scale
        at = source_channel(half_offs + HALF, HALF, INTERLEAVED)[None, :]
        second = tl.load(query_row_ptr + at, mask=mask, other=0.0).to(tl.float32) * query_scale
        own = (num_slots - 1) * BLOCK_SIZE + position % BLOCK_SIZE
        angle_ptr = cos_sin_ptr + own[:, None].to(tl.int64) * (2 * HALF) + half_offs[None, :]
        cos = tl.load(angle_ptr, mask=mask, other=0.0)
        sin = tl.load(angle_ptr + HALF, mask=mask, other=0.0)
        query_first = (first * cos - second * sin).to(dtype)
        query_second = (second * cos + first * sin).to(dtype)
    if 2 * HALF < HEAD_SIZE:
        mask = row_mask[:, None] & rest_mask[None, :]
        query_rest = tl.load(query_row_ptr + rest_offs[None, :], mask=mask, other=0.0)

    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PAD_HEAD], tl.float32)
    for slot in tl.range(0, num_slots, num_stages=STAGES):
        block = tl.where(slot < num_global, slot, local + slot - num_global - num_recalled)
        is_recalled = (slot >= num_global) & (slot < num_global + num_recalled)
        named = tl.load(recalled_base + slot - num_global, mask=is_recalled, other=0)
        block = tl.where(is_recalled, named, block)
        page = tl.load(table_ptr + block).to(tl.int64)
        page_offs = page * cache_stride_block + head_idx * cache_stride_head
        key_ptr = key_cache_ptr + page_offs + slot_offs[:, None] * HEAD_SIZE
        logits = tl.zeros([ROWS, BLOCK_SIZE], tl.float32)
        if HALF > 0:
            slot_angle_ptr = cos_sin_ptr + slot * (BLOCK_SIZE * 2 * HALF) + half_offs
            slot_cos = tl.load(slot_angle_ptr, mask=half_mask, other=0.0)[None, :]
            slot_sin = tl.load(slot_angle_ptr + HALF, mask=half_mask, other=0.0)[None, :]
            key_first = tl.load(key_ptr + half_offs[None, :], mask=half_mask[None, :], other=0.0)
            key_second = tl.load(
                key_ptr + HALF + half_offs[None, :], mask=half_mask[None, :], other=0.0
            )
            wide_first = key_first.to(tl.float32)
            wide_second = key_second.to(tl.float32)
            turned = (wide_first * slot_cos - wide_second * slot_sin).to(dtype)
            logits = tl.dot(query_first, tl.trans(turned), logits)
            turned = (wide_second * slot_cos + wide_first * slot_sin).to(dtype)
            logits = tl.dot(query_second, tl.trans(turned), logits)
        if 2 * HALF < HEAD_SIZE:
            key_rest = tl.load(key_ptr + rest_offs[None, :], mask=rest_mask[None, :], other=0.0)
            logits = tl.dot(query_rest, tl.trans(key_rest.to(dtype)), logits)
        logits = logits * scale
        if HAS_CAP:
            logits = cap_logits(logits, soft_cap)
        key_at = block * BLOCK_SIZE + slot_offs
        written = key_at < first_position + tl.load(length_ptr + tile_idx)
        seen = key_at[None, :] <= position[:, None]
        if WINDOW > 0:
            seen = seen & (key_at[None, :] > position[:, None] - WINDOW)
        logits = tl.where(seen, logits * LOG2E, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, axis=1))
        weight = tl.exp2(logits - new_best[:, None])
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.sum(weight, axis=1)
        # A page's unwritten rows may hold anything, nan too: keep them out of the product.
        value_ptr = value_cache_ptr + page_offs + slot_offs[:, None] * HEAD_SIZE
        value = tl.load(
            value_ptr + head_offs[None, :], mask=written[:, None] & head_mask[None, :], other=0.0
        )
        acc = tl.dot(weight.to(dtype), value.to(dtype), acc * rescale[:, None])
        best = new_best
    if HAS_SINKS:
        sink = tl.load(sink_ptr + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
        new_best = tl.maximum(best, sink)
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.exp2(sink - new_best)
        acc = acc * rescale[:, None]
    acc = acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
    at = row * out_stride_token + head * out_stride_head
    tl.store(
        out_ptr + at[:, None] + head_offs[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_mask[:, None] & head_mask[None, :],
    )


def attend_prefill(
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
    """Causal attention of a tile's queries over [global | recalled | local].

    query     [num_tokens, num_heads, head_size] bf16 | fp16, not rotated
    recalled  [num_tiles, num_kv_heads, recall_blocks] int32, ascending
    sinks     [num_heads] or None
    out       [num_tokens, num_heads, head_size]: only the tiles' rows are written
    """
    num_kv_heads, block_size, head_size = pages.key.shape[1:]
    group = query.shape[1] // num_kv_heads
    max_rows = tiles.max_length * group
    rows = min(max(triton.next_power_of_2(max_rows), 16), 128)
    row_parts = math.ceil(max_rows / rows)
    _attend_tile_kernel[(tiles.row.shape[0] * row_parts, num_kv_heads)](
        query,
        pages.key,
        pages.value,
        block_table,
        *tiles[:4],
        recalled,
        rotary.cos_sin,
        sinks,
        out,
        scale * pages.key_scale,
        pages.value_scale,
        rotary.query_scale,
        soft_cap,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
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
        ROW_PARTS=row_parts,
        ROWS=rows,
        HAS_CAP=soft_cap > 0,
        HAS_SINKS=sinks is not None,
        PAD_HALF=max(triton.next_power_of_2(rotary.half), 16),
        PAD_REST=max(triton.next_power_of_2(head_size - 2 * rotary.half), 16),
        PAD_HEAD=triton.next_power_of_2(head_size),
        STAGES=3 if head_size <= 128 else 2,
        num_warps=8 if rows > 64 else 4,
    )
