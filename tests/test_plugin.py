"""What a guest must not do, and its numbers. Needs no vLLM."""

import ast
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from zipfile import ZipFile

import pytest
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import vllm_reattention
from csrc_triton import reference
from csrc_triton.layout import Scope, rotation_table
from tests import engines
from tests.cases import Case
from vllm_reattention.config import ReAttentionConfig, described
from vllm_reattention.pages import bytes_per_token, pages_of
from vllm_reattention.rope import Refused, Rope, read_table
from vllm_reattention.tiles import (
    DecodeTiles,
    dense_prompts,
    ends_here,
    most_prefill_tiles,
    prefill_tiles,
    split_tail,
)

ROOT = Path(__file__).parent.parent
# Each module may import only those before it.
ORDER = [
    *("config", "times", "metrics", "mass", "attention", "memory", "warm_up"),
    *("pages", "tiles", "compat"),
    *("rope", "proof", "metadata", "backend", "layers", "plan", "doctor", "__main__"),
]
MAY_IMPORT_VLLM = {"compat", "metadata", "backend"}


def imports(path: Path) -> set[str]:
    """Every module a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imports(path)}


def python(*arguments: str | Path, cwd: Path = ROOT) -> str:
    """What Python prints, given code with -c or a module with -m."""
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_is_free():
    heavy = "import sys, vllm_reattention; print({'torch', 'vllm', 'triton'} & set(sys.modules))"
    assert python("-c", heavy) == "set()"


def test_registering_twice_is_harmless():
    python("-c", "import vllm_reattention as v; v.register(); v.register()")


def test_registering_without_vllm_is_harmless():
    python(
        "-c", "import sys; sys.modules['vllm'] = None; import vllm_reattention as v; v.register()"
    )


@pytest.mark.parametrize("path", sorted((ROOT / "csrc_triton").glob("*.py")), ids=lambda p: p.stem)
def test_kernels_know_neither_vllm_nor_us(path):
    assert not packages(path) & {"vllm", "vllm_reattention"}
    if path.stem.startswith("reference"):
        assert "triton" not in packages(path)
    else:
        assert not any(name.startswith("csrc_triton.reference") for name in imports(path))


@pytest.mark.parametrize("name", ORDER)
def test_arrows_point_down(name):
    path = ROOT / "vllm_reattention" / f"{name}.py"
    later = ORDER[ORDER.index(name) :]
    assert not imports(path) & {f"vllm_reattention.{module}" for module in later}
    assert "vllm" not in packages(path) or name in MAY_IMPORT_VLLM


def test_every_module_has_its_place():
    modules = {path.stem for path in (ROOT / "vllm_reattention").glob("*.py")}
    assert modules == {"__init__", *ORDER}


PIP = "-m", "pip", "--disable-pip-version-check", "--quiet"
OFFLINE = "--no-index", "--no-deps", "--no-build-isolation"


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> dict[str, Path]:
    """Wheel and sdist of these sources, the wheel of that sdist, and the wheel installed."""
    folder = tmp_path_factory.mktemp("built")
    tree, installed = folder / "tree", folder / "installed"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info"))
    make_sdist = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    python("-c", make_sdist, cwd=tree)
    (sdist,) = folder.glob("*.tar.gz")
    wheels = []
    for name, source in ("from tree", tree), ("from sdist", sdist):
        python(*PIP, "wheel", *OFFLINE, "--wheel-dir", folder / name, source)
        wheels += (folder / name).iterdir()
    python(*PIP, "install", *OFFLINE, "--target", installed, wheels[0])
    return dict(wheel=wheels[0], sdist=sdist, rebuilt=wheels[1], installed=installed)


def test_a_wheel_holds_the_two_packages_and_nothing_else(built):
    with ZipFile(built["wheel"]) as wheel:
        names = set(wheel.namelist())
    about = f"vllm_reattention-{vllm_reattention.__version__}.dist-info/"
    sources = [
        path for name in ("vllm_reattention", "csrc_triton") for path in (ROOT / name).glob("*.py")
    ]
    expected = {f"{path.parent.name}/{path.name}" for path in sources}
    assert {name for name in names if not name.startswith(about)} == expected
    assert about + "licenses/LICENSE" in names


def test_an_sdist_builds_the_same_wheel(built):
    def files(path: Path) -> dict[str, bytes]:
        with ZipFile(path) as wheel:
            return {name: wheel.read(name) for name in wheel.namelist()}

    with tarfile.open(built["sdist"]) as sdist:
        folders = {Path(name).parts[1] for name in sdist.getnames() if "/" in name}
    assert folders >= {"setup.py", "README.md"} and not folders & {"tests", "benchmarks"}
    assert built["wheel"].name == built["rebuilt"].name
    assert files(built["wheel"]) == files(built["rebuilt"])


def test_an_installed_wheel_is_what_vllm_looks_for(built):
    (found,) = distributions(path=[str(built["installed"])])
    assert found.metadata["Name"] == "vllm-reattention"
    assert found.version == vllm_reattention.__version__
    (entry,) = found.entry_points.select(group="vllm.general_plugins")
    assert (entry.name, entry.value) == ("reattention", "vllm_reattention:register")
    needed = [Requirement(line) for line in found.requires]
    ranges = [need.specifier for need in needed if need.name.startswith("vllm")]
    assert ranges == 2 * [SpecifierSet(vllm_reattention.VLLM_RANGE)]  # for CUDA, for a CPU


@pytest.mark.parametrize(
    "missing, modules",
    [
        ("vllm triton", "vllm_reattention csrc_triton.reference vllm_reattention.plan"),
        ("vllm", "csrc_triton.kernels"),
    ],
    ids=["without triton", "kernels"],
)
def test_an_installed_wheel_imports(missing, modules, built, tmp_path):
    code = f"""if True:
        import importlib, sys
        sys.path.insert(0, {str(built["installed"])!r})
        sys.modules.update(dict.fromkeys({missing.split()}))
        for name in {modules.split()}:
            print(importlib.import_module(name).__file__)
        import vllm_reattention
        vllm_reattention.register()
    """
    for path in python("-I", "-c", code, cwd=tmp_path).splitlines():
        assert Path(path).is_relative_to(built["installed"])


def test_changelog_opens_with_this_version_and_its_vllm():
    text = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    assert text.startswith(vllm_reattention.__version__)
    assert f"vllm{vllm_reattention.VLLM_RANGE}" in text


def test_defaults():
    scope = ReAttentionConfig().resolve(trained_window=131072, block_size=32, num_layers=32)
    assert scope == Scope(1, 191, 64, 256, 573, 447, 96, 111, 16, 0.8, 256, per_layer=True)
    assert [scope.of(length).candidate_blocks for length in (1, 2, 32)] == [447, 333, 333]
    scope = ReAttentionConfig().resolve(trained_window=8192, block_size=32, num_layers=30)
    assert scope == Scope(1, 47, 16, 64, 141, 447, 24, 27, 4, 0.8, 64, per_layer=True)
    scope = ReAttentionConfig().resolve(trained_window=512, block_size=32)
    assert scope.of(32) == scope.of_tail
    assert described(scope, 32) == (
        "512 tokens: 32 global, 352 recalled, 128 local; 192 recalled in decode"
    )
    config = ReAttentionConfig(local_size=64, recall_size=3968)
    scope = config.resolve(trained_window=8192, block_size=32)
    assert scope.read_local == 2
    assert described(scope, 32) == (
        "4,064 tokens: 32 global, 3,968 recalled, 64 local; 1,984 recalled in decode; "
        "1,920 recalled and 64 local before a prompt's end"
    )


def test_nothing_is_remembered_where_nothing_can_be():
    scopes = [ReAttentionConfig(scorer=s).resolve(512, 32, 32) for s in ("refined", "summary")]
    scopes += [ReAttentionConfig(memory=0).resolve(512, 32, 32)]
    scopes += [ReAttentionConfig().resolve(512, 32, 32, speculates=True)]
    scopes += [ReAttentionConfig().resolve(512, 32, 13)]  # every layer selects
    scopes += [ReAttentionConfig(select_every=1).resolve(512, 32, 32)]
    assert [scope.memory for scope in scopes] == [0] * 6
    assert ReAttentionConfig(select_every=2).resolve(512, 32, 2).memory == 0.8
    assert ReAttentionConfig(memory=0.5).resolve(512, 32, 2).memory == 0.5


@pytest.mark.parametrize("window", [64, 96, 500, 512, 4096, 8192, 10_000])
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_defaults_fit_any_window(window, block_size):
    if window < 2 * block_size:
        return
    scope = ReAttentionConfig().resolve(window, block_size)
    assert scope.blocks == scope.dense_blocks == scope.exact_blocks <= window // block_size


def test_a_fourth_of_the_layers_selects_but_seven_at_least():
    default, alone = ReAttentionConfig(), ReAttentionConfig(scorer="refined")
    told = {2: 1, 4: 1, 13: 1, 14: 2, 24: 3, 28: 4, 32: 4, 80: 4}
    assert {n: default.layers_per_selection(n) for n in told} == told
    assert {alone.layers_per_selection(n) for n in told} == {1}
    assert ReAttentionConfig(select_every=2).layers_per_selection(4) == 2


@pytest.mark.parametrize(
    "windows, first, selecting",
    [
        ([0] * 9, 0, [0, 4, 8]),
        ([0] * 6, 8, [8, 12]),  # the second stage of a pipeline
        ([0] * 6, 10, [10, 12]),  # one that cuts a group
        ([99, 0] * 6, 0, [1, 5, 9]),
        ([99, 99, 99, 99, 99, 0] * 3, 0, [5, 11, 17]),  # too far apart to share
    ],
)
def test_layers_without_a_window_share_selections(windows, first, selecting):
    pytest.importorskip("vllm")
    from vllm_reattention.metadata import _share_selections

    impls = {
        f"model.layers.{index}.self_attn.attn": SimpleNamespace(
            window=window, selects=True, selects_last=False, is_last=False
        )
        for index, window in enumerate(windows, first)
    }
    assert _share_selections(impls, range(0, 100, 4)) == len(selecting)
    (last,) = (name for name, impl in impls.items() if impl.selects_last)
    assert last == f"model.layers.{selecting[-1]}.self_attn.attn"
    full = [name for name, impl in impls.items() if not impl.window]
    assert [name for name, impl in impls.items() if impl.is_last] == full[-1:]
    assert selecting == [
        first + place
        for place, impl in enumerate(impls.values())
        if impl.selects and not impl.window
    ]


TURNED = dict(head_size=80, rotary_dim=32, interleaved=True, query_scale=1.4)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("turned", [{}, TURNED], ids=["whole", "partial"])
def test_parts_of_prompts_are_read_from_their_pages(turned, window, fp8):
    """And attended to as the reference does it, by what stands in for FlashAttention."""
    pytest.importorskip("vllm")
    from vllm_reattention.backend import ReAttentionImpl

    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scope = Scope(0, 0, 0, 0, window=window) if window else Scope(1, 4, 3, 40)
    case = Case(contexts=(100, 40, 70), queries=(30, 40, 7), scope=scope, **turned)
    inputs = case.build(dtype, device, torch.float8_e4m3fn if fp8 else None)
    if fp8:
        inputs.pages = inputs.pages._replace(key_scale=0.5, value_scale=2.0)
    inputs.write(reference.write_kv)
    nothing = torch.full((len(inputs.tiles.row), 1, 4), -1, dtype=torch.int32, device=device)
    expected = inputs.attend(reference.attend, nothing)

    starts, lengths = (
        torch.tensor(told, dtype=torch.int32) for told in ((0, 30, 70, 77), case.contexts)
    )
    on_device = starts.to(device), starts, lengths.to(device), lengths
    limits = torch.full_like(lengths, 640)
    prompts = dense_prompts(*on_device, 0, limits, inputs.block_table, case.block_size, 300)
    impl = SimpleNamespace(
        rotary=inputs.rotary, scale=inputs.scale, window=window, soft_cap=0.0, sinks=None,
        flash_attention=engines.flash_attention(),
    )  # fmt: skip
    out = torch.full_like(inputs.query, torch.nan)
    given = inputs.query, None, None, inputs.pages, prompts, out
    ReAttentionImpl._attend_dense(impl, *given)
    precise = 1e-5 if device == "cpu" else 4e-3
    torch.testing.assert_close(out, expected, rtol=precise, atol=precise, equal_nan=True)


@pytest.mark.parametrize(
    "different",
    [
        {},
        dict(window=64),
        dict(num_heads=8),
        dict(soft_cap=30.0),
        dict(rotary=object()),
        dict(key_bias=object()),
    ],
)
def test_layers_that_are_alike_warm_up_once_a_run(different, monkeypatch):
    pytest.importorskip("vllm")
    from vllm_reattention import backend

    alike = dict(
        num_heads=4, num_kv_heads=2, head_size=32, soft_cap=0.0, sinks=None, scale=1.0, window=0,
        flash_attention=None, key_bias=None, num_positions=768, max_model_len=2048,
        kv_cache_dtype="auto", rotary=object(), cache_config=SimpleNamespace(block_size=32),
        most_singles=4, most_requests=4,
        scope_of=lambda size: ReAttentionConfig().resolve(512, size),
    )  # fmt: skip
    layers, done = {"mamba": SimpleNamespace()}, []
    for index, changed in enumerate(({}, {}, different, {}, different)):
        impl = object.__new__(backend.ReAttentionImpl)
        vars(impl).update(alike | changed, layers=layers)
        layers[f"layers.{index}"] = SimpleNamespace(impl=impl)

    monkeypatch.setattr(backend, "warm_up", lambda *given: done.append((len(given[0]), index)))
    for rows in (8, 64, 64):  # vLLM may run more than once, and measure anew each time
        query = torch.empty(rows, 4, 32, device="meta")
        for index in range(5):
            layers[f"layers.{index}"].impl._warm_up(query, query)
    kinds = (0, 2) if different else (0,)
    assert done == [(rows, first) for rows in (8, 64, 64) for first in kinds]


@pytest.mark.parametrize("num_pages, runs", [(0, 1), (3, 0)])
def test_only_the_profile_run_warms_up(num_pages, runs, monkeypatch):
    """Steps of an idle data-parallel rank have no metadata either, but pages."""
    pytest.importorskip("vllm")
    from vllm_reattention import backend

    done = []
    impl = object.__new__(backend.ReAttentionImpl)
    monkeypatch.setattr(backend.ReAttentionImpl, "_warm_up", lambda *given: done.append(given))
    row = torch.ones(1, 4, 32)
    output = impl.forward(None, row, row, row, torch.empty(num_pages, 8), None, torch.empty(1, 4))
    assert len(done) == runs and not output.any()


def test_recalling_nothing():
    config = ReAttentionConfig(recall_size=0, local_size=480, scorer="summary")
    scope = Scope(1, 0, 15, 16, single_recall=0, read_recall=0, read_local=15, exact_blocks=16)
    assert config.resolve(512, 32) == scope
    config = ReAttentionConfig(recall_size=0, local_size=8160)
    assert config.resolve(32768, 32).of(32).local_blocks == 255


@pytest.mark.parametrize(
    "numbers, message",
    [
        (dict(topk=4), "must be among global_size, local_size"),
        ([1], "must be a dictionary"),
        (dict(local_size=100), "local_size must be a positive multiple of the block size 32"),
        (dict(local_size=0), "set local_size=32"),
        (dict(local_size="64"), "local_size must be a whole number"),
        (dict(recall_size=-32), "recall_size must be a multiple of the block size 32"),
        (
            dict(decode_recall_size=64, recall_size=32),
            "at most recall_size, 32, .* got 64; set .*=32",
        ),
        (dict(decode_recall_size=0), "0 only with it, got 0; set decode_recall_size=32"),
        (dict(read_recall_size=0), "0 only with it, got 0; set read_recall_size=32"),
        (dict(read_local_size=9999968), "at most local_size, .*; set read_local_size=1"),
        (dict(local_size=8192), "must fit in the trained window of 512 tokens, got 32 + 0 + 8192"),
        (dict(dense_limit=1024), "dense_limit must lie between"),
        (dict(dense_limit=128), "dense_limit must lie between"),
        (dict(scorer="best"), "scorer must be one of"),
        (dict(select_every=0), "select_every must be a number of layers from 1 on"),
        (dict(scorer="refined", select_every=2), "select_every must be 1 with the scorer"),
        (dict(select_layers=[]), "select_layers must be a list of layers by number from 0 on"),
        (dict(select_layers=[0, True]), "select_layers must be a list of layers"),
        (dict(select_layers="0 4"), "select_layers must be a list of layers"),
        (dict(select_layers=[0], select_every=2), "select_layers must be without select_every"),
        (dict(select_layers=[0], scorer="summary"), 'must be with the scorer "layer"'),
        (dict(select_layers=[3]), "must be among the model's layers 0 to 0, got 3"),
        (dict(select_layers=[3], memory=0), "must be among the model's layers 0 to 0, got 3"),
        (dict(memory=1), "memory must be a number from 0 to below 1, got 1"),
        (dict(memory=True), "memory must be a number from 0 to below 1, got True"),
        (dict(scorer="summary", memory=0.5), "memory must be 0 with the scorer 'summary'"),
    ],
)
def test_bad_numbers_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message.replace("+", r"\+")) as error:
        ReAttentionConfig.read({"reattention": numbers}).resolve(512, 32)
    assert "\n" not in str(error.value)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def default_dtype(request):
    """While vLLM loads a model, that of new tensors is the model's."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e8])
def test_frequencies_are_read_exactly(theta):
    exponents = torch.arange(0, 128, 2, dtype=torch.float32) / 128
    frequencies = theta**-exponents
    angles = torch.arange(131072, dtype=torch.float32)[:, None] * frequencies  # as models do
    rope = read_table(lambda p: (1.3 * angles[p].cos(), 1.3 * angles[p].sin()), len(angles))
    error = (rope.radians / frequencies - 1).abs().max()
    assert error < 2.0**-23 and abs(rope.magnitude - 1.3) < 1e-6


def test_other_tables_are_refused():
    def table(positions):
        angles = positions[:, None] ** 1.01 * torch.ones(8)
        return angles.cos(), angles.sin()

    with pytest.raises(Refused, match="position \\* frequency"):
        read_table(table, 512)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotating_composes(interleaved):
    rope = Rope(torch.rand(8, dtype=torch.float64), interleaved=interleaved)
    x, at = torch.randn(5, 3, 20), torch.arange(5)
    twice = rope.rotate(rope.rotate(x, at), at + 2)
    assert torch.allclose(twice, rope.rotate(x, 2 * at + 2), atol=1e-5)
    assert torch.equal(rope.rotary(9, x.device).cos_sin, rotation_table(rope.radians, 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("head_size", [32, 80, 128])
@pytest.mark.parametrize("layers", [1, 3])
def test_pages_share_nothing_and_fit(dtype, head_size, layers):
    content = bytes_per_token(head_size, dtype.itemsize, 32) // dtype.itemsize
    cache = torch.zeros(4, layers, 2, 32, content, dtype=dtype)[:, -1]
    pages = pages_of(cache, head_size, torch.bfloat16, (0.5, 2.0))
    for plane in pages[:3]:
        plane.copy_(plane.float() + 1)  # twice where planes overlap
    assert all((plane.float() == 1).all() for plane in pages[:3])
    assert pages.summary.dtype == (torch.bfloat16 if dtype == torch.uint8 else dtype)
    assert (pages.key_scale == 0.5) == (dtype == torch.uint8)


def test_keys_lose_a_bias_that_is_known(caplog):
    pytest.importorskip("vllm")
    from vllm_reattention.backend import ReAttentionImpl

    impl = object.__new__(ReAttentionImpl)
    impl.key_bias, impl.rotary = None, Rope(torch.rand(8, dtype=torch.float64)).rotary(200, "cpu")
    impl.soft_cap = 30.0
    layer = torch.nn.Module()
    layer.layer_name, layer._k_scale_float = "layers.0.attn", 0.5
    bias = torch.randn(2, 16) * 1000
    with caplog.at_level("WARNING", logger="vllm.reattention"):
        impl._take_off(bias / torch.zeros(2, 16), layer)
        impl._take_off(bias, layer)
    assert "layers.0.attn makes no finite keys" in caplog.text and impl.key_bias is None
    assert "layers.0.attn caps its logits" in caplog.text
    impl.soft_cap = 0.0
    impl._take_off(bias, layer)
    at = torch.arange(100)
    turned = reference.rotate_rows(bias.expand(100, -1, -1), at, impl.rotary).transpose(0, 1)
    assert torch.allclose(impl.key_bias[:, :100].float() * 0.5, turned, rtol=1e-3, atol=0.1)
    assert dict(layer.named_buffers())["key_bias"] is impl.key_bias
    impl._take_off(bias * 1000, layer)
    assert impl.key_bias.isfinite().all()


def requests(*context_and_new: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """query_start_loc and seq_lens of requests."""
    new = torch.tensor([0, *(new for _, new in context_and_new)], dtype=torch.int32)
    lengths = torch.tensor([sum(pair) for pair in context_and_new], dtype=torch.int32)
    return new.cumsum(0, dtype=torch.int32), lengths


def rows(tiles) -> list[tuple[int, int, int]]:
    """(row, request, position) of every query of every tile."""
    found = []
    for request, row, length, position in zip(*(t.tolist() for t in tiles[:4]), strict=True):
        assert length <= tiles.max_length
        found += [(row + i, request, position + i) for i in range(length)]
    return found


def test_prefill_tiles_cover_each_query_once():
    batch = (64, 1), (0, 100), (31, 2), (32, 32), (1000, 33), (5, 20)
    starts, lengths = requests(*batch)
    tiles = prefill_tiles(starts, starts, lengths, 1, block_size=32, dense=8)
    expected = [
        (int(starts[i]) + t, i, context + t)
        for i, (context, new) in enumerate(batch)
        if i
        for t in range(new)
    ]
    assert rows(tiles) == expected
    last = tiles.position + tiles.length - 1
    used = tiles.length > 0
    assert torch.equal((tiles.position // 32)[used], (last // 32)[used])


@pytest.mark.parametrize("news", [[1] * 9, [2] * 9, [8] * 9, [33] * 9, [4000, 1, 2], [64]])
def test_the_profile_run_tries_as_many_tiles_as_a_step_can_have(news):
    starts, lengths = requests(*((31, new) for new in news))
    made = len(prefill_tiles(starts, starts, lengths, 0, block_size=32, dense=8).row)
    assert made <= most_prefill_tiles(sum(news), len(news), 32) <= sum(news)


@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_a_tail_is_where_a_prompt_ends_wherever_steps_cut_it(block_size):
    """At least its last 97 tokens, as whole blocks, or what of these there is; none behind it."""
    prompts = [1000, 1024, 1025, 40, 300, 700]
    done, found = [0] * len(prompts), [[] for _ in prompts]
    for new in ([1000, 1000, 100, 40, 30, 700], [0, 24, 925, 0, 270, 50]):
        starts, lengths = requests((5, 1), *zip(done, new, strict=True))
        tiles = prefill_tiles(starts, starts, lengths, 1, block_size, 8)
        prompt_lens = torch.tensor([5, *prompts], dtype=torch.int32)
        others, tail = split_tail(tiles, 1, prompt_lens, block_size)
        assert ends_here(prompt_lens[1:], lengths[1:], block_size)
        told, rest = ([row for row in columns(x) if row[2]] for x in (tail.tiles, others))
        assert sorted(told + rest) == sorted(row for row in columns(tiles) if row[2])
        for _, request, length, position in told:
            found[request - 1] += range(position, position + length)
        done = [a + b for a, b in zip(done, new, strict=True)]
    for prompt, positions in zip(prompts, found, strict=True):
        count = {32: 4, 64: 3, 128: 2}[block_size]
        first = ((prompt - 1) // block_size + 1 - count) * block_size
        assert sorted(positions) == list(range(max(first, 0), prompt))


def test_a_tail_has_no_more_tiles_than_its_step():
    starts, lengths = requests(*[(0, 20)] * 50)
    tiles = prefill_tiles(starts, starts, lengths, 0, 32, 8)
    others, tail = split_tail(tiles, 0, lengths, 32)
    assert len(tiles.row) == len(tail.tiles.row) == 100
    assert tail.tiles.length.sum() == 50 * 20
    assert len(others.row) == 100 and not others.length.any()


def test_a_step_amid_a_prompt_has_no_tail():
    assert not ends_here(torch.tensor([4000, 0]), torch.tensor([3872, 0]), 32)
    assert ends_here(torch.tensor([4000, 0]), torch.tensor([3873, 0]), 32)


def columns(tiles) -> list[tuple[int, int, int, int]]:
    """Row, request, length and position of each."""
    request, row, length, position = (column.tolist() for column in tiles[:4])
    return list(zip(row, request, length, position, strict=True))


@pytest.mark.parametrize("most", [1, 3])
def test_decode_tiles_are_single_tokens(most):
    batch = ((9, 1), (700, 1), (31, 1)) if most == 1 else ((9, 3), (700, 1), (31, 2))
    starts, lengths = requests(*batch, (0, 0), (0, 0))  # two requests only pad the batch
    tiles = DecodeTiles(64, most, 8, starts.device).fill(starts, lengths, num_tokens=5 + most)
    expected = [
        (int(starts[i]) + t, i, context + t)
        for i, (context, new) in enumerate(batch)
        for t in range(new)
    ]
    assert rows(tiles) == expected
    assert len(tiles.row) == 5 + most


@pytest.mark.parametrize("most", [1, 3])
def test_tiles_know_what_their_request_attends_to_in_full(most):
    """Single tokens, tiles of prompts from the third request on, and those of them in a tail."""
    batch = (9, 1), (700, most), (31, 100), (640, 200)
    starts, lengths = requests(*batch)
    dense = torch.tensor([8, 16, 24, 32], dtype=torch.int32)
    singles = DecodeTiles(64, most, 8, starts.device).fill(starts[:3], lengths[:2], 1 + most, dense)
    assert singles.dense.tolist() == [8, *most * [16]]
    prompts = prefill_tiles(starts, starts, lengths, 2, 32, dense)
    rest, tail = split_tail(prompts, 2, lengths, 32)
    for tiles in (prompts, rest, tail.tiles):
        assert tiles.length.sum() > 0
        assert tiles.dense.tolist() == dense[tiles.request].tolist()
        assert tiles.part(1, 3).every(4).dense.tolist() == tiles.dense[1:3].tolist()


def test_decode_tiles_stay_where_they_are():
    """CUDA graphs replay what was captured with them."""
    decode = DecodeTiles(64, 1, 8, torch.device("cpu"))
    first = decode.fill(*requests((9, 1), (7, 1)), num_tokens=2)
    second = decode.fill(*requests((100, 1), (0, 0)), num_tokens=2)
    assert [t.data_ptr() for t in first.columns] == [t.data_ptr() for t in second.columns]
    assert rows(first) == [(0, 0, 100)]
