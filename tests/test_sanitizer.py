"""Every kernel under NVIDIA's compute-sanitizer: none leaves its tensors, none races."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOUND = 99  # exit status of compute-sanitizer where it found an error
TOOL = "compute-sanitizer"
HOPPER = Path(__file__).parent.parent / "csrc_triton/attend_hopper.py"
DONE = "launched and done"  # FOUND hides the exit status of what was watched
FRAME = re.compile(r"=========( COMPUTE-SANITIZER| RACECHECK SUMMARY: .*)? *")
END = re.compile(
    r"========= +(?:(?:Error|Warning): Race reported between|and) (?:Read|Write) access"
    r" at attend_hopper_kernel\+0x[0-9a-f]+ in attend_hopper\.py:(\d+)(?: \[\d+ hazards?\])? *"
)
# From c3a2982 on an H200, where line 237 is the kernel's def and line 329 its warp_specialize;
# the races are racecheck's words, title and summary written around them
REPORT = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Read access at attend_hopper_kernel+0xf0 in attend_hopper.py:237
=========     and Write access at attend_hopper_kernel+0x5c50 in attend_hopper.py:237 [33 hazards]
=========     and Write access at attend_hopper_kernel+0x9540 in attend_hopper.py:329 [39 hazards]
=========
========= Error: Race reported between Write access at attend_hopper_kernel+0x5c70 in attend_hopper.py:237
=========     and Read access at attend_hopper_kernel+0x220 in attend_hopper.py:237 [24 hazards]
=========     and Read access at attend_hopper_kernel+0x3b60 in attend_hopper.py:237 [16 hazards]
=========
launched and done
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""  # noqa: E501


def checked(tool: str, what: str) -> subprocess.CompletedProcess:
    """A function of this module in a process that is watched."""
    command = [TOOL, "--tool", tool, "--error-exitcode", str(FOUND)]
    # each tensor by itself: inside a pool, what is outside of one is inside of another
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = f"from tests import test_sanitizer; test_sanitizer.{what}(); print({DONE!r})"
    return subprocess.run(
        [*command, sys.executable, "-c", code],
        env=environment,
        cwd=Path(__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def sanitizer():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    if shutil.which(TOOL) is None:
        pytest.skip(f"no {TOOL} on the PATH: it comes with the CUDA toolkit")
    planted = checked("memcheck", "stray")
    if planted.returncode != FOUND:
        pytest.skip(f"{TOOL} does not see a planted error here: {planted.stdout[-500:]}")


def hand_over_lines() -> set[int]:
    """Lines that Triton's own code in Hopper's kernel is told to be of."""
    (kernel,) = (
        node
        for node in ast.parse(HOPPER.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "attend_hopper_kernel"
    )
    (call,) = (
        node
        for node in ast.walk(kernel)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "gl.warp_specialize"
    )
    return {kernel.lineno, call.lineno}


def beyond_hand_over(report: str, hand_over: set[int]) -> list[str]:
    """What racecheck says besides races within the hand-over of Hopper's kernel to its warps.

    Triton's code writes what the other warps are to do, and with which values, to shared memory
    that is nothing else's, and they read it. All warps meet four times at barrier 1, which nothing
    else uses: write | read | work | write that this was all | read. So the machine code has it, and
    no race is possible; racecheck reports some of these pairs all the same.
    """
    told = [line for line in report.splitlines() if "=========" in line]
    return [
        line
        for line in told
        if not FRAME.fullmatch(line)
        and not ((end := END.fullmatch(line)) and int(end[1]) in hand_over)
    ]


@pytest.mark.gpu
@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_stay_in_their_tensors_and_do_not_race(tool):
    done = checked(tool, "launch_everything")
    assert DONE in done.stdout, done.stdout[-5000:]
    if tool == "racecheck" and done.returncode == FOUND:
        assert "RACECHECK SUMMARY" in done.stdout, done.stdout[-5000:]
        assert not beyond_hand_over(done.stdout, hand_over_lines())
    else:
        assert done.returncode == 0, done.stdout[-5000:]


def test_only_races_within_the_hand_over_are_let_pass():
    assert beyond_hand_over(REPORT, {237, 329}) == []
    for real, other in (
        ("attend_hopper.py:237 [33", "attend_hopper.py:217 [33"),
        ("+0xf0 in attend_hopper.py:237", "+0xf0 in attend_hopper.py:134"),
        ("attend_hopper_kernel+0x220", "attend_tile_kernel+0x220"),
        ("+0x220 in attend_hopper.py", "+0x220 in primitives.py"),
        ("+0x220 in attend_hopper.py:237", "+0x220"),
        ("========= Error", "launched========= Error"),
        ("=========\n", "========= Invalid __shared__ read of size 4 bytes\n"),
    ):
        changed = REPORT.replace(real, other, 1)
        assert changed != REPORT
        assert len(beyond_hand_over(changed, {237, 329})) == 1
    assert len(beyond_hand_over(REPORT, {237})) == 1


def test_hand_over_lines_are_those_of_the_kernel():
    lines = HOPPER.read_text().splitlines()
    at = [lines[line - 1].strip() for line in sorted(hand_over_lines())]
    assert at == ["def attend_hopper_kernel(", "gl.warp_specialize("]


def stray() -> None:
    """A position that the table has not."""
    from csrc_triton import kernels
    from csrc_triton.layout import Rotary

    rotary = Rotary(torch.zeros(4, 2, 32, device="cuda"))
    x = torch.zeros(1, 1, 64, dtype=torch.float16, device="cuda")
    kernels.rotate_rows(x, torch.full((1,), 10**5, dtype=torch.int32, device="cuda"), rotary)
    torch.cuda.synchronize()


def launch_everything() -> None:
    """Small batches, pages that nobody may touch among them, through every kernel there is."""
    from csrc_triton import attend, kernels
    from csrc_triton.layout import Memory, nothing_kept
    from tests.cases import replace_kernels
    from tests.test_kernels import DECODE, DEVICE, PREFILL
    from vllm_reattention import attention

    attend.for_hopper(torch.device(DEVICE))  # imports its kernel where there is one to use
    launched = set()

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.add(self.name)
            return self.kernel[grid]

    all_of_them = replace_kernels(Counted)
    attend.for_hopper.cache_clear()

    attention.stages = lambda _: kernels
    cases = [DECODE[i] for i in (0, 1, 2, 9, 11)] + [PREFILL[i] for i in (0, 2, 4, 6, 8, 10)]
    batches = [(case, torch.float16) for case in cases]
    batches += [(case, torch.float8_e4m3fn) for case in (DECODE[0], PREFILL[0], PREFILL[8])]
    for case, cache_dtype in batches:
        inputs = case.build(torch.float16, DEVICE, cache_dtype)
        inputs.write(kernels.write_kv)
        out = torch.empty_like(inputs.query)
        memory = None
        if case.scope.per_layer:
            found = torch.zeros((len(inputs.tiles.row), inputs.block_table.shape[1]), device=DEVICE)
            memory = Memory(found, 0.5, counts=True, most=found.clone())
        given = (*inputs.score_args(), out, case.soft_cap, inputs.sinks)
        attention.reattention(*given, memory=memory)
        kernels.exact_scores(*inputs.score_args(), case.soft_cap)
        positions = torch.arange(len(out), dtype=torch.int32, device=DEVICE)
        kernels.rotate_rows(inputs.query, positions, inputs.rotary)
        size = case.block_size
        pages = inputs.block_table[0][positions // size].long()
        slots, starts = pages * size + positions % size, positions // size * size
        kernels.read_kv(inputs.pages, slots, starts, inputs.rotary, torch.float16)
        if memory is not None:
            place, size = (inputs.block_table, inputs.tiles), case.block_size
            kept = nothing_kept(len(inputs.pages.key), torch.device(DEVICE))
            kernels.keep(kept, memory.found, *place, size)
            kernels.recollect(kept, *place, inputs.tiles.length > 0, 0.5, size)
    score = torch.rand(2, 2, 5000, device=DEVICE)
    kernels.recall_blocks(score, 60)  # in two rounds
    names = torch.arange(5000, dtype=torch.int32, device=DEVICE).expand(2, 2, -1).contiguous()
    kernels.recall_blocks(score, 60, blocks=names, shared=names[..., 4940:].contiguous())
    torch.cuda.synchronize()
    assert launched == all_of_them, f"not launched: {all_of_them - launched}"
