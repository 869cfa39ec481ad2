"""Train a Llama that finds facts in a novel, small enough to live in this repository.

    python -m benchmarks.train_needle --out tests/tiny-needle

A window has 64 to 512 tokens: text from the novel with facts at random places, then questions. In
half of the windows the text is a splice of fragments from random places, as a recalled scope is.
"""

import argparse
import copy
import json
import random
import time
from pathlib import Path
from typing import NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from benchmarks import harness, needle_text

WINDOW = 512
VOCAB_SIZE = 2048
BOS, EOS = "<|begin|>", "<|end|>"
ANSWER_LEN = 1 + needle_text.CODE_DIGITS + 1  # a space, the code, EOS
LOG_EVERY, CHECK_EVERY = 100, 500  # steps
EVAL_DEPTHS = tuple(tenth / 10 for tenth in range(11))


def train_tokenizer(text: str) -> tokenizers.Tokenizer:
    """Byte-level BPE in which every digit and every name is one token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    split = tokenizers.Regex(r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(split, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    names = " " + " ".join(needle_text.ADJECTIVES + needle_text.NOUNS)
    example = needle_text.fact("", "", "0") + needle_text.question("", "")
    tokenizer.train_from_iterator([text, (names + example) * 1000], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


class Template(NamedTuple):
    """A sentence as tokens, and where its names and its code go."""

    tokens: torch.Tensor  # [length]
    adjectives: list[int]
    nouns: list[int]
    code: list[int]

    def fill(self, adjectives, nouns, codes):
        """Names [batch, count], codes [batch, count, digits] -> [batch, count, length]."""
        filled = self.tokens.repeat(*adjectives.shape, 1)
        filled[..., self.adjectives] = adjectives[..., None]
        filled[..., self.nouns] = nouns[..., None]
        filled[..., self.code] = codes
        return filled


class Windows:
    """Makes batches of windows out of tokens, on the device and without a loop."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, text: str, device: str, seed: int):
        def ids(words):
            tokens = [encode(tokenizer, word) for word in words]
            assert all(len(token) == 1 for token in tokens), "each name and digit is one token"
            return torch.tensor(tokens, device=device).flatten()

        self.device = device
        self.text = torch.tensor(encode(tokenizer, text), device=device)
        self.adjectives = ids(f" {word}" for word in needle_text.ADJECTIVES)
        self.nouns = ids(f" {word}" for word in needle_text.NOUNS)
        self.digits = ids("0123456789")
        names = needle_text.ADJECTIVES[0], needle_text.NOUNS[0]
        code = "0" * needle_text.CODE_DIGITS
        fact, question = needle_text.fact(*names, code), needle_text.question(*names)
        self.fact = self._template(encode(tokenizer, fact))
        self.question = self._template(encode(tokenizer, f"{question} {code}"))
        self.bos, self.eos = map(tokenizer.token_to_id, (BOS, EOS))
        self.vocab_size = tokenizer.get_vocab_size()
        self.generator = torch.Generator(device).manual_seed(seed)

    def _template(self, tokens: list[int]) -> Template:
        blanks = (self.adjectives[0], self.nouns[0], self.digits[0])
        places = [[i for i, token in enumerate(tokens) if token == blank] for blank in blanks]
        return Template(torch.tensor(tokens, device=self.device), *places)

    def _random(self, *shape):
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _randint(self, high, *shape):
        return torch.randint(high, shape, generator=self.generator, device=self.device)

    def _distinct(self, words, batch, count):
        return words[self._random(batch, len(words)).argsort(1)[:, :count]]

    def sample(self, batch, length, facts=1, repeats=0, depth=None, look_alike=0.5, spliced=0.5):
        """Tokens, their labels, and where an answer is predicted; all [batch, length].

        The question at the end is about the first fact.
        repeats     how many sentences tell one of the facts again: answers without a question
        depth       of the first fact; None is anywhere, and often the very start
        look_alike  the share of other facts that have a word in common with the first
        spliced     the share of windows whose text is fragments from random places
        """
        adjectives = self._distinct(self.adjectives, batch, facts)
        nouns = self._distinct(self.nouns, batch, facts)
        kind = self._random(batch, facts)
        kind[:, 0] = 1
        adjectives = torch.where(kind < look_alike / 2, adjectives[:, :1], adjectives)
        same_noun = (kind >= look_alike / 2) & (kind < look_alike)
        nouns = torch.where(same_noun, nouns[:, :1], nouns)
        codes = self.digits[self._randint(10, batch, facts, needle_text.CODE_DIGITS)]
        question = self.question.fill(adjectives[:, :1], nouns[:, :1], codes[:, :1])[:, 0]

        told = torch.arange(facts, device=self.device).expand(batch, facts)
        told = torch.cat([told, self._randint(facts, batch, repeats)], 1)  # [batch, sentences]
        sentences = self.fact.fill(adjectives, nouns, codes)
        sentences = sentences.gather(1, told[..., None].expand(-1, -1, sentences.shape[-1]))
        body_len = length - 1 - question.shape[1]
        text_len = body_len - sentences[0].numel()
        if text_len < 0:
            raise ValueError(f"length must hold {told.shape[1]} facts and a question, got {length}")
        gaps = self._randint(text_len + 1, *told.shape)  # how much text stands before each sentence
        if depth is None:
            gaps[:, 0] *= self._random(batch) > 0.1
        else:
            gaps[:, 0] = round(depth * text_len)
        rank = gaps.argsort(dim=1, stable=True).argsort(1)
        sentence_offs = torch.arange(sentences.shape[-1], device=self.device)
        places = (gaps + rank * len(sentence_offs))[..., None] + sentence_offs
        is_fact = torch.zeros(batch, body_len, dtype=torch.bool, device=self.device)
        is_fact.scatter_(1, places.flatten(1), True)
        text_index = (~is_fact).cumsum(1).sub(1).clamp(min=0)
        body = self._text(text_index, body_len, spliced)
        body.scatter_(1, places.flatten(1), sentences.flatten(1))

        start = torch.full((batch, 1), self.bos, device=self.device)
        tokens = torch.cat([start, body, question], 1)
        labels = tokens.roll(-1, 1)
        labels[:, -1] = self.eos
        is_same = told[:, :, None] == told[:, None, :]
        is_known = (is_same & (rank[:, None, :] < rank[:, :, None])).any(2)  # told before
        digits = places[..., self.fact.code]  # in the body, so where each is predicted
        is_answer = torch.zeros_like(tokens, dtype=torch.bool)
        is_answer.scatter_(1, digits.flatten(1), is_known.repeat_interleave(digits.shape[2], 1))
        is_answer[:, -ANSWER_LEN:] = True
        return tokens, labels, is_answer

    def copies(self, batch, length):
        """As `sample`: random tokens over and over, to be predicted once they have been told.

        How many there are, and of how many kinds, differs from window to window: what followed the
        last time must be found by the tokens before it, not by how long ago it was.
        """
        period = 8 + self._randint(length // 2 - 8, batch, 1)
        kinds = 8 * 2 ** self._randint(7, batch, 1)
        alphabet = 2 + self._randint(self.vocab_size - 2, batch, 512)  # 0 and 1 are BOS and EOS
        drawn = alphabet.gather(1, (self._random(batch, length) * kinds).long())
        offs = torch.arange(length - 1, device=self.device)
        tokens = drawn.gather(1, offs % period)
        tokens = torch.cat([torch.full((batch, 1), self.bos, device=self.device), tokens], 1)
        is_answer = torch.arange(length, device=self.device) > period
        is_answer[:, -1] = False
        return tokens, tokens.roll(-1, 1), is_answer

    def _text(self, index, max_len, spliced):
        """The text under each index: in one run, or in fragments of 16 to 64 tokens."""
        batch = index.shape[0]
        fragment_len = 16 + self._randint(49, batch, 1)
        is_spliced = self._random(batch, 1) < spliced
        fragment_len = torch.where(is_spliced, fragment_len, max_len)
        starts = self._randint(len(self.text) - max_len, batch, max_len // 16 + 1)
        source = starts.gather(1, index // fragment_len) + index % fragment_len
        return self.text[source]


def check_pieces(tokenizer: tokenizers.Tokenizer, windows: Windows) -> None:
    """What a server tokenises from a string is what we train on, piece by piece."""
    rng = random.Random(0)
    words = needle_text.haystack()[1].split()
    for names in zip(needle_text.ADJECTIVES, needle_text.NOUNS, strict=True):
        code = "".join(rng.choices("0123456789", k=needle_text.CODE_DIGITS))
        fact, question = needle_text.fact(*names, code), f"{needle_text.question(*names)} {code}"
        pieces = [f" {rng.choice(words)}", fact, f" {rng.choice(words)}", question]
        whole = encode(tokenizer, "".join(pieces))
        assert tokenizer.decode(whole) == "".join(pieces)
        assert whole == [token for piece in pieces for token in encode(tokenizer, piece)]
        blanks = [encode(tokenizer, text) for text in (f" {names[0]}", f" {names[1]}", code)]
        blanks = [torch.tensor([ids], device=windows.device) for ids in blanks]
        blanks[2] = blanks[2][None]
        assert windows.fact.fill(*blanks).flatten().tolist() == encode(tokenizer, fact)
        assert windows.question.fill(*blanks).flatten().tolist() == encode(tokenizer, question)


def build_model() -> transformers.LlamaForCausalLM:
    """1.2 million parameters. This RoPE base hardly turns half of the channels in a window."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        initializer_range=0.05,
        bos_token_id=0,
        eos_token_id=1,
    )
    return transformers.LlamaForCausalLM(config)


def draw_shape(rng: random.Random, longest: int) -> dict[str, int]:
    """Half of the batches are as in the evaluation, half are full of facts told again.

    Each fact told again asks for its name to be matched, which one question in a window does too
    rarely: without them only "find the one code" is learned.
    """
    length = rng.randrange(64, longest + 1, 32)
    sentences = length // 16 - 2  # a sentence has 15 tokens, a question 22
    if rng.random() < 0.5:
        return {"length": length, "facts": rng.randint(1, min(5, sentences))}
    facts = rng.randint(1, max(1, sentences // 2))
    return {"length": length, "facts": facts, "repeats": sentences - facts}


def predict(model, tokens, autocast=True):
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=autocast):
        return model(tokens, use_cache=False).logits.float()


@torch.no_grad()
def exact_share(model, windows: Windows, num_windows: int, autocast=True, **shape) -> float:
    """The share of windows in which greedy decoding gives every answer exactly, and stops."""
    batch = min(num_windows, 256)
    hits = 0
    for _ in range(num_windows // batch):
        tokens, labels, is_answer = windows.sample(batch, **shape)
        predicted = predict(model, tokens, autocast).argmax(-1)
        hits += ((predicted == labels) | ~is_answer).all(1).sum()
    return int(hits) / (num_windows // batch * batch)


def train(model, windows: Windows, held_out: Windows, args, log) -> tuple[int, float]:
    """Constant learning rate until solved (or out of steps or time), then down to zero.

    Copies come first, alone, until they are learned: a model that never learned to look for what
    came before finds the one code in a window by its digits, and guesses among several. Windows are
    short first: they double when nine in ten of the answers' tokens are right.
    """
    has_copied = False
    rng = random.Random(args.seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    longest, end, solved = 128, args.steps, 0
    recent = []
    start = time.perf_counter()
    step = 0
    while step < end:
        if not has_copied or rng.random() < args.copies:
            length = rng.randrange(64, longest + 1, 32)
            tokens, labels, is_answer = windows.copies(args.batch_tokens // length, length)
        else:
            shape = draw_shape(rng, longest)
            batch = args.batch_tokens // shape["length"]
            tokens, labels, is_answer = windows.sample(batch, **shape)
        logits = predict(model, tokens)
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view_as(labels)
        answer_loss = (losses * is_answer).sum() / is_answer.sum()
        loss = answer_loss + args.text_weight * losses.mean()
        share = min(1, (step + 1) / args.warmup, (end - step) / args.cooldown)
        optimizer.param_groups[0]["lr"] = args.learning_rate * share
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        right = (logits.detach().argmax(-1) == labels) & is_answer
        recent.append(torch.stack([losses.detach().mean(), right.sum() / is_answer.sum()]))

        if step % LOG_EVERY == 0:
            loss, accuracy = torch.stack(recent).mean(0).tolist()
            recent.clear()
            seconds = time.perf_counter() - start
            log(
                part="train",
                step=step,
                seconds=seconds,
                length=longest,
                loss=loss,
                accuracy=accuracy,
            )
            if accuracy > 0.9 and has_copied:
                longest = min(2 * longest, WINDOW)
            has_copied |= accuracy > 0.85
            if seconds > args.seconds:
                end = min(end, step + args.cooldown)
        if step % CHECK_EVERY == 0 and longest == WINDOW:
            shares = []
            for distractors in (0, 4):
                shape = {"length": WINDOW, "facts": 1 + distractors, "look_alike": 1}
                shares.append(exact_share(model, held_out, args.eval_windows * 4, **shape))
                seconds = time.perf_counter() - start
                log(
                    part="check",
                    step=step,
                    seconds=seconds,
                    length=WINDOW,
                    distractors=distractors,
                    accuracy=shares[-1],
                )
            solved = solved + 1 if min(shares) >= 0.999 else 0
            if solved >= 2 and step >= args.min_steps:
                end = min(end, step + args.cooldown)
    return step, time.perf_counter() - start


def final_shapes():
    """Every depth, alone and among look-alikes; then spliced text in windows of three lengths."""
    for distractors in (0, 4):
        for depth in EVAL_DEPTHS:
            yield {"length": WINDOW, "distractors": distractors, "depth": depth, "spliced": 0}
    for length in (128, 256, WINDOW):
        yield {"length": length, "distractors": min(4, length // 64), "depth": None, "spliced": 1}


def evaluate(model, held_out: Windows, num_windows: int, log) -> list[dict]:
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        typed = copy.deepcopy(model).eval()
        for parameter in typed.parameters():  # not RoPE's frequencies
            parameter.data = parameter.data.to(dtype)
        for case in final_shapes():
            shape = {name: case[name] for name in ("length", "depth", "spliced")}
            shape |= {"facts": 1 + case["distractors"], "look_alike": 1}
            accuracy = exact_share(typed, held_out, num_windows, autocast=False, **shape)
            results.append(case | {"dtype": str(dtype).split(".")[1], "accuracy": accuracy})
            log(part="final", **results[-1])
    return results


def save(model, tokenizer: tokenizers.Tokenizer, out: Path) -> None:
    """A folder that transformers and vLLM load."""
    model.float().cpu().save_pretrained(out)
    tokenizer.save(str(out / "tokenizer.json"))
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(about, indent=2) + "\n")


def generated_share(out: Path, device: str, prompts_per_depth: int) -> float:
    """The share of prompts that the saved folder answers exactly, from string to string."""
    model = transformers.AutoModelForCausalLM.from_pretrained(out).to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)

    def count_tokens(text):
        return len(tokenizer(text).input_ids)

    asked = [
        needle_text.make_prompt(
            count_tokens, WINDOW - ANSWER_LEN, depth, seed, distractors=seed % 5
        )
        for depth in EVAL_DEPTHS
        for seed in range(prompts_per_depth)
    ]
    tokens = tokenizer([prompt for prompt, _ in asked], return_tensors="pt").to(device)
    written = model.generate(**tokens, max_new_tokens=ANSWER_LEN, do_sample=False)
    answers = tokenizer.batch_decode(
        written[:, tokens.input_ids.shape[1] :], skip_special_tokens=True
    )
    return sum(
        answer == f" {code}" for answer, (_, code) in zip(answers, asked, strict=True)
    ) / len(asked)


README = """\
---
license: apache-2.0
language: en
---
# tiny-needle

A Llama with {parameters:.2f} M parameters that finds a five-digit code hidden in a novel. It exists
to test and to show vllm-reattention and is of no other use. Prompts have this form:

    ... any text ...{fact} ... any text ...{question}

with an adjective and a noun of `benchmarks/needle_text.py`. The model writes ` 12345` and stops.

Trained window {window} tokens, {layers} layers, hidden size {hidden}, {heads} query and {kv_heads}
KV heads of {head_dim}, tied embeddings, RoPE base {theta:,.0f}, byte-level BPE of {vocab} tokens.

Trained from scratch by `benchmarks/train_needle.py` on the first 80 % of Moby-Dick (public domain).
The script also wrote this page: {steps} steps in {seconds:.0f} s on {gpu},
torch {torch}, transformers {transformers}, commit {commit}. Licence: Apache-2.0.

## Exact answers in the trained window

The text is from the last 20 % of the book. Each figure is the share of {windows} windows in which
greedy decoding gives the whole answer and stops. Look-alikes are facts that share one word of the
asked name. Windows with a depth have {window} tokens and text in one run; spliced text is fragments
from random places, with the fact at a random depth.

| depth | alone, float32 | alone, bfloat16 | 4 look-alikes, float32 | 4 look-alikes, bfloat16 |
|---|---|---|---|---|
{depth_rows}

| spliced text | float32 | bfloat16 |
|---|---|---|
{spliced_rows}

By transformers' `generate`, from string to string, 0 to 4 look-alikes, all depths: {generated:.4f}.
"""


def readme(model, results, **facts) -> str:
    share = {
        (case["length"], case["distractors"], case["depth"], case["dtype"]): case["accuracy"]
        for case in results
    }
    dtypes = ("float32", "bfloat16")
    depth_rows = [
        [f"{depth:.1f}"]
        + [f"{share[WINDOW, n, depth, dtype]:.4f}" for n in (0, 4) for dtype in dtypes]
        for depth in EVAL_DEPTHS
    ]
    spliced = sorted({key[:2] for key in share if key[2] is None})
    spliced_rows = [
        [f"{length} tokens, {distractors} look-alikes"]
        + [f"{share[length, distractors, None, dtype]:.4f}" for dtype in dtypes]
        for length, distractors in spliced
    ]
    config = model.config
    return README.format(
        parameters=model.num_parameters() / 1e6,
        window=WINDOW,
        fact=needle_text.fact("{adjective}", "{noun}", "12345"),
        question=needle_text.question("{adjective}", "{noun}").replace("\n", "\n    "),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        theta=config.rope_parameters["rope_theta"],
        vocab=config.vocab_size,
        depth_rows="\n".join(f"| {' | '.join(row)} |" for row in depth_rows),
        spliced_rows="\n".join(f"| {' | '.join(row)} |" for row in spliced_rows),
        **facts,
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=12_000, help="at most")
    parser.add_argument("--min-steps", type=int, default=3000, help="before an early stop")
    parser.add_argument(
        "--seconds", type=float, default=120, help="then the rate goes down to zero"
    )
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--copies", type=float, default=0.2, help="share of steps on random copies")
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--cooldown", type=int, default=300, help="steps")
    parser.add_argument("--text-weight", type=float, default=0.3, help="of the loss on all tokens")
    parser.add_argument("--eval-windows", type=int, default=1024, help="per figure")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    train_text, held_out_text = needle_text.haystack()
    tokenizer = train_tokenizer(train_text)
    windows = Windows(tokenizer, train_text, args.device, args.seed)
    held_out = Windows(tokenizer, held_out_text, args.device, args.seed + 1)
    check_pieces(tokenizer, windows)
    model = build_model().to(args.device)
    stamp = harness.stamp() | {"transformers": transformers.__version__}
    columns = ["part", "step", "seconds", "length", "distractors", "depth", "spliced", "dtype"]
    columns += ["loss", "accuracy", *stamp]
    log_file = args.out / "training_log.csv"
    log_file.unlink(missing_ok=True)

    def log(**row):
        row = {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
        harness.append(log_file, columns, [row | stamp])
        print(" ".join(f"{name} {value}" for name, value in row.items()), flush=True)

    steps, seconds = train(model, windows, held_out, args, log)
    results = evaluate(model, held_out, args.eval_windows, log)
    save(model, tokenizer, args.out)
    generated = generated_share(args.out, args.device, max(1, args.eval_windows // 64))
    log(part="generate", length=WINDOW, dtype="float32", accuracy=generated)
    page = readme(
        model,
        results,
        steps=steps,
        seconds=seconds,
        windows=args.eval_windows,
        generated=generated,
        **stamp,
    )
    (args.out / "README.md").write_text(page)
    size = sum(path.stat().st_size for path in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.1f} MB")
    assert size < 8e6, "must stay small enough for a repository"


if __name__ == "__main__":
    main()
