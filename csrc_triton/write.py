"""write_kv: keys go into the page rotated by their offset; a filled block gets its summary."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Pages, Rotary
from csrc_triton.primitives import bias_stride, source_channel


@triton.jit
def _narrow(x, LIMIT: tl.constexpr, dtype: tl.constexpr):
    if LIMIT > 0:  # fp8: saturate, whatever the cast does
        x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    return x.to(dtype)


@triton.jit
def _store_summary(raw, mean_ptr, mask, HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """Mean and variance of raw [BLOCK_SIZE, channels] over the block."""
    mean = tl.sum(raw, axis=0) / BLOCK_SIZE
    away = raw - mean[None, :]
    variance = tl.sum(away * away, axis=0) / BLOCK_SIZE
    dtype = mean_ptr.dtype.element_ty
    if dtype == tl.float16:  # an inf would make every share of the request nan
        variance = tl.minimum(variance, 65504.0)
    tl.store(mean_ptr, mean.to(dtype), mask=mask)
    tl.store(mean_ptr + HEAD_SIZE, variance.to(dtype), mask=mask)


@triton.jit
def _write_kv_kernel(
    key_ptr,  # [num_tokens, num_kv_heads, head_size]
    value_ptr,  # [num_tokens, num_kv_heads, head_size]
    key_cache_ptr,  # [num_blocks, num_kv_heads, block_size, head_size]
    value_cache_ptr,
    summary_ptr,  # [num_blocks, num_kv_heads, 2, head_size]
    slot_mapping_ptr,  # [num_tokens]
    cos_sin_ptr,  # [num_positions, 2, half]
    bias_ptr,  # [num_kv_heads, block_size or more, head_size], or null
    key_inverse_scale,
    value_inverse_scale,
    key_scale,
    key_stride_token,
    key_stride_head,
    value_stride_token,
    value_stride_head,
    cache_stride_block,
    cache_stride_head,
    summary_stride_block,
    summary_stride_head,
    bias_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
    PAD_HEAD: tl.constexpr,
):
    token_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1).to(tl.int64)
    slot = tl.load(slot_mapping_ptr + token_idx)
    if slot < 0:
        return
    block_idx = slot // BLOCK_SIZE
    offset = slot % BLOCK_SIZE
    page_offs = block_idx * cache_stride_block + head_idx * cache_stride_head
    row_ptr = key_ptr + token_idx * key_stride_token + head_idx * key_stride_head
    cache_dtype = key_cache_ptr.dtype.element_ty

    value_offs = tl.arange(0, PAD_HEAD)
    value_mask = value_offs < HEAD_SIZE
    value = tl.load(
        value_ptr + token_idx * value_stride_token + head_idx * value_stride_head + value_offs,
        mask=value_mask,
        other=0.0,
    ).to(tl.float32)
    tl.store(
        value_cache_ptr + page_offs + offset * HEAD_SIZE + value_offs,
        _narrow(value * value_inverse_scale, LIMIT, cache_dtype),
        mask=value_mask,
    )

    half_offs = tl.arange(0, PAD_HALF)
    half_mask = half_offs < HALF
    first_offs = source_channel(half_offs, HALF, INTERLEAVED)
    second_offs = source_channel(half_offs + HALF, HALF, INTERLEAVED)
    rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
    rest_mask = rest_offs < HEAD_SIZE
    out_ptr = key_cache_ptr + page_offs + offset * HEAD_SIZE
    if HAS_BIAS:
        bias_ptr += head_idx * bias_stride_head
        here_ptr = bias_ptr + offset * HEAD_SIZE
    if HALF > 0:
        first = tl.load(row_ptr + first_offs, mask=half_mask, other=0.0).to(tl.float32)
        second = tl.load(row_ptr + second_offs, mask=half_mask, other=0.0).to(tl.float32)
        angle_ptr = cos_sin_ptr + offset * (2 * HALF) + half_offs
        cos = tl.load(angle_ptr, mask=half_mask, other=0.0)
        sin = tl.load(angle_ptr + HALF, mask=half_mask, other=0.0)
        turned = (first * cos - second * sin) * key_inverse_scale
        if HAS_BIAS:
            turned -= tl.load(here_ptr + half_offs, mask=half_mask, other=0.0)
        tl.store(out_ptr + half_offs, _narrow(turned, LIMIT, cache_dtype), mask=half_mask)
        turned = (second * cos + first * sin) * key_inverse_scale
        if HAS_BIAS:
            turned -= tl.load(here_ptr + HALF + half_offs, mask=half_mask, other=0.0)
        tl.store(out_ptr + HALF + half_offs, _narrow(turned, LIMIT, cache_dtype), mask=half_mask)
    if 2 * HALF < HEAD_SIZE:
        rest = tl.load(row_ptr + rest_offs, mask=rest_mask, other=0.0).to(tl.float32)
        rest *= key_inverse_scale
        if HAS_BIAS:
            rest -= tl.load(here_ptr + rest_offs, mask=rest_mask, other=0.0)
        tl.store(out_ptr + rest_offs, _narrow(rest, LIMIT, cache_dtype), mask=rest_mask)
    if offset < BLOCK_SIZE - 1:
        return

    # The block is full: its summary. Keys that come in this very step are taken from the input
    # (other programs are writing them now) and rounded as the page rounds; the others from the
    # page.
    slot_offs = tl.arange(0, BLOCK_SIZE)
    near = token_idx - (BLOCK_SIZE - 1) + slot_offs
    near_slot = tl.load(slot_mapping_ptr + near, mask=near >= 0, other=-1)
    now = near_slot == slot - offset + slot_offs
    before = now == 0
    near_ptr = key_ptr + near[:, None] * key_stride_token + head_idx * key_stride_head
    past_ptr = key_cache_ptr + page_offs + slot_offs[:, None] * HEAD_SIZE
    mean_ptr = summary_ptr + block_idx * summary_stride_block + head_idx * summary_stride_head
    if HALF > 0:
        mask = half_mask[None, :]
        now_mask = now[:, None] & mask
        past_mask = before[:, None] & mask
        angle_ptr = cos_sin_ptr + slot_offs[:, None] * (2 * HALF) + half_offs[None, :]
        cos = tl.load(angle_ptr, mask=mask, other=0.0)
        sin = tl.load(angle_ptr + HALF, mask=mask, other=0.0)
        first = tl.load(near_ptr + first_offs[None, :], mask=now_mask, other=0.0).to(tl.float32)
        second = tl.load(near_ptr + second_offs[None, :], mask=now_mask, other=0.0).to(tl.float32)
        past = tl.load(past_ptr + half_offs[None, :], mask=past_mask, other=0.0).to(tl.float32)
        turned = (first * cos - second * sin) * key_inverse_scale
        if HAS_BIAS:
            all_ptr = bias_ptr + slot_offs[:, None] * HEAD_SIZE + half_offs[None, :]
            turned -= tl.load(all_ptr, mask=mask, other=0.0)
        turned = _narrow(turned, LIMIT, cache_dtype).to(tl.float32)
        turned_first = tl.where(now[:, None], turned, past) * key_scale
        past = tl.load(past_ptr + HALF + half_offs[None, :], mask=past_mask, other=0.0)
        turned = (second * cos + first * sin) * key_inverse_scale
        if HAS_BIAS:
            turned -= tl.load(all_ptr + HALF, mask=mask, other=0.0)
        turned = _narrow(turned, LIMIT, cache_dtype).to(tl.float32)
        turned_second = tl.where(now[:, None], turned, past.to(tl.float32)) * key_scale
        raw = turned_first * cos + turned_second * sin
        _store_summary(raw, mean_ptr + half_offs, half_mask, HEAD_SIZE, BLOCK_SIZE)
        raw = turned_second * cos - turned_first * sin
        _store_summary(raw, mean_ptr + HALF + half_offs, half_mask, HEAD_SIZE, BLOCK_SIZE)
    if 2 * HALF < HEAD_SIZE:
        mask = rest_mask[None, :]
        came = tl.load(near_ptr + rest_offs[None, :], mask=now[:, None] & mask, other=0.0)
        came = came.to(tl.float32) * key_inverse_scale
        if HAS_BIAS:
            all_ptr = bias_ptr + slot_offs[:, None] * HEAD_SIZE + rest_offs[None, :]
            came -= tl.load(all_ptr, mask=mask, other=0.0)
        came = _narrow(came, LIMIT, cache_dtype)
        past = tl.load(past_ptr + rest_offs[None, :], mask=before[:, None] & mask, other=0.0)
        raw = tl.where(now[:, None], came.to(tl.float32), past.to(tl.float32)) * key_scale
        _store_summary(raw, mean_ptr + rest_offs, rest_mask, HEAD_SIZE, BLOCK_SIZE)


def write_kv(
    key: Tensor, value: Tensor, pages: Pages, slot_mapping: Tensor, rotary: Rotary
) -> None:
    """Store keys rotated by their offset in the block, values, and summaries of filled blocks.

    key, value    [num_tokens or more, num_kv_heads, head_size]  fp32 | bf16 | fp16, un-rotated
    slot_mapping  [num_tokens] int64, block * block_size + offset; negative: padding
    pages         written; block_size must be a power of two
    """
    _, num_kv_heads, block_size, head_size = pages.key.shape
    half = rotary.half
    fp8 = pages.key.dtype.itemsize == 1
    _write_kv_kernel[(slot_mapping.shape[0], num_kv_heads)](
        key,
        value,
        pages.key,
        pages.value,
        pages.summary,
        slot_mapping,
        rotary.cos_sin,
        pages.bias,
        1.0 / pages.key_scale,
        1.0 / pages.value_scale,
        pages.key_scale,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        pages.key.stride(0),
        pages.key.stride(1),
        pages.summary.stride(0),
        pages.summary.stride(1),
        bias_stride(pages),
        HEAD_SIZE=head_size,
        HALF=half,
        BLOCK_SIZE=block_size,
        INTERLEAVED=rotary.interleaved,
        LIMIT=torch.finfo(pages.key.dtype).max if fp8 else 0,
        HAS_BIAS=pages.bias is not None,
        PAD_HALF=triton.next_power_of_2(max(half, 1)),
        PAD_REST=triton.next_power_of_2(max(head_size - 2 * half, 1)),
        PAD_HEAD=triton.next_power_of_2(head_size),
        num_warps=2,
    )
