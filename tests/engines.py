"""vLLM engines in a process of their own: pytest's has Triton's interpreter switched on."""

import contextlib
import gc
import io
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple
from unittest import mock

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # errors arrive as they were raised
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
DEFAULTS = dict(
    skip_tokenizer_init=True,
    dtype="float32",
    enforce_eager=True,
    max_num_seqs=4,
    max_num_batched_tokens=64,
    enable_prefix_caching=False,
    attention_backend="reattention",
    max_model_len=2048,
    seed=0,
)


def workers(**environment: str) -> ProcessPoolExecutor:
    """A process; what it has in its environment beside ENVIRONMENT, or instead."""
    spawn, chosen = multiprocessing.get_context("spawn"), ENVIRONMENT | environment
    return ProcessPoolExecutor(1, mp_context=spawn, initializer=_prepare, initargs=(chosen,))


def _prepare(environment: dict[str, str]) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.update(environment)


def flash_attention(*_):
    """A stand-in for the GPU's, so that the path of dense prompts runs here too."""
    import torch

    def attend(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal,
        window_size, softcap, s_aux, out,
    ):  # fmt: skip
        assert causal and softcap == 0 and s_aux is None
        assert window_size[1] == min(window_size[0], 0)
        assert max_seqlen_q == int(cu_seqlens_q.diff().max())
        assert max_seqlen_k >= int(cu_seqlens_k.diff().max())
        queries, keys = (zip(x.tolist(), x[1:].tolist()) for x in (cu_seqlens_q, cu_seqlens_k))  # noqa: B905
        for (start, end), (first, last) in zip(queries, keys, strict=True):
            query = q[start:end].transpose(0, 1)
            key, value = (x[first:last].transpose(0, 1) for x in (k, v))
            lengths = end - start, last - first
            own = lengths[1] - lengths[0]
            seen = torch.ones(lengths, dtype=torch.bool, device=q.device).tril(own)
            if window_size[0] >= 0:
                seen = seen.triu(own - window_size[0])
            out[start:end] = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, seen, scale=softmax_scale, enable_gqa=True
            ).transpose(0, 1)

    return attend


def generate_with_flash_attention(*args, **options):
    """And whether it was called with whole prompts, with parts of some, or with both."""
    from vllm_reattention import compat

    calls = []

    def counted(*about):
        attend = flash_attention(*about)

        def attend_and_count(cu_seqlens_q, cu_seqlens_k, **rest):
            calls.append(cu_seqlens_q is cu_seqlens_k)
            attend(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, **rest)

        return attend_and_count

    real, compat.flash_attention = compat.flash_attention, counted
    try:
        return generate(*args, **options), set(calls)
    finally:
        compat.flash_attention = real


def generate(
    model: Path, batches: list[list[list[int]]], max_tokens: int = 16, **options
) -> tuple[list[list[list[int]]], list[tuple[int, int]]]:
    """Greedy tokens of one engine for batches of prompts, one after the other.

    And per batch how many query tokens selected what they attend to, and how many did not.
    """
    from vllm import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    llm = LLM(model=str(model), **(DEFAULTS | options))
    tokens, counts = [], []
    for prompts in batches:
        done = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        tokens.append([list(request.outputs[0].token_ids) for request in done])
        counts.append(llm.collective_rpc(_rows)[0])
    del llm
    gc.collect()
    return tokens, counts


def losses(model: Path, texts: list[list[int]], scored: int) -> list[list[float]]:
    """Of the texts' last tokens, in each phase."""
    from vllm import LLM

    from benchmarks import loss

    forced = {"logits_processors": ["benchmarks.forced:Forced"]}
    llm = LLM(model=str(model), **(DEFAULTS | forced))
    found = [loss.losses(llm, phase, texts, scored) for phase in loss.PHASES]
    del llm
    gc.collect()
    return found


class Ask(NamedTuple):
    """A request: tokens, or text where there is a tokenizer; and how to go on."""

    prompt: list[int] | str
    max_tokens: int = 16
    temperature: float = 0.0
    seed: int | None = None
    n: int = 1
    prompt_logprobs: bool = False
    regex: str | None = None
    adapter: Path | None = None  # LoRA


class Answer(NamedTuple):
    tokens: list[list[int]]  # of each of n
    text: str  # of the first
    prompt_logprobs: list[float]


def answers(
    model: Path, batches: list[list[Ask]], **options
) -> tuple[list[list[Answer]], dict[str, list[float]]]:
    """Of one engine, and its counters: each as a list, of every worker where they count apart."""
    from vllm import LLM

    llm = LLM(model=str(model), disable_log_stats=False, **(DEFAULTS | options))
    found, counters = _counted(llm, batches)
    del llm
    gc.collect()
    return found, counters


def _counted(llm, batches: list[list[Ask]]) -> tuple[list[list[Answer]], dict[str, list[float]]]:
    before = _counters(llm)  # ours are those of all this process's engines
    found = [_ask(llm, batch) for batch in batches]
    after = _counters(llm)
    counters = {
        name: [now - then for now, then in zip(values, before[name], strict=True)]
        for name, values in after.items()
        if name in before
    }
    return found, counters


@contextlib.contextmanager
def tails() -> Iterator[set[tuple[int, int]]]:
    """Positions and lengths of tiles that every layer of this process's engines selected for."""
    from vllm_reattention import metadata

    found, split_tail = set(), metadata.split_tail

    def noted(*args):
        tiles, tail = split_tail(*args)
        _, _, lengths, positions = (column.tolist() for column in tail.tiles[:4])
        found.update((p, n) for p, n in zip(positions, lengths, strict=True) if n)
        return tiles, tail

    with mock.patch.object(metadata, "split_tail", noted):
        yield found


def untold(*args, **options) -> tuple[set[tuple[int, int]], list[str]]:
    """Tails and warnings of an engine that does not tell how long its prompts are."""
    from vllm_reattention import compat, metadata

    with (
        tails() as found,
        mock.patch.object(compat, "tell_prompt_lengths", lambda: None),
        mock.patch.object(metadata.logger, "warning_once") as warned,
    ):
        generate(*args, **options)
    return found, [call.args[0] for call in warned.call_args_list]


def prompt_lengths_told() -> tuple[list, list, None]:
    """To builders that either model runner calls, and after that."""
    from types import SimpleNamespace

    import numpy as np
    import torch
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from vllm_reattention import compat

    def build(*args, **kwargs):
        return compat.prompt_lengths().tolist()

    lengths = [[5, 7], [9, 4]]
    runner = SimpleNamespace(
        input_batch=SimpleNamespace(num_tokens_no_spec_cpu_tensor=torch.tensor(lengths[0]))
    )
    batch = SimpleNamespace(prefill_len_np=np.array(lengths[1]))
    with (
        mock.patch.object(GPUModelRunner, "_build_attention_metadata", build),
        mock.patch.object(DefaultModelState, "prepare_attn", build),
    ):
        compat.tell_prompt_lengths.__wrapped__()
        first = GPUModelRunner._build_attention_metadata(runner, 12, num_reqs=2)
        second = DefaultModelState.prepare_attn(None, batch, None, for_capture=False)
    return first, second, compat.prompt_lengths()


def generate_and_tails(*args, **options) -> tuple[list[list[list[int]]], set[tuple[int, int]]]:
    with tails() as found:
        return generate(*args, **options)[0], found


def left_by_ends(*args, **options) -> dict[int, tuple[list[float], list[float]]]:
    """By the position behind a prompt's end: what its layers found, by block, and what the first
    token that the model wrote knew."""
    from vllm_reattention.memory import Memories

    found, known = {}, {}
    keep_tail, recollect = Memories.keep_tail, Memories.recollect

    def kept(self, tail, block_table):
        for row, length, position in zip(tail.memory.most, *tail.tiles[2:4], strict=True):
            if length:
                found[int(position + length)] = row.tolist()
        return keep_tail(self, tail, block_table)

    def told(self, tiles, block_table, is_generated):
        memory = recollect(self, tiles, block_table, is_generated)
        if is_generated is not None:
            for row, position in zip(memory.found, tiles.position.tolist(), strict=True):
                known.setdefault(position, row.tolist())
        return memory

    with (
        mock.patch.object(Memories, "keep_tail", kept),
        mock.patch.object(Memories, "recollect", told),
    ):
        generate(*args, **options)
    return {at: (found[at], known[at]) for at in found if at in known}


class Report(NamedTuple):
    """What an engine said, and how it came to say it."""

    answers: list[list[Answer]]
    counters: dict[str, list[float]]
    runner: str  # module of the model runner
    graphs: str  # the mode in which CUDA graphs are used, as resolved for our backend
    steps: Counter[tuple[str, int, int]]  # by mode, tokens, tokens with padding
    num_blocks: int  # of the KV cache
    tails: set[tuple[int, int]]


def report(model: Path, batches: list[list[Ask]], **options) -> Report:
    """Of one engine; its steps are known where CUDA graphs may be, on a GPU."""
    from vllm import LLM
    from vllm.compilation.cuda_graph import CUDAGraphLogging

    steps: Counter[tuple[str, int, int]] = Counter()

    def observe(_, step):
        steps[step.runtime_mode, step.num_unpadded_tokens, step.num_padded_tokens] += 1

    chosen = DEFAULTS | dict(disable_log_stats=False, cudagraph_metrics=True) | options
    with mock.patch.object(CUDAGraphLogging, "observe", observe), tails() as ends:
        llm = LLM(model=str(model), **chosen)
        steps.clear()
        said = _counted(llm, batches)
    runner, graphs = llm.collective_rpc(_runner)[0]
    num_blocks = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    del llm
    gc.collect()
    return Report(*said, runner, graphs, steps, num_blocks, ends)


def _runner(worker) -> tuple[str, str]:
    runner = worker.model_runner
    graphs = runner.vllm_config.compilation_config.cudagraph_mode
    return type(runner).__module__, str(graphs)


def answers_after_sleep(
    model: Path, batch: list[Ask], **options
) -> tuple[list[list[Answer]], list[int]]:
    """Before sleep, after level 1, after level 2; and the bytes that each level has freed.

    What level 2 does not keep is made sure to be lost: weights are spoilt before they are loaded
    again, and so is GPU memory that is free while the engine sleeps.
    """
    from vllm import LLM

    llm = LLM(model=str(model), enable_sleep_mode=True, **(DEFAULTS | options))
    found, freed = [_ask(llm, batch)], []
    for level in (1, 2):
        (before,) = llm.collective_rpc(_free_bytes)
        llm.sleep(level)
        (after,) = llm.collective_rpc(_free_bytes)
        freed.append(after - before)
        llm.collective_rpc(_spoil_free_memory)
        llm.wake_up(["weights"])
        if level == 2:
            llm.collective_rpc(_spoil_weights)
            llm.collective_rpc("reload_weights")
        llm.wake_up(["kv_cache"])
        found.append(_ask(llm, batch))
    del llm
    gc.collect()
    return found, freed


def _free_bytes(worker) -> int:
    import torch

    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def _spoil_free_memory(worker) -> None:
    import torch

    spoilt = [torch.full((1 << 28,), torch.nan, device="cuda") for _ in range(4)]  # of 1 GiB
    torch.cuda.synchronize()
    del spoilt
    torch.cuda.empty_cache()


def _spoil_weights(worker) -> None:
    import torch

    for parameter in worker.model_runner.model.parameters():
        parameter.data.fill_(torch.nan)


def answers_scheduled_ahead(*args, **options) -> tuple[list[list[Answer]], int]:
    """By asynchronous scheduling, which vLLM switches off on a CPU; and the steps of its scheduler.

    The second step is scheduled before it is known what the first one has said.
    """
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    stock, schedule, steps = CpuPlatform.check_and_update_config, AsyncScheduler.schedule, []

    def check_and_update_config(cls, config):
        stock(config)
        config.scheduler_config.async_scheduling = True

    def counted(self, *given, **named):
        steps.append(1)
        return schedule(self, *given, **named)

    with (
        mock.patch.object(
            CpuPlatform, "check_and_update_config", classmethod(check_and_update_config)
        ),
        mock.patch.object(AsyncScheduler, "schedule", counted),
    ):
        found, _ = answers(*args, **options)
    return found, len(steps)


def answers_with_host_memory(*args, **options):
    """With vLLM's OffloadingConnector, whose last step, the copying, it has for GPUs alone."""
    from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
    from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

    class Copies(OffloadingWorker):
        def __init__(self, spec, caches):
            self.pages = [cache.tensor for cache in caches.tensors]
            self.host = [page.new_zeros(spec.num_chunks, page.shape[1]) for page in self.pages]
            self.done = []

        def _copy(self, job_id, sources, source, targets, target) -> bool:
            for some, others in zip(sources, targets, strict=True):
                others[target.block_ids] = some[source.block_ids]
            self.done.append(TransferResult(job_id, True))
            return True

        def submit_store(self, job_id, source, target):
            return self._copy(job_id, self.pages, source, self.host, target)

        def submit_load(self, job_id, source, target):
            return self._copy(job_id, self.host, source, self.pages, target)

        def get_finished(self):
            done, self.done = self.done, []
            return done

        def wait(self, job_ids):
            """All is done already."""

    with mock.patch.object(CPUOffloadingSpec, "get_worker", lambda *given: Copies(*given)):
        return answers(*args, **options)


def answers_around_sleep(
    model: Path, batch: list[Ask], **options
) -> tuple[list[Answer], list[str], list[Answer]]:
    """Before and after a sleep of level 2; and what of ours that would lose on a GPU."""
    from vllm import LLM

    llm = LLM(model=str(model), **(DEFAULTS | options))
    before = _ask(llm, batch)
    (lost,) = llm.collective_rpc(_sleep_and_wake)
    found = before, lost, _ask(llm, batch)
    del llm
    gc.collect()
    return found


def _sleep_and_wake(worker) -> list[str]:
    """What vLLM's worker on a GPU does: it keeps buffers, puts them back, loads weights again."""
    import torch

    runner = worker.model_runner
    registered = [*runner.model.parameters(), *runner.model.buffers()]
    kept = {tensor.untyped_storage().data_ptr() for tensor in registered}
    lost = [
        f"{layer.layer_name}.{name}"
        for layer in runner.vllm_config.compilation_config.static_forward_context.values()
        for name, value in vars(layer.impl).items()
        if name != "rope"  # that is on the host
        for tensor in (value if isinstance(value, tuple) else (value,))
        if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in kept
    ]
    saved = {name: buffer.clone() for name, buffer in runner.model.named_buffers()}
    for tensor in (*registered, *runner.kv_caches):
        tensor.data.fill_(255 if tensor.dtype == torch.uint8 else torch.nan)  # nan in fp8, too
    for name, buffer in runner.model.named_buffers():
        buffer.data.copy_(saved[name])
    runner.reload_weights()
    return lost


def _counters(llm) -> dict[str, list[float]]:
    name = llm.llm_engine.model_config.served_model_name
    counters: dict[str, list[float]] = {}
    for metric in llm.get_metrics():
        if hasattr(metric, "value") and metric.labels.get("model_name") == name:
            counters.setdefault(metric.name.removeprefix("vllm:"), []).append(metric.value)
    return counters


def _ask(llm, batch: list[Ask]) -> list[Answer]:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.sampling_params import StructuredOutputsParams

    params = [
        SamplingParams(
            n=ask.n,
            temperature=ask.temperature,
            seed=ask.seed,
            max_tokens=ask.max_tokens,
            ignore_eos=ask.regex is None,
            detokenize=isinstance(ask.prompt, str),
            prompt_logprobs=0 if ask.prompt_logprobs else None,
            structured_outputs=StructuredOutputsParams(regex=ask.regex) if ask.regex else None,
        )
        for ask in batch
    ]
    adapters = [ask.adapter and LoRARequest("adapter", 1, str(ask.adapter)) for ask in batch]
    prompts = [
        ask.prompt if isinstance(ask.prompt, str) else {"prompt_token_ids": ask.prompt}
        for ask in batch
    ]
    adapters = adapters if any(adapters) else None
    done = llm.generate(prompts, params, use_tqdm=False, lora_request=adapters)
    return [
        Answer(
            [list(sample.token_ids) for sample in request.outputs],
            request.outputs[0].text,
            [
                found[token].logprob
                for token, found in zip(
                    request.prompt_token_ids[1:], (request.prompt_logprobs or [])[1:], strict=False
                )
            ],
        )
        for request in done
    ]


def beams(model: Path, prompt: str, widths: list[int], **options) -> list[tuple[str, float]]:
    """The best answer of each width, and the log probability of its tokens."""
    from vllm import LLM
    from vllm.sampling_params import BeamSearchParams

    llm = LLM(model=str(model), **(DEFAULTS | options))
    best = []
    for width in widths:
        params = BeamSearchParams(beam_width=width, max_tokens=8)
        (found,) = llm.beam_search([{"prompt": prompt}], params)
        best.append((found.sequences[0].text, found.sequences[0].cum_logprob))
    del llm
    gc.collect()
    return best


def _rows(worker) -> tuple[int, int] | None:
    groups = [group for groups in worker.model_runner.attn_groups for group in groups]
    counts = [
        (builder.counts["rows_selected"], builder.counts["rows_dense"])
        for group in groups
        for builder in group.metadata_builders
        if group.backend.get_name() == "REATTENTION" and builder.counts is not None
    ]
    return max(counts, default=None)


def as_drafts(model: Path, **options) -> tuple[list[list[bool]], list[tuple], list[str]]:
    """Which layers select, told to the builder in their order and against it; whether prompts go to
    FlashAttention, and if the scope is that of a prompt's end, for a target and for a draft; and
    why a builder is refused if these are a draft's, beyond the window, and within it with a scope
    of their own."""
    from vllm import LLM

    llm = LLM(model=str(model), **(DEFAULTS | options))
    (found,) = llm.collective_rpc(_as_drafts)
    del llm
    gc.collect()
    return found


def _as_drafts(worker) -> tuple[list[list[bool]], list[tuple], list[str]]:
    import torch

    runner = worker.model_runner
    (group,) = (group for groups in runner.attn_groups for group in groups)
    build, (builder, *_) = group.backend.get_builder_cls(), group.metadata_builders
    config = runner.vllm_config
    layers = config.compilation_config.static_forward_context

    def selecting(names: list[str]) -> list[bool]:
        build(builder.kv_cache_spec, names, config, runner.device)
        return [layer.impl.selects for layer in layers.values()]

    orders = [selecting(names) for names in (list(layers), list(layers)[::-1])]
    builder.has_flash_attention = True
    prompt_lens = torch.tensor([100, 50], dtype=torch.int32)
    with told_prompt_lengths(prompt_lens):
        of_target = _built(builder, prompt_lens, prompt_lens)
    # a draft's first pass has a token more than the host is told
    kinds = [of_target, _built(builder, prompt_lens + 1, prompt_lens)]
    errors = []
    for length in (config.model_config.max_model_len, 512):
        config.model_config.max_model_len = length
        for layer in layers.values():
            layer.is_draft_layer = True
            layer.impl.scope_of = lambda _: builder.scope._replace(exact_blocks=99)
        try:
            selecting(list(layers))
        except ValueError as error:
            errors.append(str(error))
    return orders, kinds, errors


@contextlib.contextmanager
def told_prompt_lengths(lengths) -> Iterator[None]:
    """As while a runner builds the metadata of a step."""
    from vllm_reattention import compat

    token = compat._prompt_lengths.set(lengths)
    try:
        yield
    finally:
        compat._prompt_lengths.reset(token)


def _built(builder, lengths, known) -> tuple[bool, bool]:
    """For a step of whole prompts, of which the host knows these lengths."""
    import torch
    from vllm.v1.attention.backend import CommonAttentionMetadata

    starts = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    tokens, most = int(lengths.sum()), int(lengths.max())
    table = torch.zeros((2, 8), dtype=torch.int32)
    step = CommonAttentionMetadata(
        starts, starts, lengths, 2, tokens, most, most, table, torch.zeros(tokens),
        seq_lens_cpu_upper_bound=known,
    )  # fmt: skip
    built = builder._build(step, builder._limits(step))
    return built.dense is not None, built.scope == builder.scope.of_tail


def _wrapped(rotary):
    """What another plugin might put around a rotary embedding, as to count its calls."""
    import torch

    wrapper = torch.nn.Module()
    wrapper.forward = rotary.forward
    return wrapper


def wrap_stock_rotary(parent, _, child):
    """Before ours has taken its place: a module that we cannot know, and that rotates."""
    from vllm_reattention import compat

    return _wrapped(child) if compat.is_rotary(child) else None


def wrap_our_rotary(parent, _, child):
    """Afterwards: one that does not, as in a layer without rotation."""
    from vllm_reattention import compat

    if compat.is_ours(child):
        for name, module in parent._modules.items():
            if hasattr(module, "stock"):
                parent._modules[name] = _wrapped(module)


def refusal(
    model: Path,
    pretend_range: str | None = None,
    pretend_gpu: bool = False,
    batch_invariant: bool = False,
    meddler: Callable | None = None,
    **options,
) -> str:
    """Why an engine does not start."""
    from torch.nn.modules.module import register_module_module_registration_hook
    from vllm import LLM
    from vllm.v1.attention import selector

    from vllm_reattention import compat, register

    register()  # before any meddler
    selector._cached_get_attn_backend.cache_clear()  # what it found fit for an earlier engine
    supported, on_cpu = compat.VLLM_RANGE, compat.on_cpu
    compat.VLLM_RANGE = pretend_range or supported
    compat.on_cpu = lambda: on_cpu() and not pretend_gpu
    os.environ["VLLM_BATCH_INVARIANT"] = str(int(batch_invariant))
    other = register_module_module_registration_hook(meddler) if meddler else None
    try:
        LLM(model=str(model), **(DEFAULTS | options))
    except (ValueError, NotImplementedError, RuntimeError) as error:
        return str(error)
    finally:
        compat.VLLM_RANGE, compat.on_cpu = supported, on_cpu
        os.environ["VLLM_BATCH_INVARIANT"] = "0"
        if other is not None:
            other.remove()
        gc.collect()
    return ""


def command(*words: str) -> tuple[int, str]:
    """What `python -m vllm_reattention` does: exit status and what it prints."""
    from vllm_reattention.__main__ import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        status = main([str(word) for word in words])
    return status, said.getvalue()


def cache_and_plan(model: Path, **options) -> tuple[float, int]:
    """Bytes of KV cache a token: what an engine takes, and what is planned for it."""
    from vllm import LLM

    from vllm_reattention import plan

    llm = LLM(model=str(model), **(DEFAULTS | options))
    taken = llm.collective_rpc(_cache_bytes)[0]
    planned = plan.make(str(model), 2048, 1, options.get("kv_cache_dtype", "auto"), None)
    del llm
    gc.collect()
    return taken, planned.token_bytes


def _cache_bytes(worker) -> float:
    caches = worker.model_runner.kv_caches
    block_size = worker.model_runner.vllm_config.cache_config.block_size
    return sum(cache[0].numel() * cache.itemsize for cache in caches) / block_size


def ailing(environment: dict[str, str] | None = None, **names: object) -> tuple[int, str]:
    """What the doctor says where names of our package, with __ for dots, are something else."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, environment or {}))
        for name, value in names.items():
            target = "vllm_reattention." + name.replace("__", ".")
            stack.enter_context(mock.patch(target, value))
        return command("doctor")
