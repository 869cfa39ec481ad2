"""Ragged batches over a paged cache with hostile contents, for the kernels and the reference."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from csrc_triton import reference
from csrc_triton.layout import Pages, Rotary, Scope, Tiles, rotation_table

NUM_POSITIONS = 1024


@dataclass(frozen=True, kw_only=True)
class Case:
    """contexts: keys of each request; queries: how many of them, at the end, are queries."""

    contexts: tuple[int, ...] = (300,)
    queries: tuple[int, ...] | None = None  # default: one each, as in decode
    heads: tuple[int, int] = (4, 2)
    head_size: int = 64
    rotary_dim: int | None = None  # default: the whole head
    block_size: int = 16
    interleaved: bool = False
    query_scale: float = 1.0
    scope: Scope = field(default_factory=lambda: Scope(1, 4, 3, 8, 8))
    dense: tuple[int, ...] | None = None  # blocks of each request; default as the scope has it
    soft_cap: float = 0.0
    sinks: bool = False
    spread: float = 1.0  # of the queries: sharp attention
    shift: float = 0.0  # of the keys: all logits of one sign
    bias: float = 0.0  # of each of the keys' channels, about so much, which pages take off
    seed: int = 0

    def __str__(self) -> str:
        told = {
            name: value
            for name, value in vars(self).items()
            if value != type(self).__dataclass_fields__[name].default and name != "scope"
        }
        return "-".join(f"{k}={v}".replace(" ", "") for k, v in told.items()) or "plain"

    def build(self, dtype: torch.dtype, device: str, cache_dtype: torch.dtype | None = None):
        return Inputs(self, dtype, device, cache_dtype or dtype)


class Inputs:
    """The tensors of a case. Unused pages and rows hold nan; tokens are written in two steps."""

    def __init__(self, case: Case, dtype, device, cache_dtype):
        self.case = case
        gen = torch.Generator().manual_seed(case.seed)
        num_heads, num_kv_heads = case.heads
        size, block_size = case.head_size, case.block_size
        half = (size if case.rotary_dim is None else case.rotary_dim) // 2
        frequencies = 10000.0 ** -(torch.arange(half) / max(half, 1))
        self.rotary = Rotary(
            rotation_table(frequencies, NUM_POSITIONS).to(device),
            case.interleaved,
            case.query_scale,
        )
        self.scale = size**-0.5
        blocks = [-(-context // block_size) for context in case.contexts]
        used = torch.randperm(sum(blocks) + 5, generator=gen)[: sum(blocks)]
        self.block_table = torch.full((len(blocks), max(blocks) + 2), 10**6, dtype=torch.int32)
        for row, part in enumerate(used.split(blocks)):
            self.block_table[row, : len(part)] = part
        self.block_table = self.block_table.to(device)
        self.pages = empty_pages(sum(blocks) + 5, num_kv_heads, block_size, size, cache_dtype)
        self.pages = Pages(*(x.to(device) for x in self.pages[:3]))

        tokens = sum(case.contexts)
        key = torch.randn(tokens, num_kv_heads, size, generator=gen) + case.shift
        if case.bias:
            bias = torch.randn(num_kv_heads, size, generator=gen) * case.bias
            table = reference.bias_table(bias.to(device), self.rotary, 2 * block_size)
            table[:, block_size:] = torch.nan  # what other blocks have is not to be read
            self.pages = self.pages._replace(bias=table)
            key += bias
        value = torch.randn(tokens, num_kv_heads, size, generator=gen)
        self.key, self.value = key.to(dtype).to(device), value.to(dtype).to(device)
        slots = [
            part[torch.arange(context) // block_size] * block_size
            + torch.arange(context) % block_size
            for context, part in zip(case.contexts, used.split(blocks), strict=True)
        ]
        self.slot_mapping = torch.cat(slots).to(device)
        queries = case.queries or (1,) * len(blocks)
        # queries are a strided view, as after a fused qkv projection
        fused = torch.randn(sum(queries) + 3, num_heads + 2, size, generator=gen) * case.spread
        self.query = fused.to(dtype).to(device)[:, :num_heads]
        dense = case.dense or (case.scope.dense_blocks,) * len(blocks)
        self.tiles = tiles_of(case.contexts, queries, dense, block_size, device)
        self.sinks = torch.randn(num_heads, generator=gen).to(device) if case.sinks else None

    def write(self, write_kv) -> None:
        """Everything in two steps, the cut in the middle of blocks; the second has padding."""
        cut = self.key.shape[0] * 2 // 3
        # a view: what lies before it are the slots of the first step, which are not to be read
        padded = torch.nn.functional.pad(self.slot_mapping, (0, 3), value=-1)[cut:]
        write_kv(self.key[:cut], self.value[:cut], self.pages, self.slot_mapping[:cut], self.rotary)
        extra = [torch.cat((x[cut:], x[:5] * 7)) for x in (self.key, self.value)]
        write_kv(*extra, self.pages, padded, self.rotary)

    def exact(self) -> "Inputs":
        """The same numbers in float64."""
        twin = object.__new__(Inputs)
        twin.__dict__ = dict(self.__dict__)
        twin.query = self.query.double()
        twin.pages = Pages(*(x.float().double() for x in self.pages[:3]), *self.pages[3:])
        return twin

    def score_args(self):
        case = self.case
        scope = case.scope
        return (
            self.query,
            self.pages,
            self.block_table,
            self.tiles,
            scope,
            self.rotary,
            self.scale,
        )

    def attend(self, attend, recalled) -> torch.Tensor:
        out = torch.full_like(self.query, float("nan"))
        case = self.case
        attend(
            self.query, self.pages, self.block_table, self.tiles, recalled, case.scope,
            self.rotary, self.scale, out, case.soft_cap, self.sinks,
        )  # fmt: skip
        return out

    def written_rows(self) -> torch.Tensor:
        rows = torch.zeros(self.query.shape[0], dtype=torch.bool)
        for row, length in zip(self.tiles.row.tolist(), self.tiles.length.tolist(), strict=True):
            rows[row : row + length] = True
        return rows

    def recalled(self) -> torch.Tensor:
        """A selection to attend over, from the reference's own scores."""
        score, extent = reference.score_blocks(*self.score_args())
        scope = self.case.scope
        return reference.recall_blocks(
            score.float(), scope.recall_blocks, extent, per_layer=scope.per_layer
        )


def replace_kernels(replacement: Callable[[str, Any], Any]) -> set[str]:
    """Every kernel by replacement(name, kernel), wherever it is launched from; their names."""
    names = set()
    for module in [m for name, m in sys.modules.items() if name.startswith("csrc_triton.")]:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            names.add(name)
            setattr(module, name, replacement(name, getattr(module, name)))
    return names


def empty_pages(num_blocks, num_kv_heads, block_size, head_size, dtype) -> Pages:
    """Pages inside a wider buffer, as vLLM hands them out: [K | V | mean | variance] per head."""
    summary_dtype = torch.float16 if dtype.itemsize == 1 else dtype
    extra = 2 * head_size * summary_dtype.itemsize // dtype.itemsize
    run = 2 * block_size * head_size + extra
    raw = torch.full((num_blocks, num_kv_heads + 1, run), float("nan")).to(dtype)[:, :num_kv_heads]
    plane = block_size * head_size
    shape = (num_blocks, num_kv_heads, block_size, head_size)
    strides = (*raw.stride()[:2], head_size, 1)
    key = raw.as_strided(shape, strides, 0)
    value = raw.as_strided(shape, strides, plane)
    summary = raw[..., 2 * plane :].view(summary_dtype).unflatten(-1, (2, head_size))
    return Pages(key, value, summary)


def tiles_of(contexts, queries, dense, block_size, device) -> Tiles:
    """Decode: a tile a query. Else: the queries of a request that lie in one block."""
    rows, row = [], 0
    for request, (context, count, limit) in enumerate(zip(contexts, queries, dense, strict=True)):
        position = context - count
        while position < context:
            end = min(context, (position // block_size + 1) * block_size)
            rows.append((request, row, end - position, position, limit))
            row, position = row + end - position, end
    rows.append((0, 0, 0, 0, 0))  # a surplus tile with nothing to do
    columns = torch.tensor(rows, dtype=torch.int32, device=device).unbind(1)
    one_each = max(queries) == 1
    return Tiles(*(c.contiguous() for c in columns), 1 if one_each else block_size)
