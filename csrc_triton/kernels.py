"""The stages as Triton kernels, under the names reference.py gives them."""

from csrc_triton.attend import attend
from csrc_triton.exact import exact_scores
from csrc_triton.read import read_kv
from csrc_triton.recall import recall_blocks
from csrc_triton.recollect import keep, recollect
from csrc_triton.refine import refine_scores
from csrc_triton.rotate import rotate_rows
from csrc_triton.score import score_blocks
from csrc_triton.write import write_kv

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
