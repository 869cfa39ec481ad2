"""Through vLLM on a CPU, with tiny models of every way to rotate."""

import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("vllm")

from benchmarks.server import serve, total
from tests import engines
from tests.make_models import (
    KINDS,
    MODELS,
    README,
    REFUSED,
    TABLE,
    WINDOW,
    make,
    make_tokenizer,
    readme_table,
)

pytestmark = pytest.mark.vllm
SERVED = [name for name in MODELS if name not in KINDS[REFUSED]]
WHY_REFUSED = {
    "hunyuan": "must be rotated last ... choose another attention backend for this model",
    "bloom": "got ALiBi slopes; choose another attention backend",
    "deepseek": "an MLA model keeps latents; choose another attention backend",
    "mrope": "got the three of mRoPE ... serve a text-only model of the family or choose",
}
RANDOM = random.Random(0)
SHORT, LONG = [
    [[RANDOM.randrange(3, 500) for _ in range(length)] for length in lengths]
    for lengths in ((7, 33, 100), (1100,))
]
# Small enough to leave blocks out within some hundred tokens
SIZES = dict(
    local_size=96, recall_size=64, read_local_size=64, read_recall_size=32, dense_limit=192
)
WHOLE = dict(max_num_batched_tokens=2048)  # of both prompts of an engine
SMALL = dict(additional_config={"reattention": SIZES})


def test_the_readme_has_these_models_and_no_others():
    (table,) = (found[0] for found in TABLE.finditer(README.read_text()))
    assert table == readme_table(), "python -m tests.make_models writes the README's table anew"


@pytest.mark.parametrize("name", SERVED)
def test_within_the_window_nothing_changes(name, folder, engine):
    """And beyond it the model still runs, chunk by chunk."""
    model = make(name, folder)
    (ours, beyond), counts = engine(engines.generate, model, [SHORT, LONG])
    (stock,), _ = engine(
        engines.generate, model, [SHORT], attention_backend="CPU_ATTN", max_model_len=WINDOW
    )
    assert ours == stock
    assert counts[0][0] == 0 < counts[1][0]
    assert len(beyond[0]) == 16


@pytest.mark.parametrize("name", ["llama", "glm4"])
def test_dense_prompts_go_to_flash_attention(name, folder, engine):
    """With what stands in for it: prompts in one step as well as cut, and long ones beside them."""
    model, batches = make(name, folder), [SHORT, LONG, [SHORT[0], LONG[0], SHORT[2]]]
    plain, _ = engine(engines.generate, model, batches, max_num_batched_tokens=256)
    (flashed, counts), calls = engine(
        engines.generate_with_flash_attention, model, batches, max_num_batched_tokens=256
    )
    assert plain == flashed
    assert calls == {True, False} and counts[0][1] > 100


def test_prompts_up_to_the_dense_limit_are_attended_to_in_full(folder, engine):
    """Beside longer ones, which are served as if there were no such limit, in the same steps."""
    model = make("llama", folder)
    prompts = [LONG[0][:length] for length in (400, 700, WINDOW - 7)]
    sizes = {"additional_config": {"reattention": SIZES | dict(dense_limit=WINDOW)}}
    ((short, long, ending),), counts = engine(engines.generate, model, [prompts], **sizes)
    ((_, as_ever, _),), _ = engine(engines.generate, model, [prompts], **SMALL)
    stock, _ = engine(
        engines.generate, model, [prompts[::2]], attention_backend="CPU_ATTN", max_model_len=WINDOW
    )
    assert stock == [[short, ending[:7]]]  # as far as the window goes
    assert long == as_ever
    assert len(ending) == 16
    decoded = 16 - 1  # the last is not read
    assert counts[0][0] == 700 - 192 + decoded + decoded - 7


def test_chunks_do_not_matter(folder, engine):
    model = make("llama", folder)
    (chunked,), counts = engine(engines.generate, model, [LONG], **SMALL)
    (whole,), _ = engine(engines.generate, model, [LONG], max_num_batched_tokens=2048, **SMALL)
    assert chunked == whole
    assert counts[0][0] > 700


def test_every_layer_selects_for_the_end_of_a_prompt(folder, engine):
    """Of the prompt, not of a chunk, as its last 128 tokens' blocks."""
    model = make("llama", folder)
    for chunk in (64, 160, 2048):
        run = engine(
            engines.generate_and_tails, model, [LONG], max_num_batched_tokens=chunk, **SMALL
        )
        assert run[1] == {(992, 32), (1024, 32), (1056, 32), (1088, 12)}, chunk


def test_an_answer_begins_with_what_the_question_found(folder, engine):
    """In any layer, and the blocks beside it, a little less."""
    options = {"additional_config": {"reattention": SIZES | dict(select_every=2)}}
    options |= dict(max_num_batched_tokens=160)
    left = engine(engines.left_by_ends, make("llama", folder), [LONG], **options)
    ((found, known),) = left.values()
    assert list(left) == [1100] and max(found) > 0
    beside = [max(found[max(i - 1, 0) : i + 2]) for i in range(len(found))]
    counts = [max(own, 0.9 * other) for own, other in zip(found, beside, strict=True)]
    last = 1099 // 32  # of its own block and those behind it nothing is kept
    assert known[:last] == pytest.approx([0.8 * value for value in counts[:last]])
    assert not any(known[last:])


def test_a_vllm_that_does_not_tell_how_long_prompts_are_is_named(folder):
    with engines.workers() as pool:  # of its own: another engine's patch would tell
        model = make("llama", folder)
        found, warnings = pool.submit(engines.untold, model, [LONG], **SMALL).result(120)
    assert not found and any("does not tell how long prompts are" in told for told in warnings)


def test_both_model_runners_tell_how_long_prompts_are():
    with engines.workers() as pool:
        told = pool.submit(engines.prompt_lengths_told).result(120)
    assert told == ([5, 7], [9, 4], None)


def test_speculation_does_not_matter(folder):
    """Some guesses are right: the prompts repeat themselves, and within the dense limit the draft
    is the model. The draft runs on vLLM's own backend, and so within the trained window alone.
    With speculation nothing is remembered, and so here without it.
    """
    model, repeated = make("llama", folder), LONG[0][:50]
    ngram = dict(method="ngram", num_speculative_tokens=3, prompt_lookup_max=3)
    draft = dict(method="draft_model", model=str(model), num_speculative_tokens=3)
    forgetful = {"reattention": SIZES | dict(memory=0)}
    # the same chunk with and without
    options = dict(additional_config=forgetful, max_num_batched_tokens=2048)
    long, short = [[repeated * 18]], [[repeated * 9, LONG[0][:150]]]
    within = options | dict(max_model_len=WINDOW)
    with engines.workers() as pool:  # of its own: what ngram imports upsets vLLM's next engine

        def said(*job, **options):
            (tokens,), counts = pool.submit(engines.generate, model, *job, **options).result(300)
            return tokens, counts[0][0]

        plain, _ = said(short, 60, **within)
        drafted, selected = said(short, 60, speculative_config=draft, **within)
        assert plain == drafted and selected > 300
        plain, _ = said(long, 40, **options)
        guessed, selected = said(long, 40, speculative_config=ngram, **options)
        assert plain == guessed and selected > 700


def test_a_forced_text_has_the_loss_of_a_prompt(folder, engine):
    """Within the dense limit, where it does not matter how many queries select together."""
    texts = [LONG[0][: WINDOW // 2], LONG[0][: WINDOW - 1]]
    prefill, decode = engine(engines.losses, make("llama", folder), texts, 40)
    assert prefill == pytest.approx(decode, abs=1e-4)
    assert prefill[0] != pytest.approx(prefill[1], abs=1e-2)


def test_a_prefix_hit_changes_nothing(folder, engine):
    model, prompts = make("llama", folder), LONG
    (miss,), _ = engine(engines.generate, model, [prompts], **SMALL)
    (first, hit), counts = engine(
        engines.generate, model, [prompts, prompts], enable_prefix_caching=True, **SMALL
    )
    assert miss == first == hit
    assert sum(counts[1]) - sum(counts[0]) < 100  # the second time little was computed


def test_scopes_differ_in_what_they_say(folder, engine):
    """Had selection no effect beyond the window, all of these would agree."""
    model = make("llama", folder)
    numbers = [
        SIZES,
        SIZES | dict(scorer="summary"),
        SIZES | dict(scorer="refined"),
        SIZES | dict(select_every=2),
        SIZES | dict(recall_size=0, read_recall_size=0),
        SIZES | dict(recall_size=0, read_recall_size=0, local_size=160, read_local_size=160),
        SIZES | dict(read_recall_size=64, read_local_size=96),
        SIZES | dict(select_layers=[0]),
    ]
    said, texts = [], [*LONG, LONG[0][::-1]]
    for n in numbers:
        config = {"reattention": n}
        (tokens,), _ = engine(engines.generate, model, [texts], additional_config=config)
        said.append(tuple(map(tuple, tokens)))
    assert len({said[0], *said[2:7]}) == 6
    assert said[7] == said[3]  # the model has two layers


@pytest.mark.parametrize(
    "options",
    [
        dict(kv_cache_dtype="fp8"),
        dict(dtype="bfloat16"),
        dict(dtype="bfloat16", kv_cache_dtype="fp8_e4m3"),
        dict(block_size=64, additional_config={"reattention": dict(local_size=128)}),
        dict(block_size=96),
    ],
    ids=str,
)
def test_other_caches_run(options, folder, engine):
    (tokens,), counts = engine(engines.generate, make("llama", folder), [LONG], **options)
    assert len(tokens[0]) == 16 and counts[0][0] > 300


@pytest.mark.parametrize("name", ["qwen2", "gptoss", "gptneox"])
def test_fp8_keeps_keys_that_have_a_bias(name, folder, engine):
    """With its bias a key would be in steps of 32, larger than what tokens differ by."""
    ask = engines.Ask(LONG[0][:180], max_tokens=1, prompt_logprobs=True)
    told = []
    for cache in ("auto", "fp8"):
        ((answer,),), _ = engine(
            engines.answers, make(name, folder), [[ask]], kv_cache_dtype=cache, **SMALL
        )
        told.append(answer.prompt_logprobs)
    away = [abs(a - b) for a, b in zip(*told, strict=True)]
    assert 0 < sum(away) / len(away) < 0.6


def test_it_may_be_chosen_for_one_kind_of_layers(folder, engine):
    model = make("llama", folder)
    kinds = dict(backend_per_kind=dict(full_attention="reattention"))
    chosen = dict(attention_backend=None, attention_config=kinds)
    assert not engine(engines.refusal, model, **chosen)  # which loads plugins, as vllm serve does
    told = engine(engines.generate, model, [LONG], **chosen)
    assert told == engine(engines.generate, model, [LONG]) and told[1][0][0] > 300


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("llama", dict(additional_config={"reattention": dict(topk=4)}), "must be among"),
        (
            "llama",
            dict(additional_config={"reattention": dict(local_size=8192)}),
            "must fit in the trained window of 512 tokens, got 32 + 0 + 8192 = 8224; make",
        ),
        *((name, {}, WHY_REFUSED[name]) for name in KINDS[REFUSED]),
        ("llama", dict(kv_cache_dtype="fp8_e5m2"), "--kv-cache-dtype must be one of auto"),
        (
            "llama",
            dict(decode_context_parallel_size=2),
            "--decode-context-parallel-size must be 1, got 2 ... use --tensor-parallel-size",
        ),
        (
            "llama",
            dict(prefill_context_parallel_size=2),
            "--prefill-context-parallel-size must be 1, got 2 ... use --tensor-parallel-size",
        ),
        (
            "llama",
            dict(batch_invariant=True),
            "VLLM_BATCH_INVARIANT must be unset ... choose another attention backend",
        ),
        ("llama", dict(ubatch_size=2), "--enable-dbo and --ubatch-size must be left out"),
        (
            "llama",
            dict(kv_transfer_config=dict(kv_connector="LMCacheConnectorV1", kv_role="kv_both")),
            "must move whole pages, LMCacheConnectorV1 hands them ... use OffloadingConnector",
        ),
        (
            "llama",
            dict(
                attention_backend=None,
                attention_config=dict(backend_per_kind=dict(full_attention="reattention")),
                additional_config={"reattention": dict(topk=4)},
            ),
            "must be among",
        ),
        (
            "llama",
            dict(speculative_config=dict(method="draft_model", num_speculative_tokens=3)),
            "must be of one model ... draft_model ... on CPU_ATTN; lower --max-model-len to 512",
        ),
        (
            "llama",
            dict(meddler=engines.wrap_stock_rotary),
            "must be its only use of positions, and no other plugin may replace ... "
            "VLLM_PLUGINS=reattention ... choose another",
        ),
        (
            "llama",
            dict(meddler=engines.wrap_our_rotary),
            "no other plugin may replace its rotary embedding ... VLLM_PLUGINS=reattention",
        ),
        ("llama", dict(pretend_gpu=True), "--dtype must be bfloat16 or float16 on a GPU"),
        ("llama", dict(block_size=16), "--block-size must be a multiple of 32, got 16"),
        ("llama", dict(pretend_range=">=99"), "must run with vllm>=99, got"),
        ("llama", dict(attention_backend="CPU_ATTN"), "max_model_len (2048) is greater than"),
    ],
)
def test_what_cannot_be_served_is_refused(name, options, message, folder, engine):
    """What it is, and what to do."""
    model = make(name, folder)
    if "speculative_config" in options:
        options = dict(speculative_config=options["speculative_config"] | dict(model=str(model)))
    error = engine(engines.refusal, model, **options)
    assert all(part in error for part in message.split(" ... ")), error
    assert "\n" not in error or "CPU_ATTN" in str(options)


def test_a_draft_on_our_backend_is_in_order_or_refused(folder, engine):
    """Model runner V2 gives a draft its target's backend, and names its layers in any order."""
    options = dict(additional_config={"reattention": SIZES | dict(select_every=2)})
    run = engine(engines.as_drafts, make("llama", folder), **options)
    (forward, backward), (of_target, of_draft), errors = run
    assert forward == backward and forward[:2] == [True, False]
    assert of_target == (True, False) and of_draft == (False, True)
    beyond, within = errors
    assert "must be of one model on reattention beyond the trained window" in beyond
    assert "a draft model must have the trained window of its target" in within


def test_yarn_may_be_added_to_a_model(folder, engine):
    """vLLM takes such a window for the scaled one, and we know better."""
    yarn = dict(rope_type="yarn", rope_theta=1e4, factor=4.0)
    scaled = dict(rope_parameters=yarn | dict(original_max_position_embeddings=WINDOW))
    for length in (2 * WINDOW, 5 * WINDOW):
        options = dict(hf_overrides=scaled, max_model_len=length)
        assert not engine(engines.refusal, make("llama", folder), **options)


def test_an_unsupported_vllm_disturbs_nobody_else(folder, engine):
    options = dict(attention_backend="CPU_ATTN", max_model_len=WINDOW)
    assert not engine(engines.refusal, make("llama", folder), pretend_range=">=99", **options)


def flags(model: Path) -> list[str]:
    told = f"--model {model} --attention-backend reattention --max-model-len 2048"
    return f"{told} --dtype float32 --max-num-seqs 2 --max-num-batched-tokens 256".split()


def test_serve(folder):
    """The command line, with every process spawned; and what /metrics then tells."""
    model = make("llama", folder)
    make_tokenizer(model)
    with serve(flags(model), on_gpu=False) as server:
        body = dict(model=str(model), prompt=LONG[0], max_tokens=8, temperature=0)
        answer = server.post("/v1/completions", body)["choices"][0]["text"]
        assert len(answer.split()) == 8
        samples = server.metrics()

    def told(name: str, **labels: str) -> float:
        return total(samples, f"reattention_{name}", engine="0", worker="0", **labels)

    # Of 1107 tokens those from 512 on select: 19 prefill tiles of 11 blocks, 7 single tokens of 6
    assert told("rows_dense_total") == 512
    assert told("rows_selected_total") == 588 + 7
    assert told("blocks_recalled_total") == 19 * 11 + 7 * 6
    assert told("context_tokens_count") == told("context_tokens_bucket", le="+Inf") == 1107
    assert told("context_tokens_sum") == 1107 * 1108 / 2
    # Each of the two layers shows the two heads of a group in the first step that selects
    assert told("recalled_share_count") >= 4
    assert 0.1 < told("recalled_share_sum") / told("recalled_share_count") <= 1
    # So do its stages tell their times, of the chunk of 64 tokens that this is
    assert told("timed_tokens_total") >= 64
    for stage in ("score_blocks", "recall_blocks", "refine_scores", "attend"):
        assert 0 < told("stage_seconds_total", stage=stage) < 60
    dashboard = (Path(__file__).parent.parent / "docs" / "grafana.json").read_text()
    assert set(re.findall(r"vllm:\w+", dashboard)) <= {sample.name for sample in samples}
    up_to = {128: 128, 512: 512, 1024: 1024, 2048: 1107}
    assert up_to == {n: told("context_tokens_bucket", le=f"{n}.0") for n in up_to}


def test_two_engines_serve(folder, engine):
    """Data parallelism: each takes some of the requests and counts for itself. Prompts are read in
    one step each, as one beside another would be cut within a block.
    """
    model, prompt = make("llama", folder), LONG[0][:700]
    make_tokenizer(model)
    (expected,), _ = engine(engines.generate, model, [[prompt]], max_tokens=8, **WHOLE)
    two = ["--data-parallel-size", "2", "--no-enable-prefix-caching"]
    two += ["--max-num-batched-tokens", str(WHOLE["max_num_batched_tokens"])]
    body = dict(model=str(model), prompt=prompt, max_tokens=8, temperature=0)
    with (
        serve(flags(model) + two, on_gpu=False) as server,
        ThreadPoolExecutor() as clients,
    ):
        found = list(clients.map(server.post, 4 * ["/v1/completions"], 4 * [body]))
        samples = server.metrics()
    for answer in found:
        assert answer["choices"][0]["text"].split() == [str(token) for token in expected[0]]
    selected = [total(samples, "reattention_rows_selected_total", engine=e) for e in "01"]
    assert min(selected) > 0 and sum(selected) == 4 * (700 - WINDOW + 7)
