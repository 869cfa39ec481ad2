"""Tiny models with random weights, one for every way a model rotates. No network, no tokenizer.

python -m tests.make_models FOLDER [NAME ...]

They are the rows of the README's table of models; without a FOLDER it is written anew.
"""

import json
import re
import sys
from pathlib import Path

import safetensors.torch
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from benchmarks import prompts

README = Path(__file__).parent.parent / "README.md"
TABLE = re.compile(r"\| rotary embedding .*\n(\|.*\n)+")  # in it
WINDOW = 512  # positions every model is "trained" on
SIZES = dict(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=WINDOW,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
)
GPT_SIZES = dict(vocab_size=512, bos_token_id=1, eos_token_id=2)
ALTERNATING = dict(sliding_window=48, layer_types=["sliding_attention", "full_attention"])
REFUSED = "refused"
YARN = dict(factor=4.0, original_max_position_embeddings=WINDOW // 4)


def rope(kind: str, theta: float = 1e4, **rest) -> dict:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **rest))


def _llama3():
    return rope("llama3", **YARN, low_freq_factor=1.0, high_freq_factor=4.0)


def _longrope():
    short = [1.0 + 0.1 * i for i in range(16)]
    long = [1.0 + 0.5 * i for i in range(16)]
    original = dict(original_max_position_embeddings=WINDOW // 4)
    return rope("longrope", **original, short_factor=short, long_factor=long) | original


def _gemma3():
    full = dict(rope_type="linear", factor=8.0, rope_theta=1e6)
    return dict(
        rope_parameters=dict(
            full_attention=full, sliding_attention=dict(rope_type="default", rope_theta=1e4)
        )
    )


# By what the README's table calls their rotary embedding, then by name: what the table calls the
# model, its configuration class, what differs from SIZES
KINDS = {
    "plain": {
        "llama": ("Llama", "LlamaConfig", {}),
        "mistral": ("Mistral", "MistralConfig", dict(sliding_window=None)),
        "qwen2": ("Qwen2", "Qwen2Config", dict(hidden_size=128)),
        "qwen3": ("Qwen3", "Qwen3Config", {}),
        "qwen3moe": (
            "Qwen3-MoE",
            "Qwen3MoeConfig",
            dict(
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=64,
                decoder_sparse_step=1,
            ),
        ),
        "granite": ("Granite", "GraniteConfig", dict(attention_multiplier=0.2)),
    },
    "Llama 3": {"llama3rope": ("Llama", "LlamaConfig", _llama3())},
    "YaRN": {"yarn": ("Llama", "LlamaConfig", rope("yarn", **YARN))},
    "dynamic NTK": {"dynamic_ntk": ("Llama", "LlamaConfig", rope("dynamic", factor=2.0))},
    "longrope": {"longrope": ("Phi-3", "Phi3Config", dict(hidden_size=128) | _longrope())},
    "partial and interleaved": {
        "glm4": ("GLM-4", "Glm4Config", dict(partial_rotary_factor=0.5)),
        "gptj": (
            "GPT-J",
            "GPTJConfig",
            dict(n_embd=128, n_layer=2, n_head=4, n_positions=WINDOW, rotary_dim=16),
        ),
    },
    "with sliding-window layers (served exactly, with no selection)": {
        "gemma2": (
            "Gemma 2",
            "Gemma2Config",
            dict(tie_word_embeddings=True, sliding_window=48, query_pre_attn_scalar=32),
        ),
        "gemma3": (
            "Gemma 3",
            "Gemma3TextConfig",
            dict(query_pre_attn_scalar=32) | ALTERNATING | _gemma3(),
        ),
        "cohere2": ("Cohere 2", "Cohere2Config", dict(tie_word_embeddings=True) | ALTERNATING),
        "exaone4": ("EXAONE 4", "Exaone4Config", dict(sliding_window_pattern="LG") | ALTERNATING),
    },
    "with attention sinks and sliding windows": {
        "gptoss": (
            "gpt-oss",
            "GptOssConfig",
            dict(num_local_experts=4, num_experts_per_tok=2)
            | ALTERNATING
            | rope("yarn", 1.5e5, **YARN, beta_fast=32.0, beta_slow=1.0, truncate=False),
        ),
    },
    "through vLLM's Transformers backend": {
        "smollm3": ("SmolLM3 (NoPE layers)", "SmolLM3Config", dict(no_rope_layers=[1, 0])),
        "olmo2": ("OLMo 2", "Olmo2Config", {}),
        "gptneox": (
            "GPT-NeoX",
            "GPTNeoXConfig",
            dict(
                hidden_size=128,
                intermediate_size=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=WINDOW,
                rotary_pct=0.25,
            ),
        ),
    },
    REFUSED: {
        "hunyuan": (
            "HunYuan (norms after the rotation)",
            "HunYuanDenseV1Config",
            dict(use_qk_norm=True),
        ),
        "bloom": ("BLOOM (ALiBi)", "BloomConfig", dict(hidden_size=128, n_layer=2, n_head=4)),
        "deepseek": (
            "DeepSeek-V2 (MLA)",
            "DeepseekV2Config",
            dict(
                kv_lora_rank=32,
                q_lora_rank=None,
                qk_nope_head_dim=32,
                qk_rope_head_dim=32,
                v_head_dim=32,
                first_k_dense_replace=2,
                n_routed_experts=4,
            ),
        ),
        "mrope": ("Qwen2 with mRoPE", "Qwen2Config", rope("default", mrope_section=[4, 6, 6])),
    },
}
MODELS = {name: model for kind in KINDS.values() for name, model in kind.items()}


def configuration(name: str) -> PreTrainedConfig:
    _, class_name, different = MODELS[name]
    sizes = GPT_SIZES if class_name in ("GPTJConfig", "GPTNeoXConfig", "BloomConfig") else SIZES
    return getattr(transformers, class_name)(**(sizes | different))


@torch.no_grad()
def make(name: str, folder: Path) -> Path:
    """Weights larger than usual, so that attention is sharp and a wrong rotation shows."""
    path = folder / name
    if (path / "config.json").exists():
        return path
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(configuration(name), dtype=torch.float32)
    for weight, parameter in model.named_parameters():
        sharp = any(part in weight for part in ("q_proj", "k_proj", "qkv", "query_key_value"))
        if parameter.dim() > 1:
            parameter.normal_(std=0.6 if sharp else 0.15)
        elif "norm" in weight:
            parameter.normal_(mean=1, std=0.3)
        elif weight.endswith("k_proj.bias"):  # large where Qwen2.5's is: in what turns least
            half = SIZES["head_dim"] // 2
            parameter.view(-1, 2, half)[..., -1] = 300.0
        elif weight.endswith("query_key_value.bias"):  # of GPT-NeoX: each head's three in a row
            parameter.view(-1, 3, SIZES["head_dim"])[:, 1, -1] = 300.0
    model.save_pretrained(path)
    return path


@torch.no_grad()
def make_adapter(model: Path) -> tuple[Path, Path]:
    """A LoRA adapter of a model's queries and values; and the model with it merged in."""
    adapter, merged = model.with_name("adapter"), model.with_name("merged")
    if adapter.exists():
        return adapter, merged
    random, rank = torch.Generator().manual_seed(0), 4
    whole = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    weights = {}
    for name, parameter in whole.named_parameters():
        if "q_proj" not in name and "v_proj" not in name:
            continue
        rows, columns = parameter.shape
        down, up = (torch.randn(s, generator=random) for s in ((rank, columns), (rows, rank)))
        path = f"base_model.model.{name.removesuffix('.weight')}"
        weights |= {f"{path}.lora_A.weight": down / 8, f"{path}.lora_B.weight": up / 8}
        parameter += up @ down / 64
    whole.save_pretrained(merged)
    adapter.mkdir()
    safetensors.torch.save_file(weights, adapter / "adapter_model.safetensors")
    about = dict(peft_type="LORA", r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"])
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    return adapter, merged


def make_tokenizer(path: Path) -> None:
    prompts.make_tokenizer(path, SIZES["vocab_size"])


def readme_table() -> str:
    rows = [(kind, ", ".join(shown for shown, *_ in KINDS[kind].values())) for kind in KINDS]
    lines = [f"| {kind} | {models} |\n" for kind, models in rows]
    return "".join(["| rotary embedding | tested with |\n", "|---|---|\n", *lines])


if __name__ == "__main__":
    folder, *names = sys.argv[1:] or [""]
    if not folder:
        README.write_text(TABLE.sub(lambda _: readme_table(), README.read_text()))
        sys.exit()
    for model_name in names or MODELS:
        print(make(model_name, Path(folder)))
