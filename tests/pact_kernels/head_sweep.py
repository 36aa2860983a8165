"""Random cases of the head kernels by the error rule, drawn by hypothesis.

`make test` runs a few through ``test_head_sweep.py``; `make sweep` runs 10,000 and records the result:
``python tests/pact_kernels/head_sweep.py --cases 10000``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from oracles import DEVICE
from test_cotrain_loss import make_terms, to_double
from test_cotrain_loss_triton import check_fused
from test_linear_logprob import Problem

from pact_kernels import linear_logprob
from pact_kernels.cotrain_loss.reference import cotrain_loss_reference
from pact_kernels.linear_logprob import launch

FLAG = st.booleans()
CASES = st.fixed_dictionaries(
    {
        "n": st.integers(1, 36),
        "width": st.integers(1, 40),
        "vocab": st.integers(2, 140),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        "spread": st.sampled_from([1e-3, 0.3, 1.0, 3.0, 10.0, 30.0]),
        "shift": st.sampled_from([0.0, 0.0, 0.0, -1000.0]),
        "repeats": FLAG,
        "bias": FLAG,
        "temperature": FLAG,
        "softcap": st.sampled_from([None, None, 0.5, 2.0, 50.0]),
        "entropy": FLAG,
        "kl_coef": st.sampled_from([0.0, 0.05]),
        "entropy_coef": st.sampled_from([0.0, 0.02]),
        "split": st.sampled_from([64, 128, 2048]),
        "chunk": st.sampled_from([1, 2, 99]),
        "seed": st.integers(0, 2**16),
    }
)


def check(case: dict) -> None:
    """Forward and backward of linear_logprob and of linear_cotrain_loss, with splits and chunks of the case's sizes."""
    case = dict(case)
    kl_coef, entropy_coef, chunk = (case.pop(name) for name in ("kl_coef", "entropy_coef", "chunk"))
    tile = launch.HEAD_TILES["interpreter"][4].block_n
    launch.SPLIT_COLUMNS = case.pop("split")
    launch.BUDGET = launch.ChunkBudget(dlogits=chunk * tile * case["vocab"] * case["dtype"].itemsize)
    if case.pop("repeats"):
        case["r"] = max(1, case["n"] // 3)
    n, width, vocab = (case.pop(name) for name in ("n", "width", "vocab"))
    problem = Problem.random(n, width, vocab, **case).to(DEVICE)
    problem.check(partial(linear_logprob, backend="triton"), problem.scale())

    terms = make_terms(problem.exact_logp().float().cpu(), problem.target.cpu(), seed=case["seed"]).to(DEVICE)
    options = {"clip_low": 0.15, "clip_high": 0.3, "kl_coef": kl_coef, "entropy_coef": entropy_coef}
    logp = problem.exact_logp().requires_grad_()
    entropy = torch.zeros_like(logp).requires_grad_()
    loss = cotrain_loss_reference(logp, to_double(terms), entropy=entropy, **options).loss
    problem.c, problem.e = torch.autograd.grad(3 * loss, (logp, entropy))
    head = {name: getattr(problem, name) for name in ("hidden", "weight", "rows", "bias", "softcap", "temperature")}
    check_fused(head, problem.target, terms, options, problem.scale())


def sweep(cases: int, seed: int = 0) -> int:
    """Run ``cases`` random cases; the number that passed. Raises on the first failure, made small by hypothesis."""
    passed, started = 0, time.time()

    @settings(
        max_examples=cases,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(CASES)
    def run(case: dict) -> None:
        nonlocal passed
        check(case)
        passed += 1
        if passed % 100 == 0:
            print(f"seed {seed}: {passed} of {cases} cases, {time.time() - started:.0f} s", flush=True)

    with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # numpy on masked lanes of the interpreter
        seeded(seed)(run)()
    return passed


def record(seed: int, cases: int, seconds: float) -> str:
    """Put a share that passed into ``benchmarks/results/head_sweep.json``, beside those of other seeds."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    from measure import RESULTS, machine, save

    path = RESULTS / "head_sweep.json"
    shares = json.loads(path.read_text())["shares"] if path.exists() else []
    about = {name: machine().get(name) for name in ("date", "commit", "torch", "triton")}
    share = {"seed": seed, "cases": cases, "failures": 0, "seconds": round(seconds), "device": DEVICE.type, **about}
    shares = sorted([*(each for each in shares if each["seed"] != seed), share], key=lambda each: each["seed"])
    total = sum(each["cases"] for each in shares)
    save("head_sweep", {"cases": total, "failures": 0, "shares": shares})
    return f"seed {seed}: {cases} cases, 0 failures, {seconds:.0f} s; {total} cases in {path}"


def main() -> None:
    """Run a share and a seed a process, and record each that passes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--first_seed", type=int, default=0, help="shares take this seed and those after it")
    arguments = parser.parse_args()
    n, share = arguments.processes, arguments.cases // arguments.processes
    cases = {arguments.first_seed + i: share + (i < arguments.cases % n) for i in range(n)}
    started = time.time()
    with ProcessPoolExecutor(
        n, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        shares = {pool.submit(sweep, cases[seed], seed): seed for seed in cases}
        for done in as_completed(shares):
            seed = shares[done]
            passed = done.result()
            if passed != cases[seed]:
                raise SystemExit(f"seed {seed}: {passed} cases ran instead of {cases[seed]}: not recorded")
            print(record(seed, passed, time.time() - started), flush=True)


if __name__ == "__main__":
    main()
