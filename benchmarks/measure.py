"""What the benchmarks share: interleaved timing, peak memory of this process, the record of where it ran."""

from __future__ import annotations

import ctypes
import datetime
import gc
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
MiB = 2**20
Seconds = dict[str, list[float]]  # of each way, one a round


def interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> tuple[Seconds, Seconds]:
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


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def machine() -> dict[str, Any]:
    """Hardware, versions and date of a result."""
    import transformers

    cpu = next(
        (line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), platform.processor()
    )
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def save(name: str, result: dict[str, Any]) -> Path:
    """Write ``results/<name>.json`` with the machine beside the result."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n")
    return path
