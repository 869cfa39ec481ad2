"""The method on plain tensors: score, recall, refine, recall again, attend."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from csrc_triton import reference
from csrc_triton.layout import Memory, Pages, Recalled, Rotary, Scope, Tail, Tiles

# Scores of all blocks for all tiles of a step could take gigabytes at millions of tokens, so
# tiles go through the selection in runs whose scratch stays below this.
SELECTION_BYTES = 256 << 20
# So many of a full tile's queries, at equal distances, select for all of it, at a fraction of what
# all would cost (docs/choices.md).
SELECTING_QUERIES = 8
# Of a tile in a Tail, the shares of so many blocks at least, the best and the shared, are told to
# the layers behind.
TAIL_FINDS = 1024
ABOVE_ALL = 1e4  # more than shares of all heads, and what was found before, add up to


def stages(device: torch.device) -> ModuleType:
    """The five stages: Triton kernels on a GPU, the reference on a CPU."""
    if device.type == "cpu":
        return reference
    from csrc_triton import kernels  # triton has no CPU build worth importing

    return kernels


def scratch_per_tile(
    num_heads: int,
    num_kv_heads: int,
    max_length: int,
    max_blocks: int,
    scope: Scope,
    is_tail: bool = False,
) -> int:
    """Numbers of fp32 that scores and masses of a tile take while it selects."""
    rows = num_heads * min(max_length, SELECTING_QUERIES)
    if is_tail:
        return (rows + num_kv_heads) * max_blocks
    per_block = num_heads + num_kv_heads if max_length == 1 else num_kv_heads
    return per_block * max_blocks + rows * scope.of(max_length).listed


def tiles_per_run(numbers: int) -> int:
    """How many tiles of so much scratch (scratch_per_tile) the selection takes at once."""
    # a multiple of 4: kernels are compiled once for rows that start on 16 bytes
    return max(4, SELECTION_BYTES // (4 * numbers) // 4 * 4)


def selecting(tiles: Tiles) -> Tiles:
    """Those of the tiles' queries that select; the last of each is one of them."""
    return tiles.every(max(1, tiles.max_length // SELECTING_QUERIES))


def select(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    soft_cap: float = 0.0,
    add_up: Callable[[Tensor], Tensor] | None = None,
    memory: Memory | None = None,
    stage: Any = None,
) -> Tensor:
    """Recalled blocks of each tile: [num_tiles, num_kv_heads or 1, recalled] int32, ascending.

    As many as the scope of such tiles recalls (Scope.of). One row for all KV heads if they recall
    the same (Scope.per_layer); `add_up` then sums scores over the processes that have a share of
    the heads each, and `memory` takes up what was found. `stage` has the stages to call instead of
    this device's.
    """
    stage, scope = stage or stages(query.device), scope.of(tiles.max_length)
    tiles = selecting(tiles)
    score, extent = stage.score_blocks(query, pages, block_table, tiles, scope, rotary, scale)
    score = _together(score, scope, add_up)
    told = scope.per_layer, memory, tiles.length
    if not scope.candidate_blocks:
        return stage.recall_blocks(score, scope.recall_blocks, extent, None, *told)
    candidates = stage.recall_blocks(score, scope.candidate_blocks, extent, None, *told)
    given = (query, pages, block_table, tiles, candidates, scope, rotary, scale, soft_cap)
    refined = _together(stage.refine_scores(*given), scope, add_up)
    return stage.recall_blocks(refined, scope.recall_blocks, None, candidates, *told)


def select_for_tail(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    shared: Tensor,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    soft_cap: float = 0.0,
    add_up: Callable[[Tensor], Tensor] | None = None,
    memory: Memory | None = None,
    stage: Any = None,
) -> Tensor:
    """The same for tiles of a Tail, which are few: from all keys, with no candidates before.

    shared  what `select` returns for them, of this layer or one before. Of it the best are
            recalled, by this layer's shares, and beside them the best of all.
    """
    stage = stage or stages(query.device)
    given = (query, pages, block_table, selecting(tiles), scope, rotary, scale, soft_cap)
    score, extent = stage.exact_scores(*given)
    score = _together(score, scope, add_up)
    # a memory takes up the highest shares as they are, no sums over queries
    told = scope.per_layer, memory, tiles.length.clamp(max=1)
    count = max(TAIL_FINDS, shared.shape[-1] + scope.recall_blocks)
    blocks = stage.recall_blocks(_above_all(score, shared), count, extent, None, *told)
    named = blocks.clamp(min=0).long().expand(-1, score.shape[1], -1)
    found = score.gather(-1, named).masked_fill(blocks < 0, -1.0)
    return stage.recall_blocks(found, scope.recall_blocks, None, blocks, *told, shared)


def _above_all(score: Tensor, blocks: Tensor) -> Tensor:
    """Scores that let these blocks be recalled before others; -1 among them: none."""
    score, rows = score.clone(), blocks.shape[1]
    bonus = (blocks >= 0).to(score.dtype) * ABOVE_ALL
    score[:, :rows].scatter_add_(-1, blocks.clamp(min=0).long(), bonus)
    return score


def _together(score: Tensor, scope: Scope, add_up: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Scores of all processes' heads, where these recall together."""
    if not scope.per_layer or add_up is None:
        return score
    # whole 16 bytes, which vLLM's own all-reduce takes; others go to NCCL, in twice the time
    shape = score.shape[0], 1, score.shape[2]
    count = math.prod(shape)
    padded = score.new_empty(-(-count // 4) * 4)
    torch.sum(score, 1, keepdim=True, out=padded[:count].view(shape))
    return add_up(padded)[:count].view(shape)


def reattention(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    out: Tensor,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    recalled: Recalled | None = None,
    add_up: Callable[[Tensor], Tensor] | None = None,
    memory: Memory | None = None,
    tail: Tail | None = None,
    stage: Any = None,
) -> Recalled:
    """Attention of every tile over its own scope (ReAttention, arXiv 2407.15176).

    query        [num_tokens, num_heads, head_size] fp32 | bf16 | fp16, not rotated
    block_table  [num_requests, max_blocks] int32; its width bounds the context
    tiles        consecutive queries of one request within one block; see layout.Tiles
    scale        of the logits, 1/sqrt(head_size) as a rule
    out          [num_tokens, num_heads, head_size]; rows of no tile are left alone
    recalled     what another layer recalled for these tiles, instead of a selection
    tail         other tiles, which get a selection of this layer in any case
    add_up       as `select` takes it; so are memory and stage
    returns      what was selected for all of them, for the layers behind
    """
    stage = stage or stages(query.device)
    max_blocks, num_kv_heads = block_table.shape[1], pages.key.shape[1]
    can_select = max_blocks > scope.dense_blocks and scope.recall_blocks and not scope.window

    def in_runs(
        choose: Callable[..., Tensor],
        tiles: Tiles,
        scope: Scope,
        memory: Memory | None,
        *shared: Tensor,
    ) -> Tensor:
        size = query.shape[1], num_kv_heads, tiles.max_length, max_blocks
        run = tiles_per_run(scratch_per_tile(*size, scope, is_tail=len(shared) > 0))
        given = (scope, rotary, scale, soft_cap, add_up)
        found = []
        for start in range(0, tiles.row.shape[0], run):
            part = tiles.part(start, start + run)
            known = memory and memory.part(start, start + run)
            theirs = [blocks[start : start + run] for blocks in shared]
            found.append(choose(query, pages, block_table, part, *theirs, *given, known, stage))
        return found[0] if len(found) == 1 else torch.cat(found)

    def shared(tiles: Tiles, scope: Scope, memory: Memory | None) -> Tensor:
        if not can_select:
            return block_table.new_empty((tiles.row.shape[0], 1, 0))
        return in_runs(select, tiles, scope, memory)

    def attend(tiles: Tiles, recalled: Tensor, scope: Scope) -> None:
        given = (tiles, recalled, scope, rotary, scale, out, soft_cap, sinks)
        stage.attend(query, pages, block_table, *given)

    if recalled is None or not can_select:
        recalled = Recalled(shared(tiles, scope, memory))
        if tail is not None:
            recalled = recalled._replace(tail=shared(tail.tiles, scope.of_tail, None))
    attend(tiles, recalled.tiles, scope.of(tiles.max_length))
    if tail is not None:
        own = recalled.tail
        assert own is not None, "what is recalled must be of a layer with the same tail"
        if can_select:
            own = in_runs(select_for_tail, tail.tiles, scope.of_tail, tail.memory, own)
        attend(tail.tiles, own, scope.of_tail)
    return recalled
