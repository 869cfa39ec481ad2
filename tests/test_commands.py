"""plan and doctor: what they promise is so, and what is wrong is said."""

import json
import re
from importlib.metadata import PackageNotFoundError

import pytest

pytest.importorskip("vllm")

from tests import engines
from tests.make_models import make

pytestmark = pytest.mark.vllm
LLAMA_8B = dict(
    architectures=["LlamaForCausalLM"],
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=131072,
    torch_dtype="bfloat16",
    tie_word_embeddings=False,
)
GEMMA = dict(
    architectures=["Gemma3ForCausalLM"],
    model_type="gemma3_text",
    hidden_size=1024,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    sliding_window=512,
    max_position_embeddings=32768,
    torch_dtype="bfloat16",
)


@pytest.fixture
def plan(engine, tmp_path):
    """Exit status and text of `plan` for a model of this configuration."""

    def call(config: dict, *words) -> tuple[int, str]:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return engine(engines.command, "plan", tmp_path, *words)

    return call


def test_plan_adds_up(plan):
    status, text = plan(LLAMA_8B, "--max-model-len", 2**20, "--gpu-memory", 141)
    assert "KV cache  132.0 KiB per token, of which 4.0 are summaries" in text
    assert "request   132.0 GiB for 1,048,576 tokens" in text
    assert "weights   15.0 GiB" in text  # 8.03 G parameters, counted with no file to look at
    assert status == 1 and "DOES NOT FIT" in text and "vllm serve" not in text
    assert "--kv-cache-dtype fp8" in text and "--gpus 2" in text


def test_what_plan_proposes_fits(plan):
    _, text = plan(LLAMA_8B, "--max-model-len", 2**20, "--gpu-memory", 141)
    ways = re.search("what fits: (.*)", text).group(1).split("; or ")
    assert len(ways) == 3
    for way in ways:
        flags = dict(zip(way.split()[::2], way.split()[1::2], strict=True))
        flags = {"--max-model-len": str(2**20), "--gpu-memory": "141"} | flags
        status, text = plan(LLAMA_8B, *(word for pair in flags.items() for word in pair))
        assert status == 0 and re.search(r"^fits +\d", text, re.MULTILINE)
        assert f"--attention-backend reattention --max-model-len {flags['--max-model-len']}" in text
    longest = int(ways[0].split()[1])
    assert plan(LLAMA_8B, "--max-model-len", longest * 101 // 100, "--gpu-memory", 141)[0] == 1


def test_plan_knows_sliding_windows(plan):
    """Ten of twelve layers keep a window and a step's tokens, whatever the length."""
    _, text = plan(GEMMA, "--max-model-len", 2**20)
    assert "layers    2 with full attention, 10 with windows of 512; 4 KV heads of size 128" in text
    assert "KV cache  4.1 KiB per token" in text
    assert "request   4.3 GiB for 1,048,576 tokens" in text
    everywhere = GEMMA | dict(architectures=["MistralForCausalLM"], model_type="mistral")
    everywhere |= dict(vocab_size=32000, intermediate_size=4096)
    status, text = plan(everywhere, "--max-model-len", 2**20, "--gpu-memory", 1)
    assert "layers    0 with full attention, 12 with windows of 512; 4 KV heads" in text
    assert "KV cache  0.0 KiB per token" in text
    assert status == 1 and "DOES NOT FIT; what fits: " in text


def test_plan_refuses_what_cannot_be_served(plan, engine, folder):
    """Nor do numbers that mean nothing get a plan."""
    for words, says in (
        (("2048", "--gpus", 3), "--gpus must divide the 32 query heads, and divide the 8 KV heads"),
        (("2048", "--gpus", 0), "or be a multiple of them, got 0"),
        (("-1",), "--max-model-len must be a positive number, got -1"),
        (("2048", "--gpu-memory", -3), "--gpu-memory must be positive, got -3"),
    ):
        status, text = plan(LLAMA_8B, "--max-model-len", *words)
        assert status == 2 and says in text.splitlines()[-1]
    status, text = plan(
        LLAMA_8B | dict(num_key_value_heads=3), "--max-model-len", 2048, "--gpus", 2
    )
    assert status == 2 and "the 3 KV heads or be a multiple of them, got 2" in text
    status, text = engine(engines.command, "plan", "no/such-model", "--max-model-len", 2048)
    assert status == 2 and text
    for name, says in (
        ("deepseek", "an MLA model keeps latents"),
        ("bloom", "position must come from a rotary embedding, got ALiBi"),
    ):
        status, text = engine(engines.command, "plan", make(name, folder), "--max-model-len", 2048)
        assert status == 2 and says in text.splitlines()[-1]
        assert "choose another attention backend" in text and "vllm serve" not in text
    status, text = plan(LLAMA_8B | dict(head_dim=512), "--max-model-len", 2048)
    assert status == 2 and "head size must be a multiple of 8 from 32 to 256, got 512" in text


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
def test_an_engine_takes_what_is_planned(kv_cache_dtype, folder, engine):
    model = make("llama", folder)
    options = dict(kv_cache_dtype=kv_cache_dtype, dtype="bfloat16")
    taken, planned = engine(engines.cache_and_plan, model, **options)
    assert taken == planned


def test_the_doctor_finds_this_installation_sound(engine):
    status, text = engine(engines.command, "doctor")
    assert status == 0
    assert [line.split()[:2] for line in text.splitlines()] == [
        ["pass", name] for name in ("versions", "device", "plugin", "backend", "arithmetic")
    ]


def missing(package: str) -> str:
    raise PackageNotFoundError(package)


def test_the_doctor_asks_no_cpu_for_triton(engine):
    status, text = engine(engines.ailing, doctor__version=missing)
    assert status == 0 and text.startswith("pass  versions")


def no_attention(*arguments, tail) -> None:
    """Writes nothing."""


def what_is_first(query, pages, table, tiles, shared, *rest):
    """Recalls block 1 and those behind it."""
    return shared.argsort(-1).argsort(-1).int() + 1


@pytest.mark.parametrize(
    "ailment, check, says",
    [
        (dict(compat__VLLM_RANGE=">=99"), "versions", "must run with vllm>=99"),
        (dict(compat__on_cpu=bool), "device", "torch finds no GPU"),
        (dict(environment=dict(VLLM_PLUGINS="lora")), "plugin", "add reattention"),
        (
            dict(compat__PATH="another.Backend"),
            "backend",
            "another plugin has registered this name",
        ),
        (dict(doctor__NEEDLES=(9, 17, 29)), "arithmetic", "selection missed blocks [29]"),
        (dict(doctor__select_for_tail=what_is_first), "arithmetic", "missed blocks [9, 17, 22]"),
        (dict(doctor__reattention=no_attention), "arithmetic", "differs from float64"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_doctor_names_what_is_wrong(ailment, check, says, engine):
    status, text = engine(engines.ailing, **ailment)
    assert status == 1
    failed = [line for line in text.splitlines() if line.startswith("FAIL")]
    assert any(line.split()[1] == check and says in line for line in failed)
