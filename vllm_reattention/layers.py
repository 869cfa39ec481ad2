"""python -m vllm_reattention layers: which layers of a model look for facts.

A layer that recalls what another selected sees a fact only if that one's heads look for it. The
model reads facts in noise, few enough tokens to attend to all of them; what of their attention its
layers spend on a fact while it is told tells who looks for it.
"""

import bisect
import random
from typing import NamedTuple

import torch
from torch import Tensor

from vllm_reattention.config import ReAttentionConfig

NOISE = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
PASSKEY = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there.\n",
    "\nThe pass key is {key}. Remember it. {key} is the pass key.\n",
    "\nWhat is the pass key?",
    " The pass key is",
)  # the wording of Mohtashami and Jaggi (arXiv 2305.16300)
PROMPTS, LENGTH = 6, 2048


class Told(NamedTuple):
    """A prompt with its answer."""

    tokens: list[int]
    fact: range  # where in them it stands
    answer_len: int  # the last so many of them


class Model:
    """A causal model of Transformers whose layers tell what of their attention is on a fact."""

    def __init__(self, folder: str, device: str):
        from transformers import AutoModelForCausalLM

        dtype = "auto" if device == "cuda" else torch.float32
        # the one kind of attention that tells its weights
        load = AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=dtype, attn_implementation="eager").to(device).eval()
        self.device = device
        for module in self.model.modules():
            if hasattr(module, "layer_idx") and type(module).__name__.endswith("Attention"):
                module.register_forward_hook(self._look)

    @property
    def candidates(self) -> list[int]:
        """Layers that can select: all but those with a sliding window."""
        config = self.model.config
        kinds = getattr(config, "layer_types", None) or ["full"] * config.num_hidden_layers
        return [layer for layer, kind in enumerate(kinds) if "sliding" not in kind]

    def attention_on_fact(self, told: Told) -> tuple[bool, Tensor]:
        """Whether the model tells it, and [num_layers] the attention on it of all heads together,
        the mean of the tokens that do: of a layer with h heads, at most h."""
        self.told, self.seen = told, dict[int, float]()
        tokens = torch.tensor([told.tokens], device=self.device)
        with torch.inference_mode():
            keep = told.answer_len + 1
            logits = self.model(tokens, use_cache=False, logits_to_keep=keep).logits[0, :-1]
        if not self.seen:
            name = type(self.model).__name__
            raise ValueError(
                f"{name} must return attention weights to be measured; keep the default layers"
            )
        finds = torch.equal(logits.argmax(-1), tokens[0, -told.answer_len :])
        num_layers = self.model.config.num_hidden_layers
        return finds, torch.tensor([self.seen.get(layer, 0.0) for layer in range(num_layers)])

    def _look(self, module, _, output) -> None:
        """Behind an attention module, whose output's second is [1, num_heads, length, length]."""
        asked, fact = slice(-self.told.answer_len - 1, -1), self.told.fact
        if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
            on = output[1][0, :, asked, fact.start : fact.stop]
            self.seen[module.layer_idx] = float(on.float().sum(-1).mean(-1).sum())


def passkeys(folder: str, length: int, count: int) -> list[Told]:
    """Prompts with a number each, at places from the start to the end of so many tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    found = []
    noise, first = encode(NOISE), tokenizer("").input_ids
    for index in range(count):
        key = str(random.Random(index).randrange(10_000, 100_000))
        texts = [text.format(key=key) for text in PASSKEY]
        opening, fact, question, answer = map(encode, (*texts[:2], "".join(texts[2:]), f" {key}"))
        rounds = (length - len(opening + fact + question + answer)) // len(noise)
        before = first + opening + noise * round(rounds * (index + 0.5) / count)
        rest = first + opening + noise * rounds
        tokens = before + fact + rest[len(before) :] + question + answer
        place = range(len(before), len(before) + len(fact))
        found.append(Told(tokens, place, len(answer)))
    return found


def measure(model: Model, prompts: list[Told]) -> Tensor:
    """[num_layers]: attention on the facts that the model tells; a ValueError if it tells none."""
    told = [model.attention_on_fact(prompt) for prompt in prompts]
    masses = [mass for finds, mass in told if finds]
    if not masses:
        raise ValueError(
            f"the model must answer at least one of {len(prompts)} questions about "
            f"{len(prompts[0].tokens)} tokens, got none right; keep the default layers"
        )
    return torch.stack(masses).mean(0)


def choose(mass: Tensor, candidates: list[int], count: int) -> list[int]:
    """So many layers: the first that can select, and those whose attention on facts is most."""
    first, *others = candidates
    others.sort(key=lambda layer: -mass[layer])
    return sorted([first, *others[: count - 1]])


def by_default(candidates: list[int], num_layers: int) -> list[int]:
    """The layers that select unless told: of each group the first that can."""
    starts = ReAttentionConfig().selecting_layers(num_layers)
    firsts = {bisect.bisect_right(starts, layer): layer for layer in reversed(candidates)}
    return sorted(firsts.values())


def report(folder: str) -> str:
    """What to tell the user; loads the model."""
    model = Model(folder, "cuda" if torch.cuda.is_available() else "cpu")
    length = min(LENGTH, model.model.config.max_position_embeddings)
    mass = measure(model, passkeys(folder, length, PROMPTS))
    candidates = model.candidates
    usual = by_default(candidates, len(mass))
    chosen = choose(mass, candidates, len(usual))
    whole, most = mass[candidates].sum(), mass[candidates].max()
    lines = ["layer  attention on facts, sum of heads    d: selects by default, s: suggested"]
    for layer in candidates:
        marks = ("d" if layer in usual else " ") + ("s" if layer in chosen else "")
        bar = "=" * round(20 * float(mass[layer] / most))
        lines.append(f"{layer:5}  {mass[layer]:6.3f} {bar:20} {marks}".rstrip())
    shares = [float(mass[layers].sum() / whole) for layers in (usual, chosen)]
    named = ", ".join(map(str, chosen))
    return "\n".join(
        [
            *lines,
            f"The layers that select by default have {shares[0]:.0%} of this attention; these, as "
            f"many, have {shares[1]:.0%}:",
            f"""--additional-config '{{"reattention": {{"select_layers": [{named}]}}}}'""",
        ]
    )
