"""Each kernel against its reference: on a GPU where there is one, else in Triton's interpreter."""

import dataclasses
import functools
import math
import random
import types
import unittest.mock

import pytest
import torch

from csrc_triton import attend, kernels, layout, read, reference, refine
from csrc_triton import exact as exact_module
from csrc_triton.layout import KEPT, Memory, Pages, Recalled, Rotary, Scope, Tiles, nothing_kept
from tests.cases import Case
from vllm_reattention import attention, mass, memory, warm_up
from vllm_reattention import tiles as tiles_module

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter multiplies bf16 as if it were an integer
DTYPES = [torch.float16, torch.bfloat16] if ON_GPU else [torch.float16]
DECODE = [
    Case(contexts=(300, 17, 160)),
    Case(contexts=(200, 333), heads=(6, 1), block_size=32, scope=Scope(1, 3, 2, 6, 6)),
    Case(contexts=(257,), heads=(3, 3), head_size=80, rotary_dim=32, interleaved=True),
    Case(contexts=(300, 129), head_size=96, query_scale=1.4, sinks=True),
    Case(contexts=(260,), rotary_dim=0, soft_cap=5.0, spread=4.0),
    Case(contexts=(300, 40), scope=Scope(0, 0, 0, 0, 0, window=50), sinks=True),
    Case(contexts=(300,), shift=-2.0, spread=2.0, interleaved=True),
    Case(contexts=(700,), scope=Scope(2, 3, 2, 20, 9), block_size=16),
    Case(contexts=(260,), rotary_dim=0, head_size=40),
    Case(contexts=(300, 190), heads=(8, 4), scope=Scope(1, 4, 3, 8, 8, per_layer=True)),
    Case(contexts=(300, 300, 17), dense=(8, 30, 8)),
    Case(contexts=(300, 17), head_size=80, rotary_dim=40, bias=2.0, sinks=True),
    # so many that each is split into fewer parts than the merge has lanes for
    Case(contexts=(40, 70, 300, 20, 90, 33, 150, 64, 10), heads=(2, 2), head_size=32),
]
PREFILL = [
    Case(contexts=(300, 17, 160), queries=(37, 17, 1)),
    Case(contexts=(200, 333), queries=(20, 65), heads=(6, 1), block_size=32,
         scope=Scope(1, 3, 2, 6, 6)),
    Case(contexts=(600,), queries=(20,), scope=Scope(2, 4, 2, 8, 8, sample_from=30)),
    Case(contexts=(257,), queries=(30,), heads=(3, 3), head_size=80, rotary_dim=32,
         interleaved=True),
    Case(contexts=(300, 129), queries=(16, 90), head_size=96, query_scale=1.4, sinks=True),
    Case(contexts=(260,), queries=(33,), rotary_dim=0, soft_cap=5.0, spread=4.0),
    Case(contexts=(300, 40), queries=(40, 7), scope=Scope(0, 0, 0, 0, 0, window=50), sinks=True),
    Case(contexts=(300,), queries=(18,), shift=-2.0, spread=2.0, interleaved=True),
    Case(contexts=(190,), queries=(20,), heads=(32, 2), scope=Scope(1, 3, 2, 6, 6)),
    Case(contexts=(300, 190), queries=(40, 3), scope=Scope(1, 4, 3, 8, 8, per_layer=True)),
    Case(contexts=(300, 17), queries=(37, 17), head_size=80, rotary_dim=40, bias=2.0, sinks=True),
    Case(contexts=(300, 17), queries=(37, 17), head_size=96, bias=2.0),
    Case(contexts=(300, 300, 17), queries=(37, 40, 5), dense=(17, 8, 8)),
]  # fmt: skip
if ON_GPU:
    DECODE += [
        Case(contexts=(5000, 1, 31, 2049), heads=(32, 8), head_size=128, block_size=32,
             scope=Scope(1, 15, 16, 32, 60)),
        Case(contexts=(900,), heads=(16, 1), head_size=256, block_size=64,
             scope=Scope(1, 3, 2, 6, 6)),
        Case(contexts=(1500, 130), heads=(14, 2), block_size=128, scope=Scope(1, 2, 1, 4, 6)),
        Case(contexts=(900, 17, 400), heads=(12, 2), head_size=128, block_size=32,
             scope=Scope(1, 6, 4, 12, 20), bias=2.0),
    ]  # fmt: skip
    PREFILL += [
        Case(contexts=(5000, 1, 31, 2049), queries=(777, 1, 31, 100), heads=(32, 8), head_size=128,
             block_size=32, scope=Scope(1, 15, 16, 32, 60)),
        Case(contexts=(900,), queries=(70,), heads=(16, 1), head_size=256, block_size=64,
             scope=Scope(1, 3, 2, 6, 6)),
        Case(contexts=(1500, 130), queries=(300, 130), heads=(14, 2), block_size=128,
             scope=Scope(1, 2, 1, 4, 6)),
        Case(contexts=(900, 40, 128), queries=(100, 40, 64), block_size=64,
             scope=Scope(1, 3, 2, 6, 6)),
        Case(contexts=(900, 17, 400), queries=(77, 17, 33), heads=(9, 3), block_size=32,
             scope=Scope(1, 6, 4, 12, 20, per_layer=True)),
        Case(contexts=(700, 333, 32), queries=(49, 65, 32), heads=(12, 2), head_size=128,
             block_size=32, scope=Scope(1, 3, 2, 6, 6)),
        Case(contexts=(300, 17, 160), queries=(37, 17, 1), heads=(16, 2), sinks=True,
             interleaved=True, query_scale=1.4),
        Case(contexts=(900,), queries=(150,), heads=(8, 2), head_size=128, block_size=64,
             spread=4.0, scope=Scope(1, 3, 2, 6, 6)),
        Case(contexts=(900, 17, 400), queries=(77, 17, 33), heads=(12, 2), head_size=128,
             block_size=32, scope=Scope(1, 6, 4, 12, 20), bias=2.0),
        Case(contexts=(900, 17, 900), queries=(77, 17, 33), heads=(8, 2), head_size=128,
             block_size=32, scope=Scope(1, 6, 4, 12, 20, per_layer=True), dense=(30, 12, 12)),
    ]  # fmt: skip
selecting = [case for case in DECODE + PREFILL if not case.scope.window]
every = pytest.mark.parametrize("case", DECODE + PREFILL, ids=str)
# Those whose pages differ: how they are attended to does not matter to what is written
written = {
    (
        case.heads,
        case.head_size,
        case.rotary_dim,
        case.block_size,
        case.interleaved,
        case.bias,
    ): case
    if ON_GPU
    else dataclasses.replace(case, contexts=tuple(min(context, 120) for context in case.contexts))
    for case in DECODE + PREFILL
}
each_written = pytest.mark.parametrize("case", written.values(), ids=str)
each_selecting = pytest.mark.parametrize("case", selecting, ids=str)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
pytestmark = pytest.mark.gpu if ON_GPU else []


def assert_as_accurate(actual, eager, exact):
    """Same places finite, and an error of the order of the reference's own in that dtype."""
    assert torch.equal(actual.isnan(), exact.isnan())
    actual, eager, exact = (torch.nan_to_num(x.double()) for x in (actual, eager, exact))
    rounding = 2.0**-8 if eager.dtype == torch.bfloat16 else 2.0**-10
    allowed = 3 * (eager - exact).norm() + rounding * exact.norm()
    assert (actual - exact).norm() <= allowed
    assert (actual - exact).abs().max() <= 16 * rounding * exact.abs().max()


@each_written
@each_dtype
def test_write_kv(case, dtype):
    ours, theirs = case.build(dtype, DEVICE), case.build(dtype, DEVICE)
    ours.write(kernels.write_kv)
    theirs.write(reference.write_kv)
    for actual, eager in zip(ours.pages[:3], theirs.pages[:3], strict=True):
        torch.testing.assert_close(actual, eager, rtol=2**-7, atol=2**-7, equal_nan=True)


@pytest.mark.parametrize("case", [DECODE[0], DECODE[2], DECODE[3], DECODE[4]], ids=str)
@each_dtype
def test_rotate_rows(case, dtype):
    inputs = case.build(dtype, DEVICE)
    positions = torch.arange(len(inputs.query), device=DEVICE, dtype=torch.int32) * 7 % 300
    args = (positions, inputs.rotary, case.query_scale)
    actual = kernels.rotate_rows(inputs.query, *args)
    eager = reference.rotate_rows(inputs.query, *args)
    exact = reference.rotate_rows(inputs.query.double(), *args)
    assert_as_accurate(actual, eager, exact)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["", "fp8"])
@pytest.mark.parametrize("case", [DECODE[i] for i in (0, 2, 3, 4, 11)], ids=str)
@each_dtype
def test_read_kv(case, dtype, cache_dtype):
    inputs = case.build(dtype, DEVICE, cache_dtype)
    if cache_dtype is not None:
        inputs.pages = inputs.pages._replace(key_scale=0.5, value_scale=2.0)
    inputs.write(reference.write_kv)
    context = case.contexts[0]
    at = torch.arange(context, device=DEVICE)
    start = at // case.block_size * case.block_size
    slots = inputs.block_table[0][at // case.block_size].long() * case.block_size + at - start
    args = (inputs.pages, slots, start.int(), inputs.rotary)
    for actual, eager, exact in zip(
        kernels.read_kv(*args, dtype),
        reference.read_kv(*args, dtype),
        reference.read_kv(*args, torch.float64),
        strict=True,
    ):
        assert actual.dtype == dtype and actual.is_contiguous() and len(actual) == context
        assert_as_accurate(actual, eager, exact)


@pytest.mark.parametrize("case", [DECODE[0], DECODE[2]], ids=str)
def test_read_kv_writes_nothing_beside_its_rows(case, monkeypatch):
    """Of heads that a program has and the cache has not."""
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    around = []

    def empty(shape, dtype, device):
        around.append(torch.full((shape[0] + 8, *shape[1:]), 7.0, dtype=dtype, device=device))
        return around[-1][: shape[0]]

    monkeypatch.setattr(read, "torch", types.SimpleNamespace(empty=empty))
    place = torch.zeros(3, dtype=torch.int64, device=DEVICE) + inputs.slot_mapping[0]
    kernels.read_kv(inputs.pages, place, place.int() * 0, inputs.rotary, torch.float16)
    assert len(around) == 2
    for rows in around:
        assert (rows[3:] == 7.0).all() and not (rows[:3] == 7.0).any()


@each_selecting
@each_dtype
def test_score_blocks(case, dtype):
    inputs = case.build(dtype, DEVICE)
    inputs.write(reference.write_kv)
    score, extent = kernels.score_blocks(*inputs.score_args())
    exact, exact_extent = reference.score_blocks(*inputs.exact().score_args())
    assert torch.equal(extent, exact_extent)
    seen = torch.arange(score.shape[-1], device=DEVICE) < extent[:, None, None]
    actual = torch.where(seen, score, -1.0)
    torch.testing.assert_close(actual.double(), exact, rtol=0.04, atol=0.01)


@pytest.mark.parametrize("probes", [layout.PROBES, 3])
@each_selecting
@each_dtype
def test_refine_scores(case, dtype, probes, monkeypatch):
    """With few probes they stand for others, too, and some of them are candidates."""
    for module in (reference, refine):
        monkeypatch.setattr(module, "PROBES", probes)
    inputs = case.build(dtype, DEVICE)
    inputs.write(reference.write_kv)
    score, extent = reference.score_blocks(*inputs.score_args())
    scope = case.scope
    candidates = reference.recall_blocks(
        score, scope.candidate_blocks, extent, per_layer=scope.per_layer
    )
    args = (candidates, *inputs.score_args()[4:], case.soft_cap)
    with monkeypatch.context() as patch:  # scratch that nobody wrote must not count
        patch.setattr(torch, "empty", lambda size, **how: torch.full(size, float("nan"), **how))
        actual = kernels.refine_scores(*inputs.score_args()[:4], *args)
    exact = reference.refine_scores(*inputs.exact().score_args()[:4], *args)
    torch.testing.assert_close(actual.double(), exact, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("columns", [exact_module.COLUMNS, 8])
@pytest.mark.parametrize("case", [case for case in PREFILL if not case.scope.window], ids=str)
@each_dtype
def test_exact_scores(case, dtype, columns, monkeypatch):
    """In one part and in several, of tiles as they stand at the ends of prompts."""
    monkeypatch.setattr(exact_module, "COLUMNS", columns)
    inputs = case.build(dtype, DEVICE)
    inputs.write(reference.write_kv)
    with monkeypatch.context() as patch:  # scratch that nobody wrote must not count
        nothing = {torch.float32: float("nan"), torch.int32: -7}
        patch.setattr(
            torch,
            "empty",
            lambda size, dtype, **how: torch.full(size, nothing[dtype], dtype=dtype, **how),
        )
        score, extent = kernels.exact_scores(*inputs.score_args(), case.soft_cap)
    exact, exact_extent = reference.exact_scores(*inputs.exact().score_args(), case.soft_cap)
    assert torch.equal(extent, exact_extent) and extent.max() > 0
    seen = torch.arange(score.shape[-1], device=DEVICE) < extent[:, None, None]
    actual = torch.where(seen, score, -1.0)
    torch.testing.assert_close(actual.double(), exact, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("far", [0.0, 64.0, -64.0])
@pytest.mark.parametrize("queries", [None, (33,)], ids=["decode", "prefill"])
def test_shares_of_logits_of_any_size(queries, far):
    """Of e to the power of 512 fp32 holds as little as of its inverse: a share tells of neither."""
    case = Case(contexts=(260,), queries=queries, rotary_dim=0)
    inputs = case.build(torch.float16, DEVICE)
    inputs.key[..., 0] = 64.0
    inputs.query[..., 0] = far  # of every logit 64 * far / 8: numbers that fp16 holds exactly
    inputs.write(reference.write_kv)
    args, exact_args = inputs.score_args(), inputs.exact().score_args()
    score, extent = reference.score_blocks(*args)
    candidates = reference.recall_blocks(score, case.scope.candidate_blocks, extent)
    actual = kernels.refine_scores(*args[:4], candidates, *args[4:])
    exact = reference.refine_scores(*exact_args[:4], candidates, *exact_args[4:])
    assert exact.clamp(min=0).sum() > 1
    torch.testing.assert_close(actual.double(), exact, rtol=0.01, atol=0.001)


@pytest.mark.parametrize("queries", [None, (33,)], ids=["decode", "prefill"])
@pytest.mark.parametrize("where", ["key", "query"])
def test_outliers_of_fp16_hide_nothing(where, queries):
    """Variances and squares end at 65504 there; an inf would make every share nan."""
    case = Case(contexts=(520,), queries=queries, heads=(2, 1), rotary_dim=0)
    inputs = case.build(torch.float16, DEVICE)
    inputs.query[..., 1] = 4.0
    for block in (9, 17, 25):
        inputs.key[16 * block : 16 * block + 16, :, 1] = 16.0
    if where == "key":
        inputs.key[70, :, 0], inputs.query[..., 0] = 2000.0, 0.0
    else:
        inputs.key[..., 0], inputs.query[..., 0] = 0.0, 3000.0
    for stage in (reference, kernels):
        inputs.write(stage.write_kv)
        recalled = attention.select(*inputs.score_args(), stage=stage)[0]
        assert all({9, 17, 25} <= set(row) for row in recalled.tolist())


@pytest.mark.parametrize("all_are", ["candidates", "probes"])
def test_shares_are_exact_where_all_keys_are_read(all_are, monkeypatch):
    """Against a softmax over keys that were never rotated or paged, in float64."""
    case = Case(contexts=(471,), scope=Scope(1, 4, 3, 8, 8), spread=2.0)
    inputs = case.build(torch.float32, DEVICE).exact()
    inputs.write(reference.write_kv)
    size, heads = case.block_size, case.heads[1]
    local = 470 // size - 2
    count = local - 1 if all_are == "candidates" else 5
    candidates = torch.arange(1, 1 + count, dtype=torch.int32, device=DEVICE).expand(2, 1, -1)
    monkeypatch.setattr(reference, "PROBES", local if all_are == "probes" else 2)
    args = inputs.score_args()
    score = reference.refine_scores(*args[:4], candidates, *args[4:])[0]
    key = inputs.key[: local * size].double().transpose(0, 1)
    query = inputs.query[0].double().unflatten(0, (heads, -1))
    shares = (query @ key.transpose(1, 2) * inputs.scale).softmax(-1)
    exact = shares.unflatten(-1, (-1, size)).sum(-1).sum(1)
    torch.testing.assert_close(score.double(), exact[:, 1 : 1 + count], rtol=1e-4, atol=1e-6)
    highest, extent = reference.exact_scores(*args)
    assert extent.tolist() == [local, 0] and (highest[0, :, 0] == -1).all()
    most = shares.unflatten(-1, (-1, size)).sum(-1).amax(1)
    torch.testing.assert_close(highest[0, :, 1:local], most[:, 1:], rtol=1e-4, atol=1e-6)


def test_probes_tell_what_summaries_do_not():
    """One key in each block outweighs the rest: means and variances tell far less of the mass."""
    case = Case(contexts=(400 * 16,), scope=Scope(1, 4, 3, 8, 8), seed=1)
    inputs = case.build(torch.float32, DEVICE).exact()
    signs = torch.randn(400, 2, 64, generator=torch.Generator().manual_seed(2)).sign()
    inputs.key[::16] += 2.5 * signs.to(DEVICE)
    inputs.write(reference.write_kv)
    args = inputs.score_args()
    score, extent = reference.score_blocks(*args)
    few, every = (reference.recall_blocks(score, n, extent) for n in (8, 400))
    told, exact = (reference.refine_scores(*args[:4], n, *args[4:])[0] for n in (few, every))
    exact = exact.gather(1, torch.searchsorted(every[0], few[0]))
    key = inputs.key[: 397 * 16].double().transpose(0, 1)
    query = inputs.query[0].double().unflatten(0, (2, -1)) * inputs.scale
    denominator = (query @ key.transpose(1, 2)).logsumexp(-1)
    variance, mean = torch.var_mean(key.unflatten(1, (397, 16)), dim=2, correction=0)
    estimate = query @ mean.transpose(1, 2) + query**2 @ variance.transpose(1, 2) / 2
    by_summaries = ((estimate + math.log(16)).logsumexp(-1) - denominator).abs().max()
    by_probes = (told / exact).log().abs().max()
    assert by_probes < by_summaries / 2, (by_probes, by_summaries)


@every
@each_dtype
def test_attend(case, dtype):
    if case.bias and dtype == torch.bfloat16:
        pytest.skip("a bias stands beside fp8 keys, which are multiplied in float16")
    inputs = case.build(dtype, DEVICE)
    inputs.write(reference.write_kv)
    recalled = inputs.recalled()
    actual = inputs.attend(kernels.attend, recalled)
    eager = inputs.attend(reference.attend, recalled)
    exact = inputs.exact().attend(reference.attend, recalled)
    assert_as_accurate(actual, eager, exact)
    assert torch.equal(~actual.isnan().any(-1).any(-1).cpu(), inputs.written_rows())


@pytest.mark.skipif(not ON_GPU, reason="Hopper's kernel is not for the interpreter")
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_hopper_takes_full_tiles_and_leaves_the_rest(cache_dtype, monkeypatch):
    if attend.for_hopper(torch.device(DEVICE)) is None:
        pytest.skip("needs Triton 3.6 on a Hopper GPU")
    taken = []
    for case in PREFILL:
        inputs = case.build(torch.bfloat16, DEVICE, cache_dtype)
        inputs.write(kernels.write_kv)
        with monkeypatch.context() as patch:
            plain = unittest.mock.MagicMock()
            patch.setattr(attend, "attend_tile_kernel", plain)
            inputs.attend(kernels.attend, inputs.recalled())
            taken.append(not plain.__getitem__.called)
    llama = next(index for index, case in enumerate(PREFILL) if case.heads == (32, 8))
    assert taken[llama] and taken[llama + 3 :] == [True] * 7  # and those listed behind
    assert not any(taken[3:8])  # odd sizes, partial rotary, soft cap, window


def test_hopper_is_given_keys_it_knows():
    fp16, bf16, fp8 = torch.float16, torch.bfloat16, torch.float8_e4m3fn
    others = [torch.float32, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.uint8, torch.int8]
    rest = (Rotary(torch.zeros(1, 2, 32)), DECODE[0].scope)
    taken = set()
    for dtype in (fp16, bf16, torch.float32):
        for cache_dtype in (fp16, bf16, fp8, *others):
            plane = torch.empty(3, 2, 32, 64, dtype=cache_dtype)
            given = (torch.empty(32, 8, 64, dtype=dtype), Pages(plane, plane, plane), *rest)
            if attend._hopper_takes(*given, 128, 0.0):
                taken.add((dtype, cache_dtype))
            assert not attend._hopper_takes(*given, 64, 0.0)
    assert taken == {(fp16, fp16), (fp16, fp8), (bf16, bf16), (bf16, fp8)}


@pytest.mark.skipif(not ON_GPU, reason="the interpreter has no fp8")
@pytest.mark.parametrize(
    "case", [*DECODE, PREFILL[0], PREFILL[2], PREFILL[8], *PREFILL[10:]], ids=str
)
@each_dtype
def test_fp8_cache(case, dtype):
    """Unused pages and rows hold nan here too. Tiles of most cases go to Hopper's kernel."""
    inputs = case.build(dtype, DEVICE, torch.float8_e4m3fn)
    twin = case.build(dtype, DEVICE, torch.float8_e4m3fn)
    for each in (inputs, twin):
        each.pages = each.pages._replace(key_scale=0.25, value_scale=0.5)
    inputs.write(kernels.write_kv)
    twin.write(reference.write_kv)
    for actual, eager in zip(inputs.pages[:3], twin.pages[:3], strict=True):
        torch.testing.assert_close(
            actual.float(), eager.float(), rtol=2**-3, atol=2**-6, equal_nan=True
        )
    recalled = inputs.recalled()
    actual = inputs.attend(kernels.attend, recalled)
    eager = inputs.attend(reference.attend, recalled)
    assert_as_accurate(actual, eager, inputs.exact().attend(reference.attend, recalled))
    assert torch.equal(~actual.isnan().any(-1).any(-1).cpu(), inputs.written_rows())
    *given, scope, rotary, scale = twin.score_args()
    if scope.candidate_blocks:
        score, extent = reference.score_blocks(*given, scope, rotary, scale)
        told = reference.recall_blocks(score, scope.candidate_blocks, extent), scope, rotary, scale
        refined = kernels.refine_scores(*given, *told, case.soft_cap)
        exact = reference.refine_scores(*inputs.exact().score_args()[:4], *told, case.soft_cap)
        torch.testing.assert_close(refined.double(), exact, rtol=0.02, atol=0.01)
    if scope.recall_blocks:
        given = *given, recalled, scope, rotary, scale
        assert mass.recalled_share(case.heads[1] - 1, *given).max() <= 1


@pytest.mark.parametrize("case", [DECODE[11], PREFILL[10]], ids=str)
def test_a_bias_of_keys_changes_what_is_stored_and_nothing_else(case):
    biased, plain = (case.build(torch.float64, "cpu") for _ in range(2))
    plain.pages = plain.pages._replace(bias=None)
    for inputs in (biased, plain):
        inputs.write(reference.write_kv)
    slots = biased.slot_mapping
    stored = [
        inputs.pages.key[slots // case.block_size, :, slots % case.block_size]
        for inputs in (biased, plain)
    ]
    assert (stored[0] - stored[1]).abs().mean() > 0.5 * case.bias
    close = functools.partial(torch.testing.assert_close, equal_nan=True)
    # to selections a bias is constant as far as fp16 holds it, turned by each offset
    near, same = dict(rtol=1e-3, atol=1e-4), dict(rtol=1e-9, atol=1e-9)
    for score in (reference.score_blocks, reference.exact_scores):
        close(score(*biased.score_args()), score(*plain.score_args()), **near)
    recalled = plain.recalled()
    refined = [
        reference.refine_scores(*args[:4], recalled, *args[4:])
        for args in (biased.score_args(), plain.score_args())
    ]
    close(*refined, **near)
    close(*(inputs.attend(reference.attend, recalled) for inputs in (biased, plain)), **same)


def test_fp8_keeps_keys_whose_bias_is_taken_off():
    case = Case(contexts=(300, 160), queries=(37, 17), rotary_dim=0, bias=100.0)
    stage, dtype = (kernels, torch.float16) if ON_GPU else (reference, torch.float32)
    exact = case.build(torch.float64, DEVICE)
    exact.write(reference.write_kv)
    recalled = exact.recalled()
    right = exact.attend(reference.attend, recalled)
    written, errors = exact.written_rows(), []
    for bias in (exact.pages.bias, None):
        inputs = case.build(dtype, DEVICE, torch.float8_e4m3fn)
        inputs.pages = inputs.pages._replace(bias=bias)
        inputs.write(stage.write_kv)
        out = inputs.attend(stage.attend, recalled)
        errors.append(((out - right)[written].norm() / right[written].norm()).item())
    assert errors[0] < 0.1 < 0.5 < errors[1]


@pytest.mark.skipif(not ON_GPU, reason="too many for the interpreter")
@every
def test_random_batches(case):
    """A thousand in all, each stage in float16 on what the one before it gave, against float64."""
    for seed in range(-(-1000 // len(DECODE + PREFILL))):
        run_stages(random_batch(case, seed))


def random_batch(case: Case, seed: int) -> Case:
    """Other requests: as many as five, of up to 40 blocks, and queries in up to four of them.

    Where some attend to more than others, any of them may.
    """
    rng = random.Random(f"{case} {seed}")
    size = case.block_size
    contexts = tuple(rng.randint(1, 40 * size) for _ in range(rng.randint(1, 5)))
    queries = None
    if case.queries is not None:
        queries = tuple(rng.randint(1, min(context, 3 * size)) for context in contexts)
    dense = case.dense and tuple(rng.choice(case.dense) for _ in contexts)
    return dataclasses.replace(case, contexts=contexts, queries=queries, dense=dense, seed=seed)


def run_stages(case: Case) -> None:
    inputs, scope = case.build(torch.float16, DEVICE), case.scope
    inputs.write(kernels.write_kv)
    args, exact_args = inputs.score_args(), inputs.exact().score_args()
    recalled = inputs.recalled()
    if not scope.window:
        score, extent = kernels.score_blocks(*args)
        seen = torch.arange(score.shape[-1], device=DEVICE) < extent[:, None, None]
        exact, exact_extent = reference.score_blocks(*exact_args)
        assert torch.equal(extent, exact_extent)
        close(torch.where(seen, score, -1.0), exact, rtol=0.04, atol=0.02)

        given = (score, scope.candidate_blocks, extent, None, scope.per_layer)
        candidates = kernels.recall_blocks(*given)
        assert torch.equal(candidates, reference.recall_blocks(*given))
        rest = (candidates, *args[4:], case.soft_cap)
        refined = kernels.refine_scores(*args[:4], *rest)
        close(refined, reference.refine_scores(*exact_args[:4], *rest), rtol=0.02, atol=0.02)

        given = (refined, scope.recall_blocks, None, candidates, scope.per_layer)
        recalled = kernels.recall_blocks(*given)
        assert torch.equal(recalled, reference.recall_blocks(*given))
    actual, eager = (inputs.attend(stage.attend, recalled) for stage in (kernels, reference))
    assert_as_accurate(actual, eager, inputs.exact().attend(reference.attend, recalled))


def close(actual: torch.Tensor, exact: torch.Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(actual.double(), exact.double(), rtol=rtol, atol=atol)


ROWS = {
    "random": lambda gen, n: torch.rand(3, 2, n, generator=gen),
    "tied": lambda gen, n: torch.randint(0, 3, (3, 2, n), generator=gen).float(),
    "sparse": lambda gen, n: torch.where(
        torch.rand(3, 2, n, generator=gen) > 0.9, torch.rand(3, 2, n, generator=gen), -1.0
    ),
    "zeros": lambda gen, n: torch.zeros(3, 2, n),
    "tiny": lambda gen, n: torch.rand(3, 2, n, generator=gen) * 1e-38,
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    "n,k", [(5, 9), (40, 7), (200, 4), (1500, 12), (5000, 60), (20000, 127), (9000, 508)]
)
def test_recall_blocks(kind, n, k):
    score = ROWS[kind](torch.Generator().manual_seed(n), n).to(DEVICE)
    extent = torch.tensor([n, 0, n - n // 3], dtype=torch.int32, device=DEVICE)
    for given in ((None,), (extent,), (extent, None, True)):
        actual = kernels.recall_blocks(score, k, *given)
        assert torch.equal(actual, reference.recall_blocks(score, k, *given))


@pytest.mark.parametrize("n,k", [(33000, 4096), (131104, 1000)])  # in one round and in two
def test_any_number_of_blocks_may_be_alike(n, k):
    """As those of one token said over and over; counts of them exceed 16 bits."""
    score = torch.full((1, 1, n), 0.25, device=DEVICE)
    score[..., [5, n - 1]] = 0.5
    recalled = kernels.recall_blocks(score, k)
    assert torch.equal(recalled, reference.recall_blocks(score, k))


@pytest.mark.parametrize("kind", ROWS)
def test_recall_among_named_blocks(kind):
    gen = torch.Generator().manual_seed(1)
    score = ROWS[kind](gen, 33).to(DEVICE)
    names = torch.randperm(90, generator=gen)[:33].sort().values.int().expand(3, 2, -1)
    names = names.contiguous().to(DEVICE)
    actual = kernels.recall_blocks(score, 8, blocks=names)
    assert torch.equal(actual, reference.recall_blocks(score, 8, blocks=names))
    for_all = dict(blocks=names[:, :1].contiguous(), per_layer=True)
    actual = kernels.recall_blocks(score, 8, **for_all)
    assert torch.equal(actual, reference.recall_blocks(score, 8, **for_all))


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("n,k,shares", [(40, 3, 3), (40, 7, 3), (959, 47, 47), (5000, 60, 9)])
def test_what_is_shared_comes_before_all_but_the_best(kind, n, k, shares, per_layer):
    """The best of it, where it is more than there is room for; else others follow; by row."""
    gen = torch.Generator().manual_seed(n)
    score, rows = ROWS[kind](gen, n).to(DEVICE), 1 if per_layer else 2
    names = torch.randperm(2 * n, generator=gen)[:n].sort().values
    picked = torch.rand(3, rows, n, generator=gen).argsort(-1)[..., :shares]
    unnamed = torch.tensor([2 * n, -1]).expand(3, rows, -1)
    shared = torch.cat((names[picked], unnamed), -1).int().to(DEVICE)
    blocks = names.int().expand(3, rows, -1).contiguous().to(DEVICE)
    given = (None, blocks, per_layer, None, None)
    recalled = reference.recall_blocks(score, k, *given, shared)
    assert torch.equal(kernels.recall_blocks(score, k, *given, shared), recalled)
    best = reference.recall_blocks(score, layout.own_part(k), *given)
    total = score.sum(1, keepdim=True) if per_layer else score
    flat = (of.flatten(0, 1).tolist() for of in (recalled, best, total, shared))
    for chosen, own, scores, others in zip(*flat, strict=True):
        of = {name: x for name, x in zip(names.tolist(), scores, strict=True) if x >= 0}
        chosen, own = set(chosen) - {-1}, set(own) - {-1}
        theirs = (of.keys() & set(others)) - own
        assert own <= chosen <= of.keys() and len(chosen) == min(k, len(of))
        assert len(chosen & theirs) == min(k - len(own), len(theirs))
        for group in (theirs, of.keys() - theirs - own):
            least = min((of[name] for name in group & chosen), default=9.0)
            most = max((of[name] for name in group - chosen), default=0.0)
            assert least >= most * (1 - 2**-12) or most < 2.0**-120


@pytest.mark.parametrize("counts,has_most", [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("n,k", [(40, 7), (1500, 12), (5000, 60), (20000, 127)])
def test_what_was_found_before_counts_and_grows(kind, n, k, counts, has_most):
    """In rows of one round and of two; of blocks that are no columns nothing is found."""
    gen = torch.Generator().manual_seed(n)
    score = ROWS[kind](gen, n).to(DEVICE)
    can = score[:, :1] >= 0  # what one head cannot recall none can
    score = torch.where(can, score.clamp(min=0), -1.0)
    extent = torch.tensor([n, 0, n - n // 3], dtype=torch.int32, device=DEVICE)
    names = torch.randperm(2 * n, generator=gen)[:n].sort().values.int().expand(3, 1, -1)
    names = names.contiguous().to(DEVICE)
    length = torch.tensor([8, 1, 5], dtype=torch.int32, device=DEVICE)
    before = torch.rand(3, 2 * n + 3, generator=gen).to(DEVICE) * 4
    for given in ((extent, None), (None, names)):
        ours, theirs = (Memory(before.clone(), 0.25, counts) for _ in range(2))
        if has_most:
            ours, theirs = (m._replace(most=before / 4) for m in (ours, theirs))
        actual = kernels.recall_blocks(score, k, *given, True, ours, length)
        exact = reference.recall_blocks(score, k, *given, True, theirs, length)
        assert torch.equal(actual, exact)
        torch.testing.assert_close(ours.found, theirs.found)
        if has_most:
            torch.testing.assert_close(ours.most, theirs.most)
            assert (theirs.most >= before / 4).all()
            grew = given[1] is not None and kind in ("random", "tied", "sparse")
            assert bool((theirs.most > before / 4).any()) == grew
        assert torch.equal(theirs.found, before) == (given[1] is None or kind in ("zeros", "tiny"))
        forgetful = reference.recall_blocks(score, k, *given, True)
        assert torch.equal(exact, forgetful) != counts or kind == "sparse"


@pytest.mark.parametrize("width", [50, 5000])
def test_what_is_kept_is_what_the_next_token_knows(width):
    """Requests in any order, one that has nothing to do, one whose page somebody else wrote to."""
    gen = torch.Generator().manual_seed(width)
    # rows of the table are longer than what is looked at, as vLLM's are
    pages = torch.randperm(4 * (width + 3), generator=gen).view(4, -1).int().to(DEVICE)[:, :width]
    block = width - 10
    last = torch.tensor([3, 15, 80, 121], device=DEVICE).int() + 16 * block
    request = torch.tensor([2, 0, 3, 1], device=DEVICE).int()
    length = torch.tensor([1, 5, 0, 16], device=DEVICE).int()
    told = Tiles(request, request, length, last + 1 - length, length, 16)
    found = torch.rand(4, width, generator=gen).to(DEVICE)
    found[1, 3:] = 0.0  # fewer than are kept
    is_generated = torch.tensor([True, True, True, False], device=DEVICE)
    again = Tiles(request, request, torch.ones_like(request), last + 1, length, 1)
    later = again._replace(position=last + 2)
    kept, known = {}, {}
    for stage in (kernels, reference):
        kept[stage] = nothing_kept(4 * (width + 3), torch.device(DEVICE))
        stage.keep(kept[stage], found, pages, told, 16)
        given = is_generated, 0.5, 16
        known[stage] = stage.recollect(kept[stage], pages, again, *given)
        assert not stage.recollect(kept[stage], pages, later, *given).any()
    for ours, theirs in zip(kept[kernels], kept[reference], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(known[kernels], known[reference])
    assert torch.equal(known[kernels][1], found[1] / 2)
    assert known[kernels][0].count_nonzero() == min(block, KEPT)
    assert not known[kernels][0, block:].any()
    assert not known[kernels][2:].any()


@pytest.mark.parametrize("candidates", [8, 0])
def test_heads_of_a_layer_recall_what_they_need_together(candidates, monkeypatch):
    case = DECODE[0]
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    given = list(inputs.score_args())
    recalled = {}
    for per_layer in (False, True):
        given[4] = case.scope._replace(candidate_blocks=candidates, per_layer=per_layer)
        for stage in (reference, kernels):
            monkeypatch.setattr(attention, "stages", lambda _, stage=stage: stage)
            recalled[per_layer, stage] = attention.select(*given)
    assert torch.equal(recalled[True, kernels], recalled[True, reference])
    (first,) = recalled[True, kernels].unbind(1)
    assert not any(torch.equal(first, other) for other in recalled[False, kernels].unbind(1))

    if candidates:
        return
    score, extent = reference.score_blocks(*given)
    assert extent.any()
    for tile in extent.nonzero().flatten().tolist():
        together = score[tile, :, : extent[tile]].sum(0)
        is_recalled = torch.isin(torch.arange(len(together)), first[tile].cpu())
        worst, best = together[is_recalled].min(), together[~is_recalled].max()
        assert worst >= best - 1e-3


SHARED = [DECODE[0], DECODE[2], DECODE[3], DECODE[4], PREFILL[0], PREFILL[-1]]


@pytest.mark.parametrize("case", SHARED, ids=str)
def test_what_share_was_recalled(case, monkeypatch):
    """Against the softmax over keys as they were made, of the last tile that recalls."""
    monkeypatch.setattr(mass, "TOKENS_AT_ONCE", 100)  # some blocks at a time
    inputs, recalled, arguments = shown(case)
    scope, size = case.scope, case.block_size
    tile = int((recalled[:, 0, 0] >= 0).nonzero()[-1])
    assert tile < len(recalled) - 1  # there are others behind it, which recall nothing
    request, row, length, position = (int(column[tile]) for column in inputs.tiles[:4])
    first = sum(case.contexts[:request])
    local = position // size - scope.local_blocks + 1
    assert local > scope.global_blocks + scope.recall_blocks
    keys = inputs.key[first + scope.global_blocks * size : first + local * size].double()
    group = case.heads[0] // case.heads[1]
    for head in range(case.heads[1]):
        blocks = recalled[tile, min(head, recalled.shape[1] - 1)].long() - scope.global_blocks
        for other, share in enumerate(mass.recalled_share(head, *arguments).tolist()):
            logits = keys[:, head] @ inputs.query[row + length - 1, head * group + other].double()
            logits *= inputs.scale * case.query_scale
            if case.soft_cap:
                logits = case.soft_cap * (logits / case.soft_cap).tanh()
            exact = logits.softmax(0).unflatten(0, (-1, size)).sum(1)[blocks].sum()
            assert share == pytest.approx(float(exact), rel=5e-3) and share < 1


def test_samples_reach_the_host_without_waiting(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(mass.time, "monotonic", lambda: now[0])
    *_, arguments = shown(DECODE[0])
    rng, shares = random.Random(0), []
    for _ in range(3):
        shares += mass.recalled_share(rng.randrange(2), *arguments).tolist()
    edges, told = (0.3, 0.5, 1.0), []
    samples = mass.MassSamples(edges, DEVICE)
    assert samples.is_due
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):  # layers of a step
            samples.add(*arguments)
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize()
    now[0] = 2 * mass.SECONDS
    assert not samples.is_due
    samples.collect(lambda *sums: told.append(sums))
    samples.collect(None)  # which it need not call again
    ((up_to, number, total),) = told
    assert up_to == [sum(share <= edge for share in shares) for edge in edges]
    assert number == len(shares) == sum(share <= 1 for share in shares)
    assert total == pytest.approx(sum(shares)) and samples.is_due

    nothing = torch.full_like(arguments[4], -1)
    samples.add(*arguments[:4], nothing, *arguments[5:])
    if ON_GPU:
        torch.cuda.synchronize()
    now[0] += mass.SECONDS / 2
    samples.collect(lambda *sums: told.append(sums))
    assert told[-1] == ([0] * len(edges), 0, 0) and not samples.is_due


def shown(case: Case) -> tuple:
    """Inputs, what they recall, and what a sample is made of."""
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    *given, scope, rotary, scale = inputs.score_args()
    recalled = inputs.recalled()
    return inputs, recalled, (*given, recalled, scope, rotary, scale, case.soft_cap)


@pytest.mark.parametrize("case", [DECODE[0], DECODE[-1], PREFILL[0], PREFILL[-1]], ids=str)
def test_a_selection_serves_other_layers(case, monkeypatch):
    """They attend to what it recalled, and select nothing themselves."""
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    monkeypatch.setattr(attention, "stages", lambda _: reference)
    given, out = inputs.score_args(), torch.full_like(inputs.query, float("nan"))
    recalled = attention.reattention(*given, out)
    assert torch.equal(recalled.tiles, attention.select(*given)) and recalled.tail is None

    monkeypatch.setattr(reference, "score_blocks", None)
    again = torch.full_like(out, float("nan"))
    assert attention.reattention(*given, again, recalled=recalled) is recalled
    torch.testing.assert_close(again, out, rtol=0, atol=0, equal_nan=True)
    others = torch.zeros_like(recalled.tiles)
    attention.reattention(*given, again, recalled=Recalled(others))
    assert not torch.allclose(again, out, equal_nan=True)


@pytest.mark.parametrize("case", [DECODE[0], PREFILL[0]], ids=str)
def test_tiles_have_the_scope_of_their_kind(case, monkeypatch):
    """Single queries recall less, and so do tiles of a prompt, but for those at its end."""
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    monkeypatch.setattr(attention, "stages", lambda _: reference)
    query, pages, table, tiles, scope, *rest = inputs.score_args()
    exact = scope._replace(recall_blocks=2)
    if tiles.max_length > 1:
        half = scope.candidate_blocks // 2
        exact = scope._replace(recall_blocks=2, local_blocks=1, candidate_blocks=half)
    assert scope.recall_blocks == 4 and scope.local_blocks > 1
    scope = scope._replace(single_recall=2, read_recall=2, read_local=1)
    out, other = torch.full_like(query, float("nan")), torch.full_like(query, float("nan"))
    recalled = attention.reattention(query, pages, table, tiles, scope, *rest, out).tiles
    assert recalled.shape[-1] == exact.recall_blocks
    assert torch.equal(recalled, attention.select(query, pages, table, tiles, exact, *rest))
    reference.attend(query, pages, table, tiles, recalled, exact, *rest, other)
    torch.testing.assert_close(out, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("finds", [attention.TAIL_FINDS, 20, 2])
@pytest.mark.parametrize("candidates", [8, 0])
def test_for_a_tail_each_layer_selects(candidates, finds, monkeypatch):
    """The best of all blocks, the best of what is shared, others; for other tiles it does not."""
    case = Case(contexts=(600, 300), queries=(70, 40))
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    monkeypatch.setattr(attention, "stages", lambda _: reference)
    query, pages, table, tiles, scope, *rest = inputs.score_args()
    scope = scope._replace(candidate_blocks=candidates)
    reading = scope._replace(recall_blocks=2, local_blocks=1, candidate_blocks=candidates // 2)
    monkeypatch.setattr(attention, "TAIL_FINDS", finds)
    monkeypatch.setattr(attention, "SELECTION_BYTES", 0)  # four tiles at once
    lengths = torch.tensor([600, 350], dtype=torch.int32, device=DEVICE)  # the second goes on
    monkeypatch.setattr(tiles_module, "TAIL", 33)
    others, tail = tiles_module.split_tail(tiles, 0, lengths, case.block_size)
    is_tail = tail.tiles.length > 0
    assert 0 < is_tail.sum() < (tiles.length > 0).sum() - 3
    given = (query, pages, table)
    theirs, of_tail = (
        torch.zeros_like(attention.select(*given, some, of_kind, *rest))
        + torch.arange(len(some.row), device=DEVICE, dtype=torch.int32)[:, None, None] + 1
        for some, of_kind in ((others, reading), (tail.tiles, scope))
    )  # fmt: skip
    out, other = torch.full_like(query, float("nan")), torch.full_like(query, float("nan"))
    known = Recalled(theirs, of_tail)
    both = scope._replace(read_recall=2, read_local=1)
    args = *given, others, both, *rest, out
    assert attention.reattention(*args, recalled=known, tail=tail) is known
    score, _ = reference.exact_scores(*given, attention.selecting(tail.tiles), scope, *rest)
    own = torch.zeros_like(of_tail)
    for tile in is_tail.nonzero().flatten().tolist():
        for head, scores in enumerate(score[tile]):
            first, *best = scores.argsort(descending=True).tolist()
            expected = list(dict.fromkeys((first, tile + 1, *best)))[: own.shape[-1]]
            own[tile, head] = torch.tensor(sorted(expected))
    for some, recalled, of_kind in ((others, theirs, reading), (tail.tiles, own, scope)):
        reference.attend(*given, some, recalled, of_kind, *rest, other)
    torch.testing.assert_close(out, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("columns", [5, 8, 447])
def test_processes_exchange_their_scores_in_whole_16_bytes(columns):
    score, given = torch.rand(3, 4, columns, device=DEVICE), []

    def add_up(x: torch.Tensor) -> torch.Tensor:
        given.append(x)
        return 2 * x

    alone = Scope(1, 4, 3, 8)
    together = attention._together(score, alone._replace(per_layer=True), add_up)
    assert given[0].is_contiguous() and given[0].nbytes % 16 == 0
    assert together.is_contiguous()  # as kernels read it
    torch.testing.assert_close(together, 2 * score.sum(1, keepdim=True))
    assert attention._together(score, alone, add_up) is score and len(given) == 1


@pytest.mark.parametrize("stage", [reference, kernels], ids=["reference", "kernels"])
def test_layers_of_a_tail_add_up_what_they_find(stage):
    case = Case(contexts=(250, 190), queries=(20, 9), scope=Scope(1, 4, 3, 8, 8, per_layer=True))
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    query, pages, table, tiles, scope, *rest = inputs.score_args()
    both = scope._replace(read_recall=1, read_local=2)
    lengths = torch.tensor([250, 190], dtype=torch.int32, device=DEVICE)
    others, tail = tiles_module.split_tail(tiles, 0, lengths, case.block_size)
    found = torch.zeros((len(tail.tiles.row), table.shape[1]), device=DEVICE)
    tail = tail._replace(memory=Memory(found, 0.5, counts=True))

    def of_one(query: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        common = pages, table, tail.tiles
        shared = attention.select(query, *common, scope, *rest, stage=stage)
        memory = Memory(found, 0.5, counts=True)
        given = query, *common, shared, scope, *rest
        return attention.select_for_tail(*given, 0.0, None, memory, stage)

    some = pages, table, attention.selecting(tail.tiles), scope
    shares, _ = reference.exact_scores(query, *some, *rest)

    out, other = torch.zeros_like(query), torch.zeros_like(query)
    for layer_query in (query, -query):
        known, alone = found.clone(), torch.zeros_like(found)
        args = layer_query, pages, table
        attention.reattention(*args, others, both, *rest, out, tail=tail, stage=stage)
        own = of_one(layer_query, known)
        attention.reattention(*args, others, both, *rest, other, stage=stage)
        stage.attend(*args, tail.tiles, own, scope, *rest, other)
        torch.testing.assert_close(out, other, rtol=0, atol=0)
        torch.testing.assert_close(found, known)
        if layer_query is query:
            expected = shares.float().clamp(min=0.0).sum(1)
            torch.testing.assert_close(found, expected / 2, rtol=2e-2, atol=2e-3)
    assert not torch.equal(own, of_one(layer_query, alone))


@pytest.mark.parametrize("stage", [reference, kernels], ids=["reference", "kernels"])
def test_a_tail_recalls_what_the_layers_before_found(stage, monkeypatch):
    """Though this layer finds least of it, and few of its own finds are looked at again."""
    monkeypatch.setattr(attention, "TAIL_FINDS", 8)
    scope = Scope(1, 4, 3, 8, 8, per_layer=True)
    inputs = Case(contexts=(600,), queries=(16,), scope=scope).build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    query, pages, table, tiles, *rest = inputs.score_args()
    some = query, pages, table, attention.selecting(tiles)
    score, extent = reference.exact_scores(*some, *rest)
    least = int(score[0, :, 1 : int(extent[0])].sum(0).argmin()) + 1
    found = torch.zeros((len(tiles.row), table.shape[1]), device=DEVICE)
    shared = torch.full((len(tiles.row), 1, 4), -1, dtype=torch.int32, device=DEVICE)
    given = query, pages, table, tiles, shared, *rest, 0.0, None
    for known, recalls in ((0.0, False), (100.0, True)):
        found[:, least] = known
        memory = Memory(found.clone(), 1.0, counts=True)
        recalled = attention.select_for_tail(*given, memory, stage)
        assert (least in recalled[0, 0].tolist()) == recalls


@pytest.mark.parametrize("stage", [reference, kernels], ids=["reference", "kernels"])
@pytest.mark.parametrize("case", [DECODE[0], PREFILL[0]], ids=str)
def test_a_request_of_nan_is_alone_with_it(stage, case):
    """Its scores are nan and name no blocks, which must not be looked up in the block table."""
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    given, tiles = inputs.score_args(), inputs.tiles
    blocks = tiles.position // case.block_size
    tile = int((blocks >= tiles.dense).nonzero()[-1])
    row, length = int(tiles.row[tile]), int(tiles.length[tile])
    before, after = torch.full((2, *inputs.query.shape), 7.0, dtype=torch.float16, device=DEVICE)
    attention.reattention(*given, before, stage=stage)
    inputs.query[row : row + length] = float("nan")
    recalled = attention.reattention(*given, after, stage=stage).tiles
    assert (recalled <= blocks[:, None, None]).all()
    assert after[row : row + length].isnan().all()
    after[row : row + length] = before[row : row + length]
    assert torch.equal(after, before)


@pytest.mark.parametrize("heads", [(4, 2), (16, 2)], ids=str)  # the latter by Hopper's kernel
@pytest.mark.parametrize("queries", [None, (37,)], ids=["decode", "prefill"])
def test_where_nothing_was_recalled_the_first_block_stands(queries, heads):
    """What lies before a request's row of the block table is not its own."""
    case = Case(contexts=(300,), queries=queries, heads=heads)
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    last = inputs.block_table[:, 18:19]  # its own block: what is read of it counts
    inputs.block_table = torch.cat((last, inputs.block_table), 1)[:, 1:]
    recalled = inputs.recalled().fill_(-1)
    expected = inputs.attend(reference.attend, recalled)
    actual = inputs.attend(kernels.attend, recalled)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3, equal_nan=True)


def test_some_queries_of_a_tile_select_for_all(monkeypatch):
    case = PREFILL[1]
    inputs = case.build(torch.float16, DEVICE)
    inputs.write(reference.write_kv)
    monkeypatch.setattr(attention, "stages", lambda _: reference)
    recalled = attention.select(*inputs.score_args())
    once = attention.selecting(inputs.tiles)
    assert attention.selecting(once) is once and once.every(1) is once
    assert once.part(1, 2).step == once.step == 4
    assert str(inputs.tiles.every(2).every(2)) == str(inputs.tiles.every(4))
    tiles, step = inputs.tiles, case.block_size // attention.SELECTING_QUERIES
    assert step == 4 and not all(length % step == 0 for length in tiles.length.tolist())
    selecting = set()
    for row, length in zip(tiles.row.tolist(), tiles.length.tolist(), strict=True):
        selecting |= set(range(row + length - 1, row - 1, -step))
    others = [row for row in range(len(inputs.query)) if row not in selecting]
    inputs.query[others] = float("nan")
    assert torch.equal(recalled, attention.select(*inputs.score_args()))
    inputs.query[sorted(selecting)] *= -1
    assert not torch.equal(recalled, attention.select(*inputs.score_args()))


@pytest.mark.parametrize(
    "scope",
    [
        Scope(1, 4, 3, 8, 8),
        Scope(1, 4, 3, 8, 8, memory=0.8, per_layer=True),
        Scope(0, 0, 0, 0, window=50),
    ],
    ids=str,
)
def test_warm_up_runs_every_stage_and_writes_nothing(scope, monkeypatch):
    launched = []

    def counted(name):
        stage = getattr(kernels, name)
        return lambda *args, **kwargs: launched.append(name) or stage(*args, **kwargs)

    everything = types.SimpleNamespace(**{name: counted(name) for name in kernels.__all__})
    for module in (attention, memory, warm_up):
        monkeypatch.setattr(module, "stages", lambda device: everything)
    inputs = DECODE[0].build(torch.float16, DEVICE)
    cache_dtype = torch.float8_e4m3fn if ON_GPU else torch.float16
    counts = {1: {1, 5}, 16: {3}}
    given = (inputs.query, 2, cache_dtype, counts, 10, 16, scope, inputs.rotary, inputs.scale)
    warm_up.warm_up(*given)
    selects = set()
    if scope.recall_blocks:
        selects = {"score_blocks", "recall_blocks", "refine_scores", "exact_scores"}
    if scope.memory:
        selects |= {"recollect", "keep"}
    assert set(launched) == {"write_kv", "attend"} | selects
