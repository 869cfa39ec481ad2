"""What requests found, kept from one of their tokens to the next.

It lies beside the page that a token's key went to: as long as a request writes to a page nobody
else does, whatever becomes of batches, graphs and schedules, and the next token finds it there. It
tells the token's position, too: what a page's user of long ago left is not taken for one's own.
"""

import torch
from torch import Tensor

from csrc_triton.layout import Memory, Tail, Tiles, nothing_kept
from vllm_reattention.attention import stages

BESIDE = 0.9  # docs/choices.md


class Memories:
    """Of all requests of one worker, for the layers of one builder.

    share   what the next token knows of it
    weight  of a selection: 1 / number of layers that select
    """

    def __init__(
        self,
        num_pages: int,
        block_size: int,
        share: float,
        weight: float,
        device: torch.device,
    ):
        self.block_size, self.share, self.weight = block_size, share, weight
        self.kept, self.stage = nothing_kept(num_pages, device), stages(device)

    def recollect(self, tiles: Tiles, block_table: Tensor, is_generated: Tensor | None) -> Memory:
        """For a step, before its first selection: a share of what is there at the token before.

        is_generated  [num_tiles] bool: single tokens that the model wrote. Those of a prompt start
                      anew (None: all of them), as the tokens before them may be of the same step
        """
        if is_generated is None:
            found = self.kept.found.new_zeros((len(tiles.row), block_table.shape[1]))
            return Memory(found, self.weight, counts=False)
        rest = is_generated, self.share, self.block_size
        found = self.stage.recollect(self.kept, block_table, tiles, *rest)
        return Memory(found, self.weight, counts=True)

    def of_layers(self, tiles: Tiles, block_table: Tensor) -> Memory:
        """For tiles of a Tail: anew, and what each layer finds counts for those behind it."""
        memory = self.recollect(tiles, block_table, None)
        return memory._replace(counts=True, most=torch.zeros_like(memory.found))

    def keep(self, tiles: Tiles, block_table: Tensor, memory: Memory) -> None:
        """After a step's last selection."""
        self.stage.keep(self.kept, memory.found, block_table, tiles, self.block_size)

    def keep_tail(self, tail: Tail, block_table: Tensor) -> None:
        """After a step's last layer: the most that any found, for the tokens that answer."""
        if tail.memory is not None and tail.memory.most is not None:
            found = with_neighbours(tail.memory.most)
            self.keep(tail.tiles, block_table, tail.memory._replace(found=found))


def with_neighbours(found: Tensor) -> Tensor:
    """Blocks count for nearly as much as those beside them: a fact may be cut by a block's end."""
    beside = torch.nn.functional.max_pool1d(found[:, None], 3, stride=1, padding=1)[:, 0]
    return torch.maximum(found, beside.mul_(BESIDE), out=beside)  # rows are as long as contexts
