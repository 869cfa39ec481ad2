"""Attention of tiles of many queries: every key is turned to its slot on the way in.

One program holds the rows of a tile that share a KV head, so a key is loaded and turned once for
all of them.
"""

import triton
import triton.language as tl

from csrc_triton.primitives import (
    LOG2E,
    beside_cache,
    cap_logits,
    find_pages,
    finish_rows,
    source_channel,
    tile_slots,
    wait_for_previous,
)


@triton.jit
def _attend_keys(
    best, total, acc, query_first, query_second, query_rest, block, page, first_slot, num_slots,
    position, first_unwritten, cos_sin_ptr, bias_ptr, key_cache_ptr, value_cache_ptr, scale,
    soft_cap, cache_stride_block,
    HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, HAS_BIAS: tl.constexpr, MASKED: tl.constexpr, SLOTS: tl.constexpr,
    PAD_HALF: tl.constexpr, PAD_REST: tl.constexpr, PAD_HEAD: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One step of online softmax: the keys of SLOTS slots of the scope, from first_slot on."""
    KEYS: tl.constexpr = SLOTS * BLOCK_SIZE
    key = tl.arange(0, KEYS)
    row = (page * cache_stride_block + key % BLOCK_SIZE * HEAD_SIZE)[:, None]
    key_at = block * BLOCK_SIZE + key % BLOCK_SIZE
    inside = first_slot + key // BLOCK_SIZE < num_slots
    head_offs = tl.arange(0, PAD_HEAD)
    if HAS_BIAS:
        bias_ptr += (key % BLOCK_SIZE * HEAD_SIZE)[:, None]
    if HALF > 0:
        half_offs = tl.arange(0, PAD_HALF)
        half_mask = half_offs < HALF
        if HALF == PAD_HALF:
            first = tl.load(key_cache_ptr + row + half_offs[None, :])
            second = tl.load(key_cache_ptr + HALF + row + half_offs[None, :])
        else:
            at = key_cache_ptr + row + half_offs[None, :]
            first = tl.load(at, mask=half_mask[None, :], other=0.0)
            second = tl.load(at + HALF, mask=half_mask[None, :], other=0.0)
    if MASKED:
        # A page's unwritten rows may hold anything, nan too: keep them out of the product.
        written = inside & (key_at < first_unwritten)
        value_mask = written[:, None] & (head_offs < HEAD_SIZE)[None, :]
        value = tl.load(value_cache_ptr + row + head_offs[None, :], mask=value_mask, other=0.0)
    elif HEAD_SIZE == PAD_HEAD:
        value = tl.load(value_cache_ptr + row + head_offs[None, :])
    else:
        value_mask = (head_offs < HEAD_SIZE)[None, :]
        value = tl.load(value_cache_ptr + row + head_offs[None, :], mask=value_mask, other=0.0)

    if HALF > 0:
        slot = tl.minimum(first_slot + tl.arange(0, SLOTS), num_slots - 1)
        angle_ptr = cos_sin_ptr + (slot * (BLOCK_SIZE * 2 * HALF))[:, None, None]
        angle_ptr += half_offs[None, None, :]
        cos = tl.load(angle_ptr, mask=half_mask[None, None, :], other=0.0)
        sin = tl.load(angle_ptr + HALF, mask=half_mask[None, None, :], other=0.0)
        wide_first, wide_second = first.to(tl.float32), second.to(tl.float32)
        if HAS_BIAS:
            at = bias_ptr + half_offs[None, :]
            wide_first += tl.load(at, mask=half_mask[None, :], other=0.0)
            wide_second += tl.load(at + HALF, mask=half_mask[None, :], other=0.0)
        wide_first = tl.reshape(wide_first, [SLOTS, BLOCK_SIZE, PAD_HALF])
        wide_second = tl.reshape(wide_second, [SLOTS, BLOCK_SIZE, PAD_HALF])
        turned_first = (wide_first * cos - wide_second * sin).to(dtype)
        turned_second = (wide_second * cos + wide_first * sin).to(dtype)
        turned_first = tl.reshape(turned_first, [KEYS, PAD_HALF])
        turned_second = tl.reshape(turned_second, [KEYS, PAD_HALF])
        logits = tl.dot(query_first, tl.trans(turned_first))
        logits = tl.dot(query_second, tl.trans(turned_second), logits)
    if 2 * HALF < HEAD_SIZE:
        rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
        rest_mask = (rest_offs < HEAD_SIZE)[None, :]
        rest = tl.load(key_cache_ptr + row + rest_offs[None, :], mask=rest_mask, other=0.0)
        rest = rest.to(query_rest.dtype)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + rest_offs[None, :], mask=rest_mask, other=0.0)
            rest += bias.to(query_rest.dtype)
        rest = tl.trans(rest)
        if HALF > 0:
            logits = tl.dot(query_rest, rest, logits)
        else:
            logits = tl.dot(query_rest, rest)
    if HAS_CAP:
        logits = cap_logits(logits * scale, soft_cap) * LOG2E
    else:
        logits = logits * (scale * LOG2E)
    if MASKED:
        seen = inside[None, :] & (key_at[None, :] <= position[:, None])
        if WINDOW > 0:
            seen = seen & (key_at[None, :] > position[:, None] - WINDOW)
        logits = tl.where(seen, logits, float("-inf"))
    new_best = tl.maximum(best, tl.max(logits, axis=1))
    weight = tl.exp2(logits - new_best[:, None])
    rescale = tl.exp2(best - new_best)
    total = total * rescale + tl.sum(weight, axis=1)
    value = beside_cache(value, value_cache_ptr)
    acc = tl.dot(weight.to(value.dtype), value, acc * rescale[:, None])
    return new_best, total, acc


@triton.jit
def attend_tile_kernel(
    query_ptr,  # [num_tokens, num_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache_ptr,
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    row_ptr,
    length_ptr,
    position_ptr,
    dense_ptr,
    recalled_ptr,  # [num_tiles, num_kv_heads or 1, recall_blocks]
    cos_sin_ptr,  # [num_positions, 2, half]
    bias_ptr,  # [num_kv_heads, block_size or more, head_size], or null
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
    bias_stride_head,
    recalled_stride_tile,
    recalled_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    ROW_PARTS: tl.constexpr = (MAX_ROWS + ROWS - 1) // ROWS
    # The last tiles of a step see the most; starting with them evens out the end.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile_idx = (program // ROW_PARTS).to(tl.int64)
    row_offs = (program % ROW_PARTS) * ROWS + tl.arange(0, ROWS)
    head_idx = tl.program_id(1)
    length = tl.load(length_ptr + tile_idx)
    if (program % ROW_PARTS) * ROWS >= length * GROUP:
        return
    row_mask = row_offs < length * GROUP
    first_position = tl.load(position_ptr + tile_idx)
    block_idx = first_position // BLOCK_SIZE
    dense = tl.load(dense_ptr + tile_idx)
    num_global, num_recalled, local = tile_slots(
        block_idx, dense, BLOCK_SIZE, GLOBAL, RECALL, LOCAL, WINDOW
    )
    num_slots = num_global + num_recalled + block_idx - local + 1
    position = first_position + row_offs // GROUP
    # as beside_cache has it
    IS_FP8: tl.constexpr = key_cache_ptr.dtype.element_ty.primitive_bitwidth == 8
    dtype: tl.constexpr = tl.float16 if IS_FP8 else query_ptr.dtype.element_ty

    row = (tl.load(row_ptr + tile_idx) + row_offs // GROUP).to(tl.int64)
    head = head_idx * GROUP + row_offs % GROUP
    query_row_ptr = (query_ptr + row * query_stride_token + head * query_stride_head)[:, None]
    query_first = 0.0
    query_second = 0.0
    query_rest = 0.0
    if HALF > 0:
        half_offs = tl.arange(0, PAD_HALF)
        mask = row_mask[:, None] & (half_offs < HALF)[None, :]
        at = source_channel(half_offs, HALF, INTERLEAVED)[None, :]
        first = tl.load(query_row_ptr + at, mask=mask, other=0.0).to(tl.float32) * query_scale
        at = source_channel(half_offs + HALF, HALF, INTERLEAVED)[None, :]
        second = tl.load(query_row_ptr + at, mask=mask, other=0.0).to(tl.float32) * query_scale
        turn = (num_slots - 1) * BLOCK_SIZE + position % BLOCK_SIZE
        angle_ptr = cos_sin_ptr + (turn * (2 * HALF))[:, None] + half_offs[None, :]
        cos = tl.load(angle_ptr, mask=mask, other=0.0)
        sin = tl.load(angle_ptr + HALF, mask=mask, other=0.0)
        query_first = (first * cos - second * sin).to(dtype)
        query_second = (second * cos + first * sin).to(dtype)
    if 2 * HALF < HEAD_SIZE:
        rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
        mask = row_mask[:, None] & (rest_offs < HEAD_SIZE)[None, :]
        query_rest = tl.load(query_row_ptr + rest_offs[None, :], mask=mask, other=0.0)
        query_rest = beside_cache(query_rest, key_cache_ptr)

    # SLOTS at a time; only a window's first keys and the tile's own block need a mask.
    plain_end = (num_slots - 1) // SLOTS * SLOTS
    if WINDOW > 0:
        plain_end = 0
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    recalled_ptr += tile_idx * recalled_stride_tile + head_idx * recalled_stride_head
    key_cache_ptr += head_idx.to(tl.int64) * cache_stride_head
    value_cache_ptr += head_idx.to(tl.int64) * cache_stride_head
    if HAS_BIAS:
        bias_ptr += head_idx * bias_stride_head
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PAD_HEAD], tl.float32)
    key_slot = tl.arange(0, SLOTS * BLOCK_SIZE) // BLOCK_SIZE
    block, page = find_pages(
        key_slot, num_slots, num_global, num_recalled, local, recalled_ptr, table_ptr
    )
    for MASKED in tl.static_range(2):
        start = plain_end if MASKED else 0
        end = num_slots if MASKED else plain_end
        for first_slot in tl.range(start, end, SLOTS, num_stages=STAGES):
            next_block, next_page = find_pages(
                first_slot + SLOTS + key_slot, num_slots, num_global, num_recalled, local,
                recalled_ptr, table_ptr,
            )  # fmt: skip
            best, total, acc = _attend_keys(
                best, total, acc, query_first, query_second, query_rest, block, page,
                first_slot, num_slots, position, first_position + length, cos_sin_ptr, bias_ptr,
                key_cache_ptr, value_cache_ptr, scale, soft_cap, cache_stride_block,
                HEAD_SIZE, HALF, BLOCK_SIZE, WINDOW, HAS_CAP, HAS_BIAS, MASKED == 1, SLOTS,
                PAD_HALF, PAD_REST, PAD_HEAD, dtype,
            )  # fmt: skip
            block, page = next_block, next_page

    head_offs = tl.arange(0, PAD_HEAD)
    out_mask = row_mask[:, None] & (head_offs < HEAD_SIZE)[None, :]
    acc = finish_rows(best, total, acc, sink_ptr, head, row_mask, value_scale, HAS_SINKS)
    at = row * out_stride_token + head * out_stride_head
    acc = acc.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] + head_offs[None, :], acc, mask=out_mask)
