"""One process with vLLM, and one folder of models, for all tests."""

import os

import pytest
import torch

# Without a GPU kernels run in Triton's interpreter, which asks when triton is first imported: by
# vLLM, it may be, and so before any test module.
if not torch.cuda.is_available() and "OFFLINE" not in os.environ:
    os.environ["TRITON_INTERPRET"] = "1"

from tests import engines


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def engine():
    """Calls a function of tests.engines in the process that holds vLLM."""
    with engines.workers() as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(300)


def pytest_collection_modifyitems(items):
    """With --dist loadgroup a file's tests share an engine; those that compile go wherever."""
    for item in items:
        if item.path.stem != "test_compile":
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
