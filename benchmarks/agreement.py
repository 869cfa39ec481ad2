"""Do engines of one model agree? In what they write, and in log probabilities.

Benchmarks of retrieval hardly notice a small error; these figures do. needle.py is the command.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from benchmarks import engines, harness
from benchmarks.prompts import ANSWER_LEN, Prompt

COLUMNS = ["model", "provider", "context_len", "metric", "value"]
COLUMNS += ["gpu", "torch", "triton", "vllm", "commit"]
TABLE = harness.RESULTS / "logprobs.csv"
TOP = 10  # log probabilities told for a place, the most likely tokens


class Variant(NamedTuple):
    """What is changed in the engine, and what it is called each time it is asked. Asked again
    without a change, an engine shows how much of a difference is its batching.
    """

    changed: dict[str, Any]
    names: tuple[str, ...]
    before: float = 0.0  # so much of each prompt is asked first, which the whole then continues


VARIANTS = [
    Variant({"enable_prefix_caching": False}, ("graphs", "graphs again")),
    Variant({"enable_prefix_caching": False, "enforce_eager": True}, ("eager",)),
    Variant({"enable_prefix_caching": False, "max_num_batched_tokens": 512}, ("chunk 512",)),
    Variant({"enable_prefix_caching": True}, ("prefix cache", "prefix cache again")),
    Variant({"enable_prefix_caching": True}, ("continued",), before=0.7),
]


class Answer(NamedTuple):
    text: str
    first: dict[int, float]  # log probabilities of the likeliest first tokens
    cached: int  # tokens of the prompt that were in the prefix cache


def answers_of_variants(
    chosen: dict[str, Any], prompts: list[Prompt], deadline: float
) -> Iterator[tuple[str, list[Answer]]]:
    """What each variant of an engine answers, by name; the first is what others compare to.

    Engines whose memory is fixed run side by side.
    """
    if chosen.get("kv_cache_memory_bytes"):
        with ThreadPoolExecutor(len(VARIANTS)) as threads:
            running = [
                (variant, threads.submit(engines.apart, ask, chosen, prompts, variant))
                for variant in VARIANTS
            ]
            for variant, answers in running:
                yield from zip(variant.names, answers.result(), strict=True)
        return
    for variant in engines.in_time(VARIANTS, lambda _: 1, deadline):
        answers = engines.apart(ask, chosen, prompts, variant)
        yield from zip(variant.names, answers, strict=True)


def ask(chosen: dict[str, Any], prompts: list[Prompt], variant: Variant) -> list[list[Answer]]:
    """A variant's answers to all prompts, each time it is asked."""
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=ANSWER_LEN, logprobs=TOP)
    with engines.engine(**chosen | variant.changed) as llm:
        if variant.before:
            parts = [
                p._replace(tokens=p.tokens[: int(len(p.tokens) * variant.before)]) for p in prompts
            ]
            llm.generate(as_tokens(parts), SamplingParams(max_tokens=1), use_tqdm=False)
        rounds = [llm.generate(as_tokens(prompts), greedy, use_tqdm=False) for _ in variant.names]
    return [[_answer(out) for out in outs] for outs in rounds]


def as_tokens(prompts: list[Prompt]) -> list[dict]:
    return [{"prompt_token_ids": prompt.tokens} for prompt in prompts]


def _answer(out) -> Answer:
    written = out.outputs[0]
    return Answer(written.text, _logprobs(written.logprobs[0]), out.num_cached_tokens or 0)


def _logprobs(place: dict) -> dict[int, float]:
    return {token: told.logprob for token, told in place.items()}


def compare(pairs: list[tuple[Answer, Answer]]) -> dict[str, float]:
    """How the first and the second of each pair agree, and what of the second was cached."""
    differences = (
        abs(a.first[token] - b.first[token]) for a, b in pairs for token in a.first.keys() & b.first
    )
    return {
        "same text": sum(a.text == b.text for a, b in pairs) / len(pairs),
        "max |d logprob| of first token": max(differences, default=math.nan),
        "mean cached prompt tokens": sum(b.cached for _, b in pairs) / len(pairs),
    }


def record(shared: dict, figures: dict[str, float]) -> None:
    """Print and write figures of one length."""
    told = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"{shared['model']} {shared['provider']} {shared['context_len']}: {told}", flush=True)
    columns = {name: shared[name] for name in COLUMNS if name in shared}
    harness.append(
        TABLE,
        COLUMNS,
        [columns | {"metric": name, "value": f"{v:.6g}"} for name, v in figures.items()],
    )


class Told(NamedTuple):
    """Log probabilities that one run tells of a text: of its own tokens, and the likeliest ones."""

    place: list[int]
    token: list[int]
    logprob: list[float]
    own: list[float]  # of the text's own tokens
    likeliest: list[int]  # token at each place


def prompt_logprobs(chosen: dict[str, Any], texts: list[list[int]]) -> list[Told]:
    """As a vLLM engine tells them, of each text from its second token on."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=TOP)
    prompts = [{"prompt_token_ids": text} for text in texts]
    with engines.engine(**chosen) as llm:
        outs = llm.generate(prompts, params, use_tqdm=False)
        return [_told(text, out.prompt_logprobs[1:]) for text, out in zip(texts, outs, strict=True)]


def _told(text: list[int], places: list[dict]) -> Told:
    places = [_logprobs(place) for place in places]
    entries = [(i, token, value) for i, at in enumerate(places) for token, value in at.items()]
    own = [at[token] for at, token in zip(places, text[1:], strict=True)]
    return Told(*map(list, zip(*entries, strict=True)), own, [max(at, key=at.get) for at in places])


def float32_logprobs(model: str, texts: list[list[int]], asked: list[list[Told]]):
    """What transformers tells in float32 of the places and tokens that each run told of.

    Returns per text: per run log probabilities; of the text's own tokens; the likeliest tokens.
    """
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    results = []
    for index, text in enumerate(texts):
        tokens = torch.tensor([text], device=device)
        with torch.inference_mode():
            told = network(tokens, use_cache=False).logits[0, :-1].log_softmax(-1)
        own = told.gather(1, tokens[0, 1:, None])[:, 0].tolist()
        runs = [told[run[index].place, run[index].token].tolist() for run in asked]
        results.append((runs, own, told.argmax(-1).tolist()))
    return results


def compare_to_float32(
    model: str, runs: dict[str, dict[str, Any]], texts: list[list[int]]
) -> list[dict[str, dict[str, float]]]:
    """Figures per text of float32 and of each run: its name, and what it asks of vLLM."""
    asked = [engines.apart(prompt_logprobs, chosen, texts) for chosen in runs.values()]
    results = []
    for index, (theirs, own, likeliest) in enumerate(
        engines.apart(float32_logprobs, model, texts, asked)
    ):
        figures = {"float32": {"loss": -sum(own) / len(own)}}
        for name, told, exact in zip(runs, asked, theirs, strict=True):
            run = told[index]
            errors = [abs(a - b) for a, b in zip(run.logprob, exact, strict=True)]
            same = sum(a == b for a, b in zip(run.likeliest, likeliest, strict=True))
            figures[name] = {
                "mean |d logprob|": sum(errors) / len(errors),
                "max |d logprob|": max(errors),
                "same likeliest token": same / len(likeliest),
                "loss": -sum(run.own) / len(run.own),
            }
        results.append(figures)
    return results
