"""One process with vLLM, and one folder of models, for all tests."""

import os

# Before torch is imported: threads of several processes would wait for each other's cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU kernels run in Triton's interpreter, which asks when triton is first imported: by
# vLLM, it may be, and so before any test module.
if not torch.cuda.is_available() and "OFFLINE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

from tests import engines

PROGRAMS = 24  # for each kernel to aim at, where they are interpreted


@pytest.fixture(scope="session", autouse=True)
def few_programs():
    """The interpreter runs them one by one: so many that work is split, not to fill a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ.get("TRITON_INTERPRET") == "1":
            from csrc_triton import attend, score

            for module, name in (
                (attend, "_single_sizes"),
                (score, "_tile_sizes"),
                (score, "_share_sizes"),
            ):
                sizes = getattr(module, name)
                patch.setattr(module, name, lambda *of, sizes=sizes: (*sizes(*of)[:-1], PROGRAMS))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def engine():
    """Calls a function of tests.engines in the process that holds vLLM."""
    with engines.workers() as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(300)


def pytest_collection_modifyitems(items):
    """With --dist loadgroup a file's tests share an engine; those that need none go wherever."""
    for item in items:
        if item.path.stem not in ("test_compile", "test_kernels"):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
