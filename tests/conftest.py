"""One process with vLLM, and one folder of models, for all tests."""

import pytest

from tests import engines


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def engine():
    """Calls a function of tests.engines in the process that holds vLLM."""
    with engines.workers() as pool:
        yield lambda function, *args, **options: pool.submit(function, *args, **options).result(300)
