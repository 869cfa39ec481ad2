"""What at least two kernels need: early starts, powers, rows and their rotation, pages, cap."""

import functools

import torch
import triton
import triton.language as tl

from csrc_triton.layout import Pages, Scope

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def source_channel(channel_offs, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where the model keeps the channel that we keep half-split at channel_offs."""
    if INTERLEAVED:
        turned = tl.where(channel_offs < HALF, 2 * channel_offs, 2 * (channel_offs - HALF) + 1)
        return tl.where(channel_offs < 2 * HALF, turned, channel_offs)
    else:
        return channel_offs


@triton.jit
def tile_slots(
    block_idx,
    dense,
    BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Scope.slots: global, recalled and first local block of the tile in block_idx."""
    num_global = tl.where(block_idx < dense, 0, GLOBAL)
    num_recalled = tl.where(block_idx < dense, 0, RECALL)
    local = tl.where(block_idx < dense, 0, block_idx - LOCAL + 1)
    if WINDOW > 0:
        num_global = tl.zeros_like(num_global)
        num_recalled = tl.zeros_like(num_recalled)
        local = tl.maximum(block_idx * BLOCK_SIZE - WINDOW + 1, 0) // BLOCK_SIZE
    return num_global, num_recalled, local


@triton.jit
def selecting_tile(
    tile_idx, length_ptr, position_ptr, dense_ptr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr, RECALL: tl.constexpr, LOCAL: tl.constexpr,
):  # fmt: skip
    """A tile's rows, whether it selects, and its first local block."""
    num_rows = tl.load(length_ptr + tile_idx) * GROUP
    block_idx = tl.load(position_ptr + tile_idx) // BLOCK_SIZE
    dense = tl.load(dense_ptr + tile_idx)
    _, num_recalled, local = tile_slots(block_idx, dense, BLOCK_SIZE, GLOBAL, RECALL, LOCAL, 0)
    return num_rows, (num_rows > 0) & (num_recalled > 0), local


@triton.jit
def cap_logits(logits, soft_cap):
    """soft_cap * tanh(logits / soft_cap), from exponentials that cannot overflow to nan."""
    double = tl.exp2(tl.minimum(logits * (2.0 * LOG2E / soft_cap), 80.0))
    return soft_cap * (1.0 - 2.0 / (double + 1.0))


@triton.jit
def add_power(best, total, exponent):
    """Two to the exponent, added to total, which is in units of two to the best so far."""
    less = tl.exp2(-tl.abs(exponent - best))  # of old and new unit one is 1 in the other
    total = tl.where(exponent > best, total * less + 1.0, total + less)
    return tl.maximum(best, exponent), total


@triton.jit
def wait_for_previous(EARLY: tl.constexpr):
    """Until the kernel launched before this one has ended; then the next may start.

    Every path of an early kernel must pass here before it reads what that kernel wrote, writes
    anything, or returns: the kernel behind takes the end of this one for the end of all before.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@functools.cache
def early_launch(device: torch.device) -> dict[str, bool]:
    """Launch arguments of a kernel whose start overlaps the end of the one before (Hopper on)."""
    if device.type == "cuda" and not torch.version.hip:
        if torch.cuda.get_device_capability(device) >= (9, 0):
            return {"EARLY": True, "launch_pdl": True}
    return {"EARLY": False}


def slot_sizes(scope: Scope) -> dict[str, int]:
    """Arguments of the kernels that ask tile_slots."""
    return {
        "GLOBAL": scope.global_blocks,
        "RECALL": scope.recall_blocks,
        "LOCAL": scope.local_blocks,
    }


def row_strides(blocks: torch.Tensor) -> tuple[int, int]:
    """Strides of tile and KV head, of blocks that are each head's own or one row for all."""
    return blocks.stride(0), blocks.stride(1) if blocks.shape[1] > 1 else 0


def bias_stride(pages: Pages) -> int:
    return 0 if pages.bias is None else pages.bias.stride(0)


@triton.jit
def beside_cache(x, cache_ptr):
    """x in the dtype in which it is multiplied by what the cache holds.

    fp16 for e4m3, which fits into it: one instruction widens two numbers, where each takes one of
    its own to become bf16.
    """
    if cache_ptr.dtype.element_ty.primitive_bitwidth == 8:
        return x.to(tl.float16)
    else:
        return x


@triton.jit
def widen_pairs(pairs):
    """The e4m3 numbers in the low and in the high bytes of int16 [keys, n], in fp16 [keys, n] both.

    Two registers' bytes are sorted in one instruction, as the compiler does not by itself.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 sorted;
        .reg .b16 low, high;
        prmt.b32 sorted, $2, 0, 0x3120;
        mov.b32 {low, high}, sorted;
        cvt.rn.f16x2.e4m3x2 $0, low;
        cvt.rn.f16x2.e4m3x2 $1, high;
        }""",
        "=r,=r,r",
        [pairs],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=2,
    )


@triton.jit
def load_rows(
    query_ptr, first_row, head_idx, row_offs, num_rows, query_stride_token, query_stride_head,
    HEAD_SIZE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, GROUP: tl.constexpr,
    STEP: tl.constexpr, PAD_HEAD: tl.constexpr,
):  # fmt: skip
    """Queries of the rows (query, head of the group), and each channel's partner in a rotation.

    Both [len(row_offs), PAD_HEAD], half-split, as the model made them.
    """
    channel_offs = tl.arange(0, PAD_HEAD)
    partner_offs = tl.where(channel_offs < HALF, channel_offs + HALF, channel_offs - HALF)
    partner_offs = tl.where(channel_offs < 2 * HALF, partner_offs, channel_offs)
    row_ptr = (
        query_ptr
        + (first_row + row_offs // GROUP * STEP).to(tl.int64) * query_stride_token
        + (head_idx * GROUP + row_offs % GROUP) * query_stride_head
    )[:, None]
    mask = (row_offs < num_rows)[:, None] & (channel_offs < HEAD_SIZE)[None, :]
    at = source_channel(channel_offs, HALF, INTERLEAVED)[None, :]
    query = tl.load(row_ptr + at, mask=mask, other=0.0)
    at = source_channel(partner_offs, HALF, INTERLEAVED)[None, :]
    return query, tl.load(row_ptr + at, mask=mask, other=0.0)


@triton.jit
def load_angles(position, cos_sin_ptr, scale, HALF: tl.constexpr, PAD_HEAD: tl.constexpr):
    """What each channel and its partner are multiplied with: [len(position), PAD_HEAD] both."""
    channel_offs = tl.arange(0, PAD_HEAD)
    turns = (channel_offs < 2 * HALF)[None, :]
    angle_ptr = cos_sin_ptr + (position * (2 * HALF))[:, None] + (channel_offs % HALF)[None, :]
    cos = tl.where(turns, tl.load(angle_ptr, mask=turns, other=0.0) * scale, 1.0)
    sin = tl.load(angle_ptr + HALF, mask=turns, other=0.0) * scale
    return cos, tl.where((channel_offs < HALF)[None, :], -sin, sin)


@triton.jit
def turn_rows(
    query, partner, position, cos_sin_ptr, query_scale,
    HALF: tl.constexpr, ROWS: tl.constexpr, POSITIONS: tl.constexpr, PAD_HEAD: tl.constexpr,
):  # fmt: skip
    """Every row turned to every position, in the query's dtype: [POSITIONS * ROWS, PAD_HEAD]."""
    if POSITIONS == 1:
        turned = query
        if HALF > 0:
            cos, sin = load_angles(position, cos_sin_ptr, query_scale, HALF, PAD_HEAD)
            turned = (query * cos + partner * sin).to(query.dtype)
    else:
        turned = tl.broadcast_to(query[None, :, :], [POSITIONS, ROWS, PAD_HEAD])
        if HALF > 0:
            cos, sin = load_angles(position, cos_sin_ptr, query_scale, HALF, PAD_HEAD)
            turned = turned * cos[:, None, :] + partner[None, :, :] * sin[:, None, :]
            turned = turned.to(query.dtype)
        turned = tl.reshape(turned, [POSITIONS * ROWS, PAD_HEAD])
    return turned


@triton.jit
def find_pages(slot, end, num_global, num_recalled, local, recalled_ptr, table_ptr):
    """Blocks and pages of the slots; page 0 from end on."""
    here = slot < end
    is_recalled = (slot >= num_global) & (slot < num_global + num_recalled)
    named = tl.load(recalled_ptr + slot - num_global, mask=is_recalled & here, other=0)
    named = tl.maximum(named, 0)  # scores of nan recall nothing
    block = tl.where(slot < num_global, slot, local + slot - num_global - num_recalled)
    block = tl.where(is_recalled, named, block)
    return block, tl.load(table_ptr + block, mask=here, other=0).to(tl.int64)


@triton.jit
def finish_rows(best, total, acc, sink_ptr, head, row_mask, value_scale, HAS_SINKS: tl.constexpr):
    """The attention of rows whose softmax state is complete, but for the sinks."""
    if HAS_SINKS:
        sink = tl.load(sink_ptr + head, mask=row_mask, other=0.0).to(tl.float32) * LOG2E
        new_best = tl.maximum(best, sink)
        rescale = tl.exp2(best - new_best)
        total = total * rescale + tl.exp2(sink - new_best)
        acc = acc * rescale[:, None]
    return acc * (value_scale / tl.where(total > 0, total, 1.0))[:, None]
