"""What was served, on vLLM's own /metrics.

Workers count on the host, from lengths it knows and from what samples bring there, and keep their
counts in mapped files of a directory that the server's process made and named in the environment. A
collector there reads them when it is asked: no message, no lock, nothing waits for a GPU.
"""

import atexit
import fcntl
import functools
import logging
import os
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from prometheus_client import REGISTRY
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector

from csrc_triton.layout import Scope
from vllm_reattention.times import STAGES

DIRECTORY = "REATTENTION_METRICS_DIR"  # made by us: not a setting
EDGES = 2 ** np.arange(7, 23)  # of a histogram, in tokens: 128 to 4M
SHARES = [n / 10 for n in range(1, 11)]  # of another
PREFIX, OWNER = "reattention-", "owner"
LOG_SECONDS = 60
SUFFIX = ".counts"
RECORD = np.dtype(
    [
        ("model_name", "S256"),
        ("engine", np.int64),
        ("worker", np.int64),
        ("rows_selected", np.int64),
        ("rows_dense", np.int64),
        ("blocks_recalled", np.int64),
        ("context_up_to", np.int64, len(EDGES)),  # rows with so many keys or fewer
        ("context_sum", np.int64),
        ("shares_up_to", np.int64, len(SHARES)),  # so much or less of the softmax
        ("shares", np.int64),
        ("shares_sum", np.float64),
        ("timed_tokens", np.int64),
        ("stage_seconds", np.float64, len(STAGES)),
    ]
)
COUNTERS = {
    "rows_selected": "Query tokens that attended to a scope chosen for them.",
    "rows_dense": "Query tokens that attended to everything before them.",
    "blocks_recalled": "Blocks recalled for a KV head of a layer, one set per tile of queries.",
    "timed_tokens": "Query tokens of the steps whose stages were timed.",
}
CONTEXT = "Query tokens by the keys before them, themselves included."
SHARE = (
    "Sampled query heads by their share of the softmax in recalled blocks: of the softmax without "
    "positions over all blocks between global and local, for one query and KV head of each layer "
    "that selects."
)
STAGE_SECONDS = "Time on the device of a stage in all layers, in the steps that were timed."
LABELS = ("model_name", "engine", "worker")

logger = logging.getLogger("vllm.reattention")


class Counts:
    """Those of one worker, since its start."""

    def __init__(self, model_name: str, engine: int, worker: int):
        folder = os.environ.get(DIRECTORY, "")
        if os.path.isdir(folder):
            file, path = tempfile.mkstemp(dir=folder)
            os.close(file)
            self.record: np.ndarray = np.memmap(path, RECORD, "w+", shape=1)
            os.rename(path, path + SUFFIX)  # from now on it is complete
        else:  # started by nobody who asks, or on another machine
            self.record = np.zeros(1, RECORD)
        self.record["model_name"] = model_name.encode()
        self.record["engine"], self.record["worker"] = engine, worker
        self.told_at, self.told = time.monotonic(), (0, 0)

    def __getitem__(self, name: str) -> int:
        return int(self.record[name][0])

    def add(
        self,
        seq_lens: np.ndarray,
        num_tokens: np.ndarray,
        num_decodes: int,
        dense_limits: np.ndarray,
        scope: Scope,
        block_size: int,
    ) -> int:
        """A step; returns how many of its query tokens select.

        seq_lens     [num_requests] int64, with the step's tokens
        num_tokens   [num_requests] int64, of the step
        num_decodes  requests, the first, whose every token is a tile of its own
        dense_limits [num_requests], tokens up to which each attends to everything
        """
        context = seq_lens - num_tokens
        selected = (seq_lens - dense_limits).clip(0, num_tokens)
        first = np.maximum(context, dense_limits)
        tiles = np.where(selected > 0, (seq_lens - 1) // block_size - first // block_size + 1, 0)
        tiles[:num_decodes] = selected[:num_decodes]
        record = self.record[0]
        record["rows_selected"] += selected.sum()
        record["rows_dense"] += num_tokens.sum() - selected.sum()
        record["blocks_recalled"] += tiles[:num_decodes].sum() * scope.of(1).recall_blocks
        record["blocks_recalled"] += tiles[num_decodes:].sum() * scope.of(block_size).recall_blocks
        record["context_up_to"] += (EDGES - context[:, None]).clip(0, num_tokens[:, None]).sum(0)
        record["context_sum"] += (num_tokens * (context + seq_lens + 1) // 2).sum()
        self._tell()
        return int(selected.sum())

    def add_shares(self, up_to: list[float], number: float, total: float) -> None:
        """A sampled step: how many shares are up to each of SHARES, how many in all, their sum."""
        record = self.record[0]
        record["shares_up_to"] += np.array(up_to, dtype=np.int64)
        record["shares"] += int(number)
        record["shares_sum"] += total

    def add_times(self, seconds: dict[str, float], tokens: int) -> None:
        """A timed step, by stage, and its query tokens."""
        record = self.record[0]
        record["timed_tokens"] += tokens
        record["stage_seconds"] += [seconds.get(stage, 0.0) for stage in STAGES]

    def _tell(self) -> None:
        """A line in the log a minute at most, from one worker of each engine."""
        seconds = time.monotonic() - self.told_at
        if seconds < LOG_SECONDS or self["worker"]:
            return
        rows = self["rows_selected"], self["rows_dense"]
        selected, dense = (now - before for now, before in zip(rows, self.told, strict=True))
        self.told_at, self.told = time.monotonic(), rows
        logger.info(
            "ReAttention: %d query tokens selected what they attended to and %d attended to "
            "everything, in %.0f s",
            selected,
            dense,
            seconds,
        )


class Collector:
    """Of all workers' counts, for prometheus_client.

    vLLM drops collectors of earlier engines by their attribute _name, which this has not.
    """

    def collect(self) -> Iterator[Metric]:
        records: dict[tuple, np.ndarray] = defaultdict(lambda: np.zeros((), RECORD))
        for path in Path(os.environ[DIRECTORY]).glob("*" + SUFFIX):
            (new,) = np.fromfile(path, RECORD)
            labels = (
                new["model_name"].decode(errors="ignore"),
                str(new["engine"]),
                str(new["worker"]),
            )
            for name in set(RECORD.names or ()) - set(LABELS):
                records[labels][name] += new[name]
        for name, about in COUNTERS.items():
            counter = CounterMetricFamily(f"vllm:reattention_{name}", about, labels=LABELS)
            for labels, record in records.items():
                counter.add_metric(labels, int(record[name]))
            yield counter
        context = HistogramMetricFamily("vllm:reattention_context_tokens", CONTEXT, labels=LABELS)
        share = HistogramMetricFamily("vllm:reattention_recalled_share", SHARE, labels=LABELS)
        labelled = (*LABELS, "stage")
        seconds = CounterMetricFamily(
            "vllm:reattention_stage_seconds", STAGE_SECONDS, labels=labelled
        )
        for labels, record in records.items():
            for stage, value in zip(STAGES, record["stage_seconds"], strict=True):
                seconds.add_metric((*labels, stage), float(value))
            rows = record["rows_selected"] + record["rows_dense"]
            buckets = _buckets(EDGES, record["context_up_to"], rows)
            context.add_metric(labels, buckets, int(record["context_sum"]))
            buckets = _buckets(SHARES, record["shares_up_to"], record["shares"])
            share.add_metric(labels, buckets, float(record["shares_sum"]))
        yield context
        yield share
        yield seconds


def _buckets(edges: Iterable[float], up_to: np.ndarray, total: np.ndarray) -> list[tuple[str, int]]:
    counts = [(str(float(edge)), int(count)) for edge, count in zip(edges, up_to, strict=True)]
    return [*counts, ("+Inf", int(total))]


def _make_directory() -> str:
    """Gone with this process; if that is killed, with the next server's start.

    A file in it stays locked as long as the process lives, or one that it forked.
    """
    path = Path(tempfile.mkdtemp(prefix=PREFIX))
    lock = (path / "new").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.rename(lock.name, path / OWNER)  # nobody sees it without its lock

    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # and no process that it forked
            shutil.rmtree(path, ignore_errors=True)
        lock.close()

    atexit.register(remove)
    return str(path)


def _remove_what_others_left() -> None:
    for path in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        with suppress(OSError):  # its owner lives, or somebody else was faster
            if path.lstat().st_uid == os.getuid():
                with (path / OWNER).open("r+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(path)  # which refuses links


@functools.cache
def export() -> None:
    """In the server's process, before workers start: theirs is the directory of their parent."""
    if DIRECTORY not in os.environ:
        _remove_what_others_left()
        os.environ[DIRECTORY] = _make_directory()
    collector = Collector()
    REGISTRY.register(collector)
    merged = MultiProcessCollector.collect

    # Where several processes serve, every request for metrics makes a registry with nothing but
    # what this collector finds in files of its own format.
    def collect(self):
        yield from merged(self)
        yield from collector.collect()

    MultiProcessCollector.collect = collect
