"""What was found for one token counts for the next, and for nobody else's."""

import types

import pytest
import torch

from csrc_triton import reference
from csrc_triton.layout import KEPT, Memory, Tail, Tiles
from vllm_reattention.memory import Memories

SIZE = 16
WIDTH = 100
# Two requests; the second's pages stand in reverse
TABLE = torch.stack((torch.arange(1, 101), torch.arange(200, 100, -1))).int()


def tiles_at(*places: tuple[int, int, int], most: int = 1) -> Tiles:
    """(request, position, length) of each tile."""
    columns = torch.tensor([(request, 0, length, at, 0) for request, at, length in places]).int()
    return Tiles(*columns.unbind(1), most)


@pytest.fixture
def memories():
    return Memories(201, SIZE, 0.5, 0.25, torch.device("cpu"))


def found(*blocks: tuple[int, float]) -> torch.Tensor:
    row = torch.zeros(WIDTH)
    for block, value in blocks:
        row[block] = value
    return row


def keep(memories, tiles: Tiles, *rows: torch.Tensor) -> None:
    memories.keep(tiles, TABLE, Memory(torch.stack(rows), 0.25, counts=True))


def recollect(memories, tiles: Tiles, *generated: bool) -> torch.Tensor:
    flags = torch.tensor(generated or [True] * len(tiles.row))
    memory = memories.recollect(tiles, TABLE, flags)
    assert memory.counts and memory.weight == 0.25
    return memory.found


def test_the_next_token_knows_half_of_it(memories):
    """Also where it begins a new page, and whatever its place in the batch."""
    first, second = found((3, 2.0), (60, 1.0)), found((5, 4.0))
    keep(memories, tiles_at((0, 1000, 1), (1, 1599, 1)), first, second)
    again = recollect(memories, tiles_at((1, 1600, 1), (0, 1001, 1)))
    assert torch.equal(again, torch.stack((second, first)) / 2)


def test_a_prompt_starts_anew_and_leaves_what_it_found(memories):
    keep(memories, tiles_at((0, 1000, 1)), found((3, 2.0)))
    prompt = tiles_at((0, 1001, 7), (0, 1008, 16), most=SIZE)
    memory = memories.recollect(prompt, TABLE, None)
    assert not memory.counts and not memory.found.any()
    assert not recollect(memories, tiles_at((0, 1001, 1)), False).any()  # its last token alone
    keep(memories, prompt, found((7, 1.0)), found((9, 1.0)))
    assert torch.equal(recollect(memories, tiles_at((0, 1024, 1)))[0], found((9, 0.5)))


def test_what_a_page_held_before_is_nobodys(memories):
    """A token that attended to everything keeps nothing; nor does one that a connector brings."""
    keep(memories, tiles_at((0, 1000, 1)), found((3, 2.0)))
    taken = TABLE.flip(0).clone()
    taken[1, 900 // SIZE] = TABLE[0, 1000 // SIZE]
    generated = torch.tensor([True, True, True])
    tiles = tiles_at((1, 901, 1), (1, 909, 1), (1, 0, 1))
    assert not memories.recollect(tiles, taken, generated).found.any()
    assert recollect(memories, tiles_at((0, 1001, 1))).any()


def test_tiles_with_nothing_to_do_overwrite_nobody(memories):
    keep(memories, tiles_at((0, 1000, 1)), found((3, 2.0)))
    before = [part.clone() for part in memories.kept]
    keep(memories, tiles_at((0, 1000, 0), (1, 5000, 0)), found((4, 9.0)), found((4, 9.0)))
    assert all(torch.equal(*pair) for pair in zip(memories.kept, before, strict=True))
    recollect(memories, tiles_at((1, 5000, 0)))  # beyond the table, which is not looked at


def test_the_most_is_kept_where_there_is_much(memories):
    row = torch.rand(WIDTH) + 1
    row[-1] = 0.0  # the token's own block
    keep(memories, tiles_at((0, WIDTH * SIZE - 1, 1)), row)
    again = recollect(memories, tiles_at((0, WIDTH * SIZE, 1)))[0]
    kept = row.topk(KEPT).indices
    assert again.count_nonzero() == KEPT < WIDTH
    torch.testing.assert_close(again[kept], row[kept] / 2)


def test_at_a_prompts_end_the_most_of_all_layers_is_kept_and_what_stands_beside_it(memories):
    tail = Tail(tiles_at((0, 1000, 9), (1, 0, 0), most=SIZE))
    memories.keep_tail(tail, TABLE)  # where nothing is remembered
    assert (memories.kept.position < 0).all()
    memory = memories.of_layers(tail.tiles, TABLE)
    assert memory.counts and not memory.most.any()
    for score in (found((3, 2.0), (9, 0.5)), found((3, 1.5), (4, 1.9), (9, 0.7))):
        row, nothing = score[None, None], torch.full((1, 1, WIDTH), -1.0)
        scores = torch.cat((row.where(row > 0, -1.0), nothing))
        names = torch.arange(WIDTH, dtype=torch.int32).expand(2, 1, -1)
        reference.recall_blocks(scores, 4, None, names, True, memory, torch.ones(2))
    assert torch.equal(memory.most[0], found((3, 2.0), (4, 1.9), (9, 0.7)))
    torch.testing.assert_close(memory.found[0], found((3, 3.5), (4, 1.9), (9, 1.2)) / 4)
    memories.keep_tail(tail._replace(memory=memory), TABLE)
    again = recollect(memories, tiles_at((0, 1009, 1)))[0]
    beside = found((2, 1.8), (3, 2.0), (4, 1.9), (5, 1.71), (8, 0.63), (9, 0.7), (10, 0.63))
    torch.testing.assert_close(again, beside / 2)


def test_a_prompts_last_token_alone_is_no_generated_one():
    """It comes among decoded ones where all before it is in the prefix cache."""
    pytest.importorskip("vllm")
    from vllm_reattention.metadata import ReAttentionMetadataBuilder

    builder = object.__new__(ReAttentionMetadataBuilder)
    builder.is_generated, builder.marked = torch.ones(6, dtype=torch.bool), 0

    def marked(num_decodes: int, *is_prefilling: bool) -> list[bool]:
        flags = torch.tensor(is_prefilling) if is_prefilling else None
        builder._mark_generated(types.SimpleNamespace(is_prefilling=flags), num_decodes)
        return builder.is_generated.tolist()

    assert marked(2, False, False, True) == [True] * 6  # a prompt behind the decoded tokens
    assert marked(3, False, False, True, True) == [True, True, False, True, True, True]
    assert marked(2, True, False) == [False, True, False, True, True, True]
    assert marked(3, False, False, False) == [True] * 6
    marked(2, False, True)
    assert marked(2) == [True] * 6  # a step of which the host does not know
