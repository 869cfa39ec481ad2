"""attend: softmax attention over a tile's scope, every key rotated to its slot on the way in.

One program holds the rows of a tile that share a KV head, so a key is loaded and rotated once for
the whole group. Few tiles (decode) split the scope over programs and merge their softmax states.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Pages, Rotary, Scope, Tiles
from csrc_triton.primitives import LOG2E, cap_logits, source_channel, tile_slots

MAX_SPLITS = 64  # of a scope


@triton.jit
def _find_pages(
    first_key, last_key, num_global, num_recalled, local, recalled_ptr, table_ptr,
    BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Blocks and pages of the slots from first_key on; page 0 behind last_key."""
    slot = first_key // BLOCK_SIZE + tl.arange(0, KEYS // BLOCK_SIZE)
    here = slot * BLOCK_SIZE < last_key
    is_recalled = (slot >= num_global) & (slot < num_global + num_recalled)
    named = tl.load(recalled_ptr + slot - num_global, mask=is_recalled & here, other=0)
    block = tl.where(slot < num_global, slot, local + slot - num_global - num_recalled)
    block = tl.where(is_recalled, named, block)
    return block, tl.load(table_ptr + block, mask=here, other=0)


@triton.jit
def _load_keys(
    page, key_cache_ptr, cache_stride_block,
    HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr,
    PAD_HALF: tl.constexpr, PAD_REST: tl.constexpr,
):  # fmt: skip
    """The parts of KEYS keys: [slots, block_size, channels] of those that turn, [KEYS, rest]."""
    offset = tl.arange(0, BLOCK_SIZE)
    row = (page.to(tl.int64) * cache_stride_block)[:, None] + (offset * HEAD_SIZE)[None, :]
    first = 0.0
    second = 0.0
    rest = 0.0
    if HALF > 0:
        half_offs = tl.arange(0, PAD_HALF)
        key_ptr = key_cache_ptr + row[:, :, None] + half_offs[None, None, :]
        if HALF == PAD_HALF:
            first = tl.load(key_ptr)
            second = tl.load(key_ptr + HALF)
        else:
            mask = (half_offs < HALF)[None, None, :]
            first = tl.load(key_ptr, mask=mask, other=0.0)
            second = tl.load(key_ptr + HALF, mask=mask, other=0.0)
    if 2 * HALF < HEAD_SIZE:
        rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
        rest = tl.load(
            key_cache_ptr + tl.reshape(row, [KEYS])[:, None] + rest_offs[None, :],
            mask=(rest_offs < HEAD_SIZE)[None, :],
            other=0.0,
        )
    return first, second, rest


@triton.jit
def _attend_keys(
    best, total, acc, query_first, query_second, query_rest, first, second, rest, block, page,
    first_key, last_key, own, position, first_unwritten, cos_sin_ptr, value_cache_ptr,
    scale, soft_cap, cache_stride_block,
    HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr,
    HAS_CAP: tl.constexpr, TURNS_QUERY: tl.constexpr, MASKED: tl.constexpr, KEYS: tl.constexpr,
    PAD_HALF: tl.constexpr, PAD_HEAD: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """One step of online softmax: KEYS keys of the scope, from first_key on."""
    SLOTS: tl.constexpr = KEYS // BLOCK_SIZE
    offset = tl.arange(0, BLOCK_SIZE)
    row = (page.to(tl.int64) * cache_stride_block)[:, None] + (offset * HEAD_SIZE)[None, :]
    head_offs = tl.arange(0, PAD_HEAD)
    value_ptr = value_cache_ptr + tl.reshape(row, [KEYS])[:, None] + head_offs[None, :]
    key_at = tl.reshape(block[:, None] * BLOCK_SIZE + offset[None, :], [KEYS])
    inside = first_key + tl.arange(0, KEYS) < last_key
    if MASKED:
        # A page's unwritten rows may hold anything, nan too: keep them out of the product.
        written = inside & (key_at < first_unwritten)
        value_mask = written[:, None] & (head_offs < HEAD_SIZE)[None, :]
        value = tl.load(value_ptr, mask=value_mask, other=0.0)
    elif HEAD_SIZE == PAD_HEAD:
        value = tl.load(value_ptr)
    else:
        value = tl.load(value_ptr, mask=(head_offs < HEAD_SIZE)[None, :], other=0.0)

    if HALF > 0:
        half_offs = tl.arange(0, PAD_HALF)
        half_mask = half_offs < HALF
        if TURNS_QUERY:  # by what lies between its slot and this one; keys stay as they are
            angle_ptr = cos_sin_ptr + (own - first_key) * (2 * HALF) + half_offs
            cos = tl.load(angle_ptr, mask=half_mask, other=0.0)[None, :]
            sin = tl.load(angle_ptr + HALF, mask=half_mask, other=0.0)[None, :]
            turned_first = (query_first * cos - query_second * sin).to(dtype)
            turned_second = (query_second * cos + query_first * sin).to(dtype)
            key_first = tl.reshape(first.to(dtype), [KEYS, PAD_HALF])
            key_second = tl.reshape(second.to(dtype), [KEYS, PAD_HALF])
            logits = tl.dot(turned_first, tl.trans(key_first))
            logits = tl.dot(turned_second, tl.trans(key_second), logits)
        else:
            angle = first_key + tl.arange(0, SLOTS) * BLOCK_SIZE
            angle_ptr = cos_sin_ptr + (angle * (2 * HALF))[:, None, None]
            angle_ptr = angle_ptr + half_offs[None, None, :]
            mask = (angle < last_key)[:, None, None] & half_mask[None, None, :]
            cos = tl.load(angle_ptr, mask=mask, other=0.0)
            sin = tl.load(angle_ptr + HALF, mask=mask, other=0.0)
            wide_first = first.to(tl.float32)
            wide_second = second.to(tl.float32)
            turned_first = (wide_first * cos - wide_second * sin).to(dtype)
            turned_second = (wide_second * cos + wide_first * sin).to(dtype)
            turned_first = tl.reshape(turned_first, [KEYS, PAD_HALF])
            turned_second = tl.reshape(turned_second, [KEYS, PAD_HALF])
            logits = tl.dot(query_first, tl.trans(turned_first))
            logits = tl.dot(query_second, tl.trans(turned_second), logits)
    if 2 * HALF < HEAD_SIZE:
        if HALF > 0:
            logits = tl.dot(query_rest, tl.trans(rest.to(dtype)), logits)
        else:
            logits = tl.dot(query_rest, tl.trans(rest.to(dtype)))
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
    acc = tl.dot(weight.to(dtype), value.to(dtype), acc * rescale[:, None])
    return new_best, total, acc


@triton.jit(do_not_specialize=["splits"])
def _attend_scope_kernel(
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
    partial_ptr,  # [num_tiles, num_kv_heads, splits, MAX_ROWS, head_size], or null
    log_mass_ptr,  # [num_tiles, num_kv_heads, splits, MAX_ROWS] log2, or null
    scale,  # of the logits, times the keys' scale
    value_scale,
    query_scale,
    soft_cap,
    splits,
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
    MAX_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MERGES: tl.constexpr,
    HAS_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    TURNS_QUERY: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    PAD_HEAD: tl.constexpr,
    STAGES: tl.constexpr,
):
    ROW_PARTS: tl.constexpr = (MAX_ROWS + ROWS - 1) // ROWS
    # The last tiles of a step see the most; starting with them evens out the end.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    tile_idx = (program // ROW_PARTS).to(tl.int64)
    row_offs = (program % ROW_PARTS) * ROWS + tl.arange(0, ROWS)
    head_idx = tl.program_id(1)
    split_idx = tl.program_id(2)
    length = tl.load(length_ptr + tile_idx)
    if (program % ROW_PARTS) * ROWS >= length * GROUP:
        return
    row_mask = row_offs < length * GROUP
    out_row = tile_idx * tl.num_programs(1) + head_idx
    first_position = tl.load(position_ptr + tile_idx)
    block_idx = first_position // BLOCK_SIZE
    num_global, num_recalled, local = tile_slots(
        block_idx, BLOCK_SIZE, GLOBAL, RECALL, LOCAL, DENSE, WINDOW
    )
    num_slots = num_global + num_recalled + block_idx - local + 1
    position = first_position + row_offs // GROUP
    own = (num_slots - 1) * BLOCK_SIZE + first_position % BLOCK_SIZE
    dtype: tl.constexpr = query_ptr.dtype.element_ty

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
        if TURNS_QUERY:
            query_first = first
            query_second = second
        else:
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

    # KEYS at a time, split so that every program starts on a multiple; only a window's first keys
    # and the tile's own block need a mask.
    num_keys = num_slots * BLOCK_SIZE
    per_split = tl.cdiv(tl.cdiv(num_keys, KEYS), splits) * KEYS
    start = split_idx * per_split
    end = tl.minimum(start + per_split, num_keys)
    own_start = (num_keys - BLOCK_SIZE) // KEYS * KEYS
    plain_end = tl.minimum(end, own_start)
    if WINDOW > 0:
        plain_end = start
    table_ptr = block_table_ptr + tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    recalled_ptr += out_row * RECALL
    key_cache_ptr += head_idx.to(tl.int64) * cache_stride_head
    value_cache_ptr += head_idx.to(tl.int64) * cache_stride_head
    best = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PAD_HEAD], tl.float32)
    # Pages are found two steps ahead and keys loaded one step ahead of their use.
    block, page = _find_pages(
        start, end, num_global, num_recalled, local, recalled_ptr, table_ptr, BLOCK_SIZE, KEYS
    )
    next_block, next_page = _find_pages(
        start + KEYS, end, num_global, num_recalled, local, recalled_ptr, table_ptr,
        BLOCK_SIZE, KEYS,
    )  # fmt: skip
    first, second, rest = _load_keys(
        page, key_cache_ptr, cache_stride_block,
        HEAD_SIZE, HALF, BLOCK_SIZE, KEYS, PAD_HALF, PAD_REST,
    )  # fmt: skip
    for first_key in tl.range(start, plain_end, KEYS, num_stages=STAGES):
        next_first, next_second, next_rest = _load_keys(
            next_page, key_cache_ptr, cache_stride_block,
            HEAD_SIZE, HALF, BLOCK_SIZE, KEYS, PAD_HALF, PAD_REST,
        )  # fmt: skip
        later_block, later_page = _find_pages(
            first_key + 2 * KEYS, end, num_global, num_recalled, local, recalled_ptr, table_ptr,
            BLOCK_SIZE, KEYS,
        )  # fmt: skip
        best, total, acc = _attend_keys(
            best, total, acc, query_first, query_second, query_rest, first, second, rest,
            block, page, first_key, end, own, position, first_position + length,
            cos_sin_ptr, value_cache_ptr, scale, soft_cap, cache_stride_block,
            HEAD_SIZE, HALF, BLOCK_SIZE, WINDOW, HAS_CAP, TURNS_QUERY, False, KEYS,
            PAD_HALF, PAD_HEAD, dtype,
        )  # fmt: skip
        first, second, rest = next_first, next_second, next_rest
        block, page = next_block, next_page
        next_block, next_page = later_block, later_page
    for first_key in tl.range(tl.maximum(start, plain_end), end, KEYS, num_stages=STAGES):
        next_first, next_second, next_rest = _load_keys(
            next_page, key_cache_ptr, cache_stride_block,
            HEAD_SIZE, HALF, BLOCK_SIZE, KEYS, PAD_HALF, PAD_REST,
        )  # fmt: skip
        later_block, later_page = _find_pages(
            first_key + 2 * KEYS, end, num_global, num_recalled, local, recalled_ptr, table_ptr,
            BLOCK_SIZE, KEYS,
        )  # fmt: skip
        best, total, acc = _attend_keys(
            best, total, acc, query_first, query_second, query_rest, first, second, rest,
            block, page, first_key, end, own, position, first_position + length,
            cos_sin_ptr, value_cache_ptr, scale, soft_cap, cache_stride_block,
            HEAD_SIZE, HALF, BLOCK_SIZE, WINDOW, HAS_CAP, TURNS_QUERY, True, KEYS,
            PAD_HALF, PAD_HEAD, dtype,
        )  # fmt: skip
        first, second, rest = next_first, next_second, next_rest
        block, page = next_block, next_page
        next_block, next_page = later_block, later_page

    head_offs = tl.arange(0, PAD_HEAD)
    out_mask = row_mask[:, None] & (head_offs < HEAD_SIZE)[None, :]
    if MERGES:
        at = (out_row * splits + split_idx) * MAX_ROWS + row_offs
        tl.store(
            log_mass_ptr + at, tl.where(total > 0, best + tl.log2(total), -1e30), mask=row_mask
        )
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(partial_ptr + at[:, None] * HEAD_SIZE + head_offs[None, :], acc, mask=out_mask)
    else:
        if HAS_SINKS:
            sink = tl.load(sink_ptr + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
            new_best = tl.maximum(best, sink)
            rescale = tl.exp2(best - new_best)
            total = total * rescale + tl.exp2(sink - new_best)
            acc = acc * rescale[:, None]
        acc = acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
        at = row * out_stride_token + head * out_stride_head
        tl.store(out_ptr + at[:, None] + head_offs[None, :], acc.to(dtype), mask=out_mask)


@triton.jit(do_not_specialize=["splits"])
def _merge_splits_kernel(
    partial_ptr,  # [num_tiles, num_kv_heads, splits, MAX_ROWS, head_size]
    log_mass_ptr,  # [num_tiles, num_kv_heads, splits, MAX_ROWS] log2
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
    MAX_ROWS: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    PAD_HEAD: tl.constexpr,
):
    tile_idx = (tl.program_id(0) // MAX_ROWS).to(tl.int64)
    tile_row = tl.program_id(0) % MAX_ROWS  # (query, head of the group)
    kv_head = tl.program_id(1)
    if tile_row >= tl.load(length_ptr + tile_idx) * GROUP:
        return
    out_row = tile_idx * tl.num_programs(1) + kv_head
    head_idx = kv_head * GROUP + tile_row % GROUP
    split_offs = tl.arange(0, MAX_SPLITS)
    head_offs = tl.arange(0, PAD_HEAD)
    part_row = (out_row * splits + split_offs) * MAX_ROWS + tile_row
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
    row = (tl.load(row_ptr + tile_idx) + tile_row // GROUP).to(tl.int64)
    at = row * out_stride_token + head_idx * out_stride_head + head_offs
    tl.store(out_ptr + at, merged.to(out_ptr.dtype.element_ty), mask=head_offs < HEAD_SIZE)


def attend(
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
    """Causal attention of each tile over [global | recalled | local].

    query     [num_tokens, num_heads, head_size] bf16 | fp16, not rotated
    recalled  [num_tiles, num_kv_heads, recall_blocks] int32, ascending
    sinks     [num_heads] or None
    out       [num_tokens, num_heads, head_size]: only the tiles' rows are written
    """
    num_kv_heads, block_size, head_size = pages.key.shape[1:]
    num_tiles = tiles.row.shape[0]
    group = query.shape[1] // num_kv_heads
    max_rows = tiles.max_length * group
    rows = min(max(triton.next_power_of_2(max_rows), 16), 128)
    row_parts = math.ceil(max_rows / rows)
    keys, warps, stages, wanted = _tile_sizes(tiles.max_length == 1, rows, head_size)
    keys = max(keys, block_size)
    splits = 1
    if tiles.max_length == 1:
        programs = num_tiles * num_kv_heads * row_parts
        splits = min(triton.next_power_of_2(max(1, wanted // programs)), MAX_SPLITS)
    partial = log_mass = None
    if splits > 1:
        shape = (num_tiles, num_kv_heads, splits, max_rows)
        partial = torch.empty((*shape, head_size), dtype=torch.float32, device=query.device)
        log_mass = torch.empty(shape, dtype=torch.float32, device=query.device)
    _attend_scope_kernel[(num_tiles * row_parts, num_kv_heads, splits)](
        query,
        pages.key,
        pages.value,
        block_table,
        *tiles[:4],
        recalled,
        rotary.cos_sin,
        sinks,
        out,
        partial,
        log_mass,
        scale * pages.key_scale,
        pages.value_scale,
        rotary.query_scale,
        soft_cap,
        splits,
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
        MAX_ROWS=max_rows,
        ROWS=rows,
        KEYS=keys,
        MERGES=splits > 1,
        HAS_CAP=soft_cap > 0,
        HAS_SINKS=sinks is not None,
        TURNS_QUERY=tiles.max_length == 1 and keys == block_size,
        PAD_HALF=max(triton.next_power_of_2(rotary.half), 16),
        PAD_REST=max(triton.next_power_of_2(head_size - 2 * rotary.half), 16),
        PAD_HEAD=triton.next_power_of_2(head_size),
        STAGES=stages,
        num_warps=warps,
    )
    if splits > 1:
        _merge_splits_kernel[(num_tiles * max_rows, num_kv_heads)](
            partial,
            log_mass,
            tiles.row,
            tiles.length,
            sinks,
            out,
            pages.value_scale,
            splits,
            out.stride(0),
            out.stride(1),
            HEAD_SIZE=head_size,
            GROUP=group,
            MAX_ROWS=max_rows,
            MAX_SPLITS=MAX_SPLITS,
            HAS_SINKS=sinks is not None,
            PAD_HEAD=triton.next_power_of_2(head_size),
            num_warps=4,
        )


def _tile_sizes(single: bool, rows: int, head_size: int) -> tuple[int, int, int, int]:
    """Keys per step, warps, stages, and programs to aim at, from a sweep on an H200."""
    if single:
        return 32, 2, 1, 528
    return 32, 4 if head_size <= 128 else 8, 1, 264
