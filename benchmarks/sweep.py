"""Tile sizes of the kernels, tried one by one: where each `_tile_sizes` comes from.

python -m benchmarks.sweep            prints the five fastest of each stage and case
"""

import itertools

import torch
import triton

from benchmarks import harness
from benchmarks.kernels import HEADS, NEW_TOKENS, Problem
from csrc_triton import attend, refine, score

CASES = [("llama-3.1-8b", 1048576, 1, 1), ("llama-3.1-8b", 131072, 32, 1)]
CASES += [("llama-3.1-8b", 131072, 1, NEW_TOKENS)]


def sizes(stage: str, is_decode: bool):
    """Every combination worth a try: what _tile_sizes of that module returns."""
    if stage == "score":
        if is_decode:
            return itertools.product((32, 64), (4,), (2, 3), (528, 1056))
        return [(64, 8, 3, 264), (128, 8, 2, 264)]
    if stage == "refine":  # candidates
        if is_decode:
            return itertools.product((1, 2), (1, 2, 4), (1,), (1056, 2112))
        return itertools.product((32, 64), (4, 8), (2, 3), (0,))
    if is_decode:
        return [*itertools.product((32, 64), (2, 4), (1,), (264, 528)), (128, 8, 1, 264)]
    return itertools.product((32, 64, 128), (4, 8), (1,), (264,))


def main() -> None:
    for name, context, batch, new in CASES:
        problem = Problem(HEADS[name], context, batch, torch.bfloat16, new)
        stages = problem.stages()
        for stage, module in (("score", score), ("refine", refine), ("attend", attend)):
            if stage == "score" and new > 1:
                stages = problem.stages()
            chosen, found = module._tile_sizes, []
            for tried in sizes(stage, new == 1):
                module._tile_sizes = lambda *_, tried=tried: tried
                try:
                    took = harness.quantiles(stages[stage], new == 1, problem.num_layers, 30)
                    found.append((took[0], tried))
                except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                    print(stage, tried, type(error).__name__, flush=True)
            module._tile_sizes = chosen
            torch.cuda.synchronize()
            best = "; ".join(f"{t:.4f} {s}" for t, s in sorted(found)[:5])
            kind = "decode" if new == 1 else "prefill"
            print(f"{kind} {batch} x {context} {stage}: {best}", flush=True)
        del problem, stages
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
