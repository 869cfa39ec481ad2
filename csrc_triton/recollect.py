"""recollect and keep: what a request found, from one of its tokens to the next.

A row of `found` is as wide as the block table, and what is kept of it is short: a program writes a
part of a row, and then what it has to tell of that part.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from csrc_triton.layout import Kept, Tiles
from csrc_triton.primitives import early_launch, wait_for_previous
from csrc_triton.recall import recall_blocks

COLUMNS = 4096


@triton.jit
def _page_at(table_ptr, request_ptr, tile_idx, position, table_stride, BLOCK_SIZE: tl.constexpr):
    table_ptr += tl.load(request_ptr + tile_idx).to(tl.int64) * table_stride
    return tl.load(table_ptr + position // BLOCK_SIZE).to(tl.int64)


@triton.jit(do_not_specialize=["max_blocks", "table_stride"])
def _recollect_kernel(
    block_ptr,  # [num_pages, KEPT]
    value_ptr,  # [num_pages, KEPT]
    kept_position_ptr,  # [num_pages]
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    position_ptr,
    is_generated_ptr,
    found_ptr,  # [num_tiles, max_blocks]
    share,
    max_blocks,
    table_stride,
    KEPT: tl.constexpr,
    PAD_KEPT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    tile_idx = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * COLUMNS
    found_ptr += tile_idx * max_blocks
    column = first + tl.arange(0, COLUMNS)
    tl.store(found_ptr + column, tl.zeros([COLUMNS], tl.float32), mask=column < max_blocks)
    before = tl.load(position_ptr + tile_idx) - 1
    is_generated = tl.load(is_generated_ptr + tile_idx) != 0
    # an idle tile may stand anywhere, behind the table too
    if is_generated & (before >= 0) & (before < max_blocks * BLOCK_SIZE):
        page = _page_at(
            block_table_ptr, request_ptr, tile_idx, before, table_stride, BLOCK_SIZE
        )  # fmt: skip
        if tl.load(kept_position_ptr + page) == before:
            offs = tl.arange(0, PAD_KEPT)
            mask = offs < KEPT
            block = tl.load(block_ptr + page * KEPT + offs, mask=mask, other=-1)
            value = tl.load(value_ptr + page * KEPT + offs, mask=mask, other=0.0)
            tl.debug_barrier()
            here = (block >= first) & (block < first + COLUMNS) & (block < max_blocks)
            tl.store(found_ptr + block, value * share, mask=here)


@triton.jit(do_not_specialize=["max_blocks", "table_stride"])
def _keep_kernel(
    best_ptr,  # [num_tiles, KEPT]
    found_ptr,  # [num_tiles, max_blocks]
    block_ptr,  # [num_pages, KEPT]
    value_ptr,  # [num_pages, KEPT]
    kept_position_ptr,  # [num_pages]
    block_table_ptr,  # [num_requests, max_blocks]
    request_ptr,  # [num_tiles]
    length_ptr,
    position_ptr,
    max_blocks,
    table_stride,
    KEPT: tl.constexpr,
    PAD_KEPT: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    EARLY: tl.constexpr,
):
    wait_for_previous(EARLY)
    tile_idx = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + tile_idx)
    if length == 0:
        return
    last = tl.load(position_ptr + tile_idx) + length - 1
    page = _page_at(block_table_ptr, request_ptr, tile_idx, last, table_stride, BLOCK_SIZE)
    offs = tl.arange(0, PAD_KEPT)
    mask = offs < KEPT
    best = tl.load(best_ptr + tile_idx * KEPT + offs, mask=mask, other=-1)
    value = tl.load(found_ptr + tile_idx * max_blocks + best, mask=best >= 0, other=0.0)
    tl.store(block_ptr + page * KEPT + offs, best, mask=mask)
    tl.store(value_ptr + page * KEPT + offs, value, mask=mask)
    tl.store(kept_position_ptr + page, last)


def recollect(
    kept: Kept,
    block_table: Tensor,
    tiles: Tiles,
    is_generated: Tensor,
    share: float,
    block_size: int,
) -> Tensor:
    """A share of what was found up to the token before each tile's, by block of its request.

    is_generated  [num_tiles] bool; the others start anew
    returns       [num_tiles, max_blocks] fp32
    """
    num_tiles, max_blocks = len(tiles.row), block_table.shape[1]
    size = kept.block.shape[1]
    found = torch.empty((num_tiles, max_blocks), dtype=torch.float32, device=block_table.device)
    columns = min(COLUMNS, triton.next_power_of_2(max_blocks))
    _recollect_kernel[(num_tiles, triton.cdiv(max_blocks, columns))](
        *kept,
        block_table,
        tiles.request,
        tiles.position,
        is_generated,
        found,
        share,
        max_blocks,
        block_table.stride(0),
        KEPT=size,
        PAD_KEPT=triton.next_power_of_2(size),
        BLOCK_SIZE=block_size,
        COLUMNS=columns,
        num_warps=4,
        **early_launch(block_table.device),
    )
    return found


def keep(kept: Kept, found: Tensor, block_table: Tensor, tiles: Tiles, block_size: int) -> None:
    """What was found up to each tile's last token, for the token behind it.

    found  [num_tiles, max_blocks] fp32, of which the most is kept: nothing from a tile's block on
    """
    size = kept.block.shape[1]
    best = recall_blocks(found[:, None], size, tiles.position // block_size)
    _keep_kernel[(len(tiles.row),)](
        best,
        found,
        *kept,
        block_table,
        tiles.request,
        tiles.length,
        tiles.position,
        found.shape[1],
        block_table.stride(0),
        KEPT=size,
        PAD_KEPT=triton.next_power_of_2(size),
        BLOCK_SIZE=block_size,
        num_warps=1,
        **early_launch(found.device),
    )
