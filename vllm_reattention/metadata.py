"""vLLM's metadata, once per step, as tiles."""

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, SlidingWindowSpec

from csrc_triton.layout import Memory, Recalled, Scope, Tail, Tiles
from vllm_reattention import compat
from vllm_reattention.config import ReAttentionConfig, described
from vllm_reattention.mass import MassSamples
from vllm_reattention.memory import Memories
from vllm_reattention.metrics import SHARES, Counts
from vllm_reattention.tiles import (
    DecodeTiles,
    DensePrompts,
    dense_blocks,
    dense_prompts,
    ends_here,
    most_dense_keys,
    prefill_tiles,
    split_tail,
)
from vllm_reattention.times import StageTimes

logger = init_logger("vllm.reattention")


@dataclass
class ReAttentionMetadata:
    scope: Scope  # of layers without a sliding window
    tiles: list[Tiles]  # decode tokens, prefill tiles: those there are
    block_table: Tensor  # [num_requests, max_blocks] int32
    dense: DensePrompts | None  # instead of prefill tiles
    memories: Memories | None
    is_generated: Tensor  # [num_decode_tokens] bool
    tail: Tail | None  # beside the prefill tiles
    # By index of `tiles`: what the last layer that selects recalled, for those behind it.
    recalled: dict[int, Recalled] = field(default_factory=dict)
    found: dict[int, Memory] = field(default_factory=dict)  # so far
    watch: Callable[..., None] | None = None  # shown what a layer recalled
    times: StageTimes | None = None  # takes the times of this step's stages

    def memory(self, index: int) -> Memory | None:
        """Of the tiles of this index, for a layer that selects."""
        if self.memories is not None and index not in self.found:
            tiles = self.tiles[index]
            is_generated = self.is_generated if tiles.max_length == 1 else None
            self.found[index] = self.memories.recollect(tiles, self.block_table, is_generated)
        return self.found.get(index)

    def keep(self, index: int) -> None:
        """For the tokens behind, once the last layer that selects has."""
        if self.memories is not None:
            self.memories.keep(self.tiles[index], self.block_table, self.found[index])

    def keep_tail(self) -> None:
        """Instead, where prompts end, once the last layer has."""
        if self.memories is not None and self.tail is not None:
            self.memories.keep_tail(self.tail, self.block_table)


def scope_of(vllm_config: VllmConfig, block_size: int) -> Scope:
    """What the tokens of a model as it is served attend to."""
    config = ReAttentionConfig.read(vllm_config.additional_config)
    model = vllm_config.model_config
    # Tokens that are verified together would need what each other found: nothing is remembered
    speculates = vllm_config.speculative_config is not None
    num_layers = model.get_total_num_hidden_layers()
    return config.resolve(compat.trained_window(model), block_size, num_layers, speculates)


class ReAttentionMetadataBuilder(AttentionMetadataBuilder[ReAttentionMetadata]):
    """Splits a step into decode tokens, whose requests stand first, and prefill tiles."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        compat.tell_prompt_lengths()
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=True)
        self.block_size = kv_cache_spec.block_size
        config = ReAttentionConfig.read(vllm_config.additional_config)
        trained_window = compat.trained_window(vllm_config.model_config)
        num_layers = vllm_config.model_config.get_total_num_hidden_layers()
        self.scope = scope_of(vllm_config, self.block_size)
        _refuse_mixture(vllm_config, trained_window)
        selecting = config.selecting_layers(num_layers)
        if not isinstance(kv_cache_spec, SlidingWindowSpec):
            forgets = config.remembers(num_layers) > self.scope.memory
            selects = f"{len(selecting)} of {num_layers} layers select"
            self._introduce(config.scorer, trained_window, selects, forgets)
        scheduler = vllm_config.scheduler_config
        most_tokens = scheduler.max_num_batched_tokens
        self.most_dense_keys = most_dense_keys(most_tokens, self.scope, self.block_size)
        rows = max(
            most_tokens,
            scheduler.max_num_seqs * self.reorder_batch_threshold,
            vllm_config.compilation_config.max_cudagraph_capture_size or 0,
        )
        layers = vllm_config.compilation_config.static_forward_context
        # In the order of the model: that of the names may differ from process to process
        named = {name: layer for name, layer in layers.items() if name in layer_names}
        _refuse_other_scopes(named, self.scope, self.block_size)
        impls = {name: layer.impl for name, layer in named.items()}
        self.has_flash_attention = all(impl.flash_attention is not None for impl in impls.values())
        selections = _share_selections(impls, selecting)
        dense = self.scope.dense_blocks
        self.decode = DecodeTiles(rows, self.reorder_batch_threshold, dense, device)
        self.layer, self.weight = next(iter(named.values())), 1 / selections if selections else 0.0
        self.memories: Memories | None = None
        self.is_generated = torch.ones(rows, dtype=torch.bool, device=device)
        self.marked = 0  # so many of these, the first, may be False
        self.counts = None
        if _first_selecting(layers) in layer_names:  # every group of layers would count alike
            self.counts = Counts(
                vllm_config.model_config.served_model_name,
                vllm_config.parallel_config.data_parallel_index,
                vllm_config.parallel_config.rank,
            )
            self.masses, self.times = MassSamples(SHARES, device), StageTimes(device)

    def _introduce(self, scorer: str, trained_window: int, selects: str, forgets: bool) -> None:
        scope, size, spec = self.scope, self.block_size, self.kv_cache_spec
        content = (spec.head_size + spec.head_size_v) * spec.dtype.itemsize
        logger.info_once(
            "ReAttention: scope of %s; trained window %d, all keys for prompts up to %d "
            "(dense_limit), scorer %s, %s, memory %g%s, summaries take %.1f %% of the KV cache",
            described(scope, size),
            trained_window,
            scope.exact_blocks * size,
            scorer,
            selects,
            scope.memory,
            " (tokens are speculated)" if forgets else "",
            100 * (1 - content / spec.state_content_size_bytes),
        )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> ReAttentionMetadata:
        if compat.prompt_lengths() is None and not self.layer.is_draft_layer:
            logger.warning_once(
                "ReAttention: this vLLM does not tell how long prompts are, so their last tokens "
                "recall what others do and questions are answered less well, and dense_limit holds "
                "for the beginning of every prompt; docs/upgrade.md"
            )
        limits = self._limits(common_attn_metadata)
        metadata = self._build(common_attn_metadata, limits)
        if self.counts is not None:
            self.masses.collect(self.counts.add_shares)
            self.times.collect(self.counts.add_times)
            selected = self._count(self.counts, common_attn_metadata, limits)
            # Not of single tokens alone: a CUDA graph replays what it captured, unwatched.
            if selected and metadata.tiles[-1].max_length > 1:
                if self.masses.is_due:
                    metadata.watch = self.masses.add
                if self.times.is_due:
                    self.times.begin(common_attn_metadata.num_actual_tokens)
                    metadata.times = self.times
        return metadata

    def build_for_cudagraph_capture(
        self, common_attn_metadata: CommonAttentionMetadata
    ) -> ReAttentionMetadata:
        return self._build(common_attn_metadata, self._limits(common_attn_metadata))

    def build_for_drafting(
        self, common_attn_metadata: CommonAttentionMetadata, draft_index: int
    ) -> ReAttentionMetadata:
        return self._build(common_attn_metadata, self._limits(common_attn_metadata))

    def _limits(self, step: CommonAttentionMetadata) -> Tensor:
        """[num_requests] int32 on the host, dense_blocks of each; untold prompts are short ones."""
        scope, told = self.scope, compat.prompt_lengths()
        limits = torch.full((len(step.seq_lens),), scope.exact_blocks, dtype=torch.int32)
        if told is not None and scope.exact_blocks > scope.dense_blocks:
            of_told = dense_blocks(told[: len(limits)], scope, self.block_size)
            limits[: len(of_told)] = of_told
        return limits

    def _build(self, step: CommonAttentionMetadata, limits: Tensor) -> ReAttentionMetadata:
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            step, self.reorder_batch_threshold
        )
        tiles, starts = [], step.query_start_loc
        # None for a draft, of which the host's lengths may also be too short
        prompt_lens = compat.prompt_lengths()
        unlike = None  # limits, where they may differ from request to request
        if self.scope.exact_blocks > self.scope.dense_blocks:
            unlike = limits.to(step.seq_lens.device, non_blocking=True)
        if num_decode_tokens:
            self._mark_generated(step, num_decodes)
            decoded = starts[: num_decodes + 1], step.seq_lens[:num_decodes]
            tiles.append(self.decode.fill(*decoded, num_decode_tokens, unlike))
        max_blocks = -(-step.max_seq_len // self.block_size)
        table, dense = step.block_table_tensor[:, :max_blocks], None
        if num_prefills and self.has_flash_attention and prompt_lens is not None:
            dense = dense_prompts(
                starts,
                step.query_start_loc_cpu,
                step.seq_lens,
                step.seq_lens_cpu_upper_bound,
                num_decodes,
                limits * self.block_size,
                table,
                self.block_size,
                self.most_dense_keys,
            )
        if num_prefills and dense is None:
            tiles.append(
                prefill_tiles(
                    starts,
                    step.query_start_loc_cpu,
                    step.seq_lens,
                    num_decodes,
                    self.block_size,
                    self.scope.dense_blocks if unlike is None else unlike,
                )
            )
        selects = self.weight and max_blocks > self.scope.dense_blocks
        memories = self._memories() if selects else None
        flags = self.is_generated[:num_decode_tokens]
        tail, scope = None, self.scope
        if prompt_lens is None:  # any tile may be at an end
            scope = scope.of_tail
        elif num_prefills and dense is None and selects:
            tiles[-1], tail = self._split_tail(step, tiles[-1], num_decodes, prompt_lens)
        if tail is not None and memories is not None:
            tail = tail._replace(memory=memories.of_layers(tail.tiles, table))
        return ReAttentionMetadata(scope, tiles, table, dense, memories, flags, tail)

    def _split_tail(
        self, step: CommonAttentionMetadata, tiles: Tiles, num_decodes: int, told: Tensor
    ) -> tuple[Tiles, Tail | None]:
        seq_lens = step.seq_lens_cpu_upper_bound
        # a copy: the runner may write the next step's before the device has read this one's
        prompt_lens = torch.zeros(len(step.seq_lens), dtype=torch.int32)
        prompt_lens[: len(told)] = told[: len(prompt_lens)]
        if seq_lens is not None:
            ends = prompt_lens[num_decodes:], seq_lens[num_decodes:]
            if not ends_here(*ends, self.block_size):
                return tiles, None
        prompt_lens = prompt_lens.to(tiles.row.device, non_blocking=True)
        return split_tail(tiles, num_decodes, prompt_lens, self.block_size)

    def _memories(self) -> Memories | None:
        """Made once there are pages, and outside of graphs, which would clear it in each replay."""
        scope, pages = self.scope, len(self.layer.kv_cache)
        if not (scope.memory and scope.recall_blocks):
            return None
        if self.memories is None or len(self.memories.kept.position) != pages:
            size, device = self.block_size, self.is_generated.device
            self.memories = Memories(pages, size, scope.memory, self.weight, device)
        return self.memories

    def _mark_generated(self, step: CommonAttentionMetadata, num_decodes: int) -> None:
        """A prompt's last token comes as a decode if it comes alone."""
        prefilling = step.is_prefilling
        if prefilling is not None and prefilling[:num_decodes].any():
            generated = ~prefilling[:num_decodes]
            self.is_generated[: len(generated)].copy_(generated, non_blocking=True)
            self.marked = max(self.marked, len(generated))
        elif self.marked:
            self.is_generated[: self.marked].fill_(True)
            self.marked = 0

    def _count(self, counts: Counts, step: CommonAttentionMetadata, limits: Tensor) -> int:
        """Returns how many query tokens select, as far as the host knows."""
        if step.seq_lens_cpu_upper_bound is None:
            logger.warning_once(
                "ReAttention: the host does not know how long some requests are; steps with such "
                "are missing from vllm:reattention_* on /metrics, not from what is served"
            )
            return 0
        seq_lens, num_tokens = _host_lengths(step)
        num_decodes, *_ = split_decodes_and_prefills(step, self.reorder_batch_threshold)
        dense = limits.numpy()[: len(seq_lens)] * self.block_size
        return counts.add(seq_lens, num_tokens, num_decodes, dense, self.scope, self.block_size)


def _host_lengths(step: CommonAttentionMetadata) -> tuple[np.ndarray, np.ndarray]:
    """A step's requests as the host knows them: lengths with their new tokens, and those alone.

    A batch that was padded to a captured graph's size ends in requests without tokens, which not
    all of its columns have.
    """
    columns = [step.query_start_loc_cpu.diff(), step.seq_lens_cpu_upper_bound]
    if step.is_prefilling is not None:
        columns.append(step.is_prefilling)
    count = min(len(column) for column in columns)
    num_tokens, seq_lens = (column[:count].numpy().astype(np.int64) for column in columns[:2])
    if step.is_prefilling is not None:  # a dummy, whose context is empty, is no prompt
        num_tokens[(seq_lens == num_tokens) & ~step.is_prefilling[:count].numpy()] = 0
    return seq_lens, num_tokens


def _share_selections(impls: dict[str, Any], layers: tuple[int, ...]) -> int:
    """From each of these layers on the first without a sliding window selects: how many do.

    A layer's number is in its name; so pipelines whose stages begin with one of them select alike.
    """
    last, selecting, full = None, [], []
    for index, (name, impl) in enumerate(impls.items()):
        if not impl.window:
            full.append(impl)
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            group = bisect.bisect_right(layers, numbers[0] if numbers else index)
            impl.selects, last = group != last, group
            selecting += [impl] if impl.selects else []
    if full:
        selecting[-1].selects_last, full[-1].is_last = True, True
    return len(selecting)


def _first_selecting(layers: dict[str, Any]) -> str | None:
    """Of the layers that keep more than a window."""
    for name, layer in layers.items():
        if compat.is_ours(layer) and not layer.impl.window:
            return name
    return None


def _refuse_mixture(vllm_config: VllmConfig, trained_window: int) -> None:
    """A layer on another backend would rotate beyond its table, and a draft is not measured."""
    if vllm_config.model_config.max_model_len <= trained_window:
        return
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if not isinstance(layer, Attention) or layer.attn_type != AttentionType.DECODER:
            continue
        if layer.is_draft_layer or not compat.is_ours(layer):
            raise ValueError(
                "all layers must be of one model on reattention beyond the trained window, got "
                f"{name} on {layer.attn_backend.get_name()}; lower --max-model-len to "
                f"{trained_window} or leave out its model or backend"
            )


def _refuse_other_scopes(layers: dict[str, Any], scope: Scope, block_size: int) -> None:
    """A draft's layers have tables of rotations for a scope of their own, and get its target's."""
    for name, layer in layers.items():
        if layer.is_draft_layer and (own := layer.impl.scope_of(block_size)) != scope:
            raise ValueError(
                "a draft model must have the trained window of its target, got "
                f"{name} with a scope of {own.blocks * block_size} tokens instead of "
                f"{scope.blocks * block_size}; choose another draft model, or n-grams"
            )
