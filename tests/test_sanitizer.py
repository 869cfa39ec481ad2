"""Every kernel under NVIDIA's compute-sanitizer: none leaves its tensors, none races."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
FOUND = 99  # exit status of compute-sanitizer where it found an error
TOOL = "compute-sanitizer"


def checked(tool: str, what: str) -> subprocess.CompletedProcess:
    """A function of this module in a process that is watched."""
    command = [TOOL, "--tool", tool, "--error-exitcode", str(FOUND)]
    # each tensor by itself: inside a pool, what is outside of one is inside of another
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code = f"from tests import test_sanitizer; test_sanitizer.{what}()"
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


@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_kernels_stay_in_their_tensors_and_do_not_race(tool):
    done = checked(tool, "launch_everything")
    assert done.returncode == 0, done.stdout[-5000:]


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
    from tests.test_kernels import DECODE, DEVICE, PREFILL
    from vllm_reattention import attention

    attend.for_hopper(torch.device(DEVICE))  # imports its kernel where there is one to use
    launched, all_of_them = set(), set()

    class Counted:
        def __init__(self, name, kernel):
            self.name, self.kernel = name, kernel

        def __getitem__(self, grid):
            launched.add(self.name)
            return self.kernel[grid]

    for module in [m for name, m in sys.modules.items() if name.startswith("csrc_triton.")]:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            all_of_them.add(name)
            setattr(module, name, Counted(name, getattr(module, name)))
    attend.for_hopper.cache_clear()

    attention.stages = lambda _: kernels
    cases = [DECODE[i] for i in (0, 1, 2, 9)] + [PREFILL[i] for i in (0, 2, 4, 6, 8)]
    batches = [(case, torch.float16) for case in cases]
    batches += [(case, torch.float8_e4m3fn) for case in (DECODE[0], PREFILL[0], PREFILL[8])]
    for case, cache_dtype in batches:
        inputs = case.build(torch.float16, DEVICE, cache_dtype)
        inputs.write(kernels.write_kv)
        out = torch.empty_like(inputs.query)
        attention.reattention(*inputs.score_args(), out, case.soft_cap, inputs.sinks)
        positions = torch.arange(len(out), dtype=torch.int32, device=DEVICE)
        kernels.rotate_rows(inputs.query, positions, inputs.rotary)
    kernels.recall_blocks(torch.rand(2, 2, 5000, device=DEVICE), 60)  # in two rounds
    torch.cuda.synchronize()
    assert launched == all_of_them, f"not launched: {all_of_them - launched}"
