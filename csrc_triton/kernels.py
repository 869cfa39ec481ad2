"""The stages as Triton kernels, under the names reference.py gives them."""

from csrc_triton.attend_decode import attend_decode
from csrc_triton.attend_prefill import attend_prefill
from csrc_triton.recall import recall_blocks
from csrc_triton.refine import refine_scores
from csrc_triton.score import score_blocks
from csrc_triton.write import write_kv

__all__ = ["attend", "recall_blocks", "refine_scores", "score_blocks", "write_kv"]


def attend(query, pages, block_table, tiles, *args, **kwargs) -> None:
    """reference.attend; decode tiles turn the query, prefill tiles turn the keys."""
    launch = attend_decode if tiles.max_length == 1 else attend_prefill
    launch(query, pages, block_table, tiles, *args, **kwargs)
