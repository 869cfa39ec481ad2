"""Tile sizes of the kernels, tried one by one: where these come from.

python -m benchmarks.sweep            prints the five fastest of each stage and case
"""

import itertools

import torch
import triton

from benchmarks import harness
from benchmarks.kernels import HEADS, NEW_TOKENS, Problem
from csrc_triton import attend, refine, score

CASES = [("llama-3.1-8b", 1048576, 1, 1), ("llama-3.1-8b", 131072, 32, 1)]
CASES += [("llama-3.1-8b", n, 1, NEW_TOKENS) for n in (131072, 1048576)]


# stage, module, its function, what to try for single queries, what for tiles
STAGES = [
    ("score", score, "_tile_sizes",
     [*itertools.product((32, 64), (4,), (3, 4), (528,))],
     [*itertools.product((64, 128), (4, 8), (2, 3), (528,))]),
    ("score", score, "_share_sizes",
     [(256, 4, 3, 264), (128, 4, 3, 528)],
     [*itertools.product((64, 128), (4, 8), (1, 2, 3), (528,))]),
    ("refine", refine, "_tile_sizes",
     [*itertools.product((8, 16), (2, 4), (3, 4))],
     [*itertools.product((32, 64, 128), (4, 8), (2, 3))]),
    ("attend", attend, "_single_sizes",
     [*itertools.product((64, 128), (2, 4), (1, 2), (528,))], []),
    ("attend", attend, "_tile_sizes", [], [(32, 4, 1), (64, 8, 1), (128, 8, 1)]),
]  # fmt: skip


def main() -> None:
    for name, context, batch, new in CASES:
        problem = Problem(HEADS[name], context, batch, torch.bfloat16, new)
        stages = problem.stages()
        for stage, module, name_of_sizes, for_singles, for_tiles in STAGES:
            chosen, found = getattr(module, name_of_sizes), []
            for tried in for_singles if new == 1 else for_tiles:
                setattr(module, name_of_sizes, lambda *_, tried=tried: tried)
                try:
                    took = harness.quantiles(stages[stage], new == 1, problem.num_layers, 30)
                    found.append((took[0], tried))
                except (triton.runtime.errors.OutOfResources, RuntimeError) as error:
                    print(stage, tried, type(error).__name__, flush=True)
            setattr(module, name_of_sizes, chosen)
            torch.cuda.synchronize()
            if not found:
                continue
            best = "; ".join(f"{t:.4f} {s}" for t, s in sorted(found)[:5])
            kind = "decode" if new == 1 else "prefill"
            print(f"{kind} {batch} x {context} {stage}{name_of_sizes}: {best}", flush=True)
        del problem, stages
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
