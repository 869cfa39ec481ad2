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
from http.client import HTTPConnection
from pathlib import Path
from typing import IO, NamedTuple

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

START_SECONDS, ANSWER_SECONDS, STOP_SECONDS = 600, 1200, 30
SERVED_NAME = "served"  # the model's, where requests are made here

# One thread: the reference works on small tensors, and threads that share a core with others
# wait for each other far longer than they work.
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
}
JSON = {"Content-Type": "application/json"}
LOCAL = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Server(NamedTuple):
    process: subprocess.Popen
    url: str
    log: IO[str]

    def post(self, path: str, body: dict) -> dict:
        asked = urllib.request.Request(self.url + path, json.dumps(body).encode(), JSON)
        try:
            with LOCAL.open(asked, timeout=ANSWER_SECONDS) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise SystemExit(f"the server refused: {error.read().decode()}") from None
        except OSError as error:
            raise SystemExit(f"{error}\n{self.written()[-4000:]}") from None

    def complete(self, prompt, max_tokens: int = 16, seconds: float = 100, **rest) -> dict:
        """The greedy answer of so many tokens, as vLLM's API tells it; or urllib's error."""
        body = json.dumps(request(prompt, max_tokens, **rest)).encode()
        asked = urllib.request.Request(self.url + "/v1/completions", body, JSON)
        with LOCAL.open(asked, timeout=seconds) as answer:
            return json.load(answer)["choices"][0]

    def hang_up(
        self, prompt, max_tokens: int, after: float = 0, told: int = 0, seconds: float = 100
    ) -> None:
        """Asks, and closes the connection: after some time, or once so many tokens have come."""
        connection = HTTPConnection(self.url.removeprefix("http://"), timeout=seconds)
        body = json.dumps(request(prompt, max_tokens, stream=True))
        connection.request("POST", "/v1/completions", body, JSON)
        if told:
            with connection.getresponse() as answer:
                if answer.status != 200:
                    raise OSError(f"status {answer.status}: {answer.read().decode()}")
                while told:
                    line = answer.readline()
                    if not line:
                        raise OSError("the answer ended too early")
                    told -= line.startswith(b"data: {")
        time.sleep(after)
        connection.close()

    def settle(self, seconds: float) -> float:
        """Share of the KV cache that stays in use once nobody asks any more."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            samples = self.metrics()
            usage = total(samples, "kv_cache_usage_perc")
            if not usage and not total(samples, "num_requests_running"):
                break
            time.sleep(0.2)
        return usage

    def processes(self) -> list[int]:
        """Its own and those that it started, the youngest last."""
        found = parents = [self.process.pid]
        while parents:
            children = []
            for parent in parents:
                with suppress(OSError):  # it has ended
                    for task in Path(f"/proc/{parent}/task").iterdir():
                        children += [int(pid) for pid in (task / "children").read_text().split()]
            parents = children
            found = found + children
        return found

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


def request(prompt, max_tokens: int, **rest) -> dict:
    body = dict(model=SERVED_NAME, prompt=prompt, max_tokens=max_tokens, temperature=0)
    return body | dict(ignore_eos=True) | rest


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
def serve(arguments: list[str], on_gpu: bool, eager: bool = True) -> Iterator[Server]:
    """A server that answers; it and its processes are gone afterwards, whatever happens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # This module is what `vllm serve` runs. That command itself asks for the version of a
    # distribution called vllm, and does not start where vllm-cpu is installed instead.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--host", "127.0.0.1", "--port", str(port), *arguments]
    if eager:  # which starts sooner
        command.append("--enforce-eager")
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
