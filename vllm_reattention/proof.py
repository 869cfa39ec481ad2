"""The proof, at load, that rotating in the cache is what the model would have done.

Each attention module is run on random states with its Attention layer stubbed. Without rotation,
what arrives must not depend on positions; rotated by us it must be what the stock module sends.
A model that cannot prove this is refused, never served wrong.
"""

import functools
import inspect
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vllm_reattention import compat
from vllm_reattention.rope import (
    Deferred,
    Refused,
    Rope,
    Site,
    defer_embeddings,
    deferring,
    read_table,
    transformers_ropes,
)

POSITIONS = (0, 1, 2, 5, 17, 40)
OTHERS = (3, 9, 30, 1, 0, 11)
ALONE = "VLLM_PLUGINS=reattention loads ours alone"
NO_ROTATION = Rope(torch.zeros(0, dtype=torch.float64))

_ropes: weakref.WeakKeyDictionary[nn.Module, Rope] = weakref.WeakKeyDictionary()


class Proven(NamedTuple):
    """What one Attention layer is sent.

    rope      rotates its queries and keys, taken over from its model
    key_bias  runs it once more: [num_kv_heads, head_size] fp32, keys of hidden states of zero, what
              a projection adds to every key, in the model's order of channels
    """

    rope: Rope
    key_bias: Callable[[], Tensor]


def prove(site: Site, dtype: torch.dtype) -> Proven:
    """Take the rotation over from one Attention layer's model, or refuse."""
    layer, parent = site.layer(), site.parent()
    try:
        with _plain_defaults():
            return _prove(layer, parent, dtype)
    except Refused as reason:
        raise Refused(
            f"{type(parent).__name__} cannot be served by reattention ({layer.layer_name}): "
            f"{reason}; choose another attention backend for this model"
        ) from None


@contextmanager
def _plain_defaults():
    """While vLLM loads a model, new tensors are by default of its type and on its device."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _prove(layer: Any, parent: nn.Module, dtype: torch.dtype) -> Proven:
    takes = inspect.signature(parent.forward).parameters
    if "position_embeddings" in takes:
        return _prove_transformers(_Probe(layer, parent, dtype))
    for name in ("positions", "position_ids"):
        if name in takes:
            return _prove_vllm(_Probe(layer, parent, dtype), name)
    raise Refused(f"it must take positions, takes {', '.join(takes)}")


class _Probe:
    """Runs an attention module and catches what it sends to its Attention layer."""

    def __init__(self, layer: Any, parent: nn.Module, dtype: torch.dtype):
        self.layer, self.parent = layer, parent
        compat.unfuse(parent)
        if (width := compat.hidden_size(parent)) is None:
            raise Refused("it must project its queries with one of vLLM's linear layers")
        self.device = layer._k_scale.device
        self.positions, self.others = (
            torch.tensor(p, device=self.device) for p in (POSITIONS, OTHERS)
        )
        random = torch.Generator().manual_seed(0)
        states = torch.randn(len(POSITIONS), width, generator=random)
        self.states = states.to(self.device, dtype)
        self.tolerance = 1e-4 if dtype == torch.float32 else 3e-2

    @torch.no_grad()
    def run(self, **inputs) -> list[Tensor]:
        """Query and key, [num_tokens, num_heads, head_size]; query alone if keys are shared."""
        layer, sent = self.layer, []

        def catch(query, key, value, *_, **__):
            for x in (query, key):
                if x is not None:
                    sent.append(x.reshape(len(POSITIONS), -1, layer.head_size).clone())
            return query.new_zeros(len(POSITIONS), layer.num_heads * layer.head_size_v)

        layer.forward = catch
        try:
            self.parent(**inputs)
        finally:
            del layer.forward
        return sent

    def of_zero(self, run: Callable[..., list[Tensor]], *inputs: Tensor) -> Tensor:
        """The key that `run` sends bare for states that are zero, as they stay."""
        self.states.zero_()
        with _plain_defaults():
            return run(*inputs)[-1][0].float()

    def off(self, rope: Rope, bare: list[Tensor], turned: list[Tensor]) -> float:
        """How far our rotation of what was sent bare is from the model's own, relatively."""
        errors = (
            (rope.rotate(a, self.positions) - b).float().abs().max() / b.float().abs().max()
            for a, b in zip(bare, turned, strict=True)
        )
        return torch.stack([*errors]).max().item()


def _prove_vllm(probe: _Probe, positions: str) -> Proven:
    children = probe.parent._modules
    names = [name for name, child in children.items() if isinstance(child, Deferred)]
    if len(names) > 1:
        raise Refused(f"it must own one rotary embedding, owns {', '.join(names)}")
    if not names and probe.parent in deferring:
        raise Refused(f"no other plugin may replace its rotary embedding ({ALONE})")

    def run(at: Tensor) -> list[Tensor]:
        return probe.run(**{positions: at, "hidden_states": probe.states})

    bare = run(probe.positions)
    _must_be_position_free(bare, run(probe.others))
    key_bias = functools.partial(probe.of_zero, run, probe.positions)
    if not names:
        return Proven(NO_ROTATION, key_bias)
    clone = children[names[0]]
    stock = vars(clone)["stock"]
    interleaved = not getattr(clone, "is_neox_style", True)
    vars(stock)["is_neox_style"] = not interleaved  # some models set it on what is now the clone
    children[names[0]] = stock
    try:
        turned = run(probe.positions)
    finally:
        children[names[0]] = clone
    if _same(bare, turned):  # the embedding is there but this layer does not call it
        return Proven(NO_ROTATION, key_bias)
    if stock not in _ropes:
        table = compat.rotary_table(stock)
        half = table.shape[-1] // 2
        _ropes[stock] = read_table(lambda p: (table[p, :half], table[p, half:]), len(table))
    rope = _ropes[stock]._replace(interleaved=interleaved)
    _must_agree(probe.off(rope, bare, turned), probe.tolerance)
    return Proven(rope, key_bias)


def _prove_transformers(probe: _Probe) -> Proven:
    """A Transformers layer is handed cos and sin, made by one embedding for the whole model."""
    config: Any = probe.parent.config
    owned = [
        rope
        for rope in transformers_ropes
        if getattr(rope, "config", None) is config and not rope.inv_freq.is_meta  # a mere copy
    ]
    if not owned or "layer_type" in inspect.signature(owned[0].forward).parameters:
        raise Refused("its model must own one rotary embedding for all layers")

    def embed(positions: Tensor) -> tuple[Tensor, Tensor]:
        at = probe.states[None].float(), positions.to(probe.device)[None]
        one, *others = (embedding(*at) for embedding in owned)  # others: of an earlier engine
        if not all(_same(one, other) for other in others):
            raise Refused(f"its model must rotate all layers alike, owns {len(owned)} embeddings")
        return one

    def run(cos: Tensor, sin: Tensor) -> list[Tensor]:
        embeddings = cos.to(probe.states), sin.to(probe.states)
        return probe.run(
            hidden_states=probe.states[None], position_embeddings=embeddings, attention_mask=None
        )

    cos, sin = embed(probe.positions)
    nowhere = torch.ones_like(cos), torch.zeros_like(sin)
    bare, turned = run(*nowhere), run(cos, sin)
    key_bias = functools.partial(probe.of_zero, run, *nowhere)
    if _same(bare, turned):
        return Proven(NO_ROTATION, key_bias)
    half = cos.shape[-1] // 2
    twice = torch.equal(cos[..., :half], cos[..., half:])  # else each angle stands beside itself
    columns = slice(half) if twice else slice(0, None, 2)

    def table(positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = embed(positions)
        return cos[0, :, columns], sin[0, :, columns]

    rope = read_table(table, config.max_position_embeddings)
    ropes = [rope._replace(interleaved=interleaved) for interleaved in (False, True)]
    rope = min(ropes, key=lambda rope: probe.off(rope, bare, turned))
    _must_agree(probe.off(rope, bare, turned), probe.tolerance)
    defer_embeddings(probe.parent)
    return Proven(rope, key_bias)


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _must_be_position_free(some: list[Tensor], others: list[Tensor]) -> None:
    """Keys exactly; queries up to a scale, as some models turn up the temperature with position."""
    query, other = (torch.nn.functional.normalize(x[0].float(), dim=-1) for x in (some, others))
    if not _same(some[1:], others[1:]) or not torch.allclose(query, other, atol=1e-2):
        raise Refused(
            "its rotary embedding must be its only use of positions, and no other plugin may "
            f"replace that ({ALONE})"
        )


def _must_agree(off: float, tolerance: float) -> None:
    if not off <= tolerance:
        raise Refused(
            f"queries and keys must be rotated last, ours and its own are {off:.0e} apart"
        )
