"""vLLM's OpenAI-compatible server as a process, on a free port of this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import IO, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 600, 1200, 30

# One thread: the reference works on small tensors, and threads that share a core with others
# wait for each other far longer than they work.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server(NamedTuple):
    process: subprocess.Popen
    url: str
    log: IO[str]

    def post(self, path: str, body: dict) -> dict:
        data, headers = json.dumps(body).encode(), {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with LOCAL.open(request, timeout=ANSWER_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"the server refused: {error.read().decode()}") from None
        except OSError as error:
            raise SystemExit(f"{error}\n{self.written()[-4000:]}") from None

    def metrics(self) -> list[Sample]:
        with LOCAL.open(f"{self.url}/metrics", timeout=ANSWER_SECONDS) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        return [sample for family in families for sample in family.samples]

    def is_ready(self) -> bool:
        try:
            with LOCAL.open(f"{self.url}/health", timeout=5):
                return True
        except OSError:
            return False

    def written(self) -> str:
        self.log.seek(0)
        return self.log.read()


def total(samples: list[Sample], name: str, **labels: str) -> float:
    """Of a metric of vLLM's over all series that have these labels; without any: an error."""
    values = [
        sample.value
        for sample in samples
        if sample.name == f"vllm:{name}" and labels.items() <= sample.labels.items()
    ]
    if not values:
        raise KeyError(f"no {name} with {labels}")
    return sum(values)


@contextmanager
def serve(arguments: list[str], on_gpu: bool) -> Iterator[Server]:
    """A server that answers; it and its processes are gone afterwards, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # This module is what `vllm serve` runs. That command itself asks for the version of a
    # distribution called vllm, and does not start where vllm-cpu is installed instead.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce-eager"]
    command += arguments
    environment = os.environ | {"HF_HUB_OFFLINE": "1"} | ({} if on_gpu else CPU_ENVIRONMENT)
    environment.pop("TRITON_INTERPRET", None)  # of the tests of kernels
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            wait(server)
            yield server
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
            with suppress(ProcessLookupError):  # what is left of the session that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait(server: Server) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not server.is_ready():
        if server.process.poll() is not None:
            raise SystemExit(f"the server did not start:\n{server.written()[-4000:]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"no server after {START_SECONDS} s:\n{server.written()[-4000:]}")
        time.sleep(0.5)
