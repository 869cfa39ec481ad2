"""vLLM's features on a GPU, as they are served there: bfloat16, CUDA graphs, both model runners.

A trained model is asked for facts in prompts of up to sixteen times its window. What it should
answer is known, and bfloat16 does not change it; with dense attention it finds none beyond its
window, so a right answer also tells that something was recalled. Each engine has its own process.
"""

import concurrent.futures
import multiprocessing
import re
from pathlib import Path

import pytest
import tokenizers
import torch

pytest.importorskip("vllm")

from benchmarks import needle_text
from benchmarks.demo import ANSWER_LEN, Task, count, trained_window
from tests import engines
from tests.engines import Ask

ON_GPU = torch.cuda.is_available()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(not ON_GPU, reason="needs a GPU"),
]
TINY = Path(__file__).parent / "tiny-needle"
WINDOW = trained_window(TINY)
PLACES = [(504, 0.5), (1500, 0.1), (2700, 0.3), (4200, 0.5), (6100, 0.7), (8000, 0.9)]
SEED = 6  # of prompts whose answers are found with fp8 weights, too
TOKENS = ANSWER_LEN - 1  # a space, five digits, the end


def tasks() -> list[Task]:
    counted = count(tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json")))
    return [
        Task(length, depth, *needle_text.make_prompt(counted, length, depth, seed))
        for seed, (length, depth) in enumerate(PLACES, SEED)
    ]


TASKS = tasks()
ASKS = [Ask(task.prompt, TOKENS) for task in TASKS]
ANSWERS = [f" {task.code}" for task in TASKS]
SELECTED = sum(length - WINDOW for length, _ in PLACES[1:])  # rows of the prompts
DECODED = (TOKENS - 1) * len(PLACES[1:])  # of what is said after those
CACHE = 1 << 30  # bytes
SECONDS = 300  # no engine takes longer
OPTIONS = dict(
    skip_tokenizer_init=False,
    dtype="bfloat16",
    enforce_eager=False,
    compilation_config=dict(cudagraph_capture_sizes=[1, 2, 4, 8]),
    gpu_memory_utilization=0.05,
    kv_cache_memory_bytes=CACHE,
    max_model_len=8192,
    max_num_seqs=8,
    # All prompts in one step, so that they then decode together
    max_num_batched_tokens=24576,
)


def start(function, *args, environment: dict[str, str] | None = None, **options):
    """What a function of tests.engines returns, called in a process of its own."""
    told = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "VLLM_LOGGING_LEVEL": "INFO"}
    with engines.workers(**told | (environment or {})) as pool:
        job = pool.submit(function, TINY, *args, **OPTIONS | options)
        try:
            return job.result(SECONDS)
        except concurrent.futures.TimeoutError:
            for process in multiprocessing.active_children():
                process.kill()  # or the pool would wait for it
            raise


def said(answers: list[engines.Answer]) -> list[str]:
    return [answer.text for answer in answers]


def last_blocks(length: int) -> range:
    last = (length - 1) // 32
    return range((last - 3) * 32, length, 32)


def assert_selected(counters: dict[str, list[float]], times: int = 1) -> None:
    """Every worker has counted what was asked so many times."""
    selected = counters["reattention_rows_selected"]
    assert selected and min(selected) >= times * SELECTED, counters
    assert max(selected) <= times * (SELECTED + DECODED), counters
    assert min(counters["reattention_blocks_recalled"]) > 0, counters


@pytest.mark.parametrize(
    "version, module",
    [("0", "vllm.v1.worker.gpu_model_runner"), ("1", "vllm.v1.worker.gpu.model_runner")],
    ids=["V1", "V2"],
)
def test_graphs_of_either_model_runner_decode(version, module):
    """Six requests of unlike length decode in a full graph captured for eight; one in that for one.

    Their answers are those of the eager engine below, as both must be the same right ones.
    """
    told = start(
        engines.report, [ASKS, ASKS[-1:]], environment={"VLLM_USE_V2_MODEL_RUNNER": version}
    )
    assert told.runner == module
    assert told.graphs == "FULL_AND_PIECEWISE"
    ends = {(start, min(32, n - start)) for n, _ in PLACES for start in last_blocks(n)}
    assert told.tails == ends
    assert said(told.answers[0]) == ANSWERS and said(told.answers[1]) == ANSWERS[-1:]
    together, single = (told.steps["FULL", tokens, size] for tokens, size in ((6, 8), (1, 1)))
    assert (together, single) == (TOKENS - 1, TOKENS - 1), told.steps
    last = PLACES[-1][0] - WINDOW
    (selected,) = told.counters["reattention_rows_selected"]
    assert selected == SELECTED + DECODED + last + TOKENS - 1, told.counters


def test_prompts_up_to_the_dense_limit_are_attended_to_in_full():
    """Beside longer ones, in the same steps and graphs: these select from half the window on."""
    sizes = dict(global_size=32, recall_size=160, local_size=64, dense_limit=WINDOW)
    told = start(engines.report, [ASKS], additional_config={"reattention": sizes})
    assert said(told.answers[0])[0] == ANSWERS[0]
    (selected,) = told.counters["reattention_rows_selected"]
    assert selected == sum(length - 256 for length, _ in PLACES[1:]) + DECODED, told.counters


def test_chunks_and_prefixes_without_graphs():
    """Prompts in chunks beside others that decode; and again, from what is in the cache."""
    told = start(
        engines.report,
        [ASKS, ASKS],
        enforce_eager=True,
        compilation_config={},
        max_num_batched_tokens=512,
        enable_prefix_caching=True,
    )
    assert told.graphs == "NONE"
    assert [said(answers) for answers in told.answers] == [ANSWERS, ANSWERS]
    (hits,) = told.counters["prefix_cache_hits"]
    whole_blocks = sum((length - 1) // 32 * 32 for length, _ in PLACES)
    assert hits == whole_blocks, told.counters
    (selected,) = told.counters["reattention_rows_selected"]
    left = sum(length - (length - 1) // 32 * 32 for length, _ in PLACES[1:])
    assert selected == SELECTED + left + 2 * DECODED, told.counters


def test_keys_may_be_kept_in_fp8():
    told = start(engines.report, [ASKS], kv_cache_dtype="fp8")
    assert said(told.answers[0]) == ANSWERS
    assert_selected(told.counters)
    in_bfloat16 = told.num_blocks * 32 * 4 * 2 * 2 * 64 * 2  # of four layers with two KV heads
    assert in_bfloat16 > 1.5 * CACHE


def test_weights_may_be_quantised_to_fp8():
    """While they are loaded. That layers rotate last is proven with such weights, too.

    One answer may be wrong: this changes the model itself, and a little differently on each kind of
    GPU.
    """
    told = start(engines.report, [ASKS], quantization="fp8")
    found = [a == b for a, b in zip(said(told.answers[0]), ANSWERS, strict=True)]
    assert sum(found) >= len(ANSWERS) - 1, said(told.answers[0])
    assert_selected(told.counters)


def test_sleep_loses_nothing():
    """Level 1 keeps weights in host memory; level 2 keeps none, and they are loaded again."""
    cache = 8 << 30  # tests beside this one do not free or take as much at once
    found, freed = start(engines.answers_after_sleep, ASKS, kv_cache_memory_bytes=cache)
    assert [said(answers) for answers in found] == 3 * [ANSWERS]
    assert min(freed) > cache / 2, freed


def test_pages_come_back_from_host_memory():
    """The cache holds one long request, so each overwrites the one before it."""
    transfer = dict(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config=dict(cpu_bytes_to_use=CACHE),
    )
    order = [-1, -2, -3, -1]
    told = start(
        engines.report,
        [[ASKS[index]] for index in order],
        kv_transfer_config=transfer,
        enable_prefix_caching=True,
        num_gpu_blocks_override=8192 // 32 + 1,
    )
    assert [answer.text for (answer,) in told.answers] == [ANSWERS[index] for index in order]
    length, _ = PLACES[-1]
    (hits,) = told.counters["external_prefix_cache_hits"]
    assert hits > 0.9 * length, told.counters
    (selected,) = told.counters["reattention_rows_selected"]
    once = sum(PLACES[index][0] - WINDOW for index in order[:3])
    assert once <= selected < once + 0.2 * length, told.counters


def test_guesses_by_ngrams_change_nothing():
    """Some are right: the answer stands in the prompt."""
    ngram = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_min=1, prompt_lookup_max=3)
    sizes = dict(cudagraph_capture_sizes=[4, 8, 16, 32])  # of four tokens for each request
    told = start(engines.report, [ASKS], speculative_config=ngram, compilation_config=sizes)
    assert said(told.answers[0]) == ANSWERS
    (accepted,) = told.counters["spec_decode_num_accepted_tokens"]
    (selected,) = told.counters["reattention_rows_selected"]
    assert accepted > 0 and selected >= SELECTED, told.counters


@pytest.mark.skipif(ON_GPU and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_share_the_heads():
    """Each has one of the two KV heads, and both recall the same blocks."""
    told = start(engines.report, [ASKS], tensor_parallel_size=2, distributed_executor_backend="mp")
    assert said(told.answers[0]) == ANSWERS
    assert len(told.counters["reattention_rows_selected"]) == 2, told.counters
    assert_selected(told.counters)


def test_the_prompts_have_an_answer_each():
    """And none can be told without its prompt."""
    assert len(set(ANSWERS)) == len(ANSWERS)
    assert all(re.fullmatch(r" \d{5}", answer) for answer in ANSWERS)
