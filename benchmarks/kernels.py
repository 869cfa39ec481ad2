"""Figure 1: attention of one layer against context length, ours beside what vLLM users have.

    python -m benchmarks.kernels --run --plot

Layers have a cache each, so that what one call leaves in the L2 cache does not serve the next; of
four layers one selects, as by default, and `attention` is the mean. Stages are those of a layer
that selects; `memory` is what a step takes once, for all its layers, to remember from one token to
the next. Decode is timed in a CUDA graph; prefill is 8192 new tokens at the end of the context.
Every case first passes a check against the reference; one that fails writes no row.

FA3, TRITON_ATTN and FlashInfer read our pages. xformers takes none but token-major ones and has a
random cache of those; there is no prefill by it, as without the flash-attn package its paged masks
end at 16 causal queries. The best of FA3's split caps and of xformers' settings counts; FlashInfer
plans before it is timed. Where xformers or FlashInfer is missing, fails its check or does not run,
it has no row and why is printed.

Floors, per layer (a scope of 5152 tokens in decode, 4096 in prefill; summaries are read in one
layer of four):
  decode bytes    context/32/4 * kv_heads * 2d * 2 (summaries) + scope * kv_heads * 2d * itemsize
  prefill FLOPs   4 * new * scope * heads * d (attend)
                  + 2 * new/4 * context/32/4 * heads * 2d (score: 8 queries of 32, 1 layer of 4)
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks import harness
from csrc_triton import kernels, reference
from csrc_triton.layout import Memory, Pages, Rotary, Scope, Tiles, rotation_table
from vllm_reattention.attention import (
    SELECTING_QUERIES,
    reattention,
    select,
    select_for_tail,
    selecting,
)
from vllm_reattention.config import SELECT_EVERY, ReAttentionConfig
from vllm_reattention.memory import Memories
from vllm_reattention.tiles import tail_tiles

COLUMNS = [
    "figure",
    "provider",
    "context_len",
    "batch",
    "heads",
    "kv_heads",
    "head_size",
    "dtype",
    "metric",
    "unit",
    "p50",
    "p20",
    "p80",
    "gpu",
    "torch",
    "triton",
    "vllm",
    "commit",
]
BLOCK_SIZE = 32
SCOPE = ReAttentionConfig().resolve(131072, BLOCK_SIZE, num_layers=32)
HEADS = {"llama-3.1-8b": (32, 8, 128), "qwen2.5-1.5b": (12, 2, 128), "smollm2-135m": (9, 3, 64)}
BIASED = [HEADS["qwen2.5-1.5b"]]  # keys have a bias, which fp8 pages take off
NEW_TOKENS = 8192
XFORMERS_PAGE = 64  # a multiple of the keys its kernel takes at once
TOLD = 400  # characters of an error: xformers names its reasons behind the first line
SECOND_CACHE = 40e9  # bytes: what xformers' own cache may take beside ours


recall = functools.partial(kernels.recall_blocks, per_layer=SCOPE.per_layer)


def page_lists(block_table: torch.Tensor, context: int, page_size: int) -> tuple[torch.Tensor, ...]:
    """Pages as FlashInfer takes them: where a request's begin, all in a row, tokens in the last."""
    batch, pages = block_table.shape[0], -(-context // page_size)
    device = block_table.device
    begin = torch.arange(batch + 1, device=device, dtype=torch.int32) * pages
    last = torch.full((batch,), context - (pages - 1) * page_size, device=device, dtype=torch.int32)
    return begin, block_table[:, :pages].flatten(), last


def attention_of_one(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: torch.Tensor,
    context: int,
    scale: float,
) -> torch.Tensor:
    """One token's attention, (heads, size), over pages (block, KV head, token, size), in fp32."""
    out = []
    for head, queries in enumerate(query.float().chunk(key.shape[1])):
        keys, values = (x[blocks, head].flatten(0, 1)[:context].float() for x in (key, value))
        out.append(torch.softmax(queries @ keys.T * scale, -1) @ values)
    return torch.cat(out)


def assert_agree(out: torch.Tensor, exact: torch.Tensor) -> None:
    error = (out.float() - exact.float()).norm() / exact.float().norm()
    if not error < 0.02:
        raise AssertionError(f"its output is off by {error:.3g}")


def best_of(time: Callable, make: Callable[[], dict[str, Callable]]):
    """Times of the best that `make` offers and its name; None and a reason where there is none."""
    try:
        return min((time(function), name) for name, function in make().items())
    except Exception as error:
        return None, " ".join((str(error) or repr(error)).split())[:TOLD]


@dataclass
class Layer:
    pages: Pages
    raw: torch.Tensor


class Problem:
    """`layers` caches of `batch` requests of `context` tokens, written by our own write_kv."""

    def __init__(self, heads, context, batch, dtype, new_tokens):
        self.heads, self.context, self.batch, self.dtype = heads, context, batch, dtype
        num_heads, num_kv_heads, size = heads
        self.new_tokens = new_tokens
        per_request = -(-context // BLOCK_SIZE)
        num_blocks = per_request * batch
        touched = batch * num_kv_heads * size * 4 * min(context, 8192)
        self.num_layers = SELECT_EVERY
        if new_tokens == 1 and context * batch * num_kv_heads * size < 2e9:
            self.num_layers *= max(1, min(4, -(-(64 << 20) // touched)))
        frequencies = 500000.0 ** -(torch.arange(size // 2, device="cuda") / (size // 2))
        table = rotation_table(frequencies, SCOPE.dense_blocks * BLOCK_SIZE + BLOCK_SIZE)
        self.rotary = Rotary(table)
        self.scale = size**-0.5
        self.block_table = torch.randperm(num_blocks, device="cuda").int().view(batch, per_request)
        self.layers = [self._layer(num_blocks) for _ in range(self.num_layers)]
        self.query = torch.randn(
            batch * new_tokens, num_heads, size, device="cuda", dtype=torch.bfloat16
        )
        self.out = torch.empty_like(self.query)
        self.tiles = self._tiles()
        self.memory = None
        if context > SCOPE.dense_blocks * BLOCK_SIZE:
            found = torch.zeros(len(self.tiles.row), per_request, device="cuda")
            self.memory = Memory(found, 1 / len(self.layers), counts=new_tokens == 1)

    def _layer(self, num_blocks: int) -> Layer:
        _, num_kv_heads, size = self.heads
        item = self.dtype.itemsize
        plane = BLOCK_SIZE * size
        run = 2 * plane + 2 * size * 2 // item
        raw = torch.empty(num_blocks, num_kv_heads, run, device="cuda", dtype=self.dtype)
        planes = raw[..., : 2 * plane].unflatten(-1, (2, BLOCK_SIZE, size))
        summary = raw[..., 2 * plane :].view(torch.bfloat16).unflatten(-1, (2, size))
        pages = Pages(planes[:, :, 0], planes[:, :, 1], summary)
        if self.heads in BIASED and item == 1:
            bias = torch.randn(num_kv_heads, BLOCK_SIZE, size, device="cuda").half()
            pages = pages._replace(bias=bias)
        step = 1 << 17
        for start in range(0, num_blocks * BLOCK_SIZE, step):
            slots = torch.arange(start, min(start + step, num_blocks * BLOCK_SIZE), device="cuda")
            shape = (len(slots), num_kv_heads, size)
            key = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
            kernels.write_kv(key, torch.randn_like(key), pages, slots, self.rotary)
        return Layer(pages, raw)

    def _tiles(self) -> Tiles:
        new, context = self.new_tokens, self.context
        if new == 1:
            rows = torch.arange(self.batch, device="cuda", dtype=torch.int32)
            ones = torch.ones_like(rows)
            dense = ones * SCOPE.dense_blocks
            return Tiles(rows, rows, ones, ones * (context - 1), dense, 1)
        rows = torch.arange(0, new, BLOCK_SIZE, device="cuda", dtype=torch.int32)
        full = torch.full_like(rows, BLOCK_SIZE)
        dense = torch.full_like(rows, SCOPE.dense_blocks)
        return Tiles(torch.zeros_like(rows), rows, full, rows + context - new, dense, BLOCK_SIZE)

    def ours(self) -> None:
        recalled = None
        for index, layer in enumerate(self.layers):
            recalled = reattention(
                self.query, layer.pages, self.block_table, self.tiles, self.scope, self.rotary,
                self.scale, self.out, recalled=recalled if index % SELECT_EVERY else None,
                memory=self.memory,
            )  # fmt: skip

    def check(self) -> None:
        """A few tiles of the last layer against the reference on what the kernels recalled.

        Without a memory, which would have them recall what the layers before it found.
        """
        self.out.fill_(float("nan"))
        memory, self.memory = self.memory, None
        self.ours()
        self.memory = memory
        scored, pages = self.layers[-SELECT_EVERY].pages, self.layers[-1].pages
        for tile in {0, self.tiles.row.shape[0] - 1}:
            part = self.tiles.part(tile, tile + 1)
            some = selecting(part)
            given = (self.query, scored, self.block_table, some, self.scope)
            given += (self.rotary, self.scale)
            recalled = self.out.new_zeros((1, 1, self.scope.recall_blocks)).int()
            if self.context > SCOPE.dense_blocks * BLOCK_SIZE:
                score, extent = kernels.score_blocks(*given)
                theirs, _ = reference.score_blocks(*given)
                n = int(extent[0])
                torch.testing.assert_close(score[..., :n], theirs[..., :n], rtol=0.1, atol=0.02)
                found = recall(score, self.scope.candidate_blocks, extent)
                refined = kernels.refine_scores(*given[:4], found, *given[4:])
                recalled = recall(refined, self.scope.recall_blocks, blocks=found)
            exact = torch.empty_like(self.out)
            reference.attend(self.query, pages, self.block_table, part, recalled, *given[4:], exact)
            rows = slice(int(part.row[0]), int(part.row[0] + part.length[0]))
            assert_agree(self.out[rows], exact[rows])

    @property
    def scope(self) -> Scope:
        return SCOPE.of(self.tiles.max_length)

    def memory_of_a_step(self) -> None:
        generated = self.tiles.length > 0 if self.new_tokens == 1 else None
        place = self.tiles, self.block_table
        self.memories.keep(*place, self.memories.recollect(*place, generated))

    def stages(self) -> dict[str, Callable[[], None]]:
        """One call of each stage per layer, on what the stage before it left."""
        kept, pages = [], self.block_table.numel()
        device = self.query.device
        self.memories = Memories(pages, BLOCK_SIZE, SCOPE.memory, 1 / len(self.layers), device)
        for layer in self.layers:
            given = (self.query, layer.pages, self.block_table)
            some = (*given, selecting(self.tiles))
            rest = (self.rotary, self.scale)
            score, extent = kernels.score_blocks(*some, self.scope, *rest)
            found = recall(score, self.scope.candidate_blocks, extent)
            refined = kernels.refine_scores(*some, found, self.scope, *rest)
            recalled = recall(refined, self.scope.recall_blocks, blocks=found)
            kept.append((some, rest, score, extent, found, refined, recalled))

        def over_layers(call):
            return lambda: [call(*state) for state in kept]

        stages = {
            "score": over_layers(lambda g, r, *_: kernels.score_blocks(*g, self.scope, *r)),
            "recall candidates": over_layers(
                lambda g, r, score, extent, *_: recall(score, self.scope.candidate_blocks, extent)
            ),
            "refine": over_layers(
                lambda g, r, s, e, found, *_: kernels.refine_scores(*g, found, self.scope, *r)
            ),
            "recall": over_layers(
                lambda g, r, s, e, found, refined, _: recall(
                    refined, self.scope.recall_blocks, blocks=found
                )
            ),
            "memory": self.memory_of_a_step,
            "attend": over_layers(
                lambda g, r, s, e, f, refined, recalled: kernels.attend(
                    *g[:3], self.tiles, recalled, self.scope, *r, self.out
                )
            ),
        }
        if self.new_tokens > 1:
            count = tail_tiles(BLOCK_SIZE)
            tail = self.tiles.part(len(self.tiles.row) - count, len(self.tiles.row))
            scope = SCOPE.of_tail
            ends = [((*given, tail), (scope, *rest)) for (*given, _), rest, *_ in kept]
            shared = [select(*given, *rest) for given, rest in ends]
            stages["exact, at a prompt's end"] = lambda: [
                kernels.exact_scores(*given[:3], selecting(tail), *rest) for given, rest in ends
            ]
            stages["select, at a prompt's end"] = lambda: [
                select_for_tail(*given, theirs, *rest)
                for (given, rest), theirs in zip(ends, shared, strict=True)
            ]
        return stages

    def flash_attn_3(self) -> dict[str, Callable[[], None]]:
        """vLLM's FlashAttention 3 on the same pages, at several caps of its key splits."""
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        new, context = self.new_tokens, self.context
        start = torch.arange(self.batch + 1, device="cuda", dtype=torch.int32) * new
        lens = torch.full((self.batch,), context, device="cuda", dtype=torch.int32)
        descale = torch.ones(self.batch, self.heads[1], device="cuda")
        fp8 = self.dtype.itemsize == 1
        query = self.query.to(self.dtype) if fp8 else self.query

        def provider(splits):
            def run():
                for layer in self.layers:
                    flash_attn_varlen_func(
                        q=query, k=layer.pages.key.transpose(1, 2),
                        v=layer.pages.value.transpose(1, 2), out=self.out, cu_seqlens_q=start,
                        max_seqlen_q=new, seqused_k=lens, max_seqlen_k=context,
                        softmax_scale=self.scale, causal=True, block_table=self.block_table,
                        fa_version=3, num_splits=splits,
                        **({"q_descale": descale, "k_descale": descale, "v_descale": descale}
                           if fp8 else {}),
                    )  # fmt: skip

            return run

        return {
            f"{splits}": provider(splits) for splits in ((0, 32, 64, 128) if new == 1 else (0,))
        }

    def triton_attn(self) -> Callable[[], None]:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention

        new, context = self.new_tokens, self.context
        start = torch.arange(self.batch + 1, device="cuda", dtype=torch.int32) * new
        lens = torch.full((self.batch,), context, device="cuda", dtype=torch.int32)

        def run():
            for layer in self.layers:
                unified_attention(
                    q=self.query, k=layer.pages.key.transpose(1, 2),
                    v=layer.pages.value.transpose(1, 2), out=self.out, cu_seqlens_q=start,
                    max_seqlen_q=new, seqused_k=lens, max_seqlen_k=context,
                    softmax_scale=self.scale, causal=True, window_size=(-1, -1),
                    block_table=self.block_table, softcap=0, q_descale=None, k_descale=None,
                    v_descale=None,
                )  # fmt: skip

        return run

    def xformers(self) -> dict[str, Callable[[], torch.Tensor]]:
        """Its paged decode, on random token-major pages of its own: as it is set, with more splits
        than its heuristic goes up to, and with more warps and stages."""
        from xformers.ops import fmha

        num_heads, num_kv_heads, size = self.heads
        per_request = -(-self.context // XFORMERS_PAGE)
        shape = (self.batch * per_request, XFORMERS_PAGE, num_kv_heads, size)
        if 4 * torch.Size(shape).numel() * self.num_layers > SECOND_CACHE:
            raise MemoryError("its own cache does not fit beside ours")
        caches = [
            [torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_() for _ in "kv"]
            for _ in self.layers
        ]
        table = torch.randperm(shape[0], device="cuda").int().view(self.batch, per_request)
        bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
            q_seqlen=[1] * self.batch, kv_seqlen=[self.context] * self.batch,
            block_tables=table, page_size=XFORMERS_PAGE, device=table.device,
        )  # fmt: skip
        group = num_heads // num_kv_heads
        query = self.query.view(1, self.batch, num_kv_heads, group, size)

        def grouped(cache):
            return cache.view(1, -1, num_kv_heads, 1, size).expand(-1, -1, -1, group, -1)

        def provider(operator):
            def run():
                for key, value in caches:
                    out = fmha.memory_efficient_attention_forward(
                        query, grouped(key), grouped(value), bias, scale=self.scale, op=operator
                    )
                return out

            pages = (cache.transpose(1, 2) for cache in caches[-1])
            exact = attention_of_one(self.query[0], *pages, table[0], self.context, self.scale)
            assert_agree(run()[0, 0].flatten(0, 1), exact)
            return run

        operator = fmha.triton_splitk.FwOp
        return {
            "as it is": provider(operator),
            "128 splits": provider(operator.get_operator(128)),
            "4 warps": provider(operator.get_operator(64, num_warps=4, num_stages=3)),
        }

    def flashinfer(self, exact: torch.Tensor | None) -> dict[str, Callable[[], torch.Tensor]]:
        """FlashInfer on the same pages, as it chooses; `exact` is what FA3 made of them."""
        import flashinfer

        begin, indices, last = page_lists(self.block_table, self.context, BLOCK_SIZE)
        workspace = torch.zeros(256 << 20, device="cuda", dtype=torch.uint8)
        shape = (*self.heads, BLOCK_SIZE)
        types = dict(q_data_type=self.query.dtype, kv_data_type=self.dtype, sm_scale=self.scale)
        if self.new_tokens == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "HND", use_cuda_graph=True, use_tensor_cores=True,
                paged_kv_indptr_buffer=begin.clone(), paged_kv_indices_buffer=indices.clone(),
                paged_kv_last_page_len_buffer=last.clone(),
            )  # fmt: skip
            wrapper.plan(begin, indices, last, *shape, **types)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
            start = torch.arange(self.batch + 1, dtype=torch.int32) * self.new_tokens
            wrapper.plan(start, begin, indices, last, *shape, causal=True, **types)

        def run():
            for layer in self.layers:
                wrapper.run(self.query, (layer.pages.key, layer.pages.value), out=self.out)
            return self.out

        self.out.fill_(float("nan"))
        run()
        if exact is not None:
            assert_agree(self.out, exact)
        pages, newest = self.layers[-1].pages, self.new_tokens - 1  # of request 0
        given = (pages.key, pages.value, self.block_table[0], self.context, self.scale)
        assert_agree(self.out[newest], attention_of_one(self.query[newest], *given))
        return {"": run}


def floor(problem: Problem) -> tuple[float, float]:
    """Bytes and FLOPs one layer cannot do without."""
    num_heads, num_kv_heads, size = problem.heads
    context = problem.context
    selects, new = context > SCOPE.dense_blocks * BLOCK_SIZE, problem.new_tokens
    scope = problem.scope.blocks * BLOCK_SIZE if selects else context
    scored = context / BLOCK_SIZE / SELECT_EVERY if selects else 0
    seen = scope if selects else context - new / 2
    bytes_moved = (
        problem.batch * num_kv_heads * size * 2 * (scored * 2 + scope * problem.dtype.itemsize)
    )
    select = new if new == 1 else new * SELECTING_QUERIES / BLOCK_SIZE
    flops = problem.batch * num_heads * size * 4 * (new * seen + select * scored)
    return bytes_moved, flops


def run_case(
    figure: str, name: str, context: int, batch: int, dtype, new: int, others: bool
) -> None:
    heads = HEADS[name]
    problem = Problem(heads, context, batch, dtype, new)
    problem.check()
    in_graph = new == 1
    rows = []
    shared = dict(
        figure=figure, context_len=context, batch=batch, heads=heads[0], kv_heads=heads[1],
        head_size=heads[2], dtype=str(dtype).removeprefix("torch."), **harness.stamp(),
    )  # fmt: skip

    def row(provider, metric, unit, p50, p20, p80):
        numbers = {"p50": f"{p50:.5g}", "p20": f"{p20:.5g}", "p80": f"{p80:.5g}"}
        rows.append(dict(shared, provider=provider, metric=metric, unit=unit, **numbers))

    def time(function):
        return harness.quantiles(function, in_graph, problem.num_layers)

    ours = time(problem.ours)
    row("reattention", "attention", "ms", *ours)
    bytes_moved, flops = floor(problem)
    told = f"{figure} {name} {batch} x {context} {shared['dtype']}: ours {ours[0]:.4f} ms"
    if new == 1:
        row("reattention", "bandwidth", "TB/s", *(bytes_moved / t / 1e9 for t in ours))
        told += f" ({bytes_moved / ours[0] / 1e9:.2f} TB/s of what must move)"
    else:
        row("reattention", "rate", "TFLOP/s", *(flops / t / 1e9 for t in ours))
        told += f" ({flops / ours[0] / 1e9:.0f} TFLOP/s of what must be done)"
    if context > SCOPE.dense_blocks * BLOCK_SIZE and others:
        try:
            for stage, function in problem.stages().items():
                took = time(function)
                if stage == "memory":
                    took = [value * problem.num_layers for value in took]  # one call, not a layer's
                row("reattention", stage, "ms", *took)
                told += f"; {stage} {took[0]:.4f}"
        except torch.OutOfMemoryError:
            told += "; stages do not fit at once"
    exact = None
    if harness.version("vllm") != "-":
        tries = problem.flash_attn_3()
        best = min((time(f), n) for n, f in tries.items())
        if others:
            tries["0"]()
            exact = problem.out.clone()
        row("FLASH_ATTN (FA3)", "attention", "ms", *best[0])
        told += f" | FA3 {best[0][0]:.4f} (splits {best[1]}) -> {best[0][0] / ours[0]:.2f}x"
        if others and context <= 131072 and dtype.itemsize == 2:
            took = time(problem.triton_attn())
            row("TRITON_ATTN", "attention", "ms", *took)
            told += f" | TRITON_ATTN {took[0]:.4f}"
    if others and dtype.itemsize == 2:
        baselines = {"FlashInfer": functools.partial(problem.flashinfer, exact)}
        if new == 1:
            baselines = {"xformers (triton_splitk)": problem.xformers} | baselines
        for provider, make in baselines.items():
            took, which = best_of(time, make)
            if took is None:
                told += f" | {provider} has no row: {which}"
                continue
            row(provider, "attention", "ms", *took)
            told += f" | {provider} {took[0]:.4f}" + (f" ({which})" if which else "")
    print(told, flush=True)
    harness.append(harness.RESULTS / "kernels.csv", COLUMNS, rows)


def run(quick: bool) -> None:
    bf16, fp8 = torch.bfloat16, torch.float8_e4m3fn
    llama, qwen = "llama-3.1-8b", "qwen2.5-1.5b"
    cases = [("decode", llama, n, 1, bf16, 1) for n in (8192, 32768, 131072, 524288, 1048576)]
    cases += [("decode", llama, n, b, bf16, 1) for n in (8192, 131072) for b in (8, 32)]
    cases += [("prefill", llama, n, 1, bf16, NEW_TOKENS) for n in (8192, 131072, 524288, 1048576)]
    if not quick:
        cases += [("decode", llama, n, 1, fp8, 1) for n in (131072, 1048576)]
        cases += [("decode", llama, n, b, fp8, 1) for n in (8192, 32768) for b in (8, 32)]
        cases += [("prefill", llama, n, 1, fp8, NEW_TOKENS) for n in (131072, 1048576)]
        cases += [("decode", qwen, n, 1, bf16, 1) for n in (32768, 131072, 1048576, 4194304)]
        cases += [("decode", qwen, n, 1, fp8, 1) for n in (131072, 1048576)]
        cases += [("prefill", qwen, 131072, 1, fp8, NEW_TOKENS)]
        cases += [("prefill", qwen, n, 1, bf16, NEW_TOKENS) for n in (131072, 1048576, 4194304)]
        cases += [("decode", "smollm2-135m", n, 8, bf16, 1) for n in (8192, 131072, 1048576)]
    for case in cases:
        try:
            run_case(*case, others=not quick or case[1] == llama)
        except AssertionError as error:
            print(case, "FAILED its check, no row:", str(error).split("\n")[0], flush=True)
        torch.cuda.empty_cache()


def plot() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = {"metric": "attention", "batch": "1", "heads": "32", "dtype": "bfloat16"}
    table = harness.read(harness.RESULTS / "kernels.csv")
    rows = [row for row in table if shown.items() <= row.items()]
    ours = dict.fromkeys(row["commit"] for row in rows if row["provider"] == "reattention")
    # not every length is measured each time; points of commits long past would mislead
    newest, recent = {}, list(ours)[-9:]
    for row in rows:
        if row["provider"] == "reattention" and row["commit"] not in recent:
            continue  # others do not change with our commits
        key = (row["figure"], row["provider"], int(row["context_len"]))
        newest[key] = float(row["p50"])
    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    titles = {"decode": "decode, one token", "prefill": f"prefill, {NEW_TOKENS} new tokens"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for provider in sorted({p for k, p, _ in newest if k == kind}):
            points = sorted((n, t) for (k, p, n), t in newest.items() if (k, p) == (kind, provider))
            axis.plot(*zip(*points, strict=True), "o-", label=provider)
        axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="ms per layer")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncol=2, fontsize=8)
    figure.suptitle(f"Attention of one layer, Llama-3.1-8B heads, bf16, {rows[-1]['gpu']}")
    figure.tight_layout()
    figure.savefig(harness.RESULTS / "kernels.png", dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--quick", action="store_true", help="the Llama-3.1-8B bf16 cases only")
    parser.add_argument("--plot", action="store_true")
    chosen = parser.parse_args()
    if chosen.run:
        run(chosen.quick)
    if chosen.plot:
        plot()
