"""RULER's synthetic tasks (arXiv 2404.06654) as token ids of an exact length.

niah_*  "One of the special magic numbers for KEY is: VALUE.", in noise, a novel or more of the kind
vt      variable tracking: which variables got a value, through a chain of assignments
cwe     common words: ten words that stand 30 times in a list where others stand 3 times
fwe     frequent words: the three most frequent of made-up words with Zipf's frequencies

Wordings, counts, room for the answer and score are RULER's. Its own are: essays and words come from
one novel; a haystack is cut so that the length is exact; an answer's opening does not end in the
space that would keep tokenizers from making one token of the next word.
"""

import bisect
import functools
import itertools
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks import needle_text
from benchmarks.prompts import LINE_END, NOISE, Prompts, hide, novel_text, run


class Facts(NamedTuple):
    """What a niah task hides and asks for."""

    hay: str  # noise, novel or facts
    key: str = "word"
    value: str = "number"
    keys: int = 1
    values: int = 1  # of each key
    queries: int = 1  # keys that are asked for


NIAH = {
    "niah_single_1": Facts("noise"),
    "niah_single_2": Facts("novel"),
    "niah_single_3": Facts("novel", value="uuid"),
    "niah_multikey_1": Facts("novel", keys=4),
    "niah_multikey_2": Facts("facts"),
    "niah_multikey_3": Facts("facts", key="uuid", value="uuid"),
    "niah_multivalue": Facts("novel", values=4),
    "niah_multiquery": Facts("novel", keys=4, queries=4),
}
ANSWER_LEN = dict.fromkeys(NIAH, 128) | {"vt": 30, "cwe": 120, "fwe": 50}  # tokens to generate
TASKS = tuple(ANSWER_LEN)
HAVE_DEPTH = frozenset(name for name, facts in NIAH.items() if facts.values == facts.queries == 1)

NOISE_LINE = NOISE.strip() + "\n"
HOPS = 4
COMMON, COMMON_TIMES, OTHER_TIMES = 10, 30, 3  # cwe: common words, times they and others stand
CODED_LEN, TOKENS_PER_CODED, FREQUENT = 6, 50, 3  # fwe: letters, context per word, words asked for


class Text(NamedTuple):
    """What stands around a haystack, what an answer names, and the haystack of so many tokens.

    A haystack that cannot have the size is returned with another.
    """

    opening: str
    question: str
    answer_opening: str
    answers: list[str]
    fill: Callable[[int], list[int]]


class Sample(NamedTuple):
    task: str
    depth: float | None  # of the one fact that is asked for, if it is one
    tokens: list[int]
    answers: list[str]


def score(sample: Sample, written: str) -> float:
    """The share of the answers that are somewhere in what was written."""
    written = written.lower()
    return sum(answer.lower() in written for answer in sample.answers) / len(sample.answers)


def make(prompts: Prompts, task: str, context_len: int, depth: float | None, seed: str) -> Sample:
    """A sample whose prompt and longest answer have `context_len` tokens together.

    depth  where the fact that is asked for stands, 0 at the start of the haystack, 1 at its end;
           None: where chance puts it, as all that a task outside HAVE_DEPTH hides
    """
    rng = random.Random(f"{task} {context_len} {depth} {seed}")
    if task == "cwe":
        text = _common_words(prompts, rng, is_short=context_len < 4096)
    elif task in NIAH:
        text = _facts(prompts, rng, NIAH[task], depth)
    else:
        text = {"vt": _variables, "fwe": _frequent_words}[task](prompts, rng)
    before, after = prompts.around(*text[:3], chats=True)
    prompt_len = context_len - ANSWER_LEN[task]
    tokens = before + text.fill(max(0, prompt_len - len(before) - len(after))) + after
    if len(tokens) != prompt_len:
        raise ValueError(
            f"context_len must suit {task}, got {context_len}: its prompt would have {len(tokens)} "
            f"tokens instead of {prompt_len}"
        )
    return Sample(task, depth, tokens, text.answers)


def _facts(prompts: Prompts, rng: random.Random, facts: Facts, depth: float | None) -> Text:
    keys = _distinct(lambda: _thing(facts.key, rng), facts.keys)
    pairs = [(key, _thing(facts.value, rng)) for key in keys for _ in range(facts.values)]
    asked = pairs[: facts.queries * facts.values]
    needles = prompts.encode_each(_fact(facts, *pair) for pair in pairs)
    depths = [rng.random() for _ in needles]
    if depth is not None:
        depths[0] = depth

    def fill(size: int) -> list[int]:
        size -= sum(map(len, needles))
        if size < 0:
            return []
        if facts.hay == "facts":
            names = (_thing(facts.key, rng) for _ in itertools.count())
            others = ((name, _thing(facts.value, rng)) for name in names if name not in keys)
            hay = _enough(prompts, (_fact(facts, *other) for other in others), size)
            hay, ends = hay[len(hay) - size :], prompts.ends(hay, LINE_END)
        elif facts.hay == "novel":
            novel, ends = prompts.haystack(novel_text())
            hay = run(novel, rng.randrange(len(novel)), size)
        else:
            noise, ends = prompts.haystack(NOISE_LINE, LINE_END)
            hay = run(noise, 0, size)
        return hide(hay, ends, list(zip(depths, needles, strict=True)))

    is_one = len(asked) == 1
    some, are, what = ("A", "is", "What is") if is_one else ("Some", "are", "What are all")
    kind = facts.value if is_one else f"{facts.value}s"
    *most, last = dict.fromkeys(key for key, _ in asked)
    query = f"{', '.join(most)}, and {last}" if most else last
    named = f"the special magic {kind} for {query} mentioned in the provided text"
    return Text(
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to "
        f"memorize it. I will quiz you about the {kind} afterwards.\n",
        f"\n{what} {named}?",
        f" T{named[1:]} {are}",
        [value for _, value in asked],
        fill,
    )


def _fact(facts: Facts, key: str, value: str) -> str:
    told = f"One of the special magic {facts.value}s for {key} is: {value}."
    return f" {told}" if facts.hay == "novel" else f"{told}\n"


def _thing(kind: str, rng: random.Random) -> str:
    if kind == "word":
        return f"{rng.choice(needle_text.ADJECTIVES)}-{rng.choice(needle_text.NOUNS)}"
    if kind == "number":
        return str(rng.randrange(1_000_000, 10_000_000))
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _variables(prompts: Prompts, rng: random.Random) -> Text:
    """One chain of assignments in noise, after a short one that is answered."""
    example = _chain(prompts, rng)
    return _after_example(prompts, _chain(prompts, rng), example, 300, " ".join(example.answers))


def _chain(prompts: Prompts, rng: random.Random) -> Text:
    names = _distinct(lambda: "".join(rng.choices(string.ascii_uppercase, k=5)), HOPS + 1)
    value = str(rng.randrange(10_000, 100_000))
    sources = [value, *(f"VAR {name}" for name in names)]
    pairs = zip(names, sources, strict=False)
    needles = prompts.encode_each(f"VAR {name} = {source}\n" for name, source in pairs)
    depths = sorted(rng.random() for _ in needles)

    def fill(size: int) -> list[int]:
        noise, ends = prompts.haystack(NOISE_LINE, LINE_END)
        hay = run(noise, 0, max(0, size - sum(map(len, needles))))
        return hide(hay, ends, list(zip(depths, needles, strict=True)))

    return Text(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        " Answer: According to the chain(s) of variable assignment in the text above, "
        f"{len(names)} variables are assigned the value {value}, they are:",
        names,
        fill,
    )


def _common_words(prompts: Prompts, rng: random.Random, is_short: bool) -> Text:
    """A list of words after a shorter one that is answered."""
    words = rng.sample(_vocabulary(), len(_vocabulary()))
    others, *times = (10, 3, 1) if is_short else (30, 10, 3)
    shown, words = words[: COMMON + others], words[COMMON + others :]
    example = _word_list(prompts, rng, shown, *times)
    text = _word_list(prompts, rng, words, COMMON_TIMES, OTHER_TIMES)
    numbered = " ".join(f"{number}. {word}" for number, word in enumerate(example.answers, 1))
    return _after_example(prompts, text, example, 10_000, numbered)


@functools.cache
def _vocabulary() -> list[str]:
    return sorted(set(re.findall(r"\b[a-z]{4,10}\b", novel_text())))


@functools.cache
def _entries(prompts: Prompts) -> tuple[list[list[int]], dict[str, list[int]]]:
    """Tokens of " 1.", " 2." up to the longest list there can be, and of each word."""
    words = _vocabulary()
    most = COMMON * COMMON_TIMES + len(words) * OTHER_TIMES
    numbers = prompts.encode_each(f" {number}." for number in range(1, most + 1))
    return numbers, dict(zip(words, prompts.encode_each(f" {word}" for word in words), strict=True))


def _word_list(
    prompts: Prompts, rng: random.Random, words: list[str], common_times: int, other_times: int
) -> Text:
    """The first words stand `common_times` each, and as many others as it takes `other_times`."""
    common, others = words[:COMMON], words[COMMON:]

    of_number, of_word = _entries(prompts)
    numbers = [0, *itertools.accumulate(map(len, of_number))]
    first = common_times * sum(len(of_word[word]) for word in common)
    rest = [0, *itertools.accumulate(other_times * len(of_word[word]) for word in others)]

    def num_tokens(count: int) -> int:
        """Of a list with so many others."""
        return numbers[COMMON * common_times + count * other_times] + first + rest[count]

    def fill(size: int) -> list[int]:
        if num_tokens(0) > size:
            return []
        count = bisect.bisect_left(range(len(others)), size, key=num_tokens)
        listed = common * common_times + others[:count] * other_times
        rng.shuffle(listed)
        entries = (of_number[index] + of_word[word] for index, word in enumerate(listed))
        return list(itertools.chain(*entries))[:size]

    return Text(
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n",
        f"\nQuestion: What are the {COMMON} most common words in the above list?",
        f" Answer: The top {COMMON} words that appear most often in the list are:",
        common,
        fill,
    )


def _after_example(prompts: Prompts, text: Text, example: Text, size: int, answer: str) -> Text:
    """The text behind an example with at most `size` tokens of haystack, and its answer."""
    hay = prompts.tokenizer.decode(example.fill(size), clean_up_tokenization_spaces=False)
    shown = example.opening + hay + example.question + example.answer_opening
    answered = f"{shown} {answer}\n\n"
    return text._replace(opening=answered + text.opening)


def _frequent_words(prompts: Prompts, rng: random.Random) -> Text:
    """Made-up words, the k-th of which is as frequent as 1 / k^2; the first is only dots."""
    asked = _coded(rng, FREQUENT)

    def fill(size: int) -> list[int]:
        count = max(FREQUENT, size // TOKENS_PER_CODED - 1)
        words = ["....", *asked, *_coded(rng, count - FREQUENT)]
        tokens = prompts.encode_each(f" {word}" for word in words)
        total = math.pi**2 / 6

        def times(number: int) -> list[int]:
            return [int(number / rank**2 / total) for rank in range(1, len(words) + 1)]

        def num_tokens(number: int) -> int:
            return sum(n * len(t) for n, t in zip(times(number), tokens, strict=True))

        number = bisect.bisect_left(range(2 * size), size, key=num_tokens)
        text = [t for n, t in zip(times(number), tokens, strict=True) for _ in range(n)]
        rng.shuffle(text)
        return list(itertools.chain(*text))[:size]

    return Text(
        "Read the following coded text and track the frequency of each coded word. Find the three "
        "most frequently appeared coded words.",
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the "
        "three most frequently appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        asked,
        fill,
    )


def _coded(rng: random.Random, count: int) -> list[str]:
    return _distinct(lambda: "".join(rng.choices(string.ascii_lowercase, k=CODED_LEN)), count)


def _distinct(make: Callable[[], str], count: int) -> list[str]:
    made: dict[str, None] = {}
    while len(made) < count:
        made[make()] = None
    return list(made)


def _enough(prompts: Prompts, texts: Iterator[str], size: int) -> list[int]:
    """Tokens of as many texts as make up at least `size` tokens."""
    tokens: list[int] = []
    while len(tokens) < size:
        tokens += itertools.chain(*prompts.encode_each(itertools.islice(texts, 256)))
    return tokens
