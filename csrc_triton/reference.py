"""ReAttention (arXiv 2407.15176) over a paged KV cache, in plain torch: the definition.

One function per kernel, same name and arguments. Every function widens to fp32 (or keeps fp64),
so float64 inputs give the exact answer. Rows of a tile are ordered (query, head of the group).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from csrc_triton.layout import PROBES, SAMPLE_EVERY, Pages, Rotary, Scope, Tiles
from csrc_triton.reference_recall import keep, recall_blocks, recollect

__all__ = [
    "attend",
    "exact_scores",
    "keep",
    "read_kv",
    "recall_blocks",
    "recollect",
    "refine_scores",
    "rotate_rows",
    "score_blocks",
    "write_kv",
]


def _wide(x: Tensor) -> Tensor:
    return x.to(
        torch.promote_types(x.dtype, torch.float32) if x.element_size() > 1 else torch.float32
    )


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotate half-split channels of x [..., head_size] by table [..., 2, half]."""
    half = table.shape[-1]
    cos, sin = table[..., 0, :].to(x.dtype), table[..., 1, :].to(x.dtype)
    first, second = x[..., :half], x[..., half : 2 * half]
    return torch.cat(
        (first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :]), dim=-1
    )


def _unrotate(x: Tensor, table: Tensor) -> Tensor:
    return _rotate(x, torch.stack((table[..., 0, :], -table[..., 1, :]), dim=-2))


def _half_split(x: Tensor, rotary: Rotary) -> Tensor:
    """The model's channel order to ours: rotary pairs (c, c + half), then the rest."""
    if not rotary.interleaved:
        return x
    turned = x[..., : 2 * rotary.half]
    return torch.cat((turned[..., ::2], turned[..., 1::2], x[..., 2 * rotary.half :]), dim=-1)


def _tile_query(
    query: Tensor, row: int, length: int, num_kv_heads: int, rotary: Rotary, step: int = 1
) -> Tensor:
    """Raw queries of a tile, half-split and scaled: [num_kv_heads, length * group, head_size]."""
    rows = _half_split(_wide(query[row : row + length * step : step]), rotary)
    scaled = torch.cat(
        (rows[..., : 2 * rotary.half] * rotary.query_scale, rows[..., 2 * rotary.half :]), dim=-1
    )
    grouped = scaled.unflatten(1, (num_kv_heads, -1))  # [length, num_kv_heads, group, head_size]
    return grouped.transpose(0, 1).flatten(1, 2)


def cap_logits(logits: Tensor, soft_cap: float) -> Tensor:
    """soft_cap * tanh(logits / soft_cap), or as they are without one."""
    return soft_cap * torch.tanh(logits / soft_cap) if soft_cap else logits


def write_kv(
    key: Tensor, value: Tensor, pages: Pages, slot_mapping: Tensor, rotary: Rotary
) -> None:
    """Store keys rotated by their offset in the block, values, and summaries of filled blocks.

    key, value    [num_tokens or more, num_kv_heads, head_size], as the model made them
    slot_mapping  [num_tokens] int64, block * block_size + offset; negative: padding
    """
    block_size = pages.block_size
    written = (slot_mapping >= 0).nonzero().flatten()
    slots = slot_mapping[written]
    block, offset = slots // block_size, slots % block_size
    turned = _rotate(_half_split(_wide(key[written]), rotary), rotary.cos_sin[offset][:, None])
    turned = turned / pages.key_scale
    if pages.bias is not None:
        turned = turned - pages.bias[:, offset].transpose(0, 1)
    pages.key[block, :, offset] = _narrow(turned, pages.key.dtype)
    pages.value[block, :, offset] = _narrow(
        _wide(value[written]) / pages.value_scale, pages.value.dtype
    )

    full = block[offset == block_size - 1]
    if not len(full):
        return
    raw = _unrotate(_wide(pages.key[full]) * pages.key_scale, rotary.cos_sin[:block_size])
    variance, mean = torch.var_mean(raw, dim=2, correction=0)
    variance = variance.clamp(max=torch.finfo(pages.summary.dtype).max)  # fp16 ends at 65504
    pages.summary[full] = torch.stack((mean, variance), dim=2).to(pages.summary.dtype)


def _real(stored: Tensor, bias: Tensor | None, key_scale: float) -> Tensor:
    """Keys from what is stored of them, [..., head_size] both."""
    return (stored if bias is None else stored + bias) * key_scale


def bias_table(bias: Tensor, rotary: Rotary, num_offsets: int, key_scale: float = 1.0) -> Tensor:
    """Pages.bias, [num_kv_heads, num_offsets, head_size] fp16.

    bias  [num_kv_heads, head_size] fp32, what keys have in common, in the model's order of channels
    """
    offsets = torch.arange(num_offsets, device=bias.device)
    turned = rotate_rows(bias.expand(num_offsets, -1, -1), offsets, rotary).transpose(0, 1)
    # in fp16 even where keys of such a scale are beyond fp8
    largest = torch.finfo(torch.float16).max / 2
    return (turned / key_scale).clamp(-largest, largest).half().contiguous()


def _narrow(x: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype.itemsize > 1:
        return x.to(dtype)
    limit = torch.finfo(dtype).max  # an fp8 cast does not saturate by itself
    return x.clamp(-limit, limit).to(dtype)


def rotate_rows(x: Tensor, positions: Tensor, rotary: Rotary, magnitude: float = 1.0) -> Tensor:
    """x rotated to its positions, rotary channels half-split.

    x          [num_tokens, num_heads, head_size]
    positions  [num_tokens] int32
    magnitude  factor of the rotary channels: rotary.query_scale for queries
    """
    raw = _half_split(_wide(x), rotary)
    raw = torch.cat((raw[..., : 2 * rotary.half] * magnitude, raw[..., 2 * rotary.half :]), -1)
    return _rotate(raw, rotary.cos_sin[positions.long()][:, None]).to(x.dtype)


def read_kv(
    pages: Pages, slots: Tensor, block_starts: Tensor, rotary: Rotary, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Keys rotated to their positions, rotary channels half-split, and values.

    slots         [num_keys] int64, block * block_size + offset
    block_starts  [num_keys] int32, position of the first key of the block
    returns       twice [num_keys, num_kv_heads, head_size] of the dtype
    """
    block, offset = slots // pages.block_size, slots % pages.block_size
    key, value = (_wide(cache)[block, :, offset] for cache in (pages.key, pages.value))
    bias = None if pages.bias is None else pages.bias[:, offset].transpose(0, 1)
    # in the cache they are rotated by their offset
    key = _rotate(_real(key, bias, pages.key_scale), rotary.cos_sin[block_starts.long()][:, None])
    return key.to(dtype), (value * pages.value_scale).to(dtype)


def score_blocks(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    scope: Scope,
    rotary: Rotary,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Each block's share of the position-free softmax, estimated from summaries.

    A block whose keys have mean m and variance v per channel holds about
    exp(q.m + (q*q).v / 2) * block_size of the softmax's mass, were its keys Gaussian.

    query        [num_tokens, num_heads, head_size], not rotated
    block_table  [num_requests, max_blocks] int32
    returns      score [num_tiles, num_kv_heads, max_blocks] fp32: shares summed over the tile's
                 rows, each cut at 1, which estimates may pass where not all blocks are in the
                 denominator (Scope.sample_from); -1 where nothing can be recalled (global, local,
                 past the end, dense tiles);
                 extent [num_tiles] int32: how many columns of score can matter, 0 for a tile
                 that recalls nothing (kernels leave the columns behind it unwritten)
    """

    def share(q: Tensor, page: Tensor) -> Tensor:
        mean, variance = _wide(pages.summary[page]).to(q.dtype).permute(2, 1, 3, 0)
        mass = q @ mean + (q * q) @ variance / 2 + math.log(pages.block_size)
        return (mass - _log_mass(mass, tiles, scope)).clamp(max=0).exp().sum(dim=1)

    return _score_all(query, pages, block_table, tiles, scope, rotary, scale, share)


def _score_all(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    share: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """score and extent, as of score_blocks, of what `share` tells of the blocks before local.

    share  [num_kv_heads, local] from scaled queries [num_kv_heads, rows, head_size], pages [local]
    """
    num_kv_heads, block_size = pages.key.shape[1:3]
    num_tiles, max_blocks = tiles.row.shape[0], block_table.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    score = query.new_full((num_tiles, num_kv_heads, max_blocks), -1.0, dtype=wide)
    extent = tiles.row.new_zeros(num_tiles)
    for tile, (request, row, length, position, dense) in enumerate(_rows(tiles)):
        num_global, num_recalled, local = scope.slots(position // block_size, dense, block_size)
        if not length or not num_recalled:
            continue
        q = _tile_query(query, row, length, num_kv_heads, rotary, tiles.step) * scale
        shares = share(q, block_table[request, :local].long())
        score[tile, :, num_global:local] = shares[:, num_global:]
        extent[tile] = local
    return score, extent


def _log_mass(mass: Tensor, tiles: Tiles, scope: Scope) -> Tensor:
    """log of the softmax's denominator, [..., rows, 1], from log masses [..., rows, blocks]."""
    num_global, local = scope.global_blocks, mass.shape[-1]
    if tiles.max_length == 1 or local < scope.sample_from:
        return mass.logsumexp(dim=-1, keepdim=True)
    sampled = mass[..., num_global::SAMPLE_EVERY] + math.log(SAMPLE_EVERY)
    return torch.cat((mass[..., :num_global], sampled), -1).logsumexp(dim=-1, keepdim=True)


def refine_scores(
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    candidates: Tensor,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    soft_cap: float = 0.0,
) -> Tensor:
    """The candidates' shares of the position-free softmax, from keys instead of summaries.

    So is the denominator: the candidates and the global blocks, and for all others PROBES of the
    blocks before local, at equal distances; those that are no candidates stand for what lies
    between them.

    candidates  [num_tiles, num_kv_heads or 1, n] int32 block ids; negative: none
    returns     [num_tiles, num_kv_heads, n] fp32; -1 where there is no candidate
    """
    num_kv_heads, block_size = pages.key.shape[1:3]
    device = query.device
    heads = torch.arange(num_kv_heads, device=device)[:, None]
    wide = torch.promote_types(query.dtype, torch.float32)
    candidates = candidates.expand(-1, num_kv_heads, -1)
    count = candidates.shape[-1]
    score = torch.full(candidates.shape, -1.0, dtype=wide, device=device)
    for tile, (request, row, length, position, dense) in enumerate(_rows(tiles)):
        num_global, num_recalled, local = scope.slots(position // block_size, dense, block_size)
        if not length or not num_recalled:
            continue
        q = _tile_query(query, row, length, num_kv_heads, rotary, tiles.step) * scale
        wanted = candidates[tile].long()
        every = max(1, -(-(local - num_global) // PROBES))
        probes = torch.arange(num_global, local, every, device=device)
        fixed = torch.cat((torch.arange(num_global, device=device), probes))
        listed = torch.cat((wanted, fixed.expand(num_kv_heads, -1)), -1)
        pages_of = block_table[request].long()[listed.clamp(min=0)]
        stored = _wide(pages.key[pages_of, heads]).to(q.dtype) * pages.key_scale
        raw = _unrotate(stored, rotary.cos_sin[:block_size])  # [num_kv_heads, n, block, head_size]
        logits = cap_logits(torch.einsum("hrd,hnbd->hrnb", q, raw), soft_cap)
        mass = logits.logsumexp(dim=-1)  # [num_kv_heads, rows, n]
        stands_for = torch.ones(listed.shape, device=device)
        stands_for[:, :count] = (wanted >= 0).float()
        is_candidate = (probes[:, None] == wanted[:, None, :]).any(-1)
        stands_for[:, count + num_global :] = torch.where(is_candidate, 0.0, float(every))
        total = (mass + stands_for.log().to(mass.dtype)[:, None]).logsumexp(dim=-1, keepdim=True)
        shares = (mass[..., :count] - total).exp()
        score[tile] = torch.where(wanted >= 0, shares.sum(dim=1), -1.0)
    return score


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
    """Each block's share of the position-free softmax over all keys before the local blocks.

    returns  score [num_tiles, num_kv_heads, max_blocks] fp32: the highest of the tile's rows, as
             one that finds what it looks for should not be outweighed by many that look for
             nothing; -1 where nothing can be recalled; extent [num_tiles] int32, as score_blocks
    """

    def share(q: Tensor, page: Tensor) -> Tensor:
        stored = _wide(pages.key[page]).to(q.dtype) * pages.key_scale
        raw = _unrotate(stored, rotary.cos_sin[: pages.block_size])
        logits = cap_logits(torch.einsum("hrd,nhbd->hrnb", q, raw), soft_cap)
        mass = logits.logsumexp(dim=-1)
        return (mass - mass.logsumexp(dim=-1, keepdim=True)).exp().amax(dim=1)

    return _score_all(query, pages, block_table, tiles, scope, rotary, scale, share)


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
    """Causal attention over [global | recalled | local], each block rotated to its slot.

    recalled  [num_tiles, num_kv_heads or 1, recall_blocks] int32, ascending
    sinks     [num_heads]: a logit per head that takes mass and gives no value
    out       [num_tokens, num_heads, head_size]: the tiles' rows are written, others left alone
    """
    num_kv_heads, block_size = pages.key.shape[1:3]
    group = query.shape[1] // num_kv_heads
    heads = torch.arange(num_kv_heads, device=query.device)[:, None]
    offset = torch.arange(block_size, device=query.device)
    recalled = recalled.expand(-1, num_kv_heads, -1)
    for tile, (request, row, length, position, dense) in enumerate(_rows(tiles)):
        if not length:
            continue
        last = position // block_size
        num_global, num_recalled, local = scope.slots(last, dense, block_size)
        fixed = torch.arange(last + 1, device=query.device).expand(num_kv_heads, -1)
        named = recalled[tile, :, :num_recalled].long().clamp(min=0)  # scores of nan recall nothing
        slots = torch.cat((fixed[:, :num_global], named, fixed[:, local:]), 1)
        num_slots = slots.shape[1]
        table = rotary.cos_sin[torch.arange(num_slots, device=query.device) * block_size]
        q = _tile_query(query, row, length, num_kv_heads, rotary)
        own = (num_slots - 1) * block_size + position % block_size
        own = torch.arange(own, own + length, device=query.device).repeat_interleave(group)
        q = _rotate(q, rotary.cos_sin[own]) * scale

        page = block_table[request].long()[slots]  # [num_kv_heads, num_slots]
        bias = None if pages.bias is None else pages.bias[:, None, :block_size]
        key = _real(_wide(pages.key[page, heads]).to(q.dtype), bias, pages.key_scale)
        key = _rotate(key, table[:, None]).flatten(1, 2)
        value = (_wide(pages.value[page, heads]).to(q.dtype) * pages.value_scale).flatten(1, 2)
        logits = cap_logits(q @ key.transpose(1, 2), soft_cap)  # [num_kv_heads, rows, keys]

        at = torch.arange(position, position + length, device=query.device)
        at = at.repeat_interleave(group)[:, None]
        key_at = (slots[..., None] * block_size + offset).flatten(1)[:, None]
        seen = key_at <= at
        if scope.window:
            seen &= key_at > at - scope.window
        logits = logits.masked_fill(~seen, float("-inf"))
        # a page's unwritten rows may hold anything, nan too
        value = value.masked_fill((key_at >= position + length).transpose(1, 2), 0.0)
        if sinks is not None:
            sink = sinks.to(q.dtype).view(num_kv_heads, 1, group).expand(-1, length, -1)
            logits = torch.cat((logits, sink.flatten(1)[..., None]), dim=-1)
            value = torch.nn.functional.pad(value, (0, 0, 0, 1))
        result = (logits.softmax(dim=-1) @ value).unflatten(1, (length, group))
        out[row : row + length] = result.transpose(0, 1).flatten(1, 2).to(out.dtype)


def _rows(tiles: Tiles):
    return zip(*(column.tolist() for column in tiles.columns), strict=True)
