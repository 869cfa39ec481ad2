"""What share of the softmax was recalled: on some steps, and nobody waits for it."""

import time
from collections.abc import Callable, Sequence
from random import Random

import torch
from torch import Tensor

from csrc_triton import reference
from csrc_triton.layout import Pages, Rotary, Scope, Tiles

SECONDS = 10  # from one sample to the next
TOKENS_AT_ONCE = 32768  # keys widened to fp32: 16 MiB for heads of 128


class MassSamples:
    """Of one worker. In a sampled step each layer that selects adds its shares up on the device
    and sends the sums so far to the host, where a later step finds them.
    """

    def __init__(self, edges: Sequence[float], device: torch.device | str):
        on_gpu = torch.device(device).type != "cpu"
        self.edges = torch.tensor(edges, dtype=torch.float32, device=device)
        self.sums = torch.zeros(len(edges) + 2, dtype=torch.float64, device=device)
        self.arrived = torch.zeros_like(self.sums, device="cpu", pin_memory=on_gpu)
        self.event = torch.cuda.Event() if on_gpu else None
        self.is_sent, self.next_at, self.random = False, 0.0, Random(0)

    @property
    def is_due(self) -> bool:
        return not self.is_sent and time.monotonic() >= self.next_at

    def add(
        self, query: Tensor, pages: Pages, table: Tensor, tiles: Tiles, recalled: Tensor, *rest
    ) -> None:
        """A layer's; arguments as recalled_share takes them, without a head."""
        if not recalled.shape[-1]:
            return
        head = self.random.randrange(pages.key.shape[1])
        share = recalled_share(head, query, pages, table, tiles, recalled, *rest)
        self.sums[:-2] += (share[:, None] <= self.edges).sum(0)
        self.sums[-2] += (share >= 0).sum()
        self.sums[-1] += share.nansum()
        self.arrived.copy_(self.sums, non_blocking=True)
        if self.event is not None:
            self.event.record()
        self.is_sent, self.next_at = True, time.monotonic() + SECONDS

    def collect(self, tell: Callable[[list[float], float, float], None]) -> None:
        """In a later step: how many shares lay up to each edge, how many in all, and their sum."""
        if self.is_sent and (self.event is None or self.event.query()):
            *up_to, number, total = self.arrived.tolist()
            tell(up_to, number, total)
            self.sums.zero_()
            self.is_sent = False


def recalled_share(
    head: int,
    query: Tensor,
    pages: Pages,
    block_table: Tensor,
    tiles: Tiles,
    recalled: Tensor,
    scope: Scope,
    rotary: Rotary,
    scale: float,
    soft_cap: float = 0.0,
) -> Tensor:
    """Of the softmax without positions over all blocks between global and local, exactly.

    Of one query, the last of the last tile that recalls, as the host need not know which that is.

    head      a KV head
    recalled  [num_tiles, num_kv_heads or 1, recall_blocks], one at least
    returns   [group]: the share of each query head of that KV head; nan if no tile recalls
    """
    num_kv_heads, block_size = pages.key.shape[1:3]
    group, device = query.shape[1] // num_kv_heads, query.device
    recalls = recalled[:, 0, 0] >= 0
    tile = (torch.arange(len(recalls), device=device) * recalls).argmax(dim=0, keepdim=True)
    blocks = recalled[:, head if recalled.shape[1] > 1 else 0][tile]  # [1, recall_blocks]
    local = tiles.position[tile] // block_size - scope.local_blocks + 1
    block = torch.arange(block_table.shape[1], device=device)
    is_between = (block >= scope.global_blocks) & (block < local)
    pages_of = block_table[tiles.request[tile]][0].masked_fill(~is_between, 0)

    # The cache holds keys rotated by their offset, so the query is turned to each offset.
    rows = query[:, head * group : (head + 1) * group][tiles.row[tile] + tiles.length[tile] - 1]
    offset = torch.arange(block_size, dtype=torch.int32, device=device)
    rows = rows.float().expand(block_size, -1, -1)
    turned = reference.rotate_rows(rows, offset, rotary, rotary.query_scale)
    masses = []
    for some in pages_of.split(max(1, TOKENS_AT_ONCE // block_size)):
        keys = pages.key[:, head][some].float() * pages.key_scale
        logits = torch.einsum("ohd,nod->hno", turned, keys) * scale
        logits = reference.cap_logits(logits, soft_cap)
        masses.append(logits.logsumexp(-1))
    mass = torch.cat(masses, 1).masked_fill(~is_between, float("-inf"))  # [group, max_blocks]
    held = mass.gather(1, blocks.clamp(min=0).long().expand(group, -1))
    held = held.masked_fill(blocks < 0, float("-inf"))
    share = (held.logsumexp(1) - mass.logsumexp(1)).exp().clamp(max=1)
    return share.masked_fill(blocks[:, 0] < 0, float("nan"))
