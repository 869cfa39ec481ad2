"""A page of vLLM's cache carries the summary of its keys.

Per block and KV head, one run: [keys | values | mean | variance]. vLLM knows pages as bytes per
token; what it moves, shares or drops takes the summary along.
"""

import torch
from torch import Tensor

from csrc_triton.layout import Pages


def bytes_per_token(head_size: int, itemsize: int, block_size: int) -> int:
    """Key, value, and the share of a summary that a token of the smallest block has."""
    summary = 2 * head_size * max(itemsize, 2)  # of two bytes at least, also beside fp8 keys
    return 2 * head_size * itemsize + -(-summary // block_size // itemsize) * itemsize


def pages_of(
    kv_cache: Tensor,
    head_size: int,
    summary_dtype: torch.dtype,
    scales: tuple[float, float],
    key_bias: Tensor | None = None,
) -> Pages:
    """Views of vLLM's cache.

    kv_cache       [num_blocks, num_kv_heads, block_size, content], contiguous from the third
                   dimension on; uint8 holds fp8
    summary_dtype  beside fp8 keys; else it is that of the keys
    scales         of fp8 keys and values
    key_bias       Pages.bias of fp8 keys
    """
    num_blocks, num_kv_heads, block_size, content = kv_cache.shape
    strides, start = kv_cache.stride(), kv_cache.storage_offset()
    assert strides[2:] == (content, 1), "pages must be head-major"
    plane = block_size * head_size

    def view(offset: int, rows: int, width: int) -> Tensor:
        size = num_blocks, num_kv_heads, rows, width
        return kv_cache.as_strided(size, (*strides[:2], width, 1), start + offset)

    key, value = view(0, block_size, head_size), view(plane, block_size, head_size)
    if kv_cache.itemsize > 1:
        return Pages(key, value, view(2 * plane, 2, head_size))
    summary = view(2 * plane, 2, head_size * summary_dtype.itemsize).view(summary_dtype)
    fp8 = torch.float8_e4m3fn
    return Pages(key.view(fp8), value.view(fp8), summary, *scales, key_bias)
