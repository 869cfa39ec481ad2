"""What holds for any batch, block table and configuration, by the reference and on the host."""

import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from csrc_triton import reference
from csrc_triton.layout import Pages, Scope, Tiles
from tests.cases import Case, Inputs
from vllm_reattention import attention
from vllm_reattention.config import ReAttentionConfig
from vllm_reattention.rope import Rope
from vllm_reattention.tiles import DecodeTiles, dense_prompts, prefill_tiles

# The same examples every time: what fails here fails everywhere.
settings.register_profile(
    "bounded", max_examples=60, deadline=None, derandomize=True, database=None
)
settings.load_profile("bounded")
CPU = torch.device("cpu")
EXACT = dict(rtol=1e-9, atol=1e-9, equal_nan=True)


@st.composite
def scopes(draw, may_have_window: bool = True) -> Scope:
    if may_have_window and draw(st.integers(0, 5)) == 0:
        return Scope(0, 0, 0, 0, window=draw(st.integers(1, 60)))
    first, recalled, local = (
        draw(st.integers(1, 2)),
        draw(st.integers(0, 4)),
        draw(st.integers(1, 3)),
    )
    dense = first + recalled + local + draw(st.integers(0, 3))
    return Scope(
        first,
        recalled,
        local,
        dense,
        candidate_blocks=draw(st.sampled_from((0, recalled, 4 * recalled))),
        per_layer=draw(st.booleans()),
        sample_from=draw(st.sampled_from((2048, 6))),
    )


@st.composite
def cases(draw, **fixed) -> Case:
    contexts = tuple(draw(st.lists(st.integers(1, 230), min_size=1, max_size=4)))
    queries = tuple(draw(st.integers(1, min(context, 40))) for context in contexts)
    head_size = draw(st.sampled_from((8, 24)))
    scope = draw(scopes())
    more = tuple(scope.dense_blocks + draw(st.integers(0, 9)) for _ in contexts)
    drawn = dict(
        contexts=contexts,
        queries=draw(st.sampled_from((None, queries))),
        dense=draw(st.sampled_from((None, more))),
        heads=draw(st.sampled_from(((2, 2), (4, 2), (3, 1)))),
        head_size=head_size,
        rotary_dim=draw(st.sampled_from((head_size, 4, 0))),
        block_size=draw(st.sampled_from((8, 16))),
        interleaved=draw(st.booleans()),
        query_scale=draw(st.sampled_from((1.0, 1.7))),
        scope=scope,
        soft_cap=draw(st.sampled_from((0.0, 3.0))),
        sinks=draw(st.booleans()),
        spread=draw(st.sampled_from((1.0, 3.0))),
        seed=draw(st.integers(0, 999)),
    )
    return Case(**drawn | fixed)


def served(inputs: Inputs) -> torch.Tensor:
    """Attention of all tiles; nan where there is none."""
    case, out = inputs.case, torch.full_like(inputs.query, torch.nan)
    attention.reattention(*inputs.score_args(), out, case.soft_cap, inputs.sinks)
    return out


def built(case: Case) -> Inputs:
    inputs = case.build(torch.float64, "cpu")
    inputs.write(reference.write_kv)
    return inputs


def tokens(inputs: Inputs, request: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a request as the model made them."""
    start = sum(inputs.case.contexts[:request])
    rows = slice(start, start + inputs.case.contexts[request])
    return inputs.key[rows], inputs.value[rows]


def ordinary(inputs: Inputs, query, key, value, window: int = 0) -> torch.Tensor:
    """Softmax attention of the last queries of a text, rotated by where things stand in it.

    query       [num_queries, group, head_size], of the heads that share the keys
    key, value  [num_tokens, head_size]
    """
    case, half = inputs.case, inputs.rotary.half
    radians = (10000.0 ** -(torch.arange(half) / max(half, 1))).double()
    rope = Rope(radians, case.query_scale**0.5, case.interleaved)
    key_at = torch.arange(len(key))
    query_at = key_at[len(key) - len(query) :]
    logits = torch.einsum(
        "qgd,kd->gqk", rope.rotate(query, query_at), rope.rotate(key[:, None], key_at)[:, 0]
    )
    logits = logits * inputs.scale
    if case.soft_cap:
        logits = case.soft_cap * torch.tanh(logits / case.soft_cap)
    ahead = query_at[:, None] - key_at
    logits = logits.masked_fill((ahead < 0) | (ahead >= (window or len(key))), -torch.inf)
    if inputs.sinks is not None:
        value = torch.cat((value, torch.zeros_like(value[:1])))
        sink = inputs.sinks[inputs.heads].double()[:, None, None].expand(-1, len(query), 1)
        logits = torch.cat((logits, sink), -1)
    return torch.einsum("gqk,kd->qgd", logits.softmax(-1), value)


@given(cases())
def test_attention_is_ordinary_over_what_was_chosen(case):
    """Up to the dense limit over the text; beyond it over an excerpt, as if that were the text."""
    inputs = built(case)
    actual = served(inputs)
    scope, size = case.scope, case.block_size
    group = case.heads[0] // case.heads[1]
    selects = inputs.block_table.shape[1] > scope.dense_blocks and scope.recall_blocks
    recalled = attention.select(*inputs.score_args(), case.soft_cap) if selects else None
    for tile, (request, row, length, position, dense) in enumerate(
        zip(*(column.tolist() for column in inputs.tiles.columns), strict=True)
    ):
        block = position // size
        for kv_head in range(case.heads[1] if length else 0):
            chosen = list(range(block + 1))
            if not scope.window and block >= dense:
                found = recalled[tile, kv_head % recalled.shape[1]].tolist() if selects else []
                assert found == sorted(set(found))
                last = chosen[-scope.local_blocks :]
                assert all(scope.global_blocks <= b < last[0] for b in found)
                chosen = [*range(scope.global_blocks), *found, *last]
            at = torch.cat([torch.arange(b * size, (b + 1) * size) for b in chosen])
            at = at[at < position + length]
            inputs.heads = slice(kv_head * group, (kv_head + 1) * group)
            key, value = (x[at, kv_head] for x in tokens(inputs, request))
            rows = slice(row, row + length)
            expected = ordinary(inputs, inputs.query[rows, inputs.heads], key, value, scope.window)
            # the served table of angles is fp32
            torch.testing.assert_close(actual[rows, inputs.heads], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(~actual.isnan().any(-1).any(-1), inputs.written_rows())


@given(cases(), st.randoms(use_true_random=False))
def test_where_pages_lie_does_not_matter(case, random):
    inputs = built(case)
    expected = served(inputs)
    num_blocks = len(inputs.pages.key)
    order = torch.tensor(random.sample(range(num_blocks), num_blocks))
    inputs.pages = Pages(*(x[order] for x in inputs.pages[:3]))
    valid = inputs.block_table < num_blocks
    moved = order.argsort().int()[inputs.block_table.clamp(max=num_blocks - 1).long()]
    inputs.block_table = torch.where(valid, moved, inputs.block_table)
    assert torch.equal(served(inputs).nan_to_num(), expected.nan_to_num())


@given(cases())
def test_company_does_not_matter(case):
    """Each request alone, with a table as wide as it needs, gets what it gets in the batch."""
    inputs = built(case)
    together = served(inputs)
    table, tiles = inputs.block_table, inputs.tiles
    for request, context in enumerate(case.contexts):
        own = tiles.request == request
        zero = torch.zeros_like(tiles.request[own])
        inputs.tiles = Tiles(zero, *(x[own] for x in tiles.columns[1:]), tiles.max_length)
        inputs.block_table = table[request : request + 1, : -(-context // case.block_size)]
        alone = served(inputs)
        rows = inputs.written_rows()
        torch.testing.assert_close(alone[rows], together[rows], **EXACT)


@given(cases(scope=Scope(1, 2, 1, 4, 8), sinks=False))
def test_selecting_in_runs_does_not_matter(case):
    inputs = built(case)
    expected = served(inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "SELECTION_BYTES", 1)
        torch.testing.assert_close(served(inputs), expected, **EXACT)


@given(cases(), st.data())
def test_a_cache_is_the_same_however_it_was_filled(case, data):
    """In any pieces, and with pieces written again, as after rejected guesses."""
    whole, pieces = (case.build(torch.float64, "cpu") for _ in range(2))

    def write(inputs: Inputs, start: int, end: int) -> None:
        rows = slice(start, end)
        reference.write_kv(
            inputs.key[rows], inputs.value[rows], inputs.pages, inputs.slot_mapping[rows],
            inputs.rotary,
        )  # fmt: skip

    count = len(whole.key)
    write(whole, 0, count)
    at = 0
    while at < count:
        end = data.draw(st.integers(at + 1, count))
        again = data.draw(st.integers(max(0, at - 3), at))
        wrong = pieces.key[again:end] * 5
        pieces.key[again:end], right = wrong, pieces.key[again:end].clone()
        write(pieces, again, end)
        pieces.key[again:end] = right
        write(pieces, again, end)
        at = end
    for ours, theirs in zip(pieces.pages[:3], whole.pages[:3], strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


scores = st.one_of(st.just(-1.0), st.just(0.5), st.floats(0, 8, width=32))


@given(st.lists(scores, min_size=1, max_size=40), st.integers(0, 12), st.integers(0, 45), st.data())
def test_recall_returns_the_best_in_order(row, num_recalled, extent, data):
    score = torch.tensor(row)[None, None]
    named = sorted(data.draw(st.sets(st.integers(0, 99), min_size=len(row), max_size=len(row))))
    names = torch.tensor(named, dtype=torch.int32)[None, None]
    limit = torch.tensor([extent], dtype=torch.int32)
    for found, limited in (
        (reference.recall_blocks(score, num_recalled, limit), row[:extent]),
        (reference.recall_blocks(score, num_recalled, None, names), row),
    ):
        found = found[0, 0].tolist()
        chosen = [block for block in found if block >= 0]
        assert found == sorted(set(chosen)) + [-1] * (num_recalled - len(chosen))
        if limited is row:
            chosen = [named.index(block) for block in chosen]
        valid = {at for at, value in enumerate(limited) if value >= 0}
        assert set(chosen) <= valid and len(chosen) == min(num_recalled, len(valid))
        worst = min((limited[at] for at in chosen), default=0.0)
        best = max((limited[at] for at in valid - set(chosen)), default=0.0)
        assert not chosen or worst >= best * (1 - 2**-14) or best < 2.0**-126


batches = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 90)), min_size=1, max_size=5)


def starts_of(new: list[int]) -> torch.Tensor:
    return torch.tensor([0, *new], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def queries_of(tiles: Tiles) -> list[tuple[int, int, int]]:
    """Row, request and position of every query of every tile, tiles within one block each."""
    found = []
    size = tiles.max_length
    for request, row, length, position in zip(*(t.tolist() for t in tiles[:4]), strict=True):
        assert 0 <= length <= size
        assert not length or position // size == (position + length - 1) // size
        found += [(row + i, request, position + i) for i in range(length)]
    return found


@given(batches, st.sampled_from((8, 32)), st.data())
def test_tiles_cover_each_query_once(batch, block_size, data):
    """Decodes first, of up to so many tokens; then prompts, wherever they were cut."""
    most = data.draw(st.integers(1, 3))
    num_decodes = data.draw(st.integers(0, len(batch)))
    batch = [
        (context, min(new, most) if i < num_decodes else new)
        for i, (context, new) in enumerate(batch)
    ]
    starts = starts_of([new for _, new in batch])
    lengths = torch.tensor([sum(pair) for pair in batch], dtype=torch.int32)
    found = []
    if num_decodes:
        num_tokens = int(starts[num_decodes])
        decode = DecodeTiles(64, most, 3, CPU)
        found += queries_of(
            decode.fill(starts[: num_decodes + 1], lengths[:num_decodes], num_tokens)
        )
    if num_decodes < len(batch):
        found += queries_of(prefill_tiles(starts, starts, lengths, num_decodes, block_size, 3))
    assert found == [
        (int(starts[i]) + t, i, context + t)
        for i, (context, new) in enumerate(batch)
        for t in range(new)
    ]


@given(batches, st.integers(0, 4), st.integers(1, 100), st.integers(0, 9), st.integers(20, 300))
def test_prompts_are_dense_within_the_limit(batch, first, dense_limit, unsure, most_keys):
    """The host may take a request for longer than it is."""
    assume(first < len(batch))
    starts = starts_of([new for _, new in batch])
    lengths = torch.tensor([sum(pair) for pair in batch], dtype=torch.int32)
    known = lengths + (lengths != starts.diff()) * unsure
    table = torch.arange(len(batch) * 40, dtype=torch.int32).view(len(batch), -1).flip(1)
    limits = torch.tensor([dense_limit * (1 + row % 2) for row in range(len(batch))])
    given_ = starts, starts, lengths, known, first, limits, table, 16, most_keys
    dense = dense_prompts(*given_)
    prompts, theirs = batch[first:], known[first:]
    whole = all(context == 0 for context, _ in prompts)
    fits = bool((theirs <= limits[first:]).all())
    fits &= whole or int(theirs.sum()) <= most_keys
    assert (dense is not None) == fits
    if dense is None:
        return
    assert dense.rows == slice(int(starts[first]), int(starts[-1]))
    new = [new for _, new in prompts]
    assert dense.starts.tolist() == starts_of(new).tolist() and dense.max_len == max(new)
    places = [context + at for context, count in prompts for at in range(count)]
    assert dense.positions.tolist() == places
    assert (dense.keys is None) == whole
    if whole:
        return
    sizes = [context + count for context, count in prompts]
    assert dense.keys.starts.tolist() == starts_of(sizes).tolist()
    assert dense.keys.max_len >= max(sizes)
    at = [(row, place) for row, size in enumerate(sizes, first) for place in range(size)]
    count = len(at)
    pages = [int(table[row, place // 16]) for row, place in at]
    slots = [page * 16 + place % 16 for page, (_, place) in zip(pages, at, strict=True)]
    assert dense.keys.slots[:count].tolist() == slots
    assert dense.keys.block_starts[:count].tolist() == [place // 16 * 16 for _, place in at]
    assert len(dense.keys.slots) == int(theirs.sum())
    # what is behind the last key counts for nothing, but is read and rotated
    assert int(dense.keys.block_starts.max()) < dense.keys.max_len <= limits.max()


sizes = st.one_of(st.none(), st.integers(-64, 400), st.integers(0, 300).map(lambda n: 32 * n))


@given(
    st.builds(
        dict, global_size=sizes, local_size=sizes, recall_size=sizes, dense_limit=sizes,
        decode_recall_size=sizes, read_recall_size=sizes, read_local_size=sizes,
        scorer=st.sampled_from(("refined", "summary", "layer")),
    ),
    st.one_of(st.integers(256, 20_000), st.just(131072)),
    st.sampled_from((32, 64, 128)),
)  # fmt: skip
@settings(max_examples=300)
def test_sizes_resolve_or_their_refusal_leads_to_some_that_do(numbers, window, block_size):
    for _ in range(16):  # at most two refusals for each size
        try:
            scope = ReAttentionConfig.read({"reattention": numbers}).resolve(window, block_size)
            break
        except ValueError as reason:
            _do_as_told(numbers, str(reason), block_size)
    else:
        raise AssertionError(f"no way out led anywhere, at last {numbers}")
    assert scope.global_blocks >= 1 <= scope.local_blocks and scope.recall_blocks >= 0
    reading = scope.of(2)
    assert reading.of(2) == reading and reading.of_tail == reading
    assert 0 < reading.local_blocks <= scope.local_blocks
    assert (0 < reading.recall_blocks <= scope.recall_blocks) or not scope.recall_blocks
    if numbers["read_recall_size"] is None and numbers["read_local_size"] is None:
        if scope.recall_blocks and scope.blocks // 2 * block_size >= 1024:
            least = reading.blocks - reading.recall_blocks + 1
            assert scope.blocks // 2 <= reading.blocks <= max(scope.blocks // 2, least)
        else:
            assert reading == scope.of_tail
    decoded = scope.of(1).recall_blocks
    assert (0 < decoded <= scope.recall_blocks) or decoded == scope.recall_blocks == 0
    if numbers["decode_recall_size"] is None:
        assert 2 * decoded in (scope.recall_blocks, scope.recall_blocks + 1)
    assert scope.blocks == scope.dense_blocks <= scope.exact_blocks <= window // block_size
    if numbers["dense_limit"] is None:
        assert scope.exact_blocks == scope.blocks
    told = SimpleNamespace(**numbers)
    for given_size, blocks in (
        (told.global_size, scope.global_blocks),
        (told.local_size, scope.local_blocks),
        (told.recall_size, scope.recall_blocks),
        (told.decode_recall_size, scope.of(1).recall_blocks),
        (told.read_recall_size, reading.recall_blocks),
        (told.read_local_size, reading.local_blocks),
        (told.dense_limit, scope.exact_blocks),
    ):
        assert given_size in (None, blocks * block_size)
    assert (scope.candidate_blocks > scope.recall_blocks) == (
        told.scorer != "summary" and scope.recall_blocks > 0
    )


def _do_as_told(numbers: dict, reason: str, block_size: int) -> None:
    if proposed := re.search(r"; set (\w+)=(\d+)$", reason):
        name, size = proposed.groups()
        assert numbers[name] != int(size)
        numbers[name] = int(size)
    elif reason.endswith("; make recall_size, local_size or global_size smaller"):
        least = dict(recall_size=0, local_size=block_size, global_size=block_size)
        assert not least.items() <= numbers.items()
        numbers |= least
    else:
        assert "; leave it out for the default" in reason and numbers["dense_limit"] is not None
        numbers["dense_limit"] = None
