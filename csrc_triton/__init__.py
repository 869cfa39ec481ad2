"""ReAttention's kernels over a paged KV cache. torch and triton, nothing else.

`reference.py` is the definition, `reference_recall.py` the half of it that is about scores alone;
each kernel file holds the launcher of the same name.
"""
