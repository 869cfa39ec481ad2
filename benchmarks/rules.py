"""Figure 4: which rule recalls the needle, and whether its recall is what an answer hangs on.

    python -m benchmarks.rules MODEL --lengths 16384 65536 --tasks essay --rules served exact
    python -m benchmarks.rules MODEL --lengths 131072 --tasks niah_multikey_1 --from-question \
        --rules served each exact oracle only

The model runs in Transformers with our stages as its attention and one prompt at a time, so that a
rule that is not served can be put in the place of `select`. Every rule sees the same prompts; with
--from-question a prompt is read as it is served, once, and a rule decides from its last QUESTION
tokens on. `logprob` is that of the answer, the more telling figure of few samples.

coverage is the share of the needle's blocks in the scope while the answer is written; each layer
and KV head counts by the attention that it pays the needle when the same task stands in a quarter
of the trained window and nothing is left out. So the heads that do the finding count.

served      what the settings say: so each rule below but for what it says
all         by all queries of a tile, not every fourth
wide        with eight times as many candidates
shared      with prompts' last tiles as all others: of the same scope, what one layer recalls is
            that of four, and candidates come before their shares
each        by every layer for itself, whatever it reads or writes
exact       shares from every key
mean        by the logits' mean over all distances in the scope, not without positions
max         exact, by the highest share of any row instead of their sum
newest      exact, by the tile's last query alone
votes       each query of each head votes for its 4 best tokens (as the method's authors released
            it, but with every head on its own keys and no tokens beside the best)
quest       the highest bound on a logit that the block's smallest and largest keys allow, of any
            row of the tile (arXiv 2406.10774)
centroid    the highest logit of the mean of a block's keys, of any row of the tile; for this and
            quest take the scorer "refined", as logits of several heads do not add up
spread      with half of a block's share given to each of its neighbours too
recent      with shares that grow along the text, to twice what they are at its end
oracle      with the needle's blocks in the place of the last recalled
only        the needle's blocks and no others, from the question on
"""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import engines, harness, ruler_text
from benchmarks.prompts import ANSWER_LEN, TASKS, Prompt, Prompts, depths, is_hit
from csrc_triton.layout import Kept, Memory, Pages, Rotary, Scope, Tail, Tiles, rotation_table
from csrc_triton.reference import rotate_rows
from vllm_reattention import attention
from vllm_reattention.config import ReAttentionConfig
from vllm_reattention.memory import Memories
from vllm_reattention.tiles import dense_blocks, prefill_tiles, split_tail

SHARES = ("exact", "max", "newest")
EXACT = (*SHARES, "votes", "quest", "centroid")
VOTES = 4  # of each query and head
ASKED = ("served", "shared", "each", "oracle")  # by the stages as they are
RULES = (*ASKED, "all", "wide", *EXACT, "mean", "spread", "recent", "only")
QUESTION = 64  # tokens, at most a block more
BLOCK_SIZE = engines.BLOCK_SIZE
COLUMNS = ["model", "rule", "rules_from", "task", "context_len", "samples", "hits", "logprob"]
COLUMNS += ["coverage", *engines.SETTINGS, "seed", "gpu", "torch", "triton", "commit"]
TABLE = harness.RESULTS / "rules.csv"
EXACT_BYTES = 1 << 30  # of logits at once


class Unrotated(nn.Module):
    """In the place of a model's rotary embedding: positions are ours to give."""

    def forward(self, x, position_ids):
        shape = (1, position_ids.shape[1], 1)
        return x.new_ones(shape), x.new_zeros(shape)


class Layer(NamedTuple):
    pages: Pages
    key: Tensor  # [max_tokens, num_kv_heads, head_size], not rotated


class Study:
    """A model with ReAttention by a rule, over one request that grows."""

    def __init__(self, model: str, device: str, dtype: torch.dtype):
        from transformers import AttentionInterface, AutoModelForCausalLM

        AttentionInterface.register("reattention", self._attend)
        load = AutoModelForCausalLM.from_pretrained
        self.model = load(model, dtype=dtype, attn_implementation="reattention").to(device).eval()
        config = self.model.config
        base = self.model.model.rotary_emb
        self.window = config.max_position_embeddings
        self.rotary = Rotary(rotation_table(base.inv_freq.to(device), self.window))
        self.model.model.rotary_emb = Unrotated()
        self.kv_heads = config.num_key_value_heads
        self.device = device

    def read(self, tokens: list[int], room: int, settings: dict, rule: str) -> None:
        """Begins a request that writes at most `room` tokens, and reads all but the question."""
        config = ReAttentionConfig(**settings)
        layers = self.model.config.num_hidden_layers
        scope = config.resolve(self.window, BLOCK_SIZE, layers)
        dense = dense_blocks(torch.tensor([len(tokens)]), scope, BLOCK_SIZE)
        self.scope = scope._replace(dense_blocks=int(dense))
        self.chosen = config.selecting_layers(layers)
        self.layers, self.length, self.tokens = {}, 0, tokens
        self.room, blocks = room, -(-(len(tokens) + room) // BLOCK_SIZE)
        self.table = torch.arange(blocks, dtype=torch.int32, device=self.device)[None]
        told = self.scope.memory, 0.0, torch.device(self.device)
        self.memories = Memories(blocks, BLOCK_SIZE, *told)
        self._begin(rule)
        whole = max(len(tokens) - QUESTION, 0) // BLOCK_SIZE * BLOCK_SIZE
        with torch.inference_mode():
            if whole:
                self._feed(tokens[:whole])
        self.read_so_far = self.length, self.scope, [part.clone() for part in self.memories.kept]

    def answer(self, rule: str, needle: range, told: list[int]) -> tuple[list[int], float, Tensor]:
        """Greedy tokens, the log probability of those told, and for each [layer, KV head] what was
        in scope of the needle's blocks while these were written, and what attention its tokens had
        (0 past the dense limit).

        The rule decides from what was read on; any number of rules may, one after the other.
        """
        first, last = needle.start // BLOCK_SIZE, (needle.stop - 1) // BLOCK_SIZE
        self.needle = needle
        self.blocks = torch.arange(first, last + 1, device=self.device, dtype=torch.int32)
        written: list[int] = []
        log_probability = 0.0
        with torch.inference_mode():
            likely = self._resume(rule)
            while len(written) < self.room:
                written.append(int(likely.argmax()))
                likely = self._feed(written[-1:])
            likely = self._resume(rule)
            for token in told:
                log_probability += float(likely[token])
                likely = self._feed([token])
        seen = torch.stack([torch.stack(self.seen[index]) for index in sorted(self.seen)])
        return written, log_probability, seen.mean(1).cpu()

    def _resume(self, rule: str) -> Tensor:
        self.length, self.scope, kept = self.read_so_far
        self.memories.kept = Kept(*(part.clone() for part in kept))
        self._begin(rule)
        if rule == "only":
            only = self.scope.of_tail._replace(single_recall=None)
            self.scope = only._replace(recall_blocks=len(self.blocks))
        return self._feed(self.tokens[self.length :])

    def _begin(self, rule: str) -> None:
        self.rule = rule
        layers = self.model.config.num_hidden_layers
        self.selecting = tuple(range(layers)) if rule == "each" else self.chosen
        self.memories.weight = 1 / len(self.selecting)
        self.seen: dict[int, list[Tensor]] = {}
        self.recalled: dict[int, Tensor] = {}
        self.found: dict[int, Memory] = {}
        self.found_by_tail: Memory | None = None
        self.recalled_by_tail: Tensor

    def _feed(self, tokens: list[int]) -> Tensor:
        """Log probabilities of the token behind these."""
        at = torch.tensor([tokens], device=self.device)
        place = torch.arange(len(tokens), device=self.device)[None] + self.length
        out = self.model(at, position_ids=place, use_cache=False, logits_to_keep=1)
        self.length += len(tokens)
        return out.logits[0, -1].float().log_softmax(-1)

    def _attend(self, module, query, key, value, mask, scaling, **_):
        query, key, value = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        index, new = module.layer_idx, query.shape[0]
        if index not in self.layers:
            self.layers[index] = self._empty(key)
        layer = self.layers[index]
        stage = attention.stages(query.device)
        slots = torch.arange(self.length, self.length + new, device=self.device)
        stage.write_kv(key, value, layer.pages, slots, self.rotary)
        layer.key[slots] = key
        starts = torch.tensor([0, new], dtype=torch.int32)
        lens = torch.tensor([self.length + new], dtype=torch.int32, device=self.device)
        if new == 1:
            zero = lens.new_zeros(1)
            dense = lens.new_full((1,), self.scope.dense_blocks)
            tiles = Tiles(zero, zero, lens.new_ones(1), lens - 1, dense, 1)
        else:
            place = starts.to(self.device), starts, lens, 0
            tiles = prefill_tiles(*place, BLOCK_SIZE, self.scope.dense_blocks)
        tiles, tail = self._split_tail(tiles) if new > 1 else (tiles, None)
        out = torch.empty_like(query)
        heads, width = query.shape[1], self.table.shape[1]
        size = heads, self.kv_heads, tiles.max_length, width, self.scope
        run = attention.tiles_per_run(attention.scratch_per_tile(*size))
        starts_of_runs = range(0, tiles.row.shape[0], run)
        rest = self.rotary, scaling, out
        for start in starts_of_runs:
            part = tiles.part(start, start + run)
            if index in self.selecting:
                self.recalled[start] = self._select_for_all(index, start, query, part, scaling)
            recalled, scope = self.recalled[start], self.scope.of(tiles.max_length)
            stage.attend(query, layer.pages, self.table, part, recalled, scope, *rest)
        if tail is not None:
            ends, scope = tail.tiles, self.scope.of_tail
            if index in self.selecting:
                self.recalled_by_tail = self._select(query, layer, ends, scope, scaling, None)
            own = self._select_for_tail(index, query, ends, self.recalled_by_tail, scaling)
            if index == len(self.model.model.layers) - 1:
                of_layers = tail._replace(memory=self.found_by_tail)
                self.memories.keep_tail(of_layers, self.table)
            stage.attend(query, layer.pages, self.table, ends, own, scope, *rest)
        if new == 1:
            self.seen.setdefault(index, []).append(self._look(query, layer, recalled, scaling))
        return out[None], None

    def _empty(self, key: Tensor) -> Layer:
        blocks, (heads, size) = self.table.shape[1], key.shape[1:]
        cache = key.new_zeros((2, blocks, heads, BLOCK_SIZE, size))
        pages = Pages(*cache, key.new_zeros((blocks, heads, 2, size)))
        return Layer(pages, key.new_zeros((blocks * BLOCK_SIZE, heads, size)))

    def _look(self, query: Tensor, layer: Layer, recalled: Tensor, scale: float) -> Tensor:
        """[2, num_kv_heads]: the needle's blocks in scope, and the attention on its tokens."""
        recalled = recalled.expand(-1, self.kv_heads, -1)
        num_global, _, local = self.scope.slots(
            self.length // BLOCK_SIZE, self.scope.dense_blocks, BLOCK_SIZE
        )
        inside = (recalled[0][:, :, None] == self.blocks).any(1)
        inside |= (self.blocks < num_global) | (self.blocks >= local)
        mass = query.new_zeros(self.kv_heads, dtype=torch.float32)
        if local == 0:
            at = torch.arange(self.length + 1, device=self.device)
            key = rotate_rows(layer.key[: self.length + 1].float(), at, self.rotary)
            turned = rotate_rows(query.float(), at[-1:], self.rotary)[0]
            turned = turned.unflatten(0, (self.kv_heads, -1))
            logits = torch.einsum("hgd,khd->hgk", turned, key) * scale
            on = logits.softmax(-1)[..., self.needle.start : self.needle.stop]
            mass = on.sum(-1).mean(1)
        return torch.stack((inside.float().mean(1), mass))

    def _split_tail(self, tiles: Tiles) -> tuple[Tiles, Tail | None]:
        if self.rule == "shared":
            return tiles, None
        prompt_len = tiles.row.new_tensor([len(self.tokens)])
        return split_tail(tiles, 0, prompt_len, BLOCK_SIZE)

    def _select_for_tail(
        self, index: int, query: Tensor, tiles: Tiles, shared: Tensor, scale: float
    ) -> Tensor:
        layer, rule, stage = self.layers[index], self.rule, attention.stages(query.device)
        if index == 0 and self.scope.memory:
            self.found_by_tail = self.memories.of_layers(tiles, self.table)
        if rule == "only":
            return self._needle_alone(tiles)

        def exact_scores(query: Tensor, pages: Pages, table: Tensor, some: Tiles, *rest):
            if rule == "all":
                some = tiles
            score, extent = stage.exact_scores(query, pages, table, some, *rest)
            if rule in EXACT:
                told = query, layer.key, some, self.scope.of_tail, scale
                score = self._exact(*told, highest=True)
            elif rule in ("spread", "recent"):
                score = self._changed(score, self._can_recall(score, extent))
            return score, extent

        recalled = attention.select_for_tail(
            self._flattened(query),
            layer.pages,
            self.table,
            tiles,
            shared,
            self.scope.of_tail,
            self.rotary,
            scale,
            memory=None if rule in EXACT and rule not in SHARES else self.found_by_tail,
            stage=SimpleNamespace(exact_scores=exact_scores, recall_blocks=stage.recall_blocks),
        )
        is_forced = rule == "oracle"
        return self._with_needle(recalled, tiles, self.scope) if is_forced else recalled

    def _select_for_all(
        self, index: int, start: int, query: Tensor, tiles: Tiles, scale: float
    ) -> Tensor:
        """What this layer and those behind it recall, which are told what a server's would be."""
        layer, place = self.layers[index], (tiles, self.table)
        scope = self.scope.of(tiles.max_length)
        if not self.scope.memory:
            return self._select(query, layer, tiles, scope, scale, None)
        if index == 0:
            generated = tiles.length > 0 if tiles.max_length == 1 else None
            self.found[start] = self.memories.recollect(*place, generated)
        recalled = self._select(query, layer, tiles, scope, scale, self.found[start])
        if index == self.selecting[-1]:
            self.memories.keep(*place, self.found[start])
        return recalled

    def _select(
        self,
        query: Tensor,
        layer: Layer,
        tiles: Tiles,
        scope: Scope,
        scale: float,
        memory: Memory | None,
    ) -> Tensor:
        rotary, stage = self.rotary, attention.stages(query.device)
        if self.rule == "only":
            return self._needle_alone(tiles)
        whole = tiles
        if self.rule != "all":
            tiles = attention.selecting(tiles)
        common = (layer.pages, self.table, tiles)
        if self.rule in EXACT:
            told = query, layer.key, tiles, scope, scale
            score = self._exact(*told, highest=self.rule == "max")
            column = torch.arange(score.shape[-1], device=score.device, dtype=torch.int32)
            # all are candidates, or nothing found would join the memory
            every = column.expand(score.shape[0], 1 if scope.per_layer else self.kv_heads, -1)
            told = scope.per_layer, memory if self.rule in SHARES else None, tiles.length
            return stage.recall_blocks(score, scope.recall_blocks, None, every.contiguous(), *told)
        query = self._flattened(query)
        if self.rule in (*ASKED, "mean"):
            recalled = attention.select(query, *common, scope, rotary, scale, memory=memory)
            is_forced = self.rule == "oracle"
            return self._with_needle(recalled, whole, scope) if is_forced else recalled
        score, extent = stage.score_blocks(query, *common, scope, rotary, scale)
        can = self._can_recall(score, extent)
        score = self._changed(score, can)
        told = scope.per_layer, memory, tiles.length
        count = (8 if self.rule == "wide" else 1) * scope.candidate_blocks
        candidates = stage.recall_blocks(score, min(count, score.shape[-1]), extent, None, *told)
        of_each = candidates.expand(-1, self.kv_heads, -1)
        named = of_each.clamp(min=0).long()
        refined = stage.refine_scores(query, *common, candidates, scope, rotary, scale)
        score = torch.zeros_like(score).scatter_add_(-1, named, refined.clamp(min=0))
        score = self._changed(score, can)
        score = torch.where(of_each >= 0, score.gather(-1, named), -1.0)
        return stage.recall_blocks(score, scope.recall_blocks, None, candidates, *told)

    def _needle_alone(self, tiles: Tiles) -> Tensor:
        return self.blocks.expand(tiles.row.shape[0], 1, -1).contiguous()

    def _flattened(self, query: Tensor) -> Tensor:
        """With the rule "mean" as it is on the average at the distances in the scope."""
        if self.rule != "mean":
            return query
        turns = self.rotary.cos_sin[: self.scope.blocks * BLOCK_SIZE].mean(0, keepdim=True)
        return rotate_rows(query, torch.zeros(len(query), device=self.device), Rotary(turns))

    def _can_recall(self, score: Tensor, extent: Tensor) -> Tensor:
        column = torch.arange(score.shape[-1], device=score.device)
        return (column >= self.scope.global_blocks) & (column < extent[:, None, None])

    def _changed(self, score: Tensor, can: Tensor) -> Tensor:
        """Scores of the blocks that can be recalled, changed as the rule says."""
        score = torch.where(can, score, 0.0)
        if self.rule == "spread":
            beside = nn.functional.pad(score, (1, 1))
            score = score + (beside[..., :-2] + beside[..., 2:]) / 2
        if self.rule == "recent":
            column = torch.arange(score.shape[-1], device=score.device)
            score = score * (1 + column / score.shape[-1])
        return torch.where(can, score, -1.0)

    def _with_needle(self, recalled: Tensor, tiles: Tiles, scope: Scope) -> Tensor:
        """The needle's blocks instead of the last, where they lie between global and local."""
        size = recalled.shape[-1]
        count = min(len(self.blocks), size)
        local = tiles.position // BLOCK_SIZE - scope.local_blocks + 1
        wanted = self.blocks[:count].expand(*recalled.shape[:2], -1)
        can = (wanted >= scope.global_blocks) & (wanted < local[:, None, None])
        others = torch.where(torch.isin(recalled, self.blocks), 1 << 30, recalled).sort(-1).values
        forced = torch.cat((others[..., : size - count], wanted), -1).sort(-1).values
        return torch.where(can.all(-1, keepdim=True), forced, recalled).to(torch.int32)

    def _exact(
        self, query: Tensor, key: Tensor, tiles: Tiles, scope: Scope, scale: float, highest: bool
    ) -> Tensor:
        """Shares of the position-free softmax from every key, [num_tiles, num_kv_heads, blocks].

        highest  of a tile's rows, instead of the sum over them
        """
        heads, most = self.kv_heads, tiles.max_length
        group, blocks = query.shape[1] // heads, key.shape[0] // BLOCK_SIZE
        keys, num_tiles = key.permute(1, 2, 0), tiles.row.shape[0]
        score = query.new_full((num_tiles, heads, blocks), -1.0, dtype=torch.float32)
        chunk = max(1, EXACT_BYTES // (4 * heads * most * group * key.shape[0]))
        offset = torch.arange(most, device=query.device)
        for start in range(0, num_tiles, chunk):
            part = slice(start, start + chunk)
            last = tiles.position[part] // BLOCK_SIZE
            local = torch.where(last < tiles.dense[part], 0, last - scope.local_blocks + 1)
            if not int(local.max()):
                continue
            counts = offset < tiles.length[part, None]
            if self.rule == "newest":
                counts &= offset == tiles.length[part, None] - 1
            row = tiles.row[part, None] + offset * tiles.step
            row = row.clamp(max=query.shape[0] - 1).long()
            q = query[row].unflatten(2, (heads, group))  # [tiles, length, heads, group, size]
            q = q.permute(2, 0, 1, 3, 4).flatten(1, 3)
            can = torch.arange(blocks, device=query.device) < local[:, None]
            if self.rule in ("votes", "quest", "centroid"):
                can[:, : scope.global_blocks] = False
                seats = counts.repeat_interleave(group, 1)[None, :, :, None]
                rows = q.unflatten(1, (len(last), -1))
                found = getattr(self, "_" + self.rule)(rows, key, can, seats)
                score[part] = torch.where(can[:, None], found.transpose(0, 1), -1.0)
                continue
            logits = (q @ keys).float().mul_(scale).unflatten(1, (len(last), -1))
            mass = logits.unflatten(-1, (blocks, BLOCK_SIZE)).logsumexp(-1)
            mass.masked_fill_(~can[None, :, None], float("-inf"))
            total = mass.logsumexp(-1, keepdim=True)
            share = (mass - total).clamp(max=0).exp().nan_to_num_()
            share *= counts.repeat_interleave(group, 1)[None, :, :, None]
            share = share.amax(2) if highest else share.sum(2)
            can[:, : scope.global_blocks] = False
            score[part] = torch.where(can[:, None], share.transpose(0, 1), -1.0)
        return score

    def _votes(self, query: Tensor, key: Tensor, can: Tensor, counts: Tensor) -> Tensor:
        """[num_kv_heads, num_tiles, blocks]; query [num_kv_heads, num_tiles, rows, head_size], can
        [num_tiles, blocks], counts [1, num_tiles, rows, 1]; so the next two."""
        logits = torch.einsum("htrd,khd->htrk", query, key).float()
        logits.masked_fill_(~can.repeat_interleave(BLOCK_SIZE, 1)[None, :, None], float("-inf"))
        block = logits.topk(VOTES, -1).indices // BLOCK_SIZE
        votes = torch.zeros((*logits.shape[:2], can.shape[1]), device=query.device)
        return votes.scatter_add_(
            -1, block.flatten(2), counts.expand(block.shape).flatten(2).float()
        )

    def _quest(self, query: Tensor, key: Tensor, can: Tensor, counts: Tensor) -> Tensor:
        least, most = key.unflatten(0, (-1, BLOCK_SIZE)).aminmax(dim=1)
        bound = torch.einsum("htrd,bhd->htrb", query.clamp(min=0), most)
        bound += torch.einsum("htrd,bhd->htrb", query.clamp(max=0), least)
        return _above_zero(bound.float().masked_fill(~counts, float("-inf")).amax(2), can)

    def _centroid(self, query: Tensor, key: Tensor, can: Tensor, counts: Tensor) -> Tensor:
        mean = key.unflatten(0, (-1, BLOCK_SIZE)).mean(1)
        logits = torch.einsum("htrd,bhd->htrb", query, mean).float()
        return _above_zero(logits.masked_fill(~counts, float("-inf")).amax(2), can)


def _above_zero(score: Tensor, can: Tensor) -> Tensor:
    """Of the same order where they count: recall_blocks takes scores from 0 on."""
    score = score.masked_fill(~can, float("inf"))
    return (score - score.amin(-1, keepdim=True)).nan_to_num_(0, 0, 0)


def needle_place(prompts: Prompts, prompt: Prompt) -> range:
    """Where the sentence with the answer stands, by the answer's first telling."""
    for lead in ("", " "):
        answer = prompts.encode(lead + prompt.answer)
        for place in range(len(prompt.tokens) - len(answer)):
            if prompt.tokens[place : place + len(answer)] == answer:
                return range(max(place - 14, 0), place + len(answer))
    raise ValueError("the answer's tokens do not stand in the prompt")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--lengths", type=int, nargs="+", required=True)
    tasks = (*TASKS, *sorted(ruler_text.HAVE_DEPTH))
    parser.add_argument("--tasks", nargs="+", choices=tasks, default=["essay"])
    parser.add_argument("--rules", nargs="+", choices=RULES, default=["served"])
    parser.add_argument("--settings", type=json.loads, nargs="+", default=[{}])
    parser.add_argument("--from-question", action="store_true", help="rules decide from there on")
    parser.add_argument("--depths", type=int, default=5)
    parser.add_argument("--keys", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if "only" in options.rules and not options.from_question:
        parser.error("the rule only needs --from-question: what stands before the needle has none")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    study = Study(options.model, device, torch.bfloat16 if device == "cuda" else torch.float32)
    stamp = {key: value for key, value in harness.stamp().items() if key != "vllm"}
    about = {"model": Path(options.model).name, "seed": options.seed} | stamp
    prompts = Prompts(options.model)
    for task in options.tasks:
        everything = {"dense_limit": study.window}
        window = study.window // 4
        (_, weight), *_ = ask(study, prompts, options, task, window, ["served"], everything, 1)
        for length in sorted(options.lengths):
            for settings in options.settings:
                shared = (
                    about | engines.Provider("reattention", options.model, 0, settings).numbers()
                )
                given = task, length, options.rules, settings, options.keys
                for row, _ in ask(study, prompts, options, *given, weight):
                    harness.append(TABLE, COLUMNS, [shared | row])


def make_prompt(prompts: Prompts, task: str, length: int, depth: float, seed: str) -> Prompt:
    """One of benchmarks.prompts, or of RULER's with one answer."""
    if task in TASKS:
        return prompts.make(task, length, depth, seed)
    sample = ruler_text.make(prompts, task, length, depth, seed)
    return Prompt(task, depth, sample.tokens, sample.answers[0])


def ask(
    study: Study,
    prompts: Prompts,
    options: argparse.Namespace,
    task: str,
    length: int,
    rules: list[str],
    settings: dict,
    keys: int,
    weight: Tensor | None = None,
) -> list[tuple[dict, Tensor]]:
    """For each rule a row of the table, and the needle's attention by layer and KV head.

    weight  of layers and heads for the coverage; None: this attention, as where all is seen
    """
    found: dict[str, list] = {rule: [] for rule in rules}
    for depth in depths(options.depths):
        for key in range(keys):
            prompt = make_prompt(prompts, task, length, depth, f"{options.seed} {key}")
            place = needle_place(prompts, prompt)
            told = prompts.encode(f" {prompt.answer}")
            room = max(ANSWER_LEN, len(told) + 1)
            for rule in rules:
                if not options.from_question or rule == rules[0]:
                    reads = "served" if options.from_question else rule
                    study.read(prompt.tokens, room, settings, reads)
                written, logprob, seen = study.answer(rule, place, told)
                text = prompts.tokenizer.decode(written)
                found[rule].append((is_hit(prompt, text), logprob, *seen.unbind(1)))
                saw = f"{logprob:.2f}, {prompt.answer} as {text!r}"
                print(f"{task} {length} {depth} {rule}: {saw}", flush=True)
    rows = []
    for rule, answers in found.items():
        hits, logprobs, covers, masses = zip(*answers, strict=True)
        mass = torch.stack(masses).mean(0)
        counts = mass if weight is None else weight
        cover = float((torch.stack(covers).mean(0) * counts).sum() / counts.sum())
        row = {"rule": rule, "task": task, "context_len": length, "hits": sum(hits)}
        row |= {"samples": len(hits), "coverage": f"{cover:.4f}"}
        row |= {"logprob": f"{sum(logprobs) / len(hits):.4g}"}
        row |= {"rules_from": "question" if options.from_question else "start"}
        rows.append((row, mass))
        print(f"{settings or 'default'} {row}", flush=True)
    return rows


if __name__ == "__main__":
    main()
