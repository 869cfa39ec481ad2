"""Prompts that hide an answer: token ids of an exact length, the answer's sentence at a depth.

passkey  a number in repeated noise, the wording of Mohtashami and Jaggi (arXiv 2305.16300)
essay    a number in a novel, the wording of RULER's niah_single_2 (arXiv 2404.06654); in a chat if
         the model has a chat template, and the answer then opens with RULER's own words
tiny     the task that benchmarks/train_needle.py trains our own tiny model on
"""

import functools
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from benchmarks import needle_text
from vllm_reattention.layers import NOISE, PASSKEY

TASKS = ("passkey", "essay", "tiny")
ANSWER_LEN = 16  # tokens to generate, which is more than an answer has
SENTENCE_END = re.compile(r"[.!?]\W*$")
LINE_END = re.compile(r"\n$")


class Prompt(NamedTuple):
    task: str
    depth: float
    tokens: list[int]
    answer: str


class Wording(NamedTuple):
    """Text around a haystack: before it, hidden in it, behind it, and how the answer opens."""

    opening: str
    needle: str
    question: str
    answer_opening: str
    answer: str


def passkey(rng: random.Random) -> Wording:
    key = str(rng.randrange(10_000, 100_000))
    return Wording(*(text.format(key=key) for text in PASSKEY), key)


def essay(rng: random.Random) -> Wording:
    name = f"{rng.choice(needle_text.ADJECTIVES)}-{rng.choice(needle_text.NOUNS)}"
    number = str(rng.randrange(1_000_000, 10_000_000))
    asked = f"special magic number for {name} mentioned in the provided text"
    return Wording(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n",
        f" One of the special magic numbers for {name} is: {number}.",
        f"\nWhat is the {asked}?",
        f" The {asked} is",
        number,
    )


def depths(count: int) -> list[float]:
    """The middles of so many equal parts of a haystack."""
    return [(step + 0.5) / count for step in range(count)]


def is_hit(prompt: Prompt, written: str) -> bool:
    """RULER's score: the answer is somewhere in what was written."""
    return prompt.answer in written


class Prompts:
    """Makes the prompts of one model, a folder, in its own tokens."""

    def __init__(self, model: str):
        from transformers import AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(model)

    def make(self, task: str, context_len: int, depth: float, seed: str) -> Prompt:
        """A prompt of exactly `context_len` tokens; the same arguments give the same prompt.

        depth  where the needle stands: 0 at the start of the haystack, 1 at its end
        """
        rng = random.Random(f"{task} {context_len} {depth} {seed}")
        if task == "tiny":
            number = rng.randrange(1 << 32)
            text, answer = needle_text.make_prompt(self._count, context_len, depth, number)
            return Prompt(task, depth, self.tokenizer(text).input_ids, answer)
        wording = {"passkey": passkey, "essay": essay}[task](rng)
        before, after = self.around(
            wording.opening, wording.question, wording.answer_opening, chats=task == "essay"
        )
        needle = self.encode(wording.needle)
        size = context_len - len(before) - len(needle) - len(after)
        if size < 0:
            raise ValueError(
                f"context_len must hold the needle and the question, got {context_len}"
            )
        hay, ends = self.haystack(novel_text() if task == "essay" else NOISE)
        hay = run(hay, rng.randrange(len(hay)) if task == "essay" else 0, size)
        hidden = hide(hay, ends, [(depth, needle)])
        return Prompt(task, depth, before + hidden + after, wording.answer)

    def novel(self, context_len: int) -> list[int]:
        """Plain text: so many tokens of the novel."""
        first = self.tokenizer("").input_ids
        return first + self.haystack(novel_text())[0][: context_len - len(first)]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def encode_each(self, texts: Iterable[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), add_special_tokens=False).input_ids

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text).input_ids)

    def around(
        self, opening: str, question: str, answer_opening: str, chats: bool
    ) -> tuple[list[int], list[int]]:
        """Tokens before and behind a haystack."""
        first = self.tokenizer("").input_ids  # what the model wants at the start, if anything
        if not chats or not self.tokenizer.chat_template:
            return first + self.encode(opening), self.encode(question + answer_opening)
        mark = "<haystack>"
        message = [{"role": "user", "content": opening + mark + question}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        before, after = text.split(mark)
        return self.encode(before), self.encode(after + answer_opening.lstrip())

    @functools.cache  # noqa: B019 one Prompts lives as long as its process
    def haystack(
        self, text: str, end: re.Pattern[str] = SENTENCE_END
    ) -> tuple[list[int], frozenset[int]]:
        """Tokens to cut haystacks from, and those of them that end a sentence."""
        tokens = self.encode(text)
        return tokens, self.ends(tokens, end)

    def ends(self, tokens: list[int], end: re.Pattern[str]) -> frozenset[int]:
        """The tokens whose text matches."""
        words = {token: self.tokenizer.decode([token]) for token in set(tokens)}
        return frozenset(token for token, word in words.items() if end.search(word))


@functools.cache
def novel_text() -> str:
    return "".join(needle_text.haystack())


def run(tokens: list[int], start: int, size: int) -> list[int]:
    """`size` tokens from `start` on, going round as often as it takes."""
    rounds = (start + size) // len(tokens) + 1
    return (tokens * rounds)[start : start + size]


def hide(hay: list[int], ends: frozenset[int], needles: list[tuple[float, list[int]]]) -> list[int]:
    """The haystack with needles, each at its depth or where the sentence it would cut begins."""
    hidden = list(hay)
    for depth, needle in sorted(needles, key=lambda needle: needle[0], reverse=True):
        place = _sentence_start(hay, round(depth * len(hay)), ends)
        hidden[place:place] = needle
    return hidden


def _sentence_start(tokens: list[int], place: int, ends: frozenset[int]) -> int:
    """The last place up to this one that no sentence runs across; both ends are such places."""
    if place == len(tokens):
        return place
    while place and tokens[place - 1] not in ends:
        place -= 1
    return place


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """For a model without one: words are the numbers of their tokens."""
    import tokenizers
    import transformers

    model = tokenizers.models.WordLevel({str(index): index for index in range(vocab_size)})
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
