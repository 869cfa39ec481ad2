"""From scores to blocks, in plain torch: what is recalled, and what is remembered of it.

The other half of the definition; reference.py has it all under one name.
"""

import torch
from torch import Tensor

from csrc_triton.layout import Kept, Memory, Tiles, own_part


def recall_blocks(
    score: Tensor,
    num_recalled: int,
    extent: Tensor | None = None,
    blocks: Tensor | None = None,
    per_layer: bool = False,
    memory: Memory | None = None,
    length: Tensor | None = None,
    shared: Tensor | None = None,
) -> Tensor:
    """The best blocks, in sequence order; of equals, the earlier.

    Scores count to 14 bits of mantissa, 12 beside what is shared: what differs by less is equal.

    score    [num_tiles, num_kv_heads, n] fp32; negative: not to be recalled
    extent   [num_tiles] int32: only so many columns of a tile count; default: all
    blocks   [num_tiles, num_rows, n] int32, the block each column stands for, ascending,
             -1 at the end; default: the column itself
    memory   counts too, and takes up the scores of named blocks; per_layer alone
    length   [num_tiles] int32: queries that these scores are sums over; for the memory
    shared   [num_tiles, num_rows, m] int32: named blocks that come before all others but the best,
             one of OWN_PART recalled
    returns  [num_tiles, num_rows, num_recalled] int32, ascending; -1 behind the last. A row for
             each KV head, or, per_layer, one for all by the sum of their scores
    """
    n = score.shape[-1]
    if per_layer:
        first, *others = score.unbind(1)
        score = sum(others, first).unsqueeze(1)  # in the order of the heads
    if memory is not None:
        score = _remember(score, blocks, memory, length)
    if extent is not None:
        columns = torch.arange(n, device=score.device)
        score = score.masked_fill(columns >= extent[:, None, None], -1.0)
    score = torch.where(score >= 0, score.float().view(torch.int32) >> 9, -1)
    if shared is not None:
        assert blocks is not None, "what is shared is looked for among named blocks"
        score = _with_shared(score, num_recalled, blocks, shared)
    order = score.argsort(dim=-1, descending=True, stable=True)[..., :num_recalled]
    chosen = torch.where(score.gather(-1, order) >= 0, order, n).sort(dim=-1).values
    chosen = torch.nn.functional.pad(chosen, (0, num_recalled - chosen.shape[-1]), value=n)
    if blocks is not None:
        named = blocks.gather(-1, chosen.clamp(max=n - 1).to(torch.int64))
    else:
        named = chosen
    return torch.where(chosen < n, named, -1).to(torch.int32)


def _with_shared(score: Tensor, num_recalled: int, blocks: Tensor, shared: Tensor) -> Tensor:
    """Scores as integers of 22 bits, of which two now tell who comes first."""
    best = score.argsort(dim=-1, descending=True, stable=True)[..., : own_part(num_recalled)]
    rank = (blocks[..., None] == shared[..., None, :]).any(-1).int()
    rank.scatter_(-1, best, 2)
    return torch.where(score >= 0, (rank << 20) + (score >> 2), -1)


def _remember(
    score: Tensor, blocks: Tensor | None, memory: Memory, length: Tensor | None
) -> Tensor:
    """Scores [num_tiles, 1, n] with what was found before; scores of named blocks join it."""
    if blocks is None:
        found = memory.found[:, None, : score.shape[-1]]
    else:
        named, can = blocks[:, 0].clamp(min=0).long(), score >= 0
        found = memory.found.gather(1, named)[:, None].masked_fill(~can, 0.0)
        assert length is not None
        own = score.masked_fill(~can, 0.0)[:, 0].to(memory.found.dtype)
        weight = (memory.weight / length.clamp(min=1)).to(own.dtype)
        memory.found.scatter_add_(1, named, own * weight[:, None])
        if memory.most is not None:
            memory.most.scatter_reduce_(1, named, own, "amax")
    return torch.where(score >= 0, score + found, score) if memory.counts else score


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
    before = tiles.position - 1
    page = _page_at(block_table, tiles, before.clamp(min=0), block_size)
    knows = is_generated & (before >= 0) & (kept.position[page] == before)
    block = kept.block[page].long()
    told = knows[:, None] & (block >= 0) & (block < max_blocks)
    found = kept.found.new_zeros((num_tiles, max_blocks))
    value = (kept.found[page] * share).masked_fill(~told, 0.0)
    return found.scatter_add_(1, block.masked_fill(~told, 0), value)


def keep(kept: Kept, found: Tensor, block_table: Tensor, tiles: Tiles, block_size: int) -> None:
    """What was found up to each tile's last token, for the token behind it.

    found  [num_tiles, max_blocks] fp32, of which the most is kept: nothing from a tile's block on
    """
    last = tiles.position + tiles.length - 1
    page = _page_at(block_table, tiles, last.clamp(min=0), block_size)
    best = recall_blocks(found[:, None], kept.block.shape[1], tiles.position // block_size)[:, 0]
    value = found.gather(1, best.clamp(min=0).long()).masked_fill(best < 0, 0.0)
    does = tiles.length > 0
    kept.block[page[does]] = best[does]
    kept.found[page[does]] = value[does].to(kept.found.dtype)
    kept.position[page[does]] = last[does]


def _page_at(block_table: Tensor, tiles: Tiles, position: Tensor, block_size: int) -> Tensor:
    block = (position // block_size).clamp(max=block_table.shape[1] - 1)  # of idle tiles
    return block_table[tiles.request.long(), block.long()].long()
