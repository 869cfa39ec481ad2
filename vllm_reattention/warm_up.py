"""In vLLM's profile run: compile what a server will run, and take the memory that it will take."""

import torch
from torch import Tensor

from csrc_triton.layout import Pages, Rotary, Scope, Tail, Tiles
from vllm_reattention.attention import reattention, stages
from vllm_reattention.memory import Memories


def warm_up(
    query: Tensor,
    num_kv_heads: int,
    cache_dtype: torch.dtype,
    tile_counts: dict[int, set[int]],
    max_blocks: int,
    block_size: int,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
    key_bias: Tensor | None = None,
) -> None:
    """Compile what a server will run and touch the memory it will take, with nothing to do.

    query        [num_tokens, num_heads, head_size], strided as it will be; any values
    cache_dtype  of keys and values
    tile_counts  numbers of tiles to try, by their max_length
    key_bias     Pages.bias
    """
    stage, head_size, device = stages(query.device), query.shape[2], query.device
    pages = _a_page(query, num_kv_heads, cache_dtype, block_size, key_bias)
    nowhere = torch.full((1,), -1, device=device)
    raw = query.new_zeros((1, num_kv_heads, head_size))
    stage.write_kv(raw, raw, pages, nowhere, rotary)
    block_table = torch.zeros((1, max_blocks), dtype=torch.int32, device=device)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for max_length, counts in tile_counts.items():
        for num_tiles in counts:
            nothing = torch.zeros(num_tiles, dtype=torch.int32, device=device)
            tiles = Tiles(nothing, nothing, nothing, nothing, nothing, max_length)
            memories = Memories(1, block_size, scope.memory, 1.0, device)
            is_generated = nothing > 0 if max_length == 1 else None
            for width in _widths(max_blocks, scope):
                table, memory, tail = block_table[:, :width], None, None
                remembers = scope.memory > 0 and width > scope.dense_blocks
                if remembers:
                    memory = memories.recollect(tiles, table, is_generated)
                if max_length > 1:  # all of them may lie at ends of prompts
                    of_layers = memories.of_layers(tiles, table) if remembers else None
                    tail = Tail(tiles, of_layers)
                given = (scope, rotary, scale, out, soft_cap, sinks)
                reattention(query, pages, table, tiles, *given, memory=memory, tail=tail)
                if memory is not None:
                    memories.keep(tiles, table, memory)
                if tail is not None:
                    memories.keep_tail(tail, table)


def warm_up_dense(
    query: Tensor,
    key: Tensor,
    cache_dtype: torch.dtype,
    most_keys: int,
    block_size: int,
    rotary: Rotary,
    key_bias: Tensor | None = None,
) -> None:
    """The same for prompts that FlashAttention gets, whole or in parts.

    query, key  [num_tokens, num_heads or num_kv_heads, head_size], strided as they will be
    most_keys   of a step's parts of prompts and of what is before them
    """
    stage, positions = stages(query.device), query.new_zeros(len(query), dtype=torch.int32)
    turned = stage.rotate_rows(query, positions, rotary, rotary.query_scale)
    stage.rotate_rows(key, positions, rotary)
    pages = _a_page(query, key.shape[1], cache_dtype, block_size, key_bias)
    starts = positions.new_zeros(most_keys)
    stage.read_kv(pages, starts.long(), starts, rotary, query.dtype)
    del turned


def _a_page(
    query: Tensor,
    num_kv_heads: int,
    dtype: torch.dtype,
    block_size: int,
    key_bias: Tensor | None,
) -> Pages:
    head_size = query.shape[2]
    cache = query.new_zeros((2, 1, num_kv_heads, block_size, head_size), dtype=dtype)
    summary = query.new_zeros((1, num_kv_heads, 2, head_size))
    return Pages(cache[0], cache[1], summary, bias=key_bias)


def _widths(max_blocks: int, scope: Scope) -> list[int]:
    """Widths of the block table that kernels differ for: recalling is compiled for powers of 2."""
    least = min(max_blocks, scope.dense_blocks or max_blocks)  # a step that selects nothing
    widths, width = [least], max_blocks
    while width > least:
        widths.append(width)
        width = 1 << (width - 1).bit_length() - 1
    return widths
