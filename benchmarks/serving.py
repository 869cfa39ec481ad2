"""Figure 2: what a user waits for, against context length: ours beside vLLM's FLASH_ATTN.

    python -m benchmarks.serving --run --shape llama-3.1-8b --lengths 8192 65536 130000 --plot

Shapes of known models with dummy weights and random tokens, whose values do not matter to time.
Requests arrive together. They are asked for one token first, with nothing in the prefix cache: TTFT
and input throughput. Then for 65, with all but their ends in it: TPOT and output throughput, of
steps in which every request decodes. Both providers run in one command, an engine each.

Peak memory is what torch allocated at most in that time, with a KV cache that holds these requests
and no more (the engine's own takes what it may have). CUDA's context and graphs are not in it.
Under tensor parallelism it is that of the first GPU; the KV cache, too.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import engines, harness

COLUMNS = ["figure", "provider", "context_len", "batch", "heads", "kv_heads", "head_size", "dtype"]
COLUMNS += ["metric", "unit", "p50", "p20", "p80", "gpu", "torch", "triton", "vllm", "commit"]
TABLE = harness.RESULTS / "serving.csv"
NEW_TOKENS = 65
ROOM = 128  # tokens of max_model_len beyond the longest prompt
WARM_UP = 12_000  # tokens of the first prompt: more than any dense limit
ENOUGH_SECONDS = 10  # of repetitions

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
    "dtype": "bfloat16",
}
QWEN = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "vocab_size": 151936,
    "dtype": "bfloat16",
}
SHAPES = {"llama-3.1-8b": LLAMA, "qwen2.5-1.5b": QWEN}


class Case(NamedTuple):
    context_len: int
    batch: int

    def room(self, block_size: int) -> int:
        """Tokens of KV cache that its requests take, in whole blocks."""
        return self.batch * -(-(self.context_len + NEW_TOKENS) // block_size) * block_size


def run_provider(
    provider: engines.Provider, cases: list[Case], chosen: dict, shared: dict, deadline: float
) -> None:
    with engines.engine(**provider.arguments(), **chosen) as llm, engines.alone():
        cache = llm.llm_engine.vllm_config.cache_config
        room = (cache.num_gpu_blocks - 1) * cache.block_size  # the first block is nobody's
        generate(llm, random_prompts(Case(min(WARM_UP, cases[-1].context_len), 1)), NEW_TOKENS)
        for case in engines.in_time(cases, lambda case: case.context_len * case.batch, deadline):
            told = f"{provider.name} {case.batch} x {case.context_len}:"
            if case.room(cache.block_size) > room:
                print(told, f"not in {room} tokens of KV cache", flush=True)
                continue
            rows = []
            for (metric, unit), samples in measure(llm, case, room).items():
                p20, p50, p80 = (f"{value:.5g}" for value in quantiles(samples))
                numbers = {"metric": metric, "unit": unit, "p50": p50, "p20": p20, "p80": p80}
                rows.append(shared | case._asdict() | {"provider": provider.name} | numbers)
                told += f" {metric} {p50} {unit},"
            harness.append(TABLE, COLUMNS, rows)
            print(told.rstrip(","), flush=True)


def measure(llm, case: Case, room: int) -> dict[tuple[str, str], list[float]]:
    """Samples of each metric and unit."""
    cache, _ = llm.collective_rpc(engines.memory)[0]
    prompts = []

    def ask_once():
        prompts[:] = random_prompts(case)
        return generate(llm, prompts, 1)

    firsts = repeat(ask_once)
    decodes = repeat(lambda: generate(llm, prompts, NEW_TOKENS))
    _, most = llm.collective_rpc(engines.memory)[0]
    block_size = llm.llm_engine.vllm_config.cache_config.block_size
    for out in decodes[-1][0]:
        if out.num_cached_tokens < case.context_len - block_size:
            raise RuntimeError(f"{case} must be in the prefix cache, {out.num_cached_tokens} are")

    ours = cache * case.room(block_size) / room
    spans = [[(o.metrics.first_token_ts, o.metrics.last_token_ts) for o in r] for r, _ in decodes]
    steps = NEW_TOKENS - 1
    tokens, written = case.batch * case.context_len, case.batch * steps
    return {
        ("TTFT", "s"): [o.metrics.first_token_latency for outs, _ in firsts for o in outs],
        ("TPOT", "ms"): [1e3 * (end - start) / steps for run in spans for start, end in run],
        ("input throughput", "tokens/s"): [tokens / seconds for _, seconds in firsts],
        ("output throughput", "tokens/s"): [
            written / (max(end for _, end in run) - min(start for start, _ in run)) for run in spans
        ],
        ("KV cache", "GiB"): [ours / 2**30],
        ("peak memory", "GiB"): [(most - cache + ours) / 2**30],
    }


def random_prompts(case: Case) -> list[list[int]]:
    """Never the same, so that none is in the prefix cache."""
    return [random.choices(range(1000, 30000), k=case.context_len) for _ in range(case.batch)]


def generate(llm, prompts: list[list[int]], num_tokens: int) -> tuple[list, float]:
    """What vLLM returns for each, and the seconds it took."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    start = time.perf_counter()
    outs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    return outs, time.perf_counter() - start


def repeat(call: Callable[[], Any]) -> list:
    """Results of up to five calls, of fewer if they take long; before those, one to warm up."""
    results = []
    end = time.time() + ENOUGH_SECONDS
    while not results or (len(results) <= 5 and time.time() < end):
        results.append(call())
    return results[1:] or results


def quantiles(samples: list[float]) -> list[float]:
    """p20, p50 and p80."""
    ordered = sorted(samples)
    return [ordered[round(share * (len(ordered) - 1))] for share in (0.2, 0.5, 0.8)]


def run(options: argparse.Namespace) -> None:
    deadline = time.time() + options.budget
    config = SHAPES[options.shape]
    cases = [Case(length, batch) for length in options.lengths for batch in options.batches]
    cases.sort(key=lambda case: case.context_len * case.batch)
    chosen = engines.arguments(options) | {
        "max_num_seqs": max(options.batches),
        "enable_prefix_caching": True,
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "disable_log_stats": False,
    }
    is_fp8 = options.kv_cache_dtype.startswith("fp8")
    shared = engines.stamp(options) | {
        "figure": "serving",
        "heads": config["num_attention_heads"],
        "kv_heads": config["num_key_value_heads"],
        "head_size": config["head_dim"],
        "dtype": "float8_e4m3fn" if is_fp8 else config["dtype"],
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        longest = max(options.lengths) + ROOM
        providers = [
            engines.Provider(name, folder, longest, options.settings) for name in options.provider
        ]
        calls = [(provider, cases, chosen, shared, deadline) for provider in providers]
        engines.each_apart(run_provider, calls)


def plot() -> None:
    """TTFT and TPOT of single requests; a line of ours is of the last two commits of it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {str(config["num_attention_heads"]): name for name, config in SHAPES.items()}
    newest = {}
    for row in harness.read(TABLE):
        if row["batch"] == "1":
            cache = ", fp8 KV" if row["dtype"].startswith("float8") else ""
            count, _, gpu = row["gpu"].rpartition(" x ")
            gpus = f", {count} GPUs" if count else ""
            line = row["metric"], f"{names[row['heads']]}{cache}{gpus}", row["provider"]
            points = newest.setdefault(line, {}).setdefault(row["commit"], {})
            points[int(row["context_len"])] = float(row["p50"]), gpu
    for line, commits in newest.items():  # not every length is measured each time
        # vLLM's own does not change with our commits
        recent = list(commits.values())[0 if line[2] == "FLASH_ATTN" else -2 :]
        newest[line] = {n: point for points in recent for n, point in points.items()}
    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    styles = {"reattention": "o-", "FLASH_ATTN": "s--", "streaming": "^:"}
    models = sorted({model for _, model, _ in newest})
    for axis, metric, unit in zip(axes, ("TTFT", "TPOT"), ("s", "ms"), strict=True):
        for (_, model, provider), points in sorted(i for i in newest.items() if i[0][0] == metric):
            lengths = sorted(points)
            axis.plot(
                lengths,
                [points[n][0] for n in lengths],
                styles.get(provider, "x-"),
                color=f"C{models.index(model)}",
                label=f"{model}, {provider}",
            )
        axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=f"{metric} ({unit})")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=8)
    machines = sorted({gpu for points in newest.values() for _, gpu in points.values()})
    figure.suptitle(f"One request, dummy weights, {', '.join(machines)}")
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(harness.RESULTS / "serving.png", dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 32768, 65536, 130000])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    engines.add_arguments(parser, providers=["FLASH_ATTN", "reattention"])
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    if options.run:
        run(options)
    if options.plot:
        plot()


if __name__ == "__main__":
    main()
