"""What the benchmarks share: interleaved timing and peak memory, on CPU and GPU; the record of where it ran."""

from __future__ import annotations

import ctypes
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MiB = 2**20
Seconds = dict[str, list[float]]  # of each way, one a round
MIN_ROUNDS = 3  # below this a median says nothing
LIBRARIES = ("triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "nvidia-cutlass-dsl")


def interleaved(ways: Mapping[str, Callable[[], object]], repeats: int) -> tuple[Seconds, Seconds]:
    """Wall and CPU seconds of each way, ``repeats`` times round-robin, so that a busy moment hits all of them.

    On a machine that others use the wall ratio is noise where the CPU ratio still holds (with one thread: waiting
    threads spin).
    """
    wall: Seconds = {name: [] for name in ways}
    cpu: Seconds = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            begin = time.perf_counter(), time.process_time()
            run()
            wall[name].append(time.perf_counter() - begin[0])
            cpu[name].append(time.process_time() - begin[1])
    return wall, cpu


def interleaved_cuda(ways: Mapping[str, Callable[[], object]], repeats: int, budget: float = float("inf")) -> Seconds:
    """GPU seconds of each way between CUDA events, round-robin, ``repeats`` rounds.

    Stops early once ``budget`` seconds have passed, but not before ``MIN_ROUNDS`` rounds. The device is idle when a way
    begins, so that a host that cannot keep up shows, as it would in a training step that synchronises.
    """
    seconds: Seconds = {name: [] for name in ways}
    begin = time.perf_counter()
    for done in range(repeats):
        if done >= MIN_ROUNDS and time.perf_counter() - begin > budget:
            break
        for name, run in ways.items():
            seconds[name].append(_cuda_seconds(run))
    return seconds


def _cuda_seconds(run: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def ratio(seconds: Seconds, slow: str, fast: str) -> float:
    """Median over the rounds of how much longer ``slow`` took than ``fast`` in the same round."""
    return median(a / b for a, b in zip(seconds[slow], seconds[fast]))


def peak_memory(run: Callable[[], object]) -> int:
    """Bytes of resident memory that ``run`` needs above what the process holds before it (Linux).

    The kernel's high-water mark is reset first; freed memory is handed back so that the baseline is honest.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def peak_cuda_memory(run: Callable[[], object]) -> int:
    """Bytes that PyTorch's allocator hands out during ``run`` above what it held before."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def return_freed_memory() -> None:
    """From here on this process hands freed tensors back to the system at once (glibc).

    Otherwise its free lists add hundreds of MiB to ``peak_memory`` by chance.
    """
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 256 * 1024)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, Any]:
    """Hardware, versions and date of a result; libraries that are not installed are left out."""
    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **_libraries(),
        **_gpu(),
    }


def _libraries() -> dict[str, str]:
    versions = {}
    for name in LIBRARIES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _gpu() -> dict[str, Any]:
    if not torch.cuda.is_available():
        return {}
    return {
        "gpu": torch.cuda.get_device_name(),
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    """The commit checked out, with ``+`` where files differ from it; None outside a repository."""
    here = ("git", "-C", str(RESULTS.parent))
    commit = _output_of(*here, "rev-parse", "--short=12", "HEAD")
    return commit and commit + ("+" if _output_of(*here, "status", "--porcelain", "--untracked-files=no") else "")


def _output_of(*command: str) -> str | None:
    """First line that ``command`` prints, or None where it prints none, fails or does not exist."""
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), None)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def save(name: str, result: dict[str, Any], path: Path | None = None) -> Path:
    """Write ``results/<name>.json``, or ``path``, with the machine beside the result."""
    path = path or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path
