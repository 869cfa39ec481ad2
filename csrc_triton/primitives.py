"""What at least two kernels need: channel order, the tile's extent, slots, soft cap."""

import triton
import triton.language as tl

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
    BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    DENSE: tl.constexpr,
    WINDOW: tl.constexpr,
):
    """Scope.slots: global, recalled and first local block of the tile in block_idx."""
    num_global = tl.where(block_idx < DENSE, 0, GLOBAL)
    num_recalled = tl.where(block_idx < DENSE, 0, RECALL)
    local = tl.where(block_idx < DENSE, 0, block_idx - LOCAL + 1)
    if WINDOW > 0:
        num_global = tl.zeros_like(num_global)
        num_recalled = tl.zeros_like(num_recalled)
        local = tl.maximum(block_idx * BLOCK_SIZE - WINDOW + 1, 0) // BLOCK_SIZE
    return num_global, num_recalled, local


@triton.jit
def cap_logits(logits, soft_cap):
    """soft_cap * tanh(logits / soft_cap), from exponentials that cannot overflow to nan."""
    double = tl.exp2(tl.minimum(logits * (2.0 * LOG2E / soft_cap), 80.0))
    return soft_cap * (1.0 - 2.0 / (double + 1.0))
