"""Loss on natural text (nats per token) by how much of it stands before.

    python -m benchmarks.loss MODEL --lengths 8192 16384 32768 65536 131072 --plot

MODEL is a folder. The text is a novel, contiguous. At every length and for every provider the same
tokens are scored, the last --scored of each text, so that only what stands before them differs. A
length counts one token more than the text, which vLLM generates.

In the phase `prefill` the scored tokens are part of the prompt: queries of one block select
together, so a token's selection has seen up to 31 later ones, and for the last 128 tokens every
layer selects, as for questions. In the phase `decode` the prompt ends
before them and each is fed alone, as if the model had written it: a tile of one query, which
nothing can flatter.
"""

import argparse
import os
import statistics
import time
from pathlib import Path

from benchmarks import engines, harness, needle
from benchmarks.prompts import Prompts, novel_text

COLUMNS = ["model", "provider", "phase", "context_len", "text", "tokens", "loss"]
COLUMNS += [*engines.SETTINGS, "gpu", "torch", "triton", "vllm", "commit"]
TABLE = harness.RESULTS / "loss.csv"
PHASES = ("prefill", "decode")


def text_ends(num_tokens: int, longest: int, count: int) -> list[int]:
    """Where texts end in a novel of so many tokens, apart, each with `longest` before it."""
    room = num_tokens - longest
    if room < 0:
        raise ValueError(f"lengths must fit in the novel of {num_tokens} tokens, got {longest}")
    return [longest + room * index // max(1, count - 1) for index in range(count)]


def make_texts(prompts: Prompts, context_len: int, ends: list[int]) -> list[list[int]]:
    """Tokens up to each end, one less than `context_len`."""
    first = prompts.tokenizer("").input_ids  # what the model wants at the start, if anything
    novel, _ = prompts.haystack(novel_text())
    size = context_len - 1 - len(first)
    return [first + novel[end - size : end] for end in ends]


def losses(llm, phase: str, texts: list[list[int]], scored: int) -> list[float]:
    """Mean negative log probability of each text's last tokens."""
    from vllm import SamplingParams

    common = {"temperature": 0, "detokenize": False, "ignore_eos": True}
    if phase == "prefill":
        params = [SamplingParams(max_tokens=1, prompt_logprobs=0, **common)] * len(texts)
        asked = texts
    else:
        params = [
            SamplingParams(
                max_tokens=scored, logprobs=0, extra_args={"forced": text[-scored:]}, **common
            )
            for text in texts
        ]
        asked = [text[:-scored] for text in texts]
    outs = llm.generate([{"prompt_token_ids": text} for text in asked], params, use_tqdm=False)
    means = []
    for text, out in zip(texts, outs, strict=True):
        told = out.prompt_logprobs if phase == "prefill" else out.outputs[0].logprobs
        own = zip(text[-scored:], told[-scored:], strict=True)
        means.append(-statistics.fmean(at[token].logprob for token, at in own))
    return means


def run_lengths(
    provider: engines.Provider,
    lengths: list[int],
    ends: list[int],
    options: argparse.Namespace,
    stamp: dict,
) -> None:
    prompts, name = Prompts(options.model), engines.named(provider, options)
    cases = [(length, phase) for length in lengths for phase in options.phases]
    chosen = needle.engine_arguments(options) | {"enable_prefix_caching": False}
    if "decode" in options.phases:
        chosen["logits_processors"] = ["benchmarks.forced:Forced"]
        # 0.33's other model runner, which is its default, has another interface for them
        os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    with engines.engine(**provider.arguments(), **chosen) as llm:
        for length, phase in engines.in_time(cases, lambda case: case[0], options.deadline):
            texts = make_texts(prompts, length, ends)
            start = time.perf_counter()
            found = losses(llm, phase, texts, options.scored)
            seconds = time.perf_counter() - start
            shared = {
                "model": Path(options.model).name,
                "provider": name,
                "phase": phase,
                "context_len": length,
                "tokens": options.scored,
            }
            shared |= provider.numbers() | stamp
            rows = [
                shared | {"text": end, "loss": f"{loss:.6f}"}
                for end, loss in zip(ends, found, strict=True)
            ]
            harness.append(TABLE, COLUMNS, rows)
            mean = statistics.fmean(found)
            print(f"{name} {phase} {length}: {mean:.4f}, {seconds:.1f} s", flush=True)


def curves(rows: list[dict]) -> dict[str, dict[int, dict[int, float]]]:
    """Loss by provider with its scope and phase, by length and text; the last row counts."""
    found = {}
    for row in rows:
        cell = found.setdefault(f"{engines.label(row)}, {row['phase']}", {})
        cell.setdefault(int(row["context_len"]), {})[int(row["text"])] = float(row["loss"])
    return found


def change(before: dict[int, float], after: dict[int, float]) -> tuple[float, float]:
    """Relative change of the mean loss over the same texts, and its standard error."""
    pairs = [(before[text], after[text]) for text in before.keys() & after.keys()]
    mean = statistics.fmean(b for b, _ in pairs)
    differences = [a - b for b, a in pairs]
    error = statistics.stdev(differences) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
    return statistics.fmean(differences) / mean, error / mean


def summary(rows: list[dict]) -> str:
    """A line for each length: the loss, and by how much it differs from the shortest length's."""
    lines = []
    for name, cells in curves(rows).items():
        lines += ["", name]
        shortest = cells[min(cells)]
        for length, texts in sorted(cells.items()):
            more, error = change(shortest, texts)
            mean = statistics.fmean(texts.values())
            spread = f" +- {error:.2%}" if len(texts) > 1 else ""
            lines.append(f"{length:>9} {mean:8.4f} {more:+8.2%}{spread}, {len(texts)} texts")
    return "\n".join(lines)


def means(cells: dict[int, dict[int, float]]) -> list[tuple[int, float]]:
    """By length, of the texts that every length has: others would be compared with each other."""
    common = set.intersection(*map(set, cells.values()))
    if not common:
        return []
    return [(n, statistics.fmean(cells[n][text] for text in common)) for n in sorted(cells)]


def draw(model: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 4.5))
    rows = [row for row in harness.read(TABLE) if row["model"] == model]
    for name, cells in curves(rows).items():
        points = means(cells)
        if len(points) < 2:  # of other texts than the curves, it would only mislead
            continue
        style = "-" if name.endswith("prefill") else "--"
        axis.plot(*zip(*points, strict=True), style, marker="o", label=name)
    lengths = sorted({int(row["context_len"]) for row in rows})
    axis.set(xscale="log", xlabel="context (tokens)", ylabel="loss (nats per token)", title=model)
    axis.set_xticks(lengths, [needle.short(n) for n in lengths])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(harness.RESULTS / f"loss-{model}.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", default=[], help="none: do not run")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=PHASES)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--scored", type=int, default=512, help="tokens of each text")
    engines.add_arguments(parser, providers=["reattention", "streaming", "FLASH_ATTN"])
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    options.deadline = time.time() + options.budget
    options.lengths.sort()

    if options.lengths:
        novel, _ = Prompts(options.model).haystack(novel_text())
        ends = text_ends(len(novel), max(options.lengths), options.texts)
        stamp, before = engines.stamp(options), len(harness.read(TABLE)) if TABLE.exists() else 0
        try:
            engines.each_provider(run_lengths, options, 0, ends, options, stamp)
        finally:
            print(summary(harness.read(TABLE)[before:]))
    if options.plot:
        draw(Path(options.model).name)


if __name__ == "__main__":
    main()
