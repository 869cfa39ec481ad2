"""python -m vllm_reattention layers: which layers of a model find facts, and so should select.

A layer that recalls what another selected sees a fact only if that one's heads look for it. The
model reads facts in noise, few enough tokens to attend to all of them; what of their attention its
layers spend on a fact while it is told tells who looks for it.
"""

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
        from transformers import AttentionInterface, AutoModelForCausalLM
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        self.attend = sdpa_attention_forward
        AttentionInterface.register("reattention_layers", self._attend)
        dtype = "auto" if device == "cuda" else torch.float32
        load = AutoModelForCausalLM.from_pretrained
        model = load(folder, dtype=dtype, attn_implementation="reattention_layers")
        self.model, self.device = model.to(device).eval(), device

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
        finds = torch.equal(logits.argmax(-1), tokens[0, -told.answer_len :])
        num_layers = self.model.config.num_hidden_layers
        return finds, torch.tensor([self.seen.get(layer, 0.0) for layer in range(num_layers)])

    def _attend(self, module, query, key, value, mask, scaling=None, **rest):
        """query [1, num_heads, length, head_size], key and value of KV heads"""
        fact, asked = self.told.fact, slice(-self.told.answer_len - 1, -1)
        group = query.shape[1] // key.shape[1]
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys = key.repeat_interleave(group, dim=1).float()
        logits = query[:, :, asked].float() @ keys.transpose(2, 3) * scale
        length = query.shape[2]
        at = torch.arange(length, device=query.device)
        logits.masked_fill_(at > at[asked, None], float("-inf"))
        on = logits.softmax(-1)[..., fact.start : fact.stop]
        self.seen[module.layer_idx] = float(on.sum(-1).mean(-1).sum())
        return self.attend(module, query, key, value, mask, scaling=scaling, **rest)


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
            f"the model must tell at least one of {len(prompts)} facts in {len(prompts[0].tokens)} "
            "tokens that it attends to, got none; leave select_layers out"
        )
    return torch.stack(masses).mean(0)


def choose(mass: Tensor, candidates: list[int], count: int) -> list[int]:
    """So many layers: the first that can select, and those whose attention on facts is most."""
    first, *others = candidates
    others.sort(key=lambda layer: -mass[layer])
    return sorted([first, *others[: count - 1]])


def report(folder: str, length: int = LENGTH, count: int = PROMPTS) -> str:
    """What to tell the user; loads the model."""
    model = Model(folder, "cuda" if torch.cuda.is_available() else "cpu")
    mass = measure(model, passkeys(folder, length, count))
    num_layers, candidates = len(mass), model.candidates
    usual = [n for n in ReAttentionConfig().selecting_layers(num_layers) if n in candidates]
    chosen = choose(mass, candidates, len(usual))
    most = float(mass.max())
    lines = ["layer  attention on facts, of all heads    d: selects by default, s: should select"]
    for layer, value in enumerate(mass.tolist()):
        marks = ("d" if layer in usual else " ") + ("s" if layer in chosen else "")
        lines.append(
            f"{layer:5}  {value:6.3f} {'=' * round(20 * value / most):20} {marks}".rstrip()
        )
    shares = [float(mass[layers].sum() / mass.sum()) for layers in (usual, chosen)]
    named = ", ".join(map(str, chosen))
    return "\n".join(
        [
            *lines,
            f"The layers that select by default have {shares[0]:.0%} of that attention, as many "
            f"others {shares[1]:.0%}:",
            f"""--additional-config '{{"reattention": {{"select_layers": [{named}]}}}}'""",
        ]
    )
