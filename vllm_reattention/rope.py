"""Rotary embeddings move from the model into the cache.

vLLM's models rotate queries and keys before they call their Attention layer; we need them as they
were before. So a module that owns both a rotary embedding and an Attention layer on our backend
gets a clone of the embedding that rotates nothing, and proof.py shows at load that nothing else
changed.
"""

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from csrc_triton.layout import Rotary, rotation_table
from vllm_reattention import compat

# Rotary embeddings of Transformers models: one serves all layers, from outside them.
transformers_ropes: weakref.WeakSet[nn.Module] = weakref.WeakSet()
# Modules that were given a clone. One that has none any more must not be taken for one that never
# rotates: its queries and keys would not be rotated at all.
deferring: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Refused(RuntimeError):
    """The model cannot be served; says why and what to do instead."""


class Deferred:
    """Mixed in front of a rotary embedding's class: hands query and key back as they came."""

    def forward(self, positions, query, key=None, *_, **__):
        return query, key

    forward_native = forward_cuda = forward_cpu = forward_hip = forward_xpu = forward_oot = forward


class Site(NamedTuple):
    """Where an Attention layer sits in its model."""

    layer: Callable[[], Any]  # a weak reference to vLLM's Attention
    parent: Callable[[], Any]  # and one to the module that owns it


@functools.cache
def install() -> None:
    """See every module as it is attached to its parent."""
    # torch's annotation has forgotten that a hook may return another module
    register_module_module_registration_hook(_on_attach)  # type: ignore[arg-type]


def _on_attach(parent: nn.Module, name: str, child: nn.Module | None) -> nn.Module | None:
    if child is None or isinstance(child, Deferred):
        return None
    if compat.is_ours(child):
        child.impl.site = Site(weakref.ref(child), weakref.ref(parent))
        for other, module in parent._modules.items():
            if compat.is_rotary(module) and not isinstance(module, Deferred):
                parent._modules[other] = _defer(parent, module)
        return None
    if compat.is_rotary(child):
        owned = any(compat.is_ours(module) for module in parent._modules.values())
        return _defer(parent, child) if owned else None
    if isinstance(getattr(child, "inv_freq", None), Tensor):
        transformers_ropes.add(child)
    return None


def _defer(parent: nn.Module, stock: nn.Module) -> nn.Module:
    """A shallow clone that rotates nothing.

    It shares parameters and buffers, so names of weights stay; other modules that share the
    embedding keep theirs.
    """
    clone = copy.copy(stock)
    kind: type = type(stock)  # mypy takes a type[nn.Module] for unhashable
    clone.__class__ = _deferred_class(kind)
    vars(clone)["stock"] = stock  # past nn.Module.__setattr__, which would make it a child
    deferring.add(parent)
    return clone


@functools.cache
def _deferred_class(stock: type) -> type:
    return type("Deferred" + stock.__name__, (Deferred, stock), {})


def defer_embeddings(parent: nn.Module) -> None:
    """The same for a Transformers layer, which is handed cos and sin: hand it ones and zeros."""
    inner = parent.forward

    def forward(*args, position_embeddings=None, **kwargs):
        if position_embeddings is not None:
            cos, sin = position_embeddings
            position_embeddings = torch.ones_like(cos), torch.zeros_like(sin)
        return inner(*args, position_embeddings=position_embeddings, **kwargs)

    parent.forward = forward


class Rope(NamedTuple):
    """What a rotary embedding is made from: magnitude * cos(position * radians), and sin."""

    radians: Tensor  # [rotary_dim / 2] fp64, per token, on the CPU
    magnitude: float = 1.0
    interleaved: bool = False

    def rotary(self, num_positions: int, device: torch.device) -> Rotary:
        table = rotation_table(self.radians, num_positions).to(device)
        return Rotary(table, self.interleaved, self.magnitude**2)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [num_tokens, num_heads, head_size] as the model would rotate it."""
        half = len(self.radians)
        turned = x[..., : 2 * half].double().cpu()
        pairs = turned.unflatten(-1, (half, 2) if self.interleaved else (2, half))
        first, second = pairs.unbind(-1 if self.interleaved else -2)
        angles = (positions.cpu()[:, None] * self.radians)[:, None]
        cos, sin = self.magnitude * angles.cos(), self.magnitude * angles.sin()
        pairs = torch.stack(
            (first * cos - second * sin, second * cos + first * sin),
            dim=-1 if self.interleaved else -2,
        )
        return torch.cat((pairs.flatten(-2).to(x), x[..., 2 * half :]), dim=-1)


def read_table(table: Callable[[Tensor], tuple[Tensor, Tensor]], num_positions: int) -> Rope:
    """Read the frequencies off a table, and check that they give all of it back.

    table   positions [n] -> cos, sin [n, rotary_dim / 2] in fp32

    A frequency's error grows with the position it is used at, so frequencies are refined at
    positions 1, 2, 4, ...: fp32 holds these angles exactly, and each step halves the error.
    """
    powers = 2 ** torch.arange(num_positions.bit_length() - 1)
    spread = torch.linspace(0, num_positions - 1, 64, dtype=torch.float64).long()
    positions = torch.cat((torch.zeros(1, dtype=torch.long), powers, spread))
    cos, sin = (x.double().cpu() for x in table(positions))
    magnitude = cos[0].max().item()
    radians = torch.zeros_like(cos[0])
    for position, c, s in zip(powers.tolist(), cos[1:], sin[1:], strict=False):
        near = radians * position
        behind = torch.atan2(s * near.cos() - c * near.sin(), c * near.cos() + s * near.sin())
        radians = radians + behind / position
    angles = positions[:, None] * radians
    error = torch.hypot(magnitude * angles.cos() - cos, magnitude * angles.sin() - sin)
    # Models are served with tables of 16 bit as a rule, 2^-8 off; their angles are fp32
    allowed = magnitude * (2.0**-7 + 2.0**-22 * angles.abs())
    if (error > allowed).any():
        place, channel = divmod(int((error / allowed).argmax()), error.shape[1])
        raise Refused(
            f"its angles must be position * frequency, got a table {error[place, channel]:.1e} off "
            f"that at position {positions[place]}, channel {channel}"
        )
    return Rope(radians, magnitude)
