"""A server under requests that it should not get, and too many that it should.

    python -m benchmarks.faults            under a minute on a CPU

Starts vLLM's server on our tiny model with a small KV cache, asks a few questions one by one, and
asks them again while something goes wrong beside them. A fault is survived if every question got
the answer it got alone, nothing took longer than SECONDS, and the KV cache is empty afterwards.
Last, a worker is killed in the middle of a request: the server must end by itself. The exit status
tells whether all were survived.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from benchmarks import harness
from benchmarks.server import SERVED_NAME, Server, serve, total

MODEL = Path(__file__).parents[1] / "tests" / "tiny-needle"
COLUMNS = [
    "fault", "requests", "answered", "refused", "cut", "questions", "same", "seconds",
    "preemptions", "kv_usage_after", "survived", "gpu", "torch", "triton", "vllm", "commit",
]  # fmt: skip
MAX_LEN = 4096
BLOCKS = 200  # of 32 tokens: one request of MAX_LEN and a half
SECONDS = 100  # nothing takes longer
VOCABULARY = 2048
RANDOM = random.Random(0)


def tokens(length: int) -> list[int]:
    return [RANDOM.randrange(3, VOCABULARY) for _ in range(length)]


# Within the dense limit: there an answer depends neither on how a prompt is cut nor on preemption
QUESTIONS = [tokens(length) for length in (40, 200, 350, 440)]


class Load:
    """Requests beside the questions, and what became of them."""

    def __init__(self, server: Server):
        self.server = server
        self.outcomes: list[str] = []

    def send(self, prompt, max_tokens: int = 16, **rest) -> None:
        """Waits for the answer; a refusal counts as one, silence as neither."""
        try:
            self.server.complete(prompt, max_tokens, SECONDS, **rest)
            self.outcomes.append("answered")
        except urllib.error.HTTPError as error:
            self.outcomes.append("refused" if 400 <= error.code < 500 else f"error {error.code}")

    def hang_up(self, prompt, max_tokens: int = 400, after: float = 0.3) -> None:
        """Closes the connection while the answer is being made."""
        self.server.hang_up(prompt, max_tokens, after, seconds=SECONDS)
        self.outcomes.append("cut")


def mixed(load: Load) -> list[Callable[[], None]]:
    """Short and long prompts at once, some of which are given up."""
    jobs = []
    for index in range(16):
        length = 100 if index % 4 else 2500
        if index % 3 == 2:
            jobs.append(lambda n=length: load.hang_up(tokens(n), after=RANDOM.uniform(0.1, 2)))
        else:
            jobs.append(lambda n=length: load.send(tokens(n)))
    return jobs


def disconnects(load: Load) -> list[Callable[[], None]]:
    """Clients that leave at once, in the middle of a prompt or of an answer."""
    return [
        lambda after=after, n=n: load.hang_up(tokens(n), after=after)
        for n in (100, 3000)
        for after in (0.0, 0.2, 1.0)
    ]


def exhausted(load: Load) -> list[Callable[[], None]]:
    """Answers that outgrow the KV cache together: some are preempted and computed again."""
    return [lambda: load.send(tokens(900), max_tokens=400) for _ in range(6)]


def hostile(load: Load) -> list[Callable[[], None]]:
    """What no client should send; each is refused or answered."""
    prompts = [[], "", tokens(MAX_LEN + 1), [VOCABULARY * 10**3], [-1], [2**40], None, [[]]]
    jobs = [lambda prompt=prompt: load.send(prompt) for prompt in prompts]
    many = [f"stop {index}" for index in range(10_000)]
    jobs.append(lambda: load.send(tokens(50), stop=many))
    jobs.append(lambda: load.send(tokens(50), max_tokens=10**9))
    jobs.append(lambda: load.send(tokens(50), n=10**6))
    return jobs


FAULTS = {f.__name__: f for f in (mixed, disconnects, exhausted, hostile)}


def ask(server: Server, pool: ThreadPoolExecutor) -> list[str]:
    """The answers to the questions."""
    return [choice["text"] for choice in pool.map(server.complete, QUESTIONS)]


def try_fault(server: Server, name: str, alone: list[str]) -> dict:
    load, before = Load(server), total(server.metrics(), "num_preemptions_total")
    jobs = FAULTS[name](load)
    start = time.monotonic()
    with ThreadPoolExecutor(len(jobs) + len(QUESTIONS)) as pool:
        beside = [pool.submit(job) for job in jobs]
        time.sleep(0.2)
        answers = ask(server, pool)
        for job in beside:
            job.result()
    seconds = time.monotonic() - start
    usage = server.settle(SECONDS)
    samples = server.metrics()
    row = {
        "fault": name,
        "requests": len(jobs),
        "questions": len(QUESTIONS),
        "same": sum(a == b for a, b in zip(answers, alone, strict=True)),
        "seconds": round(seconds, 1),
        "preemptions": int(total(samples, "num_preemptions_total") - before),
        "kv_usage_after": usage,
    }
    row |= {kind: load.outcomes.count(kind) for kind in ("answered", "refused", "cut")}
    told = row["answered"] + row["refused"] + row["cut"] == len(jobs)  # else: the server failed
    told &= name != "exhausted" or row["preemptions"] > 0
    row["survived"] = told and answers == alone and usage == 0 and seconds < SECONDS
    return row


def kill_worker(server: Server) -> dict:
    """The process that holds the model ends in the middle of a request."""
    failures = []

    def ask() -> None:
        try:
            server.complete(tokens(3000), 900, SECONDS)
        except OSError as error:
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(1)
    start = time.monotonic()
    os.kill(worker(server), signal.SIGKILL)
    asking.join(SECONDS)
    with suppress(subprocess.TimeoutExpired):
        server.process.wait(SECONDS)
    ended = server.process.poll() is not None and "EngineDeadError" in server.written()
    return {
        "fault": "worker killed",
        "requests": 1,
        "refused": len(failures),
        "seconds": round(time.monotonic() - start, 1),
        "survived": len(failures) == 1 and ended,
    }


def worker(server: Server) -> int:
    """The youngest of the server's processes that vLLM named."""
    started = server.processes()
    return [pid for pid in started if b"VLLM::" in Path(f"/proc/{pid}/cmdline").read_bytes()][-1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("faults", nargs="*", default=[*FAULTS, "kill"], help=" ".join(FAULTS))
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "faults.csv")
    options = parser.parse_args()

    import torch

    stamp, rows = harness.stamp(), []
    arguments = f"--model {MODEL} --served-model-name {SERVED_NAME} --attention-backend reattention"
    arguments += f" --max-model-len {MAX_LEN} --num-gpu-blocks-override {BLOCKS} --max-num-seqs 8"
    arguments += " --max-num-batched-tokens 512 --no-enable-prefix-caching --dtype "
    on_gpu = torch.cuda.is_available()
    arguments += "bfloat16 --gpu-memory-utilization 0.3" if on_gpu else "float32"
    with serve(arguments.split(), on_gpu) as server:
        with ThreadPoolExecutor(1) as one_by_one:
            alone = ask(server, one_by_one)
        for name in options.faults:
            row = kill_worker(server) if name == "kill" else try_fault(server, name, alone)
            print(row, flush=True)
            rows.append(row | stamp)
    harness.append(options.out, COLUMNS, rows)
    return 0 if all(row["survived"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
