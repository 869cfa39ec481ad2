"""The benchmarks' pure parts: prompts, scores, what is asked of vLLM, what is written down."""

import argparse
import ast
import json
import math
import re
import time
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks import agreement, demo, engines, harness, needle, needle_text, serving
from benchmarks.prompts import NOISE, Prompt, Prompts, is_hit

CHAT = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
LENGTHS = [300, 777, 2000]
DEPTHS = [0, 0.25, 0.5, 1]


@pytest.fixture(scope="module", params=["plain", "chat"])
def prompts(request, tmp_path_factory) -> Prompts:
    """Of a small tokenizer; the plain one puts a token in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([NOISE, needle_text.haystack()[1][:100_000]], trainer)
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if request.param == "chat":
        about["chat_template"] = CHAT
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
        )
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return Prompts(str(folder))


@pytest.fixture
def model(tmp_path) -> str:
    """A folder with a configuration: trained on 512 tokens."""
    rope = {"rope_type": "default", "rope_theta": 100000.0}
    config = {"model_type": "llama", "max_position_embeddings": 512, "rope_parameters": rope}
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


def text_of(prompts: Prompts, prompt: Prompt) -> str:
    return prompts.tokenizer.decode(prompt.tokens)


@pytest.mark.parametrize("task", ["passkey", "essay", "tiny"])
@pytest.mark.parametrize("context_len", LENGTHS)
def test_prompts_have_exactly_the_length_asked_for(prompts, task, context_len):
    for depth in DEPTHS:
        assert len(prompts.make(task, context_len, depth, "0").tokens) == context_len


@pytest.mark.parametrize("task", ["passkey", "essay", "tiny"])
def test_the_answer_stands_in_the_needle_and_nowhere_else(prompts, task):
    mentions = {"passkey": 2, "essay": 1, "tiny": 1}[task]
    for seed in range(5):
        prompt = prompts.make(task, 2000, 0.5, str(seed))
        assert text_of(prompts, prompt).count(prompt.answer) == mentions


@pytest.mark.parametrize("task", ["passkey", "essay", "tiny"])
@pytest.mark.parametrize("depth", DEPTHS)
def test_the_needle_stands_at_its_depth(prompts, task, depth):
    prompt = prompts.make(task, 2000, depth, "0")
    before, _, after = text_of(prompts, prompt).partition(prompt.answer)
    assert len(before) / len(before + after) == pytest.approx(depth, abs=0.1)


@pytest.mark.parametrize("task, needle", [("passkey", " The pass key"), ("essay", " One of the")])
def test_the_needle_cuts_no_sentence(prompts, task, needle):
    for seed in range(5):
        text = text_of(prompts, prompts.make(task, 777, 0.6, str(seed)))
        assert re.search(r"[.!?]\W*$", text.partition(needle)[0])


def test_the_question_comes_last_and_a_chat_asks_it(prompts):
    text = text_of(prompts, prompts.make("essay", 777, 0.5, "0"))
    is_chat = prompts.tokenizer.chat_template is not None
    assert text.endswith("mentioned in the provided text is")
    assert ("<|begin|>assistant\nThe special magic number for" in text) == is_chat
    assert text.startswith("<|begin|>user\n" if is_chat else "<|begin|>A special")
    passkey = text_of(prompts, prompts.make("passkey", 777, 0.5, "0"))
    assert passkey.endswith("\nWhat is the pass key? The pass key is")


def test_seeds_make_different_prompts_and_nothing_else_does(prompts):
    for task in ("passkey", "essay", "tiny"):
        first, same, other = (prompts.make(task, 777, 0.5, seed) for seed in "aab")
        assert first == same
        assert first.answer != other.answer


def test_too_short_for_needle_and_question_is_refused(prompts):
    with pytest.raises(
        ValueError, match="context_len must hold the needle and the question, got 20"
    ):
        prompts.make("passkey", 20, 0.5, "0")


def test_rows_count_hits_by_task_and_depth():
    asked = [Prompt("passkey", depth, [], "123") for depth in (0, 0, 1)] + [
        Prompt("essay", 0, [], "77")
    ]
    assert is_hit(asked[0], " 123.") and not is_hit(asked[0], " 12 3")
    found = needle.rows(asked, ["123", "12", " is 1234", "78"], {"model": "m"})
    assert [(r["task"], r["depth"], r["samples"], r["hits"]) for r in found] == [
        ("passkey", 0, 2, 1),
        ("passkey", 1, 1, 1),
        ("essay", 0, 1, 0),
    ]
    assert all(row["model"] == "m" for row in found)


def test_columns():
    told = "model provider task context_len depth samples hits global_size local_size recall_size"
    assert (
        " ".join(needle.COLUMNS) == told + " dense_limit scorer seed gpu torch triton vllm commit"
    )
    kernels = ast.parse((Path(needle.__file__).parent / "kernels.py").read_text())
    columns = next(
        ast.literal_eval(node.value)
        for node in kernels.body
        if isinstance(node, ast.Assign) and node.targets[0].id == "COLUMNS"
    )
    assert columns == serving.COLUMNS
    assert set(harness.stamp()) < set(serving.COLUMNS) & set(needle.COLUMNS)
    assert set(harness.stamp()) < set(agreement.COLUMNS)


def test_shared_columns_are_columns(model):
    options = argparse.Namespace(model=model, seed=3)
    for name in engines.PROVIDERS:
        provider = engines.Provider(name, model, 1024, {})
        shared = needle.shared_columns(provider, name, 900, options, harness.stamp())
        assert set(shared) <= set(needle.COLUMNS)
        assert ("scorer" in shared) == (name in ("reattention", "streaming"))


def test_streaming_has_the_scope_of_reattention(model):
    ours, streaming = (
        engines.Provider(name, model, 2048, {}).numbers() for name in ("reattention", "streaming")
    )
    parts = ("global_size", "local_size", "recall_size")
    assert ours["recall_size"] > 0 == streaming["recall_size"]
    assert sum(ours[part] for part in parts) == sum(streaming[part] for part in parts) == 512
    assert ours["dense_limit"] == streaming["dense_limit"]


@pytest.mark.parametrize("name", engines.PROVIDERS)
def test_what_is_asked_of_vllm(model, name):
    inside, past = (engines.Provider(name, model, n, {}).arguments() for n in (512, 1200))
    assert past["max_model_len"] == 1200
    if name in ("reattention", "streaming"):
        assert past["attention_backend"] == "reattention"
        assert "hf_overrides" not in past
        return
    assert inside["hf_overrides"] == {}
    assert past["attention_backend"] == "FLASH_ATTN"
    assert past["hf_overrides"]["max_position_embeddings"] == 3 * 512
    if name == "yarn":
        rope = past["hf_overrides"]["rope_parameters"]
        assert rope["factor"] * rope["original_max_position_embeddings"] == 3 * 512
        assert rope["rope_theta"] == 100000.0


def test_nothing_starts_that_may_not_end_in_time(capsys):
    started = []
    for case in engines.in_time([1, 2, 100], lambda cost: cost, time.time() + 1):
        started.append(case)
        time.sleep(0.02 * case)
    assert started == [1, 2]
    assert "no time left for 100" in capsys.readouterr().out


def test_answers_are_compared_in_text_and_first_token():
    first = agreement.Answer("a", {1: -1.0, 2: -2.0}, 0)
    other = agreement.Answer("b", {1: -1.5, 3: -2.0}, 10)
    figures = agreement.compare([(first, first), (first, other)])
    assert list(figures.values()) == [0.5, 0.5, 5]
    nothing_in_common = agreement.compare([(first, agreement.Answer("a", {}, 0))])
    assert math.isnan(nothing_in_common["max |d logprob| of first token"])


def test_serving_needs_whole_blocks_and_tells_quantiles():
    assert serving.Case(1000, 2).room(32) == 2 * 34 * 32
    assert serving.quantiles([5.0, 1.0, 4.0, 2.0, 3.0, 6.0]) == [2.0, 3.0, 5.0]
    assert serving.quantiles([7.0]) == [7.0, 7.0, 7.0]


def test_repetitions_leave_out_the_one_that_warms_up(monkeypatch):
    calls = iter(range(100))
    assert serving.repeat(lambda: next(calls)) == [1, 2, 3, 4, 5]
    monkeypatch.setattr(serving, "ENOUGH_SECONDS", 0)
    assert serving.repeat(lambda: next(calls)) == [6]


@pytest.mark.parametrize(
    "answer, right",
    [(" 12345", True), (" 12345. And", True), (" 12354", False), ("", False), (" 123456", False)],
)
def test_the_demo_knows_a_right_answer(answer, right):
    assert demo.is_right(answer, "12345") == right


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_demos_servers_differ_in_the_backend_alone(model, on_gpu):
    stock = "FLASH_ATTN" if on_gpu else "CPU_ATTN"
    ours, other = (demo.flags(Path(model), name, on_gpu) for name in ("reattention", stock))
    ours, other = (dict(zip(f[::2], f[1::2], strict=True)) for f in (ours, other))
    assert ours["--max-model-len"] == other["--max-model-len"] == str(64 * 512 + 64)
    assert {name for name in ours | other if ours.get(name) != other.get(name)} == {
        "--attention-backend",
        "--additional-config",
        "--hf-overrides",
    }


def test_the_demos_prompts_have_their_lengths(prompts, model):
    folder, count = Path(prompts.tokenizer.name_or_path), demo.count
    (folder / "config.json").write_text((Path(model) / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    within, *beyond = demo.make_tasks(folder, seed=0)
    assert count(tokenizer)(within.prompt) == 512 - demo.ANSWER_LEN
    assert [count(tokenizer)(task.prompt) for task in beyond] == [64 * 512] * len(demo.DEPTHS)
    assert all("What is the secret code of" in task.question for task in (within, *beyond))
    assert all(task.prompt.count(task.code) == 1 for task in (within, *beyond))


@pytest.mark.parametrize(
    "found, convincing",
    [([True, True, True, False], True), ([False, True, True], False), ([True, True, False], False)],
)
def test_the_demo_fails_unless_most_is_found(found, convincing):
    assert demo.is_convincing(found) == convincing
