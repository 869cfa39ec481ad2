"""What requests found, kept from one of their tokens to the next.

It lies beside the page that a token's key went to: as long as a request writes to a page nobody
else does, whatever becomes of batches, graphs and schedules, and the next token finds it there.
"""

import torch
from torch import Tensor

from csrc_triton.layout import Memory, Scope, Tiles
from vllm_reattention.attention import KEPT, best_found


class Memories:
    """Of all requests of one worker, for the layers of one builder.

    A row for each page: the blocks of which most was found up to the last token written there. The
    row of a page that a connector brought is somebody else's, of long ago. Only a request that was
    preempted and comes back from host memory but for its last token reads such a one; it fades as
    any memory does.
    """

    def __init__(self, num_pages: int, block_size: int, scope: Scope, weight: float, device):
        self.block_size, self.scope, self.weight = block_size, scope, weight
        self.blocks = torch.zeros((num_pages, KEPT), dtype=torch.int32, device=device)
        self.found = torch.zeros((num_pages, KEPT), dtype=torch.float32, device=device)

    def recollect(self, tiles: Tiles, block_table: Tensor, is_generated: Tensor | None) -> Memory:
        """For a step, before its first selection: a share of what is there at the token before.

        is_generated  [num_tiles] bool: single tokens that the model wrote. Those of a prompt start
                      anew (None: all of them), as the tokens before them may be of the same step
        """
        num_tiles, width = len(tiles.row), block_table.shape[1]
        found = self.found.new_zeros((num_tiles, width))
        if is_generated is None:
            return Memory(found, self.weight, counts=False)
        block = (tiles.position - 1).clamp(min=0) // self.block_size
        page = _pages(block_table, tiles.request, block)
        # A token within the dense limit selects nothing, and leaves no row behind.
        selected = is_generated & (block >= self.scope.dense_blocks)
        before = self.found[page] * (self.scope.memory * selected)[:, None]
        found.scatter_add_(1, self.blocks[page].long().clamp_(max=width - 1), before)
        return Memory(found, self.weight, counts=True)

    def keep(self, tiles: Tiles, block_table: Tensor, memory: Memory) -> None:
        """After a step's last selection."""
        page = _pages(block_table, tiles.request, tiles.position // self.block_size)
        page = page.masked_fill_(tiles.length == 0, 0)  # vLLM gives page 0 to nobody
        blocks, found = best_found(memory)
        self.blocks[page] = blocks.clamp_(min=0)
        self.found[page] = found


def _pages(block_table: Tensor, request: Tensor, block: Tensor) -> Tensor:
    block = block.long().clamp(max=block_table.shape[1] - 1)  # of tiles with nothing to do
    return block_table[request.long(), block].long()
