"""RULER's tasks (arXiv 2404.06654): how much of a long context is used, not only found.

    python -m benchmarks.ruler MODEL --lengths 8192 32768 --provider reattention FLASH_ATTN --plot

MODEL is a folder. A length counts the prompt and the room for its answer. Every provider answers
the same prompts, greedily, all its lengths in one engine (one for each length with YaRN); the
samples of a task and length go to the engine at once and their rows are written when they are
answered. In a row `hits` is the sum over samples of the share of answers found; `depth` is empty
where several facts are asked for. Facts that are asked for alone stand at --depths places in turn.
"""

import argparse
import time
from pathlib import Path

from benchmarks import agreement, engines, harness, needle
from benchmarks.prompts import Prompts, depths
from benchmarks.ruler_text import ANSWER_LEN, HAVE_DEPTH, TASKS, Sample, make, score

TABLE = harness.RESULTS / "ruler.csv"


def make_samples(
    prompts: Prompts, task: str, context_len: int, options: argparse.Namespace
) -> list[Sample]:
    return [
        make(prompts, task, context_len, depth_of(task, index, options), f"{options.seed} {index}")
        for index in range(options.samples)
    ]


def depth_of(task: str, index: int, options: argparse.Namespace) -> float | None:
    return depths(options.depths)[index % options.depths] if task in HAVE_DEPTH else None


def refuse_lengths(options: argparse.Namespace) -> None:
    """Before any engine starts: a ValueError if a task does not fit a length."""
    prompts = Prompts(options.model)
    for length in options.lengths:
        for task in options.tasks:
            make(prompts, task, length, depth_of(task, 0, options), "0")


def rows(samples: list[Sample], written: list[str], shared: dict) -> list[dict]:
    """Rows of one task and length, one for each depth."""
    scores = {}
    for sample, text in zip(samples, written, strict=True):
        scores.setdefault(sample.depth, []).append(score(sample, text))
    return [
        shared | {"depth": depth, "samples": len(found), "hits": round(sum(found), 4)}
        for depth, found in scores.items()
    ]


def run_grid(
    provider: engines.Provider, lengths: list[int], options: argparse.Namespace, stamp: dict
) -> None:
    from vllm import SamplingParams

    prompts = Prompts(options.model)
    cases = [(length, task) for length in lengths for task in options.tasks]
    chosen = needle.engine_arguments(options) | {"enable_prefix_caching": False}
    with engines.engine(**provider.arguments(), **chosen) as llm:
        for length, task in engines.in_time(cases, lambda case: case[0], options.deadline):
            samples = make_samples(prompts, task, length, options)
            greedy = SamplingParams(temperature=0, max_tokens=ANSWER_LEN[task])
            start = time.perf_counter()
            answers = llm.generate(agreement.as_tokens(samples), greedy, use_tqdm=False)
            seconds = time.perf_counter() - start
            label = engines.named(provider, options)
            shared = needle.shared_columns(provider, label, length, options, stamp)
            written = [answer.outputs[0].text for answer in answers]
            found = rows(samples, written, shared | {"task": task})
            harness.append(TABLE, needle.COLUMNS, found)
            print(f"{label} {task} {length}: {share(found):.1%}, {seconds:.1f} s", flush=True)
            pairs = [pair for pair in zip(samples, written, strict=True) if score(*pair) < 1]
            for sample, text in pairs[: needle.TOLD]:
                print(f"  missed {sample.depth} {sample.answers}: {text!r}", flush=True)


def share(found: list[dict]) -> float:
    return sum(float(row["hits"]) for row in found) / sum(int(row["samples"]) for row in found)


def shares(found: list[dict]) -> dict[tuple[str, int], float]:
    """The share of answers found by task and length, the average over tasks with them.

    Only where every task has been run is there an average.
    """
    cells = {}
    for row in found:
        cells.setdefault((row["task"], int(row["context_len"])), []).append(row)
    told = {place: share(cell) for place, cell in cells.items()}
    tasks = {task for task, _ in told}
    for length in sorted({length for _, length in told}):
        column = [told[task, length] for task in tasks if (task, length) in told]
        if len(column) == len(tasks):
            told["average", length] = sum(column) / len(column)
    return told


def by_provider(found: list[dict]) -> dict[str, list[dict]]:
    """Rows by provider and scope."""
    groups = {}
    for row in found:
        groups.setdefault(engines.label(row), []).append(row)
    return groups


def summary(found: list[dict]) -> str:
    """Percentages by task and length, a table for each provider."""
    lines = []
    for name, mine in by_provider(found).items():
        told = shares(mine)
        lengths = sorted({length for _, length in told})
        lines += ["", f"{name:32}" + "".join(f"{length:>9}" for length in lengths)]
        for task in (*TASKS, "average"):
            cells = [f"{told[task, n]:.1%}" if (task, n) in told else "-" for n in lengths]
            if set(cells) != {"-"}:
                lines.append(f"{task:32}" + "".join(f"{cell:>9}" for cell in cells))
    return "\n".join(lines)


def is_drawn(name: str, found: list[dict]) -> bool:
    return not name.startswith("reattention") or {row["task"] for row in found} == set(TASKS)


def draw(model: str) -> None:
    """A plot for each task and for their average; of each seed what was measured last counts."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    newest = {}
    for row in harness.read(TABLE):
        if row["model"] == model:
            place = ("provider", *engines.SETTINGS, "task", "context_len", "depth", "seed")
            newest[tuple(row[name] for name in place)] = row
    groups = by_provider(list(newest.values()))
    # scopes that a few tasks tried would crowd out those that were measured
    groups = {name: found for name, found in groups.items() if is_drawn(name, found)}
    figure, grid = plt.subplots(3, 4, figsize=(15, 9), sharey=True)
    for task, axis in zip((*TASKS, "average"), grid.flat, strict=True):
        for index, (name, found) in enumerate(groups.items()):  # not all have every task
            points = sorted((n, value) for (of, n), value in shares(found).items() if of == task)
            # the average of a few tasks is not to be seen beside that of all
            if points and (task in TASKS or {row["task"] for row in found} == set(TASKS)):
                axis.plot(*zip(*points, strict=True), marker="o", label=name, color=f"C{index}")
        axis.set(title=task, xscale="log", ylim=(-0.03, 1.03))
        lengths = sorted({int(row["context_len"]) for row in newest.values()})
        axis.set_xticks(lengths, [needle.short(n) for n in lengths], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    lines = {line.get_label(): line for axis in grid.flat for line in axis.lines}
    figure.legend(lines.values(), lines, loc="lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{model}: RULER, share of answers found by context length")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(harness.RESULTS / f"ruler-{model}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="none: do not run")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--samples", type=int, default=25, help="for each task and length")
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    engines.add_arguments(parser, providers=["reattention"])
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    options.deadline = time.time() + options.budget
    options.lengths.sort()

    if options.lengths:
        refuse_lengths(options)
        stamp, before = engines.stamp(options), len(harness.read(TABLE)) if TABLE.exists() else 0
        try:
            engines.each_provider(run_grid, options, 0, options, stamp)
        finally:
            print(summary(harness.read(TABLE)[before:]))
    if options.plot:
        draw(Path(options.model).name)


if __name__ == "__main__":
    main()
