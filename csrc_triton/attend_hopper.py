"""Attention of tiles of many queries on Hopper: some warps turn keys while others multiply.

One program holds the rows of a tile that share a KV head, as in attend_prefill. A ring of steps of
KEYS keys lies in shared memory. Four warps fill it: they copy pages in, AHEAD steps early, and turn
the keys where they lie. Twice four warps take 64 rows each through product, softmax and product.

Pages of fp8 are copied into the first half of the place that their 16-bit numbers will fill.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from csrc_triton.primitives import LOG2E, source_channel, tile_slots

WARP_ROWS = gl.constexpr(64)  # of four warps: what one product takes
# Of a thread; three times four warps have 3 * 168 of them to share.
ROW_REGISTERS, FILL_REGISTERS = gl.constexpr(192), gl.constexpr(120)


@gluon.constexpr_function
def _by_rows(size):
    """Rows of `size` channels, 16 bytes a thread, over four warps."""
    across = min(size // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // across, across], [4, 1], [1, 0])


@gluon.constexpr_function
def _swizzled(HEAD_SIZE, HALF, element):
    """Rows of keys or values such that products can read them, and halves can be cut out."""
    width = min(2 * HEAD_SIZE, 128)
    while HALF and width > 32 and 2 * HALF % width:
        width //= 2
    return gl.NVMMASharedLayout(width, element.primitive_bitwidth, 2)


@gluon.constexpr_function
def _by_vectors(SLOTS, BLOCK_SIZE, HEAD_SIZE, bits, num_warps):
    """Slots, keys and channels of so many bits, 16 bytes at a time.

    Of 16 bits, a thread holds both channels of a rotation.
    """
    channels = [[0, 0, 1 << bit] for bit in range(HEAD_SIZE.bit_length() - 1)]
    held, across = channels[:4], channels[4:]
    if bits == 16:
        held, across = [*channels[:3], channels[-1]], channels[3:-1]
    keys = [[0, 1 << bit, 0] for bit in range(BLOCK_SIZE.bit_length() - 1)]
    keys += [[1 << bit, 0, 0] for bit in range(SLOTS.bit_length() - 1)]
    lanes, keys = (across + keys)[:5], keys[5 - len(across) :]
    warps = len(keys) - (num_warps.bit_length() - 1)
    return gl.DistributedLinearLayout(
        held + keys[:warps], lanes, keys[warps:], [], [SLOTS, BLOCK_SIZE, HEAD_SIZE]
    )


@gluon.constexpr_function
def _as_copied(HEAD_SIZE):
    """Rows of bytes such that what turns halves of heads reads no bank twice."""
    return gl.SwizzledSharedLayout(HEAD_SIZE // 2, 128 // HEAD_SIZE, 2, [2, 1, 0])


@gluon.jit
def _find_block(slot, num_slots, num_global, num_recalled, local, recalled_ptr):
    """Blocks of the slots; negative outside the scope."""
    here = (slot >= 0) & (slot < num_slots)
    is_recalled = (slot >= num_global) & (slot < num_global + num_recalled)
    named = gl.load(recalled_ptr + slot - num_global, mask=is_recalled & here, other=0)
    named = gl.maximum(named, 0)  # scores of nan recall nothing
    block = gl.where(slot < num_global, slot, local + slot - num_global - num_recalled)
    return gl.where(here, gl.where(is_recalled, named, block), -1)


@gluon.jit
def _find_page(block, table_ptr):
    return gl.load(table_ptr + block, mask=block >= 0, other=0)


@gluon.jit
def _load_angles(
    slot, num_slots, cos_sin_ptr, HALF: gl.constexpr, BLOCK_SIZE: gl.constexpr, flat: gl.constexpr
):
    half_offs = gl.arange(0, HALF, gl.SliceLayout(0, flat))
    slot = gl.maximum(gl.minimum(slot, num_slots - 1), 0)
    angle_ptr = cos_sin_ptr + (slot * (BLOCK_SIZE * 2 * HALF))[:, None] + half_offs[None, :]
    return gl.load(angle_ptr), gl.load(angle_ptr + HALF)


@gluon.jit
def _halves(tile, HALF: gl.constexpr):
    """First and second channels of a head, as [slots, keys, HALF]."""
    tile = gl.reshape(tile, [tile.shape[0], tile.shape[1], 2, HALF])
    return gl.split(gl.permute(tile, (0, 1, 3, 2)))


@gluon.jit
def _place(ring, stage, cached: gl.constexpr, shape: gl.constexpr):
    """Where pages are copied to, as they are."""
    place = ring.index(stage)
    if cached.primitive_bitwidth == ring.dtype.primitive_bitwidth:
        return place.reshape(shape)
    else:
        return place._reinterpret(cached, shape, _as_copied(shape[2]))


@gluon.jit
def _fill(
    steps, num_slots, num_keys, num_global, num_recalled, local, recalled_ptr, table_ptr,
    cos_sin_ptr, bias_ptr, key_cache_ptr, value_cache_ptr, cache_stride_block, keys, values,
    filled, freed,
    HEAD_SIZE: gl.constexpr, HALF: gl.constexpr, BLOCK_SIZE: gl.constexpr, SLOTS: gl.constexpr,
    STAGES: gl.constexpr, AHEAD: gl.constexpr, HAS_BIAS: gl.constexpr,
):  # fmt: skip
    """Keys, turned to their slots, and values into the ring; the scope's last step first."""
    dtype: gl.constexpr = keys.dtype
    shape: gl.constexpr = [SLOTS, BLOCK_SIZE, HEAD_SIZE]
    cached: gl.constexpr = key_cache_ptr.dtype.element_ty
    bits: gl.constexpr = cached.primitive_bitwidth
    tile: gl.constexpr = _by_vectors(SLOTS, BLOCK_SIZE, HEAD_SIZE, 16, gl.num_warps())
    copy: gl.constexpr = _by_vectors(SLOTS, BLOCK_SIZE, HEAD_SIZE, bits, gl.num_warps())
    offset = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, gl.SliceLayout(2, copy)))
    head_offs = gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, gl.SliceLayout(1, copy)))
    slot = gl.arange(0, SLOTS, gl.SliceLayout(1, gl.SliceLayout(2, copy)))
    inside = (offset * HEAD_SIZE)[None, :, None] + head_offs[None, None, :]
    if HAS_BIAS:  # the same for each slot
        bias_offset = gl.arange(0, BLOCK_SIZE, gl.SliceLayout(0, gl.SliceLayout(2, tile)))
        bias_head = gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, gl.SliceLayout(1, tile)))
        of_slots = gl.full(shape, 0, gl.int32, tile) + (bias_offset * HEAD_SIZE)[None, :, None]
        bias_at = bias_ptr + (of_slots + bias_head[None, None, :])
    copied_slot = slot + (steps - 1) * SLOTS
    # A page is found in two loads, each a step ahead of its use.
    given = (num_slots, num_global, num_recalled, local, recalled_ptr)
    page = _find_page(_find_block(copied_slot, *given), table_ptr)
    block = _find_block(copied_slot - SLOTS, *given)

    like, _ = _halves(gl.full(shape, 0.0, gl.float32, tile), HALF)
    flat: gl.constexpr = gl.SliceLayout(1, like.type.layout)
    turned_slot = gl.arange(0, SLOTS, gl.SliceLayout(1, flat)) + (steps - 1) * SLOTS
    cos, sin = _load_angles(turned_slot, num_slots, cos_sin_ptr, HALF, BLOCK_SIZE, flat)
    for step in range(-AHEAD, steps):
        copied = step + AHEAD
        if copied < steps:
            at = (page.to(gl.int64) * cache_stride_block)[:, None, None] + inside
            written = (copied_slot * BLOCK_SIZE)[:, None] + offset[None, :] < num_keys
            page = _find_page(block, table_ptr)
            copied_slot -= SLOTS
            block = _find_block(copied_slot - SLOTS, *given)
            stage = copied % STAGES
            mbarrier.wait(freed.index(stage), (copied // STAGES + 1) % 2)
            place = _place(keys, stage, cached, shape)
            async_copy.async_copy_global_to_shared(place, key_cache_ptr + at)
            # A page's unwritten rows may hold anything, nan too: keep them out of the product.
            place = _place(values, stage, cached, shape)
            mask = written[:, :, None]
            async_copy.async_copy_global_to_shared(place, value_cache_ptr + at, mask=mask)
        async_copy.commit_group()
        if step >= 0:
            async_copy.wait_group(AHEAD)
            stage = step % STAGES
            turned_slot -= SLOTS
            next_cos, next_sin = _load_angles(
                turned_slot, num_slots, cos_sin_ptr, HALF, BLOCK_SIZE, flat
            )
            key = _place(keys, stage, cached, shape).load(tile)
            if bits == 8:
                value = _place(values, stage, cached, shape).load(tile)
                values.index(stage).reshape(shape).store(value.to(values.dtype))
            if HAS_BIAS:
                key = key.to(dtype) + gl.load(bias_at).to(dtype)
            first, second = _halves(key.to(gl.float32), HALF)
            cos, sin = cos[:, None, :], sin[:, None, :]
            turned = gl.join(first * cos - second * sin, second * cos + first * sin).to(dtype)
            turned = gl.reshape(gl.permute(turned, (0, 1, 3, 2)), shape)
            place = keys.index(stage).reshape(shape)
            place.store(gl.convert_layout(turned, tile, assert_trivial=True))
            cos, sin = next_cos, next_sin
            hopper.fence_async_shared()
            mbarrier.arrive(filled.index(stage))


@gluon.jit
def _soften(logits, best, total, scale):
    new_best = gl.maximum(best, gl.max(logits, axis=1) * scale)
    weight = gl.exp2(logits * scale - new_best[:, None])
    rescale = gl.exp2(best - new_best)
    return new_best, total * rescale + gl.sum(weight, axis=1), rescale, weight


@gluon.jit
def _consume(
    first_row, query, given,
    HEAD_SIZE: gl.constexpr, HALF: gl.constexpr, INTERLEAVED: gl.constexpr, GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr, HAS_SINKS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """64 rows from first_row on: softmax over every step of the ring."""
    (
        num_rows, token, position, head_idx, steps, num_slots, query_ptr, cos_sin_ptr, sink_ptr,
        out_ptr, scale, value_scale, query_scale, query_stride_token, query_stride_head,
        out_stride_token, out_stride_head, keys, values, filled, freed,
    ) = given  # fmt: skip
    KEYS: gl.constexpr = keys.shape[1]
    dtype: gl.constexpr = keys.dtype
    product: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    weights: gl.constexpr = gl.DotOperandLayout(0, output, 2)
    own = (num_slots - 1) * BLOCK_SIZE + position % BLOCK_SIZE  # in the scope

    halves: gl.constexpr = _by_rows(HALF)
    row_offs = first_row + gl.arange(0, WARP_ROWS, gl.SliceLayout(1, halves))
    half_offs = gl.arange(0, HALF, gl.SliceLayout(0, halves))
    row = (token + row_offs // GROUP).to(gl.int64) * query_stride_token
    row += (head_idx * GROUP + row_offs % GROUP) * query_stride_head
    here = (row_offs < num_rows)[:, None]
    at = query_ptr + row[:, None]
    first = source_channel(half_offs, HALF, INTERLEAVED)[None, :]
    second = source_channel(half_offs + HALF, HALF, INTERLEAVED)[None, :]
    first = gl.load(at + first, mask=here, other=0.0).to(gl.float32) * query_scale
    second = gl.load(at + second, mask=here, other=0.0).to(gl.float32) * query_scale
    angle_ptr = cos_sin_ptr + ((own + row_offs // GROUP) * (2 * HALF))[:, None] + half_offs[None, :]
    cos = gl.load(angle_ptr, mask=here, other=0.0)
    sin = gl.load(angle_ptr + HALF, mask=here, other=0.0)
    query.slice(0, HALF, 1).store((first * cos - second * sin).to(dtype))
    query.slice(HALF, HALF, 1).store((second * cos + first * sin).to(dtype))
    hopper.fence_async_shared()
    gl.thread_barrier()
    query = query.load(gl.DotOperandLayout(0, product, 2))

    row_offs = first_row + gl.arange(0, WARP_ROWS, gl.SliceLayout(1, product))
    key_offs = (steps - 1) * KEYS + gl.arange(0, KEYS, gl.SliceLayout(0, product))
    best = gl.full([WARP_ROWS], -1e30, gl.float32, gl.SliceLayout(1, product))
    total = gl.full([WARP_ROWS], 0.0, gl.float32, gl.SliceLayout(1, product))
    nothing = gl.full([WARP_ROWS, KEYS], 0.0, gl.float32, product)
    acc = gl.full([WARP_ROWS, HEAD_SIZE], 0.0, gl.float32, output)
    scale = scale * LOG2E

    mbarrier.wait(filled.index(0), 0)
    logits = hopper.warpgroup_mma(query, keys.index(0).permute((1, 0)), nothing, use_acc=False)
    seen = (num_slots > 0) & (key_offs[None, :] <= (own + row_offs // GROUP)[:, None])
    logits = gl.where(seen, logits, float("-inf"))
    best, total, rescale, weight = _soften(logits, best, total, scale)
    weight = gl.convert_layout(weight.to(values.dtype), weights)
    acc = hopper.warpgroup_mma(weight, values.index(0), acc)
    mbarrier.arrive(freed.index(0))
    for step in range(1, steps):
        stage = step % STAGES
        mbarrier.wait(filled.index(stage), step // STAGES % 2)
        logits = hopper.warpgroup_mma(
            query, keys.index(stage).permute((1, 0)), nothing, use_acc=False
        )
        best, total, rescale, weight = _soften(logits, best, total, scale)
        acc *= gl.convert_layout(rescale, gl.SliceLayout(1, output))[:, None]
        weight = gl.convert_layout(weight.to(values.dtype), weights)
        acc = hopper.warpgroup_mma(weight, values.index(stage), acc)
        mbarrier.arrive(freed.index(stage))

    row_offs = first_row + gl.arange(0, WARP_ROWS, gl.SliceLayout(1, output))
    head_offs = gl.arange(0, HEAD_SIZE, gl.SliceLayout(0, output))
    head = head_idx * GROUP + row_offs % GROUP
    row_mask = row_offs < num_rows
    best = gl.convert_layout(best, gl.SliceLayout(1, output))
    total = gl.convert_layout(total, gl.SliceLayout(1, output))
    if HAS_SINKS:
        sink = gl.load(sink_ptr + head, mask=row_mask, other=0.0).to(gl.float32) * LOG2E
        new_best = gl.maximum(best, sink)
        rescale = gl.exp2(best - new_best)
        total = total * rescale + gl.exp2(sink - new_best)
        acc *= rescale[:, None]
    acc *= (value_scale / gl.where(total > 0, total, 1.0))[:, None]
    at = (token + row_offs // GROUP).to(gl.int64) * out_stride_token + head * out_stride_head
    acc = acc.to(out_ptr.dtype.element_ty)
    gl.store(out_ptr + at[:, None] + head_offs[None, :], acc, mask=row_mask[:, None])


@gluon.jit
def attend_hopper_kernel(
    query_ptr,  # as attend_tile_kernel
    key_cache_ptr,
    value_cache_ptr,
    block_table_ptr,
    request_ptr,
    row_ptr,
    length_ptr,
    position_ptr,
    dense_ptr,
    recalled_ptr,
    cos_sin_ptr,
    bias_ptr,
    sink_ptr,
    out_ptr,
    scale,
    value_scale,
    query_scale,
    soft_cap,  # not read
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
    HEAD_SIZE: gl.constexpr,
    HALF: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    GROUP: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    GLOBAL: gl.constexpr,
    RECALL: gl.constexpr,
    LOCAL: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SINKS: gl.constexpr,
    MAX_ROWS: gl.constexpr,
    SLOTS: gl.constexpr,
    STAGES: gl.constexpr,
    AHEAD: gl.constexpr,
    EARLY: gl.constexpr,
):
    if EARLY:
        # wait_for_previous, whose words are Triton's own
        gl.inline_asm_elementwise(
            "griddepcontrol.wait; griddepcontrol.launch_dependents; // $0", "=r", [],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    ROWS: gl.constexpr = 2 * WARP_ROWS
    PARTS: gl.constexpr = (MAX_ROWS + ROWS - 1) // ROWS
    KEYS: gl.constexpr = SLOTS * BLOCK_SIZE
    # In float16 all of fp8 fits, a pair in one instruction, and weights, which are at most 1.
    bits: gl.constexpr = key_cache_ptr.dtype.element_ty.primitive_bitwidth
    dtype: gl.constexpr = gl.float16 if bits == 8 else query_ptr.dtype.element_ty
    # The last tiles of a step see the most; starting with them evens out the end.
    program = gl.num_programs(0) - 1 - gl.program_id(0)
    tile_idx = (program // PARTS).to(gl.int64)
    first_row = program % PARTS * ROWS
    head_idx = gl.program_id(1)
    length = gl.load(length_ptr + tile_idx)
    position = gl.load(position_ptr + tile_idx)
    token = gl.load(row_ptr + tile_idx)
    block_idx = position // BLOCK_SIZE
    dense = gl.load(dense_ptr + tile_idx)
    num_global, num_recalled, local = tile_slots(
        block_idx, dense, BLOCK_SIZE, GLOBAL, RECALL, LOCAL, 0
    )
    # Nothing to do is one step that sees nothing.
    num_slots = num_global + num_recalled + block_idx - local + 1
    num_slots = gl.where(first_row < length * GROUP, num_slots, 0)
    steps = gl.maximum((num_slots + SLOTS - 1) // SLOTS, 1)
    num_keys = (num_slots - 1) * BLOCK_SIZE + position % BLOCK_SIZE + length
    table_ptr = block_table_ptr + gl.load(request_ptr + tile_idx).to(gl.int64) * table_stride
    recalled_ptr += tile_idx * recalled_stride_tile + head_idx * recalled_stride_head
    key_cache_ptr += head_idx.to(gl.int64) * cache_stride_head
    value_cache_ptr += head_idx.to(gl.int64) * cache_stride_head

    layout: gl.constexpr = _swizzled(HEAD_SIZE, HALF, dtype)
    query = gl.allocate_shared_memory(dtype, [2, WARP_ROWS, HEAD_SIZE], layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_SIZE], layout)
    values = gl.allocate_shared_memory(dtype, [STAGES, KEYS, HEAD_SIZE], layout)
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(freed.index(stage), count=2)
    hopper.fence_async_shared()

    if HAS_BIAS:
        bias_ptr += head_idx * bias_stride_head
    else:
        bias_ptr = cos_sin_ptr  # not read; None cannot be handed on
    if not HAS_SINKS:
        sink_ptr = cos_sin_ptr  # likewise
    rows = (
        length * GROUP, token, position, head_idx, steps, num_slots, query_ptr, cos_sin_ptr,
        sink_ptr, out_ptr, scale, value_scale, query_scale, query_stride_token, query_stride_head,
        out_stride_token, out_stride_head, keys, values, filled, freed,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (first_row, query.index(0), rows,
                HEAD_SIZE, HALF, INTERLEAVED, GROUP, BLOCK_SIZE, HAS_SINKS, STAGES,
            )),
            (_consume, (first_row + WARP_ROWS, query.index(1), rows,
                HEAD_SIZE, HALF, INTERLEAVED, GROUP, BLOCK_SIZE, HAS_SINKS, STAGES,
            )),
            (_fill, (
                steps, num_slots, num_keys, num_global, num_recalled, local, recalled_ptr,
                table_ptr, cos_sin_ptr, bias_ptr, key_cache_ptr, value_cache_ptr,
                cache_stride_block, keys, values, filled, freed, HEAD_SIZE, HALF, BLOCK_SIZE, SLOTS,
                STAGES, AHEAD, HAS_BIAS,
            )),
        ],
        [4, 4],
        [ROW_REGISTERS, FILL_REGISTERS],
    )  # fmt: skip
