"""The needle task as text: facts hidden in a novel, and a question about one of them.

Shared by training, demo, evaluation and tests. All white space of a haystack is single spaces, so
words and facts can be joined anywhere and neither changes how the other is tokenised.
"""

import functools
import itertools
import random
from collections.abc import Callable
from pathlib import Path

MOBY_DICK = Path(__file__).parent / "data" / "moby-dick.txt"
EVALUATION_SHARE = 0.2  # the end of the text, never trained on
CODE_DIGITS = 5

ADJECTIVES = str.split("""
    amber ancient arctic bitter bronze calm chilly clever copper cosmic crimson curly dusty
    eager emerald fancy fierce floral fluffy frozen fuzzy gentle glossy golden grumpy hasty
    hollow humble icy jolly lazy lively lucky lunar magic mellow mighty misty modern muddy
    nimble noisy orange plastic polite purple quiet rapid rusty scarlet shiny silent silver
    simple sleepy smooth solar spicy sturdy sunny tiny velvet violet wooden
""")
NOUNS = str.split("""
    acorn anchor badger balloon bamboo beacon beaver bicycle blanket bottle bridge cactus camera
    candle canyon carpet castle cheese comet compass cookie cradle crystal desert dragon falcon
    feather fiddle forest fountain garden guitar hammer harbor helmet igloo jacket kettle kitten
    ladder lantern lemon magnet marble meadow mirror monkey needle octopus orchid otter oyster
    panda parrot pebble pencil pepper pillow planet pumpkin rabbit ribbon robot rocket
""")


def fact(adjective: str, noun: str, code: str) -> str:
    return f" The secret code of the {adjective} {noun} is {code}."


def question(adjective: str, noun: str) -> str:
    """What the model completes with a space and the code."""
    return f"\nQuestion: What is the secret code of the {adjective} {noun}?\nAnswer:"


@functools.cache
def haystack(path: Path = MOBY_DICK) -> tuple[str, str]:
    """The book without its publisher's notices, in two parts: to train on and to evaluate on."""
    book = path.read_text(encoding="utf-8").split("***")[2]
    words = book.split()
    cut = round(len(words) * (1 - EVALUATION_SHARE))
    return " " + " ".join(words[:cut]), " " + " ".join(words[cut:])


def make_prompt(
    count_tokens: Callable[[str], int],
    context_len: int,
    depth: float,
    seed: int,
    distractors: int = 0,
) -> tuple[str, str]:
    """A prompt of exactly `context_len` tokens and the code that answers it.

    count_tokens  how many tokens the server sees for a text, those it adds itself (BOS) included
    depth         where the asked fact stands: 0 at the start of the haystack, 1 at its end
    distractors   facts about other names, at random depths; they share a word with the asked name
    """
    rng = random.Random(seed)
    adjective, *adjectives = rng.sample(ADJECTIVES, 1 + distractors)
    noun, *nouns = rng.sample(NOUNS, 1 + distractors)
    codes = [f"{rng.randrange(10**CODE_DIGITS):0{CODE_DIGITS}}" for _ in range(1 + distractors)]
    needles = [(depth, fact(adjective, noun, codes[0]))]
    for index, code in enumerate(codes[1:]):
        names = (adjective, nouns[index]) if index % 2 == 0 else (adjectives[index], noun)
        needles.append((rng.random(), fact(*names, code)))
    asked = question(adjective, noun)

    added = count_tokens("")
    budget = context_len - added
    budget -= sum(count_tokens(text) - added for text in (asked, *(text for _, text in needles)))
    if budget < 0:
        raise ValueError(f"context_len must hold the facts and the question, got {context_len}")

    words = _words(count_tokens, budget, rng)
    num_words = len(words)
    needles.sort(reverse=True)  # from the end, so that earlier places stay valid
    for place, text in needles:
        words.insert(round(place * num_words), text)
    prompt = "".join(words) + asked
    if count_tokens(prompt) != context_len:
        raise ValueError(f"tokens must not cross words, got {count_tokens(prompt)}/{context_len}")
    return prompt, codes[0]


def _words(count_tokens: Callable[[str], int], budget: int, rng: random.Random) -> list[str]:
    """Words of the evaluation part from a random place, repeated if need be, that fill the budget.

    The last few are those that fit: a word that would go over is skipped.
    """
    text = [" " + word for word in haystack()[1].split()]
    added = count_tokens("")
    cost_of = functools.cache(lambda word: count_tokens(word) - added)
    words = []
    for word in itertools.islice(itertools.cycle(text), rng.randrange(len(text)), None):
        if budget == 0:
            return words
        if cost_of(word) <= budget:
            words.append(word)
            budget -= cost_of(word)
