"""What of vLLM we lean on, name by name, against vLLM's sources, with nothing imported.

Sources are those of the installed vLLM, and of any other whose parent folder is named in
REATTENTION_VLLM_SOURCES, as of a wheel that was unzipped there. docs/upgrade.md tells when.
"""

import ast
import functools
import os
import re
from collections.abc import Iterator
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
OURS = ROOT / "vllm_reattention"
OTHERS = "REATTENTION_VLLM_SOURCES"
Function = ast.FunctionDef | ast.AsyncFunctionDef


class Sources:
    """A vLLM as files."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __str__(self) -> str:
        said = re.search(
            r"version = ['\"](.+?)['\"]", (self.folder / "vllm/_version.py").read_text()
        )
        return said.group(1)

    @functools.cache  # noqa: B019
    def tree(self, module: str) -> ast.Module:
        path = self.folder.joinpath(*module.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return ast.parse(file.read_text())
        raise AssertionError(f"vLLM has no module {module}")

    def package(self, module: str, level: int) -> str:
        """What a relative import of this level means in that module."""
        up = level - self.folder.joinpath(*module.split(".")).is_dir()
        return module.rsplit(".", up)[0] if up else module

    def find(self, module: str, name: str) -> tuple[str, ast.AST]:
        """The definition of a name, wherever it is imported from, and its module."""
        for node in _statements(self.tree(module)):
            if name in _defined(node):
                return module, node
            if isinstance(node, ast.ImportFrom):
                origin = self.package(module, node.level) if node.level else ""
                origin = ".".join(filter(None, (origin, node.module)))
                for alias in node.names:
                    if name == (alias.asname or alias.name):
                        return self.find(origin, alias.name)
                    if alias.name == "*" and origin.startswith("vllm"):
                        with suppress(AssertionError):
                            return self.find(origin, name)
        if self.folder.joinpath(*module.split("."), f"{name}.py").is_file():
            return f"{module}.{name}", self.tree(f"{module}.{name}")
        raise AssertionError(f"vLLM's {module} has no {name}")

    def members(self, module: str, name: str) -> dict[str, ast.AST]:
        """What a class and its bases define, and what their methods set on self."""
        module, node = self.find(module, name)
        assert isinstance(node, ast.ClassDef), f"vLLM's {module}.{name} is no class"
        found = {}
        for base in node.bases:
            while isinstance(base, ast.Subscript):  # Generic[T]
                base = base.value
            if isinstance(base, ast.Name) and base.id in self.names(module):
                found |= self.members(module, base.id)
        for method in node.body:
            if isinstance(method, Function):
                for statement in ast.walk(method):
                    found |= dict.fromkeys(_set_on_self(statement), statement)
        for statement in node.body:
            found |= dict.fromkeys(_defined(statement), statement)
        return found

    @functools.cache  # noqa: B019
    def names(self, module: str) -> frozenset[str]:
        """Classes of a module: its own, and those that it has from vLLM."""
        found = set()
        for node in _statements(self.tree(module)):
            if isinstance(node, ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.ImportFrom) and (
                node.level or node.module.startswith("vllm")
            ):
                found |= {alias.asname or alias.name for alias in node.names}
        return frozenset(found)

    def look_up(self, module: str, dotted: str) -> ast.AST:
        """A name of a module, or of a class in it."""
        name, _, member = dotted.partition(".")
        if not member:
            return self.find(module, name)[1]
        members = self.members(module, name)
        assert member in members, f"vLLM's {module}.{name} has no {member}"
        return members[member]


def _statements(node: ast.AST) -> Iterator[ast.AST]:
    """Of a module, those under `if` and `try` too."""
    for statement in ast.iter_child_nodes(node):
        yield statement
        if isinstance(statement, ast.If | ast.Try | ast.ExceptHandler | ast.With):
            yield from _statements(statement)


def _defined(node: ast.AST) -> set[str]:
    if isinstance(node, Function | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def _set_on_self(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "self.register_buffer":
        return {node.args[0].value}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return {
        target.attr
        for target in targets
        if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self"
    }


def parameters(function: ast.AST) -> tuple[list[str], list[str], bool]:
    """Names in order, those of them that must be given, and whether any other is taken."""
    given = function.args
    names = [argument.arg for argument in given.posonlyargs + given.args]
    needed = names[: len(names) - len(given.defaults)]
    for argument, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        names.append(argument.arg)
        needed += [argument.arg] if default is None else []
    return names, needed, given.kwarg is not None


class Seam(NamedTuple):
    """A name of vLLM's, and what of it we count on."""

    module: str
    name: str
    used_by: str  # what of ours relies on it
    has: str = ""  # members of the class that we read
    takes: str = ""  # arguments we give it, the first of them by their places
    first: int = 0  # how many of these by place
    says: str = ""  # a piece of its code: how it calls us, or what we do as well


ATTENTION = "vllm.model_executor.layers.attention.attention"
BACKEND = "vllm.v1.attention.backend"
CONFIG = "vllm.config"
ROPE = "vllm.model_executor.layers.rotary_embedding"
UTILS = "vllm.v1.worker.utils"
PREPARE_ATTN = (
    "self input_batch cudagraph_mode block_tables slot_mappings attn_groups kv_cache_config "
    "for_capture ubatch_idx model_specific_attn_metadata"
)
SEAMS = [
    # how the backend is named, chosen and checked
    Seam("vllm", "__version__", "compat.version_refusal"),
    Seam("vllm.v1.attention.backends.registry", "AttentionBackendEnum", "compat._register_name",
         has="register get_path get_class"),
    Seam("vllm.v1.attention.backends.registry", "AttentionBackendEnum.register",
         "compat._register_name", takes="cls name value", first=3),
    Seam("vllm.config.attention", "AttentionConfig", "compat: the backend that was chosen",
         has="backend", says="AttentionBackendEnum[value.upper()]"),
    Seam("vllm.platforms.cpu", "CpuPlatform.get_attn_backend_cls", "compat._honour_choice_on_cpu",
         takes="cls selected_backend attn_selector_config num_heads", first=4),
    Seam("vllm.platforms.cuda", "CudaPlatformBase.get_attn_backend_cls",
         "backend.supports_*: a GPU's platform asks them",
         says="backend_class.validate_configuration(device_capability=device_capability, "
              "**attn_selector_config._asdict())"),
    Seam(BACKEND, "AttentionBackend.validate_configuration", "compat._honour_choice_on_cpu",
         says="cls.supports_combination("),
    Seam(BACKEND, "AttentionBackend", "backend.supports_combination",
         has="supports_kv_cache_dtype supports_block_size supported_dtypes "
             "supported_kv_cache_dtypes forward_includes_kv_cache_update"),
    Seam("vllm.platforms.interface", "DeviceCapability", "compat._honour_choice_on_cpu",
         has="major minor"),
    Seam("vllm.platforms.interface", "Platform", "compat.on_cpu, compat.flash_attention",
         has="is_cpu is_cuda"),
    # arguments and lengths
    Seam("vllm.engine.arg_utils", "EngineArgs",
         "compat._check_and_lift_length, compat.model_config",
         has="attention_backend attention_config additional_config block_size kv_transfer_config "
             "enable_dbo ubatch_size "
             "decode_context_parallel_size prefill_context_parallel_size gpu_memory_utilization "
             "model max_model_len kv_cache_dtype skip_tokenizer_init"),
    Seam("vllm.engine.arg_utils", "EngineArgs.create_model_config",
         "compat._check_and_lift_length", takes="self", first=1),
    Seam("vllm.engine.arg_utils", "EngineArgs.create_engine_config",
         "compat._check_and_lift_length: this is where we come in",
         says="self.create_model_config()"),
    Seam("vllm.config.model", "ModelConfig.get_and_verify_max_len",
         "compat._check_and_lift_length", takes="self max_model_len", first=2),
    Seam("vllm.config.model", "ModelConfig.__post_init__", "compat._check_and_lift_length",
         says="self.max_model_len = self.get_and_verify_max_len(self.max_model_len)"),
    Seam("vllm.config.model", "_get_and_verify_max_len",
         "compat.trained_window, compat._check_and_lift_length",
         says="the env var VLLM_ALLOW_LONG_MAX_MODEL_LEN=1.",
         takes="hf_config model_arch_config tokenizer_config max_model_len "
               "disable_sliding_window sliding_window"),
    Seam("vllm.config.model_arch", "ModelArchitectureConfig", "compat.trained_window, plan.make",
         has="derived_max_model_len_and_key total_num_attention_heads total_num_kv_heads"),
    Seam("vllm.transformers_utils.config", "iter_rope_parameters", "compat.trained_window",
         takes="config", first=1),
    Seam("vllm.envs", "VLLM_BATCH_INVARIANT", "compat._refuse_companions"),
    Seam("vllm.config.kv_transfer", "KVTransferConfig.has_connector", "compat._refuse_companions",
         takes="self connector_name", first=2),
    Seam("vllm.config.model", "ModelConfig", "backend, metadata, plan",
         has="max_model_len served_model_name hf_text_config model_arch_config uses_mrope dtype "
             "architecture quantization model get_head_size get_sliding_window "
             "get_total_num_hidden_layers use_mla uses_alibi"),
    Seam(CONFIG, "AttentionConfig", "compat._check_and_lift_length",
         has="backend backend_per_kind"),
    Seam(CONFIG, "VllmConfig", "backend, metadata",
         has="model_config cache_config scheduler_config parallel_config compilation_config "
             "additional_config"),
    Seam(CONFIG, "CompilationConfig", "metadata.ReAttentionMetadataBuilder",
         has="static_forward_context max_cudagraph_capture_size"),
    Seam(CONFIG, "SchedulerConfig", "metadata.ReAttentionMetadataBuilder",
         has="max_num_batched_tokens max_num_seqs"),
    Seam(CONFIG, "ParallelConfig",
         "metadata.ReAttentionMetadataBuilder: labels of metrics, compat.sum_over_processes",
         has="data_parallel_index rank tensor_parallel_size"),
    Seam(CONFIG, "CacheConfig", "backend.ReAttentionImpl._warm_up", has="block_size"),
    # the layer and its calls
    Seam(ATTENTION, "Attention", "compat.is_ours, backend.ReAttentionImpl, proof._Probe",
         has="attn_backend impl layer_name num_heads head_size head_size_v attn_type "
             "is_draft_layer forward"),
    Seam("vllm.v1.worker.gpu.spec_decode.speculator", "DraftModelSpeculator.load_model",
         "metadata._refuse_mixture, metadata._refuse_other_scopes",
         says="all_attn_layers[layer_name].is_draft_layer = True"),
    Seam(ATTENTION, "Attention.__init__", "backend.ReAttentionImpl.__init__",
         says="self.impl = impl_cls(num_heads, head_size, scale, num_kv_heads, alibi_slopes, "
              "sliding_window, kv_cache_dtype, logits_soft_cap, attn_type, "
              "kv_sharing_target_layer_name, **extra_impl_args)"),
    Seam(ATTENTION, "Attention.__init__", "backend.ReAttentionBackend.get_name",
         says="AttentionBackendEnum[self.attn_backend.get_name()]"),
    Seam(ATTENTION, "Attention.process_weights_after_loading", "proof.prove",
         says="self.impl.process_weights_after_loading(act_dtype)"),
    Seam("vllm.model_executor.model_loader.utils", "process_weights_after_loading", "proof.prove",
         says="module.process_weights_after_loading(model_config.dtype)"),
    Seam(ATTENTION, "unified_kv_cache_update", "backend.ReAttentionImpl.do_kv_cache_update",
         says="attn_layer.impl.do_kv_cache_update(attn_layer, key, value, kv_cache, "
              "layer_slot_mapping)"),
    Seam(ATTENTION, "unified_attention_with_output", "backend.ReAttentionImpl.forward",
         says="self.impl.forward(self, query, key, value, kv_cache, attn_metadata, output=output, "
              "output_scale=output_scale, output_block_scale=output_block_scale)"),
    Seam(ATTENTION, "Attention.__init__", "metadata._memories: as many rows as pages",
         says="self.kv_cache = torch.tensor([])"),
    Seam(ATTENTION, "set_default_quant_scales", "backend: layer._k_scale, its device",
         says="register_buffer('_k_scale',"),
    Seam(ATTENTION, "set_default_quant_scales", "backend._pages",
         says="layer._k_scale_float = 1.0"),
    Seam(ATTENTION, "set_default_quant_scales", "backend._pages",
         says="layer._v_scale_float = 1.0"),
    Seam(BACKEND, "AttentionType", "metadata._refuse_mixture", has="DECODER"),
    # pages
    Seam("vllm.v1.kv_cache_interface", "AttentionSpec", "backend.customize_spec, metadata",
         has="block_size head_size head_size_v dtype state_content_bytes "
             "state_content_size_bytes"),
    Seam("vllm.v1.kv_cache_interface", "KVCacheLayout", "backend.supported_kv_cache_layouts",
         has="LBHNC BLHNC"),
    Seam("vllm.v1.kv_cache_interface", "create_kv_cache_views", "pages.pages_of: order of a page",
         says="[B, H, N, C]"),
    Seam(UTILS, "customize_attention_spec", "backend.customize_spec",
         says="backend.customize_spec(spec)"),
    # a step
    Seam(BACKEND, "CommonAttentionMetadata", "metadata.ReAttentionMetadataBuilder",
         has="query_start_loc query_start_loc_cpu seq_lens seq_lens_cpu_upper_bound max_seq_len "
             "block_table_tensor is_prefilling"),
    Seam("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._build_attention_metadata",
         "compat.tell_prompt_lengths: a row is a request of this batch, first to last",
         says="self.input_batch.num_prompt_tokens_cpu_tensor[:num_reqs_padded]"),
    Seam("vllm.v1.worker.gpu_input_batch", "InputBatch.__init__", "compat.tell_prompt_lengths",
         says="self.num_tokens_no_spec_cpu_tensor = torch.zeros("),
    Seam("vllm.v1.worker.gpu_input_batch", "InputBatch.add_request",
         "compat.tell_prompt_lengths: with the answer of a request that resumes",
         says="self.num_tokens_no_spec[req_index] = request.num_tokens"),
    Seam("vllm.v1.worker.gpu.model_states.default", "DefaultModelState.prepare_attn",
         "compat.tell_prompt_lengths", takes=PREPARE_ATTN, first=2,
         says="is_prefilling=torch.from_numpy(input_batch.is_prefilling_np)"),
    Seam("vllm.v1.worker.gpu.model_states.mamba_hybrid", "MambaHybridModelState.prepare_attn",
         "compat.tell_prompt_lengths", takes=PREPARE_ATTN, first=2),
    Seam("vllm.v1.worker.gpu.input_batch", "InputBatch", "compat.tell_prompt_lengths",
         has="prefill_len_np is_prefilling_np"),
    Seam(BACKEND, "AttentionMetadataBuilder", "metadata.ReAttentionMetadataBuilder",
         has="_cudagraph_support reorder_batch_threshold kv_cache_spec"),
    Seam(BACKEND, "AttentionMetadataBuilder._init_reorder_batch_threshold",
         "metadata.ReAttentionMetadataBuilder",
         takes="self reorder_batch_threshold supports_spec_as_decode", first=2),
    Seam(BACKEND, "AttentionCGSupport", "metadata.ReAttentionMetadataBuilder", has="UNIFORM_BATCH"),
    Seam("vllm.v1.attention.backends.utils", "split_decodes_and_prefills",
         "metadata.ReAttentionMetadataBuilder", takes="common_attn_metadata decode_threshold",
         first=2, says="return (num_decodes, num_prefills, num_decode_tokens, num_prefill_tokens)"),
    Seam("vllm.v1.attention.backends.fa_utils", "get_flash_attn_version", "compat.flash_attention",
         takes="head_size has_sinks requires_softcap"),
    Seam("vllm.vllm_flash_attn.flash_attn_interface", "flash_attn_varlen_func",
         "backend.ReAttentionImpl._attend_dense",
         takes="q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k softmax_scale causal "
               "window_size softcap s_aux out fa_version"),
    # rotary embeddings
    Seam("vllm.model_executor.models.llama", "LlamaAttention.forward", "rope.Deferred",
         says="q, k = self.rotary_emb(positions, q, k)"),
    Seam(f"{ROPE}.base", "RotaryEmbeddingBase", "compat.is_rotary, compat.rotary_table",
         has="is_neox_style _compute_cos_sin_cache cos_sin_cache"),
    Seam(f"{ROPE}.base", "RotaryEmbeddingBase._compute_cos_sin_cache", "compat.rotary_table",
         takes="self", first=1, says="torch.cat((cos, sin), dim=-1)"),
    Seam(f"{ROPE}.phi3_long_rope_scaled_rope", "Phi3LongRoPEScaledRotaryEmbedding",
         "compat.rotary_table",
         has="long_short_cos_sin_cache use_long_rope max_position_embeddings "
             "original_max_position_embeddings long_factor short_factor long_mscale short_mscale"),
    Seam(f"{ROPE}.phi3_long_rope_scaled_rope",
         "Phi3LongRoPEScaledRotaryEmbedding._compute_cos_sin_cache", "compat.rotary_table",
         takes="self max_position_embeddings rescale_factors mscale", first=4),
    Seam("vllm.model_executor.layers.linear", "LinearBase", "compat.hidden_size",
         has="input_size"),
    Seam("vllm.model_executor.layers.linear", "RowParallelLinear", "compat.hidden_size",
         has="input_size"),
    Seam("vllm.model_executor.models.qwen3_next", "Qwen3NextAttention", "compat.unfuse",
         has="use_fused_qk_norm_rope_gate"),
    # metrics
    Seam("vllm.v1.metrics.prometheus", "unregister_vllm_metrics", "metrics.Collector",
         says="hasattr(collector, '_name')"),
    Seam("vllm.v1.metrics.prometheus", "get_prometheus_registry", "metrics.export",
         says="multiprocess.MultiProcessCollector(registry)"),
    Seam("vllm.plugins", "load_general_plugins", "compat.registered_path"),
]  # fmt: skip


def _folders() -> list[Path]:
    """Parents of `vllm` folders."""
    spec = find_spec("vllm")  # does not import it
    installed = [Path(spec.origin).parent.parent] if spec and spec.origin else []
    return installed + [Path(path) for path in os.environ.get(OTHERS, "").split(":") if path]


SOURCES = [Sources(folder) for folder in _folders()]
if not SOURCES:
    pytest.skip("needs vLLM's sources", allow_module_level=True)
each_vllm = pytest.mark.parametrize("vllm", SOURCES, ids=str)


@each_vllm
@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.name} for {seam.used_by}")
def test_what_we_lean_on_is_there(seam, vllm):
    node = vllm.look_up(seam.module, seam.name)
    what = f"vLLM's {seam.module}.{seam.name}, on which {seam.used_by} relies,"
    if seam.has:
        missing = set(seam.has.split()) - vllm.members(seam.module, seam.name).keys()
        assert not missing, f"{what} has no {', '.join(sorted(missing))}"
    if seam.takes:
        given = seam.takes.split()
        names, needed, takes_any = parameters(node)
        assert takes_any or set(given) <= set(names), f"{what} takes {', '.join(names)}"
        assert set(needed) <= set(given), f"{what} must be given {', '.join(needed)}"
        assert names[: seam.first] == given[: seam.first], f"{what} has them in another order"
    if seam.says:
        assert seam.says in ast.unparse(node), f"{what} does not say: {seam.says}"


def _imported() -> list[tuple[str, str, str]]:
    """Module, name and by whom, of all that we import from vLLM; of a module alone, no name."""
    found = []
    for path in sorted(OURS.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "vllm":
                found += [(node.module, alias.name, path.stem) for alias in node.names]
            elif isinstance(node, ast.Import):
                found += [
                    (alias.name, "", path.stem)
                    for alias in node.names
                    if alias.name.split(".")[0] == "vllm"
                ]
    return sorted(set(found))


@each_vllm
@pytest.mark.parametrize("module, name, who", _imported())
def test_what_we_import_is_there(module, name, who, vllm):
    if name:
        vllm.find(module, name)
    else:
        vllm.tree(module)


OVERRIDES = {
    "ReAttentionBackend": ("backend", "AttentionBackend"),
    "ReAttentionImpl": ("backend", "AttentionImpl"),
    "ReAttentionMetadataBuilder": ("metadata", "AttentionMetadataBuilder"),
}
CALLED_ELSEWHERE = {"do_kv_cache_update"}  # a seam above
OUR_METHODS = {
    name: {
        node.name: node
        for definition in ast.parse((OURS / f"{file}.py").read_text()).body
        if isinstance(definition, ast.ClassDef) and definition.name == name
        for node in definition.body
        if isinstance(node, ast.FunctionDef)
    }
    for name, (file, _) in OVERRIDES.items()
}
PUBLIC = [
    (name, method)
    for name, methods in OUR_METHODS.items()
    for method in methods
    if method == "__init__" or not method.startswith("_")
]


@each_vllm
@pytest.mark.parametrize("ours, method", [m for m in PUBLIC if m[1] not in CALLED_ELSEWHERE])
def test_what_vllm_calls_of_ours_takes_what_it_gives(ours, method, vllm):
    base = OVERRIDES[ours][1]
    theirs = vllm.members(BACKEND, base).get(method)
    assert theirs is not None, f"vLLM's {base} has no {method}: nobody would call ours"
    given, *_ = parameters(theirs)
    names, needed, _ = parameters(OUR_METHODS[ours][method])
    assert names[: len(given)] == given and set(needed) <= set(given), (
        f"{ours}.{method} takes {', '.join(names)}, vLLM gives it {', '.join(given)}"
    )


@each_vllm
@pytest.mark.parametrize("ours", OVERRIDES)
def test_what_vllm_demands_we_have(ours, vllm):
    members = vllm.members(BACKEND, OVERRIDES[ours][1])
    demanded = {
        name
        for name, node in members.items()
        if "abstractmethod" in map(ast.unparse, getattr(node, "decorator_list", []))
    }
    missing = demanded - OUR_METHODS[ours].keys()
    assert demanded and not missing, f"vLLM demands {', '.join(missing)} of {ours}"


@each_vllm
def test_a_configuration_can_be_checked(vllm):
    """The CPU's platform hands it over as we do, field by field."""
    fields = vllm.look_up("vllm.v1.attention.selector", "AttentionSelectorConfig").body
    given = {node.target.id for node in fields if isinstance(node, ast.AnnAssign)}
    names, *_ = parameters(vllm.look_up(BACKEND, "AttentionBackend.validate_configuration"))
    missing = (given | {"cls", "device_capability"}) ^ set(names)
    assert not missing, f"not both a field and an argument of it: {', '.join(missing)}"
