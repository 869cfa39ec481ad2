"""vLLM engines as the benchmarks start them: what a provider is, and a process for each."""

import argparse
import fcntl
import json
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness
from vllm_reattention.config import SIZES, ReAttentionConfig

# FLASH_ATTN is vLLM's own with the model's RoPE as it is, run on past the trained window; yarn is
# the same with YaRN by the factor it takes; streaming is reattention that recalls nothing and has
# the more local tokens.
PROVIDERS = ("reattention", "FLASH_ATTN", "streaming", "yarn")
BLOCK_SIZE = 32
SETTINGS = (*SIZES, "scorer", "select_every", "memory")


class Provider(NamedTuple):
    """One way to serve a model, a folder, on up to `max_len` tokens."""

    name: str
    model: str
    max_len: int
    settings: dict[str, Any]  # of reattention

    def numbers(self) -> dict[str, Any]:
        """Reattention's settings, resolved; the providers that have none get none.

        In the place of `select_every` stand the layers that select, where they are named.
        """
        if self.name not in ("reattention", "streaming"):
            return {}
        config = ReAttentionConfig(**self.settings)
        trained = self.trained()
        layers = trained.num_hidden_layers
        scope = config.resolve(trained.max_position_embeddings, BLOCK_SIZE, layers)
        recall, local, decode = scope.recall_blocks, scope.local_blocks, scope.of(1).recall_blocks
        reading = scope.of(BLOCK_SIZE)
        read, read_local = reading.recall_blocks, reading.local_blocks
        if self.name == "streaming":
            local = read_local = recall + local
            recall = decode = read = 0
        blocks = scope.global_blocks, local, recall, decode, read, read_local, scope.exact_blocks
        sizes = (number * BLOCK_SIZE for number in blocks)
        selects = config.layers_per_selection(layers)
        if config.select_layers is not None:
            selects = " ".join(map(str, config.selecting_layers(layers)))
        return dict(zip(SETTINGS, (*sizes, config.scorer, selects, scope.memory), strict=True))

    def arguments(self) -> dict[str, Any]:
        """What it asks of vLLM."""
        chosen = {"model": self.model, "max_model_len": self.max_len}
        if numbers := self.numbers():
            if layers := self.settings.get("select_layers"):
                del numbers["select_every"]
                numbers["select_layers"] = layers
            ours = {"additional_config": {"reattention": numbers}}
            return chosen | ours | {"attention_backend": "reattention"}
        return chosen | {"attention_backend": "FLASH_ATTN", "hf_overrides": self._longer()}

    def _longer(self) -> dict[str, Any]:
        """Changes to the model's configuration that let it run past its trained window."""
        config = self.trained()
        window = config.max_position_embeddings
        factor = -(-self.max_len // window)
        if factor == 1:
            return {}
        longer = {"max_position_embeddings": factor * window}  # also the rows of its RoPE table
        if self.name == "yarn":
            longer["rope_parameters"] = {
                "rope_type": "yarn",
                "rope_theta": config.rope_parameters["rope_theta"],
                "factor": float(factor),
                "original_max_position_embeddings": window,
            }
        return longer

    def trained(self):
        """The model's own configuration."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(self.model)


def shared_lengths(name: str, lengths: list[int]) -> list[list[int]]:
    """Lengths that one engine of a provider can serve: a factor of YaRN fits one length."""
    return [[length] for length in lengths] if name == "yarn" else [lengths]


def label(row: dict) -> str:
    """What to call a row's provider in figures: with its scope, global + recalled + local.

    What is recalled in decode stands in brackets, if it is less; so does what is recalled and
    local while a prompt is read, behind the rest.
    """
    if not row["global_size"]:
        return row["provider"]
    recall, decode = (str(row[name]) for name in ("recall_size", "decode_recall_size"))
    recall += f" ({decode})" if decode != recall else ""
    at_end = f"{row['provider']} {row['global_size']}+{recall}+{row['local_size']}"
    reading = tuple(str(row[f"read_{name}"]) for name in ("recall_size", "local_size"))
    if reading == tuple(str(row[name]) for name in ("recall_size", "local_size")):
        return at_end
    return f"{at_end}, read by {'+'.join(reading)}"


def add_arguments(parser: argparse.ArgumentParser, providers: list[str]) -> None:
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=providers)
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="of reattention, as in --additional-config"
    )
    parser.add_argument("--chunk", type=int, default=8192, help="tokens in one scheduler step")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--gpu-memory-utilization", type=float, default=0.9)
    parser.add_argument(
        "--kv-cache-memory-bytes", type=int, help="not all that is left: engines can share a GPU"
    )
    parser.add_argument(
        "--budget", type=float, default=float("inf"), help="seconds after which nothing is started"
    )


def stamp(options: argparse.Namespace) -> dict[str, str]:
    """Of rows that engines with these options make."""
    return harness.stamp(options.tensor_parallel_size)


def named(provider: Provider, options: argparse.Namespace) -> str:
    """What to call it in rows: with the cache's dtype, where that is not the model's."""
    if options.kv_cache_dtype == "auto":
        return provider.name
    return f"{provider.name}/{options.kv_cache_dtype}"


def arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What the options ask of vLLM, whoever the provider is."""
    return {
        "max_num_batched_tokens": options.chunk,
        "enforce_eager": options.enforce_eager,
        "kv_cache_dtype": options.kv_cache_dtype,
        "tensor_parallel_size": options.tensor_parallel_size,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
    }


@contextmanager
def engine(**arguments) -> Iterator:
    """A vllm.LLM, gone afterwards with its process and its memory."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # to send memory() to the engine
    import vllm

    import vllm_reattention

    vllm_reattention.register()
    llm = vllm.LLM(**arguments)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()


@contextmanager
def alone() -> Iterator[None]:
    """While no other benchmark of this machine is timed: engines may start side by side."""
    with (Path(tempfile.gettempdir()) / "vllm-reattention-benchmark.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
        yield


def memory(worker) -> tuple[int, int]:
    """For llm.collective_rpc: bytes of the KV cache; the most allocated since the last call."""
    import torch

    caches = (cache.untyped_storage() for cache in worker.model_runner.kv_caches)
    cache = sum({storage.data_ptr(): storage.nbytes() for storage in caches}.values())
    if not torch.cuda.is_available():
        return cache, cache
    most = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return cache, most


def in_time(cases: Iterable, cost: Callable[[Any], float], deadline: float) -> Iterator:
    """The cases, until one that may not end in time by what the last one took."""
    seconds_per_cost = 0.0
    for case in cases:
        start = time.time()
        if start + seconds_per_cost * cost(case) > deadline:
            print(f"no time left for {case} and what follows it", flush=True)
            return
        yield case
        seconds_per_cost = (time.time() - start) / cost(case)


def apart(function: Callable, *arguments) -> Any:
    """What a call returns, made in a process of its own."""
    with _process() as process:
        return process.submit(function, *arguments).result()


def each_provider(function: Callable, options: argparse.Namespace, room: int, *arguments) -> None:
    """function(provider, lengths, *arguments) for every provider, in as few engines as can be.

    room  tokens that max_model_len has beyond the longest of the lengths
    """
    calls = []
    for name in options.provider:
        for lengths in shared_lengths(name, options.lengths):
            longest = max(lengths) + room
            provider = Provider(name, options.model, longest, options.settings)
            calls.append((provider, lengths, *arguments))
    each_apart(function, calls)


def each_apart(function: Callable, calls: list[tuple]) -> None:
    """Calls in a process each; one that fails does not keep the next from running."""
    failed = 0
    for call in calls:
        with _process() as process:
            if error := process.submit(function, *call).exception():
                traceback.print_exception(error)
                failed += 1
    if failed:
        raise SystemExit(f"{failed} of {len(calls)} engines failed")


def _process() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
