"""A server under load: many clients with short prompts, some with long ones, some that leave.

    python -m benchmarks.load --shape llama-3.1-8b --provider reattention FLASH_ATTN    on a GPU
    python -m benchmarks.load tests/tiny-needle --clients 8 --long 2000 --requests 24   on a CPU

Every eighth client of either kind, and one at least, leaves before its answer is complete: by turns
soon after it has asked and in the middle of the answer. The others wait, and are those of
`vllm bench serve`, a process for each kind, as it sums up all its requests together. It replays a
trace, the one of its data sets with prompts of exact lengths that needs nothing but a tokenizer.
It cannot leave a request, so the clients that do are this script's.

Beside them a few short questions are asked again and again, whose answers are known from before.
They stay within the dense limit: there an answer does not depend on how a prompt is cut. Where
rounding differs with what else is in a batch, it may pick either of two tokens that are equally
likely, and the answers are compared up to there. With the dummy weights of a shape that is nearly
everywhere: to know that answers stay what they were takes a model.

The load is survived if every request was answered or left in time, every question got the answer it
got alone, and the KV cache is empty afterwards. The exit status tells whether all of it was.
"""

import argparse
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import engines, harness, prompts
from benchmarks.server import SERVED_NAME, Server, serve, total
from benchmarks.serving import SHAPES

COLUMNS = [
    "provider", "model", "prompt_len", "output_len", "clients", "requests", "answered", "aborted",
    "failed", "ttft_p50_s", "ttft_p99_s", "tpot_p50_ms", "tpot_p99_ms", "tokens_per_s", "seconds",
    "preemptions", "kv_usage_after", "gpu_gib_peak", "host_gib_before", "host_gib_after",
    "questions", "same", "survived", "gpu", "torch", "triton", "vllm", "commit",
]  # fmt: skip
LEAVING = 8  # one client of so many leaves
QUESTION_LENGTHS = (40, 200, 350, 440)
SETTLE_SECONDS = 100
TIE = 0.25  # of log probability: bfloat16 keeps logits around 16 to the next eighth
RANDOM = random.Random(0)
# The command itself asks for the version of a distribution called vllm, as benchmarks.server tells
BENCH = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


class Kind(NamedTuple):
    """Clients with prompts of one length; each asks again once it has its answer or has left."""

    prompt_len: int
    clients: int
    requests: int

    @property
    def leaving(self) -> "Kind":
        """Those of them that leave."""
        clients = max(1, self.clients // LEAVING)
        requests = max(clients, round(self.requests * clients / self.clients))
        return Kind(self.prompt_len, clients, requests)

    @property
    def staying(self) -> "Kind":
        left = self.leaving
        return Kind(self.prompt_len, self.clients - left.clients, self.requests - left.requests)


class Answer(NamedTuple):
    tokens: list[str]
    likely: list[dict[str, float]]  # log probabilities of the likeliest at each place

    def agrees(self, other: "Answer") -> bool:
        """Up to where rounding may have picked another of two equally likely tokens."""
        for mine, theirs, likely in zip(self.tokens, other.tokens, self.likely, strict=True):
            if mine != theirs:
                return likely[mine] - likely.get(theirs, float("-inf")) < TIE
        return True


def ask(server: Server, question: list[int], seconds: float) -> Answer:
    told = server.complete(
        question, seconds=seconds, logprobs=5, return_tokens_as_token_ids=True
    )["logprobs"]  # fmt: skip
    return Answer(told["tokens"], told["top_logprobs"])


class Load(NamedTuple):
    server: Server
    folder: str  # of the model, with its tokenizer
    vocab_size: int
    output_len: int
    deadline: float

    def left(self) -> float:
        return max(1.0, self.deadline - time.monotonic())

    def tokens(self, length: int) -> list[int]:
        return RANDOM.choices(range(3, self.vocab_size), k=length)

    def stay(self, kind: Kind, begins: threading.Event) -> dict[str, Any]:
        """What `vllm bench serve` found, or nothing if it was not done in time."""
        with tempfile.TemporaryDirectory() as folder:
            trace, found = Path(folder) / "trace.jsonl", Path(folder) / "found.json"
            lengths = {"input_length": kind.prompt_len, "output_length": self.output_len}
            rows = [{"timestamp": 0, "hash_ids": [n]} | lengths for n in range(kind.requests)]
            trace.write_text("".join(json.dumps(row) + "\n" for row in rows))
            chosen = {
                "base_url": self.server.url,
                "endpoint": "/v1/completions",
                "model": self.folder,
                "served_model_name": SERVED_NAME,
                "dataset_name": "timed_trace",
                "dataset_path": trace,
                "timed_trace_chunk_hash_size": kind.prompt_len,  # one number for each prompt
                "num_prompts": kind.requests,
                "max_concurrency": kind.clients,
                "percentile_metrics": "ttft,tpot",
                "metric_percentiles": "50,99",
                "temperature": 0,
                "ready_check_timeout_sec": 0,  # it would send one more
                "disable_tqdm": True,
                "save_result": True,
                "result_dir": folder,
                "result_filename": found.name,
            }
            process = subprocess.Popen(
                [sys.executable, "-u", "-c", BENCH, *flags(chosen)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            in_time, lines = threading.Timer(self.left(), process.kill), []
            in_time.start()
            with process:
                for line in process.stdout:
                    lines.append(line)
                    if "Starting main benchmark run" in line:
                        begins.set()
            in_time.cancel()
            begins.set()
            told = json.loads(found.read_text()) if found.exists() else {}
            if not told or told["failed"]:
                print("".join(lines)[-4000:], flush=True)
            return told

    def leave(self, kind: Kind, begins: threading.Event) -> int:
        """How many were told what they waited for, and left, while others stay."""
        begins.wait(self.left())

        def leave_one(index: int) -> bool:
            when: dict[str, Any] = {"after": RANDOM.uniform(0.1, 1)}
            if index % 2:
                when = {"told": max(1, self.output_len // 2)}
            prompt = self.tokens(kind.prompt_len)
            try:
                self.server.hang_up(prompt, self.output_len, seconds=self.left(), **when)
            except (OSError, HTTPException) as error:
                print(f"a client that leaves, {kind.prompt_len} tokens: {error}", flush=True)
                return False
            return True

        with ThreadPoolExecutor(kind.clients) as pool:
            return sum(pool.map(leave_one, range(kind.requests)))

    def ask_until(self, done: threading.Event, alone: dict[tuple, Answer]) -> list[bool]:
        """Whether each answer was the one it was alone; once more when there is no load."""
        same = []
        while True:
            is_last = done.is_set()
            for question, expected in alone.items():
                try:
                    answer = ask(self.server, list(question), self.left())
                    same.append(expected.agrees(answer))
                except (OSError, HTTPException) as error:
                    print(f"a question: {error}", flush=True)
                    same.append(False)
            if is_last:
                return same
            done.wait(1)


def flags(chosen: dict[str, Any]) -> list[str]:
    """Options as one gives them to vLLM's commands."""
    said = []
    for name, value in chosen.items():
        if value is None or value is False or value == {}:
            continue
        said.append("--" + name.replace("_", "-"))
        if value is not True:
            said.append(json.dumps(value) if isinstance(value, dict) else str(value))
    return said


@contextlib.contextmanager
def peak_gpu_memory() -> Iterator[list[float]]:
    """GiB in use at most on all GPUs of this machine together; in a list, empty without any."""
    most: list[float] = []
    done = threading.Event()

    def watch() -> None:
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        while not done.wait(1):
            told = subprocess.run(query, capture_output=True, text=True, check=False).stdout
            used = sum(int(line) for line in told.split() if line.isdigit()) / 2**10
            most[:] = [max([used, *most])]

    watching = threading.Thread(target=watch)
    with contextlib.suppress(OSError):  # no nvidia-smi
        subprocess.run(["nvidia-smi"], capture_output=True, check=False)
        watching.start()
    try:
        yield most
    finally:
        done.set()
        if watching.ident is not None:
            watching.join()


def host_memory(server: Server) -> float:
    """GiB of its processes; what several share is divided among them."""
    kib = 0
    for pid in server.processes():
        with contextlib.suppress(OSError):  # it has ended
            told = Path(f"/proc/{pid}/smaps_rollup").read_text()
            kib += sum(int(line.split()[1]) for line in told.splitlines() if line[:4] == "Pss:")
    return kib / 2**20


def run(load: Load, kinds: list[Kind]) -> list[dict[str, Any]]:
    """A row for each kind."""
    server = load.server
    questions = [load.tokens(length) for length in QUESTION_LENGTHS]
    alone = {tuple(question): ask(server, question, load.left()) for question in questions}
    before, start = total(server.metrics(), "num_preemptions_total"), time.monotonic()
    host, done = host_memory(server), threading.Event()
    with peak_gpu_memory() as gpu, ThreadPoolExecutor(2 * len(kinds) + 1) as pool:
        asking = pool.submit(load.ask_until, done, alone)
        begins = [threading.Event() for _ in kinds]
        left = [pool.submit(load.leave, k.leaving, e) for k, e in zip(kinds, begins, strict=True)]
        stayed = [pool.submit(load.stay, k.staying, e) for k, e in zip(kinds, begins, strict=True)]
        try:
            aborted = [one.result() for one in left]
            told = [one.result() for one in stayed]
        finally:
            done.set()
        same = asking.result()
    seconds, usage = time.monotonic() - start, server.settle(SETTLE_SECONDS)
    shared = {
        "output_len": load.output_len,
        "seconds": round(seconds, 1),
        "preemptions": int(total(server.metrics(), "num_preemptions_total") - before),
        "kv_usage_after": usage,
        "gpu_gib_peak": round(gpu[0], 2) if gpu else "",
        "host_gib_before": round(host, 2),
        "host_gib_after": round(host_memory(server), 2),
        "questions": len(same),
        "same": sum(same),
    }
    rows = []
    for kind, found, number in zip(kinds, told, aborted, strict=True):
        row = shared | kind._asdict()
        row |= {"answered": found.get("completed", 0), "aborted": number}
        row["failed"] = kind.requests - row["answered"] - number
        for name, key, scale in (
            ("ttft_p50_s", "p50_ttft_ms", 1e-3),
            ("ttft_p99_s", "p99_ttft_ms", 1e-3),
            ("tpot_p50_ms", "p50_tpot_ms", 1),
            ("tpot_p99_ms", "p99_tpot_ms", 1),
            ("tokens_per_s", "total_token_throughput", 1),
        ):
            row[name] = f"{found[key] * scale:.4g}" if row["answered"] else ""
        row["survived"] = row["failed"] == 0 and all(same) and usage == 0
        rows.append(row)
    return rows


def run_provider(
    provider: engines.Provider, kinds: list[Kind], chosen: dict, options: argparse.Namespace
) -> list[dict[str, Any]]:
    import torch

    on_gpu = torch.cuda.is_available()
    fixed = {
        "served_model_name": SERVED_NAME,
        "dtype": "bfloat16" if on_gpu else "float32",
        "max_num_seqs": options.clients,
        "no_enable_prefix_caching": True,  # no question is answered from what it was alone
    }
    arguments = flags(provider.arguments() | chosen | fixed)
    with serve(arguments, on_gpu, eager=options.enforce_eager or not on_gpu) as server:
        deadline = time.monotonic() + options.seconds
        size = provider.trained().vocab_size
        load = Load(server, provider.model, size, options.output, deadline)
        rows = []
        try:
            rows = run(load, kinds)
        finally:  # it may not even have told its metrics
            if not rows or not all(row["survived"] for row in rows):
                print(server.written()[-8000:], flush=True)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("model", nargs="?", help="a folder")
    what.add_argument("--shape", choices=SHAPES, help="of a known model, with dummy weights")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--long-clients", type=int, help="of these; an eighth, and two at least")
    parser.add_argument("--short", type=int, default=100, help="tokens of a prompt")
    parser.add_argument("--long", type=int, default=100_000)
    parser.add_argument("--output", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=900, help="until what goes on has failed")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "load.csv")
    engines.add_arguments(parser, providers=["reattention"])
    options = parser.parse_args()

    long_clients = options.long_clients or max(2, options.clients // 8)
    long_requests = round(options.requests * long_clients / options.clients)
    kinds = [
        Kind(options.short, options.clients - long_clients, options.requests - long_requests),
        Kind(options.long, long_clients, long_requests),
    ]
    if any(kind.clients < 2 or kind.requests < kind.clients for kind in kinds):
        parser.error(f"each kind must have two clients and a request for each, got {kinds}")
    chosen = engines.arguments(options)
    del chosen["enforce_eager"]  # the server is told apart
    survived = True
    with tempfile.TemporaryDirectory() as folder:
        if options.shape:
            config = SHAPES[options.shape]
            (Path(folder) / "config.json").write_text(json.dumps(config))
            prompts.make_tokenizer(Path(folder), config["vocab_size"])
            chosen["load_format"] = "dummy"
        model = str(options.model or folder)
        about = {"model": options.shape or Path(model).name} | engines.stamp(options)
        for name in options.provider:
            room = max(options.long, max(QUESTION_LENGTHS)) + options.output
            provider = engines.Provider(name, model, room, options.settings)
            rows = run_provider(provider, kinds, chosen, options)
            rows = [row | about | {"provider": name} for row in rows]
            for row in rows:
                print({name: row[name] for name in COLUMNS}, flush=True)
            harness.append(options.out, COLUMNS, rows)
            survived &= all(row["survived"] for row in rows)
    return 0 if survived else 1


if __name__ == "__main__":
    sys.exit(main())
