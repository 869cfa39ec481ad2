"""ReAttention's kernels over a paged KV cache. torch and triton, nothing else.

`reference.py` is the definition; each kernel file holds the launcher of the same name.
"""
