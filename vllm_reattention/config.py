"""The method's numbers: --additional-config '{"reattention": {...}}'."""

from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from csrc_triton.layout import Scope

KEY = "reattention"
Scorer = Literal["layer", "refined", "summary"]
SIZES = (
    "global_size",
    "local_size",
    "recall_size",
    "decode_recall_size",
    "read_recall_size",
    "read_local_size",
    "dense_limit",
)
MOST = 8192  # tokens of a default scope
LEAST = 2048  # tokens of a default scope, if the model was trained on so many
READ_LEAST = 1024  # tokens of half a scope, by which prompts are read; less was not measured
CANDIDATES_PER_RECALLED = 3
# At least, of a single query, whose keys are read once: 512 with the global block and the probes.
SINGLE_CANDIDATES = 447
MEMORY = 0.8
SELECT_EVERY = 4
SELECTIONS = 7  # of a model at least, if it has so many layers


@dataclass(frozen=True)
class ReAttentionConfig:
    """Sizes in tokens; None is derived from the model's trained window.

    global_size   first tokens of the context, always attended to; default 32, at least one block
    local_size    most recent tokens, always attended to; default a quarter of the scope
    recall_size   tokens selected from those between; default the rest of the scope; 0 selects none
    decode_recall_size
                  tokens selected when a token is decoded; default half of recall_size, which takes
                  less time; answers that list many facts need all of it
    read_recall_size, read_local_size
                  tokens selected, and most recent ones, for a prompt but for its last 97 to 128
                  tokens; default half the scope if that is at least 1024 tokens, and a quarter of
                  local_size in it: what is read with less is told apart better
    dense_limit   prompts up to this length, and what answers them up to there, are attended to in
                  full; default the scope. In longer prompts everything is attended to up to the
                  scope, whatever the limit, as more dense text at their start would cost answers
    scorer        layer: blocks are scored from their summaries, then the best candidates again from
                  their keys; the KV heads of a layer add up their scores and recall the same blocks
                  refined: the same, but each KV head recalls its own blocks
                  summary: each KV head ranks blocks by their summaries alone. At the end of a
                  prompt every key is scored, with any scorer
    select_every  one layer in this many selects, and the following ones reuse its selection. Only
                  with the scorer "layer"; default 4, fewer in models with fewer than 28 layers
    select_layers the numbers of the layers that select, in place of select_every; layer 0 always
                  does. `python -m vllm_reattention layers MODEL` prints those that find facts
    memory        factor by which what earlier selections found is added to the scores of the next
                  decoded token; 0 turns it off. Only with the scorer "layer"; default 0.8, or 0
                  where every layer selects, which finds as much without

    The default scope is a quarter of the trained window, but at least 2048 tokens (or the window)
    and at most 8192: models make less of recalled text well before their window ends
    (docs/choices.md).
    """

    global_size: int | None = None
    local_size: int | None = None
    recall_size: int | None = None
    decode_recall_size: int | None = None
    read_recall_size: int | None = None
    read_local_size: int | None = None
    dense_limit: int | None = None
    scorer: Scorer = "layer"
    select_every: int | None = None
    select_layers: tuple[int, ...] | None = None
    memory: float | None = None

    def __post_init__(self):
        for name in SIZES:
            size = getattr(self, name)
            if size is not None and type(size) is not int:
                raise ValueError(f"{name} must be a whole number of tokens, got {size!r}")
        every = self.select_every
        if every is not None and (type(every) is not int or every < 1):
            raise ValueError(f"select_every must be a number of layers from 1 on, got {every!r}")
        self._check_layers()
        if self.scorer not in get_args(Scorer):
            raise ValueError(f"scorer must be one of {get_args(Scorer)}, got {self.scorer!r}")
        memory = self.memory
        if memory is not None and (type(memory) not in (int, float) or not 0 <= memory < 1):
            raise ValueError(f"memory must be a number from 0 to below 1, got {memory!r}")
        if self.scorer != "layer" and memory:
            raise ValueError(
                f"memory must be 0 with the scorer {self.scorer!r}, as a KV head has none that it "
                f'corresponds to in the next layer, got {memory}; take the scorer "layer"'
            )
        if self.scorer != "layer" and every not in (None, 1):
            raise ValueError(
                f"select_every must be 1 with the scorer {self.scorer!r}, as a KV head has none "
                f'that it corresponds to in the next layer, got {every}; take the scorer "layer"'
            )

    def _check_layers(self) -> None:
        layers = self.select_layers
        if layers is None:
            return
        if (
            not isinstance(layers, list | tuple)
            or not layers
            or any(type(layer) is not int or layer < 0 for layer in layers)
        ):
            raise ValueError(
                f"select_layers must be a list of layers by number from 0 on, got {layers!r}"
            )
        if self.select_every is not None:
            raise ValueError(
                f"select_layers must be without select_every, got {layers} and "
                f"{self.select_every}; leave one of them out"
            )
        if self.scorer != "layer":
            raise ValueError(
                f'select_layers must be with the scorer "layer", got {self.scorer!r}, of which '
                "every layer selects; leave one of them out"
            )

    @classmethod
    def read(cls, additional_config: Any) -> "ReAttentionConfig":
        """From vLLM's additional_config; no "reattention" in it means all defaults."""
        numbers = dict(additional_config or {}).get(KEY, {})
        if not isinstance(numbers, dict):
            raise ValueError(
                f"{KEY!r} in --additional-config must be a dictionary, got {numbers!r}"
            )
        names = [field.name for field in fields(cls)]
        for name in numbers:
            if name not in names:
                raise ValueError(
                    f"keys of {KEY!r} in --additional-config must be among {', '.join(names)}, "
                    f"got {name!r}"
                )
        return cls(**numbers)

    def selecting_layers(self, num_layers: int) -> tuple[int, ...]:
        """Of so many; the layers behind each recall what it did.

        What a model's first layers select is of no use to its last.
        """
        if self.select_layers is not None:
            if max(self.select_layers) >= num_layers:
                raise ValueError(
                    f"select_layers must be among the model's layers 0 to {num_layers - 1}, got "
                    f"{max(self.select_layers)}; leave it out"
                )
            return tuple(sorted({0, *self.select_layers}))
        return tuple(range(0, num_layers, self.layers_per_selection(num_layers)))

    def layers_per_selection(self, num_layers: int) -> int:
        """Where select_layers does not tell."""
        if self.scorer != "layer":
            return 1
        return self.select_every or max(1, min(SELECT_EVERY, num_layers // SELECTIONS))

    def remembers(self, num_layers: int) -> float:
        """The memory of a model of so many layers."""
        shares = len(self.selecting_layers(num_layers)) < num_layers
        if self.memory is not None:
            return float(self.memory)
        return MEMORY if shares else 0.0

    def resolve(
        self, trained_window: int, block_size: int, num_layers: int = 1, speculates: bool = False
    ) -> Scope:
        """The scope in blocks for a model trained on `trained_window` tokens.

        num_layers  of the model; select_layers must be among them, and the memory hangs on it
        speculates  tokens are verified together, so that none can know what the one before found
        """

        def whole(size: int) -> int:
            return size // block_size * block_size

        size = whole(min(MOST, max(trained_window // 4, LEAST), trained_window))
        first = max(32, block_size) if self.global_size is None else self.global_size
        local = max(whole(size // 4), block_size) if self.local_size is None else self.local_size
        recall = self.recall_size
        if recall is None:
            recall = max(size - first - local, 0)
        decode = self.decode_recall_size
        if decode is None:
            decode = -(-recall // (2 * block_size)) * block_size
        total = first + recall + local
        half = whole(total // 2)
        halves = recall > 0 and half >= READ_LEAST
        read_local = self.read_local_size
        if read_local is None:
            least = max(whole(local // 4), 2 * block_size, half - first - recall)
            read_local = min(least, local) if halves else local
        read = self.read_recall_size
        if read is None:
            read = min(max(half - first - read_local, block_size), recall) if halves else recall
        dense = self.dense_limit
        if dense is None:
            dense = total

        sizes = zip(SIZES, (first, local, recall, decode, read, read_local, dense), strict=True)
        for name, tokens in sizes:
            at_least = 0 if name.endswith("recall_size") else block_size
            if tokens < at_least or tokens % block_size:
                kind = "a positive multiple" if at_least else "a multiple"
                raise ValueError(
                    f"{name} must be {kind} of the block size {block_size}, got {tokens}; "
                    f"set {name}={max(at_least, -(-tokens // block_size) * block_size)}"
                )
        if total > trained_window:
            raise ValueError(
                f"global_size + recall_size + local_size must fit in the trained window of "
                f"{trained_window} tokens, got {first} + {recall} + {local} = {total}; "
                f"make recall_size, local_size or global_size smaller"
            )
        for name, tokens in (("decode_recall_size", decode), ("read_recall_size", read)):
            if tokens > recall or (recall and not tokens):
                raise ValueError(
                    f"{name} must be at most recall_size, {recall}, and 0 only with it, "
                    f"got {tokens}; set {name}={min(max(tokens, block_size), recall)}"
                )
        if read_local > local:
            raise ValueError(
                f"read_local_size must be at most local_size, {local}, got {read_local}; "
                f"set read_local_size={local}"
            )
        if not total <= dense <= trained_window:
            raise ValueError(
                f"dense_limit must lie between the scope of {total} tokens and the trained "
                f"window of {trained_window}, got {dense}; leave it out for the default"
            )
        recalled, refined = recall // block_size, self.scorer != "summary"
        candidates = CANDIDATES_PER_RECALLED * recalled if refined else 0
        return Scope(
            global_blocks=first // block_size,
            recall_blocks=recalled,
            local_blocks=local // block_size,
            dense_blocks=total // block_size,
            candidate_blocks=candidates,
            single_candidates=max(2 * recalled, SINGLE_CANDIDATES) if candidates else 0,
            single_recall=decode // block_size,
            read_recall=read // block_size,
            read_local=read_local // block_size,
            per_layer=self.scorer == "layer",
            memory=0.0 if speculates else self.remembers(num_layers),
            exact_blocks=dense // block_size,
        )


def described(scope: Scope, block_size: int) -> str:
    """A scope in words, in tokens."""

    def told(blocks: int) -> str:
        return f"{blocks * block_size:,}"

    text = (
        f"{told(scope.blocks)} tokens: {told(scope.global_blocks)} global, "
        f"{told(scope.recall_blocks)} recalled, {told(scope.local_blocks)} local"
    )
    if (decoded := scope.of(1).recall_blocks) < scope.recall_blocks:
        text += f"; {told(decoded)} recalled in decode"
    if (reading := scope.of(block_size)) != scope.of_tail:
        text += (
            f"; {told(reading.recall_blocks)} recalled and {told(reading.local_blocks)} local "
            "before a prompt's end"
        )
    return text
