"""Figure 3: what is found in a long context, by its length and by where in it the answer stands.

    python -m benchmarks.needle MODEL --lengths 12288 131072 --tasks passkey essay --plot

MODEL is a folder. Every provider answers the same prompts, greedily; all prompts of one length go
to the engine at once, and their rows are written when they are answered. Stock vLLM gets an engine
of its own for each length with YaRN, as its factor fits one length.

--agree compares the first provider's answers under CUDA graphs with those it gives eagerly, in
chunks of 512 tokens, and with a prefix cache. --compare-logprobs compares log probabilities of a
text's tokens with those of a float32 run.
"""

import argparse
import time
from pathlib import Path

from benchmarks import agreement, engines, harness
from benchmarks.prompts import ANSWER_LEN, TASKS, Prompt, Prompts, depths, is_hit

COLUMNS = ["model", "provider", "task", "context_len", "depth", "samples", "hits"]
COLUMNS += [*engines.SETTINGS, "seed", "gpu", "torch", "triton", "vllm", "commit"]
TABLE = harness.RESULTS / "needle.csv"
MAX_NUM_SEQS = 8
TOLD = 5  # answers that are wrong, of each length
ROOM = 64  # tokens that max_model_len has for a prompt's answer


def make_prompts(options: argparse.Namespace, context_len: int) -> list[Prompt]:
    """Samples of one length: tasks x depths x keys."""
    make = Prompts(options.model).make
    return [
        make(task, context_len, depth, f"{options.seed} {key}")
        for task in options.tasks
        for depth in depths(options.depths)
        for key in range(options.keys)
    ]


def rows(prompts: list[Prompt], written: list[str], shared: dict) -> list[dict]:
    """Rows of one length, one for each task and depth."""
    hits = {}
    for prompt, text in zip(prompts, written, strict=True):
        hits.setdefault((prompt.task, prompt.depth), []).append(is_hit(prompt, text))
    return [
        shared | {"task": task, "depth": depth, "samples": len(found), "hits": sum(found)}
        for (task, depth), found in hits.items()
    ]


def tell(shared: dict, found: list[dict], seconds: float, missed: list[str]) -> None:
    """Hits by depth, a line for each task; and some of what was said instead."""
    for task in dict.fromkeys(row["task"] for row in found):
        cells = [row for row in found if row["task"] == task]
        hits, samples = (sum(row[name] for row in cells) for name in ("hits", "samples"))
        told = " ".join(f"{row['depth']:.2f}:{row['hits']}" for row in cells)
        print(
            f"{shared['model']} {shared['provider']} {task} {shared['context_len']}: "
            f"{hits}/{samples} ({told}), {seconds:.1f} s",
            flush=True,
        )
    for line in missed[:TOLD]:
        print(f"  missed {line}", flush=True)


def run_grid(
    provider: engines.Provider, lengths: list[int], options: argparse.Namespace, stamp: dict
) -> None:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_LEN)
    chosen = engine_arguments(options) | {"enable_prefix_caching": options.prefix_caching}
    with engines.engine(**provider.arguments(), **chosen) as llm:
        for length in engines.in_time(lengths, lambda length: length, options.deadline):
            prompts = make_prompts(options, length)
            start = time.perf_counter()
            answers = llm.generate(agreement.as_tokens(prompts), greedy, use_tqdm=False)
            seconds = time.perf_counter() - start
            label = engines.named(provider, options)
            shared = shared_columns(provider, label, length, options, stamp)
            written = [answer.outputs[0].text for answer in answers]
            found = rows(prompts, written, shared)
            harness.append(TABLE, COLUMNS, found)
            pairs = [pair for pair in zip(prompts, written, strict=True) if not is_hit(*pair)]
            missed = [f"{prompt.task} {prompt.answer}: {text!r}" for prompt, text in pairs]
            tell(shared, found, seconds, missed)


def engine_arguments(options: argparse.Namespace) -> dict:
    return engines.arguments(options) | {"max_num_seqs": MAX_NUM_SEQS}


def shared_columns(provider, label: str, length: int, options, stamp: dict) -> dict:
    about = {"model": Path(options.model).name, "provider": label, "context_len": length}
    return about | provider.numbers() | {"seed": options.seed} | stamp


def make_provider(name: str, lengths: list[int], options: argparse.Namespace) -> engines.Provider:
    return engines.Provider(name, options.model, max(lengths) + ROOM, options.settings)


def run_agreement(options: argparse.Namespace, stamp: dict) -> None:
    """The answers of each variant of an engine, and how they differ from those of the first."""
    provider = make_provider(options.provider[0], options.lengths, options)
    prompts = [p for length in options.lengths for p in make_prompts(options, length)]
    chosen = provider.arguments() | engine_arguments(options)
    first = []
    for variant, answers in agreement.answers_of_variants(chosen, prompts, options.deadline):
        first = first or answers
        for length in options.lengths:
            label = f"{provider.name}/{variant}"
            shared = shared_columns(provider, label, length, options, stamp)
            mine = [index for index, prompt in enumerate(prompts) if len(prompt.tokens) == length]
            texts = [answers[index].text for index in mine]
            harness.append(TABLE, COLUMNS, rows([prompts[i] for i in mine], texts, shared))
            pairs = [(first[index], answers[index]) for index in mine]
            agreement.record(shared, agreement.compare(pairs))


def run_logprobs(options: argparse.Namespace, stamp: dict) -> None:
    """Log probabilities of the novel's tokens against float32, reattention's and stock vLLM's."""
    lengths = options.lengths or [2048, 7168]
    prompts = Prompts(options.model)
    texts = [prompts.novel(length) for length in lengths]
    chosen = engine_arguments(options) | {"enable_prefix_caching": False}
    providers = [make_provider(name, lengths, options) for name in ("reattention", "FLASH_ATTN")]
    runs = {provider.name: provider.arguments() | chosen for provider in providers}
    results = agreement.compare_to_float32(options.model, runs, texts)
    for length, figures in zip(lengths, results, strict=True):
        for name, compared in figures.items():
            shared = {"model": Path(options.model).name, "provider": name, "context_len": length}
            agreement.record(shared | stamp, compared)


def draw(options: argparse.Namespace) -> None:
    """A heat map for each task and provider, of settings and depths asked for.

    Of each cell those rows count that were measured last, at one commit.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    model, newest = Path(options.model).name, {}
    settings = {
        name: engines.Provider(name, options.model, 0, options.settings).numbers()
        for name in engines.PROVIDERS
    }
    for row in harness.read(TABLE):
        name, _, variant = row["provider"].partition("/")
        # none for a variant of an engine but that with an fp8 cache
        asked = settings.get(name) if not variant or variant.startswith("fp8") else None
        is_asked = row["model"] == model and float(row["depth"]) in depths(options.depths)
        if asked is None or not is_asked:
            continue
        if all(row[name] == str(number) for name, number in asked.items()):
            place = int(row["context_len"]), float(row["depth"])
            cells = newest.setdefault((row["task"], row["provider"]), {})
            commit, hits, samples = cells.get(place, ("", 0, 0))
            if commit != row["commit"]:
                hits = samples = 0
            cells[place] = row["commit"], hits + int(row["hits"]), samples + int(row["samples"])
    tasks = [task for task in TASKS if any(task == key[0] for key in newest)]
    providers = sorted({provider for _, provider in newest})
    size = 4.2 * len(providers), 2.8 * len(tasks)
    figure, grid = plt.subplots(len(tasks), len(providers), squeeze=False, figsize=size)
    for task, line in zip(tasks, grid, strict=True):
        for provider, axis in zip(providers, line, strict=True):
            cells = newest.get((task, provider), {})
            if not cells:
                axis.axis("off")
                continue
            axis.set_title(f"{task}, {provider}", fontsize=10)
            lengths, rows_at = (sorted(set(values)) for values in zip(*cells, strict=True))
            shares = {place: hits / samples for place, (_, hits, samples) in cells.items()}
            image = [[shares.get((n, depth), float("nan")) for n in lengths] for depth in rows_at]
            axis.imshow(image, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
            for y, values in enumerate(image):
                for x, share in enumerate(values):
                    if share == share:
                        axis.text(x, y, f"{share:.0%}", ha="center", va="center", fontsize=7)
            axis.set_xticks(range(len(lengths)), [short(n) for n in lengths], fontsize=8)
            axis.set_yticks(range(len(rows_at)), [f"{depth:.0%}" for depth in rows_at], fontsize=8)
            axis.set(xlabel="context (tokens)", ylabel="depth")
    figure.suptitle(f"{model}: share of answers found")
    figure.tight_layout()
    figure.savefig(harness.RESULTS / f"needle-{model}.png", dpi=120)


def short(tokens: int) -> str:
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if tokens % (unit // 2) == 0:
            return f"{tokens / unit:g}{name}"
    return str(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="none: do not run")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["passkey"])
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--keys", type=int, default=5, help="samples for each length and depth")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--prefix-caching", action="store_true")
    engines.add_arguments(parser, providers=["reattention"])
    parser.add_argument("--agree", action="store_true")
    parser.add_argument("--compare-logprobs", action="store_true")
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    options.deadline = time.time() + options.budget
    options.lengths.sort()

    if options.compare_logprobs:
        run_logprobs(options, engines.stamp(options))
    elif options.agree:
        run_agreement(options, engines.stamp(options))
    elif options.lengths:
        engines.each_provider(run_grid, options, ROOM, options, engines.stamp(options))
    if options.plot:
        draw(options)


if __name__ == "__main__":
    main()
