"""exact_scores: shares of the softmax over all keys, as the paper's selection has them.

The first kernel is that of refine.py, with every block in its list. A second adds each row up, a
third compares the rows block by block.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Pages, Rotary, Scope, Tiles
from csrc_triton.primitives import (
    add_power,
    early_launch,
    selecting_tile,
    slot_sizes,
    wait_for_previous,
)
from csrc_triton.refine import key_mass

COLUMNS = 1024


@triton.jit
def _row_total_kernel(
    length_ptr,  # [num_tiles]
    position_ptr,
    dense_ptr,
    mass_ptr,  # [num_tiles, num_kv_heads, MAX_ROWS, num_listed] log2
    total_ptr,  # [num_tiles, num_kv_heads, MAX_ROWS] log2
    num_listed,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    tile_idx = tl.program_id(0).to(tl.int64)
    row_idx = tl.program_id(2)
    num_rows, selects, local = selecting_tile(
        tile_idx, length_ptr, position_ptr, dense_ptr, GROUP, BLOCK_SIZE, GLOBAL, RECALL, LOCAL
    )
    if (row_idx >= num_rows) | (not selects):
        return
    at = (tile_idx * tl.num_programs(1) + tl.program_id(1)) * MAX_ROWS + row_idx
    mass_ptr += at * num_listed
    best = tl.full([COLUMNS], -1e30, tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for first in tl.range(0, local, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mass = tl.load(mass_ptr + column, mask=column < local, other=-1e30)
        best, total = add_power(best, total, mass)
    most = tl.max(best, axis=0)
    tl.store(total_ptr + at, most + tl.log2(tl.sum(total * tl.exp2(best - most), axis=0)))


@triton.jit(do_not_specialize=["max_blocks"])
def _highest_share_kernel(
    length_ptr,  # [num_tiles]
    position_ptr,
    dense_ptr,
    mass_ptr,  # [num_tiles, num_kv_heads, MAX_ROWS, num_listed] log2
    total_ptr,  # [num_tiles, num_kv_heads, MAX_ROWS] log2
    score_ptr,  # [num_tiles, num_kv_heads, max_blocks]
    extent_ptr,  # [num_tiles]
    num_listed,
    max_blocks,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GLOBAL: tl.constexpr,
    RECALL: tl.constexpr,
    LOCAL: tl.constexpr,
    MAX_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    tile_idx = tl.program_id(0).to(tl.int64)
    head_idx = tl.program_id(1)
    first = tl.program_id(2) * COLUMNS
    num_rows, selects, local = selecting_tile(
        tile_idx, length_ptr, position_ptr, dense_ptr, GROUP, BLOCK_SIZE, GLOBAL, RECALL, LOCAL
    )
    extent = tl.where(selects, local, 0)
    if (head_idx == 0) & (first == 0):
        tl.store(extent_ptr + tile_idx, extent)
    if first >= extent:
        return
    out_row = tile_idx * tl.num_programs(1) + head_idx
    column = first + tl.arange(0, COLUMNS)
    mask = column < extent
    highest = tl.full([COLUMNS], float("-inf"), tl.float32)
    for row_idx in tl.range(0, num_rows):
        row = out_row * MAX_ROWS + row_idx
        mass = tl.load(mass_ptr + row * num_listed + column, mask=mask, other=float("-inf"))
        highest = tl.maximum(highest, mass - tl.load(total_ptr + row))
    share = tl.exp2(tl.minimum(highest, 0.0))
    share = tl.where(column < GLOBAL, -1.0, share)
    tl.store(score_ptr + out_row * max_blocks + column, share, mask=mask)


def exact_scores(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Each block's share of the position-free softmax, from every key before the local blocks.

    query        [num_tokens, num_heads, head_size] bf16 | fp16, not rotated
    block_table  [num_requests, max_blocks] int32
    returns      score [num_tiles, num_kv_heads, max_blocks] fp32: the highest of the tile's rows,
                 defined below the extent; extent [num_tiles] int32, 0 for tiles that recall nothing
    """
    mass = key_mass(query, pages, block_table, tiles, None, scope, rotary, scale, soft_cap)
    num_tiles, num_kv_heads, max_rows, num_listed = mass.shape
    max_blocks = block_table.shape[1]
    fp32: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    total = torch.empty((num_tiles, num_kv_heads, max_rows), **fp32)
    score = torch.empty((num_tiles, num_kv_heads, max_blocks), **fp32)
    extent = torch.empty((num_tiles,), dtype=torch.int32, device=query.device)
    fixed = {
        "GROUP": query.shape[1] // num_kv_heads,
        "BLOCK_SIZE": pages.block_size,
        **slot_sizes(scope),
        "MAX_ROWS": max_rows,
        "COLUMNS": COLUMNS,
        **early_launch(query.device),
    }
    place = tiles.length, tiles.position, tiles.dense, mass, total
    grid = num_tiles, num_kv_heads, max_rows
    _row_total_kernel[grid](*place, num_listed, **fixed, num_warps=4)
    grid = num_tiles, num_kv_heads, triton.cdiv(max_blocks, COLUMNS)
    _highest_share_kernel[grid](*place, score, extent, num_listed, max_blocks, **fixed, num_warps=4)
    return score, extent
