"""python -m vllm_reattention plan: the memory of a context length, with nothing started."""

import shlex
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import torch
import transformers

from csrc_triton.layout import Scope
from vllm_reattention import compat
from vllm_reattention.attention import scratch_per_tile, tiles_per_run
from vllm_reattention.config import ReAttentionConfig, described
from vllm_reattention.pages import bytes_per_token
from vllm_reattention.tiles import most_dense_keys, most_prefill_tiles

GIB = 2**30
CHUNK = 8192  # --max-num-batched-tokens of the command that is planned
MOST_REQUESTS = 1024  # --max-num-seqs of vLLM on large GPUs, unless told
RESERVE = 2 * GIB  # the model's own activations, CUDA graphs, communication: a guess
MOST_GPUS = 8


class Shape(NamedTuple):
    """A model as its configuration tells it."""

    architecture: str
    trained_window: int
    weight_bytes: int | None  # None: not known
    full_layers: int
    window_layers: int  # of sliding-window layers
    window: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype_size: int

    def splits_over(self, gpus: int) -> bool:
        """As vLLM splits heads: KV heads that do not divide must be copied evenly."""
        if gpus < 1 or self.num_heads % gpus:
            return False
        return not (self.num_kv_heads % gpus and gpus % self.num_kv_heads)


@dataclass(frozen=True)
class Plan:
    """Bytes are those of one GPU. Tensor parallelism splits heads and weights."""

    model: str
    shape: Shape
    scope: Scope
    max_model_len: int
    gpus: int
    fp8: bool
    gpu_bytes: int | None  # None: not known

    @property
    def kv_heads(self) -> int:
        return max(1, self.shape.num_kv_heads // self.gpus)

    @property
    def token_bytes(self) -> int:
        """Keys, values and summaries of a token, all layers that keep it."""
        return self._token_bytes(self.shape.full_layers)

    def _token_bytes(self, layers: int) -> int:
        size = 1 if self.fp8 else self.shape.dtype_size
        block = compat.BLOCK_SIZES[0]
        return layers * self.kv_heads * bytes_per_token(self.shape.head_size, size, block)

    @property
    def summary_bytes(self) -> int:
        """What of token_bytes is summaries."""
        size = 1 if self.fp8 else self.shape.dtype_size
        content = 2 * self.shape.head_size * size
        return self.token_bytes - self.shape.full_layers * self.kv_heads * content

    @property
    def request_bytes(self) -> int:
        """KV cache of one request of max_model_len tokens."""
        return self.fixed_bytes + self.max_model_len * self.token_bytes

    @property
    def fixed_bytes(self) -> int:
        """Of a request's sliding-window layers, which keep a window and a step's tokens."""
        kept = min(self.shape.window + CHUNK, self.max_model_len)
        return kept * self._token_bytes(self.shape.window_layers)

    @property
    def weight_bytes(self) -> int:
        return (self.shape.weight_bytes or 0) // self.gpus

    @property
    def scratch_bytes(self) -> int:
        """What the backend makes vLLM's profile run see: the most that a step's selection takes."""
        # all tiles of prompts may lie at ends, whose scope is the largest
        block, scope, shape = compat.BLOCK_SIZES[0], self.scope.of_tail, self.shape
        max_blocks = -(-self.max_model_len // block)
        heads = shape.num_heads // self.gpus
        # queries turned, and keys and values read, of prompts that FlashAttention gets
        keys = most_dense_keys(CHUNK, scope, block)
        turned = CHUNK * heads + 2 * keys * self.kv_heads
        turned *= shape.head_size * shape.dtype_size
        if max_blocks <= scope.dense_blocks:
            return turned
        most = 0
        prompts = most_prefill_tiles(CHUNK, MOST_REQUESTS, block)
        for num_tiles, max_length in (MOST_REQUESTS, 1), (prompts, block):
            size = heads, self.kv_heads, max_length, max_blocks, scope
            numbers, own = scratch_per_tile(*size), scope.of(max_length)
            at_once = min(num_tiles, tiles_per_run(numbers))
            # beside that: candidates and their scores, recalled blocks, denominators
            beside = self.kv_heads * (2 * own.candidate_blocks + own.recall_blocks)
            beside += 0 if max_length == 1 else heads * max_length
            memories = 1 if max_length == 1 else 3  # of tiles, and two at ends of prompts
            remembered = memories * num_tiles * max_blocks if scope.memory else 0
            most = max(most, 4 * (at_once * (numbers + beside) + remembered))
            if max_length > 1:
                numbers = scratch_per_tile(*size, is_tail=True)
                at_once = min(num_tiles, tiles_per_run(numbers))
                most = max(most, 4 * (at_once * numbers + remembered))
                most = max(most, 4 * (remembered + remembered // memories))  # kept with neighbours
        return max(most, turned)

    @property
    def room(self) -> int | None:
        """For the KV cache; None: not known."""
        if self.gpu_bytes is None or self.shape.weight_bytes is None:
            return None
        usable = int(self.gpu_bytes * compat.memory_share())
        return usable - self.weight_bytes - self.scratch_bytes - RESERVE

    @property
    def fits(self) -> bool | None:
        return None if self.room is None else self.request_bytes <= self.room

    @property
    def longest(self) -> int:
        """The longest request known to fit, in whole blocks; 0: none."""
        block = compat.BLOCK_SIZES[0]
        if not self.token_bytes:  # windows alone: all lengths take the same
            return 0
        tokens = max(0, (self.room or 0) - self.fixed_bytes) // self.token_bytes
        return tokens // block * block

    @property
    def command(self) -> str:
        words = ["vllm", "serve", self.model, "--attention-backend", "reattention"]
        words += ["--max-model-len", str(self.max_model_len)]
        words += ["--max-num-batched-tokens", str(CHUNK)]
        if self.gpus > 1:
            words += ["--tensor-parallel-size", str(self.gpus)]
        if self.fp8:
            words += ["--kv-cache-dtype", "fp8"]
        return shlex.join(words)

    def ways_out(self) -> list[str]:
        """What would fit instead: fewer tokens, fp8 keys, more GPUs."""
        found = []
        if self.longest:
            found.append(f"--max-model-len {self.longest}")
        for fp8 in (self.fp8, True):
            gpus = self.gpus
            while gpus <= MOST_GPUS and self.shape.splits_over(gpus):
                other = replace(self, gpus=gpus, fp8=fp8)
                if other.fits:
                    found.append(f"--gpus {gpus}" + (" --kv-cache-dtype fp8" if fp8 else ""))
                    break
                gpus *= 2
        return list(dict.fromkeys(found))


def make(
    model: str, max_model_len: int, gpus: int, kv_cache_dtype: str, gpu_bytes: int | None
) -> Plan:
    """Reads the model's configuration; weights only as sizes of files."""
    if max_model_len < 1:
        raise ValueError(f"--max-model-len must be a positive number, got {max_model_len}")
    if gpu_bytes is not None and gpu_bytes < 1:
        raise ValueError(f"--gpu-memory must be positive, got {gpu_bytes / GIB:g}")
    config = compat.model_config(model, max_model_len, kv_cache_dtype)
    if refusal := compat.model_refusal(config):
        raise ValueError(refusal)
    text, sizes = config.hf_text_config, config.model_arch_config
    kinds = getattr(text, "layer_types", None) or ["full_attention"]
    if kinds == ["full_attention"]:
        window = config.get_sliding_window()
        kinds = ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    shape = Shape(
        architecture=config.architecture,
        trained_window=compat.trained_window(config),
        weight_bytes=weight_bytes(config),
        full_layers=kinds.count("full_attention"),
        window_layers=kinds.count("sliding_attention"),
        window=config.get_sliding_window() or 0,
        num_heads=sizes.total_num_attention_heads,
        num_kv_heads=sizes.total_num_kv_heads,
        head_size=config.get_head_size(),
        dtype_size=config.dtype.itemsize,
    )
    if not shape.splits_over(gpus):
        raise ValueError(
            f"--gpus must divide the {shape.num_heads} query heads, and divide the "
            f"{shape.num_kv_heads} KV heads or be a multiple of them, got {gpus}"
        )
    num_layers = shape.full_layers + shape.window_layers
    scope = ReAttentionConfig().resolve(shape.trained_window, compat.BLOCK_SIZES[0], num_layers)
    fp8 = kv_cache_dtype.startswith("fp8")
    return Plan(model, shape, scope, max_model_len, gpus, fp8, gpu_bytes)


def gpu_memory() -> int | None:
    """Bytes of this machine's first GPU."""
    if not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(0).total_memory


def weight_bytes(config) -> int | None:
    """Of the files in the model's folder or in the cache of downloads; else by the configuration.

    None if that does not tell, as of a quantised model that is not here.
    """
    folder = Path(config.model)
    if not folder.is_dir():
        with suppress(OSError):
            folder = Path(huggingface_hub.snapshot_download(config.model, local_files_only=True))
    for ending in ("safetensors", "bin", "pt"):
        if size := sum(file.stat().st_size for file in folder.glob(f"*.{ending}")):
            return size
    if config.quantization:
        return None
    with torch.device("meta"), suppress(ValueError):  # transformers does not know every model
        model = transformers.AutoModelForCausalLM.from_config(config.hf_text_config)
        return sum(weight.numel() for weight in model.parameters()) * config.dtype.itemsize
    return None


def report(plan: Plan) -> str:
    shape, scope, block = plan.shape, plan.scope, compat.BLOCK_SIZES[0]
    each = "on each GPU, " if plan.gpus > 1 else ""
    lines = [
        f"{plan.model}: {shape.architecture}, trained on {shape.trained_window:,} tokens",
        f"layers    {shape.full_layers} with full attention"
        + (f", {shape.window_layers} with windows of {shape.window}" if shape.window_layers else "")
        + f"; {shape.num_kv_heads} KV heads of size {shape.head_size}",
        f"scope     {described(scope, block)}",
        f"dense     full attention for prompts up to {scope.exact_blocks * block:,} tokens "
        "(dense_limit)",
        f"KV cache  {each}{plan.token_bytes / 1024:.1f} KiB per token, "
        f"of which {plan.summary_bytes / 1024:.1f} are summaries",
        f"request   {each}{_gib(plan.request_bytes)} for {plan.max_model_len:,} tokens",
        f"scratch   {each}{_gib(plan.scratch_bytes)}, reserved in vLLM's profile run",
    ]
    if shape.weight_bytes is None:
        lines.append("weights   unknown until they are downloaded")
    else:
        lines.append(f"weights   {each}{_gib(plan.weight_bytes)}")
    if plan.room is None or plan.gpu_bytes is None:
        lines.append("room      unknown: pass --gpu-memory GiB")
    else:
        lines.append(
            f"room      {each}{_gib(plan.room)} for the KV cache: vLLM uses "
            f"{compat.memory_share():.0%} of {_gib(plan.gpu_bytes)}, of which {_gib(RESERVE)} are "
            "reserved for activations and CUDA graphs"
        )
        if plan.fits:
            lines.append(
                f"fits      {plan.room / plan.request_bytes:.1f} such requests at the same time"
            )
        else:
            ways = "; or ".join(plan.ways_out()) or f"nothing does, with up to {MOST_GPUS} GPUs"
            lines.append(f"DOES NOT FIT; what fits: {ways}")
    if plan.fits is not False:  # no command that would fail
        lines += ["", plan.command]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
