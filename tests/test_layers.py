"""Which layers find facts, and so should select."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")

import tokenizers
import transformers

from benchmarks import needle_text
from benchmarks.demo import count
from tests import engines
from tests.make_models import make
from vllm_reattention import layers

pytestmark = pytest.mark.vllm
TINY = Path(__file__).parent / "tiny-needle"


def told(seed: int) -> layers.Told:
    """A fact that the tiny model was trained to tell, and the line it stands in."""
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    text, answer = needle_text.make_prompt(count(tokenizer), 300, 0.5, seed)
    asked = tokenizer.encode(text).ids
    tokens = tokenizer.encode(f"{text} {answer}").ids
    assert tokens[: len(asked)] == asked
    digits = tokens[len(asked) :][-len(answer) :]
    at = next(i for i in range(len(asked)) if asked[i : i + len(digits)] == digits)
    return layers.Told(tokens, range(at - 4, at + len(digits)), len(tokens) - len(asked))


@pytest.fixture(scope="module")
def model():
    return layers.Model(str(TINY), "cpu")


def test_attention_on_a_fact_is_what_the_model_pays(model):
    prompt = told(6)
    finds, mass = model.attention_on_fact(prompt)
    assert finds
    load = transformers.AutoModelForCausalLM.from_pretrained
    plain = load(TINY, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        out = plain(torch.tensor([prompt.tokens]), output_attentions=True)
    rows = slice(-prompt.answer_len - 1, -1)
    for layer, weights in enumerate(out.attentions):
        on = weights[0, :, rows, prompt.fact.start : prompt.fact.stop].sum(-1)
        torch.testing.assert_close(mass[layer], on.mean(1).sum(), rtol=1e-3, atol=1e-4)
    assert mass.max() > 0.5  # a head that looks at little else


def test_facts_that_are_not_told_do_not_count(model):
    prompt = told(7)
    wrong = prompt._replace(tokens=[*prompt.tokens[:-1], prompt.tokens[0]])
    _, mass = model.attention_on_fact(prompt)
    assert torch.equal(layers.measure(model, [wrong, prompt, wrong]), mass)
    with pytest.raises(ValueError, match="at least one of 2 questions about"):
        layers.measure(model, [wrong, wrong])


def test_the_first_layer_and_those_that_look_most_are_chosen():
    mass = torch.tensor([0.0, 0.4, 0.1, 0.9, 0.9, 0.2])
    assert layers.choose(mass, list(range(6)), 3) == [0, 3, 4]
    assert layers.choose(mass, list(range(6)), 4) == [0, 1, 3, 4]
    assert layers.choose(mass, [2, 5], 4) == [2, 5]  # the others have a sliding window
    assert layers.by_default(list(range(28)), 28) == list(range(0, 28, 4))
    assert layers.by_default([5, 11, 17, 18, 23], 28) == [5, 11, 17, 23]


def test_layers_with_a_sliding_window_cannot_select(folder):
    found = layers.Model(str(make("gemma3", folder)), "cpu")
    kinds = found.model.config.layer_types
    assert set(kinds) == {"sliding_attention", "full_attention"}
    assert [kinds[layer] for layer in found.candidates] == ["full_attention"] * kinds.count(
        "full_attention"
    )


def test_the_prompts_hold_their_facts():
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY)
    prompts = layers.passkeys(str(TINY), 1500, 3)
    places = []
    for prompt in prompts:
        assert 1300 < len(prompt.tokens) <= 1520
        fact = tokenizer.decode(prompt.tokens[prompt.fact.start : prompt.fact.stop])
        answer = tokenizer.decode(prompt.tokens[-prompt.answer_len :])
        assert fact.count(answer.strip()) == 2
        places.append(prompt.fact.start / len(prompt.tokens))
    assert places == sorted(places) and places[0] < 0.3 and places[-1] > 0.6


def test_the_command_says_what_was_found(monkeypatch, engine):
    """Of a model that cannot tell passkeys it says so."""
    status, text = engine(engines.command, "layers", TINY)
    assert status == 2 and "must answer at least one of 6 questions" in text.splitlines()[-1]
    monkeypatch.setattr(layers, "passkeys", lambda *_: [told(6), told(7)])
    text = layers.report(str(TINY))
    assert "layer  attention" in text and "select_layers" in text.splitlines()[-1]
    marked = [line.split()[0] for line in text.splitlines()[1:-2] if "s" in line.split()[-1]]
    assert f"[{', '.join(marked)}]" in text.splitlines()[-1]
