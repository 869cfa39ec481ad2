"""python -m vllm_reattention doctor: check this installation."""

import os
from collections.abc import Callable
from importlib.metadata import entry_points, version
from platform import python_version

import torch
from torch import Tensor

from csrc_triton.layout import Pages, Scope, Tail, Tiles
from vllm_reattention import __version__, compat
from vllm_reattention.attention import reattention, select, select_for_tail, stages
from vllm_reattention.rope import Rope

BLOCK, LENGTH, HEADS, KV_HEADS, HEAD_SIZE = 32, 1000, 8, 2, 64
SCOPE = Scope(1, 4, 3, 8, candidate_blocks=16)
NEEDLES = (9, 17, 22)  # blocks that hold what every query looks for


class Unsound(Exception):
    """What is wrong, and what to do."""


def main() -> int:
    """Every check, one line each; 1 if any failed."""
    failed = False
    for name, check in CHECKS.items():
        try:
            print(f"pass  {name:12}  {check()}")
        except Unsound as reason:
            failed = True
            print(f"FAIL  {name:12}  {reason}")
        except Exception as error:  # whatever goes wrong is what was asked for
            failed = True
            print(f"FAIL  {name:12}  {type(error).__name__}: {error}")
    return int(failed)


def versions() -> str:
    if refusal := compat.version_refusal():
        raise Unsound(refusal)
    return (
        f"vllm-reattention {__version__}, vLLM {compat.vllm_version()}, torch {torch.__version__}, "
        + ("" if compat.on_cpu() else f"triton {version('triton')}, ")  # no need of it there
        + f"Python {python_version()}"
    )


def device() -> str:
    if compat.on_cpu():
        return "CPU: the reference in plain PyTorch (correct, but slow)"
    if not torch.cuda.is_available():
        raise Unsound("this vLLM is not a CPU build, and torch finds no GPU; check nvidia-smi")
    about = torch.cuda.get_device_properties(0)
    if (about.major, about.minor) < (8, 0):
        raise Unsound(
            f"the GPU must have compute capability 8.0 or later, {about.name} has "
            f"{about.major}.{about.minor}"
        )
    return f"{about.name}, {about.total_memory / 2**30:.0f} GiB"


def plugin() -> str:
    """vLLM loads what the distribution names, unless VLLM_PLUGINS leaves it out."""
    found = [e for e in entry_points(group="vllm.general_plugins") if e.name == "reattention"]
    if not found:
        raise Unsound(
            "no entry point found: vllm-reattention must be installed with pip; being "
            "importable is not enough"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "reattention" not in allowed.split(","):
        raise Unsound(f"VLLM_PLUGINS={allowed} excludes this plugin; add reattention to it")
    return f"{found[0].value}"


def backend() -> str:
    path = compat.registered_path()
    if path != compat.PATH:
        raise Unsound(
            f"vLLM's backend {compat.NAME} must be {compat.PATH}, got {path}: another "
            "plugin has registered this name; remove it or set VLLM_PLUGINS=reattention"
        )
    return f"--attention-backend {compat.NAME.lower()}"


def arithmetic() -> str:
    """Selection finds what was planted; attention agrees with float64."""
    where = torch.device("cpu" if compat.on_cpu() else "cuda")
    dtype = torch.float32 if compat.on_cpu() else torch.bfloat16
    errors = []
    # a decoded token, a tile of a prompt, one at its end
    for num_queries, is_end in ((1, False), (8, False), (8, True)):
        case = Case(num_queries, where, dtype)
        recalled, out = case.run(is_end)
        for head, blocks in enumerate(recalled.tolist()):
            if missed := set(NEEDLES) - set(blocks):
                raise Unsound(f"selection missed blocks {sorted(missed)} for KV head {head}")
        exact = case.attention(recalled)
        errors.append((out.double().cpu() - exact).norm() / exact.norm())
    worst = torch.stack(errors).max()  # unlike Python's, it keeps nan
    allowed = 1e-5 if dtype == torch.float32 else 2e-2
    if not worst < allowed:
        raise Unsound(
            f"attention in {dtype} differs from float64 by {worst:.0e}, more than {allowed:.0e}"
        )
    kind = "reference" if where.type == "cpu" else "kernels"
    return f"{kind} in {dtype}: relative error {worst:.0e} against float64"


CHECKS: dict[str, Callable[[], str]] = {
    "versions": versions,
    "device": device,
    "plugin": plugin,
    "backend": backend,
    "arithmetic": arithmetic,
}


class Case:
    """One request of LENGTH tokens with its last tokens as queries."""

    def __init__(self, num_queries: int, where: torch.device, dtype: torch.dtype):
        random = torch.Generator().manual_seed(num_queries)
        self.query = torch.randn(num_queries, HEADS, HEAD_SIZE, generator=random)
        self.key = torch.randn(LENGTH, KV_HEADS, HEAD_SIZE, generator=random)
        self.value = torch.randn(LENGTH, KV_HEADS, HEAD_SIZE, generator=random)
        wanted = torch.randn(KV_HEADS, HEAD_SIZE, generator=random)
        self.query += wanted.repeat_interleave(HEADS // KV_HEADS, 0)
        for block in NEEDLES:
            self.key[block * BLOCK : (block + 1) * BLOCK] += wanted
        self.query, self.key, self.value = (
            x.to(where, dtype) for x in (self.query, self.key, self.value)
        )
        self.rope = Rope(10000.0 ** (-torch.arange(0, HEAD_SIZE, 2).double() / HEAD_SIZE))
        self.scale = HEAD_SIZE**-0.5

    def run(self, is_end: bool) -> tuple[Tensor, Tensor]:
        """What was recalled, [num_kv_heads, recall_blocks], and the attention's output."""
        where, dtype, num_queries = self.query.device, self.query.dtype, len(self.query)
        rotary = self.rope.rotary(LENGTH, where)
        num_blocks = -(-LENGTH // BLOCK)
        order = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).to(where)
        page = torch.full((num_blocks, KV_HEADS, BLOCK, HEAD_SIZE), torch.nan).to(where, dtype)
        pages = Pages(page, page.clone(), page[:, :, :2].clone())
        at = torch.arange(LENGTH, device=where)
        slots = order[at // BLOCK] * BLOCK + at % BLOCK
        stages(where).write_kv(self.key, self.value, pages, slots, rotary)
        first = LENGTH - num_queries
        numbers = [[0], [0], [num_queries], [first], [SCOPE.dense_blocks]]
        request, row, length, position, dense = torch.tensor(
            numbers, dtype=torch.int32, device=where
        )
        tiles = Tiles(request, row, length, position, dense, 1 if num_queries == 1 else BLOCK)
        table = order.to(torch.int32)[None]
        common, rest = (self.query, pages, table, tiles), (SCOPE, rotary, self.scale)
        out = torch.full_like(self.query, torch.nan)
        recalled, tail = select(*common, *rest), None
        if is_end:
            tail = Tail(tiles)
            recalled = select_for_tail(*common, recalled, *rest)
            tiles = tiles._replace(length=torch.zeros_like(tiles.length))
        reattention(self.query, pages, table, tiles, *rest, out, tail=tail)
        return recalled[0], out

    def attention(self, recalled: Tensor) -> Tensor:
        """The definition in float64, from keys that no cache has seen."""
        last = (LENGTH - 1) // BLOCK
        outputs = []
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            fixed = [*range(SCOPE.global_blocks)], [*range(last - SCOPE.local_blocks + 1, last + 1)]
            blocks = torch.tensor(fixed[0] + recalled[kv_head].tolist() + fixed[1])
            tokens = (blocks[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
            places = torch.arange(len(tokens))[tokens < LENGTH]
            tokens = tokens[tokens < LENGTH]
            key, value = (x.double().cpu()[tokens, kv_head] for x in (self.key, self.value))
            query = self.query.double().cpu()[:, head]
            own = places[-len(query) :]
            query, key = self._rotate(query, own), self._rotate(key, places)
            logits = (query @ key.T * self.scale).masked_fill(places > own[:, None], -torch.inf)
            outputs.append(logits.softmax(-1) @ value)
        return torch.stack(outputs, 1)

    def _rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.rope.rotate(x[:, None], positions)[:, 0]
