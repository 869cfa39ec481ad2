"""The words both the reference and the kernels speak: pages, rotary, scope, tiles."""

from typing import NamedTuple

import torch
from torch import Tensor


class Pages(NamedTuple):
    """One layer's KV cache: views into vLLM's pages, head-major, any stride but the last.

    key      [num_blocks, num_kv_heads, block_size, head_size]  fp32 | bf16 | fp16 | fp8_e4m3;
             rotated by the key's offset in its block, rotary channels half-split
    value    [num_blocks, num_kv_heads, block_size, head_size]  same dtype as key
    summary  [num_blocks, num_kv_heads, 2, head_size]           16 bit (fp32 for an fp32 cache);
             mean and variance per channel of the block's un-rotated keys; valid once it is full
    bias     [num_kv_heads, block_size or more, head_size]      fp16, contiguous; rotated as keys
             are; or None

    A real key is (stored key + bias) * key_scale, a real value stored value * value_scale; only
    beside fp8 is there a bias or a scale other than 1. Summaries are of keys without the bias. So
    are logits of selections: all keys have it in common, and no share of a softmax depends on it.
    """

    key: Tensor
    value: Tensor
    summary: Tensor
    key_scale: float = 1.0
    value_scale: float = 1.0
    bias: Tensor | None = None

    @property
    def block_size(self) -> int:
        return self.key.shape[2]


class Rotary(NamedTuple):
    """The model's rotary embedding as pure rotations.

    cos_sin [num_positions, 2, rotary_dim / 2] fp32. A NoPE layer has rotary_dim 0.
    """

    cos_sin: Tensor
    interleaved: bool = False  # the model pairs channels (2c, 2c + 1) instead of (c, c + half)
    query_scale: float = 1.0  # a scaled table (YaRN, longrope) is a rotation times m: this is m * m

    @property
    def half(self) -> int:
        return self.cos_sin.shape[2]


SAMPLE_EVERY = 8  # see Scope.sample_from
# Where keys tell a share, so many blocks, equally spaced, tell the mass of those that are neither
# global nor candidates. With them a denominator is right to 0.05 of its logarithm, where estimates
# from summaries are off by 0.7 (docs/choices.md).
PROBES = 64
# Of a tile in a Tail, one recalled block in so many is what the layer finds best; the others are
# those of what layers share that it finds best. A layer's own finds alone distract as well
# (docs/choices.md).
OWN_PART = 4


def own_part(num_recalled: int) -> int:
    return max(1, num_recalled // OWN_PART)


class Scope(NamedTuple):
    """What a tile attends to, in blocks: [global | recalled | local], or everything."""

    global_blocks: int
    recall_blocks: int
    local_blocks: int  # the tile's own block is one of them
    # Tiles that end within so many blocks attend to everything; see also exact_blocks, and Tiles
    dense_blocks: int
    candidate_blocks: int = 0  # candidates whose exact share is computed; 0: trust the summaries
    # The same for tiles of one query, where more are cheap, and find more; 0: as many as for others
    single_candidates: int = 0
    # Recalled by a tile of one query (docs/choices.md); None: as many as by others
    single_recall: int | None = None
    # Of tiles of more queries that are not in a Tail; None: as of those that are
    read_recall: int | None = None
    read_local: int | None = None
    # What the tokens before found counts so much for a token that the model writes; 0: nothing is
    # remembered. For per_layer alone.
    memory: float = 0.0
    # Of requests whose prompt fits into so many blocks, instead of dense_blocks; 0: there are none
    exact_blocks: int = 0
    per_layer: bool = False  # KV heads add their shares up and recall the same blocks
    window: int = 0  # sliding-window layers: every key of the window, exactly; no recall
    # With so many blocks before local, a prefill tile takes the softmax's denominator (which only
    # weighs its rows against each other) from the global blocks and every SAMPLE_EVERY-th other.
    sample_from: int = 2048

    def of(self, max_length: int) -> "Scope":
        """That of tiles of at most so many queries, if they are not in a Tail."""
        if max_length == 1:
            recall = self.recall_blocks if self.single_recall is None else self.single_recall
            candidates = self.single_candidates or self.candidate_blocks
            return self._replace(recall_blocks=recall, candidate_blocks=candidates)
        scope = self.of_tail
        if self.read_local is not None:
            scope = scope._replace(local_blocks=self.read_local)
        if self.read_recall is not None and self.recall_blocks:
            candidates = self.candidate_blocks * self.read_recall // self.recall_blocks
            scope = scope._replace(recall_blocks=self.read_recall, candidate_blocks=candidates)
        return scope

    @property
    def of_tail(self) -> "Scope":
        return self._replace(read_recall=None, read_local=None)

    @property
    def listed(self) -> int:
        """How many blocks' keys tell the shares of a tile's candidates; 0: summaries tell them."""
        candidates = self.candidate_blocks
        return candidates + self.global_blocks + PROBES if candidates else 0

    @property
    def blocks(self) -> int:
        return self.global_blocks + self.recall_blocks + self.local_blocks

    def slots(self, block: int, dense: int, block_size: int) -> tuple[int, int, int]:
        """Global, recalled and first local block of a tile (Tiles.dense) that lies in `block`."""
        if self.window:
            return 0, 0, max(block * block_size - self.window + 1, 0) // block_size
        if block < dense:
            return 0, 0, 0
        return self.global_blocks, self.recall_blocks, block - self.local_blocks + 1


class Tiles(NamedTuple):
    """Queries that share one selection; all lie in one block of one request.

    request   [num_tiles] int32, row of the block table
    row       [num_tiles] int32, first row in `query`
    length    [num_tiles] int32, number of queries; 0: nothing to do
    position  [num_tiles] int32, absolute position of the first query
    dense     [num_tiles] int32, a tile in a block before this one attends to everything
    """

    request: Tensor
    row: Tensor
    length: Tensor
    position: Tensor
    dense: Tensor
    max_length: int  # at most block_size; 1 for decode
    step: int = 1  # from one of its queries to the next, in rows; stages that select take any

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """Those with an entry for each tile, in the order in which kernels take them."""
        return self.request, self.row, self.length, self.position, self.dense

    def part(self, start: int, end: int) -> "Tiles":
        some = slice(start, end)
        return self._replace(
            request=self.request[some],
            row=self.row[some],
            length=self.length[some],
            position=self.position[some],
            dense=self.dense[some],
        )

    def every(self, step: int) -> "Tiles":
        """The same tiles with every step-th of their queries, counted back from the last."""
        if step == 1:
            return self  # with no work on the device: single queries come here in every step
        length = (self.length + step - 1) // step
        skipped = (self.length - 1).clamp(min=0) % step * self.step
        row, position = self.row + skipped, self.position + skipped
        return self._replace(
            row=row,
            length=length,
            position=position,
            max_length=-(-self.max_length // step),
            step=step * self.step,
        )


class Memory(NamedTuple):
    """What the tokens of a tile's request found, by block: the mean of the layers that select.

    found   [num_tiles, max_blocks] fp32, added to scores; each selection adds to it what it finds
    weight  of a selection: 1 / number of layers that select
    counts  False: scores stay as they are, and selections only add to it
    most    [num_tiles, max_blocks] fp32, or None: beside the mean the most that a selection found
    """

    found: Tensor
    weight: float
    counts: bool
    most: Tensor | None = None

    def part(self, start: int, end: int) -> "Memory":
        most = None if self.most is None else self.most[start:end]
        return self._replace(found=self.found[start:end], most=most)


class Tail(NamedTuple):
    """Tiles at the ends of prompts, where questions stand: every layer selects for them.

    tiles   those of a step; length 0: nothing to do
    memory  of theirs, which all layers select with; None: each selects for itself
    """

    tiles: Tiles
    memory: Memory | None = None


class Recalled(NamedTuple):
    """What a layer that selects recalled, for those behind it.

    tiles  of a step's tiles, [num_tiles, num_kv_heads or 1, recalled] int32, ascending
    tail   of those in a Tail; of it each layer takes the best; None: there are none
    """

    tiles: Tensor
    tail: Tensor | None = None


KEPT = 64  # blocks that a request remembers from one token to the next


class Kept(NamedTuple):
    """What requests found, kept from one of their tokens to the next, beside the token's page.

    block     [num_pages, KEPT] int32, those of which most was found up to the last token written
              there; -1: none
    found     [num_pages, KEPT] fp32, how much
    position  [num_pages] int32, of that token; -1: nothing was kept
    """

    block: Tensor
    found: Tensor
    position: Tensor


def nothing_kept(num_pages: int, device: torch.device) -> Kept:
    block = torch.full((num_pages, KEPT), -1, dtype=torch.int32, device=device)
    found = torch.zeros((num_pages, KEPT), dtype=torch.float32, device=device)
    return Kept(block, found, block.new_full((num_pages,), -1))


def rotation_table(frequencies: Tensor, num_positions: int) -> Tensor:
    """cos and sin of position * frequency.

    frequencies [rotary_dim / 2], radians per token
    returns     [num_positions, 2, rotary_dim / 2] fp32, angles taken in fp64
    """
    positions = torch.arange(num_positions, device=frequencies.device, dtype=torch.float64)
    angles = positions[:, None] * frequencies.double()
    return torch.stack((angles.cos(), angles.sin()), dim=1).float()
