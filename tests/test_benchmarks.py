"""The benchmarks' pure parts: prompts, scores, what is asked of vLLM, what is written down."""

import argparse
import json
import math
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from benchmarks import (
    agreement,
    demo,
    engines,
    harness,
    kernels,
    load,
    loss,
    needle,
    needle_text,
    ruler,
    ruler_text,
    rules,
    serving,
)
from benchmarks.prompts import NOISE, Prompt, Prompts, is_hit, novel_text
from csrc_triton import reference
from vllm_reattention import attention
from vllm_reattention.config import ReAttentionConfig
from vllm_reattention.tiles import prefill_tiles

CHAT = (
    "{% for m in messages %}<|begin|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
LENGTHS = [300, 777, 2000]
TINY = Path(__file__).parent / "tiny-needle"
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


def ruler_sample(prompts, task, seed="0", depth=None, length=6000) -> tuple[str, list[str]]:
    sample = ruler_text.make(prompts, task, length, depth, seed)
    return text_of(prompts, sample), sample.answers


@pytest.mark.parametrize("task", ruler_text.TASKS)
@pytest.mark.parametrize("context_len", [6000, 9001])
def test_rulers_prompts_and_answers_have_exactly_the_length_asked_for(prompts, task, context_len):
    for depth in (None, 0.1, 0.9):
        sample = ruler_text.make(prompts, task, context_len, depth, "0")
        assert len(sample.tokens) + ruler_text.ANSWER_LEN[task] == context_len


@pytest.mark.parametrize("task", ruler_text.TASKS)
def test_rulers_seeds_make_different_samples_and_nothing_else_does(prompts, task):
    first, same, other = (ruler_sample(prompts, task, seed) for seed in "aab")
    assert first == same
    assert first[1] != other[1]


@pytest.mark.parametrize("task", ruler_text.NIAH)
def test_rulers_facts_tell_the_answers_and_few_others(prompts, task):
    text, answers = ruler_sample(prompts, task)
    told = re.findall(r"One of the special magic (\w+)s for (\S+) is: (\S+)\.", text)
    query = text[text.rindex("special magic") : text.rindex("mentioned")]
    assert [value for _, key, value in told if key in query] == sorted(
        answers, key=lambda answer: text.index(answer)
    )
    others = len(told) - len(answers)
    assert others > 20 if task in ("niah_multikey_2", "niah_multikey_3") else others in (0, 3)
    assert (others == 3) == (task == "niah_multikey_1")
    assert len(answers) == (4 if task in ("niah_multivalue", "niah_multiquery") else 1)
    assert {len(answer) for answer in answers} == {36 if task[-1] == "3" else 7}


@pytest.mark.parametrize("task", sorted(ruler_text.HAVE_DEPTH))
@pytest.mark.parametrize("depth", DEPTHS)
def test_rulers_fact_stands_at_its_depth(prompts, task, depth):
    text, (answer,) = ruler_sample(prompts, task, depth=depth)
    assert text.index(answer) / len(text) == pytest.approx(depth, abs=0.1)


def test_rulers_variables_follow_from_the_value(prompts):
    text, answers = ruler_sample(prompts, "vt")
    opening = "Memorize and track"
    shown, asked = text.split(opening)[1:]
    for part, names in ((asked, answers), (shown, shown.split("they are: ")[1].split())):
        chain = re.findall(r"assigned the value (\d+) in", part)
        for name, source in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\n", part):
            assert source == chain[-1]
            chain.append(name)
        assert chain[1:] == names
    assert len(answers) == 5


def test_rulers_common_words_are_the_most_common(prompts):
    text, answers = ruler_sample(prompts, "cwe", length=9001)
    shown, asked = text.split("Below is a numbered list")[1:]
    counts = Counter(re.findall(r"\d+\. (\w+)", asked)).most_common()
    assert {word for word, _ in counts[:10]} == set(answers)
    assert counts[9][1] >= 28 and counts[10][1] == 3
    words = re.findall(r"\d+\. (\w+)", shown)
    assert {word for word, _ in Counter(words[:-10]).most_common(10)} == set(words[-10:])


def test_rulers_frequent_words_are_the_most_frequent(prompts):
    text, answers = ruler_sample(prompts, "fwe")
    coded = text.split("coded words.")[1].split("\nQuestion")[0].split()
    (dots, _), *counts = Counter(coded).most_common(5)
    assert dots == "...."
    assert [word for word, _ in counts[:3]] == answers
    assert counts[0][1] / counts[2][1] == pytest.approx(16 / 4, rel=0.15)


@pytest.mark.parametrize("task", ["cwe", "vt", "fwe", "niah_multikey_3"])
def test_ruler_refuses_lengths_that_cannot_hold_what_it_hides(prompts, task):
    with pytest.raises(ValueError, match=f"context_len must suit {task}, got 150"):
        ruler_text.make(prompts, task, 150, None, "0")


def test_ruler_scores_the_share_of_answers_and_averages_over_all_tasks():
    sample = ruler_text.Sample("vt", None, [], ["ABC", "DEF", "GHI", "JKL"])
    assert ruler_text.score(sample, "abc, JKL and DE") == 0.5
    single = [ruler_text.Sample("fwe", depth, [], ["x"]) for depth in (0.1, 0.1, 0.9)]
    about = dict.fromkeys(needle.COLUMNS, "") | {"provider": "p"}
    vt = ruler.rows([sample] * 2, ["abc", "abc def"], about | {"task": "vt", "context_len": 8})
    fwe = ruler.rows(single, ["x", "", "y"], about | {"task": "fwe", "context_len": 8})
    assert [(row["depth"], row["samples"], row["hits"]) for row in vt + fwe] == [
        (None, 2, 0.75),
        (0.1, 2, 1.0),
        (0.9, 1, 0.0),
    ]
    longer = [row | {"context_len": 16} for row in vt]
    assert ruler.shares(vt + fwe + longer) == {
        ("vt", 8): 0.375,
        ("fwe", 8): 1 / 3,
        ("vt", 16): 0.375,
        ("average", 8): (0.375 + 1 / 3) / 2,
    }
    lines = [line.split() for line in ruler.summary(vt + fwe + longer).splitlines()[1:]]
    assert lines == [
        ["p", "8", "16"],
        ["vt", "37.5%", "37.5%"],
        ["fwe", "33.3%", "-"],
        ["average", "35.4%", "-"],
    ]


def test_rulers_single_facts_stand_at_every_depth_in_turn():
    options = argparse.Namespace(depths=2)
    assert [ruler.depth_of("niah_single_1", i, options) for i in range(3)] == [0.25, 0.75, 0.25]
    assert ruler.depth_of("niah_multivalue", 0, options) is None


def test_figures_tell_scopes_apart():
    row = {"provider": "reattention", "global_size": 32, "local_size": "64", "recall_size": 0}
    row |= {"decode_recall_size": "0", "read_recall_size": "0", "read_local_size": 64}
    assert engines.label(row) == "reattention 32+0+64"
    row |= {"recall_size": "128", "decode_recall_size": 64, "read_recall_size": 128}
    assert engines.label(row) == "reattention 32+128 (64)+64"
    row["read_local_size"] = "32"
    assert engines.label(row) == "reattention 32+128 (64)+64, read by 128+32"
    assert engines.label(row | {"provider": "yarn", "global_size": ""}) == "yarn"


def test_losses_of_all_lengths_are_of_the_same_tokens(prompts):
    novel, _ = prompts.haystack(novel_text())
    ends = loss.text_ends(len(novel), 2000, 3)
    assert ends[0] == 2000 and ends[-1] == len(novel)
    short, long = (loss.make_texts(prompts, length, ends) for length in (500, 2000))
    assert {len(text) for text in short} == {499} and {len(text) for text in long} == {1999}
    assert [text[-400:] for text in short] == [text[-400:] for text in long]
    assert len({tuple(text) for text in short}) == 3
    with pytest.raises(ValueError, match=f"fit in the novel of {len(novel)} tokens, got 10000000"):
        loss.text_ends(len(novel), 10_000_000, 3)


def test_losses_change_over_the_same_texts():
    assert loss.change({1: 2.0, 2: 4.0, 3: 9.0}, {1: 2.5, 2: 4.5}) == (0.5 / 3, 0.0)
    cells = {16: {1: 2.5, 2: 4.5}, 8: {1: 2.0, 2: 4.0, 3: 9.0}}
    assert loss.means(cells) == [(8, 3.0), (16, 3.5)]
    assert loss.means({8: {1: 2.0}, 16: {2: 2.0}}) == []
    about = dict.fromkeys(loss.COLUMNS, "") | {"provider": "p", "phase": "decode"}
    rows = [
        about | {"context_len": n, "text": text, "loss": value}
        for n, text, value in ((8, 1, 2.0), (8, 2, 4.0), (16, 1, 2.5), (16, 2, 4.1))
    ]
    lines = loss.summary(rows).splitlines()
    assert lines[1] == "p, decode"
    assert lines[2].split()[:3] == ["8", "3.0000", "+0.00%"]
    assert lines[3].split()[:3] == ["16", "3.3000", "+10.00%"]


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


@pytest.mark.parametrize("context", [1, 31, 32, 33, 96])
def test_page_lists_name_the_pages_of_the_block_table(context):
    table = torch.randperm(12).int().view(3, 4)
    begin, indices, last = kernels.page_lists(table, context, 32)
    assert begin.dtype == indices.dtype == last.dtype == torch.int32
    for request, blocks in enumerate(table):
        pages = indices[begin[request] : begin[request + 1]]
        assert (len(pages) - 1) * 32 + last[request] == context and 0 < last[request] <= 32
        assert pages.tolist() == blocks[: len(pages)].tolist()
    assert len(indices) == begin[-1]


def test_attention_of_one_is_attention_over_its_pages():
    key, value = torch.randn(2, 9, 2, 8, 16)  # pages, KV heads, tokens, size
    query, blocks = torch.randn(6, 16), torch.tensor([7, 0, 3]).int()
    keys, values = (x[blocks].transpose(0, 1).flatten(1, 2)[:, :21] for x in (key, value))
    exact = torch.nn.functional.scaled_dot_product_attention(
        query[None, :, None], keys[None], values[None], scale=0.3, enable_gqa=True
    )
    out = kernels.attention_of_one(query, key, value, blocks, 21, 0.3)
    torch.testing.assert_close(out, exact[0, :, 0])
    kernels.assert_agree(out.bfloat16(), exact[0, :, 0])
    with pytest.raises(AssertionError, match="off by"):
        kernels.assert_agree(out * float("nan"), exact[0, :, 0])


def test_the_best_of_a_baseline_counts_and_one_that_fails_tells_why():
    made = {"slow": lambda: 3.0, "fast": lambda: 2.0}
    assert kernels.best_of(lambda function: [function()], lambda: made) == ([2.0], "fast")

    def fails():
        raise RuntimeError("no such kernel:\n  at line 3" + 999 * "!")

    nothing, why = kernels.best_of(None, fails)
    assert nothing is None and why.startswith("no such kernel: at line 3!") and len(why) == 400
    assert kernels.best_of(lambda function: function(), lambda: {"": fails})[0] is None


def test_columns():
    told = "model provider task context_len depth samples hits global_size local_size recall_size"
    told += " decode_recall_size read_recall_size read_local_size dense_limit scorer select_every"
    assert " ".join(needle.COLUMNS) == told + " memory seed gpu torch triton vllm commit"
    assert kernels.COLUMNS == serving.COLUMNS
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


def test_layers_that_are_named_select_and_are_written_down(model):
    named = engines.Provider("reattention", model, 1200, {"select_layers": [3, 2]})
    assert named.numbers()["select_every"] == "0 2 3"
    asked = named.arguments()["additional_config"]
    assert ReAttentionConfig.read(asked).selecting_layers(4) == (0, 2, 3)


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


def test_a_load_is_shared_out_among_those_that_stay_and_those_that_leave():
    short, long = load.Kind(100, 56, 224), load.Kind(100_000, 8, 32)
    assert (short.leaving[1:], short.staying[1:]) == ((7, 28), (49, 196))
    assert (long.leaving[1:], long.staying[1:]) == ((1, 4), (7, 28))
    few = load.Kind(2000, 2, 3)
    assert (few.leaving[1:], few.staying[1:]) == ((1, 2), (1, 1))


def test_answers_may_differ_where_two_tokens_are_equally_likely():
    likely = [{"a": -0.1, "b": -3.0}, {"c": -0.7, "d": -0.8, "e": -2.0}, {"f": -0.1}]
    alone = load.Answer(["a", "c", "f"], likely)
    assert alone.agrees(alone)
    for tokens, agrees in (("adg", True), ("bcf", False), ("aef", False), ("acg", False)):
        assert alone.agrees(load.Answer(list(tokens), likely)) == agrees


def test_options_are_told_as_on_a_command_line():
    chosen = {"max_num_seqs": 2, "load_format": None, "no_x": True, "eager": False, "a": {"b": 1}}
    assert load.flags(chosen) == ["--max-num-seqs", "2", "--no-x", "--a", '{"b": 1}']


@pytest.fixture(scope="module")
def study() -> rules.Study:
    return rules.Study(str(TINY), "cpu", torch.float32)


@pytest.mark.parametrize("highest", [False, True])
def test_exact_shares_are_those_that_the_stages_tell_of_all_blocks(study, highest):
    prompts = Prompts(str(TINY))
    tokens = prompts.make("tiny", 420, 0.3, "1").tokens
    study.read(tokens, 2, dict(global_size=32, local_size=64, recall_size=64), "exact")
    layer, scope, num_tokens = study.layers[1], study.scope, study.length
    heads = study.model.config.num_attention_heads
    query = torch.randn(num_tokens, heads, layer.key.shape[-1])
    starts = torch.tensor([0, num_tokens], dtype=torch.int32)
    tiles = prefill_tiles(starts, starts, starts[1:], 0, rules.BLOCK_SIZE, scope.dense_blocks)
    tiles = attention.selecting(tiles.part(0, int((tiles.length > 0).sum())))
    assert tiles.step == 4
    exact = study._exact(query, layer.key, tiles, scope, 0.3, highest)
    blocks = torch.where(exact >= 0, torch.arange(exact.shape[-1]), -1).int()
    assert (blocks >= 0).sum() > 10
    common, rest = (query, layer.pages, study.table, tiles), (scope, study.rotary, 0.3)
    if highest:
        told, _ = reference.exact_scores(*common, *rest)
    else:
        told = reference.refine_scores(*common, blocks, *rest)
    torch.testing.assert_close(exact, told, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "rule, scorer", [*((rule, "layer") for rule in rules.RULES), ("quest", "refined")]
)
def test_every_rule_recalls_what_it_may(study, rule, scorer, monkeypatch):
    """By each tile as many blocks as it may, between global and local, in order, and no other."""
    recalls = []
    select, select_for_tail = rules.Study._select, rules.Study._select_for_tail

    def kept(*given):
        recalls.append((given[3], select(*given)))
        return recalls[-1][1]

    def kept_of_tail(*given):
        recalls.append((given[3], select_for_tail(*given)))
        return recalls[-1][1]

    monkeypatch.setattr(rules.Study, "_select", kept)
    monkeypatch.setattr(rules.Study, "_select_for_tail", kept_of_tail)
    prompts = Prompts(str(TINY))
    prompt = prompts.make("tiny", 300, 0.3, "0")
    settings = dict(global_size=32, local_size=64, recall_size=64, dense_limit=160, scorer=scorer)
    decoded = 2 if rule == "oracle" else 1  # as many as the needle has
    settings["decode_recall_size"] = 32 * decoded
    told = prompts.encode(f" {prompt.answer}")
    study.read(prompt.tokens, 2, settings, "served" if rule == "only" else rule)
    served, needle = len(recalls), rules.needle_place(prompts, prompt)
    written, logprob, seen = study.answer(rule, needle, told)
    assert len(written) == 2 and logprob < 0
    assert rule not in ("oracle", "only") or seen[:, 0].min() == 1
    if rule == "only":
        blocks = list(range(needle.start // 32, (needle.stop - 1) // 32 + 1))
        for _, recalled in recalls[served:]:
            assert recalled.flatten(0, 1).tolist() == [blocks] * len(recalled)
        recalls = recalls[:served]
    for tiles, recalled in recalls:
        block = tiles.position // 32
        selects = (block >= 5) & (tiles.length > 0)
        assert recalled.shape[1] == (2 if scorer == "refined" else 1)
        assert recalled.shape[2] == (decoded if tiles.max_length == 1 else 2)
        chosen = recalled[selects]
        assert (chosen >= 1).all() and (chosen.diff(dim=-1) > 0).all()
        assert (chosen <= (block[selects] - 2)[:, None, None]).all()
    assert any(((tiles.position // 32 >= 5) & (tiles.length > 0)).any() for tiles, _ in recalls)
