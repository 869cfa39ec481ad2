"""vLLM's features around the backend: each must give what it gives without the other."""

import random
import re
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from benchmarks.demo import make_tasks
from tests import engines
from tests.engines import Ask
from tests.make_models import make, make_adapter

pytestmark = pytest.mark.vllm
RANDOM = random.Random(1)
FIRST, SECOND, THIRD = (
    [RANDOM.randrange(3, 500) for _ in range(length)] for length in (1100, 700, 330)
)
# Selects from 192 tokens on; prompts in one piece, so that no chunk cuts a tile
WHOLE = dict(
    additional_config={
        "reattention": dict(
            local_size=96,
            recall_size=64,
            read_local_size=64,
            read_recall_size=32,
            dense_limit=192,
            select_every=2,
        )
    },
    max_num_batched_tokens=4096,
)
SAMPLED = Ask(FIRST, temperature=1.0, seed=7)
SCORED = Ask(SECOND, max_tokens=1, prompt_logprobs=True)
# A model that answers, with a tokenizer
TINY = Path(__file__).parent / "tiny-needle"
TINY_OPTIONS = dict(
    skip_tokenizer_init=False,
    max_model_len=4096,
    max_num_batched_tokens=2048,
)


@pytest.fixture(scope="module")
def llama(folder):
    return make("llama", folder)


@pytest.fixture(scope="module")
def plain(llama, engine):
    """Answers of one engine that does nothing else at the same time."""
    batches = [[Ask(prompt, 24)] for prompt in (FIRST, SECOND, THIRD)]
    batches += [[SCORED], [SAMPLED], [SAMPLED._replace(seed=8)], [SAMPLED._replace(seed=9)]]
    found, counters = engine(engines.answers, llama, batches, **WHOLE)
    prompts, said = 4 * 1100 + 2 * 700 + 330, 3 * 23 + 3 * 15
    assert counters["reattention_rows_dense"] == [7 * 192]
    assert counters["reattention_rows_selected"] == [prompts + said - 7 * 192]
    return [answer for (answer,) in found]


@pytest.fixture(scope="module")
def alone(plain):
    """What is said after FIRST, SECOND, THIRD."""
    return [answer.tokens[0] for answer in plain[:3]]


def test_a_batch_changes_nothing_in_whatever_order(plain, alone, llama, engine):
    """Requests of unlike length end and begin while others go on, and change places."""
    places = [(1, 3), (0, 24), (2, 9), (1, 24), (2, 24), (0, 5), (1, 1)]
    batch = [Ask((FIRST, SECOND, THIRD)[which], length) for which, length in places]
    samples = SAMPLED._replace(n=3)  # each goes on with a seed of its own
    found, _ = engine(
        engines.answers, llama, [batch, [samples]], enable_prefix_caching=True,
        **WHOLE | dict(max_num_seqs=3),
    )  # fmt: skip
    for (which, length), answer in zip(places, found[0], strict=True):
        assert answer.tokens == [alone[which][:length]]
    assert found[1][0].tokens == [answer.tokens[0] for answer in plain[4:]]


def test_logprobs_of_a_prompt(plain, llama, engine):
    """Those of any chunks, and within the dense limit those of vLLM's own backend."""
    whole = plain[3].prompt_logprobs
    ((chunked,),), _ = engine(
        engines.answers, llama, [[SCORED]], **WHOLE | dict(max_num_batched_tokens=64)
    )
    assert len(whole) == len(SECOND) - 1
    assert whole == pytest.approx(chunked.prompt_logprobs, abs=1e-3)
    stock = dict(attention_backend="CPU_ATTN", max_model_len=512)
    ask = SCORED._replace(prompt=SECOND[:192])
    ((within,),), _ = engine(engines.answers, llama, [[ask]], **stock)
    assert whole[:191] == pytest.approx(within.prompt_logprobs, abs=1e-3)


def test_an_adapter_is_the_model_with_it_merged_in(alone, llama, engine):
    """A batch is all with it or all without: vLLM 0.32 on a CPU mixes these up by itself."""
    adapter, merged = make_adapter(llama)
    batches = [[Ask(FIRST, 24)], [Ask(p, 24, adapter=adapter) for p in (FIRST, SECOND)]]
    (plain, adapted), _ = engine(
        engines.answers, llama, batches, enable_lora=True, max_lora_rank=8, **WHOLE
    )
    batch = [Ask(p, 24) for p in (FIRST, SECOND)]
    (expected,), _ = engine(engines.answers, merged, [batch], **WHOLE)
    assert plain[0].tokens == [alone[0]] != adapted[0].tokens
    assert [answer.tokens for answer in adapted] == [answer.tokens for answer in expected]


def test_what_is_preempted_is_computed_again(llama, engine):
    """Up to the dense limit; beyond it tokens that were decoded come back as tiles of a prompt."""
    batch = [Ask(prompt[:300], 60) for prompt in (FIRST, SECOND, THIRD)]
    options = dict(max_model_len=512)
    (roomy,), calm = engine(engines.answers, llama, [batch], **options)
    (tight,), pressed = engine(
        engines.answers, llama, [batch], num_gpu_blocks_override=33, **options
    )
    assert calm["num_preemptions"] == [0] < pressed["num_preemptions"]
    assert roomy == tight


def test_pages_are_used_again_by_others(alone, llama, engine):
    """Room for one long request: its pages, and their summaries, are overwritten."""
    batches = [[Ask(prompt, 24)] for prompt in (SECOND, FIRST, THIRD, FIRST)]
    found, _ = engine(
        engines.answers, llama, batches, num_gpu_blocks_override=37, max_model_len=1152, **WHOLE
    )
    tokens = [answer.tokens[0] for (answer,) in found]
    assert tokens == [alone[1], alone[0], alone[2], alone[0]]


def test_a_connector_brings_pages_with_their_summaries(alone, llama, engine, tmp_path):
    """Stored by one engine, loaded by another, which computes only what is left of the prompt."""
    transfer = dict(
        kv_connector="ExampleConnector",
        kv_role="kv_both",
        kv_connector_extra_config=dict(shared_storage_path=str(tmp_path)),
    )
    counts = []
    for _ in range(2):
        ((answer,),), counters = engine(
            engines.answers, llama, [[Ask(FIRST, 24)]], kv_transfer_config=transfer, **WHOLE
        )
        assert answer.tokens == [alone[0]]
        counts += [counters[f"reattention_rows_{kind}"][0] for kind in ("dense", "selected")]
    left = 1100 - 1099 // 32 * 32
    assert counts == [192, 1100 - 192 + 23, 0, left + 23]


def test_pages_come_back_from_host_memory(alone, llama, engine):
    """What others have overwritten is not computed again. The copying itself is a stand-in's."""
    transfer = dict(
        kv_connector="OffloadingConnector",
        kv_role="kv_both",
        kv_connector_extra_config=dict(cpu_bytes_to_use=64 << 20),
    )
    room = dict(num_gpu_blocks_override=37, max_model_len=1152, enable_prefix_caching=True)
    batches = [[Ask(prompt, 24)] for prompt in (FIRST, SECOND, THIRD, FIRST)]
    found, counters = engine(
        engines.answers_with_host_memory, llama, batches, kv_transfer_config=transfer,
        **WHOLE | room,
    )  # fmt: skip
    tokens = [answer.tokens[0] for (answer,) in found]
    assert tokens == [*alone, alone[0]]
    assert counters["external_prefix_cache_hits"][0] >= 1000
    computed = counters["reattention_rows_dense"][0] + counters["reattention_rows_selected"][0]
    assert computed == 1100 + 700 + 330 + 1100 % 32 + 4 * 23


def test_answers_can_be_constrained_and_searched_for(engine):
    """Constrained beyond the trained window; searched for within the dense limit, as every step of
    a beam is a new prompt, whose tiles are not those of single tokens.
    """
    within, beyond, *_ = (task.prompt for task in make_tasks(TINY, seed=0))
    beyond = beyond[-6000:]  # characters
    asks = [Ask(within, 8), Ask(beyond, 8), Ask(beyond, 8, regex=r" 1[0-9]{4}\.")]
    (found,), counters = engine(engines.answers, TINY, [asks], **TINY_OPTIONS)
    assert counters["reattention_rows_selected"][0] > 500
    greedy, free, constrained = (answer.text for answer in found)
    assert re.fullmatch(r" 1[0-9]{4}\.", constrained) and constrained != free
    options = TINY_OPTIONS | dict(enable_prefix_caching=True)
    (one, one_score), (_, best_score) = engine(engines.beams, TINY, within, [1, 3], **options)
    assert greedy[:6] in one
    assert best_score >= one_score - 1e-3


def test_two_processes_share_the_heads(alone, llama, engine):
    """Each has one of the two KV heads, and counts for itself."""
    batches = [[Ask(FIRST, 24), Ask(THIRD, 24)]]
    options = WHOLE | dict(distributed_executor_backend="mp", tensor_parallel_size=2)
    (found,), counters = engine(engines.answers, llama, batches, **options)
    assert [answer.tokens[0] for answer in found] == [alone[0], alone[2]]
    rows = 1100 + 330 + 2 * 23
    assert counters["reattention_rows_dense"] == [384, 384]
    assert counters["reattention_rows_selected"] == [rows - 384, rows - 384]


def test_two_processes_share_the_layers(llama, engine):
    """Each has one of the two layers, and counts for itself. A stage's first layer selects, so
    every layer has to for the same tokens; and it remembers what its own layers found.
    """
    batches = [[Ask(FIRST, 24), Ask(THIRD, 24)]]
    numbers = WHOLE["additional_config"]["reattention"] | dict(select_every=1, memory=0)
    options = WHOLE | dict(additional_config={"reattention": numbers})
    expected, _ = engine(engines.answers, llama, batches, **options)
    stages = dict(distributed_executor_backend="mp", pipeline_parallel_size=2)
    found, counters = engine(
        engines.answers, llama, batches, worker_cls="tests.pipeline.Stage", **options | stages
    )
    assert found == expected
    rows = 1100 + 330 + 2 * 23
    assert counters["reattention_rows_dense"] == [384, 384]
    assert counters["reattention_rows_selected"] == [rows - 384, rows - 384]


def test_steps_may_be_scheduled_ahead(alone, llama, engine):
    """A request joins and one ends while the next step is on its way."""
    batch = [Ask(FIRST, 24), Ask(SECOND, 5), Ask(THIRD, 24)]
    options = WHOLE | dict(max_num_seqs=2)
    (found,), steps = engine(engines.answers_scheduled_ahead, llama, [batch], **options)
    assert [answer.tokens[0] for answer in found] == [alone[0], alone[1][:5], alone[2]]
    assert steps > 24


@pytest.mark.parametrize("name, cache", [("llama", "auto"), ("qwen2", "fp8")])
def test_sleep_loses_nothing(name, cache, alone, folder, engine):
    """By what a GPU's worker saves and restores, done by hand: vLLM does not sleep on a CPU."""
    options = WHOLE | dict(kv_cache_dtype=cache)
    model, ask = make(name, folder), Ask(FIRST, 24)
    before, lost, after = engine(engines.answers_around_sleep, model, [ask], **options)
    assert before == after and (before[0].tokens == [alone[0]]) == (name == "llama")
    assert lost == []
