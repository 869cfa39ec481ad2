"""What vLLM asks of an attention backend, and what it calls."""

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.config.cache import CacheDType
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionType,
)
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from csrc_triton.layout import Pages, Rotary, Scope
from csrc_triton.reference import bias_table
from vllm_reattention import compat
from vllm_reattention.attention import reattention, stages
from vllm_reattention.metadata import ReAttentionMetadata, ReAttentionMetadataBuilder, scope_of
from vllm_reattention.pages import bytes_per_token, pages_of
from vllm_reattention.proof import prove
from vllm_reattention.rope import Refused, Rope, Site
from vllm_reattention.tiles import DensePrompts, most_dense_keys, most_prefill_tiles
from vllm_reattention.warm_up import warm_up, warm_up_dense

ELSEWHERE = "choose another attention backend"


class ReAttentionBackend(AttentionBackend):
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[CacheDType]] = [
        "auto",
        "float16",
        "bfloat16",
        "fp8",
        "fp8_e4m3",
    ]

    @staticmethod
    def get_name() -> str:
        return compat.NAME

    @staticmethod
    def get_impl_cls() -> type["ReAttentionImpl"]:
        return ReAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[ReAttentionMetadataBuilder]:
        return ReAttentionMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int]:
        return list(compat.BLOCK_SIZES)

    @classmethod
    def get_preferred_block_size(cls, default_block_size: int) -> int:
        return compat.BLOCK_SIZES[0]

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        return compat.head_size_refusal(head_size) is None

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @classmethod
    def supports_sink(cls) -> bool:
        return True

    @classmethod
    def supports_combination(
        cls,
        head_size,
        dtype,
        kv_cache_dtype,
        block_size,
        use_mla,
        has_sink,
        use_sparse,
        use_mm_prefix,
        device_capability,
    ) -> str | None:
        """The first reason with a way out; vLLM prints it behind its own short ones."""
        if refusal := compat.version_refusal():
            return refusal
        if use_mla or use_sparse:
            return f"{compat.LATENTS}; {ELSEWHERE}"
        if use_mm_prefix:
            return f"attention must be causal, images of this model see each other; {ELSEWHERE}"
        if not cls.supports_kv_cache_dtype(kv_cache_dtype):
            known = ", ".join(cls.supported_kv_cache_dtypes)
            return f"--kv-cache-dtype must be one of {known}, got {kv_cache_dtype}"
        if dtype == torch.float32 and not compat.on_cpu():
            return "--dtype must be bfloat16 or float16 on a GPU, got float32"
        if refusal := compat.head_size_refusal(head_size):
            return f"{refusal}; {ELSEWHERE}"
        if not cls.supports_block_size(block_size):
            return f"--block-size must be a multiple of {compat.BLOCK_SIZES[0]}, got {block_size}"
        return None

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Head-major: what a block keeps for a head is one contiguous run."""
        return KVCacheLayout.LBHNC, KVCacheLayout.BLHNC

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Room for summaries; asked with any block size, so it cannot depend on that."""
        if spec.state_content_bytes is not None:
            return spec
        size = bytes_per_token(spec.head_size, spec.dtype.itemsize, compat.BLOCK_SIZES[0])
        return replace(spec, state_content_bytes=size)


class ReAttentionImpl(AttentionImpl[ReAttentionMetadata]):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: Tensor | None = None,
        **unknown,
    ):
        if alibi_slopes is not None:
            raise NotImplementedError(
                f"position must come from a rotary embedding, got ALiBi slopes; {ELSEWHERE}"
            )
        if kv_sharing_target_layer_name is not None:
            raise NotImplementedError(
                f"layers must keep their own keys, got one that shares those of "
                f"{kv_sharing_target_layer_name}; {ELSEWHERE}"
            )
        if unknown:
            raise NotImplementedError(
                f"Attention layers must be plain, got {', '.join(unknown)}; {ELSEWHERE}"
            )
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads = num_kv_heads or num_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.window = sliding_window or 0
        self.soft_cap = logits_soft_cap or 0.0
        self.sinks = sinks
        self.flash_attention = compat.flash_attention(head_size, sinks is not None, self.soft_cap)
        self.selects = True  # else it recalls what a layer before it did; set by the builder
        self.selects_last = False  # of the builder's layers
        self.is_last = False  # of those without a window
        self.site: Site | None = None  # set when the layer is attached to its parent
        self.rope: Rope | None = None  # set once weights are loaded, and with it the next two
        self.rotary: Rotary
        self.summary_dtype: torch.dtype
        self.key_bias: Tensor | None = None  # Pages.bias

        config = get_current_vllm_config()
        self.scope_of = functools.partial(scope_of, config)  # a block size
        self.num_positions = self._num_positions()
        self.cache_config = config.cache_config
        speculative, most_requests = config.speculative_config, config.scheduler_config.max_num_seqs
        verified = 1 + speculative.num_speculative_tokens if speculative else 1
        self.most_singles, self.most_requests = most_requests * verified, most_requests
        self.add_up = compat.sum_over_processes(config.parallel_config)
        self.max_model_len = config.model_config.max_model_len
        self.layers = config.compilation_config.static_forward_context

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Called once weights are final, and again whenever they are reloaded."""
        if self.rope is not None:
            return
        if self.site is None:
            raise Refused("an Attention layer must be attached to a module; choose another backend")
        (rope, key_bias), layer = prove(self.site, act_dtype), self.site.layer()
        if layer.attn_backend is not ReAttentionBackend or layer.head_size_v != self.head_size:
            raise Refused(
                f"{layer.layer_name} must be a plain Attention layer with values as wide as keys, "
                f"got {type(layer).__name__} on {layer.attn_backend.__name__}; {ELSEWHERE}"
            )
        self.summary_dtype = act_dtype if act_dtype.itemsize == 2 else torch.bfloat16
        self.rotary = self._shared_rotary(rope) or rope.rotary(
            self.num_positions, layer._k_scale.device
        )
        self.rope = rope
        # A buffer outlives sleep: level 2 saves buffers and writes them back in place.
        layer.register_buffer("rotary_table", self.rotary.cos_sin, persistent=False)
        if self.kv_cache_dtype.startswith("fp8") and (bias := key_bias()).any():
            self._take_off(bias, layer)

    def _take_off(self, key_bias: Tensor, layer: Attention) -> None:
        """Keys are to be kept without it from now on, or it is said why not."""
        why_not = None
        if not key_bias.isfinite().all():
            why_not = (
                "makes no finite keys of hidden states that are zero, so their bias is unknown"
            )
        elif self.soft_cap:  # so selections need it in the keys
            why_not = "caps its logits, of which its keys' bias is no constant"
        if why_not:
            compat.logger.warning(
                "%s %s: if its model adds a large one, serve it with --kv-cache-dtype auto",
                layer.layer_name,
                why_not,
            )
            return
        scale, largest_block = layer._k_scale_float, compat.BLOCK_SIZES[-1]
        self.key_bias = bias_table(key_bias, self.rotary, largest_block, scale)
        layer.register_buffer("key_bias", self.key_bias, persistent=False)

    def _num_positions(self) -> int:
        """Positions in a scope or window, which stands anywhere in its first and last block."""
        block_size, *_, largest = compat.BLOCK_SIZES
        dense = self.scope_of(block_size).exact_blocks * block_size
        return max(dense, self.window) + 2 * largest

    def _shared_rotary(self, rope: Rope) -> Rotary | None:
        """That of an earlier layer with the same rotary embedding: tables are large."""
        for other in self._of_all_layers():
            if (
                other.rope is not None
                and len(other.rotary.cos_sin) == self.num_positions
                and other.rope.interleaved == rope.interleaved
                and other.rope.magnitude == rope.magnitude
                and torch.equal(other.rope.radians, rope.radians)
            ):
                return other.rotary
        return None

    def _of_all_layers(self) -> Iterator["ReAttentionImpl"]:
        impls = (getattr(layer, "impl", None) for layer in self.layers.values())
        return (impl for impl in impls if isinstance(impl, ReAttentionImpl))

    def do_kv_cache_update(
        self, layer: Attention, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        if not kv_cache.numel():
            return
        rows = slot_mapping.shape[0]
        pages = self._pages(layer, kv_cache)
        write_kv = stages(key.device).write_kv
        write_kv(key[:rows], value[:rows], pages, slot_mapping, self.rotary)

    def forward(
        self,
        layer: Attention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: ReAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        if attn_metadata is None:
            if not kv_cache.numel():  # the profile run; later dummy runs have pages
                self._warm_up(query, key)
            return output.fill_(0)
        scope = attn_metadata.scope
        if self.window:
            scope = Scope(0, 0, 0, 0, window=self.window)
        pages = self._pages(layer, kv_cache)
        if attn_metadata.dense is not None:
            self._attend_dense(query, key, value, pages, attn_metadata.dense, output)
        recalled, table = attn_metadata.recalled, attn_metadata.block_table
        stage: Any = stages(query.device)
        if attn_metadata.times is not None:
            stage = attn_metadata.times.around(stage)
        for index, tiles in enumerate(attn_metadata.tiles):
            selects = self.selects and not self.window
            found = reattention(
                query,
                pages,
                table,
                tiles,
                scope,
                self.rotary,
                self.scale,
                output,
                self.soft_cap,
                self.sinks,
                # none if the layer that selects for this one is not in this forward pass
                None if self.selects else recalled.get(index),
                self.add_up,
                attn_metadata.memory(index) if selects else None,
                attn_metadata.tail if tiles.max_length > 1 else None,
                stage,
            )
            if selects:
                recalled[index] = found
                if self.selects_last:
                    attn_metadata.keep(index)
                if attn_metadata.watch is not None:
                    rest = scope.of(tiles.max_length), self.rotary, self.scale, self.soft_cap
                    attn_metadata.watch(query, pages, table, tiles, found.tiles, *rest)
        if self.is_last:
            attn_metadata.keep_tail()
        return output

    def _attend_dense(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        pages: Pages,
        prompts: DensePrompts,
        output: Tensor,
    ) -> None:
        """Prompts within the dense limit need nothing of ours but the rotation."""
        assert self.flash_attention is not None, "without it the builder finds no dense prompts"
        rotate_rows = stages(query.device).rotate_rows
        rows, positions, rotary, keys = prompts.rows, prompts.positions, self.rotary, prompts.keys
        if keys is None:
            k, v = rotate_rows(key[rows], positions, rotary), value[rows]
        else:
            # whatever the model's order, keys are half-split in the cache
            place = keys.slots, keys.block_starts
            k, v = stages(query.device).read_kv(pages, *place, rotary, query.dtype)
        self.flash_attention(
            q=rotate_rows(query[rows], positions, rotary, rotary.query_scale),
            k=k,
            v=v,
            cu_seqlens_q=prompts.starts,
            cu_seqlens_k=prompts.starts if keys is None else keys.starts,
            max_seqlen_q=prompts.max_len,
            max_seqlen_k=prompts.max_len if keys is None else keys.max_len,
            softmax_scale=self.scale,
            causal=True,
            window_size=[self.window - 1, 0] if self.window else [-1, -1],
            softcap=self.soft_cap,
            s_aux=self.sinks,
            out=output[rows],
        )

    def _pages(self, layer: Attention, kv_cache: Tensor) -> Pages:
        scales = layer._k_scale_float, layer._v_scale_float
        return pages_of(kv_cache, self.head_size, self.summary_dtype, scales, self.key_bias)

    @property
    def _kind(self) -> tuple:
        """Layers for which this is equal compile the same kernels and take the same memory."""
        heads = self.num_heads, self.num_kv_heads, self.head_size
        optional = self.sinks, self.flash_attention, self.key_bias
        has = self.soft_cap > 0, *(part is not None for part in optional)
        lengths = self.window, self.num_positions, self.max_model_len
        return *heads, *has, *lengths, self.kv_cache_dtype, id(self.rotary)

    def _warm_up(self, query: Tensor, key: Tensor) -> None:
        """In the profile run: compile every kernel, and let vLLM see the most memory they take.

        Once in each run for layers that are alike: the others would do the same again.
        """
        if query.device.type == "cpu":
            return
        if next(impl for impl in self._of_all_layers() if impl._kind == self._kind) is not self:
            return
        block_size = compat.kernel_block_size(self.cache_config.block_size)
        scope = self.scope_of(block_size)
        most_keys = most_dense_keys(len(query), scope, block_size)
        if self.window:
            scope = Scope(0, 0, 0, 0, window=self.window)
        singles = min(self.most_singles, len(query))
        prompts = most_prefill_tiles(len(query), self.most_requests, block_size)
        cache_dtype = query.dtype
        if self.kv_cache_dtype.startswith("fp8"):
            cache_dtype = torch.float8_e4m3fn
        warm_up(
            query,
            self.num_kv_heads,
            cache_dtype,
            {1: {1, singles}, block_size: {prompts}},
            -(-self.max_model_len // block_size),
            block_size,
            scope,
            self.rotary,
            self.scale,
            self.soft_cap,
            self.sinks,
            self.key_bias,
        )
        if self.flash_attention is not None:
            rest = most_keys, block_size, self.rotary, self.key_bias
            warm_up_dense(query, key, cache_dtype, *rest)
