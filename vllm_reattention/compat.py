"""Every patch to vLLM and every difference between its releases."""

import functools
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeGuard

import torch
from packaging.specifiers import SpecifierSet
from torch import nn

from vllm_reattention import VLLM_RANGE, __version__, metrics
from vllm_reattention.config import ReAttentionConfig

NAME = "REATTENTION"
PATH = "vllm_reattention.backend.ReAttentionBackend"
LATENTS = "keys must be kept per head, an MLA model keeps latents"
BLOCK_SIZES = (32, 64, 128)  # of the kernels; the first unless --block-size says otherwise

logger = logging.getLogger("vllm.reattention")
_chosen: ContextVar[bool] = ContextVar("reattention_chosen", default=False)
_prompt_lengths: ContextVar[torch.Tensor | None] = ContextVar("prompt_lengths", default=None)


@functools.cache
def install() -> None:
    """Register the name and apply the patches; they act only when our backend is chosen."""
    try:
        import vllm.v1.attention.backends.registry  # noqa: F401
    except ImportError:  # a vLLM of long ago, or none: nobody can choose us
        return
    _register_name()
    _honour_choice_on_cpu()
    _check_and_lift_length()


def vllm_version() -> str:
    import vllm

    return vllm.__version__


def version_refusal() -> str | None:
    """Why this vLLM cannot be served, or None."""
    version = vllm_version()
    if SpecifierSet(VLLM_RANGE).contains(version, prereleases=True):
        return None
    return (
        f"vllm-reattention {__version__} must run with vllm{VLLM_RANGE}, got {version}; "
        f"install such a vLLM or choose another attention backend"
    )


def _register_name():
    """Add REATTENTION to vLLM's enum of backends, once.

    A spawned engine unpickles its configuration, and with it our member, before it loads plugins.
    Enum members are pickled by value, which is unknown there; so ours is pickled as this call.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.__members__.get(NAME)
    if member is None:
        if not hasattr(AttentionBackendEnum, "register"):  # before 0.32: refused, but by name
            return None
        member = AttentionBackendEnum.register(NAME, PATH)
        member.__reduce_ex__ = lambda protocol: (_register_name, ())
    return member


def registered_path() -> str | None:
    """The class behind our name once vLLM has loaded its plugins."""
    from vllm.plugins import load_general_plugins
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    load_general_plugins()
    member = AttentionBackendEnum.__members__.get(NAME)
    return member and member.get_path()


def _honour_choice_on_cpu() -> None:
    """vLLM's CPU platform takes its own backend whatever was chosen; honour ours, check it."""
    from vllm.platforms import current_platform
    from vllm.platforms.interface import DeviceCapability

    if not current_platform.is_cpu():
        return
    platform = type(current_platform)
    stock = platform.get_attn_backend_cls.__func__

    @functools.wraps(stock)
    def get_attn_backend_cls(cls, selected_backend, attn_selector_config, num_heads=None):
        if getattr(selected_backend, "name", None) != NAME:
            return stock(cls, selected_backend, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=DeviceCapability(0, 0), **attn_selector_config._asdict()
        )
        if reasons:
            raise ValueError(f"{NAME} is not valid for this configuration: {'; '.join(reasons)}")
        return selected_backend.get_path()

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _check_and_lift_length() -> None:
    """Refuse early what cannot be served, and allow max_model_len beyond the trained window.

    The model's configuration, which checks its length, is made before vLLM looks at the backend;
    a context variable tells it which one was chosen.
    """
    from vllm.config.model import ModelConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform

    create, verify = EngineArgs.create_model_config, ModelConfig.get_and_verify_max_len

    @functools.wraps(create)
    def create_model_config(self):
        attention = self.attention_config
        chosen = [self.attention_backend or attention.backend, *attention.backend_per_kind.values()]
        if NAME not in (str(getattr(backend, "name", backend)).upper() for backend in chosen):
            return create(self)
        if refusal := version_refusal():
            raise ValueError(refusal)
        _refuse_companions(self)
        config = ReAttentionConfig.read(self.additional_config)
        metrics.export()
        if self.block_size is None and current_platform.is_cpu():
            self.block_size = BLOCK_SIZES[0]  # before 0.33 that platform does not ask the backend
        token = _chosen.set(True)
        try:
            model_config = create(self)
        finally:
            _chosen.reset(token)
        num_layers = model_config.get_total_num_hidden_layers()
        block_size = kernel_block_size(self.block_size)
        config.resolve(trained_window(model_config), block_size, num_layers)
        if model_config.uses_mrope:
            raise ValueError(
                "rotary embedding must have one position per token, got the three of mRoPE "
                f"({model_config.architecture}); serve a text-only model of the family or choose "
                "another attention backend"
            )
        return model_config

    @functools.wraps(verify)
    def get_and_verify_max_len(self, max_model_len):
        try:
            return verify(self, max_model_len)
        except ValueError as error:  # also within a window that YaRN, added to it, has scaled
            if not _chosen.get() or "VLLM_ALLOW_LONG_MAX_MODEL_LEN" not in str(error):
                raise
            return int(max_model_len)

    EngineArgs.create_model_config = create_model_config
    ModelConfig.get_and_verify_max_len = get_and_verify_max_len


def _refuse_companions(arguments) -> None:
    """What would split a step, or read our pages as if they held keys and values alone."""
    from vllm import envs

    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (size := getattr(arguments, name)) > 1:
            flag = "--" + name.replace("_", "-")
            raise ValueError(
                f"{flag} must be 1, got {size}: all blocks of a request take part in a selection; "
                "use --tensor-parallel-size or choose another attention backend"
            )
    if envs.VLLM_BATCH_INVARIANT:
        raise ValueError(
            "VLLM_BATCH_INVARIANT must be unset: where a prompt is cut decides what is recalled; "
            "choose another attention backend"
        )
    if arguments.enable_dbo or arguments.ubatch_size > 1:
        raise ValueError(
            "--enable-dbo and --ubatch-size must be left out: what a request found is kept for its "
            "next token, which may be in another microbatch; or choose another attention backend"
        )
    transfer = arguments.kv_transfer_config
    for name in ("LMCacheConnectorV1", "LMCacheMPConnector", "FlexKVConnectorV1"):
        if transfer is not None and transfer.has_connector(name):
            raise ValueError(
                f"the KV connector must move whole pages, {name} hands them to a package that "
                "knows keys and values alone and may leave out their summaries; use "
                "OffloadingConnector or NixlConnector"
            )


@functools.cache
def tell_prompt_lengths() -> None:
    """Have both model runners tell our builders how long prompts are, not only that they are."""
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState
    from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def wrap(owner: type, name: str, lengths: Callable[..., torch.Tensor]) -> None:
        build = getattr(owner, name)

        @functools.wraps(build)
        def told(self, *args, **kwargs):
            token = _prompt_lengths.set(lengths(self, *args, **kwargs))
            try:
                return build(self, *args, **kwargs)
            finally:
                _prompt_lengths.reset(token)

        setattr(owner, name, told)

    def of_runner(runner, *args, **kwargs) -> torch.Tensor:
        # what is computed before the next token: of a request that resumes, its answer, too
        return runner.input_batch.num_tokens_no_spec_cpu_tensor

    def of_batch(state, input_batch, *args, **kwargs) -> torch.Tensor:
        return torch.from_numpy(input_batch.prefill_len_np)

    wrap(GPUModelRunner, "_build_attention_metadata", of_runner)
    wrap(DefaultModelState, "prepare_attn", of_batch)
    wrap(MambaHybridModelState, "prepare_attn", of_batch)


def prompt_lengths() -> torch.Tensor | None:
    """[num_requests or more] of the step whose metadata is built, on the host; None: no such."""
    return _prompt_lengths.get()


def model_refusal(model_config) -> str | None:
    """Why a model cannot be served, as far as its configuration tells; the backend says it, too."""
    elsewhere = f"choose another attention backend for {model_config.architecture}"
    if model_config.use_mla:
        return f"{LATENTS}; {elsewhere}"
    if model_config.uses_alibi:
        return f"position must come from a rotary embedding, got ALiBi; {elsewhere}"
    refusal = head_size_refusal(model_config.get_head_size())
    return refusal and f"{refusal}; {elsewhere}"


def head_size_refusal(size: int) -> str | None:
    if 32 <= size <= 256 and size % 8 == 0:
        return None
    return f"head size must be a multiple of 8 from 32 to 256, got {size}"


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def flash_attention(head_size: int, has_sinks: bool, soft_cap: float) -> Callable | None:
    """vLLM's FlashAttention for ragged batches, where this platform's serves such heads."""
    from vllm.platforms import current_platform

    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(
        head_size=head_size, has_sinks=has_sinks, requires_softcap=soft_cap > 0
    )
    if version is None or (has_sinks and version < 3) or head_size % 8:
        return None
    return functools.partial(fa_utils.flash_attn_varlen_func, fa_version=version)


def sum_over_processes(parallel_config) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Sums a tensor over the processes that share a layer's heads; None if there is but one."""
    if parallel_config.tensor_parallel_size == 1:
        return None
    from vllm.distributed import tensor_model_parallel_all_reduce

    return tensor_model_parallel_all_reduce


def kernel_block_size(block_size: int | None) -> int:
    """What vLLM cuts its blocks into for our kernels."""
    fitting = [size for size in BLOCK_SIZES if block_size and block_size % size == 0]
    return max(fitting, default=BLOCK_SIZES[0])


def trained_window(model_config) -> int:
    """The longest context the model was made for: what vLLM takes as the limit of max_model_len."""
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.config import iter_rope_parameters

    text_config = model_config.hf_text_config
    window = _get_and_verify_max_len(
        hf_config=text_config,
        model_arch_config=model_config.model_arch_config,
        tokenizer_config=None,
        max_model_len=None,
        disable_sliding_window=False,
        sliding_window=None,
    )
    # longrope: the above is the length before scaling. YaRN added to a configuration of the
    # original length scales it, though vLLM takes such lengths as scaled already.
    derived, key = model_config.model_arch_config.derived_max_model_len_and_key
    windows = [window] if key is None else [window, int(derived)]
    for rope in iter_rope_parameters(text_config):
        if rope["rope_type"] == "yarn":
            original = rope.get("original_max_position_embeddings", 0)
            windows.append(int(rope.get("factor", 1.0) * original))
    return max(windows)


def model_config(model: str, max_model_len: int, kv_cache_dtype: str):
    """vLLM's, of a model that we are to serve."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(
        model=model,
        max_model_len=max_model_len,
        attention_backend=NAME,
        kv_cache_dtype=kv_cache_dtype,
        skip_tokenizer_init=True,
    ).create_model_config()


def memory_share() -> float:
    """Of a GPU, what vLLM takes unless told otherwise."""
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs.gpu_memory_utilization


def is_ours(module: nn.Module | None) -> TypeGuard[Any]:
    """Whether this is a vLLM Attention layer on our backend."""
    attention = _loaded("vllm.model_executor.layers.attention", "Attention")
    return isinstance(module, attention) and module.attn_backend.get_name() == NAME


def is_rotary(module: nn.Module | None) -> TypeGuard[nn.Module]:
    """Whether this is one of vLLM's rotary embeddings: called with positions, query and key."""
    package = "vllm.model_executor.layers.rotary_embedding"
    return isinstance(
        module,
        (
            _loaded(f"{package}.base", "RotaryEmbeddingBase"),
            _loaded(f"{package}.phi3_long_rope_scaled_rope", "Phi3LongRoPEScaledRotaryEmbedding"),
        ),
    )


def _loaded(module: str, name: str) -> type[Any] | tuple[()]:
    """The class, if its module was imported by now: asked of every module of every process."""
    return getattr(sys.modules.get(module), name, ())


def rotary_table(rope: Any) -> torch.Tensor:
    """cos | sin of every position in fp32: the module's own buffer may be 16 bit."""
    with torch.device("cpu"):
        if not hasattr(rope, "long_short_cos_sin_cache"):
            return rope._compute_cos_sin_cache().float()
        if rope.use_long_rope:  # longrope: vLLM decides by max_model_len which half is used
            return rope._compute_cos_sin_cache(
                rope.max_position_embeddings, rope.long_factor, rope.long_mscale
            )
        return rope._compute_cos_sin_cache(
            rope.original_max_position_embeddings, rope.short_factor, rope.short_mscale
        )


def hidden_size(attention: nn.Module) -> int | None:
    """Width of what an attention module takes: quantised weights may not show it, layers do."""
    from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

    for module in attention.modules():
        if isinstance(module, LinearBase) and not isinstance(module, RowParallelLinear):
            return module.input_size
    return None


def unfuse(attention: Any) -> None:
    """Qwen3-Next on CUDA rotates in a kernel of its own unless told not to."""
    if getattr(attention, "use_fused_qk_norm_rope_gate", False):
        attention.use_fused_qk_norm_rope_gate = False
