"""attend: softmax attention over a tile's scope, every block rotated to its slot."""

import functools
import math

import torch
import triton
from torch import Tensor

from csrc_triton.attend_decode import attend_single_kernel, merge_splits_kernel
from csrc_triton.attend_prefill import attend_tile_kernel
from csrc_triton.layout import Pages, Rotary, Scope, Tiles
from csrc_triton.primitives import bias_stride, early_launch, row_strides, slot_sizes

MAX_SPLITS = 64  # of a scope


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
    recalled  [num_tiles, num_kv_heads or 1, recall_blocks] int32, ascending
    sinks     [num_heads] or None
    out       [num_tokens, num_heads, head_size]: only the tiles' rows are written
    """
    num_kv_heads, block_size, head_size = pages.key.shape[1:]
    num_tiles = tiles.row.shape[0]
    group = query.shape[1] // num_kv_heads
    arguments = (
        query,
        pages.key,
        pages.value,
        block_table,
        *tiles.columns,
        recalled,
        rotary.cos_sin,
        pages.bias,
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
        bias_stride(pages),
        *row_strides(recalled),
    )
    fixed = {
        "HEAD_SIZE": head_size,
        "HALF": rotary.half,
        "INTERLEAVED": rotary.interleaved,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        **slot_sizes(scope),
        "WINDOW": scope.window,
        "HAS_CAP": soft_cap > 0,
        "HAS_BIAS": pages.bias is not None,
        "HAS_SINKS": sinks is not None,
        "PAD_HEAD": max(triton.next_power_of_2(head_size), 16),
    }
    early = early_launch(query.device)
    if tiles.max_length > 1:
        max_rows = tiles.max_length * group
        hopper = for_hopper(query.device)
        if hopper and _hopper_takes(query, pages, rotary, scope, max_rows, soft_cap):
            for flag in ("WINDOW", "HAS_CAP", "PAD_HEAD"):
                del fixed[flag]
            hopper[(num_tiles * math.ceil(max_rows / 128), num_kv_heads)](
                *arguments, **fixed, STAGES=5, AHEAD=3 if pages.key.itemsize == 1 else 2,
                MAX_ROWS=max_rows,
                SLOTS=max(64 // block_size, 1), num_warps=4, **early,
            )  # fmt: skip
            return
        rows = min(max(triton.next_power_of_2(max_rows), 16), 128)
        keys, warps, stages = _tile_sizes(head_size)
        attend_tile_kernel[(num_tiles * math.ceil(max_rows / rows), num_kv_heads)](
            *arguments, **fixed, MAX_ROWS=max_rows, ROWS=rows, SLOTS=max(keys // block_size, 1),
            PAD_HALF=max(triton.next_power_of_2(rotary.half), 16),
            PAD_REST=max(triton.next_power_of_2(head_size - 2 * rotary.half), 16),
            STAGES=stages, num_warps=warps, **early,
        )  # fmt: skip
        return
    keys, warps, stages, wanted = _single_sizes(head_size)
    slots = max(keys // block_size, 1)
    splits = triton.next_power_of_2(max(1, wanted // (num_tiles * num_kv_heads)))
    splits = min(splits, MAX_SPLITS)
    partial = log_mass = None
    if splits > 1:
        shape = (num_tiles, num_kv_heads, splits, group)
        partial = torch.empty((*shape, head_size), dtype=torch.float32, device=query.device)
        log_mass = torch.empty(shape, dtype=torch.float32, device=query.device)
    attend_single_kernel[(num_tiles, num_kv_heads, splits)](
        *arguments, partial, log_mass, splits, **fixed, SLOTS=slots, MERGES=splits > 1,
        ROWS=max(triton.next_power_of_2(group), 16 // slots), STAGES=stages, num_warps=warps,
        **early,
    )  # fmt: skip
    if splits > 1:
        merge_splits_kernel[(num_tiles, num_kv_heads * group)](
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
            MAX_SPLITS=MAX_SPLITS,
            HAS_SINKS=sinks is not None,
            PAD_HEAD=triton.next_power_of_2(head_size),
            num_warps=4,
            **early,
        )


@functools.cache
def for_hopper(device: torch.device):
    """The kernel in Gluon, on the GPUs and in the Triton it was written for; else None."""
    if device.type == "cuda" and not torch.version.hip and triton.__version__.startswith("3.6."):
        if torch.cuda.get_device_capability(device)[0] == 9:
            from csrc_triton.attend_hopper import attend_hopper_kernel

            return attend_hopper_kernel
    return None


def _hopper_takes(
    query: Tensor, pages: Pages, rotary: Rotary, scope: Scope, max_rows: int, soft_cap: float
) -> bool:
    """Whether it knows the keys' dtype and turns them whole, and most rows of a program in use."""
    block_size, head_size = pages.key.shape[2:]
    return (
        pages.key.dtype in (query.dtype, torch.float8_e4m3fn)
        and query.dtype.itemsize == 2
        and head_size == 2 * rotary.half
        and head_size in (64, 128)
        and block_size in (16, 32, 64)
        and all(stride % 16 == 0 for stride in pages.key.stride()[:2])
        and max_rows > 64
        and not scope.window
        and not soft_cap
    )


def _single_sizes(head_size: int) -> tuple[int, int, int, int]:
    """Keys per step, warps, stages, and programs to aim at, from a sweep on an H200."""
    return 64, 2 if head_size <= 128 else 4, 2, 528


def _tile_sizes(head_size: int) -> tuple[int, int, int]:
    """Keys per step, warps and stages, from a sweep on an H200."""
    return 32, 4 if head_size <= 128 else 8, 1
