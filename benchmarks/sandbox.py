"""Short tool calls a second through the sandbox, with 1 and 2 workers, from as many threads.

python benchmarks/sandbox.py      a printed table, and results/sandbox.json
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from measure import save

from pact.sandbox import Sandbox

GOAL = 200.0  # calls a second of two workers on two cores


def distance(latitude: float, longitude: float, places: dict[str, list[float]]) -> dict[str, float]:
    """A tool of the usual size: a loop, some arithmetic, a dict. Kilometres on the sphere."""
    import math

    found = {}
    for name, (north, east) in places.items():
        a, b = math.radians(north - latitude) / 2, math.radians(east - longitude) / 2
        h = math.sin(a) ** 2 + math.cos(math.radians(latitude)) * math.cos(math.radians(north)) * math.sin(b) ** 2
        found[name] = round(2 * 6371 * math.asin(math.sqrt(h)), 1)
    return found


SOURCE = inspect.getsource(distance)
ARGUMENTS = {"latitude": 52.5, "longitude": 13.4, "places": {"Paris": [48.86, 2.35], "Rome": [41.9, 12.5]}}
RESULT = json.dumps(distance(**ARGUMENTS))  # type: ignore[arg-type]


def numpy_packages() -> list[Path]:
    """numpy, and the folder of shared libraries that its wheels have beside it on some systems."""
    spec = importlib.util.find_spec("numpy")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent
    return [path for path in (folder, folder.with_name("numpy.libs")) if path.exists()]


def calls_a_second(sandbox: Sandbox, workers: int, calls: int) -> float:
    """Of ``calls`` calls made from ``workers`` threads; RuntimeError when one is answered wrongly."""
    with ThreadPoolExecutor(workers) as pool:
        begin = time.perf_counter()
        outputs = [
            call.output for call in pool.map(lambda _: sandbox.call(SOURCE, "distance", ARGUMENTS), range(calls))
        ]
        seconds = time.perf_counter() - begin
    if set(outputs) != {RESULT}:
        raise RuntimeError(f"a call was answered {set(outputs) - {RESULT}}")
    return calls / seconds


def measure(counts: Sequence[int], calls: int, rounds: int) -> list[dict[str, Any]]:
    """Every number of workers in turn, ``rounds`` times; with bare workers, and with numpy preloaded into them."""
    ways: dict[str, Callable[..., Sandbox]] = {
        "bare": Sandbox,
        "numpy preloaded": partial(Sandbox, packages=numpy_packages(), preload=["numpy"]),
    }
    cells: dict[tuple[str, int], list[float]] = {(way, workers): [] for way in ways for workers in counts}
    for _ in range(rounds):
        for (way, workers), rates in cells.items():
            with ways[way](workers=workers) as sandbox:
                calls_a_second(sandbox, workers, 2 * workers)  # starts the workers
                rates.append(calls_a_second(sandbox, workers, calls))
    return [
        {"worker": way, "workers": workers, "calls_per_s": rates, "median": median(rates)}
        for (way, workers), rates in cells.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    cells = measure((1, 2), arguments.calls, arguments.rounds)
    print(f"{arguments.calls} calls a round, {arguments.rounds} interleaved rounds; goal {GOAL:g} a second on 2 cores")
    print(f"{'worker':16} {'workers':>7} {'calls/s (median)':>17} {'range':>13}")
    for cell in cells:
        rates = cell["calls_per_s"]
        spread = f"{min(rates):.0f}..{max(rates):.0f}"
        print(f"{cell['worker']:16} {cell['workers']:7d} {cell['median']:17.0f} {spread:>13}")
    result = {"goal": GOAL, "calls": arguments.calls, "cells": cells}
    print(f"written to {save('sandbox', result)}")


if __name__ == "__main__":
    main()
