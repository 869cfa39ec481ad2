"""Attention of single queries: the scope is split over programs, and their results are merged.

Bound by reading the scope, so the queries turn and keys go straight from the page into the
product. A product has 16 rows at least: what a group leaves empty is filled with the same queries
turned to the next slots. Values of 8 bits are read as pairs of 16, which the instruction that
transposes on the way from shared memory takes; single bytes would be read one by one.
"""

import triton
import triton.language as tl

from csrc_triton.primitives import (
    LOG2E,
    beside_cache,
    cap_logits,
    find_pages,
    finish_rows,
    load_rows,
    tile_slots,
    turn_rows,
    wait_for_previous,
    widen_pairs,
)


@triton.jit(do_not_specialize=["splits"])
def attend_single_kernel(
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
    partial_ptr,  # [num_tiles, num_kv_heads, splits, group, head_size], or null
    log_mass_ptr,  # [num_tiles, num_kv_heads, splits, group] log2, or null
    splits,
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
    ROWS: tl.constexpr,
    SLOTS: tl.constexpr,
    MERGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    split_idx = tl.program_id(2)
    out_row = tile_idx * tl.num_programs(1) + head_idx
    length = tl.load(length_ptr + tile_idx)
    position = tl.load(position_ptr + tile_idx)
    row = tl.load(row_ptr + tile_idx)
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    block_idx = position // BLOCK_SIZE
    dense = tl.load(dense_ptr + tile_idx)
    num_global, num_recalled, local = tile_slots(
        block_idx, dense, BLOCK_SIZE, GLOBAL, RECALL, LOCAL, WINDOW
    )
    num_slots = num_global + num_recalled + block_idx - local + 1
    own = (num_slots - 1) * BLOCK_SIZE + position % BLOCK_SIZE
    per_split = tl.cdiv(tl.cdiv(num_slots, SLOTS), splits) * SLOTS
    start = split_idx * per_split
    end = tl.minimum(start + per_split, num_slots)
    recalled_ptr += tile_idx * recalled_stride_tile + head_idx * recalled_stride_head
    wait_for_previous(EARLY)
    if length == 0:
        return
    group_offs = tl.arange(0, ROWS)
    query, partner = load_rows(
        query_ptr, row, head_idx, group_offs, length * GROUP, query_stride_token,
        query_stride_head, HEAD_SIZE, HALF, INTERLEAVED, GROUP, 1, PAD_HEAD,
    )  # fmt: skip
    query, partner = beside_cache(query, key_cache_ptr), beside_cache(partner, key_cache_ptr)

    # lanes are (slot, row), keys (slot, offset); only what has one slot belongs together
    lane_slot = tl.arange(0, SLOTS * ROWS) // ROWS
    key = tl.arange(0, SLOTS * BLOCK_SIZE)
    key_slot = key // BLOCK_SIZE
    offset = key % BLOCK_SIZE
    belongs = lane_slot[:, None] == key_slot[None, :]
    slot_offs = tl.arange(0, SLOTS)
    head_offs = tl.arange(0, PAD_HEAD)
    head_mask = (head_offs < HEAD_SIZE)[None, :]
    key_cache_ptr += head_idx.to(tl.int64) * cache_stride_head
    value_cache_ptr += head_idx.to(tl.int64) * cache_stride_head
    if HAS_BIAS:
        bias_ptr += head_idx * bias_stride_head + (offset * HEAD_SIZE)[:, None] + head_offs[None, :]
    PAIRS: tl.constexpr = 2 if value_cache_ptr.dtype.element_ty.primitive_bitwidth == 8 else 1
    if PAIRS == 2:
        value_cache_ptr = value_cache_ptr.to(tl.pointer_type(tl.int16))
    value_offs = tl.arange(0, PAD_HEAD // PAIRS)
    value_mask = (value_offs < HEAD_SIZE // PAIRS)[None, :]
    if 2 * HALF == HEAD_SIZE:  # what scales all channels scales the logits
        scale *= query_scale
        query_scale = 1.0
    best = tl.full([SLOTS * ROWS], -1e30, tl.float32)
    total = tl.zeros([SLOTS * ROWS], tl.float32)
    acc = tl.zeros([SLOTS * ROWS, PAD_HEAD // PAIRS], tl.float32)
    if PAIRS == 2:  # acc has the even channels
        odd_acc = tl.zeros([SLOTS * ROWS, PAD_HEAD // 2], tl.float32)
    block, page = find_pages(
        start + key_slot, end, num_global, num_recalled, local, recalled_ptr, table_ptr
    )
    for first_slot in tl.range(start, end, SLOTS, num_stages=STAGES):
        at = (page * cache_stride_block + offset * HEAD_SIZE)[:, None] + head_offs[None, :]
        value_row = page * (cache_stride_block // PAIRS) + offset * (HEAD_SIZE // PAIRS)
        value_at = value_row[:, None] + value_offs[None, :]
        key_at = block * BLOCK_SIZE + offset
        seen = (first_slot + key_slot < end) & (key_at <= position)
        # a page's unwritten rows may hold anything, nan too: keep them out of the product
        if HEAD_SIZE == PAD_HEAD:
            keys = tl.load(key_cache_ptr + at)
            values = tl.load(value_cache_ptr + value_at, mask=seen[:, None], other=0)
        else:
            keys = tl.load(key_cache_ptr + at, mask=head_mask, other=0.0)
            values = tl.load(value_cache_ptr + value_at, mask=seen[:, None] & value_mask, other=0)
        block, page = find_pages(
            first_slot + SLOTS + key_slot, end, num_global, num_recalled, local, recalled_ptr,
            table_ptr,
        )  # fmt: skip
        # a query turns by what lies between its slot and the keys', which stay as they are
        turn = tl.maximum(own - (first_slot + slot_offs) * BLOCK_SIZE, 0)
        turned = turn_rows(
            query, partner, turn, cos_sin_ptr, query_scale, HALF, ROWS, SLOTS, PAD_HEAD
        )
        keys = keys.to(turned.dtype)
        if HAS_BIAS:
            keys += tl.load(bias_ptr, mask=head_mask, other=0.0).to(turned.dtype)
        logits = tl.dot(turned, tl.trans(keys))
        if HAS_CAP:
            logits = cap_logits(logits * scale, soft_cap) * LOG2E
        else:
            logits = logits * (scale * LOG2E)
        if WINDOW > 0:
            seen = seen & (key_at > position - WINDOW)
        logits = tl.where(belongs & seen[None, :], logits, float("-inf"))
        new_best = tl.maximum(best, tl.max(logits, axis=1))
        weight = tl.exp2(logits - new_best[:, None])
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.sum(weight, axis=1)
        weight = weight.to(turned.dtype)
        if PAIRS == 2:
            values, odd_values = widen_pairs(values)
            odd_acc = tl.dot(weight, odd_values, odd_acc * rescale[:, None])
        acc = tl.dot(weight, values, acc * rescale[:, None])
        best = new_best

    if PAIRS == 2:
        acc = tl.interleave(acc, odd_acc)
    if SLOTS > 1:
        lane_best = best
        best = tl.max(tl.reshape(best, [SLOTS, ROWS]), axis=0)
        same = tl.reshape(tl.broadcast_to(best[None, :], [SLOTS, ROWS]), [SLOTS * ROWS])
        rescale = tl.exp2(lane_best - same)
        total = tl.sum(tl.reshape(total * rescale, [SLOTS, ROWS]), axis=0)
        acc = tl.sum(tl.reshape(acc * rescale[:, None], [SLOTS, ROWS, PAD_HEAD]), axis=0)
    head = head_idx * GROUP + group_offs
    group_mask = group_offs < GROUP
    out_mask = group_mask[:, None] & head_mask
    if MERGES:
        at = (out_row * splits + split_idx) * GROUP + group_offs
        log_mass = tl.where(total > 0, best + tl.log2(tl.maximum(total, 1e-37)), -1e30)
        tl.store(log_mass_ptr + at, log_mass, mask=group_mask)
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(partial_ptr + at[:, None] * HEAD_SIZE + head_offs[None, :], acc, mask=out_mask)
    else:
        acc = finish_rows(best, total, acc, sink_ptr, head, group_mask, value_scale, HAS_SINKS)
        at = row.to(tl.int64) * out_stride_token + head * out_stride_head
        acc = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] + head_offs[None, :], acc, mask=out_mask)


@triton.jit(do_not_specialize=["splits"])
def merge_splits_kernel(
    partial_ptr,  # [num_tiles, num_kv_heads, splits, group, head_size]
    log_mass_ptr,  # [num_tiles, num_kv_heads, splits, group] log2
    row_ptr,  # [num_tiles]
    length_ptr,
    sink_ptr,  # [num_heads], or null
    out_ptr,  # [num_tokens, num_heads, head_size]
    value_scale,
    splits,
    out_stride_token,
    out_stride_head,
    HEAD_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    length = tl.load(length_ptr + tile_idx)
    row = tl.load(row_ptr + tile_idx).to(tl.int64)
    wait_for_previous(EARLY)
    if length == 0:
        return
    num_kv_heads = tl.num_programs(1) // GROUP
    out_row = tile_idx * num_kv_heads + head_idx // GROUP
    split_offs = tl.arange(0, MAX_SPLITS)
    head_offs = tl.arange(0, PAD_HEAD)
    part_row = (out_row * splits + split_offs) * GROUP + head_idx % GROUP
    split_mask = split_offs < splits
    log_mass = tl.load(log_mass_ptr + part_row, mask=split_mask, other=-1e30)
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
        mask=split_mask[:, None] & (head_offs < HEAD_SIZE)[None, :],
        other=0.0,
    )
    merged = tl.sum(partial * weight[:, None], axis=0) / total * value_scale
    at = row * out_stride_token + head_idx * out_stride_head + head_offs
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=head_offs < HEAD_SIZE)
