"""rotate_rows: rotary embedding at absolute positions, for prompts that attend to everything."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Rotary
from csrc_triton.primitives import source_channel


@triton.jit
def _rotate_rows_kernel(
    x_ptr,  # [num_tokens, num_heads, head_size]
    position_ptr,  # [num_tokens]
    cos_sin_ptr,  # [num_positions, 2, half]
    out_ptr,  # [num_tokens, num_heads, head_size], contiguous
    magnitude,
    num_heads,
    x_stride_token,
    x_stride_head,
    HEAD_SIZE: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    PAD_HALF: tl.constexpr,
    PAD_REST: tl.constexpr,
):
    token_idx = tl.program_id(0).to(tl.int64)
    head_offs = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    head_mask = (head_offs < num_heads)[:, None]
    row_ptr = x_ptr + token_idx * x_stride_token + head_offs[:, None] * x_stride_head
    out_row_ptr = out_ptr + (token_idx * num_heads + head_offs[:, None]) * HEAD_SIZE
    dtype = out_ptr.dtype.element_ty
    if HALF > 0:
        half_offs = tl.arange(0, PAD_HALF)
        mask = head_mask & (half_offs < HALF)[None, :]
        at = source_channel(half_offs, HALF, INTERLEAVED)[None, :]
        first = tl.load(row_ptr + at, mask=mask, other=0.0).to(tl.float32) * magnitude
        at = source_channel(half_offs + HALF, HALF, INTERLEAVED)[None, :]
        second = tl.load(row_ptr + at, mask=mask, other=0.0).to(tl.float32) * magnitude
        angle_ptr = cos_sin_ptr + tl.load(position_ptr + token_idx) * (2 * HALF) + half_offs
        cos = tl.load(angle_ptr, mask=half_offs < HALF, other=0.0)[None, :]
        sin = tl.load(angle_ptr + HALF, mask=half_offs < HALF, other=0.0)[None, :]
        at = out_row_ptr + half_offs[None, :]
        tl.store(at, (first * cos - second * sin).to(dtype), mask=mask)
        tl.store(at + HALF, (second * cos + first * sin).to(dtype), mask=mask)
    if 2 * HALF < HEAD_SIZE:
        rest_offs = 2 * HALF + tl.arange(0, PAD_REST)
        mask = head_mask & (rest_offs < HEAD_SIZE)[None, :]
        rest = tl.load(row_ptr + rest_offs[None, :], mask=mask, other=0.0)
        tl.store(out_row_ptr + rest_offs[None, :], rest.to(dtype), mask=mask)


def rotate_rows(x: Tensor, positions: Tensor, rotary: Rotary, magnitude: float = 1.0) -> Tensor:
    """x rotated to its positions, rotary channels half-split.

    x          [num_tokens, num_heads, head_size] bf16 | fp16
    positions  [num_tokens] int32
    magnitude  factor of the rotary channels: rotary.query_scale for queries
    returns    like x, contiguous
    """
    num_tokens, num_heads, head_size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _rotate_rows_kernel[(num_tokens, triton.cdiv(num_heads, 8))](
        x,
        positions,
        rotary.cos_sin,
        out,
        magnitude,
        num_heads,
        x.stride(0),
        x.stride(1),
        HEAD_SIZE=head_size,
        HALF=rotary.half,
        INTERLEAVED=rotary.interleaved,
        HEADS=8,
        PAD_HALF=triton.next_power_of_2(max(rotary.half, 1)),
        PAD_REST=triton.next_power_of_2(max(head_size - 2 * rotary.half, 1)),
        num_warps=2,
    )
    return out
