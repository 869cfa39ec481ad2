"""read_kv: keys and values out of their pages, for prompts that attend to everything."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Pages, Rotary
from csrc_triton.primitives import bias_stride


@triton.jit
def _read_kv_kernel(
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache_ptr,
    slot_ptr,  # [num_keys]
    block_start_ptr,  # [num_keys]
    cos_sin_ptr,  # [num_positions, 2, half]
    bias_ptr,  # [num_kv_heads, block_size or more, head_size], or null
    key_ptr,  # [num_keys, num_kv_heads, head_size], contiguous
    value_ptr,
    key_scale,
    value_scale,
    num_kv_heads,
    cache_stride_block,
    cache_stride_head,
    bias_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HEADS: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    PAD_HEAD: tl.constexpr,
):
    key_idx = tl.program_id(0).to(tl.int64)
    head_offs = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_mask = (head_offs < num_kv_heads)[:, None]
    slot = tl.load(slot_ptr + key_idx)
    row = slot // BLOCK_SIZE * cache_stride_block + slot % BLOCK_SIZE * HEAD_SIZE
    row = row + head_offs.to(tl.int64)[:, None] * cache_stride_head
    out = (key_idx * num_kv_heads + head_offs[:, None]) * HEAD_SIZE
    dtype = key_ptr.dtype.element_ty

    channel = tl.arange(0, PAD_HEAD)[None, :]
    mask = head_mask & (channel < HEAD_SIZE)
    value = tl.load(value_cache_ptr + row + channel, mask=mask, other=0.0).to(tl.float32)
    tl.store(value_ptr + out + channel, (value * value_scale).to(dtype), mask=mask)
    if HAS_BIAS:
        bias_ptr += head_offs[:, None] * bias_stride_head + slot % BLOCK_SIZE * HEAD_SIZE
    if HALF > 0:
        half_offs = tl.arange(0, PAD_HALF)
        mask = head_mask & (half_offs < HALF)[None, :]
        at = row + half_offs[None, :]
        first = tl.load(key_cache_ptr + at, mask=mask, other=0.0).to(tl.float32)
        second = tl.load(key_cache_ptr + HALF + at, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            first += tl.load(bias_ptr + half_offs[None, :], mask=mask, other=0.0)
            second += tl.load(bias_ptr + HALF + half_offs[None, :], mask=mask, other=0.0)
        first, second = first * key_scale, second * key_scale
        angle_ptr = cos_sin_ptr + tl.load(block_start_ptr + key_idx) * (2 * HALF) + half_offs
        cos = tl.load(angle_ptr, mask=half_offs < HALF, other=0.0)[None, :]
        sin = tl.load(angle_ptr + HALF, mask=half_offs < HALF, other=0.0)[None, :]
        at = out + half_offs[None, :]
        tl.store(key_ptr + at, (first * cos - second * sin).to(dtype), mask=mask)
        tl.store(key_ptr + HALF + at, (second * cos + first * sin).to(dtype), mask=mask)
    if 2 * HALF < HEAD_SIZE:
        rest_offs = 2 * HALF + tl.arange(0, PAD_REST)[None, :]
        mask = head_mask & (rest_offs < HEAD_SIZE)
        rest = tl.load(key_cache_ptr + row + rest_offs, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            rest += tl.load(bias_ptr + rest_offs, mask=mask, other=0.0)
        tl.store(key_ptr + out + rest_offs, (rest * key_scale).to(dtype), mask=mask)


def read_kv(
    pages: Pages, slots: Tensor, block_starts: Tensor, rotary: Rotary, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys rotated to their positions, rotary channels half-split, and values.

    slots         [num_keys] int64, block * block_size + offset
    block_starts  [num_keys] int32, position of the first key of the block
    dtype         of what is returned, fp32 | bf16 | fp16
    returns       twice [num_keys, num_kv_heads, head_size], contiguous
    """
    _, num_kv_heads, block_size, head_size = pages.key.shape
    shape = (len(slots), num_kv_heads, head_size)
    key, value = (torch.empty(shape, dtype=dtype, device=slots.device) for _ in range(2))
    _read_kv_kernel[(len(slots), triton.cdiv(num_kv_heads, 8))](
        pages.key,
        pages.value,
        slots,
        block_starts,
        rotary.cos_sin,
        pages.bias,
        key,
        value,
        pages.key_scale,
        pages.value_scale,
        num_kv_heads,
        pages.key.stride(0),
        pages.key.stride(1),
        bias_stride(pages),
        HEAD_SIZE=head_size,
        HALF=rotary.half,
        BLOCK_SIZE=block_size,
        HAS_BIAS=pages.bias is not None,
        HEADS=8,
        PAD_HALF=triton.next_power_of_2(max(rotary.half, 1)),
        PAD_REST=triton.next_power_of_2(max(head_size - 2 * rotary.half, 1)),
        PAD_HEAD=triton.next_power_of_2(head_size),
        num_warps=2,
    )
    return key, value
