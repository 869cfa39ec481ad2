"""A step's requests as tiles, computed on the device: the host may not know how long they are."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from csrc_triton.layout import Scope, Tail, Tiles

TAIL = 97  # tokens of a prompt at least, its last, in whose tiles every layer selects


class DecodeTiles:
    """One tile per token of requests with few new tokens: a speculated token selects as if it
    were decoded alone. CUDA graphs replay what was captured with these tensors, so they stay.
    """

    def __init__(
        self, max_tokens: int, max_tokens_per_request: int, dense: int, device: torch.device
    ):
        self.single = max_tokens_per_request == 1
        self.row = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self.request, self.length, self.position = torch.zeros(
            3, max_tokens, dtype=torch.int32, device=device
        )
        self.dense = torch.full_like(self.row, dense)

    def fill(
        self,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        num_tokens: int,
        dense: Tensor | None = None,
    ) -> Tiles:
        """The tiles of the first num_tokens rows; rows that only pad the batch get length 0.

        query_start_loc  [num_requests + 1] int32, first row of each request
        seq_lens         [num_requests] int32, length with the new tokens; 0: a padding request
        dense            [num_requests] int32, as in Tiles; None: as they were made
        """
        columns = self.row, self.request, self.length, self.position, self.dense
        row, request, length, position, limit = (column[:num_tokens] for column in columns)
        if self.single and num_tokens <= len(seq_lens):  # the token of request i is row i
            torch.sub(seq_lens[:num_tokens], 1, out=position).clamp_(min=0)
            torch.clamp(seq_lens[:num_tokens], max=1, out=length)
            if dense is not None:
                limit.copy_(dense[:num_tokens])
            return Tiles(row, row, length, position, limit, max_length=1)
        ends = query_start_loc[1:]
        torch.searchsorted(ends, row, right=True, out_int32=True, out=request)
        request.clamp_(max=len(ends) - 1)
        torch.sub(seq_lens[request], ends[request] - row, out=position)
        length.copy_((row < ends[-1]) & (position >= 0))
        position.clamp_(min=0)
        if dense is not None:
            torch.index_select(dense, 0, request, out=limit)
        return Tiles(request, row, length, position, limit, max_length=1)


def most_prefill_tiles(num_tokens: int, num_requests: int, block_size: int) -> int:
    """Of no step of so many does prefill_tiles make more."""
    return min(num_tokens, num_tokens // block_size + 2 * num_requests)


def dense_blocks(prompt_lens: Tensor, scope: Scope, block_size: int) -> Tensor:
    """[num_requests] int32, as in Tiles: in a block from this one on a request's tokens select."""
    is_long = prompt_lens > scope.exact_blocks * block_size
    return torch.where(is_long, scope.dense_blocks, scope.exact_blocks).to(torch.int32)


def most_dense_keys(num_tokens: int, scope: Scope, block_size: int) -> int:
    """Of no step of so many does dense_prompts read more."""
    return num_tokens + scope.exact_blocks * block_size


def prefill_tiles(
    query_start_loc: Tensor,
    query_start_loc_cpu: Tensor,
    seq_lens: Tensor,
    first_request: int,
    block_size: int,
    dense: Tensor | int,
) -> Tiles:
    """One tile per block that a request's new tokens lie in, for requests from first_request on.

    How many blocks that are depends on where the first new token lies, which is on the device. So
    each request gets as many tiles as it could need, and a surplus one has length 0.

    dense  [num_requests] int32, as in Tiles, or one number for all
    """

    def most_tiles(num_tokens: Tensor) -> Tensor:
        return (num_tokens + block_size - 2) // block_size + 1

    num_tiles = int(most_tiles(query_start_loc_cpu[first_request:].diff()).sum())
    starts, seq_lens = query_start_loc[first_request:], seq_lens[first_request:]
    num_tokens = starts.diff()
    bounds = most_tiles(num_tokens)
    ends = bounds.cumsum(0, dtype=torch.int32)
    tile = torch.arange(num_tiles, dtype=torch.int32, device=starts.device)
    request = torch.searchsorted(ends, tile, right=True, out_int32=True).clamp_(max=len(ends) - 1)
    seq_len = seq_lens[request]
    context = seq_len - num_tokens[request]
    block = context // block_size + tile - (ends - bounds)[request]
    position = torch.maximum(context, block * block_size)
    length = (torch.minimum(seq_len, (block + 1) * block_size) - position).clamp_(min=0)
    row = starts[request] + position - context
    request += first_request
    limit = torch.full_like(request, dense) if isinstance(dense, int) else dense[request]
    return Tiles(request, row, length, position, limit, max_length=block_size)


def ends_here(prompt_lens: Tensor, seq_lens: Tensor, block_size: int) -> bool:
    """Whether any of these prompts may have its tail, or a part of it, in this step.

    prompt_lens, seq_lens  [num_requests] on the host, the latter with the step's tokens
    """
    first = (prompt_lens - 1) // block_size - tail_tiles(block_size) + 1
    return bool((seq_lens > first.clamp(min=0) * block_size).any())


def tail_tiles(block_size: int) -> int:
    return 1 + -(-(TAIL - 1) // block_size)  # the last block may have a single token


def split_tail(
    tiles: Tiles, first_request: int, prompt_lens: Tensor, block_size: int
) -> tuple[Tiles, Tail]:
    """Prefill tiles, those that lie at the end of their prompt with length 0; and those.

    Wherever steps cut the prompts.

    tiles        of requests from first_request on
    prompt_lens  [num_requests] int32, on the tiles' device
    """
    count, device = tail_tiles(block_size), tiles.row.device
    # no more than there are tiles: many short prompts may end in one step
    places = min((len(prompt_lens) - first_request) * count, len(tiles.row))
    last = (prompt_lens - 1) // block_size
    back = last[tiles.request] - tiles.position // block_size
    is_last = (tiles.length > 0) & (tiles.position < prompt_lens[tiles.request]) & (back < count)
    place = torch.where(is_last, is_last.cumsum(0) - 1, places)  # one more, for all the others
    index = torch.arange(len(place), device=device)
    tile = index.new_zeros(places + 1).scatter_(0, place, index)[:places]
    is_there = is_last.new_zeros(places + 1).scatter_(0, place, is_last)[:places]
    of_tail = tiles._replace(
        request=tiles.request[tile],
        row=tiles.row[tile],
        length=tiles.length[tile].masked_fill(~is_there, 0),
        position=tiles.position[tile],
        dense=tiles.dense[tile],
    )
    return tiles._replace(length=tiles.length.masked_fill(is_last, 0)), Tail(of_tail)


class CachedKeys(NamedTuple):
    """Where the keys of requests lie in their pages, one request's behind another's.

    The host bounds their number from above; what lies behind the last of them counts for nothing.
    """

    starts: Tensor  # [num_requests + 1] int32, first key of each among these
    slots: Tensor  # [num_keys] int64, page * block_size + offset
    block_starts: Tensor  # [num_keys] int32, position of the page's first key
    max_len: int


class DensePrompts(NamedTuple):
    """A step's tokens of prompts that attend to all before them: plain causal attention."""

    rows: slice  # of the step's tokens
    starts: Tensor  # [num_requests + 1] int32, first row of each among these
    positions: Tensor  # [num_rows] int32
    max_len: int  # of those in this step
    keys: CachedKeys | None  # None: of prompts that start in this step, and are whole


def dense_prompts(
    query_start_loc: Tensor,
    query_start_loc_cpu: Tensor,
    seq_lens: Tensor,
    seq_lens_cpu: Tensor | None,
    first_request: int,
    limits: Tensor,
    block_table: Tensor,
    block_size: int,
    most_keys: int,
) -> DensePrompts | None:
    """The requests from first_request on, if none is longer than its limit.

    seq_lens_cpu  [num_requests], no less than seq_lens; None: the host does not know
    limits        [num_requests] on the host, in tokens, up to which each attends to everything
    most_keys     of all parts of prompts together, as they are read into memory of their own
    """
    if seq_lens_cpu is None:
        return None
    lens = query_start_loc_cpu[first_request:].diff()
    known = seq_lens_cpu[first_request:][: len(lens)]
    are_whole, longest, num_keys = torch.equal(lens, known), int(known.max()), int(known.sum())
    is_over = known > limits[first_request:][: len(lens)]
    if bool(is_over.any()) or (not are_whole and num_keys > most_keys):
        return None
    rows = slice(int(query_start_loc_cpu[first_request]), int(query_start_loc_cpu[-1]))
    starts = query_start_loc[first_request:] - rows.start
    row = torch.arange(rows.stop - rows.start, dtype=torch.int32, device=starts.device)
    prompt = _owner(row, starts)
    position, keys = row - starts[prompt], None
    if not are_whole:
        theirs = seq_lens[first_request:][: len(lens)]
        position += (theirs - starts.diff())[prompt]
        table = block_table[first_request:]
        keys = _cached_keys(theirs, num_keys, longest, table, block_size)
    return DensePrompts(rows, starts, position, int(lens.max()), keys)


def _owner(row: Tensor, starts: Tensor) -> Tensor:
    """Which of the ragged parts that start there a row is in; the last, if behind all."""
    return torch.searchsorted(starts[1:], row, right=True).clamp_(max=len(starts) - 2)


def _cached_keys(
    seq_lens: Tensor, num_keys: int, max_len: int, block_table: Tensor, block_size: int
) -> CachedKeys:
    starts = nn.functional.pad(seq_lens.cumsum(0, dtype=torch.int32), (1, 0))
    row = torch.arange(num_keys, dtype=torch.int32, device=seq_lens.device)
    request = _owner(row, starts)
    most = min(max_len, block_table.shape[1] * block_size)  # rows behind the last are clamped
    position = (row - starts[request]).clamp_(max=most - 1)
    block = position // block_size
    slots = block_table[request, block].long() * block_size + position % block_size
    return CachedKeys(starts, slots, block * block_size, max_len)
