"""Every kernel compiles for GPUs that this machine need not have.

Triton's interpreter, in which kernels run without a GPU, is Python: it takes what the compiler does
not, such as a return from the middle of a function.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
# Bytes that a block of threads may share: the least of the GPUs that are served, those of compute
# capability 8.6, 8.9 and 12.0.
MOST_SHARED = 99 << 10


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_kernels_compile(capability):
    code = f"from tests import test_compile; test_compile.compile_everything({capability})"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:]


class Compiled:
    """In the place of a kernel: compiles what is launched, once, and runs nothing."""

    done: ClassVar[set[str]] = set()

    def __init__(self, kernel, capability: int):
        self.kernel, self.capability = kernel, capability

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args, num_warps: int = 4, launch_pdl: bool = False, **named) -> None:
        from triton import compile
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        named["EARLY"] = self.capability >= 90
        given = dict(zip(self.kernel.arg_names, args, strict=False)) | named
        types, constants = {}, {}
        for place, parameter in enumerate(self.kernel.params):
            value = given[parameter.name]
            if parameter.is_constexpr or value is None:
                types[parameter.name], constants[(place,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                types[parameter.name] = "*" + TYPES[value.dtype]
            else:
                types[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        what = f"{self.kernel.__name__} {types} {constants}"
        if what not in self.done:
            self.done.add(what)
            source = ASTSource(self.kernel, types, constants)
            target = GPUTarget("cuda", self.capability, 32)
            compiled = compile(source, target=target, options={"num_warps": num_warps})
            slow = re.search(r"fp_to_fp .*f8E4M3FN.* -> .*bf16", compiled.asm["ttgir"])
            assert not slow, f"e4m3 is multiplied in fp16 (primitives.beside_cache): {what}"
            if self.capability not in (90, 100):  # which have more, and the compiler may use it
                assert compiled.metadata.shared <= MOST_SHARED, (
                    f"{compiled.metadata.shared}: {what}"
                )


def compile_everything(capability: int) -> None:
    from csrc_triton import kernels
    from csrc_triton.layout import Memory, Scope, nothing_kept
    from tests.cases import Case, replace_kernels
    from tests.test_kernels import DECODE, PREFILL
    from vllm_reattention.attention import selecting

    names = replace_kernels(lambda _, kernel: Compiled(kernel, capability))
    # for one generation every kind of 16-bit cache, for the others what may not fit their memory
    decode, prefill = ((0, 2, 9, 11), (0, 3, 5, 8, 10)) if capability == 90 else ((9,), (8,))
    batches = [(DECODE[i], torch.bfloat16) for i in decode]
    batches += [(PREFILL[i], torch.bfloat16) for i in prefill]
    scope = Scope(1, 15, 16, 32, 60, per_layer=True)
    for heads, size in (((32, 8), 128), ((16, 1), 256)):
        for queries in (None, (64,)):
            large = dict(heads=heads, head_size=size, block_size=32, scope=scope)
            batches.append((Case(contexts=(2100,), queries=queries, **large), torch.bfloat16))
    if capability == 89:  # as 80, but that it knows fp8
        batches = []
    if capability >= 89:
        fp8 = torch.float8_e4m3fn
        batches += [(case, fp8) for case in (DECODE[9], DECODE[11], PREFILL[8], PREFILL[10])]
    for case, cache_dtype in batches:
        inputs = case.build(torch.bfloat16, "cpu", cache_dtype)
        tiles, table = inputs.tiles, inputs.block_table
        num_tiles, n = len(tiles.row), table.shape[1]
        rows = 1 if case.scope.per_layer else case.heads[1]
        soft_cap, few = case.soft_cap, selecting(tiles)
        rest = (*inputs.score_args()[:3], few, *inputs.score_args()[4:])
        kernels.write_kv(inputs.key, inputs.value, inputs.pages, inputs.slot_mapping, inputs.rotary)
        kernels.rotate_rows(inputs.query, tiles.position, inputs.rotary)
        slots = tiles.position.long(), tiles.position
        kernels.read_kv(inputs.pages, *slots, inputs.rotary, torch.bfloat16)
        score, extent = kernels.score_blocks(*rest)
        if tiles.max_length > 1:  # single queries are no prompt's end
            kernels.exact_scores(*rest, soft_cap)
        named = torch.zeros((num_tiles, rows, 24), dtype=torch.int32)
        kernels.refine_scores(*rest[:4], named, *rest[4:], soft_cap)
        memory = None
        if case.scope.per_layer:
            found = torch.zeros((num_tiles, n))
            memory = Memory(found, 0.5, counts=True, most=found)
            kept = nothing_kept(len(inputs.pages.key), torch.device("cpu"))
            kernels.keep(kept, found, table, tiles, case.block_size)
            kernels.recollect(kept, table, tiles, tiles.length > 0, 0.5, case.block_size)
        told = case.scope.per_layer, memory, tiles.length
        kernels.recall_blocks(score, 4, extent, None, *told)
        long = torch.zeros((num_tiles, case.heads[1], 5000))
        kernels.recall_blocks(long, 60, extent, None, *told)  # in two rounds
        kernels.recall_blocks(long[..., :24], 4, None, named, *told)
        kernels.recall_blocks(long[..., :24], 4, None, named, *told, named)
        inputs.attend(kernels.attend, named[..., : case.scope.recall_blocks].contiguous())
    compiled = {what.split()[0] for what in Compiled.done}
    assert compiled == names, f"not compiled: {names - compiled}"
