"""What is counted, against counting one token after the other; and who reads it."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from random import Random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from csrc_triton.layout import Scope
from vllm_reattention import metrics, times

BLOCK, DENSE, RECALLED, RECALLED_IN_DECODE = 32, 128, 4, 2
SCOPE = Scope(1, 5, 2, DENSE // BLOCK, single_recall=RECALLED_IN_DECODE, read_recall=RECALLED)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(metrics.DIRECTORY, str(tmp_path))
    return tmp_path


def step(
    counts: metrics.Counts,
    requests: list[tuple[int, int]],
    num_decodes: int = 0,
    limits: list[int] | None = None,
) -> None:
    """requests: what each has in its cache, and its new tokens."""
    context, new = np.array(requests, dtype=np.int64).T
    dense = np.array(limits or [DENSE] * len(requests))
    counts.add(context + new, new, num_decodes, dense, SCOPE, BLOCK)


def read(name: str) -> dict[tuple[str, ...], float]:
    """By the labels of each series."""
    return {
        tuple(sample.labels.values()): sample.value
        for family in metrics.Collector().collect()
        for sample in family.samples
        if sample.name == f"vllm:reattention_{name}"
    }


def test_requests_that_only_pad_a_batch_are_left_out():
    from vllm_reattention.metadata import _host_lengths

    padded = SimpleNamespace(
        query_start_loc_cpu=torch.tensor([0, 1, 2, 10, 10], dtype=torch.int32),
        seq_lens_cpu_upper_bound=torch.tensor([300, 1, 8, 0], dtype=torch.int32),
        is_prefilling=torch.tensor([False, False, True]),  # of real requests alone
    )
    seq_lens, num_tokens = _host_lengths(padded)
    assert seq_lens.tolist() == [300, 1, 8]
    assert num_tokens.tolist() == [1, 0, 8]  # the second is a dummy


@pytest.mark.parametrize("seed", range(20))
def test_counting_equals_counting_one_by_one(seed):
    random = Random(seed)
    num_decodes = random.randrange(4)
    requests = [(random.randrange(400), random.randrange(4)) for _ in range(num_decodes)]
    requests += [(random.randrange(300), random.randrange(300)) for _ in range(3)]
    limits = [random.choice((DENSE, 2 * DENSE)) for _ in requests]
    counts = metrics.Counts("m", 0, 0)
    step(counts, requests, num_decodes, limits)

    selected, singles, tiles, seen = 0, 0, set(), []
    for request, (context, new) in enumerate(requests):
        for position in range(context, context + new):
            seen.append(position + 1)
            if position >= limits[request]:
                selected += 1
                single = request < num_decodes
                tiles.add((request, position if single else position // BLOCK))
                singles += single
    assert counts["rows_selected"] == selected
    assert counts["rows_dense"] == len(seen) - selected
    others = len(tiles) - singles
    assert counts["blocks_recalled"] == others * RECALLED + singles * RECALLED_IN_DECODE
    assert counts["context_sum"] == sum(seen)
    up_to = [sum(keys <= edge for keys in seen) for edge in metrics.EDGES]
    assert counts.record["context_up_to"][0].tolist() == up_to


def test_workers_stand_apart_and_one_started_anew_goes_on(folder):
    step(metrics.Counts("a model", 0, 0), [(200, 1)], num_decodes=1)
    step(metrics.Counts("a model", 0, 0), [(0, 10), (500, 1)])
    step(metrics.Counts("a model", 0, 1), [(200, 1)], num_decodes=1)
    first, second = (("a model", "0", worker) for worker in "01")
    assert read("rows_selected_total") == {first: 2, second: 1}
    assert read("rows_dense_total") == {first: 10, second: 0}
    buckets = read("context_tokens_bucket")
    assert [buckets[(*first, edge)] for edge in ("128.0", "256.0", "+Inf")] == [10, 11, 12]


def test_shares_add_up_over_workers_started_anew(folder):
    for up_to in ([0] * 9 + [2], [0] * 4 + [3] * 6):
        metrics.Counts("m", 0, 0).add_shares(up_to, up_to[-1], up_to[-1] / 2)
    labels = ("m", "0", "0")
    buckets = read("recalled_share_bucket")
    assert [buckets[(*labels, edge)] for edge in ("0.4", "0.5", "1.0", "+Inf")] == [0, 3, 5, 5]
    assert read("recalled_share_sum") == {labels: 2.5}


def test_times_add_up_over_workers_started_anew(folder):
    for seconds in ({"attend": 2.0}, {"attend": 1.0, "score_blocks": 0.5}):
        metrics.Counts("m", 0, 0).add_times(seconds, 100)
    told = {labels[-1]: value for labels, value in read("stage_seconds_total").items()}
    assert told == dict.fromkeys(times.STAGES, 0) | {"score_blocks": 0.5, "attend": 3}
    assert read("timed_tokens_total") == {("m", "0", "0"): 200}


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_stages_are_timed_without_waiting(device, monkeypatch):
    now, told = [0.0], []
    monkeypatch.setattr(times.time, "monotonic", lambda: now[0])
    stages = SimpleNamespace(**{name: lambda x, y=1: x * y for name in times.STAGES})
    timer = times.StageTimes(device)
    assert timer.is_due
    timer.begin(64)
    timed, matrix = timer.around(stages), torch.ones(2000, 2000, device=device)
    assert timed.attend(matrix, y=matrix).shape == (2000, 2000) and timed.attend(3) == 3
    assert timed.recall_blocks(matrix).shape == (2000, 2000)
    if device == "cuda":
        torch.cuda.synchronize()
    now[0] = 2 * times.SECONDS
    assert not timer.is_due  # what was sampled was not collected yet
    timer.collect(lambda *sample: told.append(sample))
    timer.collect(None)  # which it need not call again
    ((seconds, tokens),) = told
    assert tokens == 64 and set(seconds) == {"attend", "recall_blocks"}
    assert 0 < seconds["recall_blocks"] < 60 and 0 < seconds["attend"] < 60
    assert timer.is_due
    timer.begin(1)
    now[0] += times.SECONDS / 2
    assert not timer.is_due


def test_one_server_and_several_tell_the_same(folder, monkeypatch):
    monkeypatch.setattr(metrics, "REGISTRY", CollectorRegistry(auto_describe=True))
    monkeypatch.setattr(MultiProcessCollector, "collect", MultiProcessCollector.collect)
    metrics.export.__wrapped__()
    step(metrics.Counts("m", 0, 0), [(200, 3)])
    several = CollectorRegistry()
    MultiProcessCollector(several, str(folder))
    for registry in (metrics.REGISTRY, several):
        text = generate_latest(registry).decode()
        assert (
            'vllm:reattention_rows_selected_total{engine="0",model_name="m",worker="0"} 3' in text
        )


def test_the_servers_directory_goes_with_it_and_not_with_what_it_forked():
    code = f"""if True:
        import os, sys
        from vllm_reattention import metrics
        metrics.export()
        path = os.environ["{metrics.DIRECTORY}"]
        child = os.fork()
        if not child:
            sys.exit()
        os.waitpid(child, 0)
        print(os.path.exists(path), path)
    """
    environment = {name: value for name, value in os.environ.items() if name != metrics.DIRECTORY}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    existed, path = done.stdout.split()
    assert existed == "True" and not os.path.exists(path)


def test_a_name_is_cut_between_letters(folder):
    metrics.Counts("x" + 200 * "é", engine=0, worker=0)
    ((name, *_),) = read("rows_selected_total")
    assert name == "x" + 127 * "é"


def test_what_a_killed_server_left_goes_when_the_next_one_starts(tmp_path, monkeypatch):
    code = "import os; from vllm_reattention import metrics as m; m.export(); "
    code += f"print(os.environ['{metrics.DIRECTORY}'], flush=True); input()"
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    environment.pop(metrics.DIRECTORY, None)

    def start() -> tuple[subprocess.Popen, Path]:
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        return process, Path(process.stdout.readline().strip())

    somebody_elses = tmp_path / "reattention-of-mine"
    somebody_elses.mkdir()
    (killed, its), (alive, stays) = start(), start()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / metrics.OWNER).touch()
    (tmp_path / "reattention-link").symlink_to(elsewhere)
    killed.kill()
    killed.wait()
    (its / f"x{metrics.SUFFIX}").touch()
    assert its.parent == tmp_path
    with monkeypatch.context() as patch:
        patch.setattr(metrics.tempfile, "tempdir", str(tmp_path))
        patch.setattr(metrics.os, "getuid", lambda: -1)
        metrics._remove_what_others_left()
    assert its.exists()  # a server of another user
    third, new = start()
    assert not its.exists()
    assert stays.exists() and new.exists() and somebody_elses.exists()
    assert (elsewhere / metrics.OWNER).exists()
    for process in (alive, third):
        process.communicate("\n")
    assert not stays.exists() and not new.exists()


def test_without_a_server_it_counts_for_itself(folder, monkeypatch):
    monkeypatch.setenv(metrics.DIRECTORY, str(folder / "of another machine"))
    counts = metrics.Counts("m", 0, 0)
    step(counts, [(200, 1)])
    assert counts["rows_selected"] == 1 and not os.listdir(folder)


def test_a_line_a_minute_from_one_worker(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "vllm.reattention")
    monkeypatch.setattr(metrics.logger, "propagate", True)
    now = [1000]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    first, second = metrics.Counts("m", 0, 0), metrics.Counts("m", 0, 1)
    for now[0] in range(1000, 1150, 10):
        step(first, [(0, 100), (200, 1)])
        step(second, [(0, 100), (200, 1)])
    counted = "ReAttention: {} query tokens selected what they attended to and {} attended to"
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith(counted.format(7, 700)) and lines[0].endswith("in 60 s")
    assert lines[1].startswith(counted.format(6, 600))
