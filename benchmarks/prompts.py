"""Prompts that hide an answer: token ids of an exact length, the answer's sentence at a depth.

passkey  a number in repeated noise, the wording of Mohtashami and Jaggi (arXiv 2305.16300)
essay    a number in a novel, the wording of RULER's niah_single_2 (arXiv 2404.06654); in a chat if
         the model has a chat template, and the answer then opens with RULER's own words
tiny     the task that benchmarks/train_needle.py trains our own tiny model on
"""

import functools
import random
import re
from typing import NamedTuple

from benchmarks import needle_text

TASKS = ("passkey", "essay", "tiny")
ANSWER_LEN = 16  # tokens to generate, which is more than an answer has
NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE_END = re.compile(r"[.!?]\W*$")


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
    return Wording(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize "
        "them. I will quiz you about the important information there.\n",
        f"\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
        "\nWhat is the pass key?",
        " The pass key is",
        key,
    )


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
        before, after = self._around(wording, task == "essay")
        needle = self.encode(wording.needle)
        size = context_len - len(before) - len(needle) - len(after)
        if size < 0:
            raise ValueError(
                f"context_len must hold the needle and the question, got {context_len}"
            )
        hay, ends = self._haystack(task)
        hay = _run(hay, rng.randrange(len(hay)) if task == "essay" else 0, size)
        place = _sentence_start(hay, round(depth * size), ends)
        return Prompt(
            task, depth, before + hay[:place] + needle + hay[place:] + after, wording.answer
        )

    def novel(self, context_len: int) -> list[int]:
        """Plain text: so many tokens of the novel."""
        first = self.tokenizer("").input_ids
        return first + self._haystack("essay")[0][: context_len - len(first)]

    def encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _count(self, text: str) -> int:
        return len(self.tokenizer(text).input_ids)

    def _around(self, wording: Wording, chats: bool) -> tuple[list[int], list[int]]:
        """Tokens before and behind the haystack."""
        first = self.tokenizer("").input_ids  # what the model wants at the start, if anything
        if not chats or not self.tokenizer.chat_template:
            before, after = wording.opening, wording.question + wording.answer_opening
            return first + self.encode(before), self.encode(after)
        mark = "<haystack>"
        content = wording.opening + mark + wording.question
        message = [{"role": "user", "content": content}]
        text = self.tokenizer.apply_chat_template(
            message, tokenize=False, add_generation_prompt=True
        )
        before, after = text.split(mark)
        return self.encode(before), self.encode(after + wording.answer_opening.lstrip())

    @functools.cache  # noqa: B019 one Prompts lives as long as its process
    def _haystack(self, task: str) -> tuple[list[int], frozenset[int]]:
        """Tokens to cut haystacks from, and those of them that end a sentence."""
        text = NOISE if task == "passkey" else "".join(needle_text.haystack())
        tokens = self.encode(text)
        words = {token: self.tokenizer.decode([token]) for token in set(tokens)}
        ends = (token for token, word in words.items() if SENTENCE_END.search(word))
        return tokens, frozenset(ends)


def _run(tokens: list[int], start: int, size: int) -> list[int]:
    """`size` tokens from `start` on, going round as often as it takes."""
    rounds = (start + size) // len(tokens) + 1
    return (tokens * rounds)[start : start + size]


def _sentence_start(tokens: list[int], place: int, ends: frozenset[int]) -> int:
    """The last place up to this one that no sentence runs across; both ends are such places."""
    if place == len(tokens):
        return place
    while place and tokens[place - 1] not in ends:
        place -= 1
    return place
