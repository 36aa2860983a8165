"""Runs thousands of random cases in several processes and records how many passed. Knows nothing of what they check."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.strategies import SearchStrategy
from interpreting import patch_once_a_launch
from oracles import DEVICE

Check = Callable[[Any], None]


def sweep(check: Check, cases: SearchStrategy, number: int, seed: int = 0) -> int:
    """Run ``number`` random cases; how many passed. Raises on the first failure, made small by hypothesis."""
    passed, started = 0, time.time()
    patch_once_a_launch()

    @settings(
        max_examples=number,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def run(case: Any) -> None:
        nonlocal passed
        check(case)
        passed += 1
        if passed % 100 == 0:
            print(f"seed {seed}: {passed} of {number} cases, {time.time() - started:.0f} s", flush=True)

    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # numpy on masked lanes of the interpreter
        seeded(seed)(run)()
    return passed


def record(name: str, seed: int, cases: int, seconds: float) -> str:
    """Put a share that passed into ``benchmarks/results/<name>.json``, beside those of other seeds."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from measure import RESULTS, machine, save

    path = RESULTS / f"{name}.json"
    shares = json.loads(path.read_text())["shares"] if path.exists() else []
    about = {key: machine().get(key) for key in ("date", "commit", "torch", "triton")}
    share = {"seed": seed, "cases": cases, "failures": 0, "seconds": round(seconds), "device": DEVICE.type, **about}
    shares = sorted([*(each for each in shares if each["seed"] != seed), share], key=lambda each: each["seed"])
    total = sum(each["cases"] for each in shares)
    save(name, {"cases": total, "failures": 0, "shares": shares})
    return f"seed {seed}: {cases} cases, 0 failures, {seconds:.0f} s; {total} cases in {path}"


def main(name: str, share: Callable[[int, int], int], description: str | None) -> None:
    """Run ``share(cases, seed)`` in each process, and record each that passes."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--shares", type=int, help="more of them than processes lose less to a stop (default: as many)")
    parser.add_argument("--first_seed", type=int, default=0, help="shares take this seed and those after it")
    arguments = parser.parse_args()
    n = arguments.shares or arguments.processes
    cases = {arguments.first_seed + i: arguments.cases // n + (i < arguments.cases % n) for i in range(n)}
    started = time.time()
    with ProcessPoolExecutor(
        arguments.processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        shares = {pool.submit(share, cases[seed], seed): seed for seed in cases}
        for done in as_completed(shares):
            seed = shares[done]
            passed = done.result()
            if passed != cases[seed]:
                raise SystemExit(f"seed {seed}: {passed} cases ran instead of {cases[seed]}: not recorded")
            print(record(name, seed, passed, time.time() - started), flush=True)
